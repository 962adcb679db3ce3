// Forward kernel: channels are read in vectors of up to 16 bytes, and corners are computed once per row and point.
#include "cuda_common.cuh"

namespace deformable {

namespace {

// Threads of a block if the queries are pixels: the larger their rectangle, the more corners they share.
template <typename A>
constexpr int kMostThreads = sizeof(A) == 8 ? 256 : 512;  // as many as the shared memory of a block allows

constexpr int kThreadsPerProcessor = 1024;  // at least; leaves 64 registers for each

template <typename T, int Vec, int Group>
__global__ void __launch_bounds__(kMostThreads<wide<T>>, kThreadsPerProcessor / kMostThreads<wide<T>>) forward_kernel(
    const __grid_constant__ Problem problem, const T* __restrict__ value, const wide<T>* __restrict__ locations,
    const wide<T>* __restrict__ weights, T* __restrict__ out) {
  using A = wide<T>;
  constexpr int kTile = Group * kPointsPerLane;
  __shared__ Place<A> shared[kMostThreads<A> / Group][kTile];
  const int lane = threadIdx.x % Group, group = threadIdx.x / Group;
  const Row row(problem, blockIdx.x * (blockDim.x / Group) + group);
  Place<A>* places = shared[group];
  const int samples = problem.levels * problem.points;
  const int64_t first_sample = row.index * samples;
  const T* base = value + row.image * problem.image_elements + row.head * problem.channels;

  for (int first = 0; first < problem.channels; first += Group * Vec) {
    const int channel = first + lane * Vec;
    const bool has_channels = channel < problem.channels;
    const T* channels = computed_once(base + channel);
    A sums[Vec] = {};
    for (int tile = 0; tile < samples; tile += kTile) {
      __syncwarp();  // all lanes have read the places of the previous tile
#pragma unroll
      for (int i = 0; i < kPointsPerLane; ++i) {
        const int k = tile + lane + i * Group;
        if (k < samples) {
          place(problem, locations, weights, first_sample + k, k / problem.points, places[k - tile]);
        }
      }
      __syncwarp();
      if (!has_channels) continue;
      const int count = min(kTile, samples - tile);
#pragma unroll 4
      for (int k = 0; k < count; ++k) {
        const Place<A> place = places[k];
        A sample[Vec] = {};
#pragma unroll
        for (int corner = 0; corner < 4; ++corner) {
          const Pack<T, Vec> pack = read_corner<Vec>(channels, place, corner);
#pragma unroll
          for (int i = 0; i < Vec; ++i) sample[i] += place.weight[corner] * static_cast<A>(pack.item[i]);
        }
#pragma unroll
        for (int i = 0; i < Vec; ++i) sums[i] += place.attention * sample[i];
      }
    }
    if (has_channels && row.written) {
      Pack<T, Vec> pack;
#pragma unroll
      for (int i = 0; i < Vec; ++i) pack.item[i] = static_cast<T>(sums[i]);
      *reinterpret_cast<Pack<T, Vec>*>(out + row.index * problem.channels + channel) = pack;
    }
  }
}

struct Forward {
  template <typename T, int Vec, int Group>
  static void launch(
      const Problem& problem, const T* value, const wide<T>* locations, const wide<T>* weights, T* out) {
    const int threads = problem.queries_are_pixels ? kMostThreads<wide<T>> : kThreads;
    const int blocks = blocks_of(problem, Group, threads);
    forward_kernel<T, Vec, Group><<<blocks, threads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        problem, value, locations, weights, out);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

}  // namespace

void launch_forward(
    c10::ScalarType type, const Problem& problem, const void* value, const void* locations, const void* weights,
    void* out) {
  with_type(type, [&]<typename T>() {
    launch_vectors<Forward, T>(
        problem, address_of(value) | address_of(out), static_cast<const T*>(value),
        static_cast<const wide<T>*>(locations), static_cast<const wide<T>*>(weights), static_cast<T*>(out));
  });
}

}  // namespace deformable
