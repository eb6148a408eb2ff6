// Decode attention over a split of the compressed tier.
#pragma once

#include "minicache/compressed_sums.cuh"
#include "minicache/turned_queries.cuh"

namespace minicache {

// Thread block: (split, KV head and tile of its query heads, decode). Rebuild: keys are in the pre_rope basis. Kind: what
// is known of both streams, which leaves out what others need.
template <class T, bool Rebuild, int Kind>
struct CompressedSplit {
  static constexpr int kThreads = kDecodeThreads;
  // More would spill registers, or, of tables and maps of keys that are rebuilt, find no shared memory.
  static constexpr int kPlainBlocks = !Kind || Kind == kWide || kArch == 800 ? 3 : 4;
  static constexpr bool kTwoRebuild = Kind != 64 || kArch == 1200;
  static constexpr int kMinBlocks = !Rebuild ? kPlainBlocks : kTwoRebuild ? 2 : 3;
  static constexpr int kStageBlocks = stage_blocks(Rebuild, Kind);
  using Arguments = CompressedSplitArguments<T>;
  using Own = CompressedSums<T, Kind>;
  using Turned = TurnedQueries<T>;

  template <class Block>
  MC_HD static void run(Block& block, const Arguments& a) {
    const SplitItem item = SplitItem::of(block, a.problem, true);
    if (item.tokens.empty()) return;
    const int key_slot = a.key.slot(item.head), value_slot = a.value.slot(item.head);
    const int blocks = item.last_block - item.first_block;
    const std::int32_t* const ids = load_table(block, a, item, blocks);
    const Scores scores{reinterpret_cast<float*>(block.shared + a.shared.scores)};
    StageRing stages(block.shared, a.shared.stage_bytes, a.shared.stages);  // of all keys, then of values
    using KeySource = StageSource<T, Kind, Part::key>;
    using ValueSource = StageSource<T, Kind, Part::value>;
    typename Block::template PerThread<KeySource> keys;
    typename Block::template PerThread<ValueSource> values;
    block.each([&](Thread thread) { keys(thread) = KeySource::of(thread, a.key, key_slot); });
    auto find_values = [&] {
      block.each([&](Thread thread) { values(thread) = ValueSource::of(thread, a.value, value_slot); });
    };
    // Cache blocks in stage number u of keys, or of values.
    const int rounds = ceil_div(blocks, kStageBlocks);
    auto held = [&](int u) { return minimum(kStageBlocks, blocks - u * kStageBlocks); };
    auto each_held = [&](int u, auto f) {
      MC_UNROLL
      for (int n = 0; n < kStageBlocks; ++n) {
        if (n == 0 || n < held(u)) f(n);
      }
    };
    auto fetch_blocks = [&](int u, const StreamReader& reader, const auto& source) {
      char* const stage = stages.to_fill();
      MC_UNROLL
      for (int n = 0; n < kStageBlocks; ++n) {
        const int own = u * kStageBlocks + n;
        block.each([&](Thread thread) {
          char* const target = stage + n * a.shared.block_bytes;
          if (own < blocks) source(thread).template fetch<Block>(thread, reader, target, ids[own]);
        });
      }
      Block::commit_async();
    };
    auto fetch_value = [&](int u) { fetch_blocks(u, a.value, values); };
    auto fetch = [&](int u) {
      if (u < rounds) return fetch_blocks(u, a.key, keys);
      if (Rebuild) find_values();  // again for each stage: not in registers while keys are rebuilt
      fetch_value(u - rounds);
    };
    if (!Rebuild) find_values();
    for (int u = 0; u < a.shared.stages - 1; ++u) fetch(u);

    const QueryFragments fragments = fragments_of(block, a);
    constexpr bool kKnownQueries = is_known(Kind) && !Rebuild;
    const int exact_step = kKnownQueries ? 0 : prepare_queries(block, a, item, fragments);
    KeyRebuild rebuild{};
    if constexpr (Rebuild) rebuild = Turned::template prepare_rebuild<Kind>(block, a, key_slot);
    const float scale = a.problem.shape.scale * kLog2e;
    const int start = item.first_block * kBlockSize;
    // Waits for stage number u of those that `fill` fills, and has one further ahead filled.
    auto wait_for = [&](int u, auto fill) {
      const bool single = Kind == kGeneral && a.shared.stages == 1;
      if (single) {
        block.sync();  // nobody reads it any more
        fill(u);
      }
      wait_stage(block, a.shared.stages);
      if (!single) fill(u + a.shared.stages - 1);
    };
    // Calls `read` with each stage of keys and the place of its first token,
    auto read_keys = [&](auto read) {
      for (int u = 0; u < rounds; ++u) {
        wait_for(u, fetch);
        read(stages.to_read(), u, start + u * kStageBlocks * kBlockSize);
      }
    };
    // or with each of its blocks.
    auto read_key_blocks = [&](auto read) {
      read_keys([&](const char* stage, int u, int token) {
        each_held(u, [&](int n) { read(stage + n * a.shared.block_bytes, token + n * kBlockSize); });
      });
    };
    if constexpr (Rebuild) {
      Turned::fill_bases(block, a, item.split * kSplitTokens + start, blocks);
      typename Block::template PerThread<typename Turned::Step> own;
      block.each([&](Thread thread) { own(thread) = Turned::Step::of(a, item, thread, thread.warp()); });
      block.sync();
      auto first_step = [&](int b) { return (b & (turned_blocks(Kind) - 1)) * turned_steps(a.key.shape.dim); };
      auto turn = [&](int u) {
        MC_UNROLL
        for (int n = 0; n < kStageBlocks; ++n) {
          const int b = u * kStageBlocks + n;
          if (b < blocks) Turned::turn(block, a, item, fragments, own, first_step(b), b);
        }
      };
      turn(0);
      with_formats<Kind>(a.key, [&](auto formats) {
        read_keys([&](const char* stage, int u, int token) {
          auto first = [&](int n) { return first_step(u * kStageBlocks + n); };
          rebuild.template logits<T, Kind>(block, a.key, formats, stage, a.shared.block_bytes, held(u), fragments,
                                           first, scale, scores, token);
          turn(u + 1);
        });
      });
    } else if constexpr (kKnownQueries) {
      KnownQueries<T, Kind, Block> queries;
      prepare_known(block, a, item, scale, fragments.data, queries);
      with_formats<Kind>(a.key, [&](auto formats) {
        read_key_blocks([&](const char* stage, int token) {
          known_logits<T>(block, KeyStage<Kind, decltype(formats)>{a.key, stage}, queries, scale, scores, token);
        });
      });
    } else {
      with_formats<Kind>(a.key, [&](auto formats) {
        read_key_blocks([&](const char* stage, int token) {
          key_logits<T>(block, KeyStage<Kind, decltype(formats)>{a.key, stage}, fragments, scale, scores, token);
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
    const WeightFragments weights{fragments.data, fragments.parts + kConstants * kQueryTile, fragments.parts};
    typename Block::template PerThread<WeightSums<Kind>> constants;
    block.each([&](Thread thread) { constants(thread).clear(weights, thread); });
    typename Own::template Sums<Block> sums[Own::kOwn];
    Own::clear(block, sums);
    typename Own::template WarpRuns<Block> runs;
    Own::find_runs(block, a.value.shape, runs);
    if (Rebuild) find_values();
    with_formats<Kind>(a.value, [&](auto formats) {
      for (int u = 0; u < rounds; ++u) {
        wait_for(u, fetch_value);
        const char* const first = stages.to_read();
        auto each_block = [&](auto f) {
          each_held(u, [&](int n) {
            const ValueStage<Kind, decltype(formats)> stage{a.value, first + n * a.shared.block_bytes};
            f(stage, (u * kStageBlocks + n) * kBlockSize, weights.behind(n * a.shared.weight_bytes));
          });
        };
        each_block([&](const auto& stage, int token, const WeightFragments& own) {
          prepare_weights<T>(block, stage, scores, start + token, own, constants);
        });
        block.sync();
        each_block(
            [&](const auto& stage, int, const WeightFragments& own) { Own::add_stage(block, stage, own, runs, sums); });
      }
    });
    block.each([&](Thread thread) { constants(thread).store(weights, thread); });
    if (!Kind && exact.count > 0) Own::prepare_exact_weights(block, a, exact, weights);
    char* const unused = block.shared + a.shared.scores;  // by what is left to do for known runs
    Own::hand_over(block, unused, sums);
    Own::finish_constants(block, weights);
    Own::take_over(block, unused, sums);
    if (offset_codes(a.value)) Own::take_offset(block, weights, sums);
    Own::store_latent(block, a, item, weights, runs, sums);
    if (!Kind && exact.count > 0) Own::store_exact(block, a, item, exact, weights, sums);
  }

 private:
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

  // Whether a stream's codes are read with an offset.
  MC_HD static bool offset_codes(const StreamReader& reader) {
    bool result = false;
    with_formats<Kind>(reader, [&](auto formats) {
      result = KeyStage<Kind, decltype(formats)>{reader, nullptr}.template offset_codes<T>();
    });
    return result;
  }

  template <class Queries, class Block>
  MC_HD static void prepare_known(Block& block, const Arguments& a, const SplitItem& item, float scale, char* shared,
                                  Queries& queries) {
    auto row = [&](int query) { return a.problem.query_row(item.sequence, item.query + query); };
    auto numbers = [&](int query, int c, float (&x)[8]) {
      for (float& y : x) y = 0.0f;
      if (query >= item.queries) return;
      if (a.queries.latent == nullptr) {
        const auto own = detail::load<Neighbours<T, 8>>(a.problem.query(item.sequence, item.query + query) + c);
        MC_UNROLL
        for (int i = 0; i < 8; ++i) x[i] = to_float(own.x[i]);
        return;
      }
      const float* const mapped = a.queries.latent + row(query) * a.key.shape.stored + c;
      MC_UNROLL
      for (int half = 0; half < 2; ++half) {
        const auto own = detail::load<Neighbours<float, 4>>(mapped + 4 * half);
        MC_UNROLL
        for (int i = 0; i < 4; ++i) x[4 * half + i] = own.x[i];
      }
    };
    queries.prepare(block, shared, offset_codes(a.key), numbers, [&](int query) {
      const bool used = a.queries.offset != nullptr && query < item.queries;
      return used ? scale * a.queries.offset[row(query)] : 0.0f;
    });
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
      step = turned_blocks(Kind) * turned_steps(shape.dim);
    } else {
      KeyStage<Kind>{a.key, nullptr}.each_run([&](int n) {
        const StageRun& run = a.key.runs[n];
        const float* mapped = n == kResidualRun ? a.queries.residual : a.queries.latent;
        const int width = n == kResidualRun ? shape.dim : shape.stored, start = n == kResidualRun ? 0 : run.stored;
        fill_fragments<T>(block, fragments, n, run.format, run.length, step, [&](int query, int c) {
          if (mapped == nullptr || query >= item.queries) return plain(query, start + c);
          return mapped[row(query) * width + start + c];
        });
        step += run.length / 16;
      });
    }
    if (!Kind && shape.retained > 0)
      fill_fragments<T>(block, fragments, kExactRun, shape.retained_format, shape.dim, step, plain);
    block.each([&](Thread thread) {
      if (thread.index >= kQueryTile) return;
      const bool used = a.queries.offset != nullptr && thread.index < item.queries;
      fragments.offset[thread.index] = used ? a.queries.offset[row(thread.index)] : 0.0f;
    });
    block.sync();
    finish_fragments(block, fragments, [&](int n) {
      if (n == kExactRun) return shape.retained > 0;
      return !Rebuild && a.key.has_run(n);
    });
    return step;
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
};

}  // namespace minicache
