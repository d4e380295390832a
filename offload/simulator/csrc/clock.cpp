#include "clock.h"

#include "memory.h"
#include "races.h"

#include <time.h>

#include <algorithm>
#include <cstdio>

namespace sim {

Interval enqueue(int64_t stream, double duration, Engine& engine, const char* name, int64_t bytes, double flops) {
  State& s = state();
  StreamState& queue = s.streams[size_t(stream)];
  join(queue.seen, s.host_seen);
  queue.epoch++;
  if (queue.seen.size() <= size_t(stream)) queue.seen.resize(size_t(stream) + 1);
  queue.seen[size_t(stream)] = queue.epoch;

  const double start = std::max({queue.time, s.host, engine.free_at});
  const double end = start + duration;
  queue.time = engine.free_at = end;
  engine.busy += duration;
  if (s.config.trace != 0) {
    TraceRecord record{};
    snprintf(record.name, sizeof(record.name), "%s", name);
    record.stream = stream;
    record.start = start;
    record.end = end;
    record.bytes = bytes;
    record.flops = flops;
    s.trace.push_back(record);
  }
  return {start, end};
}

void wait_for_stream(int64_t stream) {
  State& s = state();
  s.host = std::max(s.host, s.streams[size_t(stream)].time);
  join(s.host_seen, s.streams[size_t(stream)].seen);
}

void wait_for_all_streams() {
  for (size_t i = 0; i < state().streams.size(); i++) wait_for_stream(int64_t(i));
}

void hold_host_for_stream(int64_t stream) {
  state().counters.host_syncs++;
  wait_for_stream(stream);
}

void hold_host_for_all_streams() {
  state().counters.host_syncs++;
  wait_for_all_streams();
}

void reset_clock() {
  State& s = state();
  wait_for_all_streams();
  for (StreamState& stream : s.streams) {
    stream.time = 0;
    join(stream.seen, s.host_seen);
  }
  settle_deferred_frees();
  s.host = 0;
  s.compute = s.h2d = s.d2h = Engine{};
  s.counters = Counters{};
  s.trace.clear();
  s.faults = Faults{};
  s.clock_generation++;
}

namespace {

struct ThreadTime {
  int depth = 0;
  bool started = false;  // whether left_at was taken while python_time was on
  double left_at = 0;
};

ThreadTime& thread_time() {
  thread_local ThreadTime instance;
  return instance;
}

double thread_cpu_seconds() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return double(now.tv_sec) + 1e-9 * double(now.tv_nsec);
}

}  // namespace

DeviceCall::DeviceCall() {
  ThreadTime& mine = thread_time();
  if (mine.depth++ > 0) return;
  State& s = state();
  if (s.config.python_time == 0) {
    mine.started = false;
    return;
  }
  if (mine.started) {
    const Lock lock(s.mutex);
    s.host += std::max(0.0, thread_cpu_seconds() - mine.left_at) * s.config.python_scale;
  }
}

bool DeviceCall::active() { return thread_time().depth > 0; }

DeviceCall::~DeviceCall() {
  ThreadTime& mine = thread_time();
  if (--mine.depth > 0 || state().config.python_time == 0) return;
  mine.started = true;
  mine.left_at = thread_cpu_seconds();
}

}  // namespace sim
