// Backward kernel: gradients of locations and weights are summed within a group of lanes and written once.
// Only the gradient of value needs atomic additions, in vectors where the GPU supports them.
#include "cuda_common.cuh"

namespace deformable {

namespace {

// Numbers per atomic addition; GPUs of compute capability 9.0 or newer can add 2 or 4 floats at once.
template <typename A, int Vec>
constexpr int kAddedAtOnce =
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    std::is_same_v<A, float> ? (Vec % 4 == 0 ? 4 : Vec) : 1;
#else
    1;
#endif

// `Numbers` is a template parameter because atomicAdd for vectors needs compute capability 9.0: for older ones, a call
// with float4 would not compile even in a branch that is never taken.
template <typename Numbers, typename A>
__device__ __forceinline__ void add_at_once(A* address, const Numbers& numbers) {
  atomicAdd(reinterpret_cast<Numbers*>(address), numbers);
}

// address[0 .. Vec) += numbers; each addition is atomic.
template <int Vec, typename A>
__device__ __forceinline__ void add_atomically(A* address, const A (&numbers)[Vec]) {
  constexpr int kAtOnce = kAddedAtOnce<A, Vec>;
#pragma unroll
  for (int i = 0; i < Vec; i += kAtOnce) {
    if constexpr (kAtOnce == 4) {
      add_at_once(address + i, make_float4(numbers[i], numbers[i + 1], numbers[i + 2], numbers[i + 3]));
    } else if constexpr (kAtOnce == 2) {
      add_at_once(address + i, make_float2(numbers[i], numbers[i + 1]));
    } else {
      add_at_once(address + i, numbers[i]);
    }
  }
}

// Sums four numbers over the lanes of a group; lane i gets the sum of number i % 4. Lanes exchange two numbers with the
// lane two away and one with their neighbour, so three exchanges do the first two steps of all four sums.
template <int Group, typename A>
__device__ __forceinline__ A sum_of_four(const A (&numbers)[4], int lane) {
  static_assert(Group >= 4);
  const bool upper = lane & 2, odd = lane & 1;
  A even_one = upper ? numbers[2] : numbers[0], odd_one = upper ? numbers[3] : numbers[1];
  even_one += __shfl_xor_sync(kAllLanes, upper ? numbers[0] : numbers[2], 2);
  odd_one += __shfl_xor_sync(kAllLanes, upper ? numbers[1] : numbers[3], 2);
  A sum = odd ? odd_one : even_one;
  sum += __shfl_xor_sync(kAllLanes, odd ? even_one : odd_one, 1);
#pragma unroll
  for (int distance = 4; distance < Group; distance *= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
  return sum;
}

template <typename T, int Vec, int Group>
__global__ void __launch_bounds__(kThreads) backward_kernel(
    const __grid_constant__ Problem problem, const T* __restrict__ gradient, const T* __restrict__ value,
    const wide<T>* __restrict__ locations, const wide<T>* __restrict__ weights, wide<T>* __restrict__ grad_value,
    wide<T>* __restrict__ grad_locations, wide<T>* __restrict__ grad_weights) {
  using A = wide<T>;
  constexpr int kTile = Group * kPointsPerLane;
  __shared__ Place<A> shared_places[kThreads / Group][kTile];
  __shared__ Pack<A, 4> shared_dots[kThreads / Group][kTile];  // gradient times values, at the four corners
  const int lane = threadIdx.x % Group, group = threadIdx.x / Group;
  const Row row(problem, blockIdx.x * (kThreads / Group) + group);
  Place<A>* places = shared_places[group];
  Pack<A, 4>* dots = shared_dots[group];
  const int samples = problem.levels * problem.points;
  const int64_t base = row.image * problem.image_elements + row.head * problem.channels;
  const int64_t first_sample = row.index * samples;

  for (int first = 0; first < problem.channels; first += Group * Vec) {
    const int channel = first + lane * Vec;
    const bool has_channels = row.written && channel < problem.channels;
    const T* channels = computed_once(value + base + channel);
    A* grad_channels = computed_once(grad_value + base + channel);
    A upstream[Vec] = {};
    if (has_channels) {
      const auto pack = *reinterpret_cast<const Pack<T, Vec>*>(
          gradient + row.index * problem.channels + channel);
#pragma unroll
      for (int i = 0; i < Vec; ++i) upstream[i] = static_cast<A>(pack.item[i]);
    }
    for (int tile = 0; tile < samples; tile += kTile) {
      Fractions<A> mine[kPointsPerLane];
      __syncwarp();  // all lanes have read the places and sums of the previous tile
#pragma unroll
      for (int i = 0; i < kPointsPerLane; ++i) {
        const int k = tile + lane + i * Group;
        if (k < samples) {
          mine[i] = place(problem, locations, weights, first_sample + k, k / problem.points, places[k - tile]);
        }
      }
      __syncwarp();
      const int count = min(kTile, samples - tile);
#pragma unroll 2
      for (int k = 0; k < count; ++k) {
        const Place<A> place = places[k];
        A dot[4] = {};
        if (has_channels) {
          Pack<T, Vec> corners[4];
          A at_sample[Vec];
#pragma unroll
          for (int corner = 0; corner < 4; ++corner) {
            corners[corner] = read_corner<Vec>(channels, place, corner);
          }
#pragma unroll
          for (int i = 0; i < Vec; ++i) at_sample[i] = place.attention * upstream[i];
#pragma unroll
          for (int corner = 0; corner < 4; ++corner) {
            A shares[Vec];
#pragma unroll
            for (int i = 0; i < Vec; ++i) {
              dot[corner] += upstream[i] * static_cast<A>(corners[corner].item[i]);
              shares[i] = place.weight[corner] * at_sample[i];
            }
            if (place.has(corner)) add_atomically<Vec>(grad_channels + place.offset(corner), shares);
          }
        }
        const A sum = sum_of_four<Group>(dot, lane);
        if (lane < 4) dots[k].item[lane] = sum;
      }
      __syncwarp();
#pragma unroll
      for (int i = 0; i < kPointsPerLane; ++i) {
        const int k = tile + lane + i * Group;
        if (k >= samples || !row.written) continue;
        Pack<A, 2> at_location = {};
        A at_weight = 0;
        if (mine[i].inside) {
          const Fractions<A>& f = mine[i];
          A dot[4];
#pragma unroll
          for (int corner = 0; corner < 4; ++corner) dot[corner] = f.valid[corner] ? dots[k - tile].item[corner] : A(0);
          at_weight = (1 - f.y) * ((1 - f.x) * dot[0] + f.x * dot[1]) + f.y * ((1 - f.x) * dot[2] + f.x * dot[3]);
          at_location.item[0] = f.attention * f.width * ((1 - f.y) * (dot[1] - dot[0]) + f.y * (dot[3] - dot[2]));
          at_location.item[1] = f.attention * f.height * ((1 - f.x) * (dot[2] - dot[0]) + f.x * (dot[3] - dot[1]));
        }
        auto* to_location = reinterpret_cast<Pack<A, 2>*>(grad_locations + 2 * (first_sample + k));
        if (first > 0) {  // add to the sums that this lane wrote for the previous channels
          at_weight += grad_weights[first_sample + k];
          at_location.item[0] += to_location->item[0];
          at_location.item[1] += to_location->item[1];
        }
        grad_weights[first_sample + k] = at_weight;
        *to_location = at_location;
      }
    }
  }
}

struct Backward {
  template <typename T, int Vec, int Group>
  static void launch(
      const Problem& problem, const T* gradient, const T* value, const wide<T>* locations, const wide<T>* weights,
      wide<T>* grad_value, wide<T>* grad_locations, wide<T>* grad_weights) {
    backward_kernel<T, Vec, Group><<<blocks_of(problem, Group), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        problem, gradient, value, locations, weights, grad_value, grad_locations, grad_weights);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

}  // namespace

void launch_backward(
    c10::ScalarType type, const Problem& problem, const void* gradient, const void* value, const void* locations,
    const void* weights, void* grad_value, void* grad_locations, void* grad_weights) {
  with_type(type, [&]<typename T>() {
    using A = wide<T>;
    launch_vectors<Backward, T>(
        problem, address_of(gradient) | address_of(value), static_cast<const T*>(gradient),
        static_cast<const T*>(value), static_cast<const A*>(locations), static_cast<const A*>(weights),
        static_cast<A*>(grad_value), static_cast<A*>(grad_locations), static_cast<A*>(grad_weights));
  });
}

}  // namespace deformable
