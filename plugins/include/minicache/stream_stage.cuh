// One cache block of a stream, of one slot, in shared memory: what a stage of a pipeline holds.
#pragma once

#include "minicache/code_reader.cuh"
#include "minicache/stage_layout.cuh"

namespace minicache {

// Starts copying 64 rows of Bytes bytes to rows `stage_stride(Bytes)` apart.
template <int Bytes, class Block>
MC_HD void copy_known_rows(Thread thread, char* target, const char* source) {
  constexpr int kShift = row_shift(Bytes), kRows = kDecodeThreads >> kShift, kStride = stage_stride(Bytes);
  const int row = thread.index >> kShift, column = (thread.index & ((1 << kShift) - 1)) * 16;
  if (row >= kBlockSize || column >= Bytes) return;
  MC_UNROLL
  for (int i = 0; i < (kBlockSize + kRows - 1) / kRows; ++i) {
    Block::copy_async(target + row * kStride + column + i * kRows * kStride,
                      source + row * Bytes + column + i * kRows * Bytes);
  }
}

// Starts copying block `id` of slot `slot` to `stage`.
template <class T, int Kind, class Formats, class Block>
MC_HD void fetch_stage(Block& block, const StreamReader& reader, char* stage, std::int64_t id, int slot) {
  const StreamBlock source = reader.block(id);
  const StageLayout& layout = reader.stage;
  const int member = reader.shape.member;
  block.each([&](Thread thread) {
    auto copy = [&](const StageField& field, const void* from) {
      copy_rows<Block>(thread, stage + field.offset, field.stride, from, field.bytes, field.shift, field.rows,
                       field.rows);
    };
    // A field of at most a unit of 16 bytes per thread.
    auto copy_units = [&](const StageField& field, const void* from) {
      const int at = 16 * thread.index;
      if (thread.index < field.rows) Block::copy_async(stage + field.offset + at, static_cast<const char*>(from) + at);
    };
    if constexpr (is_known(Kind) && !std::is_same_v<Formats, AnyFormat>) {
      constexpr int kBytes = Kind * bits_of(Formats::format) / 8;
      const std::int64_t first = (id * reader.shape.heads + slot) * (kBlockSize * kBytes);
      copy_known_rows<kBytes, Block>(thread, stage, reinterpret_cast<const char*>(reader.pools.codes) + first);
      if (layout.params.offset >= 0) copy_units(layout.params, source.params(slot));
      if (layout.norms.offset >= 0) copy_units(layout.norms, source.norms(member, slot));
    } else {
      if (layout.codes.offset >= 0) copy(layout.codes, source.codes(slot));
      if (!is_known(Kind) && layout.latent.offset >= 0) copy(layout.latent, source.template latent<T>(slot));
      if (!Kind && layout.residual.offset >= 0) {
        copy(layout.residual, source.residual(member, slot));
        copy(layout.residual_params, source.residual_params(member, slot));
      }
      if (layout.params.offset >= 0) copy(layout.params, source.params(slot));
      if (layout.norms.offset >= 0) copy(layout.norms, source.norms(member, slot));
    }
  });
}

// Numbers that a stage has for each of its tokens: bytes from its start; -1: scales are 1, minima 0.
struct TokenRanges {
  const char* data;
  int scales, minima;
  MC_HD float scale(int token) const { return scales < 0 ? 1.0f : at(scales, token); }
  MC_HD float minimum(int token) const { return minima < 0 ? 0.0f : at(minima, token); }

 private:
  MC_HD float at(int offset, int token) const { return to_float(reinterpret_cast<const Half*>(data + offset)[token]); }
};

// Reads a stage, with what is known of the stream (`Kind`) and of the formats of its runs.
template <int Kind, class Formats = AnyFormat>
struct Stage {
  const StreamReader& reader;
  const char* data;

  // Calls f with the number of each run that is a part of every token.
  template <class F>
  MC_HD void each_run(F f) const {
    if constexpr (is_known(Kind)) {
      f(0);
    } else {
      MC_NO_UNROLL
      for (int i = 0; i < reader.part_count; ++i) f(reader.parts[i]);
    }
  }
  MC_HD const StageRun& run(int n) const { return reader.runs[n]; }
  MC_HD auto length(int n) const {
    if constexpr (is_known(Kind)) {
      return Fixed<Kind>{};
    } else {
      return run(n).length;
    }
  }
  MC_HD const char* rows(int n) const { return is_known(Kind) ? data : data + run(n).rows; }
  MC_HD int stride(int n) const {
    if constexpr (kCodes) {
      return stage_stride(Kind * bits_of(Formats::format) / 8);
    } else {
      return run(n).stride;
    }
  }
  MC_HD bool words(int n) const { return is_known(Kind) || run(n).words; }
  // Whether codes are read with an offset.
  template <class T>
  MC_HD bool offset_codes() const {
    if constexpr (kCodes) return kOffsetCodes<T, Formats::format> && run(0).channel_scales < 0;
    return false;
  }
  // Of a run with ranges per channel; null: it has none.
  MC_HD const Half* channel_scales(int n) const { return channel(n, run(n).channel_scales, 0); }
  MC_HD const Half* channel_minima(int n) const { return channel(n, run(n).channel_minima, length(n)); }
  MC_HD TokenRanges token_ranges(int n) const {
    if constexpr (kCodes) {  // the ranges are the second field
      const int scales = run(n).token_scales < 0 || !has_ranges(Formats::format) ? -1 : kParams;
      return {data, scales, scales < 0 || !is_integer(Formats::format) ? -1 : kParams + 2 * kBlockSize};
    } else {
      return {data, run(n).token_scales, run(n).token_minima};
    }
  }
  // Norms of the tokens as scales.
  MC_HD TokenRanges norms() const { return {data, reader.stage.norms.offset, -1}; }

 private:
  static constexpr bool kCodes = is_known(Kind) && !std::is_same_v<Formats, AnyFormat>;
  static constexpr int params_of_known() {
    if constexpr (kCodes) return (kBlockSize * stage_stride(Kind * bits_of(Formats::format) / 8) + 127) / 128 * 128;
    return 0;
  }
  static constexpr int kParams = params_of_known();

  // Numbers `offset` bytes from the stage's start, or number `first` of the ranges of a known run.
  MC_HD const Half* channel(int n, int offset, int first) const {
    if constexpr (kCodes) {
      if (!has_ranges(Formats::format)) return nullptr;
      return run(n).channel_scales < 0 ? nullptr : reinterpret_cast<const Half*>(data + kParams) + first;
    } else {
      return offset < 0 ? nullptr : reinterpret_cast<const Half*>(data + offset);
    }
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
    if (!has_ranges(reader.shape.retained_format)) return 1.0f;
    return to_float(block(n).exact_params(reader.shape.member, slot)[n % reader.shape.retained]);
  }
  MC_HD float minimum(int n) const {
    const int capacity = reader.shape.retained;
    if (!is_integer(reader.shape.retained_format)) return 0.0f;
    return to_float(block(n).exact_params(reader.shape.member, slot)[capacity + n % capacity]);
  }
};

}  // namespace minicache
