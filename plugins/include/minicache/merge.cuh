// Merges of a group's vectors that are not linear, on one token and head (or token, `norm` token).
//
// Directions, angles, the spherical mean and its refinement all follow from the products x_i . x_j: every mean lies in
// the span of the directions, y = sum_i c_i x_i / |x_i|. So a block reads its vectors once for their products, one
// thread per token works out the coefficients, and the vectors are combined.
#pragma once

#include "minicache/elementary.cuh"
#include "minicache/rotation.cuh"

namespace minicache {

MC_HD int pairs_of(int members) { return members * (members + 1) / 2; }
// Number of the pair (i, j), i <= j.
MC_HD int pair_number(int members, int i, int j) { return i * members - i * (i - 1) / 2 + j - i; }

// Whether the merge, or its retention, depends on angles.
MC_HD bool needs_angles(const StreamShape& shape) {
  return shape.merge == Merge::slerp || (shape.merge == Merge::mean && shape.retained > 0);
}

// One member's vectors of a cache block and slot: as the full tier holds them, to be un-rotated, or as floats that
// another kernel prepared.
template <class T>
struct VectorSource {
  const T* rows;         // [B, D]
  const float* vectors;  // [B, D]; null: take `rows`
  int dim;
  Rotation rotation;

  // As stored.
  MC_HD void load(float (&x)[kChunk], int row, int component) const {
    if (vectors != nullptr) {
      load_chunk(x, vectors + row * dim + component);
    } else {
      load_chunk(x, rows + row * dim + component);
    }
  }
  // Un-rotated, together with the chunk it is paired with.
  MC_HD void load_unrotated(float (&x)[kChunk], int row, int component) const {
    load(x, row, component);
    if (!rotation.turns()) return;
    const int half = dim / 2, first = component < half ? component : component - half;
    const Turn turn = rotation.turn_of(row, first);
    float other[kChunk];
    load(other, row, component < half ? component + half : first);
    component < half ? turn.apply(x, other) : turn.apply(other, x);
  }
};

// A source's vectors, un-rotated, as floats in shared memory [B, pitch]: each row by its own four threads.
template <class T, class Block>
MC_HD void rows_to_shared(Block& block, const VectorSource<T>& source, float* shared, int pitch) {
  block.each([&](Thread thread) {
    const int row = row_of(thread);
    const auto load = [&](float(&x)[kChunk], int component) { source.load(x, row, component); };
    const auto store = [&](const float(&x)[kChunk], int component) { store_chunk(shared + row * pitch + component, x); };
    if (source.rotation.turns()) {
      turn_row(thread, source.rotation, load, store);
      return;
    }
    MC_NO_UNROLL
    for (int component = component_of(thread, 0); component < source.dim; component += kRowThreads * kChunk) {
      float x[kChunk];
      load(x, component);
      store(x, component);
    }
  });
}

// A source's vectors as a tile; `shared` [B, pitch_of(D)] if they are rotated.
template <int Chunks, class Block, class Source>
MC_HD void load_vectors(Block& block, typename Block::template PerThread<Tile<Chunks>>& tile, const Source& source,
                        float* shared) {
  if (source.rotation.turns()) {
    const int pitch = pitch_of(source.dim);
    block.sync_warp();
    rows_to_shared(block, source, shared, pitch);
    block.sync_warp();
    load_tile<Chunks>(block, tile, source.dim, [&](float(&x)[kChunk], int row, int component) {
      load_chunk(x, shared + row * pitch + component);
    });
    return;
  }
  load_tile<Chunks>(block, tile, source.dim,
                    [&](float(&x)[kChunk], int row, int component) { source.load(x, row, component); });
}

// products[row] of two tiles, for every row.
template <int Chunks, class Block>
MC_HD void multiply_rows(Block& block, const typename Block::template PerThread<Tile<Chunks>>& a,
                         const typename Block::template PerThread<Tile<Chunks>>& b, float* products) {
  typename Block::template PerThread<float> sum;
  block.each([&](Thread thread) {
    float partial = 0.0f;
    MC_UNROLL
    for (int j = 0; j < Chunks; ++j) {
      MC_UNROLL
      for (int e = 0; e < kChunk; ++e) partial += a(thread).x[j][e] * b(thread).x[j][e];
    }
    sum(thread) = partial;
  });
  block.template reduce_add<kRowThreads>(sum);
  block.each([&](Thread thread) {
    if (leads_row(thread)) products[row_of(thread)] = sum(thread);
  });
}

// x_i . x_j of all pairs, [pairs, B]; `source(i)`: member i, `shared` as `load_vectors` takes it.
// Two members stay in `first` and `second`.
template <int Chunks, class Block, class Sources>
MC_HD void measure_products(Block& block, int members, Sources source,
                            typename Block::template PerThread<Tile<Chunks>>& first,
                            typename Block::template PerThread<Tile<Chunks>>& second, float* shared,
                            float* products) {
  MC_NO_UNROLL
  for (int i = 0; i + 1 < members; ++i) {
    load_vectors<Chunks>(block, first, source(i), shared);
    MC_NO_UNROLL
    for (int j = i + 1; j < members; ++j) {
      load_vectors<Chunks>(block, second, source(j), shared);
      if (j == 1) multiply_rows<Chunks>(block, first, first, products);
      if (i == 0) multiply_rows<Chunks>(block, second, second, products + pair_number(members, j, j) * kBlockSize);
      multiply_rows<Chunks>(block, first, second, products + pair_number(members, i, j) * kBlockSize);
    }
  }
}

// Shared memory of a merge, per token: [.., B] each.
struct MergeScratch {
  float* products;  // [pairs]; cosines once `solve_angles` has run
  float* weight;    // [m]: y = sum_i weight_i x_i
  float* inverse;   // [m]: 1 / |x_i|, 0 for a vector without direction
  float* step;      // [m]
  float* score;     // largest angle, kFirstScore where it has no meaning
};

// One token's solution; reads and writes column `token` of the scratch.
struct AngleSolver {
  MergeScratch s;
  int members, token;

  MC_HD float& weight(int i) const { return s.weight[i * kBlockSize + token]; }
  MC_HD float& inverse(int i) const { return s.inverse[i * kBlockSize + token]; }
  MC_HD float& step(int i) const { return s.step[i * kBlockSize + token]; }
  MC_HD float& product(int i, int j) const {
    return s.products[pair_number(members, minimum(i, j), maximum(i, j)) * kBlockSize + token];
  }
  MC_HD static float clamped(float cosine) { return minimum(maximum(cosine, -1.0f), 1.0f); }

  // Products to cosines; norms go out through `store_norm(member, norm)`. Whether angles have a meaning.
  template <class StoreNorm>
  MC_HD bool normalise(StoreNorm store_norm) const {
    bool meaningful = true;
    MC_NO_UNROLL
    for (int i = 0; i < members; ++i) {
      const float norm = square_root(product(i, i));
      store_norm(i, norm);
      const bool usable = norm > 0.0f && norm < kInfinity;
      inverse(i) = usable ? divide(1.0f, norm) : 0.0f;
      meaningful = meaningful && usable;
    }
    float largest = 0.0f;
    MC_NO_UNROLL
    for (int i = 0; i < members; ++i) {
      product(i, i) = inverse(i) > 0.0f ? 1.0f : 0.0f;
      MC_NO_UNROLL
      for (int j = i + 1; j < members; ++j) {
        const float cosine = product(i, j) * inverse(i) * inverse(j);
        product(i, j) = cosine;
        largest = maximum(largest, arc_cosine(clamped(cosine)));
      }
    }
    meaningful = meaningful && !(largest > kPi - kAntipodalMargin);
    s.score[token] = meaningful ? largest : kFirstScore;
    return meaningful;
  }

  MC_HD void take_last() const {
    MC_NO_UNROLL
    for (int i = 0; i < members; ++i) weight(i) = i + 1 < members ? 0.0f : 1.0f;
  }

  // |sum_i v_i u_i|^2 and (sum_i v_i u_i) . u_j, v = `coefficient(i)`.
  template <class Coefficient>
  MC_HD float along(Coefficient coefficient, int j) const {
    float sum = 0.0f;
    MC_NO_UNROLL
    for (int i = 0; i < members; ++i) sum += coefficient(i) * product(i, j);
    return sum;
  }
  template <class Coefficient>
  MC_HD float square(Coefficient coefficient) const {
    float sum = 0.0f;
    MC_NO_UNROLL
    for (int j = 0; j < members; ++j) sum += coefficient(j) * along(coefficient, j);
    return sum;
  }

  // Weights divided by the length of their sum; false if that is zero.
  MC_HD bool to_unit() const {
    const float length = square_root(maximum(square([&](int i) { return weight(i); }), 0.0f));
    if (!(length > 0.0f)) return false;
    MC_NO_UNROLL
    for (int i = 0; i < members; ++i) weight(i) = divide(weight(i), length);
    return true;
  }

  // Spherical interpolation of two; `t` is the weight of the second.
  MC_HD void interpolate(float t) const {
    const float omega = s.score[token];
    weight(0) = 1.0f - t;
    weight(1) = t;
    if (omega < kSmallAngle) {
      to_unit();
      return;
    }
    const float sine = sine_of(omega);
    MC_NO_UNROLL
    for (int i = 0; i < 2; ++i) weight(i) = divide(sine_of(weight(i) * omega), sine);
  }

  // One step of the weighted spherical mean, in the tangent space of the current one.
  MC_HD void refine(const float* shares) const {
    float toward = 0.0f;
    MC_NO_UNROLL
    for (int i = 0; i < members; ++i) {
      const float cosine = clamped(along([&](int k) { return weight(k); }, i));
      const float theta = arc_cosine(cosine), sine = sine_of(theta);
      const float factor = theta < kSmallAngle ? 1.0f : divide(theta, sine > 0.0f ? sine : 1.0f);
      step(i) = shares[i] * factor;
      toward += step(i) * cosine;
    }
    MC_NO_UNROLL
    for (int i = 0; i < members; ++i) step(i) -= toward * weight(i);
    const float length = square_root(maximum(square([&](int i) { return step(i); }), 0.0f));
    float sine, cosine;
    sine_and_cosine(length, sine, cosine);
    // Near the mean the length is mostly rounding noise; the step itself is not.
    const float share = length > 0.0f ? divide(sine, length) : 1.0f;
    MC_NO_UNROLL
    for (int i = 0; i < members; ++i) weight(i) = cosine * weight(i) + share * step(i);
    to_unit();
  }

  // Weights of the directions, then of the vectors. `shares`: of the layers, adding up to 1.
  MC_HD void solve(float t, const float* shares, bool meaningful) const {
    if (meaningful && members == 2) {
      interpolate(t);
    } else if (meaningful) {
      MC_NO_UNROLL
      for (int i = 0; i < members; ++i) weight(i) = shares[i];
      meaningful = to_unit();
      if (!meaningful) s.score[token] = kFirstScore;
      MC_NO_UNROLL
      for (int k = 0; k < kKarcherSteps && meaningful; ++k) refine(shares);
    }
    if (!meaningful) take_last();
    MC_NO_UNROLL
    for (int i = 0; i < members; ++i) weight(i) *= inverse(i);
  }
};

// tile = sum_i weight_i x_i, or the arithmetic mean. `loaded`: the tiles hold the two members.
template <int Chunks, class Block, class Sources>
MC_HD void combine(Block& block, const StreamShape& shape, Sources source, const MergeScratch& s,
                   typename Block::template PerThread<Tile<Chunks>>& tile,
                   typename Block::template PerThread<Tile<Chunks>>& other, float* shared, bool loaded) {
  const bool mean = shape.merge == Merge::mean;
  if (!loaded) load_vectors<Chunks>(block, tile, source(0), shared);
  for (int i = 1; i < shape.members; ++i) {
    if (!loaded) load_vectors<Chunks>(block, other, source(i), shared);
    block.each([&](Thread thread) {
      const int row = row_of(thread);
      const float own = mean || i > 1 ? 1.0f : s.weight[row];
      const float next = mean ? 1.0f : s.weight[i * kBlockSize + row];
      MC_UNROLL
      for (int j = 0; j < Chunks; ++j) {
        MC_UNROLL
        for (int e = 0; e < kChunk; ++e) tile(thread).x[j][e] = own * tile(thread).x[j][e] + next * other(thread).x[j][e];
      }
    });
  }
  if (!mean) return;
  const float members = static_cast<float>(shape.members);
  block.each([&](Thread thread) {
    MC_UNROLL
    for (int j = 0; j < Chunks; ++j) {
      MC_UNROLL
      for (int e = 0; e < kChunk; ++e) tile(thread).x[j][e] = divide(tile(thread).x[j][e], members);
    }
  });
}

}  // namespace minicache
