// Attention of few queries over selected FP8 records of 656 bytes (512 e4m3, 4 fp32 scales, 64
// bf16), for HEADS heads (16, 32 or 64) per block of four warpgroups.
//
// The last gathers records, decodes them and stores them as keys, of which values are a part. The
// first makes scores transposed, keys x heads, so that any number of heads is a product's width and
// not its padded height, and turns them into weights. The two between hold half of the result's
// columns each and add weights x values.
//
// Weights are powers of two above a head's reference, which follows the largest score only when
// that has outgrown it by 2^SLACK: fp32 and bf16 have the room, and sums are seldom rescaled.
//
// In each four neighbouring columns of queries, keys and values the middle ones are swapped, as a
// word of four codes decodes into (0, 2) and (1, 3); results are swapped back where written.
//
// Every thread arrives for itself: one lane that did so for its warp would order the others'
// accesses only through `__syncwarp`, which is no instruction here, so that a race checker cannot
// follow it.

#include "sparse_decode_keys.cuh"

constexpr int THREADS = 512;
// Registers. The last group does with 80, but is faster with more where the first can spare them.
constexpr int FIRST = HEADS == 64 ? 88 : 112, LAST = HEADS == 64 ? 104 : 80;
enum { GROUP = 1, QUERIES, WEIGHTS };  // barriers of threads: the first group's, and all

// The end of a row for the whole block: shares are there, and nobody needs values any more. By
// `bar.sync` it would do as well, but compute-sanitizer 2025.3 loses that one.
__device__ __forceinline__ void row_ends(Shared& s, unsigned& row) {
    barrier_arrive(address(&s.ended));
    barrier_wait(address(&s.ended), row);
    row ^= 1;
}

// -- first warpgroup: scores, weights -------------------------------------------------------------

// Moves references up to the largest exponents, which become 0, and says by which factors earlier
// sums shrink. `fresh` as long as no key was seen; then references also move down.
__device__ __forceinline__ void move_references(Shared& s, float (&score)[COLUMNS * 4],
                                                float (&sum)[COLUMNS * 2], bool& fresh) {
    const int warp = threadIdx.x / 32, group = threadIdx.x % 32 / 4, quad = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < COLUMNS * 2; i++) {
        float p = fmaxf(score[i / 2 * 4 + i % 2], score[i / 2 * 4 + i % 2 + 2]);
        p = fmaxf(p, __shfl_xor_sync(~0u, p, 4));
        p = fmaxf(p, __shfl_xor_sync(~0u, p, 8));
        p = fmaxf(p, __shfl_xor_sync(~0u, p, 16));
        if (group == 0) s.most[warp][i / 2 * 8 + quad * 2 + i % 2] = p;
    }
    threads_wait(GROUP, 128);
    bool none = false;
#pragma unroll
    for (int i = 0; i < COLUMNS * 2; i++) {
        const int head = i / 2 * 8 + quad * 2 + i % 2;
        float p = fmaxf(fmaxf(s.most[0][head], s.most[1][head]),
                        fmaxf(s.most[2][head], s.most[3][head]));
        none = p == -INFINITE;
        if (none || (!fresh && p < 0)) p = 0;
        score[i / 2 * 4 + i % 2] -= p;
        score[i / 2 * 4 + i % 2 + 2] -= p;
        const float factor = fresh ? 1.f : exp2_fast(-p);
        sum[i] *= factor;
        if (warp == 0 && group == 0) {
            s.reference[head] += p;
            s.factor[head] = factor;
        }
    }
    threads_wait(GROUP, 128);
    fresh = fresh && none;
}

// What the head's weights came to: for the joint of a cluster, or the row's own end.
__device__ __forceinline__ void finish_sums(const Work& w, const Item& item, Shared& s, int head0,
                                            const float (&sum)[COLUMNS * 2]) {
    const int tid = threadIdx.x, warp = tid / 32, group = tid % 32 / 4, quad = tid % 4;
#pragma unroll
    for (int i = 0; i < COLUMNS * 2; i++) {
        float x = sum[i];
        x += __shfl_xor_sync(~0u, x, 4);
        x += __shfl_xor_sync(~0u, x, 8);
        x += __shfl_xor_sync(~0u, x, 16);
        if (group == 0) s.most[warp][i / 2 * 8 + quad * 2 + i % 2] = x;
    }
    threads_wait(GROUP, 128);
    if (tid >= HEADS) return;
    const int head = head0 + tid;
    const float total = s.most[0][tid] + s.most[1][tid] + s.most[2][tid] + s.most[3][tid];
    if (MODE == JOINED) {
        s.share[tid] = total;
        return;
    }
    const bool some = total > 0;
    const float lse = (s.reference[tid] + log2f(total)) * LN2;
    float share = some ? 1 / total : 0;
    if (head < w.heads) {
        if (item.direct) {
            if (w.sink) share /= 1 + expf(w.sink[head] - (some ? lse : 0));
            w.lse[lse_at(w, item, head)] = some ? lse : INFINITE;
        } else {
            float* to = w.part_lse + static_cast<long long>(item.piece) * w.heads + head;
            *to = some ? lse : -INFINITE;
            for (int i = 0; i < item.unused; i++) *(to += w.heads) = -INFINITE;
        }
    }
    s.share[tid] = share;
}

__device__ __forceinline__ void make_scores(const Work& w, const Item& item, Shared& s, int& stage,
                                            unsigned& phase, unsigned& turn, int head0) {
    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
    const int group = lane / 4, quad = lane % 4;
    const int row0 = warp * 16 + group;  // this thread's keys are row0 and row0 + 8
    const int p_row = warp * 16 + lane / 8 % 2 * 8 + lane % 8;
    const unsigned q_at = address(s.q);
    float sum[COLUMNS * 2];
#pragma unroll
    for (int i = 0; i < COLUMNS * 2; i++) sum[i] = 0;
    if (tid < 64) s.reference[tid] = 0;
    bool fresh = true;
    threads_wait(QUERIES, 384);

    for (int block = 0; block < item.count; block++) {
        float score[COLUMNS * 4];
        const unsigned k_at = address(s.keys[stage]);
        barrier_wait(address(&s.ready[stage]), phase);
        mma_begin();
#pragma unroll
        for (int i = 0; i < (CHUNKS + 1) * 4; i++)
            mma_scores(score, descriptor(k_at + i / 4 * KEYS * 128 + i % 4 * 32, 16, 1024),
                       descriptor(q_at + i / 4 * HEADS * 128 + i % 4 * 32, 16, 1024), i > 0);
        mma_end();
        const bool now[2] = {s.valid[stage][row0] != 0, s.valid[stage][row0 + 8] != 0};
        mma_wait<0>();
        barrier_arrive(address(&s.spent[stage]));

        // scores become exponents of two above the heads' references
#pragma unroll
        for (int j = 0; j < COLUMNS; j++) {
            const float2 ref = *reinterpret_cast<const float2*>(&s.reference[j * 8 + quad * 2]);
#pragma unroll
            for (int i = 0; i < 4; i++)
                score[j * 4 + i] = fmaf(score[j * 4 + i], w.scale_log2, i % 2 ? -ref.y : -ref.x);
        }
        if (!__all_sync(~0u, now[0] && now[1]))
#pragma unroll
            for (int i = 0; i < COLUMNS * 4; i++)
                score[i] = now[i % 4 / 2] ? score[i] : -INFINITE;
        float most = -INFINITE;
#pragma unroll
        for (int i = 0; i < COLUMNS * 4; i++) most = fmaxf(most, score[i]);
        const bool was_fresh = fresh, move = any_of(most > SLACK || fresh);
        if (block > 0) barrier_wait(address(&s.empty), turn ^ 1);
        if (move) move_references(s, score, sum, fresh);
        if (tid == 0) s.rescale = move && !was_fresh;

        unsigned packed[COLUMNS][2];
#pragma unroll
        for (int j = 0; j < COLUMNS; j++) {
            const float a = exp2_fast(score[j * 4]), b = exp2_fast(score[j * 4 + 1]);
            const float c = exp2_fast(score[j * 4 + 2]), d = exp2_fast(score[j * 4 + 3]);
            sum[j * 2] += a + c;
            sum[j * 2 + 1] += b + d;
            packed[j][0] = pack(a, b), packed[j][1] = pack(c, d);
        }
        const unsigned p_at = address(s.weights) + p_row * 128;
#pragma unroll
        for (int j = 0; j < COLUMNS; j += 2)
            store_matrices(p_at + ((j + lane / 16) ^ (p_row & 7)) * 16, packed[j][0], packed[j][1],
                           packed[j + 1][0], packed[j + 1][1]);
        fence_async();
        barrier_arrive(address(&s.full));
        turn ^= 1;
        stage ^= 1;
        phase ^= stage == 0;
    }
    finish_sums(w, item, s, head0, sum);
}

// -- second and third warpgroup: queries in, results out ------------------------------------------

__device__ __forceinline__ void load_queries(const Work& w, const Item& item, Shared& s,
                                             int head0) {
    const unsigned short* q = w.q + item.batch * w.q_batch + item.next * w.q_next;
    const unsigned at = address(s.q);
#pragma unroll 6
    for (int i = threadIdx.x - 128; i < HEADS * (DIM / 8); i += 256) {
        const int head = i / (DIM / 8), d = i % (DIM / 8) * 8, c = d / 64;
        uint4 x = make_uint4(0, 0, 0, 0);
        if (head0 + head < w.heads)
            x = *reinterpret_cast<const uint4*>(q + (head0 + head) * w.q_head + d);
        if (c < CHUNKS)
            x = make_uint4(__byte_perm(x.x, x.y, 0x5410), __byte_perm(x.x, x.y, 0x7632),
                           __byte_perm(x.z, x.w, 0x5410), __byte_perm(x.z, x.w, 0x7632));
        store16(at + c * HEADS * 128 + head * 128 + ((d % 64 / 8 ^ (head & 7)) << 4), x.x, x.y, x.z,
                x.w);
    }
    fence_async();
}

// Sums of a block of a cluster, to where values were.
__device__ __forceinline__ void keep_sums(Shared& s, const float (&acc)[2][64],
                                          int half, int row0) {
    const int group = threadIdx.x % 32 / 4, quad = threadIdx.x % 4;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int row = row0 + 8 * r;
        if (row >= HEADS) continue;
#pragma unroll
        for (int i = 0; i < 32; i++) {
            const unsigned chunk = (half * 64 + i * 2 + quad / 2) ^ (group * 2);
            const float a = acc[i / 16][i % 16 * 4 + r * 2];
            const float b = acc[i / 16][i % 16 * 4 + r * 2 + 1];
            store8(address(s.keys) + row * 2048 + chunk * 16 + quad % 2 * 8,
                   a, b);
        }
    }
}

__device__ __forceinline__ void write_results(const Work& w, const Item& item, const Shared& s,
                                              const float (&acc)[2][64], int half, int row0,
                                              int head0) {
    const int quad = threadIdx.x % 4;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int row = row0 + 8 * r, head = head0 + row;
        const bool real = row < HEADS && head < w.heads;
        const float share = real ? s.share[row] : 0;
        const long long place = item.direct ? item.row : item.piece;
        const long long to = (place * w.heads + head) * LATENT + half * 256 + quad * 2;
#pragma unroll
        for (int i = 0; i < 32; i++) {
            float a = acc[i / 16][i % 16 * 4 + r * 2] * share;
            float b = acc[i / 16][i % 16 * 4 + r * 2 + 1] * share;
            const float other = __shfl_xor_sync(~0u, quad % 2 ? a : b, 1);
            if (quad % 2)
                a = other;
            else
                b = other;
            if (!real) continue;
            if (item.direct)
                *reinterpret_cast<unsigned*>(w.out + to + i * 8) = pack(a, b);
            else
                *reinterpret_cast<float2*>(w.part + to + i * 8) = make_float2(a, b);
        }
    }
}

__device__ __forceinline__ void add_values(const Work& w, const Item& item, Shared& s, int& stage,
                                           unsigned& phase, unsigned& turn, unsigned& row_turn,
                                           int head0) {
    const int tid = threadIdx.x % 128, half = threadIdx.x / 128 - 1, lane = tid % 32;
    const int row0 = tid / 32 * 16 + lane / 4;  // this thread's heads are row0 and row0 + 8
    load_queries(w, item, s, head0);
    threads_wait(QUERIES, 384);
    float acc[2][64];
    if (item.count == 0)
#pragma unroll
        for (int i = 0; i < 128; i++) acc[i / 64][i % 64] = 0;
    for (int block = 0; block < item.count; block++) {
        barrier_wait(address(&s.ready[stage]), phase);
        barrier_wait(address(&s.full), turn);
        if (s.rescale) {
            const float f0 = s.factor[row0 % HEADS], f1 = s.factor[(row0 + 8) % HEADS];
#pragma unroll
            for (int i = 0; i < 128; i++) acc[i / 64][i % 64] *= i % 4 / 2 ? f1 : f0;
        }
        const unsigned p_at = address(s.weights);
        const unsigned v_at = address(s.keys[stage]) + half * (CHUNKS / 2) * KEYS * 128;
        mma_begin();
#pragma unroll
        for (int i = 0; i < KEYS / 16; i++)
#pragma unroll
            for (int n = 0; n < 2; n++)
                mma_values(acc[n], descriptor(p_at + i * 2048, 8192, 1024),
                           descriptor(v_at + n * 2 * KEYS * 128 + i * 2048, KEYS * 128, 1024),
                           block + i > 0);
        mma_end();
        mma_wait<0>();
        barrier_arrive(address(&s.empty));
        barrier_arrive(address(&s.spent[stage]));
        turn ^= 1;
        stage ^= 1;
        phase ^= stage == 0;
    }
    row_ends(s, row_turn);
    if (MODE == JOINED)
        keep_sums(s, acc, half, row0);
    else
        write_results(w, item, s, acc, half, row0, head0);
}

// -- both: the pieces of a row, one in each block of a cluster, become its result -----------------

__device__ __forceinline__ void join(const Work& w, const Item& item, Shared& s, int head0) {
    const int tid = threadIdx.x, pieces = w.splits, rank = blockIdx.y;
    const int heads = min(HEADS, w.heads - head0);
    float* shares = reinterpret_cast<float*>(s.weights);
    cluster_wait();
    if (tid < heads) {
        const unsigned reference_at = address(&s.reference[tid]), total_at = address(&s.share[tid]);
        float factor[CLUSTER], total[CLUSTER], most = -INFINITE, sum = 0;
#pragma unroll
        for (int r = 0; r < CLUSTER; r++) {
            total[r] = r < pieces ? cluster_float(total_at, r) : 0;
            factor[r] = r < pieces ? cluster_float(reference_at, r) : 0;
            if (total[r] > 0) most = fmaxf(most, factor[r]);
        }
#pragma unroll
        for (int r = 0; r < CLUSTER; r++) {
            factor[r] = total[r] > 0 ? exp2f(factor[r] - most) : 0;
            sum += total[r] * factor[r];
        }
        const bool some = sum > 0;
        const float lse = (most + log2f(sum)) * LN2;
        float share = some ? 1 / sum : 0;
        if (w.sink) share /= 1 + expf(w.sink[head0 + tid] - (some ? lse : 0));
#pragma unroll
        for (int r = 0; r < CLUSTER; r++) shares[r * 64 + tid] = factor[r] * share;
        if (rank == 0) w.lse[lse_at(w, item, head0 + tid)] = some ? lse : INFINITE;
    }
    threads_wait(WEIGHTS, THREADS);
    unsigned short* out = w.out + (static_cast<long long>(item.row) * w.heads + head0) * LATENT;
    const int all = heads * (LATENT / 4), part = (all + pieces - 1) / pieces;
    for (int i = rank * part + tid; i < min(all, (rank + 1) * part); i += THREADS) {
        const int row = i / (LATENT / 4), chunk = i % (LATENT / 4);
        const unsigned at = address(s.keys) + row * 2048 + ((chunk ^ (row % 8 * 2)) * 16);
        float4 v[CLUSTER], sum = make_float4(0, 0, 0, 0);
#pragma unroll
        for (int r = 0; r < CLUSTER; r++)
            if (r < pieces) v[r] = cluster_load(at, r);
#pragma unroll
        for (int r = 0; r < CLUSTER; r++) {
            if (r >= pieces) continue;
            const float f = shares[r * 64 + row];
            sum.x = fmaf(v[r].x, f, sum.x), sum.y = fmaf(v[r].y, f, sum.y);
            sum.z = fmaf(v[r].z, f, sum.z), sum.w = fmaf(v[r].w, f, sum.w);
        }
        *reinterpret_cast<uint2*>(out + static_cast<long long>(i) * 4) =
            make_uint2(pack(sum.x, sum.z), pack(sum.y, sum.w));
    }
    cluster_wait();  // nobody leaves while others read its memory
}

struct Turns {
    int stage;
    unsigned phase, turn, row;
};

__device__ __forceinline__ void run_first(const Work& w, const Item& item, Shared& s, Turns& t,
                                          int head0) {
    make_scores(w, item, s, t.stage, t.phase, t.turn, head0);
    row_ends(s, t.row);
    if (MODE == JOINED) join(w, item, s, head0);
}

__device__ __forceinline__ void run_middle(const Work& w, const Item& item, Shared& s, Turns& t,
                                           int head0) {
    add_values(w, item, s, t.stage, t.phase, t.turn, t.row, head0);
    if (MODE == JOINED) join(w, item, s, head0);
}

__device__ __forceinline__ void run_last(const Work& w, const Item& item, Shared& s, Turns& t,
                                         int head0) {
    bring_keys(w, item, s, t.stage, t.phase);
    row_ends(s, t.row);
    if (MODE == JOINED) join(w, item, s, head0);
}

// Grid [rows * head blocks, pieces], or, PLANNED and EVEN, [workers * head blocks]: blocks that
// share keys run side by side.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    sparse_decode(const __grid_constant__ Work w) {
    extern __shared__ unsigned char memory[];
    Shared& s = *reinterpret_cast<Shared*>(memory + (1024 - (address(memory) & 1023)) % 1024);
    const int head_blocks = (w.heads + HEADS - 1) / HEADS;
    const int head0 = blockIdx.x % head_blocks * HEADS, who = blockIdx.x / head_blocks;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(address(&s.ready[i]), 128);
            barrier_init(address(&s.spent[i]), 384);
        }
        barrier_init(address(&s.full), 128);
        barrier_init(address(&s.empty), 256);
        barrier_init(address(&s.ended), THREADS);
        barrier_init_done();
    }
    __syncthreads();
    Turns t = {0, 0, 0, 0};
#if MODE == 1 || MODE == 3
#if MODE == 3
    const int blocks = (w.k + KEYS - 1) / KEYS;
    const int from = who * w.span, to = min(from + w.span, w.rows * blocks);
    const int row = from / blocks, last = (to - 1) / blocks;
    auto item_at = [&](int at) {  // a row's pieces lie side by side, in `splits` places
        const int piece = who - at * blocks / w.span;
        const int pieces = at < last || to == (at + 1) * blocks ? piece + 1 : w.splits;
        const int first = at == row ? from - at * blocks : 0, end = min(blocks, to - at * blocks);
        return item_of(w, at, first, end, at * w.splits + piece, false, w.splits - pieces);
    };
#else
    const int row = w.schedule[who * 4], begin = w.schedule[who * 4 + 1];
    const int last = min(w.schedule[who * 4 + 2], w.rows - 1), stop = w.schedule[who * 4 + 3];
    int piece = 0;  // pieces are numbered row by row and worker by worker
    for (int i = threadIdx.x % 32; i < who; i += 32)
        piece += max(0, min(w.schedule[i * 4 + 2], w.rows - 1) - w.schedule[i * 4] + 1);
    piece = __reduce_add_sync(~0u, piece);
    auto item_at = [&](int at) {
        const bool direct = w.num_splits[at + 1] - w.num_splits[at] <= 1;
        const int first = at == row ? begin : 0, end = at == last ? stop : 1 << 30;
        return item_of(w, at, first, end, piece + at - row, direct);
    };
#endif
    if (threadIdx.x < 128) {
        registers_give<FIRST>();
        for (int at = row; at <= last; at++) run_first(w, item_at(at), s, t, head0);
    } else if (threadIdx.x < 384) {
        registers_take<160>();
        for (int at = row; at <= last; at++) run_middle(w, item_at(at), s, t, head0);
    } else {
        registers_give<LAST>();
        for (int at = row; at <= last; at++) run_last(w, item_at(at), s, t, head0);
    }
#else
    const int begin = blockIdx.y * w.span, piece = who * w.splits + blockIdx.y;
    const Item item = item_of(w, who, begin, begin + w.span, piece, w.splits == 1);
    if (threadIdx.x < 128) {
        registers_give<FIRST>();
        run_first(w, item, s, t, head0);
    } else if (threadIdx.x < 384) {
        registers_take<160>();
        run_middle(w, item, s, t, head0);
    } else {
        registers_give<LAST>();
        run_last(w, item, s, t, head0);
    }
#endif
}
