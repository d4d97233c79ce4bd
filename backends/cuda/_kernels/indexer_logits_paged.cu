// The indexer's scores of a few FP8 queries of each request against the request's FP8 keys in pages.
//
// What takes time is to read the keys, so each is read once, for all queries of its request. A block
// is persistent and has an equal stretch of all requests' tiles of 64 keys; one warp streams them in
// with the copy engine, many at once. The WGS computing warpgroups take turns: each has every WGS-th
// tile. Three warps write -inf beyond each request's longest limit.
//
// Macros: HEADS (32 or 64), NEXT queries of a request, PAGE keys of a page (8, 16, 32, or a multiple of
// 64), WGS, STAGES (a multiple of WGS).

#include "indexer_logits.cuh"

constexpr int COLUMNS = HEADS * NEXT;
constexpr int GROUPS = (COLUMNS + 127) / 128;  // products per tile
constexpr int BOX = PAGE < KEYS ? PAGE : KEYS;  // keys that one copy moves
constexpr int CONSUMERS = WGS * 128;
constexpr int THREADS = CONSUMERS + 128;
constexpr int Q_ROWS = COLUMNS < 128 ? COLUMNS : 128;  // that one copy moves
constexpr int Q_BYTES = GROUPS * Q_ROWS * DIM;
constexpr int KEYS_AT = 2 * Q_BYTES;
constexpr int SCALES_AT = KEYS_AT + STAGES * TILE_BYTES;
constexpr int BARRIERS_AT = SCALES_AT + STAGES * KEYS * 4;
constexpr int ROOM_AT = BARRIERS_AT + (STAGES + 2) * 16;

struct Args {
    const unsigned char* pages;
    const float* weights;
    const int* limits;
    const int* table;
    long long page, weights_row, out_row;  // strides, a page's in bytes
    int limits_row, table_row;             // strides
    int batch, context, page_count, clean;  // clean: -inf is wanted beyond the limits
};

// Positions that some query of a request may see; a warp together.
__device__ __forceinline__ int longest(const Args& args, int request) {
    int limit = 0;
    if (threadIdx.x % 32 < NEXT)
        limit = args.limits[request * args.limits_row + threadIdx.x % 32];
    return min(__reduce_max_sync(~0u, max(limit, 0)), args.context);
}

// The same number's tiles by one thread.
__device__ __forceinline__ int tiles_of(const Args& args, int request) {
    int limit = 0;
#pragma unroll
    for (int query = 0; query < NEXT; ++query)
        limit = max(limit, args.limits[request * args.limits_row + query]);
    return (min(limit, args.context) + KEYS - 1) / KEYS;
}

// Calls `each(request, its longest limit, first tile, last tile)` for the pieces of a stretch; a warp
// together.
template <typename F>
__device__ __forceinline__ void walk(const Args& args, Stretch stretch, F each) {
    int request = stretch.group, skip = stretch.tile;
    for (int left = stretch.left; left > 0; ++request) {
        const int limit = longest(args, request);
        const int count = min((limit + KEYS - 1) / KEYS - skip, left);
        if (count > 0) each(request, limit, skip, skip + count);
        left -= count;
        skip = 0;
    }
}

// `bytes`, a multiple of 16, from memory to shared memory; `barrier` counts them.
__device__ __forceinline__ void copy_bytes(unsigned to, const void* from, int bytes, unsigned barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            to),
        "l"(from), "r"(bytes), "r"(barrier)
        : "memory");
}

// One box of keys, which are read once: they leave L2 before anything else does.
__device__ __forceinline__ void copy_keys(unsigned to, const TensorMap* from, unsigned barrier,
                                          int inside, int page) {
    constexpr unsigned long long EVICT_FIRST = 0x12F0000000000000ull;
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        ".L2::cache_hint [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(to),
        "l"(from), "r"(barrier), "r"(0), "r"(inside), "r"(page), "l"(EVICT_FIRST)
        : "memory");
}

__device__ __forceinline__ void produce(const Args& args, const TensorMap* queries,
                                        const TensorMap* keys, unsigned shared, Stretch stretch) {
    const int lane = threadIdx.x % 32;
    int stage = 0, phase = 0, slot = 0, q_phase = 0;
    walk(args, stretch, [&](int request, int limit, int first, int last) {
        // The pages of 32 boxes, and of the 32 after them.
        const int* table = args.table + static_cast<long long>(request) * args.table_row;
        const int boxes = (limit + BOX - 1) / BOX;
        const auto load = [&](int box) {
            return box < boxes ? min(max(table[box * BOX / PAGE], 0), args.page_count - 1) : 0;
        };
        int box = first * (KEYS / BOX), ahead = 0;
        int pages = load(box + lane), next_pages = load(box + 32 + lane);

        const unsigned q_full = shared + BARRIERS_AT + (STAGES + slot) * 16;
        barrier_wait(q_full + 8, q_phase ^ 1);
        if (lane == 0) {
            barrier_expect(q_full, Q_BYTES);
#pragma unroll
            for (int group = 0; group < GROUPS; ++group)
                copy_box(shared + slot * Q_BYTES + group * Q_ROWS * DIM, queries, q_full, 0,
                         group * Q_ROWS, request);
        }
        if (++slot == 2) slot = 0, q_phase ^= 1;
        for (int tile = first; tile < last; ++tile) {
            const unsigned full = shared + BARRIERS_AT + stage * 16;
            const unsigned keys_to = shared + KEYS_AT + stage * TILE_BYTES;
            const unsigned scales_to = shared + SCALES_AT + stage * KEYS * 4;
            barrier_wait(full + 8, phase ^ 1);
            // Boxes beyond the limit are left out; what lies there instead is never used.
            if (lane == 0) barrier_expect(full, min(KEYS / BOX, boxes - box) * BOX * (DIM + 4));
#pragma unroll
            for (int part = 0; part < KEYS / BOX; ++part) {
                const int page = __shfl_sync(~0u, pages, ahead);
                const int inside = PAGE > KEYS ? box * BOX % PAGE : 0;
                if (lane == 0 && box < boxes) {
                    copy_keys(keys_to + part * BOX * DIM, keys, full, inside, page);
                    copy_bytes(scales_to + part * BOX * 4,
                               args.pages + page * args.page + PAGE * DIM + inside * 4, BOX * 4,
                               full);
                }
                ++box;
                if (++ahead == 32) {
                    ahead = 0;
                    pages = next_pages;
                    next_pages = load(box + 32 + lane);
                }
            }
            if (++stage == STAGES) stage = 0, phase ^= 1;
        }
    });
}

__device__ __forceinline__ void clear_outside(const Args& args, float* out, int warp, int warps) {
    for (int request = blockIdx.x; request < args.batch; request += gridDim.x) {
        const int begin = (longest(args, request) + KEYS - 1) / KEYS * KEYS;
        for (int query = warp; query < NEXT; query += warps)
            clear(out + (static_cast<long long>(request) * NEXT + query) * args.out_row, begin,
                  args.context);
    }
}

// A thread's weights and rows for one product of a tile.
template <int GROUP>
struct Group {
    static constexpr int N = GROUP == GROUPS - 1 ? COLUMNS - GROUP * 128 : 128;
    static constexpr int FIRST = GROUP * 128 / HEADS;
    float weights[N / 4];
    Rows<N> rows;

    __device__ __forceinline__ void load(const Args& args, float* out, int request) {
        const int row = request * NEXT + FIRST;
        load_weights<N>(weights, args.weights, args.weights_row, row, args.batch * NEXT);
#pragma unroll
        for (int i = 0; i < Columns<N>::SCORES; ++i) {
            const int query = 2 * i + threadIdx.x % 2;
            const bool there = query < Columns<N>::QUERIES;
            const int* limit = args.limits + request * args.limits_row + FIRST;
            rows.out[i] = out + (row + (there ? query : 0)) * args.out_row;
            rows.start[i] = 0;
            rows.end[i] = there ? limit[query] : 0;
            rows.room[i] = there ? args.context : 0;
        }
    }
};

// All products of a tile, one after another: while one is weighed and added, the next is made.
template <int GROUP>
struct Chain {
    Group<GROUP> group;
    Chain<GROUP + 1> rest;

    __device__ __forceinline__ void load(const Args& args, float* out, int request) {
        group.load(args, out, request);
        rest.load(args, out, request);
    }

    __device__ __forceinline__ void start(float (&products)[2][64], unsigned long long keys,
                                          unsigned long long columns) {
        constexpr int N = Group<GROUP>::N;
        multiply<N>(reinterpret_cast<float(&)[N / 2]>(products[GROUP % 2]), keys,
                    columns + GROUP * (128 * DIM / 16));
    }

    // `start` has been called; `done` is when the matrix unit has read the last of the tile.
    template <typename F>
    __device__ __forceinline__ void finish(float (&products)[2][64], unsigned long long keys,
                                           unsigned long long columns, float scale, int key,
                                           F done) {
        constexpr int N = Group<GROUP>::N;
        auto& own = reinterpret_cast<float(&)[N / 2]>(products[GROUP % 2]);
        rest.start(products, keys, columns);
        if (GROUP == GROUPS - 1) {
            mma_wait<0>();
            done();
        } else {
            mma_wait<1>();
        }
        mma_touch(own);
        float score[Columns<N>::SCORES];
        sums<N>(score, own, group.weights);
        write(group.rows, score, scale, key, key);
        rest.finish(products, keys, columns, scale, key, done);
    }
};

template <>
struct Chain<GROUPS> {
    __device__ __forceinline__ void load(const Args&, float*, int) {}
    __device__ __forceinline__ void start(float (&)[2][64], unsigned long long, unsigned long long) {}
    template <typename F>
    __device__ __forceinline__ void finish(float (&)[2][64], unsigned long long, unsigned long long,
                                           float, int, F) {}
};

__device__ __forceinline__ void consume(const Args& args, float* out, const unsigned char* memory,
                                        unsigned shared, Stretch stretch) {
    const int own = own_key();
    const bool leader = threadIdx.x % 32 == 0;
    int stage = threadIdx.x / 128, phase = 0, slot = 0, q_phase = 0;
    int skip = stage;  // tiles until this warpgroup's next
    walk(args, stretch, [&](int request, int, int first, int last) {
        const unsigned q_full = shared + BARRIERS_AT + (STAGES + slot) * 16;
        const auto columns = tile_descriptor(shared + slot * Q_BYTES);
        Chain<0> chain;
        chain.load(args, out, request);
        barrier_wait(q_full, q_phase);
        if (++slot == 2) slot = 0, q_phase ^= 1;
        int tile = first + skip;
        for (; tile < last; tile += WGS) {
            const unsigned full = shared + BARRIERS_AT + stage * 16;
            const auto keys = tile_descriptor(shared + KEYS_AT + stage * TILE_BYTES);
            barrier_wait(full, phase);
            const float scale =
                reinterpret_cast<const float*>(memory + SCALES_AT + stage * KEYS * 4)[own];
            float products[2][64];
            chain.start(products, keys, columns);
            chain.finish(products, keys, columns, scale, tile * KEYS + own, [&]() {
                if (leader) barrier_arrive(full + 8);
            });
            stage += WGS;
            if (stage >= STAGES) stage -= STAGES, phase ^= 1;
        }
        skip = tile - last;
        if (leader) barrier_arrive(q_full + 8);
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
            barrier_init(shared + BARRIERS_AT + at * 16 + 8, at < STAGES ? 4 : WGS * 4);
        }
        barrier_init_done();
    }
    wait_for_kernel_ahead();
    const Stretch own =
        stretch<THREADS>(args.batch, reinterpret_cast<long long*>(memory + ROOM_AT),
                         [&](int request) { return tiles_of(args, request); });
    if (threadIdx.x < CONSUMERS) {
        registers_take<(504 - 40) / WGS / 8 * 8>();
        consume(args, out, memory, shared, own);
    } else {
        registers_give<40>();
        const int warp = threadIdx.x / 32 - CONSUMERS / 32;
        if (warp == 0)
            produce(args, &queries, &keys, shared, own);
        else if (args.clean)
            clear_outside(args, out, warp - 1, 3);
    }
}
