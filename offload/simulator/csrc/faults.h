// Failures on request: a slow copy, a refused allocation, a refused page-lock.
#pragma once

#include "state.h"

namespace sim {

// Counts one case and tells whether it is the one that the fault was armed for.
bool strikes(Fault& fault);

}  // namespace sim
