"""What can go wrong in a way the user can mend: one clear line each, never a traceback."""

from __future__ import annotations

from collections.abc import Sequence

_MOST_BITS = 256


class UserError(Exception):
    """Wrong input or a failed check. The command line prints the message as one line and exits with `exit_code`.

    The message says what is wrong, where (layer, tensor, file), what was expected, and what to do.
    """

    exit_code = 1


class UsageError(UserError):
    """The command was called in a way it does not take (bad flag value, output folder in the way)."""

    exit_code = 2


class SeveralErrors(UserError):
    """Things that are wrong, all found before any work: one line each, after a line that says how many."""

    def __init__(self, errors: Sequence[UserError]) -> None:
        self.lines = [f"{len(errors)} things to mend before this can start:", *(f"  {error}" for error in errors)]
        super().__init__("\n".join(self.lines))
        self.exit_code = max(error.exit_code for error in errors)


def short(value: object, most: int = 100) -> str:
    """`value` as an error line may hold it, however long or odd it is: printable, its middle cut out beyond `most` characters.

    An integer that Python will not write out (thousands of digits) is told by its bits.
    """
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        return f"a number of {value.bit_length()} bits"
    text = value if isinstance(value, str) else repr(value)
    if len(text) > most:
        text = f"{text[: most * 2 // 3]}...{text[-most // 4 :]}"
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
