// Queries for keys stored before RoPE: turned back by the positions of a split's cache blocks, and what KeyRebuild needs.
#pragma once

#include "minicache/compressed_layout.cuh"

namespace minicache {

template <class T>
struct TurnedQueries {
  using Arguments = CompressedSplitArguments<T>;

  using Base = KeyRebuild::Base;

  // Of the split's cache block number u.
  MC_HD static Base* bases_of(char* shared, const Arguments& a, int u) {
    return reinterpret_cast<Base*>(shared + a.shared.bases) + u * padded_half(a.key.shape.dim);
  }
  // `first`: position of the first of `blocks` blocks. A thread turns one component from block to block.
  template <class Block>
  MC_HD static void fill_bases(Block& block, const Arguments& a, int first, int blocks) {
    constexpr int kOwn = 4;  // blocks of a thread
    const int dim = a.key.shape.dim, half = padded_half(dim);
    const Base* const steps = reinterpret_cast<const Base*>(a.turns + KeyRebuild::turn_bytes<Code<T>>(dim));
    block.each([&](Thread thread) {
      for (int k = thread.index; k < ceil_div(blocks, kOwn) * half; k += kDecodeThreads) {
        const int c = k % half, u = k / half * kOwn;
        const Base step = steps[c];
        Base base = KeyRebuild::base_of(dim, a.problem.shape.inverse_frequencies, first + u * kBlockSize, c);
        for (int i = u; i < minimum(u + kOwn, blocks); ++i) {
          bases_of(block.shared, a, i)[c] = base;
          base = {base.cosine * step.cosine - base.sine * step.sine, base.sine * step.cosine + base.cosine * step.sine};
        }
      }
    });
  }

  // A query's components of a thread in step n of half the padded key, and those they are paired with; zeros without
  // any.
  struct Step {
    Pair<T> low[2], high[2];

    MC_HD static Step of(const Arguments& a, const SplitItem& item, Thread thread, int n) {
      const int dim = a.key.shape.dim, query = thread.lane() / 4;
      Step step{};
      MC_UNROLL
      for (int j = 0; j < 2; ++j) {
        const int c = component(thread, n, j);
        if (c >= dim / 2 || query >= item.queries) continue;  // dim / 2 is even
        const T* const row = a.problem.query(item.sequence, item.query + query) + c;
        step.low[j] = detail::load<Pair<T>>(row);
        step.high[j] = detail::load<Pair<T>>(row + dim / 2);
      }
      return step;
    }
    MC_HD static int component(Thread thread, int n, int j) { return 16 * n + 2 * (thread.lane() % 4) + 8 * j; }
  };

  // Queries turned back by the position of block u, from step `first` of the fragments on: their products with keys
  // turned by the rest of their own positions are those of the queries with the keys. `own`: of the warp's first step.
  template <class Block>
  MC_HD static void turn(Block& block, const Arguments& a, const SplitItem& item, const QueryFragments& fragments,
                         const typename Block::template PerThread<Step>& own, int first, int u) {
    using E = Code<T>;
    const int steps = padded_half(a.key.shape.dim) / 16;
    const Base* const bases = bases_of(block.shared, a, u);
    block.each([&](Thread thread) {
      for (int n = thread.warp(); n < steps; n += kDecodeWarps) {
        const Step query = n < kDecodeWarps ? own(thread) : Step::of(a, item, thread, n);
        FragmentB<E> low, high;
        MC_UNROLL
        for (int j = 0; j < 2; ++j) {
          const auto base = detail::load<Neighbours<Base, 2>>(bases + Step::component(thread, n, j));
          float x[2], y[2];
          MC_UNROLL
          for (int i = 0; i < 2; ++i) {
            const float p = i == 0 ? first_of(query.low[j]) : second_of(query.low[j]);
            const float q = i == 0 ? first_of(query.high[j]) : second_of(query.high[j]);
            x[i] = p * base.x[i].cosine + q * base.x[i].sine;
            y[i] = q * base.x[i].cosine - p * base.x[i].sine;
          }
          put_pair(low, j, round_pair<E>(x[0], x[1]));
          put_pair(high, j, round_pair<E>(y[0], y[1]));
        }
        fragments.template at<E, T>(first + n, thread.lane()) = low;
        fragments.template at<E, T>(first + steps + n, thread.lane()) = high;
      }
    });
  }

  template <int Kind, class Block>
  MC_HD static KeyRebuild prepare_rebuild(Block& block, const Arguments& a, int slot) {
    KeyRebuild rebuild{RowRebuild::of<T, Kind>(block, a.key, a.map_fragments, slot, a.shared), a.turns};
    if (Kind != kGeneral || a.shared.turns >= 0) {
      char* const own = block.shared + a.shared.turns;
      fetch_bytes(block, own, a.turns, KeyRebuild::turn_bytes<Code<T>>(a.key.shape.dim));
      rebuild.turns = own;
    }
    rebuild.keys.map.template fetch<T>(block, a.key);
    rebuild.keys.template prepare<T, Kind>(block, a.key, slot, false);
    Block::commit_async();
    Block::template wait_async<0>();
    return rebuild;
  }
};

}  // namespace minicache
