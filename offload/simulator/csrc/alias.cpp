#include "alias.h"

namespace sim {

namespace {

void release_device_storage(void* context) {
  c10::raw::intrusive_ptr::decref(static_cast<c10::StorageImpl*>(context));
}

void release_host_storage(void* context) { delete static_cast<c10::Storage*>(context); }

c10::Storage make_storage(size_t bytes, c10::DataPtr data, c10::Allocator* allocator) {
  return c10::Storage(c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), bytes,
                                                            std::move(data), allocator, /*resizable=*/true));
}

Tensor make_tensor(c10::Storage storage, c10::DispatchKey key, const Tensor& like) {
  Tensor result =
      at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
  auto* impl = result.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
  return result;
}

}  // namespace

Tensor host_alias(const Tensor& device) {
  auto* storage = device.storage().unsafeGetStorageImpl();
  c10::raw::intrusive_ptr::incref(storage);
  c10::DataPtr data(storage->mutable_data(), storage, &release_device_storage, c10::Device(at::kCPU));
  return make_tensor(make_storage(storage->nbytes(), std::move(data), c10::GetAllocator(at::kCPU)),
                     c10::DispatchKey::CPU, device);
}

Tensor meta_like(const Tensor& tensor) {
  Tensor result = at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options().device(at::kMeta));
  if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) result.unsafeGetTensorImpl()->set_wrapped_number(true);
  return result;
}

c10::StorageImpl* aliased_storage(const c10::Storage& host) {
  const c10::DataPtr& data = host.unsafeGetStorageImpl()->data_ptr();
  if (data.get_deleter() != &release_device_storage) return nullptr;
  return static_cast<c10::StorageImpl*>(data.get_context());
}

c10::Storage device_storage_of(const c10::Storage& host, Adopted& adopted) {
  if (auto* original = aliased_storage(host)) {
    return c10::Storage(c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(original));
  }
  auto* impl = host.unsafeGetStorageImpl();
  const auto known = adopted.find(impl);
  if (known != adopted.end()) return known->second;
  if (host.nbytes() == 0) return adopted[impl] = empty_device_storage();
  void* data = impl->mutable_data();
  c10::DataPtr owned(data, new c10::Storage(host), &release_host_storage, c10::Device(at::kCPU));
  c10::DataPtr block = make_block(data, host.nbytes(), std::move(owned));
  return adopted[impl] = make_storage(host.nbytes(), std::move(block), device_allocator());
}

Tensor device_tensor(c10::Storage storage, const Tensor& like) {
  return make_tensor(std::move(storage), c10::DispatchKey::PrivateUse1, like);
}

c10::Storage empty_device_storage() {
  return make_storage(0, device_allocator()->allocate(0), device_allocator());
}

}  // namespace sim
