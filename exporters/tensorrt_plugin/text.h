// Lines, words and numbers of the program's text.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

namespace mla2dsa {

// Words separated by single spaces. Throws Refused for an empty line, a double space, anything but printable ASCII.
std::vector<std::string_view> splitWords(std::string_view line);

std::vector<std::string_view> split(std::string_view text, char separator);

// Decimal digits, at least one, with a sign if `sign`; false for anything else and for what does not fit 64 bits.
bool readInteger(std::string_view text, bool sign, int64_t& number) noexcept;

// Exactly 8 hexadecimal digits in lower case.
bool readBits(std::string_view text, uint32_t& bits) noexcept;

// A letter or underscore, then letters, digits and underscores.
bool isIdentifier(std::string_view text) noexcept;

// At most 60 characters of it, for messages; never with anything unprintable.
struct Shown {
    explicit Shown(std::string_view text) noexcept;
    char text[64];
};

}  // namespace mla2dsa
