// In place of PyTorch's header of this name.
#pragma once

#include "cuda_emulation/runtime.h"

#define C10_CUDA_KERNEL_LAUNCH_CHECK() (cuda_emulation::unchecked = false)  // the emulation throws at the launch
#define C10_CUDA_CHECK(call) cuda_emulation::expect((call) == cudaSuccess, #call)
