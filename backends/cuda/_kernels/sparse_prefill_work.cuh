// What one block of `sparse_prefill.cu` works on: 64 rows, each a query and one of its heads, and
// the keys that they see. With RANGES they are the keys of a range per query, else a selection.
#pragma once
#include "sparse_prefill_hopper.cuh"

constexpr int ROWS = 64, KEYS = 48, VALUES = 512;

struct Call {
    const unsigned short *q, *kv;
    const int *indices, *lengths;  // with RANGES: first and end key of every query
    const float* sink;
    unsigned short* out;
    float *top, *lse, *part;  // part: fp32 [splits, tokens, heads, VALUES] in the place of out
    long long q_token, q_head, kv_row, index_row;
    int tokens, heads, context, k, splits;
    float scale;

    DEV const unsigned short* query(long long token, int head) const {
        return q + token * q_token + head * q_head;
    }
};

#ifdef RANGES

// 64 rows that follow each other in [tokens, heads], and a part of the keys that any of them sees.
struct Work {
    int row, tiles, split;
    int start, end;              // keys
    int inner_start, inner_end;  // keys that every row sees
    int token, last_token;

    static DEV int count(const Call& call) {
        return (call.tokens * call.heads + ROWS - 1) / ROWS * call.splits;
    }

    DEV Work(const Call& call, int at) {  // last rows first: they see most where it is causal
        row = (count(call) - 1 - at) / call.splits * ROWS;
        split = at % call.splits;
        token = row / call.heads;
        last_token = min(row + ROWS - 1, call.tokens * call.heads - 1) / call.heads;
        start = inner_end = call.context, end = inner_start = 0;
        for (int i = token + (threadIdx.x & 31); i <= last_token; i += 32) {
            const int first = call.indices[i], last = call.lengths[i];
            if (first < last) start = min(start, first), end = max(end, last);
            inner_start = max(inner_start, first), inner_end = min(inner_end, last);
        }
        end = min(__reduce_max_sync(~0u, end), call.context);
        start = min(max(__reduce_min_sync(~0u, start), 0), end);
        inner_start = __reduce_max_sync(~0u, inner_start);
        inner_end = __reduce_min_sync(~0u, inner_end);
        const int all = (end - start + KEYS - 1) / KEYS;
        const int own = (all + call.splits - 1) / call.splits;
        start = min(start + split * own * KEYS, end);
        end = min(start + own * KEYS, end);
        tiles = max(1, (end - start + KEYS - 1) / KEYS);
    }
    DEV bool has(const Call& call, int r) const { return row + r < call.tokens * call.heads; }
    DEV const unsigned short* query(const Call& call, int r) const {
        return call.query((row + r) / call.heads, (row + r) % call.heads);
    }
    // Where the result of a row lies, in rows.
    DEV long long place(const Call& call, int r) const {
        return (long long)split * call.tokens * call.heads + row + r;
    }
    // The row of kv at place `at`; -1 if no row sees it: then it may hold anything.
    DEV int key(const Call& call, int at) const {
        const int found = start + at;
        if (found >= end) return -1;
        if (found >= inner_start && found < inner_end) return found;
        for (int i = token; i <= last_token; ++i)
            if (found >= call.indices[i] && found < call.lengths[i]) return found;
        return -1;
    }
};

// Which keys of a tile the two rows of a thread see, row g and row g + 8 of its warp's 16.
struct Sight {
    int first[2], last[2];

    DEV Sight(const Call& call, const Work& work) {
        const int r0 = (threadIdx.x / 32 & 3) * 16 + (threadIdx.x & 31) / 4;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const bool own = work.has(call, r0 + 8 * r);
            const int token = own ? (work.row + r0 + 8 * r) / call.heads : 0;
            first[r] = (own ? call.indices[token] : 0) - work.start;
            last[r] = own ? min(call.lengths[token], work.end) - work.start : first[r];
        }
    }
    DEV void hide(float (&s)[24], int t, unsigned, unsigned) const {
        if (t * KEYS >= max(first[0], first[1]) && (t + 1) * KEYS <= min(last[0], last[1])) return;
#pragma unroll
        for (int i = 0; i < 24; ++i) {
            const int at = t * KEYS + 8 * (i / 4) + 2 * (threadIdx.x & 3) + (i & 1);
            if (at < first[i / 2 & 1] || at >= last[i / 2 & 1]) s[i] = -INFINITE;
        }
    }
};

#else

// One query and 64 of its heads.
struct Work {
    long long token;
    int head, keys, tiles;

    static DEV int count(const Call& call) {
        return call.tokens * ((call.heads + ROWS - 1) / ROWS);
    }

    DEV Work(const Call& call, int at) {
        const int blocks = (call.heads + ROWS - 1) / ROWS;
        token = at / blocks;
        head = at % blocks * ROWS;
        keys = call.lengths ? max(0, min(call.k, call.lengths[token])) : call.k;
        tiles = max(1, (keys + KEYS - 1) / KEYS);
    }
    DEV bool has(const Call& call, int r) const { return head + r < call.heads; }
    DEV const unsigned short* query(const Call& call, int r) const {
        return call.query(token, head + r);
    }
    // Where the result of a row lies, in rows.
    DEV long long place(const Call& call, int r) const { return token * call.heads + head + r; }
    // The row of kv at place `at` of the selection; -1 if there is none.
    DEV int key(const Call& call, int at) const {
        if (at >= keys) return -1;
        const int found = call.indices[token * call.index_row + at];
        return (unsigned)found < (unsigned)call.context ? found : -1;
    }
};

// Which keys of a tile there are: bit i of `low` and `high` says it of key i and key 32 + i.
struct Sight {
    DEV Sight(const Call&, const Work&) {}
    DEV void hide(float (&s)[24], int, unsigned low, unsigned high) const {
        if (low == ~0u && high == 0xffffu) return;
#pragma unroll
        for (int i = 0; i < 24; ++i) {
            const unsigned seen = i < 16 ? low : high;
            if (!(seen >> (8 * (i / 4 & 3) + 2 * (threadIdx.x & 3) + (i & 1)) & 1)) s[i] = -INFINITE;
        }
    }
};

#endif
