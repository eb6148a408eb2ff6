// Attention on the CPU, where keys and values lie: float32, vectors of the widest instruction set the machine has.
#pragma once

#include "api.h"
#include "cpu/latent.h"

namespace minicache::cpu {

constexpr int kMaxGroupSize = 128;  // query heads per KV head

// One part of a decode: tokens [first, last) of one tier of one sequence, for one KV head.
struct DecodePart {
  std::int32_t sequence, head;
  bool compressed;
  std::int32_t first, last;
};

// Query rows [first, first + count) of one KV head of a prefill chunk; row r is query head r % G of query r / G.
struct PrefillPart {
  std::int32_t sequence, head;
  std::int32_t first, count;
};

// `key`, `value`: how to read the streams (unused without a compressed tier). `turns`: [positions, 2, D / 2] cosines and
// sines of every compressed position, of keys in the pre_rope basis. `scratch`: room for as many floats as the function
// of the same name below says.
struct Kernels {
  const char* name;
  // Leaves G partial results {largest logit, sum of weights, weighted values [D]} in `out`.
  void (*decode_part)(const AttentionArguments&, const Reader& key, const Reader& value, const DecodePart&,
                      const float* turns, float* scratch, float* out);
  // Output [G, D] from `parts` partial results, in order.
  void (*combine_parts)(int group, int dim, int parts, const float* partials, float* out);
  // Writes its rows of the output.
  void (*prefill_part)(const AttentionArguments&, const Reader& key, const Reader& value, const PrefillPart&,
                       const float* turns, float* scratch);
};

// The widest set this processor has, at most `limit` (avx512, avx2 or generic; null: no limit).
const Kernels& kernels(const char* limit);

std::int64_t decode_scratch(const AttentionArguments&, const Reader& key, const Reader& value);
std::int64_t prefill_scratch(const AttentionArguments&, const Reader& key, const Reader& value, int rows);

}  // namespace minicache::cpu
