"""Wrong input to the programs: exit code 2 and one line on stderr that names the file or flag, never a traceback."""

import gc
import os
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import eval as eval_program
import test as test_program
import testall as testall_program
import train as train_program
from lib.checkpoints.native import BEST, LAST
from lib.cli import QUOTED, reason
from lib.files import check_writable, replacing
from tests.conftest import PUBLISHED, ROOT, TINY_BERT

pytestmark = pytest.mark.filterwarnings("error::UserWarning")  # a warning would be a second line

PROGRAMS = {"train": train_program, "test": test_program, "testall": testall_program, "eval": eval_program}


@pytest.fixture
def refusal(capfd):
    """Calls a program with flags that it must refuse; returns the line that it prints."""

    def call(program, *flags):
        capfd.readouterr()
        try:
            code = PROGRAMS[program].main([str(flag) for flag in flags])
        except SystemExit as stopped:
            code = stopped.code
        line = capfd.readouterr().err
        assert code == 2, line
        assert len(line.splitlines()) == line.count("\n") == 1, line
        return line

    return call


@pytest.fixture
def refused_training(refusal, tiny_flags, tmp_path):
    """Starts a new training with further flags that must be refused."""
    return lambda *flags: refusal("train", *tiny_flags, "--model_name", tmp_path / "new_run", *flags)


@pytest.fixture
def refused_evaluation(refusal, trained_run):
    """Evaluates a trained checkpoint with further flags that must be refused."""
    return lambda *flags: refusal("eval", "--checkpoint", trained_run, "--device", "cpu", "--workers", "0", *flags)


# Data


def test_no_data_set(refusal, tmp_path):
    """A flag of the family's scripts is accepted with the value that says nothing, and refused with another."""
    line = refusal("train", "--precomp_enc_type", "basic", "--data_path", tmp_path)
    assert line.startswith(f"error: no data set at {tmp_path / 'f30k_precomp'}")
    for part in ("train_ims.npy", "usually obtained", "train_demo.sh"):
        assert part in line
    assert "--precomp_enc_type" in refusal("train", "--precomp_enc_type", "weight_norm", "--data_path", tmp_path)


def spoil(path):
    rows = np.load(path)
    rows[15] = np.nan
    np.save(path, rows)


@pytest.mark.parametrize(
    ("split", "name", "change", "workers", "words"),
    [
        ("train", "ims.npy", spoil, 1, "row 15 holds NaN"),
        ("dev", "ims.npy", spoil, 0, "row 15 holds NaN"),
        ("test", "ims.npy", lambda path: path.write_bytes(path.read_bytes()[:-100]), 0, "truncated"),
        ("train", "caps.txt", lambda path: path.write_text("a\n" * 49), 0, "captions do not fit"),
    ],
)
def test_a_damaged_data_file_is_named(
    refused_training, refused_evaluation, make_data, tmp_path, split, name, change, workers, words
):
    path = make_data(tmp_path / "damaged") / f"{split}_{name}"
    change(path)
    refused = refused_evaluation if split == "test" else refused_training
    line = refused("--data_path", tmp_path, "--data_name", "damaged", "--workers", workers)
    assert line.startswith("error: ")
    assert f"{path}: " in line
    assert words in line
    gc.collect()  # the worker ends with the loader


CHINESE = "\u4e00\u53ea\u72d7"


def test_training_and_evaluation_say_that_some_captions_are_unknown(tiny_flags, make_data, tmp_path, capsys):
    data = make_data(tmp_path / "mixed")
    for split in ("train", "test"):
        lines = (data / f"{split}_caps.txt").read_text().splitlines()
        lines[-1] = 40 * CHINESE
        (data / f"{split}_caps.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    flags = [*tiny_flags, "--data_path", str(tmp_path), "--data_name", "mixed", "--model_name", str(tmp_path / "run")]
    assert train_program.main(flags) == 0
    out = capsys.readouterr().out
    assert f"warning: train: the vocabulary of {TINY_BERT} does not know 6 % of the captions' pieces" in out
    assert "dev: the vocabulary" not in out
    flags = ["--checkpoint", str(tmp_path / "run"), "--device", "cpu", "--workers", "0"]
    assert test_program.main(flags) == 0
    assert "warning: test: the vocabulary of " in capsys.readouterr().out


def test_images_that_do_not_divide_into_five_folds(refusal, make_data, trained_run, tmp_path):
    make_data(tmp_path / "seven", images={"testall": 7})
    flags = ["--checkpoint", trained_run, "--data_path", tmp_path, "--data_name", "seven", "--device", "cpu"]
    assert "--fold5: 7 images" in refusal("testall", *flags)


# Flags

OUT_OF_RANGE = [
    *(("--batch_size", "1"), ("--embed_size", "1"), ("--learning_rate", "0.0"), ("--learning_rate", "nan")),
    *(("--margin", "1e+19"), ("--grad_clip", "-1.0"), ("--seed", str(2**70)), ("--lr_update", "-1")),
]


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(
    "flags",
    [
        ["--no_such_flag"],
        ["--batch", "8"],  # no guessing from prefixes
        ["--precision", "fp8"],
        ["--workers", "-1"],
        ["--batch_size", str(2**63)],
    ],
    ids=" ".join,
)
def test_flags_that_do_not_exist_or_do_not_parse(refusal, program, flags):
    assert flags[0] in refusal(program, *flags)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        *(([flag, number], f"{flag} {number}: must be ") for flag, number in OUT_OF_RANGE),
        (["--similarity", "cosine"], "--similarity cosine: expected xdim, "),
        (["--gate", "ajar"], "--gate ajar: expected adaptive, "),
        (["--similarity", "independent", "--gate", "open"], "--gate open: --similarity independent has no gate"),
        (["--loss", "triplet"], "--loss triplet: expected hinge, "),
        (["--loss", "hinge:hardness=2"], "--loss hinge: has no option 'hardness'"),
        (["--gate", "open:width=2"], "--gate open: has no option 'width'"),
        (["--image_encoder", "regions:mask_padding=True"], "--image_encoder regions: has no option 'mask_padding'"),
        (["--gate", "open:1.4"], "--gate open:1.4: expected open:option=value"),
        (["--max_violation", "--loss", "ramped"], "--max_violation: "),
        (["--resume", "b", "--init_from", "a"], "--init_from: "),
        (["--local-rank=0"], "--local-rank: torch.distributed.launch is not supported, start"),
        (["--optim", "adam"], "unrecognized arguments: --optim adam; --optim: not needed"),
        (["--val_step=500", "--vocab_path", "vocab", "--word_dim", "300"], "; --word_dim: not needed, --bert says"),
        (["--reset_start_epoch"], "; --reset_start_epoch: --init_from starts a new run"),
        (["--backbone_source", "wsl"], "; --backbone_source: --image_encoder torchvision:NAME trains"),
        (["--batch_size", 121], "--batch_size 121: larger than the 120 pairs of train; --batch_size 8 fits"),
        (["--img_dim", 2048], "--img_dim 2048"),
    ],
)
def test_settings_that_training_refuses(refused_training, flags, words):
    assert words in refused_training(*flags)


@pytest.mark.parametrize("device", ["nonsense", "meta", "cuda:1"])
def test_devices_that_are_not_there(refused_training, refused_evaluation, monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for refused in (refused_training, refused_evaluation):
        assert f"--device {device}: " in refused("--device", device)
        assert "--precision tf32: " in refused("--device", "cpu", "--precision", "tf32")


@pytest.mark.parametrize(
    ("missing", "error", "words"),
    [
        ("transformers", ModuleNotFoundError("No module named 'transformers'"), "pip install -r requirements.txt"),
        ("torchvision", RuntimeError("operator torchvision::nms does not exist"), "install --force-reinstall torch"),
    ],
)
def test_packages_that_are_missing_or_do_not_fit(refusal, monkeypatch, missing, error, words):
    def without(name):
        if name == missing:
            raise error

    monkeypatch.setattr("lib.cli.import_module", without)
    for program in PROGRAMS:
        line = refusal(program)
        assert str(error) in line
        assert words in line


# Checkpoints


def test_checkpoints_and_text_models_that_are_not_there(refusal, refused_training, tmp_path, monkeypatch):
    for program, flag in (("eval", "--checkpoint"), ("train", "--resume"), ("train", "--init_from")):
        assert f"{tmp_path / 'no.pt'}: no such checkpoint" in refusal(program, flag, tmp_path / "no.pt")
    assert f"{tmp_path}: no checkpoint in it" in refusal("train", "--resume", tmp_path)
    assert f"--bert {tmp_path}: " in refused_training("--bert", tmp_path)
    monkeypatch.chdir(tmp_path)
    for program in ("test", "testall", "eval"):
        line = refusal(program)
        assert f"no {BEST} below runs/" in line
        assert "--checkpoint" in line


def test_a_published_checkpoint_needs_to_be_told_where_the_data_is(refusal):
    line = refusal("eval", "--checkpoint", PUBLISHED, "--bert", TINY_BERT, "--device", "cpu")
    assert str(PUBLISHED) in line
    assert "--data_path" in line


# Run folders and results


def test_run_folders_that_hold_a_run_or_cannot_be_written(refused_training, trained_run, tmp_path):
    before = (trained_run / LAST).read_bytes()
    line = refused_training("--model_name", trained_run)
    assert f"--model_name {trained_run}: holds a run already" in line
    assert f"--resume {trained_run}" in line
    assert (trained_run / LAST).read_bytes() == before
    (tmp_path / "file").write_text("kept")
    for flag in ("--model_name", "--logger_name"):
        line = refused_training(flag, tmp_path / "file" / "run")
        assert f"{flag} {tmp_path / 'file' / 'run'}: cannot be written" in line


def test_results_do_not_replace_what_is_read(refused_evaluation, trained_run, tiny_data, tmp_path):
    best, features = tmp_path / "best", Path(*tiny_data) / "test_ims.npy"
    best.symlink_to(trained_run / BEST)
    for flag, path in (
        ("--json", trained_run / BEST),
        ("--save_sims", features),
        ("--ranks", best),
        ("--json", trained_run / "run.json"),
    ):
        before = path.read_bytes()
        assert f"{path}: would replace " in refused_evaluation(flag, path)
        assert path.read_bytes() == before


def test_links_are_followed_and_pipes_and_devices_are_written_to(tmp_path):
    target, link, pipe = tmp_path / "folder" / "target", tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(target)
    os.mkfifo(pipe)
    got = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    for path in (link, pipe, "/dev/null"):
        check_writable(str(path))
        with replacing(path) as file:
            np.save(file, np.arange(3))
    reader.join()
    assert got == [target.read_bytes()]
    assert link.is_symlink()
    assert np.load(link).tolist() == [0, 1, 2]
    assert not Path("/dev/null").is_file()
    if os.path.isdir("/dev/shm"):  # whose files are files
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            for text in (b"first", b"last"):
                with replacing(f"{folder}/a") as file:
                    file.write(text)
            assert Path(folder, "a").read_bytes() == text
    assert not list(tmp_path.rglob("*.tmp"))


# The system


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "first", "WORLD_SIZE": "2"}, "the variable RANK is 'first', not a number"),
        ({"RANK": "0", "WORLD_SIZE": "x"}, "the variable WORLD_SIZE is 'x', not a number"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "but not MASTER_ADDR: start with torchrun, or unset RANK"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "TAKEN"}, "the port is taken"),
    ],
)
def test_variables_that_describe_no_job(tiny_flags, tmp_path, variables, words):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        environment = {**os.environ, **{name: value.replace("TAKEN", port) for name, value in variables.items()}}
        command = [sys.executable, "train.py", *tiny_flags, "--model_name", str(tmp_path / "run")]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert words in done.stderr


@pytest.mark.parametrize("program", PROGRAMS)
def test_names_that_are_too_long_or_of_another_encoding(refusal, program, tiny_flags):
    for name in ("x" * 300, b"\xff\xfe".decode(errors="surrogateescape")):
        flags = [*tiny_flags, "--init_from", name] if program == "train" else ["--checkpoint", name]
        assert "error: " in refusal(program, *flags)


def test_too_few_files_that_may_be_open():
    """PyTorch's loaders may wait forever where they cannot open more."""
    line = f"ulimit -n 16; exec {sys.executable} test.py"
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True)
    words = "error: this shell lets a program open 16 files, 256 are needed: ulimit -n 1024\n"
    assert (done.returncode, done.stderr) == (2, words)


# What libraries say


@settings(deadline=None, max_examples=20)
@given(st.text() | st.text().map(lambda text: text * QUOTED))
def test_any_reason_is_one_short_line_that_can_be_printed(said):
    quoted = reason(ValueError(said))
    assert quoted.isprintable()
    assert 0 < len(quoted) <= QUOTED
    assert reason(ValueError(f"\n red: \x1b[31m{said}")).startswith("red: ?[31m")
