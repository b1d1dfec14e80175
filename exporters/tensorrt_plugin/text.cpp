#include "text.h"

#include "errors.h"

namespace mla2dsa {
namespace {

bool isDigit(char c) noexcept { return c >= '0' && c <= '9'; }

bool isLetter(char c) noexcept { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_'; }

}  // namespace

std::vector<std::string_view> split(std::string_view text, char separator) {
    std::vector<std::string_view> parts;
    while (true) {
        size_t const end = text.find(separator);
        parts.push_back(text.substr(0, end));
        if (end == std::string_view::npos) return parts;
        text.remove_prefix(end + 1);
    }
}

std::vector<std::string_view> splitWords(std::string_view line) {
    for (char c : line) {
        if (c < ' ' || c > '~') refuse("a byte that is not printable ASCII: 0x%02x", static_cast<unsigned char>(c));
    }
    if (line.empty()) refuse("empty");
    std::vector<std::string_view> words = split(line, ' ');
    for (std::string_view word : words) {
        if (word.empty()) refuse("words are separated by single spaces");
    }
    return words;
}

bool readInteger(std::string_view text, bool sign, int64_t& number) noexcept {
    bool const negative = sign && !text.empty() && text[0] == '-';
    if (negative) text.remove_prefix(1);
    if (text.empty()) return false;
    int64_t value = 0;
    for (char c : text) {
        if (!isDigit(c)) return false;
        int const digit = c - '0';
        if (__builtin_mul_overflow(value, 10, &value)) return false;
        if (negative ? __builtin_sub_overflow(value, digit, &value) : __builtin_add_overflow(value, digit, &value)) {
            return false;
        }
    }
    number = value;
    return true;
}

bool readBits(std::string_view text, uint32_t& bits) noexcept {
    if (text.size() != 8) return false;
    uint32_t value = 0;
    for (char c : text) {
        bool const letter = c >= 'a' && c <= 'f';
        if (!isDigit(c) && !letter) return false;
        value = value << 4 | static_cast<uint32_t>(letter ? c - 'a' + 10 : c - '0');
    }
    bits = value;
    return true;
}

bool isIdentifier(std::string_view text) noexcept {
    if (text.empty() || !isLetter(text[0])) return false;
    for (char c : text) {
        if (!isLetter(c) && !isDigit(c)) return false;
    }
    return true;
}

Shown::Shown(std::string_view from) noexcept {
    size_t count = 0;
    for (; count < from.size() && count < 60; ++count) {
        text[count] = from[count] >= ' ' && from[count] <= '~' ? from[count] : '?';
    }
    if (count < from.size()) {
        text[count - 1] = text[count - 2] = text[count - 3] = '.';
    }
    text[count] = 0;
}

}  // namespace mla2dsa
