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

// Thread block: (query head, decode). Shared memory: a factor per split, for each warp on its own.
template <class T>
struct CombineSplits {
  static constexpr int kThreads = kDecodeThreads;

  // A query row's records of the splits that one tier has.
  struct Records {
    const float* first;
    int count, stride;
    MC_HD const float* at(int n) const { return first + n * stride; }
  };

  template <class Block>
  MC_HD static void run(Block& block, const CombineArguments<T>& a) {
    const int sequence = block.y(), head = block.x();
    const Records full = records(a, false, sequence, head), compressed = records(a, true, sequence, head);
    const int count = full.count + compressed.count;
    auto record = [&](int n) { return n < full.count ? full.at(n) : compressed.at(n - full.count); };
    auto factors = [&](Thread thread) { return reinterpret_cast<float*>(block.shared) + thread.warp() * count; };
    typename Block::template PerThread<float> peak, total;
    block.each([&](Thread thread) {
      peak(thread) = -kInfinity;
      for (int n = thread.lane(); n < count; n += kWarp) peak(thread) = maximum(peak(thread), record(n)[0]);
    });
    block.template reduce_max<kWarp>(peak);
    block.each([&](Thread thread) {
      const float shift = peak(thread) == -kInfinity ? 0.0f : peak(thread);
      total(thread) = 0.0f;
      for (int n = thread.lane(); n < count; n += kWarp) {
        const float factor = exp2_of(record(n)[0] - shift);
        factors(thread)[n] = factor;
        total(thread) += factor * record(n)[1];
      }
    });
    block.template reduce_add<kWarp>(total);
    block.sync_warp();
    block.each([&](Thread thread) {
      const float* const own = factors(thread);
      // Component of a vector, added up over a tier's splits.
      auto sum = [&](const Records& records, const float* factor, int place) {
        float result = 0.0f;
        for (int n = 0; n < records.count; ++n) result += factor[n] * records.at(n)[place];
        return result;
      };
      write(thread, a, sequence, head, total(thread) > 0.0f ? 1.0f / total(thread) : 0.0f, compressed.count > 0,
            [&](int place) { return sum(full, own, place); },
            [&](int place) { return sum(compressed, own + full.count, place); });
    });
  }

 private:
  MC_HD static Records records(const CombineArguments<T>& a, bool compressed_tier, int sequence, int head) {
    const Partials& partials = compressed_tier ? a.compressed : a.full;
    if (partials.splits == 0) return {nullptr, 0, 0};
    const TokenRange tokens = visible(a.problem, compressed_tier, sequence);
    if (tokens.empty()) return {nullptr, 0, 0};
    const int first = tokens.first / kSplitTokens;
    return {partials.at(a.problem.query_row(sequence, head), first), ceil_div(tokens.last, kSplitTokens) - first,
            partials.record};
  }

  // `full(place)`, `compressed(place)`: sums over the splits of either tier.
  template <class Full, class Compressed>
  MC_HD static void write(Thread thread, const CombineArguments<T>& a, int sequence, int head, float inverse,
                          bool has_compressed, Full full, Compressed compressed) {
    const StreamShape& shape = a.value.shape;
    const int dim = a.problem.shape.dim, slot = has_compressed ? a.value.slot(head / a.problem.group) : 0;
    const std::int64_t row = a.problem.query_row(sequence, head);
    T* out = a.out + a.problem.step.query_start[sequence] * a.out_stride + static_cast<std::int64_t>(head) * dim;
    const bool offset = has_compressed && a.value.maps.offset != nullptr;
    const float weight = offset ? compressed(2) : 0.0f;
    for (int d = thread.index; d < dim; d += kThreads) {
      float x = full(kRecordHead + d);
      if (offset) x += weight * a.value.maps.offset[slot * dim + d];
      if (has_compressed && shape.retained > 0) x += compressed(exact_vector(shape) + d);
      if (has_compressed && !a.mapped) {
        x += compressed(kRecordHead + d);
        if (shape.has_residual()) x += compressed(residual_vector(shape) + d);
      }
      if (a.mapped) {
        a.plain[row * dim + d] = x * inverse;
        if (shape.has_residual()) a.residual_sums[row * dim + d] = compressed(residual_vector(shape) + d) * inverse;
      } else {
        out[d] = from_float<T>(x * inverse);
      }
    }
    if (!a.mapped) return;
    for (int c = thread.index; c < shape.stored; c += kThreads) {
      a.sums[row * shape.stored + c] = compressed(kRecordHead + c) * inverse;
    }
  }
};

}  // namespace minicache
