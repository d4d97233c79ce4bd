// Hopper's copy engine, barriers and matrix unit: what several kernels say in PTX.
//
// Shared memory is named by 32-bit addresses (`address`). A tile that the matrix unit reads has rows
// of 128 bytes, begins at a multiple of 1024 and is swizzled as the copy engine does it.

#pragma once

struct alignas(64) TensorMap {
    char bytes[128];
};

__device__ __forceinline__ unsigned address(const void* shared) {
    return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

// -- barriers --------------------------------------------------------------------------------------

__device__ __forceinline__ void barrier_init(unsigned barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

// Makes initialised barriers visible to the copy engine and to the other blocks of a cluster.
__device__ __forceinline__ void barrier_init_done() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(unsigned barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_expect(unsigned barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
                 "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void barrier_wait(unsigned barrier, int parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// A barrier of `threads` threads of the block; 0 is __syncthreads' own.
__device__ __forceinline__ void threads_wait(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// A warpgroup changes how many registers each of its threads has.
template <int COUNT>
__device__ __forceinline__ void registers_take() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <int COUNT>
__device__ __forceinline__ void registers_give() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// -- clusters --------------------------------------------------------------------------------------

__device__ __forceinline__ int cluster_rank() {
    int rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// Arrives at the barrier that lies at the same place in another block's shared memory. What this block
// wrote is not made visible by it: that would cost a fence of the whole device.
__device__ __forceinline__ void barrier_arrive_at(unsigned barrier, int rank) {
    unsigned there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(barrier), "r"(rank));
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(there) : "memory");
}

// All blocks of a cluster meet; what they wrote before is visible after.
__device__ __forceinline__ void cluster_wait() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                     : "memory");
}

// The two halves of a meeting after which every block of the cluster has begun and made its barriers.
__device__ __forceinline__ void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

__device__ __forceinline__ void cluster_arrived() {
    asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
}

// The same at once.
__device__ __forceinline__ void cluster_meet() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::
                     : "memory");
}

// Four floats of another block's shared memory, at the place that `shared` has in this block's.
__device__ __forceinline__ float4 cluster_load(unsigned shared, int rank) {
    unsigned there;
    float4 v;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared), "r"(rank));
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(there)
                 : "memory");
    return v;
}

// Sends four floats to the place that `shared` has in another block's memory; the barrier at the place
// that `barrier` has there counts their bytes. That block must not have ended when they come.
__device__ __forceinline__ void cluster_send(unsigned shared, unsigned barrier, int rank,
                                             const float* v) {
    unsigned there, counts;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared), "r"(rank));
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(counts) : "r"(barrier), "r"(rank));
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4},"
        " [%5];" ::"r"(there),
        "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]), "r"(counts)
        : "memory");
}

// -- copies ----------------------------------------------------------------------------------------

// One box of a tensor with three axes to shared memory; `barrier` counts its bytes.
__device__ __forceinline__ void copy_box(unsigned to, const TensorMap* from, unsigned barrier, int x,
                                         int y, int z) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(to),
        "l"(from), "r"(barrier), "r"(x), "r"(y), "r"(z)
        : "memory");
}

// The same, to the same place in every block of the cluster whose bit is in `ranks`, and each one's
// own barrier counts.
__device__ __forceinline__ void copy_box_to(unsigned to, const TensorMap* from, unsigned barrier,
                                            unsigned short ranks, int x, int y, int z) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(to),
        "l"(from), "r"(barrier), "r"(x), "r"(y), "r"(z), "h"(ranks)
        : "memory");
}

// Asks for a box to be brought to the last cache, where all writes arrive: it may come before they do.
__device__ __forceinline__ void fetch_box(const TensorMap* from, int x, int y, int z) {
    asm volatile("cp.async.bulk.prefetch.tensor.3d.L2.global.tile [%0, {%1, %2, %3}];" ::"l"(from),
                 "r"(x), "r"(y), "r"(z)
                 : "memory");
}

__device__ __forceinline__ void copy_prepare(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// A number that the compiler shall not know to be the same in all lanes: it would move it to a register
// of the whole warp, and wait for it, as soon as it is asked for.
__device__ __forceinline__ float load_early(const float* from) {
    float v;
    asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(v) : "l"(from));
    return v;
}

// Four bytes to shared memory, or zeros if not `inside`; nothing is read then.
__device__ __forceinline__ void copy_word(unsigned to, const void* from, bool inside) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from),
                 "r"(inside ? 4 : 0)
                 : "memory");
}

// This thread arrives at `barrier` once its copies of words have come.
__device__ __forceinline__ void copy_words_arrive(unsigned barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// Four 8 x 8 matrices of 16-bit values: eight lanes each say where the rows of one begin.
__device__ __forceinline__ void store_matrices(unsigned to, unsigned a, unsigned b, unsigned c,
                                               unsigned d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to),
                 "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
}

__device__ __forceinline__ uint4 load_piece(unsigned from) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(from)
                 : "memory");
    return v;
}

__device__ __forceinline__ float4 load_floats(unsigned from) {
    float4 v;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(from)
                 : "memory");
    return v;
}

// Two 8 x 8 matrices of 16-bit values, turned: lanes 0 to 15 say where the columns of the first and
// of the second begin.
__device__ __forceinline__ void store_turned(unsigned to, unsigned first, unsigned second) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(to),
                 "r"(first), "r"(second)
                 : "memory");
}

// -- matrix unit -----------------------------------------------------------------------------------

// Descriptor of a swizzled tile whose rows are 128 bytes; advance it by bytes / 16 along a row.
__device__ __forceinline__ unsigned long long tile_descriptor(unsigned shared) {
    return static_cast<unsigned long long>((shared & 0x3FFFF) >> 4) | 1ull << 16 | 64ull << 32 |
           1ull << 62;
}

__device__ __forceinline__ void mma_begin() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void mma_end() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int PENDING>
__device__ __forceinline__ void mma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Tells the compiler that the matrix unit changes these registers until it was waited for.
template <int COUNT>
__device__ __forceinline__ void mma_touch(float (&d)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// d = a b^T, plus d if `add`: a has 64 rows, b has N rows, both 32 bytes deep. Element 4j + 2h + c of d
// is row 16 warp + lane / 4 + 8h, column 8j + 2 (lane % 4) + c. HALF ("bf16" or "f16") before this file
// multiplies those instead of FP8.
template <int N>
struct Mma;

#ifdef HALF
#define MMA_KIND "k16.f32." HALF "." HALF
#define MMA_TURNED ", 0, 0"
#else
#define MMA_KIND "k32.f32.e4m3.e4m3"
#define MMA_TURNED ""
#endif
#define L4 "%0, %1, %2, %3"
#define O4 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define L8 L4 ", %4, %5, %6, %7"
#define O8 O4, "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define L12 L8 ", %8, %9, %10, %11"
#define O12 O8, "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11])
#define L16 L12 ", %12, %13, %14, %15"
#define O16 O12, "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define L20 L16 ", %16, %17, %18, %19"
#define O20 O16, "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19])
#define L24 L20 ", %20, %21, %22, %23"
#define O24 O20, "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23])
#define L28 L24 ", %24, %25, %26, %27"
#define O28 O24, "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27])
#define L32 L28 ", %28, %29, %30, %31"
#define O32 O28, "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define L36 L32 ", %32, %33, %34, %35"
#define O36 O32, "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35])
#define L40 L36 ", %36, %37, %38, %39"
#define O40 O36, "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39])
#define L44 L40 ", %40, %41, %42, %43"
#define O44 O40, "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43])
#define L48 L44 ", %44, %45, %46, %47"
#define O48 O44, "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
#define L52 L48 ", %48, %49, %50, %51"
#define O52 O48, "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51])
#define L56 L52 ", %52, %53, %54, %55"
#define O56 O52, "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55])
#define L60 L56 ", %56, %57, %58, %59"
#define O60 O56, "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59])
#define L64 L60 ", %60, %61, %62, %63"
#define O64 O60, "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define L68 L64 ", %64, %65, %66, %67"
#define O68 O64, "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67])
#define L72 L68 ", %68, %69, %70, %71"
#define O72 O68, "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71])
#define L76 L72 ", %72, %73, %74, %75"
#define O76 O72, "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75])
#define L80 L76 ", %76, %77, %78, %79"
#define O80 O76, "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79])
#define L84 L80 ", %80, %81, %82, %83"
#define O84 O80, "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83])
#define L88 L84 ", %84, %85, %86, %87"
#define O88 O84, "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87])
#define L92 L88 ", %88, %89, %90, %91"
#define O92 O88, "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91])
#define L96 L92 ", %92, %93, %94, %95"
#define O96 O92, "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])

#define MMA(N, LIST, OUT, A, B, ADD)                                                                \
    template <>                                                                                    \
    struct Mma<N> {                                                                                \
        static __device__ __forceinline__ void run(float (&d)[N / 2], unsigned long long a,        \
                                                   unsigned long long b, int add) {                \
            asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " ADD                               \
                         ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N MMA_KIND " {" LIST            \
                         "}, " A ", " B ", add, 1, 1" MMA_TURNED ";\n}"                            \
                         : OUT                                                                     \
                         : "l"(a), "l"(b), "r"(add));                                              \
        }                                                                                          \
    };
MMA(8, L4, O4, "%4", "%5", "%6")
MMA(16, L8, O8, "%8", "%9", "%10")
MMA(24, L12, O12, "%12", "%13", "%14")
MMA(32, L16, O16, "%16", "%17", "%18")
MMA(40, L20, O20, "%20", "%21", "%22")
MMA(48, L24, O24, "%24", "%25", "%26")
MMA(56, L28, O28, "%28", "%29", "%30")
MMA(64, L32, O32, "%32", "%33", "%34")
MMA(72, L36, O36, "%36", "%37", "%38")
MMA(80, L40, O40, "%40", "%41", "%42")
MMA(88, L44, O44, "%44", "%45", "%46")
MMA(96, L48, O48, "%48", "%49", "%50")
MMA(104, L52, O52, "%52", "%53", "%54")
MMA(112, L56, O56, "%56", "%57", "%58")
MMA(120, L60, O60, "%60", "%61", "%62")
MMA(128, L64, O64, "%64", "%65", "%66")
MMA(192, L96, O96, "%96", "%97", "%98")
#undef MMA
