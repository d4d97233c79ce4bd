// A block's list of (score, column) in shared memory, in order of columns: the cut at its k-th score,
// and what is kept of it. Built with THREADS of a block, PER scores of a thread in a tile, CAP entries
// of a list, and BYTES of shared memory.

#pragma once

#include "overlap.cuh"

#define FULL 0xffffffffu
#define WARPS (THREADS / 32)
#define TILE (THREADS * PER)  // scores that are offered to the list in one step
#define OWN (CAP / THREADS)   // entries of the list that a thread may hold while it is cut
#define SAMPLED 8             // scores of a thread in a sample
#define PREFETCHED 65536      // bytes of a row
#define BINS 1024
#define FEW 32  // scores in a bin that one warp ranks directly
#define LOWEST (-3.402823466e38f)

namespace {

struct Entry {
  float score;
  int column;
};

struct Shared {
  unsigned bins[BINS];
  alignas(8 * WARPS) unsigned sums[2][WARPS];
  unsigned lows[WARPS], highs[WARPS];
  unsigned few[FEW];
  unsigned found_bin, found_above, found_inside, fews;
  int held, place;
  alignas(16) Entry list[CAP];
};
static_assert(OWN % 4 == 0 && CAP % THREADS == 0, "threads hold equal shares of a full list");
static_assert(sizeof(Shared) <= BYTES, "topk.py counts the bytes of shared memory");

// What every thread of a block knows of the list: scores below `floor` do not enter. While `ties` is
// positive, that many scores equal to the floor may still be wanted.
struct State {
  float floor;
  int count, ties;
  unsigned sums;  // address in shared memory of the sums that `exchange` writes next
};

// Selects all keys above `key`, and the first `room` of those equal to it.
struct Cut {
  unsigned key;
  int room;
};

struct Sums {
  int before, all;
};

__device__ int lane() { return threadIdx.x & 31; }
__device__ int warp() { return threadIdx.x >> 5; }

// Whole numbers in the order of scores, above 0. Adding 0 makes -0 and +0 one.
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

// Sums of one number per warp: over the warps before this one, and over all. One barrier is enough,
// since two memories take turns.
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
  constexpr int EACH = BINS / THREADS;
  const int lowest = BINS - (static_cast<int>(threadIdx.x) + 1) * EACH;
  unsigned own[EACH], total = 0;
#pragma unroll
  for (int i = 0; i < EACH; ++i) own[i] = s.bins[lowest + i], total += own[i];
  const unsigned sum = scan(total);
  const unsigned all = __shfl_sync(FULL, sum, 31);
  int before = above + exchange(state, all).before + static_cast<int>(sum - total);
  if (before < k && k <= before + static_cast<int>(total)) {
#pragma unroll
    for (int i = EACH - 1; i >= 0; --i) {
      const int inside = static_cast<int>(own[i]);
      if (before < k && k <= before + inside) {
        s.found_bin = lowest + i, s.found_above = before, s.found_inside = inside;
      }
      before += inside;
    }
  }
  __syncthreads();
}

// Where to cut keys, N a thread, 0 where there is none, so that the k best remain. There are k at
// least; from the `used`-th of each thread on there are none. A positive `slack` is how many more may
// remain; the cut is then rougher, and has room for ties only where more than that are equal.
template <int N>
__device__ Cut cut_at(
    Shared& s, State& state, const unsigned (&key)[N], int used, int k, int slack) {
  unsigned low = 0xffffffffu, high = 0;
#pragma unroll
  for (int u = 0; u < N; ++u) {
    if (u < used) low = min(low, key[u] - 1), high = max(high, key[u]);
  }
  low = __reduce_min_sync(FULL, low), high = __reduce_max_sync(FULL, high);
  if (lane() == 0) s.lows[warp()] = low, s.highs[warp()] = high;
  for (int i = threadIdx.x; i < BINS; i += THREADS) s.bins[i] = 0;
  if (threadIdx.x == 0) s.fews = 0;
  __syncthreads();
  low = __reduce_min_sync(FULL, s.lows[lane() % WARPS]) + 1;
  high = __reduce_max_sync(FULL, s.highs[lane() % WARPS]);
  int above = 0, inside, need;
  while (true) {
    const int shift = max(0, 32 - __clz(high - low) - 10);
#pragma unroll
    for (int u = 0; u < N; ++u) {
      if (u < used && key[u] - low <= high - low) atomicAdd(&s.bins[(key[u] - low) >> shift], 1u);
    }
    __syncthreads();
    find_bin(s, state, k, above);
    low += s.found_bin << shift;
    high = min(high, low + ((1u << shift) - 1));
    above = s.found_above;
    inside = s.found_inside, need = k - above;
    if (inside - need <= slack) return {low - 1, 0};
    if (shift == 0) return {low, need};
    if (slack == 0 && inside <= FEW) break;
    for (int i = threadIdx.x; i < BINS; i += THREADS) s.bins[i] = 0;
    __syncthreads();
  }
#pragma unroll
  for (int u = 0; u < N; ++u) {
    if (u < used && key[u] - low <= high - low) s.few[atomicAdd(&s.fews, 1u)] = key[u];
  }
  __syncthreads();
  const unsigned own = lane() < inside ? s.few[lane()] : 0;
  int greater = 0, equal = 0;
  for (int i = 0; i < inside; ++i) {
    const unsigned other = __shfl_sync(FULL, own, i);
    greater += other > own, equal += other == own;
  }
  const bool last = greater < need && need <= greater + equal;
  const int source = __ffs(__ballot_sync(FULL, last)) - 1;
  const unsigned found = __shfl_sync(FULL, own, source);
  const int room = __shfl_sync(FULL, need - greater, source);
  return room == __shfl_sync(FULL, equal, source) ? Cut{found - 1, 0} : Cut{found, room};
}

// Cut the list down to its k best and put their columns into `out` if LAST, else the entries to the
// list's front.
template <bool LAST>
__device__ void keep_best(Shared& s, State& state, int k, int* out) {
  // Warps have equal stretches of the list. Entries are read four at a time, so that reads overlap.
  const int used = (state.count + THREADS * 4 - 1) / (THREADS * 4) * 4;
  const int first = warp() * (32 * used) + lane();
  unsigned key[OWN];
  int column[OWN];
#pragma unroll
  for (int u = 0; u < OWN; u += 4) {
    if (u < used) {
#pragma unroll
      for (int i = u; i < u + 4; ++i) {
        const Entry entry = s.list[first + i * 32];
        key[i] = first + i * 32 < state.count ? key_of(entry.score) : 0;
        if constexpr (!LAST) column[i] = entry.column;
      }
    }
  }
  const Cut cut = state.count > k ? cut_at(s, state, key, used, k, 0) : Cut{0, 0};
  unsigned counts = 0;
#pragma unroll
  for (int u = 0; u < OWN; ++u) {
    if (u < used) counts += (key[u] > cut.key) + (cut.room && key[u] == cut.key ? 1 << 16 : 0);
  }
  const Sums sums = exchange(state, __reduce_add_sync(FULL, counts));
  const unsigned lower = (1u << lane()) - 1;
  int above = sums.before & 0xffff, equal = sums.before >> 16;
#pragma unroll
  for (int u = 0; u < OWN; u += 4) {
    if (u < used) {
      if constexpr (LAST) {
#pragma unroll
        for (int i = u; i < u + 4; ++i) column[i] = s.list[first + i * 32].column;
      }
#pragma unroll
      for (int i = u; i < u + 4; ++i) {
        const unsigned ups = __ballot_sync(FULL, key[i] > cut.key);
        bool kept = key[i] > cut.key;
        int place = above + __popc(ups & lower);
        above += __popc(ups);
        if (cut.room) {
          const unsigned evens = __ballot_sync(FULL, key[i] == cut.key);
          const int even = equal + __popc(evens & lower);
          kept |= key[i] == cut.key && even < cut.room;
          place += min(even, cut.room);
          equal += __popc(evens);
        }
        if constexpr (LAST) {
          if (kept) out[place] = column[i];
        } else {
          if (kept) s.list[place] = {value_of(key[i]), column[i]};
        }
      }
    }
  }
  state.count = (sums.all & 0xffff) + min(sums.all >> 16, cut.room);
  state.floor = value_of(cut.key + 1), state.ties = 0;  // from here only higher scores are of use
  __syncthreads();
}

__device__ __noinline__ State reduced(Shared& s, State state, int k) {
  keep_best<false>(s, state, k, nullptr);
  return state;
}

}  // namespace
