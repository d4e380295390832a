#include "races.h"

#include <algorithm>

namespace sim {

namespace {

// Only reached by storages cut into very many pieces that are in flight all at once.
constexpr size_t kMaxRanges = size_t(1) << 16;

void report_race(const std::string& message) {
  count_race(message);
  TORCH_CHECK(state().config.strict_races == 0, "simulated accelerator: race: ", message);
}

}  // namespace

void count_race(const std::string& message) {
  state().races++;
  state().last_race = message;
}

void join(VectorClock& into, const VectorClock& from) {
  if (into.size() < from.size()) into.resize(from.size());
  for (size_t i = 0; i < from.size(); i++) into[i] = std::max(into[i], from[i]);
}

bool ordered(const VectorClock& seen, const Access& access) {
  const auto index = size_t(access.stream);
  return index < seen.size() && seen[index] >= access.epoch;
}

void RangeMap::split(size_t position) {
  auto it = ranges_.lower_bound(position);
  if (it == ranges_.begin()) return;
  --it;
  if (it->second.end <= position) return;
  const Range right = it->second;
  it->second.end = position;
  ranges_.emplace(position, right);
}

void RangeMap::erase(size_t begin, size_t end) {
  split(begin);
  split(end);
  ranges_.erase(ranges_.lower_bound(begin), ranges_.lower_bound(end));
}

void RangeMap::assign(size_t begin, size_t end, Access access) {
  auto it = ranges_.find(begin);
  if (it != ranges_.end() && it->second.end == end) {  // the usual case: the same tensor again
    it->second.access = access;
    return;
  }
  erase(begin, end);
  ranges_.emplace(begin, Range{end, access});
}

void AccessHistory::touch(size_t begin, size_t end, int64_t stream, bool write, const char* op) {
  if (begin >= end) return;
  const StreamState& own = state().streams[size_t(stream)];
  auto unordered = [&](const Access& earlier) { return earlier.stream != stream && !ordered(own.seen, earlier); };

  writes_.visit(begin, end, [&](const Access& earlier) {
    if (!unordered(earlier)) return;
    report_race(c10::str(op, " on stream ", stream, write ? " writes" : " reads", " memory written on stream ",
                         earlier.stream, " without a wait"));
  });
  if (write) {
    for (const auto& [reader, ranges] : reads_) {
      ranges.visit(begin, end, [&](const Access& earlier) {
        if (!unordered(earlier)) return;
        report_race(c10::str(op, " on stream ", stream, " overwrites memory still read on stream ", earlier.stream));
      });
    }
    // Whoever is ordered after this write is ordered after everything it replaced.
    for (auto& entry : reads_) entry.second.erase(begin, end);
    writes_.assign(begin, end, {stream, own.epoch});
  } else {
    auto it = std::find_if(reads_.begin(), reads_.end(), [&](const auto& entry) { return entry.first == stream; });
    if (it == reads_.end()) it = reads_.emplace(reads_.end(), stream, RangeMap{});
    it->second.assign(begin, end, {stream, own.epoch});
  }
  trim();
}

void AccessHistory::trim() {
  size_t total = writes_.size();
  for (const auto& entry : reads_) total += entry.second.size();
  if (total < trim_at_) return;
  // All later work is queued by the host, so what the host has seen can never race again.
  auto settled = [](const Access& access) { return ordered(state().host_seen, access); };
  writes_.drop_if(settled);
  total = writes_.size();
  for (auto& entry : reads_) {
    entry.second.drop_if(settled);
    total += entry.second.size();
  }
  if (total >= kMaxRanges) {  // forget rather than grow for ever: a race may be missed, none is invented
    writes_ = {};
    reads_.clear();
    total = 0;
  }
  trim_at_ = std::max<size_t>(64, 2 * total);
}

double AccessHistory::wait_before_reuse(int64_t owner_stream, const std::vector<int64_t>& recorded,
                                        size_t bytes) const {
  State& s = state();
  const StreamState& owner = s.streams[size_t(owner_stream)];
  double until = 0;
  std::vector<int64_t> reported;  // one report per stream, however many ranges it used
  auto check = [&](const Access& access) {
    if (access.stream == owner_stream || ordered(owner.seen, access) || ordered(s.host_seen, access)) return;
    if (std::find(recorded.begin(), recorded.end(), access.stream) != recorded.end()) {
      until = std::max(until, s.streams[size_t(access.stream)].time);
      return;
    }
    if (std::find(reported.begin(), reported.end(), access.stream) != reported.end()) return;
    reported.push_back(access.stream);
    count_race(c10::str("block of ", bytes, " bytes freed while used on stream ", access.stream, " (allocated on ",
                        owner_stream, ", no record_stream)"));
  };
  writes_.visit_all(check);
  for (const auto& entry : reads_) entry.second.visit_all(check);
  return until;
}

}  // namespace sim
