// The CUDA driver, opened when it is first needed: loading this library and building engines work without one.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mla2dsa {

using Result = int;  // CUresult: 0 is success
using DevicePointer = unsigned long long;

// The entry points that are used, by the names of cuda.h.
struct Driver {
    Result (*init)(unsigned);
    Result (*ctxGetCurrent)(void**);
    Result (*ctxGetDevice)(int*);
    Result (*deviceGetAttribute)(int*, int, int);
    Result (*moduleLoadData)(void**, void const*);
    Result (*moduleGetFunction)(void**, void*, char const*);
    Result (*funcSetAttribute)(void*, int, int);
    Result (*launchKernel)(
        void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**);
    Result (*memcpyDtoDAsync)(DevicePointer, DevicePointer, size_t, void*);
    Result (*getErrorName)(Result, char const**);             // may be missing
    Result (*funcLoad)(void*);                                // may be missing: CUDA 12.4
    Result (*ctxGetId)(void*, unsigned long long*);           // may be missing: CUDA 12.0
};

// libcuda.so.1, or what the environment's MLA2DSA_LIBCUDA names. nullptr without a driver (it is looked for once);
// `why` then says in one line why, and lives as long as the process.
Driver const* driver(char const** why = nullptr) noexcept;

// CUDA's name of an error, as CUDA_ERROR_OUT_OF_MEMORY.
char const* nameOf(Driver const& driver, Result result) noexcept;

}  // namespace mla2dsa
