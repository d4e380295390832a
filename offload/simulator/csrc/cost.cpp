#include "cost.h"

#include <algorithm>
#include <unordered_set>

namespace sim {

namespace {

double product(at::IntArrayRef sizes) {
  double result = 1;
  for (const int64_t size : sizes) result *= double(size);
  return result;
}

double matmul_flops(const Tensor& a, const Tensor& b) { return 2 * product(a.sizes()) * double(b.size(-1)); }

double attention_flops(const Tensor& query, const Tensor& key, const Tensor& value) {
  const double rows = double(query.numel()) / double(query.size(-1));
  const double scores = 2 * double(query.numel()) * double(key.size(-2));
  const double mixing = 2 * rows * double(key.size(-2)) * double(value.size(-1));
  return scores + mixing;
}

double flops_of(const std::string& op, const std::vector<Tensor>& in, const std::vector<Tensor>& out) {
  if (op == "aten::mm" || op == "aten::bmm") return in.size() < 2 ? 0 : matmul_flops(in[0], in[1]);
  if (op == "aten::addmm" || op == "aten::baddbmm" || op == "aten::_addmm_activation") {
    return in.size() < 3 ? 0 : matmul_flops(in[1], in[2]);
  }
  if (op == "aten::convolution_overrideable") {
    // Per output element; for a transposed convolution this is an upper bound.
    return 2 * product(out[0].sizes()) * product(in[1].sizes().slice(1));
  }
  if (op == "aten::_scaled_dot_product_flash_attention_for_cpu") return attention_flops(in[0], in[1], in[2]);
  return 0;
}

bool same_storage(const Tensor& a, const Tensor& b) {
  return a.is_privateuseone() && b.is_privateuseone() &&
         a.storage().unsafeGetStorageImpl() == b.storage().unsafeGetStorageImpl();
}

}  // namespace

bool needs_value_on_host(const std::string& op, const std::vector<Tensor>& arguments) {
  static const std::unordered_set<std::string> always{
      "aten::nonzero",    "aten::masked_select",      "aten::equal",             "aten::_unique2",
      "aten::unique_dim", "aten::unique_consecutive", "aten::repeat_interleave", "aten::is_set_to"};
  if (always.count(op) > 0) return true;
  if (op != "aten::index") return false;
  return std::any_of(arguments.begin() + 1, arguments.end(),
                     [](const Tensor& index) { return index.scalar_type() == at::kBool; });
}

namespace {

// Where the host waits. Indexing with a mask is not among them: torch asks for the mask's nonzero first, which is.
// Writing several values through a mask counts its ones; one value is filled in without.
bool holds_host(const std::string& op, const std::vector<Tensor>& arguments) {
  if (op == "aten::index") return false;
  if (needs_value_on_host(op, arguments)) return true;
  if (op != "aten::_index_put_impl_" || arguments.size() < 3 || arguments.back().numel() == 1) return false;
  return std::any_of(arguments.begin() + 1, arguments.end() - 1,
                     [](const Tensor& index) { return index.scalar_type() == at::kBool; });
}

}  // namespace

void charge_kernel(const std::string& op, const KernelTensors& tensors) {
  State& s = state();
  const Lock lock(s.mutex);
  s.counters.ops++;
  s.host += s.config.launch;

  double bytes = 0;
  bool half = true;
  for (const Operand& operand : tensors.operands) {
    bytes += bytes_of(operand.tensor) * (double(operand.read) + double(operand.written));
    const auto dtype = operand.tensor.scalar_type();
    if (dtype == at::kFloat || dtype == at::kDouble) half = false;
  }
  for (const Tensor& output : tensors.outputs) bytes += bytes_of(output);
  const double flops = flops_of(op, tensors.arguments, tensors.outputs);
  const double peak = half ? s.config.flops16 : s.config.flops32;
  const double duration = std::max({flops / peak, bytes / s.config.hbm, s.config.kernel_min});
  s.counters.flops += flops;

  const int64_t stream = current_stream();
  enqueue(stream, duration, s.compute, op.c_str(), int64_t(bytes), flops);
  for (const Operand& operand : tensors.operands) touch(operand.tensor, stream, operand.written, op.c_str());
  for (const Tensor& output : tensors.outputs) {
    // A view of an operand is no write; a fresh result is.
    const bool view = std::any_of(tensors.operands.begin(), tensors.operands.end(), [&](const Operand& operand) {
      return same_storage(operand.tensor, output);
    });
    if (!view) touch(output, stream, /*write=*/true, op.c_str());
  }
  if (holds_host(op, tensors.arguments)) hold_host_for_stream(stream);
}

}  // namespace sim
