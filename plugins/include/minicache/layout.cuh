// The two-tier cache as kernels see it: shapes known when an engine is built, pointers known when it runs.
// Layouts are those of minicache_trt/contract.py; tests hold the two together.
#pragma once

#include "minicache/formats.cuh"

namespace minicache {

constexpr int kBlockSize = 64;  // tokens per cache block, both tiers
constexpr int kMaxSegments = 4;
constexpr int kMaxGroup = 8;    // layers of a stream
constexpr int kMaxRank = 256;   // components of a linear stream's latent vector
constexpr int kMaxHeadDim = 256;
constexpr int kMaxRetained = kBlockSize / 2;  // tokens a block keeps exactly

// Numbers of minicache_trt/compression/constants.py.
constexpr float kPi = 3.14159265358979f;
constexpr float kSmallAngle = 1e-4f;
constexpr float kAntipodalMargin = 1e-3f;
constexpr float kFirstScore = 4.0f;
constexpr int kKarcherSteps = 2;

enum class Part : std::int32_t { key, value };
enum class Merge : std::int32_t { none, mean, slerp, linear };
enum class Basis : std::int32_t { post_rope, pre_rope };
enum class Norm : std::int32_t { head, token };
enum class Retention : std::int32_t { topk, threshold, paper_literal };

// A run of components of a stream's latent vector, stored in one format.
struct Segment {
  std::int32_t length;
  Format format;
  bool channel;           // ranges per component over the block, otherwise per token
  bool hadamard;
  std::int32_t component;  // first component among all of them
  std::int32_t stored;     // first component among the stored ones (dropped segments have none)
  std::int32_t storage;    // first number in the latent pool (model) or first byte in the code pool, per token and head
  std::int32_t scale;      // offset of the scales in a head's params
  std::int32_t minimum;    // offset of the minima (integer formats)
  std::int32_t ranges;     // how many of each: kBlockSize (per token) or length (channel), 0 without
};

// Everything about a stream that is known when the engine is built, for one of its layers (`member`).
struct StreamShape {
  Part part;
  Merge merge;
  Basis basis;
  Norm norm;
  Retention retention;
  Format retained_format;  // model, fp8, int8, int4
  Format residual;         // int8, int4, int2; drop: none
  bool align, match_heads;
  std::int32_t heads, dim;        // KV heads H (slots of the stream), head_dim D
  std::int32_t members, member;   // layers of the group m, this layer's place among them
  std::int32_t retained;          // capacity R
  std::int32_t sink_tokens;
  float t, gamma;
  std::int32_t rank, stored;      // components of y, and those that are stored
  std::int32_t segments;
  Segment segment[kMaxSegments];
  // Sizes of a block's fields, per head (and token, layer):
  std::int32_t latent;       // latent: numbers per token
  std::int32_t code_bytes;   // codes: bytes per token
  std::int32_t params;       // params: numbers per head

  MC_HD int norm_heads() const { return norm == Norm::head ? heads : 1; }
  MC_HD bool gaussian() const { return is_gaussian(first_stored().format); }
  MC_HD bool has_norms() const { return merge == Merge::slerp || gaussian(); }
  MC_HD bool has_residual() const { return residual != Format::drop; }
  MC_HD int residual_bytes() const { return dim * bits_of(residual) / 8; }
  MC_HD int exact_bytes() const { return dim * bits_of(retained_format) / 8; }  // 0 for model
  MC_HD int exact_params() const {
    return retained * (is_integer(retained_format) ? 2 : retained_format == Format::fp8 ? 1 : 0);
  }
  // Whether reading takes the map P_i; without it y is the vector itself (up to norm and residual).
  MC_HD bool has_map() const {
    bool result = merge == Merge::linear || align || stored != rank;
    for (int i = 0; i < segments; ++i) result = result || segment[i].hadamard;
    return result;
  }
  MC_HD const Segment& first_stored() const {
    int i = 0;
    while (segment[i].format == Format::drop) ++i;
    return segment[i];
  }
};

// Pools of one stream, [Nc, ...] each, block-major then head-major; null where the stream has none.
//
//   latent          T     [H, B, latent]            segments in model format, side by side
//   codes           int8  [H, B, code_bytes]        low bits first, byte - 128
//   params          half  [H, params]               per segment with ranges: scales, then minima
//   norms           half  [m, Hn, B] (slerp) or [1, H, B] (gaussian)
//   residual        int8  [m, H, B, residual_bytes]
//   residual_params half  [m, H, 2 B]               scales, then minima, one per token
//   exact           T     [m, H, R, D], or int8 [m, H, R, exact_bytes]
//   exact_params    half  [m, H, exact_params]      scales, then minima, one per slot
//   retained_index  int8  [Hn, R]                   offsets in the block, ascending; unused ones, -1, last
struct StreamPools {
  void* latent;
  std::int8_t* codes;
  Half* params;
  Half* norms;
  std::int8_t* residual;
  Half* residual_params;
  void* exact;
  Half* exact_params;
  std::int8_t* retained_index;
};

// First entry of one block's (and layer's, and head's) part of each pool. `head` is a slot of the stream.
struct StreamBlock {
  const StreamShape& shape;
  const StreamPools& pools;
  std::int64_t block;

  template <class T>
  MC_HD T* latent(int head) const {
    return static_cast<T*>(pools.latent) + (block * shape.heads + head) * kBlockSize * shape.latent;
  }
  MC_HD std::int8_t* codes(int head) const {
    return pools.codes + (block * shape.heads + head) * kBlockSize * shape.code_bytes;
  }
  MC_HD Half* params(int head) const { return pools.params + (block * shape.heads + head) * shape.params; }
  // Of B tokens. Slerp streams have one row per layer, gaussian ones a single row for all.
  MC_HD Half* norms(int member, int head) const {
    const bool slerp = shape.merge == Merge::slerp;
    const int rows = slerp ? shape.members * shape.norm_heads() : shape.heads;
    const int row = slerp ? member * shape.norm_heads() + (shape.norm == Norm::head ? head : 0) : head;
    return pools.norms + (block * rows + row) * kBlockSize;
  }
  MC_HD std::int8_t* residual(int member, int head) const {
    return pools.residual + of_layer(member, head) * kBlockSize * shape.residual_bytes();
  }
  MC_HD Half* residual_params(int member, int head) const {
    return pools.residual_params + of_layer(member, head) * 2 * kBlockSize;
  }
  template <class T>
  MC_HD T* exact(int member, int head) const {
    return static_cast<T*>(pools.exact) + of_layer(member, head) * shape.retained * shape.dim;
  }
  MC_HD std::int8_t* exact_codes(int member, int head) const {
    return static_cast<std::int8_t*>(pools.exact) + of_layer(member, head) * shape.retained * shape.exact_bytes();
  }
  MC_HD Half* exact_params(int member, int head) const {
    return pools.exact_params + of_layer(member, head) * shape.exact_params();
  }
  MC_HD std::int8_t* retained_index(int head) const {
    const int row = shape.norm == Norm::head ? head : 0;
    return pools.retained_index + (block * shape.norm_heads() + row) * shape.retained;
  }

 private:
  MC_HD std::int64_t of_layer(int member, int head) const {
    return (block * shape.members + member) * shape.heads + head;
  }
};

// Linear maps of one layer's reading, as minicache_trt/functions/stream_maps.py makes them; null where identity.
//   x_i = nu (y P^T + residual A^T) + c
struct ReadMaps {
  const float* map;           // P_i [map_heads, D, stored]; map_heads is H, or 1: the same for every slot
  const float* residual_map;  // A_i [H, D, D]
  const float* offset;        // c_i [H, D]
  const std::int64_t* heads;  // KV head of each slot [H]
  const std::int64_t* slots;  // slot of each KV head [H]
  std::int32_t map_heads;
};

// Linear maps of a stream's writing; null where identity.
struct WriteMaps {
  const float* transform;     // T [rank, stored], merges that are not linear
  const float* align;         // [m, H, D, D]
  const float* encode;        // W_i [m, H, D, stored], linear: y = sum_i x_i W_i - b
  const float* bias;          // b [H, stored]
  const std::int64_t* heads;  // KV head of slot h of layer i [m, H]
  const float* map[kMaxGroup];     // P_i [H, D, stored] and
  const float* offset[kMaxGroup];  // c_i [H, D] of linear streams that retain tokens: what each token loses
};

// Full tier of one layer: [Nf, 2, H, B, D], keys (after RoPE) at 0, values at 1.
template <class T>
struct FullTier {
  T* kv;
  std::int32_t heads, dim;

  // B rows of D numbers.
  MC_HD T* block(std::int64_t block, Part part, int head) const {
    return kv + ((block * 2 + static_cast<int>(part)) * heads + head) * kBlockSize * dim;
  }
};

// A step's int32 tensors, as minicache_trt/contract.py names them. Sequence s holds positions [0, c) in the compressed
// tier and [c, n) in the full tier, c = compressed_len[s] (a multiple of kBlockSize), n = context_len[s] after the step.
struct Step {
  const std::int32_t* query_start;       // [sequences + 1]
  const std::int32_t* context_len;       // [sequences]
  const std::int32_t* compressed_len;    // [sequences]; null without a compressed tier
  const std::int32_t* slot_mapping;      // [tokens]
  const std::int32_t* full_table;        // [sequences, full_columns]
  const std::int32_t* compressed_table;  // [sequences, compressed_columns]
  std::int32_t tokens, sequences, decodes;  // one-token sequences come first, `decodes` of them
  std::int32_t full_columns, compressed_columns;
  std::int32_t longest_chunk;               // queries of the longest prefill chunk (an upper bound), 0 without any

  MC_HD int compressed(int sequence) const { return compressed_len == nullptr ? 0 : compressed_len[sequence]; }
};

// Query heads and KV heads, scale and soft cap of logits, rotary frequencies.
struct AttentionShape {
  std::int32_t query_heads, heads, dim;
  float scale;                       // 1 / sqrt(D), or a number of the model's own
  float softcap;                     // logits x become softcap * tanh(x / softcap); 0: they stay as they are
  const float* inverse_frequencies;  // [D / 2], of keys in the pre_rope basis; component i is paired with i + D / 2
};

}  // namespace minicache
