// Scoring keys in two parts: a sample of the tiles, from which a floor is guessed that the k best of a
// row should reach, then all others, of which only what reaches the floor is kept.
//
// A row has KEYS lists, one for each place of a key in its tile, so that a thread appends to its own.
// Their entries take turns in memory: entry i of all lists, then entry i + 1. Where two blocks share a
// row's tiles, one fills the lists from the front and one from the back.
//
// Macros: PART, LIST entries of a list (for PART 2).

#pragma once

#include "indexer_guess.cuh"
#include "indexer_logits.cuh"

static_assert(WIDTH == KEYS, "a list for each place of a key in its tile");

struct Kept {
    float score;
    int column;
};

struct Span {
    int first, last;  // tiles, those of this part numbered in order
};

// The tiles of this part among [first, last) of all, in its own numbers.
__device__ __forceinline__ Span part(int first, int last) {
    const int sampled = (first + EVERY - 1 - DRAWN) / EVERY;
    const int sampled_last = (last + EVERY - 1 - DRAWN) / EVERY;
    if (PART == 1) return {sampled, sampled_last};
    if (PART == 2) return {first - sampled, last - sampled_last};
    return {first, last};
}

// Which of all tiles a tile of this part is.
__device__ __forceinline__ int place(int tile) {
    if (PART == 1) return tile * EVERY + DRAWN;
    if (PART == 2) return tile + (tile + EVERY - 1 - DRAWN) / (EVERY - 1);
    return tile;
}

// The key that follows `key` at the same place in the next tile of this part.
__device__ __forceinline__ int following(int key) {
    if (PART == 1) return key + EVERY * KEYS;
    if (PART == 2) return key + (key / KEYS % EVERY == DRAWN - 1 ? 2 * KEYS : KEYS);
    return key + KEYS;
}

// The column of the result in which a key's score lies.
__device__ __forceinline__ int column_of(int key) {
    return PART == 1 ? key / (EVERY * KEYS) * KEYS + key % KEYS : key;
}

#if PART == 2
// What a thread must know of the rows whose scores it keeps.
template <int N>
struct Lists {
    char* first[Columns<N>::SCORES];
    int count[Columns<N>::SCORES];  // what reached the floor, kept or not
    int start[Columns<N>::SCORES], end[Columns<N>::SCORES];
    float floor[Columns<N>::SCORES];
    int step;  // bytes from an entry to the next
};

// Without a branch, as `store_if`.
template <int N>
__device__ __forceinline__ void write(Lists<N>& lists, const float (&score)[Columns<N>::SCORES],
                                      float scale, int key, int) {
#pragma unroll
    for (int i = 0; i < Columns<N>::SCORES; ++i) {
        const float value = score[i] * scale;
        const bool wanted =
            key >= lists.start[i] && key < lists.end[i] && value >= lists.floor[i];
        char* at = lists.first[i] + static_cast<long long>(lists.count[i]) * lists.step;
        asm volatile(
            "{\n.reg .pred wanted;\nsetp.ne.b32 wanted, %0, 0;\n"
            "@wanted st.global.v2.b32 [%1], {%2, %3};\n}" ::"r"(
                static_cast<int>(wanted && lists.count[i] < LIST)),
            "l"(at), "r"(__float_as_uint(value)), "r"(key)
            : "memory");
        lists.count[i] += wanted;
    }
}
#endif
