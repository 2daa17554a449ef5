"""To the Hugging Face hub and back: what is sent is the model and nothing of this machine, and names load as paths do.

The hub is an imitation, tests/hub.py.
"""

import json
import shlex
import shutil
import socket
from pathlib import Path

import huggingface_hub
import pytest
import torch

import convert
import eval as eval_program
import share
import train
from lib import load
from lib.checkpoints.native import BEST, find_checkpoint, read_checkpoint
from lib.checkpoints.record import read_record
from lib.config import TrainSettings, parse
from lib.evaluation.report import describe_source
from lib.model import backbone
from tests.conftest import ROOT, TINY_BERT, write_data
from tests.hub import TOKEN, Hub

USER, NAME = "quentin.mueller", "mueller/xdim-mine"
REGIONS = torch.randn(3, 6, 16, generator=torch.Generator().manual_seed(0))
ENCODER = {"encoder": "hf:/home/quentin.mueller/vit", "weights": "0123456789abcdef", "regions": 5, "whole": True}
ENCODER |= {"weights_file": "/home/quentin.mueller/w.pth", "folder": "/home/quentin.mueller/photos", "width": 16}
ENCODER |= {"preprocessing": {"size": [224, 224]}, "categories": []}


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_flags) -> Path:
    """A run with a test evaluation, in a user's folder, as all that it was made from."""
    home = tmp_path_factory.mktemp("home") / USER
    write_data(home / "pictures")
    (home / "pictures" / "encoder.json").write_text(json.dumps(ENCODER))
    shutil.copytree(TINY_BERT, home / "bert")
    flags = ["--data_path", home, "--data_name", "pictures", "--bert", home / "bert", "--logger_name", home / "logs"]
    assert train.main([*tiny_flags, *map(str, flags), "--loss", "ramped", "--model_name", str(home / "run")]) == 0
    assert eval_program.main([str(home / "run"), "--json", str(home / "run" / "test.json"), "--workers", "0"]) == 0
    return home / "run"


@pytest.fixture(scope="module")
def written(run, tmp_path_factory) -> Path:
    """The folder of a dry run."""
    folder = tmp_path_factory.mktemp("dry") / "written"
    assert share.main(["push", str(run), NAME, "--licence", "mit", "--dry_run", str(folder)]) == 0
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The imitation, which huggingface_hub takes for the hub, with an empty cache and a token."""
    hub, constants = Hub().start(), huggingface_hub.constants
    use(hub.url, monkeypatch)
    for name, value in {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": False}.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield hub
    hub.stop()


def use(url, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )


@pytest.fixture
def refusal(capfd):
    """The one line with which a program refuses its arguments."""

    def call(program, *arguments):
        capfd.readouterr()
        assert program.main([str(one) for one in arguments]) == 2
        line = capfd.readouterr().err
        assert line.startswith("error: ")
        assert line.count("\n") == 1
        return line

    return call


def score(checkpoint):
    return load(checkpoint, device="cpu").score(REGIONS, ["a dog near the park", "two men"])


def test_what_is_sent_loads_back_equal_to_the_bit_and_names_no_folder_nor_user(run, written):
    files = {path.name: path.read_bytes() for path in written.iterdir()}
    assert sorted(files) == ["README.md", "config.json", BEST, "tokenizer.json"]
    for secret in (USER, "/home", str(run.parents[1]), str(Path.home()), str(ROOT)):
        assert [name for name, data in files.items() if secret.encode() in data] == []
    sent, own = (read_checkpoint(find_checkpoint(str(folder))) for folder in (written, run))
    assert sent["model"].keys() == own["model"].keys()
    assert all(torch.equal(weight, own["model"][name]) for name, weight in sent["model"].items())
    assert torch.equal(score(written), score(run))
    assert [sent["data"]["train"]["encoder"][name] for name in ("weights_file", "folder")] == ["", ""]
    config = json.loads(files["config.json"])
    assert config["architecture"] == sent["architecture"]
    assert (config["regions_by"]["encoder"], config["regions_by"]["weights"]) == ("hf:vit", ENCODER["weights"])
    assert files["tokenizer.json"].decode() == own["tokenizer"]


def test_the_model_card_holds_the_records_figures_and_its_command_gives_the_runs_settings(run, written):
    card, record = huggingface_hub.ModelCard.load(written / "README.md"), read_record(run)
    about = (card.data.license, card.data.library_name, card.data.pipeline_tag, card.data.tags[0])
    assert about == ("mit", "x-dim", "zero-shot-image-classification", "x-dim")
    test = json.loads((run / "test.json").read_text())
    dev = record["history"][record["chosen"]["epoch"] - 1]["dev"]
    figures = [
        *(f"{dev[way]['r1']:.1f}" for way in ("i2t", "t2i")),
        f"{test['rsum']:.1f}",
        record["data"]["dev"]["fingerprint"],
    ]
    figures += [f"{end:.1f}" for end in test["interval"]["rsum"]]
    for figure in (*figures, f'load("{NAME}")', "hf:vit", "| train | 24 | 120 |", "10.1145/3581783.3611703"):
        assert figure in card.text
    (command,) = [line for line in card.text.splitlines() if line.startswith("    python train.py")]
    settings = vars(parse(TrainSettings, "", shlex.split(command)[2:]))
    elsewhere = {"data_path": "data", "bert": "bert", "model_name": "runs/pictures", "logger_name": "runs/pictures"}
    assert settings == record["settings"] | elsewhere


def test_a_pushed_model_loads_by_its_name_pinned_and_once(run, written, hub, monkeypatch, capsys):
    assert share.main(["push", str(run), NAME, "--licence", "mit", "--private"]) == 0
    (_, _), (commit, files) = hub.repos[NAME]
    assert files.keys() - {".gitattributes"} == {path.name for path in written.iterdir()}
    for name in ("README.md", "config.json", "tokenizer.json"):
        assert files[name] == (written / name).read_bytes()
    assert hub.private[NAME]
    assert USER.encode() not in b"".join(hub.bodies)
    out = capsys.readouterr().out
    assert f"sending to {hub.url}/{NAME}, private\n" in out
    assert f" MB  {BEST}\n" in out
    assert f'load("{NAME}@{commit}")' in out
    assert torch.equal(score(NAME), score(run))
    assert f"{NAME}@{commit}: 0.1 MB are fetched from {hub.url}" in capsys.readouterr().out
    newer = hub.commit(NAME, {"README.md": b"edited"})
    content = read_checkpoint(find_checkpoint(NAME))
    assert describe_source("", content, "checkpoint").startswith(f"checkpoint  {NAME}@{newer}, 1 epochs")
    hub.requests.clear()
    assert read_checkpoint(find_checkpoint(f"{NAME}@{commit}"))["path"] == f"{NAME}@{commit}"
    assert hub.requests == []  # a commit does not change
    hub.stop()
    capsys.readouterr()
    assert torch.equal(score(NAME), score(run))
    assert f"{NAME}@{newer}: as fetched before, without the Hugging Face hub (" in capsys.readouterr().out
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(score(f"{NAME}@main"), score(run))


def test_a_path_comes_before_a_name_of_the_hub(hub, run, refusal, tmp_path, monkeypatch):
    hub.commit(NAME, {BEST: b"another"})
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run, NAME)
    assert find_checkpoint(NAME) == Path(NAME) / BEST
    assert "mueller/typo: no such checkpoint" in refusal(convert, "mueller/typo", "out.safetensors")
    assert "runs/a.safetensors: no such checkpoint" in refusal(convert, "runs/a.safetensors", "out.safetensors")
    assert hub.requests == []


def test_names_that_give_no_model_are_refused_in_a_line(hub, written, refusal, tmp_path, monkeypatch):
    damaged = bytearray((written / BEST).read_bytes())
    damaged[-1] ^= 1
    hub.commit("mueller/published", {"model.pth.tar": b"", "config.json": b"{}"})
    hub.commit("mueller/damaged", {BEST: bytes(damaged)})
    nowhere = "no such file or folder here, nor had from the Hugging Face hub"

    def refused(name):
        return refusal(convert, name, tmp_path / "out.safetensors").removeprefix(f"error: {name}: ")

    assert refused("mueller/published").startswith("not a model of this project, there is no model_best.safetensors")
    assert "damaged, or not a checkpoint (its checksum is wrong)" in refused("mueller/damaged")
    assert refused("mueller/nothing").startswith(f"{nowhere} (no such model, or one that needs a token")
    assert refused("mueller/damaged@v2") == f"{nowhere} (no such revision)\n"
    assert refused("mueller/a--b") == f"{nowhere} (Cannot have -- or .)\n"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        use(f"http://127.0.0.1:{silent.getsockname()[1]}", monkeypatch)
        monkeypatch.setattr(backbone, "HUB_SECONDS", 0.2)
        assert refused("mueller/other") == f"{nowhere} (TimeoutError)\n"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert refused("mueller/other") == f"{nowhere} (HF_HUB_OFFLINE is set)\n"


def test_nothing_is_sent_where_it_cannot_or_should_not_be(hub, run, refusal, tmp_path, monkeypatch):
    hub.commit(NAME, {"README.md": b""})
    hub.commit("mueller/bert", {"model.safetensors": b""})
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    shutil.copy(run / "last.pt", unfinished)

    def refused(*arguments):
        return refusal(share, "push", *arguments).removeprefix(f"error: {arguments[1]}: ")

    assert "no epoch has ended" in refused(unfinished, NAME)
    assert "a state of training; name the run folder" in refused(unfinished / "last.pt", NAME)
    assert refused(run, "mine").startswith("expected OWNER/NAME")
    assert refused(run, NAME, "--private").startswith("is public already")
    assert refused(run, "mueller/bert").startswith("holds something else (model.safetensors)")
    assert "is already there" in refused(run, NAME, "--dry_run", run)
    monkeypatch.setenv("HF_TOKEN", "another")
    assert refused(run, NAME) == f"{hub.url} does not answer, or refuses (Invalid user token)\n"
    monkeypatch.delenv("HF_TOKEN")
    assert refused(run, NAME).startswith("the Hugging Face hub wants a token: hf auth login, or HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.stop()
    assert refused(run, NAME).startswith(f"{hub.url} does not answer")
    assert len(hub.repos[NAME]) == len(hub.repos["mueller/bert"]) == 1
