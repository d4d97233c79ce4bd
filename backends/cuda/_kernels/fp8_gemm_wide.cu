// Products of many rows of FP8 activations with FP8 weights, both with block scales.
//
// A block computes 128 rows and WAVES times WIDTH columns, two warpgroups 64 rows each. Each 128 of k
// are multiplied into registers of their own and added in fp32 with both scales. A producer fills a
// ring of stages with the copy engine; scales are read by those who need them, one block of k ahead.
//
// What a group does between two products is time that the matrix unit may lose. So blocks of k are
// unrolled: the wait for a stage begins before the last part is added, and addresses are computed
// for the whole warp.
//
// PAIR = 2: two blocks of a cluster take neighbouring rows, each copies half of the weights, to both.
//
// Macros: WAVES, WIDTH (128, or 192 with one wave), STAGES, PAIR, AHEAD (2, with one wave of 128: a
// group's next products are under way while it adds the last ones), and those of gemm_tiles.cuh.

constexpr int MT = 128;
constexpr int NT = WAVES * WIDTH;
constexpr int REGS = WIDTH / 2;
// Columns' scales change at multiples of 128, and a tile may begin between two.
constexpr int PARTS = WIDTH % 128 ? WIDTH / 64 : WIDTH / 128;
constexpr int HEIGHT = MT * PAIR;

#include "gemm_tiles.cuh"
#include "hopper_gemm.cuh"

static_assert(AHEAD == 1 || WAVES == 1, "registers");

constexpr int ROW_BYTES = MT * BLOCK;
constexpr int WEIGHT_BYTES = NT * BLOCK;
constexpr int STAGE_BYTES = ROW_BYTES + WEIGHT_BYTES;
constexpr int STORE_AT = STAGES * STAGE_BYTES;

#include "gemm_store.cuh"

constexpr int BARRIERS_AT = STORE_AT + STORE_BYTES;
constexpr int CONSUMERS = 256;

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

__device__ __forceinline__ void multiply(float (&part)[REGS], unsigned left, unsigned right) {
    const auto rows = tile_descriptor(left), weights = tile_descriptor(right);
    mma_begin();
#pragma unroll
    for (int step = 0; step < BLOCK / 32; ++step)
        Mma<WIDTH>::run(part, rows + step * 2, weights + step * 2, step);
    mma_end();
}

// The scales of one block of k: of a thread's two rows, and of each wave's columns.
struct Scales {
    float upper, lower, weights[WAVES][PARTS];
};

// Where a tile's scales lie, for one thread. Rows beyond the tile's are clamped: nothing of them is
// stored.
struct Scaling {
    const float *upper, *lower, *weights[WAVES][PARTS];

    __device__ __forceinline__ Scaling(const Args& args, const Tile& tile) {
        const int row = tile.row + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
        const int last = max(0, tile.row + tile.rows - 1);
        const float* rows = args.a_scale + (MODE == 1 ? tile.group * args.a_scale_group : 0);
        upper = rows + min(row, last) * args.a_scale_row;
        lower = rows + min(row + 8, last) * args.a_scale_row;
#pragma unroll
        for (int wave = 0; wave < WAVES; ++wave)
#pragma unroll
            for (int part = 0; part < PARTS; ++part)
                weights[wave][part] = args.b_scale + tile.group * args.b_scale_group +
                                      min(tile.column + wave * WIDTH + part * (WIDTH / PARTS),
                                          args.n - 1) / BLOCK * args.b_scale_row;
    }

    __device__ __forceinline__ Scales at(int block) const {
        Scales scales;
        scales.upper = load_early(upper + block), scales.lower = load_early(lower + block);
#pragma unroll
        for (int wave = 0; wave < WAVES; ++wave)
#pragma unroll
            for (int part = 0; part < PARTS; ++part)
                scales.weights[wave][part] = load_early(weights[wave][part] + block);
        return scales;
    }
};

// A product that stays where it is written: the compiler would move it before the matrix unit starts.
__device__ __forceinline__ float multiplied(float a, float b) {
    float product;
    asm volatile("mul.rn.f32 %0, %1, %2;" : "=f"(product) : "f"(a), "f"(b));
    return product;
}

// What the sums of a thread's two rows are multiplied with.
struct Factors {
    float upper[WAVES][PARTS], lower[WAVES][PARTS];

    __device__ __forceinline__ explicit Factors(const Scales& scales) {
#pragma unroll
        for (int wave = 0; wave < WAVES; ++wave)
#pragma unroll
            for (int i = 0; i < PARTS; ++i) {
                upper[wave][i] = multiplied(scales.upper, scales.weights[wave][i]);
                lower[wave][i] = multiplied(scales.lower, scales.weights[wave][i]);
            }
    }
};

__device__ __forceinline__ void add(float (&sum)[REGS], float (&part)[REGS], const Factors& factors,
                                    int wave) {
    mma_touch(part);
#pragma unroll
    for (int i = 0; i < REGS; i += 4) {
        const float upper = factors.upper[wave][i / (REGS / PARTS)];
        const float lower = factors.lower[wave][i / (REGS / PARTS)];
        sum[i] += part[i] * upper;
        sum[i + 1] += part[i + 1] * upper;
        sum[i + 2] += part[i + 2] * lower;
        sum[i + 3] += part[i + 3] * lower;
    }
}

__device__ __forceinline__ void release(unsigned empty) {
    const int lane = threadIdx.x % 32;
    if (PAIR > 1 && lane < PAIR) barrier_arrive_at(empty, lane);
    if (PAIR == 1 && lane == 0) barrier_arrive(empty);
}

__device__ __forceinline__ void consume(const Args& args, Out* out, unsigned shared, int rank,
                                        int first, int step) {
    const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);  // one number for the warp
    const int tiles = tile_count(args);
    int stage = 0, phase = 0;
    const auto enter = [&] { barrier_wait(shared + BARRIERS_AT + stage * 16, phase); };
    const auto start = [&](float (&part)[REGS], int wave) {
        const unsigned from = shared + stage * STAGE_BYTES;
        multiply(part, from + group * 64 * BLOCK, from + ROW_BYTES + wave * WIDTH * BLOCK);
    };
    // The barrier that says that this stage was read.
    const auto leave = [&] {
        const unsigned empty = shared + BARRIERS_AT + stage * 16 + 8;
        if (++stage == STAGES) stage = 0, phase ^= 1;
        return empty;
    };
    for (int at = first; at < tiles; at += step) {
        const Tile tile = tile_at(args, at, rank);
        float sum[WAVES][REGS] = {};
        if (!tile.idle) {
            const int last = args.blocks - 1;
            float parts[AHEAD][REGS];
            const Scaling scaling(args, tile);
            Scales next = scaling.at(0);
            // Those of a block of k, and the next ones are asked for.
            const auto factors = [&](int block) {
                const Factors now(next);
                next = scaling.at(min(block + 1, last));
                return now;
            };
            // No branch stands between a product's start and the wait for it: the compiler would
            // wait at once.
            if constexpr (AHEAD == 1) {
#pragma unroll 4
                for (int block = 0; block <= last; ++block) {
                    enter();
                    start(parts[0], 0);
                    const Factors now = factors(block);
#pragma unroll
                    for (int wave = 0; wave < WAVES; ++wave) {
                        if (wave > 0) start(parts[0], wave);
                        mma_wait<0>();
                        if (wave == WAVES - 1) release(leave());
                        add(sum[wave], parts[0], now, wave);
                    }
                }
            } else {
                // Even blocks of k in the first part, odd ones in the second.
                int block = 0;
                Factors now = factors(0);
                enter();
                start(parts[0], 0);
                for (; block + 1 < last; block += 2) {
#pragma unroll
                    for (int odd = 0; odd < 2; ++odd) {
                        const unsigned empty = leave();
                        enter();
                        start(parts[odd ^ 1], 0);
                        mma_wait<1>();
                        release(empty);
                        add(sum[0], parts[odd], now, 0);
                        now = factors(block + odd + 1);
                    }
                }
                if (block < last) {
                    const unsigned empty = leave();
                    enter();
                    start(parts[1], 0);
                    mma_wait<1>();
                    release(empty);
                    add(sum[0], parts[0], now, 0);
                    mma_wait<0>();
                    release(leave());
                    add(sum[0], parts[1], Factors(next), 0);
                } else {
                    mma_wait<0>();
                    release(leave());
                    add(sum[0], parts[0], now, 0);
                }
            }
        }
#pragma unroll
        for (int wave = 0; wave < WAVES; ++wave)
            store_rows(args, out, tile, sum[wave], tile.column + wave * WIDTH, shared);
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
