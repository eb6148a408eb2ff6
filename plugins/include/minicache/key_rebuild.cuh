// Logits of keys stored before RoPE: a warp rebuilds 16 keys at a time on the tensor cores, rotates them by their
// positions, and multiplies with the plain queries. Neither leaves the chip.
//
//     k = rotate(nu ([y | residual] [P | A]^T) + c)
//
// Halves of a key (component i is paired with i + D / 2) are padded to a multiple of 16 components each.
#pragma once

#include "minicache/key_logits.cuh"

namespace minicache {

MC_HD int padded_half(int dim) { return ceil_div(dim / 2, 16) * 16; }

// Steps of 16 components of [y | residual].
MC_HD int rebuild_steps(const StreamShape& shape) {
  return (shape.stored + (shape.has_residual() ? shape.dim : 0)) / 16;
}

// Fragments B of [P | A]^T of one slot: [padded key / 8][steps][lanes].
template <class T>
MC_HD std::int64_t rebuild_fragments(const StreamShape& shape) {
  return static_cast<std::int64_t>(2 * padded_half(shape.dim) / 8) * rebuild_steps(shape) * kWarp;
}

struct KeyRebuild {
  const void* map;                   // fragments, in shared memory if they fit
  char* rows;                        // [kDecodeWarps][16] rows of [y | residual]
  const float* inverse_frequencies;
  const float* offset;               // c of the slot, or null

  template <class T>
  MC_HD static int row_stride(const StreamShape& shape) {
    return stage_stride(rebuild_steps(shape) * 16 * static_cast<int>(sizeof(Code<T>)));
  }

  // Component of the padded key's component d, -1 in the padding.
  MC_HD static int component(int dim, int d) {
    const int half = padded_half(dim), place = d % half;
    return place < dim / 2 ? place + d / half * (dim / 2) : -1;
  }

  // Rows of the warp's 16 tokens, dequantized: two threads a row.
  template <class T, int Kind, class Block>
  MC_HD void dequantize(Block& block, const Stage<Kind>& stage) const {
    const int stride = row_stride<T>(stage.reader.shape);
    int start = 0;
    stage.each_run([&](int n) {
      const Segment& run = stage.run(n);
      const TokenRanges ranges = stage.token_ranges(n);
      const char* first = stage.template rows<T>(n);
      const int from = stage.stride(n);
      const bool words = stage.words(n);
      const Half *scales = stage.channel_scales(n), *minima = stage.channel_minima(n);
      with_format(run.format, [&](auto tag) {
        constexpr Format kFormat = decltype(tag)::value;
        block.each([&](Thread thread) {
          const int row = thread.index / 2, token = row;
          Code<T>* target = reinterpret_cast<Code<T>*>(rows + row * stride) + start;
          const float scale = ranges.scale(token), lowest = ranges.minimum(token);
          for (int at = thread.index % 2 * 4; at < run.length; at += 8) {
            Pair<Element<T, kFormat>> x[2];
            read_run<T, kFormat, 4>(first + row * from, at, words, x);
            MC_UNROLL
            for (int i = 0; i < 4; ++i) {
              float y = i < 2 ? first_of(x[i % 2]) : second_of(x[i % 2]);
              if constexpr (has_ranges(kFormat)) {
                const float factor = scales == nullptr ? scale : to_float(scales[at + i]);
                const float constant =
                    scales == nullptr || !is_integer(kFormat) ? lowest : to_float(minima[at + i]);
                y = factor * y + constant;
              }
              target[at + i] = from_float<Code<T>>(y);
            }
          }
        });
      });
      start += run.length;
    });
    block.sync_warp();
  }

  template <class T, int Kind, class Block>
  MC_HD void logits(Block& block, const Stage<Kind>& stage, const QueryFragments& queries, float scale, Scores scores,
                    int token, int position) const {
    using E = Code<T>;
    const StreamShape& shape = stage.reader.shape;
    const int stride = row_stride<T>(shape), steps = rebuild_steps(shape), half = padded_half(shape.dim);
    block.sync_warp();
    dequantize<T>(block, stage);
    typename Block::template PerThread<FragmentD> logit;
    block.each([&](Thread thread) { logit(thread) = FragmentD{}; });
    for (int d = 0; d < half; d += 16) {
      // Sums 0, 1: components d to d + 15; 2, 3: those they are paired with.
      typename Block::template PerThread<FragmentD> key[4];
      block.each([&](Thread thread) {
        MC_UNROLL
        for (int n = 0; n < 4; ++n) key[n](thread) = FragmentD{};
      });
      for (int step = 0; step < steps; ++step) {
        typename Block::template PerThread<FragmentA<E>> y;
        block.template load_matrices<false>(y, [&](Thread thread) -> const void* {
          const int l = thread.lane(), row = 16 * thread.warp() + l % 8 + 8 * (l / 8 % 2);
          return rows + row * stride + (16 * step + 8 * (l / 16)) * static_cast<int>(sizeof(E));
        });
        MC_UNROLL
        for (int n = 0; n < 4; ++n) {
          const std::int64_t tile = (d + n / 2 * half) / 8 + n % 2;
          typename Block::template PerThread<FragmentB<E>> map_part;
          block.each([&](Thread thread) {
            map_part(thread) = static_cast<const FragmentB<E>*>(map)[(tile * steps + step) * kWarp + thread.lane()];
          });
          block.multiply_add(key[n], y, map_part);
        }
      }
      typename Block::template PerThread<FragmentA<E>> rotated[2];
      block.each([&](Thread thread) {
        const FragmentD sums[4] = {key[0](thread), key[1](thread), key[2](thread), key[3](thread)};
        rotate<T>(thread, stage, sums, d, position, rotated[0](thread), rotated[1](thread));
      });
      MC_UNROLL
      for (int n = 0; n < 2; ++n) {
        typename Block::template PerThread<FragmentB<E>> query;
        block.each([&](Thread thread) {
          query(thread) = queries.at<E, T>((d + n * half) / 16, thread.lane());
        });
        block.multiply_add(logit, rotated[n], query);
      }
    }
    block.each([&](Thread thread) {
      const int t = thread.lane() % 4, row = 16 * thread.warp() + thread.lane() / 4;
      MC_UNROLL
      for (int i = 0; i < 4; ++i) scores(2 * t + i % 2, token + row + 8 * (i / 2)) = logit(thread).x[i] * scale;
    });
  }

 private:
  // Keys as they come out of the product become fragments A of the next one: columns 8 n + 2 t + i are its k.
  template <class T, int Kind>
  MC_HD void rotate(Thread thread, const Stage<Kind>& stage, const FragmentD (&sums)[4], int d, int position,
                    FragmentA<Code<T>>& low, FragmentA<Code<T>>& high) const {
    const int dim = stage.reader.shape.dim, t = thread.lane() % 4, row = 16 * thread.warp() + thread.lane() / 4;
    MC_UNROLL
    for (int j = 0; j < 2; ++j) {
      const float norm = stage.norms().scale(row + 8 * j), place = static_cast<float>(position + row + 8 * j);
      MC_UNROLL
      for (int n = 0; n < 2; ++n) {
        float x[2] = {}, y[2] = {};
        MC_UNROLL
        for (int i = 0; i < 2; ++i) {
          const int c = d + 8 * n + 2 * t + i;
          if (c >= dim / 2) continue;
          const float a = norm * sums[n].x[2 * j + i] + (offset == nullptr ? 0.0f : offset[c]);
          const float b = norm * sums[n + 2].x[2 * j + i] + (offset == nullptr ? 0.0f : offset[c + dim / 2]);
          float sine, cosine;
          sine_and_cosine(multiply(place, inverse_frequencies[c]), sine, cosine);
          x[i] = a * cosine - b * sine;
          y[i] = b * cosine + a * sine;
        }
        put_pair(low, j + 2 * n, make_pair<Code<T>>(x[0], x[1]));
        put_pair(high, j + 2 * n, make_pair<Code<T>>(y[0], y[1]));
      }
    }
  }
};

}  // namespace minicache
