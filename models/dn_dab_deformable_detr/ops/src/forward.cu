// The operator on CUDA, forward: every channel is read in vectors of up to 16 bytes, every point placed once a row.
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "cuda_common.cuh"

namespace deformable {

namespace {

template <typename T, int Vec, int Group>
__global__ void __launch_bounds__(kThreads) forward_kernel(
    const __grid_constant__ Problem problem, const T* __restrict__ value, const wide<T>* __restrict__ locations,
    const wide<T>* __restrict__ weights, T* __restrict__ out) {
  using A = wide<T>;
  constexpr int kTile = Group * kPointsPerLane;
  __shared__ Place<A> shared[kThreads / Group][kTile];
  const int lane = threadIdx.x % Group, group = threadIdx.x / Group;
  const int row = blockIdx.x * (kThreads / Group) + group;
  if (row >= problem.rows) return;  // whole groups: the others wait for lanes of their own group alone
  const unsigned mask = group_mask<Group>();
  Place<A>* places = shared[group];
  const int head = row % problem.heads, image = row / problem.heads / problem.queries;
  const int samples = problem.levels * problem.points;
  const T* base = value + image * problem.image_elements + head * problem.channels;

  for (int first = 0; first < problem.channels; first += Group * Vec) {
    const int channel = first + lane * Vec;
    const bool has_channels = channel < problem.channels;
    A sums[Vec] = {};
    for (int tile = 0; tile < samples; tile += kTile) {
      __syncwarp(mask);  // the places of the tile before have been read
#pragma unroll
      for (int i = 0; i < kPointsPerLane; ++i) {
        const int k = tile + lane + i * Group;
        if (k < samples) {
          place(
              problem, locations, weights, static_cast<int64_t>(row) * samples + k, k / problem.points,
              places[k - tile]);
        }
      }
      __syncwarp(mask);
      if (!has_channels) continue;
      const int count = min(kTile, samples - tile);
#pragma unroll 4
      for (int k = 0; k < count; ++k) {
        const Place<A> place = places[k];
        if (place.offset[0] < 0) continue;
#pragma unroll
        for (int corner = 0; corner < 4; ++corner) {
          const auto pack = *reinterpret_cast<const Pack<T, Vec>*>(base + place.offset[corner] + channel);
#pragma unroll
          for (int i = 0; i < Vec; ++i) sums[i] += place.weight[corner] * static_cast<A>(pack.item[i]);
        }
      }
    }
    if (has_channels) {
      Pack<T, Vec> pack;
#pragma unroll
      for (int i = 0; i < Vec; ++i) pack.item[i] = static_cast<T>(sums[i]);
      *reinterpret_cast<Pack<T, Vec>*>(out + static_cast<int64_t>(row) * problem.channels + channel) = pack;
    }
  }
}

struct Forward {
  template <typename T, int Vec, int Group>
  static void launch(
      const Problem& problem, const at::Tensor& value, const at::Tensor& locations, const at::Tensor& weights,
      const at::Tensor& out) {
    forward_kernel<T, Vec, Group><<<blocks_of(problem, Group), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        problem, value.const_data_ptr<T>(), locations.const_data_ptr<wide<T>>(), weights.const_data_ptr<wide<T>>(),
        out.mutable_data_ptr<T>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

at::Tensor sample(
    const at::Tensor& given_value, at::IntArrayRef level_sizes, const at::Tensor& given_locations,
    const at::Tensor& given_weights) {
  const Sizes sizes = checked_sizes(given_value, level_sizes, given_locations, given_weights);
  const c10::cuda::CUDAGuard guard(given_value.device());
  auto out = at::zeros({sizes.batch, sizes.queries, sizes.heads, sizes.channels}, given_value.options());
  if (out.numel() == 0 || sizes.samples() == 0) return out;
  const Problem problem = problem_of(sizes);
  const auto value = given_value.contiguous(), weights = given_weights.contiguous();
  // A view into the middle of a tensor need not begin where a pair of coordinates may be read at once.
  auto locations = given_locations.contiguous();
  if (address_of(locations) % (2 * locations.element_size()) != 0) locations = locations.clone();
  const uintptr_t addresses = address_of(value) | address_of(out);
  switch (value.scalar_type()) {
    case at::kDouble: launch_vectors<Forward, double>(problem, addresses, value, locations, weights, out); break;
    case at::kHalf: launch_vectors<Forward, c10::Half>(problem, addresses, value, locations, weights, out); break;
    case at::kBFloat16:
      launch_vectors<Forward, c10::BFloat16>(problem, addresses, value, locations, weights, out);
      break;
    default: launch_vectors<Forward, float>(problem, addresses, value, locations, weights, out);
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(dn_detr, CUDA, library) { library.impl("sample", &sample); }

}  // namespace deformable
