// The part of ONNX Runtime's C ABI a custom operator needs, so that building one takes a C++ compiler and nothing else.
//
// The ABI is a table of functions that only grows: entries keep their places in all releases (ONNX Runtime asserts this
// of its own header, onnxruntime_c_api.h). Version 17 (ONNX Runtime 1.17) and later have everything below.
#pragma once

#include <cstddef>
#include <cstdint>

namespace minicache::ort {

constexpr std::uint32_t kApiVersion = 17;
constexpr std::uint32_t kCustomOpVersion = 16;  // the layout of CustomOp below

struct Status;
struct SessionOptions;
struct CustomOpDomain;
struct Value;
struct ShapeInfo;
struct KernelInfo;
struct KernelContext;

enum class Element : int { undefined = 0, float32 = 1 };
enum class Characteristic : int { required = 0, optional = 1, variadic = 2 };
constexpr int kFail = 1;

struct Api {
  const void* const* table;

  template <class Function>
  Function at(std::size_t place) const {
    return reinterpret_cast<Function>(const_cast<void*>(table[place]));
  }

  Status* create_status(int code, const char* message) const {
    return at<Status* (*)(int, const char*)>(0)(code, message);
  }
  Status* create_domain(const char* name, CustomOpDomain** out) const {
    return at<Status* (*)(const char*, CustomOpDomain**)>(26)(name, out);
  }
  template <class Op>
  Status* add_op(CustomOpDomain* domain, const Op* op) const {
    return at<Status* (*)(CustomOpDomain*, const Op*)>(27)(domain, op);
  }
  Status* add_domain(SessionOptions* options, CustomOpDomain* domain) const {
    return at<Status* (*)(SessionOptions*, CustomOpDomain*)>(28)(options, domain);
  }
  Status* data(Value* value, void** out) const { return at<Status* (*)(Value*, void**)>(51)(value, out); }
  Status* rank(const ShapeInfo* info, std::size_t* out) const {
    return at<Status* (*)(const ShapeInfo*, std::size_t*)>(61)(info, out);
  }
  Status* dimensions(const ShapeInfo* info, std::int64_t* out, std::size_t count) const {
    return at<Status* (*)(const ShapeInfo*, std::int64_t*, std::size_t)>(62)(info, out, count);
  }
  Status* shape(const Value* value, ShapeInfo** out) const {
    return at<Status* (*)(const Value*, ShapeInfo**)>(65)(value, out);
  }
  Status* attribute(const KernelInfo* info, const char* name, std::int64_t* out) const {
    return at<Status* (*)(const KernelInfo*, const char*, std::int64_t*)>(86)(info, name, out);
  }
  // `size` holds the room at `out` before, and the length with the closing zero after.
  Status* attribute(const KernelInfo* info, const char* name, char* out, std::size_t* size) const {
    return at<Status* (*)(const KernelInfo*, const char*, char*, std::size_t*)>(87)(info, name, out, size);
  }
  Status* input(const KernelContext* context, std::size_t index, const Value** out) const {
    return at<Status* (*)(const KernelContext*, std::size_t, const Value**)>(90)(context, index, out);
  }
  Status* output(KernelContext* context, std::size_t index, const std::int64_t* shape, std::size_t rank,
                 Value** out) const {
    return at<Status* (*)(KernelContext*, std::size_t, const std::int64_t*, std::size_t, Value**)>(91)(
        context, index, shape, rank, out);
  }
  void release(Status* status) const { at<void (*)(Status*)>(93)(status); }
  void release(ShapeInfo* info) const { at<void (*)(ShapeInfo*)>(99)(info); }
  // Calls function(data, i) for every i < total on the session's threads.
  Status* parallel_for(const KernelContext* context, void (*function)(void*, std::size_t), std::size_t total,
                       std::size_t batches, void* data) const {
    return at<Status* (*)(const KernelContext*, void (*)(void*, std::size_t), std::size_t, std::size_t, void*)>(274)(
        context, function, total, batches, data);
  }
};

struct ApiBase {
  const void* const* (*get_api)(std::uint32_t version);
  const char* (*get_version)();
};

// A custom operator: callbacks, each of which gets this struct.
struct CustomOp {
  std::uint32_t version = kCustomOpVersion;
  void* (*create_kernel)(const CustomOp*, const void* const*, const KernelInfo*) = nullptr;
  const char* (*name)(const CustomOp*);
  const char* (*provider)(const CustomOp*);
  Element (*input_type)(const CustomOp*, std::size_t);
  std::size_t (*inputs)(const CustomOp*);
  Element (*output_type)(const CustomOp*, std::size_t);
  std::size_t (*outputs)(const CustomOp*);
  void (*compute)(void*, KernelContext*) = nullptr;
  void (*destroy_kernel)(void*);
  Characteristic (*input_characteristic)(const CustomOp*, std::size_t);
  Characteristic (*output_characteristic)(const CustomOp*, std::size_t);
  int (*input_memory)(const CustomOp*, std::size_t);
  int (*variadic_inputs)(const CustomOp*);
  int (*variadic_inputs_alike)(const CustomOp*);
  int (*variadic_outputs)(const CustomOp*);
  int (*variadic_outputs_alike)(const CustomOp*);
  Status* (*create_kernel_checked)(const CustomOp*, const void* const*, const KernelInfo*, void**);
  Status* (*compute_checked)(void*, KernelContext*);
};

}  // namespace minicache::ort
