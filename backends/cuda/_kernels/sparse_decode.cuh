// What decoding over selected FP8 records is made of: what a call says, what a block keeps in
// shared memory, how codes become factors, and the two products.

#pragma once

#include "hopper_gemm.cuh"

#ifndef HEADS
#define HEADS 64
#endif
#ifndef MODE
#define MODE 0
#endif

typedef unsigned long long u64;

#define INFINITE __int_as_float(0x7f800000)

// How a row's keys are shared out: evenly, for another kernel to join where there are several
// pieces; among workers, as a schedule says; among the blocks of a cluster, which join themselves;
// among workers of `span` blocks of keys each, whatever rows these are of.
enum { ALONE, PLANNED, JOINED, EVEN };

constexpr int KEYS = 64, LATENT = 512, DIM = 576, ROPE_AT = 528, RECORD = 656;
constexpr int CHUNKS = LATENT / 64;  // columns are decoded and multiplied 64 at a time
constexpr int COLUMNS = HEADS / 8;   // groups of eight heads
constexpr int STAGES = 2;            // blocks of keys that are kept
constexpr int CLUSTER = 8;           // pieces that a cluster joins
constexpr float SLACK = 16;          // powers of two by which weights may outgrow their reference
constexpr float LN2 = 0.6931471805599453f;

// A call. Strides count elements, of pages bytes.
struct Work {
    const unsigned short* q;
    long long q_batch, q_next, q_head;
    const unsigned char* pages;
    long long page_bytes;
    const int* indices;
    long long index_batch, index_next, index_k;
    const int* lengths;  // or null
    long long length_batch, length_next;
    const float* sink;  // or null
    unsigned short* out;
    float *lse, *part, *part_lse;
    const int *schedule, *num_splits;
    float scale_log2;
    int rows, next_n, heads, k, page_size, slots;
    int span, splits;  // blocks of keys of a piece, pieces of a row (EVEN: at most)
    unsigned magic;    // slot / page_size is slot * magic >> shift
    int shift;
};

// `count` of a row's blocks of keys, from `first` on. If `direct`, they are all it has. After the
// piece come `unused` places for pieces that this row has not.
struct Item {
    int row, batch, next, first, count, length, piece, unused;
    bool direct;
};

// Tiles have rows of 128 bytes, swizzled. Weights and keys lie key by key, the keys' columns in
// parts of 64; the first eight parts are the values too.
struct Shared {
    unsigned char q[CHUNKS + 1][HEADS * 128];
    unsigned char keys[STAGES][CHUNKS + 1][KEYS * 128];
    unsigned char weights[KEYS * 128];  // in the end a cluster's shares, float [CLUSTER][64]
    float reference[64];                // of each head's exponents
    float share[64];  // what a head's sums are multiplied with in the end, or its sum of weights
    float most[4][64];
    float factor[64];  // by which earlier sums shrink, if `rescale`
    int rescale;
    unsigned char valid[STAGES][KEYS];
    u64 ready[STAGES], spent[STAGES], full, empty, ended;  // of keys, of weights, and of a row
};

__device__ __forceinline__ Item item_of(const Work& w, int row, int first, int end, int piece,
                                        bool direct, int unused = 0) {
    int batch = row / w.next_n, next = row % w.next_n, length = w.k;
    if (w.lengths)
        length = min(length, w.lengths[batch * w.length_batch + next * w.length_next]);
    end = min(end, (length + KEYS - 1) / KEYS);
    return {row, batch, next, first, max(0, end - first), length, piece, unused, direct};
}

__device__ __forceinline__ const int* indices_of(const Work& w, const Item& item) {
    return w.indices + item.batch * w.index_batch + item.next * w.index_next;
}

__device__ __forceinline__ long long lse_at(const Work& w, const Item& item, int head) {
    return (static_cast<long long>(item.batch) * w.heads + head) * w.next_n + item.next;
}

// Where the record in a slot lies; null if that is none. What a slot outside the pool means is
// undefined: here it is no key.
__device__ __forceinline__ const unsigned char* record_at(const Work& w, int slot) {
    if (slot < 0 || slot >= w.slots) return nullptr;
    const unsigned page = static_cast<unsigned>(static_cast<u64>(slot) * w.magic >> w.shift);
    const long long token = slot - static_cast<int>(page) * w.page_size;
    return w.pages + page * w.page_bytes + token * RECORD;
}

// -- memory and barriers --------------------------------------------------------------------------

// Whether any thread of the first warpgroup says so.
__device__ __forceinline__ bool any_of(bool mine) {
    int any;
    asm volatile(
        "{\n.reg .pred in, out;\nsetp.ne.s32 in, %1, 0;\n"
        "barrier.cta.red.or.pred out, 1, 128, in;\nselp.s32 %0, 1, 0, out;\n}\n"
        : "=r"(any)
        : "r"(static_cast<int>(mine))
        : "memory");
    return any;
}

// What this thread stored is there for the matrix unit once a barrier says that it came so far.
__device__ __forceinline__ void fence_async() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void store16(unsigned at, unsigned a, unsigned b, unsigned c,
                                        unsigned d) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(a), "r"(b), "r"(c),
                 "r"(d));
}

__device__ __forceinline__ void store8(unsigned at, float a, float b) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(at), "f"(a), "f"(b));
}

__device__ __forceinline__ void store4(unsigned at, unsigned a) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"(a));
}

// Records begin at any multiple of 16, so that two loads share most 32-byte sectors at their ends:
// lines stay in the first cache.
__device__ __forceinline__ uint4 load16(const unsigned char* at) {
    uint4 v;
    asm volatile("ld.global.nc.L1::evict_last.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(at));
    return v;
}

__device__ __forceinline__ void prefetch(const unsigned char* record) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(record));
}

__device__ __forceinline__ float cluster_float(unsigned shared, int rank) {
    unsigned there;
    float v;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared), "r"(rank));
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(v) : "r"(there) : "memory");
    return v;
}

// -- arithmetic -----------------------------------------------------------------------------------

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ unsigned pack(float low, float high) {
    unsigned both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

__device__ __forceinline__ unsigned times(unsigned a, unsigned b) {
    unsigned c;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
    return c;
}

// Four e4m3 codes to bf16 pairs (0, 2) and (1, 3). A code's bits, moved to where bf16 has exponent
// and fraction, are its value times 2^-120, subnormal or not; `scale` holds what makes up for that,
// and so stays below 2^8. The code of NaN becomes 480.
__device__ __forceinline__ void decode(unsigned codes, unsigned scale, unsigned& even,
                                       unsigned& odd) {
    even = times(((codes << 4) & 0x07f007f0u) | ((codes << 8) & 0x80008000u), scale);
    odd = times(((codes >> 4) & 0x07f007f0u) | (codes & 0x80008000u), scale);
}

// -- products -------------------------------------------------------------------------------------

// Of a tile of rows of 128 bytes: `leading` bytes lie between parts of 64 columns that fill a row,
// `stride` bytes between groups of eight rows.
__device__ __forceinline__ u64 descriptor(unsigned at, unsigned leading, unsigned stride) {
    return static_cast<u64>((at & 0x3ffff) >> 4) | static_cast<u64>(leading >> 4) << 16 |
           static_cast<u64>(stride >> 4) << 32 | 1ull << 62;
}

#define R4(a, i) "+f"(a[i]), "+f"(a[i + 1]), "+f"(a[i + 2]), "+f"(a[i + 3])
#define R16(a, i) R4(a, i), R4(a, i + 4), R4(a, i + 8), R4(a, i + 12)
#define R32(a, i) R16(a, i), R16(a, i + 16)

// d[64 keys, HEADS] = keys [64, 16] queries^T [16, HEADS], plus d if `add`.
__device__ __forceinline__ void mma_scores(float (&d)[COLUMNS * 4], u64 a, u64 b, int add) {
#if HEADS == 64
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "%32, %33, p, 1, 1, 0, 0;\n}\n"
        : R32(d, 0)
        : "l"(a), "l"(b), "r"(add));
#elif HEADS == 32
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
        "%16, %17, p, 1, 1, 0, 0;\n}\n"
        : R16(d, 0)
        : "l"(a), "l"(b), "r"(add));
#else
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %10, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7}, %8, %9, p, 1, 1, 0, 0;\n}\n"
        : R4(d, 0), R4(d, 4)
        : "l"(a), "l"(b), "r"(add));
#endif
}

// d[64 heads, 128] = weights^T [64, 16] values [16, 128], plus d if `add`: both lie key by key.
__device__ __forceinline__ void mma_values(float (&d)[64], u64 a, u64 b, int add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "%64, %65, p, 1, 1, 1, 1;\n}\n"
        : R32(d, 0), R32(d, 32)
        : "l"(a), "l"(b), "r"(add));
}
