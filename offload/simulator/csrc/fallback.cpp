#include "fallback.h"

#include "runtime.h"

#include <ATen/EmptyTensor.h>

#include <unordered_set>

namespace sim {

namespace {

constexpr c10::DispatchKeySet kDeviceKey(c10::DispatchKey::PrivateUse1);

// Index operations take CPU indices beside device tensors, as CUDA's do.
bool mixed_devices_allowed(const std::string& op) {
  static const std::unordered_set<std::string> names{
      "aten::index", "aten::index_put",     "aten::index_put_", "aten::_index_put_impl_",
      "aten::copy_", "aten::_unsafe_index", "aten::is_set_to"};
  return names.count(op) > 0;
}

bool should_ghost(const std::string& op, const torch::jit::Stack& stack, size_t base) {
  if (state().config.ghost <= 0) return false;
  double bytes = 0;
  std::vector<Tensor> tensors;
  for (size_t i = base; i < stack.size(); i++) {
    if (stack[i].isTensor()) {
      tensors.push_back(stack[i].toTensor());
    } else if (stack[i].isTensorList()) {
      for (const Tensor& tensor : stack[i].toTensorVector()) tensors.push_back(tensor);
    }
  }
  for (const Tensor& tensor : tensors) bytes += bytes_of(tensor);
  return is_ghost(bytes) && !needs_value_on_host(op, tensors);
}

using OptionalTensors = c10::List<std::optional<Tensor>>;

void lower_argument(c10::IValue& value, const c10::Argument& argument, Lowering& lowering) {
  const bool written = argument.alias_info() != nullptr && argument.alias_info()->isWrite();
  const bool read = !argument.is_out();
  if (value.isTensor()) {
    value = lowering.lower(value.toTensor(), read, written);
  } else if (value.isTensorList()) {
    auto tensors = value.toTensorVector();
    for (Tensor& tensor : tensors) tensor = lowering.lower(tensor, read, written);
    value = c10::List<Tensor>(tensors);
  } else if (value.isOptionalTensorList()) {
    OptionalTensors lowered;
    for (const std::optional<Tensor>& tensor : value.toOptionalTensorVector()) {
      lowered.push_back(tensor ? std::optional<Tensor>(lowering.lower(*tensor, read, written)) : tensor);
    }
    value = lowered;
  } else if (value.isDevice()) {
    if (value.toDevice().is_privateuseone()) value = c10::Device(lowering.ghost() ? at::kMeta : at::kCPU);
  } else if (value.isGenerator()) {
    value = host_generator(value.toGenerator());
  } else if (value.isNone() && argument.name() == "generator") {
    value = host_generator(default_generator());
  }
}

void lift_result(c10::IValue& value, Lowering& lowering) {
  if (value.isTensor()) {
    value = lowering.lift(value.toTensor());
  } else if (value.isTensorList()) {
    auto tensors = value.toTensorVector();
    for (Tensor& tensor : tensors) tensor = lowering.lift(tensor);
    value = c10::List<Tensor>(tensors);
  }
}

}  // namespace

Tensor Lowering::lower(const Tensor& tensor, bool read, bool written) {
  if (!tensor.defined()) return tensor;
  tensors_.arguments.push_back(tensor);
  if (!tensor.is_privateuseone()) {
    if (tensor.is_cpu() && tensor.dim() > 0) cpu_argument_ = true;
    const bool number = tensor.unsafeGetTensorImpl()->is_wrapped_number();
    return ghost_ && tensor.is_cpu() && !number ? meta_like(tensor) : tensor;
  }
  for (size_t i = 0; i < lowered_.size(); i++) {
    Operand& known = tensors_.operands[i];
    if (!known.tensor.is_same(tensor)) continue;
    known.read |= read;
    known.written |= written;
    return lowered_[i];
  }
  tensors_.operands.push_back({tensor, read, written});
  lowered_.push_back(ghost_ ? meta_like(tensor) : host_alias(tensor));
  return lowered_.back();
}

Tensor Lowering::lift(const Tensor& result) {
  if (!result.defined()) return result;
  if (!result.is_cpu() && !(ghost_ && result.is_meta())) return result;
  for (size_t i = 0; i < lowered_.size(); i++) {
    if (lowered_[i].is_same(result)) return tensors_.operands[i].tensor;
  }
  Tensor lifted = result.is_meta()
                      ? at::detail::empty_strided_generic(result.sizes(), result.strides(), device_allocator(),
                                                          kDeviceKey, result.scalar_type())
                      : device_tensor(device_storage_of(result.storage(), adopted_), result);
  tensors_.outputs.push_back(lifted);
  return lifted;
}

void Lowering::write_back() {
  for (size_t i = 0; i < lowered_.size(); i++) {
    if (!tensors_.operands[i].written) continue;
    const Tensor& original = tensors_.operands[i].tensor;
    const Tensor& host = lowered_[i];
    if (ghost_) {
      if (original.sizes() != host.sizes()) original.resize_(host.sizes());
      continue;
    }
    auto* impl = original.unsafeGetTensorImpl();
    if (aliased_storage(host.storage()) != original.storage().unsafeGetStorageImpl()) {
      impl->set_storage_keep_dtype(device_storage_of(host.storage(), adopted_));
    }
    if (impl->sizes() != host.sizes() || impl->strides() != host.strides() ||
        impl->storage_offset() != host.storage_offset()) {
      impl->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
    }
  }
}

void Lowering::check_same_device(const std::string& op) const {
  const bool mixed = cpu_argument_ && !tensors_.operands.empty();
  TORCH_CHECK(!mixed || mixed_devices_allowed(op),
              "Expected all tensors to be on the same device, but found at least two devices, ", kDevice,
              " and cpu! (", op, ")");
}

void boxed_fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const DeviceCall call;
  const auto& schema = op.schema();
  const std::string& name = schema.operator_name().name;
  const auto& arguments = schema.arguments();
  const size_t first_argument = stack->size() - arguments.size();

  Lowering lowering(should_ghost(name, *stack, first_argument));
  for (size_t i = 0; i < arguments.size(); i++) lower_argument((*stack)[first_argument + i], arguments[i], lowering);
  lowering.check_same_device(name);
  {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    op.callBoxed(stack);
  }
  lowering.write_back();
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); i++) {
    lift_result((*stack)[i], lowering);
  }
  lowering.charge(name);
}

void boxed_metadata_op(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const DeviceCall call;
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
}

}  // namespace sim
