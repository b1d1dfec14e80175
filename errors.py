"""What can go wrong in a way the user can mend: one clear line each, never a traceback."""


class UserError(Exception):
    """Wrong input or a failed check. The command line prints the message as one line and exits with `exit_code`.

    The message says what is wrong, where (layer, tensor, file), what was expected, and what to do.
    """

    exit_code = 1


class UsageError(UserError):
    """The command was called in a way it does not take (bad flag value, output folder in the way)."""

    exit_code = 2
