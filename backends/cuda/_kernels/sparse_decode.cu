// Attention of few queries over selected FP8 records of 656 bytes (512 e4m3, 4 fp32 scales, 64
// bf16), for HEADS heads (a multiple of 8, up to 64) per block.
//
// Three warpgroups. The first gathers keys straight into the registers where wgmma wants a left
// operand, decodes them there, and makes scores transposed, keys x heads: keys meet no shared memory
// on that way, and any number of heads is a width of the product, not a padded height. What it
// decoded it also stores as values. The other two hold half of the result's columns each and add
// weights x values. Raw records of the next 64 keys are in flight in the first group's registers
// while the present ones are computed.
//
// Orders: a thread of a left operand holds 16 neighbouring columns of a key instead of every eighth
// pair; queries are stored in the order that makes up for it. In each four neighbouring columns of
// the values the middle ones are swapped, as a word of four codes decodes into (0, 2) and (1, 3);
// results are swapped back when they are written.

typedef unsigned u32;
typedef unsigned long long u64;

#ifndef HEADS
#define HEADS 64
#endif
#ifndef MODE
#define MODE 0
#endif

namespace {

constexpr int KEYS = 64, LATENT = 512, DIM = 576, RECORD = 656, CHUNKS = LATENT / 64;
constexpr int COLUMNS = HEADS / 8;  // groups of eight heads
#ifndef DELAY
#define DELAY -1
#endif
enum { ALONE, PLANNED, JOINED };  // MODE: pieces of a row are joined by another kernel, or here
constexpr int STAGES = 2, RECORDS = 4;
constexpr int CLUSTER = 8;  // pieces that blocks of one cluster join among themselves
constexpr float SLACK = 16;  // powers of two that weights may outgrow their reference by
constexpr float LN2 = 0.6931471805599453f;
#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif

struct Shared {
    unsigned char q[9][HEADS * 128];
    unsigned char values[STAGES][LATENT * KEYS * 2];
    unsigned char weights[STAGES][64 * KEYS * 2];
    float reference[64], share[64], most[4][64], factor[STAGES][64], weight[CLUSTER][64];
    const unsigned char* record[RECORDS][KEYS];  // where the keys of coming blocks are; null = no key
    int rescale[STAGES];
    u64 full[STAGES], empty[STAGES];
};

__device__ __forceinline__ u32 address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// -- barriers -------------------------------------------------------------------------------------

__device__ __forceinline__ void bar_init(u64* bar, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(bar)), "r"(count));
}
__device__ __forceinline__ void bar_arrive(u64* bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(bar)) : "memory");
}
__device__ __forceinline__ void bar_wait(u64* bar, u32 phase) {
    asm volatile(
        "{\n.reg .pred done;\nagain:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n}\n" ::"r"(address(bar)), "r"(phase) : "memory");
}
__device__ __forceinline__ void sync_some(int id, int threads) {
    asm volatile("barrier.cta.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ bool any_of_group(bool mine) {
    int any;
    asm volatile(
        "{\n.reg .pred in, out;\nsetp.ne.s32 in, %1, 0;\n"
        "barrier.cta.red.or.pred out, 1, 128, in;\nselp.s32 %0, 1, 0, out;\n}\n"
        : "=r"(any) : "r"((int)mine) : "memory");
    return any;
}
__device__ __forceinline__ void fence_async() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// -- wgmma ----------------------------------------------------------------------------------------

__device__ __forceinline__ void mma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void mma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int N> __device__ __forceinline__ void mma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// rows of 128 bytes, swizzled; `leading` and `stride` in bytes
__device__ __forceinline__ u64 descriptor(u32 at, u32 leading, u32 stride) {
    return (u64)((at & 0x3ffff) >> 4) | (u64)(leading >> 4) << 16 | (u64)(stride >> 4) << 32 |
           1ull << 62;
}

#define R4(a, i) "+f"(a[i]), "+f"(a[i + 1]), "+f"(a[i + 2]), "+f"(a[i + 3])
#define R16(a, i) R4(a, i), R4(a, i + 4), R4(a, i + 8), R4(a, i + 12)
#define R32(a, i) R16(a, i), R16(a, i + 16)

// scores[64 keys, HEADS] += keys (registers) x queries (shared, K-major)
__device__ __forceinline__ void mma_scores(float (&d)[COLUMNS * 4], const u32 (&a)[4], u64 b, int add) {
#if HEADS == 64
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
        "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, "
        "{%32,%33,%34,%35}, %36, p, 1, 1, 0;\n}\n"
        : R32(d, 0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
#elif HEADS == 32
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %21, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, "
        "{%16,%17,%18,%19}, %20, p, 1, 1, 0;\n}\n"
        : R16(d, 0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
#else
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %13, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7}, {%8,%9,%10,%11}, %12, p, 1, 1, 0;\n}\n"
        : R4(d, 0), R4(d, 4) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
#endif
}

// out[64 heads, 256] += weights (shared, head fastest) x values (shared, column fastest)
__device__ __forceinline__ void mma_values(float (&d)[128], u64 a, u64 b, int add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
        "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
        "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
        "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,"
        "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,"
        "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,"
        "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,"
        "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127}, "
        "%128, %129, p, 1, 1, 1, 1;\n}\n"
        : R32(d, 0), R32(d, 32), R32(d, 64), R32(d, 96) : "l"(a), "l"(b), "r"(add));
}

// -- arithmetic -----------------------------------------------------------------------------------

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ u32 pack(float low, float high) {
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
__device__ __forceinline__ u32 times(u32 a, u32 b) {
    u32 c;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
    return c;
}
// Four e4m3 codes to bf16 pairs (0, 2) and (1, 3). A code's bits, moved to where bf16 has exponent
// and fraction, are its value times 2^-120, subnormal or not; `scale` holds what makes up for it.
__device__ __forceinline__ void decode(u32 codes, u32 scale, u32& even, u32& odd) {
    u32 e = ((codes << 4) & 0x07f007f0u) | ((codes << 8) & 0x80008000u);
    u32 o = ((codes >> 4) & 0x07f007f0u) | (codes & 0x80008000u);
    even = times(e, scale);
    odd = times(o, scale);
}
__device__ __forceinline__ void store16(u32 at, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(a), "r"(b), "r"(c), "r"(d));
}
__device__ __forceinline__ void store4(u32 at, u32 a) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"(a));
}
__device__ __forceinline__ uint4 load16(const unsigned char* at) {
    uint4 v;
    asm volatile("ld.global.nc.L1::evict_last.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at));
    return v;
}

// -- clusters ---------------------------------------------------------------------------------------

__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
__device__ __forceinline__ u32 at_rank(u32 at, int rank) {
    u32 there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(rank));
    return there;
}
__device__ __forceinline__ float4 load_remote16(u32 at) {
    float4 v;
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(at) : "memory");
    return v;
}
__device__ __forceinline__ float load_remote(u32 at) {
    float v;
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(v) : "r"(at) : "memory");
    return v;
}

__device__ __forceinline__ void prefetch(const unsigned char* record) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(record), "r"(RECORD));
}

struct Work {
    const unsigned short* q;
    long long q_batch, q_next, q_head;
    const unsigned char* pages;
    long long page_bytes;
    const int* indices;
    long long index_batch, index_next, index_k;
    const int* lengths;
    long long length_batch, length_next;
    const float* sink;
    unsigned short* out;
    float *lse, *part, *part_lse;
    const int *schedule, *num_splits;
    float scale_log2;
    int rows, next_n, heads, k, page_size, slots, span, splits;
    u32 magic;  // slot / page_size is slot * magic >> shift
    int shift;
};

// One row's blocks of keys from `first` on, `count` of them, for the heads of this block.
struct Item {
    int row, first, count, length, piece;
    bool direct;
};

__device__ __forceinline__ Item item_of(const Work& w, int row, int first, int end, int piece, bool direct) {
    int batch = row / w.next_n, next = row % w.next_n;
    int length = w.k;
    if (w.lengths)
        length = min(length, w.lengths[batch * w.length_batch + next * w.length_next]);
    end = min(end, (length + KEYS - 1) / KEYS);
    return {row, first, max(0, end - first), length, piece, direct};
}

// -- first warpgroup: keys, scores, weights ----------------------------------------------------------

struct Raw {
    uint4 latent[2][CHUNKS], rope[2][2];
    float4 scale[2];
};

__device__ __forceinline__ int slot_of(const Work& w, const int* indices, int at, int length) {
    int slot = at < length ? __ldg(indices + at * w.index_k) : -1;
    return slot < w.slots ? slot : -1;  // outside the pool is undefined: here it is no key
}
__device__ __forceinline__ const unsigned char* record_of(const Work& w, int slot) {
    u32 page = (u32)((u64)(u32)slot * w.magic >> w.shift);
    return w.pages + page * w.page_bytes + ((u32)slot - page * w.page_size) * (long long)RECORD;
}

__device__ __forceinline__ void load_record(Raw& raw, int r, const unsigned char* at, int quad) {
    uint4 v = make_uint4(0, 0, 0, 0);
    if (at) v = load16(at + LATENT);
    raw.scale[r] = *reinterpret_cast<float4*>(&v);
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        raw.latent[r][c] = make_uint4(0, 0, 0, 0);
        if (at) raw.latent[r][c] = load16(at + c * 64 + quad * 16);
    }
}
__device__ __forceinline__ void load_rope(Raw& raw, int r, const unsigned char* at, int quad) {
#pragma unroll
    for (int c = 0; c < 2; c++) {
        raw.rope[r][c] = make_uint4(0, 0, 0, 0);
        if (at) raw.rope[r][c] = load16(at + 528 + quad * 32 + c * 16);
    }
}

__device__ __forceinline__ void make_scores(const Work& w, const Item& item, Shared& s, int& stage, u32& phase, int head0) {
    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, group = lane / 4, quad = lane % 4;
    const int row0 = warp * 16 + group;
    const int* indices = w.indices + (item.row / w.next_n) * w.index_batch + (item.row % w.next_n) * w.index_next;
    const u32 q_at = address(s.q);
    float sum[COLUMNS * 2];
#pragma unroll
    for (int i = 0; i < COLUMNS * 2; i++) sum[i] = 0;
    if (tid < 64) s.reference[tid] = 0;
    bool fresh = true;

    Raw raw;
    bool valid[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int slot = item.count > 0 ? slot_of(w, indices, item.first * KEYS + row0 + 8 * r, item.length) : -1;
        const unsigned char* at = slot < 0 ? nullptr : record_of(w, slot);
        load_record(raw, r, at, quad);
        load_rope(raw, r, at, quad);
        valid[r] = slot >= 0;
    }
    sync_some(2, 384);  // queries are in shared memory

    for (int block = 0; block < item.count; block++) {
        u32 scale[2][2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            scale[r][0] = pack(raw.scale[r].x * 0x1p120f, raw.scale[r].y * 0x1p120f);
            scale[r][1] = pack(raw.scale[r].z * 0x1p120f, raw.scale[r].w * 0x1p120f);
        }
        bar_wait(&s.empty[stage], phase ^ 1);
        float score[COLUMNS * 4];
        const u32 v_at = address(s.values[stage]) + row0 * 128;
        u32 keys[2][4][4];
#pragma unroll
        for (int step = 0; step < CHUNKS + 1; step++) {
            const int c = step ? step - 1 : CHUNKS;  // the rotated part first
            u32(&a)[4][4] = keys[step % 2];
            if (step >= 2) mma_wait<1>();  // the products that read these registers
#pragma unroll
            for (int r = 0; r < 2; r++) {
                if (c < CHUNKS) {
                    uint4& x = raw.latent[r][c < CHUNKS ? c : 0];
                    u32 f = __byte_perm(scale[r][c / 4 % 2], 0, c / 2 % 2 ? 0x3232 : 0x1010);
                    decode(x.x, f, a[0][r], a[0][r + 2]);
                    decode(x.y, f, a[1][r], a[1][r + 2]);
                    decode(x.z, f, a[2][r], a[2][r + 2]);
                    decode(x.w, f, a[3][r], a[3][r + 2]);
                    u32 to = v_at + c * 8192 + r * 1024;
                    store16(to + (((quad * 2) ^ group) << 4), a[0][r], a[0][r + 2], a[1][r], a[1][r + 2]);
                    store16(to + (((quad * 2 + 1) ^ group) << 4), a[2][r], a[2][r + 2], a[3][r], a[3][r + 2]);
                } else {
                    uint4 &x = raw.rope[r][0], &y = raw.rope[r][1];
                    a[0][r] = x.x, a[0][r + 2] = x.y, a[1][r] = x.z, a[1][r + 2] = x.w;
                    a[2][r] = y.x, a[2][r + 2] = y.y, a[3][r] = y.z, a[3][r + 2] = y.w;
                }
            }
            mma_fence();
#pragma unroll
            for (int i = 0; i < 4; i++)
                mma_scores(score, a[i], descriptor(q_at + c * HEADS * 128 + i * 32, 16, 1024), step + i > 0);
            mma_commit();
            if (step == DELAY && block > 0 && lane == 0) bar_arrive(&s.full[stage ^ 1]);
        }
        // the next block's records come while this one's scores are waited for
        bool now[2] = {valid[0], valid[1]};
        const unsigned char* at[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            at[r] = s.record[(block + 1) % RECORDS][row0 + 8 * r];
            load_record(raw, r, at[r], quad);
            valid[r] = at[r] != nullptr;
        }
        mma_wait<0>();
#pragma unroll
        for (int r = 0; r < 2; r++) load_rope(raw, r, at[r], quad);

        // scores become exponents of two below the heads' references
        float most = -1e30f;
#pragma unroll
        for (int j = 0; j < COLUMNS; j++) {
            float2 ref = *reinterpret_cast<const float2*>(&s.reference[j * 8 + quad * 2]);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float x = fmaf(score[j * 4 + i], w.scale_log2, i % 2 ? -ref.y : -ref.x);
                score[j * 4 + i] = x;
            }
        }
        if (!__all_sync(~0u, now[0] && now[1]))
#pragma unroll
            for (int i = 0; i < COLUMNS * 4; i++) score[i] = now[i % 4 / 2] ? score[i] : -INFINITY;
#pragma unroll
        for (int i = 0; i < COLUMNS * 4; i++) most = fmaxf(most, score[i]);
        bool shift = any_of_group(most > SLACK || fresh);
        if (shift) {
            float peak[COLUMNS * 2];
#pragma unroll
            for (int i = 0; i < COLUMNS * 2; i++) {
                float p = fmaxf(score[i / 2 * 4 + i % 2], score[i / 2 * 4 + i % 2 + 2]);
                p = fmaxf(p, __shfl_xor_sync(~0u, p, 4));
                p = fmaxf(p, __shfl_xor_sync(~0u, p, 8));
                peak[i] = fmaxf(p, __shfl_xor_sync(~0u, p, 16));
            }
            if (group == 0)
#pragma unroll
                for (int i = 0; i < COLUMNS * 2; i++) s.most[warp][i / 2 * 8 + quad * 2 + i % 2] = peak[i];
            sync_some(1, 128);
            bool none = false;
#pragma unroll
            for (int i = 0; i < COLUMNS * 2; i++) {
                int head = i / 2 * 8 + quad * 2 + i % 2;
                float p = fmaxf(fmaxf(s.most[0][head], s.most[1][head]), fmaxf(s.most[2][head], s.most[3][head]));
                none = p == -INFINITY;
                if (!fresh) p = fmaxf(p, 0);
                if (none) p = 0;
                score[i / 2 * 4 + i % 2] -= p;
                score[i / 2 * 4 + i % 2 + 2] -= p;
                float factor = fresh ? 1.f : exp2_fast(-p);
                sum[i] *= factor;
                if (warp == 0 && group == 0) {
                    s.reference[head] += p;
                    s.factor[stage][head] = factor;
                }
            }
            sync_some(1, 128);
            shift = !fresh;
            fresh = fresh && none;
        }
        if (tid == 0) s.rescale[stage] = shift;
        const u32 p_row = warp * 16 + (lane / 8 % 2) * 8 + lane % 8;
        const u32 p_at = address(s.weights[stage]) + p_row * 128;
        u32 packed[COLUMNS][2];
#pragma unroll
        for (int j = 0; j < COLUMNS; j++) {
            float a = exp2_fast(score[j * 4]), b = exp2_fast(score[j * 4 + 1]);
            float c = exp2_fast(score[j * 4 + 2]), d = exp2_fast(score[j * 4 + 3]);
            sum[j * 2] += a + c;
            sum[j * 2 + 1] += b + d;
            packed[j][0] = pack(a, b), packed[j][1] = pack(c, d);
        }
#pragma unroll
        for (int j = 0; j < COLUMNS; j += 2) {
            u32 chunk = (j + lane / 16) ^ (p_row & 7);
            asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(p_at + chunk * 16),
                         "r"(packed[j][0]), "r"(packed[j][1]), "r"(packed[j + 1][0]), "r"(packed[j + 1][1]));
        }
        fence_async();
        __syncwarp();
        if (DELAY < 0 && lane == 0) bar_arrive(&s.full[stage]);
        stage ^= 1;
        phase ^= stage == 0;
    }

    if (DELAY >= 0 && item.count > 0 && lane == 0) bar_arrive(&s.full[stage ^ 1]);

    // sums over keys, shares of the result, and the logarithms
#pragma unroll
    for (int i = 0; i < COLUMNS * 2; i++) {
        float x = sum[i];
        x += __shfl_xor_sync(~0u, x, 4);
        x += __shfl_xor_sync(~0u, x, 8);
        x += __shfl_xor_sync(~0u, x, 16);
        if (group == 0) s.most[warp][i / 2 * 8 + quad * 2 + i % 2] = x;
    }
    sync_some(1, 128);
    if (tid < HEADS) {
        const int head = head0 + tid;
        float total = s.most[0][tid] + s.most[1][tid] + s.most[2][tid] + s.most[3][tid];
        float share = total > 0 ? 1 / total : 0;
        if (MODE == JOINED) share = total;
        float lse = (s.reference[tid] + log2f(total)) * LN2;
        if (head < w.heads && MODE != JOINED) {
            if (item.direct) {
                if (w.sink && total > 0) share /= 1 + expf(w.sink[head] - lse);
                long long to = ((long long)(item.row / w.next_n) * w.heads + head) * w.next_n + item.row % w.next_n;
                w.lse[to] = total > 0 ? lse : INFINITY;
            } else {
                w.part_lse[(long long)item.piece * w.heads + head] = total > 0 ? lse : -INFINITY;
            }
        }
        s.share[tid] = share;
    }
}

// -- second and third warpgroup: queries in, results out --------------------------------------------

__device__ __forceinline__ void load_queries(const Work& w, const Item& item, Shared& s, int head0) {
    const unsigned short* q = w.q + (item.row / w.next_n) * w.q_batch + (item.row % w.next_n) * w.q_next;
    const u32 at = address(s.q);
    for (int i = threadIdx.x - 128; i < HEADS * (DIM / 8); i += 256) {
        int head = i / (DIM / 8), d = i % (DIM / 8) * 8, c = d / 64;
        uint4 x = make_uint4(0, 0, 0, 0);
        if (head0 + head < w.heads) x = *reinterpret_cast<const uint4*>(q + (head0 + head) * w.q_head + d);
        u32 row = at + c * HEADS * 128 + head * 128, quad = d % 64 / 16;
        u32 pairs[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int half = 0; half < 2; half++) {
            u32 a = pairs[half * 2], b = pairs[half * 2 + 1], step = d % 16 / 4 + half;
            if (c < CHUNKS) {  // pairs (0, 2) and (1, 3), as codes decode
                u32 even = __byte_perm(a, b, 0x5410), odd = __byte_perm(a, b, 0x7632);
                a = even, b = odd;
            }
            store4(row + (((step * 2) ^ (head & 7)) << 4) + quad * 4, a);
            store4(row + (((step * 2 + 1) ^ (head & 7)) << 4) + quad * 4, b);
        }
    }
    fence_async();
}

// Finds the records of one block of keys, a key for each thread, and has them brought to L2.
__device__ __forceinline__ void find_records(const Work& w, const Item& item, Shared& s, int block) {
    const int key = threadIdx.x - 128;
    if (key >= KEYS) return;
    const unsigned char* record = nullptr;
    if (block < item.count) {
        const int* indices = w.indices + (item.row / w.next_n) * w.index_batch + (item.row % w.next_n) * w.index_next;
        int slot = slot_of(w, indices, (item.first + block) * KEYS + key, item.length);
        if (slot >= 0) {
            record = record_of(w, slot);
            prefetch(record);
        }
    }
    s.record[block % RECORDS][key] = record;
}

__device__ __forceinline__ void add_values(const Work& w, const Item& item, Shared& s, int& stage, u32& phase, int head0) {
    const int tid = threadIdx.x % 128, half = threadIdx.x / 128 - 1;
    const int warp = tid / 32, lane = tid % 32, group = lane / 4, quad = lane % 4;
    const int row0 = warp * 16 + group;
    find_records(w, item, s, 1);
    find_records(w, item, s, 2);
    load_queries(w, item, s, head0);
    sync_some(2, 384);
    float acc[128];
    for (int block = 0; block < item.count; block++) {
        bar_wait(&s.full[stage], phase);
        if (s.rescale[stage]) {
            float f0 = row0 < HEADS ? s.factor[stage][row0] : 1.f;
            float f1 = row0 + 8 < HEADS ? s.factor[stage][row0 + 8] : 1.f;
#pragma unroll
            for (int i = 0; i < 128; i += 4) acc[i] *= f0, acc[i + 1] *= f0, acc[i + 2] *= f1, acc[i + 3] *= f1;
        }
        u32 p_at = address(s.weights[stage]), v_at = address(s.values[stage]) + half * 4 * 8192;
        mma_fence();
#pragma unroll
        for (int i = 0; i < KEYS / 16; i++)
            mma_values(acc, descriptor(p_at + i * 2048, 8192, 1024), descriptor(v_at + i * 2048, 8192, 1024), block + i > 0);
        mma_commit();
        find_records(w, item, s, block + 3);
        mma_wait<0>();
        __syncwarp();
        if (lane == 0) bar_arrive(&s.empty[stage]);
        stage ^= 1;
        phase ^= stage == 0;
    }
    sync_some(3, 384);  // shares are in shared memory, and values are needed no more
    if (MODE == JOINED) {
        const u32 to = address(s.values);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int row = row0 + 8 * r;
            if (row < HEADS)
#pragma unroll
                for (int i = 0; i < 32; i++) {
                    u32 chunk = (half * 64 + i * 2 + quad / 2) ^ (group * 2);
                    float a = item.count ? acc[i * 4 + r * 2] : 0.f, b = item.count ? acc[i * 4 + r * 2 + 1] : 0.f;
                    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to + row * 2048 + chunk * 16 + quad % 2 * 8), "f"(a), "f"(b));
                }
        }
        return;
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int row = row0 + 8 * r, head = head0 + row;
        const bool real = row < HEADS && head < w.heads;
        const float share = real ? s.share[row] : 0;
        const bool none = item.count == 0;
        const long long to = ((long long)(item.direct ? item.row : item.piece) * w.heads + head) * LATENT + half * 256;
#pragma unroll
        for (int i = 0; i < 32; i++) {
            float a = none ? 0.f : acc[i * 4 + r * 2] * share, b = none ? 0.f : acc[i * 4 + r * 2 + 1] * share;
            float other = __shfl_xor_sync(~0u, quad % 2 ? a : b, 1);
            if (quad % 2) a = other;
            else b = other;
            if (real) {
                const long long column = to + i * 8 + quad * 2;
                if (item.direct)
                    *reinterpret_cast<u32*>(w.out + column) = pack(a, b);
                else
                    *reinterpret_cast<float2*>(w.part + column) = make_float2(a, b);
            }
        }
    }
}

// The pieces of a row, one in each block of the cluster, become its result: every block takes a part
// of the columns of all heads.
__device__ __forceinline__ void join(const Work& w, const Item& item, Shared& s, int head0) {
    const int tid = threadIdx.x, pieces = w.splits, rank = blockIdx.y;
    cluster_sync();
    const int heads = min(HEADS, w.heads - head0);
    if (tid < heads) {
        const u32 reference_at = address(&s.reference[tid]), total_at = address(&s.share[tid]);
        float reference[CLUSTER], total[CLUSTER], most = -INFINITY, sum = 0;
#pragma unroll
        for (int r = 0; r < CLUSTER; r++) {
            total[r] = r < pieces ? load_remote(at_rank(total_at, r)) : 0;
            reference[r] = r < pieces ? load_remote(at_rank(reference_at, r)) : 0;
            if (total[r] > 0) most = fmaxf(most, reference[r]);
        }
#pragma unroll
        for (int r = 0; r < CLUSTER; r++) {
            reference[r] = total[r] > 0 ? exp2f(reference[r] - most) : 0;
            sum += total[r] * reference[r];
        }
        float lse = (most + log2f(sum)) * LN2, share = sum > 0 ? 1 / sum : 0;
        if (w.sink && sum > 0) share /= 1 + expf(w.sink[head0 + tid] - lse);
#pragma unroll
        for (int r = 0; r < CLUSTER; r++) s.weight[r][tid] = reference[r] * share;
        if (rank == 0) {
            long long to = ((long long)(item.row / w.next_n) * w.heads + head0 + tid) * w.next_n + item.row % w.next_n;
            w.lse[to] = sum > 0 ? lse : INFINITY;
        }
    }
    sync_some(4, 384);
    const u32 from = address(s.values);
    unsigned short* out = w.out + ((long long)item.row * w.heads + head0) * LATENT;
    const int all = heads * (LATENT / 4), part = (all + pieces - 1) / pieces;
    for (int i = rank * part + tid; i < min(all, (rank + 1) * part); i += 384) {
        const int row = i / (LATENT / 4), chunk = i % (LATENT / 4);
        const u32 at = from + row * 2048 + ((chunk ^ (row % 8 * 2)) * 16);
        float4 v[CLUSTER], sum = make_float4(0, 0, 0, 0);
#pragma unroll
        for (int r = 0; r < CLUSTER; r++)
            if (r < pieces) v[r] = load_remote16(at_rank(at, r));
#pragma unroll
        for (int r = 0; r < CLUSTER; r++)
            if (r < pieces) {
                float f = s.weight[r][row];
                sum.x = fmaf(v[r].x, f, sum.x), sum.y = fmaf(v[r].y, f, sum.y);
                sum.z = fmaf(v[r].z, f, sum.z), sum.w = fmaf(v[r].w, f, sum.w);
            }
        // the middle columns of four are swapped
        *reinterpret_cast<uint2*>(out + (long long)i * 4) = make_uint2(pack(sum.x, sum.z), pack(sum.y, sum.w));
    }
    cluster_sync();  // nobody leaves while others read here
}

}  // namespace

extern "C" __global__ void __launch_bounds__(384, 1) sparse_decode(const __grid_constant__ Work w) {
    extern __shared__ unsigned char memory[];
    Shared& s = *reinterpret_cast<Shared*>(memory + (1024 - (address(memory) & 1023)) % 1024);
    const int head_blocks = (w.heads + HEADS - 1) / HEADS;
    const int head0 = blockIdx.x % head_blocks * HEADS, who = blockIdx.x / head_blocks;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) bar_init(&s.full[i], 4), bar_init(&s.empty[i], 8);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    int stage = 0;
    u32 phase = 0;
    if (MODE == PLANNED) {
        const int row = w.schedule[who * 4], begin = w.schedule[who * 4 + 1];
        const int last = min(w.schedule[who * 4 + 2], w.rows - 1), stop = w.schedule[who * 4 + 3];
        int piece = 0;  // pieces are numbered row by row and worker by worker
        for (int i = threadIdx.x % 32; i < who; i += 32)
            piece += max(0, min(w.schedule[i * 4 + 2], w.rows - 1) - w.schedule[i * 4] + 1);
        piece = __reduce_add_sync(~0u, piece);
        if (threadIdx.x < 128) {
            asm volatile("setmaxnreg.inc.sync.aligned.u32 184;");
            for (int at = row; at <= last; at++, piece++) {
                int first = at == row ? begin : 0, end = at == last ? stop : 1 << 30;
                bool direct = w.num_splits[at + 1] - w.num_splits[at] <= 1;
                make_scores(w, item_of(w, at, first, end, piece, direct), s, stage, phase, head0);
                sync_some(3, 384);
            }
        } else {
            asm volatile("setmaxnreg.dec.sync.aligned.u32 160;");
            for (int at = row; at <= last; at++, piece++) {
                int first = at == row ? begin : 0, end = at == last ? stop : 1 << 30;
                bool direct = w.num_splits[at + 1] - w.num_splits[at] <= 1;
                add_values(w, item_of(w, at, first, end, piece, direct), s, stage, phase, head0);
            }
        }
    } else {
        const int begin = blockIdx.y * w.span;
        const Item item = item_of(w, who, begin, begin + w.span, who * w.splits + blockIdx.y, w.splits == 1);
        if (threadIdx.x < 128) {
            asm volatile("setmaxnreg.inc.sync.aligned.u32 184;");
            make_scores(w, item, s, stage, phase, head0);
            sync_some(3, 384);
            if (MODE == JOINED) join(w, item, s, head0);
        } else {
            asm volatile("setmaxnreg.dec.sync.aligned.u32 160;");
            add_values(w, item, s, stage, phase, head0);
            if (MODE == JOINED) join(w, item, s, head0);
        }
    }
}
