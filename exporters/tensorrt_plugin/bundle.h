// The field `kernels`: machine code by kernel and architecture. Everything here points into the field's bytes.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace mla2dsa {

struct Binary {
    int architecture = 0;
    uint32_t threads = 0;  // of a block
    uint32_t shared = 0;   // bytes of dynamic shared memory
    std::string entry;     // function in the cubin
    std::string_view cubin;
};

struct Kernel {
    std::string name;
    std::string parameters;   // a letter each: p i l f n
    std::vector<bool> aligned;  // by parameter: divisible by 16
    std::vector<Binary> binaries;

    Binary const* binary(int architecture) const noexcept;
};

struct Bundle {
    std::vector<Kernel> kernels;

    int find(std::string_view name) const noexcept;  // -1: no such kernel
};

// bytes: without a NUL at the end. Throws Refused. `bytes` has to outlive the bundle.
Bundle readBundle(std::string_view bytes);

// The field as TensorRT gives it, without the NUL that its ONNX parser adds. The size is in the field.
std::string_view trimBundle(std::string_view bytes) noexcept;

}  // namespace mla2dsa
