// Attention of 64 rows (queries and heads) over keys that they share, on Hopper. A persistent block
// has four warpgroups with one task each, which hand tiles of 48 keys on through shared memory:
//   gather   copies the rows' queries and the keys, up to three tiles ahead
//   score    S = Q K^T, the softmax, and P = its numerators as 16-bit numbers. Five ninths of Q stay
//            in registers, which saves shared memory and its bandwidth.
//   mix (2)  O += P V, each for half of the 512 value columns, and the result
// The tensor cores take turns: P V of one tile while the softmax of the next one is computed, then
// Q K^T of the one after it. So P is handed on late, when most of the next Q K^T has been begun.
// The numerators' base follows the largest score only when that is 2^8 above it, so that O is seldom
// rescaled. WIDTH (columns of a key, 512 or 576), HALF (fp16 instead of bf16) and RANGES (which keys:
// see Work) are macros.
// Numbers that threads store and load themselves are handed on, and their place given back, by every
// thread for itself: one lane that arrives for its warp orders the others' accesses only through
// `__syncwarp`, which is no instruction here, so that a race checker cannot follow it.
#include "sparse_prefill_work.cuh"

constexpr int STAGES = 3, PUBLISHED = 28;  // PUBLISHED: of 36 products, see `products`
constexpr int PIECES = WIDTH / 64, HELD = 5;  // pieces of 64 columns; of Q, those in registers
constexpr unsigned K_PIECE = KEYS * 128, Q_PIECE = ROWS * 128;
constexpr unsigned K_AT = 0, K_TILE = PIECES * K_PIECE;
constexpr unsigned Q_AT = K_AT + STAGES * K_TILE;
constexpr unsigned P_AT = Q_AT + (PIECES - HELD) * Q_PIECE, P_TILE = ROWS * 128;
constexpr unsigned KEPT_AT = P_AT + 2 * P_TILE;        // float [2, 64]: what old sums are scaled by
constexpr unsigned RAISED_AT = KEPT_AT + 2 * 64 * 4;   // float [2, 4]: if a warp's rows are scaled
constexpr unsigned FACTOR_AT = RAISED_AT + 2 * 4 * 4;  // float [64]: what the result is scaled by
constexpr unsigned SEEN_AT = FACTOR_AT + 64 * 4;       // 64 bits [3]: which keys there are
constexpr unsigned BARRIERS_AT = SEEN_AT + STAGES * 8;
constexpr unsigned K_LANDED = BARRIERS_AT, K_FULL = K_LANDED + 8 * STAGES,
                   K_FREE = K_FULL + 8 * STAGES, P_FULL = K_FREE + 8 * STAGES, P_FREE = P_FULL + 16,
                   Q_LANDED = P_FREE + 16, Q_FULL = Q_LANDED + 8, Q_FREE = Q_FULL + 8,
                   FACTOR_FULL = Q_FREE + 8, FACTOR_FREE = FACTOR_FULL + 8;
constexpr float LOG2E = 1.4426950408889634f, HEADROOM = 8.0f;

// A position in a ring of buffers, and the parity of its barriers.
template <int SIZE>
struct Ring {
    unsigned at = 0, phase = 0;
    DEV void next() {
        if (++at == SIZE) at = 0, phase ^= 1;
    }
};

// Three warps copy: 8 threads a row of 128 bytes at a time.
DEV void gather(const Call& call, unsigned base) {
    const int piece = threadIdx.x & 7, group = threadIdx.x / 8;
    const unsigned swizzled = (piece ^ (group & 7)) << 4;  // rows 12 further: 4 pieces beside it
    Ring<STAGES> ring;
    unsigned round = 0;
    for (int at = blockIdx.x; at < Work::count(call); at += gridDim.x, round ^= 1) {
        const Work work(call, at);
        int rows[KEYS / 12];
#pragma unroll
        for (int i = 0; i < KEYS / 12; ++i) rows[i] = work.key(call, group + 12 * i);
        for (int t = 0; t < work.tiles; ++t, ring.next()) {
            wait(base + K_FREE + 8 * ring.at, ring.phase ^ 1);
            const unsigned to = base + K_AT + ring.at * K_TILE + group * 128;
#pragma unroll
            for (int i = 0; i < KEYS / 12; ++i) {
                const int bytes = rows[i] >= 0 ? 16 : 0;
                const unsigned short* from = call.kv + max(rows[i], 0) * call.kv_row + piece * 8;
#pragma unroll
                for (int c = 0; c < PIECES; ++c)
                    copy16(to + (swizzled ^ (i & 1) << 6) + i * 12 * 128 + c * K_PIECE, from + c * 64,
                           bytes);
                rows[i] = work.key(call, (t + 1) * KEYS + group + 12 * i);
            }
            arrive_after_copies(base + K_LANDED + 8 * ring.at);
            if (t) continue;
            wait(base + Q_FREE, round ^ 1);
#pragma unroll 1
            for (int row = group; row < ROWS; row += 12) {
                const int bytes = work.has(call, row) ? 16 : 0;
                const unsigned short* from =
                    bytes ? work.query(call, row) + HELD * 64 + piece * 8 : call.q;
                const unsigned place = base + Q_AT + row * 128 + ((piece ^ (row & 7)) << 4);
#pragma unroll
                for (int c = 0; c < PIECES - HELD; ++c)
                    copy16(place + c * Q_PIECE, from + c * 64, bytes);
            }
            arrive_after_copies(base + Q_LANDED);
            const int after = at + gridDim.x;
            if (after >= Work::count(call)) continue;
            const Work next(call, after);
            for (int i = threadIdx.x; i < ROWS * PIECES; i += 96)
                if (next.has(call, i / PIECES))
                    prefetch(next.query(call, i / PIECES) + i % PIECES * 64);
        }
    }
}

// The fourth warp shows the tensor cores what has landed, and says which keys there are.
DEV void relay(const Call& call, unsigned base) {
    const int lane = threadIdx.x & 31;
    Ring<STAGES> ring;
    unsigned round = 0;
    for (int at = blockIdx.x; at < Work::count(call); at += gridDim.x, round ^= 1) {
        const Work work(call, at);
        int rows[2] = {-1, -1};
        for (int t = -1; t < work.tiles; ++t) {
            const unsigned low = __ballot_sync(~0u, rows[0] >= 0);
            const unsigned high = __ballot_sync(~0u, rows[1] >= 0);
            rows[0] = work.key(call, (t + 1) * KEYS + lane);
            rows[1] = lane < KEYS - 32 ? work.key(call, (t + 1) * KEYS + 32 + lane) : -1;
            if (t < 0) continue;
            wait(base + K_FREE + 8 * ring.at, ring.phase ^ 1);  // nobody reads what was seen before
            wait(base + K_LANDED + 8 * ring.at, ring.phase);
            fence_proxy();
            if (lane == 0) store2(base + SEEN_AT + 8 * ring.at, low, high);
            arrive_if(lane == 0, base + K_FULL + 8 * ring.at);
            ring.next();
            if (t) continue;
            wait(base + Q_LANDED, round);
            fence_proxy();
            arrive_if(lane == 0, base + Q_FULL);
        }
    }
}

// Begins the products that make Q K^T of a tile of keys. Before the last few, hands on the tile of P
// before, if told so: its products shall stand in the tensor cores' queue behind these.
DEV void products(float (&s)[24], const unsigned (&held)[4 * HELD][4], u64 query, unsigned base,
                  unsigned stage, bool publishes, const Ring<2>& ring) {
    const u64 keys = tile(base + K_AT + stage * K_TILE, 16);
    products_begin();
#pragma unroll
    for (int i = 0; i < 4 * PIECES; ++i) {
        const u64 b = keys + ((i / 4 * K_PIECE + i % 4 * 32) >> 4);
        if (i < 4 * HELD)
            multiply(s, held[i], b, i);
        else
            multiply(s, query + (((i / 4 - HELD) * Q_PIECE + i % 4 * 32) >> 4), b, 1);
        if (i == PUBLISHED) arrive_if(publishes, base + P_FULL + 8 * ring.at);
    }
    products_end();
}

// Softmax of the two rows of a thread, row g and row g + 8 of its warp's 16.
struct Softmax {
    float peak[2], total[2];
    float base[2], zero[2];  // the score that numerators are relative to; minus it in base 2, or 0

    DEV Softmax() {
        peak[0] = peak[1] = base[0] = base[1] = -INFINITE;
        total[0] = total[1] = zero[0] = zero[1] = 0;
    }

    // Writes the numerators of a tile; `publish` hands them on.
    DEV void step(float (&s)[24], float unit, unsigned base_at, const Ring<2>& ring) {
        const int lane = threadIdx.x & 31, warp = threadIdx.x / 32 & 3;
        bool far = false;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float most = fmaxf(s[2 * r], s[2 * r + 1]);
#pragma unroll
            for (int j = 1; j < 6; ++j)
                most = fmaxf(most, fmaxf(s[4 * j + 2 * r], s[4 * j + 2 * r + 1]));
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
            peak[r] = fmaxf(peak[r], most);
            far |= (peak[r] - base[r]) * unit > HEADROOM;  // false as long as both are infinite
        }
        const bool raised = __any_sync(~0u, far);
        if (raised) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const float old = zero[r];
                zero[r] = peak[r] == -INFINITE ? 0.0f : -peak[r] * unit;
                const float kept = base[r] == -INFINITE ? 0.0f : power2(zero[r] - old);
                base[r] = peak[r];
                total[r] *= kept;
                const int row = warp * 16 + lane / 4 + 8 * r;
                store_if((lane & 3) == 0, base_at + KEPT_AT + (ring.at * 64 + row) * 4, kept);
            }
        }
        store_if(lane == 0, base_at + RAISED_AT + (ring.at * 4 + warp) * 4, raised ? 1.0f : 0.0f);
        const int row = warp * 16 + (lane & 15);
        const unsigned to = base_at + P_AT + ring.at * P_TILE + row * 128;
#pragma unroll
        for (int c = 0; c < 3; ++c) {
#pragma unroll
            for (int i = 8 * c; i < 8 * c + 8; ++i) {
                s[i] = power2(fmaf(s[i], unit, zero[i / 2 & 1]));
                total[i / 2 & 1] += s[i];
            }
            store_matrices(to + (((2 * c + (lane >> 4)) ^ (row & 7)) << 4),
                           pack(s[8 * c], s[8 * c + 1]), pack(s[8 * c + 2], s[8 * c + 3]),
                           pack(s[8 * c + 4], s[8 * c + 5]), pack(s[8 * c + 6], s[8 * c + 7]));
        }
        fence_proxy();
    }

    DEV void end(const Call& call, const Work& work, unsigned base_at) {
        const int lane = threadIdx.x & 31, warp = threadIdx.x / 32 & 3;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            total[r] += __shfl_xor_sync(~0u, total[r], 1);
            total[r] += __shfl_xor_sync(~0u, total[r], 2);
            if (lane & 3) continue;
            const int row = warp * 16 + lane / 4 + 8 * r;
            const bool none = total[r] == 0, own = work.has(call, row);
            const float log = (logarithm2(total[r]) - zero[r]) / LOG2E;
            float factor = none ? 0.0f : 1 / total[r];
#ifndef RANGES
            if (call.sink && own && !none)
                factor /= 1 + power2((call.sink[work.head + row] - log) * LOG2E);
#endif
            store(base_at + FACTOR_AT + row * 4, factor);
            if (!own) continue;
            const long long place = work.place(call, row);
            call.lse[place] = none ? INFINITE : log;
            if (call.top) call.top[place] = peak[r] * call.scale;
        }
    }
};

// A thread's part of the pieces of Q that stay in registers, as the first factor of products.
DEV void hold(const Call& call, const Work& work, unsigned (&held)[4 * HELD][4]) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32 & 3;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int row = warp * 16 + lane / 4 + 8 * r;
        const bool own = work.has(call, row);
        const unsigned* from = (const unsigned*)(work.query(call, row) + 2 * (lane & 3));
#pragma unroll
        for (int i = 0; i < 4 * HELD; ++i) {
            held[i][r] = own ? from[8 * i] : 0;
            held[i][2 + r] = own ? from[8 * i + 4] : 0;
        }
    }
}

DEV void score(const Call& call, unsigned base) {
    const u64 query = tile(base + Q_AT, 16);
    Ring<STAGES> ring;
    Ring<2> turn;
    unsigned round = 0;
    float s[24];
    unsigned held[4 * HELD][4];
    for (int at = blockIdx.x; at < Work::count(call); at += gridDim.x, round ^= 1) {
        const Work work(call, at);
        const Sight sight(call, work);
        Softmax softmax;
        if (at == blockIdx.x) hold(call, work, held);
        wait(base + Q_FULL, round);
        wait(base + K_FULL + 8 * ring.at, ring.phase);
        products(s, held, query, base, ring.at, false, turn);
        for (int t = 0; t < work.tiles; ++t, turn.next()) {
            const bool last = t + 1 == work.tiles;
            products_wait<0>(s);
            if (last) {
                arrive_if((threadIdx.x & 31) == 0, base + Q_FREE);
                const int after = at + gridDim.x;
                if (after < Work::count(call)) hold(call, Work(call, after), held);
            }
            const uint2 seen = load2(base + SEEN_AT + 8 * ring.at);
            sight.hide(s, t, seen.x, seen.y);
            ring.next();
            wait(base + P_FREE + 8 * turn.at, turn.phase ^ 1);
            softmax.step(s, call.scale * LOG2E, base, turn);
            const bool landed =
                !last && __all_sync(~0u, ready(base + K_FULL + 8 * ring.at, ring.phase));
            arrive_if(!landed, base + P_FULL + 8 * turn.at);
            if (last) break;
            if (!landed) wait(base + K_FULL + 8 * ring.at, ring.phase);
            products(s, held, query, base, ring.at, landed, turn);
        }
        turn.next();
        wait(base + FACTOR_FREE, round ^ 1);
        softmax.end(call, work, base);
        arrive(base + FACTOR_FULL);
    }
}

// Transposes the 4 words of 4 neighbouring threads, so that each has 16 bytes of one row.
DEV void exchange(unsigned (&w)[4]) {
    const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        const unsigned other = __shfl_xor_sync(~0u, odd ? w[i] : w[i + 1], 1);
        (odd ? w[i] : w[i + 1]) = other;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const unsigned other = __shfl_xor_sync(~0u, upper ? w[i] : w[i + 2], 2);
        (upper ? w[i] : w[i + 2]) = other;
    }
}

DEV void mix(const Call& call, unsigned base, int half) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32 & 3, row = warp * 16 + lane / 4;
    Ring<STAGES> ring;
    Ring<2> turn;
    unsigned round = 0;
    float o[2][64];  // columns 0 to 127 and 128 to 255 of the half
    for (int at = blockIdx.x; at < Work::count(call); at += gridDim.x, round ^= 1) {
        const Work work(call, at);
        for (int t = 0; t < work.tiles; ++t, ring.next(), turn.next()) {
            wait(base + P_FULL + 8 * turn.at, turn.phase);
            if (t && load(base + RAISED_AT + (turn.at * 4 + warp) * 4) != 0) {
                const unsigned from = base + KEPT_AT + (turn.at * 64 + row) * 4;
                const float upper = load(from), lower = load(from + 32);
#pragma unroll
                for (int i = 0; i < 128; ++i) o[i / 64][i % 64] *= i & 2 ? lower : upper;
            }
            const u64 shares = tile(base + P_AT + turn.at * P_TILE, 16);
            const u64 values = tile(base + K_AT + ring.at * K_TILE + half * 4 * K_PIECE, K_PIECE);
            products_begin();
#pragma unroll
            for (int i = 0; i < KEYS / 16; ++i)
                for (int c = 0; c < 2; ++c)
                    multiply(o[c], shares + (i * 32 >> 4),
                             values + ((i * 2048 + c * 2 * K_PIECE) >> 4), t | i);
            products_end();
            products_wait<0>(o[0]);
            products_wait<0>(o[1]);
            arrive(base + K_FREE + 8 * ring.at);
            arrive(base + P_FREE + 8 * turn.at);
        }
        wait(base + FACTOR_FULL, round);
        const float upper = load(base + FACTOR_AT + row * 4);
        const float lower = load(base + FACTOR_AT + (row + 8) * 4);
        arrive(base + FACTOR_FREE);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float factor = r ? lower : upper;
            const bool own = work.has(call, row + 8 * r);
            const long long to = work.place(call, row + 8 * r) * VALUES + half * 256;
            if (call.part) {
#pragma unroll
                for (int j = 0; j < 32; ++j) {
                    const float* pair = &o[j / 16][4 * (j % 16) + 2 * r];
                    if (own)
                        *(float2*)(call.part + to + 8 * j + 2 * (lane & 3)) =
                            make_float2(pair[0] * factor, pair[1] * factor);
                }
                continue;
            }
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                unsigned w[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float* pair = &o[j / 4][16 * (j % 4) + 4 * i + 2 * r];
                    w[i] = pack(pair[0] * factor, pair[1] * factor);
                }
                exchange(w);
                if (own)
                    *(uint4*)(call.out + to + 32 * j + 8 * (lane & 3)) =
                        make_uint4(w[0], w[1], w[2], w[3]);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(512, 1) attend(
    const unsigned short* q, const unsigned short* kv, const int* indices, const int* lengths,
    const float* sink, unsigned short* out, float* top, float* lse, float* part, long long q_token,
    long long q_head, long long kv_row, long long index_row, int tokens, int heads, int context,
    int k, int splits, float scale) {
    extern __shared__ __align__(1024) unsigned char memory[];
    const Call call{q,      kv,        indices, lengths, sink,    out, top,    lse,  part, q_token,
                    q_head, kv_row, index_row, tokens,  heads,   context, k, splits, scale};
    const unsigned base = address(memory);
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(base + K_LANDED + 8 * i, 96);
            barrier_init(base + K_FULL + 8 * i, 1);
            barrier_init(base + K_FREE + 8 * i, 256);
        }
        for (int i = 0; i < 2; ++i) {
            barrier_init(base + P_FULL + 8 * i, 128);
            barrier_init(base + P_FREE + 8 * i, 256);
        }
        barrier_init(base + Q_LANDED, 96);
        barrier_init(base + Q_FULL, 1);
        barrier_init(base + Q_FREE, 4);
        barrier_init(base + FACTOR_FULL, 128);
        barrier_init(base + FACTOR_FREE, 256);
        fence_proxy();
    }
    __syncthreads();
    const int task = __shfl_sync(~0u, threadIdx.x / 128, 0);
    if (task == 0) {
        fewer_registers<48>();
        if (threadIdx.x < 96)
            gather(call, base);
        else
            relay(call, base);
    } else if (task == 1) {
        more_registers<144>();
        score(call, base);
    } else {
        more_registers<160>();
        mix(call, base, task - 2);
    }
}
