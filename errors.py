"""What can go wrong in a way the user can mend: one clear line each, never a traceback."""

from __future__ import annotations

from collections.abc import Sequence


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
