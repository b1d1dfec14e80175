// The part of the CUDA runtime that examples/deploy/run_engine.cpp uses, on the host's memory: for tests without a GPU.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <cstring>

enum cudaError_t { cudaSuccess = 0, cudaErrorMemoryAllocation = 2 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2 };
using cudaStream_t = void*;

inline char const* cudaGetErrorString(cudaError_t) { return "out of memory"; }
inline cudaError_t cudaMalloc(void** made, size_t bytes) {
    *made = std::malloc(bytes);
    if (*made != nullptr) std::memset(*made, 0xff, bytes);
    return *made != nullptr ? cudaSuccess : cudaErrorMemoryAllocation;
}
inline cudaError_t cudaFree(void* memory) {
    std::free(memory);
    return cudaSuccess;
}
inline cudaError_t cudaMemset(void* memory, int byte, size_t count) {
    std::memset(memory, byte, count);
    return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, void const* from, size_t count, cudaMemcpyKind, cudaStream_t) {
    std::memcpy(to, from, count);
    return cudaSuccess;
}
inline cudaError_t cudaStreamCreate(cudaStream_t* made) {
    *made = nullptr;
    return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
