// A block's list of (score, column) in shared memory, in order of columns: the cut at its k-th score,
// and what is kept of it. Built with THREADS of a block, PER scores of a thread in a tile, and the
// blocks RESIDENT on a processor.

#pragma once

#define FULL 0xffffffffu
#define WARPS (THREADS / 32)
#define TILE (THREADS * PER)  // scores that are offered to the list in one step
#define SAMPLE 2048
#define BINS 1024
#define FEW 32  // scores in a bin that one warp ranks directly
#define SAMPLED_FROM 4096
#define LOWEST (-3.402823466e38f)
#define NAN_VALUE __uint_as_float(0x7fffffffu)

namespace {

struct Entry {
  float score;
  int column;
};

struct Shared {
  unsigned bins[BINS];
  unsigned few[FEW];
  alignas(8 * WARPS) unsigned sums[2][WARPS];
  unsigned low, high, found_bin, found_above, found_inside, fews;
  int held, place;
  alignas(16) Entry list[1];  // as many as were asked for
};
static_assert(sizeof(Shared) <= 4736 + sizeof(Entry), "topk.py counts 4736 bytes beside the list");

// What every thread of a block knows of the list: scores below `floor` do not enter.
struct State {
  float floor;
  int count;
  unsigned sums;  // address in shared memory of the sums that `exchange` writes next
};

// Selects all keys above `key`, `above` of them, and then the first of those equal to it.
struct Cut {
  unsigned key;
  int above;
};

struct Sums {
  int before, all;
};

__device__ int lane() { return threadIdx.x & 31; }
__device__ int warp() { return threadIdx.x >> 5; }

// Whole numbers in the order of scores. Adding 0 makes -0 and +0 one.
__device__ unsigned key_of(float x) {
  const unsigned bits = __float_as_uint(x + 0.0f);
  return bits ^ (static_cast<unsigned>(static_cast<int>(bits) >> 31) | 0x80000000u);
}

__device__ float value_of(unsigned key) {
  return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

// The address of something in shared memory, computed here and now: left to itself the compiler does it
// anew at every access, and asks for the block's place in its cluster each time.
__device__ unsigned address_of(const void* in_shared) {
  unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(in_shared));
  asm volatile("" : "+r"(at));
  return at;
}

// A sum over the lanes up to this one.
__device__ unsigned scan(unsigned own) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    asm volatile(
        "{.reg .pred p; .reg .b32 lower; shfl.sync.up.b32 lower|p, %0, %1, 0, -1;"
        " @p add.u32 %0, %0, lower;}"
        : "+r"(own)
        : "r"(step));
  }
  return own;
}

// Sums of one number per warp: over the warps before this one, and over all. A barrier of the block;
// two memories in turn make one barrier enough.
__device__ Sums exchange(State& state, unsigned mine) {
  if (lane() == 0) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(state.sums + 4 * warp()), "r"(mine) : "memory");
  }
  __syncthreads();
  unsigned other = 0;
  if (lane() < WARPS) {
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(other) : "r"(state.sums + 4 * lane()) : "memory");
  }
  state.sums ^= 4 * WARPS;
  return {
      static_cast<int>(__reduce_add_sync(FULL, lane() < warp() ? other : 0)),
      static_cast<int>(__reduce_add_sync(FULL, other))};
}

// The bin in which the count from above reaches k, for all threads.
__device__ void find_bin(Shared& s, State& state, int k, int above) {
  constexpr int OWN = BINS / THREADS;
  const int top = BINS - 1 - static_cast<int>(threadIdx.x) * OWN;
  unsigned own = 0;
#pragma unroll
  for (int i = 0; i < OWN; ++i) own += s.bins[top - i];
  const unsigned sum = scan(own);
  const unsigned all = __shfl_sync(FULL, sum, 31);
  int before = above + exchange(state, all).before + static_cast<int>(sum - own);
  if (before < k && k <= before + static_cast<int>(own)) {
    int bin = top;
    while (before + static_cast<int>(s.bins[bin]) < k) before += s.bins[bin--];
    s.found_bin = bin, s.found_above = before, s.found_inside = s.bins[bin];
  }
  __syncthreads();
}

// Where to cut a list of at least k entries so that its k best remain, or up to `slack` more.
__device__ Cut cut_at(Shared& s, State& state, int k, int slack) {
  unsigned low = 0xffffffffu, high = 0;
  for (int i = threadIdx.x; i < state.count; i += THREADS) {
    const unsigned key = key_of(s.list[i].score);
    low = min(low, key), high = max(high, key);
  }
  if (threadIdx.x == 0) s.low = 0xffffffffu, s.high = 0;
  __syncthreads();
  low = __reduce_min_sync(FULL, low), high = __reduce_max_sync(FULL, high);
  if (lane() == 0) atomicMin(&s.low, low), atomicMax(&s.high, high);
  int above = 0;
  bool first = true;
  while (true) {
    for (int i = threadIdx.x; i < BINS; i += THREADS) s.bins[i] = 0;
    if (threadIdx.x == 0) s.fews = 0;
    __syncthreads();
    if (first) low = s.low, high = s.high, first = false;
    const int shift = max(0, 32 - __clz(high - low) - 10);
    for (int i = threadIdx.x; i < state.count; i += THREADS) {
      const unsigned key = key_of(s.list[i].score);
      if (key >= low && key <= high) atomicAdd(&s.bins[(key - low) >> shift], 1u);
    }
    __syncthreads();
    find_bin(s, state, k, above);
    low += s.found_bin << shift;
    high = min(high, low + ((1u << shift) - 1));
    above = s.found_above;
    if (shift == 0) return {low, above};
    const int inside = s.found_inside, need = k - above;
    if (inside - need <= slack) return {low - 1, above + inside};
    if (inside <= FEW) break;
  }
  for (int i = threadIdx.x; i < state.count; i += THREADS) {
    const unsigned key = key_of(s.list[i].score);
    if (key >= low && key <= high) s.few[atomicAdd(&s.fews, 1u)] = key;
  }
  __syncthreads();
  const int inside = s.found_inside, need = k - above;
  const unsigned own = lane() < inside ? s.few[lane()] : 0;
  int greater = 0, equal = 0;
  for (int i = 0; i < inside; ++i) {
    const unsigned other = __shfl_sync(FULL, own, i);
    greater += other > own, equal += other == own;
  }
  const unsigned cuts = __ballot_sync(FULL, greater < need && need <= greater + equal);
  const int source = __ffs(cuts) - 1;
  return {__shfl_sync(FULL, own, source), above + __shfl_sync(FULL, greater, source)};
}

// Keep what `cut` selects, at most k entries: their columns in `out` if LAST, else in the list itself.
template <bool LAST>
__device__ void keep(Shared& s, State& state, Cut cut, int k, int* out) {
  constexpr int U = 4;
  const int room = max(0, k - cut.above);
  const unsigned lower = (1u << lane()) - 1;
  int above = 0, equal = 0;
  for (int at = 0; at < state.count; at += THREADS * U) {
    Entry entry[U];
    unsigned ups[U], evens[U], counts = 0;
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int i = at + warp() * (32 * U) + u * 32 + lane();
      unsigned key = 0;
      if (i < state.count) entry[u] = s.list[i], key = key_of(entry[u].score);
      ups[u] = __ballot_sync(FULL, key > cut.key);
      evens[u] = __ballot_sync(FULL, i < state.count && key == cut.key);
      counts += __popc(ups[u]) + (__popc(evens[u]) << 16);
    }
    const Sums sums = exchange(state, counts);
    int ups_before = above + (sums.before & 0xffff), evens_before = equal + (sums.before >> 16);
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int even = evens_before + __popc(evens[u] & lower);
      const int place = ups_before + __popc(ups[u] & lower) + min(even, room);
      if ((ups[u] >> lane() & 1) || ((evens[u] >> lane() & 1) && even < room)) {
        if (LAST) {
          out[place] = entry[u].column;
        } else {
          s.list[place] = entry[u];
        }
      }
      ups_before += __popc(ups[u]), evens_before += __popc(evens[u]);
    }
    above += sums.all & 0xffff, equal += sums.all >> 16;
  }
  __syncthreads();
  state.count = above + min(equal, room);
}

// Cut the list down to its k best; from here only higher scores enter.
__device__ void reduce(Shared& s, State& state, int k) {
  const Cut cut = cut_at(s, state, k, 0);
  keep<false>(s, state, cut, k, nullptr);
  state.floor = value_of(cut.key + 1);
}

// -- clusters -----------------------------------------------------------------------------------

__device__ int cluster_size() {
  int size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

__device__ int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ unsigned remote(const void* own, int rank) {
  unsigned there;
  const unsigned here = static_cast<unsigned>(__cvta_generic_to_shared(own));
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
  return there;
}

__device__ int remote_int(const int* own, int rank) {
  int found;
  asm volatile("ld.shared::cluster.s32 %0, [%1];" : "=r"(found) : "r"(remote(own, rank)) : "memory");
  return found;
}

// Copy this block's list into the first block's, from `place` on.
__device__ void push(Shared& s, int place, int count) {
  const unsigned there = remote(s.list, 0);
  for (int i = threadIdx.x; i < count; i += THREADS) {
    const Entry entry = s.list[i];
    asm volatile("st.shared::cluster.v2.b32 [%0], {%1, %2};" ::"r"(there + 8 * (place + i)),
                 "r"(__float_as_uint(entry.score)), "r"(entry.column)
                 : "memory");
  }
}

}  // namespace
