// Positions of a request to slots of the pool, through the request's row of the block table.

namespace {

constexpr int PER = 4;

__device__ int slot_of(int position, const int* pages, int page_size, int shift, int max_pages) {
  if (position < 0) return -1;
  const int page = shift >= 0 ? position >> shift : position / page_size;
  const int held = __ldg(pages + min(page, max_pages - 1));
  return held * page_size + (position - page * page_size);
}

}  // namespace

// shift: log2 of page_size, or -1 where that is no whole number. One block column per 4 * blockDim
// positions of a row.
extern "C" __global__ void __launch_bounds__(256) to_slots(
    const int* indices, const int* table, int* out, long long index_stride, long long table_stride,
    int k, int rows_per_request, int page_size, int shift, int max_pages) {
  const long long row = blockIdx.x;
  const int* from = indices + row * index_stride;
  const int* pages = table + row / rows_per_request * table_stride;
  int* to = out + row * k;
  const int at = (blockIdx.y * blockDim.x + threadIdx.x) * PER;
  const unsigned long long bits =
      reinterpret_cast<unsigned long long>(from) | reinterpret_cast<unsigned long long>(to);
  if (at + PER <= k && bits % 16 == 0) {
    int4 v = __ldg(reinterpret_cast<const int4*>(from + at));
    v.x = slot_of(v.x, pages, page_size, shift, max_pages);
    v.y = slot_of(v.y, pages, page_size, shift, max_pages);
    v.z = slot_of(v.z, pages, page_size, shift, max_pages);
    v.w = slot_of(v.w, pages, page_size, shift, max_pages);
    *reinterpret_cast<int4*>(to + at) = v;
  } else {
    for (int i = at; i < min(k, at + PER); ++i) {
      to[i] = slot_of(from[i], pages, page_size, shift, max_pages);
    }
  }
}
