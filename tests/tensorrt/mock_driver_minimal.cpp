// A CUDA driver without a GPU, as much of it as the plugin library and examples/deploy/check_folder.cpp call. Memory is the
// host's, and a launch runs nothing: its entry point goes to the file that MOCK_LAUNCHES names, one a line.
// MOCK_SM: the architecture to be (default 90).
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

namespace {

constexpr int kInvalidValue = 1;
constexpr int kInvalidImage = 200;
constexpr int kNotFound = 500;

int architecture() {
    char const* const named = std::getenv("MOCK_SM");
    return named != nullptr ? std::atoi(named) : 90;
}

std::map<void*, std::string> functions;
int context;

}  // namespace

extern "C" {

int cuInit(unsigned) { return 0; }

int cuDeviceGet(int* device, int number) {
    *device = 0;
    return number == 0 ? 0 : kInvalidValue;
}

int cuDevicePrimaryCtxRetain(void** made, int) {
    *made = &context;
    return 0;
}

int cuCtxSetCurrent(void* made) { return made == &context ? 0 : kInvalidValue; }

int cuCtxGetCurrent(void** made) {
    *made = &context;
    return 0;
}

int cuCtxGetDevice(int* device) {
    *device = 0;
    return 0;
}

int cuCtxSynchronize() { return 0; }

int cuDeviceGetAttribute(int* value, int attribute, int) {
    *value = attribute == 16 ? 132 : attribute == 75 ? architecture() / 10 : architecture() % 10;
    return 0;
}

int cuGetErrorName(int result, char const** name) {
    *name = result == kInvalidImage ? "CUDA_ERROR_INVALID_IMAGE" : "CUDA_ERROR_OF_THE_MOCK";
    return 0;
}

int cuModuleLoadData(void** module, void const* image) {
    if (std::memcmp(image, "\177ELF", 4) != 0) return kInvalidImage;
    *module = std::malloc(1);
    return 0;
}

int cuModuleGetFunction(void** function, void* module, char const* entry) {
    if (module == nullptr) return kNotFound;
    *function = std::malloc(1);
    functions[*function] = entry;
    return 0;
}

int cuFuncSetAttribute(void* function, int, int) { return functions.count(function) != 0 ? 0 : kInvalidValue; }

int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned, unsigned, void*,
    void** parameters, void**) {
    auto const found = functions.find(function);
    if (found == functions.end() || x * y * z == 0 || threads == 0 || parameters == nullptr) return kInvalidValue;
    if (char const* const path = std::getenv("MOCK_LAUNCHES")) {
        std::FILE* const file = std::fopen(path, "a");
        if (file == nullptr) return kInvalidValue;
        std::fprintf(file, "%s\n", found->second.c_str());
        std::fclose(file);
    }
    return 0;
}

int cuMemAlloc_v2(unsigned long long* made, size_t bytes) {
    void* const memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
    *made = reinterpret_cast<unsigned long long>(memory);
    return memory != nullptr ? 0 : 2;
}

int cuMemFree_v2(unsigned long long memory) {
    std::free(reinterpret_cast<void*>(memory));
    return 0;
}

int cuMemsetD8_v2(unsigned long long memory, unsigned char byte, size_t count) {
    std::memset(reinterpret_cast<void*>(memory), byte, count);
    return 0;
}

int cuMemcpyDtoDAsync_v2(unsigned long long to, unsigned long long from, size_t count, void*) {
    std::memmove(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), count);
    return 0;
}
}
