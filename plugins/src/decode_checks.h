// What minicache_decode_attention asks of its arguments: 0, or an error whose message names the argument.
#pragma once

#include "errors.h"
#include "minicache/decode_attention.cuh"

namespace minicache {
namespace {

constexpr const char kName[] = "decode_attention";

inline std::int32_t missing(const char* argument) { return fail(invalid_argument, "%s: %s is null", kName, argument); }

inline std::int32_t check_pool(const char* part, const char* name, const void* pool, bool needed) {
  if (!needed) return ok;
  if (pool == nullptr) return fail(invalid_argument, "%s: %s.%s is null", kName, part, name);
  if (!aligned(pool, 16)) return fail(invalid_argument, "%s: %s.%s is not aligned to 16 bytes", kName, part, name);
  return ok;
}

inline std::int32_t check_maps(const char* part, const StreamShape& shape, const ReadMaps& maps) {
  auto absent = [&](const char* name) { return fail(invalid_argument, "%s: %s.%s is null", kName, part, name); };
  if (shape.has_map() && maps.map == nullptr) return absent("map");
  if (maps.map != nullptr && maps.map_heads != 1 && maps.map_heads != shape.heads) {
    return fail(invalid_argument, "%s: %s.map_heads: expected 1 or %d, got %d", kName, part, shape.heads,
                maps.map_heads);
  }
  const struct {
    const char* name;
    const float* data;
  } matrices[] = {{"map", maps.map}, {"residual_map", maps.residual_map}, {"offset", maps.offset}};
  for (const auto& matrix : matrices) {
    if (!aligned(matrix.data, 16)) {
      return fail(invalid_argument, "%s: %s.%s is not aligned to 16 bytes", kName, part, matrix.name);
    }
  }
  if (shape.has_residual() && shape.align && maps.residual_map == nullptr) return absent("residual_map");
  if (shape.merge == Merge::linear && maps.offset == nullptr) return absent("offset");
  if (shape.match_heads && maps.slots == nullptr) return absent("slots");
  return ok;
}

inline std::int32_t check_stream(const char* name, Part part, const AttentionShape& attention, const StreamView& view) {
  const StreamShape& shape = *view.shape;
  if (shape.part != part) return fail(invalid_argument, "%s: %s.shape describes the other part", kName, name);
  if (shape.heads != attention.heads || shape.dim != attention.dim) {
    return fail(invalid_argument, "%s: %s.shape: expected %d heads of %d, got %d of %d", kName, name, attention.heads,
                attention.dim, shape.heads, shape.dim);
  }
  const StreamPools& pools = view.pools;
  const bool retained = shape.retained > 0;
  const struct {
    const char* name;
    const void* pool;
    bool needed;
  } wanted[] = {
      {"latent", pools.latent, shape.latent > 0},
      {"codes", pools.codes, shape.code_bytes > 0},
      {"params", pools.params, shape.params > 0},
      {"norms", pools.norms, shape.has_norms()},
      {"residual", pools.residual, shape.has_residual()},
      {"residual_params", pools.residual_params, shape.has_residual()},
      {"exact", pools.exact, retained},
      {"exact_params", pools.exact_params, retained && shape.exact_params() > 0},
      {"retained_index", pools.retained_index, retained},
  };
  for (const auto& field : wanted) {
    if (const std::int32_t status = check_pool(name, field.name, field.pool, field.needed)) return status;
  }
  return check_maps(name, shape, view.maps);
}

inline std::int32_t check_shape(const AttentionArguments& a) {
  const AttentionShape& shape = a.shape;
  if (shape.heads < 1 || shape.query_heads < 1 || shape.query_heads % shape.heads != 0) {
    return fail(invalid_argument, "%s: query_heads: expected a multiple of heads (%d), got %d", kName, shape.heads,
                shape.query_heads);
  }
  if (shape.dim != 64 && shape.dim != 80 && shape.dim != 96 && shape.dim != 128 && shape.dim != 256) {
    return fail(unsupported, "%s: dim: expected 64, 80, 96, 128 or 256, got %d", kName, shape.dim);
  }
  if (!(shape.scale > 0.0f)) return fail(invalid_argument, "%s: scale: expected a positive number", kName);
  if (!(shape.softcap >= 0.0f)) return fail(invalid_argument, "%s: softcap: expected 0 or more", kName);
  const Step& step = a.step;
  if (step.decodes < 0 || step.decodes > step.sequences || step.decodes > step.tokens) {
    return fail(invalid_argument, "%s: decodes: expected 0 to %d, got %d", kName, minimum(step.sequences, step.tokens),
                step.decodes);
  }
  if (step.decodes > 65535 || shape.heads * ceil_div(shape.query_heads / shape.heads, kQueryTile) > 65535) {
    return fail(unsupported, "%s: more than 65535 decodes or tiles of query heads", kName);
  }
  if ((a.key.shape == nullptr) != (a.value.shape == nullptr)) {
    return fail(invalid_argument, "%s: key.shape and value.shape: expected both or none", kName);
  }
  if (step.full_columns < 1) {
    return fail(invalid_argument, "%s: full_columns: expected at least 1, got %d", kName, step.full_columns);
  }
  if (a.key.shape != nullptr && step.compressed_columns < 1) {
    return fail(invalid_argument, "%s: compressed_columns: expected at least 1, got %d", kName,
                step.compressed_columns);
  }
  if (a.sliding_window < 0) {
    return fail(invalid_argument, "%s: sliding_window: expected 0 or more, got %d", kName, a.sliding_window);
  }
  return ok;
}

inline std::int32_t check_pointers(const AttentionArguments& a, std::size_t number) {
  const Step& step = a.step;
  if (a.kv == nullptr) return missing("kv");
  if (!aligned(a.kv, 16)) return fail(invalid_argument, "%s: kv is not aligned to 16 bytes", kName);
  if (a.full_blocks < 1) {
    return fail(invalid_argument, "%s: full_blocks: expected at least 1, got %d", kName, a.full_blocks);
  }
  if (a.q == nullptr) return missing("q");
  if (a.out == nullptr) return missing("out");
  if (!aligned(a.q, 16)) return fail(invalid_argument, "%s: q is not aligned to 16 bytes", kName);
  if (!aligned(a.out, number)) return fail(invalid_argument, "%s: out is not aligned to its numbers", kName);
  const std::int64_t width = static_cast<std::int64_t>(a.shape.query_heads) * a.shape.dim;
  if (a.q_stride < width || a.out_stride < width) {
    return fail(invalid_argument, "%s: q_stride and out_stride: expected at least %lld, got %lld and %lld", kName,
                static_cast<long long>(width), static_cast<long long>(a.q_stride),
                static_cast<long long>(a.out_stride));
  }
  const auto unit = static_cast<std::int64_t>(16 / number);
  if (a.q_stride % unit != 0) {
    return fail(invalid_argument, "%s: q_stride: expected a multiple of %lld, got %lld", kName,
                static_cast<long long>(unit), static_cast<long long>(a.q_stride));
  }
  if (step.query_start == nullptr) return missing("query_start");
  if (step.context_len == nullptr) return missing("context_len");
  if (step.full_table == nullptr) return missing("full_table");
  if (a.key.shape == nullptr) return ok;
  if (step.compressed_len == nullptr) return missing("compressed_len");
  if (step.compressed_table == nullptr) return missing("compressed_table");
  if (a.key.shape->basis == Basis::pre_rope && a.shape.inverse_frequencies == nullptr) {
    return missing("inverse_frequencies");
  }
  if (const std::int32_t status = check_stream("key", Part::key, a.shape, a.key)) return status;
  return check_stream("value", Part::value, a.shape, a.value);
}

}  // namespace
}  // namespace minicache
