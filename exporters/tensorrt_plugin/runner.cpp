#include "runner.h"

#include <algorithm>

#include "errors.h"
#include "shapes.h"
#include "text.h"

namespace mla2dsa {
namespace {

using nvinfer1::Dims;
using nvinfer1::PluginTensorDesc;

int64_t number(Expression const& expression, Values const& values, int line, char const* what) {
    int64_t result = 0;
    Fault const fault = evaluate(expression, values, result);
    if (fault != Fault::kNone) refuse("program line %d: %s %s", line, what, describe(fault));
    return result;
}

int64_t size(Expression const& expression, Values const& values, int line, char const* what) {
    int64_t const result = number(expression, values, line, what);
    if (result < 0) refuse("program line %d: %s is %lld", line, what, static_cast<long long>(result));
    return result;
}

void name(std::vector<Let> const& lets, Values& values) noexcept {
    for (Let const& let : lets) {
        int64_t result = 0;
        values.faults[let.place] = evaluate(let.value, values, result);
        values.names[let.place] = result;
    }
}

class Run {
public:
    Run(Definition const& definition, Loaded const& loaded, Memory const* memory)
        : mDefinition(definition), mProgram(definition.program), mLoaded(loaded), mMemory(memory) {}

    void operator()(PluginTensorDesc const* inputs, PluginTensorDesc const* outputs) {
        bind(inputs, outputs);
        if (nothingToDo()) return;
        if (mMemory != nullptr) copyAliases();
        Form const& form = choose();
        name(form.lets, mValues);
        reserveWorkspace(form);
        countLaunches(form);
        for (Step const& step : form.steps) {
            if (step.loop) {
                repeat(form.loops[step.index]);
            } else {
                launch(form.launches[step.index]);
            }
        }
    }

private:
    void bind(PluginTensorDesc const* inputs, PluginTensorDesc const* outputs) {
        int const count = static_cast<int>(mProgram.inputs.size());
        Dims const* dims[kMaxTensors];
        for (int at = 0; at < mProgram.tensors(); ++at) {
            dims[at] = at < count ? &inputs[at].dims : &outputs[at - count].dims;
            mBase[at] = 0;
            if (mMemory == nullptr) continue;
            void const* const pointer = at < count ? mMemory->inputs[at] : mMemory->outputs[at - count];
            mBase[at] = reinterpret_cast<uintptr_t>(pointer);
        }
        bindDims(mProgram, dims, mValues);
        for (int at = 0; at < mProgram.tensors(); ++at) mBytes[at] = bytesOf(mProgram.tensor(at), mValues.dims[at]);
        mValues.units = mLoaded.units;
    }

    bool nothingToDo() const noexcept {
        return std::all_of(mBytes + mProgram.inputs.size(), mBytes + mProgram.tensors(), [](int64_t b) { return b == 0; });
    }

    void copyAliases() {
        size_t const count = mProgram.inputs.size();
        for (size_t at = 0; at < mProgram.outputs.size(); ++at) {
            int const from = mProgram.outputs[at].alias;
            size_t const to = count + at;
            if (from < 0 || mBase[from] == mBase[to] || mBytes[to] == 0) continue;
            if (mBytes[from] != mBytes[to]) refuse("output %zu is written in place of input %d, and has other dims", at, from);
            Driver const& driver = *mLoaded.driver;
            Result const result
                = driver.memcpyDtoDAsync(mBase[to], mBase[from], static_cast<size_t>(mBytes[to]), mMemory->stream);
            if (result != 0) refuse("copying input %d to output %zu: %s", from, at, nameOf(driver, result));
        }
    }

    Form const& choose() const {
        for (Form const& form : mProgram.forms) {
            auto const& all = form.architectures;
            if (std::find(all.begin(), all.end(), mLoaded.architecture) == all.end()) continue;
            if (number(form.guard, mValues, form.line, "the guard") > 0) return form;
        }
        refuse("no form of the program is for sm_%d and these shapes", mLoaded.architecture);
    }

    void reserveWorkspace(Form const& form) {
        mWorkspaceBytes = size(form.workspace, mValues, form.workspaceLine, "the workspace");
        int64_t const reserved = size(form.reserve, mValues, form.reserveLine, "the reserve");
        if (mWorkspaceBytes > reserved) {
            refuse("program line %d: a workspace of %lld bytes, and %lld are reserved", form.workspaceLine,
                static_cast<long long>(mWorkspaceBytes), static_cast<long long>(reserved));
        }
        mWorkspace = mMemory == nullptr ? 0 : reinterpret_cast<uintptr_t>(mMemory->workspace);
        if (mMemory != nullptr && mWorkspace == 0 && mWorkspaceBytes > 0) {
            refuse("TensorRT gives no workspace, %lld bytes are needed", static_cast<long long>(mWorkspaceBytes));
        }
    }

    // Before the first launch: too many are refused whole.
    void countLaunches(Form const& form) {
        int64_t total = static_cast<int64_t>(form.launches.size());
        for (Loop const& loop : form.loops) {
            int64_t const stop = number(loop.stop, mValues, loop.line, "the end of repeat");
            int64_t const step = number(loop.step, mValues, loop.line, "the step of repeat");
            if (step < 1) refuse("program line %d: a step of %lld", loop.line, static_cast<long long>(step));
            int64_t const times = stop < 1 ? 0 : (stop - 1) / step + 1;
            int64_t const each = static_cast<int64_t>(loop.launches.size());
            if (times > kMaxLaunched || (total += times * each) > kMaxLaunched) {
                refuse("program line %d: more than %lld launches", loop.line, static_cast<long long>(kMaxLaunched));
            }
        }
    }

    void repeat(Loop const& loop) {
        int64_t const stop = number(loop.stop, mValues, loop.line, "the end of repeat");
        int64_t const step = number(loop.step, mValues, loop.line, "the step of repeat");
        for (int64_t at = 0; at < stop;) {
            mValues.loop = at;
            name(loop.lets, mValues);
            for (Launch const& one : loop.launches) launch(one);
            if (__builtin_add_overflow(at, step, &at)) return;
        }
    }

    void launch(Launch const& launch) {
        unsigned grid[3];
        bool empty = false;
        for (int axis = 0; axis < 3; ++axis) {
            int64_t const programs = size(launch.grid[axis], mValues, launch.line, "the grid");
            if (programs > (axis == 0 ? kMaxGridX : kMaxGridYZ)) {
                refuse("program line %d: a grid of %lld programs in dim %d", launch.line,
                    static_cast<long long>(programs), axis);
            }
            grid[axis] = static_cast<unsigned>(programs);
            empty = empty || programs == 0;
        }
        if (empty) return;
        Kernel const& kernel = mDefinition.kernel(launch);
        uint64_t words[kMaxParameters];
        void* pointers[kMaxParameters];
        for (size_t at = 0; at < launch.words.size(); ++at) {
            words[at] = word(launch, launch.words[at], at, kernel.aligned[at]);
            pointers[at] = &words[at];  // little endian: the low half of a word is its 32 bits
        }
        if (mMemory == nullptr) return;
        Loaded::Function const& function = mLoaded.functions[static_cast<size_t>(launch.index)];
        Driver const& driver = *mLoaded.driver;
        Result const result = driver.launchKernel(function.handle, grid[0], grid[1], grid[2], function.threads, 1, 1,
            function.shared, mMemory->stream, pointers, nullptr);
        if (result != 0) {
            refuse("program line %d: launching %s: %s", launch.line, Shown(launch.kernel).text, nameOf(driver, result));
        }
    }

    uint64_t word(Launch const& launch, Word const& word, size_t at, bool aligned) const {
        uint64_t made = 0;
        switch (word.kind) {
        case 'f': return word.bits;
        case 'n': return 0;
        case 't': made = pointer(launch, word, at, mBase[word.tensor], mBytes[word.tensor]); break;
        case 'w': made = pointer(launch, word, at, mWorkspace, mWorkspaceBytes); break;
        default: {
            int64_t const value = number(word.value, mValues, launch.line, "a parameter");
            if (word.kind == 'i' && value != static_cast<int32_t>(value)) {
                refuse("program line %d: parameter %zu is %lld, and has 32 bits", launch.line, at,
                    static_cast<long long>(value));
            }
            made = word.kind == 'i' ? static_cast<uint32_t>(value) : static_cast<uint64_t>(value);
        }
        }
        if (aligned && made % kDivisor != 0) {
            refuse("program line %d: parameter %zu of %s is 0x%llx, and has to be divisible by %d", launch.line, at,
                Shown(launch.kernel).text, static_cast<unsigned long long>(made), static_cast<int>(kDivisor));
        }
        return made;
    }

    uint64_t pointer(Launch const& launch, Word const& word, size_t at, uintptr_t base, int64_t bytes) const {
        int64_t const offset = size(word.value, mValues, launch.line, "an offset");
        if (offset > bytes) {
            refuse("program line %d: parameter %zu points %lld bytes into %lld", launch.line, at,
                static_cast<long long>(offset), static_cast<long long>(bytes));
        }
        return base + static_cast<uint64_t>(offset);
    }

    Definition const& mDefinition;
    Program const& mProgram;
    Loaded const& mLoaded;
    Memory const* mMemory;
    Values mValues;
    uintptr_t mBase[kMaxTensors];
    int64_t mBytes[kMaxTensors];
    uintptr_t mWorkspace = 0;
    int64_t mWorkspaceBytes = 0;
};

}  // namespace

void run(Definition const& definition, Loaded const& loaded, PluginTensorDesc const* inputs,
    PluginTensorDesc const* outputs, Memory const* memory) {
    Run(definition, loaded, memory)(inputs, outputs);
}

int64_t reservedBytes(Program const& program, nvinfer1::DynamicPluginTensorDesc const* inputs,
    nvinfer1::DynamicPluginTensorDesc const* outputs) {
    int const count = static_cast<int>(program.inputs.size());
    Dims const* dims[kMaxTensors];
    for (int at = 0; at < program.tensors(); ++at) dims[at] = at < count ? &inputs[at].max : &outputs[at - count].max;
    Values values;
    bindDims(program, dims, values);
    int64_t most = 0;
    for (Form const& form : program.forms) {
        name(form.lets, values);
        most = std::max(most, size(form.reserve, values, form.reserveLine, "the reserve"));
    }
    return most;
}

}  // namespace mla2dsa
