// Element types: their names in a program, their sizes, and what TensorRT calls them.
#include "program.h"

namespace mla2dsa {

using nvinfer1::DataType;

char const* nameOf(Element element) noexcept {
    switch (element) {
    case Element::kBf16: return "bf16";
    case Element::kFp16: return "fp16";
    case Element::kFp32: return "fp32";
    case Element::kFp8: return "fp8e4nv";
    case Element::kI32: return "i32";
    case Element::kI64: return "i64";
    default: return "u8";
    }
}

int64_t bytesOf(Element element) noexcept {
    switch (element) {
    case Element::kBf16:
    case Element::kFp16: return 2;
    case Element::kFp32:
    case Element::kI32: return 4;
    case Element::kI64: return 8;
    default: return 1;
    }
}

DataType typeOf(Element element) noexcept {
    switch (element) {
    case Element::kBf16: return DataType::kBF16;
    case Element::kFp16: return DataType::kHALF;
    case Element::kFp32: return DataType::kFLOAT;
    case Element::kFp8: return DataType::kFP8;
    case Element::kI32: return DataType::kINT32;
    case Element::kI64: return DataType::kINT64;
    default: return DataType::kINT8;
    }
}

bool holds(Element element, DataType type) noexcept {
    return type == typeOf(element) || (element == Element::kU8 && type == DataType::kUINT8);
}

}  // namespace mla2dsa
