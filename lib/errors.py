"""The ways a program ends early on purpose: each is one line on stderr, never a traceback."""

QUOTED = 200  # characters of a text from elsewhere that an error message quotes


class InputError(Exception):
    """Something given to the program is wrong. The message names the file or flag and says what to do."""

    exit_code = 2


class TrainingStopped(Exception):
    """A run that cannot go on (a loss that is not a number, say). The message says what to do."""

    exit_code = 1


class Interrupted(Exception):
    """A run that was asked to end and has saved. The message holds the command to go on."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.exit_code = 128 + signal  # as shells count it


class PeerLost(Exception):
    """Another process of the same job has gone; what went wrong is for that one, or for torchrun, to say."""

    exit_code = 1


def reason(error: Exception) -> str:
    """The first line of what a library's error says, to be quoted in ours."""
    return one_line(str(error)) or type(error).__name__


def one_line(text: str) -> str:
    """The first line of a text from elsewhere, cut to QUOTED characters, for an error message.

    What cannot be printed becomes "?": a hostile file must not write to the terminal through an error message.
    """
    line = next(iter(text.strip().splitlines()), "")
    if len(line) > QUOTED:
        line = line[: QUOTED - 3] + "..."
    return "".join(character if character.isprintable() else "?" for character in line)
