// Division of doubles that are known to be in range. The device's own tests operands and result and
// calls a function for what is out of range: two of them, or what stands beside one, wait for one
// another. Here is its way for what is in range, to the same bits, the divisor's part first.
#pragma once

#include "host_device.h"

#if defined(CUDA_SIM)
#include "cuda_sim.h"
#endif
#if defined(__CUDA_ARCH__) || defined(CUDA_SIM)
#define RK_DIVIDES 1
#else
#define RK_DIVIDES 0
#endif

namespace reasonkern {

// A y from 2^-1000 to 2^1000.
struct Divisor {
  double value;
  double reciprocal;  // on a device: to the last place or so

  RK_HOST_DEVICE explicit Divisor(double y);
};

// x / y, rounded once; |x| and |x / y| from 2^-900 on, or x = 0. Where x / y is beyond the doubles,
// NaN on a device.
RK_HOST_DEVICE double quotient(double x, const Divisor& y);

#if RK_DIVIDES
RK_HOST_DEVICE Divisor::Divisor(double y) : value(y) {
#if defined(CUDA_SIM)
  double r = cuda_sim::rough(1 / y);
#else
  double r;
  asm("rcp.approx.ftz.f64 %0, %1;" : "=d"(r) : "d"(y));
#endif
  const double error = __fma_rn(-y, r, 1.0);
  r = __fma_rn(r, __fma_rn(error, error, error), r);
  reciprocal = __fma_rn(r, __fma_rn(-y, r, 1.0), r);
}
RK_HOST_DEVICE double quotient(double x, const Divisor& y) {
  const double q = product(x, y.reciprocal);
  return __fma_rn(y.reciprocal, __fma_rn(-y.value, q, x), q);
}
#else
RK_HOST_DEVICE Divisor::Divisor(double y) : value(y), reciprocal(0) {}
RK_HOST_DEVICE double quotient(double x, const Divisor& y) { return x / y.value; }
#endif

}  // namespace reasonkern
