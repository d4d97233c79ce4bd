// How a tile of 128 rows leaves the registers of two warpgroups, 64 columns at a time. Before this
// file: gemm_tiles.cuh, hopper_gemm.cuh, and STORE_AT, the place in shared memory.

#pragma once

constexpr int STORE_BYTES = OUT == 2 ? 0 : MT * 128;

// COUNT / 32 times 64 columns of 16 rows by each warp: fp32 as the registers lie, narrower ones
// through shared memory of the warp's own, so that whole lines are written. Pieces of 16 bytes change
// places there, which keeps banks apart.
template <int COUNT>
__device__ __forceinline__ void store_rows(const Args& args, Out* out, const Tile& tile,
                                           const float (&sum)[COUNT], int column, unsigned shared) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (OUT == 2) {
#pragma unroll
        for (int i = 0; i < COUNT; i += 2) {
            const int row = warp * 16 + lane / 4 + i / 2 % 2 * 8;
            const int at = column + i / 4 * 8 + lane % 4 * 2;
            const bool counts = row < tile.rows;
            if (row < tile.room && at < args.n)
                *reinterpret_cast<float2*>(out + (tile.out_row + row) * args.n + at) =
                    make_float2(counts ? sum[i] : 0.0f, counts ? sum[i + 1] : 0.0f);
        }
        return;
    }
    const unsigned room = shared + STORE_AT + warp * 16 * 128;
    const int own = lane % 16;
#pragma unroll
    for (int from = 0; from < COUNT; from += 32, column += 64) {
        __syncwarp();  // the columns before have left
#pragma unroll
        for (int i = 0; i < 32; i += 8)
            store_matrices(room + own * 128 + ((i / 4 + lane / 16) ^ own % 8) * 16,
                           pack(sum[from + i], sum[from + i + 1]),
                           pack(sum[from + i + 2], sum[from + i + 3]),
                           pack(sum[from + i + 4], sum[from + i + 5]),
                           pack(sum[from + i + 6], sum[from + i + 7]));
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int inside = i * 4 + lane / 8, piece = lane % 8, row = warp * 16 + inside;
            uint4 values = load_piece(room + inside * 128 + (piece ^ inside % 8) * 16);
            if (row >= tile.rows) values = make_uint4(0, 0, 0, 0);
            if (row < tile.room && column + piece * 8 < args.n)
                *reinterpret_cast<uint4*>(out + (tile.out_row + row) * args.n + column + piece * 8) =
                    values;
        }
    }
}
