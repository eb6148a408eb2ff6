// Messages of the plugins, to the logger of whoever called them.
#pragma once

#include <NvInferRuntime.h>

namespace minicache::trt {

// Owned by TensorRT, which hands it over when it loads the library.
void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept;

// To the logger; to the standard error stream where there is none. Messages name their plugin themselves.
void report(nvinfer1::ILogger::Severity severity, const char* message) noexcept;

}  // namespace minicache::trt
