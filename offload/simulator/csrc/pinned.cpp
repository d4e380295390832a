#include "pinned.h"

#include "clock.h"
#include "faults.h"
#include "memory.h"
#include "races.h"

#include <c10/core/impl/alloc_cpu.h>
#include <sys/mman.h>

#include <algorithm>

namespace sim {

namespace {

constexpr int32_t kOutOfMemory = 2;  // cudaErrorMemoryAllocation

using Ranges = std::map<uintptr_t, PinnedRange>;

// The range that holds the address, or the end.
Ranges::iterator range_at(uintptr_t address) {
  Ranges& ranges = state().pinned_ranges;
  auto it = ranges.upper_bound(address);
  if (it == ranges.begin()) return ranges.end();
  --it;
  return address - it->first < it->second.bytes ? it : ranges.end();
}

// The first range that shares a byte with [begin, begin + bytes), or the end.
Ranges::iterator overlapping(uintptr_t begin, size_t bytes) {
  Ranges& ranges = state().pinned_ranges;
  const auto holds_begin = range_at(begin);
  if (holds_begin != ranges.end()) return holds_begin;
  const auto next = ranges.lower_bound(begin);
  return next != ranges.end() && next->first - begin < bytes ? next : ranges.end();
}

bool refused(size_t bytes) {
  State& s = state();
  if (strikes(s.faults.refuse_pinning)) return true;
  return s.config.pin_limit > 0 && double(s.pinned) + double(bytes) > s.config.pin_limit;
}

// What torch raises when cudaHostAlloc fails.
[[noreturn]] void throw_refusal(size_t bytes) {
  const State& s = state();
  const c10::SourceLocation here{__func__, __FILE__, uint32_t(__LINE__)};
  throw c10::AcceleratorError(here, kOutOfMemory,
                              c10::str("simulated accelerator error: out of memory: cannot page-lock ", bytes,
                                       " bytes of host memory; ", s.pinned, " are, the limit (pin_limit) is ",
                                       int64_t(s.config.pin_limit), ", 0 for none"));
}

void add(uintptr_t address, size_t bytes, bool registered) {
  State& s = state();
  s.pinned_ranges[address] = {bytes, registered};
  s.pinned += int64_t(bytes);
  s.pinned_peak = std::max(s.pinned_peak, s.pinned);
  s.host += double(bytes) / s.config.host_memcpy;  // the kernel locks and clears every page
}

void remove(Ranges::iterator range) {
  State& s = state();
  s.pinned -= int64_t(range->second.bytes);
  s.pinned_ranges.erase(range);
}

size_t forget_pinned(void* data) {
  const Lock lock(state().mutex);
  const auto range = state().pinned_ranges.find(uintptr_t(data));
  const size_t bytes = range->second.bytes;
  remove(range);
  return bytes;
}

void free_pinned(void* data) {
  forget_pinned(data);
  c10::free_cpu(data);
}

void free_mapped_pinned(void* data) { munmap(data, forget_pinned(data)); }

class PinnedMemory final : public at::HostAllocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    const DeviceCall call;
    if (bytes == 0) return {nullptr, nullptr, &c10::detail::deleteNothing, c10::Device(at::kCPU)};
    State& s = state();
    const Lock lock(s.mutex);
    if (refused(bytes)) throw_refusal(bytes);
    const bool mapped = is_ghost(double(bytes));
    void* data = mapped ? map_memory(bytes) : c10::alloc_cpu(bytes);
    // Memory that was given back to the system while it was registered, and comes from there again.
    for (auto stale = overlapping(uintptr_t(data), bytes); stale != s.pinned_ranges.end();
         stale = overlapping(uintptr_t(data), bytes)) {
      remove(stale);
    }
    add(uintptr_t(data), bytes, /*registered=*/false);
    return {data, data, mapped ? &free_mapped_pinned : &free_pinned, c10::Device(at::kCPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t bytes) const override { memcpy(to, from, bytes); }
  bool record_event(void*, void*, c10::Stream) override { return true; }
  void empty_cache() override {}
  at::HostStats get_stats() override { return {}; }
  void reset_accumulated_stats() override {}
  void reset_peak_stats() override {}
};

PinnedMemory* g_pinned_memory = new PinnedMemory;

}  // namespace

at::HostAllocator* pinned_allocator() { return g_pinned_memory; }

bool is_pinned(const void* pointer) { return is_pinned(pointer, 1); }

bool is_pinned(const void* pointer, size_t bytes) {
  const Lock lock(state().mutex);
  const auto range = range_at(uintptr_t(pointer));
  if (range == state().pinned_ranges.end()) return false;
  return bytes <= range->second.bytes - (uintptr_t(pointer) - range->first);
}

void use_pinned(const void* pointer, double end) {
  State& s = state();
  const auto range = range_at(uintptr_t(pointer));
  if (range == s.pinned_ranges.end()) return;
  range->second.busy_until = end;
  range->second.clock_generation = s.clock_generation;
}

bool host_register(uintptr_t address, size_t bytes) {
  State& s = state();
  const Lock lock(s.mutex);
  if (overlapping(address, bytes) != s.pinned_ranges.end() || refused(bytes)) return false;
  add(address, bytes, /*registered=*/true);
  return true;
}

bool host_unregister(uintptr_t address) {
  State& s = state();
  const Lock lock(s.mutex);
  const auto range = s.pinned_ranges.find(address);
  if (range == s.pinned_ranges.end() || !range->second.registered) return false;
  const PinnedRange& leaving = range->second;
  const bool busy = leaving.clock_generation == s.clock_generation && leaving.busy_until > s.host;
  const size_t bytes = leaving.bytes;
  remove(range);
  if (busy) count_race(c10::str(bytes, " bytes of host memory unregistered while a copy still uses them"));
  return true;
}

}  // namespace sim
