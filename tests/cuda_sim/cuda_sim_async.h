// What goes on beside the threads: bulk copies, and mailboxes between the blocks of a cluster. What
// is on its way lands before the wait that needs it: as late as the hardware may let it where
// threads run in forward order, which shows a read without a wait; at once in reverse order, which
// shows a write over what is still being read; either way in random order.
#pragma once

namespace cuda_sim {

// The 8 bytes of a mailbox: bytes still to come, negative while they come unannounced.
struct MailboxState {
  std::int32_t missing;
  std::int16_t announced, turn;
};

inline MailboxState* mailbox(void* state) {
  return static_cast<MailboxState*>(aligned(state, 8, "mailbox"));
}
inline void open_mailbox(void* state) { *mailbox(state) = {}; }

inline void change_missing(MailboxState* box, int bytes) {
  box->missing += bytes;
  if (box->announced && box->missing == 0) box->announced = 0, ++box->turn;
}

inline void expect_bytes(void* state, unsigned bytes) {
  MailboxState* box = mailbox(state);
  if (std::exchange(box->announced, 1)) fail("expect_bytes: twice in one turn");
  change_missing(box, static_cast<int>(bytes));
}

inline void land(void* state, const Letter& letter) {
  std::memcpy(letter.to, letter.bytes.data(), letter.bytes.size());
  change_missing(mailbox(state), -static_cast<int>(letter.bytes.size()));
}

inline bool lands_at_once() {
  return machine.order == Order::random ? machine.random() % 2 : machine.order == Order::reverse;
}

inline void post(void* state, const Letter& letter) {
  if (lands_at_once()) return land(state, letter);
  machine.letters[state].push_back(letter);
}

inline void send(void* to, void* state, unsigned rank, const void* value, std::size_t size) {
  const auto* bytes = static_cast<const unsigned char*>(value);
  to = cluster_map(aligned(to, 16, "send"), rank);
  post(cluster_map(state, rank), {to, {bytes, bytes + size}});
}

inline void copy_bulk(void* shared, const void* global, unsigned bytes, void* state) {
  if (bytes % 16 != 0) fail("copy_bulk: not whole vectors");
  const auto* from = static_cast<const unsigned char*>(aligned(global, 16, "copy_bulk"));
  void* to = cluster_map(aligned(shared, 16, "copy_bulk"), cluster_rank());
  post(state, {to, {from, from + bytes}});
}

// Copies without a mailbox: the thread that started them waits for them.
inline void copy_async(void* shared, const void* global) {
  const auto* from = static_cast<const unsigned char*>(aligned(global, 16, "copy_async"));
  void* to = aligned(shared, 16, "copy_async");
  if (lands_at_once()) {
    std::memcpy(to, from, 16);
  } else {
    machine.letters[&self()].push_back({to, {from, from + 16}});
  }
}

inline void wait_for_copies() {
  for (const Letter& letter : std::exchange(machine.letters[&self()], {})) {
    std::memcpy(letter.to, letter.bytes.data(), letter.bytes.size());
  }
}

// The hardware knows whether the turn under way is an even one, no more: it lets a wait pass while
// the turn before is not over, and not any more when the turn behind is over, too.
inline void wait_for_turn(void* state, unsigned turn) {
  MailboxState* box = mailbox(state);
  while (true) {
    const int since = static_cast<std::int16_t>(box->turn - static_cast<std::int16_t>(turn));
    if (since == 1) return;
    if (since != 0) fail("wait_for_turn: neither the turn under way nor the one before");
    for (const Letter& letter : std::exchange(machine.letters[state], {})) land(state, letter);
    if (box->turn == static_cast<std::int16_t>(turn)) yield();
  }
}

}  // namespace cuda_sim
