// From the statements of a kernel to instructions with a function each.
#pragma once

#include <memory>

#include "machine.h"
#include "syntax.h"

namespace emulator {

// Keeps pointers into `kernel`. `constants`: addresses of the module's global variables by name.
// Throws UnsupportedPtx.
std::unique_ptr<Program> decode(const KernelText& kernel, const ModuleText& module,
                                const std::map<std::string, const char*>& constants);

}  // namespace emulator
