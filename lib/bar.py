"""Progress bars: of a job's first process only, quiet where stderr is no terminal."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

from lib import processes

Item = TypeVar("Item")

passed = 0  # items of all bars so far: a process that works makes this grow (lib/processes.py)


def with_bar(items: Iterable[Item], what: str, total: int | None = None) -> Iterator[Item]:
    """Items on their way, counted by a bar."""
    global passed
    for item in tqdm(items, desc=what, total=total, leave=False, disable=None if processes.is_first() else True):
        passed += 1
        yield item
