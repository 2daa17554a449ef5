"""Ranked lists and metrics of queries, against sorting each list; --ranks holds enough to redo every table."""

import json

import hypothesis.strategies as st
import numpy as np
import pytest
from eccv_caption._metrics import compute_eccv_metrics, compute_r_at_k
from hypothesis import given, settings

import eval as eval_program
from lib.evaluation.metrics import (
    Ranks,
    bootstrap,
    interval,
    map_metrics,
    mean_metrics,
    parts_of_split,
    rank_parts,
    retrieval_metrics,
)
from lib.evaluation.rankings import ABSENT, RankedList, judge, pair_protocols, query_metrics

FLAGS = ["--device", "cpu", "--workers", "0", "--split", "testall"]
SCORES = (-np.inf, -1.5, -0.0, 0.0, 0.25, 2.0)  # few, so that many are equal; the two zeros are
SEEDS = st.integers(0, 2**32 - 1)
ODD = 'A "quoted" line\u2028 of \\ text, café {}'


def sorted_items(scores, right, items=None):
    """Best first; of equal scores the wrong ones first, then the first."""
    return sorted(range(len(scores)) if items is None else items, key=lambda one: (-scores[one], one in right, one))


# One list


@settings(deadline=None)
@given(
    items=st.integers(1, 30),
    seed=SEEDS,
    dtype=st.sampled_from([np.float64, np.float32, np.float16]),
    absent=st.integers(0, 2),
)
def test_positions_and_first_items_are_those_of_a_sorted_list_and_absent_items_stand_behind_all(
    items, seed, dtype, absent
):
    rng = np.random.default_rng(seed)
    scores, right = rng.choice(SCORES, size=items).astype(dtype), rng.permutation(items)[: rng.integers(1, items + 1)]
    ranked, order = RankedList(scores), sorted_items(scores, set(right))
    positions = ranked.positions(np.append([ABSENT] * absent, right).astype(int))
    assert positions[:absent].tolist() == list(range(items, items + absent))
    assert sorted(positions[absent:]) == sorted(order.index(item) for item in right)
    assert ranked.positions(np.sort(right)).tolist() == [order.index(item) for item in np.sort(right)]
    assert ranked.top(right).tolist() == order[:10]


@settings(deadline=None)
@given(items=st.integers(1, 60), seed=SEEDS)
def test_metrics_of_a_query_are_those_of_the_package_eccv_caption(items, seed):
    rng = np.random.default_rng(seed)
    right = rng.permutation(items)[: rng.integers(1, items + 1)]
    found = query_metrics(right)
    ranked, fits = {7: list(range(items))}, {7: right.tolist()}
    theirs = compute_eccv_metrics(ranked, fits)
    names = {"map_at_r": "eccv_map_at_r", "r_precision": "eccv_rprecision", "r1": "eccv_r1"}
    assert {name: found[name] for name in names} == pytest.approx({k: theirs[name] for k, name in names.items()})
    assert [found[f"r{k}"] for k in (1, 5, 10)] == [compute_r_at_k(ranked, fits, k) for k in (1, 5, 10)]


# All lists


@settings(deadline=None)
@given(counts=st.lists(st.integers(1, 4), min_size=1, max_size=2).map(lambda some: some * 5), seed=SEEDS)
def test_the_best_position_is_the_rank_that_is_counted_in_the_whole_split_and_in_folds(counts, seed):
    image_of_caption = np.repeat(np.arange(len(counts)), counts)
    scores = np.random.default_rng(seed).choice(SCORES, size=(len(counts), sum(counts))).astype(np.float32)
    parts = parts_of_split(image_of_caption, folds=5)
    whole, *folds = rank_parts(scores, image_of_caption, parts)
    queries = list(judge(scores, pair_protocols(image_of_caption, parts)))
    best = {name: [query.positions[name].min() for query in queries] for name in ("all", "fold")}
    assert best["all"] == [*whole.i2t, *whole.t2i]
    assert best["fold"] == [rank for way in ("i2t", "t2i") for fold in folds for rank in getattr(fold, way)]


# The file of --ranks


def evaluate(folder, *flags):
    """The results of eval.py, the first line of --ranks and the others."""
    files = ["--json", folder / "results.json", "--ranks", folder / "ranks.jsonl"]
    assert eval_program.main([str(flag) for flag in (*flags, *files, *FLAGS)]) == 0
    with open(folder / "ranks.jsonl", encoding="utf-8", newline="\n") as file:
        about, *records = map(json.loads, file)
    return json.loads((folder / "results.json").read_text()), about, records


@pytest.fixture
def make_split(tmp_path):
    """Writes a data set of images with any numbers of captions, and scores of it: flags of eval.py, the mean scores."""

    def make(counts, levels=40, seeds=(0,)):
        folder = tmp_path / "varying_precomp"
        folder.mkdir()
        np.save(folder / "testall_ims.npy", np.random.default_rng(0).random((len(counts), 2, 4), np.float32))
        (folder / "testall_caps.txt").write_text("".join(f"{ODD.format(c)}\n" for c in range(sum(counts))), "utf-8")
        (folder / "testall_caps_counts.txt").write_text("".join(f"{count}\n" for count in counts))
        (folder / "testall_ids.txt").write_text("".join(f"étang {i}.png\n" for i in range(len(counts))), "utf-8")
        own = np.repeat(np.arange(len(counts)), counts) == np.arange(len(counts))[:, None]
        flags, matrices = ["--data_path", tmp_path, "--data_name", folder.name], []
        for rng in map(np.random.default_rng, seeds):
            scores = rng.integers(levels, size=own.shape) + own * rng.integers(levels // 2, size=own.shape)
            np.save(tmp_path / f"scores{len(matrices)}.npy", scores.astype(np.float32))
            flags += ["--checkpoint", tmp_path / f"scores{len(matrices)}.npy"]
            matrices.append(scores)
        return flags, sum(matrices) / len(matrices)

    return make


def image_of(record):
    return record["query"] if record["way"] == "i2t" else record["right"][0]


def redo(records, name, seed):
    """Metrics of some images and their captions, and those of each draw, from their ranks alone."""
    best = [[min(one["ranks"][name]) - 1 for one in records if one["way"] == way] for way in ("i2t", "t2i")]
    images = [image_of(one) for one in records]
    image_of_caption = np.array([image_of(one) - min(images) for one in records if one["way"] == "t2i"])
    ranks = Ranks(*map(np.array, best))
    return retrieval_metrics(ranks), bootstrap(ranks, image_of_caption, seed)


def redo_all(about, records):
    """What --json holds: metrics of all, or the mean of the folds with those of each and of all."""
    with_ends = lambda metrics, draws: {**metrics, "interval": map_metrics(interval, draws)}  # noqa: E731
    full = with_ends(*redo(records, "all", seed=0))
    if not about["folds"]:
        return {**full, "folds": []}
    size, folds = about["images"] // about["folds"], []
    for fold in range(about["folds"]):
        own = [one for one in records if image_of(one) // size == fold]
        folds.append(redo(own, "fold", seed=fold + 1))
    mean = with_ends(*(mean_metrics(list(each)) for each in zip(*folds, strict=True)))
    return {**mean, "folds": [with_ends(*fold) for fold in folds], "full": full}


def flat(values, path=()):
    """{path: number} of nested dictionaries and lists."""
    if not isinstance(values, dict | list):
        return {path: values}
    items = values.items() if isinstance(values, dict) else enumerate(values)
    return {place: number for name, one in items for place, number in flat(one, (*path, name)).items()}


def assert_sorted(records, scores):
    """That ranks of all right items and the first ten are those of a sort of the scores."""
    for one in records:
        row = scores[one["query"]] if one["way"] == "i2t" else scores[:, one["query"]]
        order = sorted_items(row, set(one["right"]))
        assert one["ranks"]["all"] == [1 + order.index(item) for item in one["right"]]
        assert one["top"] == [[item, float(row[item])] for item in order[:10]]


@pytest.mark.parametrize("folds", [(), ("--fold5",)])
def test_every_figure_of_the_last_row_can_be_redone_from_its_lines_alone(make_split, tmp_path, folds):
    flags, scores = make_split(np.random.default_rng(0).integers(1, 8, size=60).tolist(), seeds=(0, 1))
    results, about, records = evaluate(tmp_path, *flags, *folds)
    redone = redo_all(about, records)
    assert about["row"] == results["row"] == "ensemble of 2"
    assert ("full" in results) == ("full" in redone) == bool(folds)
    assert flat({name: results[name] for name in redone}) == pytest.approx(flat(redone), abs=1e-9)
    assert 10 < results["rsum"] / 6 < 90
    assert_sorted(records, scores)


def test_lines_hold_ids_texts_and_ranks_within_folds(make_split, tmp_path):
    counts = [3, 1, 4, 1, 5]
    flags, scores = make_split(counts, levels=3)
    _, about, records = evaluate(tmp_path, *flags, "--fold5")
    size = {"images": 5, "captions": 14, "row": "saved scores", "folds": 5}
    assert about == {"format": "x-dim ranks 1", "data": str(tmp_path / "varying_precomp"), "split": "testall", **size}
    image_of_caption = np.repeat(np.arange(5), counts).tolist()
    assert [(one["way"], one["query"], one["id"]) for one in records[:5]] == [
        ("i2t", i, f"étang {i}.png") for i in range(5)
    ]
    assert [(one["way"], one["caption"], one["right"]) for one in records[5:]] == [
        ("t2i", ODD.format(c), [image]) for c, image in enumerate(image_of_caption)
    ]
    assert_sorted(records, scores)
    for one in records:  # a fold is one image and its captions, so all items within it are right
        assert sorted(one["ranks"]["fold"]) == list(range(1, len(one["right"]) + 1))
