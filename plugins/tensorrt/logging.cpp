#include "tensorrt/logging.h"

#include <atomic>
#include <cstdio>
#include <string>

namespace minicache::trt {
namespace {

std::atomic<nvinfer1::ILoggerFinder*>& finder() {
  static std::atomic<nvinfer1::ILoggerFinder*> own{nullptr};
  return own;
}

}  // namespace

void set_logger_finder(nvinfer1::ILoggerFinder* own) noexcept { finder() = own; }

void report(nvinfer1::ILogger::Severity severity, const char* message) noexcept {
  try {
    nvinfer1::ILoggerFinder* const own = finder();
    nvinfer1::ILogger* const logger = own == nullptr ? nullptr : own->findLogger();
    if (logger != nullptr) {
      logger->log(severity, (std::string("minicache: ") + message).c_str());
      return;
    }
  } catch (...) {  // a message is not worth more than this; the caller returns an error anyway
  }
  std::fprintf(stderr, "minicache: %s\n", message);
}

}  // namespace minicache::trt
