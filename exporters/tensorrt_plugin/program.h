// A program as it is in memory: what docs/tensorrt.md says of the field `program`.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "expression.h"

namespace mla2dsa {

enum class Element : uint8_t { kBf16, kFp16, kFp32, kFp8, kI32, kI64, kU8 };

char const* nameOf(Element element) noexcept;

int64_t bytesOf(Element element) noexcept;

// Whether TensorRT may hold the element type as `type`. Bytes go as INT8 too: UINT8 cannot leave a network.
bool holds(Element element, nvinfer1::DataType type) noexcept;

nvinfer1::DataType typeOf(Element element) noexcept;

struct Dim {
    bool any = false;  // inputs only: whatever it is
    Expression size;   // else
};

struct Tensor {
    Element type{};
    std::vector<Dim> dims;
    int alias = -1;  // outputs: the input that it is written in place of
    int line = 0;
};

struct Word {
    char kind = 'n';  // t w i l f n
    int tensor = 0;
    Expression value;  // t, w: bytes; i, l: the number
    uint32_t bits = 0;  // f
};

struct Launch {
    std::string kernel;
    int index = 0;  // of the kernel in the bundle
    Expression grid[3];
    std::vector<Word> words;
    int line = 0;
};

struct Let {
    int place = 0;  // in Values
    Expression value;
    int line = 0;
};

struct Loop {
    Expression stop;
    Expression step;
    std::vector<Let> lets;
    std::vector<Launch> launches;
    int line = 0;
};

// One of a launch or a loop, by index into the form's lists.
struct Step {
    bool loop = false;
    size_t index = 0;
};

struct Form {
    std::string name;
    std::vector<int> architectures;
    Expression guard;
    std::vector<Let> lets;
    Expression workspace;
    Expression reserve;
    std::vector<Launch> launches;
    std::vector<Loop> loops;
    std::vector<Step> steps;
    int line = 0;
    int workspaceLine = 0;
    int reserveLine = 0;
};

struct Program {
    std::string op;
    std::vector<Tensor> inputs;
    std::vector<Tensor> outputs;
    std::vector<Form> forms;

    int tensors() const noexcept { return static_cast<int>(inputs.size() + outputs.size()); }
    Tensor const& tensor(int number) const noexcept {
        size_t const at = static_cast<size_t>(number);
        return at < inputs.size() ? inputs[at] : outputs[at - inputs.size()];
    }
};

// Of the plugin `op`. Throws Refused with the number of the line.
Program readProgram(std::string_view text, std::string_view op);

// Every launch that is written in the form, those of its loops last.
template <class Visit>
void eachLaunch(Form& form, Visit&& visit) {
    for (Launch& launch : form.launches) visit(launch);
    for (Loop& loop : form.loops) {
        for (Launch& launch : loop.launches) visit(launch);
    }
}

}  // namespace mla2dsa
