// The field `program`, from its first line to the last `end`.
#include <algorithm>

#include "errors.h"
#include "form_reader.h"
#include "program.h"
#include "text.h"

namespace mla2dsa {
namespace {

using Words = std::vector<std::string_view>;

Element readElement(std::string_view text) {
    for (Element element : {Element::kBf16, Element::kFp16, Element::kFp32, Element::kFp8, Element::kI32,
             Element::kI64, Element::kU8}) {
        if (text == nameOf(element)) return element;
    }
    refuse("type %s is not known", Shown(text).text);
}

class Reader {
public:
    Reader(std::string_view op) : mOp(op) {}

    void line(Words const& words, int number) {
        if (number == 1) return version(words);
        if (mForm.open()) {
            if (mForm.line(words, number)) mProgram.forms.push_back(mForm.take());
            return;
        }
        std::string_view const first = words[0];
        if (number == 2) return op(words);
        if (first == "in") return input(words, number);
        if (first == "out") return output(words, number);
        if (first == "alias") return alias(words);
        if (first == "form") return form(words, number);
        refuse("%s is not known here", Shown(first).text);
    }

    Program finish() {
        if (mForm.open()) refuse("the program ends inside of a form");
        if (mProgram.forms.empty()) refuse("the program has no form");
        return std::move(mProgram);
    }

private:
    void version(Words const& words) {
        int64_t version = 0;
        if (words.size() != 2 || words[0] != "mla2dsa-plugin" || !readInteger(words[1], false, version)) {
            refuse("expected mla2dsa-plugin %d", kFormatVersion);
        }
        if (version != kFormatVersion) {
            refuse("the program has version %lld, this plugin reads %d", static_cast<long long>(version), kFormatVersion);
        }
    }

    void op(Words const& words) {
        if (words.size() != 2 || words[0] != "op") refuse("expected op NAME");
        if (words[1] != mOp) {
            refuse("the program is of op %s, the plugin is %s", Shown(words[1]).text, Shown(mOp).text);
        }
        mProgram.op = words[1];
    }

    Tensor tensor(Words const& words, int number) {
        if (words.size() < 2) refuse("%s without a type", Shown(words[0]).text);
        if (mProgram.tensors() == kMaxTensors) refuse("more than %d inputs and outputs", kMaxTensors);
        if (words.size() - 2 > static_cast<size_t>(kMaxDims)) refuse("more than %d dims", kMaxDims);
        Tensor made;
        made.type = readElement(words[1]);
        made.line = number;
        return made;
    }

    void input(Words const& words, int number) {
        if (!mProgram.outputs.empty() || !mProgram.forms.empty()) refuse("inputs come before outputs and forms");
        Tensor made = tensor(words, number);
        mScope.ranks.push_back(0);
        for (size_t at = 2; at < words.size(); ++at) {
            Dim dim;
            dim.any = words[at] == "*";
            if (!dim.any) dim.size = readExpression(words[at], mScope);
            made.dims.push_back(std::move(dim));
            ++mScope.ranks.back();  // dims to the left are in sight
        }
        mProgram.inputs.push_back(std::move(made));
    }

    void output(Words const& words, int number) {
        if (mAliases || !mProgram.forms.empty()) refuse("outputs come before aliases and forms");
        Tensor made = tensor(words, number);
        for (size_t at = 2; at < words.size(); ++at) made.dims.push_back({false, readExpression(words[at], mScope)});
        mProgram.outputs.push_back(std::move(made));
    }

    void alias(Words const& words) {
        int64_t output = 0;
        int64_t input = 0;
        if (!mProgram.forms.empty()) refuse("aliases come before forms");
        if (words.size() != 3 || !readInteger(words[1], false, output) || !readInteger(words[2], false, input)) {
            refuse("expected alias OUTPUT INPUT");
        }
        if (output >= static_cast<int64_t>(mProgram.outputs.size())) refuse("there is no output %s", Shown(words[1]).text);
        if (input >= static_cast<int64_t>(mProgram.inputs.size())) refuse("there is no input %s", Shown(words[2]).text);
        Tensor& to = mProgram.outputs[static_cast<size_t>(output)];
        Tensor const& from = mProgram.inputs[static_cast<size_t>(input)];
        if (to.alias >= 0) refuse("output %s has an alias already", Shown(words[1]).text);
        for (Tensor const& other : mProgram.outputs) {
            if (other.alias == input) refuse("input %s has an alias already", Shown(words[2]).text);
        }
        if (to.type != from.type || to.dims.size() != from.dims.size()) {
            refuse("an alias needs the same type and number of dims on both sides");
        }
        to.alias = static_cast<int>(input);
        mAliases = true;
    }

    void form(Words const& words, int number) {
        if (mProgram.outputs.empty()) refuse("the program has no output");
        if (mProgram.forms.size() == static_cast<size_t>(kMaxForms)) refuse("more than %d forms", kMaxForms);
        std::vector<int> ranks;
        for (int at = 0; at < mProgram.tensors(); ++at) ranks.push_back(static_cast<int>(mProgram.tensor(at).dims.size()));
        mForm.begin(words, mScope, std::move(ranks), number);
    }

    std::string_view mOp;
    Program mProgram;
    Scope mScope;  // the inputs' dims
    FormReader mForm;
    bool mAliases = false;
};

}  // namespace

Program readProgram(std::string_view text, std::string_view op) {
    if (text.size() > kMaxText) refuse("the program has more than %zu bytes", kMaxText);
    if (!text.empty() && text.back() == '\n') text.remove_suffix(1);
    Reader reader(op);
    int number = 0;
    try {
        for (std::string_view line : split(text, '\n')) {
            ++number;
            reader.line(splitWords(line), number);
        }
        return reader.finish();
    } catch (Refused const& error) {
        refuse("program line %d: %s", number, error.what());
    }
}

}  // namespace mla2dsa
