// What the emulator itself is tested with: kernels whose results a test computes too, and kernels with one defect each.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "minicache/elementary.cuh"

namespace {

using u32 = std::uint32_t;
using u64 = unsigned long long;

// ---- arithmetic: thread i writes number n of its results to out[n][i] ----

__global__ void integers(const u32* a, const u32* b, const u32* c, u32* out, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const u32 x = a[i], y = b[i], z = c[i];
  const int sx = static_cast<int>(x), sy = static_cast<int>(y);
  int n = 0;
  auto put = [&](u32 value) { out[n++ * count + i] = value; };
  u32 r;
  put(x + y);
  put(x - y);
  put(x * y + z);
  put(__umulhi(x, y));
  put(static_cast<u32>(__mulhi(sx, sy)));
  put(y == 0 ? 0 : x / y);
  put(y == 0 ? 0 : x % y);
  put(sy == 0 || sy == -1 ? 0 : static_cast<u32>(sx / sy));
  put(sy == 0 || sy == -1 ? 0 : static_cast<u32>(sx % sy));
  put(static_cast<u32>(min(sx, sy)));
  put(max(x, y));
  asm("shl.b32 %0, %1, %2;" : "=r"(r) : "r"(x), "r"(y % 40));
  put(r);
  asm("shr.u32 %0, %1, %2;" : "=r"(r) : "r"(x), "r"(y % 40));
  put(r);
  asm("shr.s32 %0, %1, %2;" : "=r"(r) : "r"(x), "r"(y % 40));
  put(r);
  asm("lop3.b32 %0, %1, %2, %3, 0xca;" : "=r"(r) : "r"(x), "r"(y), "r"(z));  // x ? y : z, bit by bit
  put(r);
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(x), "r"(y), "r"(z));
  put(r);
  asm("bfi.b32 %0, %1, %2, %3, %4;" : "=r"(r) : "r"(x), "r"(y), "r"(z % 32), "r"(z / 32 % 33));
  put(r);
  asm("bfe.u32 %0, %1, %2, %3;" : "=r"(r) : "r"(x), "r"(z % 32), "r"(z / 32 % 33));
  put(r);
  asm("bfe.s32 %0, %1, %2, %3;" : "=r"(r) : "r"(x), "r"(z % 32), "r"(z / 32 % 33));
  put(r);
  put(static_cast<u32>(__clz(sx)));
  put(static_cast<u32>(__popc(x)));
  const u64 wide = static_cast<u64>(x) * y + z;
  put(static_cast<u32>(wide));
  put(static_cast<u32>(wide >> 32));
  put(static_cast<u32>(static_cast<int>(static_cast<signed char>(x)) + static_cast<short>(y)));
}

__global__ void floats(const float* a, const float* b, const float* c, float* out, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const float x = a[i], y = b[i], z = c[i];
  int n = 0;
  auto put = [&](float value) { out[n++ * count + i] = value; };
  put(__fadd_rn(x, y));
  put(__fmul_rn(x, y));
  put(__fmaf_rn(x, y, z));
  put(__fdiv_rn(x, y));
  put(__fsqrt_rn(fabsf(x)));
  put(__frcp_rn(y));
  float approximate;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(approximate) : "f"(y));
  put(approximate);
  put(fminf(x, y));
  put(fmaxf(x, y));
  put(copysignf(x, y));
  put(exp2f(fminf(fmaxf(x, -100.0f), 100.0f)));
  put(rintf(x));
  put(static_cast<float>(__float2int_rz(x)));
  put(static_cast<float>(__float2uint_rn(x)));
  put(__half2float(__float2half_rn(x)));
  put(__bfloat162float(__float2bfloat16_rn(x)));
  const __half2 sum = __hfma2(__floats2half2_rn(x, y), __floats2half2_rn(y, z), __floats2half2_rn(z, x));
  put(__low2float(sum));
  put(__high2float(sum));
  const __half2 negative = __hneg2(__floats2half2_rn(x, y));
  put(__low2float(negative));
  put(__high2float(negative));
  put(static_cast<float>(static_cast<double>(x) * y));
  put(x < y ? 1.0f : 0.0f);
  put(!(x >= y) ? 1.0f : 0.0f);
  put(x == y ? 1.0f : 0.0f);
  put(x != y ? 1.0f : 0.0f);
}

// out[2][count]: sines, cosines.
__global__ void angles(const float* in, float* out, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) minicache::sine_and_cosine_approximate(in[i], out[i], out[count + i]);
}

// ---- warps ----

// out[4][32]: lane ^ 5, lane 3 of each eighth, one down, two up.
__global__ void shuffles(u32* out) {
  const u32 lane = threadIdx.x;
  out[lane] = __shfl_xor_sync(~0u, lane * 10, 5);
  out[32 + lane] = __shfl_sync(~0u, lane * 10, 3, 8);
  out[64 + lane] = __shfl_down_sync(~0u, lane * 10, 1);
  out[96 + lane] = __shfl_up_sync(~0u, lane * 10, 2);
}

// Steps of Collatz from each thread's number on: loops of different lengths, then a shuffle of all.
__global__ void diverging(const u32* in, u32* steps, u32* neighbours) {
  const int lane = threadIdx.x;
  u32 x = in[lane], count = 0;
  while (x != 1) {
    if (x % 2 == 0) {
      x /= 2;
    } else {
      x = 3 * x + 1;
    }
    ++count;
  }
  steps[lane] = count;
  neighbours[lane] = __shfl_xor_sync(~0u, count, 1);
}

// d [16][8] = a [16][16] b [16][8] + c, by way of shared memory and ldmatrix; b is stored by rows.
template <class T>
__global__ void product(const T* a, const T* b, const float* c, float* d) {
  __shared__ __align__(16) T left[16 * 16], right[16 * 8];
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  for (int i = lane; i < 256; i += 32) left[i] = a[i];
  for (int i = lane; i < 128; i += 32) right[i] = b[i];
  __syncwarp();
  u32 x[4], y[2];
  const u32 from = static_cast<u32>(__cvta_generic_to_shared(left + lane % 16 * 16 + lane / 16 * 8));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(from));
  const u32 other = static_cast<u32>(__cvta_generic_to_shared(right + lane % 16 * 8));
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];" : "=r"(y[0]), "=r"(y[1]) : "r"(other));
  float z[4];
  for (int i = 0; i < 4; ++i) z[i] = c[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2];
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(z[0]), "+f"(z[1]), "+f"(z[2]), "+f"(z[3])
        : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(y[0]), "r"(y[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(z[0]), "+f"(z[1]), "+f"(z[2]), "+f"(z[3])
        : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(y[0]), "r"(y[1]));
  }
  for (int i = 0; i < 4; ++i) d[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = z[i];
}

// ---- one defect each; `defect` chooses, `mend` leaves it out ----

enum Defect : int {
  race,
  write_race,
  warp_race,
  unwritten,
  unwaited,
  never_waited,
  overrun,
  misaligned,
  outside,
  lost_lanes,
  half_barrier,
  defects
};

__device__ void copy_async(void* target, const void* source) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<u32>(__cvta_generic_to_shared(target))),
               "l"(source));
}

__global__ void with_defect(int defect, bool mend, const u32* in, u32* out) {
  __shared__ __align__(16) u32 shared[256];
  const int i = threadIdx.x;
  switch (defect) {
    case race:  // a neighbour of another warp reads before a barrier
      shared[i] = in[i];
      if (mend) __syncthreads();
      if (i >= 32) out[i] = shared[i - 32];
      break;
    case write_race:  // a warp writes what the other may still have to read
      shared[i] = in[i];
      __syncthreads();
      out[i] = shared[(i + 32) % 64];
      if (mend) __syncthreads();
      shared[i] = 0;
      break;
    case warp_race:  // lanes of one warp, which need not run in step
      shared[i] = in[i];
      if (mend) __syncwarp();
      out[i] = shared[i ^ 1];
      break;
    case unwritten:
      if (mend || i < 60) shared[i] = in[i];
      __syncthreads();
      out[i] = shared[63 - i];
      break;
    case unwaited:
      if (i < 16) copy_async(shared + 4 * i, in + 4 * i);
      asm volatile("cp.async.commit_group;");
      if (mend) asm volatile("cp.async.wait_group 0;" ::: "memory");
      __syncthreads();
      out[i] = shared[i];
      asm volatile("cp.async.wait_group 0;" ::: "memory");
      break;
    case never_waited:
      if (i < 16) copy_async(shared + 4 * i, in + 4 * i);
      asm volatile("cp.async.commit_group;");
      if (mend) asm volatile("cp.async.wait_group 0;" ::: "memory");
      out[i] = in[i];
      break;
    case overrun:
      shared[i + (mend ? 0 : 200)] = in[i];
      out[i] = in[i];
      break;
    case misaligned: {
      const u32* from = in + (mend ? 4 : 1) * (i / 32);
      const uint4 x = *reinterpret_cast<const uint4*>(from);
      out[i] = x.x + x.y + x.z + x.w;
      break;
    }
    case outside:
      out[i] = in[i + (mend ? 0 : 1)];
      break;
    case lost_lanes:  // half of a warp is gone when the shuffle asks for all
      if (!mend && i % 32 >= 16) return;
      out[i] = __shfl_xor_sync(~0u, in[i], 1);
      break;
    default:  // half_barrier: the second warp waits for a lane that waits for it
      if (mend || i != 40) __syncthreads();
      if (i == 40 && !mend) out[40] = __shfl_sync(~0u, in[40], 0);
      out[i] = in[i];
  }
}

}  // namespace

#define CASES_API extern "C" __attribute__((visibility("default")))

namespace {

const char* finish() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

// Null, or what went wrong.
CASES_API const char* cases_integers(const u32* a, const u32* b, const u32* c, u32* out, int count) {
  integers<<<(count + 95) / 96, 96>>>(a, b, c, out, count);
  return finish();
}
CASES_API const char* cases_floats(const float* a, const float* b, const float* c, float* out, int count) {
  floats<<<(count + 95) / 96, 96>>>(a, b, c, out, count);
  return finish();
}
CASES_API const char* cases_angles(const float* in, float* out, int count) {
  angles<<<(count + 95) / 96, 96>>>(in, out, count);
  return finish();
}
CASES_API const char* cases_shuffles(u32* out) {
  shuffles<<<1, 32>>>(out);
  return finish();
}
CASES_API const char* cases_diverging(const u32* in, u32* steps, u32* neighbours) {
  diverging<<<1, 32>>>(in, steps, neighbours);
  return finish();
}
CASES_API const char* cases_product(int bfloat16, const void* a, const void* b, const float* c, float* d) {
  if (bfloat16) {
    product<<<1, 32>>>(static_cast<const __nv_bfloat16*>(a), static_cast<const __nv_bfloat16*>(b), c, d);
  } else {
    product<<<1, 32>>>(static_cast<const __half*>(a), static_cast<const __half*>(b), c, d);
  }
  return finish();
}
CASES_API const char* cases_defect(int defect, int mend, const u32* in, u32* out) {
  with_defect<<<1, 64>>>(defect, mend != 0, in, out);
  return finish();
}
// Launches with more threads, shared memory or blocks than a GPU takes.
CASES_API const char* cases_launch(int blocks, int threads, int shared) {
  shuffles<<<dim3(1, blocks), threads, shared>>>(nullptr);
  return finish();
}
