// Numbers of one stored block and slot: codes, ranges, levels and transforms undone.
#pragma once

#include "minicache/codes.cuh"
#include "minicache/hadamard.cuh"

namespace minicache {

// Eight codes of a format with ranges, of `Width` bits, as numbers before scale and minimum.
template <int Width>
MC_HD void load_numbers(float (&x)[kChunk], Format format, const std::int8_t* codes) {
  const PackedCodes packed = load_codes<Width>(codes);
  MC_UNROLL
  for (int e = 0; e < kChunk; ++e) {
    const std::uint32_t code = packed.template get<Width>(e);
    x[e] = Width == 8 && format == Format::fp8 ? fp8_to_float(static_cast<std::uint8_t>(code)) : static_cast<float>(code);
  }
}
MC_HD void load_numbers(float (&x)[kChunk], Format format, const std::int8_t* codes) {
  with_range_bits(format, [&](auto bits) { load_numbers<decltype(bits)::value>(x, format, codes); });
}

// Levels of all gaussian formats as a table in shared memory: lanes that read different ones meet no bank conflict.
constexpr int kLevels = 32;
template <int Width>
constexpr int kFirstLevel = (1 << Width) - 2;

template <int Width>
MC_HD void fill_levels(Thread thread, float* levels) {
  float level = 0.0f;
  MC_UNROLL
  for (int code = 0; code < 1 << Width; ++code) {
    if (thread.index == kFirstLevel<Width> + code) level = gaussian_level(Width, code);
  }
  if (inside(thread.index, kFirstLevel<Width>, 1 << Width)) levels[thread.index] = level;
}
MC_HD void fill_levels(Thread thread, float* levels) {
  if (thread.index >= kLevels) return;
  fill_levels<1>(thread, levels);
  fill_levels<2>(thread, levels);
  fill_levels<3>(thread, levels);
  fill_levels<4>(thread, levels);
}

// Eight gaussian codes as levels.
template <int Width>
MC_HD void load_levels(float (&x)[kChunk], const std::int8_t* codes, const float* levels) {
  const PackedCodes packed = load_codes<Width>(codes);
  MC_UNROLL
  for (int e = 0; e < kChunk; ++e) x[e] = levels[kFirstLevel<Width> + packed.template get<Width>(e)];
}

// Eight codes of a row with one range: scale * code + lowest (null: none).
MC_HD void load_row_numbers(float (&x)[kChunk], Format format, const std::int8_t* codes, const Half* scale,
                            const Half* lowest) {
  load_numbers(x, format, codes);
  const float step = to_float(*scale), low = lowest == nullptr ? 0.0f : to_float(*lowest);
  MC_UNROLL
  for (int e = 0; e < kChunk; ++e) x[e] = x[e] * step + low;
}

// Eight numbers, or one of them eight times.
MC_HD void load_factors(float (&x)[kChunk], const Half* from, bool each) {
  if (each) {
    load_chunk(x, from);
    return;
  }
  const float one = to_float(*from);
  MC_UNROLL
  for (int e = 0; e < kChunk; ++e) x[e] = one;
}

// A chunk of a segment: row `row`, components from `place` of the segment. Gaussian numbers are levels, without the norm.
template <class T>
MC_HD void load_segment_chunk(float (&x)[kChunk], const StreamBlock& from, int slot, const Segment& segment, int row,
                              int place, const float* levels) {
  const StreamShape& shape = from.shape;
  if (segment.format == Format::model) {
    load_chunk(x, from.latent<T>(slot) + row * shape.latent + segment.storage + place);
    return;
  }
  const std::int8_t* codes = from.codes(slot) + row * shape.code_bytes + segment.storage +
                             place / kChunk * bits_of(segment.format);
  if (is_gaussian(segment.format)) {
    with_gaussian_bits(segment.format, [&](auto bits) { load_levels<decltype(bits)::value>(x, codes, levels); });
    return;
  }
  // One scale and minimum for the chunk, or one for each component.
  const Half* scale = from.params(slot) + segment.scale + (segment.channel ? place : row);
  const Half* lowest = from.params(slot) + segment.minimum + (segment.channel ? place : row);
  float factor[kChunk], low[kChunk] = {};
  load_numbers(x, segment.format, codes);
  load_factors(factor, scale, segment.channel);
  if (is_integer(segment.format)) load_factors(low, lowest, segment.channel);
  MC_UNROLL
  for (int e = 0; e < kChunk; ++e) x[e] = x[e] * factor[e] + low[e];
}

// Calls `visit(component, chunk)` for the thread's chunks of its row's latent vector, without the norm. Components count
// stored ones, as a reading map's columns do. `levels`: the table, for gaussian segments.
template <class T, class Visit>
MC_HD void visit_latent(Thread thread, const StreamBlock& from, int slot, const float* levels, Visit visit) {
  constexpr int kStride = kRowThreads * kChunk;
  const int row = row_of(thread);
  MC_NO_UNROLL
  for (int i = 0; i < from.shape.segments; ++i) {
    const Segment& segment = from.shape.segment[i];
    if (segment.format == Format::drop) continue;
    const int begin = segment.stored, end = begin + segment.length;
    const int first = begin + ((component_of(thread, 0) - begin) & (kStride - 1));
    if (is_gaussian(segment.format)) {
      const std::int8_t* const codes = from.codes(slot) + row * from.shape.code_bytes + segment.storage;
      with_gaussian_bits(segment.format, [&](auto bits) {
        constexpr int kWidth = decltype(bits)::value;
        MC_NO_UNROLL
        for (int component = first; component < end; component += kStride) {
          float x[kChunk];
          load_levels<kWidth>(x, codes + (component - begin) / kChunk * kWidth, levels);
          visit(component, x);
        }
      });
      continue;
    }
    MC_NO_UNROLL
    for (int component = first; component < end; component += kStride) {
      float x[kChunk];
      load_segment_chunk<T>(x, from, slot, segment, row, component - begin, levels);
      visit(component, x);
    }
  }
}

// A chunk of a row's latent vector, without the norm; dropped components are zero.
template <class T>
MC_HD void load_latent_chunk(float (&x)[kChunk], const StreamBlock& from, int slot, int row, int component,
                             const float* levels) {
  const StreamShape& shape = from.shape;
  MC_UNROLL
  for (int e = 0; e < kChunk; ++e) x[e] = 0.0f;
  MC_NO_UNROLL
  for (int i = 0; i < shape.segments; ++i) {
    const Segment& segment = shape.segment[i];
    const int first = segment.component;
    if (segment.format == Format::drop || !inside(component, first, segment.length)) continue;
    load_segment_chunk<T>(x, from, slot, segment, row, component - first, levels);
    return;
  }
}

// The latent vectors of a slot to shared memory [B, pitch]; transforms are still to be undone.
template <class T, class Block>
MC_HD void latent_to_shared(Block& block, const StreamBlock& from, int slot, const float* levels, float* shared, int pitch) {
  block.each([&](Thread thread) {
    MC_NO_UNROLL
    for (int component = component_of(thread, 0); component < from.shape.rank; component += kRowThreads * kChunk) {
      float x[kChunk];
      load_latent_chunk<T>(x, from, slot, row_of(thread), component, levels);
      store_chunk(shared + row_of(thread) * pitch + component, x);
    }
  });
}

MC_HD bool has_transforms(const StreamShape& shape) {
  for (int i = 0; i < shape.segments; ++i) {
    if (shape.segment[i].hadamard && shape.segment[i].format != Format::drop) return true;
  }
  return false;
}

// Undoes the transforms of every component's rows in shared memory [B, pitch].
template <int Chunks, class Block>
MC_HD void undo_transforms(Block& block, const StreamShape& shape, float* shared, int pitch) {
  typename Block::template PerThread<Tile<Chunks>> tile;
  block.sync();
  tile_from_shared<Chunks>(block, tile, shared, pitch, 0, shape.rank);
  MC_NO_UNROLL
  for (int i = 0; i < shape.segments; ++i) {
    const Segment& segment = shape.segment[i];
    if (segment.hadamard && segment.format != Format::drop)
      hadamard<Chunks>(block, tile, segment.component, segment.length, shared, pitch);
  }
  block.sync();
  tile_to_shared<Chunks>(block, tile, shared, pitch, 0, shape.rank);
}

// A chunk of a member's residual.
MC_HD void load_residual_chunk(float (&x)[kChunk], const StreamBlock& from, int slot, int row, int component) {
  const StreamShape& shape = from.shape;
  const std::int8_t* codes = from.residual(shape.member, slot) + row * shape.residual_bytes();
  const Half* params = from.residual_params(shape.member, slot) + row;
  load_row_numbers(x, shape.residual, codes + component / kChunk * bits_of(shape.residual), params, params + kBlockSize);
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
