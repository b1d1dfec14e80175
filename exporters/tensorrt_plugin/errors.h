// How the plugin says no: an exception inside, one line on stderr outside, and the same text for who asks.
#pragma once

#include <new>
#include <stdexcept>
#include <string>

namespace mla2dsa {

// What is wrong, in one line. Never leaves a function that TensorRT calls.
class Refused : public std::runtime_error {
public:
    using std::runtime_error::runtime_error;
};

// As printf. Throws Refused.
[[noreturn]] __attribute__((format(printf, 1, 2))) void refuse(char const* format, ...);

// Prints "mla2dsa plugin: NODE: TEXT" to stderr and keeps "NODE: TEXT" for lastError. Never throws.
void report(std::string const& node, char const* text) noexcept;

// Keeps "NODE: TEXT" without printing it: for questions that TensorRT asks many times over.
void note(std::string const& node, char const* text) noexcept;

// The last text kept by any thread, "" before the first. Valid until the calling thread asks again.
char const* lastError() noexcept;

// Runs `action`; what it throws is reported, and `otherwise` returned in its place. Result: the return type.
template <class Result, class Action>
Result guarded(std::string const& node, Result otherwise, Action&& action) noexcept {
    try {
        return action();
    } catch (std::bad_alloc const&) {
        report(node, "out of memory");
    } catch (std::exception const& error) {
        report(node, error.what());
    } catch (...) {
        report(node, "unknown failure");
    }
    return otherwise;
}

}  // namespace mla2dsa
