// Page-locked host memory: what torch allocates through pin_memory, and what is registered where it lies.
#pragma once

#include "state.h"

#include <ATen/core/CachingHostAllocator.h>

namespace sim {

// Whether the byte is page-locked, as Tensor.is_pinned() asks.
bool is_pinned(const void* pointer);

// Whether one page-locked range holds all the bytes. Two ranges that touch are two: CUDA refuses a copy across them.
bool is_pinned(const void* pointer, size_t bytes);

// Notes that a copy from or to the range at `pointer` runs until `end`.
void use_pinned(const void* pointer, double end);

// As cudaHostRegister. False when the range overlaps a page-locked one, or the limit or a fault refuses it.
bool host_register(uintptr_t address, size_t bytes);

// False when no registered range begins there. Doing it under a running copy is a race.
bool host_unregister(uintptr_t address);

at::HostAllocator* pinned_allocator();

}  // namespace sim
