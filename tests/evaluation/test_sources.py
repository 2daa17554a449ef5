"""What is evaluated: one checkpoint or several, saved scores, on data of its own or of others; what is said of it."""

import json
import re
import shutil

import numpy as np
import pytest

import eval as eval_program
import test as test_program
import train
from tests.conftest import write_data
from tests.evaluation.test_evaluate import FLAGS, recalls, sorted_recalls
from tests.evaluation.test_metrics import sorted_ranks


@pytest.fixture(scope="module")
def another_run(tiny_flags, tmp_path_factory):
    """A run with another seed."""
    folder = tmp_path_factory.mktemp("runs") / "another"
    assert train.main([*tiny_flags, "--seed", "1", "--model_name", str(folder)]) == 0
    return folder


@pytest.fixture
def evaluate(tmp_path, capsys):
    """Runs eval.py: its results, the scores it has saved, what it has printed."""

    def evaluate(*flags):
        files = ["--json", str(tmp_path / "results.json"), "--save_sims", str(tmp_path / "sims.npy")]
        capsys.readouterr()
        assert eval_program.main([*map(str, flags), *files, *FLAGS]) == 0, capsys.readouterr().err
        results = json.loads((tmp_path / "results.json").read_text())
        return results, np.load(tmp_path / "sims.npy"), capsys.readouterr().out

    return evaluate


# Ensembles


def test_an_ensemble_ranks_by_the_mean_of_its_models_scores_beside_each_of_them(evaluate, trained_run, another_run):
    one, scores_of_one, _ = evaluate("--checkpoint", trained_run, "--split", "testall", "--fold5")
    other, scores_of_other, _ = evaluate("--checkpoint", another_run, "--split", "testall", "--fold5")
    both, scores, out = evaluate(
        *("--checkpoint", trained_run, "--checkpoint", another_run, "--split", "testall", "--fold5")
    )
    np.testing.assert_array_equal(scores, (scores_of_one + scores_of_other) / 2)
    for name, alone in (("single 1", one), ("single 2", other)):
        figures = both["singles"][name]
        assert figures == {part: alone[part] for part in figures}
    np.testing.assert_allclose(recalls(both["full"]), sorted_recalls(scores))
    folds = [sorted_recalls(scores[4 * k : 4 * k + 4, 20 * k : 20 * k + 20]) for k in range(5)]
    np.testing.assert_allclose(recalls(both), np.mean(folds, axis=0))
    assert both["row"] == "ensemble of 2"
    rows = (
        "single 1, mean of 5 folds of 4",
        "single 2, all 20 images",
        "ensemble of 2, fold 5",
        "ensemble of 2, all 20",
    )
    assert all(row in out for row in rows)
    assert f"single 2    {another_run}/model_best.pt" in out


def test_three_models_and_the_same_model_twice(evaluate, trained_run, another_run):
    _, one, _ = evaluate("--checkpoint", trained_run)
    _, other, _ = evaluate("--checkpoint", another_run)
    _, three, out = evaluate("--checkpoint", trained_run, "--checkpoint", another_run, "--checkpoint", trained_run)
    np.testing.assert_allclose(three, (2 * one + other) / 3, atol=1e-6)
    assert "ensemble of 3" in out
    results, twice, _ = evaluate("--checkpoint", trained_run, "--checkpoint", trained_run)
    np.testing.assert_array_equal(twice, one)
    assert results["rsum"] == results["singles"]["single 1"]["rsum"]


def test_saved_scores_stand_for_the_checkpoint_that_made_them(evaluate, trained_run, another_run, tiny_data, tmp_path):
    expected = evaluate("--checkpoint", trained_run, "--checkpoint", another_run)
    for name, run in (("one", trained_run), ("other", another_run)):
        np.save(tmp_path / f"{name}.npy", evaluate("--checkpoint", run)[1])
    data = ["--data_path", tiny_data[0], "--data_name", tiny_data[1]]
    for sources in (("one.npy", "other.npy"), ("one.npy", another_run)):
        paths = [tmp_path / sources[0], tmp_path / sources[1]]
        results, scores, _ = evaluate(*(flag for path in paths for flag in ("--checkpoint", path)), *data)
        np.testing.assert_array_equal(scores, expected[1])
        assert all(results[part] == expected[0][part] for part in ("i2t", "t2i", "rsum", "interval", "singles"))
    alone, _, out = evaluate("--checkpoint", tmp_path / "one.npy", *data)
    assert alone["rsum"] == expected[0]["singles"]["single 1"]["rsum"]
    assert alone["row"] == "saved scores"
    assert f"checkpoint  {tmp_path / 'one.npy'}\n" in out


def test_any_number_of_captions_and_ties_are_ranked_as_by_sorting_each_list(evaluate, tmp_path):
    rng, images = np.random.default_rng(0), 20
    counts = rng.integers(1, 5, size=images)
    image_of_caption = np.repeat(np.arange(images), counts)
    folder = write_data(tmp_path / "few_precomp", {"test": images}, repeats=())
    (folder / "test_caps_counts.txt").write_text("".join(f"{count}\n" for count in counts))
    (folder / "test_caps.txt").write_text("".join(f"caption {number}\n" for number in range(counts.sum())))
    scores = rng.integers(6, size=(images, counts.sum())).astype(np.float32)
    np.save(tmp_path / "ties.npy", scores)
    data = ["--data_path", tmp_path, "--data_name", folder.name]
    results, saved, _ = evaluate("--checkpoint", tmp_path / "ties.npy", *data, "--fold5")
    np.testing.assert_array_equal(saved, scores)
    assert_figures(results["full"], sorted_ranks(scores, image_of_caption))
    for k, fold in enumerate(results["folds"]):
        captions = image_of_caption // 4 == k
        ranks = sorted_ranks(scores[4 * k : 4 * k + 4, captions], image_of_caption[captions] - 4 * k)
        assert_figures(fold, ranks)
    for way in ("i2t", "t2i"):
        for name, value in results[way].items():
            assert value == pytest.approx(np.mean([fold[way][name] for fold in results["folds"]]))


def assert_figures(metrics, ranks):
    for way, of_way in zip(("i2t", "t2i"), map(np.array, ranks), strict=True):
        hits = [100 * np.mean(of_way < k) for k in (1, 5, 10)]
        expected = [*hits, np.mean(hits), np.floor(np.median(of_way)) + 1, np.mean(of_way) + 1]
        assert [metrics[way][name] for name in ("r1", "r5", "r10", "avg", "medr", "meanr")] == pytest.approx(expected)


# What the split had to do with training


def test_the_split_that_chose_the_model_and_the_one_it_learned_from_are_named(evaluate, trained_run):
    results, _, out = evaluate("--checkpoint", trained_run, "--split", "dev")
    assert results["row"] == "X-Dim, chosen on this split"
    assert "X-Dim, chosen on this split  " in out
    assert "chosen on this split: dev is what the run's best epoch was chosen on" in out
    assert evaluate("--checkpoint", trained_run, "--split", "train")[0]["row"] == "X-Dim, seen in training"
    assert evaluate("--checkpoint", trained_run, "--split", "test")[0]["caveats"] == []


def test_dev_is_known_under_another_name_by_its_content(evaluate, trained_run, tiny_data, tmp_path):
    shutil.copytree(f"{tiny_data[0]}/{tiny_data[1]}", tmp_path / tiny_data[1])
    for ending in ("ims.npy", "caps.txt", "ids.txt"):
        shutil.copy(tmp_path / tiny_data[1] / f"dev_{ending}", tmp_path / tiny_data[1] / f"held_out_{ending}")
    results = evaluate("--checkpoint", trained_run, "--data_path", tmp_path, "--split", "held_out")[0]
    assert results["row"] == "X-Dim, chosen on this split"


def test_zero_shot_transfer_is_said_in_the_table(evaluate, trained_run, tiny_data, tmp_path):
    folder = write_data(tmp_path / "other_precomp", {"train": 30, "dev": 10, "test": 12})
    data = ["--data_path", tmp_path, "--data_name", "other_precomp"]
    results, _, out = evaluate("--checkpoint", trained_run, *data)
    assert results["row"] == "X-Dim, zero-shot"
    assert f"zero-shot: trained on {tiny_data[0]}/{tiny_data[1]}, evaluated on {folder}" in out
    assert results["caveats"] == [f"trained on {tiny_data[0]}/{tiny_data[1]}, evaluated on {folder}"]
    both = evaluate("--checkpoint", trained_run, "--checkpoint", trained_run, *data)[2]
    assert "single 1, zero-shot" in both
    assert "ensemble of 2, zero-shot" in both
    assert both.count("zero-shot: trained on") == 1


@pytest.mark.parametrize("halved", [False, True])
def test_a_copy_of_the_data_under_another_name_is_no_transfer(evaluate, trained_run, tiny_data, tmp_path, halved):
    copied = shutil.copytree(f"{tiny_data[0]}/{tiny_data[1]}", tmp_path / "copied")
    if halved:
        for path in copied.glob("*_ims.npy"):
            np.save(path, np.load(path).astype(np.float16))
    data = ["--data_path", tmp_path, "--data_name", "copied"]
    assert evaluate("--checkpoint", trained_run, *data)[0]["caveats"] == []
    assert evaluate("--checkpoint", trained_run, *data, "--split", "dev")[0]["row"] == "X-Dim, chosen on this split"


def test_another_data_set_in_a_folder_of_the_same_name_is_a_transfer(evaluate, trained_run, tiny_data, tmp_path):
    write_data(tmp_path / tiny_data[1], {"train": 30, "dev": 12, "test": 12})
    assert evaluate("--checkpoint", trained_run, "--data_path", tmp_path)[0]["row"] == "X-Dim, zero-shot"


# Wrong input


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (np.zeros((10, 49), np.float32), r"10 x 49 scores, but \S+ test has 10 images and 50 captions"),
        (np.zeros(50, np.float32), "expected a matrix of floating-point scores"),
        (np.zeros((10, 50), np.int64), "expected a matrix of floating-point scores"),
        (np.full((10, 50), np.nan, np.float32), "NaN"),
        (b"no array", "no readable matrix"),
        (None, "no readable matrix"),
    ],
)
def test_a_file_that_holds_no_scores_of_the_split_is_named(tiny_data, tmp_path, capsys, content, complaint):
    path = tmp_path / "scores.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content)
    data = ["--data_path", tiny_data[0], "--data_name", tiny_data[1]]
    assert test_program.main(["--checkpoint", str(path), *data, *FLAGS]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(complaint, line)


def test_saved_scores_alone_do_not_say_what_they_are_scores_of(tmp_path, capsys):
    np.save(tmp_path / "scores.npy", np.zeros((2, 10), np.float32))
    assert test_program.main(["--checkpoint", str(tmp_path / "scores.npy"), *FLAGS]) == 2
    assert "--data_path and --data_name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--checkpoint", "a", "--checkpoint", "b", "--rerank", "5"], "--rerank: for a single checkpoint"),
        (["--checkpoint", "a.npy", "--rerank", "5"], "--rerank: for a single checkpoint"),
        (["--rerank", "5", "--ranks", "x"], "--ranks: needs every pair's exact score"),
        (["--rerank", "5", "--eccv"], "--eccv: needs every pair's exact score"),
    ],
)
def test_what_cannot_be_had_together_is_refused(flags, complaint, capsys):
    assert test_program.main(flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert complaint in line


def test_models_of_different_features_cannot_be_an_ensemble(trained_run, tiny_flags, tmp_path, capsys):
    write_data(tmp_path / "small", {"train": 8, "dev": 4}, img_dim=4)
    data = ["--data_path", str(tmp_path), "--data_name", "small", "--img_dim", "4"]
    assert train.main([*tiny_flags, *data, "--model_name", str(tmp_path / "run")]) == 0
    checkpoints = ["--checkpoint", str(trained_run), "--checkpoint", str(tmp_path / "run")]
    capsys.readouterr()
    assert test_program.main([*checkpoints, *FLAGS]) == 2
    assert "features of 4 and of 16 numbers" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--json", "--ranks", "--save_sims"])
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_encoded(flag, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lib.evaluation.evaluate.opened", None)
    assert test_program.main([flag, str(tmp_path), *FLAGS]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"error: {tmp_path} could not be written: Is a directory"
    (tmp_path / "file").touch()
    assert test_program.main([flag, str(tmp_path / "file" / "results"), *FLAGS]) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
