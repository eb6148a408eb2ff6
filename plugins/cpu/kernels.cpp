#include "cpu/kernels.h"

#include <string>

#define MC_INLINE __attribute__((always_inline))
#define MC_SIMD static inline __attribute__((always_inline, unused))
#define MC_ENTRY static __attribute__((noinline, unused))

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between inlined functions only

namespace minicache::cpu {

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c,bmi2,prefer-vector-width=512")
namespace avx512 {
#define MC_LANES 16
#define MC_COLUMNS 4
#include "cpu/simd.inl"
#include "cpu/stream.inl"
#include "cpu/decode.inl"
#include "cpu/prefill.inl"
#undef MC_LANES
#undef MC_COLUMNS
}  // namespace avx512
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2")
namespace avx2 {
#define MC_LANES 8
#define MC_COLUMNS 2
#include "cpu/simd.inl"
#include "cpu/stream.inl"
#include "cpu/decode.inl"
#include "cpu/prefill.inl"
#undef MC_LANES
#undef MC_COLUMNS
}  // namespace avx2
#pragma GCC pop_options
#endif

namespace generic {
#define MC_LANES 4
#define MC_COLUMNS 2
#include "cpu/simd.inl"
#include "cpu/stream.inl"
#include "cpu/decode.inl"
#include "cpu/prefill.inl"
#undef MC_LANES
#undef MC_COLUMNS
}  // namespace generic

namespace {

#define MC_KERNELS(isa) Kernels{#isa, isa::decode_part, isa::combine_parts, isa::prefill_part}

#if defined(__x86_64__)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq");
}

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif

std::int64_t widest(const AttentionArguments& a, const Reader& key, const Reader& value) {
  return maximum(maximum(key.latent.width, value.latent.width), a.shape.dim);
}

}  // namespace

const Kernels& kernels(const char* limit) {
  static const Kernels generic_kernels = MC_KERNELS(generic);
#if defined(__x86_64__)
  static const Kernels avx512_kernels = MC_KERNELS(avx512), avx2_kernels = MC_KERNELS(avx2);
  __builtin_cpu_init();
  const std::string wanted = limit == nullptr ? "" : limit;
  if (has_avx512() && wanted != "avx2" && wanted != "generic") return avx512_kernels;
  if (has_avx2() && wanted != "generic") return avx2_kernels;
#endif
  return generic_kernels;
}

std::int64_t decode_scratch(const AttentionArguments& a, const Reader& key, const Reader& value) {
  const std::int64_t group = a.shape.query_heads / a.shape.heads, wide = widest(a, key, value);
  return group * (a.shape.dim + 2 * wide + kBlockSize + 1) + 2 * kBlockSize * wide;
}

std::int64_t prefill_scratch(const AttentionArguments& a, const Reader& key, const Reader& value, int rows) {
  const std::int64_t tiles = ceil_div(rows, kBlockSize), dim = a.shape.dim;
  return tiles * kBlockSize * (2 * dim + 2) + kBlockSize * (kBlockSize + 2 * dim + widest(a, key, value));
}

}  // namespace minicache::cpu
