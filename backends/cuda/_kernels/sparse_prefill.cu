// Attention of 64 heads of one query over selected keys, on Hopper. A persistent block has four
// warpgroups with one task each, which hand tiles of 48 keys on through shared memory:
//   gather   copies the heads' queries and the selected rows of kv, three tiles ahead
//   score    S = Q K^T, the softmax, and P = its numerators as 16-bit numbers; four ninths of Q stay
//            in registers, which saves shared memory and its bandwidth
//   mix (2)  O += P V, each for half of the 512 value columns, and the result
// The numerators' base follows the largest score only when that is 2^8 above it, so that O is seldom
// rescaled. WIDTH (columns of a key, 512 or 576) and HALF (fp16 instead of bf16) are macros.
#include "sparse_prefill_work.cuh"

constexpr int STAGES = 3;
constexpr int PIECES = WIDTH / 64, HELD = 4;  // pieces of 64 columns; of Q, those in registers
constexpr unsigned K_PIECE = KEYS * 128, Q_PIECE = ROWS * 128;
constexpr unsigned K_AT = 0, K_TILE = PIECES * K_PIECE;
constexpr unsigned Q_AT = K_AT + STAGES * K_TILE;
constexpr unsigned P_AT = Q_AT + (PIECES - HELD) * Q_PIECE, P_TILE = ROWS * 128;
constexpr unsigned KEPT_AT = P_AT + 2 * P_TILE;       // float [2, 64]: what old sums are scaled by
constexpr unsigned RAISED_AT = KEPT_AT + 2 * 64 * 4;  // int [2, 4]: whether a warp's rows are scaled
constexpr unsigned FACTOR_AT = RAISED_AT + 2 * 4 * 4; // float [64]: what the result is scaled by
constexpr unsigned BARRIERS_AT = FACTOR_AT + 64 * 4;
constexpr unsigned K_FULL = BARRIERS_AT, K_FREE = K_FULL + 8 * STAGES, P_FULL = K_FREE + 8 * STAGES,
                   P_FREE = P_FULL + 16, Q_FULL = P_FREE + 16, Q_FREE = Q_FULL + 8,
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

DEV void gather(const Call& call, unsigned base) {
    const int piece = threadIdx.x & 7, group = threadIdx.x % 128 >> 3;
    const unsigned place = group * 128 + ((piece ^ (group & 7)) << 4);
    Ring<STAGES> ring;
    unsigned round = 0;
    for (int at = blockIdx.x; at < Work::count(call); at += gridDim.x, round ^= 1) {
        const Work work(call, at);
        int rows[KEYS / 16];
#pragma unroll
        for (int i = 0; i < KEYS / 16; ++i) rows[i] = work.key(call, group + 16 * i);
        wait(base + Q_FREE, round ^ 1);
#pragma unroll 1
        for (int i = 0; i < ROWS / 16; ++i) {
            const int row = group + 16 * i, bytes = work.has(call, row) ? 16 : 0;
            const unsigned short* from =
                (bytes ? work.query(call, row) : call.q) + HELD * 64 + piece * 8;
#pragma unroll
            for (int c = 0; c < PIECES - HELD; ++c)
                copy16(base + Q_AT + c * Q_PIECE + place + i * 2048, from + c * 64, bytes);
        }
        arrive_after_copies(base + Q_FULL);
        for (int t = 0; t < work.tiles; ++t, ring.next()) {
            int next[KEYS / 16];
#pragma unroll
            for (int i = 0; i < KEYS / 16; ++i)
                next[i] = work.key(call, (t + 1) * KEYS + group + 16 * i);
            wait(base + K_FREE + 8 * ring.at, ring.phase ^ 1);
            const unsigned to = base + K_AT + ring.at * K_TILE + place;
#pragma unroll
            for (int i = 0; i < KEYS / 16; ++i) {
                const int bytes = rows[i] >= 0 ? 16 : 0;
                const unsigned short* from = call.kv + max(rows[i], 0) * call.kv_row + piece * 8;
#pragma unroll
                for (int c = 0; c < PIECES; ++c)
                    copy16(to + c * K_PIECE + i * 2048, from + c * 64, bytes);
                rows[i] = next[i];
            }
            arrive_after_copies(base + K_FULL + 8 * ring.at);
        }
    }
}

// Q K^T of one tile of keys.
DEV void scores(float (&s)[24], const unsigned (&held)[4 * HELD][4], unsigned base, unsigned stage) {
    const u64 keys = tile(base + K_AT + stage * K_TILE, 16), query = tile(base + Q_AT, 16);
    products_begin();
#pragma unroll
    for (int i = 0; i < 4 * HELD; ++i)
        multiply(s, held[i], keys + ((i / 4 * K_PIECE + i % 4 * 32) >> 4), i);
#pragma unroll
    for (int i = 4 * HELD; i < 4 * PIECES; ++i)
        multiply(s, query + (((i / 4 - HELD) * Q_PIECE + i % 4 * 32) >> 4),
                 keys + ((i / 4 * K_PIECE + i % 4 * 32) >> 4), 1);
    products_end();
}

// Softmax of the two rows of a thread, row g and row g + 8 of its warp's 16.
struct Softmax {
    float peak[2], base[2], total[2];
    DEV void step(float (&s)[24], float unit, unsigned base_at, Ring<2>& ring) {
        const int lane = threadIdx.x & 31, warp = threadIdx.x / 32 & 3, t4 = lane & 3;
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
            far |= (peak[r] - base[r]) * unit > HEADROOM;
        }
        const bool raised = __any_sync(~0u, far);
        wait(base_at + P_FREE + 8 * ring.at, ring.phase ^ 1);
        if (raised) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const float kept = peak[r] == -INFINITE ? 1.0f : power2((base[r] - peak[r]) * unit);
                base[r] = peak[r];
                total[r] *= kept;
                if (t4 == 0) {
                    const int row = warp * 16 + lane / 4 + 8 * r;
                    store(base_at + KEPT_AT + (ring.at * 64 + row) * 4, kept);
                }
            }
        }
        if (lane == 0)
            store(base_at + RAISED_AT + (ring.at * 4 + warp) * 4, raised ? 1.0f : 0.0f);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float zero = base[r] == -INFINITE ? 0.0f : -base[r] * unit;
#pragma unroll
            for (int j = 0; j < 6; ++j) {
                const int i = 4 * j + 2 * r;
                s[i] = power2(fmaf(s[i], unit, zero));
                s[i + 1] = power2(fmaf(s[i + 1], unit, zero));
                total[r] += s[i] + s[i + 1];
            }
        }
        const int row = warp * 16 + (lane & 15);
        const unsigned to = base_at + P_AT + ring.at * P_TILE + row * 128;
#pragma unroll
        for (int i = 0; i < 3; ++i)
            store_matrices(to + (((2 * i + (lane >> 4)) ^ (row & 7)) << 4),
                           pack(s[8 * i], s[8 * i + 1]), pack(s[8 * i + 2], s[8 * i + 3]),
                           pack(s[8 * i + 4], s[8 * i + 5]), pack(s[8 * i + 6], s[8 * i + 7]));
        fence_proxy();
        __syncwarp();
        if (lane == 0) arrive(base_at + P_FULL + 8 * ring.at);
        ring.next();
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
            const float log = base[r] * call.scale + logarithm2(total[r]) / LOG2E;
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

DEV void score(const Call& call, unsigned base) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32 & 3;
    Ring<STAGES> ring;
    Ring<2> turn;
    unsigned round = 0;
    float s[2][24];
    unsigned held[4 * HELD][4];
    for (int at = blockIdx.x; at < Work::count(call); at += gridDim.x, round ^= 1) {
        const Work work(call, at);
        Sight sight(call, work);
        Softmax softmax;
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
            softmax.peak[r] = softmax.base[r] = -INFINITE;
            softmax.total[r] = 0;
        }
        const auto begin = [&](float (&into)[24]) {
            wait(base + K_FULL + 8 * ring.at, ring.phase);
            fence_proxy();
            scores(into, held, base, ring.at);
            ring.next();
        };
        const auto finish = [&](float (&from)[24], int t) {
            sight.hide(from, call, work, t);
            softmax.step(from, call.scale * LOG2E, base, turn);
        };
        wait(base + Q_FULL, round);
        begin(s[0]);
        for (int t = 0;; ++t) {
            if (t + 1 == work.tiles) {
                products_wait<0>(s[0]);
                if (lane == 0) arrive(base + Q_FREE);
                finish(s[0], t);
                break;
            }
            begin(s[1]);
            products_wait<1>(s[0]);
            finish(s[0], t);
            if (++t + 1 == work.tiles) {
                products_wait<0>(s[1]);
                if (lane == 0) arrive(base + Q_FREE);
                finish(s[1], t);
                break;
            }
            begin(s[0]);
            products_wait<1>(s[1]);
            finish(s[1], t);
        }
        wait(base + FACTOR_FREE, round ^ 1);
        softmax.end(call, work, base);
        __syncwarp();
        if (lane == 0) arrive(base + FACTOR_FULL);
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
            wait(base + K_FULL + 8 * ring.at, ring.phase);
            wait(base + P_FULL + 8 * turn.at, turn.phase);
            fence_proxy();
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
            __syncwarp();
            if (lane == 0) {
                arrive(base + K_FREE + 8 * ring.at);
                arrive(base + P_FREE + 8 * turn.at);
            }
        }
        wait(base + FACTOR_FULL, round);
        const float upper = load(base + FACTOR_AT + row * 4);
        const float lower = load(base + FACTOR_AT + (row + 8) * 4);
        __syncwarp();
        if (lane == 0) arrive(base + FACTOR_FREE);
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
            barrier_init(base + K_FULL + 8 * i, 128);
            barrier_init(base + K_FREE + 8 * i, 8);
        }
        for (int i = 0; i < 2; ++i) {
            barrier_init(base + P_FULL + 8 * i, 4);
            barrier_init(base + P_FREE + 8 * i, 8);
        }
        barrier_init(base + Q_FULL, 128);
        barrier_init(base + Q_FREE, 4);
        barrier_init(base + FACTOR_FULL, 4);
        barrier_init(base + FACTOR_FREE, 8);
        fence_proxy();
    }
    __syncthreads();
    const int task = __shfl_sync(~0u, threadIdx.x / 128, 0);
    if (task == 0) {
        fewer_registers<32>();
        gather(call, base);
    } else if (task == 1) {
        more_registers<160>();
        score(call, base);
    } else {
        more_registers<160>();
        mix(call, base, task - 2);
    }
}
