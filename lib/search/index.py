"""The index of pictures, a LanceDB database, and how it is asked.

    pictures     id, path, size and time of the file, vector (D,), regions (R, D), boxes (R, 4); a row a picture
    captions     id, picture, caption, vector (D,); a row a caption, where the data set has some
    unreadable   id, path, size and time of the files that are no pictures, and why, so that none is tried again

A query reads only: any number of processes may ask while one fills (fill.py). Each query sees one version of a table.
"""

import json
import os
import time
from collections.abc import Sequence
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lib.checkpoints.native import digest
from lib.cli import InputError, optional, refusing
from lib.config import QuerySettings, SearchSettings
from lib.evaluation.attention import Attention, explain
from lib.evaluation.score import Block, Matcher, load
from lib.model.engine import CombinedScorer
from lib.model.layers import pad_rows, real_rows, upload

FORMAT, ABOUT = "x-dim index 1", b"x-dim"  # what the metadata of `pictures` say, and under which name
PICTURES, CAPTIONS, UNREADABLE = "pictures", "captions", "unreadable"
FRESH = timedelta(seconds=1)  # after which a query looks for what others have written meanwhile
PROBES = 50  # parts of the approximate index that are searched; of a million pictures it has a thousand
GROUP = 128  # captions encoded at a time
Times = dict[str, float] | None  # when each part of a query ended, by time.perf_counter(); filled by the query
LEAST = 1e-12  # below which a region's largest number counts as nothing


class Found(NamedTuple):
    """An answer."""

    id: str
    path: str
    score: float
    words: Sequence[tuple[str, float]] = ()  # each word of the query with its own score, where the similarity has such
    caption: str = ""
    boxes: np.ndarray | None = None  # (R, 4): x1 y1 x2 y2 in pixels


class Index:
    """Pictures that have been embedded by one model, and that model, to embed what is asked."""

    def __init__(self, uri: str, matcher: Matcher):
        """Raises InputError where the index is another model's."""
        self.uri, self.matcher, self.about = uri, matcher, read_about(uri)
        if self.about["model"] != (found := fingerprint(matcher)):
            by = f"was made by the model {self.about['model'][:16]} ({self.about['checkpoint']}), not by {found[:16]}"
            raise InputError(f"--index {uri}: {by} ({matcher.content['path']}); name its checkpoint, or a new index")
        database = connect(uri)
        self.pictures, self.captions, self.unreadable = map(database.open_table, (PICTURES, CAPTIONS, UNREADABLE))

    @classmethod
    def open(cls, uri: str | Path, checkpoint: str = "", device: str = "auto", **options: str) -> "Index":
        """Open an index for queries. uri: a folder, or what else LanceDB takes (s3://, gs://, db://).

        checkpoint: of its model, if it is no longer where it was. options: of `lib.load`. Raises InputError.
        """
        if not (about := read_about(uri := str(uri))):
            raise InputError(f"--index {uri}: no index there; make one: python search.py index PHOTOS --index {uri}")
        given = {"bert": about["bert"], "precision": "", "engine": "", "image_weights": "", **options}
        return cls(uri, load(checkpoint or about["checkpoint"], device=device, **given))

    @classmethod
    def of(cls, settings: SearchSettings) -> "Index":
        """Open the index that a program is given. Raises InputError, also where no pictures are in it."""
        given = {name: getattr(settings, name) for name in ("checkpoint", "device", "precision", "engine")}
        given |= {name: value for name in ("bert", "image_weights") if (value := getattr(settings, name))}
        index = cls.open(settings.index, **given)
        if not len(index):
            raise InputError(f"--index {settings.index}: no pictures in it")
        return index

    def __len__(self) -> int:
        return self.pictures.count_rows()

    def query(self, text: str, top: int = 10, candidates: int = 200, times: Times = None) -> list[Found]:
        """The best pictures for a sentence, best first, by the exact scores of the nearest `candidates`.

        A word's score is the mean of its pieces'; the score of X-Dim is the mean over all pieces, special tokens too.
        """
        times = {} if times is None else times
        words, lengths, vector = self.encode(text)
        times["encode"] = time.perf_counter()
        rows = self.nearest(self.pictures, vector, max(top, candidates), ["id", "path", "regions", "boxes"])
        times["find"] = time.perf_counter()
        if not len(rows):
            return []
        block = self.read_regions(rows)
        times["read"] = time.perf_counter()
        scores = self.score(words, lengths, block, 1 - torch.tensor(rows["_distance"].to_numpy()))
        ids = rows["id"].to_pylist()
        order = sorted(range(len(ids)), key=lambda k: (-scores[k], ids[k]))[:top]
        of_words: list[list] = [[]] * len(order)
        if hasattr(self.matcher.model.similarity, "explain"):
            best = Block(slice(top), block.regions[order], None if block.real is None else block.real[order])
            seen = explain(self.matcher, best, words, text, self.dependency)
            of_words = [list(zip(one.words, one.scores.tolist(), strict=True)) for one in seen]
        times["rank"] = time.perf_counter()
        return [
            Found(row["id"], row["path"], float(scores[k]), each, boxes=_to_boxes(row["boxes"]))
            for row, k, each in zip(rows.take(order).to_pylist(), order, of_words, strict=True)
        ]

    def explain(self, id: str, text: str) -> Attention:
        """What the score of a stored picture and a sentence is made of. Raises InputError, also without attention."""
        with refusing(f"--index {self.uri}: cannot be read"):
            row = self.pictures.search().where(f"id = {quote(id)}").select(["vector", "regions", "boxes"]).to_arrow()
        if not len(row):
            raise InputError(f"--index {self.uri}: {id} is no longer in it")
        (words, lengths, vector), block = self.encode(text), self.read_regions(row)
        score = self.score(words, lengths, block, vector.cpu() @ torch.tensor(row["vector"][0].as_py()))
        (found,) = explain(self.matcher, block, words, text, self.dependency)
        return found._replace(score=score.item(), boxes=_to_boxes(row["boxes"][0].as_py()))

    def query_picture(self, picture: Any, top: int = 10, times: Times = None) -> tuple[list[Found], list[Found]]:
        """The pictures and captions nearest to a picture (a path, or PIL's), by the cosine of vectors alone, as X-Dim
        scores pictures against words only. Raises InputError."""
        times = {} if times is None else times
        ((seen, _),) = self.matcher.take([picture])
        vector = embed(self.matcher, [seen])[1]
        times["encode"] = time.perf_counter()
        answers = []
        for table, own in ((self.pictures, ["id", "path"]), (self.captions, ["picture", "caption"])):
            rows = self.nearest(table, vector, top, own).to_pylist()
            of_rows = [(row.get("id") or row["picture"], row.get("path", ""), 1 - row["_distance"]) for row in rows]
            answers.append([Found(*one, (), row.get("caption", "")) for one, row in zip(of_rows, rows, strict=True)])
        times["find"] = time.perf_counter()
        return answers[0], answers[1]

    # The parts of a query

    def encode(self, text: str) -> tuple[Tensor, Tensor, Tensor]:
        """Word embeddings (W, D), their number (1,) and the vector (1, D) of a sentence."""
        if not text.strip():
            raise InputError("the query is empty; give a sentence")
        return encode_captions(self.matcher, [text])

    def nearest(self, table: Any, vector: Tensor, number: int, columns: Sequence[str]) -> Any:
        """Columns of the rows nearest to a vector (1, D), as an Arrow table with `_distance`, 1 - cosine."""
        with refusing(f"--index {self.uri}: cannot be read"):
            search = table.search(vector[0].float().cpu().numpy(), vector_column_name="vector").distance_type("dot")
            search = search.nprobes(PROBES).limit(number)
            if number >= table.count_rows():
                search = search.bypass_vector_index()
            return search.select([*columns, "_distance"]).to_arrow()

    def read_regions(self, rows: Any) -> Block:
        """The regions of rows (n), in float32, on the device."""
        device, dims = self.matcher.compute.device, self.about["dims"]
        buffers = (memoryview(one.as_buffer()) for one in rows["regions"])  # which are not copied
        regions = [decode(one, dims, self.about["regions"]) for one in buffers]
        counts = torch.tensor([len(one) for one in regions])
        packed = upload(torch.from_numpy(np.concatenate(regions)), device).float()
        return Block(slice(len(rows)), pad_rows(packed, counts), real_rows(counts, device))

    def score(self, words: Tensor, lengths: Tensor, block: Block, cosines: Tensor) -> Tensor:
        """Exact scores (n,) of pictures and one sentence, on the CPU. cosines: (n,), of the vectors."""
        with self.matcher.compute.in_force():
            scorer: Any = self._scorer
            added = torch.zeros(())
            if isinstance(scorer, CombinedScorer):
                scorer, added = scorer.own, scorer.weight.cpu() * cosines
            return scorer.all_pairs(block.regions, scorer.captions(words, lengths), block.real)[:, 0].cpu() + added

    @cached_property
    def _scorer(self) -> Any:
        return self.matcher.scorer()

    @cached_property
    def dependency(self) -> Tensor | None:
        """The model's: with 1,024 dimensions it takes as long as all else of a word's scores."""
        return self.matcher.dependency()


# The database


def import_lancedb() -> Any:
    """The package. Raises InputError where it is missing."""
    os.environ.setdefault("LANCEDB_LOG", "error")
    return optional("lancedb", "search.py")


def connect(uri: str) -> Any:
    """The database at a path, which is made, or a URI, as LanceDB takes it. Raises InputError."""
    with refusing(f"--index {uri}: cannot be opened"):
        return import_lancedb().connect(uri, read_consistency_interval=FRESH)


def read_about(uri: str) -> dict[str, Any]:
    """What an index says of itself; nothing where there is none. Raises InputError where it is none of this project."""
    import_lancedb()
    if "://" not in uri and not Path(uri).is_dir():
        return {}
    database = connect(uri)
    with refusing(f"--index {uri}: not an index of pictures"):
        if PICTURES not in database.list_tables().tables:
            return {}
        about = json.loads(database.open_table(PICTURES).schema.metadata[ABOUT])
        if about["format"] != FORMAT:
            raise ValueError(f"its format is {about['format']!a}")
    return about


def fingerprint(matcher: Matcher) -> str:
    """SHA-256 of a model: the checksum that its file carries, else one of its weights."""
    return matcher.content.get("sha256") or digest("", matcher.model.state_dict())


# Embeddings as they are stored


@torch.inference_mode()
def embed(matcher: Matcher, images: Sequence[Tensor]) -> tuple[Block, Tensor]:
    """Regions of pictures as a block, and their vectors (n, D). images: of each what the model takes."""
    with matcher.compute.in_force():
        (block,) = matcher.embed_images([matcher.batch(images)])
        return block, matcher.model.pooling.pool_images(block.regions, block.real)


@torch.inference_mode()
def encode_captions(matcher: Matcher, captions: list[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Word embeddings (sum of W, D) of captions, their numbers (C,), and the captions' vectors (C, D)."""
    with matcher.compute.in_force():
        words, lengths = matcher.embed_captions(matcher.tokenizer.tokenize(captions), GROUP)
        return words, lengths, matcher.model.pooling.pool_captions(words, lengths)


def encode(regions: np.ndarray, form: str) -> bytes:
    """Regions (R, D) float32 as bytes: float32, float16, or int8 behind each region's scale in float32."""
    if form != "int8":
        return regions.astype(form).tobytes()
    scales = np.maximum(np.abs(regions).max(axis=1, keepdims=True), LEAST) / 127
    return scales.astype(np.float32).tobytes() + np.rint(regions / scales).astype(np.int8).tobytes()


def decode(data: Any, dims: int, form: str) -> np.ndarray:
    """Regions (R, D) of `encode`'s bytes, in float16 or float32."""
    if form != "int8":
        return np.frombuffer(data, form).reshape(-1, dims)
    count = len(data) // (dims + 4)
    scales = np.frombuffer(data, np.float32, count)[:, None]
    return np.frombuffer(data, np.int8, offset=4 * count).reshape(count, dims) * scales


def quote(text: str) -> str:
    """A text as SQL writes it."""
    return "'" + text.replace("'", "''") + "'"


def _to_boxes(data: bytes | None) -> np.ndarray | None:
    return None if data is None else np.frombuffer(data, np.float32).reshape(-1, 4)


def answer(settings: QuerySettings) -> str:
    """What search.py query prints. Raises InputError."""
    index = Index.of(settings)
    if settings.image:
        pictures, captions = index.query_picture(settings.image, settings.top)
    else:
        pictures, captions = index.query(settings.text, settings.top, settings.candidates), []
    if settings.json:
        found = {"pictures": [_to_plain(one) for one in pictures], "captions": [_to_plain(one) for one in captions]}
        return json.dumps({name: rows for name, rows in found.items() if rows or name == "pictures"})
    return "\n\n".join(_table(rows) for rows in (pictures, captions) if rows)


def _to_plain(found: Found) -> dict[str, Any]:
    return {name: value for name, value in found._asdict().items() if name != "boxes" and value not in ((), [], "")}


def _table(rows: Sequence[Found]) -> str:
    """A line for each answer, the words' scores below it."""
    lines = []
    for rank, one in enumerate(rows, start=1):
        name = f"{one.caption}  ({one.id})" if one.caption else one.path or one.id
        lines.append(f"{rank:>4}  {one.score:7.4f}  {name}")
        if one.words:
            lines.append(" " * 15 + "  ".join(f"{word} {score:.2f}" for word, score in one.words))
    return "\n".join(lines)
