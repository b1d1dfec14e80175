#include "expression.h"

#include <algorithm>

#include "errors.h"
#include "text.h"

namespace mla2dsa {
namespace {

bool isOperator(Op op) noexcept { return op >= Op::kAdd; }

bool readOperator(std::string_view text, Op& op) noexcept {
    if (text.size() != 1) return false;
    constexpr std::string_view kSigns = "+-*/^<>";
    size_t const at = kSigns.find(text[0]);
    if (at == std::string_view::npos) return false;
    op = static_cast<Op>(static_cast<int>(Op::kAdd) + static_cast<int>(at));
    return true;
}

Part readDim(std::string_view text, Scope const& scope) {
    size_t const dot = text.find('.');
    int64_t tensor = 0;
    int64_t axis = 0;
    if (dot == std::string_view::npos || !readInteger(text.substr(1, dot - 1), false, tensor)
        || !readInteger(text.substr(dot + 1), false, axis)) {
        refuse("%s is not known in an expression", Shown(text).text);
    }
    int const tensors = static_cast<int>(scope.ranks.size());
    if (tensor >= tensors || axis >= scope.ranks[static_cast<size_t>(tensor)]) {
        refuse("%s: there is no such dim here", Shown(text).text);
    }
    return {Op::kDim, static_cast<uint8_t>(tensor), static_cast<uint8_t>(axis), 0};
}

Part readLeaf(std::string_view text, Scope const& scope) {
    int64_t number = 0;
    if (readInteger(text, true, number)) return {Op::kInteger, 0, 0, number};
    if (!text.empty() && text[0] == 'd') return readDim(text, scope);
    if (!text.empty() && text[0] == 'v') {
        std::string_view const name = text.substr(1);
        if (!scope.loop.empty() && name == scope.loop) return {Op::kLoop, 0, 0, 0};
        if (scope.units && name == "units") return {Op::kUnits, 0, 0, 0};
        refuse("%s: there is no such variable here", Shown(text).text);
    }
    if (scope.names != nullptr) {
        auto const found = scope.names->find(std::string(text));
        if (found != scope.names->end()) return {Op::kName, 0, 0, found->second};
    }
    refuse("%s is not known in an expression", Shown(text).text);
}

Fault apply(Op op, int64_t a, int64_t b, int64_t& result) noexcept {
    bool overflow = false;
    switch (op) {
    case Op::kAdd: overflow = __builtin_add_overflow(a, b, &result); break;
    case Op::kSub: overflow = __builtin_sub_overflow(a, b, &result); break;
    case Op::kMul: overflow = __builtin_mul_overflow(a, b, &result); break;
    case Op::kFloor:
        if (b < 1) return Fault::kDivision;
        result = a / b - (a % b < 0 ? 1 : 0);
        break;
    case Op::kCeil:
        if (b < 1) return Fault::kDivision;
        result = a / b + (a % b > 0 ? 1 : 0);
        break;
    case Op::kLess: result = std::min(a, b); break;
    default: result = std::max(a, b); break;
    }
    return overflow ? Fault::kOverflow : Fault::kNone;
}

nvinfer1::DimensionOperation operationOf(Op op) noexcept {
    using nvinfer1::DimensionOperation;
    switch (op) {
    case Op::kAdd: return DimensionOperation::kSUM;
    case Op::kSub: return DimensionOperation::kSUB;
    case Op::kMul: return DimensionOperation::kPROD;
    case Op::kFloor: return DimensionOperation::kFLOOR_DIV;
    case Op::kCeil: return DimensionOperation::kCEIL_DIV;
    case Op::kLess: return DimensionOperation::kMIN;
    default: return DimensionOperation::kMAX;
    }
}

// A value of the symbolic stack: a number as long as everything in it is known.
struct Symbol {
    nvinfer1::IDimensionExpr const* expression;  // nullptr: `number`
    int64_t number;
};

nvinfer1::IDimensionExpr const* node(Symbol const& symbol, nvinfer1::IExprBuilder& builder) {
    auto const* made = symbol.expression != nullptr ? symbol.expression : builder.constant(symbol.number);
    if (made == nullptr) refuse("TensorRT cannot hold this shape's expression");
    return made;
}

Symbol leaf(Part const& part, nvinfer1::DimsExprs const* inputs) {
    if (part.op == Op::kInteger) return {nullptr, part.value};
    if (part.op != Op::kDim) refuse("a shape may refer to dims only");
    auto const* dim = inputs[part.tensor].d[part.axis];
    if (dim == nullptr) refuse("TensorRT gives no dim %d of input %d", part.axis, part.tensor);
    if (dim->isConstant()) return {nullptr, dim->getConstantValue()};
    return {dim, 0};
}

}  // namespace

Expression readExpression(std::string_view text, Scope const& scope) {
    Expression expression;
    int depth = 0;
    for (std::string_view part : split(text, ',')) {
        if (expression.size() == kMaxParts) refuse("an expression of more than %d parts", kMaxParts);
        Op op{};
        if (readOperator(part, op)) {
            if (depth < 2) refuse("%s in %s has no two operands", Shown(part).text, Shown(text).text);
            expression.push_back({op, 0, 0, 0});
            --depth;
        } else {
            expression.push_back(readLeaf(part, scope));
            if (++depth > kMaxStack) refuse("an expression with more than %d values on its stack", kMaxStack);
        }
    }
    if (depth != 1) refuse("expression %s leaves %d values", Shown(text).text, depth);
    return expression;
}

char const* describe(Fault fault) noexcept {
    return fault == Fault::kOverflow ? "does not fit 64 bits" : "divides by a number below 1";
}

Fault evaluate(Expression const& expression, Values const& values, int64_t& result) noexcept {
    int64_t stack[kMaxStack];
    int depth = 0;
    for (Part const& part : expression) {
        switch (part.op) {
        case Op::kInteger: stack[depth++] = part.value; break;
        case Op::kDim: stack[depth++] = values.dims[part.tensor][part.axis]; break;
        case Op::kUnits: stack[depth++] = values.units; break;
        case Op::kLoop: stack[depth++] = values.loop; break;
        case Op::kName:
            if (values.faults[part.value] != Fault::kNone) return values.faults[part.value];
            stack[depth++] = values.names[part.value];
            break;
        default:
            --depth;
            Fault const fault = apply(part.op, stack[depth - 1], stack[depth], stack[depth - 1]);
            if (fault != Fault::kNone) return fault;
        }
    }
    result = stack[0];
    return Fault::kNone;
}

nvinfer1::IDimensionExpr const* symbolic(
    Expression const& expression, nvinfer1::DimsExprs const* inputs, nvinfer1::IExprBuilder& builder) {
    Symbol stack[kMaxStack];
    int depth = 0;
    for (Part const& part : expression) {
        if (!isOperator(part.op)) {
            stack[depth++] = leaf(part, inputs);
            continue;
        }
        Symbol const b = stack[--depth];
        Symbol& a = stack[depth - 1];
        bool const divides = part.op == Op::kFloor || part.op == Op::kCeil;
        if (divides && b.expression == nullptr && b.number < 1) refuse("%s", describe(Fault::kDivision));
        if (a.expression == nullptr && b.expression == nullptr) {
            Fault const fault = apply(part.op, a.number, b.number, a.number);
            if (fault != Fault::kNone) refuse("%s", describe(fault));
        } else {
            a.expression = builder.operation(operationOf(part.op), *node(a, builder), *node(b, builder));
            if (a.expression == nullptr) refuse("TensorRT cannot hold this shape's expression");
        }
    }
    if (stack[0].expression == nullptr && stack[0].number < 0) {
        refuse("is %lld", static_cast<long long>(stack[0].number));
    }
    return node(stack[0], builder);
}

bool constant(Expression const& expression, nvinfer1::DimsExprs const* inputs, int64_t& result) {
    int64_t dims[kMaxTensors][kMaxDims] = {};
    Values values;
    for (int tensor = 0; tensor < kMaxTensors; ++tensor) values.dims[tensor] = dims[tensor];
    for (Part const& part : expression) {
        if (part.op != Op::kDim) continue;
        Symbol const symbol = leaf(part, inputs);
        if (symbol.expression != nullptr) return false;
        dims[part.tensor][part.axis] = symbol.number;
    }
    Fault const fault = evaluate(expression, values, result);
    if (fault != Fault::kNone) refuse("%s", describe(fault));
    return true;
}

}  // namespace mla2dsa
