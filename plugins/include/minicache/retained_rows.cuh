// Vectors that a block keeps exactly, as they are read.
#pragma once

#include "minicache/codes.cuh"

namespace minicache {

// A chunk of a retained vector, number `place` of the block's.
template <class T>
MC_HD void load_exact_chunk(float (&x)[kChunk], const StreamBlock& from, int slot, int place, int component) {
  const StreamShape& shape = from.shape;
  const Format format = shape.retained_format;
  if (format == Format::model) {
    load_chunk(x, from.exact<T>(shape.member, slot) + place * shape.dim + component);
    return;
  }
  const Half* const params = from.exact_params(shape.member, slot) + place;
  const std::int8_t* const codes = from.exact_codes(shape.member, slot) + place * shape.exact_bytes();
  const float scale = to_float(params[0]), lowest = is_integer(format) ? to_float(params[shape.retained]) : 0.0f;
  with_range_bits(format, [&](auto bits) {
    constexpr int kWidth = decltype(bits)::value;
    const PackedCodes packed = load_codes<kWidth>(codes + component / kChunk * kWidth);
    MC_UNROLL
    for (int e = 0; e < kChunk; ++e) {
      const std::uint32_t code = packed.template get<kWidth>(e);
      const bool number = kWidth == 8 && format == Format::fp8;
      x[e] = (number ? fp8_to_float(static_cast<std::uint8_t>(code)) : static_cast<float>(code)) * scale + lowest;
    }
  });
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
