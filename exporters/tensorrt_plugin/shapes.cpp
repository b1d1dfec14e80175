#include "shapes.h"

#include <cstdio>

#include "errors.h"

namespace mla2dsa {
namespace {

using nvinfer1::Dims;
using nvinfer1::DimsExprs;
using nvinfer1::PluginTensorDesc;

void checkRank(Program const& program, int number, int32_t rank) {
    Tensor const& tensor = program.tensor(number);
    if (rank == static_cast<int32_t>(tensor.dims.size())) return;
    refuse("%s has %d dims, the program (line %d) takes %zu", TensorName(program, number).text, rank, tensor.line,
        tensor.dims.size());
}

void checkDims(Program const& program, int number, Values const& values) {
    Tensor const& tensor = program.tensor(number);
    for (size_t axis = 0; axis < tensor.dims.size(); ++axis) {
        if (tensor.dims[axis].any) continue;
        int64_t const found = values.dims[number][axis];
        int64_t wanted = 0;
        Fault const fault = evaluate(tensor.dims[axis].size, values, wanted);
        if (fault != Fault::kNone) {
            refuse("dim %zu of %s (program line %d) %s", axis, TensorName(program, number).text, tensor.line,
                describe(fault));
        }
        if (found != wanted) {
            refuse("dim %zu of %s is %lld, the program (line %d) takes %lld", axis, TensorName(program, number).text,
                static_cast<long long>(found), tensor.line, static_cast<long long>(wanted));
        }
    }
}

}  // namespace

TensorName::TensorName(Program const& program, int number) noexcept {
    int const inputs = static_cast<int>(program.inputs.size());
    bool const input = number < inputs;
    std::snprintf(text, sizeof text, "%s %d", input ? "input" : "output", input ? number : number - inputs);
}

void checkCounts(Program const& program, int32_t inputs, int32_t outputs) {
    if (inputs != static_cast<int32_t>(program.inputs.size())) {
        refuse("%d inputs, the program takes %zu", inputs, program.inputs.size());
    }
    if (outputs != static_cast<int32_t>(program.outputs.size())) {
        refuse("%d outputs, the program has %zu", outputs, program.outputs.size());
    }
}

void bindDims(Program const& program, Dims const* const* dims, Values& values) {
    for (int number = 0; number < program.tensors(); ++number) {
        Dims const& found = *dims[number];
        checkRank(program, number, found.nbDims);
        for (int32_t axis = 0; axis < found.nbDims; ++axis) {
            if (found.d[axis] < 0) {
                refuse("dim %d of %s is %lld", axis, TensorName(program, number).text,
                    static_cast<long long>(found.d[axis]));
            }
        }
        values.dims[number] = found.d;
    }
}

void checkTensors(Program const& program, PluginTensorDesc const* inputs, PluginTensorDesc const* outputs) {
    int const count = static_cast<int>(program.inputs.size());
    Dims const* dims[kMaxTensors];
    Values values;
    for (int number = 0; number < program.tensors(); ++number) {
        PluginTensorDesc const& found = number < count ? inputs[number] : outputs[number - count];
        Tensor const& tensor = program.tensor(number);
        if (!holds(tensor.type, found.type)) {
            refuse("%s has TensorRT's type %d, the program (line %d) takes %s", TensorName(program, number).text,
                static_cast<int>(found.type), tensor.line, nameOf(tensor.type));
        }
        dims[number] = &found.dims;
    }
    bindDims(program, dims, values);
    for (int number = 0; number < program.tensors(); ++number) checkDims(program, number, values);
    for (size_t at = 0; at < program.outputs.size(); ++at) {
        int const alias = program.outputs[at].alias;
        for (size_t axis = 0; alias >= 0 && axis < program.outputs[at].dims.size(); ++axis) {
            if (outputs[at].dims.d[axis] != inputs[alias].dims.d[axis]) {
                refuse("output %zu is written in place of input %d, and has other dims", at, alias);
            }
        }
    }
}

void inferShapes(
    Program const& program, DimsExprs const* inputs, DimsExprs* outputs, nvinfer1::IExprBuilder& builder) {
    int number = 0;
    size_t axis = 0;
    try {
        for (; number < static_cast<int>(program.inputs.size()); ++number) {
            checkRank(program, number, inputs[number].nbDims);
            Tensor const& tensor = program.tensor(number);
            for (axis = 0; axis < tensor.dims.size(); ++axis) {
                int64_t wanted = 0;
                auto const* found = inputs[number].d[axis];
                if (tensor.dims[axis].any || found == nullptr || !found->isConstant()) continue;
                if (!constant(tensor.dims[axis].size, inputs, wanted)) continue;
                int64_t const is = found->getConstantValue();
                if (is != wanted) {
                    refuse("is %lld, the program takes %lld", static_cast<long long>(is), static_cast<long long>(wanted));
                }
            }
        }
        for (Tensor const& tensor : program.outputs) {
            DimsExprs& made = outputs[number - static_cast<int>(program.inputs.size())];
            made.nbDims = static_cast<int32_t>(tensor.dims.size());
            for (axis = 0; axis < tensor.dims.size(); ++axis) {
                made.d[axis] = symbolic(tensor.dims[axis].size, inputs, builder);
            }
            ++number;
        }
    } catch (Refused const& error) {
        TensorName const name(program, number);
        std::string const what = error.what();
        if (what.rfind(name.text, 0) == 0) throw;  // says it already
        refuse("dim %zu of %s (program line %d) %s", axis, name.text, program.tensor(number).line, what.c_str());
    }
}

int64_t bytesOf(Tensor const& tensor, int64_t const* dims) {
    int64_t bytes = bytesOf(tensor.type);
    for (size_t axis = 0; axis < tensor.dims.size(); ++axis) {
        if (dims[axis] == 0) return 0;
    }
    for (size_t axis = 0; axis < tensor.dims.size(); ++axis) {
        if (__builtin_mul_overflow(bytes, dims[axis], &bytes)) refuse("a tensor of more bytes than 64 bits can count");
    }
    return bytes;
}

}  // namespace mla2dsa
