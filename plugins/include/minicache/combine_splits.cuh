// One softmax over all splits of a query row: partial results weighed and added in order, full tier first.
#pragma once

#include "minicache/compressed_split.cuh"

namespace minicache {

template <class T>
struct CombineArguments {
  DecodeProblem<T> problem;
  Partials full, compressed;       // compressed: splits 0 without a compressed tier
  StreamReader value;              // with a compressed tier
  bool mapped;                     // results go to the three below and on to OutputMap, otherwise to `out`
  float *sums, *residual_sums, *plain;
  T* out;
  std::int64_t out_stride;
};

// Thread block: (query head, decode). Shared memory: a factor per split, and a number per warp.
template <class T>
struct CombineSplits {
  static constexpr int kThreads = kDecodeThreads;

  template <class Block>
  MC_HD static void run(Block& block, const CombineArguments<T>& a) {
    const int sequence = block.y(), head = block.x();
    const std::int64_t row = a.problem.query_row(sequence, head);
    const TokenRange full = splits_of(visible(a.problem, false, sequence));
    const TokenRange compressed =
        a.compressed.splits == 0 ? TokenRange{0, 0} : splits_of(visible(a.problem, true, sequence));
    const int full_count = full.last - full.first, count = full_count + compressed.last - compressed.first;
    auto record = [&](int n) {
      return n < full_count ? a.full.at(row, full.first + n) : a.compressed.at(row, compressed.first + n - full_count);
    };
    float* warps = reinterpret_cast<float*>(block.shared);
    float* factors = warps + kDecodeWarps;
    typename Block::template PerThread<float> number;
    block.each([&](Thread thread) {
      number(thread) = -kInfinity;
      for (int n = thread.index; n < count; n += kThreads) number(thread) = maximum(number(thread), record(n)[0]);
    });
    block.template reduce_max<kWarp>(number);
    const float peak = over_warps(block, number, warps, [](float x, float y) { return maximum(x, y); });
    const float shift = peak == -kInfinity ? 0.0f : peak;
    block.each([&](Thread thread) {
      number(thread) = 0.0f;
      for (int n = thread.index; n < count; n += kThreads) {
        factors[n] = exp2_of(record(n)[0] - shift);
        number(thread) += factors[n] * record(n)[1];
      }
    });
    block.template reduce_add<kWarp>(number);
    const float total = over_warps(block, number, warps, [](float x, float y) { return x + y; });
    // Component of a vector, added up over the tier's splits.
    auto sum = [&](bool compressed_tier, int place) {
      float result = 0.0f;
      const int first = compressed_tier ? full_count : 0, last = compressed_tier ? count : full_count;
      MC_UNROLL
      for (int n = first; n < last; ++n) result += factors[n] * record(n)[place];
      return result;
    };
    write(block, a, sequence, head, total > 0.0f ? 1.0f / total : 0.0f, count > full_count, sum);
  }

 private:
  MC_HD static TokenRange splits_of(TokenRange tokens) {
    if (tokens.empty()) return {0, 0};
    return {tokens.first / kSplitTokens, ceil_div(tokens.last, kSplitTokens)};
  }

  // The same number for every thread, from one per warp.
  template <class Block, class F>
  MC_HD static float over_warps(Block& block, const typename Block::template PerThread<float>& x, float* warps,
                                F join) {
    block.sync();
    block.each([&](Thread thread) {
      if (thread.lane() == 0) warps[thread.warp()] = x(thread);
    });
    block.sync();
    float result = warps[0];
    for (int w = 1; w < kDecodeWarps; ++w) result = join(result, warps[w]);
    return result;
  }

  template <class Block, class Sum>
  MC_HD static void write(Block& block, const CombineArguments<T>& a, int sequence, int head, float inverse,
                          bool has_compressed, Sum sum) {
    const StreamShape& shape = a.value.shape;
    const int dim = a.problem.shape.dim, slot = has_compressed ? a.value.slot(head / a.problem.group) : 0;
    const std::int64_t row = a.problem.query_row(sequence, head);
    T* out = a.out + a.problem.step.query_start[sequence] * a.out_stride + static_cast<std::int64_t>(head) * dim;
    block.each([&](Thread thread) {
      const bool offset = has_compressed && a.value.maps.offset != nullptr;
      const float weight = offset ? sum(true, 2) : 0.0f;
      for (int d = thread.index; d < dim; d += kThreads) {
        float x = sum(false, kRecordHead + d);
        if (offset) x += weight * a.value.maps.offset[slot * dim + d];
        if (has_compressed && shape.retained > 0) x += sum(true, exact_vector(shape) + d);
        if (has_compressed && !a.mapped) {
          x += sum(true, kRecordHead + d);
          if (shape.has_residual()) x += sum(true, residual_vector(shape) + d);
        }
        if (a.mapped) {
          a.plain[row * dim + d] = x * inverse;
          if (shape.has_residual()) a.residual_sums[row * dim + d] = sum(true, residual_vector(shape) + d) * inverse;
        } else {
          out[d] = from_float<T>(x * inverse);
        }
      }
      if (!a.mapped) return;
      for (int c = thread.index; c < shape.stored; c += kThreads) {
        a.sums[row * shape.stored + c] = sum(true, kRecordHead + c) * inverse;
      }
    });
  }
};

}  // namespace minicache
