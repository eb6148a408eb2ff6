// Checks of a stream's pools.
#include "launching.h"

namespace minicache {

bool check_pools(const char* function, const StreamShape& shape, const StreamPools& pools) {
  const bool retained = shape.retained > 0;
  const struct {
    bool needed;
    Required required;
  } all[] = {
      {shape.latent > 0, {"pools.latent", pools.latent, 16}},
      {shape.code_bytes > 0, {"pools.codes", pools.codes, 16}},
      {shape.params > 0, {"pools.params", pools.params, 16}},
      {shape.has_norms(), {"pools.norms", pools.norms, 16}},
      {shape.has_residual(), {"pools.residual", pools.residual, 16}},
      {shape.has_residual(), {"pools.residual_params", pools.residual_params, 16}},
      {retained, {"pools.exact", pools.exact, 16}},
      {shape.exact_params() > 0, {"pools.exact_params", pools.exact_params, 2}},
      {retained, {"pools.retained_index", pools.retained_index, 1}},
  };
  for (const auto& pool : all) {
    if (pool.needed && !check_pointer(function, pool.required)) return false;
  }
  return true;
}

}  // namespace minicache
