// What goes on beside the threads: bulk copies, and mailboxes between the blocks of a cluster.
// Nothing lands before the wait that needs it, as late as the hardware may.
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

inline void expect_bytes(void* state, unsigned bytes) {
  if (std::exchange(mailbox(state)->announced, 1)) fail("expect_bytes: twice in one turn");
  mailbox(state)->missing += static_cast<int>(bytes);
}

inline void send(void* to, void* state, unsigned rank, const void* value, std::size_t size) {
  const auto* bytes = static_cast<const unsigned char*>(value);
  to = cluster_map(aligned(to, 16, "send"), rank);
  machine.letters[cluster_map(state, rank)].push_back({to, {bytes, bytes + size}});
}

inline void copy_bulk(void* shared, const void* global, unsigned bytes, void* state) {
  if (bytes % 16 != 0) fail("copy_bulk: not whole vectors");
  const auto* from = static_cast<const unsigned char*>(aligned(global, 16, "copy_bulk"));
  void* to = cluster_map(aligned(shared, 16, "copy_bulk"), cluster_rank());
  machine.letters[state].push_back({to, {from, from + bytes}});
}

inline void wait_for_turn(void* state, unsigned turn) {
  MailboxState* box = mailbox(state);
  while (box->turn == static_cast<std::int16_t>(turn)) {
    for (const Letter& letter : std::exchange(machine.letters[state], {})) {
      std::memcpy(letter.to, letter.bytes.data(), letter.bytes.size());
      box->missing -= static_cast<int>(letter.bytes.size());
    }
    if (box->announced && box->missing == 0) {
      box->announced = 0;
      ++box->turn;
    } else {
      yield();
    }
  }
}

}  // namespace cuda_sim
