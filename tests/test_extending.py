"""Parts by name from training to evaluation: what is there, and one of each kind as docs/extending.md adds it."""

import json
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import eval as eval_program
import train
from lib import load
from lib.checkpoints.native import LAST, read_checkpoint
from lib.model import registry

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"
FLAGS = ["--device", "cpu", "--workers", "0"]
CHOICES = {
    "independent": ["--similarity", "independent"],
    "gpo": ["--similarity", "gpo"],
    "option": ["--gate", "open:start=1.2", "--loss", "ramped"],
}


@pytest.fixture
def train_with(tiny_flags, tmp_path, capsys):
    """Trains an epoch with some flags; the run folder."""

    def train_with(*flags, name="run"):
        folder = tmp_path / name
        assert train.main([*tiny_flags, "--model_name", str(folder), *flags]) == 0, capsys.readouterr().err
        return folder

    return train_with


def evaluate(run, folder, *flags):
    """The results and the scores of the test split."""
    files = ["--json", str(folder / "results.json"), "--save_sims", str(folder / "sims.npy")]
    assert eval_program.main(["--checkpoint", str(run), *files, *flags, *FLAGS]) == 0
    return json.loads((folder / "results.json").read_text()), np.load(folder / "sims.npy")


def score_from_python(run, results):
    folder = Path(results["data"])
    captions = (folder / "test_caps.txt").read_text().splitlines()
    return load(run, device="cpu").score(np.load(folder / "test_ims.npy")[::5], captions).numpy()


@pytest.mark.parametrize("choice", CHOICES)
def test_a_choice_is_trained_remembered_evaluated_and_resumed(train_with, tmp_path, choice):
    run = train_with(*CHOICES[choice])
    asked = dict(zip(CHOICES[choice][::2], CHOICES[choice][1::2], strict=True))
    similarity = read_checkpoint(run / LAST)["architecture"]["similarity"]
    assert similarity["name"] == asked.get("--similarity", "xdim")
    if gate := asked.get("--gate"):
        assert similarity["options"]["gate"] == registry.parse_part("gate", gate)
    results, scores = evaluate(run, tmp_path)
    np.testing.assert_allclose(score_from_python(run, results), scores, atol=1e-5)
    _, rounded = evaluate(run, tmp_path, "--precision", "bf16")
    assert 0 < np.abs(rounded - scores).max() < 0.1 * max(1.0, scores.std())
    assert train.main(["--resume", str(run), "--num_epochs", "2", *FLAGS]) == 0
    assert read_checkpoint(run / LAST)["progress"]["epoch"] == 2


def test_the_plain_engine_trains_and_evaluates_with_the_formula_to_the_same_model(train_with, tmp_path):
    fast, plain = train_with(name="fast"), train_with("--engine", "plain", name="plain")
    one, other = (re.findall(r"loss ([\d.]+)", (run / "run.log").read_text()) for run in (fast, plain))
    assert len(one) == 4
    assert [*map(float, one)] == pytest.approx([*map(float, other)], rel=1e-4)
    weights = [read_checkpoint(run / LAST)["model"]["image_encoder.linear.weight"] for run in (fast, plain)]
    assert not torch.equal(*weights)  # another order of additions
    _, scores = evaluate(plain, tmp_path, "--engine", "tiled")
    _, by_formula = evaluate(plain, tmp_path)  # with what it was trained with
    np.testing.assert_allclose(by_formula, scores, atol=1e-5)
    assert not np.array_equal(by_formula, scores)  # another order of additions: it was another engine


@pytest.fixture
def page(monkeypatch):
    """The page's files as modules, its lines in the registry; the commands that it gives."""
    text = PAGE.read_text()
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        if path := re.match(r'"""(\S+)\.py: ', block):
            module = types.ModuleType(path[1].replace("/", "."))
            monkeypatch.setitem(sys.modules, module.__name__, module)
            exec(block, module.__dict__)
        else:
            kind, name, place = re.fullmatch(r'(\w+)\["(\w+)"\] = "(.*)"\n', block).groups()
            monkeypatch.setitem(getattr(registry, kind), name, place)
    commands = re.findall(r"^    python train\.py (--\w+ [^#\n]*)", text, flags=re.M)
    return [command.split() for command in commands]


def test_the_pages_parts_are_trained_evaluated_and_resumed(page, train_with, tmp_path):
    flags = [flags for flags in page if flags[0] not in ("--engine", "--bert")]
    assert {flag for flag, _ in flags} == {"--similarity", "--gate", "--loss", "--image_encoder", "--text_encoder"}
    for number, part in enumerate(flags):
        run = train_with(*part, name=f"run{number}")
        results, scores = evaluate(run, tmp_path)
        np.testing.assert_allclose(score_from_python(run, results), scores, atol=1e-5)
        assert train.main(["--resume", str(run), "--num_epochs", "2", *FLAGS]) == 0
