// What scoring keys of one tensor and keys of pages have in common.
//
// A tile of 64 keys is multiplied with the heads of some queries, so that a thread has, of each query,
// 16 of 64 heads for two keys; it weighs and adds those itself, and four neighbours add theirs up.

#pragma once

#include "hopper_gemm.cuh"
#include "overlap.cuh"

constexpr int DIM = 128;
constexpr int KEYS = 64;
constexpr int TILE_BYTES = KEYS * DIM;

// The score of a key outside a row's range: -infinity.
__device__ __forceinline__ float nothing() { return __int_as_float(0xff800000); }

// The key of a tile whose score this thread has after `sums`.
__device__ __forceinline__ int own_key() {
    return threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4 + (threadIdx.x & 2) * 4;
}

// N columns of products hold N / HEADS queries, of which a thread has every second score.
template <int N>
struct Columns {
    static constexpr int QUERIES = N / HEADS;
    static constexpr int SCORES = (QUERIES + 1) / 2;
    static constexpr int WEIGHTS = N / 4;
};

// The weights that this thread needs, for rows from `first`; what rows beyond `rows` get is never used.
template <int N>
__device__ __forceinline__ void load_weights(float (&own)[N / 4], const float* weights,
                                             long long row_stride, int first, int rows) {
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
        const int row = min(first + j / (HEADS / 8), rows - 1);
        const int head = j % (HEADS / 8) * 8 + threadIdx.x % 4 * 2;
#pragma unroll
        for (int c = 0; c < 2; ++c) own[2 * j + c] = weights[row * row_stride + head + c];
    }
}

// score[i] = sum over heads of ReLU(products) * weight, of query 2 i + threadIdx % 2 (of query 2 i if
// that is the last) and key `own_key()`. ReLU(x) is a maximum for one of the two keys and half of x + |x|
// for the other: these take different arithmetic, which then works side by side. Both are exact.
template <int N>
__device__ __forceinline__ void sums(float (&score)[Columns<N>::SCORES],
                                     const float (&products)[N / 2], const float (&own)[N / 4]) {
    constexpr int QUERIES = Columns<N>::QUERIES, OCTETS = HEADS / 8;
    const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
    float kept[QUERIES];
#pragma unroll
    for (int query = 0; query < QUERIES; ++query) {
        float low_key = 0.0f, high_key = 0.0f;
#pragma unroll
        for (int j = query * OCTETS; j < (query + 1) * OCTETS; ++j) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const float low = products[4 * j + c], up = products[4 * j + 2 + c];
                low_key = fmaf(low + fabsf(low), own[2 * j + c], low_key);
                high_key = fmaf(fmaxf(up, 0.0f), own[2 * j + c], high_key);
            }
        }
        low_key *= 0.5f;
        kept[query] = (high ? high_key : low_key) +
                      __shfl_xor_sync(~0u, high ? low_key : high_key, 2);
    }
#pragma unroll
    for (int i = 0; i < Columns<N>::SCORES; ++i) {
        const float even_query = kept[2 * i], odd_query = kept[min(2 * i + 1, QUERIES - 1)];
        score[i] = (odd ? odd_query : even_query) +
                   __shfl_xor_sync(~0u, odd ? even_query : odd_query, 1);
    }
}

// What a thread must know of the rows that it writes.
template <int N>
struct Rows {
    float* out[Columns<N>::SCORES];
    int start[Columns<N>::SCORES], end[Columns<N>::SCORES];
    int room[Columns<N>::SCORES];  // columns; 0 for a row that is not there
};

// Stores without a branch: around one the compiler would wait for all products that are under way.
__device__ __forceinline__ void store_if(bool wanted, float* at, float value) {
    asm volatile("{\n.reg .pred wanted;\nsetp.ne.b32 wanted, %0, 0;\n@wanted st.global.f32 [%1], %2;\n}" ::
                     "r"(static_cast<int>(wanted)),
                 "l"(at), "f"(value)
                 : "memory");
}

template <int N>
__device__ __forceinline__ void write(const Rows<N>& rows, const float (&score)[Columns<N>::SCORES],
                                      float scale, int key, int column) {
#pragma unroll
    for (int i = 0; i < Columns<N>::SCORES; ++i) {
        const bool inside = key >= rows.start[i] && key < rows.end[i];
        store_if(key < rows.room[i], rows.out[i] + column, inside ? score[i] * scale : nothing());
    }
}

// products = keys (64) times N columns; the tiles lie in shared memory.
template <int N>
__device__ __forceinline__ void multiply(float (&products)[N / 2], unsigned long long keys,
                                         unsigned long long columns) {
    mma_begin();
#pragma unroll
    for (int step = 0; step < DIM / 32; ++step)
        Mma<N>::run(products, keys + step * 2, columns + step * 2, step);
    mma_end();
}

// A warp writes -inf to columns [begin, end) of a row.
__device__ __forceinline__ void clear(float* row, int begin, int end) {
    for (int column = begin + threadIdx.x % 32; column < end; column += 32) row[column] = nothing();
}

// The tiles of all `count` groups of rows in one line, of which every block takes an equal stretch.
// `tiles_of(group)` is how many a group has. All threads of the block; `room` is 2 + THREADS / 32
// words of shared memory.
struct Stretch {
    int group, tile, left;  // where it begins, and how many tiles it has
    int previous;           // tiles of the block before
};

template <int THREADS, typename F>
__device__ __forceinline__ Stretch stretch(int count, long long* room, F tiles_of) {
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int run = (count + THREADS - 1) / THREADS;
    const int first = min(thread * run, count), last = min(first + run, count);
    long long own = 0;
    for (int group = first; group < last; ++group) own += tiles_of(group);
    long long upto = own;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const long long before = __shfl_up_sync(~0u, upto, step);
        if (lane >= step) upto += before;
    }
    if (lane == 31) room[2 + warp] = upto;
    __syncthreads();
    long long all = 0;
    upto -= own;
#pragma unroll
    for (int other = 0; other < THREADS / 32; ++other) {
        if (other < warp) upto += room[2 + other];
        all += room[2 + other];
    }
    const long long begin = all * blockIdx.x / gridDim.x, end = all * (blockIdx.x + 1) / gridDim.x;
    if (upto <= begin && begin < upto + own) {
        int group = first, tiles = tiles_of(group);
        for (; upto + tiles <= begin; tiles = tiles_of(++group)) upto += tiles;
        room[0] = group;
        room[1] = begin - upto;
    }
    __syncthreads();
    const long long before = all * max(static_cast<int>(blockIdx.x) - 1, 0) / gridDim.x;
    return {static_cast<int>(room[0]), static_cast<int>(room[1]), static_cast<int>(end - begin),
            static_cast<int>(begin - before)};
}
