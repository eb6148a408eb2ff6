// What differs between a GPU and the host build of the same kernels: annotations, 16-bit floats, bit casts.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define MC_HD __host__ __device__ __forceinline__
#else
#define MC_HD inline __attribute__((always_inline))
#endif

// Only in device code: the host compiler does not know the pragma.
#if defined(__CUDA_ARCH__)
#define MC_UNROLL _Pragma("unroll")
#define MC_UNROLL_TWICE _Pragma("unroll 2")
#define MC_NO_UNROLL _Pragma("unroll 1")
#else
#define MC_UNROLL
#define MC_UNROLL_TWICE
#define MC_NO_UNROLL
#endif

#if defined(__CUDA_ARCH__)
#define MC_ON_DEVICE 1
#else
#define MC_ON_DEVICE 0
#endif

namespace minicache {

// What is compiled for, as in 900; on the host 0.
#if defined(__CUDA_ARCH__)
constexpr int kArch = __CUDA_ARCH__;
#else
constexpr int kArch = 0;
#endif

// IEEE binary16 and bfloat16 as stored; arithmetic is done in float.
struct Half {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};

template <class To, class From>
MC_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To to;
#if MC_ON_DEVICE
  memcpy(&to, &from, sizeof(To));
#else
  std::memcpy(&to, &from, sizeof(To));
#endif
  return to;
}

MC_HD float to_float(float x) { return x; }

MC_HD float to_float(BFloat16 x) { return bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16); }

MC_HD float to_float(Half x) {
#if MC_ON_DEVICE
  return __half2float(__ushort_as_half(x.bits));
#elif defined(__FLT16_MAX__)
  return static_cast<float>(bit_cast<_Float16>(x.bits));
#else
  const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000u) << 16;
  const std::uint32_t rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
  // Scaling by 2^112 restores the exponent bias and normalises subnormal numbers exactly.
  return bit_cast<float>(sign | bit_cast<std::uint32_t>(bit_cast<float>(rest << 13) * 0x1p112f));
#endif
}

template <class T>
MC_HD T from_float(float x);

template <>
MC_HD float from_float<float>(float x) {
  return x;
}

// Round half to even; NaN stays NaN.
template <>
MC_HD BFloat16 from_float<BFloat16>(float x) {
  const std::uint32_t bits = bit_cast<std::uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return BFloat16{static_cast<std::uint16_t>((bits >> 16) | 0x40u)};
  return BFloat16{static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

template <>
MC_HD Half from_float<Half>(float x) {
#if MC_ON_DEVICE
  return Half{__half_as_ushort(__float2half_rn(x))};
#elif defined(__FLT16_MAX__)
  return Half{bit_cast<std::uint16_t>(static_cast<_Float16>(x))};
#else
  const std::uint32_t bits = bit_cast<std::uint32_t>(x), sign = (bits >> 16) & 0x8000u, rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return Half{static_cast<std::uint16_t>(sign | 0x7e00u)};
  if (rest >= 0x477ff000u) return Half{static_cast<std::uint16_t>(sign | 0x7c00u)};
  if (rest < 0x38800000u) {  // subnormal: adding 0.5 lets the addition round at the right bit
    const std::uint32_t sum = bit_cast<std::uint32_t>(bit_cast<float>(rest) + 0.5f);
    return Half{static_cast<std::uint16_t>(sign | (sum - 0x3f000000u))};
  }
  return Half{static_cast<std::uint16_t>(sign | ((rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u)) >> 13))};
#endif
}

constexpr float kFloat16Max = 65504.0f;

// Rounded to binary16; magnitudes above its range become its largest number.
MC_HD Half saturate_half(float x) {
  return from_float<Half>(x > kFloat16Max ? kFloat16Max : x < -kFloat16Max ? -kFloat16Max : x);
}

// Product and sum without contraction into a fused multiply-add: quantizers decide alike on every device.
MC_HD float multiply(float a, float b) {
#if MC_ON_DEVICE
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

MC_HD float add(float a, float b) {
#if MC_ON_DEVICE
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

// IEEE division, whatever the compiler's fast-math flags.
MC_HD float divide(float a, float b) {
#if MC_ON_DEVICE
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}

// Round half to even.
MC_HD float round_even(float x) {
#if MC_ON_DEVICE
  return rintf(x);
#else
  return __builtin_rintf(x);
#endif
}

// Bits of x without leading zeros; 0 for 0.
MC_HD int bit_length(unsigned x) {
#if MC_ON_DEVICE
  return 32 - __clz(static_cast<int>(x));
#else
  return x == 0 ? 0 : 32 - __builtin_clz(x);
#endif
}

MC_HD int ceil_div(int a, int b) { return (a + b - 1) / b; }

template <class T>
MC_HD T minimum(T a, T b) {
  return b < a ? b : a;
}

template <class T>
MC_HD T maximum(T a, T b) {
  return a < b ? b : a;
}

// Of floats in one instruction. Neither may be NaN: on a GPU the other one is the result.
MC_HD float minimum(float a, float b) {
#if MC_ON_DEVICE
  return fminf(a, b);
#else
  return b < a ? b : a;
#endif
}
MC_HD float maximum(float a, float b) {
#if MC_ON_DEVICE
  return fmaxf(a, b);
#else
  return a < b ? b : a;
#endif
}

}  // namespace minicache
