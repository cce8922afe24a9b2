// A warp in a block of a compiled kernel, and what its instructions do (instructions.py).
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

constexpr int LANES = 32, MANY = INT32_MAX;
constexpr uint32_t ALL = ~0u;

struct Warp;
struct Op {
  void (*run)(Warp&, const Op&);
  int64_t imm[2];   // offsets of addresses, the target of a branch
  int32_t at[12];   // of the operands' registers in a warp's file, where constants lie too
  int32_t guard;    // of the predicate, -1: none
  int32_t negated;  // whether the guard is
};

[[noreturn]] inline void fail(const std::string& text) { throw std::runtime_error(text); }

// ---- numbers

template <class To, class From>
To bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}

struct half {
  _Float16 x;
  half(float y) : x(y == y ? _Float16(y) : bits<_Float16>(uint16_t(0x7FFF))) {}
  operator float() const { return x; }
};

struct bfloat {
  uint16_t x;
  bfloat(float y) : x(0x7FFF) {
    const uint32_t b = bits<uint32_t>(y);
    if (y == y) x = (b + 0x7FFF + (b >> 16 & 1)) >> 16;
  }
  operator float() const { return bits<float>(uint32_t(x) << 16); }
};

template <class T>
constexpr uint32_t SIZE = 8 * sizeof(T);

template <class T>
T result(T x) {  // of float32's arithmetic a GPU has one NaN; x86 has others
  if constexpr (std::is_same_v<T, float>) return x == x ? x : bits<float>(0x7FFFFFFF);
  return x;
}

template <class T>
T flushed(T x) {
  return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(T(0), x) : x;
}

template <class T>
T least(T a, T b) {
  if constexpr (std::is_floating_point_v<T>)
    if (a != a || (a == b && std::signbit(b))) return b;
  return b < a ? b : a;
}

template <class T>
T most(T a, T b) {
  if constexpr (std::is_floating_point_v<T>)
    if (a != a || (a == b && std::signbit(a))) return b;
  return b > a ? b : a;
}

template <class T>
T high(T a, T b) {
  if constexpr (std::is_signed_v<T>) return T(__int128(a) * b >> SIZE<T>);
  return T((unsigned __int128)(a)*b >> SIZE<T>);
}

template <class T>
T left(T a, uint32_t n) {
  return n < SIZE<T> ? T(a << n) : T(0);
}

template <class T>
T right(T a, uint32_t n) {
  return n < SIZE<T> ? T(a >> n) : T(a < 0 ? -1 : 0);
}

template <class T>
T field(T a, uint32_t from, uint32_t length) {
  if (!length) return 0;
  if (from + length >= SIZE<T>) return right(a, from);
  return right(left(a, SIZE<T> - from - length), SIZE<T> - length);
}

inline uint32_t permuted(uint32_t a, uint32_t b, uint32_t choice) {
  const uint64_t both = uint64_t(b) << 32 | a;
  uint32_t out = 0;
  for (int k = 0; k < 4; ++k) {
    const uint32_t pick = choice >> (4 * k), byte = both >> (8 * (pick & 7)) & 255;
    out |= (pick & 8 ? (byte & 128 ? 255u : 0u) : byte) << (8 * k);
  }
  return out;
}

inline double reciprocal(double x) {  // its low 32 bits are 0
  return bits<double>(bits<uint64_t>(flushed(1 / flushed(x))) & 0xFFFFFFFF00000000);
}

// To the nearest; `mode` n, z, m or p: to an integer as PTX's rni, rzi, rmi and rpi.
template <class To, char mode, class From>
To converted(From a) {
  if constexpr (mode == 0) {
    static_assert(!std::is_integral_v<To> || std::is_integral_v<From>);
    static_assert(!std::is_class_v<To> || std::is_class_v<From> || std::is_same_v<From, float>,
                  "this conversion would round twice");
    if constexpr (std::is_class_v<From>) return To(result(float(a)));
    return result(To(a));
  } else {
    const From x = mode == 'n'   ? std::nearbyint(a)
                   : mode == 'z' ? std::trunc(a)
                   : mode == 'm' ? std::floor(a)
                                 : std::ceil(a);
    if constexpr (std::is_floating_point_v<To>) return result(To(x));
    using Limits = std::numeric_limits<To>;
    const bool wide = std::is_same_v<From, double> || sizeof(To) == 8;
    if (a != a) return wide ? To(uint64_t(1) << (SIZE<To> - 1)) : To(0);
    if (x >= std::ldexp(From(1), Limits::digits)) return Limits::max();
    return x < From(Limits::min()) ? Limits::min() : To(x);
  }
}

// ---- a warp

struct Byte {  // of shared memory: its last accesses, and how many barriers came before them
  int32_t writer = -1, write_barrier = 0, write_sync = 0;  // a thread; its warp's bar.warp.sync
  int32_t reader = -1, read_barrier = 0;                   // a warp, or MANY
};

struct Range {
  uint64_t begin, end;
};

struct Block {
  std::vector<uint8_t> shared;
  std::vector<Byte> bytes;
  const Range* tensors;
  int tensor_count, barrier = 0;
  int64_t steps = 0;
};

struct Copy {  // asynchronous
  uint32_t to;
  int lane;
  uint8_t bytes[16];
  uint32_t size;
};

struct Warp {
  Block* block;
  char* file;  // of registers: 32 values each
  int index, pc = 0, next = INT32_MAX, sync = 0;
  uint32_t mask = ALL, live = ALL;
  bool waits = false;
  int lane_pc[LANES];
  std::vector<std::vector<Copy>> copies{1};  // the last group is open

  template <class T>
  T* at(int offset) {
    return reinterpret_cast<T*>(file + offset);
  }

  template <class F>
  void each(F f) {
    if (mask == ALL) {
#pragma GCC ivdep
      for (int l = 0; l < LANES; ++l) f(l);
    } else {
      for (int l = 0; l < LANES; ++l)
        if (mask >> l & 1) f(l);
    }
  }

  void together() {
    if (mask != ALL) fail("not all lanes of the warp are here");
  }

  void exchange(int members) {
    together();
    for (int l = 0; l < LANES; ++l)
      if (at<uint32_t>(members)[l] != ALL) fail("an exchange among some lanes is not known");
  }

  uint8_t* global(uint64_t address, uint32_t size) {
    if (address % size) fail("a misaligned address");
    for (int k = 0; k < block->tensor_count; ++k)
      if (address >= block->tensors[k].begin && address + size <= block->tensors[k].end)
        return reinterpret_cast<uint8_t*>(address);
    fail("an address outside the tensors of the launch");
  }

  void read_global(uint64_t address, void* to, uint32_t size, int) {
    std::memcpy(to, global(address, size), size);
  }

  void write_global(uint64_t address, const void* from, uint32_t size, int) {
    std::memcpy(global(address, size), from, size);
  }

  uint32_t shared(uint32_t address, uint32_t size) {
    if (address % size) fail("a misaligned address of shared memory");
    if (address + size > block->shared.size()) fail("an address outside the shared memory");
    return address;
  }

  bool written_before(const Byte& byte, int lane) {
    const int thread = index * LANES + lane;
    if (byte.write_barrier < block->barrier || byte.writer < 0 || byte.writer == thread)
      return true;
    return byte.writer / LANES == index && byte.write_sync < sync;
  }

  void read_shared(uint32_t address, void* to, uint32_t size, int lane) {
    std::memcpy(to, &block->shared[shared(address, size)], size);
    for (uint32_t k = address; k < address + size; ++k) {
      Byte& byte = block->bytes[k];
      if (byte.writer < 0) fail("shared memory that nothing wrote");
      if (!written_before(byte, lane)) fail("a race: another thread wrote this");
      const bool alone = byte.read_barrier < block->barrier || byte.reader < 0;
      byte.reader = alone || byte.reader == index ? index : MANY;
      byte.read_barrier = block->barrier;
    }
  }

  void write_shared(uint32_t address, const void* from, uint32_t size, int lane) {
    uint8_t* to = &block->shared[shared(address, size)];
    for (uint32_t k = 0; k < size; ++k) {
      Byte& byte = block->bytes[address + k];
      const uint8_t value = static_cast<const uint8_t*>(from)[k];
      if (to[k] != value && !written_before(byte, lane)) fail("a race: another thread wrote this");
      if (byte.reader >= 0 && byte.reader != index && byte.read_barrier == block->barrier)
        fail("a race: another warp reads this");
      byte.writer = index * LANES + lane;
      byte.write_barrier = block->barrier, byte.write_sync = sync;
      to[k] = value;
    }
  }
};

// ---- instructions that move values between registers, lanes and memory

template <class T, class Part, int n>
void pack(Warp& w, const Op& o) {
  w.each([&](int l) {
    T x = 0;
    for (int k = 0; k < n; ++k) x |= T(w.at<Part>(o.at[k + 1])[l]) << (k * SIZE<Part>);
    w.at<T>(o.at[0])[l] = x;
  });
}

template <class T, class Part, int n>
void unpack(Warp& w, const Op& o) {
  w.each([&](int l) {
    const T x = w.at<T>(o.at[n])[l];
    for (int k = 0; k < n; ++k) w.at<Part>(o.at[k])[l] = x >> (k * SIZE<Part>);
  });
}

template <auto read, class Address, class Held, class T, int n>
void load(Warp& w, const Op& o) {
  w.each([&](int l) {
    T x[n];
    (w.*read)(w.at<Address>(o.at[n])[l] + o.imm[0], x, sizeof(x), l);
    for (int k = 0; k < n; ++k) w.at<Held>(o.at[k])[l] = x[k];
  });
}

template <auto write, class Address, class Held, class T, int n>
void store(Warp& w, const Op& o) {
  w.each([&](int l) {
    T x[n];
    for (int k = 0; k < n; ++k) x[k] = w.at<Held>(o.at[k])[l];
    (w.*write)(w.at<Address>(o.at[n])[l] + o.imm[0], x, sizeof(x), l);
  });
}

template <auto access, int n>  // n of 8x8 elements of 16 bits; lane l has two of row l / 4
void matrices(Warp& w, const Op& o) {
  w.together();
  uint32_t row[LANES];
  for (int l = 0; l < LANES; ++l) row[l] = w.at<uint32_t>(o.at[n])[l] + o.imm[0];
  for (int k = 0; k < n; ++k)
    for (int l = 0; l < LANES; ++l) {
      const uint32_t at = w.shared(row[8 * k + l / 4], 16) + l % 4 * 4;
      (w.*access)(at, w.at<uint32_t>(o.at[k]) + l, 4, l);
    }
}

template <class T>
void atomic_add(Warp& w, const Op& o, int outputs) {
  w.each([&](int l) {
    T* p = reinterpret_cast<T*>(w.global(w.at<uint64_t>(o.at[outputs])[l] + o.imm[0], sizeof(T)));
    const T x = w.at<T>(o.at[outputs + 1])[l];
    if (outputs) w.at<T>(o.at[0])[l] = *p;
    *p += x;
  });
}

template <char mode>  // up, down, bfly, idx
void shuffle(Warp& w, const Op& o) {
  w.exchange(o.at[4]);
  const auto *a = w.at<uint32_t>(o.at[1]), *by = w.at<uint32_t>(o.at[2]);
  const auto* limit = w.at<uint32_t>(o.at[3]);
  uint32_t x[LANES];
  for (int l = 0; l < LANES; ++l) {
    const int n = by[l] & 31, segment = limit[l] >> 8 & 31;
    const int last = (l & segment) | (limit[l] & 31 & ~segment);
    const int from = mode == 'u'   ? l - n
                     : mode == 'd' ? l + n
                     : mode == 'b' ? l ^ n
                                   : (l & segment) | (n & ~segment);
    x[l] = a[(mode == 'u' ? from >= last : from <= last) ? from : l];
  }
  std::memcpy(w.at<uint32_t>(o.at[0]), x, sizeof(x));
}

template <class T, class F>
void reduce(Warp& w, const Op& o, F f) {
  w.exchange(o.at[2]);
  const T* x = w.at<T>(o.at[1]);
  T total = x[0];
  for (int l = 1; l < LANES; ++l) total = f(total, x[l]);
  std::fill_n(w.at<T>(o.at[0]), LANES, total);
}

inline void start_copies(Warp& w, const Op& o, uint32_t size) {
  w.each([&](int l) {
    Copy copy{uint32_t(w.at<uint32_t>(o.at[0])[l] + o.imm[0]), l, {}, size};
    const uint32_t used = w.at<uint32_t>(o.at[2])[l];
    if (used) w.read_global(w.at<uint64_t>(o.at[1])[l] + o.imm[1], copy.bytes, used, l);
    w.copies.back().push_back(copy);
  });
}

inline void wait_for_copies(Warp& w, size_t open) {
  for (; w.copies.size() > open + 1; w.copies.erase(w.copies.begin()))
    for (const Copy& copy : w.copies.front())
      w.write_shared(copy.to, copy.bytes, copy.size, copy.lane);
}
