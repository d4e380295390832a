// Runs any operation: device arguments become host aliases, the CPU kernel runs, its results become device tensors.
#pragma once

#include "alias.h"
#include "cost.h"

#include <torch/library.h>

namespace sim {

// The arguments and results of one operation on their way to the CPU kernel and back.
class Lowering {
 public:
  // With `ghost`, kernels run on the meta device: shapes, accounts and clock are right, nothing is computed.
  explicit Lowering(bool ghost) : ghost_(ghost) {}

  bool ghost() const { return ghost_; }
  Tensor lower(const Tensor& tensor, bool read = true, bool written = false);
  Tensor lift(const Tensor& result);

  // Follows in-place and out= operations that resized or replaced their target.
  void write_back();

  // Throws when a CPU tensor with dimensions stands beside a device tensor, as on a real device.
  void check_same_device(const std::string& op) const;

  void charge(const std::string& op) const { charge_kernel(op, tensors_); }

 private:
  bool ghost_;
  bool cpu_argument_ = false;
  KernelTensors tensors_;
  std::vector<Tensor> lowered_;  // parallel to tensors_.operands
  Adopted adopted_;
};

void boxed_fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack);

// For operations on sizes, strides and storage only: the CPU kernel works on the device tensor itself.
void boxed_metadata_op(const c10::OperatorHandle& op, torch::jit::Stack* stack);

}  // namespace sim
