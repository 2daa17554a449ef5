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
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lib.checkpoints.native import digest
from lib.cli import InputError, refusing
from lib.config import QuerySettings, SearchSettings
from lib.data.images import NotAPicture, load_picture
from lib.evaluation.attention import Attention, explain
from lib.evaluation.score import Block, Matcher, load
from lib.model.engine import CombinedScorer
from lib.model.layers import pad_rows, real_rows, upload
from lib.model.pooling import MeanPooling

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
        check_model(self.about, uri, matcher)
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
        regions, real = self.read_regions(rows)
        times["read"] = time.perf_counter()
        scores = self.score(words, lengths, regions, real, 1 - torch.tensor(rows["_distance"].to_numpy()))
        ids = rows["id"].to_pylist()
        order = sorted(range(len(ids)), key=lambda k: (-scores[k], ids[k]))[:top]
        best = torch.tensor(order)
        of_words = self._score_words(text, words, regions[best], None if real is None else real[best])
        times["rank"] = time.perf_counter()
        answers = zip(rows.take(order).to_pylist(), order, of_words, strict=True)
        return [
            Found(row["id"], row["path"], float(scores[k]), each, boxes=_to_boxes(row["boxes"]))
            for row, k, each in answers
        ]

    def explain(self, id: str, text: str) -> Attention:
        """What the score of a picture and a sentence is made of, from the regions that the index holds.

        Raises InputError where the picture is no longer in it, or the similarity attends to nothing.
        """
        with refusing(f"--index {self.uri}: cannot be read"):
            row = self.pictures.search().where(f"id = {quote(id)}").select(["vector", "regions", "boxes"]).to_arrow()
        if not len(row):
            raise InputError(f"--index {self.uri}: {id} is no longer in it")
        (words, lengths, vector), (regions, real) = self.encode(text), self.read_regions(row)
        score = self.score(words, lengths, regions, real, vector.cpu() @ torch.tensor(row["vector"][0].as_py()))
        (found,) = explain(self.matcher, regions, real, words, text, [0.0])
        return found._replace(score=score.item(), boxes=_to_boxes(row["boxes"][0].as_py()))

    def query_picture(self, picture: Any, top: int = 10, times: Times = None) -> tuple[list[Found], list[Found]]:
        """The pictures and the captions nearest to a picture (a path, or PIL's), by the cosine of their vectors.

        X-Dim scores pictures against words only, so that nothing is ranked again. Raises InputError.
        """
        try:
            pixels, size = load_picture(picture, see_with(self.matcher).preprocessing)
        except NotAPicture as error:
            raise InputError(f"{picture}: {error}") from None
        times = {} if times is None else times
        (seen,) = self.matcher.see([pixels], [size])
        vector = embed(self.matcher, [seen.features])[1]
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

    def read_regions(self, rows: Any) -> tuple[Tensor, Tensor | None]:
        """Regions (n, R, D) float32 of rows, on the device, and which of them are real, None for all."""
        device, dims = self.matcher.compute.device, self.about["dims"]
        regions = [decode(one, dims, self.about["regions"]) for one in _buffers(rows["regions"])]
        counts = torch.tensor([len(one) for one in regions])
        packed = upload(torch.from_numpy(np.concatenate(regions)), device).float()
        return pad_rows(packed, counts), real_rows(counts, device)

    def score(self, words: Tensor, lengths: Tensor, regions: Tensor, real: Tensor | None, cosines: Tensor) -> Tensor:
        """Exact scores (n,) of regions (n, R, D) and one sentence, on the CPU. cosines: (n,), of the vectors."""
        with self.matcher.compute.in_force():
            scorer: Any = self._scorer
            cosine = torch.zeros(())
            if isinstance(scorer, CombinedScorer):
                cosine = scorer.weight.cpu() * cosines
                scorer = scorer.own
            return scorer.all_pairs(regions, scorer.captions(words, lengths), real)[:, 0].cpu() + cosine

    @cached_property
    def _scorer(self) -> Any:
        return self.matcher.scorer()

    @cached_property
    def _dependency(self) -> Tensor | None:
        """X-Dim's dependency matrix: with 1,024 dimensions it takes as long as all else of a word's scores."""
        return self.matcher.model.similarity.dependency()

    def _score_words(self, text: str, words: Tensor, regions: Tensor, real: Tensor | None) -> list[list]:
        """For each picture (n) the words of a sentence with their scores; nothing where the similarity has none."""
        if not hasattr(self.matcher.model.similarity, "explain"):
            return [[]] * len(regions)
        found = explain(self.matcher, regions, real, words, text, [0.0] * len(regions), self._dependency)
        return [list(zip(one.words, one.scores.tolist(), strict=True)) for one in found]


# The database


def import_lancedb() -> Any:
    """The package. Raises InputError where it is missing."""
    os.environ.setdefault("LANCEDB_LOG", "error")
    try:
        return import_module("lancedb")
    except ModuleNotFoundError as error:
        raise InputError(f"{error}: the search needs LanceDB, run: pip install lancedb") from None


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


def check_model(about: dict[str, Any], uri: str, matcher: Matcher) -> None:
    """Raises InputError where an index is another model's."""
    if about["model"] != (found := fingerprint(matcher)):
        by = f"was made by the model {about['model'][:16]} ({about['checkpoint']}), not by {found[:16]}"
        raise InputError(f"--index {uri}: {by} ({matcher.content['path']}); name its checkpoint, or another index")


def fingerprint(matcher: Matcher) -> str:
    """SHA-256 of a model: the checksum that its file carries, else one of its weights."""
    return matcher.content.get("sha256") or digest("", matcher.model.state_dict())


def vector_of(matcher: Matcher) -> str:
    """What the vectors of a model are, in words."""
    model, pooling = matcher.model, matcher.model.pooling
    if type(pooling) is MeanPooling:
        return "mean region and mean word: the model has no global head"
    return "global head" if pooling is model.global_head else "pooled by the similarity itself"


# Embeddings as they are stored


def see_with(matcher: Matcher) -> Any:
    """The vision model that a model's pictures go through, its own or that of its regions. Raises InputError."""
    return matcher.model.vision or matcher.vision


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


def _buffers(column: Any) -> list[memoryview]:
    """The bytes of each row of a binary column, without copying them."""
    return [memoryview(one.as_buffer()) for one in column]


def quote(text: str) -> str:
    """A text as SQL writes it."""
    return "'" + text.replace("'", "''") + "'"


def _to_boxes(data: bytes | None) -> np.ndarray | None:
    return None if data is None else np.frombuffer(data, np.float32).reshape(-1, 4)


# The program


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
        lines.append(
            f"{rank:>4}  {one.score:7.4f}  {one.caption or one.path or one.id}" + f"  ({one.id})" * bool(one.caption)
        )
        if one.words:
            lines.append(" " * 15 + "  ".join(f"{word} {score:.2f}" for word, score in one.words))
    return "\n".join(lines)
