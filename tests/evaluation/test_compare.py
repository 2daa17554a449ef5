"""eval.py compare: two models on the same queries, against loops over sorted lists, and with a winner that is known."""

import json
import re

import numpy as np
import pytest

import eval as eval_program
from lib.evaluation.metrics import DRAWS, Ranks, bootstrap
from tests.conftest import write_data
from tests.evaluation.test_metrics import NAMES, five_each, flat, plain_metrics, sorted_ranks

FLAGS = ["--device", "cpu", "--workers", "0", "--batch_size", "7"]
MANY = 200
WAYS = ("i2t", "t2i")


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """The folder of a data set with 200 images of five captions."""
    return write_data(tmp_path_factory.mktemp("data") / "many_precomp", {"test": MANY}, regions=1, img_dim=2)


@pytest.fixture
def compare(tmp_path, capsys):
    """Runs eval.py compare on two matrices, or on what lies at two paths: its results and what it has printed."""

    def compare(a, b, *flags, data=None):
        paths = [tmp_path / f"{name}.npy" if isinstance(one, np.ndarray) else one for name, one in (("a", a), ("b", b))]
        for path, one in zip(paths, (a, b), strict=True):
            if isinstance(one, np.ndarray):
                np.save(path, one)
        data = ["--data_path", data.parent, "--data_name", data.name] if data else []
        argv = ["compare", *paths, *data, "--split", "test", "--json", tmp_path / "results.json", *flags, *FLAGS]
        capsys.readouterr()
        assert eval_program.main(list(map(str, argv))) == 0, capsys.readouterr().err
        return json.loads((tmp_path / "results.json").read_text()), capsys.readouterr().out

    return compare


def is_right(image_of_caption):
    return np.arange(image_of_caption[-1] + 1)[:, None] == image_of_caption


def noisy(image_of_caption, seed):
    """Scores of a model that finds a part of the right items."""
    right = is_right(image_of_caption)
    return 3.0 * right + np.random.default_rng(seed).standard_normal(right.shape)


def summary(out):
    """The line that names the winner."""
    (line,) = [line for line in out.splitlines() if "from A to B" in line]
    return line


# Who is better


@pytest.mark.parametrize("flags", [[], ["--fold5"]])
def test_a_model_compared_with_itself_has_no_winner_and_no_query_that_changes(compare, many, flags):
    scores = noisy(five_each(MANY), seed=0)
    results, out = compare(scores, scores, *flags, data=many)
    difference = results["difference"]
    for one in [difference, difference["full"]] if flags else [difference]:
        assert (flat(one), flat(one["p"]), flat(one["interval"])) == ([0] * 13, [1] * 13, [[0, 0]] * 13)
    alike = {"i2t": {"a": 0, "b": 0, "alike": MANY}, "t2i": {"a": 0, "b": 0, "alike": 5 * MANY}}
    assert (results["wins"], results["changed"]) == (alike, [])
    assert summary(out) == "no winner: rSum +0.0 from A to B (95 % +0.0 to +0.0), p = 1.000"
    assert "no query changes its rank" in out


def test_the_worse_of_two_is_found_whichever_comes_first(compare, many):
    better = noisy(five_each(MANY), seed=0)
    worse = better + 0.5 * np.random.default_rng(1).standard_normal(better.shape)
    (down, out_down), (up, out_up) = compare(better, worse, data=many), compare(worse, better, data=many)
    assert max(down["difference"]["interval"]["rsum"]) < 0
    assert summary(out_down).startswith(f"A is better: rSum {down['difference']['rsum']:.1f} from A to B")
    assert summary(out_up).startswith(f"B is better: rSum +{up['difference']['rsum']:.1f} from A to B")
    assert flat(up["difference"]) == [-value for value in flat(down["difference"])]
    assert flat(up["difference"]["p"]) == flat(down["difference"]["p"])
    for way in WAYS:
        a, b, alike = down["wins"][way].values()
        assert a > b > 0
        assert up["wins"][way] == {"a": b, "b": a, "alike": alike}


# Against an independent computation


def expect(difference, a, b, draws_a, draws_b):
    """Values, intervals and p-values of a difference, from both models' metrics and those of their draws."""
    assert flat(difference) == pytest.approx(np.subtract(flat(b), flat(a)))
    draws = np.subtract(flat(draws_b), flat(draws_a))
    np.testing.assert_allclose(flat(difference["interval"]), np.percentile(draws, [2.5, 97.5], axis=1).T, atol=1e-9)
    exact = draws.round(9)
    fewer = np.minimum((exact <= 0).sum(axis=1), (exact >= 0).sum(axis=1))
    p_values = np.minimum(1, 2 * (fewer + 1) / (DRAWS + 1))
    rounded = ((exact == 0) & (draws != 0)).sum(axis=1)  # zero but for rounding: may count on one side alone
    assert (np.abs(flat(difference["p"]) - p_values) <= 2 * rounded / (DRAWS + 1) + 1e-12).all()


def mean(metrics):
    """Each metric averaged."""
    means = iter(np.mean([flat(one) for one in metrics], axis=0))
    return {**{way: {name: next(means) for name in NAMES} for way in WAYS}, "rsum": next(means)}


def test_differences_intervals_and_wins_equal_those_of_sorted_lists_in_folds_too(compare, tmp_path):
    counts = np.random.default_rng(0).integers(1, 8, size=40)
    folder, image_of_caption = tmp_path / "mixed_precomp", np.repeat(np.arange(40), counts)
    write_data(folder, {"test": 40}, repeats=())
    (folder / "test_caps_counts.txt").write_text("".join(f"{count}\n" for count in counts))
    (folder / "test_caps.txt").write_text("".join(f"caption {number}\n" for number in range(counts.sum())))
    right = is_right(image_of_caption)
    draw = lambda seed: np.random.default_rng(seed).integers(12, size=right.shape) + 6 * right  # noqa: E731
    scores = [draw(seed).astype(np.float32) for seed in (0, 1)]  # with many ties
    results, out = compare(*scores, "--fold5", data=folder)
    whole = [Ranks(*map(np.array, sorted_ranks(one, image_of_caption))) for one in scores]
    metrics, draws = [plain_metrics(*one) for one in whole], [bootstrap(one, image_of_caption) for one in whole]
    expect(results["difference"]["full"], *metrics, *draws)
    of_folds = []
    for one in scores:
        values, drawn = [], []
        for k in range(5):
            own = image_of_caption // 8 == k
            image = image_of_caption[own] - 8 * k
            ranks = Ranks(*map(np.array, sorted_ranks(one[8 * k : 8 * k + 8, own], image)))
            values.append(plain_metrics(*ranks))
            drawn.append(bootstrap(ranks, image, seed=k + 1))
        of_folds.append((mean(values), mean(drawn)))
    (a, draws_a), (b, draws_b) = of_folds
    expect(results["difference"], a, b, draws_a, draws_b)
    for title, way in zip(("image to text", "text to image"), WAYS, strict=True):
        pairs = list(zip(*(getattr(one, way) for one in whole), strict=True))
        wins = [sum(x < y for x, y in pairs), sum(y < x for x, y in pairs), sum(x == y for x, y in pairs)]
        assert list(results["wins"][way].values()) == wins
        assert re.search(rf"^  {title} +{wins[0]} +{wins[1]} +{wins[2]}$", out, re.MULTILINE)
    for which in ("mean of 5 folds of 8", "all 40 images"):
        for name in ("A", "B", "B - A"):
            assert re.search(f"^{name}, {which} ", out, re.MULTILINE)


# Where they differ


def test_queries_whose_rank_changes_by_the_largest_factor_are_shown_with_captions_that_cannot_steer_the_terminal(
    compare, many
):
    texts = (many / "test_caps.txt").read_text().splitlines()
    texts[7] = "a red \x1b[2J ball"
    (many / "test_caps.txt").write_text("".join(f"{text}\n" for text in texts))
    right, rng = is_right(five_each(MANY)), np.random.default_rng(0)
    a = np.where(right, 1.0, rng.random(right.shape) / 2)  # every right pair first
    b = a.copy()
    b[1, 7] = np.sort(a[:, 7])[-100]  # its caption falls behind 99 others
    b[3, 15:20] = 0.0  # the image falls behind all captions, each of its captions behind all images
    results, out = compare(a, b, data=many)
    assert results["wins"] == {"i2t": {"a": 1, "b": 0, "alike": 199}, "t2i": {"a": 6, "b": 0, "alike": 994}}
    found = [(one["way"], one["query"], one["ranks"], one["captions"]) for one in results["changed"]]
    of_captions = [("t2i", caption, [1, 200], [texts[caption]]) for caption in range(15, 20)]
    assert found == [("i2t", 3, [1, 996], texts[15:20]), *of_captions]
    better = compare(b, a, data=many)[0]["changed"]
    assert [one["ranks"][::-1] for one in better] == [one["ranks"] for one in results["changed"]]
    printed = out.split("queries that change most")[1]
    assert re.search(rf"\n  image 3 +1 +996  {re.escape(texts[15])}\n +{re.escape(texts[16])}\n", printed)
    assert re.search(rf"\n  caption 19 +1 +200  {re.escape(texts[19])}\n", printed)
    b[3, 15:20] = 1.0
    assert "a red ?[2J ball" in compare(a, b, data=many)[1]


# Checkpoints


def test_a_checkpoint_and_the_scores_it_has_saved_are_alike_and_caveats_name_the_one_they_are_true_of(
    compare, trained_run, tmp_path
):
    path = tmp_path / "saved.npy"
    flags = ["--checkpoint", str(trained_run), "--split", "dev", "--save_sims", str(path), *FLAGS]
    assert eval_program.main(flags) == 0
    for pair, which in (((trained_run, path), "A"), ((path, trained_run), "B")):
        results, out = compare(*pair, "--split", "dev")
        assert results["a"] == results["b"]
        assert summary(out).startswith("no winner: rSum +0.0")
        assert f"\n{which}, chosen on this split: dev is what" in out
        for name, one in zip("AB", pair, strict=True):
            assert re.search(f"^{name} +{re.escape(str(one))}", out, re.MULTILINE)


# Wrong input


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (["good.npy", "absent_run"], "absent_run"),
        (["other.npy", "good.npy"], r"other\.npy: 50 x 11 scores, but \S+ test has 10 images and 50 captions"),
        (["good.npy", "good.npy", "--split", "odd", "--fold5"], "--fold5: 12 images"),
    ],
)
def test_wrong_uses_are_one_line_that_names_the_file_or_flag(given, complaint, tmp_path, monkeypatch, capsys):
    data = write_data(tmp_path / "data" / "tiny_precomp", {"test": 10, "odd": 12}, repeats=())
    monkeypatch.chdir(tmp_path)
    np.save("good.npy", np.eye(10 if "odd" not in given else 12).repeat(5, axis=1))
    np.save("other.npy", np.zeros((50, 11)))
    flags = ["--data_path", str(data.parent), "--data_name", data.name, *FLAGS]
    assert eval_program.main(["compare", *given, *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(complaint, line)
