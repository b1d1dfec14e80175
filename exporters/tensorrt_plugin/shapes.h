// What tensors have to be, before and after their shapes are known.
#pragma once

#include "definition.h"

namespace mla2dsa {

// As many inputs and outputs as the program has. Throws Refused.
void checkCounts(Program const& program, int32_t inputs, int32_t outputs);

// Points `values` at the dims, for the expressions of forms. Throws Refused for another rank or a negative dim.
void bindDims(Program const& program, nvinfer1::Dims const* const* dims, Values& values);

// Types, and every rule of the program about dims. Throws Refused.
void checkTensors(
    Program const& program, nvinfer1::PluginTensorDesc const* inputs, nvinfer1::PluginTensorDesc const* outputs);

// The same as far as it is known while a network is built, and the outputs' dims. Throws Refused.
void inferShapes(Program const& program, nvinfer1::DimsExprs const* inputs, nvinfer1::DimsExprs* outputs,
    nvinfer1::IExprBuilder& builder);

// Bytes of a tensor. Throws Refused when 64 bits do not hold them.
int64_t bytesOf(Tensor const& tensor, int64_t const* dims);

// "input 2" or "output 0", by tensor number.
struct TensorName {
    TensorName(Program const& program, int number) noexcept;
    char text[24];
};

}  // namespace mla2dsa
