// Elementary functions in float precision on both sides, whatever the compiler's fast-math flags.
#pragma once

#include "minicache/platform.cuh"

namespace minicache {

constexpr float kInfinity = __builtin_huge_valf();
constexpr float kLog2e = 1.44269504088896f;

MC_HD float square_root(float x) {
#if MC_ON_DEVICE
  return __fsqrt_rn(x);
#else
  return __builtin_sqrtf(x);
#endif
}

MC_HD float arc_cosine(float x) {
#if MC_ON_DEVICE
  return acosf(x);
#else
  return __builtin_acosf(x);
#endif
}

MC_HD void sine_and_cosine(float angle, float& sine, float& cosine) {
#if MC_ON_DEVICE
  sincosf(angle, &sine, &cosine);
#else
  sine = __builtin_sinf(angle);
  cosine = __builtin_cosf(angle);
#endif
}

// The same within 1e-6, of angles below 2^24.
MC_HD void sine_and_cosine_approximate(float angle, float& sine, float& cosine) {
#if MC_ON_DEVICE
  // Whole turns come off first, those of 2 pi rounded without an error: instructions take -pi to pi.
  constexpr float kTurn = 6.28318548f, kRest = -1.74845553e-7f, kRounder = 12582912.0f;
  const float turns = __fadd_rn(__fmaf_rn(angle, 0.159154943f, kRounder), -kRounder);
  const float rest = __fmaf_rn(-turns, kRest, __fmaf_rn(-turns, kTurn, angle));
  asm("sin.approx.ftz.f32 %0, %1;" : "=f"(sine) : "f"(rest));
  asm("cos.approx.ftz.f32 %0, %1;" : "=f"(cosine) : "f"(rest));
#else
  sine_and_cosine(angle, sine, cosine);
#endif
}

MC_HD float sine_of(float angle) {
#if MC_ON_DEVICE
  return sinf(angle);
#else
  return __builtin_sinf(angle);
#endif
}

// 2^x; exactly 0 for -infinity.
MC_HD float exp2_of(float x) {
#if MC_ON_DEVICE
  return exp2f(x);
#else
  return __builtin_exp2f(x);
#endif
}

// 2^x within 2 ulp, subnormal results as zero; 2^-infinity is 0.
MC_HD float exp2_approximate(float x) {
#if MC_ON_DEVICE
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return __builtin_exp2f(x);
#endif
}

// 1 / x within 1 ulp, of an x whose reciprocal is a normal number.
MC_HD float reciprocal_approximate(float x) {
#if MC_ON_DEVICE
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return 1.0f / x;
#endif
}

// cap * tanh(x / cap) of a finite x, within 1e-6 cap; cap 0: not to be called.
struct SoftCap {
  float cap, rate;

  MC_HD explicit SoftCap(float largest) : cap(largest), rate(largest > 0.0f ? -2.0f * kLog2e / largest : 0.0f) {}
  MC_HD float operator()(float x) const {
    const float power = exp2_approximate((x < 0.0f ? -x : x) * rate);
    const float y = cap * (1.0f - power) * reciprocal_approximate(1.0f + power);
    return x < 0.0f ? -y : y;
  }
};

}  // namespace minicache
