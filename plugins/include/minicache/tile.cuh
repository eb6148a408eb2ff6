// Rows of a cache block in registers: 64 rows of up to 32 * Chunks components, four threads to a row.
//
// Thread i holds row i / 4, and of it the chunks q, q + 4, q + 8, ... of eight components each, q = i % 4. Numbers of
// 16 bits are read and written 16 bytes at a time, four neighbouring threads side by side, and a row's sum is that of
// four neighbouring lanes. Segments begin and end at multiples of 16 components, so a chunk lies in one segment.
#pragma once

#include "minicache/fragments.cuh"
#include "minicache/layout.cuh"

namespace minicache {

constexpr int kChunk = 8;
constexpr int kRowThreads = 4;
constexpr int kTileThreads = kRowThreads * kBlockSize;

template <int Chunks>
struct Tile {
  float x[Chunks][kChunk];
};

MC_HD int row_of(Thread thread) { return thread.index / kRowThreads; }
MC_HD bool leads_row(Thread thread) { return thread.index % kRowThreads == 0; }
// First component of a thread's chunk number j.
MC_HD int component_of(Thread thread, int j) { return (thread.index % kRowThreads + kRowThreads * j) * kChunk; }
MC_HD bool inside(int component, int first, int length) { return component >= first && component < first + length; }

// Row pitch of a tile of floats in shared memory: four neighbouring threads' chunks fall into different banks.
MC_HD constexpr int pitch_of(int width) { return width + 4; }

struct alignas(16) Bytes16 {
  std::uint32_t words[4];
};

// Memory as another type of the same alignment.
template <class To>
MC_HD To load_as(const void* address) {
#if MC_ON_DEVICE
  return *static_cast<const To*>(address);
#else
  To value;
  std::memcpy(&value, address, sizeof(To));
  return value;
#endif
}

template <class From>
MC_HD void store_as(void* address, const From& value) {
#if MC_ON_DEVICE
  *static_cast<From*>(address) = value;
#else
  std::memcpy(address, &value, sizeof(From));
#endif
}

// Four floats to and from 16-byte aligned memory.
MC_HD void store_four(float* to, const float* x) {
  store_as(to, Bytes16{{bit_cast<std::uint32_t>(x[0]), bit_cast<std::uint32_t>(x[1]), bit_cast<std::uint32_t>(x[2]),
                        bit_cast<std::uint32_t>(x[3])}});
}
MC_HD void load_four(float* x, const float* from) {
  const Bytes16 bytes = load_as<Bytes16>(from);
  MC_UNROLL
  for (int i = 0; i < 4; ++i) x[i] = bit_cast<float>(bytes.words[i]);
}

// Eight numbers of 16 bits.
template <class T>
MC_HD void chunk_of(float (&x)[kChunk], const Bytes16& bytes) {
  MC_UNROLL
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = to_float(T{static_cast<std::uint16_t>(bytes.words[i])});
    x[2 * i + 1] = to_float(T{static_cast<std::uint16_t>(bytes.words[i] >> 16)});
  }
}

// Eight numbers from 16-byte aligned memory.
template <class T>
MC_HD void load_chunk(float (&x)[kChunk], const T* from) {
  if constexpr (sizeof(T) == 2) {
    chunk_of<T>(x, load_as<Bytes16>(from));
  } else {
    load_four(x, from);
    load_four(x + 4, from + 4);
  }
}

template <class T>
MC_HD void store_chunk(T* to, const float (&x)[kChunk]) {
  if constexpr (sizeof(T) == 2) {
    Bytes16 bytes;
    MC_UNROLL
    for (int i = 0; i < 4; ++i) {
      bytes.words[i] = round_pair<T>(x[2 * i], x[2 * i + 1]).bits;
    }
    store_as(to, bytes);
  } else {
    store_four(to, x);
    store_four(to + 4, x + 4);
  }
}

// Every thread's chunks `load(chunk, row, component)`; zeros from component `width` on.
template <int Chunks, class Block, class Load>
MC_HD void load_tile(Block& block, typename Block::template PerThread<Tile<Chunks>>& tile, int width, Load load) {
  block.each([&](Thread thread) {
    MC_UNROLL
    for (int j = 0; j < Chunks; ++j) {
      float(&chunk)[kChunk] = tile(thread).x[j];
      const int component = component_of(thread, j);
      if (component < width) {
        load(chunk, row_of(thread), component);
      } else {
        MC_UNROLL
        for (int e = 0; e < kChunk; ++e) chunk[e] = 0.0f;
      }
    }
  });
}

// A run of components to and from a tile [B, pitch] in shared memory; the caller synchronizes.
template <int Chunks, class Block>
MC_HD void tile_to_shared(Block& block, const typename Block::template PerThread<Tile<Chunks>>& tile, float* shared,
                          int pitch, int first, int length) {
  block.each([&](Thread thread) {
    MC_UNROLL
    for (int j = 0; j < Chunks; ++j) {
      const int component = component_of(thread, j);
      if (inside(component, first, length))
        store_chunk(shared + row_of(thread) * pitch + component - first, tile(thread).x[j]);
    }
  });
}

template <int Chunks, class Block>
MC_HD void tile_from_shared(Block& block, typename Block::template PerThread<Tile<Chunks>>& tile, const float* shared,
                            int pitch, int first, int length) {
  block.each([&](Thread thread) {
    MC_UNROLL
    for (int j = 0; j < Chunks; ++j) {
      const int component = component_of(thread, j);
      if (inside(component, first, length))
        load_chunk(tile(thread).x[j], shared + row_of(thread) * pitch + component - first);
    }
  });
}

// Copies bytes (a multiple of 16, both sides aligned) with every thread of the block.
template <class Block>
MC_HD void copy_bytes(Block& block, void* to, const void* from, int bytes) {
  block.each([&](Thread thread) {
    for (int i = 16 * thread.index; i < bytes; i += 16 * Block::kThreads)
      store_as(static_cast<char*>(to) + i, load_as<Bytes16>(static_cast<const char*>(from) + i));
  });
}

}  // namespace minicache
