// Accumulators rounded to operands and results, and fragments read two at a time.
#pragma once

#include <type_traits>

#include "minicache/pairs.cuh"

namespace minicache {

// `make_pair` in one instruction. On a GPU NaNs lose their payload.
template <class T>
MC_HD Pair<T> round_pair(float first, float second) {
#if MC_ON_DEVICE
  std::uint32_t bits;
  if constexpr (std::is_same_v<T, Half>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
  }
  return Pair<T>{bits};
#else
  return make_pair<T>(first, second);
#endif
}

// Of 16 rows per warp, the first one of a thread's part of fragments A and D; the other is 8 further.
MC_HD int own_row(Thread thread) { return 16 * thread.warp() + thread.lane() / 4; }

// Fragments B of two steps, loaded at once.
template <class E>
struct alignas(2 * sizeof(FragmentB<E>)) FragmentPair {
  FragmentB<E> step[2];
};

// Fragments B of two neighbouring products, as `load_matrices` reads them together: neighbouring registers, which the
// product takes as they are.
template <class T>
MC_HD FragmentB<T> half_of(const FragmentA<T>& both, int half) {
  FragmentB<T> result;
  std::memcpy(&result, both.x + 4 * half, sizeof(result));
  return result;
}

// Numbers `first` and `second` as sums of parts.
template <class E, int Parts>
MC_HD void split_pair(float first, float second, Pair<E> (&out)[Parts]) {
  MC_UNROLL
  for (int i = 0; i < Parts; ++i) {
    out[i] = round_pair<E>(first, second);
    first -= first_of(out[i]);
    second -= second_of(out[i]);
  }
}

}  // namespace minicache
