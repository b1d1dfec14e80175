// Runs an engine folder of `mla2dsa build` with TensorRT and CUDA alone: token ids in, token ids out (README.md).
//
//     run_engine [--host-code] ENGINE_FOLDER NEW_TOKENS ID...
//
// One sequence, greedy; it ends before the first token that the folder's manifest has among its eos_token_id. The prompt goes through profile 0 ("prefill") in chunks, then every new token through profile 1 ("decode").
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
#include <map>
#include <memory>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace {

using namespace nvinfer1;
using Text = std::string;
constexpr auto kMin = OptProfileSelector::kMIN, kMax = OptProfileSelector::kMAX;

[[noreturn]] void fail(Text const& text) { throw std::runtime_error(text); }

void check(cudaError_t result, char const* what) {
    if (result != cudaSuccess) fail(Text(what) + ": " + cudaGetErrorString(result));
}

void check(bool good, Text const& what) {
    if (!good) fail(what + " failed");
}

class Logger : public ILogger {
    void log(Severity severity, char const* text) noexcept override {
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
    if (type == DataType::kFLOAT) return 4;
    if (type == DataType::kHALF || type == DataType::kBF16) return 2;
    if (type == DataType::kINT8 || type == DataType::kUINT8 || type == DataType::kFP8) return 1;
    fail("a cache or the logits have element type " + std::to_string(static_cast<int>(type)));
}

size_t countOf(Dims const& dims) {
    size_t count = 1;
    for (int at = 0; at < dims.nbDims; ++at) count *= static_cast<size_t>(dims.d[at]);
    return count;
}

Dims dimsOf(std::vector<int64_t> const& sizes) {
    Dims dims{static_cast<int32_t>(sizes.size()), {}};
    std::copy(sizes.begin(), sizes.end(), dims.d);
    return dims;
}

float numberOf(void const* data, size_t at, DataType type) {
    if (type == DataType::kFLOAT) return static_cast<float const*>(data)[at];
    uint32_t const half = static_cast<uint16_t const*>(data)[at];
    uint32_t bits = half << 16;  // bfloat16: the upper half of a float
    if (type == DataType::kHALF) bits = (half & 0x8000) << 16 | (half & 0x7fff) << 13;
    float number = 0;
    std::memcpy(&number, &bits, sizeof number);
    if (type == DataType::kBF16) return number;
    if ((half & 0x7c00) == 0x7c00) return std::numeric_limits<float>::quiet_NaN();  // infinite ones too: no logit is
    return number * 0x1p112f;  // the exponent counts from 15 in one and from 127 in the other
}

struct Cache {
    Text past, present;
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
        int64_t const longest = std::max(limit("input_ids", 1, 0, kMax), limit("input_ids", 1, mDecode, kMax));
        for (auto& [name, memory] : mInputs) memory = zeros(static_cast<size_t>(longest) * sizeof(int64_t));
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
        int64_t const most = limit("input_ids", 1, profile, kMax);
        for (auto at = ids.begin(); at != ids.end();) {
            auto const end = at + std::min<int64_t>(ids.end() - at, most);
            next = step({at, end}, profile);
            at = end;
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
                if (mEngine.getTensorDataType(name.c_str()) != DataType::kINT64) fail("input " + name + " is not int64");
                mInputs[name] = nullptr;
            }
        }
        if (mEngine.getTensorIOMode("logits") != TensorIOMode::kOUTPUT) fail("the engine has no output logits");
        if (mCaches.empty()) fail("the engine has no caches (inputs past_...): build it from an export of mla2dsa");
        mLogitsType = mEngine.getTensorDataType("logits");
        if (bytesOf(mLogitsType) < 2) fail("the logits are not float32, float16 or bfloat16");
    }

    int64_t limit(Text const& name, int axis, int profile, OptProfileSelector which) const {
        int64_t const fixed = mEngine.getTensorShape(name.c_str()).d[axis];
        return fixed >= 0 ? fixed : mEngine.getProfileShape(name.c_str(), profile, which).d[axis];
    }

    // Work grows with the cache's slots, so no more of them than there will be tokens. Both profiles have to take them.
    int64_t slotsFor(int64_t tokens) const {
        Text const& name = mCaches.front().past;
        int64_t slots = tokens, most = std::numeric_limits<int64_t>::max();
        for (int profile : {0, mDecode}) {
            if (limit(name, 0, profile, kMin) > 1) fail("the engine does not take a batch of 1");
            slots = std::max(slots, limit(name, 1, profile, kMin));
            most = std::min(most, limit(name, 1, profile, kMax));
        }
        if (slots > most) fail(std::to_string(tokens) + " tokens, the engine's caches hold " + std::to_string(most));
        return slots;
    }

    Dims cacheDims(Text const& past) const { return dimsOf({1, mSlots, mEngine.getTensorShape(past.c_str()).d[2]}); }

    void set(Text const& name, std::vector<int64_t> const& values, bool perToken) {
        auto const found = mInputs.find(name);
        if (found == mInputs.end() && name == "last") return;  // exported with the logits of all tokens
        if (found == mInputs.end()) fail("the engine has no input " + name);
        void* const to = found->second.get();
        size_t const bytes = values.size() * sizeof(int64_t);
        check(cudaMemcpyAsync(to, values.data(), bytes, cudaMemcpyHostToDevice, mStream), "copying an input");
        int64_t const count = static_cast<int64_t>(values.size());
        check(mContext->setInputShape(name.c_str(), perToken ? dimsOf({1, count}) : dimsOf({count})), "shaping " + name);
        check(mContext->setTensorAddress(name.c_str(), to), "binding " + name);
    }

    int64_t step(std::vector<int64_t> ids, int profile) {
        if (profile != mProfile) check(mContext->setOptimizationProfileAsync(profile, mStream), "choosing a profile");
        mProfile = profile;
        int64_t const count = static_cast<int64_t>(ids.size());
        std::vector<int64_t> slots(ids.size());
        std::iota(slots.begin(), slots.end(), mFed);
        // A chunk below the profile's minimum repeats its last token, in the same slot: that writes the same row again.
        size_t const least = static_cast<size_t>(limit("input_ids", 1, profile, kMin));
        ids.resize(std::max(ids.size(), least), ids.back());
        slots.resize(ids.size(), slots.back());
        set("input_ids", ids, true);
        set("position_ids", slots, true);
        set("slots", slots, true);
        set("key_begin", {0}, false);
        set("last", {count - 1}, false);
        for (Cache const& cache : mCaches) {
            check(mContext->setInputShape(cache.past.c_str(), cacheDims(cache.past)), "shaping " + cache.past);
            check(mContext->setTensorAddress(cache.past.c_str(), cache.memory.get()), "binding " + cache.past);
            check(mContext->setTensorAddress(cache.present.c_str(), cache.memory.get()), "binding " + cache.present);
        }
        Dims const shape = mContext->getTensorShape("logits");
        size_t const bytes = countOf(shape) * bytesOf(mLogitsType);
        if (bytes > std::exchange(mLogitsBytes, std::max(mLogitsBytes, bytes))) mLogits = zeros(bytes);
        check(mContext->setTensorAddress("logits", mLogits.get()), "binding logits");
        check(mContext->enqueueV3(mStream), "running the engine");
        mFed += count;
        return likeliest(shape, static_cast<size_t>(count - 1));
    }

    // Of the row at `last`, or of the only one there is. The lowest id of equals.
    int64_t likeliest(Dims const& shape, size_t last) {
        size_t const vocab = static_cast<size_t>(shape.d[2]);
        std::vector<char> host(vocab * bytesOf(mLogitsType));
        char const* const from = static_cast<char const*>(mLogits.get()) + (shape.d[1] == 1 ? 0 : last * host.size());
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
    int const mDecode;  // the profile
    std::unique_ptr<IExecutionContext> mContext;
    cudaStream_t mStream = nullptr;
    int mProfile = 0;  // a new context's
    std::vector<Cache> mCaches;
    std::map<Text, Memory> mInputs;
    Memory mLogits;
    size_t mLogitsBytes = 0;
    DataType mLogitsType{};
    int64_t mSlots = 0;
    int64_t mFed = 0;  // tokens
};

std::vector<char> read(Text const& path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) fail(path + ": cannot be read");
    return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

// The tokens that end a text: "eos_token_id": [1, 2] in the manifest, the only key of that name there.
std::vector<int64_t> stopTokens(Text const& path) {
    std::vector<char> const bytes = read(path);
    Text const text(bytes.begin(), bytes.end());
    Text const key = "\"eos_token_id\"";
    size_t const at = text.find(key);
    std::istringstream rest(at == Text::npos ? Text() : text.substr(at + key.size()));
    std::vector<int64_t> found;
    char sign = 0;
    bool good = static_cast<bool>(rest >> sign) && sign == ':' && rest >> sign && sign == '[';
    good = good && rest >> std::ws && (rest.peek() != ']' || rest >> sign);
    for (int64_t id = 0; good && sign != ']'; found.push_back(id)) {
        good = rest >> id && id >= 0 && rest >> sign && (sign == ',' || sign == ']');
    }
    if (!good) fail(path + ": eos_token_id is no list of token ids; build the engine again");
    return found;
}

int64_t integer(char const* text, int64_t least) {
    char* end = nullptr;
    errno = 0;
    long long const number = std::strtoll(text, &end, 10);
    bool const good = end != text && *end == 0 && errno == 0 && number >= least;
    if (!good) fail(Text(text) + " is not a whole number of at least " + std::to_string(least));
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

    std::vector<char> const plan = read(folder + "/model.engine");
    std::vector<int64_t> const stop = stopTokens(folder + "/mla2dsa-engine.json");
    Logger logger;
    std::unique_ptr<IRuntime> const runtime(createInferRuntime(logger));
    check(runtime != nullptr, "starting TensorRT");
    Text const library = folder + "/libmla2dsa_trt.so";
    if (hostCode) runtime->setEngineHostCodeAllowed(true);  // the plan has the plugin library inside
    if (!hostCode && runtime->getPluginRegistry().loadLibrary(library.c_str()) == nullptr) {
        fail(library + ": TensorRT cannot load it");
    }
    std::unique_ptr<ICudaEngine> const engine(runtime->deserializeCudaEngine(plan.data(), plan.size()));
    if (engine == nullptr) fail(folder + "/model.engine: TensorRT cannot use it on this machine");

    Session session(*engine, static_cast<int64_t>(ids.size()) + wanted - 1);  // the last token made is not fed
    for (int64_t made = 1; made <= wanted; ++made) {
        ids = {session.feed(ids)};
        if (std::find(stop.begin(), stop.end(), ids[0]) != stop.end()) break;
        std::printf("%s%lld", made == 1 ? "" : " ", static_cast<long long>(ids[0]));
        std::fflush(stdout);
    }
    std::printf("\n");
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
