// A row of logits under a control, by one thread. `Row` is how its logits are read and written: in
// place, or beside a row that must stay as it is. It has
//
//   typedef … Value;             float, or double for float64 logits
//   Value get(int64_t id);       what was set, else the logit
//   void set(int64_t id, Value);
//   Value largest();             of the finite values, -inf where there are none
#pragma once

#include "control.h"

namespace reasonkern {
namespace modulation {

// Whether something finite is left without the banned set. Ids that the row writes to anyway are
// looked at first, then all: mostly the first one answers, and a cache line of its own costs.
template <class Row>
RK_HOST_DEVICE bool survives_ban(Row& row, const RowControl& c, const Sets& sets, int64_t vocab) {
  for (int part = 0; part < kAdders; ++part) {
    const int64_t set = c.sets[part];
    for (int64_t k = set < 0 ? 0 : sets.bounds[set]; set >= 0 && k < sets.bounds[set + 1]; ++k) {
      const int64_t id = sets.id(k);
      if (id < vocab && !(sets.member(k) >> c.ban & 1) && is_finite(row.get(id))) return true;
    }
  }
  int64_t k = sets.bounds[c.ban];
  for (int64_t id = 0; id < vocab; ++id) {
    if (k < sets.bounds[c.ban + 1] && sets.id(k) == id) {
      ++k;
    } else if (is_finite(row.get(id))) {
      return true;
    }
  }
  return false;
}

template <class Row>
RK_HOST_DEVICE void apply_sets(Row& row, const RowControl& c, const Sets& sets, int64_t vocab) {
  int64_t done = 0;
  if (c.ban >= 0 && survives_ban(row, c, sets, vocab)) {
    for (int64_t k = sets.bounds[c.ban]; k < sets.bounds[c.ban + 1]; ++k) {
      const int64_t id = sets.id(k);
      if (id < vocab) row.set(id, banned(row.get(id)));
    }
    done = int64_t(1) << c.ban;
  }
  for (int part = 0; part < kAdders; ++part) {
    if (c.sets[part] < 0 || (done >> c.sets[part] & 1)) continue;
    const int64_t own = int64_t(1) << c.sets[part];
    const double alone = added_to(c, own);  // most ids are in one set
    for (int64_t k = sets.bounds[c.sets[part]]; k < sets.bounds[c.sets[part] + 1]; ++k) {
      const int64_t id = sets.id(k), member = sets.member(k);
      if (id >= vocab || (member & done)) continue;
      row.set(id, with_added(row.get(id), member == own ? alone : added_to(c, member)));
    }
    done |= own;
  }
}

// The minimum of thinking: the mass of the end goes to the wait.
template <class Row>
RK_HOST_DEVICE void move_to_wait(Row& row, const RowControl& c, int64_t vocab, float temperature) {
  if (c.end < 0 || c.end >= vocab || c.wait >= vocab) return;
  const typename Row::Value wait = row.get(c.wait);
  if (!can_wait(wait)) return;
  row.set(c.wait, merged(wait, row.get(c.end), Divisor(temperature)));
  row.set(c.end, -typename Row::Value(kInfinity));
}

// What is done by id. The forced one, or -1; with one there is nothing else to do.
template <class Row>
RK_HOST_DEVICE int64_t apply_ids(Row& row, const RowControl& c, const Sets& sets, int64_t vocab) {
  if (c.force >= 0 && c.force < vocab && can_force(row.get(c.force))) {
    row.set(c.force, typename Row::Value(kForced));
    return c.force;
  }
  apply_sets(row, c, sets, vocab);
  return -1;
}

// What depends on the logits after that.
template <class Row>
RK_HOST_DEVICE void apply_rest(Row& row, const RowControl& c, int64_t vocab, float temperature,
                               bool dense) {
  move_to_wait(row, c, vocab, temperature);
  if (dense && c.soft >= 0 && c.soft < vocab) {
    row.set(c.soft, raised(row.get(c.soft), row.largest(), c.weight, c.margin));
  }
}

template <class Row>
RK_HOST_DEVICE void apply_control(Row& row, const RowControl& c, const Sets& sets, int64_t vocab,
                                  float temperature, bool dense) {
  if (apply_ids(row, c, sets, vocab) < 0) apply_rest(row, c, vocab, temperature, dense);
}

}  // namespace modulation
}  // namespace reasonkern
