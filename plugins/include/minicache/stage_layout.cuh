// Where the fields of a stage lie, and what its runs need of them: laid out on the host, once for a launch.
#pragma once

#include "minicache/decode_split.cuh"
#include "minicache/format_dispatch.cuh"

namespace minicache {

// Runs of a stream's rows: its segments, the residual and the retained vectors.
constexpr int kResidualRun = kMaxSegments, kExactRun = kMaxSegments + 1, kRuns = kMaxSegments + 2;

// What is known of a layer's streams when a kernel is compiled: nothing, that they are plain, or also how many
// components their runs have, of codes of a format that `with_known_format` has. Plain: there is nothing beside runs of
// segments and norms, and ranges are few; wide if not every unit of 32 components has a warp of its own.
constexpr int kGeneral = 0, kPlain = 1, kWide = 2;
constexpr int kMostPlainParams = 2 * kMaxSegments * kBlockSize;  // of a head: as many as all runs' ranges per token
MC_HD constexpr bool is_known(int kind) { return kind > kWide; }

constexpr int kKnownBits = 4;
MC_HD constexpr bool has_known_format(Format format) { return format == Format::int4 || format == Format::g4; }
template <class F>
MC_HD void with_known_format(Format format, F f) {
  if (format == Format::int4) return f(FormatTag<Format::int4>{});
  return f(FormatTag<Format::g4>{});
}

MC_HD bool is_plain(const StreamShape& shape) {
  return !shape.has_residual() && shape.retained == 0 && shape.params <= kMostPlainParams;
}
MC_HD bool is_wide(const StreamShape& shape) { return shape.stored > 32 * kDecodeWarps; }
// The number of components to compile for; 0: none.
MC_HD int known_length(const StreamShape& shape) {
  const Segment& only = shape.segment[0];
  if (!is_plain(shape) || shape.segments != 1 || !has_known_format(only.format)) return 0;
  return only.length == 64 || only.length == 128 ? only.length : 0;
}
// What is known of a layer's keys and values together.
MC_HD int kind_of(const StreamShape& key, const StreamShape& value) {
  const int length = known_length(key);
  if (length > 0 && length == known_length(value)) return length;
  if (!is_plain(key) || !is_plain(value)) return kGeneral;
  return is_wide(key) || is_wide(value) ? kWide : kPlain;
}

// A number known when this is compiled.
template <int N>
struct Fixed {
  MC_HD constexpr operator int() const { return N; }
};

// Fields of a thread block's shared memory, one after another on multiples of 128 bytes.
struct SharedFields {
  std::int32_t bytes = 0;
  // Offset of the next one.
  std::int32_t operator()(std::int64_t size) {
    const std::int32_t offset = bytes;
    bytes += static_cast<std::int32_t>((size + 127) / 128 * 128);
    return offset;
  }
};

// A field of a stage: where it lies, and how it is copied there. Rows of a multiple of 16 bytes keep apart, all others
// are copied as units of 16 bytes.
struct StageField {
  std::int32_t offset;  // -1: the stream has none
  std::int32_t bytes, stride, shift, rows;
};

// `bytes`: of all fields; strides: bytes between the rows of two tokens.
struct StageLayout {
  StageField codes, latent, residual, params, norms, residual_params;
  std::int32_t bytes;
  std::int32_t code_stride, latent_stride, residual_stride;
};

// Rows of a multiple of 16 bytes get an odd number of 16-byte units, which keeps eight neighbouring rows in different
// banks; others stay as they are stored, one after another.
MC_HD constexpr int stage_stride(int bytes) { return bytes % 16 != 0 || bytes / 16 % 2 == 1 ? bytes : bytes + 16; }

// Bytes of a row of a known stream's codes; they lie one after another. Threads read keys by rows, whose units of 16
// bytes lie in different banks as they are stored; values by columns, of rows 2 t and following,
// t = lane % 4: their units change places.
MC_HD constexpr int known_bytes(int length) { return length * kKnownBits / 8; }
MC_HD constexpr int known_unit(Part part, int length, int row, int unit) {
  if (part == Part::key) return unit;
  return length == 64 ? unit ^ (row >> 2 & 1) : unit ^ (row >> 1 & 3);
}

// `known`: whether the kernel is compiled for the stream's runs.
template <class T>
StageLayout stage_layout(const StreamShape& shape, bool known) {
  StageLayout layout{};
  auto field = [&](int bytes, int rows, int stride) -> StageField {
    if (bytes == 0) return {-1, 0, 0, 0, 0};
    const int offset = layout.bytes;
    layout.bytes += ceil_div(rows * stride, 128) * 128;
    if (rows > 1 && bytes % 16 == 0) return {offset, bytes, stride, row_shift(bytes), rows};
    return {offset, 16, 16, 0, rows * bytes / 16};
  };
  auto rows = [&](int bytes, std::int32_t& stride) {
    stride = known ? known_bytes(shape.segment[0].length) : stage_stride(bytes);
    return field(bytes, kBlockSize, stride);
  };
  auto flat = [&](int bytes) { return field(bytes, 1, bytes); };
  layout.codes = rows(shape.code_bytes, layout.code_stride);
  layout.latent = rows(shape.latent * static_cast<int>(sizeof(T)), layout.latent_stride);
  layout.residual = rows(shape.has_residual() ? shape.residual_bytes() : 0, layout.residual_stride);
  layout.params = flat(shape.params * 2);
  layout.norms = flat(shape.has_norms() ? kBlockSize * 2 : 0);
  layout.residual_params = flat(shape.has_residual() ? kBlockSize * 4 : 0);
  return layout;
}

// A run of a stage's rows. Offsets are bytes from the stage's start; -1: it has no such ranges.
struct StageRun {
  Format format;
  std::int32_t length, stored;  // components, and the first one's number among the stored ones
  std::int32_t rows, stride;    // row of token 0, bytes between the rows of two tokens
  std::int32_t token_scales, token_minima, channel_scales, channel_minima;
  std::int32_t weights;         // the first run whose weights, of values, are the same
  bool words;                   // whether words of its codes are aligned
  float centre;                 // `centre_of` the format
};

// A stream as the kernels read it: of one layer.
struct StreamReader {
  StreamShape shape;
  StreamPools pools;
  ReadMaps maps;
  StageLayout stage;
  StageRun runs[kResidualRun + 1];
  // Numbers of the runs that are a part of every token; of those of them whose weights, of values, are no other's.
  std::int32_t parts[kResidualRun + 1], weighted[kResidualRun + 1], part_count, weighted_count;

  MC_HD bool has_run(int n) const {
    if (n == kResidualRun) return shape.has_residual();
    return n < shape.segments && shape.segment[n].format != Format::drop;
  }
  MC_HD int slot(int head) const { return maps.slots == nullptr ? head : static_cast<int>(maps.slots[head]); }
  MC_HD StreamBlock block(std::int64_t id) const { return {shape, pools, id}; }
};

template <class T>
StageRun stage_run(const StreamShape& shape, const StageLayout& stage, int n) {
  StageRun run{};
  int params = stage.params.offset, scale = 0, minimum = kBlockSize;
  bool channel = false;
  if (n == kResidualRun) {
    run.format = shape.residual;
    run.length = shape.dim;
    run.rows = stage.residual.offset;
    run.stride = stage.residual_stride;
    params = stage.residual_params.offset;
  } else {
    const Segment& segment = shape.segment[n];
    const bool model = segment.format == Format::model;
    run.format = segment.format;
    run.length = segment.length;
    run.stored = segment.stored;
    run.rows = model ? stage.latent.offset + segment.storage * static_cast<int>(sizeof(T))
                     : stage.codes.offset + segment.storage;
    run.stride = model ? stage.latent_stride : stage.code_stride;
    scale = segment.scale;
    minimum = segment.minimum;
    channel = segment.channel;
  }
  const int scales = has_ranges(run.format) ? params + 2 * scale : -1;
  const int minima = is_integer(run.format) ? params + 2 * minimum : -1;
  run.token_scales = channel ? -1 : scales;
  run.token_minima = channel ? -1 : minima;
  run.channel_scales = channel ? scales : -1;
  run.channel_minima = channel ? minima : -1;
  run.words = (run.stride | run.rows) % 4 == 0;
  run.centre = centre_of(run.format);
  return run;
}

template <class T>
StreamReader stream_reader(const StreamShape& shape, const StreamPools& pools, const ReadMaps& maps,
                           bool known) {
  StreamReader reader{shape, pools, maps, stage_layout<T>(shape, known), {}, {}, {}, 0, 0};
  for (int n = 0; n <= kResidualRun; ++n) {
    if (!reader.has_run(n)) continue;
    StageRun& run = reader.runs[n];
    run = stage_run<T>(shape, reader.stage, n);
    run.weights = n;
    for (int m = n - 1; m >= 0; --m) {
      const StageRun& other = reader.runs[m];
      if (reader.has_run(m) && run.token_scales < 0 && other.token_scales < 0 &&
          (run.format == Format::model) == (other.format == Format::model)) {
        run.weights = m;
      }
    }
    reader.parts[reader.part_count++] = n;
    if (run.weights == n) reader.weighted[reader.weighted_count++] = n;
  }
  return reader;
}

}  // namespace minicache
