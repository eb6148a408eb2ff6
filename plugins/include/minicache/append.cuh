// New keys and values of a step into the full tier.
#pragma once

#include "minicache/tile.cuh"

namespace minicache {

// Whether the cache may hold it; float32 numbers from 3e38 on count as infinite, so that their sums stay numbers.
MC_HD bool is_finite(Half x) { return (x.bits & 0x7c00u) != 0x7c00u; }
MC_HD bool is_finite(BFloat16 x) { return (x.bits & 0x7f80u) != 0x7f80u; }
MC_HD bool is_finite(float x) { return x > -3e38f && x < 3e38f; }

template <class T>
struct AppendArguments {
  FullTier<T> tier;
  const T* k;  // [tokens, H, D], rows of a token side by side
  const T* v;
  std::int64_t k_stride, v_stride;   // numbers between tokens
  const std::int32_t* slot_mapping;  // [tokens]; slots outside the tier are skipped
  std::int32_t tokens, blocks;
};

// A thread moves the 16 bytes number `i` of the step: keys and values of one token after another.
template <class T>
struct AppendKernel {
  static constexpr int kThreads = 256;
  static constexpr int kPack = 16 / sizeof(T);

  // Packs of 16 bytes in a step; the launcher sees to it that they can be counted in 31 bits.
  MC_HD static std::int64_t packs(std::int64_t tokens, int heads, int dim) { return tokens * 2 * heads * (dim / kPack); }

  template <class Block>
  MC_HD static void run(Block& block, const AppendArguments<T>& a) {
    block.each([&](Thread thread) {
      const int row = a.tier.heads * a.tier.dim / kPack;
      const int i = block.x() * kThreads + thread.index, pair = i / row, number = (i - pair * row) * kPack;
      if (pair >= 2 * a.tokens) return;
      const std::int64_t token = pair / 2;
      const Part part = pair % 2 == 0 ? Part::key : Part::value;
      const std::int32_t slot = a.slot_mapping[token];
      if (slot < 0 || slot / kBlockSize >= a.blocks) return;
      const T* from = (part == Part::key ? a.k + token * a.k_stride : a.v + token * a.v_stride) + number;
      const int head = number / a.tier.dim, component = number % a.tier.dim;
      T* to = a.tier.block(slot / kBlockSize, part, head) + slot % kBlockSize * a.tier.dim + component;
      T numbers[kPack];
      store_as(numbers, load_as<Bytes16>(from));
      MC_UNROLL
      for (int e = 0; e < kPack; ++e) numbers[e] = is_finite(numbers[e]) ? numbers[e] : T{};
      store_as(to, load_as<Bytes16>(numbers));
    });
  }
};

}  // namespace minicache
