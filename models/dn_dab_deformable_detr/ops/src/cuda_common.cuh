// What the forward and the backward kernel share.
//
// A group of 4 to 32 lanes of one warp works on one row, the output of one image, query and head. Its lanes first place
// the row's points, a different one each, and leave corners and weights in shared memory; then all go through the
// points together, each lane with its own `Vec` neighbouring channels.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <limits>
#include <type_traits>

#include "sampling.h"

namespace deformable {

constexpr int kThreads = 256;
constexpr int kMaxLevels = 16;
constexpr int kPointsPerLane = 2;

// The type that sums are taken in, and that locations and weights have.
template <typename T>
using wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

struct Problem {
  int rows, queries, heads, channels, points, levels;
  int64_t image_elements;  // of value, from one image to the next
  int height[kMaxLevels], width[kMaxLevels], start[kMaxLevels];
};

template <typename T, int Vec>
struct alignas(sizeof(T) * Vec) Pack {
  T item[Vec];
};

// The four pixels around a point, as distances from the first element of the row's image and head.
template <typename A>
struct alignas(16) Place {
  A weight[4];    // attention times bilinear weight; 0 outside of the map
  int offset[4];  // a corner outside of the map is moved onto one inside; -1 where all are outside
};

// What the lane that has placed a point keeps for its gradient.
template <typename A>
struct Fractions {
  A x, y, attention;
  int width, height;
  bool valid[4];
  bool inside;
};

template <int Group>
__device__ __forceinline__ unsigned group_mask() {
  if constexpr (Group == 32) {
    return 0xffffffffu;
  } else {
    return ((1u << Group) - 1u) << (threadIdx.x % 32 / Group * Group);
  }
}

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
  f.inside = x > A(-1) && x < A(f.width) && y > A(-1) && y < A(f.height);  // false for NaN
  if (!f.inside) {
    place.offset[0] = -1;
    return f;
  }
  const A floor_x = floor(x), floor_y = floor(y);
  const int left = static_cast<int>(floor_x), top = static_cast<int>(floor_y);
  f.x = x - floor_x;
  f.y = y - floor_y;
  const bool west = left >= 0, east = left + 1 < f.width, north = top >= 0, south = top + 1 < f.height;
  f.valid[0] = north && west, f.valid[1] = north && east, f.valid[2] = south && west, f.valid[3] = south && east;
  place.weight[0] = f.valid[0] ? f.attention * (1 - f.y) * (1 - f.x) : A(0);
  place.weight[1] = f.valid[1] ? f.attention * (1 - f.y) * f.x : A(0);
  place.weight[2] = f.valid[2] ? f.attention * f.y * (1 - f.x) : A(0);
  place.weight[3] = f.valid[3] ? f.attention * f.y * f.x : A(0);
  const int stride = problem.heads * problem.channels;
  const int first = (problem.start[level] + max(top, 0) * f.width + max(left, 0)) * stride;
  const int right = west && east ? stride : 0, down = north && south ? f.width * stride : 0;
  place.offset[0] = first, place.offset[1] = first + right;
  place.offset[2] = first + down, place.offset[3] = first + right + down;
  return f;
}

inline Problem problem_of(const Sizes& sizes) {
  constexpr int64_t kLimit = std::numeric_limits<int>::max();
  const auto levels = static_cast<int64_t>(sizes.levels.size());
  TORCH_CHECK(levels <= kMaxLevels, "sample: ", levels, " levels, expected at most ", kMaxLevels, " on CUDA");
  const int64_t rows = sizes.batch * sizes.queries * sizes.heads;
  const int64_t image_elements = sizes.pixels * sizes.heads * sizes.channels;
  TORCH_CHECK(
      rows < kLimit - kThreads && image_elements < kLimit && sizes.samples() < kLimit,
      "sample: ", rows, " rows of ", sizes.samples(), " points, ", image_elements,
      " elements an image, expected fewer than 2^31 of each on CUDA");
  Problem problem{
      static_cast<int>(rows), static_cast<int>(sizes.queries), static_cast<int>(sizes.heads),
      static_cast<int>(sizes.channels), static_cast<int>(sizes.points), static_cast<int>(levels), image_elements};
  for (int64_t level = 0; level < levels; ++level) {
    problem.height[level] = sizes.levels[level].height;
    problem.width[level] = sizes.levels[level].width;
    problem.start[level] = static_cast<int>(sizes.levels[level].start);
  }
  return problem;
}

// Calls `Kernel::launch<T, Vec, Group>` with the widest loads that channels and addresses allow, up to 16 bytes.
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

template <typename Kernel, typename T, typename... Arguments>
void launch_vectors(const Problem& problem, uintptr_t addresses, const Arguments&... arguments) {
  constexpr int kWidest = 16 / sizeof(T);
  const auto fits = [&](int vec) { return problem.channels % vec == 0 && addresses % (vec * sizeof(T)) == 0; };
  if (fits(kWidest)) {
    launch_group<Kernel, T, kWidest>(problem, arguments...);
  } else if (kWidest > 2 && fits(2)) {
    launch_group<Kernel, T, 2>(problem, arguments...);
  } else {
    launch_group<Kernel, T, 1>(problem, arguments...);
  }
}

inline int blocks_of(const Problem& problem, int group) {
  const int rows_per_block = kThreads / group;
  return (problem.rows + rows_per_block - 1) / rows_per_block;
}

inline uintptr_t address_of(const at::Tensor& tensor) { return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()); }

}  // namespace deformable
