"""The file of --ranks: from its lines alone come all figures, and what it says of each query is so."""

import json

import numpy as np
import pytest

import eval as eval_program
from lib.evaluation.bootstrap import bootstrap, interval
from lib.evaluation.metrics import map_figures, mean_metrics
from lib.evaluation.ranks import Ranks
from tests.evaluation.test_rankings import sorted_items

FLAGS = ["--device", "cpu", "--workers", "0", "--split", "testall"]
FIGURES = ("i2t", "t2i", "rsum", "interval")
LEVELS = 40  # of scores: few, so that many are equal
ODD = 'A "quoted" line\u2028 of \\ text, café {}'


def evaluate(folder, *flags):
    """The results of eval.py, the first line of --ranks and the others."""
    files = ["--json", folder / "results.json", "--ranks", folder / "ranks.jsonl"]
    assert eval_program.main([str(flag) for flag in (*flags, *files, *FLAGS)]) == 0
    with open(folder / "ranks.jsonl", encoding="utf-8", newline="\n") as file:
        about, *records = map(json.loads, file)
    return json.loads((folder / "results.json").read_text()), about, records


@pytest.fixture
def make_split(tmp_path):
    """Writes a data set of images with any numbers of captions, and scores of it: flags of eval.py, scores."""

    def make(counts, levels=LEVELS, seeds=(0,), name="varying_precomp"):
        folder = tmp_path / name
        folder.mkdir()
        np.save(folder / "testall_ims.npy", np.random.default_rng(0).random((len(counts), 2, 4), np.float32))
        (folder / "testall_caps.txt").write_text("".join(f"{ODD.format(c)}\n" for c in range(sum(counts))), "utf-8")
        (folder / "testall_caps_counts.txt").write_text("".join(f"{count}\n" for count in counts))
        flags, matrices = ["--data_path", tmp_path, "--data_name", name], []
        for seed in seeds:
            matrices.append(draw_scores(counts, levels, seed))
            np.save(tmp_path / f"scores{seed}.npy", matrices[-1])
            flags += ["--checkpoint", tmp_path / f"scores{seed}.npy"]
        return flags, sum(matrices) / len(matrices)

    return make


def draw_scores(counts, levels, seed):
    """Some whole numbers, larger ones for pairs, so that ranks lie between the best and those of chance."""
    image_of_caption, rng = np.repeat(np.arange(len(counts)), counts), np.random.default_rng(seed)
    own = image_of_caption == np.arange(len(counts))[:, None]
    scores = rng.integers(levels, size=own.shape) + own * rng.integers(levels // 2, size=own.shape)
    return scores.astype(np.float32)


# Figures, from the lines alone


def plain_figures(ranks):
    """Of the best rank of each query of one direction, counted from 1."""
    recalls = {f"r{k}": 100 * sum(rank <= k for rank in ranks) / len(ranks) for k in (1, 5, 10)}
    average = sum(recalls.values()) / 3
    return {**recalls, "avg": average, "medr": np.median(ranks) // 1, "meanr": sum(ranks) / len(ranks)}


def image_of(record):
    return record["query"] if record["way"] == "i2t" else record["right"][0]


def redo(records, name, seed):
    """Figures of some images and their captions, and those of each draw, from their ranks of one kind."""
    best = {way: [min(one["ranks"][name]) for one in records if one["way"] == way] for way in ("i2t", "t2i")}
    ways = {way: plain_figures(ranks) for way, ranks in best.items()}
    images = [image_of(one) for one in records]
    image_of_caption = np.array([image_of(one) - min(images) for one in records if one["way"] == "t2i"])
    draws = bootstrap(Ranks(*(np.array(ranks) - 1 for ranks in best.values())), image_of_caption, seed)
    return {**ways, "rsum": sum(ways[way][f"r{k}"] for way in ways for k in (1, 5, 10))}, draws


def redo_all(about, records):
    """What --json holds: figures of all, or the mean of the folds with those of each and of all."""
    full = with_interval(*redo(records, "all", seed=0))
    if not about["folds"]:
        return {**full, "folds": []}
    size, folds = about["images"] // about["folds"], []
    for fold in range(about["folds"]):
        own = [one for one in records if image_of(one) // size == fold]
        folds.append(redo(own, "fold", seed=fold + 1))
    mean = with_interval(*(mean_metrics(list(each)) for each in zip(*folds, strict=True)))
    return {**mean, "folds": [with_interval(*fold) for fold in folds], "full": full}


def with_interval(figures, draws):
    return {**figures, "interval": map_figures(interval, draws)}


def flat(figures, path=()):
    """{path: number} of nested dictionaries and lists."""
    if not isinstance(figures, dict | list):
        return {path: figures}
    items = figures.items() if isinstance(figures, dict) else enumerate(figures)
    return {place: number for name, one in items for place, number in flat(one, (*path, name)).items()}


def assert_redone(results, about, records):
    redone = redo_all(about, records)
    assert {"full" in results} == {"full" in redone} == {bool(about["folds"])}
    assert flat({name: results[name] for name in redone}) == pytest.approx(flat(redone), abs=1e-9)
    assert set(redone) >= {*FIGURES, "folds"}


@pytest.mark.parametrize("folds", [(), ("--fold5",)])
def test_every_figure_of_a_checkpoint_can_be_redone(trained_run, tmp_path, folds):
    assert_redone(*evaluate(tmp_path, "--checkpoint", trained_run, *folds))


@pytest.mark.parametrize("folds", [(), ("--fold5",)])
def test_every_figure_can_be_redone_where_scores_are_equal_and_images_have_any_number_of_captions(
    make_split, tmp_path, folds
):
    counts = np.random.default_rng(0).integers(1, 8, size=60).tolist()
    results, about, records = evaluate(tmp_path, *make_split(counts)[0], *folds)
    assert_redone(results, about, records)
    assert 10 < results["rsum"] / 6 < 90


def test_ranks_are_those_of_the_last_row_of_several(make_split, tmp_path):
    flags, mean = make_split([5] * 20, seeds=(0, 1))
    results, about, records = evaluate(tmp_path, *flags)
    assert about["row"] == results["row"] == "ensemble of 2"
    assert_redone(results, about, records)
    assert_sorted(records, mean)


# What it says of each query


def assert_sorted(records, scores):
    """Ranks of all right items and the first ten are those of a sort of the scores."""
    for one in records:
        row = scores[one["query"]] if one["way"] == "i2t" else scores[:, one["query"]]
        order = sorted_items(row, set(one["right"]))
        assert one["ranks"]["all"] == [1 + order.index(item) for item in one["right"]]
        assert one["top"] == [[item, float(row[item])] for item in order[:10]]


def test_lines_are_those_of_a_sort_of_the_saved_scores(trained_run, tmp_path):
    _, _, records = evaluate(tmp_path, "--checkpoint", trained_run, "--save_sims", tmp_path / "sims.npy")
    assert_sorted(records, np.load(tmp_path / "sims.npy"))


@pytest.mark.parametrize("levels", [2, 12])
def test_lines_are_those_of_a_sort_of_scores_that_are_equal_for_many(make_split, tmp_path, levels):
    flags, scores = make_split(np.random.default_rng(1).integers(1, 8, size=25).tolist(), levels)
    assert_sorted(evaluate(tmp_path, *flags)[2], scores)


def test_ranks_in_a_fold_are_those_of_a_sort_of_its_scores(make_split, tmp_path):
    counts = [3, 1, 4, 1, 5, 2, 6, 5, 3, 5]
    flags, scores = make_split(counts)
    ends = np.cumsum([0, *counts])
    for one in evaluate(tmp_path, *flags, "--fold5")[2]:
        first = image_of(one) // 2 * 2
        of_fold = {"t2i": range(first, first + 2), "i2t": range(ends[first], ends[first + 2])}[one["way"]]
        row = scores[one["query"]] if one["way"] == "i2t" else scores[:, one["query"]]
        order = sorted(of_fold, key=lambda item, row=row, right=one["right"]: (-row[item], item in right, item))
        assert one["ranks"]["fold"] == [1 + order.index(item) for item in one["right"]]


def test_fewer_items_than_ten_are_all_in_the_list(make_split, tmp_path):
    flags, scores = make_split([1, 3, 2])
    _, _, records = evaluate(tmp_path, *flags)
    assert_sorted(records, scores)
    assert [len(one["top"]) for one in records] == [6] * 3 + [3] * 6


def test_one_image_and_one_caption_have_rank_one(make_split, tmp_path):
    results, about, records = evaluate(tmp_path, *make_split([1])[0])
    assert [one["ranks"] for one in records] == [{"all": [1]}] * 2
    assert_redone(results, about, records)


def test_the_first_line_says_what_was_evaluated(make_split, tmp_path):
    flags, _ = make_split([3, 1, 4, 1, 5])
    _, about, _ = evaluate(tmp_path, *flags, "--fold5")
    assert about == {
        **{"format": "x-dim ranks 1", "data": str(tmp_path / "varying_precomp"), "split": "testall"},
        **{"images": 5, "captions": 14, "row": "saved scores", "folds": 5},
    }
    assert evaluate(tmp_path, *flags)[1]["folds"] == 0


def test_images_come_first_with_their_captions_as_right_ones_then_captions_with_their_text(make_split, tmp_path):
    flags, _ = make_split([3, 1, 4])
    _, _, records = evaluate(tmp_path, *flags)
    images, captions = records[:3], records[3:]
    assert all(set(one) == {"way", "query", "right", "ranks", "top"} for one in images)
    assert [(one["way"], one["query"], one["right"]) for one in images] == [
        ("i2t", 0, [0, 1, 2]),
        ("i2t", 1, [3]),
        ("i2t", 2, [4, 5, 6, 7]),
    ]
    expected = [("t2i", c, ODD.format(c), [image]) for c, image in enumerate([0, 0, 0, 1, 2, 2, 2, 2])]
    assert [(one["way"], one["query"], one["caption"], one["right"]) for one in captions] == expected
    assert all(list(one["ranks"]) == ["all"] for one in records)


def test_images_have_the_ids_of_the_data_set(make_split, tmp_path):
    flags, _ = make_split([2, 1, 1])
    (tmp_path / "varying_precomp" / "testall_ids.txt").write_text("COCO_01.jpg\nétang.png\n7\n", "utf-8")
    _, _, records = evaluate(tmp_path, *flags)
    assert [one["id"] for one in records if one["way"] == "i2t"] == ["COCO_01.jpg", "étang.png", "7"]
    assert not any("id" in one for one in records if one["way"] == "t2i")


# What is refused


def test_a_file_that_cannot_be_written_is_an_error_in_one_line(make_split, tmp_path, capsys):
    flags, _ = make_split([1, 2])
    (tmp_path / "ranks.jsonl").mkdir()
    given = [*flags, *FLAGS, "--ranks", tmp_path / "ranks.jsonl"]
    before = sorted(tmp_path.rglob("*"))
    assert eval_program.main([str(flag) for flag in given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path / "ranks.jsonl") in line
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("flag", ["--ranks", "--save_sims", "--eccv"])
def test_what_needs_every_exact_score_is_refused_with_coarse_ones(tmp_path, capsys, flag):
    given = [flag] if flag == "--eccv" else [flag, str(tmp_path / "file")]
    assert eval_program.main([*FLAGS, "--rerank", "5", *given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"error: {flag}: needs every pair's exact score, leave out --rerank"
    assert not list(tmp_path.iterdir())
