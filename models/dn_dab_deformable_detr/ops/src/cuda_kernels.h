// Interface of the CUDA kernels to cuda.cu.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>
#include <limits>

namespace deformable {

constexpr int kMaxLevels = 16;
// Maximum number of rows, points of a row, and elements of an image. The kernels count them in int, and a loop may
// overshoot by one step: the rows of a block, a tile of points, or the channels of a group of lanes.
constexpr int64_t kMostCounted = std::numeric_limits<int>::max() - 1024;

struct Problem {
  int rows, queries, heads, channels, points, levels;
  int64_t image_elements;  // elements of value per image
  bool queries_are_pixels;  // as many queries as pixels: those of an encoder, in the order of the pixels
  int height[kMaxLevels], width[kMaxLevels], start[kMaxLevels];
};

// Launch on the current device and stream. Tensors are contiguous and not empty; `type` is the type of value. Locations
// are aligned to the size of a pair of coordinates.
void launch_forward(
    c10::ScalarType type, const Problem& problem, const void* value, const void* locations, const void* weights,
    void* out);
// Adds to `grad_value` and overwrites `grad_locations` and `grad_weights`; the three have the type of the weights.
void launch_backward(
    c10::ScalarType type, const Problem& problem, const void* gradient, const void* value, const void* locations,
    const void* weights, void* grad_value, void* grad_locations, void* grad_weights);

}  // namespace deformable
