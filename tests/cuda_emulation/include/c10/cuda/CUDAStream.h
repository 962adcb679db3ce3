// In place of PyTorch's header of this name.
#pragma once

#include "cuda_emulation/runtime.h"

namespace c10::cuda {

inline cudaStream_t getCurrentCUDAStream() { return &cuda_emulation::stream_of_pytorch; }

}  // namespace c10::cuda
