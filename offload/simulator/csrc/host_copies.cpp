#include "host_copies.h"

#include "clock.h"

#include <ATen/ExpandUtils.h>
#include <ATen/ops/copy_native.h>

#include <algorithm>

namespace sim {

namespace {

bool plain(const Tensor& tensor) { return tensor.is_cpu() && tensor.layout() == at::kStrided; }

// A CPU kernel that stands in for the device may copy as much as it likes: its result is real.
bool is_ghost_copy(const Tensor& target, const Tensor& source) {
  if (state().config.ghost <= 0 || !target.defined() || !source.defined()) return false;
  return plain(target) && plain(source) && is_ghost(std::max(bytes_of(target), bytes_of(source))) &&
         !DeviceCall::active();
}

}  // namespace

Tensor& copy_on_host(Tensor& target, const Tensor& source, bool non_blocking) {
  if (!is_ghost_copy(target, source)) return at::native::copy_(target, source, non_blocking);
  const DeviceCall call;
  TORCH_CHECK(at::is_expandable_to(source.sym_sizes(), target.sym_sizes()), "The size of the source ", source.sizes(),
              " does not fit that of the target ", target.sizes(), " (copy_ in ghost mode)");
  State& s = state();
  const Lock lock(s.mutex);
  s.host += std::max(bytes_of(target), bytes_of(source)) / s.config.host_memcpy;
  return target;
}

}  // namespace sim
