"""--similarity and --gate from training to evaluation, and one of one's own as docs/similarities.md adds it."""

import json
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import convert
import eval as eval_program
import train
from lib import load
from lib.checkpoints.native import read_checkpoint
from lib.model import similarities
from tests.conftest import TINY_BERT

PAGE = Path(__file__).parents[1] / "docs" / "similarities.md"
FLAGS = ["--device", "cpu", "--workers", "0"]
CHOICES = [
    ("independent", "adaptive"),
    ("gpo", "adaptive"),
    ("xdim", "open"),
    ("xdim", "fixed"),
    ("xdim", "dense"),
    ("xdim", "diagonal"),
]


@pytest.fixture
def train_with(tiny_flags, tmp_path, capsys):
    """Trains an epoch with some flags; the run folder."""

    def train_with(*flags, name="run"):
        folder = tmp_path / name
        assert train.main([*tiny_flags, "--model_name", str(folder), *flags]) == 0, capsys.readouterr().err
        return folder

    return train_with


def results_of(run, folder, *flags):
    files = ["--json", str(folder / "results.json"), "--save_sims", str(folder / "sims.npy")]
    assert eval_program.main(["--checkpoint", str(run), *files, *flags, *FLAGS]) == 0
    return json.loads((folder / "results.json").read_text()), np.load(folder / "sims.npy")


@pytest.mark.parametrize(("name", "gate"), CHOICES)
def test_a_choice_is_trained_kept_resumed_and_evaluated(train_with, tmp_path, name, gate):
    run = train_with("--similarity", name, "--gate", gate)
    content = read_checkpoint(run / "last.pt")
    assert (content["architecture"]["similarity"], content["architecture"]["gate"]) == (name, gate)
    results, scores = results_of(run, tmp_path)
    assert 0 <= results["rsum"] <= 600
    assert results["row"] == (name if name != "xdim" else f"X-Dim, {gate} gate")
    folder = Path(results["data"])
    captions = (folder / "test_caps.txt").read_text().splitlines()
    again = load(run, device="cpu").score(np.load(folder / "test_ims.npy")[::5], captions)
    np.testing.assert_allclose(again, scores, atol=1e-5)
    assert train.main(["--resume", str(run), "--num_epochs", "2", *FLAGS]) == 0
    assert read_checkpoint(run / "last.pt")["progress"]["epoch"] == 2


def test_two_epochs_are_those_of_one_that_is_resumed(train_with):
    whole = train_with("--similarity", "gpo", "--num_epochs", "2", name="whole")
    half = train_with("--similarity", "gpo", name="half")
    assert train.main(["--resume", str(half), "--num_epochs", "2", *FLAGS]) == 0
    one, other = (read_checkpoint(run / "last.pt")["model"] for run in (whole, half))
    assert all(np.array_equal(one[name].numpy(), other[name].numpy()) for name in one)


@pytest.mark.parametrize("flags", [["--max_violation"], ["--precision", "bf16"], ["--max_violation", "--mask_padding"]])
def test_every_choice_is_trained_in_any_way(train_with, flags):
    for number, (name, gate) in enumerate(CHOICES):
        train_with("--similarity", name, "--gate", gate, *flags, name=f"run{number}")


def test_bfloat16_scores_stay_near_float32(train_with, tmp_path):
    for number, (name, gate) in enumerate(CHOICES):
        run = train_with("--similarity", name, "--gate", gate, name=f"run{number}")
        exact, rounded = (results_of(run, tmp_path, "--precision", precision)[1] for precision in ("fp32", "bf16"))
        assert 0 < np.abs(rounded - exact).max() < 0.1 * max(1.0, exact.std())


def test_vectors_that_are_pooled_are_not_normalised_before(train_with):
    pooled, attended = (load(train_with("--similarity", name, name=name)) for name in ("gpo", "independent"))
    assert not pooled.model.image_encoder.normalize
    assert not pooled.model.text_encoder.normalize
    assert attended.model.image_encoder.normalize


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--similarity", "cosine"], "--similarity cosine: expected xdim, independent, gpo"),
        (["--gate", "ajar"], "--gate ajar: expected adaptive, open, fixed, dense, diagonal"),
        (["--similarity", "gpo", "--gate", "dense"], "--gate dense: --similarity gpo has no gate"),
    ],
)
def test_what_is_not_there_is_refused(tiny_flags, tmp_path, capsys, flags, complaint):
    assert train.main([*tiny_flags, "--model_name", str(tmp_path / "run"), *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert complaint in line


def test_the_published_form_holds_what_the_published_code_knows(train_with, tmp_path, capsys):
    run = train_with("--gate", "diagonal")
    assert convert.main([str(run), str(tmp_path / "out.pth.tar")]) == 2
    assert "the published code does not know --gate diagonal" in capsys.readouterr().err
    assert convert.main([str(run), str(tmp_path / "out")]) == 0
    assert read_checkpoint(tmp_path / "out")["architecture"]["gate"] == "diagonal"


@pytest.mark.parametrize("gate", ["open", "fixed"])
def test_gates_that_differ_in_training_only_are_published_as_the_papers(train_with, tiny_data, tmp_path, gate):
    run = train_with("--gate", gate)
    assert convert.main([str(run), str(tmp_path / "out.pth.tar")]) == 0
    places = ["--data_path", tiny_data[0], "--data_name", tiny_data[1], "--bert", str(TINY_BERT)]
    assert read_checkpoint(tmp_path / "out.pth.tar")["architecture"]["gate"] == "adaptive"
    scores = [results_of(of, tmp_path, *more)[1] for of, more in ((run, []), (tmp_path / "out.pth.tar", places))]
    np.testing.assert_array_equal(*scores)


@pytest.fixture
def own_similarity(monkeypatch):
    """The page's example, as if it were in its file and its line in the registry."""
    file, line = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    module = types.ModuleType("lib.model.mean")
    exec(file, module.__dict__)
    monkeypatch.setitem(sys.modules, "lib.model.mean", module)
    monkeypatch.setattr(similarities, "SIMILARITIES", similarities.SIMILARITIES)
    before = dict(similarities.SIMILARITIES)
    exec(line, {"SIMILARITIES": similarities.SIMILARITIES})
    yield
    similarities.SIMILARITIES.clear()
    similarities.SIMILARITIES.update(before)


def test_a_similarity_of_ones_own_is_trained_and_evaluated_as_the_page_says(own_similarity, train_with, tmp_path):
    run = train_with("--similarity", "mean")
    _, scores = results_of(run, tmp_path)
    matcher, folder = load(run, device="cpu"), Path(read_checkpoint(run / "last.pt")["settings"]["data_path"])
    features = np.load(next(folder.glob("*/test_ims.npy")))[::5]
    assert scores.shape == (10, 50)
    assert np.abs(scores).max() <= 1 + 1e-6
    np.testing.assert_allclose(matcher.score(features, ["a dog"])[:, 0], score_by_means(matcher, features), atol=1e-5)


def score_by_means(matcher, features):
    with torch.no_grad():
        ids, lengths = map(torch.from_numpy, matcher.tokenizer.pad(matcher.tokenizer.tokenize(["a dog"])))
        word = matcher.model.encode_captions(ids, lengths).mean(dim=0)
        regions = [matcher.model.encode_images(torch.from_numpy(image)).mean(dim=0) for image in features]
        return torch.stack([torch.cosine_similarity(one, word, dim=0) for one in regions]).numpy()


def test_checkpoints_from_before_there_was_a_choice_are_xdims(trained_run, tmp_path):
    content = torch.load(trained_run / "last.pt", weights_only=True)
    for name in ("similarity", "gate"):
        del content["architecture"][name], content["settings"][name]
    torch.save(content, tmp_path / "old.pt")
    assert read_checkpoint(tmp_path / "old.pt")["architecture"]["similarity"] == "xdim"
    assert eval_program.main(["--checkpoint", str(tmp_path / "old.pt"), "--bert", str(TINY_BERT), *FLAGS]) == 0
