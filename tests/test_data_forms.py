"""One data set in each form that it can be stored in: the same training and the same evaluation; and varying numbers of
regions and captions, against the formulas."""

import json
import re
import shutil

import numpy as np
import pytest
import torch

import eval as eval_program
import train
from lib.checkpoints.native import build_model, read_checkpoint
from lib.config import EvaluationSettings
from lib.data.batches import EpochBatches
from lib.data.dataset import open_split
from lib.evaluation.evaluate import evaluate
from lib.model.xdim import score_caption
from tests.conftest import write_data

SPLITS = ("train", "dev", "test", "testall")
FLAGS = ["--device", "cpu", "--workers", "0", "--batch_size", "7"]


def restore(source, folder, change):
    """A copy of a data set whose feature files a function has changed."""
    shutil.copytree(source, folder)
    for split in SPLITS:
        change(folder, split, np.load(folder / f"{split}_ims.npy"))
    return folder


def by_offsets(folder, split, features):
    np.save(folder / f"{split}_ims.npy", features.reshape(-1, features.shape[2]))
    np.save(folder / f"{split}_offsets.npy", np.arange(len(features) + 1) * features.shape[1])


def five_times(folder, split, features):
    np.save(folder / f"{split}_ims.npy", features.repeat(5, axis=0))


def halved(folder, split, features):
    np.save(folder / f"{split}_ims.npy", features.astype(np.float16))


def rounded(folder, split, features):
    np.save(folder / f"{split}_ims.npy", features.astype(np.float16).astype(np.float32))


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    """The folder of a data set by the form it is in."""
    root = tmp_path_factory.mktemp("forms")
    plain = write_data(root / "plain", repeats=())
    changes = {"by_offsets": by_offsets, "five_times": five_times, "halved": halved, "rounded": rounded}
    return {"plain": plain, **{name: restore(plain, root / name, change) for name, change in changes.items()}}


@pytest.fixture(scope="module")
def outcome(forms, tiny_flags, tmp_path_factory):
    """What training on a form, and evaluating, gives: losses, weights and scores of testall."""
    done = {}

    def run(form, precision="fp32"):
        if (form, precision) not in done:
            folder = tmp_path_factory.mktemp("runs") / form
            data = ["--data_path", str(forms[form].parent), "--data_name", form]
            flags = [*tiny_flags, *data, "--model_name", str(folder), "--log_step", "1", "--precision", precision]
            assert train.main(flags) == 0
            losses = re.findall(r"step \d+ loss ([\d.]+)", (folder / "run.log").read_text())
            results = evaluate(
                EvaluationSettings(
                    **{"checkpoint": (str(folder),), "split": "testall", "fold5": True, "device": "cpu", "workers": 0},
                    **{"precision": precision, "save_sims": str(folder / "sims.npy")},
                )
            )
            recalls = {name: results[name] for name in ("i2t", "t2i", "rsum", "folds", "full")}
            weights = read_checkpoint(folder / "last.pt")["model"]
            done[form, precision] = losses, weights, np.load(folder / "sims.npy"), recalls
        return done[form, precision]

    return run


def assert_equal(outcome, other):
    assert outcome[0] == other[0]
    assert len(outcome[0]) == 15
    assert all(torch.equal(weight, other[1][name]) for name, weight in outcome[1].items())
    assert np.array_equal(outcome[2], other[2])
    assert outcome[3] == other[3]


@pytest.mark.parametrize("form", ["by_offsets", "five_times"])
def test_how_images_are_stored_changes_no_bit_of_losses_weights_scores_and_recalls(outcome, form):
    assert_equal(outcome(form), outcome("plain"))


def test_float16_gives_to_the_bit_what_the_same_numbers_give_in_float32(outcome):
    assert_equal(outcome("halved"), outcome("rounded"))


def test_float16_changes_losses_and_scores_by_no_more_than_rounding_does(outcome):
    """Features of about 1 are rounded by up to 5e-4, and 15 steps of learning add to that."""
    halved, plain = outcome("halved"), outcome("plain")
    assert halved[0] != plain[0]
    np.testing.assert_allclose(np.float64(halved[0]), np.float64(plain[0]), rtol=2e-3)
    np.testing.assert_allclose(halved[2], plain[2], atol=1e-2)
    assert abs(halved[2] - plain[2]).mean() < 1e-3


def test_where_products_are_rounded_anyway_float16_changes_no_bit(outcome):
    assert_equal(outcome("halved", "bf16"), outcome("plain", "bf16"))


# Varying numbers of regions and captions


def write_varying(folder):
    rng = np.random.default_rng(0)
    folder.mkdir()
    for split, images in (("train", 40), ("dev", 15), ("test", 15), ("testall", 20)):
        counts, captions = rng.integers(1, 9, size=images), rng.integers(1, 8, size=images)
        captions[: images // 5] = 3
        features = rng.standard_normal((counts.sum(), 16)).astype(np.float32)
        np.save(folder / f"{split}_ims.npy", features)
        np.save(folder / f"{split}_offsets.npy", np.cumsum([0, *counts]))
        words = ["man", "dog", "ball", "park", "bench", "red", "black"]
        lines = [" ".join([*rng.choice(words, size=rng.integers(1, 9)), *str(k)]) for k in range(captions.sum())]
        (folder / f"{split}_caps.txt").write_text("".join(f"{line}\n" for line in lines))
        (folder / f"{split}_caps_counts.txt").write_text("".join(f"{count}\n" for count in captions))
    return folder


@pytest.fixture(scope="module")
def varying(tmp_path_factory):
    return write_varying(tmp_path_factory.mktemp("varying") / "own_precomp")


@pytest.fixture(scope="module")
def varying_run(varying, tiny_flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "varying"
    data = ["--data_path", str(varying.parent), "--data_name", varying.name, "--batch_size", "8"]
    assert train.main([*tiny_flags, *data, "--model_name", str(folder), "--log_step", "1"]) == 0
    return folder


def oracle_scores(model, images, captions):
    """Scores of images (r, img_dim) and captions (ids), one pair at a time."""
    D, temperature = model.similarity.dependency(), model.similarity.log_temperature.exp()
    words = [model.encode_captions(ids[None], torch.tensor([len(ids)])) for ids in captions]
    scores = [torch.cat([score_caption(image[None], word, D, temperature) for word in words]) for image in images]
    return torch.stack(scores)


def test_training_on_varying_numbers_says_that_it_masks_and_scores_as_the_formulas_do(varying, varying_run):
    assert "regions     1 to 8 of an image; padding is masked" in (varying_run / "run.log").read_text()
    model, tokenizer = build_model(read_checkpoint(varying_run / "last.pt"))
    assert not read_checkpoint(varying_run / "last.pt")["architecture"]["mask_padding"]  # the flag was not given
    model.image_encoder.mask_padding = True
    model.train()
    model.text_encoder.backbone.eval()
    split = open_split(str(varying.parent), varying.name, "train", 16)
    features, counts, ids, lengths = EpochBatches(split, tokenizer.tokenize(split.captions), tokenizer, 8, 0, 0)[0]
    assert len(set(counts.tolist())) > 2
    with torch.no_grad():
        actual = model(features, counts, ids, lengths)
        regions = model.image_encoder.embed(features).split(counts.tolist())
        expected = oracle_scores(model, regions, [one[:n] for one, n in zip(ids, lengths, strict=True)])
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def evaluated(varying_run):
    written = varying_run / "sims.npy", varying_run / "results.json"
    flags = ["--checkpoint", str(varying_run), "--split", "testall", "--fold5", *FLAGS]
    assert eval_program.main([*flags, "--save_sims", str(written[0]), "--json", str(written[1])]) == 0
    return np.load(written[0]), json.loads(written[1].read_text())


def test_scores_of_varying_numbers_equal_the_formulas(varying, varying_run, evaluated):
    model, tokenizer = build_model(read_checkpoint(varying_run / "model_best.pt"))
    model.eval()
    features = torch.from_numpy(np.load(varying / "testall_ims.npy"))
    counts = np.diff(np.load(varying / "testall_offsets.npy")).tolist()
    captions = (varying / "testall_caps.txt").read_text().splitlines()
    ids = [torch.from_numpy(tokenizer.pad(tokenizer.tokenize([caption]))[0][0]) for caption in captions]
    with torch.no_grad():
        expected = oracle_scores(model, [model.image_encoder.embed(image) for image in features.split(counts)], ids)
    np.testing.assert_allclose(evaluated[0], expected, atol=1e-5)


def best_ranks(scores, image_of_caption):
    i2t = [
        min(list(np.argsort(-row, kind="stable")).index(true) for true in np.flatnonzero(image_of_caption == image))
        for image, row in enumerate(scores)
    ]
    t2i = [list(np.argsort(-column, kind="stable")).index(image_of_caption[k]) for k, column in enumerate(scores.T)]
    return i2t, t2i


def test_recalls_of_varying_numbers_of_captions_equal_a_plain_sort(varying, evaluated):
    scores, results = evaluated
    counts = np.loadtxt(varying / "testall_caps_counts.txt", dtype=int)
    assert len(set(counts)) > 3
    image_of_caption = np.repeat(np.arange(20), counts)
    rounds = [(slice(0, 20), slice(0, len(image_of_caption)))]
    edges = np.cumsum([0, *counts])
    rounds += [(slice(4 * k, 4 * k + 4), slice(edges[4 * k], edges[4 * k + 4])) for k in range(5)]
    for (images, captions), metrics in zip(rounds, [results["full"], *results["folds"]], strict=True):
        ranks = best_ranks(scores[images, captions], image_of_caption[captions] - images.start)
        for way, of_way in zip(("i2t", "t2i"), ranks, strict=True):
            for k in (1, 5, 10):
                assert metrics[way][f"r{k}"] == pytest.approx(100 * np.mean(np.array(of_way) < k))


def test_coarse_to_fine_reaches_the_exact_recalls_on_varying_numbers(varying_run, evaluated, tmp_path):
    flags = ["--checkpoint", str(varying_run), "--split", "testall", "--fold5", *FLAGS]
    assert eval_program.main([*flags, "--rerank", "1000", "--json", str(tmp_path / "rerank.json")]) == 0
    results = json.loads((tmp_path / "rerank.json").read_text())
    for name in ("i2t", "t2i", "rsum", "folds", "full"):
        assert results[name] == evaluated[1][name]


def test_a_list_of_images_with_different_numbers_of_regions_is_scored_from_python(varying, varying_run, evaluated):
    from lib import load

    features = torch.from_numpy(np.load(varying / "testall_ims.npy"))
    counts = np.diff(np.load(varying / "testall_offsets.npy")).tolist()
    captions = (varying / "testall_caps.txt").read_text().splitlines()
    scores = load(varying_run, device="cpu").score(list(features.split(counts)), captions)
    np.testing.assert_allclose(scores, evaluated[0], atol=1e-5)


def test_resuming_on_varying_numbers_equals_no_interruption(varying, varying_run, tiny_flags, tmp_path):
    data = ["--data_path", str(varying.parent), "--data_name", varying.name, "--batch_size", "8"]
    flags = [*tiny_flags, *data, "--model_name", str(tmp_path / "run"), "--log_step", "1"]
    assert train.main([*flags, "--save_steps", "7"]) == 0
    for name in ("last.pt", "model_best.pt"):
        (tmp_path / "run" / name).unlink()
    steps = sorted((tmp_path / "run").glob("step-*.pt"))
    for path in steps[1:]:
        path.unlink()
    assert train.main(["--resume", str(steps[0])]) == 0
    weights, expected = (read_checkpoint(folder / "last.pt")["model"] for folder in (tmp_path / "run", varying_run))
    assert all(torch.equal(weight, expected[name]) for name, weight in weights.items())
