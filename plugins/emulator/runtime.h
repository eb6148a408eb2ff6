// What tests ask of the emulated CUDA runtime, beside its own functions. C ABI.
#pragma once

#include <cstddef>
#include <cstdint>

#define EMULATOR_API extern "C" __attribute__((visibility("default")))

// Kernels may use these bytes until the next `emulator_allow_all`; with none named, all of the process.
EMULATOR_API void emulator_allow(const void* base, std::size_t bytes);
EMULATOR_API void emulator_allow_all();

// Order in which thread blocks run: 0 first to last, 1 last to first. A GPU promises none.
EMULATOR_API void emulator_reverse(std::int32_t reverse);
// What cudaGetLastError would return to the calling thread, and stays.
EMULATOR_API std::int32_t emulator_last_error();

// What launchers are told of the GPU: multiprocessors, and bytes of shared memory that a thread block may have and that
// a multiprocessor has. Takes three numbers and gives back those before.
EMULATOR_API void emulator_exchange_device(std::int32_t* numbers);

// JSON of what each kernel did since the last reset; valid until the next call.
EMULATOR_API const char* emulator_statistics();
EMULATOR_API void emulator_reset_statistics();
