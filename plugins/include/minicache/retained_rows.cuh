// Vectors that a block keeps exactly, as they are read.
#pragma once

#include "minicache/codes.cuh"

namespace minicache {

// Eight codes of a format with ranges, of `Width` bits, as numbers before scale and minimum.
template <int Width>
MC_HD void load_numbers(float (&x)[kChunk], Format format, const std::int8_t* codes) {
  const PackedCodes packed = load_codes<Width>(codes);
  MC_UNROLL
  for (int e = 0; e < kChunk; ++e) {
    const std::uint32_t code = packed.template get<Width>(e);
    x[e] =
        Width == 8 && format == Format::fp8 ? fp8_to_float(static_cast<std::uint8_t>(code)) : static_cast<float>(code);
  }
}
MC_HD void load_numbers(float (&x)[kChunk], Format format, const std::int8_t* codes) {
  with_range_bits(format, [&](auto bits) { load_numbers<decltype(bits)::value>(x, format, codes); });
}

// Eight codes of a row with one range: scale * code + lowest (null: none).
MC_HD void load_row_numbers(float (&x)[kChunk], Format format, const std::int8_t* codes, const Half* scale,
                            const Half* lowest) {
  load_numbers(x, format, codes);
  const float step = to_float(*scale), low = lowest == nullptr ? 0.0f : to_float(*lowest);
  MC_UNROLL
  for (int e = 0; e < kChunk; ++e) x[e] = x[e] * step + low;
}

// A chunk of a retained vector, number `place` of the block's.
template <class T>
MC_HD void load_exact_chunk(float (&x)[kChunk], const StreamBlock& from, int slot, int place, int component) {
  const StreamShape& shape = from.shape;
  const Format format = shape.retained_format;
  if (format == Format::model) {
    load_chunk(x, from.exact<T>(shape.member, slot) + place * shape.dim + component);
    return;
  }
  const Half* params = from.exact_params(shape.member, slot) + place;
  load_row_numbers(
      x, format,
      from.exact_codes(shape.member, slot) + place * shape.exact_bytes() + component / kChunk * bits_of(format), params,
      is_integer(format) ? params + shape.retained : nullptr);
}

// places[row]: which retained vector row is, -1 for none. Synchronized.
template <class Block>
MC_HD void find_retained(Block& block, const StreamBlock& from, int slot, std::int32_t* places) {
  block.each([&](Thread thread) {
    if (thread.index < kBlockSize) places[thread.index] = -1;
  });
  block.sync();
  block.each([&](Thread thread) {
    if (thread.index >= from.shape.retained) return;
    const int row = from.retained_index(slot)[thread.index];
    if (row >= 0 && row < kBlockSize) places[row] = thread.index;
  });
  block.sync();
}

}  // namespace minicache
