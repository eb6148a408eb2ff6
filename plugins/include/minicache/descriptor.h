// Stream descriptors: how a builder tells kernels, plugins and custom operators what a stream is, as plain numbers.
// Written by minicache_trt/descriptor.py.
//
//   integers  0 version · 1 part · 2 merge · 3 basis · 4 norm · 5 layers of the group · 6 this layer's place
//             7 retained · 8 retention · 9 sink tokens · 10 retained format · 11 residual format (drop: none)
//             12 align · 13 match heads · 14 segments, then for each: length · format · axis (1: channel) · hadamard
//   floats    0 t · 1 gamma
#pragma once

#include <cstdarg>
#include <cstdio>

#include "minicache/layout.cuh"

namespace minicache {

constexpr int kDescriptorVersion = 1;
constexpr int kDescriptorHead = 15, kDescriptorSegment = 4;

// What was wrong, for the person who can change it. An empty message means success.
struct Error {
  char message[256] = "";

  bool operator()(const char* format, ...) __attribute__((format(printf, 2, 3))) {
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(message, sizeof(message), format, arguments);
    va_end(arguments);
    return false;
  }
};

namespace detail {

inline bool in_range(const char* field, int value, int lowest, int highest, Error& error) {
  if (value >= lowest && value <= highest) return true;
  return error("%s: expected %d to %d, got %d", field, lowest, highest, value);
}

inline bool parse_segment(const std::int32_t* field, int number, StreamShape& shape, Error& error) {
  char name[40];
  const char* fields[] = {"length", "format", "axis", "transform"};
  const int highest[] = {kMaxGroup * kMaxHeadDim, kFormats - 1, 1, 1};
  for (int i = 0; i < kDescriptorSegment; ++i) {
    std::snprintf(name, sizeof(name), "segments[%d].%s", number, fields[i]);
    if (!in_range(name, field[i], i == 0 ? 16 : 0, highest[i], error)) return false;
  }
  if (field[0] % 16 != 0) return error("segments[%d].length: expected a multiple of 16, got %d", number, field[0]);
  Segment& segment = shape.segment[number];
  segment = Segment{};
  segment.length = field[0];
  segment.format = static_cast<Format>(field[1]);
  segment.channel = field[2] == 1;
  segment.hadamard = field[3] == 1;
  segment.component = shape.rank;
  segment.stored = shape.stored;
  segment.storage = segment.format == Format::model ? shape.latent : shape.code_bytes;
  segment.ranges = !has_ranges(segment.format) ? 0 : segment.channel ? segment.length : kBlockSize;
  segment.scale = shape.params;
  segment.minimum = shape.params + segment.ranges;
  shape.params += segment.ranges * (is_integer(segment.format) ? 2 : 1);
  shape.rank += segment.length;
  if (segment.format == Format::drop) return true;
  shape.stored += segment.length;
  if (segment.format == Format::model) {
    shape.latent += segment.length;
  } else {
    shape.code_bytes += segment.length * bits_of(segment.format) / 8;
  }
  return true;
}

}  // namespace detail

// Parse a descriptor; false with a message that names the field if it describes no stream.
inline bool parse_stream(const std::int32_t* integers, int count, const float* floats, int float_count, int heads,
                         int dim, StreamShape& shape, Error& error) {
  using detail::in_range;
  if (count < kDescriptorHead) return error("stream: expected at least %d integers, got %d", kDescriptorHead, count);
  if (float_count != 2) return error("stream: expected 2 floats (t, gamma), got %d", float_count);
  if (integers[0] != kDescriptorVersion)
    return error("stream: version %d of the description, this library reads %d", integers[0], kDescriptorVersion);
  static const char* const names[] = {"version",  "part",      "merge",       "basis",           "norm",
                                      "members",  "member",    "retained",    "retention",       "sink_tokens",
                                      "retained_format", "residual", "align", "match_heads", "segments"};
  const int highest[] = {kDescriptorVersion, 1, 3, 1, 1, kMaxGroup, kMaxGroup - 1, kBlockSize / 2, 2, kBlockSize / 2,
                         static_cast<int>(Format::int4), kFormats - 1, 1, 1, kMaxSegments};
  for (int i = 1; i < kDescriptorHead; ++i) {
    if (!in_range(names[i], integers[i], i == 5 || i == 14 ? 1 : 0, highest[i], error)) return false;
  }
  if (!in_range("member", integers[6], 0, integers[5] - 1, error)) return false;
  if (!in_range("sink_tokens", integers[9], 0, integers[7], error)) return false;
  if (heads < 1 || dim < 16 || dim > kMaxHeadDim || dim % 16 != 0)
    return error("head_dim: expected a multiple of 16 up to %d, got %d (%d heads)", kMaxHeadDim, dim, heads);
  if (count != kDescriptorHead + kDescriptorSegment * integers[14])
    return error("stream: expected %d integers for %d segments, got %d",
                 kDescriptorHead + kDescriptorSegment * integers[14], integers[14], count);
  shape = StreamShape{};
  shape.part = static_cast<Part>(integers[1]);
  shape.merge = static_cast<Merge>(integers[2]);
  shape.basis = static_cast<Basis>(integers[3]);
  shape.norm = static_cast<Norm>(integers[4]);
  shape.members = integers[5];
  shape.member = integers[6];
  shape.retained = integers[7];
  shape.retention = static_cast<Retention>(integers[8]);
  shape.sink_tokens = integers[9];
  shape.retained_format = static_cast<Format>(integers[10]);
  shape.residual = static_cast<Format>(integers[11]);
  shape.align = integers[12] == 1;
  shape.match_heads = integers[13] == 1;
  shape.segments = integers[14];
  shape.t = floats[0];
  shape.gamma = floats[1];
  shape.heads = heads;
  shape.dim = dim;
  if (shape.residual != Format::drop && !is_integer(shape.residual))
    return error("residual: expected int8, int4, int2 or drop, got format %d", integers[11]);
  for (int i = 0; i < shape.segments; ++i) {
    const std::int32_t* field = integers + kDescriptorHead + kDescriptorSegment * i;
    if (!detail::parse_segment(field, i, shape, error)) return false;
  }
  if (shape.stored == 0) return error("segments: expected at least one that is not dropped");
  const bool linear = shape.merge == Merge::linear;
  if (!linear && shape.rank != dim) return error("segments: expected head_dim %d components, got %d", dim, shape.rank);
  if (linear && shape.rank > minimum(kMaxRank, shape.members * dim))
    return error("segments: expected at most %d components, got %d", minimum(kMaxRank, shape.members * dim), shape.rank);
  return true;
}

}  // namespace minicache
