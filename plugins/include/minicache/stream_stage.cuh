// One cache block of a stream, of one slot, in shared memory: what a stage of a pipeline holds.
#pragma once

#include "minicache/code_reader.cuh"
#include "minicache/decode_split.cuh"

namespace minicache {

// Runs of a stream's rows: its segments, the residual and the retained vectors.
constexpr int kResidualRun = kMaxSegments, kExactRun = kMaxSegments + 1, kRuns = kMaxSegments + 2;

// Byte offsets of a stage's fields (-1: the stream has none), and bytes between the rows of two tokens.
struct StageLayout {
  std::int32_t codes, latent, residual, params, norms, residual_params, bytes;
  std::int32_t code_stride, latent_stride, residual_stride;
};

// Rows of a multiple of 16 bytes get an odd number of 16-byte units, which keeps eight neighbouring rows in different
// banks; others stay as they are stored, one after another.
MC_HD int stage_stride(int bytes) { return bytes % 16 != 0 || bytes / 16 % 2 == 1 ? bytes : bytes + 16; }

template <class T>
StageLayout stage_layout(const StreamShape& shape) {
  StageLayout layout{};
  auto field = [&](int bytes) {
    const int offset = bytes > 0 ? layout.bytes : -1;
    layout.bytes += ceil_div(bytes, 128) * 128;
    return offset;
  };
  layout.code_stride = stage_stride(shape.code_bytes);
  layout.latent_stride = stage_stride(shape.latent * static_cast<int>(sizeof(T)));
  layout.residual_stride = stage_stride(shape.has_residual() ? shape.residual_bytes() : 0);
  layout.codes = field(shape.code_bytes > 0 ? kBlockSize * layout.code_stride : 0);
  layout.latent = field(shape.latent > 0 ? kBlockSize * layout.latent_stride : 0);
  layout.residual = field(shape.has_residual() ? kBlockSize * layout.residual_stride : 0);
  layout.params = field(shape.params * 2);
  layout.norms = field(shape.has_norms() ? kBlockSize * 2 : 0);
  layout.residual_params = field(shape.has_residual() ? kBlockSize * 4 : 0);
  return layout;
}

// A stream as the kernels read it: of one layer.
struct StreamReader {
  StreamShape shape;
  StreamPools pools;
  ReadMaps maps;
  StageLayout stage;
  Segment residual, exact;

  MC_HD const Segment& run(int n) const {
    return n == kResidualRun ? residual : n == kExactRun ? exact : shape.segment[n];
  }
  // Whether run number n is a part of every token.
  MC_HD bool has_run(int n) const {
    if (n == kResidualRun) return shape.has_residual();
    return n < shape.segments && shape.segment[n].format != Format::drop;
  }
  MC_HD int slot(int head) const { return maps.slots == nullptr ? head : static_cast<int>(maps.slots[head]); }
  MC_HD int map_head(int slot) const { return maps.map_heads == 1 ? 0 : slot; }
  MC_HD StreamBlock block(std::int64_t id) const { return {shape, pools, id}; }
};

template <class T>
StreamReader stream_reader(const StreamShape& shape, const StreamPools& pools, const ReadMaps& maps) {
  auto row = [&](Format format, int ranges) {
    Segment run{};
    run.length = shape.dim;
    run.format = format;
    run.minimum = ranges;
    run.ranges = ranges;
    return run;
  };
  return {shape, pools, maps, stage_layout<T>(shape), row(shape.residual, kBlockSize),
          row(shape.retained_format, has_ranges(shape.retained_format) ? shape.retained : 0)};
}

// Starts copying block `id` of slot `slot` to `stage`.
template <class T, class Block>
MC_HD void fetch_stage(Block& block, const StreamReader& reader, char* stage, std::int64_t id, int slot) {
  const StreamBlock source = reader.block(id);
  const StreamShape& shape = reader.shape;
  const StageLayout& layout = reader.stage;
  block.each([&](Thread thread) {
    auto rows = [&](int offset, int stride, const void* from, int bytes) {
      if (bytes % 16 == 0) {
        copy_rows<Block>(thread, stage + offset, stride, from, bytes, kBlockSize, kBlockSize);
      } else {  // 64 rows of any length make whole units of 16 bytes
        copy_rows<Block>(thread, stage + offset, 16, from, 16, kBlockSize / 16 * bytes, kBlockSize / 16 * bytes);
      }
    };
    auto flat = [&](int offset, const void* from, int bytes) {
      copy_rows<Block>(thread, stage + offset, 16, from, 16, bytes / 16, bytes / 16);
    };
    if (layout.codes >= 0) rows(layout.codes, layout.code_stride, source.codes(slot), shape.code_bytes);
    if (layout.latent >= 0) {
      const int bytes = shape.latent * static_cast<int>(sizeof(T));
      rows(layout.latent, layout.latent_stride, source.template latent<T>(slot), bytes);
    }
    if (layout.params >= 0) flat(layout.params, source.params(slot), shape.params * 2);
    if (layout.norms >= 0) flat(layout.norms, source.norms(shape.member, slot), kBlockSize * 2);
    if (layout.residual >= 0) {
      rows(layout.residual, layout.residual_stride, source.residual(shape.member, slot), shape.residual_bytes());
      flat(layout.residual_params, source.residual_params(shape.member, slot), kBlockSize * 4);
    }
  });
}

// Reads a stage.
struct Stage {
  const StreamReader& reader;
  const char* data;

  // Row of token 0 of run n, bytes between rows, and whether words of its codes are aligned.
  template <class T>
  MC_HD const char* rows(int n) const {
    const Segment& run = reader.run(n);
    if (n == kResidualRun) return data + reader.stage.residual;
    return run.format == Format::model ? data + reader.stage.latent + run.storage * static_cast<int>(sizeof(T))
                                       : data + reader.stage.codes + run.storage;
  }
  MC_HD int stride(int n) const {
    if (n == kResidualRun) return reader.stage.residual_stride;
    return reader.run(n).format == Format::model ? reader.stage.latent_stride : reader.stage.code_stride;
  }
  MC_HD bool words(int n) const { return (stride(n) | reader.run(n).storage) % 4 == 0; }
  // Scales and minima of run n start at its `scale` and `minimum`.
  MC_HD const Half* params(int n) const {
    const int offset = n == kResidualRun ? reader.stage.residual_params : reader.stage.params;
    return reinterpret_cast<const Half*>(data + offset);
  }
  MC_HD const Half* channel_params(int n) const {
    return reader.run(n).channel && has_ranges(reader.run(n).format) ? params(n) : nullptr;
  }
  MC_HD float scale(int n, int token) const {
    const Segment& run = reader.run(n);
    return run.channel || !has_ranges(run.format) ? 1.0f : to_float(params(n)[run.scale + token]);
  }
  MC_HD float minimum(int n, int token) const {
    const Segment& run = reader.run(n);
    return run.channel || !is_integer(run.format) ? 0.0f : to_float(params(n)[run.minimum + token]);
  }
  MC_HD float norm(int token) const {
    return reader.stage.norms < 0 ? 1.0f : to_float(reinterpret_cast<const Half*>(data + reader.stage.norms)[token]);
  }
};

// Retained vectors of a split, numbered over its cache blocks: `capacity` of them each.
struct ExactRows {
  const StreamReader& reader;
  const std::int32_t* table;  // block ids, from the first one seen on
  const void** rows;          // in shared memory, after `find_rows`
  int slot, count;

  template <class T, class Block>
  MC_HD void find_rows(Block& block) const {
    block.each([&](Thread thread) {
      for (int n = thread.index; n < count; n += kDecodeThreads) rows[n] = row<T>(n);
    });
  }

  MC_HD int clamped(int n) const { return minicache::minimum(n, count - 1); }
  MC_HD StreamBlock block(int n) const { return reader.block(table[n / reader.shape.retained]); }
  template <class T>
  MC_HD const void* row(int n) const {
    const StreamShape& shape = reader.shape;
    const int place = n % shape.retained;
    if (shape.retained_format == Format::model) {
      return block(n).template exact<T>(shape.member, slot) + place * shape.dim;
    }
    return block(n).exact_codes(shape.member, slot) + place * shape.exact_bytes();
  }
  // Token it stands for, counted from the first block; -1: none.
  MC_HD int token(int n) const {
    const int offset = block(n).retained_index(slot)[n % reader.shape.retained];
    return offset < 0 ? -1 : n / reader.shape.retained * kBlockSize + offset;
  }
  MC_HD float scale(int n) const {
    if (!has_ranges(reader.exact.format)) return 1.0f;
    return to_float(block(n).exact_params(reader.shape.member, slot)[n % reader.shape.retained]);
  }
  MC_HD float minimum(int n) const {
    if (!is_integer(reader.exact.format)) return 0.0f;
    return to_float(block(n).exact_params(reader.shape.member, slot)[reader.exact.minimum + n % reader.shape.retained]);
  }
};

}  // namespace minicache
