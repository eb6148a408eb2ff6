#include "effects.h"

#include <cstring>

#include "numbers.h"

namespace emulator {
namespace {

int size_of_x(const Instruction& i, int n) { return static_cast<int>(i.x[n]); }

template <float (*ToFloat)(u16)>
void multiply_matrices(Block&, Warp& warp, const Instruction& i, u32) {
  float a[16][16], b[16][8], d[4][kWarp];
  for (int lane = 0; lane < kWarp; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int n = 0; n < 4; ++n) {
      const u32 pair = warp.at<u32>(i.x[4 + n])[lane];
      a[g + 8 * (n % 2)][2 * t + 8 * (n / 2)] = ToFloat(static_cast<u16>(pair));
      a[g + 8 * (n % 2)][2 * t + 8 * (n / 2) + 1] = ToFloat(static_cast<u16>(pair >> 16));
    }
    for (int n = 0; n < 2; ++n) {
      const u32 pair = warp.at<u32>(i.x[8 + n])[lane];
      b[2 * t + 8 * n][g] = ToFloat(static_cast<u16>(pair));
      b[2 * t + 8 * n + 1][g] = ToFloat(static_cast<u16>(pair >> 16));
    }
  }
  for (int n = 0; n < 4; ++n) {
    const float* const c = warp.at<float>(i.x[10 + n]);
    for (int lane = 0; lane < kWarp; ++lane) {
      const int row = lane / 4 + 8 * (n / 2), column = 2 * (lane % 4) + n % 2;
      float sum = 0.0f;
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      d[n][lane] = c[lane] + sum;
    }
  }
  for (int n = 0; n < 4; ++n) std::memcpy(warp.at<float>(i.x[n]), d[n], sizeof(d[n]));
}

template <bool To, Space Where>
void convert_address(Block& block, Warp& warp, const Instruction& i, u32 mask) {
  each_lane(mask, [&](int lane) {
    const u64 base =
        reinterpret_cast<u64>(Where == Space::shared ? block.shared() : block.local(warp.index * kWarp + lane));
    u64& d = warp.at<u64>(i.x[0])[lane];
    d = To ? warp.at<u64>(i.x[1])[lane] - base : warp.at<u64>(i.x[1])[lane] + base;
  });
}

}  // namespace

void load(Block& block, Warp& warp, const Instruction& i, u32 mask) {
  const int bytes = size_of_x(i, 8), width = size_of_x(i, 9);
  char* addresses[kWarp];
  each_lane(mask, [&](int lane) {
    addresses[lane] = block.access(warp, i, lane, block.address_of(warp, i, lane), bytes * i.count, false);
    for (int n = 0; n < i.count; ++n) {
      char* const target = warp.file + i.x[n] + static_cast<std::size_t>(lane) * width;
      u64 value = 0;
      std::memcpy(&value, addresses[lane] + n * bytes, static_cast<std::size_t>(bytes));
      if ((i.variant & 1) && bytes < 8)
        value = static_cast<u64>(static_cast<s64>(value << (64 - 8 * bytes)) >> (64 - 8 * bytes));
      std::memcpy(target, &value, static_cast<std::size_t>(width));
    }
  });
  if (i.space != Space::param && i.space != Space::local) block.count_access(addresses, mask, bytes * i.count);
}

void store(Block& block, Warp& warp, const Instruction& i, u32 mask) {
  const int bytes = size_of_x(i, 8), width = size_of_x(i, 9);
  char* addresses[kWarp];
  each_lane(mask, [&](int lane) {
    addresses[lane] = block.access(warp, i, lane, block.address_of(warp, i, lane), bytes * i.count, true);
    for (int n = 0; n < i.count; ++n) {
      std::memcpy(addresses[lane] + n * bytes, warp.file + i.x[n] + static_cast<std::size_t>(lane) * width,
                  static_cast<std::size_t>(bytes));
    }
  });
  if (i.space != Space::local) block.count_access(addresses, mask, bytes * i.count);
}

void copy_async(Block& block, Warp& warp, const Instruction& i, u32 mask) {
  char* addresses[kWarp];
  each_lane(mask, [&](int lane) {
    const u64 target = i.variant & 1 ? warp.at<u64>(i.x[0])[lane] : warp.at<u32>(i.x[0])[lane];
    const char* const source = block.address_of(warp, i, lane);
    const int bytes = size_of_x(i, 8);
    const int valid = i.variant & 2 ? static_cast<int>(warp.at<u32>(i.x[1])[lane]) : bytes;
    block.begin_copy(warp, i, lane,
                     static_cast<u32>(target + static_cast<u64>(static_cast<s64>(static_cast<s32>(i.x[2])))), source,
                     bytes, valid);
    addresses[lane] = const_cast<char*>(source);
  });
  block.count_access(addresses, mask, size_of_x(i, 8));
}

void commit_copies(Block& block, Warp& warp, const Instruction&, u32 mask) {
  each_lane(mask, [&](int lane) { block.commit_copies(warp, lane); });
}

void wait_copies(Block& block, Warp& warp, const Instruction& i, u32 mask) {
  each_lane(mask, [&](int lane) { block.wait_copies(warp, lane, static_cast<int>(i.x[0])); });
}

void warp_barrier(Block&, Warp& warp, const Instruction&, u32) { ++warp.epoch; }

void shuffle(Block&, Warp& warp, const Instruction& i, u32 mask) {
  u32* const d = warp.at<u32>(i.x[0]);
  u32 a[kWarp], b[kWarp], c[kWarp], in_range = 0;
  std::memcpy(a, warp.at<u32>(i.x[1]), sizeof(a));
  std::memcpy(b, warp.at<u32>(i.x[2]), sizeof(b));
  std::memcpy(c, warp.at<u32>(i.x[3]), sizeof(c));
  for (int lane = 0; lane < kWarp; ++lane) {
    if ((mask >> lane & 1u) == 0) continue;
    const int distance = static_cast<int>(b[lane] & 31u), clamp = static_cast<int>(c[lane] & 31u);
    const int segment = static_cast<int>(c[lane] >> 8 & 31u);
    const int last = (lane & segment) | (clamp & ~segment), first = lane & segment;
    int from = 0;
    bool valid = false;
    switch (i.variant & 3) {
      case 0:
        from = lane ^ distance, valid = from <= last;
        break;
      case 1:
        from = first | (distance & ~segment), valid = from <= last;
        break;
      case 2:
        from = lane - distance, valid = from >= last;
        break;
      default:
        from = lane + distance, valid = from <= last;
    }
    if (!valid) from = lane;
    d[lane] = a[from];
    in_range |= static_cast<u32>(valid) << lane;
  }
  if (i.variant & 4) {
    u32& p = warp.predicate(i.x[4]);
    p = (p & ~mask) | (in_range & mask);
  }
}

void load_matrices(Block& block, Warp& warp, const Instruction& i, u32) {
  u16 rows[kWarp][8];
  char* addresses[kWarp];
  for (int lane = 0; lane < 8 * i.count; ++lane) {
    addresses[lane] = block.access(warp, i, lane, block.address_of(warp, i, lane), 16, false);
    std::memcpy(rows[lane], addresses[lane], 16);
  }
  for (int n = 0; n < i.count; ++n) {
    u32* const d = warp.at<u32>(i.x[n]);
    for (int lane = 0; lane < kWarp; ++lane) {
      const int g = lane / 4, t = lane % 4;
      const u16 low = i.variant ? rows[8 * n + 2 * t][g] : rows[8 * n + g][2 * t];
      const u16 high = i.variant ? rows[8 * n + 2 * t + 1][g] : rows[8 * n + g][2 * t + 1];
      d[lane] = low | static_cast<u32>(high) << 16;
    }
  }
  block.count_access(addresses, i.count == 4 ? ~0u : (1u << 8 * i.count) - 1, 16);
}

void multiply_halves(Block& block, Warp& warp, const Instruction& i, u32 mask) {
  multiply_matrices<half_to_float>(block, warp, i, mask);
}

void multiply_bfloats(Block& block, Warp& warp, const Instruction& i, u32 mask) {
  multiply_matrices<bfloat_to_float>(block, warp, i, mask);
}

void from_shared(Block& block, Warp& warp, const Instruction& i, u32 mask) {
  convert_address<false, Space::shared>(block, warp, i, mask);
}

void to_shared(Block& block, Warp& warp, const Instruction& i, u32 mask) {
  convert_address<true, Space::shared>(block, warp, i, mask);
}

void from_local(Block& block, Warp& warp, const Instruction& i, u32 mask) {
  convert_address<false, Space::local>(block, warp, i, mask);
}

void to_local(Block& block, Warp& warp, const Instruction& i, u32 mask) {
  convert_address<true, Space::local>(block, warp, i, mask);
}

}  // namespace emulator
