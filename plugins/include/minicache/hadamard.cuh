// Walsh-Hadamard transform of a segment of a tile: consecutive runs, each the largest power of two that still fits.
#pragma once

#include "minicache/tile.cuh"

namespace minicache {

// Of a positive length.
MC_HD int largest_power(int length) {
#if MC_ON_DEVICE
  return 1 << (31 - __clz(length));
#else
  return 1 << (31 - __builtin_clz(static_cast<unsigned>(length)));
#endif
}

// Length of the run that component `place` of a segment of `length` components lies in.
MC_HD int run_length(int length, int place) {
  int run = largest_power(length);
  MC_NO_UNROLL
  while (place >= run) {
    place -= run;
    length -= run;
    run = largest_power(length);
  }
  return run;
}

// 1 / sqrt of a run's length, 16 to 256.
MC_HD float hadamard_scale(int run) {
  // An even power of two has an exact root.
  const bool even = (run & 0x155) != 0;
  return (even ? 1.0f : 0.70710678118654752f) * (run >= 256 ? 0.0625f : run >= 64 ? 0.125f : 0.25f);
}

// A stage's number: the sum at the pair's lower place, the difference at the upper one.
MC_HD float butterfly(float own, float other, bool upper) { return upper ? add(other, -own) : add(own, other); }

template <int Chunks, class Block>
struct Hadamard {
  using Tiles = typename Block::template PerThread<Tile<Chunks>>;

  Block& block;
  Tiles& tile;
  int first, length;

  // Whether the pairs of every stage lie in one thread or in neighbouring lanes.
  MC_HD bool fits_registers() const { return first % largest_power(length) == 0; }

  // Stages of distance 1, 2 and 4, inside chunks.
  MC_HD void in_chunks() {
    block.each([&](Thread thread) {
      MC_UNROLL
      for (int j = 0; j < Chunks; ++j) {
        if (!inside(component_of(thread, j), first, length)) continue;
        float(&x)[kChunk] = tile(thread).x[j];
        MC_UNROLL
        for (int half = 1; half < kChunk; half *= 2) {
          MC_UNROLL
          for (int e = 0; e < kChunk; ++e) {
            if (e & half) continue;
            const float low = x[e], high = x[e + half];
            x[e] = add(low, high);
            x[e + half] = add(low, -high);
          }
        }
      }
    });
  }

  // The stage of distance 8 (mask 1) or 16 (mask 2), between lanes.
  MC_HD void between_lanes(int mask) {
    typename Block::template PerThread<float> own, other;
    typename Block::template PerThread<bool> active;
    MC_UNROLL
    for (int j = 0; j < Chunks; ++j) {
      block.each([&](Thread thread) {
        const int component = component_of(thread, j);
        active(thread) = inside(component, first, length) && run_length(length, component - first) > kChunk * mask;
      });
      MC_UNROLL
      for (int e = 0; e < kChunk; ++e) {
        block.each([&](Thread thread) { own(thread) = tile(thread).x[j][e]; });
        block.shuffle_xor(other, own, mask);
        block.each([&](Thread thread) {
          if (active(thread)) tile(thread).x[j][e] = butterfly(own(thread), other(thread), thread.index & mask);
        });
      }
    }
  }

  // The stage of distance 32 * Mask, between a thread's own chunks.
  template <int Mask>
  MC_HD void between_chunks() {
    block.each([&](Thread thread) {
      MC_UNROLL
      for (int j = 0; j + Mask < Chunks; ++j) {
        const int component = component_of(thread, j);
        if ((j & Mask) || !inside(component, first, length)) continue;
        if (run_length(length, component - first) <= 32 * Mask) continue;
        MC_UNROLL
        for (int e = 0; e < kChunk; ++e) {
          const float low = tile(thread).x[j][e], high = tile(thread).x[j + Mask][e];
          tile(thread).x[j][e] = add(low, high);
          tile(thread).x[j + Mask][e] = add(low, -high);
        }
      }
    });
  }

  MC_HD void scale() {
    block.each([&](Thread thread) {
      MC_UNROLL
      for (int j = 0; j < Chunks; ++j) {
        const int component = component_of(thread, j);
        if (!inside(component, first, length)) continue;
        const float factor = hadamard_scale(run_length(length, component - first));
        MC_UNROLL
        for (int e = 0; e < kChunk; ++e) tile(thread).x[j][e] = multiply(tile(thread).x[j][e], factor);
      }
    });
  }

  // Stages of distance 8 and more in shared memory, a tile [B, pitch].
  MC_HD void in_shared(float* shared, int pitch) {
    block.sync();
    tile_to_shared<Chunks>(block, tile, shared, pitch, first, length);
    const int pairs = length / 2, largest = largest_power(length);
    for (int half = kChunk; half < largest; half *= 2) {
      block.sync();
      block.each([&](Thread thread) {
        for (int i = thread.index; i < kBlockSize * pairs; i += kTileThreads) {
          const int row = i / pairs, pair = i % pairs, place = pair / half * 2 * half + pair % half;
          if (run_length(length, place) <= half) continue;
          float* low = shared + row * pitch + place;
          const float a = low[0], b = low[half];
          low[0] = add(a, b);
          low[half] = add(a, -b);
        }
      });
    }
    block.sync();
    tile_from_shared<Chunks>(block, tile, shared, pitch, first, length);
  }
};

// Transforms components [first, first + length). `shared` [B, pitch] is used where a run does not begin at a multiple
// of its length.
template <int Chunks, class Block>
MC_HD void hadamard(Block& block, typename Block::template PerThread<Tile<Chunks>>& tile, int first, int length,
                    float* shared, int pitch) {
  Hadamard<Chunks, Block> transform{block, tile, first, length};
  transform.in_chunks();
  if (transform.fits_registers()) {
    transform.between_lanes(1);
    if (length >= 32) transform.between_lanes(2);
    transform.template between_chunks<1>();
    transform.template between_chunks<2>();
    transform.template between_chunks<4>();
  } else {
    transform.in_shared(shared, pitch);
  }
  transform.scale();
}

// Whether a stream's transforms need a tile in shared memory.
MC_HD bool hadamard_needs_shared(const StreamShape& shape) {
  for (int i = 0; i < shape.segments; ++i) {
    const Segment& segment = shape.segment[i];
    if (segment.hadamard && segment.format != Format::drop && segment.component % largest_power(segment.length) != 0)
      return true;
  }
  return false;
}

}  // namespace minicache
