// Vectors of floats and what attention computes with them. Included once per instruction set, inside a namespace of its
// own, with MC_LANES floats to a vector; see kernels.cpp.

typedef float Floats __attribute__((vector_size(4 * MC_LANES), aligned(4), may_alias));
typedef std::int32_t Ints __attribute__((vector_size(4 * MC_LANES)));
typedef std::uint8_t Bytes __attribute__((vector_size(MC_LANES), aligned(1), may_alias));

constexpr int kLanes = MC_LANES;
constexpr int kColumns = MC_COLUMNS;  // vectors of a product's tile in registers
constexpr int kRows = 4;              // rows of it
constexpr int kLine = 16;             // floats of a cache line
constexpr int kAheadRows = 16;        // rows by which streams through memory are prefetched

MC_SIMD Floats load(const float* x) { return *reinterpret_cast<const Floats*>(x); }
MC_SIMD void store(float* x, Floats value) { *reinterpret_cast<Floats*>(x) = value; }
MC_SIMD void store_some(float* x, Floats value, int count) {
  if (count == kLanes) {
    store(x, value);
  } else {
    for (int i = 0; i < count; ++i) x[i] = value[i];
  }
}
MC_SIMD Floats splat(float x) { return x - Floats{}; }
MC_SIMD Ints to_integers(Bytes x) { return __builtin_convertvector(x, Ints); }
MC_SIMD Floats to_floats(Ints x) { return __builtin_convertvector(x, Floats); }
MC_SIMD Floats larger(Floats a, Floats b) { return a > b ? a : b; }

typedef float Four __attribute__((vector_size(16)));

// Sums of every fourth lane.
MC_SIMD Four fold(Floats x) {
#if MC_LANES == 16
  const auto eight = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
                     __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
#else
  const Floats eight = x;
#endif
#if MC_LANES >= 8
  return __builtin_shufflevector(eight, eight, 0, 1, 2, 3) + __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
#else
  return eight;
#endif
}

MC_SIMD float sum(Floats x) {
  const Four four = fold(x);
  const Four two = four + __builtin_shufflevector(four, four, 2, 3, 0, 1);
  return two[0] + two[1];
}

// Four sums, each in the order of `sum`.
MC_SIMD void store_sums(float* y, Floats a, Floats b, Floats c, Floats d) {
  const Four e = fold(a), f = fold(b), g = fold(c), h = fold(d);
  const Four ef = __builtin_shufflevector(e, f, 0, 4, 1, 5) + __builtin_shufflevector(e, f, 2, 6, 3, 7);
  const Four gh = __builtin_shufflevector(g, h, 0, 4, 1, 5) + __builtin_shufflevector(g, h, 2, 6, 3, 7);
  const Four all = __builtin_shufflevector(ef, gh, 0, 1, 4, 5) + __builtin_shufflevector(ef, gh, 2, 3, 6, 7);
  __builtin_memcpy(y, &all, sizeof(all));
}

// 2^x for x <= 0; 0 below -126. Relative error 2e-7.
MC_SIMD Floats exp2_vector(Floats x) {
  const Floats lowest = splat(-126.0f), shift = splat(0x1.8p23f);
  const Ints underflow = x < lowest;
  x = underflow ? lowest : x;
  const Floats shifted = x + shift;           // its low bits are the nearest integer
  const Floats f = x - (shifted - shift);     // in [-1/2, 1/2]
  Floats p = splat(1.5403530393381609954e-4f);
  p = p * f + splat(1.3333558146428443423e-3f);
  p = p * f + splat(9.6181291076284771619e-3f);
  p = p * f + splat(5.5504108664821579953e-2f);
  p = p * f + splat(2.4022650695910071233e-1f);
  p = p * f + splat(6.9314718055994530942e-1f);
  p = p * f + splat(1.0f);
  Ints bits;
  __builtin_memcpy(&bits, &shifted, sizeof(bits));
  Ints result;
  __builtin_memcpy(&result, &p, sizeof(result));
  result += bits << 23;
  Floats scaled;
  __builtin_memcpy(&scaled, &result, sizeof(scaled));
  return underflow ? Floats{} : scaled;
}

// cap * tanh(x / cap), within 1e-6 cap.
MC_SIMD Floats soft_cap(Floats x, float cap) {
  const Ints negative = x < Floats{};
  const Floats power = exp2_vector((negative ? x : -x) * splat(2.0f * 1.44269504088896340736f / cap));
  const Floats y = splat(cap) * (splat(1.0f) - power) / (splat(1.0f) + power);
  return negative ? -y : y;
}

MC_SIMD float exp2_scalar(float x) {
  return exp2_vector(splat(x))[0];
}

// C [rows, Vectors * kLanes] = C * factor[row] + A B, sums in registers; element (m, k) of A is a[m * am + k * ak].
// `factor` null: C is overwritten.
template <int Rows, int Vectors>
MC_SIMD void product_tile(int depth, const float* a, std::int64_t am, std::int64_t ak, const float* b, std::int64_t bk,
                          float* c, std::int64_t cm, const float* factor) {
  Floats sums[Rows][Vectors];
#pragma GCC unroll 8
  for (int m = 0; m < Rows; ++m) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
      sums[m][v] = factor == nullptr ? Floats{} : load(c + m * cm + v * kLanes) * splat(factor[m]);
    }
  }
  for (int k = 0; k < depth; ++k) {
    Floats right[Vectors];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) right[v] = load(b + k * bk + v * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < Rows; ++m) {
      const Floats left = splat(a[m * am + k * ak]);
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) sums[m][v] += left * right[v];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < Rows; ++m) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) store(c + m * cm + v * kLanes, sums[m][v]);
  }
}

template <int Vectors>
MC_SIMD void product_columns(int rows, int depth, const float* a, std::int64_t am, std::int64_t ak, const float* b,
                             std::int64_t bk, float* c, std::int64_t cm, const float* factor) {
  int m = 0;
  for (; m + kRows <= rows; m += kRows) {
    product_tile<kRows, Vectors>(depth, a + m * am, am, ak, b, bk, c + m * cm, cm, factor ? factor + m : nullptr);
  }
  for (; m < rows; ++m) {
    product_tile<1, Vectors>(depth, a + m * am, am, ak, b, bk, c + m * cm, cm, factor ? factor + m : nullptr);
  }
}

// C [rows, columns] = C * factor[row] + A B; columns a multiple of kLanes.
MC_ENTRY void product(int rows, int columns, int depth, const float* a, std::int64_t am, std::int64_t ak, const float* b,
                     std::int64_t bk, float* c, std::int64_t cm, const float* factor) {
  int n = 0;
  for (; n + kColumns * kLanes <= columns; n += kColumns * kLanes) {
    product_columns<kColumns>(rows, depth, a, am, ak, b + n, bk, c + n, cm, factor);
  }
  for (; n < columns; n += kLanes) product_columns<1>(rows, depth, a, am, ak, b + n, bk, c + n, cm, factor);
}

// Brings row `t` + kAheadRows of `rows` into the cache, or, where they end, rows of `next`; `width` floats to a row.
MC_SIMD void prefetch_row(const float* rows, int t, int used, int width, const float* next) {
  const int row = t + kAheadRows;
  const float* from = row < used ? rows + static_cast<std::int64_t>(row) * width
                                 : next + static_cast<std::int64_t>(row - used) * width;
  for (int i = 0; i < width; i += kLine) __builtin_prefetch(from + i);
}

// values [Queries, Vectors * kLanes] = values * factor[query] + weights [Queries, B] rows, rows streamed from memory.
template <int Queries, int Vectors>
MC_SIMD void stream_columns(int used, const float* weights, const float* rows, int width, const float* next,
                            float* values, std::int64_t stride, const float* factor) {
  Floats sums[Queries][Vectors];
#pragma GCC unroll 8
  for (int g = 0; g < Queries; ++g) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) sums[g][v] = load(values + g * stride + v * kLanes) * splat(factor[g]);
  }
  for (int t = 0; t < used; ++t) {
    if (next != nullptr) prefetch_row(rows, t, used, width, next);
    const float* row = rows + static_cast<std::int64_t>(t) * width;
    Floats right[Vectors];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) right[v] = load(row + v * kLanes);
#pragma GCC unroll 8
    for (int g = 0; g < Queries; ++g) {
      const Floats weight = splat(weights[g * kBlockSize + t]);
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) sums[g][v] += weight * right[v];
    }
  }
#pragma GCC unroll 8
  for (int g = 0; g < Queries; ++g) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) store(values + g * stride + v * kLanes, sums[g][v]);
  }
}

template <int Queries>
MC_SIMD void stream_queries(int used, const float* weights, const float* rows, int width, const float* next,
                            float* values, std::int64_t stride, const float* factor) {
  constexpr int kVectors = Queries == 1 ? 8 : 4;  // as many sums at a time as it takes to hide an addition's latency
  int n = 0;
  for (; n + kVectors * kLanes <= width; n += kVectors * kLanes) {
    const float* ahead = n == 0 ? next : nullptr;
    stream_columns<Queries, kVectors>(used, weights, rows + n, width, ahead, values + n, stride, factor);
  }
  for (; n + 2 * kLanes <= width; n += 2 * kLanes) {
    const float* ahead = n == 0 ? next : nullptr;
    stream_columns<Queries, 2>(used, weights, rows + n, width, ahead, values + n, stride, factor);
  }
  if (n < width) stream_columns<Queries, 1>(used, weights, rows + n, width, nullptr, values + n, stride, factor);
}

// values [queries, width] = values * factor[query] + weights [queries, B] rows, for fewer queries than kRows. `next`:
// what is read after the rows, or null when these are in the cache.
MC_ENTRY void stream_product(int queries, int used, const float* weights, const float* rows, int width,
                             const float* next, float* values, std::int64_t stride, const float* factor) {
  int g = 0;
  for (; g + 2 <= queries; g += 2) {
    stream_queries<2>(used, weights + g * kBlockSize, rows, width, g == 0 ? next : nullptr, values + g * stride, stride,
                      factor + g);
  }
  if (g < queries) {
    stream_queries<1>(used, weights + g * kBlockSize, rows, width, g == 0 ? next : nullptr, values + g * stride, stride,
                      factor + g);
  }
}

// Inner product; `length` a multiple of kLanes.
MC_SIMD float dot(const float* a, const float* b, int length) {
  Floats first{}, second{};
  int i = 0;
  for (; i + 2 * kLanes <= length; i += 2 * kLanes) {
    first += load(a + i) * load(b + i);
    second += load(a + i + kLanes) * load(b + i + kLanes);
  }
  if (i < length) first += load(a + i) * load(b + i);
  return sum(first + second);
}

// Inner products of queries [Queries, width] with keys [Keys, width]; out [Queries, B]. `width` a multiple of kLanes.
template <int Queries, int Keys>
MC_SIMD void dots(int width, const float* q, const float* keys, float* out) {
  Floats sums[Queries][Keys] = {};
  for (int i = 0; i < width; i += kLanes) {
    Floats right[Queries];
#pragma GCC unroll 8
    for (int g = 0; g < Queries; ++g) right[g] = load(q + g * width + i);
#pragma GCC unroll 8
    for (int t = 0; t < Keys; ++t) {
      const Floats left = load(keys + static_cast<std::int64_t>(t) * width + i);
#pragma GCC unroll 8
      for (int g = 0; g < Queries; ++g) sums[g][t] += left * right[g];
    }
  }
#pragma GCC unroll 8
  for (int g = 0; g < Queries; ++g) {
    if constexpr (Keys == 4) {
      store_sums(out + g * kBlockSize, sums[g][0], sums[g][1], sums[g][2], sums[g][3]);
    } else {
#pragma GCC unroll 8
      for (int t = 0; t < Keys; ++t) out[g * kBlockSize + t] = sum(sums[g][t]);
    }
  }
}

// y += factor * x; `length` a multiple of kLanes.
MC_SIMD void add_scaled(float* y, const float* x, float factor, int length) {
  const Floats f = splat(factor);
  for (int i = 0; i < length; i += kLanes) store(y + i, load(y + i) + f * load(x + i));
}
