// What torch asks of a device besides kernels: generators, hooks, streams and events.
#pragma once

#include "state.h"

#include <ATen/core/Generator.h>

namespace sim {

at::Generator& default_generator();

// The CPU generator inside a device generator: the same seed gives the same numbers as on the CPU.
// Throws for a generator of another device.
at::Generator host_generator(const at::Generator& generator);

// Registers hooks and the pinned allocator with torch, once.
void register_runtime();

}  // namespace sim
