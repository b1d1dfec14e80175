// Runs an engine folder of `mla2dsa build` with TensorRT and CUDA alone: token ids in, token ids out (README.md).
//
//     run_engine [--host-code] ENGINE_FOLDER NEW_TOKENS ID...
//
// One sequence. The prompt goes through profile 0 ("prefill") in chunks, then every new token through profile 1 ("decode").
// Caches are allocated once; a call reads past_X and writes present_X, and both are bound to the same memory.
#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using namespace nvinfer1;
using Text = std::string;

[[noreturn]] void fail(Text const& text) { throw std::runtime_error(text); }

void check(cudaError_t result, char const* what) {
    if (result != cudaSuccess) fail(Text(what) + ": " + cudaGetErrorString(result));
}

void check(bool good, Text const& what) {
    if (!good) fail(what + " failed");
}

class Logger : public ILogger {
    void log(Severity severity, AsciiChar const* text) noexcept override {
        if (severity <= Severity::kWARNING) std::fprintf(stderr, "tensorrt: %s\n", text);
    }
};

struct Free {
    void operator()(void* pointer) const { cudaFree(pointer); }
};
using Memory = std::unique_ptr<void, Free>;

Memory zeros(size_t bytes) {
    void* made = nullptr;
    check(cudaMalloc(&made, std::max<size_t>(bytes, 1)), "allocating device memory");
    Memory memory(made);
    check(cudaMemset(made, 0, bytes), "clearing device memory");
    return memory;
}

size_t bytesOf(DataType type) {
    switch (type) {
    case DataType::kFLOAT:
    case DataType::kINT32: return 4;
    case DataType::kHALF:
    case DataType::kBF16: return 2;
    case DataType::kINT64: return 8;
    case DataType::kINT8:
    case DataType::kUINT8:
    case DataType::kBOOL:
    case DataType::kFP8: return 1;
    default: fail("an input or output has element type " + std::to_string(static_cast<int>(type)));
    }
}

size_t countOf(Dims const& dims) {
    size_t count = 1;
    for (int at = 0; at < dims.nbDims; ++at) {
        if (dims.d[at] < 0) fail("a size is not known: not all inputs have their shape");
        count *= static_cast<size_t>(dims.d[at]);
    }
    return count;
}

Dims dimsOf(std::vector<int64_t> const& sizes) {
    Dims dims{};
    dims.nbDims = static_cast<int32_t>(sizes.size());
    std::copy(sizes.begin(), sizes.end(), dims.d);
    return dims;
}

float numberOf(void const* data, size_t at, DataType type) {
    uint16_t half = 0;
    float number = 0;
    if (type == DataType::kFLOAT) {
        std::memcpy(&number, static_cast<float const*>(data) + at, sizeof number);
        return number;
    }
    std::memcpy(&half, static_cast<uint16_t const*>(data) + at, sizeof half);
    if (type == DataType::kBF16) {
        uint32_t const bits = static_cast<uint32_t>(half) << 16;
        std::memcpy(&number, &bits, sizeof number);
        return number;
    }
    int const exponent = half >> 10 & 31;
    int const fraction = half & 1023;
    if (exponent == 31) {
        number = fraction != 0 ? std::numeric_limits<float>::quiet_NaN() : std::numeric_limits<float>::infinity();
    } else {
        number = exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                               : std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
    }
    return (half & 0x8000) != 0 ? -number : number;
}

struct Cache {
    Text past;
    Text present;
    Memory memory;
};

// One sequence: what it has seen lives in the caches.
class Session {
public:
    Session(ICudaEngine& engine, int64_t tokens) : mEngine(engine), mDecode(engine.getNbOptimizationProfiles() - 1) {
        check(cudaStreamCreate(&mStream), "creating a stream");
        mContext.reset(engine.createExecutionContext());
        check(mContext != nullptr, "creating an execution context");
        if (mDecode > 1) fail("the engine has more than two profiles: mla2dsa build makes prefill and decode");
        readTensors();
        mSlots = slotsFor(tokens);
        for (Cache& cache : mCaches) {
            DataType const type = engine.getTensorDataType(cache.past.c_str());
            cache.memory = zeros(countOf(cacheDims(cache.past)) * bytesOf(type));
        }
        int64_t longest = 0;
        for (int profile : {0, mDecode}) {
            longest = std::max(longest, limit("input_ids", 1, profile, OptProfileSelector::kMAX));
        }
        for (size_t at = 0; at < mInputs.size(); ++at) {
            mInputMemory.push_back(zeros(static_cast<size_t>(longest) * sizeof(int64_t)));
        }
    }
    ~Session() {
        cudaStreamSynchronize(mStream);
        cudaStreamDestroy(mStream);
    }
    Session(Session const&) = delete;

    // The next token after these, which follow all that were fed before.
    int64_t feed(std::vector<int64_t> const& ids) {
        int64_t next = 0;
        int const profile = ids.size() == 1 ? mDecode : 0;
        int64_t const most = limit("input_ids", 1, profile, OptProfileSelector::kMAX);
        for (size_t at = 0; at < ids.size();) {
            size_t const count = std::min(ids.size() - at, static_cast<size_t>(most));
            next = step({ids.begin() + static_cast<long>(at), ids.begin() + static_cast<long>(at + count)}, profile);
            at += count;
        }
        return next;
    }

private:
    // past_X pairs with present_X; everything else that goes in is known by name.
    void readTensors() {
        for (int at = 0; at < mEngine.getNbIOTensors(); ++at) {
            Text const name = mEngine.getIOTensorName(at);
            bool const input = mEngine.getTensorIOMode(name.c_str()) == TensorIOMode::kINPUT;
            if (input && name.rfind("past_", 0) == 0) {
                Text const present = "present_" + name.substr(5);
                if (mEngine.getTensorIOMode(present.c_str()) != TensorIOMode::kOUTPUT) fail("no output " + present);
                mCaches.push_back({name, present, nullptr});
            } else if (input) {
                static char const* const known[] = {"input_ids", "position_ids", "slots", "key_begin", "last"};
                if (std::find(std::begin(known), std::end(known), name) == std::end(known)) fail("unknown input " + name);
                if (mEngine.getTensorDataType(name.c_str()) != DataType::kINT64) fail("input " + name + " is not int64");
                mInputs.push_back(name);
            }
        }
        if (mEngine.getTensorIOMode("logits") != TensorIOMode::kOUTPUT) fail("the engine has no output logits");
        if (mCaches.empty()) fail("the engine has no caches (inputs past_...): build it from an export of mla2dsa");
        mLogitsType = mEngine.getTensorDataType("logits");
        if (mLogitsType != DataType::kFLOAT && mLogitsType != DataType::kHALF && mLogitsType != DataType::kBF16) {
            fail("logits are not float32, float16 or bfloat16");
        }
    }

    int64_t limit(Text const& name, int axis, int profile, OptProfileSelector which) const {
        int64_t const fixed = mEngine.getTensorShape(name.c_str()).d[axis];
        return fixed >= 0 ? fixed : mEngine.getProfileShape(name.c_str(), profile, which).d[axis];
    }

    // Work grows with the cache's slots, so no more of them than there will be tokens. Both profiles have to take them.
    int64_t slotsFor(int64_t tokens) const {
        Text const& name = mCaches.front().past;
        int64_t most = std::numeric_limits<int64_t>::max();
        int64_t slots = tokens;
        for (int profile : {0, mDecode}) {
            if (limit(name, 0, profile, OptProfileSelector::kMIN) > 1) fail("the engine does not take a batch of 1");
            slots = std::max(slots, limit(name, 1, profile, OptProfileSelector::kMIN));
            most = std::min(most, limit(name, 1, profile, OptProfileSelector::kMAX));
        }
        if (slots > most) {
            fail(std::to_string(tokens) + " tokens, and the engine's caches hold " + std::to_string(most));
        }
        return slots;
    }

    Dims cacheDims(Text const& past) const { return dimsOf({1, mSlots, mEngine.getTensorShape(past.c_str()).d[2]}); }

    void setProfile(int profile) {
        if (profile == mProfile) return;
        check(mContext->setOptimizationProfileAsync(profile, mStream), "choosing profile " + std::to_string(profile));
        mProfile = profile;
    }

    void set(Text const& name, std::vector<int64_t> const& values, bool perToken) {
        auto const found = std::find(mInputs.begin(), mInputs.end(), name);
        if (found == mInputs.end()) {
            if (name == "last") return;  // exported with logits of all tokens
            fail("the engine has no input " + name);
        }
        void* const to = mInputMemory[static_cast<size_t>(found - mInputs.begin())].get();
        size_t const bytes = values.size() * sizeof(int64_t);
        check(cudaMemcpyAsync(to, values.data(), bytes, cudaMemcpyHostToDevice, mStream), "copying an input");
        int64_t const count = static_cast<int64_t>(values.size());
        check(mContext->setInputShape(name.c_str(), perToken ? dimsOf({1, count}) : dimsOf({count})), "shape of " + name);
        check(mContext->setTensorAddress(name.c_str(), to), "binding " + name);
    }

    int64_t step(std::vector<int64_t> ids, int profile) {
        setProfile(profile);
        int64_t const count = static_cast<int64_t>(ids.size());
        std::vector<int64_t> slots(ids.size());
        for (size_t at = 0; at < slots.size(); ++at) slots[at] = mFed + static_cast<int64_t>(at);
        // A chunk below the profile's minimum repeats its last token, in the same slot: that writes the same row again.
        size_t const least = static_cast<size_t>(limit("input_ids", 1, profile, OptProfileSelector::kMIN));
        ids.resize(std::max(ids.size(), least), ids.back());
        slots.resize(ids.size(), slots.back());
        set("input_ids", ids, true);
        set("position_ids", slots, true);
        set("slots", slots, true);
        set("key_begin", {0}, false);
        set("last", {count - 1}, false);
        for (Cache const& cache : mCaches) {
            check(mContext->setInputShape(cache.past.c_str(), cacheDims(cache.past)), "shape of " + cache.past);
            check(mContext->setTensorAddress(cache.past.c_str(), cache.memory.get()), "binding " + cache.past);
            check(mContext->setTensorAddress(cache.present.c_str(), cache.memory.get()), "binding " + cache.present);
        }
        Dims const shape = mContext->getTensorShape("logits");
        size_t const bytes = countOf(shape) * bytesOf(mLogitsType);
        if (bytes > mLogitsBytes) {
            mLogits = zeros(bytes);
            mLogitsBytes = bytes;
        }
        check(mContext->setTensorAddress("logits", mLogits.get()), "binding logits");
        check(mContext->enqueueV3(mStream), "running the engine");
        mFed += count;
        return likeliest(shape, count - 1);
    }

    // Of the row at `last`, or of the only one there is. The lowest id of equals.
    int64_t likeliest(Dims const& shape, int64_t last) {
        size_t const vocab = static_cast<size_t>(shape.d[2]);
        size_t const row = shape.d[1] == 1 ? 0 : static_cast<size_t>(last);
        std::vector<char> host(vocab * bytesOf(mLogitsType));
        char const* const from = static_cast<char const*>(mLogits.get()) + row * host.size();
        check(cudaMemcpyAsync(host.data(), from, host.size(), cudaMemcpyDeviceToHost, mStream), "copying the logits");
        check(cudaStreamSynchronize(mStream), "running the engine");
        size_t best = 0;
        for (size_t at = 0; at < vocab; ++at) {
            float const number = numberOf(host.data(), at, mLogitsType);
            if (std::isnan(number)) fail("the logits are not numbers");
            if (number > numberOf(host.data(), best, mLogitsType)) best = at;
        }
        return static_cast<int64_t>(best);
    }

    ICudaEngine& mEngine;
    int const mDecode;
    std::unique_ptr<IExecutionContext> mContext;
    cudaStream_t mStream = nullptr;
    int mProfile = 0;  // a new context's
    std::vector<Cache> mCaches;
    std::vector<Text> mInputs;
    std::vector<Memory> mInputMemory;  // one per input
    Memory mLogits;
    size_t mLogitsBytes = 0;
    DataType mLogitsType{};
    int64_t mSlots = 0;
    int64_t mFed = 0;
};

std::vector<char> read(Text const& path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) fail(path + ": cannot be read");
    return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

int64_t integer(char const* text, int64_t least) {
    char* end = nullptr;
    errno = 0;
    long long const number = std::strtoll(text, &end, 10);
    if (end == text || *end != 0 || errno != 0 || number < least) {
        fail(Text(text) + " is not a whole number of at least " + std::to_string(least));
    }
    return number;
}

void run(std::vector<char*> words) {
    bool const hostCode = !words.empty() && std::strcmp(words[0], "--host-code") == 0;
    if (hostCode) words.erase(words.begin());
    if (words.size() < 3) fail("usage: run_engine [--host-code] ENGINE_FOLDER NEW_TOKENS ID...");
    Text const folder = words[0];
    int64_t const wanted = integer(words[1], 1);
    std::vector<int64_t> ids;
    for (size_t at = 2; at < words.size(); ++at) ids.push_back(integer(words[at], 0));

    Logger logger;
    std::vector<char> const plan = read(folder + "/model.engine");
    std::unique_ptr<IRuntime> const runtime(createInferRuntime(logger));
    check(runtime != nullptr, "starting TensorRT");
    Text const library = folder + "/libmla2dsa_trt.so";
    if (hostCode) {
        runtime->setEngineHostCodeAllowed(true);  // the plan has the plugin library inside
    } else if (runtime->getPluginRegistry().loadLibrary(library.c_str()) == nullptr) {
        fail(library + ": TensorRT cannot load it");
    }
    std::unique_ptr<ICudaEngine> const engine(runtime->deserializeCudaEngine(plan.data(), plan.size()));
    if (engine == nullptr) fail(folder + "/model.engine: TensorRT cannot use it on this machine");

    Session session(*engine, static_cast<int64_t>(ids.size()) + wanted - 1);
    int64_t next = session.feed(ids);
    for (int64_t made = 1;; ++made) {
        std::printf("%lld%c", static_cast<long long>(next), made == wanted ? '\n' : ' ');
        std::fflush(stdout);
        if (made == wanted) return;
        next = session.feed({next});
    }
}

}  // namespace

int main(int count, char** words) {
    try {
        run({words + 1, words + count});
    } catch (std::exception const& error) {
        std::fprintf(stderr, "run_engine: %s\n", error.what());
        return 1;
    }
}
