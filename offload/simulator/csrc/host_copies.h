// Copies between CPU tensors, of which those above the ghost limit are only accounted for.
#pragma once

#include "state.h"

namespace sim {

// Tensor.copy_ for a CPU target: torch's own, unless ghost mode is on and one side is larger than its limit. Then no
// byte is touched, so that weights of real size can be pinned, cloned and converted on machines that could not hold
// them twice, and the host clock advances by the larger side over the rate host_memcpy.
Tensor& copy_on_host(Tensor& target, const Tensor& source, bool non_blocking);

}  // namespace sim
