// The indexer's scores of FP8 queries against FP8 keys that lie in one tensor.
//
// A block is persistent and has an equal stretch of all tiles: some queries times 64 keys. The queries
// stay in shared memory while one warp streams keys past them with the copy engine. Each of two
// computing warpgroups has its own 256 query heads, in two halves: while it weighs and adds the products
// of one half, the matrix unit makes those of the other. Three warps write -inf where no row of a block
// has a range.
//
// Macros: HEADS (32 or 64), STAGES, PART (0: all tiles; 1: a sample of them, whose scores lie side by
// side; 2: the others, of whose scores only those that reach their row's floor are kept, in lists).

#include "indexer_logits.cuh"
#include "indexer_parts.cuh"

constexpr int HALF = 128;                  // columns of one product
constexpr int ROWS = 4 * HALF / HEADS;     // of a block of queries
constexpr int CONSUMERS = 256;
constexpr int THREADS = CONSUMERS + 128;
constexpr int Q_BYTES = 4 * HALF * DIM;
constexpr int KEYS_AT = 2 * Q_BYTES;
constexpr int BARRIERS_AT = KEYS_AT + STAGES * TILE_BYTES;
constexpr int ROOM_AT = BARRIERS_AT + (STAGES + 2) * 16;

struct Args {
    const float* k_scale;
    const float* weights;
    const int* starts;
    const int* ends;
    const int* chosen;  // how many blocks of queries are wanted, and their numbers; null: all are
    const Guess* guesses;  // of PART 2, as are:
    int *counts, *lost;
    long long weights_row, out_row;  // strides
    int rows, context, clean;  // clean: -inf is wanted wherever a row has no range
    int from, most;  // which of those chosen is the first, and how many there is room for
};

// How many blocks of queries there are, and where one's rows begin.
__device__ __forceinline__ int blocks_of(const Args& args) {
    if (args.chosen) return max(0, min(args.chosen[0] - args.from, args.most));
    return (args.rows + ROWS - 1) / ROWS;
}

__device__ __forceinline__ int row_of(const Args& args, int block) {
    return (args.chosen ? args.chosen[1 + args.from + block] : block) * ROWS;
}

// The tiles that some row of a block of queries needs; a warp together.
__device__ __forceinline__ Span span_of(const Args& args, int block) {
    const int row = row_of(args, block) + threadIdx.x % 32;
    int low = args.context, high = 0;
    if (threadIdx.x % 32 < ROWS && row < args.rows) {
        const int start = max(args.starts[row], 0), end = min(args.ends[row], args.context);
        if (start < end) low = start, high = end;
    }
    low = __reduce_min_sync(~0u, low);
    high = __reduce_max_sync(~0u, high);
    return low < high ? part(low / KEYS, (high + KEYS - 1) / KEYS) : Span{0, 0};
}

// The same number by one thread.
__device__ __forceinline__ int tiles_of(const Args& args, int block) {
    int low = args.context, high = 0;
    const int first = row_of(args, block);
    for (int row = first; row < min(first + ROWS, args.rows); ++row) {
        const int start = max(args.starts[row], 0), end = min(args.ends[row], args.context);
        if (start < end) low = min(low, start), high = max(high, end);
    }
    if (low >= high) return 0;
    const Span span = part(low / KEYS, (high + KEYS - 1) / KEYS);
    return span.last - span.first;
}

// Calls `each(block, first tile, last tile, tiles of the block before these)` for the pieces of a
// stretch; a warp together.
template <typename F>
__device__ __forceinline__ void walk(const Args& args, Stretch stretch, F each) {
    int block = stretch.group, skip = stretch.tile;
    for (int left = stretch.left; left > 0; ++block) {
        const Span span = span_of(args, block);
        const int count = min(span.last - span.first - skip, left);
        if (count > 0) each(block, span.first + skip, span.first + skip + count, skip);
        left -= count;
        skip = 0;
    }
}

// Moves a block's weights to L2, where they are when the computing warpgroups ask for them.
__device__ __forceinline__ void prefetch_weights(const Args& args, int block) {
    constexpr int LINES = HEADS * 4 / 128;  // of a row
    const int row = row_of(args, block) + threadIdx.x % 32 / LINES;
    if (threadIdx.x % 32 < ROWS * LINES && row < args.rows)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(args.weights + row * args.weights_row +
                                                      threadIdx.x % LINES * 32));
}

__device__ __forceinline__ void produce(const Args& args, const TensorMap* queries,
                                        const TensorMap* keys, unsigned shared, Stretch stretch) {
    const bool leader = threadIdx.x % 32 == 0;
    int stage = 0, phase = 0, slot = 0, q_phase = 0;
    walk(args, stretch, [&](int block, int first, int last, int) {
        const unsigned q_full = shared + BARRIERS_AT + (STAGES + slot) * 16;
        barrier_wait(q_full + 8, q_phase ^ 1);
        if (leader) {
            barrier_expect(q_full, Q_BYTES);
            copy_box(shared + slot * Q_BYTES, queries, q_full, 0, 0, row_of(args, block));
        }
        prefetch_weights(args, block);
        if (++slot == 2) slot = 0, q_phase ^= 1;
        for (int tile = first; tile < last; ++tile) {
            const unsigned full = shared + BARRIERS_AT + stage * 16;
            barrier_wait(full + 8, phase ^ 1);
            if (leader) {
                barrier_expect(full, TILE_BYTES);
                copy_box(shared + KEYS_AT + stage * TILE_BYTES, keys, full, 0, place(tile) * KEYS, 0);
            }
            if (++stage == STAGES) stage = 0, phase ^= 1;
        }
    });
}

__device__ __forceinline__ void clear_outside(const Args& args, float* out, int warp, int warps) {
    const int blocks = (args.rows + ROWS - 1) / ROWS;
    for (int block = blockIdx.x; block < blocks; block += gridDim.x) {
        const Span span = span_of(args, block);
        for (int row = block * ROWS + warp; row < min(block * ROWS + ROWS, args.rows); row += warps) {
            clear(out + row * args.out_row, 0, min(span.first * KEYS, args.context));
            clear(out + row * args.out_row, span.last * KEYS, args.context);
        }
    }
}

#if PART < 2
using Target = Rows<HALF>;

// The rows from `first` on, whose scores begin at row `to` of the result.
__device__ __forceinline__ void open(Target& rows, const Args& args, float* out, int first, int to,
                                     int, bool) {
#pragma unroll
    for (int i = 0; i < Columns<HALF>::SCORES; ++i) {
        const int own = 2 * i + threadIdx.x % 2, row = first + own;
        const bool there = row < args.rows;
        rows.out[i] = out + (there ? to + own : 0) * args.out_row;
        rows.start[i] = there ? args.starts[row] : 0;
        rows.end[i] = there ? args.ends[row] : 0;
        rows.room[i] = there ? args.context : 0;
    }
}

__device__ __forceinline__ void close(const Target&, const Args&, int, int) {}
#else
using Target = Lists<HALF>;

// The lists of the rows from `first` on, for one of two blocks that share these; none if `lost`.
__device__ __forceinline__ void open(Target& lists, const Args& args, float* out, int first, int,
                                     int sharer, bool lost) {
    constexpr int BYTES = KEYS * static_cast<int>(sizeof(Kept));
    lists.step = sharer ? -BYTES : BYTES;
#pragma unroll
    for (int i = 0; i < Columns<HALF>::SCORES; ++i) {
        const int row = first + 2 * i + threadIdx.x % 2;
        const bool there = row < args.rows && !lost;
        const long long of_row = static_cast<long long>(there ? row : 0) * LIST + (sharer ? LIST - 1 : 0);
        lists.first[i] = reinterpret_cast<char*>(out) + (of_row * KEYS + own_key()) * sizeof(Kept);
        lists.count[i] = 0;
        lists.start[i] = there ? args.starts[row] : 0;
        lists.end[i] = there ? min(args.ends[row], args.context) : 0;
        lists.floor[i] = there ? args.guesses[row].floor : 0.0f;
        if (lost && row < args.rows) args.lost[row] = 1;
    }
}

__device__ __forceinline__ void close(const Target& lists, const Args& args, int first, int sharer) {
#pragma unroll
    for (int i = 0; i < Columns<HALF>::SCORES; ++i) {
        const int row = first + 2 * i + threadIdx.x % 2;
        if (row < args.rows)
            args.counts[(static_cast<long long>(row) * 2 + sharer) * KEYS + own_key()] = lists.count[i];
    }
}
#endif

__device__ __forceinline__ void consume(const Args& args, float* out, unsigned shared, Stretch stretch) {
    constexpr int QUERIES = Columns<HALF>::QUERIES, NEXT = HALF * DIM / 16;
    const int group = threadIdx.x / 128;
    const bool leader = threadIdx.x % 32 == 0;
    int stage = 0, phase = 0, slot = 0, q_phase = 0;
    walk(args, stretch, [&](int block, int first, int last, int before) {
        float weights[2][HALF / 4], products[2][HALF / 2], score[Columns<HALF>::SCORES];
        Target target[2];
        const int own_row = row_of(args, block) + group * 2 * QUERIES;
        // The block before has the first tiles, unless they are more than its whole stretch.
        const bool lost = before > stretch.previous;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = own_row + half * QUERIES;
            load_weights<HALF>(weights[half], args.weights, args.weights_row, row, args.rows);
            open(target[half], args, out, row, block * ROWS + (group * 2 + half) * QUERIES,
                 before > 0, lost);
        }
        const unsigned q_full = shared + BARRIERS_AT + (STAGES + slot) * 16;
        const auto columns = tile_descriptor(shared + slot * Q_BYTES + group * 2 * HALF * DIM);
        barrier_wait(q_full, q_phase);
        if (++slot == 2) slot = 0, q_phase ^= 1;
        int key = place(first) * KEYS + own_key();
        float scale = args.k_scale[min(key, args.context - 1)];
        unsigned full = 0;
        unsigned long long keys = 0;

        // Begins the first half of the products of the tile that comes next.
        const auto begin = [&]() {
            full = shared + BARRIERS_AT + stage * 16;
            keys = tile_descriptor(shared + KEYS_AT + stage * TILE_BYTES);
            barrier_wait(full, phase);
            multiply<HALF>(products[0], keys, columns);
        };
        const auto finish = [&](int half) {
            mma_touch(products[half]);
            sums<HALF>(score, products[half], weights[half]);
            write(target[half], score, scale, key, column_of(key));
        };
        // The rest of a tile, and the beginning of the next if that follows without a pause.
        const auto rest = [&](bool go_on) {
            multiply<HALF>(products[1], keys, columns + NEXT);
            // A key beyond the context has any scale: it is not written.
            const int next = following(key);
            const float next_scale = args.k_scale[min(next, args.context - 1)];
            mma_wait<1>();
            finish(0);
            const unsigned read = full;
            if (++stage == STAGES) stage = 0, phase ^= 1;
            if (go_on) {
                begin();
                mma_wait<1>();
            } else {
                mma_wait<0>();
            }
            if (leader) barrier_arrive(read + 8);
            finish(1);
            key = next;
            scale = next_scale;
        };
        // Runs of four tiles: the compiler cannot follow products that are under way around a loop.
        int tile = first;
        for (; tile + 4 <= last; tile += 4) {
            begin();
            rest(true);
            rest(true);
            rest(true);
            rest(false);
        }
        for (; tile < last; ++tile) {
            begin();
            rest(false);
        }
        if (leader) barrier_arrive(q_full + 8);
        if (!lost) {
            close(target[0], args, own_row, before > 0);
            close(target[1], args, own_row + QUERIES, before > 0);
        }
    });
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    scores(const __grid_constant__ TensorMap queries, const __grid_constant__ TensorMap keys,
           const __grid_constant__ Args args, float* out) {
    extern __shared__ __align__(1024) unsigned char memory[];
    const unsigned shared = address(memory);
    if (threadIdx.x == 0) {
        copy_prepare(&queries);
        copy_prepare(&keys);
        for (int at = 0; at < STAGES + 2; ++at) {
            barrier_init(shared + BARRIERS_AT + at * 16, 1);
            barrier_init(shared + BARRIERS_AT + at * 16 + 8, CONSUMERS / 32);
        }
        barrier_init_done();
    }
    wait_for_kernel_ahead();
    if (!blocks_of(args)) return;
    const Stretch own =
        stretch<THREADS>(blocks_of(args), reinterpret_cast<long long*>(memory + ROOM_AT),
                         [&](int block) { return tiles_of(args, block); });
    if (threadIdx.x < CONSUMERS) {
        registers_take<232>();
        consume(args, out, shared, own);
    } else {
        registers_give<40>();
        const int warp = threadIdx.x / 32 - CONSUMERS / 32;
        if (warp == 0)
            produce(args, &queries, &keys, shared, own);
        else if (args.clean)
            clear_outside(args, out, warp - 1, 3);
    }
}
