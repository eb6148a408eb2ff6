// A matrix of a layer's reading maps.
#pragma once

#include "minicache/layout.cuh"

namespace minicache {

// One matrix per slot, [heads, D, columns] row-major; heads is H, or 1: the same for all. Null: none.
struct HeadMatrix {
  const float* data;
  std::int32_t heads, columns;
  MC_HD const float* of(int slot, int dim) const {
    return data + static_cast<std::int64_t>(heads == 1 ? 0 : slot) * dim * columns;
  }
};

}  // namespace minicache
