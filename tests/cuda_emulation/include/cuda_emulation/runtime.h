// What CUDA adds to C++, as far as the kernels of this project use it. build.py rewrites the syntax that is not C++.
#pragma once

#include <math.h>

#include <bit>
#include <cstdint>
#include <cstdlib>
#include <type_traits>

#include "block.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

using std::max;
using std::min;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  uint64_t count() const { return uint64_t(x) * y * z; }
  uint3 index(uint64_t number) const {
    return {unsigned(number % x), unsigned(number / x % y), unsigned(number / x / y)};
  }
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline dim3 gridDim, blockDim;
inline constexpr unsigned warpSize = cuda_emulation::kWarp;
using cudaStream_t = const void*;

// The GPU has as many threads on a multiprocessor as those of the emulated compute capability.
enum cudaError_t { cudaSuccess };
enum cudaDeviceAttr { cudaDevAttrMaxThreadsPerMultiProcessor };
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int /*device*/) {
  *value = EMULATED_CUDA_ARCH < 800 ? 1024 : EMULATED_CUDA_ARCH % 100 > 0 || EMULATED_CUDA_ARCH >= 1200 ? 1536 : 2048;
  return cudaSuccess;
}

namespace cuda_emulation {

using Where = std::source_location;

inline const char stream_of_pytorch = 0;  // its address is the current stream; a launch without a stream has another
inline int guards = 0;                    // device guards in scope
inline bool unchecked = false;            // a launch without a check for errors behind it

inline void expect(bool condition, const char* message) {
  if (!condition) throw std::runtime_error(std::string("CUDA emulation: ") + message);
}

// The order of blocks and threads is drawn from the environment variable CUDA_EMULATION_SEED.
inline void launch(
    dim3 grid, dim3 block, size_t dynamic_shared, cudaStream_t stream, const std::function<void()>& run) {
  const bool fits = grid.x <= 0x7fffffff && grid.y <= 65535 && grid.z <= 65535 && block.z <= 64;
  expect(grid.count() > 0 && block.count() > 0 && block.count() <= 1024 && fits, "a launch outside of CUDA's limits");
  expect(dynamic_shared == 0, "dynamic shared memory is not emulated");
  expect(stream == &stream_of_pytorch, "a launch on another stream than PyTorch's");
  expect(guards > 0, "a launch without a device guard");
  expect(!unchecked, "the launch before has no check for errors");
  gridDim = grid, blockDim = block;
  const char* seed = std::getenv("CUDA_EMULATION_SEED");
  std::mt19937 random(seed == nullptr ? 0 : std::atoi(seed));
  std::vector<Thread> threads(block.count());
  for (unsigned i = 0; i < threads.size(); ++i) threads[i].number = i, threads[i].index = block.index(i);
  std::vector<uint64_t> blocks(grid.count());
  for (uint64_t i = 0; i < blocks.size(); ++i) blocks[i] = i;
  std::shuffle(blocks.begin(), blocks.end(), random);
  for (const uint64_t number : blocks) {
    blockIdx = grid.index(number);
    Block(threads, random, run).run();
  }
  unchecked = true;
}

// `kernel<<<grid, block, bytes, stream>>>` becomes a call of this; its result takes the kernel's arguments.
template <typename... Parameters>
auto configured(
    void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t dynamic_shared = 0, cudaStream_t stream = nullptr) {
  return [=](const std::type_identity_t<Parameters>&... arguments) {
    launch(grid, block, dynamic_shared, stream, [&] { kernel(arguments...); });
  };
}

// `__shared__ T name[N];` becomes `auto& name = shared<T[N]>();`.
template <typename Array>
Array& shared(Where where = Where::current()) {
  return *reinterpret_cast<Array*>(running->shared(Place(where), sizeof(Array)));
}

template <typename T>
std::shared_ptr<const Meeting> exchange(unsigned mask, const T& value, Where where) {
  static_assert(sizeof(T) <= kLargestValue && std::is_trivially_copyable_v<T>);
  Place place(where);
  place.warp = running->warp();
  place.mask = mask;
  return running->meet(place, &value, sizeof(T));
}

template <typename T>
T value_of(const Meeting& meeting, unsigned lane) {
  if (!(meeting.lanes >> lane & 1)) running->fail("a shuffle reads lane " + std::to_string(lane) + ", which is absent");
  T value;
  std::memcpy(&value, meeting.values[lane], sizeof(T));
  return value;
}

template <typename Numbers>
void add_aligned(Numbers* address) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(Numbers) != 0) running->fail("an atomicAdd that is not aligned");
}

}  // namespace cuda_emulation

inline void __syncthreads(cuda_emulation::Where where = cuda_emulation::Where::current()) {
  cuda_emulation::running->meet(cuda_emulation::Place(where));
}

inline void __syncwarp(unsigned mask = ~0u, cuda_emulation::Where where = cuda_emulation::Where::current()) {
  cuda_emulation::exchange(mask, 0, where);
}

template <typename T>
T __shfl_sync(
    unsigned mask, T value, int source, int width = 32,
    cuda_emulation::Where where = cuda_emulation::Where::current()) {
  const auto meeting = cuda_emulation::exchange(mask, value, where);
  const int lane = cuda_emulation::running->lane();
  return cuda_emulation::value_of<T>(*meeting, lane / width * width + source % width);
}

template <typename T>
T __shfl_xor_sync(
    unsigned mask, T value, int distance, int width = 32,
    cuda_emulation::Where where = cuda_emulation::Where::current()) {
  const auto meeting = cuda_emulation::exchange(mask, value, where);
  const int lane = cuda_emulation::running->lane(), source = lane ^ distance;
  return cuda_emulation::value_of<T>(*meeting, source / width <= lane / width ? source : lane);
}

inline unsigned __ballot_sync(
    unsigned mask, bool predicate, cuda_emulation::Where where = cuda_emulation::Where::current()) {
  const auto meeting = cuda_emulation::exchange(mask, predicate, where);
  unsigned votes = 0;
  for (unsigned lane = 0; lane < cuda_emulation::kWarp; ++lane) {
    if (meeting->lanes >> lane & 1) votes |= unsigned(cuda_emulation::value_of<bool>(*meeting, lane)) << lane;
  }
  return votes;
}

// No thread runs between the reading and the writing, so that plain additions are atomic.
template <typename T>
  requires std::is_floating_point_v<T>
T atomicAdd(T* address, std::type_identity_t<T> number) {
  cuda_emulation::add_aligned(address);
  const T before = *address;
  *address = before + number;
  return before;
}

#if EMULATED_CUDA_ARCH >= 900  // GPUs before have no additions of vectors
inline float2 atomicAdd(float2* address, float2 numbers) {
  cuda_emulation::add_aligned(address);
  const float2 before = *address;
  *address = {before.x + numbers.x, before.y + numbers.y};
  return before;
}
inline float4 atomicAdd(float4* address, float4 numbers) {
  cuda_emulation::add_aligned(address);
  const float4 before = *address;
  *address = {before.x + numbers.x, before.y + numbers.y, before.z + numbers.z, before.w + numbers.w};
  return before;
}
#endif
