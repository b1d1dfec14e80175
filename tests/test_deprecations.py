"""A call that a library will drop is an error when one of our files makes it, and nobody's business when a library does.

Python shows the warning to whoever stands `stacklevel` frames up, by the `__name__` of its globals.
"""

import warnings
from collections.abc import Callable

import forgetting
import pytest

CATEGORIES = (DeprecationWarning, FutureWarning, PendingDeprecationWarning)
OURS = ("mla2dsa", "mla2dsa.passes.graph.editor", "tests.passes.test_find_mla", forgetting.__name__)
THEIRS = ("torch.export", "transformers.modeling_utils", "mla2dsa_plugin", "onnxscript")


def old(category: type[Warning], stacklevel: int = 2) -> Callable[[], None]:
    """A function of a library that warns its caller."""

    def function() -> None:
        warnings.warn("use the new one", category, stacklevel=stacklevel)

    return function


def call_from(module: str, function: Callable[[], None]) -> None:
    """Call as code of that module does."""
    exec("function()", {"__name__": module, "function": function})


@pytest.mark.parametrize("category", CATEGORIES)
@pytest.mark.parametrize("module", OURS)
def test_deprecated_calls_of_ours_are_errors(module: str, category: type[Warning]) -> None:
    with pytest.raises(category, match="use the new one"):
        call_from(module, old(category))


@pytest.mark.parametrize("category", CATEGORIES)
@pytest.mark.parametrize("module", THEIRS)
def test_deprecated_calls_of_libraries_are_not(module: str, category: type[Warning]) -> None:
    call_from(module, old(category))


def test_what_a_library_says_of_itself_is_not() -> None:
    """Without a stacklevel the warning is the library's own, whoever called."""
    library = {"__name__": "some_library", "warnings": warnings}
    exec("def function(): warnings.warn('in here', DeprecationWarning)", library)
    call_from("mla2dsa.passes", library["function"])  # type: ignore[arg-type]


@pytest.mark.parametrize("category", CATEGORIES)
def test_a_deprecated_call_in_this_very_file_is_an_error(category: type[Warning]) -> None:
    function = old(category)
    with pytest.raises(category):
        function()
