// The operator's schema, and the argument checks of all kernels.
#include <Python.h>

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "sampling.h"

namespace deformable {

namespace {

void check_shape(const char* name, const at::Tensor& tensor, at::IntArrayRef expected) {
  TORCH_CHECK(
      tensor.sizes() == expected,
      message("sample: ", name, " has the shape ", tensor.sizes(), ", expected ", expected));
}

std::vector<Level> checked_levels(at::IntArrayRef level_sizes, int64_t pixels) {
  TORCH_CHECK(
      !level_sizes.empty() && level_sizes.size() % 2 == 0,
      message("sample: level_sizes has ", level_sizes.size(), " entries, expected height and width of each level"));
  std::vector<Level> levels;
  levels.reserve(level_sizes.size() / 2);
  int64_t start = 0;
  for (size_t i = 0; i < level_sizes.size(); i += 2) {
    const int64_t height = level_sizes[i], width = level_sizes[i + 1];
    TORCH_CHECK(
        1 <= height && height <= kLargestSide && 1 <= width && width <= kLargestSide,
        message("sample: level ", i / 2, " is ", height, " x ", width, ", expected sides from 1 to ", kLargestSide));
    levels.push_back({static_cast<int32_t>(height), static_cast<int32_t>(width), start});
    start += height * width;
    TORCH_CHECK(start <= pixels, message("sample: the levels have more pixels than value, which has ", pixels));
  }
  TORCH_CHECK(start == pixels, message("sample: the levels have ", start, " pixels, and value has ", pixels));
  return levels;
}

}  // namespace

Sizes checked_sizes(
    const at::Tensor& value, at::IntArrayRef level_sizes, const at::Tensor& locations, const at::Tensor& weights) {
  TORCH_CHECK(
      value.dim() == 4, message("sample: value has ", value.dim(), " axes, expected 4 (B x S x heads x channels)"));
  TORCH_CHECK(
      locations.dim() == 6,
      message("sample: locations has ", locations.dim(), " axes, expected 6 (B x Q x heads x levels x points x 2)"));
  const auto type = value.scalar_type();
  TORCH_CHECK(
      type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16,
      message("sample: value is ", type, ", expected a floating type of 16, 32 or 64 bits"));
  const auto wide = type == at::kDouble ? at::kDouble : at::kFloat;
  for (const auto& [name, tensor] : {std::pair("locations", locations), std::pair("weights", weights)}) {
    TORCH_CHECK(
        tensor.scalar_type() == wide,
        message("sample: ", name, " is ", tensor.scalar_type(), ", expected ", wide, " for ", type, " values"));
    TORCH_CHECK(
        tensor.device() == value.device(),
        message("sample: ", name, " is on ", tensor.device(), ", and value on ", value.device()));
  }
  const Sizes sizes{
      value.size(0), value.size(1), value.size(2), value.size(3), locations.size(1), locations.size(4),
      checked_levels(level_sizes, value.size(1))};
  const auto num_levels = static_cast<int64_t>(sizes.levels.size());
  check_shape("locations", locations, {sizes.batch, sizes.queries, sizes.heads, num_levels, sizes.points, 2});
  check_shape("weights", weights, {sizes.batch, sizes.queries, sizes.heads, num_levels, sizes.points});
  return sizes;
}

void check_gradient(const at::Tensor& gradient, const at::Tensor& value, const Sizes& sizes) {
  check_shape("the gradient", gradient, {sizes.batch, sizes.queries, sizes.heads, sizes.channels});
  TORCH_CHECK(
      gradient.scalar_type() == value.scalar_type() && gradient.device() == value.device(),
      message(
          "sample: the gradient is ", gradient.scalar_type(), " on ", gradient.device(), ", and value ",
          value.scalar_type(), " on ", value.device()));
}

void alert_not_deterministic() { at::globalContext().alertNotDeterministic("dn_detr_sample_backward_cuda"); }

}  // namespace deformable

TORCH_LIBRARY(dn_detr, library) {
  library.def("sample(Tensor value, SymInt[] level_sizes, Tensor locations, Tensor weights) -> Tensor");
  library.def(
      "sample_backward(Tensor gradient, Tensor value, SymInt[] level_sizes, Tensor locations, Tensor weights) "
      "-> (Tensor, Tensor, Tensor)");
}

// An empty Python module: importing it loads this library, which registers the operator.
PyMODINIT_FUNC PyInit_deformable_sampling() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "deformable_sampling", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
