// Products of many rows of FP8 activations with FP8 weights, both with block scales.
//
// A block computes 128 rows and WAVES times WIDTH columns, two warpgroups 64 rows each. Each 128 of k are
// multiplied into registers of their own and added in fp32 with both scales. A producer fills a ring of
// stages with the copy engine.
//
// PAIR = 2: two blocks of a cluster take neighbouring rows, each copies half of the weights, to both.
//
// Macros: WIDTH (128, or any multiple of 8 up to 136), WAVES, STAGES, PAIR, AHEAD (2: a group's next
// products are under way while it adds the last ones), and those of gemm_tiles.cuh.

constexpr int MT = 128;
constexpr int NT = WAVES * WIDTH;
constexpr int HEIGHT = MT * PAIR;

#include "gemm_tiles.cuh"
#include "hopper_gemm.cuh"

static_assert(NT / PAIR % 8 == 0, "eight rows are one pattern of the swizzle");

constexpr int ROW_BYTES = MT * BLOCK;
constexpr int WEIGHT_BYTES = NT * BLOCK;
constexpr int STAGE_BYTES = ROW_BYTES + WEIGHT_BYTES;
constexpr int STORE_AT = STAGES * STAGE_BYTES;
constexpr int SIDES = WIDTH == BLOCK ? 1 : 2;  // blocks of weights that a wave may touch
constexpr int CONSUMERS = 256;

#include "gemm_store.cuh"

constexpr int BARRIERS_AT = STORE_AT + STORE_BYTES;

__device__ __forceinline__ void multiply(float (&part)[REGS], unsigned left, unsigned right) {
    const auto rows = tile_descriptor(left), weights = tile_descriptor(right);
    mma_begin();
#pragma unroll
    for (int step = 0; step < BLOCK / 32; ++step)
        Mma<WIDTH>::run(part, rows + step * 2, weights + step * 2, step);
    mma_end();
}

// The scales of one block of k: of a thread's two rows, and of a wave's columns, which lie in one block
// of weights or in two.
struct Scales {
    float upper, lower, weights[WAVES][SIDES];
};

__device__ __forceinline__ void add(float (&sum)[REGS], float (&part)[REGS], const Scales& scales,
                                    int wave, int edge) {
    mma_touch(part);
    const float* weights = scales.weights[wave];
    const float first_high = scales.upper * weights[0];
    const float first_low = scales.lower * weights[0];
    const float second_high = scales.upper * weights[SIDES - 1];
    const float second_low = scales.lower * weights[SIDES - 1];
#pragma unroll
    for (int i = 0; i < REGS; i += 4) {
        const bool second = SIDES == 2 && i * 2 >= edge;
        const float high = second ? second_high : first_high;
        const float low = second ? second_low : first_low;
        sum[i] += part[i] * high;
        sum[i + 1] += part[i + 1] * high;
        sum[i + 2] += part[i + 2] * low;
        sum[i + 3] += part[i + 3] * low;
    }
}

__device__ __forceinline__ void produce(const Args& args, const TensorMap* weights,
                                        const TensorMap* rows, unsigned shared, int rank, int first,
                                        int step) {
    const int tiles = tile_count(args);
    int stage = 0, phase = 0;
    for (int at = first; at < tiles; at += step) {
        const Tile tile = tile_at(args, at, rank);
        if (tile.idle) continue;
        for (int block = 0; block < args.blocks; ++block) {
            const unsigned full = shared + BARRIERS_AT + stage * 16;
            const unsigned to = shared + stage * STAGE_BYTES;
            barrier_wait(full + 8, phase ^ 1);
            barrier_expect(full, STAGE_BYTES);
            copy_box(to, rows, full, block * BLOCK, tile.row, MODE == 1 ? tile.group : 0);
            if (PAIR == 1)
                copy_box(to + ROW_BYTES, weights, full, block * BLOCK, tile.column, tile.group);
            else
                copy_box_to(to + ROW_BYTES + rank * (WEIGHT_BYTES / PAIR), weights, full, 3,
                            block * BLOCK, tile.column + rank * (NT / PAIR), tile.group);
            if (++stage == STAGES) stage = 0, phase ^= 1;
        }
    }
}

__device__ __forceinline__ void release(unsigned empty) {
    const int lane = threadIdx.x % 32;
    if (PAIR > 1 && lane < PAIR) barrier_arrive_at(empty, lane);
    if (PAIR == 1 && lane == 0) barrier_arrive(empty);
}

// Where a tile's scales lie, for one thread. Rows beyond the tile's are clamped: nothing of them is
// stored.
struct Scaling {
    const float *upper, *lower, *weights[WAVES][SIDES];
    int edge[WAVES];

    __device__ __forceinline__ Scaling(const Args& args, const Tile& tile) {
        const int row = tile.row + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
        const int last = max(0, tile.row + tile.rows - 1);
        const float* rows = args.a_scale + (MODE == 1 ? tile.group * args.a_scale_group : 0);
        upper = rows + min(row, last) * args.a_scale_row;
        lower = rows + min(row + 8, last) * args.a_scale_row;
#pragma unroll
        for (int wave = 0; wave < WAVES; ++wave) {
            const int column = tile.column + wave * WIDTH;
            edge[wave] = BLOCK - column % BLOCK;
#pragma unroll
            for (int side = 0; side < SIDES; ++side)
                weights[wave][side] =
                    args.b_scale + tile.group * args.b_scale_group +
                    min(column + side * edge[wave], args.n - 1) / BLOCK * args.b_scale_row;
        }
    }

    __device__ __forceinline__ Scales at(int block) const {
        Scales scales;
        scales.upper = load_early(upper + block), scales.lower = load_early(lower + block);
#pragma unroll
        for (int i = 0; i < WAVES * SIDES; ++i)
            scales.weights[i / SIDES][i % SIDES] = load_early(weights[i / SIDES][i % SIDES] + block);
        return scales;
    }
};

__device__ __forceinline__ void consume(const Args& args, Out* out, unsigned shared, int rank,
                                        int first, int step) {
    const int group = threadIdx.x / 128;
    const int tiles = tile_count(args);
    int stage = 0, phase = 0;
    for (int at = first; at < tiles; at += step) {
        const Tile tile = tile_at(args, at, rank);
        float sum[WAVES][REGS];
#pragma unroll
        for (int i = 0; i < WAVES * REGS; ++i) sum[i / REGS][i % REGS] = 0.0f;
        if (!tile.idle) {
            const Scaling scaling(args, tile);
            const int last = args.blocks - 1;
            Scales next = scaling.at(0);
            float parts[AHEAD][REGS];
            const auto enter = [&] { barrier_wait(shared + BARRIERS_AT + stage * 16, phase); };
            const auto start = [&](float (&part)[REGS], int wave) {
                const unsigned from = shared + stage * STAGE_BYTES;
                multiply(part, from + group * 64 * BLOCK, from + ROW_BYTES + wave * WIDTH * BLOCK);
            };
            const auto leave = [&] {
                const unsigned empty = shared + BARRIERS_AT + stage * 16 + 8;
                if (++stage == STAGES) stage = 0, phase ^= 1;
                return empty;
            };
            const auto scales = [&](int block) {
                const Scales now = next;
                next = scaling.at(min(block + 1, last));
                return now;
            };
            const auto finish = [&](int wave, float (&part)[REGS], const Scales& now) {
                add(sum[wave], part, now, wave, scaling.edge[wave]);
            };
            // No branch stands between a product's start and the wait for it: the compiler would
            // wait at once.
            if constexpr (AHEAD == 1) {
                for (int block = 0; block <= last; ++block) {
                    const Scales now = scales(block);
                    enter();
#pragma unroll
                    for (int wave = 0; wave < WAVES; ++wave) {
                        start(parts[0], wave);
                        mma_wait<0>();
                        if (wave == WAVES - 1) release(leave());
                        finish(wave, parts[0], now);
                    }
                }
            } else {
                // Steps are a block's waves one after another; even ones use the first part.
                const int steps = args.blocks * WAVES - 1;
                int at_step = 0;
                Scales now = scales(0);
                enter();
                start(parts[0], 0);
                for (; at_step + 1 < steps; at_step += 2) {
#pragma unroll
                    for (int odd = 0; odd < 2; ++odd) {
                        const bool last_wave = WAVES == 1 || odd == 1;
                        const unsigned empty = last_wave ? leave() : 0;
                        if (last_wave) enter();
                        start(parts[odd ^ 1], WAVES == 1 ? 0 : odd ^ 1);
                        mma_wait<1>();
                        if (last_wave) release(empty);
                        
                        finish(WAVES == 1 ? 0 : odd, parts[odd], now);
                        if (last_wave) now = scales((at_step + odd) / WAVES + 1);
                    }
                }
                if (at_step < steps) {
                    const unsigned empty = WAVES == 1 ? leave() : 0;
                    if (WAVES == 1) enter();
                    start(parts[1], WAVES - 1);
                    mma_wait<1>();
                    if (WAVES == 1) release(empty);
                    finish(0, parts[0], now);
                    if (WAVES == 1) now = next;
                    mma_wait<0>();
                    release(leave());
                    finish(WAVES - 1, parts[1], now);
                } else {
                    mma_wait<0>();
                    release(leave());
                    finish(0, parts[0], now);
                }
            }
        }
#pragma unroll
        for (int wave = 0; wave < WAVES; ++wave)
            store_wave(args, out, tile, sum[wave], tile.column + wave * WIDTH, shared);
    }
}

extern "C" __global__ void __launch_bounds__(CONSUMERS + 128, 1)
    product(const __grid_constant__ TensorMap weights, const __grid_constant__ TensorMap rows,
            const __grid_constant__ Args args, Out* out) {
    extern __shared__ __align__(1024) unsigned char memory[];
    const unsigned shared = address(memory);
    if (threadIdx.x == 0) {
        copy_prepare(&weights);
        copy_prepare(&rows);
        for (int stage = 0; stage < STAGES; ++stage) {
            barrier_init(shared + BARRIERS_AT + stage * 16, 1);
            barrier_init(shared + BARRIERS_AT + stage * 16 + 8, CONSUMERS / 32 * PAIR);
        }
        barrier_init_done();
    }
    if (PAIR == 1)
        __syncthreads();
    else
        cluster_meet();
    const int first = blockIdx.x / PAIR, step = gridDim.x / PAIR, rank = blockIdx.x % PAIR;
    if (threadIdx.x < CONSUMERS) {
        registers_take<232>();
        consume(args, out, shared, rank, first, step);
    } else {
        registers_give<40>();
        if (threadIdx.x == CONSUMERS) produce(args, &weights, &rows, shared, rank, first, step);
    }
    if (PAIR > 1) {
        __syncwarp();
        cluster_meet();  // the other still arrives at barriers here
    }
}
