"""Ends work at any point of the writer, as a kill, Ctrl-C or a full disk would, and compares what comes of it."""

import os
import resource
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lib.data.features import FeatureFile
from lib.prepare import writer


def record_every(size: int, monkeypatch) -> None:
    """Have the writer record how far it has come after so many bytes of features, and nothing wait for the disk."""
    monkeypatch.setattr(writer, "SYNC_BYTES", size)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())} if folder.exists() else {}


def final(folder: Path) -> dict[str, bytes]:
    """The files that have their final names."""
    under_way = (".part", ".tmp", "_progress.json")
    return {name: content for name, content in contents(folder).items() if not name.endswith(under_way)}


def check_final(folder: Path, expected: dict[str, bytes]) -> None:
    """Whatever has a final name is complete; and where the features have theirs, all of their split is there."""
    there = final(folder)
    assert there.items() <= expected.items()
    for name in there:
        if name.endswith("_ims.npy"):
            split = name.removesuffix("ims.npy")
            assert {other for other in expected if other.startswith(split)} <= set(there)
            assert len(FeatureFile(folder / name))


def states(work: Callable[[], object], folder: Path) -> list[dict[str, bytes]]:
    """What is in the folder before each line of the writer while it works, each state once.

    This is what a kill there leaves: what the writer still holds in memory is not in the files.
    """
    found: dict[tuple, dict[str, bytes]] = {}

    def look():
        state = contents(folder)
        found.setdefault(tuple(state.items()), state)

    with _at_lines(lambda number: look()):
        work()
    return list(found.values())


def restore(folder: Path, state: dict[str, bytes]) -> None:
    folder.mkdir(parents=True)
    for name, content in state.items():
        (folder / name).write_bytes(content)


def kill(work: Callable[[], object], line: int) -> bool:
    """Do the work in a process that is killed before the line-th line of the writer that it comes to.

    False where it came to its end before.
    """
    child = os.fork()
    if child == 0:
        try:
            with _at_lines(lambda number: number == line and os.kill(os.getpid(), signal.SIGKILL)):
                work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


def press_ctrl_c(work: Callable[[], object], line: int) -> bool:
    """Do the work, with KeyboardInterrupt at a line of the writer; False where it came to its end before."""

    def interrupt(number):
        if number == line:
            raise KeyboardInterrupt

    def run():
        try:
            with _at_lines(interrupt):
                work()
        except KeyboardInterrupt:
            interrupted.append(True)

    interrupted = []
    thread = threading.Thread(target=run)  # what Python keeps of an exception that a tracer raises ends with it
    thread.start()
    thread.join()
    return bool(interrupted)


@contextmanager
def files_at_most(size: int) -> Iterator[None]:
    """No file can grow beyond a size: writing ends in the middle, as on a full disk."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


@contextmanager
def _at_lines(act: Callable[[int], object]) -> Iterator[None]:
    """Call act(1), act(2), ... before the lines of the writer."""
    number = 0

    def trace(frame, event, argument):
        nonlocal number
        if frame.f_code.co_filename != writer.__file__:
            return None
        if event == "line":
            number += 1
            act(number)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)
