// Elementary functions in full float precision on both sides, whatever the compiler's fast-math flags.
#pragma once

#include "minicache/platform.cuh"

namespace minicache {

constexpr float kInfinity = __builtin_huge_valf();

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

MC_HD float sine_of(float angle) {
#if MC_ON_DEVICE
  return sinf(angle);
#else
  return __builtin_sinf(angle);
#endif
}

}  // namespace minicache
