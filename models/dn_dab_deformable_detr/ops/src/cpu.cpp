// CPU operator: parallel over images, heads and queries (backward: levels), vectorised over channels.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "cpu_kernels.h"

namespace deformable {

namespace {

// The same loops for each instruction set; `target` enables it for that function only.
#define DEFORMABLE_VARIANT(name, attribute)                                              \
  template <typename Kernel, typename T>                                                 \
  attribute void name(const Arguments<T>& arguments, int64_t begin, int64_t end) {       \
    run_blocks<Kernel>(arguments, begin, end);                                           \
  }

DEFORMABLE_VARIANT(run_anywhere, )
#if defined(__x86_64__)
DEFORMABLE_VARIANT(run_avx2, __attribute__((target("avx2,fma"))))
DEFORMABLE_VARIANT(run_avx512, __attribute__((target("avx512f,avx512vl,avx512dq,avx2,fma"))))
#endif

template <typename Kernel, typename T>
auto fastest() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return &run_avx512<Kernel, T>;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &run_avx2<Kernel, T>;
#endif
  return &run_anywhere<Kernel, T>;
}

template <typename Kernel, typename T>
void run_parallel(const Arguments<T>& arguments, int64_t tasks, int64_t grain) {
  const auto run = fastest<Kernel, T>();
  at::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) { run(arguments, begin, end); });
}

template <typename T>
void forward(
    const Sizes& sizes, const at::Tensor& value, const at::Tensor& locations, const at::Tensor& weights,
    at::Tensor& out) {
  Arguments<T> arguments{sizes};
  arguments.value = value.const_data_ptr<T>();
  arguments.locations = locations.const_data_ptr<T>();
  arguments.weights = weights.const_data_ptr<T>();
  arguments.out = out.mutable_data_ptr<T>();
  run_parallel<Forward>(arguments, sizes.batch * sizes.heads * sizes.queries, 64);
}

template <typename T>
void backward(
    const Sizes& sizes, const at::Tensor& gradient, const at::Tensor& value, const at::Tensor& locations,
    const at::Tensor& weights, at::Tensor& grad_value, at::Tensor& grad_locations, at::Tensor& grad_weights) {
  Arguments<T> arguments{sizes};
  arguments.gradient = gradient.const_data_ptr<T>();
  arguments.value = value.const_data_ptr<T>();
  arguments.locations = locations.const_data_ptr<T>();
  arguments.weights = weights.const_data_ptr<T>();
  arguments.grad_value = grad_value.mutable_data_ptr<T>();
  arguments.grad_locations = grad_locations.mutable_data_ptr<T>();
  arguments.grad_weights = grad_weights.mutable_data_ptr<T>();
  // Just enough tasks to keep the threads busy, since heads in one task share cache lines.
  const int64_t tasks = sizes.batch * static_cast<int64_t>(sizes.levels.size());
  arguments.head_groups = std::clamp<int64_t>((4 * at::get_num_threads() + tasks - 1) / tasks, 1, sizes.heads);
  run_parallel<Backward>(arguments, tasks * arguments.head_groups, 1);
}

at::Tensor sample(
    const at::Tensor& value, at::IntArrayRef level_sizes, const at::Tensor& locations, const at::Tensor& weights) {
  const Sizes sizes = checked_sizes(value, level_sizes, locations, weights);
  // 16-bit values are summed in float.
  const auto type = locations.scalar_type();
  const std::vector<int64_t> shape{sizes.batch, sizes.queries, sizes.heads, sizes.channels};
  if (sizes.samples() == 0 || c10::multiply_integers(shape) == 0) return at::zeros(shape, value.options());
  auto out = at::empty(shape, value.options().dtype(type));  // `forward` writes every element
  const auto run = type == at::kDouble ? &forward<double> : &forward<float>;
  run(sizes, value.to(type).contiguous(), locations.contiguous(), weights.contiguous(), out);
  return out.to(value.scalar_type());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> sample_backward(
    const at::Tensor& gradient, const at::Tensor& value, at::IntArrayRef level_sizes, const at::Tensor& locations,
    const at::Tensor& weights) {
  const Sizes sizes = checked_sizes(value, level_sizes, locations, weights);
  check_gradient(gradient, value, sizes);
  const auto type = locations.scalar_type();
  auto grad_value = at::zeros(value.sizes(), value.options().dtype(type));
  auto grad_locations = at::zeros(locations.sizes(), locations.options());
  auto grad_weights = at::zeros(weights.sizes(), weights.options());
  if (gradient.numel() > 0 && sizes.samples() > 0) {
    const auto run = type == at::kDouble ? &backward<double> : &backward<float>;
    run(sizes, gradient.to(type).contiguous(), value.to(type).contiguous(), locations.contiguous(),
        weights.contiguous(), grad_value, grad_locations, grad_weights);
  }
  return {grad_value.to(value.scalar_type()), grad_locations, grad_weights};
}

}  // namespace

TORCH_LIBRARY_IMPL(dn_detr, CPU, library) {
  library.impl("sample", &sample);
  library.impl("sample_backward", &sample_backward);
}

}  // namespace deformable
