// What TensorRT finds in the library: one creator per plugin, and the functions that it and a host call.
#include <cstring>
#include <string_view>

#include "errors.h"
#include "format_limits.h"
#include "plugin.h"

namespace mla2dsa {
namespace {

using namespace nvinfer1;

std::string_view bytesOf(PluginFieldCollection const* fields, char const* name) {
    for (int32_t at = 0; fields != nullptr && at < fields->nbFields; ++at) {
        PluginField const& field = fields->fields[at];
        if (field.name == nullptr || std::strcmp(field.name, name) != 0) continue;
        if (field.type != PluginFieldType::kCHAR) {
            refuse("field %s has type %d, expected kCHAR (6)", name, static_cast<int>(field.type));
        }
        if (field.data == nullptr || field.length < 1) refuse("field %s is empty", name);
        return {static_cast<char const*>(field.data), static_cast<size_t>(field.length)};
    }
    refuse("field %s is missing; build the engine's network with mla2dsa build", name);
}

class Creator final : public IPluginCreatorV3One {
public:
    explicit Creator(char const* name) : mName(name) {}

    IPluginV3* createPlugin(char const* name, PluginFieldCollection const* fields, TensorRTPhase) noexcept override {
        std::string node;
        try {
            node = name != nullptr && *name != 0 ? name : mName;
        } catch (...) {  // no memory for a name: the message does without
        }
        return guarded<IPluginV3*>(node, nullptr, [&] {
            return new Plugin(node, define(mName, bytesOf(fields, kProgramField), bytesOf(fields, kKernelsField)));
        });
    }

    // The ONNX parser looks for an attribute by each of these names, and warns when there is none.
    PluginFieldCollection const* getFieldNames() noexcept override { return &mCollection; }

    char const* getPluginName() const noexcept override { return mName; }
    char const* getPluginVersion() const noexcept override { return kPluginVersion; }
    char const* getPluginNamespace() const noexcept override { return kNamespace; }

private:
    char const* mName;
    PluginField mFields[2] = {{kProgramField, nullptr, PluginFieldType::kCHAR, 0},
        {kKernelsField, nullptr, PluginFieldType::kCHAR, 0}};
    PluginFieldCollection mCollection{2, mFields};
};

}  // namespace
}  // namespace mla2dsa

#define MLA2DSA_EXPORT extern "C" __attribute__((visibility("default")))

MLA2DSA_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
    // Never destroyed: a registry may outlive the library's own statics.
    static nvinfer1::IPluginCreatorInterface* const all[] = {new mla2dsa::Creator("LightningIndexer"),
        new mla2dsa::Creator("SparseMLA"), new mla2dsa::Creator("CacheWrite")};
    count = sizeof all / sizeof *all;
    return all;
}

// TensorRT offers its logger; it is not taken, for its table of functions changed in TensorRT 11.
MLA2DSA_EXPORT void setLoggerFinder(void*) {}

// Why the last call failed ("NODE: TEXT"), "" if none has. Valid until this thread asks again.
MLA2DSA_EXPORT char const* mla2dsa_last_error() { return mla2dsa::lastError(); }

// The version of program and kernels that the library reads.
MLA2DSA_EXPORT int32_t mla2dsa_plugin_version() { return mla2dsa::kFormatVersion; }
