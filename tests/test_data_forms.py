"""A data set in each form that it can be stored in gives the same training and evaluation; images may have any number
of regions and captions."""

import json

import numpy as np
import pytest
import torch

import eval as eval_program
import train
from lib import load
from lib.checkpoints.native import BEST, LAST, read_checkpoint
from lib.checkpoints.record import read_record
from tests.conftest import write_data, write_varying_data

# How each form stores an image's features, of shape (images, regions, img_dim)
FORMS = {
    "plain": lambda features: features,
    "packed": lambda features: features.reshape(-1, features.shape[2]),
    "five_times": lambda features: features.repeat(5, axis=0),
    "halved": lambda features: features.astype(np.float16),
    "rounded": lambda features: features.astype(np.float16).astype(np.float32),
}


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    """A folder with one data set in each form."""
    root = tmp_path_factory.mktemp("forms")
    for name, change in FORMS.items():
        folder = write_data(root / name, repeats=())
        for path in folder.glob("*_ims.npy"):
            features = np.load(path)
            np.save(path, change(features))
            if name == "packed":
                np.save(str(path).replace("_ims", "_offsets"), np.arange(len(features) + 1) * features.shape[1])
    return root


def weights_of(run):
    return torch.load(run / "last.pt", weights_only=True)["model"]


def evaluate(run, *flags):
    """Scores and metrics of testall."""
    written = run / "sims.npy", run / "results.json"
    flags = ["--checkpoint", str(run), "--split", "testall", "--fold5", "--device", "cpu", "--workers", "0", *flags]
    assert eval_program.main([*flags, "--save_sims", str(written[0]), "--json", str(written[1])]) == 0
    results = json.loads(written[1].read_text())
    return np.load(written[0]), {name: results[name] for name in ("i2t", "t2i", "rsum", "folds", "full")}


@pytest.fixture(scope="module")
def outcome(forms, tiny_flags, tmp_path_factory):
    """What training on a form and evaluating give: weights, scores, metrics."""
    done = {}

    def run(form, precision):
        if (form, precision) not in done:
            folder = tmp_path_factory.mktemp("runs") / form
            data = ["--data_path", str(forms), "--data_name", form, "--precision", precision]
            assert train.main([*tiny_flags, *data, "--model_name", str(folder)]) == 0
            done[form, precision] = weights_of(folder), *evaluate(folder, "--precision", precision)
        return done[form, precision]

    return run


@pytest.mark.parametrize(
    ("form", "same", "precision"),
    [
        ("packed", "plain", "fp32"),
        ("five_times", "plain", "fp32"),
        ("halved", "rounded", "fp32"),
        ("halved", "plain", "bf16"),  # which rounds more than float16 does
    ],
)
def test_how_features_are_stored_changes_no_bit_of_weights_scores_and_metrics(outcome, form, same, precision):
    weights, scores, metrics = outcome(form, precision)
    expected = outcome(same, precision)
    assert all(torch.equal(weight, expected[0][name]) for name, weight in weights.items())
    assert np.array_equal(scores, expected[1])
    assert metrics == expected[2]


# Varying numbers of regions and captions


@pytest.fixture(scope="module")
def varying(tmp_path_factory):
    images = {"train": 40, "dev": 15, "test": 15, "testall": 20}
    return write_varying_data(tmp_path_factory.mktemp("varying") / "own_precomp", images)


@pytest.fixture(scope="module")
def varying_run(varying, tiny_flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "varying"
    flags = [*tiny_flags, "--data_path", str(varying.parent), "--data_name", varying.name]
    assert train.main([*flags, "--model_name", str(folder)]) == 0
    return folder


def test_scores_are_those_of_each_image_alone(varying, varying_run):
    evaluated, _ = evaluate(varying_run)
    offsets = np.load(varying / "testall_offsets.npy")
    images = np.split(np.load(varying / "testall_ims.npy"), offsets[1:-1])
    captions = (varying / "testall_caps.txt").read_text().splitlines()
    matcher = load(varying_run, device="cpu")
    np.testing.assert_allclose(matcher.score(images, captions), evaluated, atol=1e-5)
    for image, scores in zip(images, evaluated, strict=True):  # without any padding
        np.testing.assert_allclose(matcher.score([image], captions)[0], scores, atol=1e-5)


def test_checkpoint_and_record_say_that_padding_is_masked_where_numbers_of_regions_vary(varying_run):
    for name in (LAST, BEST):
        content = read_checkpoint(varying_run / name)
        assert content["architecture"]["image_encoder"]["options"]["mask_padding"]
        assert content["settings"]["mask_padding"]
    assert read_record(varying_run)["settings"]["mask_padding"]
    assert "regions     1 to 8 of an image; padding is masked" in (varying_run / "run.log").read_text()
