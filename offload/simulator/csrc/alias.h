// Zero-copy passage between device tensors and the CPU tensors that kernels run on.
#pragma once

#include "memory.h"

#include <unordered_map>

namespace sim {

// A CPU tensor over the same bytes, which keeps the device storage alive.
Tensor host_alias(const Tensor& device);

// A tensor of the same shape and strides without data.
Tensor meta_like(const Tensor& tensor);

// The device storage that an alias stands for, or null if the storage is not an alias.
c10::StorageImpl* aliased_storage(const c10::Storage& host);

// The device storages made so far for the fresh host buffers of one call, so that outputs sharing one go on sharing it.
using Adopted = std::unordered_map<c10::StorageImpl*, c10::Storage>;

// The device storage for a host one: what it aliases, or the host buffer itself taken over without a copy.
c10::Storage device_storage_of(const c10::Storage& host, Adopted& adopted);

// A device tensor on `storage` with the shape, strides and dtype of `like`.
Tensor device_tensor(c10::Storage storage, const Tensor& like);

c10::Storage empty_device_storage();

}  // namespace sim
