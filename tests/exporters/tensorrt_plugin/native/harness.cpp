// Drives the plugin through TensorRT's interfaces, without TensorRT: functions in C for Python's ctypes (plugin_harness.py),
// and with REPLAY a program that runs cases from a file, for the sanitizers. Shapes come in one array: the dims of all
// tensors, inputs first, one after the other.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "tensorrt_abi.h"

using namespace nvinfer1;

namespace {

using GetCreators = IPluginCreatorInterface* const* (*) (int32_t&);

GetCreators gCreators = nullptr;
char const* (*gLastError)() = nullptr;

// TensorRT's shape expressions, as far as they are known numbers or stay symbols; a symbol keeps its text.
struct Dim final : IDimensionExpr {
    struct Impl final : apiv::VDimensionExpr {
        bool known = true;
        int64_t value = 0;
        std::string text;
        bool isConstant() const override { return known; }
        int64_t getConstantValue() const override { return value; }
        bool isSizeTensor() const override { return false; }
    } impl;
    Dim() { mImpl = &impl; }
};

struct Builder final : IExprBuilder {
    struct Impl final : apiv::VExprBuilder {
        std::deque<Dim> made;
        IDimensionExpr const* add(bool known, int64_t value, std::string text) {
            Dim& dim = made.emplace_back();
            dim.impl.known = known;
            dim.impl.value = value;
            dim.impl.text = std::move(text);
            return &dim;
        }
        IDimensionExpr const* constant(int64_t value) override { return add(true, value, std::to_string(value)); }
        IDimensionExpr const* operation(
            DimensionOperation op, IDimensionExpr const& a, IDimensionExpr const& b) override {
            static char const* const kNames[] = {"+", "*", "max", "min", "-", "==", "<", "/", "ceil"};
            auto const& left = static_cast<Dim const&>(a).impl;
            auto const& right = static_cast<Dim const&>(b).impl;
            return add(false, 0, "(" + left.text + " " + kNames[static_cast<int>(op)] + " " + right.text + ")");
        }
        IDimensionExpr const* declareSizeTensor(int32_t, IDimensionExpr const&, IDimensionExpr const&) override {
            return nullptr;
        }
    } impl;
    Builder() { mImpl = &impl; }
};

void describe(PluginTensorDesc* to, int count, int const* types, int const* ranks, int64_t const* dims) {
    for (int at = 0; at < count; ++at) {
        to[at].type = static_cast<DataType>(types[at]);
        to[at].format = TensorFormat::kLINEAR;
        to[at].scale = 1;
        to[at].dims.nbDims = ranks[at];
        for (int axis = 0; axis < ranks[at]; ++axis) to[at].dims.d[axis] = *dims++;
    }
}

template <class Capability>
Capability* capability(void* plugin, PluginCapabilityType type) {
    return static_cast<Capability*>(static_cast<IPluginV3*>(plugin)->getCapabilityInterface(type));
}

IPluginV3OneBuildV2* build(void* plugin) { return capability<IPluginV3OneBuildV2>(plugin, PluginCapabilityType::kBUILD); }

IPluginV3OneRuntime* runtime(void* plugin) {
    return capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
}

IPluginCreatorV3One* creatorOf(char const* op) {
    int32_t count = 0;
    IPluginCreatorInterface* const* const all = gCreators(count);
    for (int32_t at = 0; at < count; ++at) {
        auto* const creator = static_cast<IPluginCreatorV3One*>(all[at]);
        if (std::strcmp(creator->getPluginName(), op) == 0) return creator;
    }
    return nullptr;
}

constexpr int kMost = 64;

}  // namespace

extern "C" {

// 0 when the library has all that TensorRT looks for.
int h_open(char const* path) {
    void* const library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
        std::fprintf(stderr, "%s\n", dlerror());
        return 1;
    }
    gCreators = reinterpret_cast<GetCreators>(dlsym(library, "getCreators"));
    gLastError = reinterpret_cast<char const* (*) ()>(dlsym(library, "mla2dsa_last_error"));
    return gCreators == nullptr || gLastError == nullptr || dlsym(library, "setLoggerFinder") == nullptr;
}

char const* h_error() { return gLastError(); }

// type: of both fields, as a PluginFieldType. A field of length -1 is left out.
void* h_create(char const* op, char const* node, void const* program, int programSize, void const* kernels, int kernelsSize,
    int type, int phase) {
    IPluginCreatorV3One* const creator = creatorOf(op);
    if (creator == nullptr) return nullptr;
    std::vector<PluginField> fields;
    auto const kind = static_cast<PluginFieldType>(type);
    if (programSize >= 0) fields.push_back({"program", program, kind, programSize});
    if (kernelsSize >= 0) fields.push_back({"kernels", kernels, kind, kernelsSize});
    PluginFieldCollection const collection{static_cast<int32_t>(fields.size()), fields.data()};
    return creator->createPlugin(node, &collection, static_cast<TensorRTPhase>(phase));
}

void* h_clone(void* plugin) { return static_cast<IPluginV3*>(plugin)->clone(); }

void* h_attach(void* plugin) { return runtime(plugin)->attachToContext(nullptr); }

void h_free(void* plugin) { delete static_cast<IPluginV3*>(plugin); }

// "NAMESPACE::NAME version VERSION, N outputs"
int h_describe(void* plugin, char* to, int size) {
    auto* const core = capability<IPluginV3OneCore>(plugin, PluginCapabilityType::kCORE);
    return std::snprintf(to, static_cast<size_t>(size), "%s::%s version %s, %d outputs", core->getPluginNamespace(),
        core->getPluginName(), core->getPluginVersion(), build(plugin)->getNbOutputs());
}

int h_alias(void* plugin, int output) { return build(plugin)->getAliasedInput(output); }

int h_supports(void* plugin, int position, int inputs, int outputs, int const* types) {
    DynamicPluginTensorDesc all[kMost] = {};
    for (int at = 0; at < inputs + outputs; ++at) all[at].desc.type = static_cast<DataType>(types[at]);
    return build(plugin)->supportsFormatCombination(position, all, inputs, outputs);
}

// Shapes of the outputs as text, "[d0.0,(2048 min d1.1)][...]", where a dim below 0 is a symbol. 0 when TensorRT would go on.
int h_outputs(void* plugin, int inputs, int const* ranks, int64_t const* dims, char* to, int size) {
    Builder builder;
    DimsExprs in[kMost] = {};
    DimsExprs out[kMost] = {};
    for (int at = 0; at < inputs; ++at) {
        in[at].nbDims = ranks[at];
        for (int axis = 0; axis < ranks[at]; ++axis, ++dims) {
            std::string const name = "d" + std::to_string(at) + "." + std::to_string(axis);
            in[at].d[axis] = builder.impl.add(*dims >= 0, *dims, *dims >= 0 ? std::to_string(*dims) : name);
        }
    }
    int const count = build(plugin)->getNbOutputs();
    int const result = build(plugin)->getOutputShapes(in, inputs, nullptr, 0, out, count, builder);
    std::string text;
    for (int at = 0; result == 0 && at < count; ++at) {
        text += "[";
        for (int axis = 0; axis < out[at].nbDims; ++axis) {
            text += (axis > 0 ? "," : "") + static_cast<Dim const*>(out[at].d[axis])->impl.text;
        }
        text += "]";
    }
    std::snprintf(to, static_cast<size_t>(size), "%s", text.c_str());
    return result;
}

int h_output_types(void* plugin, int inputs, int* types) {
    DataType out[kMost] = {};
    DataType in[kMost] = {};
    for (int at = 0; at < inputs; ++at) in[at] = static_cast<DataType>(types[at]);
    int const count = build(plugin)->getNbOutputs();
    int const result = build(plugin)->getOutputDataTypes(out, count, in, inputs);
    for (int at = 0; at < count; ++at) types[at] = static_cast<int>(out[at]);
    return result;
}

size_t h_workspace(void* plugin, int inputs, int outputs, int const* types, int const* ranks, int64_t const* dims) {
    PluginTensorDesc all[kMost] = {};
    DynamicPluginTensorDesc dynamic[kMost] = {};
    describe(all, inputs + outputs, types, ranks, dims);
    for (int at = 0; at < inputs + outputs; ++at) {
        dynamic[at].desc = all[at];
        dynamic[at].min = dynamic[at].opt = dynamic[at].max = all[at].dims;
    }
    return build(plugin)->getWorkspaceSize(dynamic, inputs, dynamic + inputs, outputs);
}

int h_shapes(void* plugin, int inputs, int outputs, int const* types, int const* ranks, int64_t const* dims) {
    PluginTensorDesc all[kMost] = {};
    describe(all, inputs + outputs, types, ranks, dims);
    return runtime(plugin)->onShapeChange(all, inputs, all + inputs, outputs);
}

int h_enqueue(void* plugin, int inputs, int outputs, int const* types, int const* ranks, int64_t const* dims, void** pointers,
    void* workspace, void* stream) {
    PluginTensorDesc all[kMost] = {};
    describe(all, inputs + outputs, types, ranks, dims);
    return runtime(plugin)->enqueue(
        all, all + inputs, pointers, pointers + inputs, workspace, static_cast<cudaStream_t>(stream));
}

// The field that the plugin gives to be serialised.
int h_field(void* plugin, char const* name, void const** data) {
    PluginFieldCollection const* const fields = runtime(plugin)->getFieldsToSerialize();
    for (int at = 0; at < fields->nbFields; ++at) {
        if (std::strcmp(fields->fields[at].name, name) != 0) continue;
        *data = fields->fields[at].data;
        return fields->fields[at].length;
    }
    return -1;
}
}

#ifdef REPLAY

extern "C" IPluginCreatorInterface* const* getCreators(int32_t&);
extern "C" char const* mla2dsa_last_error();

namespace {

// Little endian numbers and strings, as plugin_harness.py writes them.
struct Cases {
    std::FILE* file;
    bool read(void* to, size_t size) { return std::fread(to, 1, size, file) == size; }
    bool number(int& to) { return read(&to, 4); }
    bool string(std::vector<char>& to) {
        int size = 0;
        if (!number(size)) return false;
        to.assign(static_cast<size_t>(size), 0);
        return read(to.data(), to.size());
    }
};

// All that TensorRT does with a plugin: each step must come back, whatever it says.
char const* replay(char const* op, std::vector<char> const& program, std::vector<char> const& kernels, int inputs,
    int outputs, std::vector<int> const& types, std::vector<int> const& ranks, std::vector<int64_t> const& dims) {
    constexpr int kChar = 6;
    void* const plugin = h_create(op, "case", program.data(), static_cast<int>(program.size()), kernels.data(),
        static_cast<int>(kernels.size()), kChar, 1);
    if (plugin == nullptr) return "not created";
    char text[4096];
    void const* data = nullptr;
    bool good = h_field(plugin, "program", &data) >= 0 && h_field(plugin, "kernels", &data) >= 0;
    if (build(plugin)->getNbOutputs() <= kMost) {
        good = h_outputs(plugin, inputs, ranks.data(), dims.data(), text, sizeof text) == 0 && good;
    }
    h_workspace(plugin, inputs, outputs, types.data(), ranks.data(), dims.data());
    void* const copy = h_clone(plugin);
    void* const attached = copy != nullptr ? h_attach(copy) : nullptr;
    h_free(plugin);
    h_free(copy);
    if (attached == nullptr) return "not attached";
    good = h_shapes(attached, inputs, outputs, types.data(), ranks.data(), dims.data()) == 0 && good;
    void* pointers[kMost];
    for (int at = 0; at < kMost; ++at) pointers[at] = reinterpret_cast<void*>(uintptr_t{0x100000000} * (at + 1));
    void* const workspace = reinterpret_cast<void*>(uintptr_t{0x10000});
    good = h_enqueue(attached, inputs, outputs, types.data(), ranks.data(), dims.data(), pointers, workspace, nullptr) == 0
        && good;
    h_free(attached);
    return good ? "ok" : "refused";
}

}  // namespace

int main(int, char** arguments) {
    gCreators = getCreators;
    gLastError = mla2dsa_last_error;
    Cases cases{std::fopen(arguments[1], "rb")};
    if (cases.file == nullptr) return 2;
    std::vector<char> op;
    std::vector<char> program;
    std::vector<char> kernels;
    while (cases.string(op)) {
        op.push_back(0);
        int inputs = 0;
        int outputs = 0;
        if (!cases.string(program) || !cases.string(kernels) || !cases.number(inputs) || !cases.number(outputs)) return 2;
        std::vector<int> types(static_cast<size_t>(inputs + outputs));
        std::vector<int> ranks(types.size());
        std::vector<int64_t> dims;
        for (size_t at = 0; at < types.size(); ++at) {
            if (!cases.number(types[at]) || !cases.number(ranks[at])) return 2;
            for (int axis = 0; axis < ranks[at]; ++axis) {
                int64_t size = 0;
                if (!cases.read(&size, 8)) return 2;
                dims.push_back(size);
            }
        }
        char const* const result = replay(op.data(), program, kernels, inputs, outputs, types, ranks, dims);
        bool const good = std::strcmp(result, "ok") == 0;
        std::printf("%s%s%s\n", result, good ? "" : ": ", good ? "" : h_error());
    }
    std::fclose(cases.file);
    return 0;
}

#endif
