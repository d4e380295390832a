#include "state.h"

namespace sim {

State& state() {
  // Never destroyed: tensors may outlive any static object at interpreter exit.
  static State* instance = new State;
  return *instance;
}

int64_t& current_stream() {
  thread_local int64_t stream = 0;
  return stream;
}

}  // namespace sim
