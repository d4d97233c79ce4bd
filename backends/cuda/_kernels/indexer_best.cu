// The k best keys of each row of queries, from what scoring in two parts has kept (indexer_parts.cuh).
//
// `guess` comes between the parts: from a row's sample it guesses a floor that somewhat more than k of
// all its scores should reach, and keeps those of the sample that do. `best` comes after: it cuts what
// reached the floor at the k-th score, which is exact if k did. Where fewer did, or more than a list
// holds, it marks the row's block of queries, which is then scored and selected from anew.
//
// Macros: those of topk.cuh, OWNED scores of a thread in a sample, LIST entries of a list, TAKEN of the
// sample's list.

#include "topk.cuh"
#include "indexer_guess.cuh"

namespace {

constexpr int SURE = WIDTH * (LIST - 1);  // a range of so many keys fits into the lists as a whole
constexpr int SAMPLES = TAKEN / THREADS, BOTH = SAMPLES + LIST * WIDTH / THREADS;
static_assert(LIST * WIDTH % THREADS == 0 && TAKEN % THREADS == 0 && THREADS % WIDTH == 0,
              "threads have equal shares of the lists");
static_assert(BOTH <= 32, "a bit for each entry of a thread");

struct Bounds {
  int start, end;
};

__device__ Bounds bounds(const int* starts, const int* ends, int row, int context) {
  return {max(0, starts[row]), min(context, ends[row])};
}

// Bits of a set of columns, in the memory of the list that is not used here. A thread has `each` words.
struct Set {
  unsigned* words;
  int count, each;
};

// How many columns come before this thread's, and how many there are.
__device__ Sums places(State& state, const Set& set) {
  unsigned own = 0;
  for (int i = 0; i < set.each; ++i) {
    const int at = threadIdx.x * set.each + i;
    if (at < set.count) own += __popc(set.words[at]);
  }
  const unsigned upto = scan(own);
  const Sums sums = exchange(state, __shfl_sync(FULL, upto, 31));
  return {sums.before + static_cast<int>(upto - own), sums.all};
}

// Of the columns with a key, find the `room` lowest.
template <int N>
__device__ void lowest(State& state, const Set& set, const unsigned (&key)[N], const int (&column)[N],
                       unsigned wanted, int room) {
  for (int i = threadIdx.x; i < set.count; i += THREADS) set.words[i] = 0;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (key[i] == wanted) atomicOr(&set.words[column[i] >> 5], 1u << (column[i] & 31));
  __syncthreads();
  int left = room - places(state, set).before;
  for (int i = 0; i < set.each; ++i) {
    const int at = threadIdx.x * set.each + i;
    if (at >= set.count) break;
    unsigned word = set.words[at];
    const int inside = __popc(word);
    for (int surplus = inside - max(0, left); surplus > 0; --surplus) word ^= 0x80000000u >> __clz(word);
    set.words[at] = word;
    left -= inside;
  }
  __syncthreads();
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    guess(const float* sample, const int* starts, const int* ends, Guess* guesses, Entry* taken,
          int* counts, int* lost, long long stride, int context, int k) {
  extern __shared__ __align__(128) unsigned char memory[];
  Shared& s = *reinterpret_cast<Shared*>(memory);
  State state{LOWEST, 0, 0, address_of(s.sums)};
  const int row = blockIdx.x;
  let_next_kernel_begin();
  wait_for_kernel_ahead();
  for (int i = threadIdx.x; i < 2 * WIDTH; i += THREADS)
    counts[static_cast<long long>(row) * 2 * WIDTH + i] = 0;
  if (threadIdx.x == 0) lost[row] = 0;
  const Bounds range = bounds(starts, ends, row, context);
  const int tiles = (context + WIDTH - 1) / WIDTH;
  const int drawn = (tiles + EVERY - 1 - DRAWN) / EVERY * WIDTH;
  unsigned key[OWNED], inside = 0;
#pragma unroll
  for (int i = 0; i < OWNED; i += 4) {
    const int at = (i * THREADS) + threadIdx.x * 4;
    float4 x = {0.0f, 0.0f, 0.0f, 0.0f};
    if (at < drawn) x = *reinterpret_cast<const float4*>(sample + row * stride + at);
    const float value[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int column = (at / WIDTH * EVERY + DRAWN) * WIDTH + at % WIDTH + e;
      const bool in = at < drawn && column >= range.start && column < range.end;
      key[i + e] = in && value[e] >= LOWEST ? key_of(value[e]) : 0;
      inside += in ? 1 : 0;
      inside += key[i + e] ? 1 << 16 : 0;
    }
  }
  const unsigned sums = exchange(state, __reduce_add_sync(FULL, inside)).all;
  const int total = range.end - range.start;
  unsigned least = key_of(LOWEST);
  if (total > SURE) {
    const float expected = static_cast<float>(k) * (sums & 0xffff) / total;
    const int rank = static_cast<int>(expected + 4 * sqrtf(expected) + 8);
    if ((sums >> 16) >= rank) {
      const Cut cut = cut_at(s, state, key, OWNED, rank, max(1, rank / 16));
      least = cut.room ? cut.key : cut.key + 1;
    }
  }
  unsigned own = 0;
#pragma unroll
  for (int i = 0; i < OWNED; ++i) own += key[i] >= least;
  const unsigned upto = scan(own);
  const Sums found = exchange(state, __shfl_sync(FULL, upto, 31));
  int place = found.before + static_cast<int>(upto - own);
#pragma unroll
  for (int i = 0; i < OWNED; ++i) {
    const int at = i / 4 * 4 * THREADS + threadIdx.x * 4;
    if (key[i] >= least) {
      if (place < TAKEN)
        taken[static_cast<long long>(row) * TAKEN + place] = {
            value_of(key[i]), (at / WIDTH * EVERY + DRAWN) * WIDTH + at % WIDTH + i % 4};
      ++place;
    }
  }
  if (threadIdx.x == 0) guesses[row] = {value_of(least), found.all};
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    best(const Entry* lists, const Guess* guesses, const Entry* taken, const int* counts,
         const int* lost, int* marks, int* chosen, int* out, int first, int group, int context,
         int k) {
  extern __shared__ __align__(128) unsigned char memory[];
  Shared& s = *reinterpret_cast<Shared*>(memory);
  State state{LOWEST, 0, 0, address_of(s.sums)};
  const long long row = blockIdx.x;
  const int list = threadIdx.x % WIDTH;
  let_next_kernel_begin();
  wait_for_kernel_ahead();

  const Guess guessed = guesses[row];
  const int front = counts[row * 2 * WIDTH + list], back = counts[(row * 2 + 1) * WIDTH + list];
  bool lacks = front + back > LIST || guessed.sampled > TAKEN || lost[row];
  unsigned key[BOTH], own = 0;
  int column[BOTH];
#pragma unroll
  for (int i = 0; i < BOTH; ++i) {
    const int at = (i - SAMPLES) * THREADS + threadIdx.x, entry = at / WIDTH;
    const int slot = entry < front ? entry : LIST - 1 - (entry - front);
    const bool there = i < SAMPLES ? i * THREADS + threadIdx.x < guessed.sampled : entry < front + back;
    const Entry* from = i < SAMPLES ? taken + row * TAKEN + i * THREADS + threadIdx.x
                                    : lists + (row * LIST + slot) * WIDTH + list;
    Entry found = {0.0f, 0};
    if (there && !lacks) found = *from;
    key[i] = there ? key_of(found.score) : 0;
    column[i] = found.column;
    own += there;
  }
  const int longest = __reduce_max_sync(FULL, front + back);
  const int used = SAMPLES + (longest + THREADS / WIDTH - 1) / (THREADS / WIDTH);
  const unsigned sums =
      exchange(state, __reduce_add_sync(FULL, own + (lacks ? 1 << 16 : 0))).all;
  const int all = sums & 0xffff;
  lacks = sums >> 16 || (all < k && guessed.floor > LOWEST);
  if (lacks) {
    const int block = (first + blockIdx.x) / group;
    if (threadIdx.x == 0 && !atomicExch(&marks[block], 1)) chosen[1 + atomicAdd(chosen, 1)] = block;
    return;
  }
  const Cut cut = all > k ? cut_at(s, state, key, used, k, 0) : Cut{0, 0};
  const int words = (context + 31) / 32;
  const Set ties{reinterpret_cast<unsigned*>(s.list), words, (words + THREADS - 1) / THREADS};
  if (cut.room) lowest(state, ties, key, column, cut.key, cut.room);
  unsigned kept = 0;
#pragma unroll
  for (int i = 0; i < BOTH; ++i) {
    bool takes = key[i] > cut.key;
    if (cut.room && key[i] == cut.key) takes = ties.words[column[i] >> 5] >> (column[i] & 31) & 1;
    kept |= static_cast<unsigned>(takes) << i;
  }
  const Sums sum = exchange(state, __reduce_add_sync(FULL, __popc(kept)));
  int* result = out + (first + row) * k;
  int place = sum.before;
  const unsigned lower = (1u << lane()) - 1;
#pragma unroll
  for (int i = 0; i < BOTH; ++i) {
    const bool takes = kept >> i & 1;
    const unsigned others = __ballot_sync(FULL, takes);
    if (takes) result[place + __popc(others & lower)] = column[i];
    place += __popc(others);
  }
  for (int i = sum.all + threadIdx.x; i < k; i += THREADS) result[i] = -1;
}
