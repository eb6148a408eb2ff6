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

// Thread block: (query heads, one per warp, decode). Shared memory: a factor per split for each warp.
template <class T>
struct CombineSplits {
  static constexpr int kThreads = kDecodeThreads;
  static constexpr int kRun = 4;  // components of a lane

  using Run = Neighbours<float, kRun>;
  MC_HD static void add(Run& sum, float factor, const float* from) {
    const Run other = detail::load<Run>(from);
    MC_UNROLL
    for (int i = 0; i < kRun; ++i) sum.x[i] += factor * other.x[i];
  }
  MC_HD static void store(Run sum, float factor, float* to) {
    for (float& x : sum.x) x *= factor;
    *reinterpret_cast<Run*>(to) = sum;
  }

  // A query row's records of the splits that one tier has, and their factors.
  struct Records {
    const float* first;
    float* factors;
    int count, stride;
    MC_HD const float* at(int n) const { return first + n * stride; }
    // Components from `place` on of a vector, a multiple of kRun, added up over the splits.
    MC_HD void add(Run& sum, int place) const {
      for (int n = 0; n < count; ++n) CombineSplits::add(sum, factors[n], at(n) + place);
    }
  };

  template <class Block>
  MC_HD static void run(Block& block, const CombineArguments<T>& a) {
    const int sequence = block.y(), heads = a.problem.shape.query_heads;
    auto head = [&](Thread thread) { return block.x() * kDecodeWarps + thread.warp(); };
    if (!block.any_warp([&](Thread thread) { return head(thread) < heads; })) return;
    typename Block::template PerThread<float> peak, total;
    typename Block::template PerThread<Records> full, compressed;
    auto count = [&](Thread thread) { return full(thread).count + compressed(thread).count; };
    auto record = [&](Thread thread, int n) {
      return n < full(thread).count ? full(thread).at(n) : compressed(thread).at(n - full(thread).count);
    };
    block.each([&](Thread thread) {
      const int own = minimum(head(thread), heads - 1);
      float* const factors = reinterpret_cast<float*>(block.shared) +
                             thread.warp() * (a.full.splits + a.compressed.splits);
      full(thread) = records(a, false, sequence, own, factors);
      compressed(thread) = records(a, true, sequence, own, factors + full(thread).count);
      peak(thread) = -kInfinity;
      for (int n = thread.lane(); n < count(thread); n += kWarp) {
        peak(thread) = maximum(peak(thread), record(thread, n)[0]);
      }
    });
    block.template reduce_max<kWarp>(peak);
    block.each([&](Thread thread) {
      const float shift = peak(thread) == -kInfinity ? 0.0f : peak(thread);
      float* const factors = full(thread).factors;
      total(thread) = 0.0f;
      for (int n = thread.lane(); n < count(thread); n += kWarp) {
        factors[n] = exp2_of(record(thread, n)[0] - shift);
        total(thread) += factors[n] * record(thread, n)[1];
      }
    });
    block.template reduce_add<kWarp>(total);
    block.sync_warp();
    block.each([&](Thread thread) {
      if (head(thread) >= heads) return;
      const float inverse = total(thread) > 0.0f ? 1.0f / total(thread) : 0.0f;
      write(thread, a, sequence, head(thread), inverse, full(thread), compressed(thread));
    });
  }

 private:
  MC_HD static Records records(const CombineArguments<T>& a, bool compressed_tier, int sequence, int head,
                               float* factors) {
    const Partials& partials = compressed_tier ? a.compressed : a.full;
    if (partials.splits == 0) return {nullptr, factors, 0, 0};
    const TokenRange tokens = visible(a.problem, compressed_tier, sequence);
    if (tokens.empty()) return {nullptr, factors, 0, 0};
    const int first = tokens.first / kSplitTokens;
    return {partials.at(a.problem.query_row(sequence, head), first), factors,
            ceil_div(tokens.last, kSplitTokens) - first, partials.record};
  }

  MC_HD static void write(Thread thread, const CombineArguments<T>& a, int sequence, int head, float inverse,
                          const Records& full, const Records& compressed) {
    const StreamShape& shape = a.value.shape;
    const int dim = a.problem.shape.dim;
    const std::int64_t row = a.problem.query_row(sequence, head);
    T* out = a.out + a.problem.step.query_start[sequence] * a.out_stride + static_cast<std::int64_t>(head) * dim;
    const float* offset = compressed.count > 0 ? a.value.maps.offset : nullptr;
    float weight = 0.0f;
    if (offset != nullptr) {
      offset += a.value.slot(head / a.problem.group) * dim;
      for (int n = 0; n < compressed.count; ++n) weight += compressed.factors[n] * compressed.at(n)[2];
    }
    const int step = kRun * kWarp;
    for (int d = kRun * thread.lane(); d < dim; d += step) {
      Run x{};
      full.add(x, kRecordHead + d);
      if (offset != nullptr) add(x, weight, offset + d);
      if (shape.retained > 0) compressed.add(x, exact_vector(shape) + d);
      if (!a.mapped) {
        compressed.add(x, kRecordHead + d);
        if (shape.has_residual()) compressed.add(x, residual_vector(shape) + d);
        MC_UNROLL
        for (int i = 0; i < kRun; ++i) out[d + i] = from_float<T>(x.x[i] * inverse);
        continue;
      }
      store(x, inverse, a.plain + row * dim + d);
      if (!shape.has_residual()) continue;
      Run residual{};
      compressed.add(residual, residual_vector(shape) + d);
      store(residual, inverse, a.residual_sums + row * dim + d);
    }
    if (!a.mapped) return;
    for (int c = kRun * thread.lane(); c < shape.stored; c += step) {
      Run latent{};
      compressed.add(latent, kRecordHead + c);
      store(latent, inverse, a.sums + row * shape.stored + c);
    }
  }
};

}  // namespace minicache
