// Which tile of a product a block computes, and what its outputs look like.
//
// Macros: OUT (0 bf16, 1 fp16, 2 fp32), and MODE:
//   0  one product; `plan` is not read
//   1  activations [groups, m, k], of which the first plan[group] rows count
//   2  `plan` is what gemm_units.cu found
// Rows that do not count, and units of a group < 0, become zeros. Before this file: MT and NT, rows
// and columns of a block's tile, and HEIGHT, rows of a cluster's.

#pragma once

constexpr int BLOCK = 128;

#if OUT == 2
using Out = float;
#else
using Out = unsigned short;
#endif

// Two neighbours rounded to 16 bits; `low` comes first in memory.
__device__ __forceinline__ unsigned pack(float low, float high) {
    unsigned both;
    if (OUT == 0)
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    else
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

struct Args {
    const float* a_scale;
    const float* b_scale;
    const int* plan;
    long long a_scale_group, a_scale_row, b_scale_group, b_scale_row;  // strides
    int m, n, blocks, groups;
};

// One tile: `rows` of `room` rows count, the others are written as zeros. Both may be less than
// nothing in the second of a pair; `idle` tells that no row of the cluster counts.
struct Tile {
    int group, row, rows, room, column;
    bool idle;
    long long out_row;
};

__device__ __forceinline__ int tile_count(const Args& args) {
    const int across = (args.n + NT - 1) / NT;
    if (MODE == 2) return args.plan[0] * across;
    return args.groups * ((args.m + HEIGHT - 1) / HEIGHT) * across;
}

// SPAN rows of tiles are walked together, column by column, so that tiles computed at about the same
// time share both operands in the last cache.
constexpr int SPAN = 8;

__device__ __forceinline__ Tile tile_at(const Args& args, int at, int rank) {
    const int across = (args.n + NT - 1) / NT;
    const int down = MODE == 2 ? args.plan[0] : (args.m + HEIGHT - 1) / HEIGHT;
    int group = at / (down * across);
    const int inside = at % (down * across), first = inside / (SPAN * across) * SPAN;
    const int span = min(SPAN, down - first), within = inside % (SPAN * across);
    const int unit = first + within % span, column = within / span * NT;
    int row, rows, room;
    long long out_row;
    if (MODE == 2) {
        const int2* found = reinterpret_cast<const int2*>(args.plan + 2) + unit;
        row = found->x, group = found->y, room = found[1].x - row;
        rows = group < 0 ? 0 : room, out_row = row;
    } else {
        row = unit * HEIGHT, room = args.m - row;
        rows = MODE == 1 ? min(room, args.plan[group] - row) : room;
        out_row = static_cast<long long>(group) * args.m + row;
    }
    const int skip = HEIGHT == MT ? 0 : rank * MT;
    return {group, row + skip, min(MT, rows - skip), min(MT, room - skip), column, rows <= 0,
            out_row + skip};
}
