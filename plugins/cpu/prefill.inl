// Attention of prefill chunks: tiles of queries against blocks of keys, with running sums.
//
// Queries lie side by side in vectors (columns), so that no maximum or sum runs across a vector, and keys and values are
// read as they lie.

constexpr int kTile = kBlockSize;  // query rows of a tile; keys come in blocks of as many

// Running softmax of some queries over the keys seen so far: `peak` and `total` per query, `values` [queries, D].
struct Running {
  float* peak;
  float* total;
  float* values;
};

// One tile of queries against up to one block of keys. `q` [D, kTile], `keys`, `values` [B, D] with `used` rows.
// A key at position p is seen by row i if after[i] < p <= upto[i]. `softcap` 0: none.
MC_SIMD void attend(int dim, float softcap, const float* q, const float* keys, const float* values, int used, int position,
                    bool masked, const std::int32_t* upto, const std::int32_t* after, float* logits, Running state) {
  product(used, kTile, dim, keys, dim, 1, q, kTile, logits, kTile, nullptr);
  if (softcap > 0.0f) {
    for (int i = 0; i < used * kTile; i += kLanes) store(logits + i, soft_cap(load(logits + i), softcap));
  }
  if (masked) {
    for (int t = 0; t < used; ++t) {
      for (int i = 0; i < kTile; ++i) {
        const bool seen = position + t <= upto[i] && position + t > after[i];
        logits[t * kTile + i] = seen ? logits[t * kTile + i] : kLowest;
      }
    }
  }
  float shrink[kTile];
  for (int i = 0; i < kTile; i += kLanes) {
    const Floats before = load(state.peak + i);
    Floats peak = before;
    for (int t = 0; t < used; ++t) peak = larger(peak, load(logits + t * kTile + i));
    Floats added{};
    for (int t = 0; t < used; ++t) {
      const Floats weight = exp2_vector(load(logits + t * kTile + i) - peak);
      store(logits + t * kTile + i, weight);
      added += weight;
    }
    const Floats factor = exp2_vector(before - peak);
    store(shrink + i, factor);
    store(state.peak + i, peak);
    store(state.total + i, load(state.total + i) * factor + added);
  }
  product(kTile, dim, used, logits, 1, kTile, values, dim, state.values, dim, shrink);
}

// A key whose row sees nothing yet keeps weight exp2(kLowest - kLowest) = 1: rows get their own position's key last, so
// that the first seen key wipes what was added before (its factor underflows to 0).
MC_ENTRY void prefill_part(const AttentionArguments& a, const Reader& key, const Reader& value, const PrefillPart& part,
                           const float* turns, float* scratch) {
  const int dim = a.shape.dim, group = a.shape.query_heads / a.shape.heads, s = part.sequence;
  const int start = a.step.query_start[s], length = a.step.context_len[s], compressed = a.step.compressed(s);
  const int queries = a.step.query_start[s + 1] - start, before = length - queries;
  const int tiles = ceil_div(part.count, kTile);
  const float scale = a.shape.scale * kLog2e;
  const float* source = static_cast<const float*>(a.q) + start * a.q_stride + part.head * group * dim;
  float* const all_q = scratch;                                    // [tiles, D, kTile]
  float* const peaks = all_q + static_cast<std::int64_t>(tiles) * dim * kTile;   // [tiles, kTile]
  float* const totals = peaks + tiles * kTile;
  float* const sums = totals + tiles * kTile;                      // [tiles, kTile, D]
  float* const logits = sums + static_cast<std::int64_t>(tiles) * kTile * dim;   // [B, kTile]
  float* const keys = logits + kBlockSize * kTile;
  float* const values = keys + kBlockSize * dim;
  float* const latent = values + kBlockSize * dim;
  std::int32_t upto[kTile], after[kTile];

  for (int tile = 0; tile < tiles; ++tile) {
    float* q = all_q + static_cast<std::int64_t>(tile) * dim * kTile;
    for (int i = 0; i < kTile; ++i) {
      const int row = part.first + minimum(tile * kTile + i, part.count - 1);
      const float* from = source + row / group * a.q_stride + row % group * dim;
      for (int d = 0; d < dim; ++d) q[d * kTile + i] = from[d] * scale;
      peaks[tile * kTile + i] = kLowest;
      totals[tile * kTile + i] = 0.0f;
    }
  }
  for (std::int64_t i = 0; i < static_cast<std::int64_t>(tiles) * kTile * dim; ++i) sums[i] = 0.0f;

  const auto limits = [&](int tile) {
    for (int i = 0; i < kTile; ++i) {
      upto[i] = before + (part.first + minimum(tile * kTile + i, part.count - 1)) / group;
      after[i] = a.sliding_window > 0 ? upto[i] - a.sliding_window : -1;
    }
  };
  const auto run = [&](int tile, const float* k, const float* v, int used, int position) {
    const Running state{peaks + tile * kTile, totals + tile * kTile, sums + static_cast<std::int64_t>(tile) * kTile * dim};
    const bool masked = position + used - 1 > upto[0] || position <= after[kTile - 1];
    attend(dim, a.shape.softcap * kLog2e, all_q + static_cast<std::int64_t>(tile) * dim * kTile, k, v, used, position, masked, upto, after, logits,
           state);
  };

  // Compressed history: one block restored, then seen by every tile.
  const std::int32_t* table = a.step.compressed_table + static_cast<std::int64_t>(s) * a.step.compressed_columns;
  for (int block = 0; block * kBlockSize < compressed; ++block) {
    limits(0);
    if ((block + 1) * kBlockSize - 1 <= after[0]) continue;
    const int key_slot = a.key.maps.slots == nullptr ? part.head : static_cast<int>(a.key.maps.slots[part.head]);
    const int value_slot = a.value.maps.slots == nullptr ? part.head : static_cast<int>(a.value.maps.slots[part.head]);
    const float* turn = turns + static_cast<std::int64_t>(block) * kBlockSize * dim;
    restore_tile(a.key, key, table[block], key_slot, turn, keys, latent);
    restore_tile(a.value, value, table[block], value_slot, nullptr, values, latent);
    for (int tile = 0; tile < tiles; ++tile) {
      limits(tile);
      if ((block + 1) * kBlockSize - 1 <= after[0]) continue;
      run(tile, keys, values, kBlockSize, block * kBlockSize);
    }
  }
  const FullTier<float> tier{static_cast<float*>(a.kv), a.shape.heads, dim};
  const std::int32_t* full = a.step.full_table + static_cast<std::int64_t>(s) * a.step.full_columns;
  for (int tile = 0; tile < tiles; ++tile) {
    limits(tile);
    for (int block = 0; compressed + block * kBlockSize <= upto[kTile - 1]; ++block) {
      const int position = compressed + block * kBlockSize;
      if (position + kBlockSize - 1 <= after[0]) continue;
      const int used = minimum(kBlockSize, upto[kTile - 1] + 1 - position);
      run(tile, tier.block(full[block], Part::key, part.head), tier.block(full[block], Part::value, part.head), used,
          position);
    }
    float* target = static_cast<float*>(a.out) + start * a.out_stride + part.head * group * dim;
    for (int i = 0; i < kTile && tile * kTile + i < part.count; ++i) {
      const int row = part.first + tile * kTile + i;
      float* to = target + row / group * a.out_stride + row % group * dim;
      const float inverse = 1.0f / totals[tile * kTile + i];
      const float* from = sums + (static_cast<std::int64_t>(tile) * kTile + i) * dim;
      for (int d = 0; d < dim; ++d) to[d] = from[d] * inverse;
    }
  }
}
