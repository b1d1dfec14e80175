// One form of a program, line by line, from `form` to its `end`.
#pragma once

#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "program.h"

namespace mla2dsa {

class FormReader {
public:
    bool open() const noexcept { return mOpen; }

    // The line `form NAME SMS GUARD`. inputs: what the guard sees, without vunits. ranks: of all tensors.
    void begin(std::vector<std::string_view> const& words, Scope const& inputs, std::vector<int> ranks, int number);

    // A line inside. True when it was the form's `end`. Throws Refused.
    bool line(std::vector<std::string_view> const& words, int number);

    Form take();

private:
    void let(std::vector<std::string_view> const& words, int number);
    void workspace(std::vector<std::string_view> const& words, int number);
    void reserve(std::vector<std::string_view> const& words, int number);
    void repeat(std::vector<std::string_view> const& words, int number);
    void launch(std::vector<std::string_view> const& words, int number);
    void endLoop();
    bool endForm();
    Word word(std::string_view text) const;
    Expression read(std::string_view text) const { return readExpression(text, mScope); }

    bool mOpen = false;
    bool mInLoop = false;
    Form mForm;
    Scope mScope;
    int mPlaces = 0;
    int mLaunches = 0;
    std::unordered_map<std::string, int> mNames;
    std::unordered_map<std::string, int> mOutside;  // names as they were before the loop
};

}  // namespace mla2dsa
