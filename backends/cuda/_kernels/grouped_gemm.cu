// Products of rows with their groups' weights, in bf16 or fp16.
//
// A block computes 128 rows of one unit (gemm_units.cu) and WAVES times 128 columns, two warpgroups 64
// rows each, summed in fp32 by the matrix unit. A producer fills a ring of stages with the copy engine.
//
// Macros: WAVES, STAGES, OUT (0 bf16, 1 fp16: also the operands' type), and MODE 2 of gemm_tiles.cuh.

#if OUT == 0
#define HALF "bf16"
#else
#define HALF "f16"
#endif

constexpr int MT = 128;
constexpr int WIDTH = 128;
constexpr int REGS = WIDTH / 2;
constexpr int NT = WAVES * WIDTH;
constexpr int HEIGHT = MT;

#include "gemm_tiles.cuh"
#include "hopper_gemm.cuh"

constexpr int DEPTH = 64;  // of k in a stage
constexpr int ROW_BYTES = MT * DEPTH * 2;
constexpr int STAGE_BYTES = ROW_BYTES + NT * DEPTH * 2;
constexpr int STORE_AT = STAGES * STAGE_BYTES;
constexpr int CONSUMERS = 256;

#include "gemm_store.cuh"

constexpr int BARRIERS_AT = STORE_AT + STORE_BYTES;

__device__ __forceinline__ void produce(const Args& args, const TensorMap* weights,
                                        const TensorMap* rows, unsigned shared) {
    const int tiles = tile_count(args);
    int stage = 0, phase = 0;
    for (int at = blockIdx.x; at < tiles; at += gridDim.x) {
        const Tile tile = tile_at(args, at, 0);
        if (tile.idle) continue;
        for (int block = 0; block < args.blocks; ++block) {
            const unsigned full = shared + BARRIERS_AT + stage * 16;
            const unsigned to = shared + stage * STAGE_BYTES;
            barrier_wait(full + 8, phase ^ 1);
            barrier_expect(full, STAGE_BYTES);
            copy_box(to, rows, full, block * DEPTH, tile.row, 0);
            copy_box(to + ROW_BYTES, weights, full, block * DEPTH, tile.column, tile.group);
            if (++stage == STAGES) stage = 0, phase ^= 1;
        }
    }
}

__device__ __forceinline__ void consume(const Args& args, Out* out, unsigned shared) {
    const int lane = threadIdx.x % 32, group = threadIdx.x / 128;
    const int tiles = tile_count(args);
    int stage = 0, phase = 0;
    for (int at = blockIdx.x; at < tiles; at += gridDim.x) {
        const Tile tile = tile_at(args, at, 0);
        float sum[WAVES][REGS];
#pragma unroll
        for (int wave = 0; wave < WAVES; ++wave)
#pragma unroll
            for (int i = 0; i < REGS; ++i) sum[wave][i] = 0.0f;
        if (!tile.idle) {
            unsigned before = 0;  // the stage that the products in flight read
            for (int block = 0; block < args.blocks; ++block) {
                const unsigned full = shared + BARRIERS_AT + stage * 16;
                const unsigned from = shared + stage * STAGE_BYTES;
                barrier_wait(full, phase);
                mma_begin();
#pragma unroll
                for (int wave = 0; wave < WAVES; ++wave) {
                    const auto left = tile_descriptor(from + group * 64 * DEPTH * 2);
                    const auto right =
                        tile_descriptor(from + ROW_BYTES + wave * WIDTH * DEPTH * 2);
#pragma unroll
                    for (int step = 0; step < DEPTH / 16; ++step)
                        Mma<WIDTH>::run(sum[wave], left + step * 2, right + step * 2, 1);
                }
                mma_end();
                mma_wait<1>();
                if (block > 0 && lane == 0) barrier_arrive(before + 8);
                before = full;
                if (++stage == STAGES) stage = 0, phase ^= 1;
            }
            mma_wait<0>();
            if (lane == 0) barrier_arrive(before + 8);
        }
#pragma unroll
        for (int wave = 0; wave < WAVES; ++wave) {
            mma_touch(sum[wave]);
            store_rows(args, out, tile, sum[wave], tile.column + wave * WIDTH, shared);
        }
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
            barrier_init(shared + BARRIERS_AT + stage * 16 + 8, CONSUMERS / 32);
        }
        barrier_init_done();
    }
    __syncthreads();
    if (threadIdx.x < CONSUMERS) {
        registers_take<232>();
        consume(args, out, shared);
    } else {
        registers_give<40>();
        if (threadIdx.x == CONSUMERS) produce(args, &weights, &rows, shared);
    }
}
