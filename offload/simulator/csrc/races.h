// Finds accesses to device memory that no stream order, event or synchronisation puts in sequence.
//
// Happens-before is kept with one vector clock per stream, event and for the host. Each storage remembers, by byte
// range, the last write and the last read per stream; so two slots of one ring buffer may belong to two streams,
// while overlapping ranges are caught. A strided view counts as its whole span: columns of one matrix used on two
// streams are reported although no byte is shared. All host threads count as one. Races on *host* memory are
// not seen, because operations on CPU tensors do not pass through here: overwriting a pinned source before its copy
// is done goes unnoticed. Unregistering it is (pinned.h).
#pragma once

#include "state.h"

namespace sim {

struct Access {
  int64_t stream;
  uint64_t epoch;
};

// Which access touched each byte last. Ranges are half open and never overlap.
class RangeMap {
 public:
  template <class Visitor>
  void visit(size_t begin, size_t end, Visitor&& visitor) const {
    auto it = ranges_.upper_bound(begin);
    if (it != ranges_.begin()) --it;
    for (; it != ranges_.end() && it->first < end; ++it) {
      if (it->second.end > begin) visitor(it->second.access);
    }
  }

  template <class Visitor>
  void visit_all(Visitor&& visitor) const {
    for (const auto& entry : ranges_) visitor(entry.second.access);
  }

  template <class Predicate>
  void drop_if(Predicate&& predicate) {
    for (auto it = ranges_.begin(); it != ranges_.end();) {
      it = predicate(it->second.access) ? ranges_.erase(it) : std::next(it);
    }
  }

  void assign(size_t begin, size_t end, Access access);
  void erase(size_t begin, size_t end);
  size_t size() const { return ranges_.size(); }

 private:
  struct Range {
    size_t end;
    Access access;
  };
  void split(size_t position);
  std::map<size_t, Range> ranges_;
};

// What happened to the bytes of one storage.
class AccessHistory {
 public:
  // Checks one access against the history, reports races, then records it. `stream` must already have been charged
  // for the operation (its epoch is that operation).
  void touch(size_t begin, size_t end, int64_t stream, bool write, const char* op);

  // Latest end time of work on other streams that the memory must wait for before it can be used again; streams that
  // were not recorded and are not ordered are races. Never throws: it is called from a deleter.
  double wait_before_reuse(int64_t owner_stream, const std::vector<int64_t>& recorded, size_t bytes) const;

 private:
  void trim();
  RangeMap writes_;
  std::vector<std::pair<int64_t, RangeMap>> reads_;  // by stream
  size_t trim_at_ = 64;
};

// Counts a race without raising: for calls that must not throw.
void count_race(const std::string& message);

void join(VectorClock& into, const VectorClock& from);
bool ordered(const VectorClock& seen, const Access& access);

}  // namespace sim
