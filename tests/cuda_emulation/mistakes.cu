// Kernels with one mistake each, which the emulation must find, and one without.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <functional>
#include <map>
#include <string>

namespace {

// out[i] = 63 - i, read from what a thread of the other warp wrote.
template <bool Waits>
__global__ void reversed(float* out) {
  __shared__ float numbers[64];
  numbers[threadIdx.x] = threadIdx.x;
  if (Waits) __syncthreads();
  out[threadIdx.x] = numbers[63 - threadIdx.x];
}

// out[i] = the sum of 0 to 31 in lanes 0 to 31, and the number of odd lanes in the other warp.
__global__ void exchanged(float* out) {
  float sum = threadIdx.x;
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
  const unsigned votes = __ballot_sync(~0u, threadIdx.x % 2);
  out[threadIdx.x] = threadIdx.x < 32 ? __shfl_sync(~0u, sum, 5) : __builtin_popcount(votes);
}

__global__ void behind_an_array(float* out) {
  __shared__ float numbers[64];
  numbers[threadIdx.x + 1] = 1;
  __syncthreads();
  out[threadIdx.x] = numbers[threadIdx.x];
}

__global__ void two_barriers(float*) {
  if (threadIdx.x < 40) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void absent_lane(float* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(0xffffu, 1.0f, 20);
}

__global__ void mask_without_itself(float*) { __syncwarp(0xffffu); }

__global__ void unaligned_vector(float* out) {
  atomicAdd(reinterpret_cast<float2*>(out + 1), make_float2(1, 1));
}

__global__ void much_shared_memory(float* out) {
  __shared__ float numbers[2][6145];
  out[threadIdx.x] = numbers[1][threadIdx.x];
}

void launch(const std::string& name, float* out) {
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const std::map<std::string, std::function<void()>> launches{
      {"right", [&] { reversed<true><<<1, 64, 0, stream>>>(out); }},
      {"exchanged", [&] { exchanged<<<1, 64, 0, stream>>>(out); }},
      {"no barrier", [&] { reversed<false><<<1, 64, 0, stream>>>(out); }},
      {"behind an array", [&] { behind_an_array<<<1, 64, 0, stream>>>(out); }},
      {"two barriers", [&] { two_barriers<<<1, 64, 0, stream>>>(out); }},
      {"absent lane", [&] { absent_lane<<<1, 32, 0, stream>>>(out); }},
      {"mask without itself", [&] { mask_without_itself<<<1, 32, 0, stream>>>(out); }},
      {"unaligned vector", [&] { unaligned_vector<<<1, 1, 0, stream>>>(out); }},
      {"much shared memory", [&] { much_shared_memory<<<1, 64, 0, stream>>>(out); }},
      {"many threads", [&] { reversed<true><<<1, 1025, 0, stream>>>(out); }},
      {"no threads", [&] { reversed<true><<<0, 64, 0, stream>>>(out); }},
      {"dynamic shared memory", [&] { reversed<true><<<1, 64, 64, stream>>>(out); }},
      {"another stream", [&] { reversed<true><<<1, 64>>>(out); }},
  };
  launches.at(name)();
}

}  // namespace

// Launches a kernel on out, 64 numbers; returns the error or an empty text.
extern "C" const char* run(const char* name, float* out) {
  static std::string error;
  error.clear();
  try {
    if (std::string(name) == "no guard") {
      launch("right", out);
    }
    const c10::cuda::CUDAGuard guard(0);
    if (std::string(name) == "no check") {
      launch("right", out);
      launch("right", out);
    }
    launch(name, out);
  } catch (const std::exception& problem) {
    error = problem.what();
  }
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return error.c_str();
}
