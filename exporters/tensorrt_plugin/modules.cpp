#include "modules.h"

#include <functional>
#include <mutex>
#include <string>
#include <unordered_map>

#include "errors.h"
#include "text.h"

namespace mla2dsa {
namespace {

constexpr int kMultiprocessors = 16;  // CU_DEVICE_ATTRIBUTE_*
constexpr int kMajor = 75;
constexpr int kMinor = 76;
constexpr int kMaxDynamicShared = 8;  // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
constexpr unsigned kSharedWithoutAsking = 48 * 1024;

struct Module {
    unsigned long long context;
    std::string_view cubin;
    std::shared_ptr<KernelBytes const> owner;  // of the cubin's bytes
    void* handle;
    std::unordered_map<std::string, void*> functions;
};

// Modules stay loaded: the driver removes them with their context, and an engine that comes back finds them.
struct Cache {
    std::mutex mutex;
    std::unordered_multimap<size_t, Module> modules;
};

Cache& cache() {
    static auto* const made = new Cache();  // never destroyed: a host may end while its threads still run
    return *made;
}

void check(Driver const& driver, Result result, char const* what, std::string const& kernel) {
    if (result == 0) return;
    if (kernel.empty()) refuse("%s: %s", what, nameOf(driver, result));
    refuse("%s of kernel %s: %s", what, Shown(kernel).text, nameOf(driver, result));
}

Module& moduleOf(Driver const& driver, unsigned long long context, Kernel const& kernel, Binary const& binary,
    std::shared_ptr<KernelBytes const> const& owner, Cache& in) {
    size_t const hash = std::hash<std::string_view>()(binary.cubin) ^ static_cast<size_t>(context);
    auto const [from, to] = in.modules.equal_range(hash);
    for (auto at = from; at != to; ++at) {
        if (at->second.context == context && at->second.cubin == binary.cubin) return at->second;
    }
    Module made{context, binary.cubin, owner, nullptr, {}};
    check(driver, driver.moduleLoadData(&made.handle, binary.cubin.data()), "loading", kernel.name);
    return in.modules.emplace(hash, std::move(made))->second;
}

Loaded::Function functionOf(Driver const& driver, Module& module, Kernel const& kernel, Binary const& binary) {
    Loaded::Function made{nullptr, binary.threads, binary.shared};
    void*& known = module.functions[binary.entry];
    if (known == nullptr) {
        void* found = nullptr;
        check(driver, driver.moduleGetFunction(&found, module.handle, binary.entry.c_str()), "finding", kernel.name);
        if (binary.shared > kSharedWithoutAsking) {
            Result const result = driver.funcSetAttribute(found, kMaxDynamicShared, static_cast<int>(binary.shared));
            check(driver, result, "shared memory", kernel.name);
        }
        // Else the first launch would load it, and that may be while a graph is captured.
        if (driver.funcLoad != nullptr) check(driver, driver.funcLoad(found), "loading", kernel.name);
        known = found;
    }
    made.handle = known;
    return made;
}

[[noreturn]] void refuseArchitecture(Definition const& definition, int architecture) {
    std::string built;
    for (int one : definition.architectures()) built += (built.empty() ? "sm_" : ", sm_") + std::to_string(one);
    refuse("built for %s; this GPU is sm_%d; build again with --sm %d", built.c_str(), architecture, architecture);
}

unsigned long long currentContext(Driver const& driver) {
    void* context = nullptr;
    check(driver, driver.ctxGetCurrent(&context), "the current CUDA context", "");
    if (context == nullptr) refuse("no CUDA context is current in this thread");
    // A number that never comes back, where an address may.
    unsigned long long number = 0;
    if (driver.ctxGetId != nullptr && driver.ctxGetId(context, &number) == 0) return number;
    return static_cast<unsigned long long>(reinterpret_cast<uintptr_t>(context));
}

bool launches(Definition const& definition, int architecture) noexcept {
    for (Form const& form : definition.program.forms) {
        for (int one : form.architectures) {
            if (one == architecture) return true;
        }
    }
    return false;
}

}  // namespace

std::shared_ptr<Loaded const> load(Definition const& definition, std::shared_ptr<Loaded const> const& before) {
    char const* why = "";
    Driver const* const found = driver(&why);
    if (found == nullptr) refuse("%s", why);
    unsigned long long const context = currentContext(*found);
    if (before != nullptr && before->context == context) return before;

    auto made = std::make_shared<Loaded>();
    made->driver = found;
    made->context = context;
    int device = 0;
    int major = 0;
    int minor = 0;
    check(*found, found->ctxGetDevice(&device), "the context's device", "");
    check(*found, found->deviceGetAttribute(&major, kMajor, device), "the architecture", "");
    check(*found, found->deviceGetAttribute(&minor, kMinor, device), "the architecture", "");
    check(*found, found->deviceGetAttribute(&made->units, kMultiprocessors, device), "the multiprocessors", "");
    made->architecture = 10 * major + minor;
    if (!launches(definition, made->architecture)) refuseArchitecture(definition, made->architecture);

    Cache& all = cache();
    std::lock_guard<std::mutex> lock(all.mutex);
    for (Kernel const& kernel : definition.kernels->bundle.kernels) {
        Binary const* const binary = kernel.binary(made->architecture);
        if (binary == nullptr) {
            made->functions.emplace_back();
            continue;
        }
        Module& module = moduleOf(*found, context, kernel, *binary, definition.kernels, all);
        made->functions.push_back(functionOf(*found, module, kernel, *binary));
    }
    return made;
}

}  // namespace mla2dsa
