#include "runtime.h"

#include "clock.h"
#include "memory.h"
#include "pinned.h"
#include "races.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/GeneratorForPrivateuseone.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <algorithm>

namespace sim {

namespace {

constexpr int64_t kStreamPool = 32;  // handed out in turn and then again, as CUDA's

class DeviceGenerator final : public c10::GeneratorImpl {
 public:
  explicit DeviceGenerator(c10::DeviceIndex index)
      : GeneratorImpl(c10::Device(kPrivateUse1, std::max<c10::DeviceIndex>(index, 0)),
                      c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)),
        inner(at::detail::createCPUGenerator()) {}

  void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { inner.set_offset(offset); }
  uint64_t get_offset() const override { return inner.get_offset(); }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
  void set_state(const c10::TensorImpl& saved) override { inner.unsafeGetGeneratorImpl()->set_state(saved); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return inner.unsafeGetGeneratorImpl()->get_state();
  }
  static c10::DeviceType device_type() { return kPrivateUse1; }

  at::Generator inner;

 private:
  DeviceGenerator* clone_impl() const override {
    auto* copy = new DeviceGenerator(0);
    copy->inner = inner.clone();
    return copy;
  }
};

class Hooks final : public at::PrivateUse1HooksInterface {
 public:
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  bool isPinnedPtr(const void* pointer) const override { return is_pinned(pointer); }
  at::Allocator* getPinnedMemoryAllocator() const override { return pinned_allocator(); }
  at::Device getDeviceFromPtr(void*) const override { return kDevice; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return default_generator(); }
  at::Generator getNewGenerator(c10::DeviceIndex index) const override {
    return at::make_generator<DeviceGenerator>(index);
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    auto* impl = storage.unsafeGetStorageImpl();
    c10::DataPtr data = device_allocator()->allocate(bytes);
    const size_t kept = std::min(bytes, impl->nbytes());
    if (kept > 0) device_allocator()->copy_data(data.get(), impl->data(), kept);
    impl->set_data_ptr_noswap(std::move(data));
    impl->set_nbytes(bytes);
  }
};

class Guard final : public c10::impl::DeviceGuardImplInterface {
 public:
  static constexpr c10::DeviceType static_type = kPrivateUse1;
  c10::DeviceType type() const override { return kPrivateUse1; }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  void setDevice(c10::Device device) const override {
    TORCH_CHECK(device.index() <= 0, "invalid device index ", int(device.index()), ": there is one device");
  }
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::DeviceCapability getDeviceCapability(c10::Device) const override { return {}; }

  c10::Stream getStream(c10::Device) const override { return make_stream(current_stream()); }
  c10::Stream getDefaultStream(c10::Device) const override { return make_stream(0); }
  c10::Stream getNewStream(c10::Device, int) const override {
    State& s = state();
    const Lock lock(s.mutex);
    const int64_t id = 1 + s.next_stream++ % kStreamPool;
    while (int64_t(s.streams.size()) <= id) s.streams.emplace_back();
    return make_stream(id);
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return getNewStream(device, 0); }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    const int64_t previous = current_stream();
    current_stream() = stream.id();
    return make_stream(previous);
  }
  void* getStreamNativeHandle(const c10::Stream stream) const override {
    return reinterpret_cast<void*>(stream.id());
  }
  bool queryStream(const c10::Stream& stream) const override {
    const DeviceCall call;
    State& s = state();
    const Lock lock(s.mutex);
    const StreamState& queue = s.streams[size_t(stream.id())];
    if (queue.time <= s.host) {
      join(s.host_seen, queue.seen);
      return true;
    }
    s.host += s.config.query_lat;
    return false;
  }
  void synchronizeStream(const c10::Stream& stream) const override {
    const DeviceCall call;
    const Lock lock(state().mutex);
    state().host += state().config.sync_lat;
    hold_host_for_stream(stream.id());
  }
  void synchronizeDevice(const c10::DeviceIndex) const override {
    const DeviceCall call;
    const Lock lock(state().mutex);
    state().host += state().config.sync_lat;
    hold_host_for_all_streams();
  }

  void record(void** event, const c10::Stream& stream, const c10::DeviceIndex, const c10::EventFlag) const override {
    const DeviceCall call;
    State& s = state();
    const Lock lock(s.mutex);
    if (*event == nullptr) *event = new EventState;
    auto* recorded = static_cast<EventState*>(*event);
    StreamState& queue = s.streams[size_t(stream.id())];
    join(queue.seen, s.host_seen);
    recorded->time = std::max(queue.time, s.host);
    recorded->seen = queue.seen;
    recorded->clock_generation = s.clock_generation;
  }
  void block(void* event, const c10::Stream& stream) const override {
    if (event == nullptr) return;
    const DeviceCall call;
    State& s = state();
    const Lock lock(s.mutex);
    const auto* awaited = static_cast<EventState*>(event);
    StreamState& queue = s.streams[size_t(stream.id())];
    queue.time = std::max(queue.time, time_of(*awaited));
    join(queue.seen, awaited->seen);
  }
  bool queryEvent(void* event) const override {
    if (event == nullptr) return true;
    const DeviceCall call;
    State& s = state();
    const Lock lock(s.mutex);
    const auto* asked = static_cast<EventState*>(event);
    if (time_of(*asked) <= s.host) {
      join(s.host_seen, asked->seen);
      return true;
    }
    s.host += s.config.query_lat;
    return false;
  }
  void synchronizeEvent(void* event) const override {
    if (event == nullptr) return;
    const DeviceCall call;
    State& s = state();
    const Lock lock(s.mutex);
    const auto* awaited = static_cast<EventState*>(event);
    s.counters.host_syncs++;
    s.host = std::max(s.host + s.config.sync_lat, time_of(*awaited));
    join(s.host_seen, awaited->seen);
  }
  double elapsedTime(void* from, void* to, const c10::DeviceIndex) const override {
    const Lock lock(state().mutex);
    return (static_cast<EventState*>(to)->time - static_cast<EventState*>(from)->time) * 1e3;
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override {
    delete static_cast<EventState*>(event);
  }
  void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& stream) const override {
    device_allocator()->recordStream(data, stream);
  }

 private:
  static c10::Stream make_stream(int64_t id) { return c10::Stream(c10::Stream::UNSAFE, kDevice, id); }
  static double time_of(const EventState& event) {
    return event.clock_generation == state().clock_generation ? event.time : 0;
  }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

}  // namespace

at::Generator& default_generator() {
  static auto* generator = new at::Generator(at::make_generator<DeviceGenerator>(0));
  return *generator;
}

at::Generator host_generator(const at::Generator& generator) {
  TORCH_CHECK(generator.device().is_privateuseone(), "Expected a '", c10::DeviceTypeName(kPrivateUse1, true),
              "' device type for generator but found '", generator.device().type(), "'");
  return static_cast<DeviceGenerator*>(generator.unsafeGetGeneratorImpl())->inner;
}

void register_runtime() {
  static const bool done = [] {
    at::RegisterPrivateUse1HooksInterface(new Hooks);
    at::setHostAllocator(kPrivateUse1, pinned_allocator());
    return true;
  }();
  (void)done;
}

}  // namespace sim
