// Proves that the plugins of an engine folder work in a process without Python and without TensorRT:
//
//     check_folder ENGINE_FOLDER
//
// Loads ENGINE_FOLDER/libmla2dsa_trt.so as TensorRT does, makes a plugin of each pair NAME.program and NAME.kernels in
// ENGINE_FOLDER/plugins, and has each one launch its kernels on zeros, for a decode and for a prefill shape. What they
// compute is not looked at. The driver is libcuda.so.1, or what the environment's MLA2DSA_LIBCUDA names.
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "tensorrt_abi.h"

namespace {

using namespace nvinfer1;
using Text = std::string;
using Path = std::filesystem::path;
using Shapes = std::vector<std::vector<int64_t>>;

[[noreturn]] void fail(Text const& text) { throw std::runtime_error(text); }

template <class Function>
Function find(void* library, Text const& from, char const* name) {
    auto const found = reinterpret_cast<Function>(dlsym(library, name));
    if (found == nullptr) fail(from + ": it lacks " + name);
    return found;
}

void* open(Text const& path, Text const& what) {
    void* const library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
        char const* const why = dlerror();
        fail(what + ": " + (why != nullptr ? why : "cannot be loaded"));
    }
    return library;
}

// What is needed of the CUDA driver: a context on device 0, and memory.
class Driver {
public:
    using Pointer = unsigned long long;

    Driver() {
        char const* const named = std::getenv("MLA2DSA_LIBCUDA");
        mPath = named != nullptr ? named : "libcuda.so.1";
        mLibrary = open(mPath, "no CUDA driver");
        int device = 0;
        void* context = nullptr;
        call<int(unsigned)>("cuInit", 0U);
        call<int(int*, int)>("cuDeviceGet", &device, 0);
        call<int(void**, int)>("cuDevicePrimaryCtxRetain", &context, device);
        call<int(void*)>("cuCtxSetCurrent", context);
        int major = 0;
        int minor = 0;
        call<int(int*, int, int)>("cuDeviceGetAttribute", &major, 75, device);
        call<int(int*, int, int)>("cuDeviceGetAttribute", &minor, 76, device);
        mArchitecture = 10 * major + minor;
    }

    int architecture() const { return mArchitecture; }

    Pointer zeros(size_t bytes) const {
        Pointer made = 0;
        call<int(Pointer*, size_t)>("cuMemAlloc_v2", &made, std::max<size_t>(bytes, 1));
        call<int(Pointer, unsigned char, size_t)>("cuMemsetD8_v2", made, 0, std::max<size_t>(bytes, 1));
        return made;
    }

    void free(Pointer memory) const { call<int(Pointer)>("cuMemFree_v2", memory); }

    // What kernels did wrong shows here.
    void wait() const { call<int()>("cuCtxSynchronize"); }

private:
    template <class Function, class... Arguments>
    void call(char const* name, Arguments... arguments) const {
        int const result = find<Function*>(mLibrary, mPath, name)(arguments...);
        if (result != 0) fail(Text(name) + ": CUDA error " + std::to_string(result));
    }

    Text mPath;
    void* mLibrary = nullptr;
    int mArchitecture = 0;
};

// Device memory that goes when the check is over.
class Memory {
public:
    explicit Memory(Driver const& driver) : mDriver(driver) {}
    ~Memory() {
        for (Driver::Pointer one : mAll) {
            try {
                mDriver.free(one);
            } catch (std::exception const&) {  // after a failure there is nothing left to say
            }
        }
    }
    Memory(Memory const&) = delete;

    void* zeros(size_t bytes) {
        mAll.push_back(mDriver.zeros(bytes));
        return reinterpret_cast<void*>(mAll.back());
    }

private:
    Driver const& mDriver;
    std::vector<Driver::Pointer> mAll;
};

struct Library {
    Text path;
    std::vector<IPluginCreatorV3One*> creators;
    char const* (*lastError)() = nullptr;

    explicit Library(Path const& folder) : path((folder / "libmla2dsa_trt.so").string()) {
        if (!std::filesystem::exists(path)) fail(path + ": there is no plugin library");
        void* const library = open(path, "the plugin library");
        auto const get = find<IPluginCreatorInterface* const* (*)(int32_t&)>(library, path, "getCreators");
        lastError = find<char const* (*)()>(library, path, "mla2dsa_last_error");
        int32_t count = 0;
        auto* const* const all = get(count);
        for (int32_t at = 0; at < count; ++at) {
            if (Text(all[at]->getInterfaceInfo().kind) != "PLUGIN CREATOR_V3ONE") fail(path + ": a creator of another kind");
            creators.push_back(static_cast<IPluginCreatorV3One*>(all[at]));
        }
    }

    IPluginCreatorV3One& creator(Text const& op) const {
        for (IPluginCreatorV3One* one : creators) {
            if (op == one->getPluginName()) return *one;
        }
        fail("the plugin library has no plugin " + op);
    }
};

// The lines of a program that say what goes in and out (docs/tensorrt.md). The plugin reads and checks the whole of it.
struct Program {
    struct Tensor {
        Text type;
        std::vector<Text> dims;
        int alias = -1;
    };
    Text op;
    std::vector<Tensor> inputs;
    std::vector<Tensor> outputs;

    explicit Program(Text const& text) {
        std::istringstream lines(text);
        Text line;
        for (int number = 1; std::getline(lines, line); ++number) {
            std::istringstream words(line);
            Text first;
            words >> first;
            if (number == 2 && first == "op") words >> op;
            if (first == "form") break;
            if (first == "in" || first == "out") {
                Tensor tensor;
                words >> tensor.type;
                for (Text dim; words >> dim;) tensor.dims.push_back(dim);
                if (tensor.dims.size() > static_cast<size_t>(Dims::MAX_DIMS)) fail("a tensor has too many dims");
                (first == "in" ? inputs : outputs).push_back(tensor);
            }
            size_t output = 0;
            int input = 0;
            if (first == "alias" && words >> output >> input && output < outputs.size()) outputs[output].alias = input;
        }
        if (op.empty()) fail("its second line is not op NAME");
    }
};

// Reverse Polish over the sizes known so far.
int64_t evaluate(Text const& expression, Shapes const& shapes) {
    std::vector<int64_t> stack;
    std::istringstream parts(expression);
    for (Text part; std::getline(parts, part, ',');) {
        char const sign = part.size() == 1 ? part[0] : '0';
        if (Text("+-*/^<>").find(sign) != Text::npos) {
            if (stack.size() < 2) fail("expression " + expression + " is not whole");
            int64_t const b = stack.back();
            stack.pop_back();
            int64_t& a = stack.back();
            if ((sign == '/' || sign == '^') && b < 1) fail("expression " + expression + " divides by " + std::to_string(b));
            switch (sign) {
            case '+': a += b; break;
            case '-': a -= b; break;
            case '*': a *= b; break;
            case '/': a = a / b - (a % b < 0 ? 1 : 0); break;
            case '^': a = a / b + (a % b > 0 ? 1 : 0); break;
            case '<': a = std::min(a, b); break;
            default: a = std::max(a, b);
            }
            continue;
        }
        unsigned tensor = 0;
        unsigned axis = 0;
        long long number = 0;
        char after = 0;
        if (std::sscanf(part.c_str(), "d%u.%u%c", &tensor, &axis, &after) == 2) {
            if (tensor >= shapes.size() || axis >= shapes[tensor].size()) fail("expression " + expression + ": no such dim");
            stack.push_back(shapes[tensor][axis]);
        } else if (std::sscanf(part.c_str(), "%lld%c", &number, &after) == 1) {
            stack.push_back(number);
        } else {
            fail("expression " + expression + " is not known");
        }
    }
    if (stack.size() != 1 || stack[0] < 0 || stack[0] > 1 << 20) fail("expression " + expression + " is no size");
    return stack[0];
}

constexpr int64_t kBatch = 1;
constexpr int64_t kDecodeTokens = 1;
constexpr int64_t kPrefillTokens = 640;  // enough to leave the forms for few tokens, whatever the number of heads
constexpr int64_t kSlots = 1024;         // of caches, and whatever else is free

// Sizes of all tensors, the inputs first. Every `*` gets a small number: the first one is the batch. Queries have 4 dims and
// their second is the tokens; an op that has none counts its tokens in the last `*` (the rows that go into a cache).
Shapes shapesFor(Program const& program, int64_t tokens) {
    int free = 0;
    for (auto const& input : program.inputs) free += static_cast<int>(std::count(input.dims.begin(), input.dims.end(), "*"));
    bool const queries = !program.inputs.empty() && program.inputs[0].dims.size() == 4;
    int const ofTokens = queries ? 2 : free;
    Shapes shapes;
    int seen = 0;
    for (auto const& input : program.inputs) {
        shapes.emplace_back();
        for (Text const& dim : input.dims) {
            if (dim != "*") {
                shapes.back().push_back(evaluate(dim, shapes));
                continue;
            }
            ++seen;
            shapes.back().push_back(seen == 1 ? kBatch : seen == ofTokens ? tokens : kSlots);
        }
    }
    Shapes const inputs = shapes;
    for (auto const& output : program.outputs) {
        shapes.emplace_back();
        for (Text const& dim : output.dims) shapes.back().push_back(evaluate(dim, inputs));
    }
    return shapes;
}

struct Element {
    char const* name;
    DataType type;
    size_t bytes;
};
constexpr Element kElements[] = {{"bf16", DataType::kBF16, 2}, {"fp16", DataType::kHALF, 2}, {"fp32", DataType::kFLOAT, 4},
    {"fp8e4nv", DataType::kFP8, 1}, {"i32", DataType::kINT32, 4}, {"i64", DataType::kINT64, 8}, {"u8", DataType::kINT8, 1}};

Element const& element(Text const& name) {
    for (Element const& one : kElements) {
        if (name == one.name) return one;
    }
    fail("element type " + name + " is not known");
}

void runOnce(IPluginV3& plugin, Library const& library, Driver const& driver, Program const& program, int64_t tokens) {
    Shapes const shapes = shapesFor(program, tokens);
    size_t const inputs = program.inputs.size();
    std::vector<PluginTensorDesc> descs;
    std::vector<void*> pointers;
    Memory memory(driver);
    for (size_t at = 0; at < shapes.size(); ++at) {
        auto const& tensor = at < inputs ? program.inputs[at] : program.outputs[at - inputs];
        Element const& made = element(tensor.type);
        PluginTensorDesc desc{};
        desc.type = made.type;
        desc.format = TensorFormat::kLINEAR;
        desc.scale = 1;
        desc.dims.nbDims = static_cast<int32_t>(shapes[at].size());
        size_t bytes = made.bytes;
        for (size_t axis = 0; axis < shapes[at].size(); ++axis) {
            desc.dims.d[axis] = shapes[at][axis];
            bytes *= static_cast<size_t>(shapes[at][axis]);
        }
        descs.push_back(desc);
        bool const aliased = tensor.alias >= 0 && static_cast<size_t>(tensor.alias) < inputs;
        pointers.push_back(aliased ? pointers[static_cast<size_t>(tensor.alias)] : memory.zeros(bytes));
    }
    std::vector<DynamicPluginTensorDesc> ranges;
    for (PluginTensorDesc const& desc : descs) ranges.push_back({desc, desc.dims, desc.dims, desc.dims});

    int32_t const in = static_cast<int32_t>(inputs);
    int32_t const out = static_cast<int32_t>(shapes.size() - inputs);
    auto* const build = static_cast<IPluginV3OneBuildV2*>(plugin.getCapabilityInterface(PluginCapabilityType::kBUILD));
    auto* const runtime = static_cast<IPluginV3OneRuntime*>(plugin.getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    if (build == nullptr || runtime == nullptr) fail("the plugin lacks an interface");
    size_t const workspace = build->getWorkspaceSize(ranges.data(), in, ranges.data() + in, out);
    if (workspace > size_t{1} << 40) fail(library.lastError());
    if (runtime->onShapeChange(descs.data(), in, descs.data() + in, out) != 0) fail(library.lastError());
    void* const scratch = memory.zeros(workspace);
    void const* const* const from = pointers.data();
    if (runtime->enqueue(descs.data(), descs.data() + in, from, pointers.data() + in, scratch, nullptr) != 0) {
        fail(library.lastError());
    }
    driver.wait();
}

Text read(Path const& path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) fail("cannot be read");
    return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

void checkPlugin(Library const& library, Driver const& driver, Path const& file) {
    Text const node = file.stem().string();
    Text const text = read(file);
    Text const kernels = read(Path(file).replace_extension(".kernels"));
    Program const program(text);
    PluginField const fields[] = {{"program", text.data(), PluginFieldType::kCHAR, static_cast<int32_t>(text.size())},
        {"kernels", kernels.data(), PluginFieldType::kCHAR, static_cast<int32_t>(kernels.size())}};
    PluginFieldCollection const collection{2, fields};
    std::unique_ptr<IPluginV3> const made(
        library.creator(program.op).createPlugin(node.c_str(), &collection, TensorRTPhase::kRUNTIME));
    if (made == nullptr) fail(library.lastError());
    auto* const runtime = static_cast<IPluginV3OneRuntime*>(made->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    if (runtime == nullptr) fail("the plugin has no run-time interface");
    std::unique_ptr<IPluginV3> const attached(runtime->attachToContext(nullptr));
    if (attached == nullptr) fail(library.lastError());
    runOnce(*attached, library, driver, program, kDecodeTokens);
    runOnce(*attached, library, driver, program, kPrefillTokens);
    std::printf("%s: %s, decode ok, prefill ok\n", node.c_str(), program.op.c_str());
}

void check(Path const& folder) {
    Path const place = folder / "plugins";
    std::vector<Path> files;
    if (!std::filesystem::is_directory(place)) fail(place.string() + ": there is no such folder");
    for (auto const& entry : std::filesystem::directory_iterator(place)) {
        if (entry.path().extension() == ".program") files.push_back(entry.path());
    }
    if (files.empty()) fail(place.string() + ": there is no NAME.program");
    std::sort(files.begin(), files.end());

    Library const library(folder);
    Text names;
    for (IPluginCreatorV3One* one : library.creators) names += Text(names.empty() ? "" : ", ") + one->getPluginName();
    std::printf("libmla2dsa_trt.so: %s\n", names.c_str());
    Driver const driver;
    for (Path const& file : files) {
        try {
            checkPlugin(library, driver, file);
        } catch (std::exception const& error) {
            fail(file.filename().string() + ": " + error.what());
        }
    }
    std::printf("%zu plugins ok on sm_%d\n", files.size(), driver.architecture());
}

}  // namespace

int main(int count, char** words) {
    try {
        if (count != 2) fail("usage: check_folder ENGINE_FOLDER");
        check(words[1]);
    } catch (std::exception const& error) {
        std::fflush(stdout);
        std::fprintf(stderr, "check_folder: %s\n", error.what());
        return 1;
    }
}
