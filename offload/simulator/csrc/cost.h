// What a kernel costs on the virtual clock: max(FLOP / peak, bytes / memory bandwidth, shortest kernel).
#pragma once

#include "clock.h"
#include "memory.h"

#include <string>
#include <vector>

namespace sim {

// A device tensor that a kernel was given. An out= argument is written only, an in-place one is read and written.
struct Operand {
  Tensor tensor;
  bool read;
  bool written;
};

// The tensors of one operation: every tensor argument in order, repeats and CPU tensors included; each device tensor
// among them once; and the results that are not one of them.
struct KernelTensors {
  std::vector<Tensor> arguments;
  std::vector<Operand> operands;
  std::vector<Tensor> outputs;
};

// Advances the clock for one kernel on the current stream and records its accesses for the race detector.
void charge_kernel(const std::string& op, const KernelTensors& tensors);

// Operations whose result size or value the host needs, so that no ghost can stand in for them.
bool needs_value_on_host(const std::string& op, const std::vector<Tensor>& arguments);

}  // namespace sim
