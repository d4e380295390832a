// Operations that need more than the fallback, and the registration of everything with torch's dispatcher.
#include "copies.h"
#include "host_copies.h"
#include "runtime.h"

#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/native/DispatchStub.h>
#include <ATen/native/transformers/attention.h>

#include <array>

namespace sim {

namespace {

constexpr c10::DispatchKeySet kKey(c10::DispatchKey::PrivateUse1);

Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device>, std::optional<bool> pinned, std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(!c10::pinned_memory_or_default(pinned), "Only dense CPU tensors can be pinned");
  return at::detail::empty_generic(size, device_allocator(), kKey, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, device_allocator(), kKey, c10::dtype_or_default(dtype));
}

Tensor& set_empty(Tensor& self) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(empty_device_storage());
  impl->set_sizes_contiguous({0});
  return self;
}

// Lets `param.data = device_tensor` and Module.to() keep the identity of the Parameter.
bool shallow_copy_allowed(const Tensor& a, const Tensor& b) {
  auto dense = [](const Tensor& t) { return t.layout() == at::kStrided && (t.is_cpu() || t.is_privateuseone()); };
  return dense(a) && dense(b);
}

void record_stream(Tensor& tensor, at::Stream stream) {
  device_allocator()->recordStream(tensor.storage().data_ptr(), stream);
}

Tensor convolution(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                   c10::SymIntArrayRef stride, c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                   bool transposed, c10::SymIntArrayRef output_padding, c10::SymInt groups) {
  const DeviceCall call;
  const char* name = "aten::convolution_overrideable";
  const Tensor no_bias;
  const Tensor& given_bias = bias ? *bias : no_bias;
  Lowering lowering(is_ghost(bytes_of(input) + bytes_of(weight) + bytes_of(given_bias)));
  const Tensor x = lowering.lower(input);
  const Tensor w = lowering.lower(weight);
  const Tensor b = lowering.lower(given_bias);
  lowering.check_same_device(name);
  Tensor result;
  {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const auto maybe_bias = b.defined() ? std::optional<Tensor>(b) : std::nullopt;
    result = at::convolution_symint(x, w, maybe_bias, stride, padding, dilation, transposed, output_padding, groups);
  }
  result = lowering.lift(result);
  lowering.charge(name);
  return result;
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Tensor& grad, const Tensor& input, const Tensor& weight,
                                                        c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
                                                        c10::SymIntArrayRef dilation, bool transposed,
                                                        c10::SymIntArrayRef output_padding, c10::SymInt groups,
                                                        std::array<bool, 3> wanted) {
  const DeviceCall call;
  Lowering lowering(is_ghost(bytes_of(grad) + bytes_of(input) + bytes_of(weight)));
  const Tensor g = lowering.lower(grad);
  const Tensor x = lowering.lower(input);
  const Tensor w = lowering.lower(weight);
  const std::vector<c10::SymInt> bias_sizes{grad.sym_size(1)};
  std::tuple<Tensor, Tensor, Tensor> grads;
  {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    grads = at::convolution_backward_symint(g, x, w, at::OptionalSymIntArrayRef(c10::SymIntArrayRef(bias_sizes)),
                                            stride, padding, dilation, transposed, output_padding, groups, wanted);
  }
  auto lifted = std::make_tuple(lowering.lift(std::get<0>(grads)), lowering.lift(std::get<1>(grads)),
                                lowering.lift(std::get<2>(grads)));
  lowering.charge("aten::convolution_backward");
  return lifted;
}

// Attention takes the CPU's fused kernel where the CPU would, so that the numbers are the same.
int64_t attention_choice(const Tensor& query, const Tensor& key, const Tensor& value,
                         const std::optional<Tensor>& mask, double dropout, bool causal, std::optional<double> scale,
                         bool grouped) {
  const bool grad = at::GradMode::is_enabled() &&
                    (query.requires_grad() || key.requires_grad() || value.requires_grad());
  auto on_host = [&](const Tensor& tensor) {
    Tensor result = tensor.is_privateuseone() ? host_alias(tensor) : tensor;
    if (grad) result.set_requires_grad(tensor.requires_grad());
    return result;
  };
  const auto host_mask = mask && mask->defined() ? std::optional<Tensor>(on_host(*mask)) : mask;
  return at::_fused_sdp_choice(on_host(query), on_host(key), on_host(value), host_mask, dropout, causal, scale,
                               grouped);
}

int64_t storage_serial(const Tensor& tensor) {
  if (!tensor.is_privateuseone()) return 0;
  const Block* block = block_of(tensor.storage().unsafeGetStorageImpl());
  return block != nullptr ? block->serial : 0;
}

constexpr auto kMetadataOps = {"view",
                               "as_strided",
                               "_reshape_alias",
                               "unfold",
                               "view_as_real",
                               "view_as_complex",
                               "set_.source_Storage_storage_offset",
                               "set_.source_Storage",
                               "set_.source_Tensor",
                               "resize_"};

// These have a composite kernel, which torch would take before the fallback, and a different CPU kernel. Naming them
// runs the CPU kernel, for equality to the last bit. The conformance suite recomputes this list.
constexpr auto kCompositeOps = {"_stack",
                                "_stack.out",
                                "addr",
                                "addr.out",
                                "all.dims",
                                "all.dims_out",
                                "any.dims",
                                "any.dims_out",
                                "linalg__powsum",
                                "native_group_norm",
                                "native_layer_norm",
                                "silu_backward",
                                "mish_backward",
                                "native_channel_shuffle"};

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&boxed_fallback>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  for (const char* name : kMetadataOps) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&boxed_metadata_op>());
  }
  for (const char* name : kCompositeOps) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&boxed_fallback>());
  }
  m.impl("_has_compatible_shallow_copy_type", shallow_copy_allowed);
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", read_scalar);
  m.impl("set_", set_empty);
  m.impl("record_stream", record_stream);
  m.impl("convolution_overrideable", convolution);
  m.impl("convolution_backward_overrideable", convolution_backward);
}

// torch registers copy_ for every device at once, so the place of the CPU alone is free.
TORCH_LIBRARY_IMPL(aten, CPU, m) { m.impl("copy_", copy_on_host); }

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY(balanced_offload_simulator, m) {
  m.def("manual_seed(int seed) -> ()", [](int64_t seed) { default_generator().set_current_seed(uint64_t(seed)); });
  m.def("initial_seed() -> int", [] { return int64_t(default_generator().current_seed()); });
  m.def("rng_state() -> Tensor", [] { return default_generator().get_state(); });
  m.def("set_rng_state(Tensor saved) -> ()", [](const Tensor& saved) { default_generator().set_state(saved); });
  m.def("storage_serial(Tensor tensor) -> int", storage_serial);
}

}  // namespace

}  // namespace sim

namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &sim::attention_choice)
}  // namespace at::native

// Autocast by torch's own lists; its macros are the only public way to them.
namespace at::autocast {
namespace {
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
#define AUTOCAST_LOWER_PRECISION(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
  AT_FORALL_LOWER_PRECISION_FP(AUTOCAST_LOWER_PRECISION)
#define AUTOCAST_FP32(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
  AT_FORALL_FP32(AUTOCAST_FP32)
#define AUTOCAST_FP32_SET_DTYPE(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32_set_opt_dtype)
  AT_FORALL_FP32_SET_OPT_DTYPE(AUTOCAST_FP32_SET_DTYPE)
#define AUTOCAST_PROMOTE(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)
  AT_FORALL_PROMOTE(AUTOCAST_PROMOTE)
}
}  // namespace
}  // namespace at::autocast
