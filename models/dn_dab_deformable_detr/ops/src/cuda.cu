// Host code of the CUDA operator: checks arguments, allocates memory and launches the kernels.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <tuple>

#include "cuda_kernels.h"
#include "sampling.h"

namespace deformable {

namespace {

Problem problem_of(const Sizes& sizes) {
  const auto levels = static_cast<int64_t>(sizes.levels.size());
  TORCH_CHECK(levels <= kMaxLevels, message("sample: ", levels, " levels, expected at most ", kMaxLevels, " on CUDA"));
  const int64_t rows = sizes.batch * sizes.queries * sizes.heads;
  const int64_t image_elements = sizes.pixels * sizes.heads * sizes.channels;
  TORCH_CHECK(
      rows <= kMostCounted && image_elements <= kMostCounted && sizes.samples() <= kMostCounted,
      message(
          "sample: ", rows, " rows of ", sizes.samples(), " points, ", image_elements,
          " elements an image, expected at most ", kMostCounted, " of each on CUDA"));
  Problem problem{
      static_cast<int>(rows), static_cast<int>(sizes.queries), static_cast<int>(sizes.heads),
      static_cast<int>(sizes.channels), static_cast<int>(sizes.points), static_cast<int>(levels), image_elements,
      sizes.queries == sizes.pixels};
  for (int64_t level = 0; level < levels; ++level) {
    problem.height[level] = sizes.levels[level].height;
    problem.width[level] = sizes.levels[level].width;
    problem.start[level] = static_cast<int>(sizes.levels[level].start);
  }
  return problem;
}

// Returns locations aligned so that a pair of coordinates can be read at once; views into a tensor may be unaligned.
at::Tensor with_aligned_pairs(const at::Tensor& given) {
  const auto locations = given.contiguous();
  const auto address = reinterpret_cast<uintptr_t>(locations.const_data_ptr());
  return address % (2 * locations.element_size()) == 0 ? locations : locations.clone();
}

at::Tensor sample(
    const at::Tensor& given_value, at::IntArrayRef level_sizes, const at::Tensor& given_locations,
    const at::Tensor& given_weights) {
  const Sizes sizes = checked_sizes(given_value, level_sizes, given_locations, given_weights);
  const c10::cuda::CUDAGuard guard(given_value.device());
  const std::vector<int64_t> shape{sizes.batch, sizes.queries, sizes.heads, sizes.channels};
  if (sizes.samples() == 0 || c10::multiply_integers(shape) == 0) return at::zeros(shape, given_value.options());
  const Problem problem = problem_of(sizes);
  auto out = at::empty(shape, given_value.options());  // the kernel writes every element
  const auto value = given_value.contiguous(), weights = given_weights.contiguous();
  const auto locations = with_aligned_pairs(given_locations);
  launch_forward(
      value.scalar_type(), problem, value.const_data_ptr(), locations.const_data_ptr(), weights.const_data_ptr(),
      out.mutable_data_ptr());
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> sample_backward(
    const at::Tensor& given_gradient, const at::Tensor& given_value, at::IntArrayRef level_sizes,
    const at::Tensor& given_locations, const at::Tensor& given_weights) {
  const Sizes sizes = checked_sizes(given_value, level_sizes, given_locations, given_weights);
  check_gradient(given_gradient, given_value, sizes);
  alert_not_deterministic();
  const c10::cuda::CUDAGuard guard(given_value.device());
  // Gradients of 16-bit values are summed in float, which does not lose thousands of small terms.
  auto grad_value = at::zeros(given_value.sizes(), given_value.options().dtype(given_locations.scalar_type()));
  // The kernel writes every element of these two, but it does not run if the result has no elements.
  const bool runs = given_gradient.numel() > 0 && sizes.samples() > 0;
  const auto make = [&](const at::Tensor& like) {
    return runs ? at::empty(like.sizes(), like.options()) : at::zeros(like.sizes(), like.options());
  };
  auto grad_locations = make(given_locations), grad_weights = make(given_weights);
  if (runs) {
    const Problem problem = problem_of(sizes);
    const auto gradient = given_gradient.contiguous(), value = given_value.contiguous();
    const auto weights = given_weights.contiguous(), locations = with_aligned_pairs(given_locations);
    launch_backward(
        value.scalar_type(), problem, gradient.const_data_ptr(), value.const_data_ptr(), locations.const_data_ptr(),
        weights.const_data_ptr(), grad_value.mutable_data_ptr(), grad_locations.mutable_data_ptr(),
        grad_weights.mutable_data_ptr());
  }
  return {grad_value.to(given_value.scalar_type()), grad_locations, grad_weights};
}

}  // namespace

TORCH_LIBRARY_IMPL(dn_detr, CUDA, library) {
  library.impl("sample", &sample);
  library.impl("sample_backward", &sample_backward);
}

}  // namespace deformable
