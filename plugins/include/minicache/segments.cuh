// A block's latent vectors to stored segments: transform, then numbers or codes.
#pragma once

#include "minicache/hadamard.cuh"
#include "minicache/quantize.cuh"

namespace minicache {

// Shared memory of `store_segments`.
struct SegmentScratch {
  ColumnScratch columns;
  float* norms;              // [B], gaussian segments
  const std::int32_t* kept;  // [B], retained tokens
  std::int8_t* codes;        // [B, code_bytes]
};

MC_HD bool has_channel_ranges(const StreamShape& shape) {
  for (int i = 0; i < shape.segments; ++i) {
    if (shape.segment[i].channel && has_ranges(shape.segment[i].format)) return true;
  }
  return false;
}

// Linear merges keep only stored components, transformed by their matrix; all others hold every component, as it is.
MC_HD int first_component(const StreamShape& shape, const Segment& segment) {
  return shape.merge == Merge::linear ? segment.stored : segment.component;
}

MC_HD bool is_stored(const StreamShape& shape, int component) {
  MC_NO_UNROLL
  for (int i = 0; i < shape.segments; ++i) {
    const Segment& segment = shape.segment[i];
    if (segment.format != Format::drop && inside(component, first_component(shape, segment), segment.length)) return true;
  }
  return false;
}

template <class T, int Chunks, class Block>
MC_HD void store_segment(Block& block, const StreamBlock& to, int head, const Segment& segment,
                         typename Block::template PerThread<Tile<Chunks>>& tile, const SegmentScratch& s) {
  const StreamShape& shape = to.shape;
  const int first = first_component(shape, segment), row_bytes = shape.code_bytes;
  if (segment.hadamard && shape.merge != Merge::linear)
    hadamard<Chunks>(block, tile, first, segment.length, s.columns.tile, s.columns.pitch);
  std::int8_t* codes = s.codes + segment.storage;
  Half* params = to.params(head);
  if (segment.format == Format::model) {
    T* latent = to.latent<T>(head) + segment.storage;
    block.each([&](Thread thread) {
      MC_UNROLL
      for (int j = 0; j < Chunks; ++j) {
        const int component = component_of(thread, j);
        if (inside(component, first, segment.length))
          store_chunk(latent + row_of(thread) * shape.latent + component - first, tile(thread).x[j]);
      }
    });
  } else if (is_gaussian(segment.format)) {
    quantize_gaussian<Chunks>(block, tile, first, segment.length, segment.format, s.norms, codes, row_bytes);
  } else if (segment.channel) {
    quantize_columns<Chunks>(block, tile, first, segment.length, segment.format, s.kept, s.columns, codes, row_bytes,
                             params + segment.scale, params + segment.minimum);
  } else {
    quantize_tile<Chunks>(block, tile, first, segment.length, segment.format, [&](int row) {
      return RowTarget{codes + row * row_bytes, params + segment.scale + row,
                       is_integer(segment.format) ? params + segment.minimum + row : nullptr};
    });
  }
}

// Writes latent, codes, params and, of gaussian streams, norms of one slot.
template <class T, int Chunks, class Block>
MC_HD void store_segments(Block& block, const StreamBlock& to, int head,
                          typename Block::template PerThread<Tile<Chunks>>& tile, const SegmentScratch& s) {
  const StreamShape& shape = to.shape;
  if (shape.gaussian()) {
    standardize<Chunks>(block, tile, shape.stored, to.norms(0, head), s.norms,
                        [&](int component) { return is_stored(shape, component); });
  }
  MC_NO_UNROLL
  for (int i = 0; i < shape.segments; ++i) {
    if (shape.segment[i].format != Format::drop) store_segment<T, Chunks>(block, to, head, shape.segment[i], tile, s);
  }
  if (shape.code_bytes == 0) return;
  block.sync();
  copy_bytes(block, to.codes(head), s.codes, kBlockSize * shape.code_bytes);
}

}  // namespace minicache
