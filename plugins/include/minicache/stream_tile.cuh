// Numbers of one stored block and slot as a tile: codes, ranges and levels undone.
#pragma once

#include "minicache/codes.cuh"
#include "minicache/hadamard.cuh"

namespace minicache {

// Eight codes as numbers, before scale, minimum or norm.
MC_HD void load_numbers(float (&x)[kChunk], Format format, const std::int8_t* codes) {
  with_bits(format, [&](auto bits) {
    constexpr int kWidth = decltype(bits)::value;
    const PackedCodes packed = load_codes<kWidth>(codes);
    MC_UNROLL
    for (int e = 0; e < kChunk; ++e) {
      const std::uint32_t code = packed.template get<kWidth>(e);
      if (kWidth == 8 && format == Format::fp8) {
        x[e] = fp8_to_float(static_cast<std::uint8_t>(code));
      } else if (kWidth <= 4 && is_gaussian(format)) {
        x[e] = gaussian_level(kWidth <= 4 ? kWidth : 4, static_cast<int>(code));
      } else {
        x[e] = static_cast<float>(code);
      }
    }
  });
}

// Eight codes of a row with one range: scale * code + lowest (null: none).
MC_HD void load_row_numbers(float (&x)[kChunk], Format format, const std::int8_t* codes, const Half* scale,
                            const Half* lowest) {
  load_numbers(x, format, codes);
  const float step = to_float(*scale), low = lowest == nullptr ? 0.0f : to_float(*lowest);
  MC_UNROLL
  for (int e = 0; e < kChunk; ++e) x[e] = x[e] * step + low;
}

// A chunk of a segment: row `row`, components from `place` of the segment. Gaussian numbers are levels, without the norm.
template <class T>
MC_HD void load_segment_chunk(float (&x)[kChunk], const StreamBlock& from, int slot, const Segment& segment, int row,
                              int place) {
  const StreamShape& shape = from.shape;
  if (segment.format == Format::model) {
    load_chunk(x, from.latent<T>(slot) + row * shape.latent + segment.storage + place);
    return;
  }
  const std::int8_t* codes = from.codes(slot) + row * shape.code_bytes + segment.storage +
                             place / kChunk * bits_of(segment.format);
  if (!has_ranges(segment.format)) {
    load_numbers(x, segment.format, codes);
    return;
  }
  const Half* scale = from.params(slot) + segment.scale;
  const Half* lowest = is_integer(segment.format) ? from.params(slot) + segment.minimum : nullptr;
  if (!segment.channel) {
    load_row_numbers(x, segment.format, codes, scale + row, lowest == nullptr ? nullptr : lowest + row);
    return;
  }
  float factor[kChunk], low[kChunk] = {};
  load_numbers(x, segment.format, codes);
  load_chunk(factor, scale + place);
  if (lowest != nullptr) load_chunk(low, lowest + place);
  MC_UNROLL
  for (int e = 0; e < kChunk; ++e) x[e] = x[e] * factor[e] + low[e];
}

// The latent vectors of a slot. `compact`: stored components side by side, as they are stored, for a product with a
// reading map; otherwise every component, transforms undone (`shared` [B, pitch] as `hadamard` takes it), dropped ones 0.
template <class T, int Chunks, class Block>
MC_HD void load_latent(Block& block, const StreamBlock& from, int slot, bool compact,
                       typename Block::template PerThread<Tile<Chunks>>& tile, float* shared, int pitch) {
  const StreamShape& shape = from.shape;
  block.each([&](Thread thread) {
    MC_UNROLL
    for (int j = 0; j < Chunks; ++j) {
      const int component = component_of(thread, j);
      float(&x)[kChunk] = tile(thread).x[j];
      MC_UNROLL
      for (int e = 0; e < kChunk; ++e) x[e] = 0.0f;
      for (int i = 0; i < shape.segments; ++i) {
        const Segment& segment = shape.segment[i];
        const int first = compact ? segment.stored : segment.component;
        if (segment.format == Format::drop || !inside(component, first, segment.length)) continue;
        load_segment_chunk<T>(x, from, slot, segment, row_of(thread), component - first);
      }
    }
  });
  if (compact) return;
  for (int i = 0; i < shape.segments; ++i) {
    const Segment& segment = shape.segment[i];
    if (segment.hadamard && segment.format != Format::drop)
      hadamard<Chunks>(block, tile, segment.component, segment.length, shared, pitch);
  }
}

// A member's residuals of a slot, [B, D].
template <int Chunks, class Block>
MC_HD void load_residual(Block& block, const StreamBlock& from, int slot,
                         typename Block::template PerThread<Tile<Chunks>>& tile) {
  const StreamShape& shape = from.shape;
  const std::int8_t* codes = from.residual(shape.member, slot);
  const Half* params = from.residual_params(shape.member, slot);
  load_tile<Chunks>(block, tile, shape.dim, [&](float(&x)[kChunk], int row, int component) {
    const std::int8_t* own = codes + row * shape.residual_bytes() + component / kChunk * bits_of(shape.residual);
    load_row_numbers(x, shape.residual, own, params + row, params + kBlockSize + row);
  });
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
  load_row_numbers(x, format,
                   from.exact_codes(shape.member, slot) + place * shape.exact_bytes() + component / kChunk * bits_of(format),
                   params, is_integer(format) ? params + shape.retained : nullptr);
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
