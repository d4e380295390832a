#include "copies.h"

#include "faults.h"
#include "pinned.h"

#include <algorithm>

namespace sim {

namespace {

struct Transfer {
  bool to_device;
  int64_t bytes;
  bool pinned;
  bool ghost;
  const void* host;
  const Tensor& device;
  const char* name;
};

void log_copy(const Transfer& transfer, int64_t stream, Interval when) {
  State& s = state();
  Counters& totals = s.copy_totals;
  (transfer.to_device ? totals.h2d : totals.d2h) += 1;
  (transfer.to_device ? totals.h2d_bytes : totals.d2h_bytes) += transfer.bytes;
  if (s.config.copy_log == 0) return;
  const Block* block = block_of(transfer.device.storage().unsafeGetStorageImpl());
  const int64_t offset = transfer.device.storage_offset() * int64_t(transfer.device.element_size());
  s.copies.push_back({transfer.to_device, transfer.bytes, int64_t(uintptr_t(transfer.host)),
                      block != nullptr ? block->serial : 0, offset, stream, when.start, when.end, transfer.pinned,
                      transfer.ghost});
  while (double(s.copies.size()) > s.config.copy_log_limit) {
    s.copies.pop_front();
    s.copies_dropped++;
  }
}

void charge_transfer(const Transfer& transfer, double rate) {
  State& s = state();
  s.host += s.config.launch;
  Counters& counters = s.counters;
  (transfer.to_device ? counters.h2d : counters.d2h) += 1;
  (transfer.to_device ? counters.h2d_bytes : counters.d2h_bytes) += transfer.bytes;
  const int64_t stream = current_stream();
  double duration = s.config.copy_lat + double(transfer.bytes) / rate;
  if (strikes(s.faults.delay_copy)) duration *= s.faults.delay_copy.factor;
  Engine& engine = transfer.to_device ? s.h2d : s.d2h;
  const Interval when = enqueue(stream, duration, engine, transfer.name, transfer.bytes, 0);
  if (transfer.pinned) use_pinned(transfer.host, when.end);
  log_copy(transfer, stream, when);
  touch(transfer.device, stream, /*write=*/transfer.to_device, transfer.name);
}

// The copy engine moves one run of bytes. Other layouts and dtypes go through a temporary host buffer, which is not
// pinned: the conversion is the CPU's on the way up, and on the way down the device's own bytes come first.
bool one_run(const Tensor& a, const Tensor& b) {
  if (a.scalar_type() != b.scalar_type() || a.sizes() != b.sizes()) return false;
  if (a.is_contiguous() && b.is_contiguous()) return true;
  return a.strides() == b.strides() && a.is_non_overlapping_and_dense();
}

}  // namespace

Tensor copy_from(const Tensor& source, const Tensor& target, bool non_blocking) {
  const DeviceCall call;
  const bool ghost = is_ghost(std::max(bytes_of(source), bytes_of(target)));
  if (!ghost) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    Tensor to = target.is_privateuseone() ? host_alias(target) : target;
    to.copy_(source.is_privateuseone() ? host_alias(source) : source);
  }
  if (source.is_privateuseone() && target.is_privateuseone()) {
    charge_kernel("aten::copy_", {{source, target}, {{source, true, false}, {target, false, true}}, {}});
    return target;
  }

  State& s = state();
  const Lock lock(s.mutex);
  const bool to_device = target.is_privateuseone();
  const Tensor& device = to_device ? target : source;
  const Tensor& host = to_device ? source : target;
  const bool pinned = host.numel() > 0 && one_run(source, target) &&
                      is_pinned(host.const_data_ptr(), size_t(bytes_of(host)));
  const Config& c = s.config;
  const double rate = to_device ? (pinned ? c.h2d_pinned : c.h2d_pageable) : (pinned ? c.d2h_pinned : c.d2h_pageable);
  const char* name = to_device ? (pinned ? "h2d_pinned" : "h2d_pageable") : (pinned ? "d2h_pinned" : "d2h_pageable");
  const Transfer transfer{to_device,          int64_t(bytes_of(device)), pinned, ghost,
                          host.const_data_ptr(), device,                    name};
  charge_transfer(transfer, rate);
  // A pageable copy is staged by the calling thread, so it holds the host whatever it was asked.
  if (!non_blocking || !pinned) hold_host_for_stream(current_stream());
  return target;
}

Tensor copy_from_and_resize(const Tensor& source, const Tensor& target) {
  target.resize_(source.sizes());
  return copy_from(source, target, false);
}

at::Scalar read_scalar(const Tensor& tensor) {
  const DeviceCall call;
  const Tensor host = host_alias(tensor);
  {
    State& s = state();
    const Lock lock(s.mutex);
    charge_transfer({false, int64_t(tensor.element_size()), false, false, nullptr, tensor, "item"},
                    s.config.d2h_pageable);
    hold_host_for_stream(current_stream());
  }
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return host.item();
}

}  // namespace sim
