// Virtual time: one time line for the host and per stream, and three engines (compute, host to device, device to
// host), each of which does one thing at a time in the order in which work was queued.
#pragma once

#include "state.h"

namespace sim {

struct Interval {
  double start;
  double end;
};

// Queues work of `duration` seconds and returns when it runs.
Interval enqueue(int64_t stream, double duration, Engine& engine, const char* name, int64_t bytes, double flops);

// The host waits for a stream.
void wait_for_stream(int64_t stream);
void wait_for_all_streams();

// The same for a call that a program makes: counted in host_syncs.
void hold_host_for_stream(int64_t stream);
void hold_host_for_all_streams();

// Restarts time at zero and disarms faults. Orders everything as a synchronisation does, but is not counted as one.
void reset_clock();

// Marks the time that the calling thread spends inside the simulator. With the option python_time, the thread's CPU
// time between two such calls (Python, the library, the model's own code) is added to the host's virtual time;
// the CPU kernels that stand in for the device are not. Nested calls count once.
class DeviceCall {
 public:
  DeviceCall();
  ~DeviceCall();
  // Whether the calling thread is inside one: then CPU kernels stand in for the device.
  static bool active();
  DeviceCall(const DeviceCall&) = delete;
  DeviceCall& operator=(const DeviceCall&) = delete;
};

}  // namespace sim
