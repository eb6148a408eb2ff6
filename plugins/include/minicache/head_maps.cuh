// Linear maps of decode attention, applied once to queries and once to sums of values: products of the rows of all
// decodes' query heads of a KV head with that head's matrix, in float32.
#pragma once

#include "minicache/decode_split.cuh"
#include "minicache/key_rebuild.cuh"

namespace minicache {

// Query rows of a thread block, and of one where there are no more.
constexpr int kMapRows = 16, kFewMapRows = 4;

// One matrix per slot, [heads, D, columns] row-major; heads is H, or 1: the same for all. Null: none.
struct HeadMatrix {
  const float* data;
  std::int32_t heads, columns;
  MC_HD const float* of(int slot, int dim) const {
    return data + static_cast<std::int64_t>(heads == 1 ? 0 : slot) * dim * columns;
  }
};

// Row number `n` of a KV head: its sequence and query head.
template <class T>
MC_HD void map_row(const DecodeProblem<T>& problem, int head, int n, int& sequence, int& query) {
  sequence = n / problem.group;
  query = head * problem.group + n % problem.group;
}

constexpr int kQueryMaps = 3;  // P, A, c

template <class T>
struct QueryMapArguments {
  DecodeProblem<T> problem;
  const std::int64_t* slots;
  HeadMatrix matrix[kQueryMaps];
  float* out[kQueryMaps];  // [query rows, columns]
};

// q M for each matrix. Thread block: (128 columns of one matrix, Rows rows, KV head).
template <class T, int Rows>
struct QueryMap {
  static constexpr int kThreads = kDecodeThreads;
  static constexpr int kShared = Rows * kMaxHeadDim * 4;

  MC_HD static int tiles(const QueryMapArguments<T>& a, int n) {
    return a.matrix[n].data == nullptr ? 0 : ceil_div(a.matrix[n].columns, kThreads);
  }

  template <class Block>
  MC_HD static void run(Block& block, const QueryMapArguments<T>& a) {
    int n = 0, tile = block.x();
    for (; n < kQueryMaps - 1 && tile >= tiles(a, n); ++n) tile -= tiles(a, n);
    const int dim = a.problem.shape.dim, head = block.z(), first = block.y() * Rows;
    const int rows = minimum(a.problem.step.decodes * a.problem.group - first, Rows);
    float* query = reinterpret_cast<float*>(block.shared);  // [D][Rows]
    block.each([&](Thread thread) {
      for (int i = thread.index; i < Rows * dim; i += kThreads) {
        const int row = i / dim, c = i % dim;
        int sequence, number;
        map_row(a.problem, head, first + minimum(row, rows - 1), sequence, number);
        query[c * Rows + row] = to_float(a.problem.query(sequence, number)[c]);
      }
    });
    block.sync();
    const float* matrix = a.matrix[n].of(a.slots == nullptr ? head : static_cast<int>(a.slots[head]), dim);
    const int columns = a.matrix[n].columns;
    block.each([&](Thread thread) {
      const int column = tile * kThreads + thread.index;
      if (column >= columns) return;
      float sum[Rows] = {};
      for (int d = 0; d < dim; ++d) {
        const float x = matrix[static_cast<std::int64_t>(d) * columns + column];
        MC_UNROLL
        for (int row = 0; row < Rows; ++row) sum[row] += x * query[d * Rows + row];
      }
      MC_UNROLL
      for (int row = 0; row < Rows; ++row) {
        if (row >= rows) continue;
        int sequence, number;
        map_row(a.problem, head, first + row, sequence, number);
        a.out[n][a.problem.query_row(sequence, number) * columns + column] = sum[row];
      }
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

// plain + sums P^T + residual_sums A^T. Thread block: (16 components, Rows rows, KV head).
template <class T, int Rows>
struct OutputMap {
  static constexpr int kThreads = kDecodeThreads;
  static constexpr int kLanes = 8;  // of one component
  static constexpr int kComponents = kThreads / kLanes;
  static constexpr int kShared = Rows * kMaxRank * 4;

  template <class Block>
  MC_HD static void run(Block& block, const OutputMapArguments<T>& a) {
    const int dim = a.problem.shape.dim, head = block.z(), first = block.y() * Rows;
    const int rows = minimum(a.problem.step.decodes * a.problem.group - first, Rows);
    const int slot = a.slots == nullptr ? head : static_cast<int>(a.slots[head]);
    typename Block::template PerThread<float> total[Rows];
    block.each([&](Thread thread) {
      MC_UNROLL
      for (int row = 0; row < Rows; ++row) total[row](thread) = 0.0f;
    });
    auto add = [&](const HeadMatrix& matrix, const float* sums) {
      if (sums == nullptr) return;
      const int columns = matrix.columns;
      float* x = reinterpret_cast<float*>(block.shared);  // [Rows][columns]
      block.sync();
      block.each([&](Thread thread) {
        for (int i = thread.index; i < Rows * columns; i += kThreads) {
          int sequence, number;
          map_row(a.problem, head, first + minimum(i / columns, rows - 1), sequence, number);
          x[i] = sums[a.problem.query_row(sequence, number) * columns + i % columns];
        }
      });
      block.sync();
      block.each([&](Thread thread) {
        const int component = block.x() * kComponents + thread.index / kLanes;
        const float* line = matrix.data == nullptr ? nullptr : matrix.of(slot, dim) + component * columns;
        for (int c = thread.index % kLanes * 4; c < columns; c += kLanes * 4) {
          MC_UNROLL
          for (int i = 0; i < 4; ++i) {
            const float factor = line == nullptr ? static_cast<float>(c + i == component) : line[c + i];
            MC_UNROLL
            for (int row = 0; row < Rows; ++row) total[row](thread) += factor * x[row * columns + c + i];
          }
        }
      });
    };
    add(a.latent, a.sums);
    add(a.residual, a.residual_sums);
    MC_UNROLL
    for (int row = 0; row < Rows; ++row) block.template reduce_add<kLanes>(total[row]);
    block.each([&](Thread thread) {
      const int component = block.x() * kComponents + thread.index / kLanes;
      if (thread.index % kLanes != 0) return;
      MC_UNROLL
      for (int row = 0; row < Rows; ++row) {
        if (row >= rows) continue;
        int sequence, number;
        map_row(a.problem, head, first + row, sequence, number);
        const float plain = a.plain[a.problem.query_row(sequence, number) * dim + component];
        T* out = a.out + a.problem.step.query_start[sequence] * a.out_stride + static_cast<std::int64_t>(number) * dim;
        out[component] = from_float<T>(plain + total[row](thread));
      }
    });
  }
};

template <class T>
struct MapFragmentsArguments {
  StreamShape shape;
  ReadMaps maps;
  const float* inverse_frequencies;
  bool paired;  // as `rebuild_fragment` says
  void* out;    // [slots][rebuild_fragments]
  char* turns;  // KeyRebuild's table

  static std::int64_t bytes(const StreamShape& shape) {
    return shape.heads * rebuild_fragments<T>(shape) * static_cast<std::int64_t>(sizeof(FragmentB<Code<T>>));
  }
};

// What KeyRebuild takes: [P | A]^T of every slot, null maps being the identity, components of y and residual in the order
// of `QueryFragments::component`, run by run; and the turns of a block's places. Thread block: (128 fragments, slot), behind the last slot 128
// turns.
template <class T>
struct MapFragments {
  static constexpr int kThreads = kDecodeThreads;
  using E = Code<T>;

  MC_HD static std::int64_t turns(const StreamShape& shape) { return kBlockSize * padded_half(shape.dim) / 2; }

  template <class Block>
  MC_HD static void run(Block& block, const MapFragmentsArguments<T>& a) {
    block.each([&](Thread thread) {
      const std::int64_t n = static_cast<std::int64_t>(block.x()) * kThreads + thread.index;
      if (block.y() < a.shape.heads) {
        if (n < rebuild_fragments<T>(a.shape)) fill(a, block.y(), n);
      } else if (n < turns(a.shape)) {
        const int dim = a.shape.dim, pairs = padded_half(dim) / 2;
        const int place = static_cast<int>(n) / pairs, pair = static_cast<int>(n) % pairs;
        auto* const row = reinterpret_cast<KeyRebuild::Turn<E>*>(a.turns + place * KeyRebuild::turn_stride<E>(dim));
        row[pair] = KeyRebuild::turn_of<E>(dim, a.inverse_frequencies, place, pair);
      }
    });
  }

 private:
  MC_HD static void fill(const MapFragmentsArguments<T>& a, int slot, std::int64_t n) {
    const StreamShape& shape = a.shape;
    const int steps = padded_steps(rebuild_steps(shape)), lane = static_cast<int>(n % kWarp);
    const int step = static_cast<int>(n / kWarp % steps), tile = static_cast<int>(n / kWarp / steps);
    const int d = KeyRebuild::component(shape.dim, tile * 8 + lane / 4);
    const HeadMatrix map{a.maps.map, a.maps.map_heads, shape.stored};
    const HeadMatrix residual{a.maps.residual_map, shape.heads, shape.dim};
    auto number = [&](int c) {
      const bool own = c < shape.stored;
      const HeadMatrix matrix = own ? map : residual;
      const int column = own ? c : c - shape.stored;
      if (d < 0 || step >= rebuild_steps(shape)) return 0.0f;
      if (matrix.data == nullptr) return static_cast<float>(column == d);
      return matrix.of(slot, shape.dim)[static_cast<std::int64_t>(d) * matrix.columns + column];
    };
    FragmentB<E>* const out = static_cast<FragmentB<E>*>(a.out) + slot * rebuild_fragments<T>(shape);
    FragmentB<E>& target = out[rebuild_fragment(a.paired, steps, tile, step, lane)];
    int first = shape.stored, length = shape.dim;  // of the run that the step belongs to
    for (int s = 0; s < shape.segments; ++s) {
      const Segment& segment = shape.segment[s];
      if (segment.format == Format::drop || 16 * step < segment.stored) continue;
      if (16 * step >= segment.stored + segment.length) continue;
      first = segment.stored;
      length = segment.length;
    }
    for (int j = 0; j < 2; ++j) {
      auto component = [&](int i) { return first + QueryFragments::component(length, step - first / 16, lane, j, i); };
      put_pair(target, j, make_pair<E>(number(component(0)), number(component(1))));
    }
  }
};

}  // namespace minicache
