// Handlers of instructions that use memory or other lanes. Where operands lie in `Instruction::x` is said at each.
#pragma once

#include "machine.h"

namespace emulator {

// Registers x[0 .. count), sizes of number and register in x[8] and x[9], address register x[12]; variant 1: numbers
// extend their sign.
void load(Block& block, Warp& warp, const Instruction& i, std::uint32_t mask);
void store(Block& block, Warp& warp, const Instruction& i, std::uint32_t mask);

// Target x[0] (64 bits with variant bit 1) plus x[2], bytes x[8]; with variant bit 2 only the first x[1] are read.
void copy_async(Block& block, Warp& warp, const Instruction& i, std::uint32_t mask);
void commit_copies(Block& block, Warp& warp, const Instruction& i, std::uint32_t mask);
void wait_copies(Block& block, Warp& warp, const Instruction& i, std::uint32_t mask);  // x[0]: groups that may remain

void warp_barrier(Block& block, Warp& warp, const Instruction& i, std::uint32_t mask);

// x: d, a, b, c; variant 0 bfly, 1 idx, 2 up, 3 down; with bit 4 the predicate in x[4].
void shuffle(Block& block, Warp& warp, const Instruction& i, std::uint32_t mask);

// Matrices of 8 x 8 to x[0 .. count); variant 1: transposed.
void load_matrices(Block& block, Warp& warp, const Instruction& i, std::uint32_t mask);

// m16n8k16, x: d (4), a (4), b (2), c (4) registers.
void multiply_halves(Block& block, Warp& warp, const Instruction& i, std::uint32_t mask);
void multiply_bfloats(Block& block, Warp& warp, const Instruction& i, std::uint32_t mask);

// Generic addresses are host pointers, shared ones count from the block's shared memory, local ones from the thread's.
void from_shared(Block& block, Warp& warp, const Instruction& i, std::uint32_t mask);
void to_shared(Block& block, Warp& warp, const Instruction& i, std::uint32_t mask);
void from_local(Block& block, Warp& warp, const Instruction& i, std::uint32_t mask);
void to_local(Block& block, Warp& warp, const Instruction& i, std::uint32_t mask);

}  // namespace emulator
