// One cache block of a stream, of one slot, in shared memory: what a stage of a pipeline holds.
#pragma once

#include "minicache/code_reader.cuh"
#include "minicache/fragments.cuh"
#include "minicache/stage_layout.cuh"

namespace minicache {

// What copies cache blocks of a stream, of one slot, to stages: a thread's part of it.
template <class T>
struct AnyStageSource {
  int slot;

  MC_HD static AnyStageSource of(Thread, const StreamReader&, int slot) { return {slot}; }

  // Starts copying block `id` to `stage`.
  template <class Block>
  MC_HD void fetch(Thread thread, const StreamReader& reader, char* stage, std::int32_t id) const {
    const StreamBlock source = reader.block(id);
    const StageLayout& layout = reader.stage;
    const int member = reader.shape.member;
    auto copy = [&](const StageField& field, const void* from) { copy_field<Block>(thread, stage, field, from); };
    if (layout.codes.offset >= 0) copy(layout.codes, source.codes(slot));
    if (layout.latent.offset >= 0) copy(layout.latent, source.template latent<T>(slot));
    if (layout.residual.offset >= 0) {
      copy(layout.residual, source.residual(member, slot));
      copy(layout.residual_params, source.residual_params(member, slot));
    }
    if (layout.params.offset >= 0) copy(layout.params, source.params(slot));
    if (layout.norms.offset >= 0) copy(layout.norms, source.norms(member, slot));
  }

  template <class Block>
  MC_HD static void copy_field(Thread thread, char* stage, const StageField& field, const void* from) {
    copy_rows<Block>(thread, stage + field.offset, field.stride, from, field.bytes, field.shift, field.rows,
                     field.rows);
  }
};

// Where something lies in block 0, and how far it is to the next block.
struct BlockAddress {
  const char* first;
  std::uint32_t step;

  template <class X>
  MC_HD static BlockAddress of(const X* first, const X* second, int offset) {
    return {forgotten(reinterpret_cast<const char*>(first) + offset),
            static_cast<std::uint32_t>((second - first) * sizeof(X))};
  }
  MC_HD const char* of(std::int32_t id) const { return first + std::uint64_t{static_cast<std::uint32_t>(id)} * step; }
};

// Ranges and norms of a plain stream: a thread's unit of 16 bytes of either.
struct StageUnit {
  static constexpr int kNormThreads = kDecodeThreads / 2;  // threads from here on copy norms, those before ranges
  static_assert(2 * kMostPlainParams <= 16 * kNormThreads, "a thread for each unit");

  BlockAddress source;
  std::int32_t target;  // in a stage; -1: none

  MC_HD static StageUnit of(Thread thread, const StreamReader& reader, int slot) {
    const StageLayout& layout = reader.stage;
    const StreamBlock first = reader.block(0), second = reader.block(1);
    StageUnit unit{{nullptr, 0}, -1};
    auto take = [&](const StageField& field, const Half* from, const Half* next, int n) {
      if (field.offset < 0 || n >= field.rows) return;
      unit.source = BlockAddress::of(from, next, 16 * n);
      unit.target = field.offset + 16 * n;
    };
    if (thread.index < kNormThreads) {
      take(layout.params, first.params(slot), second.params(slot), thread.index);
    } else {
      const int member = reader.shape.member;
      take(layout.norms, first.norms(member, slot), second.norms(member, slot), thread.index - kNormThreads);
    }
    return unit;
  }

  template <class Block>
  MC_HD void fetch(char* stage, std::int32_t id) const {
    if (target >= 0) Block::copy_async(stage + target, source.of(id));
  }
};

// Of a plain stream.
template <class T>
struct PlainStageSource {
  BlockAddress codes;
  int slot;
  StageUnit unit;

  MC_HD static PlainStageSource of(Thread thread, const StreamReader& reader, int slot) {
    return {BlockAddress::of(reader.block(0).codes(slot), reader.block(1).codes(slot), 0), slot,
            StageUnit::of(thread, reader, slot)};
  }

  template <class Block>
  MC_HD void fetch(Thread thread, const StreamReader& reader, char* stage, std::int32_t id) const {
    const StageLayout& layout = reader.stage;
    auto copy = [&](const StageField& field, const void* from) {
      AnyStageSource<T>::template copy_field<Block>(thread, stage, field, from);
    };
    if (layout.codes.offset >= 0) copy(layout.codes, codes.of(id));
    if (layout.latent.offset >= 0) copy(layout.latent, reader.block(id).template latent<T>(slot));
    unit.template fetch<Block>(stage, id);
  }
};

// Of a known stream: a thread copies 16 bytes of every kRows-th row.
template <int Kind, Part Of>
struct KnownStageSource {
  static constexpr int kBytes = known_bytes(Kind);
  static constexpr int kShift = row_shift(kBytes), kRows = kDecodeThreads >> kShift, kCopies = kBlockSize / kRows;
  static_assert(kBlockSize % kRows == 0 && kBytes == 16 << kShift, "all threads copy alike");
  static_assert(kCopies <= 2 && known_unit(Of, Kind, kRows, 0) == 0, "one place and the next");

  BlockAddress codes;
  std::int32_t target;  // in a stage
  StageUnit unit;

  MC_HD static KnownStageSource of(Thread thread, const StreamReader& reader, int slot) {
    const int row = thread.index >> kShift, unit = thread.index & ((1 << kShift) - 1);
    return {BlockAddress::of(reader.block(0).codes(slot), reader.block(1).codes(slot), row * kBytes + 16 * unit),
            row * kBytes + 16 * known_unit(Of, Kind, row, unit), StageUnit::of(thread, reader, slot)};
  }

  template <class Block>
  MC_HD void fetch(Thread, const StreamReader&, char* stage, std::int32_t id) const {
    const char* const from = codes.of(id);
    Block::copy_async(stage + target, from);
    if constexpr (kCopies == 2) Block::template copy_async_at<kRows * kBytes, kRows * kBytes>(stage + target, from);
    unit.template fetch<Block>(stage, id);
  }
};

template <class T, int Kind, Part Of>
using StageSource = std::conditional_t<is_known(Kind), KnownStageSource<Kind, Of>,
                                       std::conditional_t<Kind == kGeneral, AnyStageSource<T>, PlainStageSource<T>>>;

// Stages in shared memory, filled and read in turn.
struct StageRing {
  char* shared;
  int stage_bytes, end;
  int filled = 0, ready = 0;  // the next to fill and to read

  MC_HD StageRing(char* base, int bytes, int stages) : shared(base), stage_bytes(bytes), end(stages * bytes) {}
  MC_HD char* to_fill() { return next(filled); }
  MC_HD const char* to_read() { return next(ready); }

 private:
  MC_HD char* next(int& stage) {
    char* const result = shared + stage;
    stage = stage + stage_bytes == end ? 0 : stage + stage_bytes;
    return result;
  }
};

// Ranges of a run's components, the same for all tokens, if it has such: bytes from the stage's start.
struct ChannelRanges {
  bool any;
  const char* data;
  int first_scale, first_minimum;  // minima: of integer formats
  MC_HD const Half* scales() const { return reinterpret_cast<const Half*>(data + first_scale); }
  MC_HD const Half* minima() const { return reinterpret_cast<const Half*>(data + first_minimum); }
};

// Numbers that a stage has for each of its tokens: bytes from its start; -1: scales are 1, minima 0.
struct TokenRanges {
  const char* data;
  int scales, minima;
  MC_HD float scale(int token) const { return scales < 0 ? 1.0f : at(scales, token); }
  MC_HD float minimum(int token) const { return minima < 0 ? 0.0f : at(minima, token); }
  // Of tokens first, first + 1, first + 8, first + 9; `first` is even.
  MC_HD void load_scales(int first, float (&out)[4]) const { load(scales, first, 1.0f, out); }
  MC_HD void load_minima(int first, float (&out)[4]) const { load(minima, first, 0.0f, out); }

 private:
  MC_HD float at(int offset, int token) const { return to_float(reinterpret_cast<const Half*>(data + offset)[token]); }
  MC_HD void load(int offset, int first, float other, float (&out)[4]) const {
    MC_UNROLL
    for (int i = 0; i < 2; ++i) {
      out[2 * i] = out[2 * i + 1] = other;
      if (offset < 0) continue;
      const Pair<Half> two = detail::load<Pair<Half>>(data + offset + 2 * (first + 8 * i));
      out[2 * i] = first_of(two);
      out[2 * i + 1] = second_of(two);
    }
  }
};

// Reads a stage of keys or values, with what is known of the stream (`Kind`) and of the formats of its runs.
template <int Kind, Part Of, class Formats = AnyFormat>
struct Stage {
  const StreamReader& reader;
  const char* data;

  // Calls f with the number of each run that is a part of every token.
  template <class F>
  MC_HD void each_run(F f) const {
    each_of(reader.parts, reader.part_count, f);
  }
  // Of those whose weights, of values, are no other's.
  template <class F>
  MC_HD void each_weighted(F f) const {
    each_of(reader.weighted, reader.weighted_count, f);
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
      return known_bytes(Kind);
    } else {
      return run(n).stride;
    }
  }
  MC_HD bool words(int n) const { return is_known(Kind) || run(n).words; }
  MC_HD float centre(int n) const {
    if constexpr (kCodes) {
      return centre_of(Formats::format);
    } else {
      return run(n).centre;
    }
  }
  // Whether codes are read with an offset.
  template <class T>
  MC_HD bool offset_codes() const {
    if constexpr (kCodes) return kOffsetCodes<T, Formats::format> && run(0).channel_scales < 0;
    return false;
  }
  MC_HD ChannelRanges channel_ranges(int n) const {
    if constexpr (kCodes) {
      return {has_ranges(Formats::format) && run(n).channel_scales >= 0, data, kParams, kParams + 2 * length(n)};
    } else {
      return {run(n).channel_scales >= 0, data, run(n).channel_scales, run(n).channel_minima};
    }
  }
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
  template <class F>
  MC_HD static void each_of(const std::int32_t* numbers, int count, F f) {
    if constexpr (is_known(Kind)) {
      f(0);
    } else {
      MC_NO_UNROLL
      for (int i = 0; i < count; ++i) f(numbers[i]);
    }
  }

  static constexpr bool kCodes = is_known(Kind) && !std::is_same_v<Formats, AnyFormat>;
  static constexpr int params_of_known() {
    if constexpr (kCodes) return (kBlockSize * known_bytes(Kind) + 127) / 128 * 128;
    return 0;
  }
  static constexpr int kParams = params_of_known();
};

template <int Kind, class Formats = AnyFormat>
using KeyStage = Stage<Kind, Part::key, Formats>;
template <int Kind, class Formats = AnyFormat>
using ValueStage = Stage<Kind, Part::value, Formats>;

// Calls f with the formats a stream's stages have: of a known stream the one it has.
template <int Kind, class F>
MC_HD void with_formats(const StreamReader& reader, F f) {
  auto one = [&](auto tag) { f(OneFormat<decltype(tag)::value>{}); };
  if constexpr (is_known(Kind)) {
    with_known_format(reader.shape.segment[0].format, one);
  } else {
    f(AnyFormat{});
  }
}

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
