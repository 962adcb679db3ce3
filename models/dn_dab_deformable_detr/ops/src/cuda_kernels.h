// What cuda.cu, the host's part of the operator on CUDA, knows of the kernels.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>
#include <limits>

namespace deformable {

constexpr int kMaxLevels = 16;
// Most rows, points of a row, and elements of an image. The kernels count them in int, and in steps that may end one
// step behind the last: of a block's rows, of a tile of points, of the channels of a group of lanes.
constexpr int64_t kMostCounted = std::numeric_limits<int>::max() - 1024;

struct Problem {
  int rows, queries, heads, channels, points, levels;
  int64_t image_elements;  // of value, from one image to the next
  int height[kMaxLevels], width[kMaxLevels], start[kMaxLevels];
};

// Launch on the current device and stream, for contiguous tensors with at least one element; `type` is that of the
// values. Locations begin at a multiple of the size of a pair of coordinates.
void launch_forward(
    c10::ScalarType type, const Problem& problem, const void* value, const void* locations, const void* weights,
    void* out);
// Adds to `grad_value`, writes all of `grad_locations` and `grad_weights`; these three are of the type of the weights.
void launch_backward(
    c10::ScalarType type, const Problem& problem, const void* gradient, const void* value, const void* locations,
    const void* weights, void* grad_value, void* grad_locations, void* grad_weights);

}  // namespace deformable
