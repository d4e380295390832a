// What a kernel costs on the virtual clock: max(FLOP / peak, bytes / memory bandwidth, shortest kernel).
#pragma once

#include "clock.h"
#include "memory.h"

#include <string>
#include <vector>

namespace sim {

// The tensors of one operation. `unique` and `written` name each device tensor once; `arguments` holds every tensor
// argument in order, repeats and CPU tensors included.
struct KernelTensors {
  std::vector<Tensor> arguments;
  std::vector<Tensor> unique;
  std::vector<bool> written;
  std::vector<Tensor> outputs;
};

// Advances the clock for one kernel on the current stream and records its accesses for the race detector.
void charge_kernel(const std::string& op, const KernelTensors& tensors);

// Operations whose result size or value the host needs, so that on a GPU too they wait for the stream.
bool needs_value_on_host(const std::string& op, const std::vector<Tensor>& arguments);

}  // namespace sim
