"""Searching among 10,000 to a million pictures: seconds to build, bytes a picture, milliseconds of a query, recall.

    OMP_NUM_THREADS=2 python benchmarks/search.py --folder /tmp
    python benchmarks/search.py --checkpoint RUN --data_name NAME    # what candidates and fewer bytes a region lose

Pictures are random unit vectors around 50,000 centres, their regions random unit vectors around those. Each query of a
warm process encodes a caption of 3 to 20 words, and finds, reads and scores the candidates of a vector
around a centre. Recall: which share of the vectors' exact nearest the approximate index finds. --folder needs some 19
KB a picture of 36 regions; what is written there is deleted at the end.
"""

import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import common  # noqa: E402
from benchmarks.evaluate import write_bert  # noqa: E402
from lib.checkpoints.native import new_model, write_weights  # noqa: E402
from lib.config import IndexSettings, TrainSettings  # noqa: E402
from lib.evaluation.evaluate import open_split_of  # noqa: E402
from lib.evaluation.score import embed_split, load, pool, score_all  # noqa: E402
from lib.runtime import versions  # noqa: E402
from lib.search import Index, fill  # noqa: E402
from lib.search.index import decode, encode  # noqa: E402
from lib.training.run_folder import Progress  # noqa: E402

CENTRES, NOISE = 50_000, 0.5  # of the vectors; length of the noise around a centre
WARM = 100  # queries before the first that counts
TEXT = {  # sizes of language models, where they differ from BERT-base
    "base": {},
    "small": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
}
PARTS = ("encode", "find", "read", "score")
FIRST = (20, 50, 100, 200)  # candidates by the vectors alone


def main() -> None:
    flags = common.parser(__doc__.splitlines()[0])
    flags.add_argument("--pictures", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    flags.add_argument("--regions", type=int, nargs="+", default=[36, 36, 4], help="of each number of pictures")
    flags.add_argument("--queries", type=int, default=200)
    flags.add_argument("--candidates", type=int, default=200)
    flags.add_argument("--text", choices=TEXT, default="base", help="language model: of BERT-base's size, of MiniLM's")
    flags.add_argument("--folder", default=None, help="where there is room")
    flags.add_argument("--compress", default="", help="as of search.py")
    flags.set_defaults(embed_size=256)
    flags.add_argument("--checkpoint", default="", help="ask what this model loses instead")
    flags.add_argument("--data_name", default="", help="on this data set (default: the checkpoint's)")
    flags.add_argument("--split", default="test", help="its split")
    flags.add_argument("--captions", type=int, default=500, help="of them so many")
    settings = common.parse(flags, pictures=[300], regions=[2], queries=5, candidates=10)
    if settings.checkpoint:
        ask_model(settings)
        return
    results = {}
    with tempfile.TemporaryDirectory(dir=settings.folder) as folder:
        checkpoint = write_model(settings, Path(folder))
        for pictures, regions in zip(settings.pictures, settings.regions, strict=True):
            uri = Path(folder) / "index"
            results[f"{pictures:,} x {regions}"] = measure(settings, str(uri), checkpoint, pictures, regions)
            shutil.rmtree(uri)
    report(settings, results)


def write_model(settings, folder: Path) -> Path:
    """A checkpoint of random weights, its language model of BERT-base's size."""
    bert = write_bert(folder, **(common.bert_sizes(settings) or TEXT[settings.text]))
    flags = asdict(
        TrainSettings(bert=str(bert), bert_from_scratch=True, img_dim=8, embed_size=settings.embed_size, gate="open")
    )
    model, tokenizer, _ = new_model(flags)
    content = {"model": model.state_dict(), "architecture": model.architecture, "tokenizer": tokenizer.specification}
    write_weights(
        folder / "model.safetensors",
        {**content, "settings": flags, "progress": asdict(Progress()), "data": {}, "versions": versions()},
    )
    return folder / "model.safetensors"


def around(centres: np.ndarray, noise: float, rng: np.random.Generator) -> np.ndarray:
    """A unit vector near each of some (..., D)."""
    moved = centres + noise / centres.shape[-1] ** 0.5 * rng.standard_normal(centres.shape, np.float32)
    return moved / np.linalg.norm(moved, axis=-1, keepdims=True)


def write_batches(table, vectors: np.ndarray, regions: int, form: str, rng: np.random.Generator) -> Iterator:
    """Arrow batches of the rows of `pictures`, as many as a commit has."""
    import pyarrow as pa

    size = fill.commit_size(len(vectors))
    for first in range(0, len(vectors), size):
        some = vectors[first : first + size]
        of_some = around(some[:, None].repeat(regions, axis=1), 1.0, rng)
        names = [str(number) for number in range(first, first + len(some))]
        columns = {
            **{"id": names, "path": [f"photos/{name}.jpg" for name in names], "size": [0] * len(some)},
            **{"time": [0] * len(some), "boxes": [bytes(16 * regions)] * len(some)},
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(some.ravel()), some.shape[1]),
            "regions": [encode(one, form) for one in of_some],
        }
        yield pa.record_batch([pa.array(columns[field.name], field.type) for field in table.schema], table.schema)


def measure(settings, uri: str, checkpoint: Path, pictures: int, regions: int) -> dict[str, float]:
    import pyarrow as pa

    rng, matcher = np.random.default_rng(0), load(checkpoint, "", settings.device, "", "")
    centres = around(np.zeros((CENTRES, settings.embed_size), np.float32), 1.0, rng)
    vectors = around(centres[rng.integers(CENTRES, size=pictures)], NOISE, rng)
    asked = IndexSettings(index=uri, photos="photos", compress=settings.compress)
    fill.make_tables(asked, matcher, fill.Source("photos", [], None, None))
    index = Index(uri, matcher)
    batches = write_batches(index.pictures, vectors, regions, index.about["regions"], rng)
    written, _ = common.clock(
        lambda: [index.pictures.add(pa.Table.from_batches([batch])) for batch in batches], settings.device
    )
    built, _ = common.clock(lambda: fill.tidy(index.pictures), settings.device)
    size = sum(path.stat().st_size for path in Path(uri).rglob("*") if path.is_file())
    queries = around(centres[rng.integers(CENTRES, size=WARM + settings.queries)], NOISE, rng)
    seconds, found = ask(settings, index, queries, rng)
    nearest = (queries[WARM:] @ vectors.T).argpartition(-settings.candidates)[:, -settings.candidates :]
    recall = {k: [] for k in (10, settings.candidates)}
    for query, true, one in zip(queries[WARM:], nearest, found, strict=True):
        true = true[(vectors[true] @ query).argsort()[::-1]]
        for k, shares in recall.items():
            shares.append(len(set(true[:k]) & set(one)) / k)
    milliseconds = {part: 1000 * seconds[:, k, 0] for k, part in enumerate(PARTS)}
    milliseconds["query"], milliseconds["cpu"] = 1000 * seconds.sum(axis=1).T
    return {
        **{"write_seconds": written, "index_seconds": built, "bytes": size / pictures},
        **{f"{part}_p50": float(np.percentile(values, 50)) for part, values in milliseconds.items()},
        **{f"{part}_p99": float(np.percentile(values, 99)) for part, values in milliseconds.items()},
        **{f"recall_{k}": float(np.mean(shares)) for k, shares in recall.items()},
    }


def now() -> np.ndarray:
    """Seconds of the clock, and of the processor in this process."""
    return np.array([time.perf_counter(), time.process_time()])


def ask(settings, index: Index, queries: np.ndarray, rng) -> tuple[np.ndarray, list[list[int]]]:
    """Seconds (queries, PARTS, 2) of each part of the queries that count, and the candidates that they found.

    Finding and reading are one call; finding alone is measured by a call without the regions, before it or after it.
    """
    seconds, found = [], []
    for number, vector in enumerate(torch.from_numpy(queries)):
        words = rng.integers(30_000, size=rng.integers(3, 21))
        started = now()
        embedded, lengths, _ = index.encode(" ".join(f"word{word}" for word in words))
        encoded, spent, answers = now(), {}, {}
        for more in ((), ("regions", "boxes")) if number % 2 else (("regions", "boxes"), ()):
            begun = now()
            answers[more] = index.nearest(index.pictures, vector[None], settings.candidates, ["id", "path", *more])
            spent[more] = now() - begun
        rows, begun = answers["regions", "boxes"], now()
        block = index.read_regions(rows)
        read = now()
        index.score(embedded, lengths, block, 1 - torch.tensor(rows["_distance"].to_numpy()))
        scored, whole = now(), spent["regions", "boxes"]
        if number >= WARM:
            seconds.append([encoded - started, spent[()], whole - spent[()] + read - begun, scored - read])
            found.append([int(one) for one in rows["id"].to_pylist()])
    return np.array(seconds), found


def ask_model(settings) -> None:
    """What a trained model loses where its vectors choose the candidates, and where regions are stored in few bytes."""
    matcher = load(settings.checkpoint, "", settings.device, "", "")
    asked = IndexSettings(
        index="-", data_name=settings.data_name or matcher.content["settings"]["data_name"], split=settings.split
    )
    split, _ = open_split_of([matcher.content], asked)
    captions = matcher.tokenizer.tokenize(split.captions[: settings.captions])
    embeddings = embed_split(matcher, split, captions, 128, 0)
    exact = score_all(matcher.scorer(), embeddings)
    images, sentences = pool(matcher.model.pooling, embeddings)
    cosines, forms = images @ sentences.T, compare_forms(matcher, embeddings, exact)
    kept = {
        f"captions among {len(images):,} images": kept_by_vectors(cosines.T, exact.T),
        f"images among {len(sentences):,} captions": kept_by_vectors(cosines, exact),
    }
    title = f"{asked.data_name} {asked.split}, {len(captions):,} captions"
    columns = ["exact top 10 in the vectors' first", *map(str, FIRST), f"all ten in {FIRST[-1]}"]
    common.show(title, columns, [[name, *map("{:.3f}".format, one)] for name, one in kept.items()], settings.device)
    rows = [[name, *map("{:.5f}".format, one.values())] for name, one in forms.items()]
    common.show(title, ["", "mean error", "largest", "spread of scores", "top 10 kept"], rows, settings.device)
    common.write_json(settings.json, {"figures": {"kept": kept, "forms": forms}}, settings.device)


def kept_by_vectors(cosines: torch.Tensor, exact: torch.Tensor) -> list[float]:
    """Share of each query's exact top 10 among the first 20, 50, 100, 200 by cosine; share of queries all of whose ten
    are among the last. cosines, exact: (queries, items)."""
    best = exact.topk(10).indices
    position = cosines.argsort(descending=True).argsort().gather(1, best)
    among = [position < k for k in FIRST]
    return [one.double().mean().item() for one in (*among, among[-1].all(dim=1))]


def compare_forms(matcher, embeddings, exact: torch.Tensor) -> dict[str, dict[str, float]]:
    """Exact scores of regions as they are stored against those of float32: on average how far they are off, and which
    share of a caption's best 10 pictures stays."""
    results = {}
    for form in ("float16", "int8"):
        blocks = []
        for block in embeddings.blocks:
            rows = [decode(encode(one.numpy(), form), one.shape[1], form) for one in block.regions.float().cpu()]
            blocks.append(block._replace(regions=torch.from_numpy(np.stack(rows)).to(block.regions)))
        scores = score_all(matcher.scorer(), embeddings._replace(blocks=blocks))
        best = zip(*(one.topk(10, dim=0).indices.T.tolist() for one in (exact, scores)), strict=True)
        kept = [len({*before} & {*after}) / 10 for before, after in best]
        off = (scores - exact).abs()
        results[form] = {"mean": off.mean().item(), "largest": off.max().item(), "spread": exact.std().item()}
        results[form]["top10"] = float(np.mean(kept))
    return results


def report(settings, results: dict[str, dict]) -> None:
    recalls = [f"recall_{k}" for k in (10, settings.candidates)]
    columns = [
        "",
        "write s",
        "index s",
        "bytes a picture",
        *(f"{part} ms" for part in PARTS),
        "query p50 ms",
        "p99 ms",
        "cpu ms",
    ]
    columns += [name.replace("_", " at ") for name in recalls]
    rows = []
    for name, one in results.items():
        times = [one[f"{part}_p50"] for part in (*PARTS, "query")] + [one["query_p99"], one["cpu_p50"]]
        sizes = [f"{one['write_seconds']:.0f}", f"{one['index_seconds']:.0f}", f"{one['bytes']:,.0f}"]
        rows.append([name, *sizes, *(f"{value:.1f}" for value in times), *(f"{one[key]:.3f}" for key in recalls)])
    title = f"{settings.candidates} candidates, {settings.embed_size} dimensions, pictures x regions"
    common.show(title, columns, rows, settings.device)
    common.write_json(settings.json, {"figures": results}, settings.device)


if __name__ == "__main__":
    main()
