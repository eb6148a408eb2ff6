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
    const float* const frequencies = a.problem.shape.inverse_frequencies;
    block.each([&](Thread thread) {
      for (int k = thread.index; k < ceil_div(blocks, kOwn) * half; k += kDecodeThreads) {
        const int c = k % half, u = k / half * kOwn;
        Base base{1.0f, 0.0f}, step{1.0f, 0.0f};
        if (c < dim / 2) {
          const float place = static_cast<float>(first + u * kBlockSize);
          sine_and_cosine(multiply(place, frequencies[c]), base.sine, base.cosine);
          sine_and_cosine(multiply(static_cast<float>(kBlockSize), frequencies[c]), step.sine, step.cosine);
        }
        for (int i = u; i < minimum(u + kOwn, blocks); ++i) {
          bases_of(block.shared, a, i)[c] = base;
          base = {base.cosine * step.cosine - base.sine * step.sine, base.sine * step.cosine + base.cosine * step.sine};
        }
      }
    });
  }

  // Queries turned back by the position of block u, from step `first` of the fragments on: their products with keys
  // turned by the rest of their own positions are those of the queries with the keys.
  template <class Block>
  MC_HD static void turn(Block& block, const Arguments& a, const SplitItem& item, const QueryFragments& fragments,
                         int first, int u) {
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
          const int c = 16 * n + 2 * (thread.lane() % 4) + 8 * j;
          float x[2] = {}, y[2] = {};
          if (c < dim / 2 && used) {  // dim / 2 is even
            const Pair<T> p = detail::load<Pair<T>>(row + c), q = detail::load<Pair<T>>(row + c + dim / 2);
            const Two<Base> base = detail::load<Two<Base>>(bases + c);
            MC_UNROLL
            for (int i = 0; i < 2; ++i) {
              const float low = i == 0 ? first_of(p) : second_of(p), high = i == 0 ? first_of(q) : second_of(q);
              x[i] = low * base.x[i].cosine + high * base.x[i].sine;
              y[i] = high * base.x[i].cosine - low * base.x[i].sine;
            }
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
    const StreamShape& shape = a.key.shape;
    const int bytes = static_cast<int>(rebuild_fragments<T>(shape) * sizeof(FragmentB<Code<T>>));
    const char* const map = static_cast<const char*>(a.map_fragments) + static_cast<std::int64_t>(slot) * bytes;
    rebuild.map = map;
    rebuild.map_in_shared = a.shared.map_in_shared ? a.shared.map : -1;
    rebuild.rows = block.shared + a.shared.rows;
    rebuild.turns = block.shared + a.shared.turns;
    rebuild.offset = reinterpret_cast<float*>(block.shared + a.shared.offset);
    const float* const offset = a.key.maps.offset == nullptr ? nullptr : a.key.maps.offset + slot * shape.dim;
    const int turn_bytes = kBlockSize * KeyRebuild::turn_stride<Code<T>>(shape.dim);
    block.each([&](Thread thread) {
      auto copy = [&](std::int32_t target, const char* source, int size) {
        for (int at = thread.index * 16; at < size; at += kDecodeThreads * 16) {
          Block::copy_async(block.shared + target + at, source + at);
        }
      };
      copy(a.shared.turns, a.turns, turn_bytes);
      if (a.shared.map_in_shared) copy(a.shared.map, map, bytes);
      for (int c = thread.index; c < 2 * padded_half(shape.dim); c += kDecodeThreads) {
        const int d = KeyRebuild::component(shape.dim, c);
        rebuild.offset[c] = offset == nullptr || d < 0 ? 0.0f : offset[d];
      }
    });
    Block::commit_async();
    Block::template wait_async<0>();
    return rebuild;
  }
};

}  // namespace minicache
