// Attention of decodes, part by part: partial results of a part depend on nothing else in the batch.
//
// Logits are in units of log 2, so that weights are powers of two.

constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kLowest = -3.0e38f;

// Logits [G, B] of one block's keys, `keys` [B, width]: q [G, width], scaled. `next`: what is read after the keys.
MC_SIMD void block_logits(int group, int used, int width, const float* q, const float* keys, const float* next,
                          float* logits) {
  constexpr int kKeys = 4;
  int t = 0;
  for (; t + kKeys <= used; t += kKeys) {
    const float* key = keys + static_cast<std::int64_t>(t) * width;
    for (int i = 0; next != nullptr && i < kKeys; ++i) prefetch_row(keys, t + i, used, width, next);
    int g = 0;
    for (; g + 2 <= group; g += 2) dots<2, kKeys>(width, q + g * width, key, logits + g * kBlockSize + t);
    if (g < group) dots<1, kKeys>(width, q + g * width, key, logits + g * kBlockSize + t);
  }
  for (; t < used; ++t) {
    const float* key = keys + static_cast<std::int64_t>(t) * width;
    if (next != nullptr) prefetch_row(keys, t, used, width, next);
    for (int g = 0; g < group; ++g) dots<1, 1>(width, q + g * width, key, logits + g * kBlockSize + t);
  }
}

// Soft-caps logits [G, used] in rows of B, if the model does.
MC_SIMD void cap_logits(const AttentionArguments& a, int group, int used, float* logits) {
  if (!(a.shape.softcap > 0.0f)) return;
  for (int g = 0; g < group; ++g) {
    float* row = logits + g * kBlockSize;
    for (int t = 0; t < used; t += kLanes) store(row + t, soft_cap(load(row + t), a.shape.softcap * kLog2e));
  }
}

// Turns logits [0, used) of one query into weights relative to the running maximum; returns what earlier sums shrink by.
MC_SIMD float weigh(float* logits, int used, float& peak, float& total) {
  float highest = peak;
  for (int t = 0; t < used; ++t) highest = logits[t] > highest ? logits[t] : highest;
  const Floats shift = splat(highest);
  Floats added{};
  for (int t = used; t < kBlockSize; ++t) logits[t] = kLowest;
  for (int t = 0; t < kBlockSize; t += kLanes) {
    const Floats weight = exp2_vector(load(logits + t) - shift);
    store(logits + t, weight);
    added += weight;
  }
  const float shrink = exp2_scalar(peak - highest);
  total = total * shrink + sum(added);
  peak = highest;
  return shrink;
}

struct Workspace {
  float *query, *tile, *other, *logits, *latent, *factors;
};

MC_SIMD void decode_full(const AttentionArguments& a, const DecodePart& part, const float* q, Workspace w, float* out) {
  const FullTier<float> tier{static_cast<float*>(a.kv), a.shape.heads, a.shape.dim};
  const int dim = a.shape.dim, group = a.shape.query_heads / a.shape.heads;
  const std::int32_t* table = a.step.full_table + static_cast<std::int64_t>(part.sequence) * a.step.full_columns;
  for (int block = part.first / kBlockSize; block * kBlockSize < part.last; ++block) {
    const int from = maximum(0, part.first - block * kBlockSize);
    const int used = minimum(kBlockSize, part.last - block * kBlockSize) - from;
    const float* keys = tier.block(table[block], Part::key, part.head) + from * dim;
    const float* values = tier.block(table[block], Part::value, part.head) + from * dim;
    const bool last = (block + 1) * kBlockSize >= part.last;
    const float* next = last ? values : tier.block(table[block + 1], Part::key, part.head);
    block_logits(group, used, dim, q, keys, values, w.logits);
    cap_logits(a, group, used, w.logits);
    for (int g = 0; g < group; ++g) {
      float* partial = out + g * (2 + dim);
      w.factors[g] = weigh(w.logits + g * kBlockSize, used, partial[0], partial[1]);
    }
    if (group < kRows) {
      stream_product(group, used, w.logits, values, dim, next, out + 2, 2 + dim, w.factors);
    } else {
      product(group, dim, used, w.logits, kBlockSize, 1, values, dim, out + 2, 2 + dim, w.factors);
    }
  }
}

MC_SIMD void decode_compressed(const AttentionArguments& a, const Reader& key, const Reader& value,
                               const DecodePart& part, const float* q, const float* turns, Workspace w, float* out) {
  const int dim = a.shape.dim, group = a.shape.query_heads / a.shape.heads;
  const StreamShape &ks = *a.key.shape, &vs = *a.value.shape;
  const int key_slot = a.key.maps.slots == nullptr ? part.head : static_cast<int>(a.key.maps.slots[part.head]);
  const int value_slot = a.value.maps.slots == nullptr ? part.head : static_cast<int>(a.value.maps.slots[part.head]);
  const bool rebuild = ks.basis == Basis::pre_rope;
  const int key_width = key.latent.width, width = value.latent.width;
  const std::int32_t* table =
      a.step.compressed_table + static_cast<std::int64_t>(part.sequence) * a.step.compressed_columns;
  float constant[kMaxGroupSize], spread[kMaxGroupSize];
  for (int g = 0; g < group; ++g) {
    constant[g] = spread[g] = 0.0f;
    if (rebuild) continue;
    latent_query(key, key_slot, dim, q + g * dim, w.query + g * key_width);
    if (a.key.maps.offset != nullptr) constant[g] = dot(q + g * dim, a.key.maps.offset + key_slot * dim, dim);
  }
  for (int i = 0; i < group * width; ++i) w.latent[i] = 0.0f;
  float exact[kMaxHeadDim], nu[kBlockSize];
  for (int number = part.first / kBlockSize; number * kBlockSize < part.last; ++number) {
    const std::int64_t id = table[number];
    const int hidden = maximum(0, part.first - number * kBlockSize);  // tokens in front of a sliding window
    const StreamBlock key_block{ks, a.key.pools, id}, value_block{vs, a.value.pools, id};
    if (rebuild) {
      const float* turn = turns + static_cast<std::int64_t>(number) * kBlockSize * dim;
      restore_tile(a.key, key, id, key_slot, turn, w.other, w.tile);
      block_logits(group, kBlockSize, dim, q, w.other, nullptr, w.logits);
    } else {
      latent_tile(ks, key.latent, key_block, key_slot, w.tile);
      norms_of(ks, key_block, key_slot, nu);
      block_logits(group, kBlockSize, key_width, w.query, w.tile, nullptr, w.logits);
      for (int g = 0; g < group; ++g) {
        float* row = w.logits + g * kBlockSize;
        for (int t = 0; t < kBlockSize; ++t) row[t] = row[t] * nu[t] + constant[g];
      }
      if (ks.retained != 0) {
        const std::int8_t* index = key_block.retained_index(key_slot);
        for (int r = 0; r < ks.retained && index[r] >= 0; ++r) {
          exact_vector(ks, key_block, key_slot, r, exact);
          for (int g = 0; g < group; ++g) w.logits[g * kBlockSize + index[r]] = dot(q + g * dim, exact, dim);
        }
      }
    }
    cap_logits(a, group, kBlockSize, w.logits);
    latent_tile(vs, value.latent, value_block, value_slot, w.tile);
    norms_of(vs, value_block, value_slot, nu);
    for (int g = 0; g < group; ++g) {
      float *partial = out + g * (2 + dim), *row = w.logits + g * kBlockSize;
      for (int t = 0; t < hidden; ++t) row[t] = kLowest;
      const float shrink = weigh(row, kBlockSize, partial[0], partial[1]);
      w.factors[g] = shrink;
      spread[g] *= shrink;
      for (int d = 0; d < dim; ++d) partial[2 + d] *= shrink;
    }
    if (vs.retained != 0) {
      const std::int8_t* index = value_block.retained_index(value_slot);
      for (int r = 0; r < vs.retained && index[r] >= 0; ++r) {
        exact_vector(vs, value_block, value_slot, r, exact);
        for (int g = 0; g < group; ++g) {
          float& weight = w.logits[g * kBlockSize + index[r]];
          add_scaled(out + g * (2 + dim) + 2, exact, weight, dim);
          weight = 0.0f;
        }
      }
    }
    for (int g = 0; g < group; ++g) {
      float* row = w.logits + g * kBlockSize;
      for (int t = 0; t < kBlockSize; ++t) {
        spread[g] += row[t];
        row[t] *= nu[t];
      }
    }
    if (group < kRows) {
      stream_product(group, kBlockSize, w.logits, w.tile, width, nullptr, w.latent, width, w.factors);
    } else {
      product(group, width, kBlockSize, w.logits, kBlockSize, 1, w.tile, width, w.latent, width, w.factors);
    }
  }
  for (int g = 0; g < group; ++g) {
    float* values = out + g * (2 + dim) + 2;
    latent_value(value, value_slot, dim, w.latent + g * width, exact);
    add_scaled(values, exact, 1.0f, dim);
    if (a.value.maps.offset != nullptr) add_scaled(values, a.value.maps.offset + value_slot * dim, spread[g], dim);
  }
}

MC_ENTRY void decode_part(const AttentionArguments& a, const Reader& key, const Reader& value, const DecodePart& part,
                          const float* turns, float* scratch, float* out) {
  const int dim = a.shape.dim, group = a.shape.query_heads / a.shape.heads;
  const float scale = a.shape.scale * kLog2e;
  const float* source = static_cast<const float*>(a.q) + a.step.query_start[part.sequence] * a.q_stride;
  float* q = scratch;
  for (int i = 0; i < group * dim; ++i) q[i] = source[part.head * group * dim + i] * scale;
  for (int g = 0; g < group; ++g) {
    float* partial = out + g * (2 + dim);
    partial[0] = kLowest;
    for (int i = 1; i < 2 + dim; ++i) partial[i] = 0.0f;
  }
  const int wide = maximum(maximum(key.latent.width, value.latent.width), dim);
  Workspace w;
  w.query = q + group * dim;
  w.tile = w.query + group * wide;
  w.other = w.tile + kBlockSize * wide;
  w.logits = w.other + kBlockSize * wide;
  w.latent = w.logits + group * kBlockSize;
  w.factors = w.latent + group * wide;
  if (part.compressed) {
    decode_compressed(a, key, value, part, q, turns, w, out);
  } else {
    decode_full(a, part, q, w, out);
  }
}

// Output [G, D] of a decode and KV head from its `parts` partial results, in order.
MC_ENTRY void combine_parts(int group, int dim, int parts, const float* partials, float* out) {
  for (int g = 0; g < group; ++g) {
    float peak = kLowest, total = 0.0f;
    for (int i = 0; i < parts; ++i) peak = maximum(peak, partials[(i * group + g) * (2 + dim)]);
    float* row = out + g * dim;
    for (int d = 0; d < dim; ++d) row[d] = 0.0f;
    for (int i = 0; i < parts; ++i) {
      const float* partial = partials + (i * group + g) * (2 + dim);
      const float factor = exp2_scalar(partial[0] - peak);
      total += factor * partial[1];
      add_scaled(row, partial + 2, factor, dim);
    }
    const float inverse = 1.0f / total;
    for (int d = 0; d < dim; ++d) row[d] *= inverse;
  }
}
