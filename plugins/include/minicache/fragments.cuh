// Pairs of rounded numbers and halves of fragments: how accumulators become operands and results.
#pragma once

#include <type_traits>

#include "minicache/block.cuh"

namespace minicache {

// Two neighbouring numbers of a row, written with one store.
template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T x[2];
};

// Round half to even. On a GPU NaNs lose their payload.
template <class T>
MC_HD Pair<T> round_pair(float first, float second) {
#if MC_ON_DEVICE
  std::uint32_t bits;
  if constexpr (std::is_same_v<T, Half>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
  }
  return bit_cast<Pair<T>>(bits);
#else
  return Pair<T>{{from_float<T>(first), from_float<T>(second)}};
#endif
}

// Fragments B of two neighbouring products, as `load_matrices` reads them together: neighbouring registers, which the
// product takes as they are.
template <class T>
MC_HD FragmentB<T> half_of(const FragmentA<T>& both, int half) {
  FragmentB<T> result;
  std::memcpy(&result, both.x + 4 * half, sizeof(result));
  return result;
}

// Numbers j = 0, 1 of fragment D are rows g + 8 j, as are pairs 2 i + j of fragment A: two neighbouring fragments D
// (columns 0..7 and 8..15) are the numbers of one fragment A.
template <class T>
MC_HD void set_pair(FragmentA<T>& fragment, int row, int half, Pair<T> pair) {
  std::memcpy(fragment.x + 2 * (row + 2 * half), &pair, sizeof(pair));
}

}  // namespace minicache
