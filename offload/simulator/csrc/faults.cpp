#include "faults.h"

namespace sim {

bool strikes(Fault& fault) {
  if (fault.after < 0 || fault.after-- > 0) return false;
  state().counters.faults++;
  return true;
}

}  // namespace sim
