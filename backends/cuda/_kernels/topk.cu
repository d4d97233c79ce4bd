// The k best columns of each row of scores, in ascending order. A row has a block, or a cluster of
// blocks that share it.
//
// A row is read once. A score enters the block's list if it reaches a floor, estimated from a sample of
// the row; the list is in order of columns at all times. A list that is full is cut down to its k best,
// and the floor rises to the k-th. In the end the k-th of the list is the k-th of the row. Where the
// sample misled, so that fewer than k were taken, the row is read again without a floor. Of equal
// scores the lower columns are taken, so that every repeat selects the same.

#include "topk.cuh"
#include "topk_cluster.cuh"

namespace {

// The arguments of a call.
struct Call {
  const void* logits;
  const int *starts, *ends;
  int* out;
  long long stride;
  int n, k;
  // How many groups of `group` rows are wanted, then their numbers; null: all rows. The scores are
  // those of the groups from the one counted `from` on, one after another.
  const int* chosen;
  int from, group, rows;
};

// The row of starts, ends and out that a row of scores belongs to, or -1.
__device__ int whose(const Call& call, int index) {
  if (!call.chosen) return index;
  const int at = call.from + index / call.group;
  if (at >= call.chosen[0]) return -1;
  const int row = call.chosen[1 + at] * call.group + index % call.group;
  return row < call.rows ? row : -1;
}

// Scores of one row as 16-byte vectors from an aligned address at or before the first. Element
// i < head is no score of the row; element i is column `origin + i`. This block takes [from, to).
struct Row {
  const char* base;
  int head, total, origin, from, to;
};

// E: scores in 16 bytes.
template <int E>
__device__ Row row_of(const Call& call, int index, int owner) {
  constexpr int size = 16 / E;
  int start = 0, end = call.n;
  if (call.starts) start = max(0, min(call.n, __ldg(call.starts + owner)));
  if (call.ends) end = max(0, min(call.n, __ldg(call.ends + owner)));
  if (start >= end) return {nullptr, 0, 0, 0, 0, 0};
  const char* first = static_cast<const char*>(call.logits) + (call.stride * index + start) * size;
  const int extra = static_cast<int>(reinterpret_cast<unsigned long long>(first) & 15);
  const int head = extra / size, total = head + end - start;
  const int blocks = cluster_size();
  const int share = ((total + blocks - 1) / blocks + 511) / 512 * 512;
  const int from = min(total, share * cluster_rank());
  return {first - extra, head, total, start - head, from, min(total, from + share)};
}

template <int E>
__device__ void unpack(const uint4& v, float (&x)[E]) {
  const unsigned word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
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
__device__ void load(const Row& row, int own, uint4 (&v)[PER / E]) {
  const char* from = row.base + static_cast<long long>(own) * (16 / E);
#pragma unroll
  for (int i = 0; i < PER / E; ++i) {
    if (own + i * (32 * E) < row.to) v[i] = __ldg(reinterpret_cast<const uint4*>(from) + i * 32);
  }
}

// Append to the list (its address) those scores of a tile that reach the floor, unless they are more
// than fit: then false. x[i][e] is column + i * 32 E + e.
template <int E>
__device__ bool offer(unsigned list, State& state, const float (&x)[PER / E][E], int column) {
  constexpr int V = PER / E, BITS = 32 / V;
  const float floor = state.floor;
  unsigned taken = 0, both;
#pragma unroll
  for (int j = 0; j < PER; ++j) taken |= (x[j / E][j % E] >= floor ? 1u : 0u) << j;
  asm volatile("" : "+r"(taken));  // one word of bits, not so many predicates
  both = __popc(taken);
  if (state.ties > 0) {
#pragma unroll
    for (int j = 0; j < PER; ++j) both += x[j / E][j % E] == floor ? 1 << 16 : 0;
  }
  const Sums sums = exchange(state, __reduce_add_sync(FULL, both));
  const int all = sums.all & 0xffff;
  if (state.count + all > CAP) return false;
  unsigned packed = 0;  // counts by vector, so that one scan over the lanes serves all
#pragma unroll
  for (int i = 0; i < V; ++i) packed |= __popc(taken >> (i * E) & ((1u << E) - 1)) << (i * BITS);
  unsigned sum = scan(packed);
  const unsigned of_warp = __shfl_sync(FULL, sum, 31);
  sum -= packed;
  unsigned base = list + sizeof(Entry) * (state.count + (sums.before & 0xffff));
#pragma unroll
  for (int i = 0; i < V; ++i) {
    constexpr unsigned mask = (1ull << BITS) - 1;
    unsigned place = base + sizeof(Entry) * (sum >> (i * BITS) & mask);
    base += sizeof(Entry) * (of_warp >> (i * BITS) & mask);
#pragma unroll
    for (int e = 0; e < E; ++e) {
      asm volatile(
          "{.reg .pred p; setp.ne.u32 p, %1, 0; @p st.shared.v2.b32 [%0], {%2, %3};"
          " @p add.u32 %0, %0, 8;}"
          : "+r"(place)
          : "r"(taken & (1u << (i * E + e))), "r"(__float_as_uint(x[i][e])),
            "r"(column + i * (32 * E) + e)
          : "memory");
    }
  }
  state.count += all;
  if (state.ties > 0) {
    state.ties -= sums.all >> 16;
    if (state.ties <= 0) state.floor = value_of(key_of(floor) + 1);
  }
  return true;
}

// Take what reaches the floor in this block's part of a row from element `at` on, up to a tile that does
// not fit into the list. Where that tile begins, or row.to.
template <int E>
__device__ int stream(Shared& s, State& state, const Row& row, int at) {
  constexpr int V = PER / E;
  const unsigned list = address_of(s.list);
  const int inside = max(row.from, row.head);
  uint4 next[V];
  int own = at + own_place<E>();
  load<E>(row, own, next);
  for (; at < row.to; at += TILE, own += TILE) {
    float x[V][E];
#pragma unroll
    for (int i = 0; i < V; ++i) unpack<E>(next[i], x[i]);
    load<E>(row, own + TILE, next);
    if (at < inside || at + TILE > row.to) {
#pragma unroll
      for (int j = 0; j < PER; ++j) {
        const int element = own + j / E * (32 * E) + j % E;
        if (element < inside || element >= row.to) x[j / E][j % E] = __uint_as_float(0x7fffffffu);
      }
    }
    if (!offer<E>(list, state, x, row.origin + own)) break;
  }
  __syncthreads();
  return at;
}

// A vector of a sample of a row in strata: each is drawn at random from its share of the row.
template <int E>
__device__ const uint4* drawn(const Row& row, int i) {
  constexpr int COUNT = THREADS * SAMPLED / E;
  const unsigned stratum = i * THREADS + threadIdx.x;
  const unsigned dice = (stratum * 2654435761u) >> 16;
  const unsigned long long share = (static_cast<unsigned long long>(stratum) << 16) + dice;
  const long long at = static_cast<long long>(share * (row.total / E) / COUNT >> 16);
  return reinterpret_cast<const uint4*>(row.base) + at;
}

// Have the first of this block's scores brought into the L2 cache.
template <int E>
__device__ void prefetch(const Row& row) {
  if (threadIdx.x == 0 && row.to - row.from >= E) {
    const char* from = row.base + static_cast<long long>(row.from) * (16 / E);
    const int bytes = min((row.to - row.from) / E, PREFETCHED / 16) * 16;
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes));
  }
}

// The floor that somewhat more than k of the row's scores should reach.
template <int E>
__device__ void estimate(Shared& s, State& state, const Row& row, int k) {
  unsigned key[SAMPLED];
  uint4 sample[SAMPLED / E];
  int valid = 0;
#pragma unroll
  for (int i = 0; i < SAMPLED / E; ++i) sample[i] = __ldg(drawn<E>(row, i));
#pragma unroll
  for (int i = 0; i < SAMPLED / E; ++i) {
    float x[E];
    unpack<E>(sample[i], x);
#pragma unroll
    for (int e = 0; e < E; ++e) {
      const bool counts = x[e] >= LOWEST && !(i == 0 && threadIdx.x == 0 && e < row.head);
      key[i * E + e] = counts ? key_of(x[e]) : 0;
      valid += counts;
    }
  }
  const float expected = static_cast<float>(k) * (THREADS * SAMPLED) / (row.total - row.head);
  const int rank = static_cast<int>(expected + 4 * sqrtf(expected) + 8);
  if (exchange(state, __reduce_add_sync(FULL, valid)).all < rank) return;
  const Cut cut = cut_at(s, state, key, SAMPLED, rank, max(1, rank / 16));
  state.floor = value_of(cut.room ? cut.key : cut.key + 1);
  state.ties = cut.room ? k : 0;
}

template <int E>
__device__ void select(const Call& call) {
  extern __shared__ __align__(128) unsigned char memory[];
  Shared& s = *reinterpret_cast<Shared*>(memory);
  const int size = cluster_size(), index = blockIdx.x / size, k = call.k;
  State state{LOWEST, 0, 0, address_of(s.sums)};
  let_next_kernel_begin();
  wait_for_kernel_ahead();
  const int owner = whose(call, index);
  if (owner < 0) return;
  const Row row = row_of<E>(call, index, owner);
  if (row.total) {
    prefetch<E>(row);
    if (row.total > CAP) estimate<E>(s, state, row, k);
    bool guessed = state.floor > LOWEST;
    while (true) {
      for (int at = row.from; at < row.to;) {
        at = stream<E>(s, state, row, at);
        if (at < row.to || (size > 1 && state.count > CAP - k)) state = reduced(s, state, k);
      }
      if (size > 1 ? gather(s, state, k, guessed) : state.count >= k || !guessed) break;
      guessed = false;
      state.floor = LOWEST, state.count = state.ties = 0;
    }
  }
  if (cluster_rank() > 0) return;
  int* out = call.out + static_cast<long long>(owner) * k;
  keep_best<true>(s, state, k, out);
  for (int i = state.count + threadIdx.x; i < k; i += THREADS) out[i] = -1;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) topk_fp32(
    const void* logits, const int* starts, const int* ends, int* out, long long stride, int n,
    int k, const int* chosen, int from, int group, int rows) {
  select<4>({logits, starts, ends, out, stride, n, k, chosen, from, group, rows});
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) topk_bf16(
    const void* logits, const int* starts, const int* ends, int* out, long long stride, int n,
    int k, const int* chosen, int from, int group, int rows) {
  select<8>({logits, starts, ends, out, stride, n, k, chosen, from, group, rows});
}
