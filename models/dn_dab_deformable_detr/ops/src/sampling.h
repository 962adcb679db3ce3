// Sampling of multi-scale deformable attention (Deformable DETR, arXiv 2010.04159, equation 3, inner sums).
//
//   out[b, q, h, :] = sum over levels l and points p of
//       weights[b, q, h, l, p] * bilinear(value of image b, level l, head h; locations[b, q, h, l, p, :])
//
// A location (x, y) in [0, 1] lies at (x * width - 0.5, y * height - 0.5) on the grid of pixel centres; what is outside
// of the map is 0.
#pragma once

#include <c10/util/ArrayRef.h>

#include <cstdint>
#include <vector>

namespace at {
class Tensor;  // declared, not included: nvcc would read its headers once for each compute capability
}

namespace deformable {

// A level may be this many pixels high or wide: float32 tells no more of them apart.
constexpr int64_t kLargestSide = int64_t(1) << 24;

struct Level {
  int32_t height;
  int32_t width;
  int64_t start;  // pixels of the levels in front of it
};

struct Sizes {
  int64_t batch, pixels, heads, channels, queries, points;
  std::vector<Level> levels;

  int64_t samples() const { return static_cast<int64_t>(levels.size()) * points; }
};

// Sizes of arguments that fit together; a c10::Error otherwise.
Sizes checked_sizes(
    const at::Tensor& value, c10::IntArrayRef level_sizes, const at::Tensor& locations, const at::Tensor& weights);

// The gradient has the shape, type and device of the operator's result; a c10::Error otherwise.
void check_gradient(const at::Tensor& gradient, const at::Tensor& value, const Sizes& sizes);

// For a kernel whose atomic additions come in any order: an error or a warning under torch.use_deterministic_algorithms.
void alert_not_deterministic();

}  // namespace deformable
