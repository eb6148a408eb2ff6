// Linear maps of decode attention, applied once to queries and once to sums of values: products of the rows of all
// decodes' query heads of a KV head with that head's matrix.
#pragma once

#include "minicache/head_matrix.cuh"
#include "minicache/head_product.cuh"

namespace minicache {

// Tiles of 8 query rows of a thread block, and of one where there are no more.
constexpr int kMapTiles = 4, kFewMapTiles = 1;

// Query rows of a KV head that a thread block has to do with: `count` from number `first` on.
template <class T>
struct MapRows {
  const DecodeProblem<T>& problem;
  int head, first, count;

  MC_HD MapRows(const DecodeProblem<T>& of, int head, int first, int most)
      : problem(of), head(head), first(first), count(minimum(of.step.decodes * of.group - first, most)) {}
  MC_HD int sequence(int n) const { return (first + n) / problem.group; }
  MC_HD int query(int n) const { return head * problem.group + (first + n) % problem.group; }
  MC_HD std::int64_t row(int n) const { return problem.query_row(sequence(n), query(n)); }
};

constexpr int kQueryMaps = 3;  // P, A, c

template <class T>
struct QueryMapArguments {
  DecodeProblem<T> problem;
  const std::int64_t* slots;
  HeadMatrix matrix[kQueryMaps];
  float* out[kQueryMaps];  // [query rows, columns]
};

// q M for each matrix. Thread block: (columns of one matrix, query rows, KV head).
template <class T, int Tiles>
struct QueryMap {
  static constexpr int kThreads = kDecodeThreads;
  using Product = HeadProduct<T, Tiles>;
  using Numbers = typename Product::Numbers;
  static constexpr int kRows = Product::kRows, kShared = Product::shared_bytes(kMaxHeadDim);

  MC_HD static int tiles(const QueryMapArguments<T>& a, int n) {
    return a.matrix[n].data == nullptr ? 0 : ceil_div(a.matrix[n].columns, Product::kColumns);
  }

  template <class Block>
  MC_HD static void run(Block& block, const QueryMapArguments<T>& a) {
    int n = 0, tile = block.x();
    for (; n < kQueryMaps - 1 && tile >= tiles(a, n); ++n) tile -= tiles(a, n);
    const int dim = a.problem.shape.dim, head = block.z(), columns = a.matrix[n].columns;
    const MapRows<T> rows(a.problem, head, block.y() * kRows, kRows);
    const float* matrix = a.matrix[n].of(a.slots == nullptr ? head : static_cast<int>(a.slots[head]), dim);
    const int first = tile * Product::kColumns;
    auto query = [&](int row, int k) {
      Numbers x{};
      if (row >= rows.count) return x;
      const T* const from = a.problem.query(rows.sequence(row), rows.query(row)) + k;
      const auto stored = detail::load<Neighbours<Pair<T>, 2>>(from);
      MC_UNROLL
      for (int i = 0; i < 2; ++i) {
        x.x[2 * i] = first_of(stored.x[i]);
        x.x[2 * i + 1] = second_of(stored.x[i]);
      }
      return x;
    };
    auto column = [&](int m, int k) {
      Numbers x{};
      if (first + m >= columns) return x;
      const float* const from = matrix + static_cast<std::int64_t>(k) * columns + first + m;
      MC_UNROLL
      for (int i = 0; i < 4; ++i) x.x[i] = from[i * columns];
      return x;
    };
    typename Product::template Sums<Block> sums;
    Product::clear(block, sums);
    Product::add(block, sums, dim, columns - first, query, column);
    Product::each_sum(block, sums, [&](int row, int m, float sum) {
      if (row < rows.count && first + m < columns) a.out[n][rows.row(row) * columns + first + m] = sum;
    });
  }
};

template <class T>
struct OutputMapArguments {
  DecodeProblem<T> problem;
  const std::int64_t* slots;
  HeadMatrix latent, residual;                // P [D, stored] and A [D, D]
  const float *sums, *residual_sums, *plain;  // by query row: [stored], [D] and [D], already divided
  T* out;
  std::int64_t out_stride;
};

// plain + sums P^T + residual_sums A^T. Thread block: (components, query rows, KV head).
template <class T, int Tiles>
struct OutputMap {
  static constexpr int kThreads = kDecodeThreads;
  using Product = HeadProduct<T, Tiles>;
  using Numbers = typename Product::Numbers;
  static constexpr int kRows = Product::kRows, kColumns = Product::kColumns;
  static constexpr int kShared = Product::shared_bytes(kMaxRank);

  template <class Block>
  MC_HD static void run(Block& block, const OutputMapArguments<T>& a) {
    const int dim = a.problem.shape.dim, head = block.z(), first = block.x() * kColumns;
    const MapRows<T> rows(a.problem, head, block.y() * kRows, kRows);
    const int slot = a.slots == nullptr ? head : static_cast<int>(a.slots[head]);
    typename Product::template Sums<Block> total;
    Product::clear(block, total);
    auto add = [&](const HeadMatrix& matrix, const float* sums) {
      if (sums == nullptr) return;
      auto sum = [&](int row, int k) {
        return row < rows.count ? detail::load<Numbers>(sums + rows.row(row) * matrix.columns + k) : Numbers{};
      };
      auto column = [&](int m, int k) {
        const int component = first + m;
        Numbers x{};
        if (component >= dim) return x;
        if (matrix.data != nullptr) return detail::load<Numbers>(matrix.of(slot, dim) + component * matrix.columns + k);
        MC_UNROLL
        for (int i = 0; i < 4; ++i) x.x[i] = static_cast<float>(k + i == component);
        return x;
      };
      Product::add(block, total, matrix.columns, dim - first, sum, column);
    };
    add(a.latent, a.sums);
    add(a.residual, a.residual_sums);
    Product::each_sum(block, total, [&](int row, int m, float sum) {
      const int component = first + m;
      if (row >= rows.count || component >= dim) return;
      const int sequence = rows.sequence(row);
      T* const out = a.out + a.problem.step.query_start[sequence] * a.out_stride + rows.query(row) * dim;
      out[component] = from_float<T>(a.plain[rows.row(row) * dim + component] + sum);
    });
  }
};

}  // namespace minicache
