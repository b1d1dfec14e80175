#include "plugin.h"

#include <cstdio>

#include "errors.h"
#include "runner.h"
#include "shapes.h"

namespace mla2dsa {
namespace {

using namespace nvinfer1;

// What to ask for when the need cannot be computed: nobody has it, so TensorRT refuses, where 0 would let it run.
constexpr size_t kImpossible = size_t{1} << 60;

PluginField field(char const* name, std::string const& bytes) noexcept {
    return {name, bytes.data(), PluginFieldType::kCHAR, static_cast<int32_t>(bytes.size())};
}

}  // namespace

Plugin::Plugin(std::string node, std::shared_ptr<Definition const> definition)
    : mNode(std::move(node))
    , mDefinition(std::move(definition))
    , mFields{field(kProgramField, mDefinition->text), field(kKernelsField, mDefinition->kernels->bytes)}
    , mCollection{2, mFields} {}

IPluginCapability* Plugin::getCapabilityInterface(PluginCapabilityType type) noexcept {
    switch (type) {
    case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
    case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuildV2*>(this);
    case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
    }
    return nullptr;
}

IPluginV3* Plugin::clone() noexcept {
    return guarded<IPluginV3*>(mNode, nullptr, [&] {
        auto* made = new Plugin(mNode, mDefinition);
        made->mLoaded = mLoaded;
        return made;
    });
}

char const* Plugin::getPluginName() const noexcept { return mDefinition->program.op.c_str(); }

char const* Plugin::getPluginVersion() const noexcept { return kPluginVersion; }

char const* Plugin::getPluginNamespace() const noexcept { return kNamespace; }

int32_t Plugin::configurePlugin(
    DynamicPluginTensorDesc const*, int32_t nbInputs, DynamicPluginTensorDesc const*, int32_t nbOutputs) noexcept {
    return guarded(mNode, -1, [&] {
        checkCounts(mDefinition->program, nbInputs, nbOutputs);
        return 0;
    });
}

int32_t Plugin::getOutputDataTypes(
    DataType* outputTypes, int32_t nbOutputs, DataType const* inputTypes, int32_t nbInputs) const noexcept {
    return guarded(mNode, -1, [&] {
        Program const& program = mDefinition->program;
        checkCounts(program, nbInputs, nbOutputs);
        for (size_t at = 0; at < program.outputs.size(); ++at) {
            Tensor const& output = program.outputs[at];
            outputTypes[at] = typeOf(output.type);
            // Bytes in place of bytes: whichever of its two names the input goes by.
            if (output.alias >= 0 && holds(output.type, inputTypes[output.alias])) outputTypes[at] = inputTypes[output.alias];
        }
        return 0;
    });
}

int32_t Plugin::getOutputShapes(DimsExprs const* inputs, int32_t nbInputs, DimsExprs const*, int32_t, DimsExprs* outputs,
    int32_t nbOutputs, IExprBuilder& exprBuilder) noexcept {
    return guarded(mNode, -1, [&] {
        checkCounts(mDefinition->program, nbInputs, nbOutputs);
        inferShapes(mDefinition->program, inputs, outputs, exprBuilder);
        return 0;
    });
}

bool Plugin::supportsFormatCombination(
    int32_t pos, DynamicPluginTensorDesc const* inOut, int32_t nbInputs, int32_t nbOutputs) noexcept {
    return guarded(mNode, false, [&] {
        Program const& program = mDefinition->program;
        checkCounts(program, nbInputs, nbOutputs);
        if (pos < 0 || pos >= program.tensors()) refuse("there is no tensor %d", pos);
        Tensor const& tensor = program.tensor(pos);
        PluginTensorDesc const& found = inOut[pos].desc;
        bool const good = found.format == TensorFormat::kLINEAR && holds(tensor.type, found.type)
            && (tensor.alias < 0 || found.type == inOut[tensor.alias].desc.type);
        if (!good) {  // TensorRT tries all there are: not a word on stderr
            char text[96];
            std::snprintf(text, sizeof text, "%s (program line %d) has to be %s, linear; TensorRT offers type %d, format %d",
                TensorName(program, pos).text, tensor.line, nameOf(tensor.type), static_cast<int>(found.type),
                static_cast<int>(found.format));
            note(mNode, text);
        }
        return good;
    });
}

int32_t Plugin::getNbOutputs() const noexcept { return static_cast<int32_t>(mDefinition->program.outputs.size()); }

size_t Plugin::getWorkspaceSize(DynamicPluginTensorDesc const* inputs, int32_t nbInputs,
    DynamicPluginTensorDesc const* outputs, int32_t nbOutputs) const noexcept {
    return guarded(mNode, kImpossible, [&] {
        checkCounts(mDefinition->program, nbInputs, nbOutputs);
        return static_cast<size_t>(reservedBytes(mDefinition->program, inputs, outputs));
    });
}

int32_t Plugin::getAliasedInput(int32_t output) noexcept {
    if (output < 0 || output >= getNbOutputs()) return -1;
    return mDefinition->program.outputs[static_cast<size_t>(output)].alias;
}

int32_t Plugin::onShapeChange(
    PluginTensorDesc const* in, int32_t nbInputs, PluginTensorDesc const* out, int32_t nbOutputs) noexcept {
    return guarded(mNode, -1, [&] {
        checkCounts(mDefinition->program, nbInputs, nbOutputs);
        checkTensors(mDefinition->program, in, out);
        mLoaded = load(*mDefinition, mLoaded);
        run(*mDefinition, *mLoaded, in, out, nullptr);  // whatever these shapes make impossible is said now
        return 0;
    });
}

int32_t Plugin::enqueue(PluginTensorDesc const* inputDesc, PluginTensorDesc const* outputDesc, void const* const* inputs,
    void* const* outputs, void* workspace, cudaStream_t stream) noexcept {
    return guarded(mNode, -1, [&] {
        if (mLoaded == nullptr) refuse("enqueue before onShapeChange has loaded the kernels");
        Memory const memory{inputs, outputs, workspace, stream};
        run(*mDefinition, *mLoaded, inputDesc, outputDesc, &memory);
        return 0;
    });
}

IPluginV3* Plugin::attachToContext(IPluginResourceContext*) noexcept {
    auto* const made = static_cast<Plugin*>(clone());
    if (made == nullptr) return nullptr;
    // A builder attaches too, without a GPU or with another one: onShapeChange tries again, and says why it cannot be.
    try {
        made->mLoaded = load(*mDefinition, mLoaded);
    } catch (std::exception const& error) {
        note(mNode, error.what());
    } catch (...) {
    }
    return made;
}

PluginFieldCollection const* Plugin::getFieldsToSerialize() noexcept { return &mCollection; }

}  // namespace mla2dsa
