// Integer expressions over the dims of tensors: read once from reverse Polish text, evaluated without allocating.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "format_limits.h"
#include "tensorrt_abi.h"

namespace mla2dsa {

enum class Op : uint8_t { kInteger, kDim, kUnits, kLoop, kName, kAdd, kSub, kMul, kFloor, kCeil, kLess, kMore };

struct Part {
    Op op;
    uint8_t tensor;  // kDim
    uint8_t axis;    // kDim
    int64_t value;   // kInteger: the number; kName: its place in Values
};

using Expression = std::vector<Part>;

// What the text of an expression may refer to at its place.
struct Scope {
    std::vector<int> ranks;                           // of the tensors in sight
    bool units = false;                               // vunits
    std::string loop;                                 // the loop variable, "" outside of loops
    std::unordered_map<std::string, int> const* names = nullptr;  // place in Values by name
};

// Throws Refused.
Expression readExpression(std::string_view text, Scope const& scope);

enum class Fault : uint8_t { kNone, kOverflow, kDivision };

char const* describe(Fault fault) noexcept;

// What the parts stand for. Large: keep one on the stack and pass it on. A name whose expression has a fault carries it
// to those who use it, so that what is not used does no harm.
struct Values {
    int64_t const* dims[kMaxTensors];
    int64_t units = 0;
    int64_t loop = 0;
    int64_t names[kMaxNames];
    Fault faults[kMaxNames];
};

// Count in 64 bits: what does not fit, and a division by anything below 1, is a fault.
Fault evaluate(Expression const& expression, Values const& values, int64_t& result) noexcept;

// The same for a shape that is not known yet, over the dims of the inputs. What is constant is computed here, with the
// checks. Throws Refused.
nvinfer1::IDimensionExpr const* symbolic(
    Expression const& expression, nvinfer1::DimsExprs const* inputs, nvinfer1::IExprBuilder& builder);

// Whether all dims that the expression refers to are known; then `result` is its value. Throws Refused for a fault.
bool constant(Expression const& expression, nvinfer1::DimsExprs const* inputs, int64_t& result);

}  // namespace mla2dsa
