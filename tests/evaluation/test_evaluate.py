"""Evaluation as a whole, through the programs and from Python, against an independent computation."""

import json
import os
import re
import shutil
import subprocess
import sys
from unittest.mock import Mock, call

import numpy as np
import pytest
import torch

import eval as eval_program
import test as test_program
import testall as testall_program
import train
from lib import load
from lib.checkpoints.native import build_model, read_checkpoint
from lib.cli import QUIET, InputError
from lib.data.dataset import open_split
from lib.evaluation import score
from lib.evaluation.evaluate import Clock
from lib.evaluation.metrics import rank_matrix, retrieval_metrics
from lib.model.xdim import XDim, score_caption
from lib.runtime import ROOT
from tests.conftest import write_data
from tests.evaluation.test_metrics import five_each, sorted_ranks

FLAGS = ["--device", "cpu", "--workers", "0", "--batch_size", "7"]


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


def plain_scores(run, folder, split):
    """Scores of a split, captions and images one at a time through the formulas."""
    model, tokenizer = build_model(read_checkpoint(run / "model_best.safetensors"))
    model.eval()
    D, temperature = model.similarity.dependency(), model.similarity.log_temperature.exp()
    captions, words = (folder / f"{split}_caps.txt").read_text().splitlines(), []
    features = torch.from_numpy(np.load(folder / f"{split}_ims.npy")[::5])
    with torch.no_grad():
        regions = [model.encode_images(image, torch.tensor([len(image)]))[0] for image in features]
        for caption in captions:
            ids, lengths = map(torch.from_numpy, tokenizer.pad(tokenizer.tokenize([caption])))
            words.append(model.encode_captions(ids, lengths))
        rows = [torch.cat([score_caption(image, each, D, temperature) for each in words]) for image in regions]
    return torch.stack(rows).numpy()


def recalls(metrics):
    return [metrics[way][name] for way in ("i2t", "t2i") for name in ("r1", "r5", "r10")]


def sorted_recalls(scores, image_of_caption):
    """The six recalls by sorting each list."""
    ranks = sorted_ranks(scores, image_of_caption)
    return [100 * np.mean(np.array(of_way) < k) for of_way in ranks for k in (1, 5, 10)]


@pytest.fixture
def data(tiny_data, tmp_path):
    return tmp_path.__class__(tiny_data[0]) / tiny_data[1]


# One checkpoint


def test_scores_folds_and_json_equal_an_independent_computation(evaluate, trained_run, data):
    results, scores, _ = evaluate("--checkpoint", trained_run, "--split", "testall", "--fold5")
    assert (scores.dtype, scores.shape) == (np.float32, (20, 100))
    np.testing.assert_allclose(scores, plain_scores(trained_run, data, "testall"), atol=1e-5)
    folds = [sorted_recalls(scores[4 * k : 4 * k + 4, 20 * k : 20 * k + 20], five_each(4)) for k in range(5)]
    np.testing.assert_allclose([recalls(fold) for fold in results["folds"]], folds)
    np.testing.assert_allclose(recalls(results), np.mean(folds, axis=0))
    np.testing.assert_allclose(recalls(results["full"]), sorted_recalls(scores, five_each(20)))
    assert results["rsum"] == pytest.approx(sum(recalls(results)))
    assert (results["split"], results["images"], results["captions"]) == ("testall", 20, 100)
    assert (results["row"], results["caveats"], results["singles"]) == ("X-Dim", [], {})
    assert results["rerank"] is results["coco"] is None
    values = {"i2t", "t2i", "rsum", "interval"}
    about = {"data", "split", "images", "captions", "row", "caveats", "singles", "coco", "rerank", "timing"}
    assert set(results) == {*about, *values, "folds", "full"}
    assert all(set(one) == values for one in (results["full"], *results["folds"]))
    assert set(results["i2t"]) == set(results["interval"]["t2i"]) == {"r1", "r5", "r10", "avg", "medr", "meanr"}
    assert set(results["timing"]) == {"load_s", "encode_s", "similarity_s", "rank_s", "protocols_s"}
    plain, _, _ = evaluate("--checkpoint", trained_run, "--split", "testall")
    assert plain["folds"] == []
    assert {name: plain[name] for name in values} == results["full"]


def test_python_interface_gives_the_same_scores(evaluate, trained_run, data):
    results, expected, _ = evaluate("--checkpoint", trained_run, "--split", "testall")
    captions = (data / "testall_caps.txt").read_text().splitlines()
    images = np.load(data / "testall_ims.npy")[::5]
    model = load(trained_run, device="cpu")
    scores = model.score(images, captions)
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    assert retrieval_metrics(rank_matrix(scores.numpy(), five_each(20)))["rsum"] == results["rsum"]
    some = model.score([images[0][:4], images[1]], captions[:3])  # different numbers of regions
    np.testing.assert_allclose(some[1], expected[1, :3], atol=1e-6)
    np.testing.assert_allclose(some[:1], model.score(images[:1, :4], captions[:3]), atol=1e-6)


def test_a_program_that_loads_a_model_keeps_its_switches_its_children_and_its_libraries_messages(trained_run):
    """Its daemonic child gets multiprocessing's SIGTERM at exit; of the programs here it would be killed."""
    program = """
import multiprocessing, signal, sys, time
import huggingface_hub.utils, torch, transformers
from lib import load

def child(ready):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(print("asked to end", flush=True)))
    ready.set()
    time.sleep(300)

def switches():
    matmul, cudnn = torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.allow_tf32
    logging = [package.utils.logging.get_verbosity() for package in (transformers, huggingface_hub)]
    bars = transformers.utils.logging.is_progress_bar_enabled()
    return torch.get_float32_matmul_precision(), matmul, cudnn, torch.get_deterministic_debug_mode(), logging, bars

fork = multiprocessing.get_context("fork")
ready = fork.Event()
fork.Process(target=child, args=[ready], daemon=True).start()
ready.wait()
torch.set_float32_matmul_precision("medium")
before = switches()
model = load(sys.argv[1], device="cpu")
model.score([torch.ones(2, 16)], ["a ball"])
print(switches() == before)
"""
    command, host = (
        [sys.executable, "-c", program, trained_run],
        {k: v for k, v in os.environ.items() if k not in QUIET},
    )
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=host)
    assert ended.stdout == "True\nasked to end\n", ended.stderr


def test_a_models_methods_compute_in_its_precision_whatever_the_programs_is(trained_run, monkeypatch):
    model, seen = load(trained_run, device="cpu"), []

    def spying(method):
        def spy(*arguments):
            seen.append(torch.get_float32_matmul_precision())
            return method(*arguments)

        return spy

    for owner, name in ((model.model, "encode_images"), (model.model, "encode_captions"), (score, "score_all")):
        monkeypatch.setattr(owner, name, spying(getattr(owner, name)))
    monkeypatch.setattr(model.model.engine, "scorer", spying(model.model.engine.scorer))
    torch.set_float32_matmul_precision("medium")
    try:
        model.score([torch.ones(2, 16)], ["a ball"])
    finally:
        assert torch.get_float32_matmul_precision() == "medium"
        torch.set_float32_matmul_precision("highest")
    assert seen == ["highest"] * 4


def test_a_part_of_an_evaluation_ends_when_the_device_has_done_its_work(monkeypatch):
    device = Mock()
    monkeypatch.setattr("lib.evaluation.evaluate.time", device)
    device.perf_counter.side_effect = [1.0, 4.0]
    clock = Clock(device)
    with clock("rank"):
        device.work()
    assert device.method_calls == [call.perf_counter(), call.work(), call.synchronize(), call.perf_counter()]
    assert clock["rank_s"] == 3.0


@pytest.mark.parametrize(
    ("regions", "captions", "complaint"),
    [
        (np.zeros((2, 6, 15), np.float32), ["a ball"], "expected \\(images, regions, 16\\)"),
        (np.full((2, 6, 16), np.nan, np.float32), ["a ball"], "NaN"),
        (np.zeros((2, 6, 16), np.float32), "a ball", "list"),
        (np.zeros((2, 6, 16), np.float32), [3], "list"),
        (None, ["a ball"], "expected a list of one path"),
        ("a.jpg", ["a ball"], "expected a list of one path"),
        ([{}], ["a ball"], "expected \\(images, regions, 16\\) numbers"),
        (np.zeros((1, 3, 16), complex), ["a ball"], "numbers \\(complex or bool\\)"),
        (np.full((1, 3, 16), 1e300), ["a ball"], "infinite"),
        (np.zeros((2, 6, 16), np.float32), ["a \ud800 ball"], "no valid Unicode"),
        (["a.jpg"], ["a ball"], "nothing says which program made the regions .* arrays \\(images, regions, 16\\)"),
    ],
)
def test_python_interface_says_what_is_wrong(trained_run, regions, captions, complaint):
    with pytest.raises(InputError, match=complaint):
        load(trained_run, device="cpu").score(regions, captions)


@pytest.mark.parametrize("flag", [{"precision": "bfloat16"}, {"engine": "tile"}])
def test_python_interface_knows_the_values_that_the_flags_take(trained_run, flag):
    with pytest.raises(InputError, match=r"expected \w+ or "):
        load(trained_run, device="cpu", **flag)


def test_python_interface_takes_sentences_as_an_array_too(trained_run):
    model, regions, sentences = load(trained_run, device="cpu"), np.ones((1, 6, 16), np.float32), ["a ball", "a dog"]
    assert torch.equal(model.score(regions, np.array(sentences)), model.score(regions, sentences))


def test_rerank_with_every_item_exact_gives_the_exact_metrics_and_says_how_many_pairs(trained_run, tmp_path, capsys):
    flags = ["--checkpoint", str(trained_run), "--split", "testall", *FLAGS, "--json"]
    for name, rerank in (("exact", []), ("all", ["--rerank", "100"]), ("few", ["--rerank", "2"])):
        assert eval_program.main([*flags, str(tmp_path / f"{name}.json"), *rerank]) == 0
    exact, every, few = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("exact", "all", "few"))
    assert (every["rsum"], every["interval"]) == (exact["rsum"], exact["interval"])
    assert every["rerank"] == {"k": 100, "exact_pairs": 2000, "pairs": 2000}
    assert few["rerank"]["exact_pairs"] <= 2 * (20 + 100)
    out = capsys.readouterr().out
    assert "X-Dim, best 2 exact" in out
    assert "best 100 of each query by exact score: 2000 of 2000 pairs (100.0 %)" in out


def test_a_global_head_has_a_row_alone_and_finds_what_rerank_scores_exactly(tiny_flags, tmp_path, capsys):
    run = tmp_path / "headed"
    assert train.main([*tiny_flags, "--global_head", "gpo:weight=0.5", "--model_name", str(run)]) == 0
    flags = [str(run), "--split", "testall", "--workers", "0", "--json"]
    for name, rerank in (("exact", []), ("all", ["--rerank", "100"]), ("few", ["--rerank", "2"])):
        assert eval_program.main([*flags, str(tmp_path / f"{name}.json"), *rerank]) == 0
    exact, every, few = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("exact", "all", "few"))
    row = "X-Dim and global head"
    assert [one["row"] for one in (exact, every, few)] == [row, f"{row}, best 100 exact", f"{row}, best 2 exact"]
    alone = f"{row}, global vectors alone"
    assert recalls(every) == recalls(exact) != recalls(exact["singles"][alone])
    assert [list(one["singles"]) for one in (exact, every, few)] == [[alone]] * 3
    assert few["singles"][alone] == exact["singles"][alone]
    assert few["rerank"]["exact_pairs"] <= 2 * (20 + 100)
    matcher = load(run, device="cpu")
    split = open_split(*settings_of(matcher), "testall")
    embeddings = score.embed_split(matcher, split, matcher.tokenizer.tokenize_split("", split.captions), 8, 0)
    images, captions = score.pool(matcher.model.pooling, embeddings)
    scores = score.score_all(matcher.scorer(coarse=True), embeddings)
    torch.testing.assert_close(images @ captions.T, scores)
    expected = sorted_recalls(scores.numpy(), split.image_of_caption)
    np.testing.assert_allclose(recalls(exact["singles"][alone]), expected)


def settings_of(matcher):
    return matcher.content["settings"]["data_path"], matcher.content["settings"]["data_name"]


def test_bfloat16_stays_near_float32(evaluate, trained_run):
    _, expected, _ = evaluate("--checkpoint", trained_run, "--split", "testall")
    _, scores, out = evaluate("--checkpoint", trained_run, "--split", "testall", "--precision", "bf16")
    assert 0 < np.abs(scores - expected).max() < 0.1
    assert "bf16" in out


def test_every_image_is_encoded_once_though_its_row_stands_five_times_in_the_file(trained_run, monkeypatch):
    seen = []

    def spy(self, images, *rest, encode=XDim.encode_images):
        seen.append(len(images))
        return encode(self, images, *rest)

    monkeypatch.setattr(XDim, "encode_images", spy)
    assert eval_program.main(["--checkpoint", str(trained_run), "--split", "dev", *FLAGS]) == 0
    assert sum(seen) == 10 * 6


def test_programs_print_their_tables_and_find_the_newest_best_checkpoint(trained_run, monkeypatch, capsys, tmp_path):
    for name, age in (("older", 100), ("newer", 50)):
        best = shutil.copytree(trained_run, tmp_path / "runs" / name) / "model_best.safetensors"
        os.utime(best, (10**9 - age, 10**9 - age))
    monkeypatch.chdir(tmp_path)
    assert test_program.main(FLAGS) == 0
    out = capsys.readouterr().out
    assert "checkpoint  runs/newer/model_best.safetensors, 1 epochs, dev rSum" in out
    assert re.search(r"^run         epoch 1 of 1 chosen on dev \(rSum .*\), seed 0", out, re.MULTILINE)
    assert "test: 10 images, 50 captions" in out
    assert re.search(r"^chance ", out, re.MULTILINE)
    assert testall_program.main([str(trained_run / "last.pt"), *FLAGS]) == 0  # --checkpoint is not needed
    out = capsys.readouterr().out
    for row in ("X-Dim, fold 1", "X-Dim, fold 5", "X-Dim, mean of 5 folds of 4", "X-Dim, all 20", "chance, 20 images"):
        assert re.search(f"^{row} ", out, re.MULTILINE)


# Several checkpoints and saved scores


def test_an_ensemble_ranks_by_the_mean_of_its_models_scores_beside_each_of_them(evaluate, trained_run, another_run):
    flags = ["--split", "testall", "--fold5"]
    alone = [evaluate("--checkpoint", run, *flags) for run in (trained_run, another_run)]
    both, scores, out = evaluate("--checkpoint", trained_run, "--checkpoint", another_run, *flags)
    np.testing.assert_array_equal(scores, (alone[0][1] + alone[1][1]) / 2)
    for name, (results, _, _) in zip(("single 1", "single 2"), alone, strict=True):
        assert both["singles"][name] == {part: results[part] for part in both["singles"][name]}
    np.testing.assert_allclose(recalls(both["full"]), sorted_recalls(scores, five_each(20)))
    assert both["row"] == "ensemble of 2"
    rows = ("single 1, mean of 5 folds of 4", "single 2, all 20", "ensemble of 2, fold 5", "ensemble of 2, all 20")
    assert all(row in out for row in rows)
    assert "single 1, fold 1" not in out
    assert f"single 2    {another_run}/model_best.safetensors" in out


def test_saved_scores_stand_for_the_checkpoint_that_made_them(evaluate, trained_run, another_run, data, tmp_path):
    expected, scores, _ = evaluate("--checkpoint", trained_run, "--checkpoint", another_run)
    np.save(tmp_path / "one.npy", evaluate("--checkpoint", trained_run)[1])
    where = ["--data_path", data.parent, "--data_name", data.name]
    results, found, _ = evaluate("--checkpoint", tmp_path / "one.npy", "--checkpoint", another_run, *where)
    np.testing.assert_array_equal(found, scores)
    assert all(results[part] == expected[part] for part in ("i2t", "t2i", "rsum", "interval", "singles"))
    alone, _, out = evaluate("--checkpoint", tmp_path / "one.npy", *where)
    assert (alone["row"], alone["rsum"]) == ("saved scores", expected["singles"]["single 1"]["rsum"])
    assert f"checkpoint  {tmp_path / 'one.npy'}\n" in out


def test_saved_scores_with_captions_first_are_read_so_and_the_table_says_it(evaluate, trained_run, data, tmp_path):
    expected, scores, _ = evaluate("--checkpoint", trained_run)
    np.save(tmp_path / "turned.npy", scores.T)
    flags = ["--checkpoint", tmp_path / "turned.npy", "--data_path", data.parent, "--data_name", data.name]
    results, found, _ = evaluate(*flags)
    np.testing.assert_array_equal(found, scores)
    assert (results["row"], results["rsum"]) == ("saved scores, read captions first", expected["rsum"])


def test_of_scores_of_folds_alone_the_table_has_the_folds_and_says_why_nothing_else(
    evaluate, trained_run, data, tmp_path, capsys
):
    flags = ["--split", "testall", "--fold5", "--data_path", data.parent, "--data_name", data.name]
    expected, scores, _ = evaluate("--checkpoint", trained_run, *flags)
    folds = np.stack([scores[4 * k : 4 * k + 4, 20 * k : 20 * k + 20] for k in range(5)])
    argv = [
        *map(str, flags),
        *FLAGS,
        "--json",
        str(tmp_path / "folds.json"),
        "--checkpoint",
        str(tmp_path / "folds.npy"),
    ]
    for form, turned in ((folds, ""), (folds.swapaxes(1, 2), ", read captions first")):
        np.save(tmp_path / "folds.npy", form)
        assert eval_program.main(argv) == 0
        results, out = json.loads((tmp_path / "folds.json").read_text()), capsys.readouterr().out
        assert all(results[part] == expected[part] for part in ("i2t", "t2i", "rsum", "interval", "folds"))
        assert results["row"] == f"saved scores{turned}, folds alone"
        assert "full" not in results
        assert "all 20 images" not in out
        assert "folds alone: between folds there are no scores, so nothing is ranked among all images" in out
        assert re.search("^chance, 4 images", out, re.MULTILINE)
        assert not re.search("^chance, 20 images", out, re.MULTILINE)
    assert eval_program.main([*argv, "--checkpoint", str(trained_run)]) == 0  # an ensemble of these and of all scores
    results, out = json.loads((tmp_path / "folds.json").read_text()), capsys.readouterr().out
    assert (results["rsum"], results["row"]) == (expected["rsum"], "ensemble of 2, folds alone")
    assert "all 20 images" not in out
    for wrong, words in (
        ([*argv, "--ranks", str(tmp_path / "r")], "--ranks cannot be had"),
        (["compare", *argv[:7], argv[-1], argv[-1]], "compare cannot be had"),
    ):
        assert eval_program.main(wrong) == 2
        assert f"5 x 20 x 4 scores, of 5 folds without the pairs between these: {words}" in capsys.readouterr().err
    np.save(tmp_path / "folds.npy", folds[:4])
    assert eval_program.main(argv) == 2
    assert "4 x 4 x 20 scores, but" in (line := capsys.readouterr().err)
    assert line.endswith("testall has 20 images and 100 captions, 5 folds\n")


def test_saved_scores_of_as_many_captions_as_images_have_images_first(evaluate, tmp_path):
    scores = np.random.default_rng(0).random((12, 12), np.float32)
    (folder := tmp_path / "square").mkdir()
    np.save(folder / "test_ims.npy", np.ones((12, 3, 8), np.float32))
    (folder / "test_caps_counts.txt").write_text("1\n" * 12)
    (folder / "test_caps.txt").write_text("a dog\n" * 12)
    np.save(tmp_path / "scores.npy", scores)
    flags = ["--checkpoint", tmp_path / "scores.npy", "--data_path", tmp_path, "--data_name", "square"]
    results, found, _ = evaluate(*flags)
    np.testing.assert_array_equal(found, scores)
    assert results["row"] == "saved scores"


def test_an_evaluation_finds_the_data_of_a_training_from_another_folder(trained_run, data, tmp_path, monkeypatch):
    """The path that the training recorded is relative to the checkout."""
    monkeypatch.setattr("lib.evaluation.evaluate.ROOT", data.parent.parent)
    content = read_checkpoint(trained_run / "last.pt")
    content["settings"]["data_path"] = data.parent.name
    monkeypatch.setattr("lib.evaluation.score.read_checkpoint", lambda *_, **__: content)
    monkeypatch.chdir(tmp_path)
    assert test_program.main([str(trained_run / "last.pt"), *FLAGS]) == 0


# How the split was used in training


def test_the_split_that_chose_the_model_and_the_one_it_was_trained_on_are_named(evaluate, trained_run):
    results, _, out = evaluate("--checkpoint", trained_run, "--split", "dev")
    assert results["row"] == "X-Dim, chosen on this split"
    assert "X-Dim, chosen on this split  " in out
    assert "chosen on this split: dev is what the run's best epoch was chosen on" in out
    assert evaluate("--checkpoint", trained_run, "--split", "train")[0]["row"] == "X-Dim, seen in training"
    assert evaluate("--checkpoint", trained_run, "--split", "test")[0]["caveats"] == []


def test_zero_shot_transfer_is_said_in_the_table(evaluate, trained_run, another_run, data, tmp_path):
    folder = write_data(tmp_path / "other_precomp", {"train": 30, "dev": 10, "test": 12})
    where = ["--data_path", tmp_path, "--data_name", folder.name]
    results, _, out = evaluate("--checkpoint", trained_run, *where)
    assert results["row"] == "X-Dim, zero-shot"
    assert results["caveats"] == [f"trained on {data}, evaluated on {folder}"]
    assert f"zero-shot: trained on {data}, evaluated on {folder}" in out
    both = evaluate("--checkpoint", trained_run, "--checkpoint", another_run, *where)[2]
    assert "single 1, zero-shot" in both
    assert "ensemble of 2, zero-shot" in both
    assert both.count("zero-shot: trained on") == 1


def test_splits_are_known_by_their_content_and_data_sets_in_float16_too(evaluate, trained_run, data, tmp_path):
    copied = shutil.copytree(data, tmp_path / "copied")
    for path in copied.glob("*_ims.npy"):
        np.save(path, np.load(path).astype(np.float16))
    for ending in ("ims.npy", "caps.txt", "ids.txt"):
        shutil.copy(data / f"dev_{ending}", copied / f"held_out_{ending}")
    where = ["--data_path", tmp_path, "--data_name", "copied"]
    assert evaluate("--checkpoint", trained_run, *where)[0]["caveats"] == []
    assert evaluate("--checkpoint", trained_run, *where, "--split", "held_out")[0]["row"].endswith("on this split")
    write_data(tmp_path / data.name, {"train": 30, "dev": 12, "test": 12})
    assert evaluate("--checkpoint", trained_run, *where[:2])[0]["row"] == "X-Dim, zero-shot"
    for name in ("train", "dev"):  # without them the data set's name decides
        (tmp_path / data.name / f"{name}_caps.txt").unlink()
    assert evaluate("--checkpoint", trained_run, *where[:2])[0]["caveats"] == []


# Wrong input


def complaint_of(argv, capsys):
    """The one line that a wrong use ends with."""
    capsys.readouterr()
    assert test_program.main(list(map(str, argv))) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (np.zeros((10, 49), np.float32), r"10 x 49 scores, but \S+ test has 10 images and 50 captions"),
        (np.zeros((0, 0), np.float32), "0 x 0 scores, but"),
        (np.zeros((0, 10, 50), np.float32), "0 x 10 x 50 scores, but"),
        (np.full((10, 50), 1e300), "scores beyond float32"),
        (np.zeros((10, 50), np.int64), "expected floating-point numbers, images x captions, found int64 of 10 x 50"),
        (np.zeros((5, 2, 10), np.float32), "5 x 2 x 10 scores, of 5 folds without .* give --fold5, or use testall.py"),
        (
            np.array({"npts": 10, "sims": 0}),
            r"if you trust it, .* python -c \"import numpy as np; np.save\('scores.npy'",
        ),
        (np.full((10, 50), np.nan, np.float32), "NaN"),
        (None, "no readable matrix"),
    ],
)
def test_a_file_that_holds_no_scores_of_the_split_is_named(data, tmp_path, capsys, content, complaint):
    path = tmp_path / "scores.npy"
    if content is not None:
        np.save(path, content)
    where = ["--data_path", data.parent, "--data_name", data.name]
    assert re.search(complaint, complaint_of(["--checkpoint", path, *where, *FLAGS], capsys))
    if complaint == "NaN":
        assert "--data_path and --data_name" in complaint_of(["--checkpoint", path, *FLAGS], capsys)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--checkpoint", "a", "--checkpoint", "b", "--rerank", "5"], "--rerank: for a single checkpoint"),
        (["--rerank", "5", "--ranks", "x"], "--ranks: needs every pair's exact score"),
        (["--rerank", "5", "--eccv"], "--eccv: needs every pair's exact score"),
    ],
)
def test_what_does_not_go_together_is_refused(flags, complaint, capsys):
    assert complaint in complaint_of(flags, capsys)


def test_models_of_different_features_cannot_be_an_ensemble(trained_run, tiny_flags, tmp_path, capsys):
    write_data(tmp_path / "small", {"train": 8, "dev": 4}, img_dim=4)
    data = ["--data_path", str(tmp_path), "--data_name", "small", "--img_dim", "4"]
    assert train.main([*tiny_flags, *data, "--model_name", str(tmp_path / "run")]) == 0
    checkpoints = ["--checkpoint", str(trained_run), "--checkpoint", str(tmp_path / "run")]
    assert re.search("features of .* but the model takes --img_dim", complaint_of([*checkpoints, *FLAGS], capsys))


@pytest.mark.parametrize("flag", ["--json", "--ranks", "--save_sims"])
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_loaded(flag, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lib.evaluation.evaluate.opened", None)
    assert complaint_of([flag, tmp_path, *FLAGS], capsys) == f"error: {tmp_path} could not be written: Is a directory"
    (tmp_path / "file").touch()
    assert str(tmp_path / "file") in complaint_of([flag, tmp_path / "file" / "results", *FLAGS], capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
