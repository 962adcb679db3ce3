// Autograd of the operator for all devices. Registered in C++, where recording a call takes the CPU less time than in
// Python.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "sampling.h"

namespace deformable {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using Sample = at::Tensor(const at::Tensor&, c10::SymIntArrayRef, const at::Tensor&, const at::Tensor&);
using SampleBackward =
    Gradients(const at::Tensor&, const at::Tensor&, c10::SymIntArrayRef, const at::Tensor&, const at::Tensor&);

// Returns the operator of a name; a call of it goes through the dispatcher, as compilers that trace it expect.
template <typename Signature>
auto found(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

at::Tensor sample_below(
    const at::Tensor& value, c10::SymIntArrayRef level_sizes, const at::Tensor& locations, const at::Tensor& weights) {
  static const auto operation = found<Sample>("dn_detr::sample");
  const at::AutoDispatchBelowADInplaceOrView guard;
  return operation.call(value, level_sizes, locations, weights);
}

Gradients sample_backward_below(
    const at::Tensor& gradient, const at::Tensor& value, c10::SymIntArrayRef level_sizes, const at::Tensor& locations,
    const at::Tensor& weights) {
  static const auto operation = found<SampleBackward>("dn_detr::sample_backward");
  const at::AutoDispatchBelowADInplaceOrView guard;
  return operation.call(gradient, value, level_sizes, locations, weights);
}

Gradients sample_backward(
    const at::Tensor& gradient, const at::Tensor& value, c10::SymIntArrayRef level_sizes, const at::Tensor& locations,
    const at::Tensor& weights);

struct SampleFunction : torch::autograd::Function<SampleFunction> {
  static at::Tensor forward(
      AutogradContext* context, const at::Tensor& value, c10::SymIntArrayRef level_sizes, const at::Tensor& locations,
      const at::Tensor& weights) {
    context->save_for_backward({value, locations, weights});
    context->saved_data["level_sizes"] = level_sizes;
    return sample_below(value, level_sizes, locations, weights);
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const variable_list saved = context->get_saved_variables();
    const auto level_sizes = context->saved_data["level_sizes"].toSymIntVector();
    auto [value, locations, weights] = sample_backward(gradients[0], saved[0], level_sizes, saved[1], saved[2]);
    return {std::move(value), at::Tensor(), std::move(locations), std::move(weights)};
  }
};

// The backward as a function that has no derivative.
struct SampleBackwardFunction : torch::autograd::Function<SampleBackwardFunction> {
  static variable_list forward(
      AutogradContext*, const at::Tensor& gradient, const at::Tensor& value, c10::SymIntArrayRef level_sizes,
      const at::Tensor& locations, const at::Tensor& weights) {
    auto [grad_value, grad_locations, grad_weights] =
        sample_backward_below(gradient, value, level_sizes, locations, weights);
    return {std::move(grad_value), std::move(grad_locations), std::move(grad_weights)};
  }

  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(false, "sample: the derivative of the backward is not implemented");
  }
};

// Whether autograd records a call with these tensors. Refuses those with tangents, which would be lost.
template <typename... Tensors>
bool records(const Tensors&... tensors) {
  TORCH_CHECK(!(tensors._fw_grad(0).defined() || ...), "sample: forward-mode derivatives are not implemented");
  return at::GradMode::is_enabled() && (tensors.requires_grad() || ...);
}

at::Tensor sample(
    const at::Tensor& value, c10::SymIntArrayRef level_sizes, const at::Tensor& locations, const at::Tensor& weights) {
  if (!records(value, locations, weights)) return sample_below(value, level_sizes, locations, weights);
  return SampleFunction::apply(value, level_sizes, locations, weights);
}

Gradients sample_backward(
    const at::Tensor& gradient, const at::Tensor& value, c10::SymIntArrayRef level_sizes, const at::Tensor& locations,
    const at::Tensor& weights) {
  if (!records(gradient, value, locations, weights)) {
    return sample_backward_below(gradient, value, level_sizes, locations, weights);
  }
  auto results = SampleBackwardFunction::apply(gradient, value, level_sizes, locations, weights);
  return {std::move(results[0]), std::move(results[1]), std::move(results[2])};
}

}  // namespace

TORCH_LIBRARY_IMPL(dn_detr, Autograd, library) {
  library.impl("sample", &sample);
  library.impl("sample_backward", &sample_backward);
}

}  // namespace deformable
