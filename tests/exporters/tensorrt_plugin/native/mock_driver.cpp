// A CUDA driver without a GPU: it runs nothing, and writes down all that it is asked to launch. A test in the same process asks
// for that with mock_launches; for another process, the file that MOCK_LAUNCHES names gets the kernels' entries, one a line.
// MOCK_SM: the architecture to be (default 90). Memory is the host's.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

namespace {

struct Function {
    std::string entry;
    int parameters;
    int shared;  // opted in to
};

int gSm = std::getenv("MOCK_SM") != nullptr ? std::atoi(std::getenv("MOCK_SM")) : 90;
int gUnits = 132;
int gModules = 0;
std::string gFailing;
std::string gLaunches;
std::map<std::string, int> gParameters;
std::map<void*, Function> gFunctions;
int gContext;

int result(char const* name) { return gFailing == name ? 719 : 0; }

}  // namespace

extern "C" {

// Called by tests.
void mock_set(int sm, int units) {
    gSm = sm;
    gUnits = units;
}
void mock_parameters(char const* entry, int count) { gParameters[entry] = count; }
void mock_fail(char const* name) { gFailing = name; }
int mock_modules() { return gModules; }
char const* mock_launches() { return gLaunches.c_str(); }
void mock_clear() { gLaunches.clear(); }

// Called by a host of the plugin.
int cuDeviceGet(int* device, int) {
    *device = 0;
    return 0;
}
int cuDevicePrimaryCtxRetain(void** context, int) {
    *context = &gContext;
    return 0;
}
int cuCtxSetCurrent(void*) { return 0; }
int cuCtxSynchronize() { return 0; }
int cuMemAlloc_v2(unsigned long long* made, size_t bytes) {
    *made = reinterpret_cast<unsigned long long>(std::aligned_alloc(256, (bytes + 255) / 256 * 256));
    return *made != 0 ? 0 : 2;
}
int cuMemFree_v2(unsigned long long memory) {
    std::free(reinterpret_cast<void*>(memory));
    return 0;
}
int cuMemsetD8_v2(unsigned long long memory, unsigned char byte, size_t count) {
    std::memset(reinterpret_cast<void*>(memory), byte, count);
    return 0;
}

// Called by the plugin.
int cuInit(unsigned) { return result("cuInit"); }
int cuCtxGetCurrent(void** context) {
    *context = &gContext;
    return result("cuCtxGetCurrent");
}
int cuCtxGetDevice(int* device) {
    *device = 0;
    return result("cuCtxGetDevice");
}
int cuDeviceGetAttribute(int* value, int attribute, int) {
    *value = attribute == 16 ? gUnits : attribute == 75 ? gSm / 10 : gSm % 10;
    return result("cuDeviceGetAttribute");
}
int cuModuleLoadData(void** module, void const* image) {
    if (std::memcmp(image, "\177ELF", 4) != 0) return 200;
    *module = new char;
    ++gModules;
    return result("cuModuleLoadData");
}
int cuModuleGetFunction(void** function, void*, char const* entry) {
    *function = new char;
    gFunctions[*function] = {entry, gParameters.count(entry) != 0 ? gParameters[entry] : 0, 0};
    return result("cuModuleGetFunction");
}
int cuFuncSetAttribute(void* function, int attribute, int value) {
    if (attribute == 8) gFunctions[function].shared = value;
    return result("cuFuncSetAttribute");
}
int cuFuncLoad(void*) { return result("cuFuncLoad"); }
int cuGetErrorName(int code, char const** name) {
    *name = code == 719 ? "CUDA_ERROR_OF_THE_MOCK" : "CUDA_ERROR_INVALID_IMAGE";
    return 0;
}
int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz, unsigned shared,
    void* stream, void** parameters, void**) {
    Function const& known = gFunctions[function];
    char text[256];
    std::snprintf(text, sizeof text, "launch %s %u %u %u %u %u %u %u %d %llu", known.entry.c_str(), x, y, z, bx, by, bz,
        shared, known.shared, reinterpret_cast<unsigned long long>(stream));
    gLaunches += text;
    for (int at = 0; at < known.parameters; ++at) {  // the plugin's words are of 8 bytes each
        unsigned long long word = 0;
        std::memcpy(&word, parameters[at], 8);
        gLaunches += " " + std::to_string(word);
    }
    gLaunches += "\n";
    if (char const* const path = std::getenv("MOCK_LAUNCHES")) {
        if (std::FILE* const file = std::fopen(path, "a")) {
            std::fprintf(file, "%s\n", known.entry.c_str());
            std::fclose(file);
        }
    }
    return result("cuLaunchKernel");
}
int cuMemcpyDtoDAsync_v2(unsigned long long to, unsigned long long from, size_t bytes, void*) {
    gLaunches += "copy " + std::to_string(to) + " " + std::to_string(from) + " " + std::to_string(bytes) + "\n";
    return result("cuMemcpyDtoDAsync_v2");
}
}
