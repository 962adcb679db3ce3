// Sampling of multi-scale deformable attention (Deformable DETR, arXiv 2010.04159, equation 3, inner sums).
//
//   out[b, q, h, :] = sum over levels l and points p of
//       weights[b, q, h, l, p] * bilinear(value of image b, level l, head h; locations[b, q, h, l, p, :])
//
// A location (x, y) in [0, 1] is at (x * width - 0.5, y * height - 0.5) on the grid of pixel centres; values outside of
// the map are 0.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>
#include <c10/util/ArrayRef.h>

#include <concepts>
#include <cstdint>
#include <string>
#include <vector>

namespace at {
class Tensor;  // not included, because nvcc would parse the header once for each compute capability
}

namespace deformable {

// Maximum height or width of a level; float32 cannot distinguish more pixels.
constexpr int64_t kLargestSide = int64_t(1) << 24;

// Messages are made without streams, which write no numbers or crash where the compiler links another libstdc++ into
// this library than PyTorch uses.
inline std::string text(const std::string& words) { return words; }
inline std::string text(std::integral auto number) { return std::to_string(number); }
inline std::string text(c10::ScalarType type) { return c10::toString(type); }
inline std::string text(c10::Device device) { return device.str(); }
inline std::string text(c10::IntArrayRef numbers) {
  std::string list;
  for (const int64_t number : numbers) list += (list.empty() ? "" : ", ") + std::to_string(number);
  return "[" + list + "]";
}

template <typename... Parts>
std::string message(const Parts&... parts) {
  return (text(parts) + ...);
}

struct Level {
  int32_t height;
  int32_t width;
  int64_t start;  // number of pixels of the previous levels
};

struct Sizes {
  int64_t batch, pixels, heads, channels, queries, points;
  std::vector<Level> levels;

  int64_t samples() const { return static_cast<int64_t>(levels.size()) * points; }
};

// Returns the sizes of the arguments; throws c10::Error if they are inconsistent.
Sizes checked_sizes(
    const at::Tensor& value, c10::IntArrayRef level_sizes, const at::Tensor& locations, const at::Tensor& weights);

// Throws c10::Error unless the gradient has the shape, type and device of the operator's result.
void check_gradient(const at::Tensor& gradient, const at::Tensor& value, const Sizes& sizes);

// Raises an error or a warning under torch.use_deterministic_algorithms, for kernels with atomic additions.
void alert_not_deterministic();

}  // namespace deformable
