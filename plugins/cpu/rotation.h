// Cosines and sines of rotary angles by position, made once and shared by all layers.
#pragma once

#include <atomic>
#include <cmath>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

namespace minicache::cpu {

// [positions, 2, D / 2]; angles are float products of position and frequency, as the decoder rotates.
class RotationTable {
 public:
  explicit RotationTable(std::vector<float> frequencies) : frequencies_(std::move(frequencies)) {}

  // The table, valid for `positions` of them until this object is gone. Growing keeps earlier tables alive: other
  // threads may be reading them.
  const float* of(int positions) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (tables_.empty() || positions > known_) {
      known_ = positions > 2 * known_ ? positions : 2 * known_;
      const std::size_t half = frequencies_.size();
      std::vector<float> table(2 * half * static_cast<std::size_t>(known_));
      for (int p = 0; p < known_; ++p) {
        float* row = table.data() + 2 * half * static_cast<std::size_t>(p);
        for (std::size_t i = 0; i < half; ++i) {
          const float angle = static_cast<float>(p) * frequencies_[i];
          row[i] = std::cos(angle);
          row[half + i] = std::sin(angle);
        }
      }
      tables_.push_back(std::move(table));
    }
    return tables_.back().data();
  }

  static std::shared_ptr<RotationTable> shared(const std::vector<float>& frequencies) {
    static std::mutex mutex;
    static std::map<std::vector<float>, std::weak_ptr<RotationTable>> all;
    const std::lock_guard<std::mutex> lock(mutex);
    std::shared_ptr<RotationTable> result = all[frequencies].lock();
    if (result == nullptr) all[frequencies] = result = std::make_shared<RotationTable>(frequencies);
    return result;
  }

 private:
  std::vector<float> frequencies_;
  std::mutex mutex_;
  int known_ = 512;
  std::vector<std::vector<float>> tables_;
};

}  // namespace minicache::cpu
