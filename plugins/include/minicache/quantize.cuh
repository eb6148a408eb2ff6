// Rows and columns of a tile to codes, scales and minima. What decides a code is not contracted: every device agrees.
#pragma once

#include "minicache/codes.cuh"
#include "minicache/elementary.cuh"

namespace minicache {

// x / divisor, rounded as IEEE division does: the remainder corrects the product with the divisor's reciprocal. 0 if the
// divisor and its reciprocal are.
MC_HD float quotient_of(float x, float divisor, float reciprocal) {
#if MC_ON_DEVICE
  const float quotient = __fmul_rn(x, reciprocal);
  return __fmaf_rn(__fmaf_rn(-quotient, divisor, x), reciprocal, quotient);
#else
  return reciprocal > 0.0f ? divide(x, divisor) : 0.0f;
#endif
}

// What one range codes by, as stored: number = scale * code + lowest (float8: lowest is 0).
struct Range {
  float scale, reciprocal, lowest;

  // `high`, `low`: largest and smallest number; float8: largest magnitude and 0.
  MC_HD static Range of(Format format, float high, float low) {
    const float steps = format == Format::fp8 ? kFloat8Max : static_cast<float>((1 << bits_of(format)) - 1);
    const float scale = to_float(saturate_half(divide(add(high, -low), steps)));
    return Range{scale, scale > 0.0f ? divide(1.0f, scale) : 0.0f, to_float(saturate_half(low))};
  }

  MC_HD float ratio(float y) const { return quotient_of(add(y, -lowest), scale, reciprocal); }
};

// Codes of eight numbers, `range_of(e)` the range of each; 0 where the scale is.
template <int Width, class RangeOf>
MC_HD PackedCodes codes_of(Format format, const float (&y)[kChunk], RangeOf range_of) {
  PackedCodes codes;
  if (Width == 8 && format == Format::fp8) {
    MC_UNROLL
    for (int e = 0; e < kChunk; ++e) codes.template put<Width>(e, float_to_fp8(range_of(e).ratio(y[e])));
    return codes;
  }
  // A number up to 2^22 has its nearest integer, half to even, in the lowest bits of its sum with 1.5 x 2^23. Codes are
  // added up with the other bits of the sums, which are known: no conversions, which a GPU does slowly.
  constexpr float kLevels = static_cast<float>((1 << Width) - 1), kRounder = 0x1.8p23f;
  constexpr std::uint32_t kBits = 0x4b400000u;  // of kRounder
  std::uint32_t known[2] = {};
  MC_UNROLL
  for (int e = 0; e < kChunk; ++e) {
    const float ratio = minimum(maximum(range_of(e).ratio(y[e]), 0.0f), kLevels);
    const std::uint32_t bits = bit_cast<std::uint32_t>(add(ratio, kRounder));
    const bool upper = Width == 8 && e >= 4;
    const int shift = Width * (upper ? e - 4 : e);
    (upper ? codes.high : codes.low) += bits << shift;
    known[upper] += kBits << shift;
  }
  codes.low -= known[0];
  codes.high -= known[1];
  return codes;
}

// Where a row's codes and ranges go; null: nowhere.
struct RowTarget {
  std::int8_t* codes;
  Half* scale;
  Half* lowest;
};

// Largest and smallest number of a row so far; of float8, magnitudes and 0.
struct Extent {
  float most, least;

  MC_HD static Extent none(Format format) {
    return format == Format::fp8 ? Extent{0.0f, 0.0f} : Extent{-kInfinity, kInfinity};
  }
  MC_HD void take(Format format, const float (&y)[kChunk]) {
    take<kChunk>(format, y, [&](int) -> Extent& { return *this; });
  }
  // `extent_of(e)` takes y[e].
  template <int Count, class ExtentOf>
  MC_HD static void take(Format format, const float (&y)[Count], ExtentOf extent_of) {
    if (format == Format::fp8) {
      MC_UNROLL
      for (int e = 0; e < Count; ++e) extent_of(e).most = maximum(extent_of(e).most, y[e] < 0.0f ? -y[e] : y[e]);
      return;
    }
    MC_UNROLL
    for (int e = 0; e < Count; ++e) {
      extent_of(e).most = maximum(extent_of(e).most, y[e]);
      extent_of(e).least = minimum(extent_of(e).least, y[e]);
    }
  }
};

template <class Block>
MC_HD void extent_of_row(Block& block, typename Block::template PerThread<Extent>& extent) {
  typename Block::template PerThread<float> most, least;
  block.each([&](Thread thread) {
    most(thread) = extent(thread).most;
    least(thread) = -extent(thread).least;
  });
  block.template reduce_max<kRowThreads>(most);
  block.template reduce_max<kRowThreads>(least);
  block.each([&](Thread thread) { extent(thread) = Extent{most(thread), -least(thread)}; });
}

MC_HD void store_range(const RowTarget& to, const Range& range) {
  *to.scale = from_float<Half>(range.scale);
  if (to.lowest != nullptr) *to.lowest = from_float<Half>(range.lowest);
}

template <int Width>
MC_HD void store_chunk_codes(std::int8_t* to, Format format, const Range& range, const float (&y)[kChunk]) {
  store_codes<Width>(to, codes_of<Width>(format, y, [&](int) { return range; }));
}

// Components [first, first + length) of a tile with one range per row; `target(row)` is a RowTarget.
template <int Chunks, class Block, class Target>
MC_HD void quantize_tile(Block& block, const typename Block::template PerThread<Tile<Chunks>>& tile, int first,
                         int length, Format format, Target target) {
  typename Block::template PerThread<Extent> extent;
  block.each([&](Thread thread) {
    extent(thread) = Extent::none(format);
    MC_UNROLL
    for (int j = 0; j < Chunks; ++j) {
      if (inside(component_of(thread, j), first, length)) extent(thread).take(format, tile(thread).x[j]);
    }
  });
  extent_of_row(block, extent);
  block.each([&](Thread thread) {
    const RowTarget to = target(row_of(thread));
    const Range range = Range::of(format, extent(thread).most, extent(thread).least);
    if (leads_row(thread)) store_range(to, range);
    with_range_bits(format, [&](auto bits) {
      constexpr int kWidth = decltype(bits)::value;
      MC_UNROLL
      for (int j = 0; j < Chunks; ++j) {
        const int place = component_of(thread, j) - first;
        if (inside(place, 0, length))
          store_chunk_codes<kWidth>(to.codes + place / kChunk * kWidth, format, range, tile(thread).x[j]);
      }
    });
  });
}

// Rows of `length` components with one range each, read twice by `load(chunk, row, component)`: small code for what is
// rare. Rows whose `target(row)` has no codes are skipped.
template <class Block, class Load, class Target>
MC_HD void quantize_rows(Block& block, int length, Format format, Load load, Target target) {
  typename Block::template PerThread<Extent> extent;
  block.each([&](Thread thread) {
    Extent own = Extent::none(format);
    MC_NO_UNROLL
    for (int component = component_of(thread, 0); component < length; component += kRowThreads * kChunk) {
      float y[kChunk];
      load(y, row_of(thread), component);
      own.take(format, y);
    }
    extent(thread) = own;
  });
  extent_of_row(block, extent);
  block.each([&](Thread thread) {
    const RowTarget to = target(row_of(thread));
    if (to.codes == nullptr) return;
    const Range range = Range::of(format, extent(thread).most, extent(thread).least);
    if (leads_row(thread)) store_range(to, range);
    MC_NO_UNROLL
    for (int component = component_of(thread, 0); component < length; component += kRowThreads * kChunk) {
      float y[kChunk];
      load(y, row_of(thread), component);
      with_range_bits(format, [&](auto bits) {
        constexpr int kWidth = decltype(bits)::value;
        store_chunk_codes<kWidth>(to.codes + component / kChunk * kWidth, format, range, y);
      });
    }
  });
}

// Shared memory of `quantize_columns`: a tile [B, pitch], and scale, reciprocal and lowest number of every column.
struct ColumnScratch {
  float* tile;
  int pitch;
  float* ranges;  // [3][kMaxRank]
};

// Ranges of the tile's columns, to shared memory and to `scales` and (integers) `lowest`. Eight neighbouring lanes take
// four columns, each every eighth row: no bank conflicts.
template <class Block>
MC_HD void find_column_ranges(Block& block, int length, Format format, const std::int32_t* skipped,
                              const ColumnScratch& scratch, Half* scales, Half* lowest) {
  constexpr int kRows = 8, kColumns = 4;
  typename Block::template PerThread<float> most[kColumns], least[kColumns];
  const auto column_of = [](Thread thread) { return kColumns * (thread.index / kRows); };
  MC_NO_UNROLL
  for (int base = 0; base < length; base += kColumns * kTileThreads / kRows) {
    block.each([&](Thread thread) {
      const int column = base + column_of(thread);
      Extent extent[kColumns];
      MC_UNROLL
      for (int c = 0; c < kColumns; ++c) extent[c] = Extent::none(format);
      MC_NO_UNROLL
      for (int row = thread.index % kRows; row < kBlockSize && column < length; row += kRows) {
        if (skipped[row]) continue;
        float y[kColumns];
        load_four(y, scratch.tile + row * scratch.pitch + column);
        Extent::take<kColumns>(format, y, [&](int c) -> Extent& { return extent[c]; });
      }
      MC_UNROLL
      for (int c = 0; c < kColumns; ++c) {
        most[c](thread) = extent[c].most;
        least[c](thread) = -extent[c].least;
      }
    });
    MC_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      block.template reduce_max<kRows>(most[c]);
      block.template reduce_max<kRows>(least[c]);
    }
    block.each([&](Thread thread) {
      const int own = thread.index % kRows, column = base + column_of(thread) + own;
      if (own >= kColumns || column >= length) return;
      Extent extent{most[0](thread), -least[0](thread)};
      MC_UNROLL
      for (int c = 1; c < kColumns; ++c) {
        if (c == own) extent = Extent{most[c](thread), -least[c](thread)};
      }
      const Range range = Range::of(format, extent.most, extent.least);
      scratch.ranges[column] = range.scale;
      scratch.ranges[kMaxRank + column] = range.reciprocal;
      scratch.ranges[2 * kMaxRank + column] = range.lowest;
      scales[column] = from_float<Half>(range.scale);
      if (is_integer(format)) lowest[column] = from_float<Half>(range.lowest);
    });
  }
}

// Components [first, first + length) with one range per column. Rows with `skipped[row]` do not widen ranges; their
// codes are 0. Codes of row r go to `codes + r * row_bytes`, ranges to `scales` and (integers) `lowest`.
template <int Chunks, class Block>
MC_HD void quantize_columns(Block& block, const typename Block::template PerThread<Tile<Chunks>>& tile, int first,
                            int length, Format format, const std::int32_t* skipped, const ColumnScratch& scratch,
                            std::int8_t* codes, int row_bytes, Half* scales, Half* lowest) {
  float* ranges = scratch.ranges;
  block.sync();
  tile_to_shared<Chunks>(block, tile, scratch.tile, scratch.pitch, first, length);
  block.sync();
  find_column_ranges(block, length, format, skipped, scratch, scales, lowest);
  block.sync();
  block.each([&](Thread thread) {
    const int row = row_of(thread);
    with_range_bits(format, [&](auto bits) {
      constexpr int kWidth = decltype(bits)::value;
      MC_UNROLL
      for (int j = 0; j < Chunks; ++j) {
        const int column = component_of(thread, j) - first;
        if (!inside(column, 0, length)) continue;
        PackedCodes packed;
        if (!skipped[row]) {
          float scale[kChunk], reciprocal[kChunk], lowest[kChunk];
          load_chunk(scale, ranges + column);
          load_chunk(reciprocal, ranges + kMaxRank + column);
          load_chunk(lowest, ranges + 2 * kMaxRank + column);
          packed = codes_of<kWidth>(format, tile(thread).x[j], [&](int e) { return Range{scale[e], reciprocal[e], lowest[e]}; });
        }
        store_codes<kWidth>(codes + row * row_bytes + column / kChunk * kWidth, packed);
      }
    });
  });
}

// Divides rows by the root mean square of their stored components, `count` of them (those that are `stored(component)`),
// rounded to binary16: written to `norms` and, as floats, to `shared_norms` [B]. Rows whose norm is 0 become zero.
template <int Chunks, class Block, class Stored>
MC_HD void standardize(Block& block, typename Block::template PerThread<Tile<Chunks>>& tile, int count, Half* norms,
                       float* shared_norms, Stored stored) {
  typename Block::template PerThread<float> square;
  block.each([&](Thread thread) {
    float sum = 0.0f;
    MC_UNROLL
    for (int j = 0; j < Chunks; ++j) {
      if (!stored(component_of(thread, j))) continue;
      MC_UNROLL
      for (int e = 0; e < kChunk; ++e) sum += tile(thread).x[j][e] * tile(thread).x[j][e];
    }
    square(thread) = sum;
  });
  block.template reduce_add<kRowThreads>(square);
  block.each([&](Thread thread) {
    const Half norm = saturate_half(square_root(divide(square(thread), static_cast<float>(count))));
    const float divisor = to_float(norm), reciprocal = divisor > 0.0f ? divide(1.0f, divisor) : 0.0f;
    if (leads_row(thread)) {
      norms[row_of(thread)] = norm;
      shared_norms[row_of(thread)] = divisor;
    }
    MC_UNROLL
    for (int j = 0; j < Chunks; ++j) {
      MC_UNROLL
      for (int e = 0; e < kChunk; ++e) {
        float& x = tile(thread).x[j][e];
        x = quotient_of(x, divisor, reciprocal);
      }
    }
  });
  block.sync();
}

// Boundary to compare a magnitude with once it is known whether it is above `Known` of them: a binary search of the
// positive ones, all constants of the program. `Place`: what was found so far, in bits.
template <int Width, int Level, int Known = 0, int Place = 0>
MC_HD float next_boundary(const bool (&above)[3]) {
  if constexpr (Known < Level) {
    const float higher = next_boundary<Width, Level, Known + 1, 2 * Place + 1>(above);
    return above[Known] ? higher : next_boundary<Width, Level, Known + 1, 2 * Place>(above);
  } else {
    constexpr int kIndex = ((2 * Place + 1) << (Width - 2 - Level)) - 1;
    constexpr float kBoundary = gaussian_boundary(Width, (1 << (Width - 1)) + kIndex);
    return kBoundary;
  }
}

// How many boundaries lie strictly below `u`.
template <int Width>
MC_HD std::uint32_t gaussian_code(float u) {
  constexpr std::uint32_t kHalf = 1u << (Width - 1);
  // Boundaries are symmetric: strictly below -|u| are those of a magnitude above the next float after |u|.
  const bool positive = u > 0.0f;
  const std::uint32_t bits = bit_cast<std::uint32_t>(u) & 0x7fffffffu;
  const float magnitude = bit_cast<float>(positive ? bits : bits + 1u);
  bool above[3] = {};
  std::uint32_t count = 0;
  if constexpr (Width > 1) above[0] = next_boundary<Width, 0>(above) < magnitude;
  if constexpr (Width > 2) above[1] = next_boundary<Width, 1>(above) < magnitude;
  if constexpr (Width > 3) above[2] = next_boundary<Width, 2>(above) < magnitude;
  MC_UNROLL
  for (int level = 0; level < Width - 1; ++level) count |= above[level] ? kHalf >> (level + 1) : 0u;
  return count ^ (positive ? kHalf : kHalf - 1u);
}

// Gaussian codes of components [first, first + length); rows whose norm (in shared memory) is 0 get code 0.
template <int Chunks, class Block>
MC_HD void quantize_gaussian(Block& block, const typename Block::template PerThread<Tile<Chunks>>& tile, int first,
                             int length, Format format, const float* norms, std::int8_t* codes, int row_bytes) {
  block.each([&](Thread thread) {
    const int row = row_of(thread);
    const bool empty = !(norms[row] > 0.0f);
    with_gaussian_bits(format, [&](auto bits) {
      constexpr int kWidth = decltype(bits)::value;
      MC_UNROLL
      for (int j = 0; j < Chunks; ++j) {
        const int column = component_of(thread, j) - first;
        if (!inside(column, 0, length)) continue;
        PackedCodes packed;
        MC_UNROLL
        for (int e = 0; e < kChunk; ++e) {
          const std::uint32_t code = gaussian_code<kWidth>(tile(thread).x[j][e]);
          packed.template put<kWidth>(e, empty ? 0u : code);
        }
        store_codes<kWidth>(codes + row * row_bytes + column / kChunk * kWidth, packed);
      }
    });
  });
}

}  // namespace minicache
