// Copies between host and device: their time, their log and their bytes.
#pragma once

#include "fallback.h"

namespace sim {

// The backend of Tensor.copy_ and Tensor.to when one side is a device tensor.
Tensor copy_from(const Tensor& source, const Tensor& target, bool non_blocking);
Tensor copy_from_and_resize(const Tensor& source, const Tensor& target);

// Tensor.item(): a blocking copy of one element to the host.
at::Scalar read_scalar(const Tensor& tensor);

}  // namespace sim
