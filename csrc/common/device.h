// What launch decisions ask of a device. Plain C++.
#pragma once

#include <cstddef>

namespace reasonkern {

struct Device {
  int arch;  // whose features the code on it has; 90 is sm_90
  int multiprocessors;
  // A block's, of which a multiprocessor has 1 KiB more: as much as the driver takes of each block.
  std::size_t shared_per_block;
};

}  // namespace reasonkern
