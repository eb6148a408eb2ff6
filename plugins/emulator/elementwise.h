// Arithmetic by its PTX name: which handler computes it.
#pragma once

#include "machine.h"
#include "syntax.h"
#include "types.h"

namespace emulator {

// All of these return null for what the emulator cannot do.

// Operands in x[0] and on. Sources have the size of the type.
Handler elementwise(const Statement& statement, Type type);

// Predicates x[0] and, with variant 1, its opposite x[3], from x[1] and x[2].
Handler comparison(const std::string& name, Type type);

// From a register of `held` bytes into one of `width`.
Handler conversion(Type to, Type from, const std::string& rounding, int width, int held);
Handler pair_conversion(Type to);  // f16x2, bf16x2: x[1] becomes the upper half

Handler shift(Type type, bool left);                     // by x[2], of 32 bits
Handler product(const Statement& statement, Type type);  // x[1] x[2] + x[3], with .lo, .hi or .wide
Handler bit_field(Type type, bool inserts);              // positions and lengths of 32 bits
Handler lookup_of_three();                               // lop3: x[4] is the table
Handler selection(Type type);                            // x[1] or x[2], by the predicate x[3]
Handler logic(const std::string& name);                  // of predicates; variant: bits of negated sources

}  // namespace emulator
