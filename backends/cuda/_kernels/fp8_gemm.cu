// Products of FP8 activations with FP8 weights, both with block scales, alone or group by group.
//
// A tile is computed transposed, weights times activations^T: the 64 rows of the matrix unit are then
// weights, of which there are always many, and the few rows of activations of a decoding step lie
// along its other side, which may be as short as 8. Each 128 of k are multiplied into registers of
// their own and added in fp32 with both scales, since the unit keeps fewer bits than fp32.
//
// One producer warp fills a ring of stages with the copy engine; WGS consumer warpgroups compute 64
// rows of weights each. SPLIT blocks of a cluster share a tile's k: each sends its parts to whoever
// adds those eight rows, and adds what it receives in a fixed order.
//
// MODE 0 may begin while the kernel ahead on the stream still runs, and lets the next one do so: till
// `wait_for_kernel_ahead` it only asks for its first weights.
//
// COLUMNS > 0: the tile is turned, the 64 rows of the matrix unit are activations, and so many columns,
// a multiple of 8, lie along its other side: where columns by 64 would leave processors idle.
//
// Macros: MT rows of activations in a tile, WGS, COLUMNS, STAGES, SPLIT, BLOCKS per multiprocessor, and
// those of gemm_tiles.cuh.

constexpr bool TURNED = COLUMNS > 0;
constexpr int NT = TURNED ? COLUMNS : WGS * 64;
constexpr int HEIGHT = MT;

#include "gemm_tiles.cuh"
#include "hopper_gemm.cuh"
#include "overlap.cuh"

constexpr int CONSUMERS = WGS * 128;
constexpr int PRODUCERS = BLOCKS == 1 ? 128 : 32;  // a whole group where it gives registers away
// Registers of a thread after producers gave theirs away; together at most 512 per thread of a group.
constexpr int GIVEN = 40;
constexpr int TAKEN = WGS > 2 ? (512 - GIVEN) / WGS / 8 * 8 : 232;
constexpr int WEIGHT_BYTES = NT * BLOCK;
constexpr int STAGE_BYTES = WEIGHT_BYTES + MT * BLOCK;
constexpr int SCALES_AT = STAGES * STAGE_BYTES;
constexpr int STORE_AT = SCALES_AT + STAGES * MT * 4;
constexpr int EIGHTS = (TURNED ? NT : MT) / 8;     // along the unit's other side, by eight
constexpr int OWN = (EIGHTS + SPLIT - 1) / SPLIT;  // of them, those that a block stores, at most
constexpr int STORE_BYTES = OUT != 2 && !TURNED ? WGS * OWN * 1024 : 0;
constexpr int PARTS_AT = STORE_AT + STORE_BYTES;
constexpr int PART_BYTES = CONSUMERS * 16;  // one eight of another block's part
constexpr int RECEIVED_AT = PARTS_AT + (SPLIT - 1) * OWN * PART_BYTES;
constexpr int BARRIERS_AT = RECEIVED_AT + 16;
constexpr int REGS = EIGHTS * 4;
// Few registers are in use with few rows: blocks of k are unrolled, and scales of rows are read while
// the matrix unit works.
constexpr bool AMPLE = MT <= 64 && (BLOCKS == 1 || WGS == 1);
constexpr int UNROLLED = AMPLE ? 4 : 1;
constexpr int SOON = AMPLE ? MT / 8 : 1;
static_assert(!TURNED || (MT == 64 && WGS == 1 && NT % 8 == 0), "one group, with all the rows");

// The first of the eights that a block of the cluster stores, and which block stores one.
__device__ constexpr int first_of(int rank) { return rank * EIGHTS / SPLIT; }
__device__ constexpr int owner_of(int eight) {
    return ((eight + 1) * SPLIT + EIGHTS - 1) / EIGHTS - 1;
}

// Blocks of k: more would stand in the way of the kernel ahead.
constexpr int FETCHED = WEIGHT_BYTES > 16384 ? 2 : 3;

__device__ __forceinline__ void fetch(const Args& args, const TensorMap* weights, int at, int begin,
                                      int end) {
    const int column = tile_at(args, at, 0).column;
    for (int block = begin; block < min(end, begin + FETCHED); ++block)
        fetch_box(weights, block * BLOCK, column, 0);
}

__device__ __forceinline__ void produce(const Args& args, const TensorMap* weights,
                                        const TensorMap* rows, unsigned shared, int first, int step,
                                        int begin, int end) {
    const int lane = threadIdx.x % 32;
    const int tiles = tile_count(args);
    int stage = 0, phase = 0;
    for (int at = first; at < tiles; at += step) {
        const Tile tile = tile_at(args, at, 0);
        if (tile.idle) continue;
        const float* scales = args.a_scale + tile.group * (MODE == 1 ? args.a_scale_group : 0) +
                              tile.row * args.a_scale_row;
        for (int block = begin; block < end; ++block) {
            const unsigned full = shared + BARRIERS_AT + stage * 16;
            const unsigned to = shared + stage * STAGE_BYTES;
            barrier_wait(full + 8, phase ^ 1);
            if (lane == 0) {
                barrier_expect(full, STAGE_BYTES);
                copy_box(to, weights, full, block * BLOCK, tile.column, tile.group);
                copy_box(to + WEIGHT_BYTES, rows, full, block * BLOCK, tile.row,
                         MODE == 1 ? tile.group : 0);
            }
            const unsigned scale_to = shared + SCALES_AT + stage * MT * 4;
            for (int row = lane; row < MT; row += 32) {
                const bool inside = row < tile.rows;
                copy_word(scale_to + row * 4, scales + (inside ? row : 0) * args.a_scale_row + block,
                          inside);
            }
            copy_words_arrive(full);
            if (++stage == STAGES) stage = 0, phase ^= 1;
        }
    }
}

// Adds the parts of all blocks of a cluster: `sum` becomes the whole sum where this block stores.
__device__ __forceinline__ void add_parts(float (&sum)[REGS], unsigned shared, int mine) {
    const unsigned received = shared + RECEIVED_AT;
    const unsigned own = shared + PARTS_AT + threadIdx.x * 16;
    cluster_arrived();  // every block has begun
#pragma unroll
    for (int eight = 0; eight < EIGHTS; ++eight) {
        const int owner = owner_of(eight);
        if (owner == mine) continue;
        const int slot = (mine - (mine > owner)) * OWN + eight - first_of(owner);
        cluster_send(own + slot * PART_BYTES, received, owner, sum + eight * 4);
    }
    if (first_of(mine) < first_of(mine + 1)) barrier_wait(received, 0);
#pragma unroll
    for (int eight = 0; eight < EIGHTS; ++eight) {
        const int owner = owner_of(eight);
        if (owner != mine) continue;
        float total[4] = {};
#pragma unroll
        for (int rank = 0; rank < SPLIT; ++rank) {
            const int slot = (rank - (rank > owner)) * OWN + eight - first_of(owner);
            float4 part = make_float4(sum[eight * 4], sum[eight * 4 + 1], sum[eight * 4 + 2],
                                      sum[eight * 4 + 3]);
            if (rank != owner) part = load_floats(own + slot * PART_BYTES);
            total[0] += part.x, total[1] += part.y, total[2] += part.z, total[3] += part.w;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[eight * 4 + i] = total[i];
    }
}

// The turned tile's columns of the eights from `begin` to `end`, as the registers lie.
__device__ __forceinline__ void store_turned_tile(const Args& args, Out* out, const Tile& tile,
                                                  const float (&sum)[REGS], int begin, int end) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int i = 0; i < REGS; i += 2) {
        const int row = warp * 16 + lane / 4 + i / 2 % 2 * 8;
        const int column = tile.column + i / 4 * 8 + lane % 4 * 2;
        if (i / 4 < begin || i / 4 >= end || row >= tile.room || column >= args.n) continue;
        Out* to = out + (tile.out_row + row) * args.n + column;
        const bool counts = row < tile.rows;
        if (OUT == 2) {
            *reinterpret_cast<float2*>(to) =
                counts ? make_float2(sum[i], sum[i + 1]) : make_float2(0, 0);
        } else {
            *reinterpret_cast<unsigned*>(to) = counts ? pack(sum[i], sum[i + 1]) : 0;
        }
    }
}

// A group's 64 columns of the eights from `begin` to `end`: fp32 as the registers lie, narrower ones
// turned in shared memory first, so that whole lines are written.
__device__ __forceinline__ void store_tile(const Args& args, Out* out, const Tile& tile,
                                           const float (&sum)[REGS], int column,
                                           unsigned char* room, int begin, int end) {
    const int thread = threadIdx.x % 128, lane = thread % 32, warp = thread / 32;
    if (OUT == 2) {
        column += warp * 16 + lane / 4;
#pragma unroll
        for (int i = 0; i < REGS; ++i) {
            const int row = i / 4 * 8 + lane % 4 * 2 + i % 2, at = column + i / 2 % 2 * 8;
            if (row / 8 >= begin && row / 8 < end && row < tile.room && at < args.n)
                out[(tile.out_row + row) * args.n + at] =
                    row < tile.rows ? sum[i] : 0.0f;
        }
        return;
    }
    const int named = 1 + threadIdx.x / 128;
    threads_wait(named, 128);  // the tile before has left
#pragma unroll
    for (int j = 0; j < EIGHTS; ++j) {
        if (j < begin || j >= end) continue;
        const int row = (j - begin) * 8 + lane % 8, piece = warp * 2 + lane / 8 % 2;
        store_turned(address(room) + row * 128 + (piece ^ row % 8) * 16,
                     pack(sum[j * 4], sum[j * 4 + 1]), pack(sum[j * 4 + 2], sum[j * 4 + 3]));
    }
    threads_wait(named, 128);
    const int piece = thread % 8;
#pragma unroll
    for (int i = 0; i < (OWN + 1) / 2; ++i) {
        const int inside = i * 16 + thread / 8, row = begin * 8 + inside;
        if (row >= min(end * 8, tile.room) || column + piece * 8 >= args.n) continue;
        uint4 values = *reinterpret_cast<uint4*>(room + inside * 128 + (piece ^ row % 8) * 16);
        if (row >= tile.rows) values = make_uint4(0, 0, 0, 0);
        *reinterpret_cast<uint4*>(out + (tile.out_row + row) * args.n + column + piece * 8) =
            values;
    }
}

__device__ __forceinline__ void consume(const Args& args, Out* out, unsigned char* memory,
                                        unsigned shared, int first, int step, int begin, int end) {
    const int lane = threadIdx.x % 32;
    // Known to be one for the warp: what follows from it stays in registers of the whole warp.
    const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
    const int tiles = tile_count(args);
    int stage = 0, phase = 0;
    for (int at = first; at < tiles; at += step) {
        const Tile tile = tile_at(args, at, 0);
        const int own = tile.column + group * 64;
        float sum[REGS] = {};
        if (!tile.idle && begin < end) {
            const float* scales = args.b_scale + tile.group * args.b_scale_group +
                                  min(own, args.n - 1) / BLOCK * args.b_scale_row;
            // A turned tile may cross into the next 128 columns, whose scales are others.
            const int cut = (BLOCK - own % BLOCK) / 8;
            const float* beyond = args.b_scale + tile.group * args.b_scale_group +
                                  (min(own + NT, args.n) - 1) / BLOCK * args.b_scale_row;
            float held = 0, held_beyond = 0;  // lane i has the scale of the i-th of 32 blocks
#pragma unroll UNROLLED
            for (int block = begin; block < end; ++block) {
                const int inside = (block - begin) % 32;
                if (inside == 0) {
                    held = load_early(scales + min(block + lane, end - 1));
                    if (TURNED) held_beyond = load_early(beyond + min(block + lane, end - 1));
                }
                const unsigned full = shared + BARRIERS_AT + stage * 16;
                const unsigned from = shared + stage * STAGE_BYTES;
                const float scale = __shfl_sync(~0u, held, inside);
                barrier_wait(full, phase);
                float part[REGS];
                const auto of_weights = tile_descriptor(from + group * 64 * BLOCK);
                const auto of_rows = tile_descriptor(from + WEIGHT_BYTES);
                const auto left = TURNED ? of_rows : of_weights;
                const auto right = TURNED ? of_weights : of_rows;
                mma_begin();
#pragma unroll
                for (int step = 0; step < BLOCK / 32; ++step)
                    Mma<TURNED ? NT : MT>::run(part, left + step * 2, right + step * 2, step);
                mma_end();
                if (TURNED) {
                    const float* row_scales =
                        reinterpret_cast<const float*>(memory + SCALES_AT + stage * MT * 4) +
                        threadIdx.x / 32 * 16 + lane / 4;
                    const float upper = row_scales[0], lower = row_scales[8];
                    const float next = __shfl_sync(~0u, held_beyond, inside);
                    mma_wait<0>();
                    mma_touch(part);
#pragma unroll
                    for (int j = 0; j < EIGHTS; ++j) {
                        const float of_column = j < cut ? scale : next;
                        sum[j * 4] += part[j * 4] * (upper * of_column);
                        sum[j * 4 + 1] += part[j * 4 + 1] * (upper * of_column);
                        sum[j * 4 + 2] += part[j * 4 + 2] * (lower * of_column);
                        sum[j * 4 + 3] += part[j * 4 + 3] * (lower * of_column);
                    }
                } else {
                    const float2* row_scales =
                        reinterpret_cast<const float2*>(memory + SCALES_AT + stage * MT * 4) + lane % 4;
                    float2 soon[SOON];
                    if (AMPLE)
#pragma unroll
                        for (int j = 0; j < SOON; ++j) soon[j] = row_scales[j * 4];
                    mma_wait<0>();
                    mma_touch(part);
#pragma unroll
                    for (int j = 0; j < EIGHTS; ++j) {
                        const float2 both = AMPLE ? soon[j % SOON] : row_scales[j * 4];
                        const float even = both.x * scale, odd = both.y * scale;
                        sum[j * 4] += part[j * 4] * even;
                        sum[j * 4 + 1] += part[j * 4 + 1] * odd;
                        sum[j * 4 + 2] += part[j * 4 + 2] * even;
                        sum[j * 4 + 3] += part[j * 4 + 3] * odd;
                    }
                }
                barrier_arrive(full + 8);  // every lane has read
                if (++stage == STAGES) stage = 0, phase ^= 1;
            }
        }
        const int mine = SPLIT == 1 ? 0 : cluster_rank();
        if (SPLIT > 1) add_parts(sum, shared, mine);  // one tile a cluster
        if (TURNED)
            store_turned_tile(args, out, tile, sum, first_of(mine), first_of(mine + 1));
        else
            store_tile(args, out, tile, sum, own, memory + STORE_AT + group * OWN * 1024,
                       first_of(mine), first_of(mine + 1));
    }
}

extern "C" __global__ void __launch_bounds__(CONSUMERS + PRODUCERS, BLOCKS)
    product(const __grid_constant__ TensorMap weights, const __grid_constant__ TensorMap rows,
            const __grid_constant__ Args args, Out* out) {
    extern __shared__ __align__(1024) unsigned char memory[];
    const unsigned shared = address(memory);
    if (threadIdx.x == 0) {
        copy_prepare(&weights);
        copy_prepare(&rows);
        for (int stage = 0; stage < STAGES; ++stage) {
            barrier_init(shared + BARRIERS_AT + stage * 16, 1 + 32);
            barrier_init(shared + BARRIERS_AT + stage * 16 + 8, CONSUMERS);
        }
        if (SPLIT > 1) barrier_init(shared + RECEIVED_AT, 1);
        barrier_init_done();
        const int rank = SPLIT == 1 ? 0 : cluster_rank();
        const int eights = first_of(rank + 1) - first_of(rank);
        if (SPLIT > 1) barrier_expect(shared + RECEIVED_AT, (SPLIT - 1) * eights * PART_BYTES);
    }
    if (MODE == 0) let_next_kernel_begin();
    __syncthreads();
    if (SPLIT > 1) cluster_arrive();
    const int first = blockIdx.x / SPLIT, step = gridDim.x / SPLIT, part = blockIdx.x % SPLIT;
    const int begin = part * args.blocks / SPLIT, end = (part + 1) * args.blocks / SPLIT;
    if (MODE == 0 && threadIdx.x == CONSUMERS) fetch(args, &weights, first, begin, end);
    wait_for_kernel_ahead();
    if (threadIdx.x < CONSUMERS) {
        if (BLOCKS == 1) registers_take<TAKEN>();
        consume(args, out, memory, shared, first, step, begin, end);
    } else {
        if (BLOCKS == 1) registers_give<GIVEN>();
        if (threadIdx.x < CONSUMERS + 32)
            produce(args, &weights, &rows, shared, first, step, begin, end);
        __syncwarp();
        if (SPLIT > 1) cluster_arrived();
    }
}
