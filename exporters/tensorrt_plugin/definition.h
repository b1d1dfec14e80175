// What one plugin does: program and kernels that fit each other. Layers with the same fields share one of these.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "bundle.h"
#include "program.h"

namespace mla2dsa {

struct KernelBytes {
    std::string bytes;
    Bundle bundle;  // points into bytes
};

struct Definition {
    std::string text;
    Program program;
    std::shared_ptr<KernelBytes const> kernels;

    Kernel const& kernel(Launch const& launch) const noexcept {
        return kernels->bundle.kernels[static_cast<size_t>(launch.index)];
    }
    std::vector<int> architectures() const;  // of all forms, ascending
};

// Of the plugin `op`, from its two fields (each may end with the NUL of the ONNX parser). Throws Refused.
std::shared_ptr<Definition const> define(std::string_view op, std::string_view program, std::string_view kernels);

}  // namespace mla2dsa
