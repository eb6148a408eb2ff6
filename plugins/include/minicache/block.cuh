// One thread block, written once: on a GPU its threads run side by side, in the host build one after another.
//
// A kernel is a struct with `static constexpr int kThreads` and
//
//     template <class Block> MC_HD static void run(Block& block, const Arguments& arguments);
//
// Its body alternates `block.each([&](Thread thread) { ... })`, what every thread does on its own, with collectives
// (`sync`, shuffles, reductions, matrix products), which every thread of the block (or warp) reaches. What a thread
// keeps between two of them lives in a `Block::PerThread<T>`: registers on a GPU, an array on the host. On the host
// `each` ends before the next one begins, so a missing `sync` is not seen there: run the race checker on a GPU.
#pragma once

#include "minicache/platform.cuh"

#if !defined(__CUDACC__)
#include <vector>
#endif

namespace minicache {

constexpr int kWarp = 32;

struct Thread {
  int index;
  MC_HD int lane() const { return index % kWarp; }
  MC_HD int warp() const { return index / kWarp; }
};

// A thread of which the compiler knows nothing: what is derived from it is worked out again where it would otherwise stay
// in registers throughout a loop.
MC_HD Thread forgotten(Thread thread) {
#if MC_ON_DEVICE
  asm volatile("" : "+r"(thread.index));
#endif
  return thread;
}

// An address of which the compiler knows nothing: what is added to it later is added to the whole.
MC_HD const char* forgotten(const char* address) {
#if MC_ON_DEVICE
  asm volatile("" : "+l"(address));
#endif
  return address;
}

struct Grid {
  int x = 1, y = 1, z = 1;
};

// Operands of a 16 x 8 x 16 product D += A B, as the tensor cores hold them. With g = lane / 4, t = lane % 4:
//   A (16 x 16, rows of D): x[2 j + i] = A[g + 8 (j % 2)][2 t + 8 (j / 2) + i],  j = 0..3, i = 0..1
//   B (16 x 8):             x[2 j + i] = B[2 t + 8 j + i][g],                    j = 0..1, i = 0..1
//   D (16 x 8, float):      x[2 j + i] = D[g + 8 j][2 t + i],                    j = 0..1, i = 0..1
template <class T>
struct alignas(16) FragmentA {
  T x[8];
};
template <class T>
struct alignas(8) FragmentB {
  T x[4];
};
struct FragmentD {
  float x[4];
};

#if defined(__CUDACC__)

template <int Threads>
struct CudaBlock {
  static constexpr int kThreads = Threads;

  template <class T>
  struct PerThread {
    T value;
    __device__ __forceinline__ T& operator()(Thread) { return value; }
    __device__ __forceinline__ const T& operator()(Thread) const { return value; }
  };

  char* shared;

  __device__ __forceinline__ int x() const { return blockIdx.x; }
  __device__ __forceinline__ int y() const { return blockIdx.y; }
  __device__ __forceinline__ int z() const { return blockIdx.z; }

  template <class F>
  __device__ __forceinline__ void each(F f) {
    f(Thread{static_cast<int>(threadIdx.x)});
  }

  // A condition all threads of a warp agree on: the calling warp's answer; on the host, whether any warp says yes.
  // Collectives of a warp may follow under it; threads of warps that said no then take part without an effect.
  template <class F>
  __device__ __forceinline__ bool any_warp(F condition) {
    return condition(Thread{static_cast<int>(threadIdx.x)});
  }

  __device__ __forceinline__ void sync() { __syncthreads(); }
  __device__ __forceinline__ void sync_warp() { __syncwarp(); }

  // Every lane gets the sum (maximum) over its group of `Width` neighbouring lanes, the same bits in each.
  template <int Width>
  __device__ __forceinline__ void reduce_add(PerThread<float>& x) {
    MC_UNROLL
    for (int mask = Width / 2; mask > 0; mask /= 2) x.value += __shfl_xor_sync(0xffffffffu, x.value, mask);
  }
  template <int Width>
  __device__ __forceinline__ void reduce_max(PerThread<float>& x) {
    MC_UNROLL
    for (int mask = Width / 2; mask > 0; mask /= 2) x.value = fmaxf(x.value, __shfl_xor_sync(0xffffffffu, x.value, mask));
  }
  // out of a lane: x of lane ^ mask.
  template <class T>
  __device__ __forceinline__ void shuffle_xor(PerThread<T>& out, const PerThread<T>& x, int mask) {
    out.value = __shfl_xor_sync(0xffffffffu, x.value, mask);
  }
  // out of a lane: x of lane `from(thread)` of the same warp.
  template <class T, class F>
  __device__ __forceinline__ void shuffle(PerThread<T>& out, const PerThread<T>& x, F from) {
    out.value = __shfl_sync(0xffffffffu, x.value, from(Thread{static_cast<int>(threadIdx.x)}));
  }

  // Asynchronous copy of 16 bytes (both sides aligned) to shared memory; zeros where `valid` is false.
  __device__ __forceinline__ static void copy_async(void* target, const void* source, bool valid = true) {
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(target));
    const int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(source), "r"(bytes));
  }
  // The same from and to places behind the given ones.
  template <int Target, int Source>
  __device__ __forceinline__ static void copy_async_at(void* target, const void* source) {
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(target));
    asm volatile("cp.async.cg.shared.global [%0 + %2], [%1 + %3], 16;" ::"r"(address), "l"(source), "n"(Target),
                 "n"(Source));
  }
  __device__ __forceinline__ static void commit_async() { asm volatile("cp.async.commit_group;"); }
  // Waits until at most `Pending` of the thread's latest groups are under way; other threads see the data after `sync`.
  template <int Pending>
  __device__ __forceinline__ static void wait_async() {
    asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
  }

  // Four 8 x 8 matrices of 16-bit numbers from shared memory; lane l points to row l % 8 of matrix l / 8.
  // x[2 j + i]: matrix j, row lane / 4, column 2 (lane % 4) + i; transposed: row 2 (lane % 4) + i, column lane / 4.
  template <bool Transposed, class T, class F>
  __device__ __forceinline__ void load_matrices(PerThread<FragmentA<T>>& out, F row) {
    static_assert(sizeof(T) == 2, "tensor cores take 16-bit numbers here");
    const unsigned address =
        static_cast<unsigned>(__cvta_generic_to_shared(row(Thread{static_cast<int>(threadIdx.x)})));
    std::uint32_t* r = reinterpret_cast<std::uint32_t*>(out.value.x);
    if constexpr (Transposed) {
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                   : "r"(address));
    } else {
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                   : "r"(address));
    }
  }

  // d += a b on the tensor cores, float accumulators,
  template <class T>
  __device__ __forceinline__ void multiply_add(PerThread<FragmentD>& d, const PerThread<FragmentA<T>>& a,
                                               const PerThread<FragmentB<T>>& b) {
    product(d.value, a.value, b.value, d.value);
  }
  // and d = a b + c.
  template <class T>
  __device__ __forceinline__ void multiply_add(PerThread<FragmentD>& d, const PerThread<FragmentA<T>>& a,
                                               const PerThread<FragmentB<T>>& b, const PerThread<FragmentD>& c) {
    product(d.value, a.value, b.value, c.value);
  }

 private:
#define MC_PRODUCT(type)                                                                                     \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                                        \
               ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"                              \
               : "=f"(d.x[0]), "=f"(d.x[1]), "=f"(d.x[2]), "=f"(d.x[3])                                      \
               : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(y[0]), "r"(y[1]), "f"(c.x[0]), "f"(c.x[1]), \
                 "f"(c.x[2]), "f"(c.x[3]))
  template <class T>
  __device__ __forceinline__ static void product(FragmentD& d, const FragmentA<T>& a, const FragmentB<T>& b,
                                                 const FragmentD& c) {
    const std::uint32_t* x = reinterpret_cast<const std::uint32_t*>(a.x);
    const std::uint32_t* y = reinterpret_cast<const std::uint32_t*>(b.x);
    if constexpr (std::is_same_v<T, Half>) {
      MC_PRODUCT("f16");
    } else {
      MC_PRODUCT("bf16");
    }
  }
#undef MC_PRODUCT
};

// Thread blocks a multiprocessor should have room for: `kMinBlocks` of a kernel that says so. Bounds its registers.
template <class Kernel, class = void>
struct MinBlocks {
  static constexpr int value = 1;
};
template <class Kernel>
struct MinBlocks<Kernel, decltype(static_cast<void>(Kernel::kMinBlocks))> {
  static constexpr int value = Kernel::kMinBlocks;
};

// Entry point of a kernel.
template <class Kernel, class Arguments>
__global__ void __launch_bounds__(Kernel::kThreads, MinBlocks<Kernel>::value) enter(const __grid_constant__ Arguments arguments) {
  extern __shared__ __align__(128) char shared[];
  CudaBlock<Kernel::kThreads> block{shared};
  Kernel::run(block, arguments);
}

// Launch on a stream; `shared` is the dynamic shared memory of a block in bytes.
template <class Kernel, class Arguments>
cudaError_t launch(Grid grid, int shared, const Arguments& arguments, cudaStream_t stream) {
  const auto* const entry = reinterpret_cast<const void*>(enter<Kernel, Arguments>);
  cudaError_t error = cudaSuccess;
  if (shared > 48 * 1024) error = cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error == cudaSuccess) {
    void* values[] = {const_cast<Arguments*>(&arguments)};
    error = cudaLaunchKernel(entry, dim3(grid.x, grid.y, grid.z), dim3(Kernel::kThreads), values, shared, stream);
  }
  if (error != cudaSuccess) cudaGetLastError();  // this is its report: who launches next is not to find it
  return error;
}

#else

template <int Threads>
struct HostBlock {
  static constexpr int kThreads = Threads;

  template <class T>
  struct PerThread {
    T values[Threads];
    T& operator()(Thread thread) { return values[thread.index]; }
    const T& operator()(Thread thread) const { return values[thread.index]; }
  };

  char* shared;
  Grid place;

  int x() const { return place.x; }
  int y() const { return place.y; }
  int z() const { return place.z; }

  template <class F>
  void each(F f) {
    for (int i = 0; i < Threads; ++i) f(Thread{i});
  }

  template <class F>
  bool any_warp(F condition) {
    bool result = false;
    for (int i = 0; i < Threads; i += kWarp) result = result || condition(Thread{i});
    return result;
  }

  void sync() {}
  void sync_warp() {}

  template <int Width>
  void reduce_add(PerThread<float>& x) {
    for (int mask = Width / 2; mask > 0; mask /= 2) {
      const PerThread<float> old = x;
      for (int i = 0; i < Threads; ++i) x.values[i] = old.values[i] + old.values[i ^ mask];
    }
  }
  template <int Width>
  void reduce_max(PerThread<float>& x) {
    for (int mask = Width / 2; mask > 0; mask /= 2) {
      const PerThread<float> old = x;
      for (int i = 0; i < Threads; ++i) x.values[i] = maximum(old.values[i], old.values[i ^ mask]);
    }
  }
  template <class T>
  void shuffle_xor(PerThread<T>& out, const PerThread<T>& x, int mask) {
    const PerThread<T> old = x;
    for (int i = 0; i < Threads; ++i) out.values[i] = old.values[i ^ mask];
  }
  template <class T, class F>
  void shuffle(PerThread<T>& out, const PerThread<T>& x, F from) {
    const PerThread<T> old = x;
    for (int i = 0; i < Threads; ++i) out.values[i] = old.values[i / kWarp * kWarp + from(Thread{i}) % kWarp];
  }

  static void copy_async(void* target, const void* source, bool valid = true) {
    if (valid) {
      std::memcpy(target, source, 16);
    } else {
      std::memset(target, 0, 16);
    }
  }
  template <int Target, int Source>
  static void copy_async_at(void* target, const void* source) {
    copy_async(static_cast<char*>(target) + Target, static_cast<const char*>(source) + Source);
  }
  static void commit_async() {}
  template <int Pending>
  static void wait_async() {}

  template <bool Transposed, class T, class F>
  void load_matrices(PerThread<FragmentA<T>>& out, F row) {
    for (int i = 0; i < Threads; ++i) {
      const int warp = i / kWarp * kWarp, g = i % kWarp / 4, t = i % 4;
      for (int j = 0; j < 4; ++j) {
        for (int k = 0; k < 2; ++k) {
          const int r = Transposed ? 2 * t + k : g, c = Transposed ? g : 2 * t + k;
          out.values[i].x[2 * j + k] = static_cast<const T*>(row(Thread{warp + 8 * j + r}))[c];
        }
      }
    }
  }

  template <class T>
  void multiply_add(PerThread<FragmentD>& d, const PerThread<FragmentA<T>>& a, const PerThread<FragmentB<T>>& b) {
    multiply_add(d, a, b, d);
  }
  template <class T>
  void multiply_add(PerThread<FragmentD>& d, const PerThread<FragmentA<T>>& a, const PerThread<FragmentB<T>>& b,
                    const PerThread<FragmentD>& c) {
    for (int warp = 0; warp < Threads; warp += kWarp) {
      float left[16][16], right[16][8];
      for (int lane = 0; lane < kWarp; ++lane) {
        const int g = lane / 4, t = lane % 4;
        for (int j = 0; j < 4; ++j) {
          for (int i = 0; i < 2; ++i) {
            left[g + 8 * (j % 2)][2 * t + 8 * (j / 2) + i] = to_float(a.values[warp + lane].x[2 * j + i]);
            if (j < 2) right[2 * t + 8 * j + i][g] = to_float(b.values[warp + lane].x[2 * j + i]);
          }
        }
      }
      for (int lane = 0; lane < kWarp; ++lane) {
        const int g = lane / 4, t = lane % 4;
        for (int j = 0; j < 2; ++j) {
          for (int i = 0; i < 2; ++i) {
            float sum = c.values[warp + lane].x[2 * j + i];
            for (int k = 0; k < 16; ++k) sum += left[g + 8 * j][k] * right[k][2 * t + i];
            d.values[warp + lane].x[2 * j + i] = sum;
          }
        }
      }
    }
  }
};

// Runs every block of the grid, one after another; shared memory starts with a poison value, as it may on a GPU.
template <class Kernel, class Arguments>
void launch(Grid grid, int shared, const Arguments& arguments) {
  std::vector<char> memory(static_cast<std::size_t>(shared) + 128);
  char* base = memory.data() + (128 - reinterpret_cast<std::uintptr_t>(memory.data()) % 128);
  for (int z = 0; z < grid.z; ++z) {
    for (int y = 0; y < grid.y; ++y) {
      for (int x = 0; x < grid.x; ++x) {
        std::memset(base, 0xff, shared);
        HostBlock<Kernel::kThreads> block{base, Grid{x, y, z}};
        Kernel::run(block, arguments);
      }
    }
  }
}

#endif

}  // namespace minicache
