"""The two ways a program ends early on purpose: each is one line on stderr, never a traceback."""


class InputError(Exception):
    """Something given to the program is wrong. The message names the file or flag and says what to do."""

    exit_code = 2


class TrainingStopped(Exception):
    """A run that cannot go on (a loss that is not a number, say). The message says what to do."""

    exit_code = 1


def reason(error: Exception) -> str:
    """The first line of what a library's error says, to be quoted in ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
