// The indexer's scores of FP8 queries against FP8 keys that lie in one tensor.
//
// A block is persistent and has an equal stretch of all (512 query heads) x (64 keys) tiles. The heads
// stay in shared memory while one warp streams tiles of keys past them with the copy engine. Each of
// two warpgroups has 256 of the heads, in two halves: while it weighs and adds the products of one, the
// matrix unit makes those of the other. Three warps write -inf where no row of a block has a range.
//
// Macros: HEADS (32 or 64), STAGES.

#include "indexer_logits.cuh"

constexpr int ROWS = 512 / HEADS;  // of a block of queries
constexpr int HALF = 128;          // columns of one product
constexpr int THREADS = 384;
constexpr int Q_BYTES = 512 * DIM;
constexpr int KEYS_AT = 2 * Q_BYTES;
constexpr int BARRIERS_AT = KEYS_AT + STAGES * TILE_BYTES;
constexpr int ROOM_AT = BARRIERS_AT + (STAGES + 2) * 16;

struct Args {
    const float* k_scale;
    const float* weights;
    const int* starts;
    const int* ends;
    float* out;
    long long weights_row, out_row;  // strides
    int rows, context;
};

struct Span {
    int first, last;  // tiles
};

// The tiles that some row of a block of queries needs; a warp together.
__device__ __forceinline__ Span span_of(const Args& args, int block) {
    const int row = block * ROWS + threadIdx.x % 32;
    int low = args.context, high = 0;
    if (threadIdx.x % 32 < ROWS && row < args.rows) {
        const int start = max(args.starts[row], 0), end = min(args.ends[row], args.context);
        if (start < end) low = start, high = end;
    }
    low = __reduce_min_sync(~0u, low);
    high = __reduce_max_sync(~0u, high);
    return low < high ? Span{low / KEYS, (high + KEYS - 1) / KEYS} : Span{0, 0};
}

// The same number by one thread.
__device__ __forceinline__ int tiles_of(const Args& args, int block) {
    int low = args.context, high = 0;
    for (int row = block * ROWS; row < min(block * ROWS + ROWS, args.rows); ++row) {
        const int start = max(args.starts[row], 0), end = min(args.ends[row], args.context);
        if (start < end) low = min(low, start), high = max(high, end);
    }
    return low < high ? (high + KEYS - 1) / KEYS - low / KEYS : 0;
}

// Calls `each(block, first tile, last tile)` for the pieces of a stretch; a warp together.
template <typename F>
__device__ __forceinline__ void walk(const Args& args, Stretch stretch, F each) {
    int block = stretch.group, skip = stretch.tile;
    for (int left = stretch.left; left > 0; ++block) {
        const Span span = span_of(args, block);
        const int count = min(span.last - span.first - skip, left);
        if (count > 0) each(block, span.first + skip, span.first + skip + count);
        left -= count;
        skip = 0;
    }
}

__device__ __forceinline__ void produce(const Args& args, const TensorMap* queries,
                                        const TensorMap* keys, unsigned shared, Stretch stretch) {
    const bool leader = threadIdx.x % 32 == 0;
    int stage = 0, phase = 0, slot = 0, q_phase = 0;
    walk(args, stretch, [&](int block, int first, int last) {
        const unsigned q_full = shared + BARRIERS_AT + (STAGES + slot) * 16;
        barrier_wait(q_full + 8, q_phase ^ 1);
        if (leader) {
            barrier_expect(q_full, Q_BYTES);
            copy_box(shared + slot * Q_BYTES, queries, q_full, 0, 0, block * ROWS);
        }
        if (++slot == 2) slot = 0, q_phase ^= 1;
        for (int tile = first; tile < last; ++tile) {
            const unsigned full = shared + BARRIERS_AT + stage * 16;
            barrier_wait(full + 8, phase ^ 1);
            if (leader) {
                barrier_expect(full, TILE_BYTES);
                copy_box(shared + KEYS_AT + stage * TILE_BYTES, keys, full, 0, tile * KEYS, 0);
            }
            if (++stage == STAGES) stage = 0, phase ^= 1;
        }
    });
}

__device__ __forceinline__ void clear_outside(const Args& args, int warp, int warps) {
    const int blocks = (args.rows + ROWS - 1) / ROWS;
    for (int block = blockIdx.x; block < blocks; block += gridDim.x) {
        const Span span = span_of(args, block);
        for (int row = block * ROWS + warp; row < min(block * ROWS + ROWS, args.rows); row += warps) {
            clear(args.out + row * args.out_row, 0, min(span.first * KEYS, args.context));
            clear(args.out + row * args.out_row, span.last * KEYS, args.context);
        }
    }
}

__device__ __forceinline__ void load_rows(Rows<HALF>& rows, const Args& args, int first) {
#pragma unroll
    for (int i = 0; i < Columns<HALF>::SCORES; ++i) {
        const int row = first + 2 * i + threadIdx.x % 2;
        const bool there = row < args.rows;
        rows.out[i] = args.out + (there ? row : 0) * args.out_row;
        rows.start[i] = there ? args.starts[row] : 0;
        rows.end[i] = there ? args.ends[row] : 0;
        rows.room[i] = there ? args.context : 0;
    }
}

__device__ __forceinline__ void consume(const Args& args, unsigned shared, Stretch stretch) {
    constexpr int QUERIES = Columns<HALF>::QUERIES;
    const int group = threadIdx.x / 128, own = own_key();
    const bool leader = threadIdx.x % 32 == 0;
    int stage = 0, phase = 0, slot = 0, q_phase = 0;
    walk(args, stretch, [&](int block, int first, int last) {
        const int row = block * ROWS + group * 2 * QUERIES;
        float weights[2][HALF / 4], products[2][HALF / 2];
        Rows<HALF> rows[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int from = row + half * QUERIES;
            load_weights<HALF>(weights[half], args.weights + from * args.weights_row,
                               args.weights_row, args.rows - from);
            load_rows(rows[half], args, from);
        }
        const unsigned q_full = shared + BARRIERS_AT + (STAGES + slot) * 16;
        const auto columns = tile_descriptor(shared + slot * Q_BYTES + group * 2 * HALF * DIM);
        constexpr int NEXT = HALF * DIM / 16;
        if (++slot == 2) slot = 0;
        barrier_wait(q_full, q_phase);
        q_phase ^= slot == 0;

        unsigned full = shared + BARRIERS_AT + stage * 16;
        auto keys = tile_descriptor(shared + KEYS_AT + stage * TILE_BYTES);
        int key = first * KEYS + own;
        float scale = key < args.context ? args.k_scale[key] : 0.0f;
        float score[Columns<HALF>::SCORES];
        barrier_wait(full, phase);
        multiply<HALF>(products[0], keys, columns);
        for (int tile = first; tile < last - 1; ++tile) {
            multiply<HALF>(products[1], keys, columns + NEXT);
            const float next_scale = key + KEYS < args.context ? args.k_scale[key + KEYS] : 0.0f;
            mma_wait<1>();
            mma_touch(products[0]);
            sums<HALF>(score, products[0], weights[0]);
            write(rows[0], score, scale, key);
            if (++stage == STAGES) stage = 0, phase ^= 1;
            const unsigned next = shared + BARRIERS_AT + stage * 16;
            keys = tile_descriptor(shared + KEYS_AT + stage * TILE_BYTES);
            barrier_wait(next, phase);
            multiply<HALF>(products[0], keys, columns);
            mma_wait<1>();
            if (leader) barrier_arrive(full + 8);
            mma_touch(products[1]);
            sums<HALF>(score, products[1], weights[1]);
            write(rows[1], score, scale, key);
            full = next;
            key += KEYS;
            scale = next_scale;
        }
        multiply<HALF>(products[1], keys, columns + NEXT);
        mma_wait<1>();
        mma_touch(products[0]);
        sums<HALF>(score, products[0], weights[0]);
        write(rows[0], score, scale, key);
        mma_wait<0>();
        if (leader) barrier_arrive(full + 8), barrier_arrive(q_full + 8);
        mma_touch(products[1]);
        sums<HALF>(score, products[1], weights[1]);
        write(rows[1], score, scale, key);
        if (++stage == STAGES) stage = 0, phase ^= 1;
    });
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    scores(const __grid_constant__ TensorMap queries, const __grid_constant__ TensorMap keys,
           const __grid_constant__ Args args) {
    extern __shared__ __align__(1024) unsigned char memory[];
    const unsigned shared = address(memory);
    if (threadIdx.x == 0) {
        copy_prepare(&queries);
        copy_prepare(&keys);
        for (int at = 0; at < STAGES + 2; ++at) {
            barrier_init(shared + BARRIERS_AT + at * 16, 1);
            barrier_init(shared + BARRIERS_AT + at * 16 + 8, 8);
        }
        barrier_init_done();
    }
    const Stretch own = stretch<THREADS>((args.rows + ROWS - 1) / ROWS,
                                         reinterpret_cast<long long*>(memory + ROOM_AT),
                                         [&](int block) { return tiles_of(args, block); });
    if (threadIdx.x < 256) {
        registers_take<232>();
        consume(args, shared, own);
    } else {
        registers_give<40>();
        const int warp = threadIdx.x / 32 - 8;
        if (warp == 0)
            produce(args, &queries, &keys, shared, own);
        else
            clear_outside(args, warp - 1, 3);
    }
}
