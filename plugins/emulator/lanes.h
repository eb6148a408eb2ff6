// Instructions that do the same in every lane on its own, as handlers.
#pragma once

#include <tuple>
#include <utility>

#include "machine.h"
#include "numbers.h"

namespace emulator {

// d[lane] = F(a[lane]...): x[0] is the slot of d, x[1] and on those of the sources.
template <class F, class D, class... A>
struct Apply {
  template <std::size_t... I>
  static void lanes(Warp& warp, const Instruction& i, u32 mask, std::index_sequence<I...>) {
    D* const d = warp.at<D>(i.x[0]);
    const auto sources = std::make_tuple(static_cast<const A*>(warp.at<A>(i.x[I + 1]))...);
    if (mask == ~0u) {
      for (int lane = 0; lane < kWarp; ++lane) d[lane] = static_cast<D>(F{}(std::get<I>(sources)[lane]...));
    } else {
      each_lane(mask, [&](int lane) { d[lane] = static_cast<D>(F{}(std::get<I>(sources)[lane]...)); });
    }
  }
  static void run(Block&, Warp& warp, const Instruction& i, u32 mask) {
    lanes(warp, i, mask, std::index_sequence_for<A...>{});
  }
};

template <class D, class... A, class F>
Handler apply(F) {
  return &Apply<F, D, A...>::run;
}

template <class F, class T>
struct Compare {
  static void run(Block&, Warp& warp, const Instruction& i, u32 mask) {
    const T* const a = warp.at<T>(i.x[1]);
    const T* const b = warp.at<T>(i.x[2]);
    u32 result = 0;
    for (int lane = 0; lane < kWarp; ++lane) result |= static_cast<u32>(F{}(a[lane], b[lane])) << lane;
    u32& d = warp.predicate(i.x[0]);
    d = (d & ~mask) | (result & mask);
    if (i.variant & 1) {  // the second predicate gets the opposite
      u32& second = warp.predicate(i.x[3]);
      second = (second & ~mask) | (~result & mask);
    }
  }
};

template <class T>
void select(Block&, Warp& warp, const Instruction& i, u32 mask) {
  T* const d = warp.at<T>(i.x[0]);
  const T* const a = warp.at<T>(i.x[1]);
  const T* const b = warp.at<T>(i.x[2]);
  const u32 condition = warp.predicate(i.x[3]);
  for (int lane = 0; lane < kWarp; ++lane) {
    if (mask >> lane & 1u) d[lane] = condition >> lane & 1u ? a[lane] : b[lane];
  }
}

template <class F>
void predicates(Block&, Warp& warp, const Instruction& i, u32 mask) {
  auto source = [&](int n) {
    const u32 value = warp.predicate(i.x[n]);
    return i.variant >> n & 1 ? ~value : value;
  };
  u32& d = warp.predicate(i.x[0]);
  d = (d & ~mask) | (F{}(source(1), source(2)) & mask);
}

}  // namespace emulator
