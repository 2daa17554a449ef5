"""eval.py compare: two models on the same queries, against loops over sorted lists, and with a winner that is known."""

import json
import re

import numpy as np
import pytest

import eval as eval_program
from lib.evaluation.bootstrap import DRAWS, bootstrap, p_value
from lib.evaluation.compare import SURE
from lib.evaluation.evaluate import draw_metrics
from lib.evaluation.parts import whole
from lib.evaluation.ranks import Ranks, rank_matrix
from tests.conftest import write_data
from tests.evaluation.test_bootstrap import NAMES, flat, plain_metrics, width
from tests.evaluation.test_evaluate import FLAGS
from tests.evaluation.test_metrics import five_each, sorted_ranks

MANY = 200


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """The folder of a data set with 200 images of five captions."""
    return write_data(tmp_path_factory.mktemp("data") / "many_precomp", {"test": MANY}, regions=1, img_dim=2)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """The folder of a data set with 40 images of one to seven captions, and the images of the captions."""
    counts = np.random.default_rng(0).integers(1, 8, size=40)
    folder = write_data(tmp_path_factory.mktemp("data") / "mixed_precomp", {"test": 40}, repeats=())
    (folder / "test_caps_counts.txt").write_text("".join(f"{count}\n" for count in counts))
    (folder / "test_caps.txt").write_text("".join(f"caption {number}\n" for number in range(counts.sum())))
    return folder, np.repeat(np.arange(40), counts)


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


def is_true(image_of_caption):
    return np.arange(image_of_caption[-1] + 1)[:, None] == image_of_caption


def noisy(image_of_caption, seed, truth=3.0):
    """Scores of a model that finds a part of the right items: the larger `truth`, the more."""
    true = is_true(image_of_caption)
    return truth * true + np.random.default_rng(seed).standard_normal(true.shape)


def tied(image_of_caption, seed):
    """Scores with many ties."""
    true = is_true(image_of_caption)
    return (np.random.default_rng(seed).integers(12, size=true.shape) + 6 * true).astype(np.float32)


def said(out):
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
        assert flat(one) == [0] * 13
        assert flat(one["p"]) == [1] * 13
        assert flat(one["interval"]) == [[0, 0]] * 13
    alike = {"i2t": {"a": 0, "b": 0, "alike": MANY}, "t2i": {"a": 0, "b": 0, "alike": 5 * MANY}}
    assert (results["wins"], results["changed"]) == (alike, [])
    assert said(out) == "no winner: rSum +0.0 from A to B (95 % +0.0 to +0.0), p = 1.000"
    assert "no query changes its rank" in out


def test_the_worse_of_two_is_found_whichever_comes_first(compare, many):
    better = noisy(five_each(MANY), seed=0)
    worse = better + 0.5 * np.random.default_rng(1).standard_normal(better.shape)
    (down, out_down), (up, out_up) = compare(better, worse, data=many), compare(worse, better, data=many)
    assert (down["a"], down["b"]) == (up["b"], up["a"])
    lost = [down["a"][way]["r1"] - down["b"][way]["r1"] for way in ("i2t", "t2i")]
    assert 2 < min(lost) <= max(lost) < 15
    assert down["difference"]["rsum"] < 0
    assert max(down["difference"]["interval"]["rsum"]) < 0
    assert said(out_down).startswith(f"A is better: rSum {down['difference']['rsum']:.1f} from A to B")
    assert said(out_up).startswith(f"B is better: rSum +{up['difference']['rsum']:.1f} from A to B")
    assert flat(up["difference"]) == [-figure for figure in flat(down["difference"])]
    assert flat(up["difference"]["p"]) == flat(down["difference"]["p"])
    turned = [[-high, -low] for low, high in flat(down["difference"]["interval"])]
    np.testing.assert_allclose(flat(up["difference"]["interval"]), turned, atol=1e-9)
    for way in ("i2t", "t2i"):
        a, b, alike = down["wins"][way].values()
        assert a > b > 0
        assert up["wins"][way] == {"a": b, "b": a, "alike": alike}


def test_a_small_difference_between_models_that_err_on_other_queries_has_no_winner(compare, many):
    results, out = compare(*(noisy(five_each(MANY), seed) for seed in (0, 1)), data=many)
    assert results["difference"]["rsum"] != 0
    assert results["difference"]["p"]["rsum"] >= SURE
    low, high = results["difference"]["interval"]["rsum"]
    assert low < 0 < high
    assert said(out).startswith("no winner: rSum ")
    assert said(out).endswith(f"p = {results['difference']['p']['rsum']:.3f}")


def test_what_is_hard_for_both_cancels_in_the_interval_of_the_difference(compare, many):
    image_of_caption, rng = five_each(MANY), np.random.default_rng(0)
    a = noisy(image_of_caption, seed=0) + 3 * is_true(image_of_caption) * rng.standard_normal((MANY, 1))
    b = a + 0.3 * rng.standard_normal(a.shape)
    interval = compare(a, b, data=many)[0]["difference"]["interval"]
    alone = [bootstrap(*rank_matrix(scores, image_of_caption), image_of_caption) for scores in (a, b)]
    for way in ("i2t", "t2i"):
        unpaired = np.hypot(*(width(np.percentile(drawn[way]["r1"], [2.5, 97.5])) for drawn in alone))
        assert 0 < width(interval[way]["r1"]) < 0.7 * unpaired


def equally_good(seed):
    """Scores of two models that know the same truth, each with noise of its own, and of one that knows less."""
    image_of_caption = five_each(60)
    shared, rng = noisy(image_of_caption, [seed, 0]), np.random.default_rng([seed, 1])
    a, b = (shared + rng.standard_normal(shared.shape) for _ in range(2))
    return a, b, b + rng.standard_normal(shared.shape), image_of_caption


def rsum_draws(scores, image_of_caption):
    (ranks,), parts = rank_matrix(scores, image_of_caption), [whole(*scores.shape)]
    return draw_metrics([ranks], parts, image_of_caption)[0]["rsum"]


def test_equally_good_models_are_told_apart_in_at_most_10_percent_of_60_pairs_and_unequal_ones_in_most():
    told_apart = {"equal": 0, "unequal": 0}
    for seed in range(60):
        *models, image_of_caption = equally_good(seed)
        a, b, worse = (rsum_draws(scores, image_of_caption) for scores in models)
        told_apart["equal"] += p_value(b - a) < SURE
        told_apart["unequal"] += p_value(worse - a) < SURE
    assert told_apart["equal"] <= 6
    assert told_apart["unequal"] >= 50


# Against an independent computation


def plain_wins(a, b):
    """How many queries each ranks better."""
    wins = {"a": 0, "b": 0, "alike": 0}
    for of_a, of_b in zip(a, b, strict=True):
        wins["a" if of_a < of_b else "b" if of_b < of_a else "alike"] += 1
    return wins


def expect(difference, a, b, draws_of_a, draws_of_b):
    """Figures, intervals and p-values of a difference, from both models' metrics and those of their draws."""
    assert flat(difference) == pytest.approx(np.subtract(flat(b), flat(a)))
    draws = np.subtract(flat(draws_of_b), flat(draws_of_a))
    ends = np.percentile(draws, [2.5, 97.5], axis=1).T
    np.testing.assert_allclose(flat(difference["interval"]), ends, atol=1e-9)
    exact = draws.round(9)
    fewer = np.minimum((exact <= 0).sum(axis=1), (exact >= 0).sum(axis=1))
    p_values = np.minimum(1, 2 * (fewer + 1) / (DRAWS + 1))
    rounded = ((exact == 0) & (draws != 0)).sum(axis=1)  # zero but for rounding: may count on one side alone
    assert (np.abs(flat(difference["p"]) - p_values) <= 2 * rounded / (DRAWS + 1) + 1e-12).all()


def test_differences_intervals_and_wins_equal_those_of_sorted_lists(compare, mixed):
    folder, image_of_caption = mixed
    scores = [tied(image_of_caption, seed) for seed in (0, 1)]
    results, out = compare(*scores, data=folder)
    ranks = [Ranks(*map(np.array, sorted_ranks(one, image_of_caption))) for one in scores]
    metrics = [plain_metrics(*one) for one in ranks]
    for name, one in zip("ab", metrics, strict=True):
        assert flat(results[name]) == pytest.approx(flat(one))
    expect(results["difference"], *metrics, *(bootstrap(one, image_of_caption) for one in ranks))
    assert results["wins"] == {way: plain_wins(*(getattr(one, way) for one in ranks)) for way in ("i2t", "t2i")}
    assert all(min(wins.values()) > 0 for wins in results["wins"].values())
    for title, wins in zip(("image to text", "text to image"), results["wins"].values(), strict=True):
        assert re.search(rf"^  {title} +{wins['a']} +{wins['b']} +{wins['alike']}$", out, re.MULTILINE)
    assert (results["images"], results["captions"]) == (40, len(image_of_caption))


def mean(metrics):
    """Each figure averaged."""
    means = iter(np.mean([flat(one) for one in metrics], axis=0))
    ways = {way: {name: next(means) for name in NAMES} for way in ("i2t", "t2i")}
    return {**ways, "rsum": next(means)}


def test_of_folds_the_mean_and_the_full_set_are_compared(compare, mixed):
    folder, image_of_caption = mixed
    scores = [tied(image_of_caption, seed) for seed in (0, 1)]
    results, out = compare(*scores, "--fold5", data=folder)
    of_models = []
    for one in scores:
        metrics, drawn = [], []
        for k in range(5):
            own = image_of_caption // 8 == k
            image = image_of_caption[own] - 8 * k
            ranks = Ranks(*map(np.array, sorted_ranks(one[8 * k : 8 * k + 8, own], image)))
            metrics.append(plain_metrics(*ranks))
            drawn.append(bootstrap(ranks, image, seed=k + 1))
        of_models.append((mean(metrics), mean(drawn)))
    (a, draws_of_a), (b, draws_of_b) = of_models
    expect(results["difference"], a, b, draws_of_a, draws_of_b)
    whole_set = compare(*scores, data=folder)[0]
    assert results["difference"]["full"] == whole_set["difference"]
    assert (results["wins"], results["changed"]) == (whole_set["wins"], whole_set["changed"])
    assert f"rSum {results['difference']['rsum']:+.1f} from A to B" in said(out)
    for which in ("mean of 5 folds of 8", "all 40 images"):
        for name in ("A", "B", "B - A"):
            assert re.search(f"^{name}, {which} ", out, re.MULTILINE)


# Where they differ


def perfect(images):
    """Scores with every true pair at 1 and first, wrong ones below 0.5, no two of a caption alike."""
    image_of_caption, rng = five_each(images), np.random.default_rng(0)
    wrong = rng.permuted(np.tile(np.arange(images) / (2 * images), (5 * images, 1)), axis=1).T
    return np.where(is_true(image_of_caption), 1, wrong)


def place_caption(scores, caption, rank):
    """Put a caption's image at a rank from 1 in the caption's list; no other rank changes."""
    image = caption // 5
    wrong = np.sort(np.delete(scores[:, caption], image))[::-1]
    scores[image, caption] = 1 if rank == 1 else wrong[rank - 2 : rank].mean()


def place_image(scores, image, rank):
    """Put an image's captions at a rank from 1 in the image's list; no other rank changes.

    The captions before them are from the second half of all, whose true scores must be 1.
    """
    scores[image, 5 * image : 5 * image + 5] = 0.6
    scores[image, -(rank - 1) or scores.shape[1] :] = 0.7


def test_the_five_queries_of_each_direction_whose_rank_changes_by_the_largest_factor_are_shown(compare, many):
    captions = {497: (1, 150), 3: (1, 40), 111: (12, 1), 420: (7, 2), 300: (1, 2), 301: (2, 1), 44: (100, 190)}
    images = {20: (1, 300), 10: (30, 1), 70: (1, 9), 30: (4, 2), 40: (100, 180), 57: (10, 15)}
    matrices = perfect(MANY), perfect(MANY)
    for which, scores in enumerate(matrices):
        for caption, ranks in captions.items():
            place_caption(scores, caption, ranks[which])
        for image, ranks in images.items():
            place_image(scores, image, ranks[which])
    results, out = compare(*matrices, data=many)
    texts = (many / "test_caps.txt").read_text().splitlines()
    largest = [("i2t", image, images[image], texts[5 * image : 5 * image + 5]) for image in (20, 10, 70, 30, 40)]
    largest += [("t2i", caption, captions[caption], [texts[caption]]) for caption in (497, 3, 111, 420, 300)]
    assert results["changed"] == [
        {"way": way, "query": query, "ranks": list(ranks), "captions": texts} for way, query, ranks, texts in largest
    ]
    assert results["wins"] == {"i2t": {"a": 4, "b": 2, "alike": 194}, "t2i": {"a": 4, "b": 3, "alike": 993}}
    printed = out.split("queries that change most")[1].splitlines()[1:]
    for way, query, (a, b), of_query in largest:
        expected = ["image" if way == "i2t" else "caption", str(query), str(a), str(b), of_query[0]]
        assert printed.pop(0).split(None, 4) == expected
        assert [printed.pop(0).strip() for _ in of_query[1:]] == of_query[1:]
    assert printed == []


def test_only_queries_that_change_are_shown_and_their_captions_cannot_steer_the_terminal(compare, tmp_path):
    folder = write_data(tmp_path / "hostile_precomp", {"test": 10})
    texts = (folder / "test_caps.txt").read_text().splitlines()
    texts[7] = "a red \x1b[2J ball"
    (folder / "test_caps.txt").write_text("".join(f"{text}\n" for text in texts))
    scores, changed = perfect(10), perfect(10)
    place_caption(changed, 7, 4)
    results, out = compare(scores, changed, data=folder)
    assert results["changed"] == [{"way": "t2i", "query": 7, "ranks": [1, 4], "captions": [texts[7]]}]
    assert "a red ?[2J ball" in out
    assert "\x1b" not in out


# Checkpoints


def test_a_checkpoint_and_the_scores_it_has_saved_are_alike(compare, trained_run, tmp_path):
    path = tmp_path / "saved.npy"
    assert eval_program.main(["--checkpoint", str(trained_run), "--save_sims", str(path), *FLAGS]) == 0
    for pair in ((trained_run, path), (path, trained_run)):
        results, out = compare(*pair)
        assert flat(results["difference"]["p"]) == [1] * 13
        assert results["a"] == results["b"]
        assert results["wins"] == {"i2t": {"a": 0, "b": 0, "alike": 10}, "t2i": {"a": 0, "b": 0, "alike": 50}}
        assert said(out).startswith("no winner: rSum +0.0")
        assert "no query changes its rank" in out
        for name, one in zip("AB", pair, strict=True):
            assert re.search(f"^{name} +{re.escape(str(one))}", out, re.MULTILINE)


def test_what_has_to_be_known_of_a_checkpoint_is_said_of_the_one_it_is_true_of(compare, trained_run, tmp_path):
    path = tmp_path / "saved.npy"
    np.save(path, noisy(five_each(10), seed=0))
    assert "\nB, chosen on this split: dev is what" in compare(path, trained_run, "--split", "dev")[1]
    assert "\nA, chosen on this split: dev is what" in compare(trained_run, path, "--split", "dev")[1]


# Wrong input


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ([], "required: A, B "),
        (["good.npy"], "required: B "),
        (["good.npy", "good.npy", "good.npy"], "good.npy"),
        (["good.npy", "absent.npy"], r"absent\.npy: no readable matrix"),
        (["absent.npy", "good.npy"], r"absent\.npy: no readable matrix"),
        (["good.npy", "absent_run"], "absent_run"),
        (["good.npy", "narrow.npy"], r"narrow\.npy: 10 x 49 scores, but \S+ test has 10 images and 50 captions"),
        (["turned.npy", "good.npy"], r"turned\.npy: 50 x 10 scores, but \S+ test has 10 images and 50 captions"),
        (["good.npy", "text.npy"], r"text\.npy: no readable matrix"),
        (["good.npy", "whole.npy"], r"whole\.npy: expected a matrix of floating-point scores"),
        (["good.npy", "good.npy", "--json", "."], r"\. could not be written"),
        (["good.npy", "good.npy", "--split", "odd", "--fold5"], "--fold5: 12 images"),
        (["good.npy", "good.npy", "--split", "absent"], r"absent_ims\.npy is missing"),
        (["good.npy", "good.npy", "--rerank", "5"], "--rerank"),
    ],
)
def test_wrong_uses_are_one_line_that_names_the_file_or_flag(given, complaint, tmp_path, monkeypatch, capsys):
    data = write_data(tmp_path / "data" / "tiny_precomp", {"test": 10, "odd": 12}, repeats=())
    monkeypatch.chdir(tmp_path)
    np.save("good.npy", np.eye(10).repeat(5, axis=1))
    np.save("narrow.npy", np.zeros((10, 49)))
    np.save("turned.npy", np.zeros((50, 10)))
    np.save("whole.npy", np.zeros((10, 50), int))
    (tmp_path / "text.npy").write_text("no matrix")
    flags = ["--data_path", str(data.parent), "--data_name", data.name, *FLAGS]
    assert re.search(complaint, complaint_of(["compare", *given, *flags], capsys))


@pytest.mark.parametrize(
    ("flags", "missing"),
    [
        ([], "with --data_path and --data_name where"),
        (["--data_path", "data"], "--data_name where"),
        (["--data_name", "tiny_precomp"], "with --data_path where"),
    ],
)
def test_saved_scores_alone_do_not_say_what_they_are_scores_of(flags, missing, tmp_path, capsys):
    np.save(tmp_path / "scores.npy", np.zeros((10, 50)))
    argv = ["compare", str(tmp_path / "scores.npy"), str(tmp_path / "scores.npy"), *flags, *FLAGS]
    assert missing in complaint_of(argv, capsys)


def complaint_of(argv, capsys):
    """The one line that a wrong use ends with."""
    capsys.readouterr()
    try:
        code = eval_program.main(argv)
    except SystemExit as end:  # a flag that is wrong in itself
        code = end.code
    (line,) = capsys.readouterr().err.splitlines()
    assert code == 2
    assert "Traceback" not in line
    return line
