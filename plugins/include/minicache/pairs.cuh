// Pairs of numbers as fragments of a matrix product hold them: two 16-bit numbers in a word, or two floats.
#pragma once

#include <type_traits>

#include "minicache/block.cuh"

namespace minicache {

// What codes become: binary16 holds every code, float8 number and level; float in float32 computations.
template <class T>
struct CodeOf {
  using type = Half;
};
template <>
struct CodeOf<float> {
  using type = float;
};
template <class T>
using Code = typename CodeOf<T>::type;

// N neighbours in memory, loaded and stored at once.
template <class X, int N>
struct alignas(N * sizeof(X)) Neighbours {
  X x[N];
};

template <class E>
struct Pair {
  std::uint32_t bits;  // the first number in the low half
};
template <>
struct Pair<float> {
  float x[2];
};

namespace detail {

MC_HD std::uint32_t permuted(std::uint32_t a, std::uint32_t b, std::uint32_t selector) {
  const std::uint64_t both = static_cast<std::uint64_t>(b) << 32 | a;
  std::uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const std::uint32_t digit = selector >> (4 * i) & 15u;
    const auto byte = static_cast<std::uint32_t>(both >> (8 * (digit & 7u))) & 0xffu;
    result |= (digit < 8u ? byte : byte >> 7 == 0 ? 0u : 0xffu) << (8 * i);
  }
  return result;
}

}  // namespace detail

// Four of the eight bytes of a, then b, in one instruction (`__byte_perm` takes another to mask what it is given).
// Digits of the selector, of 4 bits, are numbers of bytes; from 8 on, the highest bit of byte digit - 8, eight times.
template <std::uint32_t Selector>
MC_HD std::uint32_t permute_bytes(std::uint32_t a, std::uint32_t b) {
#if MC_ON_DEVICE
  std::uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "n"(Selector));
  return result;
#else
  return detail::permuted(a, b, Selector);
#endif
}
// The same of a table's bytes; the selector's bits above its four digits are ignored.
template <std::uint32_t A, std::uint32_t B>
MC_HD std::uint32_t look_up_bytes(std::uint32_t selector) {
#if MC_ON_DEVICE
  std::uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "n"(A), "n"(B), "r"(selector));
  return result;
#else
  return detail::permuted(A, B, selector);
#endif
}

// x << Shift, not of what x was made of.
template <int Shift>
MC_HD std::uint32_t shifted(std::uint32_t x) {
#if MC_ON_DEVICE
  std::uint32_t result;
  asm("shl.b32 %0, %1, %2;" : "=r"(result) : "r"(x), "n"(Shift));
  return result;
#else
  return x << Shift;
#endif
}

// (x & Mask) ^ Bits, in one instruction.
template <std::uint32_t Mask, std::uint32_t Bits>
MC_HD std::uint32_t merge_bits(std::uint32_t x) {
#if MC_ON_DEVICE
  std::uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(result) : "r"(x), "n"(Mask), "r"(Bits));
  return result;
#else
  return (x & Mask) ^ Bits;
#endif
}

template <class E>
MC_HD Pair<E> make_pair(float first, float second) {
  const std::uint32_t low = from_float<E>(first).bits, high = from_float<E>(second).bits;
  return Pair<E>{low | high << 16};
}
template <>
MC_HD Pair<float> make_pair<float>(float first, float second) {
  return Pair<float>{{first, second}};
}

// What products are added to that are to stay as they are.
template <class E>
MC_HD Pair<E> minus_zeros() {
  if constexpr (sizeof(Pair<E>) == 4) {
    return Pair<E>{0x80008000u};
  } else {
    return make_pair<E>(-0.0f, -0.0f);
  }
}

template <class E>
MC_HD float first_of(Pair<E> x) {
  return to_float(E{static_cast<std::uint16_t>(x.bits & 0xffffu)});
}
template <class E>
MC_HD float second_of(Pair<E> x) {
  return to_float(E{static_cast<std::uint16_t>(x.bits >> 16)});
}
MC_HD float first_of(Pair<float> x) { return x.x[0]; }
MC_HD float second_of(Pair<float> x) { return x.x[1]; }

// The first (second) numbers of two pairs.
template <class E>
MC_HD Pair<E> firsts(Pair<E> a, Pair<E> b) {
  return Pair<E>{permute_bytes<0x5410>(a.bits, b.bits)};
}
template <class E>
MC_HD Pair<E> seconds(Pair<E> a, Pair<E> b) {
  return Pair<E>{permute_bytes<0x7632>(a.bits, b.bits)};
}
MC_HD Pair<float> firsts(Pair<float> a, Pair<float> b) { return Pair<float>{{a.x[0], b.x[0]}}; }
MC_HD Pair<float> seconds(Pair<float> a, Pair<float> b) { return Pair<float>{{a.x[1], b.x[1]}}; }

// a b + c, each rounded once.
MC_HD Pair<Half> fused(Pair<Half> a, Pair<Half> b, Pair<Half> c) {
#if MC_ON_DEVICE
  const __half2 x = bit_cast<__half2>(a.bits), y = bit_cast<__half2>(b.bits), z = bit_cast<__half2>(c.bits);
  return Pair<Half>{bit_cast<std::uint32_t>(__hfma2(x, y, z))};
#else
  return make_pair<Half>(first_of(a) * first_of(b) + first_of(c), second_of(a) * second_of(b) + second_of(c));
#endif
}
MC_HD Pair<float> fused(Pair<float> a, Pair<float> b, Pair<float> c) {
  return Pair<float>{{a.x[0] * b.x[0] + c.x[0], a.x[1] * b.x[1] + c.x[1]}};
}

// The same numbers as codes are read as.
template <class E>
MC_HD Pair<E> convert(Pair<Half> x) {
  if constexpr (sizeof(Pair<E>) == sizeof(x)) {
    return bit_cast<Pair<E>>(x);
  } else {
    return Pair<E>{{first_of(x), second_of(x)}};
  }
}

MC_HD Pair<Half> negated(Pair<Half> x) {
#if MC_ON_DEVICE
  return Pair<Half>{bit_cast<std::uint32_t>(__hneg2(bit_cast<__half2>(x.bits)))};
#else
  return Pair<Half>{x.bits ^ 0x80008000u};
#endif
}
MC_HD Pair<float> negated(Pair<float> x) { return Pair<float>{{-x.x[0], -x.x[1]}}; }

// Numbers 2 j and 2 j + 1 of a fragment.
template <class Fragment>
MC_HD auto pair_of(const Fragment& fragment, int j) {
  using E = std::remove_cv_t<std::remove_reference_t<decltype(fragment.x[0])>>;
  Pair<E> pair;
#if MC_ON_DEVICE
  pair = reinterpret_cast<const Pair<E>*>(fragment.x)[j];
#else
  std::memcpy(&pair, &fragment.x[2 * j], sizeof(pair));
#endif
  return pair;
}
template <class Fragment, class E>
MC_HD void put_pair(Fragment& fragment, int j, Pair<E> pair) {
  static_assert(sizeof(pair) == 2 * sizeof(fragment.x[0]), "types differ");
#if MC_ON_DEVICE
  reinterpret_cast<Pair<E>*>(fragment.x)[j] = pair;
#else
  std::memcpy(&fragment.x[2 * j], &pair, sizeof(pair));
#endif
}

}  // namespace minicache
