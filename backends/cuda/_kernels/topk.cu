// The k best columns of each row of scores, in ascending order. One block per row, or a cluster of
// blocks that share one.
//
// A row is read once. A score enters the block's list if it reaches a threshold, first estimated from
// a sample of the row; the list is in order of columns at all times. A list that is full is reduced
// to its k best, and the threshold rises to the k-th. In the end the k-th of the list is the k-th of
// the row. Where the sample misled, so that fewer than k were taken, the row is read again without a
// threshold. Of equal scores the lower columns are taken, so that every repeat selects the same.

#include "topk.cuh"

namespace {

// Scores of one row as 16-byte vectors from an aligned address at or before the first.
// Element i < head is no score of the row; element i is column `origin + i`.
struct Row {
  const uint4* base;
  int head, total, origin;
};

template <int E>
__device__ Row row_of(const void* logits, long long stride, int row, int start, int end) {
  constexpr int size = 16 / E;
  const char* first = static_cast<const char*>(logits) + (stride * row + start) * size;
  const int extra = static_cast<int>(reinterpret_cast<unsigned long long>(first) & 15);
  const int head = extra / size;
  return {reinterpret_cast<const uint4*>(first - extra), head, head + end - start, start - head};
}

template <int E>
__device__ void unpack(const uint4& v, float* x) {
  const unsigned word[4] = {v.x, v.y, v.z, v.w};
  for (int i = 0; i < 4; ++i) {
    if constexpr (E == 4) {
      x[i] = __uint_as_float(word[i]);
    } else {
      x[2 * i] = __uint_as_float(word[i] << 16);
      x[2 * i + 1] = __uint_as_float(word[i] & 0xffff0000u);
    }
  }
}

// The place in a tile of a thread's first score; its others follow at 32 E, 64 E..., E at a time.
template <int E>
__device__ int own_place() {
  return warp() * (32 * PER) + lane() * E;
}

template <int E>
__device__ void load(const Row& row, int own, int end, uint4 (&v)[PER / E]) {
  const uint4* from = row.base + static_cast<unsigned>(own) / E;
#pragma unroll
  for (int i = 0; i < PER / E; ++i) {
    if (own + i * (32 * E) < end) v[i] = __ldg(from + i * 32);
  }
}

// Append the scores of one tile that reach the floor to the list (its address), unless they are more than fit: then
// false. x[i * E + e] is column + i * 32 E + e. All threads call it together.
template <int E>
__device__ bool offer(unsigned list, State& state, const float (&x)[PER], int column, int cap) {
  constexpr int V = PER / E, BITS = 32 / V;
  unsigned taken = 0;
#pragma unroll
  for (int j = 0; j < PER; ++j) taken |= (x[j] >= state.floor ? 1u : 0u) << j;
  asm volatile("" : "+r"(taken));  // one word of bits, not 16 predicates
  const Sums sums = exchange(state, __reduce_add_sync(FULL, __popc(taken)));
  if (state.count + sums.all > cap) return false;
  unsigned packed = 0;  // counts by vector, so that one scan over the lanes serves all
#pragma unroll
  for (int i = 0; i < V; ++i) packed |= __popc(taken >> (i * E) & ((1u << E) - 1)) << (i * BITS);
  unsigned sum = scan(packed);
  const unsigned all = __shfl_sync(FULL, sum, 31);
  sum -= packed;
  unsigned base = list + sizeof(Entry) * (state.count + sums.before);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    constexpr unsigned mask = (1ull << BITS) - 1;
    unsigned place = base + sizeof(Entry) * (sum >> (i * BITS) & mask);
    base += sizeof(Entry) * (all >> (i * BITS) & mask);
#pragma unroll
    for (int e = 0; e < E; ++e) {
      const int j = i * E + e;
      asm volatile(
          "{.reg .pred p; setp.ne.u32 p, %1, 0; @p st.shared.v2.b32 [%0], {%2, %3};"
          " @p add.u32 %0, %0, 8;}"
          : "+r"(place)
          : "r"(taken & (1u << j)), "r"(__float_as_uint(x[j])), "r"(column + i * (32 * E) + e)
          : "memory");
    }
  }
  state.count += sums.all;
  return true;
}

// Take what reaches the floor among elements [from, to) of a row, up to a tile that does not fit into
// the list. Where that tile begins, or `to`.
template <int E>
__device__ int stream(Shared& s, State& state, const Row& row, int from, int to, int cap) {
  const unsigned list = address_of(s.list);
  const int inside = max(from, row.head);
  uint4 next[PER / E];
  int own = from + own_place<E>(), at = from;
  load<E>(row, own, to, next);
  for (; at < to; at += TILE, own += TILE) {
    float x[PER];
#pragma unroll
    for (int i = 0; i < PER / E; ++i) unpack<E>(next[i], x + i * E);
    load<E>(row, own + TILE, to, next);
    if (at < inside || at + TILE > to) {
#pragma unroll
      for (int j = 0; j < PER; ++j) {
        const int element = own + j / E * (32 * E) + j % E;
        if (element < inside || element >= to) x[j] = NAN_VALUE;
      }
    }
    if (!offer<E>(list, state, x, row.origin + own, cap)) break;
  }
  __syncthreads();
  return at;
}

// A floor that somewhat more than k of the row's scores should reach, from a sample in strata: each
// vector is drawn at random from its share of the row.
template <int E>
__device__ float estimate(Shared& s, State& state, const Row& row, int k) {
  constexpr int V = SAMPLE > THREADS * E ? SAMPLE / (THREADS * E) : 1, COUNT = THREADS * V;
  const int vectors = row.total / E;
  float x[PER];
#pragma unroll
  for (int j = 0; j < PER; ++j) x[j] = NAN_VALUE;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const unsigned draw = i * THREADS + threadIdx.x;
    const unsigned dice = (draw * 2654435761u) >> 16;
    const unsigned long long share = (static_cast<unsigned long long>(draw) << 16) + dice;
    const int at = static_cast<int>(share * vectors / COUNT >> 16);
    unpack<E>(__ldg(row.base + at), x + i * E);
    if (at == 0) {
      for (int e = 0; e < E; ++e) {
        if (e < row.head) x[i * E + e] = NAN_VALUE;
      }
    }
  }
  state.floor = LOWEST, state.count = 0;
  offer<E>(address_of(s.list), state, x, 0, TILE);
  __syncthreads();
  const float expected = static_cast<float>(k) * (COUNT * E) / (row.total - row.head);
  const int rank = static_cast<int>(expected + 4 * sqrtf(expected) + 8);
  if (rank >= state.count) return LOWEST;
  const Cut cut = cut_at(s, state, rank, rank / 16);
  return value_of(cut.above < rank ? cut.key : cut.key + 1);  // with all that equal the cut, if any
}

// The lists of a cluster in the first block's, which is reduced whenever the next does not fit. The
// length of the first block's list.
__device__ __noinline__ int take_turns(Shared& s, State state, int k, int cap) {
  const int rank = cluster_rank(), size = cluster_size();
  for (int r = 1; r < size; ++r) {
    const int held = remote_int(&s.held, r);
    if (rank == 0) {
      if (state.count + held > cap) reduce(s, state, k);
      if (threadIdx.x == 0) s.place = state.count;
    }
    cluster_sync();
    if (rank == r) push(s, remote_int(&s.place, 0), state.count);
    cluster_sync();
    if (rank == 0) state.count += held;
  }
  return state.count;
}

// The lists of a cluster, none longer than cap - k, one after another in the first block's. False: fewer than k were taken
// under a floor that was only a guess, and nothing was moved.
__device__ bool gather(Shared& s, State& state, int k, int cap, bool guessed) {
  const int rank = cluster_rank(), size = cluster_size();
  if (threadIdx.x == 0) s.held = state.count;
  cluster_sync();
  int all = 0, before = 0;
  for (int r = 0; r < size; ++r) {
    const int held = remote_int(&s.held, r);
    if (r < rank) before += held;
    all += held;
  }
  if (all < k && guessed) {
    cluster_sync();  // before anyone changes `held`
    return false;
  }
  if (all <= cap) {
    if (rank > 0) push(s, before, state.count);
    cluster_sync();
    state.count = all;
    return true;
  }
  state.count = take_turns(s, state, k, cap);
  return true;
}

template <int E>
__device__ void select(
    const void* logits, const int* starts, const int* ends, int* out, long long stride, int n, int k,
    int cap) {
  extern __shared__ __align__(128) unsigned char memory[];
  Shared& s = *reinterpret_cast<Shared*>(memory);
  const int size = cluster_size(), rank = cluster_rank();
  const int row_index = blockIdx.x / size;
  out += static_cast<long long>(row_index) * k;
  int start = 0, end = n;
  if (starts) start = max(0, min(n, starts[row_index]));
  if (ends) end = max(0, min(n, ends[row_index]));
  State state{LOWEST, 0, address_of(s.sums)};
  if (start < end) {
    const Row row = row_of<E>(logits, stride, row_index, start, end);
    const int share = ((row.total + size - 1) / size + 511) / 512 * 512;
    const int from = min(row.total, share * rank), to = min(row.total, from + share);
    bool guessed = row.total > max(cap, SAMPLED_FROM);
    float floor = guessed ? estimate<E>(s, state, row, k) : LOWEST;
    while (true) {
      guessed = floor > LOWEST;
      state.floor = floor, state.count = 0;
      for (int at = from; at < to;) {
        at = stream<E>(s, state, row, at, to, cap);
        if (at < to || (size > 1 && state.count > cap - k)) reduce(s, state, k);
      }
      if (size > 1 ? gather(s, state, k, cap, guessed) : state.count >= k || !guessed) break;
      floor = LOWEST;
    }
  }
  if (rank > 0) return;
  const Cut cut = state.count > k ? cut_at(s, state, k, 0) : Cut{0, 0};
  keep<true>(s, state, cut, k, out);
  for (int i = state.count + threadIdx.x; i < k; i += THREADS) out[i] = -1;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) topk_fp32(
    const void* logits, const int* starts, const int* ends, int* out, long long stride, int n, int k,
    int cap) {
  select<4>(logits, starts, ends, out, stride, n, k, cap);
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) topk_bf16(
    const void* logits, const int* starts, const int* ends, int* out, long long stride, int n, int k,
    int cap) {
  select<8>(logits, starts, ends, out, stride, n, k, cap);
}
