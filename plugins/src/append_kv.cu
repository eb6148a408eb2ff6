// Launcher of the append.
#include "launching.h"
#include "minicache/append.cuh"

namespace minicache {
namespace {

template <class T>
std::int32_t append(FullTier<T> tier, std::int32_t blocks, const void* k, const void* v, std::int64_t k_stride,
                    std::int64_t v_stride, const std::int32_t* slot_mapping, std::int32_t tokens, void* stream) {
  using Kernel = AppendKernel<T>;
  const std::int64_t row = static_cast<std::int64_t>(tier.heads) * tier.dim;
  for (const std::int64_t stride : {k_stride, v_stride}) {
    if (tokens > 1 && (stride < row || stride % Kernel::kPack != 0))
      return fail(invalid_argument, "append_kv: expected strides of at least %lld, multiples of %d, got %lld",
                  static_cast<long long>(row), Kernel::kPack, static_cast<long long>(stride));
  }
  const std::int64_t packs = Kernel::packs(tokens, tier.heads, tier.dim);
  if (packs > (1LL << 31) - 1 - Kernel::kThreads)
    return fail(invalid_argument, "append_kv: tokens: %d are too many for one call", tokens);
  const Grid grid{static_cast<int>((packs + Kernel::kThreads - 1) / Kernel::kThreads)};
  const AppendArguments<T> arguments{tier,     static_cast<const T*>(k), static_cast<const T*>(v), k_stride,
                                     v_stride, slot_mapping,             tokens,                   blocks};
  return launch_kernel<Kernel>("append_kv", grid, 0, arguments, stream);
}

}  // namespace
}  // namespace minicache

MC_API std::int32_t minicache_append_kv(minicache::Type type, void* kv, std::int32_t blocks, std::int32_t heads,
                                        std::int32_t dim, const void* k, const void* v, std::int64_t k_stride,
                                        std::int64_t v_stride, const std::int32_t* slot_mapping, std::int32_t tokens,
                                        void* stream) {
  using namespace minicache;
  if (tokens < 0 || blocks < 1 || heads < 1)
    return fail(invalid_argument, "append_kv: expected tokens >= 0, blocks and heads >= 1, got %d, %d, %d", tokens,
                blocks, heads);
  if (dim < 16 || dim > kMaxHeadDim || dim % 16 != 0)
    return fail(invalid_argument, "append_kv: head_dim: expected a multiple of 16 up to %d, got %d", kMaxHeadDim, dim);
  if (tokens == 0) return ok;
  for (const Required& required : {Required{"kv", kv, 16}, Required{"k", k, 16}, Required{"v", v, 16},
                                   Required{"slot_mapping", slot_mapping, 4}}) {
    if (!check_pointer("append_kv", required)) return invalid_argument;
  }
  return with_type("append_kv", type, [&](auto number) {
    using T = decltype(number);
    const FullTier<T> tier{static_cast<T*>(kv), heads, dim};
    return append(tier, blocks, k, v, k_stride, v_stride, slot_mapping, tokens, stream);
  });
}
