// Code shared by the forward and the backward kernel.
//
// A group of 4 to 32 lanes of a warp computes a row, the output of one image, query and head. First each lane computes
// the corners and weights of different points and writes them to shared memory. Then all lanes loop over the points,
// each for its own `Vec` adjacent channels. Groups of a block compute adjacent queries of one head, because the points
// of neighbouring pixels are near each other and share corners in the L1 cache. If the queries are pixels, they are
// neighbours in both directions.
#pragma once

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda_kernels.h"

namespace deformable {

constexpr int kThreads = 256;
constexpr int kPointsPerLane = 2;

// The type of sums, locations and weights.
template <typename T>
using wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T, int Vec>
struct alignas(sizeof(T) * Vec) Pack {
  T item[Vec];
};

// The four pixels around a point, as offsets in elements from the first element of the row's image and head. Corner i
// is one pixel to the right of the first for odd i, and one below it for i >= 2. All offsets lie inside of the map.
template <typename A>
struct alignas(16) Place {
  A weight[4];  // bilinear; negative for a corner outside of the map, which must not be read
  A attention;
  int first, right, down;

  __device__ __forceinline__ bool has(int corner) const { return weight[corner] >= A(0); }
  __device__ __forceinline__ int offset(int corner) const {
    return first + (corner & 1 ? right : 0) + (corner & 2 ? down : 0);
  }
};

// Values that the lane which placed a point keeps for its gradient.
template <typename A>
struct Fractions {
  A x, y, attention;
  int width, height;
  bool valid[4];
  bool inside;
};

constexpr unsigned kAllLanes = 0xffffffffu;

constexpr int kStrip = 8;  // height of a strip of pixels

// The pixel of a number that counts the pixels of each level in strips of full width, and in a strip column by column,
// so that consecutive numbers are near each other in both directions. It is a permutation of all pixels.
__device__ __forceinline__ int pixel_in_strips(const Problem& problem, int number) {
  int level = 0;
  while (level + 1 < problem.levels && number >= problem.start[level + 1]) ++level;
  const int width = problem.width[level], start = problem.start[level];
  const int in_level = number - start;
  const int top = in_level / (width * kStrip) * kStrip;
  const int in_strip = in_level - top * width;
  const int rows = min(kStrip, problem.height[level] - top);
  const int column = in_strip / rows;
  return start + (top + in_strip - column * rows) * width + column;
}

// The row that a group computes. Groups behind the last row compute it too, and write nothing, so that all lanes of a
// warp take part in every exchange.
struct Row {
  int image, query, head;
  int64_t index;  // in out and in the gradient, whose rows are ordered by image, query and head
  bool written;

  __device__ __forceinline__ Row(const Problem& problem, int group_of_grid) {
    written = group_of_grid < problem.rows;
    const int number = min(group_of_grid, problem.rows - 1);
    query = number % problem.queries;
    if (problem.queries_are_pixels) query = pixel_in_strips(problem, query);
    head = number / problem.queries % problem.heads;
    image = number / problem.queries / problem.heads;
    index = (static_cast<int64_t>(image) * problem.queries + query) * problem.heads + head;
  }
};

// Samples at locations that are outside of the map, infinite or NaN are 0, as in PyTorch's grid_sample on CUDA. Times
// infinite or NaN attention they are NaN, so such points are not skipped.
template <typename A>
__device__ __forceinline__ Fractions<A> place(
    const Problem& problem, const A* __restrict__ locations, const A* __restrict__ weights, int64_t sample, int level,
    Place<A>& place) {
  Fractions<A> f;
  const Pack<A, 2> location = *reinterpret_cast<const Pack<A, 2>*>(locations + 2 * sample);
  f.attention = weights[sample];
  f.height = problem.height[level];
  f.width = problem.width[level];
  const A x = location.item[0] * f.width - A(0.5), y = location.item[1] * f.height - A(0.5);
  f.inside = x >= A(-1) && x < A(f.width) && y >= A(-1) && y < A(f.height);  // false for NaN
  place.attention = f.attention;
  if (!f.inside) {
    place.weight[0] = place.weight[1] = place.weight[2] = place.weight[3] = A(-1);
    place.first = place.right = place.down = 0;
    return f;
  }
  const A floor_x = floor(x), floor_y = floor(y);
  const int left = static_cast<int>(floor_x), top = static_cast<int>(floor_y);
  f.x = x - floor_x;
  f.y = y - floor_y;
  const bool west = left >= 0, east = left + 1 < f.width, north = top >= 0, south = top + 1 < f.height;
  f.valid[0] = north && west, f.valid[1] = north && east, f.valid[2] = south && west, f.valid[3] = south && east;
  place.weight[0] = f.valid[0] ? (1 - f.y) * (1 - f.x) : A(-1);
  place.weight[1] = f.valid[1] ? (1 - f.y) * f.x : A(-1);
  place.weight[2] = f.valid[2] ? f.y * (1 - f.x) : A(-1);
  place.weight[3] = f.valid[3] ? f.y * f.x : A(-1);
  const int stride = problem.heads * problem.channels;
  place.first = (problem.start[level] + max(top, 0) * f.width + max(left, 0)) * stride;
  place.right = west && east ? stride : 0;
  place.down = north && south ? f.width * stride : 0;
  return f;
}

// Returns a pointer to global memory without telling the compiler how it was computed. Otherwise the compiler repeats a
// part of that for each offset: five instructions instead of one.
template <typename T>
__device__ __forceinline__ T* computed_once(T* pointer) {
#ifdef __CUDACC__
  asm("" : "+l"(pointer));
  __builtin_assume(__isGlobal(pointer));
#endif
  return pointer;
}

// Reads the channels of one corner; zeros if it is outside of the map. They are read as words, because the compiler
// keeps numbers of 16 bits that may have been read or not in a register each.
template <int Vec, typename T, typename A>
__device__ __forceinline__ Pack<T, Vec> read_corner(const T* channels, const Place<A>& place, int corner) {
  constexpr int kBytes = sizeof(T) * Vec;
  using Word = std::conditional_t<kBytes % 4 == 0, uint32_t, uint16_t>;
  using Words = Pack<Word, kBytes / sizeof(Word)>;
  Words words = {};
  if (place.has(corner)) words = *reinterpret_cast<const Words*>(channels + place.offset(corner));
  Pack<T, Vec> pack;
  memcpy(&pack, &words, kBytes);
  return pack;
}

// Calls `Kernel::launch<T, Vec, Group>` with the fewest lanes that hold the channels, at most a warp.
template <typename Kernel, typename T, int Vec, typename... Arguments>
void launch_group(const Problem& problem, const Arguments&... arguments) {
  const int lanes = (problem.channels + Vec - 1) / Vec;
  if (lanes <= 4) {
    Kernel::template launch<T, Vec, 4>(problem, arguments...);
  } else if (lanes <= 8) {
    Kernel::template launch<T, Vec, 8>(problem, arguments...);
  } else if (lanes <= 16) {
    Kernel::template launch<T, Vec, 16>(problem, arguments...);
  } else {
    Kernel::template launch<T, Vec, 32>(problem, arguments...);
  }
}

// Calls `launch_group` with the widest vectors that channels and addresses allow, up to 4 numbers and 16 bytes. Vectors
// of 8 numbers of 16 bits would leave a head's channels to few lanes.
template <typename Kernel, typename T, typename... Arguments>
void launch_vectors(const Problem& problem, uintptr_t addresses, const Arguments&... arguments) {
  constexpr int kWidest = sizeof(T) == 8 ? 2 : 4;
  const auto fits = [&](int vec) { return problem.channels % vec == 0 && addresses % (vec * sizeof(T)) == 0; };
  if (fits(kWidest)) {
    launch_group<Kernel, T, kWidest>(problem, arguments...);
  } else if (kWidest > 2 && fits(2)) {
    launch_group<Kernel, T, 2>(problem, arguments...);
  } else {
    launch_group<Kernel, T, 1>(problem, arguments...);
  }
}

inline int blocks_of(const Problem& problem, int group, int threads = kThreads) {
  const int rows_per_block = threads / group;
  return (problem.rows + rows_per_block - 1) / rows_per_block;
}

inline uintptr_t address_of(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

// Calls `function` with the type of the values as its template argument.
template <typename Function>
void with_type(c10::ScalarType type, const Function& function) {
  switch (type) {
    case c10::ScalarType::Double: return function.template operator()<double>();
    case c10::ScalarType::Half: return function.template operator()<c10::Half>();
    case c10::ScalarType::BFloat16: return function.template operator()<c10::BFloat16>();
    default: return function.template operator()<float>();
  }
}

}  // namespace deformable
