// Runs of N neighbouring components of a stored row, read as pairs for the tensor cores: codes become numbers in
// registers, a few instructions for two of them.
//
// Order of pairs: pair p holds components p and p + N / 2 of the run. Integer codes read as they are (scale and minimum
// belong to the caller), float8 and gaussian ones as the numbers they stand for.
#pragma once

#include "minicache/format_dispatch.cuh"
#include "minicache/level_reader.cuh"

namespace minicache {

namespace detail {

template <class U>
MC_HD U load(const void* source) {
#if MC_ON_DEVICE
  return *static_cast<const U*>(source);
#else
  U result;
  std::memcpy(&result, source, sizeof(U));
  return result;
#endif
}

// 1 to 4 stored bytes, the first one lowest. Rows and runs start at even addresses, with `words` at multiples of 4.
template <int Count>
MC_HD std::uint32_t load_bytes(const std::int8_t* source, bool words) {
  if constexpr (Count == 1) return load<std::uint8_t>(source);
  if constexpr (Count == 2) return load<std::uint16_t>(source);
  if constexpr (Count == 3) {
    return load<std::uint8_t>(source) | load<std::uint8_t>(source + 1) << 8 | load<std::uint8_t>(source + 2) << 16;
  }
  if (words) return load<std::uint32_t>(source);
  return load<std::uint16_t>(source) | static_cast<std::uint32_t>(load<std::uint16_t>(source + 2)) << 16;
}

// Stored bytes are 128 less than what they hold: their highest bits are flipped, here or, of 4-bit codes, by those who
// take the codes apart.
constexpr std::uint32_t kFlip = 0x80808080u;

// Chunk number `chunk` of N codes of a row, low bits first; a second word only for eight 8-bit codes.
template <int Bits, int N>
MC_HD void load_codes(const std::int8_t* row, int chunk, bool words, std::uint32_t (&codes)[2]) {
  constexpr int kRun = Bits * N;
  const int bit = chunk * kRun;
  const std::int8_t* source = row + (kRun % 8 == 0 ? chunk * (kRun / 8) : bit >> 3);
  codes[1] = 0;
  if constexpr (kRun == 64) {
    codes[0] = load_bytes<4>(source, words) ^ kFlip;
    codes[1] = load_bytes<4>(source + 4, words) ^ kFlip;
  } else if constexpr (kRun % 8 == 0) {
    codes[0] = load_bytes<kRun / 8>(source, words) ^ kFlip;
  } else {
    const int shift = bit & 7;
    std::uint32_t word = load_bytes<1>(source, words) ^ 0x80u;
    if constexpr (8 % kRun != 0) {
      if (shift + kRun > 8) word |= (load_bytes<1>(source + 1, words) ^ 0x80u) << 8;
    }
    codes[0] = word >> shift;
  }
}

// Codes of the first half of a run in the low 16 bits, of the second half in the high ones; two such words for eight
// 8-bit codes, the second with components 2, 3 and 6, 7.
template <int Bits, int N>
MC_HD std::uint32_t split_halves(const std::uint32_t (&codes)[2], int word) {
  constexpr int kHalf = Bits * N / 2;
  if constexpr (kHalf == 32) {
    return word == 0 ? permute_bytes<0x5410>(codes[0], codes[1]) : permute_bytes<0x7632>(codes[0], codes[1]);
  }
  if constexpr (kHalf >= 16) return codes[0];
  constexpr std::uint32_t kMask = (1u << (kHalf & 15)) - 1u;
  return (codes[0] & kMask) | ((codes[0] >> (kHalf & 15)) & kMask) << 16;
}

// The codes of pair p in the low bits of each half, below bits of others.
template <int Bits, int N>
MC_HD std::uint32_t code_pair(const std::uint32_t (&codes)[2], int p) {
  constexpr int kPerWord = Bits == 8 ? 2 : N / 2;
  return split_halves<Bits, N>(codes, p / kPerWord) >> (p % kPerWord * Bits);
}

// Codes in the low bits of each half as numbers, less `Centre`: 1024 + code is a binary16 number whose low bits are the
// code.
constexpr std::uint32_t kThousand = 0x64006400u;
template <int Bits, int Centre = 0>
MC_HD Pair<Half> low_codes(std::uint32_t word) {
  constexpr std::uint32_t kMask = ((1u << Bits) - 1u) * 0x00010001u;
  const Pair<Half> sum{merge_bits<kMask, kThousand>(word)};
  return fused(sum, Pair<Half>{0x3c003c00u}, Pair<Half>{(0xe400u + Centre) * 0x00010001u});
}
// The same for 4-bit codes in bits 4 to 7, in place: 1024 + 16 code.
template <int Centre = 0>
MC_HD Pair<Half> second_nibbles(std::uint32_t word) {
  const Pair<Half> sum{merge_bits<0x00f000f0u, kThousand>(word)};
  return fused(sum, Pair<Half>{0x2c002c00u}, Pair<Half>{(0xd400u + 16u * Centre) * 0x00010001u});
}

template <int Bits, int N>
MC_HD Pair<Half> integer_pair(const std::uint32_t (&codes)[2], int p) {
  if constexpr (Bits == 4 && N > 2) {
    if (p % 2 == 1) return second_nibbles(split_halves<Bits, N>(codes, 0) >> (4 * (p - 1)));
  }
  return low_codes<Bits>(code_pair<Bits, N>(codes, p));
}

// The 7 lower bits as a binary16 number with the exponent bias still to be restored: 2^(15 - 7).
template <int N>
MC_HD Pair<Half> fp8_pair(const std::uint32_t (&codes)[2], int p) {
  const std::uint32_t bytes = code_pair<8, N>(codes, p);
  const Pair<Half> small{(bytes & 0x00800080u) << 8 | (bytes & 0x007f007fu) << 7};
  return fused(small, Pair<Half>{0x5c005c00u}, Pair<Half>{0x80008000u});
}

// 4-bit codes as binary16 numbers that keep an offset, in one instruction a pair: 1024 + code of the low nibbles of each
// half, 1024 + 16 code of the high ones, whose top bit is still flipped in `word`.
template <bool High>
MC_HD Pair<Half> offset_codes(std::uint32_t word) {
  return Pair<Half>{High ? merge_bits<0x00f000f0u, kThousand ^ 0x00800080u>(word)
                         : merge_bits<0x000f000fu, kThousand>(word)};
}

}  // namespace detail

// Formats whose codes may be read with an offset, which is then taken off sums of them: pairs p of `read_offset_word`
// (columns p of `read_offset_columns`) are kCodeOffset + kOffsetStep code for odd p, kCodeOffset + code for others.
constexpr float kCodeOffset = 1024.0f, kOffsetStep = 16.0f;
template <class T, Format F>
constexpr bool kOffsetCodes = F == Format::int4 && sizeof(T) == 2;

// Eight components, from a stored word of 4-bit codes.
MC_HD void read_offset_word(std::uint32_t word, Pair<Half> (&out)[4]) {
  out[0] = detail::offset_codes<false>(word);
  out[1] = detail::offset_codes<true>(word);
  out[2] = detail::offset_codes<false>(word >> 8);
  out[3] = detail::offset_codes<true>(word >> 8);
}

// Chunk number `chunk` of four components of two rows: out[c] holds component c of both.
MC_HD void read_offset_columns(const void* a, const void* b, int chunk, Pair<Half> (&out)[4]) {
  const std::uint32_t first = detail::load<std::uint16_t>(static_cast<const char*>(a) + 2 * chunk);
  const std::uint32_t second = detail::load<std::uint16_t>(static_cast<const char*>(b) + 2 * chunk);
  const std::uint32_t joined = permute_bytes<0x5410>(first, second);
  out[0] = detail::offset_codes<false>(joined);
  out[1] = detail::offset_codes<true>(joined);
  out[2] = detail::offset_codes<false>(joined >> 8);
  out[3] = detail::offset_codes<true>(joined >> 8);
}

// N numbers at `source`, aligned to their size (at most 16 bytes).
template <int N, class E>
MC_HD void read_numbers(const E* source, Pair<E> (&out)[N / 2]) {
  if constexpr (sizeof(E) == 4) {
    MC_UNROLL
    for (int p = 0; p < N / 2; ++p) out[p] = make_pair<E>(to_float(source[p]), to_float(source[p + N / 2]));
  } else {
    struct alignas(2 * N) Run {
      Pair<E> x[N / 2];
    };
    const Run run = detail::load<Run>(source);
    MC_UNROLL
    for (int p = 0; p < N / 2; ++p) {
      if constexpr (N == 2) {
        out[p] = run.x[0];
      } else {
        out[p] = p % 2 == 0 ? firsts(run.x[p / 2], run.x[p / 2 + N / 4]) : seconds(run.x[p / 2], run.x[p / 2 + N / 4]);
      }
    }
  }
}

// Chunk number `chunk` of N components of a row in format F.
template <class T, Format F, int N>
MC_HD void read_run(const void* row, int chunk, bool words, Pair<Element<T, F>> (&out)[N / 2]) {
  constexpr int kBits = bits_of(F);
  const int index = chunk * N;
  if constexpr (F == Format::model) {
    read_numbers<N>(static_cast<const T*>(row) + index, out);
  } else if constexpr (sizeof(T) == 4) {
    const std::int8_t* stored = static_cast<const std::int8_t*>(row);
    float x[N];
    for (int i = 0; i < N; ++i) {
      const int code = unpack_code(stored, kBits, index + i);
      x[i] = is_gaussian(F)       ? gaussian_level(kBits, code)
             : F == Format::fp8 ? fp8_to_float(static_cast<std::uint8_t>(code))
                                : static_cast<float>(code);
    }
    for (int p = 0; p < N / 2; ++p) out[p] = make_pair<float>(x[p], x[p + N / 2]);
  } else {
    std::uint32_t codes[2];
    detail::load_codes<kBits, N>(static_cast<const std::int8_t*>(row), chunk, words, codes);
    if constexpr (is_gaussian(F)) {
      detail::gaussian_pairs<kBits, N>(codes, out);
    } else {
      MC_UNROLL
      for (int p = 0; p < N / 2; ++p) {
        if constexpr (F == Format::fp8) {
          out[p] = detail::fp8_pair<N>(codes, p);
        } else {
          out[p] = detail::integer_pair<kBits, N>(codes, p);
        }
      }
    }
  }
}

// Eight components, from a stored word of 4-bit codes of a format with ranges or gaussian.
template <class T, Format F>
MC_HD void read_word(std::uint32_t word, Pair<Code<T>> (&out)[4]) {
  static_assert(bits_of(F) == 4, "eight codes in a word");
  const std::uint32_t codes[2] = {word ^ detail::kFlip, 0};
  if constexpr (sizeof(T) == 4) {
    float x[8];
    for (int i = 0; i < 8; ++i) {
      const int code = codes[0] >> (4 * i) & 15u;
      x[i] = is_gaussian(F) ? gaussian_level(4, code) : static_cast<float>(code);
    }
    for (int p = 0; p < 4; ++p) out[p] = make_pair<float>(x[p], x[p + 4]);
  } else if constexpr (is_gaussian(F)) {
    detail::gaussian_pairs<4, 8>(codes, out);
  } else {
    MC_UNROLL
    for (int p = 0; p < 4; ++p) out[p] = detail::integer_pair<4, 8>(codes, p);
  }
}

namespace detail {

// Integer code number c of two rows, less its centre, whose codes are `joined`: the first row's in low halves, the
// second's in high ones.
template <int Bits, int N>
MC_HD Pair<Half> integer_column(const std::uint32_t (&joined)[2], int c) {
  constexpr int kPerWord = Bits == 8 ? 2 : N;
  if constexpr (Bits == 4 && N > 2) {
    if (c % 2 == 1) return second_nibbles<code_centre(Bits)>(joined[0] >> (4 * (c - 1)));
  }
  return low_codes<Bits, code_centre(Bits)>(joined[c / kPerWord] >> (c % kPerWord * Bits));
}

}  // namespace detail

// Chunk number `chunk` of N components (N = 2 or 4) of two rows: out[c] holds component c of both, integer codes less
// their centre.
template <class T, Format F, int N>
MC_HD void read_columns(const void* a, const void* b, int chunk, bool words, Pair<Element<T, F>> (&out)[N]) {
  constexpr int kBits = bits_of(F);
  if constexpr (is_integer(F) && sizeof(T) == 2) {
    std::uint32_t first[2], second[2];
    detail::load_codes<kBits, N>(static_cast<const std::int8_t*>(a), chunk, words, first);
    detail::load_codes<kBits, N>(static_cast<const std::int8_t*>(b), chunk, words, second);
    const std::uint32_t joined[2] = {permute_bytes<0x5410>(first[0], second[0]),
                                     permute_bytes<0x7632>(first[0], second[0])};
    MC_UNROLL
    for (int c = 0; c < N; ++c) out[c] = detail::integer_column<kBits, N>(joined, c);
  } else if constexpr (is_gaussian(F) && sizeof(T) == 2 && N == 4) {
    std::uint32_t first[2], second[2];
    detail::load_codes<kBits, N>(static_cast<const std::int8_t*>(a), chunk, words, first);
    detail::load_codes<kBits, N>(static_cast<const std::int8_t*>(b), chunk, words, second);
    detail::level_pairs<kBits>(detail::ordered_codes<kBits>(first[0], second[0]), out);
  } else {
    Pair<Element<T, F>> x[N / 2], y[N / 2];
    read_run<T, F, N>(a, chunk, words, x);
    read_run<T, F, N>(b, chunk, words, y);
    MC_UNROLL
    for (int p = 0; p < N / 2; ++p) {
      out[p] = firsts(x[p], y[p]);
      out[p + N / 2] = seconds(x[p], y[p]);
    }
    if constexpr (is_integer(F)) {  // as floats
      constexpr float kCentre = code_centre(kBits);
      MC_UNROLL
      for (int c = 0; c < N; ++c) out[c] = make_pair<float>(first_of(out[c]) - kCentre, second_of(out[c]) - kCentre);
    }
  }
}

}  // namespace minicache
