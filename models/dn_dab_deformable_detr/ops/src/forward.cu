// Forward kernel: channels are read in vectors of up to 16 bytes, and corners are computed once per row and point.
#include "cuda_common.cuh"

namespace deformable {

namespace {

// Threads of a block for the queries of an encoder, at most: the larger a block's rectangle of pixels, the more corners
// its rows share.
template <typename A>
constexpr int kMostThreads = sizeof(A) == 8 ? kThreads : 512;

// Blocks on a multiprocessor, at least; 0 leaves it to the compiler. With 64 registers a thread, two large blocks take
// all 65,536; without a limit they would take up to 127, so that one block fits.
template <int Threads>
constexpr int kLeastBlocks = Threads > kThreads ? 2 : 0;

template <typename T, int Vec, int Group, int Threads>
__global__ void __launch_bounds__(Threads, kLeastBlocks<Threads>) forward_kernel(
    const __grid_constant__ Problem problem, const T* __restrict__ value, const wide<T>* __restrict__ locations,
    const wide<T>* __restrict__ weights, T* __restrict__ out) {
  using A = wide<T>;
  constexpr int kTile = Group * kPointsPerLane;
  __shared__ Place<A> shared[Threads / Group][kTile];
  const int lane = threadIdx.x % Group, group = threadIdx.x / Group;
  const Row row(problem, blockIdx.x * (Threads / Group) + group);
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

// Whether large blocks fill a multiprocessor of the current GPU as well as small ones. They do not where it holds 1,536
// threads (compute capabilities 8.6, 8.9 and 12.0): two large blocks have 1,024, and five small ones
// 1,280 with float and bfloat16.
bool suits_large_blocks() {
  int device = 0, threads = 0;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&threads, cudaDevAttrMaxThreadsPerMultiProcessor, device));
  return threads % 1024 == 0;
}

struct Forward {
  template <typename T, int Vec, int Group>
  static void launch(
      const Problem& problem, const T* value, const wide<T>* locations, const wide<T>* weights, T* out) {
    if (problem.queries_are_pixels && suits_large_blocks()) {
      launch_blocks<T, Vec, Group, kMostThreads<wide<T>>>(problem, value, locations, weights, out);
    } else {
      launch_blocks<T, Vec, Group, kThreads>(problem, value, locations, weights, out);
    }
  }

  template <typename T, int Vec, int Group, int Threads>
  static void launch_blocks(
      const Problem& problem, const T* value, const wide<T>* locations, const wide<T>* weights, T* out) {
    const int blocks = blocks_of(problem, Group, Threads);
    forward_kernel<T, Vec, Group, Threads><<<blocks, Threads, 0, c10::cuda::getCurrentCUDAStream()>>>(
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
