// What CompressedSplit is told, and where its results and shared memory lie.
#pragma once

#include "minicache/key_rebuild.cuh"
#include "minicache/value_sums.cuh"

namespace minicache {

// Queries in the space of the keys' stream, float32 by query row; null: the query itself (offset: zero).
struct MappedQueries {
  const float* latent;    // [stored]
  const float* residual;  // [D]
  const float* offset;    // [1]
};

// Cache blocks of a stage.
MC_HD constexpr int stage_blocks(bool rebuilt, int kind) {
  return rebuilt ? rebuilt_blocks(kind) : is_known(kind) ? 2 : 1;
}
// Blocks that queries are turned for: of a stage and of the next one.
MC_HD constexpr int turned_blocks(int kind) { return 2 * stage_blocks(true, kind); }

// Where things lie in a thread block's shared memory: byte offsets.
struct CompressedShared {
  std::int32_t block_bytes, stage_bytes, stages;  // of a cache block in a stage; of a stage; how many
  std::int32_t scores, sums, exact_weights, exact_rows, rows, map;
  std::int32_t fragments;           // of queries, and in their place then of the weights of a stage's blocks
  std::int32_t weight_bytes;        // of each block
  std::int32_t turns, offset, bases;  // of keys that are rebuilt; turns: -1, where they stay in global memory
  std::int32_t table, bytes;
  bool map_in_shared;
};

// How much of what could lie in shared memory does. One stage, and turns that stay in global memory: for streams that
// are read as general ones.
struct CompressedRoom {
  int stages;
  bool map, turns;
};

template <class T>
CompressedShared compressed_shared(const StreamReader& key, const StreamReader& value, int kind,
                                   const CompressedRoom& room) {
  const StreamShape &k = key.shape, &v = value.shape;
  const bool rebuilt = k.basis == Basis::pre_rope;
  CompressedShared shared{};
  SharedFields field;
  constexpr int kStep = QueryFragments::step_bytes<T>();
  const int held = stage_blocks(rebuilt, kind), stages = room.stages;
  const int plain = (k.stored + (k.has_residual() ? k.dim : 0)) / 16;
  const int mapped = rebuilt ? turned_blocks(kind) * turned_steps(k.dim) : plain;
  shared.block_bytes = ceil_div(maximum(key.stage.bytes, value.stage.bytes), 128) * 128;
  shared.stage_bytes =
      maximum(held * shared.block_bytes, v.retained > 0 ? kSplitBlocks * kMaxRetained / 16 * kStep / stages : 0);
  shared.stage_bytes = ceil_div(shared.stage_bytes, 128) * 128;
  shared.stages = stages;
  field(static_cast<std::int64_t>(stages) * shared.stage_bytes);
  shared.scores = field(Scores::kBytes);
  const bool known = is_known(kind);  // one run, which stays in registers
  const int runs = v.has_residual() ? kResidualRun + 1 : v.segments;
  shared.weight_bytes = runs * (kBlockSize / 16) * kStep;
  shared.fragments = field(maximum((mapped + (k.retained > 0 ? k.dim / 16 : 0)) * kStep, held * shared.weight_bytes));
  // QueryFragments::sums and offset; its parts, or WeightFragments::totals and parts
  const int constants = known ? WeightSums<kKnownBits * 16>::kUsed : kConstants;
  shared.sums = field(((kRuns + 1 + kConstants) * kQueryTile + constants * kDecodeThreads) * 4);
  shared.exact_weights = field(kQueryTile * kSplitBlocks * v.retained * 4);
  shared.exact_rows = field(kSplitBlocks * maximum(k.retained, v.retained) * static_cast<int>(sizeof(void*)));
  shared.rows = field(rebuilt && kind == kPlain ? StoredRows::bytes<T>(k) : 0);
  shared.map_in_shared = rebuilt && room.map;
  shared.map = field(shared.map_in_shared ? rebuild_fragments<T>(k) * sizeof(FragmentB<Code<T>>) : 0);
  shared.turns = room.turns ? field(rebuilt ? KeyRebuild::turn_bytes<Code<T>>(k.dim) : 0) : -1;
  shared.offset = field(rebuilt ? RebuildMap::offset_bytes(k.dim) : 0);
  shared.bases = field(rebuilt ? kSplitBlocks * padded_half(k.dim) * sizeof(KeyRebuild::Base) : 0);
  shared.table = field(kSplitBlocks * 4);
  shared.bytes = field.bytes;
  return shared;
}

template <class T>
struct CompressedSplitArguments {
  DecodeProblem<T> problem;
  StreamReader key, value;
  MappedQueries queries;
  const void* map_fragments;  // of every slot, for keys that are rebuilt
  const char* turns;          // KeyRebuild's table, for them
  CompressedShared shared;
  Partials partials;  // vectors: latent sums [stored], residual ones [D], retained values [D]; as far as there are any
};

MC_HD int residual_vector(const StreamShape& value) { return kRecordHead + value.stored; }
MC_HD int exact_vector(const StreamShape& value) {
  return residual_vector(value) + (value.has_residual() ? value.dim : 0);
}
MC_HD int compressed_record(const StreamShape& value) {
  return exact_vector(value) + (value.retained > 0 ? value.dim : 0);
}

}  // namespace minicache
