// What a program may hold at most; the writer keeps to the same numbers (docs/tensorrt.md).
#pragma once

#include <cstddef>
#include <cstdint>

namespace mla2dsa {

constexpr int kFormatVersion = 1;
constexpr size_t kMaxText = 1 << 20;  // bytes
constexpr int kMaxTensors = 16;       // inputs and outputs together
constexpr int kMaxDims = 8;
constexpr int kMaxForms = 64;
constexpr int kMaxLaunches = 64;  // written in a form
constexpr int kMaxParameters = 64;
constexpr int kMaxStack = 32;
constexpr int kMaxParts = 256;
constexpr int kMaxNames = 4096;           // of a form
constexpr int64_t kMaxLaunched = 65536;   // in one run
constexpr int64_t kMaxGridX = 2147483647;  // CUDA's
constexpr int64_t kMaxGridYZ = 65535;
constexpr int kMaxThreads = 1024;
constexpr int64_t kDivisor = 16;  // what Triton's specialised kernels rely on

}  // namespace mla2dsa
