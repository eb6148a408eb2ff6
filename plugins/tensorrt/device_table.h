// Numbers that are known when a node is, on the device.
#pragma once

#include <cuda_runtime_api.h>

#include <vector>

#include "minicache/descriptor.h"

namespace minicache::trt {

// Uploaded once, to the device that is current then; there until this object goes. Nothing without numbers.
class DeviceTable {
 public:
  explicit DeviceTable(std::vector<float> values) : values_(std::move(values)) {}
  DeviceTable(const DeviceTable&) = delete;
  DeviceTable& operator=(const DeviceTable&) = delete;
  ~DeviceTable() {
    if (data_ != nullptr) cudaFree(data_);
  }

  const float* data() const { return static_cast<const float*>(data_); }
  bool ready() const { return values_.empty() || data_ != nullptr; }

  // Allocates and waits, so not while a plugin is enqueued.
  bool upload(const char* what, Error& error) {
    if (ready()) return true;
    const std::size_t bytes = values_.size() * sizeof(float);
    cudaError_t status = cudaMalloc(&data_, bytes);
    if (status == cudaSuccess) status = cudaMemcpy(data_, values_.data(), bytes, cudaMemcpyHostToDevice);
    return status == cudaSuccess || error("%s: %s", what, cudaGetErrorString(status));
  }

 private:
  std::vector<float> values_;
  void* data_ = nullptr;
};

}  // namespace minicache::trt
