// The whole state of the simulated accelerator, behind one lock.
//
// Device memory is host memory and every operation runs at once on the CPU. What is simulated is *when* it would
// have happened (clock.h), whether it was ordered against other streams (races.h) and how much memory a card with
// a given capacity would have held (memory.h). All times are virtual seconds since the last clock reset.
#pragma once

#include <ATen/ATen.h>
#include <c10/core/CachingDeviceAllocator.h>

#include <cstdint>
#include <deque>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace sim {

using at::Tensor;

constexpr auto kPrivateUse1 = c10::DeviceType::PrivateUse1;
inline const c10::Device kDevice(kPrivateUse1, 0);

// Entry s is the newest operation of stream s that the owner of the vector is known to come after.
using VectorClock = std::vector<uint64_t>;

struct StreamState {
  double time = 0;  // when the work queued so far will be done
  VectorClock seen;
  uint64_t epoch = 0;  // number of operations queued on this stream
};

struct EventState {
  double time = 0;
  VectorClock seen;
  uint64_t clock_generation = 0;  // an event from before a clock reset counts as long past
};

struct Engine {
  double free_at = 0;
  double busy = 0;
};

// Every field can be set by name from Python (see kOptions in control.cpp). Rates in bytes/s or FLOP/s, times in s.
struct Config {
  double h2d_pinned = 25e9;
  double h2d_pageable = 8e9;
  double d2h_pinned = 25e9;
  double d2h_pageable = 6e9;
  double hbm = 600e9;
  double flops16 = 60e12;
  double flops32 = 20e12;
  double launch = 5e-6;      // host time to launch a kernel or a copy
  double copy_lat = 8e-6;    // fixed part of every copy
  double kernel_min = 2e-6;  // no kernel is shorter than this
  double sync_lat = 5e-6;    // host time of a synchronize call
  double query_lat = 1e-6;   // host time of a query answered "not yet", so that polling makes progress
  double host_memcpy = 10e9;
  double strict_races = 0;  // raise at the racing operation instead of only counting
  double trace = 0;         // keep every kernel and copy for trace()
  double ghost = 0;         // bytes; operations touching more do no arithmetic. 0 = off
  double pin_limit = 0;     // bytes of host memory that can be page-locked. 0 = no limit
  double copy_log = 1;
  double copy_log_limit = 1 << 20;  // entries; older ones are dropped and counted
  double python_time = 0;           // the CPU time of the calling thread between device calls advances the host
  double python_scale = 1;
};

// Plain data with a fixed layout: ctypes reads these records directly (native.py declares the same fields).
struct TraceRecord {
  char name[64];
  int64_t stream;
  double start;
  double end;
  int64_t bytes;
  double flops;
};

struct CopyRecord {
  int64_t to_device;  // 1: host to device, 0: device to host
  int64_t bytes;
  int64_t host_address;
  int64_t storage;  // serial number of the device storage
  int64_t offset;   // bytes from the start of that storage
  int64_t stream;
  double start;
  double end;
  int64_t pinned;
  int64_t ghost;
};

struct Counters {
  int64_t ops = 0;
  int64_t h2d = 0;
  int64_t d2h = 0;
  int64_t h2d_bytes = 0;
  int64_t d2h_bytes = 0;
  double flops = 0;
  int64_t host_syncs = 0;   // calls in which the host waits for the device
  int64_t allocations = 0;  // device storages made
  int64_t faults = 0;       // injected faults that struck
};

// Page-locked host memory, allocated here or registered where it lies.
struct PinnedRange {
  size_t bytes;
  bool registered;
  double busy_until = 0;  // when the last copy queued from or to it is done
  uint64_t clock_generation = 0;
};

// A failure that a test asks for: lets `after` cases pass, then strikes once. Not armed while negative.
struct Fault {
  int64_t after = -1;
  double factor = 1;
};

struct Faults {
  Fault delay_copy;
  Fault refuse_allocation;
  Fault refuse_pinning;
};

struct State {
  std::recursive_mutex mutex;
  Config config;

  // memory
  int64_t capacity = int64_t(8) << 30;
  int64_t others = 0;  // held by other programs on the same card
  c10::CachingDeviceAllocator::DeviceStats stats;
  // Freed, but still in use by a recorded stream until a virtual time: bytes by that time. CUDA's allocator holds them
  // as well.
  std::multimap<double, int64_t> deferred;
  int64_t next_storage = 1;
  std::map<uintptr_t, PinnedRange> pinned_ranges;
  int64_t pinned = 0;
  int64_t pinned_peak = 0;

  // clock
  double host = 0;
  uint64_t clock_generation = 0;
  Engine compute;
  Engine h2d;
  Engine d2h;
  std::deque<StreamState> streams{1};
  int64_t next_stream = 0;
  VectorClock host_seen;
  Counters counters;
  std::vector<TraceRecord> trace;

  // copies since the last clear
  std::deque<CopyRecord> copies;
  int64_t copies_dropped = 0;
  Counters copy_totals;

  // races
  int64_t races = 0;
  std::string last_race;

  Faults faults;
};

State& state();

// The stream that operations of the calling thread are queued on.
int64_t& current_stream();

using Lock = std::lock_guard<std::recursive_mutex>;

inline double bytes_of(const Tensor& tensor) {
  return tensor.defined() ? double(tensor.numel()) * double(tensor.element_size()) : 0;
}

// Ghost mode: work on more bytes than the limit is only accounted for, its data is never touched.
inline bool is_ghost(double bytes) {
  const double limit = state().config.ghost;
  return limit > 0 && bytes > limit;
}

}  // namespace sim
