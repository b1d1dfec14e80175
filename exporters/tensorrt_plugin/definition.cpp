#include "definition.h"

#include <algorithm>
#include <functional>
#include <mutex>
#include <unordered_map>

#include "errors.h"
#include "text.h"

namespace mla2dsa {
namespace {

bool fits(char word, char parameter) noexcept { return parameter == 'p' ? word == 't' || word == 'w' : word == parameter; }

void checkLaunch(Launch& launch, Form const& form, Bundle const& bundle) {
    launch.index = bundle.find(launch.kernel);
    if (launch.index < 0) {
        refuse("program line %d: there is no kernel %s", launch.line, Shown(launch.kernel).text);
    }
    Kernel const& kernel = bundle.kernels[static_cast<size_t>(launch.index)];
    if (launch.words.size() != kernel.parameters.size()) {
        refuse("program line %d: %s takes %zu parameters, the launch has %zu", launch.line, Shown(launch.kernel).text,
            kernel.parameters.size(), launch.words.size());
    }
    for (size_t at = 0; at < launch.words.size(); ++at) {
        if (!fits(launch.words[at].kind, kernel.parameters[at])) {
            refuse("program line %d: parameter %zu of %s is %c, the launch has %c", launch.line, at,
                Shown(launch.kernel).text, kernel.parameters[at], launch.words[at].kind);
        }
    }
    for (int architecture : form.architectures) {
        if (kernel.binary(architecture) == nullptr) {
            refuse("program line %d: %s has no binary for sm_%d", launch.line, Shown(launch.kernel).text, architecture);
        }
    }
}

// Things that are shared as long as somebody uses them, found again by the bytes that they were made from.
template <class Value>
class Shared {
public:
    template <class Same, class Make>
    std::shared_ptr<Value const> get(size_t hash, Same&& same, Make&& make) {
        std::lock_guard<std::mutex> lock(mMutex);
        auto [from, to] = mKept.equal_range(hash);
        while (from != to) {
            std::shared_ptr<Value const> const kept = from->second.lock();
            if (kept == nullptr) {
                from = mKept.erase(from);
                continue;
            }
            if (same(*kept)) return kept;
            ++from;
        }
        std::shared_ptr<Value const> made = make();
        mKept.emplace(hash, made);
        return made;
    }

private:
    std::mutex mMutex;
    std::unordered_multimap<size_t, std::weak_ptr<Value const>> mKept;
};

size_t hashOf(std::string_view bytes) noexcept { return std::hash<std::string_view>()(bytes); }

std::shared_ptr<KernelBytes const> shareKernels(std::string_view bytes) {
    // Never destroyed: a host may end while its threads still run.
    static auto* const all = new Shared<KernelBytes>();
    return all->get(
        hashOf(bytes), [&](KernelBytes const& kept) { return kept.bytes == bytes; },
        [&] {
            auto made = std::make_shared<KernelBytes>();
            made->bytes = bytes;
            made->bundle = readBundle(made->bytes);
            return made;
        });
}

}  // namespace

std::vector<int> Definition::architectures() const {
    std::vector<int> all;
    for (Form const& form : program.forms) all.insert(all.end(), form.architectures.begin(), form.architectures.end());
    std::sort(all.begin(), all.end());
    all.erase(std::unique(all.begin(), all.end()), all.end());
    return all;
}

std::shared_ptr<Definition const> define(std::string_view op, std::string_view program, std::string_view kernels) {
    static auto* const all = new Shared<Definition>();
    if (!program.empty() && program.back() == 0) program.remove_suffix(1);
    kernels = trimBundle(kernels);
    auto const same = [&](Definition const& kept) {
        return kept.program.op == op && kept.text == program && kept.kernels->bytes == kernels;
    };
    return all->get(hashOf(program) ^ (hashOf(kernels) << 1), same, [&] {
        auto made = std::make_shared<Definition>();
        made->text = program;
        made->program = readProgram(made->text, op);
        made->kernels = shareKernels(kernels);
        for (Form& form : made->program.forms) {
            eachLaunch(form, [&](Launch& launch) { checkLaunch(launch, form, made->kernels->bundle); });
        }
        return made;
    });
}

}  // namespace mla2dsa
