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

// The lists of a cluster in the first block's, which is cut down whenever the next does not fit.
__device__ __noinline__ State take_turns(Shared& s, State state, int k) {
  const int rank = cluster_rank(), size = cluster_size();
  for (int r = 1; r < size; ++r) {
    const int held = remote_int(&s.held, r);
    if (rank == 0) {
      if (state.count + held > CAP) state = reduced(s, state, k);
      if (threadIdx.x == 0) s.place = state.count;
    }
    cluster_sync();
    if (rank == r) push(s, remote_int(&s.place, 0), state.count);
    cluster_sync();
    if (rank == 0) state.count += held;
  }
  return state;
}

// The lists of a cluster, none longer than CAP - k, one after another in the first block's. False:
// fewer than k were taken under a floor that was only a guess, and nothing was moved.
__device__ bool gather(Shared& s, State& state, int k, bool guessed) {
  const int rank = cluster_rank(), size = cluster_size();
  if (threadIdx.x == 0) s.held = state.count;
  cluster_sync();
  const int held = lane() < size ? remote_int(&s.held, lane()) : 0;
  const int before = __reduce_add_sync(FULL, lane() < rank ? held : 0);
  const int all = __reduce_add_sync(FULL, held);
  if (all < k && guessed) {
    cluster_sync();  // before anyone changes `held`
    return false;
  }
  if (all > CAP) {
    state = take_turns(s, state, k);
    return true;
  }
  if (rank > 0) push(s, before, state.count);
  cluster_sync();
  state.count = all;
  return true;
}

}  // namespace
