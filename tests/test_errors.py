"""Wrong input to the programs: exit code 2 and one line on stderr that names the file or flag, never a traceback."""

import argparse
import gc
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import eval as eval_program
import test as test_program
import testall as testall_program
import train as train_program
from lib.bert import build_bert, plain, read_config
from lib.checkpoints.native import BEST, LAST, read_checkpoint
from lib.cli import QUOTED, InputError, reason
from tests.conftest import GOLDEN, TINY_BERT

pytestmark = pytest.mark.filterwarnings("error::UserWarning")  # a warning would be a second line

PROGRAMS = {"train": train_program, "test": test_program, "testall": testall_program, "eval": eval_program}
PUBLISHED = GOLDEN / "official_format_checkpoint.pth.tar"


@pytest.fixture
def refusal(capfd):
    """Calls a program with flags that it must refuse; returns the line that it says."""

    def call(program, *flags):
        capfd.readouterr()
        try:
            code = PROGRAMS[program].main([str(flag) for flag in flags])
        except SystemExit as stopped:
            code = stopped.code
        said = capfd.readouterr().err
        assert code == 2, said
        assert len(said.splitlines()) == said.count("\n") == 1, said
        return said

    return call


@pytest.fixture
def refused_training(refusal, tiny_flags, tmp_path):
    """Starts a new training with further flags that must be refused."""
    return lambda *flags: refusal("train", *tiny_flags, "--model_name", tmp_path / "new_run", *flags)


@pytest.fixture
def refused_evaluation(refusal, trained_run):
    """Evaluates a trained checkpoint with further flags that must be refused."""
    return lambda *flags: refusal("eval", "--checkpoint", trained_run, "--device", "cpu", "--workers", "0", *flags)


@pytest.fixture
def altered(trained_run, tmp_path):
    """Writes a copy of a trained checkpoint whose content a function has changed."""

    def write(change):
        content = torch.load(trained_run / LAST, weights_only=True)
        change(content)
        torch.save(content, tmp_path / "altered.pt")
        return tmp_path / "altered.pt"

    return write


# Data


def test_no_data_set_is_one_line_in_the_terminal(tmp_path):
    program = Path(train_program.__file__)
    command = [sys.executable, program.name, "--data_path", str(tmp_path)]
    done = subprocess.run(command, cwd=program.parent, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: no data set at {tmp_path / 'f30k_precomp'}")
    assert done.stderr.count("\n") == 1
    assert "train_demo.sh" in done.stderr


def test_no_data_set_in_the_usual_place(refusal, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = refusal("train")
    for part in ("data/f30k_precomp", "train_ims.npy", "usually obtained", "train_demo.sh"):
        assert part in said


def rewrite(path, change):
    lines = path.read_bytes().splitlines()
    change(lines)
    path.write_bytes(b"\n".join(lines) + b"\n")


def truncate(features, captions):
    features.write_bytes(features.read_bytes()[:-100])


def resize(features, captions):
    np.save(features, np.load(features)[:, :, :15])


def spoil(features, captions):
    rows = np.load(features)
    rows[15] = np.nan
    np.save(features, rows)


DAMAGES = {  # how, the file to blame, what is said of it
    "missing features": (lambda features, captions: features.unlink(), "ims.npy", "is missing"),
    "missing captions": (lambda features, captions: captions.unlink(), "caps.txt", "is missing"),
    "truncated": (truncate, "ims.npy", "truncated"),
    "empty features": (lambda features, captions: features.write_bytes(b""), "ims.npy", "truncated"),
    "too few captions": (lambda features, captions: rewrite(captions, list.pop), "caps.txt", "captions do not fit"),
    "wrong feature size": (resize, "ims.npy", "features of 15 numbers"),
    "NaN": (spoil, "ims.npy", "row 15 holds NaN"),
    "not UTF-8": (
        lambda features, captions: rewrite(captions, lambda lines: lines.__setitem__(6, b"caf\xe9")),
        "caps.txt",
        "line 7 is not UTF-8",
    ),
    "empty caption": (
        lambda features, captions: rewrite(captions, lambda lines: lines.__setitem__(6, b"")),
        "caps.txt",
        "line 7 is an empty caption",
    ),
    "no captions": (lambda features, captions: captions.write_bytes(b""), "caps.txt", "no captions"),
}


def damaged(make_data, folder, split, damage):
    """A data set with one file of a split damaged. Returns flags, that file and what must be said of it."""
    make_data(folder)
    change, ending, words = DAMAGES[damage]
    change(folder / f"{split}_ims.npy", folder / f"{split}_caps.txt")
    return ["--data_path", folder.parent, "--data_name", folder.name], folder / f"{split}_{ending}", words


@pytest.mark.parametrize("split", ["train", "dev"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_training_names_the_damaged_file(refused_training, make_data, tmp_path, damage, split):
    flags, path, words = damaged(make_data, tmp_path / "damaged", split, damage)
    said = refused_training(*flags)
    assert str(path) in said
    assert words in said


@pytest.mark.parametrize("damage", DAMAGES)
def test_evaluation_names_the_damaged_file(refused_evaluation, make_data, tmp_path, damage):
    flags, path, words = damaged(make_data, tmp_path / "damaged", "test", damage)
    said = refused_evaluation(*flags)
    assert str(path) in said
    assert words in said


@pytest.mark.parametrize("split", ["train", "dev"])
def test_a_worker_that_meets_nan_ends_the_training_with_the_same_line(
    refused_training, make_data, tmp_path, monkeypatch, split
):
    # Seconds that PyTorch waits for a worker to leave by itself, which one that met an error does not do.
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2, raising=False)
    flags, path, words = damaged(make_data, tmp_path / "damaged", split, "NaN")
    said = refused_training(*flags, "--workers", "1")
    assert said.startswith(f"error: {path}: {words}")
    gc.collect()  # the worker leaves with the loader


def test_a_split_that_is_not_there_is_named(refused_evaluation):
    assert "no_such_ims.npy is missing" in refused_evaluation("--split", "no_such")


@pytest.mark.parametrize("name", ["../tiny_precomp", "/etc", "", "a\n\x1b[2J"])
def test_names_that_lead_out_of_their_folder(refused_training, refused_evaluation, altered, refusal, name):
    assert "--data_name '" in refused_training("--data_name", name)
    assert "--split '" in refused_evaluation("--split", name)
    if name:
        assert "--data_name '" in refused_evaluation("--data_name", name)
        path = altered(lambda content: content["settings"].update(data_name=name))
        assert "--data_name '" in refusal("eval", "--checkpoint", path, "--device", "cpu")


@pytest.mark.parametrize("program", ["eval", "testall"])
def test_images_that_do_not_divide_by_five_are_refused(refusal, make_data, trained_run, tmp_path, program):
    make_data(tmp_path / "seven", images={"testall": 7})
    flags = ["--checkpoint", trained_run, "--data_path", tmp_path, "--data_name", "seven", "--device", "cpu"]
    said = refusal(program, *flags, *(["--split", "testall", "--fold5"] if program == "eval" else []))
    assert "--fold5: 7 images" in said


# Flags


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(
    "flags",
    [
        ["--no_such_flag"],
        ["--batch_size", "many"],
        ["--batch_size", "2.5"],
        ["--batch", "8"],  # no guessing from prefixes
        ["--precision", "fp8"],
        ["--workers"],
    ],
    ids=" ".join,
)
def test_flags_that_do_not_exist_or_do_not_parse(refusal, program, flags):
    assert flags[0] in refusal(program, *flags)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(("name", "value"), [("batch_size", 0), ("batch_size", -3), ("workers", -1)])
def test_values_that_no_program_takes(refusal, program, name, value):
    assert f"--{name} {value}: " in refusal(program, f"--{name}", value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 1),
        ("img_dim", 0),
        ("embed_size", 1),
        ("num_epochs", 0),
        ("log_step", 0),
        ("learning_rate", "0.0"),
        ("learning_rate", "nan"),
        ("margin", "-0.2"),
        ("margin", "nan"),
        ("grad_clip", "nan"),
        ("grad_clip", "-1.0"),
        ("lr_update", -1),
        ("vse_mean_warmup_epochs", -1),
        ("seed", -1),
        ("seed", 2**70),
    ],
)
def test_values_that_training_does_not_take(refused_training, name, value):
    assert f"--{name} {value}: " in refused_training(f"--{name}", value)


def test_a_batch_larger_than_the_data(refused_training):
    assert "--batch_size 121: larger than the 120 pairs" in refused_training("--batch_size", 121)


def test_another_feature_size_than_that_of_the_data(refused_training):
    assert "--img_dim 2048" in refused_training("--img_dim", 2048)


@pytest.mark.parametrize(
    "flags",
    [
        ["--precision", "tf32", "--device", "cpu"],
        ["--device", "nonsense"],
        ["--device", ""],
        ["--device", "meta"],
        ["--device", "cuda"],
        ["--device", "cuda:1"],
        ["--device", "cuda:999"],
    ],
    ids=" ".join,
)
def test_devices_that_are_not_there(refused_training, refused_evaluation, monkeypatch, flags):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for refused in (refused_training, refused_evaluation):
        assert " ".join(flags[:2]) in refused(*flags)


# BERT


@pytest.fixture
def bert(tmp_path):
    """A BERT folder that is sound but for its weights, which are still to be written."""
    folder = tmp_path / "bert"
    folder.mkdir()
    for path in TINY_BERT.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def bert_weights():
    return {
        name: tensor.clone() for name, tensor in build_bert(plain(read_config(str(TINY_BERT)))).state_dict().items()
    }


def test_a_bert_that_is_nowhere(refused_training, tmp_path):
    assert f"--bert {tmp_path / 'nothing'}: " in refused_training("--bert", tmp_path / "nothing")


def test_a_bert_that_is_a_file(refused_training):
    assert f"--bert {PUBLISHED}: is a file" in refused_training("--bert", PUBLISHED)


@pytest.mark.parametrize("name", ["vocab.txt", "config.json"])
def test_a_bert_folder_that_lacks_a_file(refused_training, bert, name):
    (bert / name).unlink()
    assert f"--bert {bert}: the folder holds no {name}" in refused_training("--bert", bert)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"{"),
        ("config.json", b"[]"),
        ("config.json", b'{"num_hidden_layers": 1000000000}'),
        ("vocab.txt", b"junk"),
        ("tokenizer.json", b"{}"),
        ("model.safetensors", b"junk" * 100),
        ("pytorch_model.bin", b"junk" * 100),
    ],
)
def test_a_bert_folder_with_a_damaged_file(refused_training, bert, name, content):
    (bert / name).write_bytes(content)
    assert f"--bert {bert}: " in refused_training("--bert", bert)


def test_a_vocabulary_larger_than_bert(refused_training, bert):
    with open(bert / "vocab.txt", "a", encoding="utf-8") as file:
        file.write("zebra\n")
    said = refused_training("--bert", bert)
    assert f"--bert {bert}: a vocabulary of 135 entries, but config.json says 134" in said


def test_bert_weights_that_are_incomplete_are_listed(refused_training, bert):
    weights = bert_weights()
    del weights["encoder.layer.1.output.dense.bias"]
    safetensors.torch.save_file(weights, bert / "model.safetensors")
    said = refused_training("--bert", bert)
    assert f"--bert {bert}: its weights lack encoder.layer.1.output.dense.bias" in said


# Checkpoints


@pytest.mark.parametrize("program", ["test", "testall", "eval"])
def test_no_checkpoint_below_runs(refusal, program, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = refusal(program)
    assert f"no {BEST} below runs/" in said
    assert "--checkpoint" in said


def test_a_checkpoint_that_is_not_there(refusal, tmp_path):
    assert f"{tmp_path / 'no.pt'}: no such checkpoint" in refusal("eval", "--checkpoint", tmp_path / "no.pt")
    assert f"{tmp_path / BEST}: no such checkpoint" in refusal("eval", "--checkpoint", tmp_path)


NOT_CHECKPOINTS = {
    "empty": b"",
    "text": b"Not found\n" * 20,
    "random": np.random.default_rng(0).bytes(5000),
    "full stops": b"." * 100,
    "a pickle": pickle.dumps([1, 2]),
    "the start of an archive": b"PK\x03\x04" + bytes(1000),
}


@pytest.mark.parametrize("program", ["eval", "train"])
@pytest.mark.parametrize("damage", [*NOT_CHECKPOINTS, "cut"])
def test_a_damaged_checkpoint(refusal, trained_run, tmp_path, program, damage):
    whole = (trained_run / LAST).read_bytes()
    path = tmp_path / "damaged.pt"
    path.write_bytes(NOT_CHECKPOINTS.get(damage, whole[: len(whole) // 2]))
    said = refusal(program, "--resume" if program == "train" else "--checkpoint", path)
    assert said.startswith(f"error: {path}: damaged, or not a checkpoint")
    assert "weights_only" not in said  # PyTorch's advice to load it all the same


def test_a_file_of_something_else(refusal, tmp_path):
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    said = refusal("eval", "--checkpoint", tmp_path / "other.pt")
    assert f"{tmp_path / 'other.pt'}: not a checkpoint of this project" in said


WEIGHT = "similarity.log_temperature"
CHANGES = {
    f"missing {WEIGHT}": lambda weights: weights.pop(WEIGHT),
    "surplus gate.extra": lambda weights: weights.update({"gate.extra": torch.zeros(2)}),
    f"{WEIGHT} is (3,), expected ()": lambda weights: weights.update({WEIGHT: torch.zeros(3)}),
}


@pytest.mark.parametrize("words", CHANGES)
def test_weights_that_do_not_fit_are_listed(refusal, altered, words):
    path = altered(lambda content: CHANGES[words](content["model"]))
    assert words in refusal("eval", "--checkpoint", path, "--device", "cpu")
    assert words in refusal("train", "--resume", path)


class Trap:
    """Unpickled without restriction, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


FORMS = {
    "ours": lambda content, path: torch.save(content, path),
    "an older torch's": lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
    "a plain pickle": lambda content, path: path.write_bytes(pickle.dumps(content)),
}


@pytest.mark.parametrize("form", FORMS)
def test_code_in_a_checkpoint_does_not_run(refusal, tmp_path, form):
    trap, path = tmp_path / "sprung", tmp_path / "trap.pt"
    FORMS[form](Trap(trap), path)
    for flags in (("eval", "--checkpoint"), ("train", "--resume")):
        assert str(path) in refusal(*flags, path)
        assert not trap.exists()
    try:
        torch.load(path, weights_only=False)
    except RuntimeError:
        assert form == "a plain pickle"
    assert trap.exists()  # the trap itself works


def test_a_published_checkpoint_needs_to_be_told_where_the_data_is(refusal):
    said = refusal("eval", "--checkpoint", PUBLISHED, "--bert", TINY_BERT, "--device", "cpu")
    assert str(PUBLISHED) in said
    assert "--data_path" in said


@pytest.mark.parametrize(
    ("part", "name", "weight", "words"),
    [
        (0, "module.fc.bias", None, "missing fc.bias"),
        (0, "module.nothing.weight", torch.zeros(1), "surplus weights module.nothing.weight"),
        (1, "module.linear.extra", torch.zeros(1), "surplus linear.extra"),
        (2, "module.temp_scale.weight", torch.zeros(1, 2), "temp_scale.weight is (1, 2), expected (1, 1)"),
    ],
)
def test_a_published_checkpoint_whose_weights_do_not_fit(refusal, tmp_path, part, name, weight, words):
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(PUBLISHED, weights_only=True)
    content["model"][part].pop(name, None)
    if weight is not None:
        content["model"][part][name] = weight
    torch.save(content, tmp_path / "published.pth.tar")
    said = refusal("eval", "--checkpoint", tmp_path / "published.pth.tar", "--bert", TINY_BERT, "--device", "cpu")
    assert words in said


@settings(deadline=None)
@given(st.one_of(st.binary(), st.binary().map(lambda tail: b"\x80\x02" + tail)))
def test_any_bytes_are_refused_as_a_checkpoint(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any_bytes.pt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"any_bytes\.pt: .*not a checkpoint"):
        read_checkpoint(path)


@settings(deadline=None, max_examples=30)
@given(kept=st.floats(0, 1, exclude_max=True))
def test_a_checkpoint_cut_anywhere_is_refused(trained_run, tmp_path_factory, kept):
    whole, path = (trained_run / LAST).read_bytes(), tmp_path_factory.getbasetemp() / "cut.pt"
    path.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(InputError, match=r"cut\.pt: damaged"):
        read_checkpoint(path)


# Run folders and results


def test_a_folder_that_holds_a_run_is_not_trained_into(refused_training, trained_run):
    before = (trained_run / LAST).read_bytes()
    said = refused_training("--model_name", trained_run)
    assert f"--model_name {trained_run}: holds a run already" in said
    assert f"--resume {trained_run}" in said
    assert (trained_run / LAST).read_bytes() == before


def test_resuming_what_is_not_there(refusal, tmp_path):
    assert f"{tmp_path / 'no.pt'}: no such checkpoint" in refusal("train", "--resume", tmp_path / "no.pt")
    said = refusal("train", "--resume", tmp_path)
    assert f"{tmp_path}: no checkpoint in it" in said
    assert "--resume auto" in said


@pytest.mark.parametrize(
    ("flags", "change"),
    [
        (["--batch_size", "4"], "--batch_size 4 (was 8)"),
        (["--learning_rate", "0.1"], "--learning_rate 0.1 (was 0.0005)"),
        (["--max_violation"], "--max_violation True (was False)"),
        (["--embed_size", "32"], "--embed_size 32 (was 16)"),
        (["--seed", "1"], "--seed 1 (was 0)"),
        (["--bert", "other"], "--bert other (was "),
    ],
)
def test_a_resumed_run_keeps_its_recipe(refusal, trained_run, flags, change):
    before = (trained_run / LAST).read_bytes()
    said = refusal("train", "--resume", trained_run, "--num_epochs", "2", *flags)
    assert change in said
    assert said.count("(was ") == 1
    assert ("--allow_changes" in said) == (flags[0] not in ("--embed_size", "--bert"))
    assert (trained_run / LAST).read_bytes() == before


@pytest.mark.parametrize("flag", ["--json", "--save_sims"])
@pytest.mark.parametrize("place", ["file/results", "file/folder/results", "folder"])
def test_results_that_cannot_be_written(refused_evaluation, tmp_path, flag, place):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder").mkdir()
    said = refused_evaluation(flag, tmp_path / place)
    assert f"{tmp_path / place} could not be written" in said
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("flag", ["--model_name", "--logger_name"])
def test_a_run_folder_that_cannot_be_written(refused_training, tmp_path, flag):
    (tmp_path / "file").write_text("kept")
    said = refused_training(flag, tmp_path / "file" / "run")
    assert f"{flag} {tmp_path / 'file' / 'run'}: cannot be written" in said


# What libraries say


@pytest.mark.parametrize(
    ("said", "quoted"),
    [
        ("it is so\nbecause of this", "it is so"),
        ("\n\n  at last  ", "at last"),
        ("", "ValueError"),
        (" \n", "ValueError"),
        ("red: \x1b[31m", "red: ?[31m"),
        ("a\0b\x07c\u202ed\ud800e", "a?b?c?d?e"),
        ("größe 两只狗", "größe 两只狗"),
    ],
)
def test_a_reason_is_the_first_line_without_what_a_terminal_would_obey(said, quoted):
    assert reason(ValueError(said)) == quoted


def test_a_long_reason_is_cut():
    assert reason(ValueError("x" * QUOTED)) == "x" * QUOTED
    assert reason(ValueError("x" * 10**6)) == "x" * (QUOTED - 3) + "..."


@settings(deadline=None)
@given(st.text())
def test_any_reason_is_one_short_line_that_can_be_printed(said):
    quoted = reason(ValueError(said))
    assert quoted.isprintable()
    assert 0 < len(quoted) <= QUOTED
