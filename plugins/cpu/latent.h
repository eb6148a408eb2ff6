// How the CPU kernels hold a stream's latent vectors: the stored components, then the residual's, in plane order.
//
// Unpacking 2^k codes of a byte one after the other would interleave vectors. Instead the first codes of all bytes come
// first, then the second ones, and so on (planes). Maps are brought into that order once.
#pragma once

#include <vector>

#include "minicache/layout.cuh"

namespace minicache::cpu {

// A run of columns that are stored alike: one of the stream's segments, or its residual.
struct Run {
  Format format;
  bool channel;                              // ranges per column, otherwise per token
  bool residual;
  std::int32_t length, column;               // columns, the first of them
  std::int32_t storage, scale, minimum;      // as Segment's; a residual's are those of its own pools
};

struct Latent {
  std::vector<Run> runs;
  std::vector<std::int32_t> order;  // component (stored ones, then the residual's) of each column
  std::int32_t width = 0;           // columns

  Latent() = default;
  explicit Latent(const StreamShape& shape) {
    for (int i = 0; i < shape.segments; ++i) {
      const Segment& s = shape.segment[i];
      if (s.format != Format::drop) {
        add(Run{s.format, s.channel, false, s.length, width, s.storage, s.scale, s.minimum});
      }
    }
    if (shape.has_residual()) add(Run{shape.residual, false, true, shape.dim, width, 0, 0, kBlockSize});
  }

 private:
  void add(const Run& run) {
    runs.push_back(run);
    const int bits = bits_of(run.format), planes = bits == 4 || bits == 2 || bits == 1 ? 8 / bits : 1;
    for (int plane = 0; plane < planes; ++plane) {
      for (int i = 0; i < run.length / planes; ++i) order.push_back(width + i * planes + plane);
    }
    width += run.length;
  }
};

// What reading one layer's stream takes, made once per engine.
//
// x = nu * sum over columns c of y_c rows[slot][c] + offset, rows [heads, width, D]; without rows, component order[c] of
// x is nu * y_c.
struct Reader {
  Latent latent;
  std::vector<float> rows;
  std::int32_t row_heads = 0;

  Reader() = default;
  explicit Reader(const StreamView& view) : latent(*view.shape) {
    const StreamShape& shape = *view.shape;
    const ReadMaps& maps = view.maps;
    if (maps.map == nullptr && !shape.has_residual()) return;
    row_heads = maps.residual_map != nullptr ? shape.heads : maps.map != nullptr ? maps.map_heads : 1;
    const int dim = shape.dim;
    rows.resize(static_cast<std::size_t>(row_heads) * latent.width * dim);
    float* row = rows.data();
    for (int head = 0; head < row_heads; ++head) {
      const float* map = maps.map == nullptr ? nullptr : maps.map + (maps.map_heads == 1 ? 0 : head) * dim * shape.stored;
      const float* own = maps.residual_map == nullptr ? nullptr : maps.residual_map + head * dim * dim;
      for (int column = 0; column < latent.width; ++column, row += dim) {
        const int component = latent.order[column], rest = component - shape.stored;
        for (int d = 0; d < dim; ++d) {
          row[d] = rest < 0 ? (map == nullptr ? d == component : map[d * shape.stored + component])
                            : (own == nullptr ? d == rest : own[d * dim + rest]);
        }
      }
    }
  }

  const float* slot_rows(int slot, int dim) const {
    return rows.data() + static_cast<std::int64_t>(row_heads == 1 ? 0 : slot) * latent.width * dim;
  }
};

}  // namespace minicache::cpu
