#include "memory.h"

#include "clock.h"
#include "faults.h"

#include <c10/core/impl/alloc_cpu.h>
#include <sys/mman.h>

#include <algorithm>

namespace sim {

namespace {

constexpr size_t kAll = 0;  // index of the aggregate in torch's statistics
constexpr size_t kGranularity = 512;

size_t rounded_up(size_t bytes) { return (bytes + kGranularity - 1) / kGranularity * kGranularity; }

void give_back(int64_t bytes) {
  auto& stats = state().stats;
  stats.active_bytes[kAll].decrease(size_t(bytes));
  stats.reserved_bytes[kAll].decrease(size_t(bytes));
  stats.active[kAll].decrease(1);
}

int64_t free_bytes() {
  const State& s = state();
  return s.capacity - s.others - s.stats.active_bytes[kAll].current;
}

void account(size_t bytes) {
  State& s = state();
  const auto rounded = int64_t(rounded_up(bytes));
  settle_deferred_frees();
  const bool refused = strikes(s.faults.refuse_allocation);
  if (!refused && rounded > free_bytes() && !s.deferred.empty()) {  // as CUDA's allocator: synchronise, then try again
    s.stats.num_alloc_retries++;
    s.stats.num_sync_all_streams++;
    hold_host_for_all_streams();
    settle_deferred_frees();
  }
  if (refused || rounded > free_bytes()) {
    s.stats.num_ooms++;
    TORCH_CHECK_WITH(OutOfMemoryError, false, "simulated accelerator out of memory. Tried to allocate ", bytes,
                     " bytes. Capacity ", s.capacity, ", of which ", std::max<int64_t>(0, free_bytes()),
                     " free; allocated ", s.stats.allocated_bytes[kAll].current, ", taken by other programs ",
                     s.others, ".", refused ? " Refused on request (refuse_allocation)." : "");
  }
  s.stats.allocated_bytes[kAll].increase(size_t(rounded));
  s.stats.active_bytes[kAll].increase(size_t(rounded));
  s.stats.reserved_bytes[kAll].increase(size_t(rounded));
  s.stats.requested_bytes[kAll].increase(bytes);
  s.stats.allocation[kAll].increase(1);
  s.stats.active[kAll].increase(1);
  s.stats.num_device_alloc++;
  s.counters.allocations++;
}

void free_block(void* context) {
  auto* block = static_cast<Block*>(context);
  {
    State& s = state();
    const Lock lock(s.mutex);
    const double until = block->history.wait_before_reuse(block->stream, block->recorded, block->bytes);
    s.stats.allocated_bytes[kAll].decrease(block->rounded);
    s.stats.requested_bytes[kAll].decrease(block->bytes);
    s.stats.allocation[kAll].decrease(1);
    s.stats.num_device_free++;
    if (until > s.host) {
      s.deferred.emplace(until, int64_t(block->rounded));
    } else {
      give_back(int64_t(block->rounded));
    }
  }
  if (block->mapped) {
    munmap(block->data, block->bytes);
  } else if (!block->owned && block->data != nullptr) {
    c10::free_cpu(block->data);
  }
  delete block;
}

class DeviceMemory final : public c10::DeviceAllocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    const DeviceCall call;
    if (bytes == 0) return {nullptr, nullptr, &c10::detail::deleteNothing, kDevice};
    c10::DataPtr counted = make_block(nullptr, bytes, {});  // the capacity check comes before the memory
    auto* block = static_cast<Block*>(counted.get_context());
    if (is_ghost(double(bytes))) {
      block->data = map_memory(bytes);
      block->mapped = true;
    } else {
      block->data = c10::alloc_cpu(bytes);
    }
    counted.release_context();
    return {block->data, block, &free_block, kDevice};
  }

  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    if (!is_ghost(double(bytes))) memcpy(to, from, bytes);
  }
  bool initialized() override { return true; }

  void emptyCache(c10::MempoolId_t) override {
    const DeviceCall call;
    const Lock lock(state().mutex);
    settle_deferred_frees();
  }

  void recordStream(const c10::DataPtr& data, c10::Stream stream) override {
    const Lock lock(state().mutex);
    if (data.get_deleter() != &free_block) return;
    auto& recorded = static_cast<Block*>(data.get_context())->recorded;
    if (std::find(recorded.begin(), recorded.end(), stream.id()) == recorded.end()) recorded.push_back(stream.id());
  }

  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex) override {
    const Lock lock(state().mutex);
    settle_deferred_frees();
    return state().stats;
  }

  void resetAccumulatedStats(c10::DeviceIndex) override {
    const Lock lock(state().mutex);
    for (auto* stat : all_stats()) (*stat)[kAll].reset_accumulated();
    state().stats.num_ooms = 0;
    state().stats.num_alloc_retries = 0;
  }

  void resetPeakStats(c10::DeviceIndex) override {
    const Lock lock(state().mutex);
    settle_deferred_frees();
    for (auto* stat : all_stats()) (*stat)[kAll].reset_peak();
    state().pinned_peak = state().pinned;
  }

  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex) override {
    const Lock lock(state().mutex);
    settle_deferred_frees();
    return {size_t(std::max<int64_t>(0, free_bytes())), size_t(state().capacity)};
  }

 private:
  static std::vector<c10::CachingAllocator::StatArray*> all_stats() {
    auto& stats = state().stats;
    return {&stats.allocated_bytes, &stats.active_bytes, &stats.reserved_bytes,
            &stats.requested_bytes, &stats.allocation,   &stats.active};
  }
};

DeviceMemory* g_device_memory = new DeviceMemory;

REGISTER_ALLOCATOR(kPrivateUse1, g_device_memory);

}  // namespace

void* map_memory(size_t bytes) {
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  TORCH_CHECK_WITH(OutOfMemoryError, data != MAP_FAILED, "simulated accelerator: the host cannot map ", bytes,
                   " bytes");
  return data;
}

c10::DeviceAllocator* device_allocator() { return g_device_memory; }

c10::DataPtr make_block(void* data, size_t bytes, c10::DataPtr owned) {
  State& s = state();
  const Lock lock(s.mutex);
  account(bytes);
  auto* block =
      new Block{data, bytes, rounded_up(bytes), false, std::move(owned), s.next_storage++, current_stream(), {}, {}};
  return {data, block, &free_block, kDevice};
}

Block* block_of(const c10::StorageImpl* storage) {
  const c10::DataPtr& data = storage->data_ptr();
  return data.get_deleter() == &free_block ? static_cast<Block*>(data.get_context()) : nullptr;
}

void touch(const Tensor& tensor, int64_t stream, bool write, const char* op) {
  if (!tensor.is_privateuseone() || tensor.numel() == 0) return;
  Block* block = block_of(tensor.storage().unsafeGetStorageImpl());
  if (block == nullptr) return;
  const auto item = size_t(tensor.element_size());
  size_t last = 0;  // index of the last element, from the first
  for (int64_t dim = 0; dim < tensor.dim(); dim++) {
    last += size_t(tensor.size(dim) - 1) * size_t(tensor.stride(dim));
  }
  const size_t begin = size_t(tensor.storage_offset()) * item;
  block->history.touch(begin, begin + (last + 1) * item, stream, write, op);
}

void settle_deferred_frees() {
  State& s = state();
  const auto pending = s.deferred.upper_bound(s.host);
  for (auto passed = s.deferred.begin(); passed != pending; ++passed) give_back(passed->second);
  s.deferred.erase(s.deferred.begin(), pending);
}

}  // namespace sim
