// Decode attention over a split of the compressed tier.
#pragma once

#include "minicache/compressed_layout.cuh"

namespace minicache {

// Thread block: (split, KV head and tile of its query heads, decode). Rebuild: keys are in the pre_rope basis. Kind: what
// is known of both streams, which leaves out what others need.
template <class T, bool Rebuild, int Kind>
struct CompressedSplit {
  static constexpr int kThreads = kDecodeThreads;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 800
  static constexpr int kMinBlocks = 3;  // for four, registers would spill here
#else
  static constexpr int kMinBlocks = Kind ? 4 : 3;
#endif
  using Arguments = CompressedSplitArguments<T>;
  // Units of a warp: of latent components, then of residual ones.
  static constexpr int kOwn = Kind ? 1 : 2 * kOwnUnits;

  template <class Block>
  using Sums = typename Block::template PerThread<FragmentD>[2];

  template <class Block>
  MC_HD static void run(Block& block, const Arguments& a) {
    const SplitItem item = SplitItem::of(block, a.problem, true);
    if (item.tokens.empty()) return;
    const int key_slot = a.key.slot(item.head), value_slot = a.value.slot(item.head);
    const int blocks = item.last_block - item.first_block;
    const std::int32_t* const ids = load_table(block, a, item, blocks);
    const Scores scores{reinterpret_cast<float*>(block.shared + a.shared.scores)};
    // Stages go round: keys of all blocks, then values. `filled` is the next to fill, `ready` the next to read.
    const int stage_bytes = a.shared.stage_bytes, end = a.shared.stages * stage_bytes;
    int filled = 0, ready = 0;
    auto next = [&](int& stage) {
      char* const result = block.shared + stage;
      stage = stage + stage_bytes == end ? 0 : stage + stage_bytes;
      return result;
    };
    // `formats`: of the keys or values.
    auto fetch_value = [&](int u, auto formats) {
      char* const stage = next(filled);
      if (u < blocks) fetch_stage<T, Kind, decltype(formats)>(block, a.value, stage, ids[u], value_slot);
      Block::commit_async();
    };
    auto fetch = [&](int u, auto formats) {
      if (u >= blocks) return fetch_value(u - blocks, AnyFormat{});
      fetch_stage<T, Kind, decltype(formats)>(block, a.key, next(filled), ids[u], key_slot);
      Block::commit_async();
    };
    for (int u = 0; u < a.shared.stages - 1; ++u) fetch(u, AnyFormat{});

    const QueryFragments fragments = fragments_of(block, a);
    const int exact_step = prepare_queries(block, a, item, fragments);
    const KeyRebuild rebuild = prepare_rebuild(block, a, key_slot);
    const float scale = a.problem.shape.scale * kLog2e;
    const int start = item.first_block * kBlockSize;
    auto read_keys = [&](auto formats, auto read) {
      for (int u = 0; u < blocks; ++u) {
        wait_stage(block, a.shared.stages);
        fetch(u + a.shared.stages - 1, formats);
        read(Stage<Kind, decltype(formats)>{a.key, next(ready)}, start + u * kBlockSize);
      }
    };
    if constexpr (Rebuild) {
      fill_bases(block, a, item.split * kSplitTokens + start, blocks);
      block.sync();
      auto turn = [&](int u) { turn_queries(block, a, item, fragments, u % 2 * turned_steps(a.key.shape), u); };
      turn(0);
      auto read = [&](auto formats) {
        read_keys(formats, [&](const auto& stage, int token) {
          const int u = (token - start) / kBlockSize, first = u % 2 * turned_steps(a.key.shape);
          rebuild.template logits<T>(block, stage, fragments, first, scale, scores, token);
          if (u + 1 < blocks) turn(u + 1);
        });
      };
      if constexpr (is_known(Kind)) {
        each_format(a.key, read);
      } else {
        read(AnyFormat{});
      }
    } else {
      each_format(a.key, [&](auto formats) {
        read_keys(formats, [&](const auto& stage, int token) {
          key_logits<T>(block, stage, fragments, scale, scores, token);
        });
      });
    }
    const void** exact_rows = reinterpret_cast<const void**>(block.shared + a.shared.exact_rows);
    if (!Kind && a.key.shape.retained > 0) {
      const ExactRows exact{a.key, ids, exact_rows, key_slot, blocks * a.key.shape.retained};
      exact.find_rows<T>(block);
      block.sync();
      exact_logits<T>(block, exact, fragments, exact_step, scale, scores, start);
    }
    softmax(block, a.problem, item, a.partials, scores);

    const ExactRows exact{a.value, ids, exact_rows, value_slot, Kind ? 0 : blocks * a.value.shape.retained};
    take_exact_weights(block, a, exact, scores, start);
    const WeightFragments weights{block.shared + a.shared.weights, fragments.parts + kConstants * kQueryTile,
                                  fragments.parts};
    block.each([&](Thread thread) {
      for (int n = 0; n < kConstants; ++n) weights.part(n, thread) = 0.0f;
    });
    Sums<Block> sums[kOwn];
    clear(block, sums);
    bool offset = false;
    each_format(a.value, [&](auto formats) {
      for (int u = 0; u < blocks; ++u) {
        wait_stage(block, a.shared.stages);
        fetch_value(u + a.shared.stages - 1, formats);
        const Stage<Kind, decltype(formats)> stage{a.value, next(ready)};
        prepare_weights<T>(block, stage, scores, start + u * kBlockSize, weights);
        block.sync();
        add_stage(block, stage, weights, sums);
      }
      offset = Stage<Kind, decltype(formats)>{a.value, nullptr}.template offset_codes<T>();
    });
    if (!Kind && exact.count > 0) prepare_exact_weights(block, a, exact, weights);
    finish_constants(block, weights);
    if (offset) take_offset(block, weights, sums);
    store_latent(block, a, item, weights, sums);
    if (!Kind && exact.count > 0) store_exact(block, a, item, exact, weights, sums);
  }

 private:
  // Calls f with the formats a stream's stages have: of a known stream the one it has.
  template <class F>
  MC_HD static void each_format(const StreamReader& reader, F f) {
    auto one = [&](auto tag) { f(OneFormat<decltype(tag)::value>{}); };
    if constexpr (is_known(Kind)) {
      with_known_format(reader.shape.segment[0].format, one);
    } else {
      f(AnyFormat{});
    }
  }

  // Ids of the split's cache blocks, in shared memory. Ends with a `sync`.
  template <class Block>
  MC_HD static const std::int32_t* load_table(Block& block, const Arguments& a, const SplitItem& item, int blocks) {
    const Step& step = a.problem.step;
    const std::int32_t* const table = step.compressed_table +
                                      static_cast<std::int64_t>(item.sequence) * step.compressed_columns +
                                      item.block(item.first_block);
    auto* const ids = reinterpret_cast<std::int32_t*>(block.shared + a.shared.table);
    block.each([&](Thread thread) {
      if (thread.index < blocks) ids[thread.index] = table[thread.index];
    });
    block.sync();
    return ids;
  }

  template <class Block>
  MC_HD static QueryFragments fragments_of(Block& block, const Arguments& a) {
    float* sums = reinterpret_cast<float*>(block.shared + a.shared.sums);
    float* offset = sums + kRuns * kQueryTile;
    return {block.shared + a.shared.fragments, sums, offset + kQueryTile, offset};
  }

  MC_HD static bool offset_keys(const Arguments& a) {
    bool result = false;
    if constexpr (is_known(Kind)) {
      each_format(a.key, [&](auto formats) {
        result = Stage<Kind, decltype(formats)>{a.key, nullptr}.template offset_codes<T>();
      });
    }
    return result;
  }

  // Queries as fragments; returns the first step of those for retained keys.
  template <class Block>
  MC_HD static int prepare_queries(Block& block, const Arguments& a, const SplitItem& item,
                                   const QueryFragments& fragments) {
    const StreamShape& shape = a.key.shape;
    auto row = [&](int query) { return a.problem.query_row(item.sequence, item.query + query); };
    auto plain = [&](int query, int c) {
      return query < item.queries ? to_float(a.problem.query(item.sequence, item.query + query)[c]) : 0.0f;
    };
    int step = 0;
    if constexpr (Rebuild) {
      step = 2 * turned_steps(shape);
    } else {
      Stage<Kind>{a.key, nullptr}.each_run([&](int n) {
        const StageRun& run = a.key.runs[n];
        const float* mapped = n == kResidualRun ? a.queries.residual : a.queries.latent;
        const int width = n == kResidualRun ? shape.dim : shape.stored, start = n == kResidualRun ? 0 : run.stored;
        fill_fragments<T>(block, fragments, n, run.format, run.length, step, offset_keys(a), [&](int query, int c) {
          if (mapped == nullptr || query >= item.queries) return plain(query, start + c);
          return mapped[row(query) * width + start + c];
        });
        step += run.length / 16;
      });
    }
    if (!Kind && shape.retained > 0)
      fill_fragments<T>(block, fragments, kExactRun, shape.retained_format, shape.dim, step, false, plain);
    block.each([&](Thread thread) {
      if (thread.index >= kQueryTile) return;
      const bool used = a.queries.offset != nullptr && thread.index < item.queries;
      fragments.offset[thread.index] = used ? a.queries.offset[row(thread.index)] : 0.0f;
    });
    block.sync();
    finish_fragments(block, fragments, [&](int n) {
      if (n == kExactRun) return shape.retained > 0;
      return !Rebuild && (a.key.has_run(n) || (n == QueryFragments::kOffsets && offset_keys(a)));
    });
    return step;
  }

  // Steps of 16 components of a turned query.
  MC_HD static int turned_steps(const StreamShape& shape) { return 2 * padded_half(shape.dim) / 16; }

  // Cosine and sine of the position of each of the split's cache blocks, by component of half a padded key.
  struct Base {
    float cosine, sine;
  };
  MC_HD static Base* bases_of(char* shared, const Arguments& a, int u) {
    return reinterpret_cast<Base*>(shared + a.shared.bases) + u * padded_half(a.key.shape.dim);
  }
  template <class Block>
  MC_HD static void fill_bases(Block& block, const Arguments& a, int first, int blocks) {
    const int dim = a.key.shape.dim, half = padded_half(dim);
    const float* const frequencies = a.problem.shape.inverse_frequencies;
    block.each([&](Thread thread) {
      for (int k = thread.index; k < blocks * half; k += kThreads) {
        const int u = k / half, c = k % half;
        Base base{1.0f, 0.0f};
        if (c < dim / 2) {
          const float place = static_cast<float>(first + u * kBlockSize);
          sine_and_cosine(multiply(place, frequencies[c]), base.sine, base.cosine);
        }
        bases_of(block.shared, a, u)[c] = base;
      }
    });
  }

  // Queries turned back by the position of block u, from step `first` of the fragments on: their products with keys
  // turned by the rest of their own positions are those of the queries with the keys.
  template <class Block>
  MC_HD static void turn_queries(Block& block, const Arguments& a, const SplitItem& item,
                                 const QueryFragments& fragments, int first, int u) {
    using E = Code<T>;
    const int dim = a.key.shape.dim, steps = padded_half(dim) / 16;
    const Base* const bases = bases_of(block.shared, a, u);
    block.each([&](Thread thread) {
      const int query = thread.lane() / 4;
      const bool used = query < item.queries;
      const T* const row = a.problem.query(item.sequence, item.query + (used ? query : 0));
      for (int n = thread.warp(); n < steps; n += kDecodeWarps) {
        MC_UNROLL
        for (int j = 0; j < 2; ++j) {
          float x[2] = {}, y[2] = {};
          MC_UNROLL
          for (int i = 0; i < 2; ++i) {
            const int c = 16 * n + 2 * (thread.lane() % 4) + 8 * j + i;
            if (c >= dim / 2 || !used) continue;
            const float p = to_float(row[c]), q = to_float(row[c + dim / 2]);
            const Base base = bases[c];
            x[i] = p * base.cosine + q * base.sine;
            y[i] = q * base.cosine - p * base.sine;
          }
          put_pair(fragments.template at<E, T>(first + n, thread.lane()), j, make_pair<E>(x[0], x[1]));
          put_pair(fragments.template at<E, T>(first + steps + n, thread.lane()), j, make_pair<E>(y[0], y[1]));
        }
      }
    });
  }

  template <class Block>
  MC_HD static KeyRebuild prepare_rebuild(Block& block, const Arguments& a, int slot) {
    KeyRebuild rebuild{};
    if constexpr (Rebuild) {
      const StreamShape& shape = a.key.shape;
      const int bytes = static_cast<int>(rebuild_fragments<T>(shape) * sizeof(FragmentB<Code<T>>));
      const char* const map = static_cast<const char*>(a.map_fragments) + static_cast<std::int64_t>(slot) * bytes;
      rebuild.map = a.shared.map_in_shared ? block.shared + a.shared.map : map;
      rebuild.rows = block.shared + a.shared.rows;
      rebuild.turns = block.shared + a.shared.turns;
      rebuild.offset = reinterpret_cast<float*>(block.shared + a.shared.offset);
      const float* const offset = a.key.maps.offset == nullptr ? nullptr : a.key.maps.offset + slot * shape.dim;
      const int turn_bytes = kBlockSize * KeyRebuild::turn_stride<Code<T>>(shape.dim);
      block.each([&](Thread thread) {
        auto copy = [&](std::int32_t target, const char* source, int size) {
          for (int at = thread.index * 16; at < size; at += kThreads * 16) {
            Block::copy_async(block.shared + target + at, source + at);
          }
        };
        copy(a.shared.turns, a.turns, turn_bytes);
        if (a.shared.map_in_shared) copy(a.shared.map, map, bytes);
        for (int c = thread.index; c < 2 * padded_half(shape.dim); c += kThreads) {
          const int d = KeyRebuild::component(shape.dim, c);
          rebuild.offset[c] = offset == nullptr || d < 0 ? 0.0f : offset[d];
        }
      });
      Block::commit_async();
      Block::template wait_async<0>();
    }
    return rebuild;
  }

  // Weights of retained values move from `scores`, where 0 is left, to a list of their own. Ends with a `sync`.
  template <class Block>
  MC_HD static void take_exact_weights(Block& block, const Arguments& a, const ExactRows& exact, Scores scores,
                                       int start) {
    if (exact.count == 0) return;
    float* list = reinterpret_cast<float*>(block.shared + a.shared.exact_weights);
    exact.find_rows<T>(block);
    block.each([&](Thread thread) {
      for (int n = thread.index; n < exact.count; n += kThreads) {
        const int token = exact.token(n);
        for (int query = 0; query < kQueryTile; ++query) {
          list[query * exact.count + n] = token < 0 ? 0.0f : scores(query, start + token);
          if (token >= 0) scores(query, start + token) = 0.0f;
        }
      }
    });
    block.sync();
  }

  template <class Block>
  MC_HD static void clear(Block& block, Sums<Block> (&sums)[kOwn]) {
    block.each([&](Thread thread) {
      MC_UNROLL
      for (int n = 0; n < kOwn; ++n) sums[n][0](thread) = sums[n][1](thread) = FragmentD{};
    });
  }

  // What the offset of codes added to the sums of a known run. Rows g + 8 of a sum are components of odd number.
  template <class Block>
  MC_HD static void take_offset(Block& block, const WeightFragments& weights, Sums<Block> (&sums)[kOwn]) {
    block.each([&](Thread thread) {
      MC_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int query = 2 * (thread.lane() % 4) + i;
        const float added = kCodeOffset * weights.constant(WeightFragments::kOffsets, query);
        MC_UNROLL
        for (int m = 0; m < 2; ++m) {
          FragmentD& sum = sums[0][m](thread);
          sum.x[i] -= added;
          sum.x[2 + i] = (sum.x[2 + i] - added) / kOffsetStep;
        }
      }
    });
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

  template <class Formats, class Block>
  MC_HD static void add_stage(Block& block, const Stage<Kind, Formats>& stage, const WeightFragments& weights,
                              Sums<Block> (&sums)[kOwn]) {
    if constexpr (Kind) {
      stage.each_run([&](int r) {
        // A warp's unit belongs to few of the runs.
        const bool any = block.any_warp([&](Thread thread) {
          const StageRun& run = stage.run(r);
          return is_known(Kind) || (32 * thread.warp() + 31 >= run.stored && 32 * thread.warp() < run.stored + run.length);
        });
        if (any) add_unit(block, stage, weights, r, 0, sums[0]);
      });
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
  MC_HD static void add_unit(Block& block, const Stage<Kind, Formats>& stage, const WeightFragments& weights, int r,
                             int first, Sums<Block>& sum) {
    const char* base = stage.rows(r);
    const int stride = stage.stride(r);
    auto rows = [&](int step, int k) { return base + (16 * step + k) * stride; };
    auto unit = [&](Thread thread) { return first + thread.warp(); };
    auto weight = [&](auto tag, int step, Thread thread) {
      return weights.template at<Element<T, decltype(tag)::value>, T>(stage.run(r).weights, step, thread.lane());
    };
    add_values<T, Formats, kBlockSize / 16>(block, sum, kBlockSize / 16, stage.run(r).format, stage.length(r),
                                            is_known(Kind) ? 0 : stage.run(r).stored, rows, unit, weight,
                                            stage.words(r), stage.channel_scales(r), stage.channel_minima(r));
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
        float scaled[4];
        for (int i = 0; i < 4; ++i) {
          const int n = 16 * step + 2 * (thread.lane() % 4) + i % 2 + 8 * (i / 2), row = exact.clamped(n);
          const float weight = n < exact.count ? list[query * exact.count + n] : 0.0f;
          scaled[i] = weight * exact.scale(row);
          weights.part(kExactRun, thread) += weight * exact.minimum(row);
        }
        target.put<T>(exact.reader.shape.retained_format, 0, step, thread.lane(), scaled);
      }
    });
  }

  template <class Block>
  MC_HD static void finish_constants(Block& block, const WeightFragments& weights) {
    block.sync();
    block.each([&](Thread thread) {
      if (thread.index >= kConstants * kQueryTile) return;
      const int n = thread.index / kQueryTile, query = thread.index % kQueryTile;
      float sum = 0.0f;
      for (int i = 0; i < 4 * kDecodeWarps; ++i) sum += weights.part(n, Thread{i / 4 * kWarp + 4 * query + i % 4});
      weights.totals[thread.index] = sum;
    });
    block.sync();
  }

  template <class Block>
  MC_HD static void store_latent(Block& block, const Arguments& a, const SplitItem& item,
                                 const WeightFragments& weights, const Sums<Block> (&sums)[kOwn]) {
    const StreamShape& shape = a.value.shape;
    block.each([&](Thread thread) {
      MC_UNROLL
      for (int n = 0; n < kOwn; ++n) {
        const bool residual = !Kind && n >= kOwnUnits;
        const int unit = n % kOwnUnits * kDecodeWarps + thread.warp(), components = residual ? shape.dim : shape.stored;
        if (residual && !shape.has_residual()) continue;
        const bool shared =
            is_known(Kind) || residual ? 32 * unit + 16 >= components : is_shared(shape, unit, components);
        store_unit(thread, a, item, unit, shared, components, residual ? residual_vector(shape) : kRecordHead,
                   sums[n][0](thread), sums[n][1](thread), [&](int c, int query) {
                     return weights.constant(residual ? kResidualRun : is_known(Kind) ? 0 : run_of(shape, c), query);
                   });
      }
      if (thread.index >= item.queries) return;
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
        a.partials.at(row, item.split)[vector + c] = (m == 0 ? first : second).x[i] + constant(c, query);
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
      auto rows = [&](int step, int k) { return exact.rows[exact.clamped(16 * step + k)]; };
      auto unit = [&](Thread thread) { return n * kDecodeWarps + thread.warp(); };
      auto weight = [&](auto tag, int step, Thread thread) {
        return own.template at<Element<T, decltype(tag)::value>, T>(0, step, thread.lane());
      };
      add_values<T, RetainedFormat, 0>(block, sum, ceil_div(exact.count, 16), shape.retained_format, shape.dim,
                                       0, rows, unit, weight, true, nullptr, nullptr);
      block.each([&](Thread thread) {
        store_unit(thread, a, item, unit(thread), 32 * unit(thread) + 16 >= shape.dim, shape.dim, exact_vector(shape),
                   sum[0](thread), sum[1](thread), [&](int, int query) { return weights.constant(kExactRun, query); });
      });
    }
  }
};

}  // namespace minicache
