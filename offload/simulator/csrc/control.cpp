// The control surface that Python calls through ctypes: plain C functions, so one build serves every Python version.
#include "clock.h"
#include "memory.h"
#include "pinned.h"
#include "runtime.h"

#include <algorithm>
#include <cstring>

namespace sim {

namespace {

struct Option {
  const char* name;
  double Config::* field;
};

constexpr Option kOptions[] = {
    {"h2d_pinned", &Config::h2d_pinned},
    {"h2d_pageable", &Config::h2d_pageable},
    {"d2h_pinned", &Config::d2h_pinned},
    {"d2h_pageable", &Config::d2h_pageable},
    {"hbm", &Config::hbm},
    {"flops16", &Config::flops16},
    {"flops32", &Config::flops32},
    {"launch", &Config::launch},
    {"copy_lat", &Config::copy_lat},
    {"kernel_min", &Config::kernel_min},
    {"sync_lat", &Config::sync_lat},
    {"query_lat", &Config::query_lat},
    {"host_memcpy", &Config::host_memcpy},
    {"strict_races", &Config::strict_races},
    {"trace", &Config::trace},
    {"ghost", &Config::ghost},
    {"pin_limit", &Config::pin_limit},
    {"copy_log", &Config::copy_log},
    {"copy_log_limit", &Config::copy_log_limit},
    {"python_time", &Config::python_time},
    {"python_scale", &Config::python_scale},
};
constexpr int kOptionCount = int(std::size(kOptions));

struct IntegerCounter {
  const char* name;
  int64_t value;
};

std::vector<IntegerCounter> integer_counters() {
  const State& s = state();
  return {{"ops", s.counters.ops},
          {"h2d", s.counters.h2d},
          {"d2h", s.counters.d2h},
          {"h2d_bytes", s.counters.h2d_bytes},
          {"d2h_bytes", s.counters.d2h_bytes},
          {"host_syncs", s.counters.host_syncs},
          {"allocations", s.counters.allocations},
          {"faults", s.counters.faults},
          {"races", s.races},
          {"pinned", s.pinned},
          {"pinned_peak", s.pinned_peak},
          {"trace", int64_t(s.trace.size())},
          {"streams", int64_t(s.streams.size())},
          {"copies", int64_t(s.copies.size())},
          {"copies_dropped", s.copies_dropped},
          {"logged_h2d", s.copy_totals.h2d},
          {"logged_d2h", s.copy_totals.d2h},
          {"logged_h2d_bytes", s.copy_totals.h2d_bytes},
          {"logged_d2h_bytes", s.copy_totals.d2h_bytes}};
}

}  // namespace

}  // namespace sim

#define CONTROL extern "C" __attribute__((visibility("default")))

using sim::DeviceCall;
using sim::Lock;
using sim::state;

CONTROL void sim_register() { sim::register_runtime(); }

// Memory, in bytes.
CONTROL void sim_set_capacity(int64_t bytes) {
  const Lock lock(state().mutex);
  state().capacity = bytes;
}

CONTROL int64_t sim_capacity() {
  const Lock lock(state().mutex);
  return state().capacity;
}

CONTROL void sim_set_others(int64_t bytes) {
  const Lock lock(state().mutex);
  state().others = bytes;
}

CONTROL int64_t sim_others() {
  const Lock lock(state().mutex);
  return state().others;
}

// Page-locking of host memory that lies anywhere. 1: done, 0: refused.
CONTROL int sim_host_register(int64_t address, int64_t bytes) {
  const DeviceCall call;
  return sim::host_register(uintptr_t(address), size_t(bytes));
}

CONTROL int sim_host_unregister(int64_t address) {
  const DeviceCall call;
  return sim::host_unregister(uintptr_t(address));
}

// Faults. Each lets `after` cases pass and strikes once; a negative `after` disarms it.
CONTROL void sim_delay_copy(int64_t after, double factor) {
  const Lock lock(state().mutex);
  state().faults.delay_copy = {after, factor};
}

CONTROL void sim_refuse_allocation(int64_t after) {
  const Lock lock(state().mutex);
  state().faults.refuse_allocation = {after};
}

CONTROL void sim_refuse_pinning(int64_t after) {
  const Lock lock(state().mutex);
  state().faults.refuse_pinning = {after};
}

// The clock, in seconds.
CONTROL double sim_clock() {
  const DeviceCall call;
  const Lock lock(state().mutex);
  double latest = state().host;
  for (const auto& stream : state().streams) latest = std::max(latest, stream.time);
  return latest;
}

CONTROL double sim_host_clock() {
  const DeviceCall call;
  const Lock lock(state().mutex);
  return state().host;
}

CONTROL void sim_advance_host(double seconds) {
  const DeviceCall call;
  const Lock lock(state().mutex);
  state().host += seconds;
}

CONTROL void sim_reset_clock() {
  const DeviceCall call;
  const Lock lock(state().mutex);
  sim::reset_clock();
}

// Options, by index for listing and by name for setting. Returns 1 for an unknown name.
CONTROL const char* sim_option_name(int index) {
  return index >= 0 && index < sim::kOptionCount ? sim::kOptions[index].name : nullptr;
}

CONTROL double sim_option_value(int index) {
  const Lock lock(state().mutex);
  return state().config.*sim::kOptions[index].field;
}

CONTROL int sim_set_option(const char* name, double value) {
  const DeviceCall call;  // time runs from the moment at which python_time is turned on
  const Lock lock(state().mutex);
  for (const auto& option : sim::kOptions) {
    if (std::strcmp(option.name, name) != 0) continue;
    state().config.*option.field = value;
    return 0;
  }
  return 1;
}

// Counters. Fills `values` (room for `room` of them) and returns how many there are; names come by index.
CONTROL const char* sim_counter_name(int index) {
  const Lock lock(state().mutex);
  const auto counters = sim::integer_counters();
  return index >= 0 && index < int(counters.size()) ? counters[size_t(index)].name : nullptr;
}

CONTROL int sim_counters(int64_t* values, int room) {
  const Lock lock(state().mutex);
  const auto counters = sim::integer_counters();
  for (size_t i = 0; i < counters.size() && int(i) < room; i++) values[i] = counters[i].value;
  return int(counters.size());
}

CONTROL void sim_engine_counters(double* flops, double* busy_compute, double* busy_h2d, double* busy_d2h) {
  const Lock lock(state().mutex);
  *flops = state().counters.flops;
  *busy_compute = state().compute.busy;
  *busy_h2d = state().h2d.busy;
  *busy_d2h = state().d2h.busy;
}

// Records. Each fills at most `room` of them and returns how many it wrote.
CONTROL int64_t sim_trace(sim::TraceRecord* records, int64_t room) {
  const Lock lock(state().mutex);
  const auto& trace = state().trace;
  const auto count = std::min<int64_t>(room, int64_t(trace.size()));
  std::copy_n(trace.begin(), count, records);
  return count;
}

CONTROL int64_t sim_copies(sim::CopyRecord* records, int64_t room) {
  const Lock lock(state().mutex);
  const auto& copies = state().copies;
  const auto count = std::min<int64_t>(room, int64_t(copies.size()));
  std::copy_n(copies.begin(), count, records);
  return count;
}

CONTROL void sim_clear_copies() {
  const Lock lock(state().mutex);
  state().copies.clear();
  state().copies_dropped = 0;
  state().copy_totals = {};
}

// Races. Writes the newest message, cut to fit, and returns its full length.
CONTROL int64_t sim_last_race(char* message, int64_t room) {
  const Lock lock(state().mutex);
  snprintf(message, size_t(room), "%s", state().last_race.c_str());
  return int64_t(state().last_race.size());
}

CONTROL void sim_clear_races() {
  const Lock lock(state().mutex);
  state().races = 0;
  state().last_race.clear();
}
