// Units of rows for a product by groups: stretches of rows of one group, at most MT long.

constexpr int THREADS = 1024;

// Inclusive scan over the block; `room` holds 32 numbers.
template <bool LARGEST>
__device__ __forceinline__ int scan(int value, int* room) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(~0u, value, step);
        if (lane >= step) value = LARGEST ? max(value, other) : value + other;
    }
    __syncthreads();
    if (lane == 31) room[warp] = value;
    __syncthreads();
    int before = LARGEST ? -1 : 0;
    for (int i = 0; i < warp; ++i) before = LARGEST ? max(before, room[i]) : before + room[i];
    return LARGEST ? max(value, before) : value + before;
}

// `plan` gets the number of units, and from its third number on first row and group of each, then m
// and -1: a unit ends where the next begins. Rows of a group outside [0, groups) belong to group -1.
// One block.
extern "C" __global__ void __launch_bounds__(THREADS)
    units(const int* layout, int* plan, int m, int groups) {
    __shared__ int room[32], starts[THREADS];
    const int each = (m + THREADS - 1) / THREADS;
    const int begin = min(m, static_cast<int>(threadIdx.x) * each), end = min(m, begin + each);
    const auto group_of = [&](int row) {
        const int group = layout[row];
        return group < 0 || group >= groups ? -1 : group;
    };
    const auto begins = [&](int row) { return row == 0 || group_of(row) != group_of(row - 1); };
    int start = -1;
    for (int row = begin; row < end; ++row)
        if (begins(row)) start = row;
    starts[threadIdx.x] = scan<true>(start, room);
    __syncthreads();
    // Where the stretch began that reaches into this thread's rows.
    const int entry = threadIdx.x > 0 ? starts[threadIdx.x - 1] : 0;
    int count = 0, stretch = entry;
    for (int row = begin; row < end; ++row) {
        if (begins(row)) stretch = row;
        count += (row - stretch) % MT == 0;
    }
    int at = scan<false>(count, room) - count;
    int2* found = reinterpret_cast<int2*>(plan + 2);
    if (threadIdx.x == THREADS - 1) {
        plan[0] = at + count;
        found[at + count] = make_int2(m, -1);
    }
    stretch = entry;
    for (int row = begin; row < end; ++row) {
        if (begins(row)) stretch = row;
        if ((row - stretch) % MT == 0) found[at++] = make_int2(row, group_of(row));
    }
}
