// The part of TensorRT that examples/deploy/run_engine.cpp uses, with one built-in model instead of engines: for tests of how
// the program calls it. The plan's first word is the type of the logits: 0 float32, 1 float16, 7 bfloat16.
//
// The model keeps each token (plus 1) in its cache's row and makes (sum of the tokens so far + their count) % kVocab of them.
// Prefill takes 2 to 4 tokens at a time, decode one; a cache has 4 to 16 slots.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstdio>
#include <fstream>
#include <map>
#include <string>

namespace nvinfer1 {

enum class DataType : int32_t { kFLOAT = 0, kHALF = 1, kINT8 = 2, kINT32 = 3, kUINT8 = 5, kFP8 = 6, kBF16 = 7, kINT64 = 8 };
enum class TensorIOMode : int32_t { kNONE, kINPUT, kOUTPUT };
enum class OptProfileSelector : int32_t { kMIN, kOPT, kMAX };

struct Dims {
    int32_t nbDims;
    int64_t d[8];
};

class ILogger {
public:
    enum class Severity : int32_t { kINTERNAL_ERROR, kERROR, kWARNING, kINFO, kVERBOSE };
    virtual void log(Severity severity, char const* text) noexcept = 0;
    virtual ~ILogger() = default;
};

constexpr int64_t kVocab = 97, kWidth = 3;

class IExecutionContext {
public:
    DataType logits{};
    int profile = 0;
    std::map<std::string, Dims> shapes;
    std::map<std::string, void*> memory;

    bool setOptimizationProfileAsync(int to, cudaStream_t) {
        profile = to;
        shapes.clear();
        return true;
    }
    bool setInputShape(char const* name, Dims const& dims) {
        shapes[name] = dims;
        return true;
    }
    bool setTensorAddress(char const* name, void* to) {
        memory[name] = to;
        return true;
    }
    Dims getTensorShape(char const*) const { return {3, {1, 1, kVocab}}; }

    bool enqueueV3(cudaStream_t) {
        int64_t const tokens = shapes.at("input_ids").d[1];
        int64_t const slots = shapes.at("past_latent_0").d[1];
        bool good = profile == 0 ? tokens >= 2 && tokens <= 4 : tokens == 1;
        good = good && slots >= 4 && slots <= 16 && shapes.at("last").nbDims == 1 && shapes.at("key_begin").nbDims == 1;
        for (char const* name : {"position_ids", "slots"}) good = good && shapes.at(name).d[1] == tokens;
        good = good && memory.at("past_latent_0") == memory.at("present_latent_0");
        if (!good) return false;
        auto const ints = [&](char const* name) { return static_cast<int64_t const*>(memory.at(name)); };
        float* const cache = static_cast<float*>(memory.at("present_latent_0"));
        for (int64_t at = 0; at < tokens; ++at) {
            int64_t const slot = ints("slots")[at];
            if (slot < 0 || slot >= slots || ints("position_ids")[at] != slot) return false;
            cache[slot * kWidth] = static_cast<float>(ints("input_ids")[at] + 1);
        }
        int64_t const end = ints("slots")[ints("last")[0]] + 1;
        int64_t sum = 0;
        for (int64_t slot = ints("key_begin")[0]; slot < end; ++slot) sum += static_cast<int64_t>(cache[slot * kWidth]);
        for (int64_t token = 0; token < kVocab; ++token) write(token, token == sum % kVocab);
        return true;
    }

private:
    // 1.5 and, for the others, -2: both are exact in every type.
    void write(int64_t at, bool wanted) {
        void* const to = memory.at("logits");
        if (logits == DataType::kFLOAT) static_cast<float*>(to)[at] = wanted ? 1.5F : -2.0F;
        if (logits == DataType::kHALF) static_cast<uint16_t*>(to)[at] = wanted ? 0x3e00 : 0xc000;
        if (logits == DataType::kBF16) static_cast<uint16_t*>(to)[at] = wanted ? 0x3fc0 : 0xc000;
    }
};

class ICudaEngine {
public:
    DataType logits{};

    int getNbOptimizationProfiles() const { return 2; }
    int getNbIOTensors() const { return 8; }
    char const* getIOTensorName(int at) const {
        static char const* const names[] = {"input_ids", "position_ids", "slots", "key_begin", "last", "past_latent_0", "logits",
            "present_latent_0"};
        return names[at];
    }
    TensorIOMode getTensorIOMode(char const* name) const {
        for (int at = 0; at < 8; ++at) {
            if (std::string(name) == getIOTensorName(at)) return at < 6 ? TensorIOMode::kINPUT : TensorIOMode::kOUTPUT;
        }
        return TensorIOMode::kNONE;
    }
    DataType getTensorDataType(char const* name) const {
        std::string const text = name;
        if (text == "logits") return logits;
        return text.find("latent") != std::string::npos ? DataType::kFLOAT : DataType::kINT64;
    }
    Dims getTensorShape(char const* name) const {
        std::string const text = name;
        if (text.find("latent") != std::string::npos) return {3, {-1, -1, kWidth}};
        return text == "key_begin" || text == "last" ? Dims{1, {-1}} : Dims{2, {-1, -1}};
    }
    Dims getProfileShape(char const* name, int profile, OptProfileSelector which) const {
        bool const most = which == OptProfileSelector::kMAX;
        if (std::string(name).rfind("past_", 0) == 0) return {3, {1, most ? 16 : 4, kWidth}};
        return {2, {1, profile == 1 ? 1 : most ? 4 : 2}};
    }
    IExecutionContext* createExecutionContext() {
        auto* const made = new IExecutionContext();
        made->logits = logits;
        return made;
    }
};

class IPluginRegistry {
public:
    bool loaded = false;
    void* loadLibrary(char const* path) {
        loaded = std::ifstream(path).good();
        return loaded ? this : nullptr;
    }
};

class IRuntime {
public:
    ILogger* logger = nullptr;
    IPluginRegistry registry;
    bool hostCode = false;

    IPluginRegistry& getPluginRegistry() { return registry; }
    void setEngineHostCodeAllowed(bool allowed) { hostCode = allowed; }
    ICudaEngine* deserializeCudaEngine(void const* plan, size_t size) {
        int type = -1;
        std::string const text(static_cast<char const*>(plan), size);
        if (std::sscanf(text.c_str(), "%d", &type) != 1 || registry.loaded == hostCode) {
            logger->log(ILogger::Severity::kERROR, "the plan is damaged");
            return nullptr;
        }
        auto* const made = new ICudaEngine();
        made->logits = static_cast<DataType>(type);
        return made;
    }
};

inline IRuntime* createInferRuntime(ILogger& logger) {
    auto* const made = new IRuntime();
    made->logger = &logger;
    return made;
}

}  // namespace nvinfer1
