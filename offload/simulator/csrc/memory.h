// Device memory with a capacity and exact statistics.
#pragma once

#include "races.h"

namespace sim {

// One device storage. Its bytes are ordinary host memory, either allocated here or taken over from a CPU kernel.
struct Block {
  void* data;
  size_t bytes;
  size_t rounded;      // what it counts for
  bool mapped;         // from mmap: pages that nobody touches cost nothing
  c10::DataPtr owned;  // set when the memory was taken over
  int64_t serial;
  int64_t stream;  // the stream it was allocated on
  std::vector<int64_t> recorded;
  AccessHistory history;
};

// Takes `data` into device memory. Throws torch.OutOfMemoryError when the card would be full.
c10::DataPtr make_block(void* data, size_t bytes, c10::DataPtr owned);

// The block behind a storage; null if it has no memory or is not ours.
Block* block_of(const c10::StorageImpl* storage);

// Records an access to the bytes that a device tensor spans.
void touch(const Tensor& tensor, int64_t stream, bool write, const char* op);

// Gives back deferred frees whose virtual time has passed.
void settle_deferred_frees();

// Ghost storages are mapped, not allocated: the kernel provides pages on first touch, and nothing touches them.
void* map_memory(size_t bytes);

c10::DeviceAllocator* device_allocator();

}  // namespace sim
