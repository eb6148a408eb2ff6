// Codes of a chunk: eight of them fill as many whole bytes as one of them has bits.
#pragma once

#include "minicache/tile.cuh"

namespace minicache {

template <int Number>
struct Bits {
  static constexpr int value = Number;
};

// Calls `function(Bits<n>{})` for the bits of a format with ranges, or of a gaussian one.
template <class Function>
MC_HD void with_range_bits(Format format, Function function) {
  switch (bits_of(format)) {
    case 8:
      return function(Bits<8>{});
    case 4:
      return function(Bits<4>{});
    default:
      return function(Bits<2>{});
  }
}

template <class Function>
MC_HD void with_gaussian_bits(Format format, Function function) {
  switch (format) {
    case Format::g4:
      return function(Bits<4>{});
    case Format::g3:
      return function(Bits<3>{});
    case Format::g2:
      return function(Bits<2>{});
    default:
      return function(Bits<1>{});
  }
}

// Low bits first; two words for codes of eight bits.
struct PackedCodes {
  std::uint32_t low = 0, high = 0;

  template <int Width>
  MC_HD void put(int place, std::uint32_t code) {
    if (Width == 8 && place >= 4) {
      high |= code << (8 * (place - 4));
    } else {
      low |= code << (Width * place);
    }
  }
  template <int Width>
  MC_HD std::uint32_t get(int place) const {
    const std::uint32_t word = Width == 8 && place >= 4 ? high >> (8 * (place - 4)) : low >> (Width * place);
    return word & ((1u << Width) - 1u);
  }
};

MC_HD bool on_boundary(const void* address, int bytes) {
  return reinterpret_cast<std::uintptr_t>(address) % bytes == 0;
}

struct alignas(8) Bytes8 {
  std::uint32_t words[2];
};

constexpr std::uint32_t kTopBits = 0x80808080u;

// `Width` bytes of a chunk to and from memory. Codes of 2, 4 and 8 bits lie on 2-byte boundaries at least, because
// segments are multiples of 16 components; larger accesses where the address allows them.
template <int Width>
MC_HD void store_codes(std::int8_t* to, PackedCodes codes) {
  const std::uint32_t low = codes.low ^ kTopBits, high = codes.high ^ kTopBits;
  if constexpr (Width % 2 != 0) {
    MC_UNROLL
    for (int i = 0; i < Width; ++i) to[i] = static_cast<std::int8_t>(low >> (8 * i));
  } else {
    if (Width == 8 && on_boundary(to, 8)) {
      store_as(to, Bytes8{{low, high}});
    } else if (Width >= 4 && on_boundary(to, 4)) {
      store_as(to, low);
      if (Width == 8) store_as(to + 4, high);
    } else {
      MC_UNROLL
      for (int i = 0; i < Width; i += 2)
        store_as(to + i, static_cast<std::uint16_t>((i < 4 ? low : high) >> (8 * (i % 4))));
    }
  }
}

template <int Width>
MC_HD PackedCodes load_codes(const std::int8_t* from) {
  PackedCodes codes;
  if constexpr (Width % 2 != 0) {
    MC_UNROLL
    for (int i = 0; i < Width; ++i) codes.low |= static_cast<std::uint32_t>(static_cast<std::uint8_t>(from[i])) << (8 * i);
  } else {
    if (Width == 8 && on_boundary(from, 8)) {
      const Bytes8 bytes = load_as<Bytes8>(from);
      codes = PackedCodes{bytes.words[0], bytes.words[1]};
    } else if (Width >= 4 && on_boundary(from, 4)) {
      codes.low = load_as<std::uint32_t>(from);
      if (Width == 8) codes.high = load_as<std::uint32_t>(from + 4);
    } else {
      MC_UNROLL
      for (int i = 0; i < Width; i += 2)
        (i < 4 ? codes.low : codes.high) |= static_cast<std::uint32_t>(load_as<std::uint16_t>(from + i)) << (8 * (i % 4));
    }
  }
  codes.low ^= kTopBits;
  codes.high ^= kTopBits;
  return codes;
}

}  // namespace minicache
