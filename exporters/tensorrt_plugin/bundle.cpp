#include "bundle.h"

#include <climits>
#include <cstring>

#include "errors.h"
#include "format_limits.h"
#include "text.h"

namespace mla2dsa {
namespace {

constexpr std::string_view kMagic = "M2DK";
constexpr size_t kSizeAt = 8;
constexpr size_t kElfHeader = 64;
constexpr uint64_t kMachineCuda = 190;

uint64_t littleEndian(std::string_view bytes, size_t at, size_t width) noexcept {
    uint64_t value = 0;
    for (size_t i = 0; i < width; ++i) value |= uint64_t{static_cast<unsigned char>(bytes[at + i])} << (8 * i);
    return value;
}

class Cursor {
public:
    explicit Cursor(std::string_view bytes) : mBytes(bytes) {}

    uint32_t number(char const* what) {
        if (mBytes.size() - mAt < 4) refuse("kernels: cut off at byte %zu, where %s should be", mAt, what);
        uint32_t const value = static_cast<uint32_t>(littleEndian(mBytes, mAt, 4));
        mAt += 4;
        return value;
    }

    std::string_view string(char const* what) {
        size_t const length = number(what);
        if (mBytes.size() - mAt < length) {
            refuse("kernels: %s of %zu bytes at byte %zu is longer than the rest", what, length, mAt);
        }
        std::string_view const found = mBytes.substr(mAt, length);
        mAt += length;
        return found;
    }

    // A count of things that take at least `each` bytes: so that no damaged number asks for gigabytes.
    uint32_t count(char const* what, size_t each) {
        uint32_t const value = number(what);
        if (value > (mBytes.size() - mAt) / each) refuse("kernels: %u is more %s than the rest can hold", value, what);
        return value;
    }

    size_t rest() const noexcept { return mBytes.size() - mAt; }

private:
    std::string_view mBytes;
    size_t mAt = 0;
};

// Whether `count` entries of `width` bytes at `offset` lie in the file.
bool inside(std::string_view file, uint64_t offset, uint64_t count, uint64_t width) noexcept {
    return count == 0 || (offset <= file.size() && count * width <= file.size() - offset);
}

// The driver is given a cubin without its length and reads what the headers name, so they have to be true.
void checkCubin(std::string_view file, std::string const& kernel, int architecture) {
    auto const wrong = [&](char const* why) {
        refuse("kernels: %s for sm_%d is no cubin: %s", Shown(kernel).text, architecture, why);
    };
    if (file.size() < kElfHeader || file.substr(0, 4) != "\x7f" "ELF") wrong("it is no ELF file");
    if (file[4] != 2 || file[5] != 1) wrong("it is not 64-bit little endian");
    if (littleEndian(file, 18, 2) != kMachineCuda) wrong("it is for another machine than a GPU");
    uint64_t const sections = littleEndian(file, 40, 8);
    uint64_t const width = littleEndian(file, 58, 2);
    uint64_t const count = littleEndian(file, 60, 2);
    if (!inside(file, littleEndian(file, 32, 8), littleEndian(file, 56, 2), littleEndian(file, 54, 2))
        || !inside(file, sections, count, width)) {
        wrong("it is cut off");
    }
    constexpr uint32_t kNoBits = 8;  // a section without bytes in the file
    for (uint64_t at = 0; width >= 64 && at < count; ++at) {
        size_t const header = static_cast<size_t>(sections + at * width);
        if (littleEndian(file, header + 4, 4) == kNoBits) continue;
        if (!inside(file, littleEndian(file, header + 24, 8), littleEndian(file, header + 32, 8), 1)) wrong("it is cut off");
    }
}

std::string readName(Cursor& cursor, char const* what) {
    std::string_view const found = cursor.string(what);
    if (found.empty()) refuse("kernels: %s is empty", what);
    for (char c : found) {
        if (c <= ' ' || c > '~') refuse("kernels: %s %s is not printable", what, Shown(found).text);
    }
    return std::string(found);
}

Binary readBinary(Cursor& cursor, std::string const& kernel) {
    Binary made;
    uint32_t const architecture = cursor.number("an architecture");
    made.threads = cursor.number("the threads of a block");
    made.shared = cursor.number("the bytes of shared memory");
    made.entry = readName(cursor, "the entry of a cubin");
    made.cubin = cursor.string("a cubin");
    if (architecture < 1 || architecture > 9999) refuse("kernels: %u is no architecture", architecture);
    if (made.threads < 1 || made.threads > kMaxThreads) {
        refuse("kernels: %s has %u threads in a block", Shown(kernel).text, made.threads);
    }
    if (made.shared > INT_MAX) refuse("kernels: %s has %u bytes of shared memory", Shown(kernel).text, made.shared);
    made.architecture = static_cast<int>(architecture);
    checkCubin(made.cubin, kernel, made.architecture);
    return made;
}

Kernel readKernel(Cursor& cursor) {
    Kernel made;
    made.name = readName(cursor, "the name of a kernel");
    char const* const name = made.name.c_str();
    made.parameters = cursor.string("the parameters of a kernel");
    if (made.parameters.size() > static_cast<size_t>(kMaxParameters)) {
        refuse("kernels: %s has more than %d parameters", Shown(name).text, kMaxParameters);
    }
    if (made.parameters.find_first_not_of("pilfn") != std::string::npos) {
        refuse("kernels: %s has parameters %s: each has to be one of p i l f n", Shown(name).text,
            Shown(made.parameters).text);
    }
    made.aligned.resize(made.parameters.size());
    for (uint32_t left = cursor.count("aligned parameters", 4); left > 0; --left) {
        uint32_t const index = cursor.number("an aligned parameter");
        if (index >= made.parameters.size()) refuse("kernels: %s has no parameter %u to align", Shown(name).text, index);
        if (std::strchr("pil", made.parameters[index]) == nullptr) {
            refuse("kernels: parameter %u of %s is neither pointer nor integer, to be aligned", index, Shown(name).text);
        }
        made.aligned[index] = true;
    }
    for (uint32_t left = cursor.count("binaries", 20); left > 0; --left) {
        Binary binary = readBinary(cursor, made.name);
        if (made.binary(binary.architecture) != nullptr) {
            refuse("kernels: %s has two binaries for sm_%d", Shown(name).text, binary.architecture);
        }
        made.binaries.push_back(std::move(binary));
    }
    return made;
}

}  // namespace

Binary const* Kernel::binary(int architecture) const noexcept {
    for (Binary const& one : binaries) {
        if (one.architecture == architecture) return &one;
    }
    return nullptr;
}

int Bundle::find(std::string_view name) const noexcept {
    for (size_t at = 0; at < kernels.size(); ++at) {
        if (kernels[at].name == name) return static_cast<int>(at);
    }
    return -1;
}

std::string_view trimBundle(std::string_view bytes) noexcept {
    if (bytes.size() >= kSizeAt + 4 && bytes.back() == 0 && littleEndian(bytes, kSizeAt, 4) == bytes.size() - 1) {
        bytes.remove_suffix(1);
    }
    return bytes;
}

Bundle readBundle(std::string_view bytes) {
    if (bytes.substr(0, 4) != kMagic) refuse("kernels: not a field of kernels, it does not begin with M2DK");
    Cursor cursor(bytes.substr(4));
    uint32_t const version = cursor.number("the version");
    if (version != kFormatVersion) refuse("kernels: version %u, this plugin reads %d", version, kFormatVersion);
    uint32_t const size = cursor.number("the size");
    if (size != bytes.size()) refuse("kernels: %zu bytes, and the field says %u", bytes.size(), size);
    Bundle made;
    for (uint32_t left = cursor.count("kernels", 16); left > 0; --left) {
        Kernel kernel = readKernel(cursor);
        if (made.find(kernel.name) >= 0) refuse("kernels: %s twice", Shown(kernel.name).text);
        made.kernels.push_back(std::move(kernel));
    }
    if (cursor.rest() != 0) refuse("kernels: %zu bytes too many after the last kernel", cursor.rest());
    return made;
}

}  // namespace mla2dsa
