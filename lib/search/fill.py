"""Filling an index, from top to bottom: list the pictures, compare with the index, embed what is new, write, finish.

Pictures are written a few hundred at a time; each write is one commit of LanceDB, whole or not at all, after which a
kill loses nothing of it. The processes of a job embed and write their own shares; the first one alone begins and ends.
"""

import json
import os
import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from lib import collectives, distributed
from lib.checkpoints.native import trained_encoder
from lib.cli import InputError, one_line, progress_bar, reason
from lib.config import IndexSettings
from lib.data.batches import in_threads
from lib.data.dataset import Split, describe_encoder, is_same_encoder, read_boxes, read_encoder, read_ids
from lib.data.images import NotAPicture, list_photographs, load_picture
from lib.evaluation.evaluate import open_split_of
from lib.evaluation.score import BLOCK, SEEN, Matcher, load
from lib.files import hold_lock
from lib.model.pooling import MeanPooling
from lib.model.vision import Regions
from lib.search.index import (
    ABOUT,
    CAPTIONS,
    FORMAT,
    PICTURES,
    UNREADABLE,
    Index,
    connect,
    embed,
    encode,
    encode_captions,
    fingerprint,
    quote,
    read_about,
)

COMMIT, COMMITS, LARGEST = 512, 1000, 8192  # pictures of a commit: more in a run of more commits than that, to a limit
FILES = 16  # small files of a table above which they are joined
AT_ONCE = 1000  # ids of one deletion
LOCK, BUSY = "index.lock", "writing it; wait until it has ended"
NAMED = 20  # unreadable pictures that are printed
APPROXIMATE = 50_000  # rows from which on the nearest ones are found by an approximate index
UNINDEXED = 0.1  # share of them that may be compared one by one, after which that index is made anew
OLD = timedelta(seconds=10)  # how long a query may take whose files have been replaced


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

    def __init__(self, name: str, pictures: list[Picture], preprocessing: Any, split: Split | None):
        """name: of folder or split, for the index's record. preprocessing: of files. split: of region features."""
        self.name, self.pictures, self.preprocessing, self.split = name, pictures, preprocessing, split
        self.boxes = read_boxes(split) if split else None

    def load(self, part: Sequence[Picture]) -> list[Any]:
        """Of each picture its regions, what `Matcher.see` takes, or NotAPicture that says why it cannot be had."""
        loaded: list[Any] = []
        for one in part:
            if self.split:
                features = self.split.features
                rows = slice(*features.starts[one.place : one.place + 2])
                boxes: Any = None if self.boxes is None else torch.from_numpy(self.boxes[rows])
                loaded.append(Regions(torch.from_numpy(features.read(np.array([one.place]))), boxes))
                continue
            try:
                loaded.append(load_picture(one.path, self.preprocessing))
            except NotAPicture as error:
                loaded.append(error)
        return loaded


def index(settings: IndexSettings) -> None:
    """Make an index or bring it up to date. All processes of a job must call this. Raises InputError."""
    uri, first = settings.index, distributed.is_first()
    given = {name: getattr(settings, name) for name in ("device", "precision", "engine", "image_weights")}
    about = {"checkpoint": "", "bert": "", **read_about(uri)}  # by default the index's own model, else the newest
    matcher = load(settings.checkpoint or about["checkpoint"], settings.bert or about["bert"], **given)
    if "model" in about:
        Index(uri, matcher)  # refuses another model
    source, alone = find_pictures(settings, matcher), first and "://" not in uri
    with hold_lock(Path(uri) / LOCK, f"--index {uri}", BUSY) if alone else nullcontext():
        if first:
            make_tables(settings, matcher, source)
        with matcher.compute.in_force(), distributed.joined(matcher.compute.device):  # the others wait there
            job = Filling(Index(uri, matcher), source)
            todo, changed = collectives.from_first(job.compare() if first else None)
            job.embed(todo, changed, settings.workers)
        if first:
            job.finish(todo, changed)


def find_pictures(settings: IndexSettings, matcher: Matcher) -> Source:
    """The pictures of the folder, or of the split. Raises InputError where there are none."""
    if settings.photos:
        return _find_photographs(Path(settings.photos).resolve(), matcher.vision.preprocessing)
    split, _ = open_split_of([matcher.content], settings)
    ids = read_ids(split) or []
    if len(set(ids)) != len(split.features):
        ids = list(map(str, range(len(split.features))))
    captions: list[list[str]] = [[] for _ in ids]
    for caption, image in zip(split.captions, split.image_of_caption, strict=True):
        captions[image].append(caption)
    if vision := matcher.model.vision:
        found = [(os.path.abspath(path), os.stat(path)) for path in split.features.paths]
    else:  # one file of all images, and perhaps the folder that it was made of
        folder = (read_encoder(split.folder) or {}).get("folder")
        of_file = os.stat(split.features.path)
        found = [(str(split.folder.resolve() / folder / one) if folder else "", of_file) for one in ids]
    pictures = []
    for place, (one, (path, stat)) in enumerate(zip(ids, found, strict=True)):
        pictures.append(Picture(one, path, stat.st_size, stat.st_mtime_ns, place, tuple(captions[place])))
    read = (vision.preprocessing, None) if vision else (None, split)
    return Source(f"{split.folder.resolve()} {split.name}", pictures, *read)


def _find_photographs(folder: Path, preprocessing: Any) -> Source:
    names, unlisted, _ = list_photographs(folder)  # refuses none: the disk may be missing, and its index stays
    print(*(f"left out: {name}\n" for name in unlisted), sep="", end="")
    pictures = []
    for place, name in enumerate(names):
        with suppress(FileNotFoundError):  # deleted meanwhile
            stat = os.stat(folder / name)
            pictures.append(Picture(name, str(folder / name), stat.st_size, stat.st_mtime_ns, place))
    if not pictures:
        raise InputError(f"{folder}: its pictures have just gone")
    return Source(str(folder), pictures, preprocessing, None)


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
    path, head, pooling = Path(matcher.content["path"]), matcher.model.global_head, matcher.model.pooling
    bert = os.path.abspath(settings.bert) if os.path.isdir(settings.bert) else settings.bert  # a hub's name stays
    found_by = "global head" if pooling is head else "pooled by the similarity itself"
    if type(pooling) is MeanPooling:
        found_by = "mean region and mean word: the model has no global head"
    about = {
        **{"format": FORMAT, "model": fingerprint(matcher), "encoder": encoder, "source": source.name},
        **{"checkpoint": str(path.resolve() if path.exists() else path), "bert": bert},
        **{"dims": matcher.model.architecture["embed_size"], "regions": settings.compress or "float16"},
        "vector": found_by,
    }
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
        known, unreadable = (  # by id: size and time of the file
            {one: tuple(file) for one, *file in zip(*_columns(table, "id", "size", "time"), strict=True)}
            for table in (self.index.pictures, self.index.unreadable)
        )
        listed = {picture.id: (picture.size, picture.time) for picture in self.source.pictures}
        changed = {one for one, file in known.items() if listed.get(one, file) != file}
        captions: dict[str, list[str]] = defaultdict(list)
        for one, caption in zip(*_columns(self.index.captions, "picture", "caption"), strict=True):
            captions[one].append(caption)
        of_known = (picture for picture in self.source.pictures if picture.id in known)
        changed |= {picture.id for picture in of_known if sorted(picture.captions) != sorted(captions[picture.id])}
        todo = [one for one in self.source.pictures if one.id not in known and unreadable.get(one.id) != listed[one.id]]
        todo += [one for one in self.source.pictures if one.id in changed]
        gone = known.keys() - listed.keys()
        again = [one for one, file in unreadable.items() if listed.get(one) != file]
        orphans = captions.keys() - (known.keys() - gone)
        with written_whole(self.index.uri):
            _remove(self.index.captions, "picture", orphans)  # of a write that was cut off, too
            _remove(self.index.pictures, "id", gone)
            _remove(self.index.unreadable, "id", again)
        self.removed = len(gone)
        return todo, changed

    def embed(self, todo: Sequence[Picture], changed: set[str], workers: int) -> None:
        """Embed and write this process's share of pictures."""
        size = BLOCK if self.source.split or self.matcher.compute.device.type == "cuda" else SEEN
        parts = [todo[first : first + size] for first in range(0, len(todo), size)]
        parts = parts[distributed.rank() :: distributed.world_size()]
        rows: dict[str, list[dict]] = {PICTURES: [], CAPTIONS: [], UNREADABLE: []}
        threads = min(workers, distributed.own_cores())
        with progress_bar("pictures", sum(map(len, parts))) as bar:
            for part, loaded in zip(parts, in_threads(self.source.load, parts, threads), strict=True):
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
                rows[UNREADABLE].append(picture._asdict() | {"why": one_line(str(error))})
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
            rows[PICTURES].append(picture._asdict() | stored)
        captions = [(picture.id, caption) for picture, _ in readable for caption in picture.captions]
        of_captions = encode_captions(self.matcher, [caption for _, caption in captions])[2] if captions else []
        for (one, caption), vector in zip(captions, of_captions, strict=True):
            rows[CAPTIONS].append({"picture": one, "caption": caption, "vector": vector.cpu().numpy()})

    def _write(self, rows: dict[str, list[dict]], changed: set[str]) -> None:
        """Write rows, and forget them. Pictures come last: what is without them does not count."""
        pictures, index = rows[PICTURES], self.index
        again, lost = ({row["id"] for row in rows[table]} & changed for table in (PICTURES, UNREADABLE))
        with written_whole(index.uri):
            _add(index.unreadable, rows[UNREADABLE])
            _remove(index.pictures, "id", lost)
            _remove(index.captions, "picture", again | lost)
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
        unreadable = zip(*_columns(self.index.unreadable, "id", "path", "why"), strict=True)
        failed = {one: f"unreadable: {path}: {why}" for one, path, why in unreadable if one in tried}
        print(*(f"{line}\n" for line in list(failed.values())[:NAMED]), sep="", end="")
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
