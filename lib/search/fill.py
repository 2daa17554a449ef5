"""Filling an index, from top to bottom: list the pictures, compare with the index, embed what is new, write, finish.

Pictures are written a few hundred at a time; each write is one commit of LanceDB, whole or not at all, after which a
kill loses nothing of it. The processes of a job embed and write their own shares; the first one alone begins and ends.
"""

import json
import os
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from filelock import FileLock, Timeout

from lib import collectives, distributed
from lib.checkpoints.native import trained_encoder
from lib.cli import InputError, one_line, progress_bar, reason
from lib.config import IndexSettings
from lib.data.dataset import Split, describe_encoder, is_same_encoder, read_boxes, read_encoder, read_ids
from lib.data.images import NotAPicture, list_pictures, load_picture
from lib.evaluation.evaluate import open_split_of
from lib.evaluation.score import BLOCK, SEEN, Matcher, load
from lib.model.vision import Regions
from lib.search.index import (
    ABOUT,
    CAPTIONS,
    FORMAT,
    PICTURES,
    UNREADABLE,
    Index,
    check_model,
    connect,
    embed,
    encode,
    encode_captions,
    fingerprint,
    quote,
    read_about,
    see_with,
    vector_of,
)

COMMIT, COMMITS, LARGEST = 512, 1000, 8192  # pictures of a commit: more in a run of more commits than that, to a limit
FILES = 16  # small files of a table above which they are joined
AT_ONCE = 1000  # ids of one deletion
LOCK = "index.lock"
NAMED = 20  # unreadable pictures that are printed
APPROXIMATE = 50_000  # rows from which on the nearest ones are found by an approximate index
UNINDEXED = 0.1  # share of them that may be compared one by one, after which that index is made anew
OLD = timedelta(seconds=10)  # how long a query may take whose files have been replaced
Item = TypeVar("Item")
Result = TypeVar("Result")


class Picture(NamedTuple):
    """A picture that the index shall hold."""

    id: str
    path: str
    size: int  # bytes of its file
    time: int  # in nanoseconds, when the file was last changed
    place: int  # in its folder or split
    captions: Sequence[str] = ()


class Source:
    """Where pictures come from: a folder of files, or a data set's split of pictures or of region features."""

    def __init__(self, name: str, pictures: list[Picture], split: Split | None = None):
        """name: of folder or split, for the index's record. split: of region features."""
        self.name, self.pictures, self.split = name, pictures, split
        self.boxes = read_boxes(split) if split else None

    def load(self, preprocessing: Any, part: Sequence[Picture]) -> list[Any]:
        """Of each picture its regions, what `Matcher.see` takes, or NotAPicture that says why it cannot be had."""
        if self.split:
            return [self._regions(picture.place) for picture in part]
        return [_load(picture.path, preprocessing) for picture in part]

    def _regions(self, place: int) -> Regions:
        assert self.split
        features, rows = self.split.features, slice(*self.split.features.starts[place : place + 2])
        boxes: Any = None if self.boxes is None else torch.from_numpy(self.boxes[rows])
        return Regions(torch.from_numpy(features.read(np.array([place]))), boxes)


def _load(path: str, preprocessing: Any) -> Any:
    try:
        return load_picture(path, preprocessing)
    except NotAPicture as error:
        return error


def index(settings: IndexSettings) -> None:
    """Make an index of a folder of pictures or a split, or bring it up to date. All processes of a job must call this.

    Raises InputError.
    """
    about, first = read_about(settings.index), distributed.is_first()
    matcher = load_matcher(settings, about)
    if about:
        check_model(about, settings.index, matcher)
    source = find_pictures(settings, matcher)
    with writing_alone(settings.index) if first else nullcontext():
        if first:
            make_tables(settings, matcher, source)
        with matcher.compute.in_force(), distributed.joined(matcher.compute.device):  # the others wait there
            job = Filling(Index(settings.index, matcher), source)
            todo, changed = collectives.from_first(job.compare() if first else None)
            job.embed(todo, changed, settings.workers)
        if first:
            job.finish(todo, changed)


def load_matcher(settings: IndexSettings, about: dict[str, Any]) -> Matcher:
    """The model that is asked for, else the index's own, else the newest. about: what the index says of itself."""
    given = {name: getattr(settings, name) for name in ("device", "precision", "engine", "image_weights")}
    checkpoint, bert = settings.checkpoint or about.get("checkpoint", ""), settings.bert or about.get("bert", "")
    return load(checkpoint, bert=bert, **given)


def find_pictures(settings: IndexSettings, matcher: Matcher) -> Source:
    """The pictures of the folder, or of the split. Raises InputError where there are none."""
    if settings.photos:
        see_with(matcher)  # which may not be known: before anything is made
        return _find_photographs(Path(settings.photos))
    split, _ = open_split_of([matcher.content], settings)
    ids = read_ids(split) or []
    if len(set(ids)) != len(split.features):
        ids = list(map(str, range(len(split.features))))
    captions: list[list[str]] = [[] for _ in ids]
    for caption, image in zip(split.captions, split.image_of_caption, strict=True):
        captions[image].append(caption)
    if matcher.model.vision:
        found = [(str(path), os.stat(path)) for path in split.features.paths]
    else:  # one file of all images, and perhaps the folder that it was made of
        folder = (read_encoder(split.folder) or {}).get("folder")
        of_file = os.stat(split.features.path)
        found = [(str(split.folder.resolve() / folder / one) if folder else "", of_file) for one in ids]
    pictures = [
        Picture(one, path, stat.st_size, stat.st_mtime_ns, place, tuple(captions[place]))
        for place, (one, (path, stat)) in enumerate(zip(ids, found, strict=True))
    ]
    return Source(f"{split.folder.resolve()} {split.name}", pictures, None if matcher.model.vision else split)


def _find_photographs(folder: Path) -> Source:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of pictures")
    folder, pictures = folder.resolve(), []
    names, others = list_pictures(folder)
    for place, name in enumerate(names):
        if not name.isprintable():
            print(f"left out: {name!a}: its name is not printable text")
            continue
        with suppress(FileNotFoundError):  # deleted meanwhile
            stat = os.stat(folder / name)
            pictures.append(Picture(name, str(folder / name), stat.st_size, stat.st_mtime_ns, place))
    if not pictures:  # perhaps a disk that is not there: an index that was made of it stays
        raise InputError(f"{folder}: no pictures in it, nor in folders below it; other files: {others:,}")
    return Source(str(folder), pictures)


@contextmanager
def writing_alone(uri: str) -> Iterator[None]:
    """Holds the lock of an index on a disk of this machine. Raises InputError where another process writes it."""
    if "://" in uri:
        yield
        return
    lock = FileLock(Path(uri) / LOCK)
    try:
        Path(uri).mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)  # released with the process, however it ends
    except Timeout:
        raise InputError(f"--index {uri}: another process is writing it; wait until it has ended") from None
    except OSError as error:
        raise InputError(f"--index {uri}: cannot be written ({reason(error)})") from None
    with lock:
        yield


@contextmanager
def written_whole(uri: str) -> Iterator[None]:
    """Turns what LanceDB raises where it cannot write into InputError."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        why = "No space left on device" if "No space left" in str(error) else reason(error)
        stays = "what was written before stays, the same command goes on from there"
        raise InputError(f"--index {uri}: could not be written ({why}); {stays}") from None


def make_tables(settings: IndexSettings, matcher: Matcher, source: Source) -> None:
    """Make the tables of a new index. Raises InputError where an index is there that was made otherwise."""
    import pyarrow as pa

    uri, vision = settings.index, trained_encoder(matcher.content)
    encoder = vision or (read_encoder(source.split.folder) if source.split else None)
    if about := read_about(uri):
        for name, flag, here in (("source", "", source.name), ("regions", "--compress ", settings.compress)):
            if here and here != about[name]:
                raise InputError(f"--index {uri}: was made with {flag}{about[name]}, not {here}; take another index")
        if encoder and about["encoder"] and not is_same_encoder(encoder, about["encoder"]):
            made, now = (describe_encoder(one) for one in (about["encoder"], encoder))
            raise InputError(f"--index {uri}: was made of regions by {made}, these are by {now}; take another index")
        return
    path = Path(matcher.content["path"])
    about = {
        **{"format": FORMAT, "model": fingerprint(matcher), "encoder": encoder, "source": source.name},
        **{"checkpoint": str(path.resolve() if path.exists() else path), "bert": settings.bert},  # a hub's name stays
        **{"dims": matcher.model.architecture["embed_size"], "regions": settings.compress or "float16"},
        "vector": vector_of(matcher),
    }
    head = matcher.model.global_head
    vector = ("vector", pa.list_(pa.float32(), head.dims if head else about["dims"]))
    file = [("id", pa.string()), ("path", pa.string()), ("size", pa.int64()), ("time", pa.int64())]
    pictures = pa.schema([*file, vector, ("regions", pa.large_binary()), ("boxes", pa.binary())])
    schemas = {
        CAPTIONS: pa.schema([("picture", pa.string()), ("caption", pa.string()), vector]),
        UNREADABLE: pa.schema([*file, ("why", pa.string())]),
        PICTURES: pictures.with_metadata({ABOUT: json.dumps(about)}),  # last: it says that all are there
    }
    with written_whole(uri):
        database = connect(uri)
        for name, schema in schemas.items():
            database.create_table(name, schema=schema, exist_ok=True)


class Filling:
    """A job that brings an index up to date with its source."""

    def __init__(self, index: Index, source: Source):
        self.index, self.matcher, self.source, self.removed = index, index.matcher, source, 0

    def compare(self) -> tuple[list[Picture], set[str]]:
        """The pictures to embed, and the ids of those among them that have changed; what is gone is taken out."""
        known, unreadable = _files(self.index.pictures), _files(self.index.unreadable)
        listed = {picture.id: (picture.size, picture.time) for picture in self.source.pictures}
        changed = {one for one, file in known.items() if listed.get(one, file) != file}
        todo = [one for one in self.source.pictures if one.id not in known and unreadable.get(one.id) != listed[one.id]]
        todo += [one for one in self.source.pictures if one.id in changed]
        gone = known.keys() - listed.keys()
        again = [one for one, file in unreadable.items() if listed.get(one) != file]
        orphans = set(_columns(self.index.captions, "picture")[0]) - (known.keys() - gone)
        with written_whole(self.index.uri):
            for table, column, ids in (
                (self.index.captions, "picture", orphans),  # of a write that was cut off, too
                (self.index.pictures, "id", gone),
                (self.index.unreadable, "id", again),
            ):
                _remove(table, column, ids)
        self.removed = len(gone)
        return todo, changed

    def embed(self, todo: Sequence[Picture], changed: set[str], workers: int) -> None:
        """Embed and write this process's share of pictures."""
        size = BLOCK if self.source.split or self.matcher.compute.device.type == "cuda" else SEEN
        parts = [todo[first : first + size] for first in range(0, len(todo), size)]
        parts = parts[distributed.rank() :: distributed.world_size()]
        rows: dict[str, list[dict]] = {PICTURES: [], CAPTIONS: [], UNREADABLE: []}
        threads = min(workers, max(1, (os.cpu_count() or 1) // distributed.local_count()))
        read = partial(self.source.load, None if self.source.split else see_with(self.matcher).preprocessing)
        with progress_bar("pictures", sum(map(len, parts))) as bar:
            for part, loaded in zip(parts, ahead(read, parts, threads), strict=True):
                self._describe(part, loaded, rows)
                bar.update(len(part))
                distributed.heartbeat()
                if len(rows[PICTURES]) + len(rows[UNREADABLE]) >= commit_size(len(todo)):
                    self._write(rows, changed)
        self._write(rows, changed)

    def _describe(self, part: Sequence[Picture], loaded: Sequence[Any], rows: dict[str, list[dict]]) -> None:
        """Add what the tables shall hold of some pictures to their rows."""
        readable = [pair for pair in zip(part, loaded, strict=True) if not isinstance(pair[1], NotAPicture)]
        for picture, error in zip(part, loaded, strict=True):
            if isinstance(error, NotAPicture):
                rows[UNREADABLE].append(_of_file(picture) | {"why": one_line(str(error))})
        if not readable:
            return
        regions = [one for _, one in readable]
        if not self.source.split:
            regions = self.matcher.see(*zip(*regions, strict=True))
        block, vectors = embed(self.matcher, [one.features for one in regions])
        real = torch.ones(block.regions.shape[:2], dtype=torch.bool) if block.real is None else block.real.cpu()
        about = self.index.about
        of_xdim = block.regions[..., : about["dims"]].float().cpu()  # a head's dimensions are in the vector
        embedded = [rows[some].numpy() for rows, some in zip(of_xdim, real, strict=True)]
        for (picture, _), one, own, vector in zip(readable, regions, embedded, vectors.cpu().numpy(), strict=True):
            boxes = None if one.boxes is None else one.boxes.float().cpu().numpy().tobytes()
            stored = {"vector": vector, "regions": encode(own, about["regions"]), "boxes": boxes}
            rows[PICTURES].append(_of_file(picture) | stored)
        captions = [(picture.id, caption) for picture, _ in readable for caption in picture.captions]
        of_captions = encode_captions(self.matcher, [caption for _, caption in captions])[2] if captions else []
        for (one, caption), vector in zip(captions, of_captions, strict=True):
            rows[CAPTIONS].append({"picture": one, "caption": caption, "vector": vector.cpu().numpy()})

    def _write(self, rows: dict[str, list[dict]], changed: set[str]) -> None:
        """Write rows, and forget them. Pictures come last: what is without them does not count."""
        pictures, index = rows[PICTURES], self.index
        again = {row["id"] for row in pictures} & changed
        with written_whole(index.uri):
            _add(index.unreadable, rows[UNREADABLE])
            _remove(index.pictures, "id", {row["id"] for row in rows[UNREADABLE]} & changed)
            _remove(index.captions, "picture", again)
            _add(index.captions, rows[CAPTIONS])
            if again:
                merge = index.pictures.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
                merge.execute(_to_arrow(index.pictures, pictures))
            else:
                _add(index.pictures, pictures)
        for kept in rows.values():
            kept.clear()

    def finish(self, todo: Sequence[Picture], changed: set[str]) -> None:
        """Gather small files, make or renew the approximate index, and say what was done."""
        with written_whole(self.index.uri):
            for table in (self.index.pictures, self.index.captions, self.index.unreadable):
                tidy(table)
        tried = {picture.id for picture in todo}
        failed = {
            one: rest
            for one, *rest in zip(*_columns(self.index.unreadable, "id", "path", "why"), strict=True)
            if one in tried
        }
        for path, why in list(failed.values())[:NAMED]:
            print(f"unreadable: {path}: {why}")
        done = {"new": tried - changed - failed.keys(), "changed": changed - failed.keys(), "unreadable": failed}
        parts = {name: len(ids) for name, ids in done.items()} | {"removed": self.removed}
        what = ", ".join(f"{number:,} {name}" for name, number in parts.items() if number) or "nothing new"
        print(f"{self.index.uri}: {len(self.index):,} pictures, {what}; found by {self.index.about['vector']}")


def commit_size(pictures: int) -> int:
    """How many pictures are written at a time in a run of so many: what a kill may lose."""
    return max(COMMIT, min(pictures // COMMITS, LARGEST))


def tidy(table: Any) -> None:
    """Join a table's files where they are many and small, and make or renew the index of a large one's vectors."""
    import lancedb.index

    table.checkout_latest()  # with what other processes of the job have written
    count = table.count_rows()
    if table.stats()["fragment_stats"]["num_small_fragments"] > FILES:
        table.optimize()
        time.sleep(OLD.total_seconds())  # by then all readers have the new files
        table.optimize(cleanup_older_than=OLD)
    if count < APPROXIMATE or "vector" not in table.schema.names:
        return
    made = list(table.list_indices())
    if not made or (table.index_stats(made[0].name).num_unindexed_rows or 0) > UNINDEXED * count:
        parts = round(count**0.5)
        config = lancedb.index.IvfFlat("dot", num_partitions=parts, max_iterations=10, sample_rate=64)
        table.create_index("vector", config=config, replace=True)


def ahead(work: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """The results of some work, in order; so many threads do it in advance, this one where there are none."""
    if not threads:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(threads) as executor:
        waiting: deque[Future] = deque()
        for item in items:
            waiting.append(executor.submit(work, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


# Rows


def _of_file(picture: Picture) -> dict[str, Any]:
    return {"id": picture.id, "path": picture.path, "size": picture.size, "time": picture.time}


def _files(table: Any) -> dict[str, tuple[int, int]]:
    """Size and time of the file of each id."""
    ids, sizes, times = _columns(table, "id", "size", "time")
    return dict(zip(ids, zip(sizes, times, strict=True), strict=True))


def _columns(table: Any, *names: str) -> list[list]:
    read = table.search().select([*names]).limit(None).to_arrow()
    return [read[name].to_pylist() for name in names]


def _remove(table: Any, column: str, ids: Collection[str]) -> None:
    quoted = [quote(one) for one in ids]
    for first in range(0, len(quoted), AT_ONCE):
        table.delete(f"{column} IN ({', '.join(quoted[first : first + AT_ONCE])})")


def _add(table: Any, rows: list[dict]) -> None:
    if rows:
        table.add(_to_arrow(table, rows))


def _to_arrow(table: Any, rows: list[dict]) -> Any:
    import pyarrow as pa

    return pa.Table.from_pylist(rows, schema=table.schema)
