"""What tests of damaged and hostile input share."""

import tracemalloc
from contextlib import contextmanager

import pytest
from hypothesis import strategies as st

from lib.cli import InputError


@contextmanager
def memory_below(bytes):
    """Fails where Python held more memory at any time than before."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < bytes
    finally:
        tracemalloc.stop()


def grow(path, size):
    """Make a file as long as `size`; what is added are zeros that take no room on the disk."""
    with open(path, "r+b") as file:
        file.truncate(size)


def write_bytes(path, content):
    path.unlink(missing_ok=True)  # never shorten a file that is still open
    path.write_bytes(content)
    return path


def refusal(function, *args):
    """The message with which a call is refused, which is one line."""
    with pytest.raises(InputError) as caught:
        function(*args)
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    return message


def unless_refused(read, start):
    """What `read` gives, or None where it refuses in one line that starts like this."""
    try:
        return read()
    except InputError as error:
        message = str(error)
    assert message.startswith(start)
    assert len(message.splitlines()) == 1
    return None


def spoil(content, kept=None, changes=(), surplus=b""):
    """Bytes cut at `kept`, some changed, others added."""
    content = bytearray(content[:kept])
    for place, value in changes:
        if place < len(content):
            content[place] = value
    return bytes(content + surplus)


def changes(places):
    """A few bytes to change: where, and what to."""
    return st.lists(st.tuples(st.integers(0, places), st.integers(0, 255)), max_size=3)


def cuts(places):
    """Where to cut, or None for not at all."""
    return st.one_of(st.none(), st.integers(0, places))
