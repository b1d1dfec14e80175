#include "driver.h"

#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>

namespace mla2dsa {
namespace {

struct Opened {
    Driver functions{};
    bool usable = false;
    char why[512] = "";
};

template <class Function>
bool find(void* library, char const* name, Function& function) noexcept {
    function = reinterpret_cast<Function>(dlsym(library, name));
    return function != nullptr;
}

bool findAll(void* library, Driver& to, char const*& missing) noexcept {
    find(library, "cuGetErrorName", to.getErrorName);
    find(library, "cuFuncLoad", to.funcLoad);
    find(library, "cuCtxGetId", to.ctxGetId);
    // The names without _v2 are older functions with 32-bit sizes.
    return find(library, missing = "cuInit", to.init)
        && find(library, missing = "cuCtxGetCurrent", to.ctxGetCurrent)
        && find(library, missing = "cuCtxGetDevice", to.ctxGetDevice)
        && find(library, missing = "cuDeviceGetAttribute", to.deviceGetAttribute)
        && find(library, missing = "cuModuleLoadData", to.moduleLoadData)
        && find(library, missing = "cuModuleGetFunction", to.moduleGetFunction)
        && find(library, missing = "cuFuncSetAttribute", to.funcSetAttribute)
        && find(library, missing = "cuLaunchKernel", to.launchKernel)
        && find(library, missing = "cuMemcpyDtoDAsync_v2", to.memcpyDtoDAsync);
}

Opened open() noexcept {
    Opened made;
    char const* const named = std::getenv("MLA2DSA_LIBCUDA");
    void* const library = dlopen(named != nullptr ? named : "libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    char const* missing = "";
    if (library == nullptr) {
        char const* const reason = dlerror();
        std::snprintf(made.why, sizeof made.why, "no CUDA driver: %s", reason != nullptr ? reason : "not found");
    } else if (!findAll(library, made.functions, missing)) {
        std::snprintf(made.why, sizeof made.why, "the CUDA driver is too old: it lacks %s", missing);
    } else if (Result const result = made.functions.init(0)) {
        std::snprintf(made.why, sizeof made.why, "the CUDA driver does not start: %s", nameOf(made.functions, result));
    } else {
        made.usable = true;
    }
    return made;
}

}  // namespace

Driver const* driver(char const** why) noexcept {
    static Opened const opened = open();
    if (why != nullptr) *why = opened.why;
    return opened.usable ? &opened.functions : nullptr;
}

char const* nameOf(Driver const& driver, Result result) noexcept {
    char const* name = nullptr;
    if (driver.getErrorName != nullptr && driver.getErrorName(result, &name) == 0 && name != nullptr) return name;
    static thread_local char number[32];
    std::snprintf(number, sizeof number, "CUDA error %d", result);
    return number;
}

}  // namespace mla2dsa
