// C ABI of the kernels, the same for the CUDA library and for the host build (which ignores `stream` and works on host
// memory). Every function returns 0, or an error code after which minicache_last_error() names the argument; nothing
// prints or aborts. Functions only launch: they return before the GPU is done.
#pragma once

#include "minicache/layout.cuh"

#if defined(__GNUC__)
#define MC_API extern "C" __attribute__((visibility("default")))
#else
#define MC_API extern "C"
#endif

namespace minicache {

enum Status : std::int32_t { ok = 0, invalid_argument = 1, unsupported = 2, device_error = 3 };

// Compute type of keys, values, queries and of `model` pools. The host build also takes float32.
enum class Type : std::int32_t { float32, float16, bfloat16 };

// One stream as a layer reads it.
struct StreamView {
  const StreamShape* shape;  // from minicache_stream_create
  StreamPools pools;
  ReadMaps maps;
};

// What attention works on. Query rows are [Hq, D], key and value rows [H, D]; strides count numbers between tokens.
struct AttentionArguments {
  Type type;
  AttentionShape shape;
  Step step;
  void* kv;                 // full tier of the layer, full_blocks of them
  std::int32_t full_blocks;
  std::int32_t sliding_window;  // tokens a query sees, itself included; 0: all of them
  StreamView key, value;        // shapes null without a compressed tier
  const void* q;
  void* out;                    // [tokens, Hq, D]; decode writes the decodes' rows, prefill the others
  std::int64_t q_stride, out_stride;
};

}  // namespace minicache

MC_API const char* minicache_last_error();  // of the calling thread
MC_API const char* minicache_version();     // "0.1.0 cuda sm_90 ..." or "0.1.0 host"

// Shapes outlive every call that uses them. Null after an error.
MC_API minicache::StreamShape* minicache_stream_create(const std::int32_t* integers, std::int32_t count,
                                                       const float* floats, std::int32_t float_count,
                                                       std::int32_t heads, std::int32_t dim);
MC_API void minicache_stream_destroy(minicache::StreamShape* shape);

// k, v [tokens, H, D] into slots (block * kBlockSize + offset) of kv [blocks, 2, H, B, D]; numbers that are not finite
// are written as zero.
MC_API std::int32_t minicache_append_kv(minicache::Type type, void* kv, std::int32_t blocks, std::int32_t heads,
                                        std::int32_t dim, const void* k, const void* v, std::int64_t k_stride,
                                        std::int64_t v_stride, const std::int32_t* slot_mapping, std::int32_t tokens,
                                        void* stream);

// Full blocks source_blocks[n] of the group's layers (`layers`: host array of m device pointers [Nf, 2, H, B, D]) into
// blocks target_blocks[n] of the stream's pools. block_index[n]: which block of its sequence it is.
MC_API std::int32_t minicache_compress_blocks(minicache::Type type, const minicache::StreamShape* shape,
                                              const void* const* layers, const std::int32_t* source_blocks,
                                              const std::int32_t* target_blocks, const std::int32_t* block_index,
                                              std::int32_t count, const minicache::StreamPools* pools,
                                              const minicache::WriteMaps* maps, const float* inverse_frequencies,
                                              void* workspace, std::int64_t workspace_bytes, void* stream);
MC_API std::int64_t minicache_compress_workspace(minicache::Type type, const minicache::StreamShape* shape,
                                                 std::int32_t count);

// Blocks blocks[n] of a stream as its layer's keys (after RoPE) or values: out [count, H, B, D] by KV head. Where
// blocks[n] is negative, out is left as it is.
MC_API std::int32_t minicache_restore_blocks(minicache::Type type, const minicache::StreamView* stream_view,
                                             const std::int32_t* blocks, const std::int32_t* block_index,
                                             std::int32_t count, const float* inverse_frequencies, void* out,
                                             void* workspace, std::int64_t workspace_bytes, void* stream);
MC_API std::int64_t minicache_restore_workspace(minicache::Type type, const minicache::StreamShape* shape,
                                                std::int32_t count);

// Attention of the step's decodes (rows query_start[s], s < decodes) and of its prefill chunks (all other rows). The
// append of the step's keys and values comes before either. Workspace sizes depend on shapes only, so that a captured
// graph stays valid while contexts grow. Prefill also takes less workspace than it asks for, down to one restored block
// per chunk and the state of all rows: more launches, the same bits. Its size is -1 for arguments it refuses.
MC_API std::int64_t minicache_decode_workspace(const minicache::AttentionArguments* arguments);
MC_API std::int32_t minicache_decode_attention(const minicache::AttentionArguments* arguments, void* workspace,
                                               std::int64_t workspace_bytes, void* stream);
MC_API std::int64_t minicache_prefill_workspace(const minicache::AttentionArguments* arguments);
MC_API std::int32_t minicache_prefill_attention(const minicache::AttentionArguments* arguments, void* workspace,
                                                std::int64_t workspace_bytes, void* stream);
