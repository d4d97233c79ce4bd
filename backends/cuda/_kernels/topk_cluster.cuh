// The lists of the blocks of a cluster in one.

#pragma once

#include "topk.cuh"

namespace {

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

// Store in another block's shared memory, and count the bytes there on a barrier.
__device__ void send(unsigned to, int value, unsigned barrier) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(to),
               "r"(value), "r"(barrier)
               : "memory");
}

__device__ void send(unsigned to, const Entry& entry, unsigned barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(to),
      "r"(__float_as_uint(entry.score)), "r"(entry.column), "r"(barrier)
      : "memory");
}

// Wait for so many bytes from other blocks. Each barrier serves once.
__device__ void receive(unsigned long long* counter, int bytes) {
  const unsigned barrier = static_cast<unsigned>(__cvta_generic_to_shared(counter));
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
  }
  asm volatile(
      "{.reg .pred p;\n"
      "again: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], 0;\n"
      "@!p bra again;}" ::"r"(barrier)
      : "memory");
}

// Set up what other blocks send to; none does before `cluster_met`.
__device__ void cluster_meet(Shared& s) {
  if (threadIdx.x == 0) {
    for (unsigned long long* counter : {&s.counted[0], &s.counted[1], &s.pushed}) {
      asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(
                       static_cast<unsigned>(__cvta_generic_to_shared(counter)))
                   : "memory");
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncwarp();
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

__device__ void cluster_met() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// Copy this block's list into the first block's, from `place` on.
__device__ void push(Shared& s, int place, int count, bool counted) {
  const unsigned there = remote(s.list, 0), barrier = remote(&s.pushed, 0);
  for (int i = threadIdx.x; i < count; i += THREADS) {
    const Entry entry = s.list[i];
    if (counted) {
      send(there + 8 * (place + i), entry, barrier);
    } else {
      asm volatile("st.shared::cluster.v2.b32 [%0], {%1, %2};" ::"r"(there + 8 * (place + i)),
                   "r"(__float_as_uint(entry.score)), "r"(entry.column)
                   : "memory");
    }
  }
}

// The lists of a cluster in the first block's, which is cut down whenever the next does not fit.
__device__ __noinline__ State take_turns(Shared& s, State state, const int* held, int k) {
  const int rank = cluster_rank(), size = cluster_size();
  for (int r = 1; r < size; ++r) {
    if (rank == 0) {
      if (state.count + held[r] > CAP) state = reduced(s, state, k);
      if (threadIdx.x == 0) s.place = state.count;
    }
    cluster_sync();
    if (rank == r) {
      int place;
      asm volatile("ld.shared::cluster.s32 %0, [%1];"
                   : "=r"(place)
                   : "r"(remote(&s.place, 0))
                   : "memory");
      push(s, place, state.count, false);
    }
    cluster_sync();
    if (rank == 0) state.count += held[r];
  }
  return state;
}

// The lists of a cluster, none longer than CAP - k, one after another in the first block's. False:
// fewer than k were taken under a floor that was only a guess, and nothing was moved.
__device__ bool gather(Shared& s, State& state, int k, bool guessed) {
  const int rank = cluster_rank(), size = cluster_size(), attempt = guessed ? 0 : 1;
  int* held = s.held[attempt];
  if (threadIdx.x < size) {
    const int to = threadIdx.x;
    send(remote(held + rank, to), state.count, remote(&s.counted[attempt], to));
  }
  receive(&s.counted[attempt], size * static_cast<int>(sizeof(int)));
  const int own = lane() < size ? held[lane()] : 0;
  const int before = __reduce_add_sync(FULL, lane() < rank ? own : 0);
  const int all = __reduce_add_sync(FULL, own);
  if (all < k && guessed) return false;
  if (all > CAP) {
    state = take_turns(s, state, held, k);
    return true;
  }
  if (rank > 0) push(s, before, state.count, true);
  if (rank == 0) receive(&s.pushed, (all - state.count) * static_cast<int>(sizeof(Entry)));
  state.count = all;
  return true;
}

}  // namespace
