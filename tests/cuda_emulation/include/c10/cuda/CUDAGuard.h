// In place of PyTorch's header of this name.
#pragma once

#include "cuda_emulation/runtime.h"

namespace c10::cuda {

struct CUDAGuard {
  template <typename Device>
  explicit CUDAGuard(const Device&) {
    ++cuda_emulation::guards;
  }
  CUDAGuard(const CUDAGuard&) = delete;
  ~CUDAGuard() { --cuda_emulation::guards; }
};

}  // namespace c10::cuda
