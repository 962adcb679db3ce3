// Loops of the CPU operator. cpu.cpp inlines them into functions for several instruction sets.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "sampling.h"

#define DEFORMABLE_INLINE inline __attribute__((always_inline))

namespace deformable {

constexpr int kTile = 32;    // points whose places are computed together
constexpr int kVectors = 4;  // maximum number of vectors in a block of channels

// Sizes and tensors of one call.
template <typename T>
struct Arguments {
  Sizes sizes;
  const T* value;
  const T* locations;
  const T* weights;
  const T* gradient;  // backward only, like the next three
  T* grad_value;
  T* grad_locations;
  T* grad_weights;
  T* out;               // forward only
  int64_t head_groups;  // backward only: number of groups of heads that run in parallel
};

// A SIMD vector of `Lanes` numbers at any address.
template <typename T, int Lanes>
struct Vector {
  typedef T type __attribute__((vector_size(Lanes * sizeof(T)), aligned(alignof(T)), may_alias));
};
template <typename T>
struct Vector<T, 1> {
  typedef T type;
};

template <typename T, int Lanes>
using vector = typename Vector<T, Lanes>::type;

template <int Lanes, typename T>
DEFORMABLE_INLINE const vector<T, Lanes>& lanes_at(const T* address) {
  return *reinterpret_cast<const vector<T, Lanes>*>(address);
}

template <int Lanes, typename T>
DEFORMABLE_INLINE vector<T, Lanes>& lanes_at(T* address) {
  return *reinterpret_cast<vector<T, Lanes>*>(address);
}

// Start of each vector of `count` channels; the last vector overlaps the previous one so as not to read beyond the end.
template <typename T, int Lanes, int Vectors>
struct Layout {
  int64_t first[Vectors];
  vector<T, Lanes> lane;  // indices of the lanes
  T overlap;              // number of lanes that the last two vectors share

  DEFORMABLE_INLINE explicit Layout(int64_t count) : overlap(static_cast<T>(Vectors * Lanes - count)) {
    for (int i = 0; i < Vectors; ++i) first[i] = i * Lanes;
    first[Vectors - 1] = count - Lanes;
    if constexpr (Lanes == 1) {
      lane = 0;
    } else {
      for (int i = 0; i < Lanes; ++i) lane[i] = static_cast<T>(i);
    }
  }

  // The last vector with 0 in the lanes shared with the previous one, so that sums count them once. Multiplying by 0
  // would give NaN for infinite numbers.
  DEFORMABLE_INLINE vector<T, Lanes> once(const vector<T, Lanes>& last) const {
    return lane >= overlap ? last : vector<T, Lanes>{};
  }
};

// The four pixels around a point: the first is at (y, x), the others one step right and down, clamped to the map.
template <typename T>
struct Corners {
  int32_t x[kTile], y[kTile], right[kTile], down[kTile];
  T weight[4][kTile];  // first, right, down, right and down; negative outside of the map, which is not read
  T attention[kTile];
  int32_t counts[kTile];  // whether the point contributes
};

// floor(x); unlike std::floor, compilers can vectorise it for every instruction set.
template <typename T>
DEFORMABLE_INLINE int32_t floor_of(T x) {
  const int32_t truncated = static_cast<int32_t>(x);
  return truncated - (static_cast<T>(truncated) > x);
}

// Computes the corners of `count` points of one query and head. Samples at locations that are outside of the map,
// infinite or NaN are 0, as in PyTorch's grid_sample on CUDA; times infinite or NaN attention, they are NaN.
template <typename T>
DEFORMABLE_INLINE void place(
    const T* __restrict locations, const T* __restrict attention, const int32_t* __restrict heights,
    const int32_t* __restrict widths, int count, Corners<T>& corners) {
  for (int k = 0; k < count; ++k) {
    const T width = static_cast<T>(widths[k]), height = static_cast<T>(heights[k]);
    T x = locations[2 * k] * width - T(0.5), y = locations[2 * k + 1] * height - T(0.5);
    const bool inside = (x >= T(-1)) & (x < width) & (y >= T(-1)) & (y < height);  // false for NaN
    x = inside ? x : T(0);
    y = inside ? y : T(0);
    const int32_t left = floor_of(x), top = floor_of(y);
    const T fx = x - static_cast<T>(left), fy = y - static_cast<T>(top);
    const bool west = inside & (left >= 0), east = inside & (left + 1 < widths[k]);
    const bool north = top >= 0, south = top + 1 < heights[k];
    corners.x[k] = std::max(left, 0);
    corners.y[k] = std::max(top, 0);
    corners.right[k] = (left >= 0) & (left + 1 < widths[k]);
    corners.down[k] = (top >= 0) & (top + 1 < heights[k]);
    corners.weight[0][k] = north & west ? (1 - fy) * (1 - fx) : T(-1);
    corners.weight[1][k] = north & east ? (1 - fy) * fx : T(-1);
    corners.weight[2][k] = south & west ? fy * (1 - fx) : T(-1);
    corners.weight[3][k] = south & east ? fy * fx : T(-1);
    corners.attention[k] = attention[k];
    corners.counts[k] = inside | !(attention[k] - attention[k] == T(0));  // infinity - infinity is NaN
  }
}

// Computes output rows [begin, end) of all (image, query, head), for `count` channels starting at `channel`.
template <typename T, int Lanes, int Vectors>
DEFORMABLE_INLINE void forward_block(
    const Arguments<T>& a, int64_t begin, int64_t end, int64_t channel, int64_t count) {
  const Sizes& s = a.sizes;
  const int64_t samples = s.samples(), stride = s.heads * s.channels;
  const Layout<T, Lanes, Vectors> layout(count);
  int32_t heights[kTile], widths[kTile];
  int64_t starts[kTile];
  Corners<T> corners;
  for (int64_t tile = 0; tile < samples; tile += kTile) {
    const int points = static_cast<int>(std::min<int64_t>(kTile, samples - tile));
    for (int k = 0; k < points; ++k) {
      const Level& level = s.levels[(tile + k) / s.points];
      heights[k] = level.height, widths[k] = level.width, starts[k] = level.start;
    }
    for (int64_t row = begin; row < end; ++row) {
      const int64_t head = row % s.heads, image = row / s.heads / s.queries;
      place(
          a.locations + (row * samples + tile) * 2, a.weights + row * samples + tile, heights, widths,
          points, corners);
      const T* base = a.value + image * s.pixels * stride + head * s.channels + channel;
      T* out = a.out + row * s.channels + channel;
      vector<T, Lanes> sums[Vectors];
      for (int i = 0; i < Vectors; ++i) sums[i] = vector<T, Lanes>{};
      for (int k = 0; k < points; ++k) {
        if (!corners.counts[k]) continue;
        const int64_t pixel = starts[k] + static_cast<int64_t>(corners.y[k]) * widths[k] + corners.x[k];
        const T* p = base + pixel * stride;
        const int64_t right = corners.right[k] ? stride : 0, down = corners.down[k] ? widths[k] * stride : 0;
        const int64_t offset[4] = {0, right, down, right + down};
        vector<T, Lanes> sample[Vectors];
        for (int i = 0; i < Vectors; ++i) sample[i] = vector<T, Lanes>{};
        for (int j = 0; j < 4; ++j) {
          const T weight = corners.weight[j][k];
          if (weight < T(0)) continue;
          for (int i = 0; i < Vectors; ++i) sample[i] += weight * lanes_at<Lanes>(p + offset[j] + layout.first[i]);
        }
        for (int i = 0; i < Vectors; ++i) sums[i] += corners.attention[k] * sample[i];
      }
      // Later tiles add to the first one's output. Read all overlapping lanes before writing any.
      if (tile > 0) {
        for (int i = 0; i < Vectors; ++i) sums[i] += lanes_at<Lanes>(out + layout.first[i]);
      }
      for (int i = 0; i < Vectors; ++i) lanes_at<Lanes>(out + layout.first[i]) = sums[i];
    }
  }
}

template <typename T, int Lanes>
DEFORMABLE_INLINE T sum_of_lanes(const vector<T, Lanes>& lanes) {
  if constexpr (Lanes == 1) {
    return lanes;
  } else {
    constexpr int kHalf = Lanes / 2;
    const T* numbers = reinterpret_cast<const T*>(&lanes);
    if constexpr (kHalf == 1) {
      return numbers[0] + numbers[1];
    } else {
      const vector<T, kHalf> folded = lanes_at<kHalf>(numbers) + lanes_at<kHalf>(numbers + kHalf);
      return sum_of_lanes<T, kHalf>(folded);
    }
  }
}

// Computes the gradients of one (image, level, group of heads), for `count` channels starting at `channel`. Tasks write
// to separate memory, so nothing needs to be atomic. Heads are the inner loop, because the pixels of a single head are
// so far apart that they would use only a few sets of the cache.
template <typename T, int Lanes, int Vectors>
DEFORMABLE_INLINE void backward_block(const Arguments<T>& a, int64_t task, int64_t channel, int64_t count) {
  const Sizes& s = a.sizes;
  const int64_t num_levels = static_cast<int64_t>(s.levels.size());
  const int64_t group = task % a.head_groups, index = task / a.head_groups % num_levels;
  const int64_t image = task / a.head_groups / num_levels;
  const int64_t first_head = s.heads * group / a.head_groups, end_head = s.heads * (group + 1) / a.head_groups;
  const Level level = s.levels[index];
  const int64_t stride = s.heads * s.channels;
  const Layout<T, Lanes, Vectors> layout(count);
  const T width = static_cast<T>(level.width), height = static_cast<T>(level.height);
  const int64_t heads = end_head - first_head;
  for (int64_t step = 0; step < s.queries * heads; ++step) {
    const int64_t query = step / heads, head = first_head + step % heads;
    const int64_t row = (image * s.queries + query) * s.heads + head;
    const int64_t offset = (image * s.pixels + level.start) * stride + head * s.channels + channel;
    vector<T, Lanes> gradient[Vectors];
    const T* upstream = a.gradient + row * s.channels + channel;
    for (int i = 0; i < Vectors; ++i) gradient[i] = lanes_at<Lanes>(upstream + layout.first[i]);
    for (int64_t point = 0; point < s.points; ++point) {
      const int64_t sample = (row * num_levels + index) * s.points + point;
      const T attention = a.weights[sample];
      const T x = a.locations[2 * sample] * width - T(0.5), y = a.locations[2 * sample + 1] * height - T(0.5);
      if (!((x >= T(-1)) & (x < width) & (y >= T(-1)) & (y < height))) continue;
      const int32_t left = floor_of(x), top = floor_of(y);
      const T fx = x - static_cast<T>(left), fy = y - static_cast<T>(top);
      const bool west = left >= 0, east = left + 1 < level.width, north = top >= 0, south = top + 1 < level.height;
      const int64_t right = west & east ? stride : 0, down = north & south ? level.width * stride : 0;
      const int64_t pixel = static_cast<int64_t>(std::max(top, 0)) * level.width + std::max(left, 0);
      const int64_t corner[4] = {0, right, down, right + down};
      const bool valid[4] = {north && west, north && east, south && west, south && east};
      const T share[4] = {(1 - fy) * (1 - fx), (1 - fy) * fx, fy * (1 - fx), fy * fx};
      const T* value = a.value + offset + pixel * stride;
      T* grad_value = a.grad_value + offset + pixel * stride;
      vector<T, Lanes> at_sample[Vectors];
      for (int i = 0; i < Vectors; ++i) at_sample[i] = attention * gradient[i];
      at_sample[Vectors - 1] = layout.once(at_sample[Vectors - 1]);
      T dot[4] = {};
      for (int j = 0; j < 4; ++j) {
        if (!valid[j]) continue;
        vector<T, Lanes> products = vector<T, Lanes>{};
        for (int i = 0; i < Vectors; ++i) {
          const int64_t place_of_lane = corner[j] + layout.first[i];
          const vector<T, Lanes> product = gradient[i] * lanes_at<Lanes>(value + place_of_lane);
          products += i == Vectors - 1 ? layout.once(product) : product;
          lanes_at<Lanes>(grad_value + place_of_lane) += share[j] * at_sample[i];
        }
        dot[j] = sum_of_lanes<T, Lanes>(products);
      }
      // Derivatives of the bilinear weights. The gradients start at 0, and each block of channels adds to them.
      a.grad_weights[sample] += (1 - fy) * ((1 - fx) * dot[0] + fx * dot[1]) + fy * ((1 - fx) * dot[2] + fx * dot[3]);
      a.grad_locations[2 * sample] += attention * width * ((1 - fy) * (dot[1] - dot[0]) + fy * (dot[3] - dot[2]));
      a.grad_locations[2 * sample + 1] += attention * height * ((1 - fx) * (dot[2] - dot[0]) + fx * (dot[3] - dot[1]));
    }
  }
}

struct Forward {
  template <int Lanes, int Vectors, typename T>
  static DEFORMABLE_INLINE void run(const Arguments<T>& a, int64_t begin, int64_t end, int64_t channel, int64_t count) {
    forward_block<T, Lanes, Vectors>(a, begin, end, channel, count);
  }
};

struct Backward {
  template <int Lanes, int Vectors, typename T>
  static DEFORMABLE_INLINE void run(const Arguments<T>& a, int64_t begin, int64_t end, int64_t channel, int64_t count) {
    for (int64_t task = begin; task < end; ++task) backward_block<T, Lanes, Vectors>(a, task, channel, count);
  }
};

template <typename Kernel, int Lanes, typename T>
DEFORMABLE_INLINE void run_lanes(const Arguments<T>& a, int64_t begin, int64_t end, int64_t channel, int64_t count) {
  switch ((count + Lanes - 1) / Lanes) {
    case 1: return Kernel::template run<Lanes, 1>(a, begin, end, channel, count);
    case 2: return Kernel::template run<Lanes, 2>(a, begin, end, channel, count);
    case 3: return Kernel::template run<Lanes, 3>(a, begin, end, channel, count);
    default: return Kernel::template run<Lanes, kVectors>(a, begin, end, channel, count);
  }
}

// Runs all channels in blocks of nearly equal size that fit into `kVectors` vectors of 64 bytes.
template <typename Kernel, typename T>
DEFORMABLE_INLINE void run_blocks(const Arguments<T>& a, int64_t begin, int64_t end) {
  constexpr int kWide = 64 / sizeof(T);
  const int64_t channels = a.sizes.channels;
  const int64_t blocks = (channels + kVectors * kWide - 1) / (kVectors * kWide);
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t channel = channels * block / blocks, count = channels * (block + 1) / blocks - channel;
    if (count >= kWide) {
      run_lanes<Kernel, kWide>(a, begin, end, channel, count);
    } else if (count >= 4) {
      run_lanes<Kernel, 4>(a, begin, end, channel, count);
    } else {
      run_lanes<Kernel, 1>(a, begin, end, channel, count);
    }
  }
}

}  // namespace deformable
