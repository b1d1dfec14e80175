// Kernels in the memory of a GPU. Loaded once per CUDA context, however many layers use them.
#pragma once

#include <memory>
#include <vector>

#include "definition.h"
#include "driver.h"

namespace mla2dsa {

// A definition's kernels, ready to launch in one context.
struct Loaded {
    struct Function {
        void* handle = nullptr;  // nullptr: not for this architecture
        unsigned threads = 0;
        unsigned shared = 0;
    };

    Driver const* driver = nullptr;
    unsigned long long context = 0;
    int architecture = 0;
    int units = 0;  // multiprocessors
    std::vector<Function> functions;  // by kernel of the bundle
};

// For the calling thread's current context; `before` is given back where it is still right. Throws Refused: no driver, no
// current context, kernels for other architectures only, what the driver says.
std::shared_ptr<Loaded const> load(Definition const& definition, std::shared_ptr<Loaded const> const& before);

}  // namespace mla2dsa
