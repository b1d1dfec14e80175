#include "form_reader.h"

#include <algorithm>
#include <utility>

#include "errors.h"
#include "text.h"

namespace mla2dsa {
namespace {

std::vector<int> readArchitectures(std::string_view text) {
    std::vector<int> found;
    for (std::string_view part : split(text, ',')) {
        int64_t number = 0;
        if (!readInteger(part, false, number) || number < 1 || number > 9999) {
            refuse("%s is no architecture", Shown(part).text);
        }
        int const architecture = static_cast<int>(number);
        if (std::find(found.begin(), found.end(), architecture) != found.end()) {
            refuse("architecture %d twice", architecture);
        }
        found.push_back(architecture);
    }
    return found;
}

bool isName(std::string_view text) noexcept {
    int64_t number = 0;
    return text.size() > 1 && text.size() < 20 && text[0] == 'x' && readInteger(text.substr(1), false, number);
}

}  // namespace

void FormReader::begin(
    std::vector<std::string_view> const& words, Scope const& inputs, std::vector<int> ranks, int number) {
    if (words.size() != 4) refuse("expected form NAME SMS GUARD");
    mForm = Form();
    mForm.name = words[1];
    mForm.architectures = readArchitectures(words[2]);
    Scope guard = inputs;
    guard.units = true;
    mForm.guard = readExpression(words[3], guard);
    mForm.line = number;
    mNames.clear();
    mPlaces = mLaunches = 0;
    mScope = Scope();
    mScope.ranks = std::move(ranks);
    mScope.names = &mNames;
    mOpen = true;
    mInLoop = false;
}

bool FormReader::line(std::vector<std::string_view> const& words, int number) {
    std::string_view const first = words[0];
    if (first == "let") {
        let(words, number);
    } else if (first == "launch") {
        launch(words, number);
    } else if (first == "end" && words.size() == 1) {
        if (!mInLoop) return endForm();
        endLoop();
    } else if (mInLoop) {
        refuse("%s is not known inside of repeat", Shown(first).text);
    } else if (first == "workspace") {
        workspace(words, number);
    } else if (first == "reserve") {
        reserve(words, number);
    } else if (first == "repeat") {
        repeat(words, number);
    } else {
        refuse("%s is not known inside of a form", Shown(first).text);
    }
    return false;
}

Form FormReader::take() { return std::move(mForm); }

void FormReader::let(std::vector<std::string_view> const& words, int number) {
    if (words.size() != 3 || !isName(words[1])) refuse("expected let xN EXPRESSION");
    if (mNames.count(std::string(words[1])) != 0) refuse("%s has been named before", Shown(words[1]).text);
    if (mPlaces == kMaxNames) refuse("more than %d names in a form", kMaxNames);
    Let made{mPlaces, read(words[2]), number};
    mNames.emplace(words[1], mPlaces++);
    (mInLoop ? mForm.loops.back().lets : mForm.lets).push_back(std::move(made));
}

void FormReader::workspace(std::vector<std::string_view> const& words, int number) {
    if (words.size() != 2) refuse("expected workspace EXPRESSION");
    if (mForm.workspaceLine != 0) refuse("workspace twice in a form");
    mForm.workspace = read(words[1]);
    mForm.workspaceLine = number;
}

void FormReader::reserve(std::vector<std::string_view> const& words, int number) {
    if (words.size() != 2) refuse("expected reserve EXPRESSION");
    if (mForm.reserveLine != 0) refuse("reserve twice in a form");
    mForm.reserve = read(words[1]);
    mForm.reserveLine = number;
}

void FormReader::repeat(std::vector<std::string_view> const& words, int number) {
    if (words.size() != 4 || !isIdentifier(words[1])) refuse("expected repeat VARIABLE STOP STEP");
    Loop loop;
    loop.stop = read(words[2]);
    loop.step = read(words[3]);
    loop.line = number;
    mForm.steps.push_back({true, mForm.loops.size()});
    mForm.loops.push_back(std::move(loop));
    mOutside = mNames;
    mScope.loop = words[1];
    mInLoop = true;
}

void FormReader::endLoop() {
    if (mForm.loops.back().launches.empty()) refuse("a repeat without a launch");
    mNames = std::move(mOutside);
    mScope.loop.clear();
    mInLoop = false;
}

bool FormReader::endForm() {
    if (mForm.workspaceLine == 0) refuse("the form has no workspace line");
    if (mForm.reserveLine == 0) {
        mForm.reserve = mForm.workspace;
        mForm.reserveLine = mForm.workspaceLine;
    }
    mOpen = false;
    return true;
}

void FormReader::launch(std::vector<std::string_view> const& words, int number) {
    if (words.size() < 5) refuse("expected launch KERNEL X Y Z WORD...");
    if (++mLaunches > kMaxLaunches) refuse("more than %d launches in a form", kMaxLaunches);
    if (words.size() - 5 > static_cast<size_t>(kMaxParameters)) refuse("more than %d parameters", kMaxParameters);
    Launch made;
    made.kernel = words[1];
    for (size_t at = 0; at < 3; ++at) made.grid[at] = read(words[2 + at]);
    for (size_t at = 5; at < words.size(); ++at) made.words.push_back(word(words[at]));
    made.line = number;
    if (mInLoop) {
        mForm.loops.back().launches.push_back(std::move(made));
    } else {
        mForm.steps.push_back({false, mForm.launches.size()});
        mForm.launches.push_back(std::move(made));
    }
}

Word FormReader::word(std::string_view text) const {
    Word made;
    made.kind = text[0];
    std::string_view const rest = text.substr(1);
    if (text == "n") return made;
    if (made.kind == 'f' && readBits(rest, made.bits)) return made;
    if (made.kind == 'w' || made.kind == 'i' || made.kind == 'l') {
        made.value = read(rest);
        return made;
    }
    size_t const at = rest.find('@');
    int64_t tensor = 0;
    if (made.kind != 't' || !readInteger(rest.substr(0, at), false, tensor)) {
        refuse("%s is not known in a launch", Shown(text).text);
    }
    if (tensor >= static_cast<int64_t>(mScope.ranks.size())) refuse("%s: there is no such tensor", Shown(text).text);
    made.tensor = static_cast<int>(tensor);
    made.value = at == std::string_view::npos ? Expression{{Op::kInteger, 0, 0, 0}} : read(rest.substr(at + 1));
    return made;
}

}  // namespace mla2dsa
