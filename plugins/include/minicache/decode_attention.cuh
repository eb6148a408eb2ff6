// Decode attention as a whole: its kernels in order, and what they hand on in workspace.
//
//     QueryMap, MapFragments ─► FullSplit, CompressedSplit ─► CombineSplits ─► OutputMap
//     (mapped streams)          (partial results)                              (mapped values)
#pragma once

#include "minicache/combine_splits.cuh"
#include "minicache/compressed_split.cuh"
#include "minicache/full_split.cuh"
#include "minicache/head_maps.cuh"
#include "minicache/map_fragments.cuh"

namespace minicache {

// Where intermediate results lie: byte offsets, -1 for those there is no need of. Sizes depend on shapes only.
struct DecodeWorkspace {
  std::int64_t full, compressed;                        // partial results
  std::int64_t query_latent, query_residual, query_offset;
  std::int64_t map_fragments, turns;
  std::int64_t sums, residual_sums, plain;
  std::int64_t bytes;
};

// What a layer's decode attention takes; shapes null without a compressed tier.
struct DecodeSizes {
  std::int64_t query_rows;
  std::int32_t dim, full_splits, compressed_splits;
  const StreamShape *key, *value;
  const ReadMaps *key_maps, *value_maps;

  bool compressed() const { return key != nullptr; }
  bool rebuilt() const { return compressed() && key->basis == Basis::pre_rope; }
  bool maps_query() const {
    return compressed() && !rebuilt() &&
           (key_maps->map != nullptr || key_maps->residual_map != nullptr || key_maps->offset != nullptr);
  }
  bool maps_output() const {
    return compressed() && (value_maps->map != nullptr || value_maps->residual_map != nullptr);
  }
};

template <class T>
DecodeWorkspace decode_workspace(const DecodeSizes& sizes) {
  DecodeWorkspace workspace{};
  auto field = [&](bool wanted, std::int64_t bytes) {
    const std::int64_t offset = wanted ? workspace.bytes : -1;
    if (wanted) workspace.bytes += (bytes + 255) / 256 * 256;
    return offset;
  };
  const std::int64_t row = sizes.query_rows * 4;
  workspace.full = field(true, row * sizes.full_splits * (kRecordHead + sizes.dim));
  if (!sizes.compressed()) {
    workspace.compressed = workspace.query_latent = workspace.query_residual = workspace.query_offset = -1;
    workspace.map_fragments = workspace.turns = workspace.sums = workspace.residual_sums = workspace.plain = -1;
    return workspace;
  }
  const StreamShape &key = *sizes.key, &value = *sizes.value;
  workspace.compressed = field(true, row * sizes.compressed_splits * compressed_record(value));
  const bool query = sizes.maps_query(), output = sizes.maps_output();
  workspace.query_latent = field(query && sizes.key_maps->map != nullptr, row * key.stored);
  workspace.query_residual = field(query && sizes.key_maps->residual_map != nullptr, row * key.dim);
  workspace.query_offset = field(query && sizes.key_maps->offset != nullptr, row);
  workspace.map_fragments = field(sizes.rebuilt(), map_fragment_bytes<T>(key));
  workspace.turns = field(sizes.rebuilt(), KeyRebuild::table_bytes<Code<T>>(key.dim));
  workspace.sums = field(output, row * value.stored);
  workspace.residual_sums = field(output && value.has_residual(), row * value.dim);
  workspace.plain = field(output, row * value.dim);
  return workspace;
}

}  // namespace minicache
