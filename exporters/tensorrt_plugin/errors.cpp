#include "errors.h"

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <mutex>

namespace mla2dsa {
namespace {

constexpr size_t kLongest = 1024;  // fixed, so that reporting needs no memory

std::mutex gMutex;
char gLast[kLongest];

void copyLine(char (&to)[kLongest], std::string const& node, char const* text) {
    std::snprintf(to, kLongest, "%s: %s", node.empty() ? "plugin" : node.c_str(), text);
    for (char* c = to; *c != 0; ++c) {
        if (static_cast<unsigned char>(*c) < ' ' || *c == 127) *c = '?';
    }
}

}  // namespace

void refuse(char const* format, ...) {
    char text[kLongest];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    throw Refused(text);
}

void note(std::string const& node, char const* text) noexcept {
    char line[kLongest];
    copyLine(line, node, text);
    try {
        std::lock_guard<std::mutex> lock(gMutex);
        std::memcpy(gLast, line, sizeof gLast);
    } catch (...) {  // a mutex that cannot be locked: the text is lost, nothing else
    }
}

void report(std::string const& node, char const* text) noexcept {
    char line[kLongest];
    copyLine(line, node, text);
    note(node, text);
    std::fprintf(stderr, "mla2dsa plugin: %s\n", line);
}

char const* lastError() noexcept {
    static thread_local char copy[kLongest];
    try {
        std::lock_guard<std::mutex> lock(gMutex);
        std::memcpy(copy, gLast, sizeof copy);
    } catch (...) {
    }
    return copy;
}

}  // namespace mla2dsa
