// One block and head of a stream: latent vectors as floats, and keys or values from them.

// Ranges of one run as floats: `scale[i]`, `minimum[i]` of token i or of column i.
MC_SIMD void ranges_of(const Run& run, const Half* params, float* scale, float* lowest) {
  const int count = run.channel ? run.length : kBlockSize;
  const int bits = bits_of(run.format), planes = run.channel && (bits == 4 || bits == 2) ? 8 / bits : 1;
  const int each = count / planes;
  for (int plane = 0; plane < planes; ++plane) {
    for (int i = 0; i < each; ++i) {
      scale[plane * each + i] = to_float(params[run.scale + i * planes + plane]);
      if (run.format != Format::fp8) lowest[plane * each + i] = to_float(params[run.minimum + i * planes + plane]);
    }
  }
}

MC_SIMD Bytes code_bytes(const std::int8_t* stored) {
  return *reinterpret_cast<const Bytes*>(stored) ^ static_cast<std::uint8_t>(0x80);
}

// Codes of one token as floats, in plane order: out(column, codes, how many of them count). `Bits` 8, 4, 2 or 1.
template <int Bits, class Store>
MC_SIMD void unpack(const std::int8_t* stored, int length, Store out) {
  constexpr int kPlanes = 8 / Bits;
  constexpr std::int32_t kMask = (1 << Bits) - 1;
  const int bytes = length / kPlanes;
  int i = 0;
  for (; i + kLanes <= bytes; i += kLanes) {
    const Ints packed = to_integers(code_bytes(stored + i));
#pragma GCC unroll 8
    for (int plane = 0; plane < kPlanes; ++plane) {
      out(plane * bytes + i, to_floats((packed >> (plane * Bits)) & kMask), kLanes);
    }
  }
  if (i == bytes) return;
  Ints packed{};
  for (int j = 0; j < bytes - i; ++j) packed[j] = stored_to_byte(stored[i + j]);
#pragma GCC unroll 8
  for (int plane = 0; plane < kPlanes; ++plane) {
    out(plane * bytes + i, to_floats((packed >> (plane * Bits)) & kMask), bytes - i);
  }
}

template <int Bits>
MC_SIMD void integers(const Run& run, const std::int8_t* stored, std::int64_t stride, const float* scale,
                      const float* lowest, float* y, std::int64_t width) {
  for (int t = 0; t < kBlockSize; ++t) {
    float* row = y + t * width;
    const std::int8_t* codes = stored + t * stride;
    if (run.channel) {
      unpack<Bits>(codes, run.length, [&](int at, Floats code, int count) MC_INLINE {
        store_some(row + at, load(scale + at) * code + load(lowest + at), count);
      });
    } else {
      const Floats s = splat(scale[t]), m = splat(lowest[t]);
      unpack<Bits>(codes, run.length, [&](int at, Floats code, int count) MC_INLINE { store_some(row + at, s * code + m, count); });
    }
  }
}

// `level[code]` for codes below 16.
MC_SIMD Floats look_up(const float* level, Floats code) {
#if MC_LANES == 16
  const Ints place = __builtin_convertvector(code, Ints);
  return __builtin_shuffle(load(level), place);
#else
  Floats result;
  for (int i = 0; i < kLanes; ++i) result[i] = level[static_cast<int>(code[i])];
  return result;
#endif
}

template <int Bits>
MC_SIMD void levels(const Run& run, const std::int8_t* stored, std::int64_t stride, float* y, std::int64_t width) {
  float level[16];
  for (int code = 0; code < 16; ++code) level[code] = gaussian_level(Bits, code & ((1 << Bits) - 1));
  for (int t = 0; t < kBlockSize; ++t) {
    float* row = y + t * width;
    unpack<Bits>(stored + t * stride, run.length,
                 [&](int at, Floats code, int count) MC_INLINE { store_some(row + at, look_up(level, code), count); });
  }
}

// Latent vectors [B, latent.width] of one block and slot, without their norms.
MC_SIMD void latent_tile(const StreamShape& shape, const Latent& latent, const StreamBlock& block, int slot, float* y) {
  float scale[kMaxRank + kLanes], lowest[kMaxRank + kLanes];
  const std::int64_t width = latent.width;
  for (const Run& run : latent.runs) {
    const int member = shape.member;
    const std::int8_t* stored = nullptr;
    std::int64_t stride = 0;
    if (run.residual) {
      stored = block.residual(member, slot);
      stride = shape.residual_bytes();
    } else if (run.format != Format::model) {
      stored = block.codes(slot) + run.storage;
      stride = shape.code_bytes;
    }
    if (has_ranges(run.format)) {
      ranges_of(run, run.residual ? block.residual_params(member, slot) : block.params(slot), scale, lowest);
    }
    float* out = y + run.column;
    switch (run.format) {
      case Format::model: {
        const float* from = block.latent<float>(slot) + run.storage;
        for (int t = 0; t < kBlockSize; ++t) {
          for (int i = 0; i < run.length; ++i) out[t * width + i] = from[t * shape.latent + i];
        }
        break;
      }
      case Format::fp8:
        for (int t = 0; t < kBlockSize; ++t) {
          for (int i = 0; i < run.length; ++i) {
            out[t * width + i] = scale[run.channel ? i : t] * fp8_to_float(stored_to_byte(stored[t * stride + i]));
          }
        }
        break;
      case Format::int8:
        integers<8>(run, stored, stride, scale, lowest, out, width);
        break;
      case Format::int4:
        integers<4>(run, stored, stride, scale, lowest, out, width);
        break;
      case Format::int2:
        integers<2>(run, stored, stride, scale, lowest, out, width);
        break;
      case Format::g4:
        levels<4>(run, stored, stride, out, width);
        break;
      case Format::g3:
        for (int t = 0; t < kBlockSize; ++t) {
          for (int i = 0; i < run.length; ++i) {
            out[t * width + i] = gaussian_level(3, unpack_code(stored + t * stride, 3, i));
          }
        }
        break;
      case Format::g2:
        levels<2>(run, stored, stride, out, width);
        break;
      case Format::g1:
        levels<1>(run, stored, stride, out, width);
        break;
      case Format::drop:
        break;
    }
  }
}

// Norm of each token, 1 where the stream has none.
MC_SIMD void norms_of(const StreamShape& shape, const StreamBlock& block, int slot, float* nu) {
  if (!shape.has_norms()) {
    for (int t = 0; t < kBlockSize; ++t) nu[t] = 1.0f;
    return;
  }
  const Half* stored = block.norms(shape.member, slot);
  for (int t = 0; t < kBlockSize; ++t) nu[t] = to_float(stored[t]);
}

// Retained vector number `r` of the layer, [D].
MC_SIMD void exact_vector(const StreamShape& shape, const StreamBlock& block, int slot, int r, float* x) {
  const int member = shape.member, dim = shape.dim;
  if (shape.retained_format == Format::model) {
    const float* from = block.exact<float>(member, slot) + r * dim;
    for (int i = 0; i < dim; ++i) x[i] = from[i];
    return;
  }
  const std::int8_t* codes = block.exact_codes(member, slot) + r * shape.exact_bytes();
  const Half* params = block.exact_params(member, slot);
  const float scale = to_float(params[r]);
  if (shape.retained_format == Format::fp8) {
    for (int i = 0; i < dim; ++i) x[i] = scale * fp8_to_float(stored_to_byte(codes[i]));
    return;
  }
  const float lowest = to_float(params[shape.retained + r]);
  const int bits = bits_of(shape.retained_format);
  for (int i = 0; i < dim; ++i) x[i] = scale * unpack_code(codes, bits, i) + lowest;
}

// q [D] as a query for latent vectors, [latent.width].
MC_SIMD void latent_query(const Reader& reader, int slot, int dim, const float* q, float* out) {
  const Latent& latent = reader.latent;
  if (reader.rows.empty()) {
    for (int i = 0; i < latent.width; ++i) out[i] = q[latent.order[i]];
    return;
  }
  const float* rows = reader.slot_rows(slot, dim);
  for (int i = 0; i < latent.width; ++i) out[i] = dot(rows + static_cast<std::int64_t>(i) * dim, q, dim);
}

// A weighted sum of latent vectors, [latent.width], as one of vectors [D], without the offset.
MC_SIMD void latent_value(const Reader& reader, int slot, int dim, const float* weighted, float* out) {
  const Latent& latent = reader.latent;
  if (reader.rows.empty()) {
    for (int i = 0; i < latent.width; ++i) out[latent.order[i]] = weighted[i];
    return;
  }
  product(1, dim, latent.width, weighted, 0, 1, reader.slot_rows(slot, dim), dim, out, dim, nullptr);
}

// Rotate B keys [B, D] by their positions; `turns` [B, 2, D / 2]: cosines and sines.
MC_SIMD void rotate_tile(int dim, const float* turns, float* x) {
  const int half = dim / 2;
  for (int t = 0; t < kBlockSize; ++t) {
    float* row = x + t * dim;
    const float *c = turns + t * dim, *s = c + half;
    for (int i = 0; i < half; ++i) {
      const float a = row[i], b = row[i + half];
      row[i] = a * c[i] - b * s[i];
      row[i + half] = b * c[i] + a * s[i];
    }
  }
}

// Keys (after RoPE) or values [B, D] of one block, retained ones exact. `y`: room for B * latent.width floats; `turns`:
// of the block's positions, of keys in the pre_rope basis.
MC_SIMD void restore_tile(const StreamView& view, const Reader& reader, std::int64_t block_id, int slot,
                          const float* turns, float* x, float* y) {
  const StreamShape& shape = *view.shape;
  const StreamBlock block{shape, view.pools, block_id};
  const Latent& latent = reader.latent;
  const int dim = shape.dim, width = latent.width;
  latent_tile(shape, latent, block, slot, y);
  if (reader.rows.empty()) {
    for (int t = 0; t < kBlockSize; ++t) {
      for (int i = 0; i < width; ++i) x[t * dim + latent.order[i]] = y[static_cast<std::int64_t>(t) * width + i];
    }
  } else {
    product(kBlockSize, dim, width, y, width, 1, reader.slot_rows(slot, dim), dim, x, dim, nullptr);
  }
  if (shape.has_norms()) {
    float nu[kBlockSize];
    norms_of(shape, block, slot, nu);
    for (int t = 0; t < kBlockSize; ++t) {
      for (int d = 0; d < dim; ++d) x[t * dim + d] *= nu[t];
    }
  }
  if (view.maps.offset != nullptr) {
    const float* offset = view.maps.offset + static_cast<std::int64_t>(slot) * dim;
    for (int t = 0; t < kBlockSize; ++t) add_scaled(x + t * dim, offset, 1.0f, dim);
  }
  if (shape.basis == Basis::pre_rope) rotate_tile(dim, turns, x);
  if (shape.retained == 0) return;
  const std::int8_t* index = block.retained_index(slot);
  for (int r = 0; r < shape.retained && index[r] >= 0; ++r) {
    exact_vector(shape, block, slot, r, x + index[r] * dim);
  }
}
