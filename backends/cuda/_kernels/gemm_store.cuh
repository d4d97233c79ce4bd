// How a tile of 128 rows leaves the registers of two warpgroups, 128 columns at a time. Before this
// file: gemm_tiles.cuh, hopper_gemm.cuh, and STORE_AT, the place in shared memory.

#pragma once

constexpr int WIDTH = 128;
constexpr int REGS = WIDTH / 2;
constexpr int STORE_BYTES = OUT == 2 ? 0 : MT * WIDTH * 2;

// 16 rows by each warp: fp32 as the registers lie, narrower ones through shared memory of the warp's
// own, so that whole lines are written. Pieces of 16 bytes change places there, which keeps banks
// apart.
__device__ __forceinline__ void store_wave(const Args& args, Out* out, const Tile& tile,
                                           const float (&sum)[REGS], int column, unsigned shared) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (OUT == 2) {
#pragma unroll
        for (int i = 0; i < REGS; i += 2) {
            const int row = warp * 16 + lane / 4 + i / 2 % 2 * 8;
            const int at = column + i / 4 * 8 + lane % 4 * 2;
            const bool counts = row < tile.rows;
            if (row < tile.room && at < args.n)
                *reinterpret_cast<float2*>(out + (tile.out_row + row) * args.n + at) =
                    make_float2(counts ? sum[i] : 0.0f, counts ? sum[i + 1] : 0.0f);
        }
        return;
    }
    const unsigned room = shared + STORE_AT + warp * 16 * 256;
    const int own = lane % 16;
    __syncwarp();  // the wave before has left
#pragma unroll
    for (int i = 0; i < REGS; i += 8)
        store_matrices(room + own * 256 + ((i / 4 + lane / 16) ^ own % 8) * 16,
                       pack(sum[i], sum[i + 1]), pack(sum[i + 2], sum[i + 3]),
                       pack(sum[i + 4], sum[i + 5]), pack(sum[i + 6], sum[i + 7]));
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const int inside = i * 2 + lane / 16, piece = lane % 16, row = warp * 16 + inside;
        uint4 values = load_piece(room + inside * 256 + (piece ^ inside % 8) * 16);
        if (row >= tile.rows) values = make_uint4(0, 0, 0, 0);
        if (row < tile.room && column + piece * 8 < args.n)
            *reinterpret_cast<uint4*>(out + (tile.out_row + row) * args.n + column + piece * 8) =
                values;
    }
}
