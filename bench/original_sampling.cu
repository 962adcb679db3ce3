// Baseline of bench/ops.py: the algorithm of Deformable DETR's kernel. One thread computes one output channel and loads
// four neighbours for each point; in the backward pass each thread adds its share of every gradient atomically.
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <tuple>

namespace {

constexpr int kThreads = 256;

struct Shape {
  int pixels, heads, channels, queries, levels, points;
  int64_t outputs;
};

// The bilinear neighbours of one point; `inside[i]` is true if neighbour i is on the map.
struct Neighbours {
  bool inside[4];
  int64_t index[4];
  float share[4], fx, fy;
};

__device__ Neighbours neighbours_of(
    const Shape& s, int64_t image, int head, int channel, int64_t start, int height, int width, float x, float y) {
  Neighbours n;
  const int left = static_cast<int>(floorf(x)), top = static_cast<int>(floorf(y));
  n.fx = x - left, n.fy = y - top;
  for (int i = 0; i < 4; ++i) {
    const int column = left + i % 2, line = top + i / 2;
    n.inside[i] = column >= 0 && column < width && line >= 0 && line < height;
    n.index[i] = ((image * s.pixels + start + line * width + column) * s.heads + head) * s.channels + channel;
    n.share[i] = (i % 2 ? n.fx : 1 - n.fx) * (i / 2 ? n.fy : 1 - n.fy);
  }
  return n;
}

__global__ void forward_kernel(
    Shape s, const float* value, const int64_t* sizes, const float* locations, const float* weights, float* out) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= s.outputs) return;
  const int channel = index % s.channels, head = index / s.channels % s.heads;
  const int64_t row = index / s.channels, image = row / s.heads / s.queries;
  float sum = 0;
  int64_t start = 0;
  for (int level = 0; level < s.levels; ++level) {
    const int height = sizes[2 * level], width = sizes[2 * level + 1];
    for (int point = 0; point < s.points; ++point) {
      const int64_t sample = (row * s.levels + level) * s.points + point;
      const float x = locations[2 * sample] * width - 0.5f, y = locations[2 * sample + 1] * height - 0.5f;
      if (x <= -1 || y <= -1 || x >= width || y >= height) continue;
      const Neighbours n = neighbours_of(s, image, head, channel, start, height, width, x, y);
      float bilinear = 0;
      for (int i = 0; i < 4; ++i) bilinear += n.inside[i] ? n.share[i] * value[n.index[i]] : 0;
      sum += weights[sample] * bilinear;
    }
    start += static_cast<int64_t>(height) * width;
  }
  out[index] = sum;
}

__global__ void backward_kernel(
    Shape s, const float* gradient, const float* value, const int64_t* sizes, const float* locations,
    const float* weights, float* grad_value, float* grad_locations, float* grad_weights) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= s.outputs) return;
  const int channel = index % s.channels, head = index / s.channels % s.heads;
  const int64_t row = index / s.channels, image = row / s.heads / s.queries;
  const float upstream = gradient[index];
  int64_t start = 0;
  for (int level = 0; level < s.levels; ++level) {
    const int height = sizes[2 * level], width = sizes[2 * level + 1];
    for (int point = 0; point < s.points; ++point) {
      const int64_t sample = (row * s.levels + level) * s.points + point;
      const float x = locations[2 * sample] * width - 0.5f, y = locations[2 * sample + 1] * height - 0.5f;
      if (x <= -1 || y <= -1 || x >= width || y >= height) continue;
      const Neighbours n = neighbours_of(s, image, head, channel, start, height, width, x, y);
      float v[4];
      for (int i = 0; i < 4; ++i) {
        v[i] = n.inside[i] ? value[n.index[i]] : 0;
        if (n.inside[i]) atomicAdd(grad_value + n.index[i], upstream * weights[sample] * n.share[i]);
      }
      const float bilinear = n.share[0] * v[0] + n.share[1] * v[1] + n.share[2] * v[2] + n.share[3] * v[3];
      const float scale = upstream * weights[sample];
      atomicAdd(grad_weights + sample, upstream * bilinear);
      atomicAdd(
          grad_locations + 2 * sample, scale * width * ((1 - n.fy) * (v[1] - v[0]) + n.fy * (v[3] - v[2])));
      atomicAdd(
          grad_locations + 2 * sample + 1, scale * height * ((1 - n.fx) * (v[2] - v[0]) + n.fx * (v[3] - v[1])));
    }
    start += static_cast<int64_t>(height) * width;
  }
}

Shape shape_of(const at::Tensor& value, const at::Tensor& locations) {
  return {
      static_cast<int>(value.size(1)), static_cast<int>(value.size(2)), static_cast<int>(value.size(3)),
      static_cast<int>(locations.size(1)), static_cast<int>(locations.size(3)), static_cast<int>(locations.size(4)),
      value.size(0) * locations.size(1) * value.size(2) * value.size(3)};
}

int blocks_of(const Shape& shape) { return static_cast<int>((shape.outputs + kThreads - 1) / kThreads); }

// All tensors are contiguous and on one CUDA device; `sizes` is int64 of height and width, all others float32.
at::Tensor original_sample(
    const at::Tensor& value, const at::Tensor& sizes, const at::Tensor& locations, const at::Tensor& weights) {
  const Shape shape = shape_of(value, locations);
  auto out = at::zeros({value.size(0), locations.size(1), value.size(2), value.size(3)}, value.options());
  forward_kernel<<<blocks_of(shape), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
      shape, value.const_data_ptr<float>(), sizes.const_data_ptr<int64_t>(), locations.const_data_ptr<float>(),
      weights.const_data_ptr<float>(), out.mutable_data_ptr<float>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> original_backward(
    const at::Tensor& gradient, const at::Tensor& value, const at::Tensor& sizes, const at::Tensor& locations,
    const at::Tensor& weights) {
  const Shape shape = shape_of(value, locations);
  auto grad_value = at::zeros(value.sizes(), value.options());
  auto grad_locations = at::zeros(locations.sizes(), locations.options());
  auto grad_weights = at::zeros(weights.sizes(), weights.options());
  backward_kernel<<<blocks_of(shape), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
      shape, gradient.const_data_ptr<float>(), value.const_data_ptr<float>(), sizes.const_data_ptr<int64_t>(),
      locations.const_data_ptr<float>(), weights.const_data_ptr<float>(), grad_value.mutable_data_ptr<float>(),
      grad_locations.mutable_data_ptr<float>(), grad_weights.mutable_data_ptr<float>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {grad_value, grad_locations, grad_weights};
}

}  // namespace

TORCH_LIBRARY(dn_detr_bench, library) {
  library.def("original_sample(Tensor value, Tensor sizes, Tensor locations, Tensor weights) -> Tensor");
  library.def(
      "original_backward(Tensor gradient, Tensor value, Tensor sizes, Tensor locations, Tensor weights) "
      "-> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(dn_detr_bench, CUDA, library) {
  library.impl("original_sample", &original_sample);
  library.impl("original_backward", &original_backward);
}
