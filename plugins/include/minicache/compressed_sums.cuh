// Sums of a split's values: by unit of 32 components in registers, then in the split's record.
#pragma once

#include "minicache/compressed_layout.cuh"

namespace minicache {

template <class T, int Kind>
struct CompressedSums {
  using Arguments = CompressedSplitArguments<T>;
  // Units of a warp: of latent components, then of residual ones.
  static constexpr int kOwn = !Kind ? 2 * kOwnUnits : Kind == kWide ? kOwnUnits : 1;

  // Where a known run has fewer units than there are warps, they share its tokens: a warp adds kSteps of a stage's steps
  // of 16.
  static constexpr int kUnits = is_known(Kind) ? Kind / 32 : kDecodeWarps, kSharing = kDecodeWarps / kUnits;
  static constexpr int kSteps = kBlockSize / 16 / kSharing;
  MC_HD static int first_step(Thread thread) { return kSharing == 1 ? 0 : thread.warp() / kUnits * kSteps; }
  MC_HD static int own_unit(Thread thread) { return kSharing == 1 ? thread.warp() : thread.warp() % kUnits; }

  template <class Block>
  using Sums = typename Block::template PerThread<FragmentD>[2];

  template <class Block>
  MC_HD static void clear(Block& block, Sums<Block> (&sums)[kOwn]) {
    block.each([&](Thread thread) {
      MC_UNROLL
      for (int n = 0; n < kOwn; ++n) sums[n][0](thread) = sums[n][1](thread) = FragmentD{};
    });
  }

  // What the offset of codes and their centre added to the sums of a known run. Rows g + 8 of a sum are components of
  // odd number.
  template <class Block>
  MC_HD static void take_offset(Block& block, const WeightFragments& weights, Sums<Block> (&sums)[kOwn]) {
    block.each([&](Thread thread) {
      MC_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int query = 2 * (thread.lane() % 4) + i;
        const float weight = weights.constant(WeightFragments::kOffsets, query);
        constexpr float kCentre = code_centre(kKnownBits);
        MC_UNROLL
        for (int m = 0; m < 2; ++m) {
          FragmentD& sum = sums[0][m](thread);
          sum.x[i] -= (kCodeOffset + kCentre) * weight;
          sum.x[2 + i] = (sum.x[2 + i] - (kCodeOffset + kOffsetStep * kCentre) * weight) / kOffsetStep;
        }
      }
    });
  }

  // Sums of warps that share a unit, before and after a `sync`: the first warp of each unit gets them all.
  template <class Block>
  MC_HD static void hand_over(Block& block, char* shared, const Sums<Block> (&sums)[kOwn]) {
    if constexpr (kSharing > 1) {
      block.each([&](Thread thread) {
        if (thread.warp() < kUnits) return;
        FragmentD* const to = reinterpret_cast<FragmentD*>(shared) + 2 * (thread.index - kUnits * kWarp);
        to[0] = sums[0][0](thread);
        to[1] = sums[0][1](thread);
      });
    }
  }
  template <class Block>
  MC_HD static void take_over(Block& block, const char* shared, Sums<Block> (&sums)[kOwn]) {
    if constexpr (kSharing > 1) {
      block.each([&](Thread thread) {
        if (thread.warp() >= kUnits) return;
        MC_UNROLL
        for (int n = 1; n < kSharing; ++n) {
          const FragmentD* const from =
              reinterpret_cast<const FragmentD*>(shared) + 2 * (thread.index + (n - 1) * kUnits * kWarp);
          MC_UNROLL
          for (int i = 0; i < 8; ++i) sums[0][i / 4](thread).x[i % 4] += from[i / 4].x[i % 4];
        }
      });
    }
  }

  // `sum` to number n of `sums`, which stay in registers: n is not known when this is compiled.
  template <class Block>
  MC_HD static void add_sum(Block& block, Sums<Block> (&sums)[kOwn], int n, const Sums<Block>& sum) {
    block.each([&](Thread thread) {
      MC_UNROLL
      for (int k = 0; k < kOwn; ++k) {
        if (k != n) continue;
        MC_UNROLL
        for (int i = 0; i < 4; ++i) {
          sums[k][0](thread).x[i] += sum[0](thread).x[i];
          sums[k][1](thread).x[i] += sum[1](thread).x[i];
        }
      }
    });
  }

  // The runs that the halves of a unit belong to; -1: none.
  struct UnitRuns {
    int first, second;

    MC_HD static UnitRuns of(const StreamShape& shape, int unit) {
      auto run = [&](int c) { return c < shape.stored ? run_of(shape, c) : -1; };
      return {run(32 * unit), run(32 * unit + 16)};
    }
  };
  // Of each unit of a warp of a plain stream.
  template <class Block>
  using WarpRuns = typename Block::template PerThread<UnitRuns>[kOwn];
  template <class Block>
  MC_HD static void find_runs(Block& block, const StreamShape& shape, WarpRuns<Block>& runs) {
    if (!Kind || is_known(Kind)) return;
    block.each([&](Thread thread) {
      MC_UNROLL
      for (int n = 0; n < kOwn; ++n) runs[n](thread) = UnitRuns::of(shape, n * kDecodeWarps + thread.warp());
    });
  }

  // Calls f with the number of each run of a unit of the warp; on the host, of any warp.
  template <class Block, class F>
  MC_HD static void each_own_run(Block& block, const StreamReader& reader,
                                 const typename Block::template PerThread<UnitRuns>& runs, F f) {
#if MC_ON_DEVICE
    (void)reader;
    block.each([&](Thread thread) {
      const UnitRuns own = runs(thread);
      MC_NO_UNROLL
      for (int r = own.first; r >= 0; r = r == own.first && own.second != r ? own.second : -1) f(r);
    });
#else
    for (int i = 0; i < reader.part_count; ++i) {
      const int r = reader.parts[i];
      auto own = [&](Thread thread) { return runs(thread).first == r || runs(thread).second == r; };
      if (block.any_warp(own)) f(r);
    }
#endif
  }

  template <class Formats, class Block>
  MC_HD static void add_stage(Block& block, const ValueStage<Kind, Formats>& stage, const WeightFragments& weights,
                              const WarpRuns<Block>& runs, Sums<Block> (&sums)[kOwn]) {
    if constexpr (is_known(Kind)) {
      add_unit(block, stage, weights, 0, 0, sums[0]);
    } else if constexpr (Kind) {
      MC_UNROLL
      for (int n = 0; n < kOwn; ++n) {
        each_own_run(block, stage.reader, runs[n],
                     [&](int r) { add_unit(block, stage, weights, r, n * kDecodeWarps, sums[n]); });
      }
    } else {
      const StreamShape& shape = stage.reader.shape;
      for (int n = 0; n < kOwn; ++n) {
        const bool residual = n >= kOwnUnits;
        const int first = n % kOwnUnits * kDecodeWarps, components = residual ? shape.dim : shape.stored;
        if (32 * first >= components || (residual && !shape.has_residual())) continue;
        Sums<Block> sum;
        block.each([&](Thread thread) { sum[0](thread) = sum[1](thread) = FragmentD{}; });
        stage.each_run([&](int r) {
          if ((r == kResidualRun) == residual) add_unit(block, stage, weights, r, first, sum);
        });
        add_sum(block, sums, n, sum);
      }
    }
  }

  // Run r's part of units `first` and following, one per warp.
  template <class Formats, class Block>
  MC_HD static void add_unit(Block& block, const ValueStage<Kind, Formats>& stage, const WeightFragments& weights,
                             int r, int first, Sums<Block>& sum) {
    const char* base = stage.rows(r);
    const int stride = stage.stride(r);
    // From where a known run's unit would be to where it is, in all of a thread's rows.
    auto moved = [&](Thread thread) {
      if constexpr (!is_known(Kind)) return 0;
      return 16 * (known_unit(Part::value, Kind, 2 * (thread.lane() % 4), own_unit(thread)) - own_unit(thread));
    };
    auto rows = [&](Thread thread, int step, int k) {
      return base + moved(thread) + (16 * (first_step(thread) + step) + k) * stride;
    };
    auto unit = [&](Thread thread) { return first + own_unit(thread); };
    auto weight = [&](auto tag, int step, Thread thread) {
      const int n = is_known(Kind) ? 0 : stage.run(r).weights;
      return weights.template at<Element<T, decltype(tag)::value>, T>(n, first_step(thread) + step, thread.lane());
    };
    add_values<T, Formats, kSteps>(block, sum, kSteps, stage.run(r).format, stage.length(r),
                                            is_known(Kind) ? 0 : stage.run(r).stored, rows, unit, weight,
                                            stage.words(r), stage.channel_ranges(r));
  }

  // Fragments of the weights of retained values, in the memory of the stages.
  template <class Block>
  MC_HD static void prepare_exact_weights(Block& block, const Arguments& a, const ExactRows& exact,
                                          const WeightFragments& weights) {
    const float* list = reinterpret_cast<const float*>(block.shared + a.shared.exact_weights);
    const WeightFragments target{block.shared, nullptr, nullptr};
    block.sync();
    block.each([&](Thread thread) {
      const int query = thread.lane() / 4;
      for (int step = thread.warp(); step < ceil_div(exact.count, 16); step += kDecodeWarps) {
        const float centre = centre_of(exact.reader.shape.retained_format);
        float scaled[4];
        for (int i = 0; i < 4; ++i) {
          const int n = 16 * step + 2 * (thread.lane() % 4) + i % 2 + 8 * (i / 2), row = exact.clamped(n);
          const float weight = n < exact.count ? list[query * exact.count + n] : 0.0f;
          scaled[i] = weight * exact.scale(row);
          weights.part(kExactRun, thread) += weight * exact.minimum(row) + centre * scaled[i];
        }
        target.put<T>(exact.reader.shape.retained_format, 0, step, thread.lane(), scaled);
      }
    });
  }

  template <class Block>
  MC_HD static void finish_constants(Block& block, const WeightFragments& weights) {
    block.sync();
    block.each([&](Thread thread) {
      if (thread.index >= WeightSums<Kind>::kUsed * kQueryTile) return;
      const int n = thread.index / kQueryTile, query = thread.index % kQueryTile;
      float sum = 0.0f;
      for (int i = 0; i < 4 * kDecodeWarps; ++i) sum += weights.part(n, Thread{i / 4 * kWarp + 4 * query + i % 4});
      weights.totals[thread.index] = sum;
    });
    block.sync();
  }

  template <class Block>
  MC_HD static void store_latent(Block& block, const Arguments& a, const SplitItem& item,
                                 const WeightFragments& weights, const WarpRuns<Block>& runs,
                                 const Sums<Block> (&sums)[kOwn]) {
    const StreamShape& shape = a.value.shape;
    auto runs_of = [&](Thread thread, int n, int unit, bool residual) -> UnitRuns {
      if (residual) return {kResidualRun, kResidualRun};
      if constexpr (is_known(Kind)) return {0, 0};
      return Kind ? runs[n](thread) : UnitRuns::of(shape, unit);
    };
    block.each([&](Thread thread) {
      MC_UNROLL
      for (int n = 0; n < kOwn; ++n) {
        const bool residual = !Kind && n >= kOwnUnits;
        const int unit = n % kOwnUnits * kDecodeWarps + thread.warp(), components = residual ? shape.dim : shape.stored;
        if (residual && !shape.has_residual()) continue;
        const UnitRuns own = runs_of(thread, n, unit, residual);
        const bool shared = 32 * unit + 16 >= components || own.first != own.second;
        store_unit(thread, a, item, unit, shared, components, residual ? residual_vector(shape) : kRecordHead,
                   sums[n][0](thread), sums[n][1](thread), [&](int m, int query) {
                     return weights.constant(shared && m == 1 ? own.second : own.first, query);
                   });
      }
      // Without retained values the offset goes with all weights, as `softmax` has it.
      if (Kind || thread.index >= item.queries) return;
      const std::int64_t row = a.problem.query_row(item.sequence, item.query + thread.index);
      a.partials.at(row, item.split)[2] = weights.constant(kRuns, thread.index);
    });
  }

  template <class Constant>
  MC_HD static void store_unit(Thread thread, const Arguments& a, const SplitItem& item, int unit, bool shared,
                               int components, int vector, const FragmentD& first, const FragmentD& second,
                               Constant constant) {
    MC_UNROLL
    for (int m = 0; m < 2; ++m) {
      MC_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int c = unit_component(unit, shared, m, thread.lane(), i / 2), query = 2 * (thread.lane() % 4) + i % 2;
        if (c >= components || query >= item.queries) continue;
        const std::int64_t row = a.problem.query_row(item.sequence, item.query + query);
        a.partials.at(row, item.split)[vector + c] = (m == 0 ? first : second).x[i] + constant(m, query);
      }
    }
  }

  // Sums of retained values, after their weights are prepared.
  template <class Block>
  MC_HD static void store_exact(Block& block, const Arguments& a, const SplitItem& item, const ExactRows& exact,
                                const WeightFragments& weights, Sums<Block> (&sums)[kOwn]) {
    const StreamShape& shape = a.value.shape;
    const WeightFragments own{block.shared, nullptr, nullptr};
    for (int n = 0; n < kOwnUnits && 32 * kDecodeWarps * n < shape.dim; ++n) {
      Sums<Block>& sum = sums[0];
      block.each([&](Thread thread) { sum[0](thread) = sum[1](thread) = FragmentD{}; });
      auto rows = [&](Thread, int step, int k) { return exact.rows[exact.clamped(16 * step + k)]; };
      auto unit = [&](Thread thread) { return n * kDecodeWarps + thread.warp(); };
      auto weight = [&](auto tag, int step, Thread thread) {
        return own.template at<Element<T, decltype(tag)::value>, T>(0, step, thread.lane());
      };
      add_values<T, RetainedFormat, 0>(block, sum, ceil_div(exact.count, 16), shape.retained_format, shape.dim,
                                       0, rows, unit, weight, true, ChannelRanges{});
      block.each([&](Thread thread) {
        store_unit(thread, a, item, unit(thread), 32 * unit(thread) + 16 >= shape.dim, shape.dim, exact_vector(shape),
                   sum[0](thread), sum[1](thread), [&](int, int query) { return weights.constant(kExactRun, query); });
      });
    }
  }
};

}  // namespace minicache
