"""Evaluation as a whole, through the programs and from Python, against an independent computation."""

import json
import os
import re

import numpy as np
import pytest
import torch

import eval as eval_program
import test as test_program
import testall as testall_program
from lib import load
from lib.checkpoints.native import build_model, read_checkpoint
from lib.cli import InputError
from lib.evaluation.metrics import retrieval_metrics
from lib.evaluation.parts import folds
from lib.evaluation.ranks import rank_matrix
from lib.model.xdim import XDim, score_caption
from tests.conftest import TINY_BERT, write_data

FLAGS = ["--device", "cpu", "--workers", "0", "--batch_size", "7"]


def plain_scores(run, data_path, data_name, split):
    """Scores of a split, captions and images one at a time through the formulas."""
    folder = f"{data_path}/{data_name}"
    model, tokenizer = build_model(read_checkpoint(run / "model_best.pt"))
    model.eval()
    D, temperature = model.similarity.dependency(), model.similarity.log_temperature.exp()
    features = torch.from_numpy(np.load(f"{folder}/{split}_ims.npy")[::5])
    with open(f"{folder}/{split}_caps.txt", encoding="utf-8") as file:
        captions = file.read().splitlines()
    rows = []
    with torch.no_grad():
        regions = [model.encode_images(image, torch.tensor([len(image)]))[0] for image in features]
        words = []
        for caption in captions:
            ids, lengths = map(torch.from_numpy, tokenizer.pad(tokenizer.tokenize([caption])))
            words.append(model.encode_captions(ids, lengths))
        for image in regions:
            rows.append(torch.cat([score_caption(image, each, D, temperature) for each in words]))
    return torch.stack(rows).numpy()


def sorted_recalls(scores):
    """R@1, R@5, R@10 of both directions by sorting, for five captions an image and no ties."""
    images = len(scores)
    by_image = np.argsort(-scores, axis=1)
    by_caption = np.argsort(-scores, axis=0).T
    i2t = [min(np.flatnonzero(by_image[i] // 5 == i)) for i in range(images)]
    t2i = [np.flatnonzero(by_caption[c] == c // 5)[0] for c in range(5 * images)]
    return [100 * np.mean(np.array(ranks) < k) for ranks in (i2t, t2i) for k in (1, 5, 10)]


def recalls(metrics):
    return [metrics[way][name] for way in ("i2t", "t2i") for name in ("r1", "r5", "r10")]


@pytest.fixture(scope="module")
def evaluated(trained_run, tmp_path_factory):
    """Results and scores of `eval.py --fold5` on testall."""
    folder = tmp_path_factory.mktemp("results")
    files = ["--json", str(folder / "results.json"), "--save_sims", str(folder / "sims.npy")]
    assert eval_program.main(["--checkpoint", str(trained_run), "--split", "testall", "--fold5", *files, *FLAGS]) == 0
    return json.loads((folder / "results.json").read_text()), np.load(folder / "sims.npy")


def test_saved_scores_equal_the_formulas_with_repeated_rows_removed(evaluated, trained_run, tiny_data):
    scores = evaluated[1]
    assert scores.dtype == np.float32
    assert scores.shape == (20, 100)
    np.testing.assert_allclose(scores, plain_scores(trained_run, *tiny_data, "testall"), atol=1e-5)


def test_folds_mean_and_full_set_equal_an_independent_computation_from_one_matrix(evaluated):
    results, scores = evaluated
    folds = [sorted_recalls(scores[4 * k : 4 * k + 4, 20 * k : 20 * k + 20]) for k in range(5)]
    np.testing.assert_allclose([recalls(fold) for fold in results["folds"]], folds)
    np.testing.assert_allclose(recalls(results), np.mean(folds, axis=0))
    np.testing.assert_allclose(recalls(results["full"]), sorted_recalls(scores))
    assert results["rsum"] == pytest.approx(sum(np.mean(folds, axis=0)))
    assert results["full"]["rsum"] == pytest.approx(sum(sorted_recalls(scores)))


def test_json_has_the_documented_form(evaluated, trained_run, tmp_path):
    results = evaluated[0]
    assert (results["split"], results["images"], results["captions"]) == ("testall", 20, 100)
    figures = {"i2t", "t2i", "rsum", "interval"}
    about = {"data", "split", "images", "captions", "row", "caveats", "singles", "coco", "rerank", "timing"}
    assert set(results) == {*about, *figures, "folds", "full"}
    assert results["rerank"] is results["coco"] is None
    assert (results["row"], results["caveats"], results["singles"]) == ("X-Dim", [], {})
    assert set(results["i2t"]) == set(results["interval"]["t2i"]) == {"r1", "r5", "r10", "avg", "medr", "meanr"}
    assert all(set(one) == figures for one in (results["full"], *results["folds"]))
    assert set(results["timing"]) == {"load_s", "encode_s", "compile_s", "similarity_s", "rank_s", "protocols_s"}
    eval_program.main(["--checkpoint", str(trained_run), "--json", str(tmp_path / "plain.json"), *FLAGS])
    plain = json.loads((tmp_path / "plain.json").read_text())
    assert plain["folds"] == []
    assert "full" not in plain


def test_saved_scores_give_the_reported_ranks(evaluated):
    results, scores = evaluated
    parts = folds(5, 20, np.repeat(np.arange(20), 5))
    metrics = [retrieval_metrics(ranks) for ranks in rank_matrix(scores, np.repeat(np.arange(20), 5), parts)]
    assert metrics == [{name: fold[name] for name in ("i2t", "t2i", "rsum")} for fold in results["folds"]]


def test_coarse_to_fine_with_every_pair_exact_reports_what_exact_scores_do(trained_run, evaluated, tmp_path, capsys):
    flags = ["--checkpoint", str(trained_run), "--split", "testall", "--fold5", *FLAGS]
    assert eval_program.main([*flags, "--rerank", "100", "--json", str(tmp_path / "rerank.json")]) == 0
    results = json.loads((tmp_path / "rerank.json").read_text())
    assert results["rerank"] == {"k": 100, "exact_pairs": 2000, "pairs": 2000}
    for name in ("i2t", "t2i", "rsum", "folds", "full"):
        assert results[name] == evaluated[0][name]
    assert "best 100 of each query by exact score: 2000 of 2000 pairs (100.0 %)" in capsys.readouterr().out


def test_coarse_to_fine_says_how_many_scores_were_exact(trained_run, tmp_path, capsys):
    flags = ["--checkpoint", str(trained_run), *FLAGS]
    assert test_program.main([*flags, "--rerank", "1"]) == 0
    out = capsys.readouterr().out
    assert "X-Dim, best 1 exact" in out
    pairs = int(re.search(r"score: (\d+) of 500 pairs", out)[1])
    assert 50 <= pairs <= 60
    assert test_program.main([*flags, "--rerank", "auto"]) == 0
    assert re.search(r"X-Dim, best (20|40|80) exact", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--rerank", "0"], "--rerank 0"),
        (["--rerank", "some"], "--rerank some"),
        (["--rerank", "-1"], "--rerank"),
        (["--rerank", "²"], "--rerank ²"),
        (["--rerank", "5", "--save_sims", "x.npy"], "--save_sims"),
    ],
)
def test_wrong_uses_of_rerank_are_refused(flags, complaint, capsys):
    assert eval_program.main(flags) == 2
    assert complaint in capsys.readouterr().err


def test_scores_that_are_not_numbers_leave_no_file_behind(trained_run, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(
        "lib.evaluation.matcher.Scorer.all_pairs", lambda self, images, *_: torch.full((len(images), 50), torch.nan)
    )
    flags = ["--checkpoint", str(trained_run), "--split", "dev", *FLAGS]
    assert eval_program.main([*flags, "--save_sims", str(tmp_path / "sims.npy")]) == 2
    assert "NaN" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_every_image_is_encoded_once(trained_run, monkeypatch):
    seen = []

    def spy(self, features, counts, encode=XDim.encode_images):
        seen.append(len(features))
        return encode(self, features, counts)

    monkeypatch.setattr(XDim, "encode_images", spy)
    assert eval_program.main(["--checkpoint", str(trained_run), "--split", "dev", *FLAGS]) == 0
    assert sum(seen) == 10 * 6


def test_the_programs_print_their_tables(trained_run, capsys):
    assert test_program.main(["--checkpoint", str(trained_run), *FLAGS]) == 0
    named = capsys.readouterr().out
    assert "test: 10 images, 50 captions" in named
    assert "chance" in named
    assert testall_program.main(["--checkpoint", str(trained_run / "last.pt"), *FLAGS]) == 0
    out = capsys.readouterr().out
    for row in ("fold 1", "fold 5", "mean of 5 folds of 4", "all 20 images", "chance, 20 images"):
        assert row in out


def test_without_a_name_the_newest_best_checkpoint_below_runs_is_taken(trained_run, monkeypatch, capsys, tmp_path):
    for name, age in (("older", 100), ("newer", 50)):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "model_best.pt").write_bytes((trained_run / "model_best.pt").read_bytes())
        os.utime(folder / "model_best.pt", (10**9 - age, 10**9 - age))
    monkeypatch.chdir(tmp_path)
    assert test_program.main(FLAGS) == 0
    assert "checkpoint  runs/newer/model_best.pt, 1 epochs, dev rSum" in capsys.readouterr().out


def test_python_interface_scores_features_and_sentences(trained_run, tiny_data, evaluated):
    folder = f"{tiny_data[0]}/{tiny_data[1]}"
    with open(f"{folder}/testall_caps.txt", encoding="utf-8") as file:
        captions = file.read().splitlines()
    model = load(trained_run, device="cpu")
    scores = model.score(np.load(f"{folder}/testall_ims.npy")[::5], captions)
    assert scores.shape == (20, 100)
    np.testing.assert_allclose(scores, evaluated[1], atol=1e-6)
    assert (
        retrieval_metrics(rank_matrix(scores, np.repeat(np.arange(20), 5))[0])["rsum"] == evaluated[0]["full"]["rsum"]
    )


@pytest.mark.parametrize(
    ("regions", "captions", "complaint"),
    [
        (np.zeros((2, 6, 15), np.float32), ["a ball"], "expected \\(images, regions, 16\\)"),
        (np.zeros((2, 16), np.float32), ["a ball"], "expected \\(images, regions, 16\\)"),
        (np.full((2, 6, 16), np.nan, np.float32), ["a ball"], "NaN"),
        (np.zeros((2, 6, 16), np.float32), "a ball", "list"),
        (np.zeros((2, 6, 16), np.float32), [], "list"),
    ],
)
def test_python_interface_says_what_is_wrong(trained_run, regions, captions, complaint):
    with pytest.raises(InputError, match=complaint):
        load(trained_run, device="cpu").score(regions, captions)


def test_bfloat16_evaluation_stays_near_float32(trained_run, evaluated, tmp_path):
    flags = ["--checkpoint", str(trained_run), "--split", "testall", "--precision", "bf16", *FLAGS]
    assert eval_program.main([*flags, "--save_sims", str(tmp_path / "sims.npy")]) == 0
    assert np.abs(np.load(tmp_path / "sims.npy") - evaluated[1]).max() < 0.1


def test_evaluation_on_another_data_set_takes_its_path_and_name(trained_run, tmp_path, capsys):
    write_data(tmp_path / "precomp", images={"dev": 5})
    flags = ["--checkpoint", str(trained_run), "--data_path", str(tmp_path), "--data_name", "other", "--split", "dev"]
    assert eval_program.main([*flags, "--bert", str(TINY_BERT), *FLAGS]) == 0
    assert f"{tmp_path / 'precomp'} dev: 5 images, 25 captions" in capsys.readouterr().out
