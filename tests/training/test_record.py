"""run.json says how a run came about; test.py quotes it."""

import json
import re
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import test as test_program
import train
from lib.checkpoints.record import quote, read_record
from lib.cli import InputError
from lib.data.dataset import open_split
from lib.runtime import ROOT, git_commit, versions


@pytest.fixture(scope="module")
def run(tiny_flags, tmp_path_factory):
    """A run of two epochs that was resumed for a third."""
    folder = tmp_path_factory.mktemp("recorded") / "run"
    assert train.main([*tiny_flags, "--num_epochs", "2", "--model_name", str(folder), "--seed", "5"]) == 0
    assert train.main(["--resume", str(folder), "--num_epochs", "3"]) == 0
    return folder


def test_the_record_holds_settings_versions_data_seed_and_history(run, tiny_data):
    record = read_record(run)
    assert record["settings"]["seed"] == 5
    assert record["settings"]["num_epochs"] == 3
    train_split = open_split(*tiny_data, "train", 16)
    assert record["data"]["train"] == {
        **{"folder": str(train_split.folder), "images": 24, "captions": 120, "fingerprint": train_split.fingerprint()}
    }
    assert set(record["data"]) == {"train", "dev"}
    assert [session["step"] for session in record["sessions"]] == [0, 30]
    assert [session["from"] for session in record["sessions"]] == [None, str(run / "step-00000030.pt")]
    assert record["sessions"][1]["versions"] == versions()
    assert record["progress"] == {"epoch": 3, "batch": 0, "step": 45}
    assert [entry["epoch"] for entry in record["history"]] == [1, 2, 3]
    printed = re.findall(r"dev: .* rSum ([\d.]+)", (run / "run.log").read_text())
    assert [f"{entry['dev']['rsum']:.1f}" for entry in record["history"]] == printed


def test_the_best_epoch_is_chosen_on_dev(run):
    record = read_record(run)
    best = max(record["history"], key=lambda entry: entry["dev"]["rsum"])
    assert record["chosen"] == {
        **{"split": "dev", "epoch": best["epoch"], "rsum": best["dev"]["rsum"], "checkpoint": "model_best.pt"}
    }


def test_training_never_looks_at_the_test_splits(tiny_flags, make_data, tmp_path):
    make_data(tmp_path / "some_precomp", images={"train": 24, "dev": 10})
    flags = [*tiny_flags, "--data_path", str(tmp_path), "--data_name", "some_precomp"]
    assert train.main([*flags, "--model_name", str(tmp_path / "run")]) == 0


def test_test_py_quotes_the_record(run, capsys):
    flags = ["--checkpoint", str(run), "--device", "cpu", "--workers", "0"]
    assert test_program.main(flags) == 0
    chosen = read_record(run)["chosen"]
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("run "))
    assert f"epoch {chosen['epoch']} of 3 chosen on dev (rSum {chosen['rsum']:.1f}), seed 5" in line


def test_a_damaged_record_is_said_and_evaluation_goes_on(run, tmp_path, capsys):
    (tmp_path / "model_best.pt").write_bytes((run / "model_best.pt").read_bytes())
    (tmp_path / "run.json").write_text('{"format": "x-dim run 1", "chosen"')
    assert test_program.main(["--checkpoint", str(tmp_path), "--device", "cpu", "--workers", "0"]) == 0
    assert f"run         {tmp_path / 'run.json'}: damaged" in capsys.readouterr().out


def test_a_damaged_record_begins_anew_when_the_run_goes_on(run, tiny_flags, tmp_path, capsys):
    folder = tmp_path / "run"
    assert train.main([*tiny_flags, "--model_name", str(folder)]) == 0
    (folder / "run.json").write_text("not JSON")
    assert train.main(["--resume", str(folder), "--num_epochs", "2"]) == 0
    assert f"warning: {folder / 'run.json'}: damaged, or not the record of a run; it begins anew" in (
        capsys.readouterr().out
    )
    assert [session["step"] for session in read_record(folder)["sessions"]] == [15]
    assert len(read_record(folder)["history"]) == 2


SOUND = {
    "format": "x-dim run 1",
    "settings": {"seed": 0},
    "sessions": [{"versions": {"git": "0123456789abcdef"}}],
    "progress": {"epoch": 2},
    "chosen": {"split": "dev", "epoch": 1, "rsum": 12.34},
}
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*SOUND, "git"]), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=300)
@given(
    content=st.one_of(
        st.binary(max_size=100),
        st.builds(
            lambda change: json.dumps({**SOUND, **change}).encode(), st.dictionaries(st.sampled_from([*SOUND]), JSON)
        ),
        st.builds(lambda cut: json.dumps(SOUND).encode()[:cut], st.integers(0, 250)),
        st.just(b"[" * 100_000),
    )
)
def test_any_record_is_quoted_in_one_line_or_refused(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp()
    (folder / "run.json").write_bytes(content)
    try:
        line = quote(read_record(folder))
    except InputError as error:
        line = str(error)
        assert "run.json" in line
    assert len(line.splitlines()) == 1
    if content == json.dumps(SOUND).encode():
        assert line == "epoch 1 of 2 chosen on dev (rSum 12.3), seed 0, commit 0123456789"


def test_the_commit_is_that_of_this_code_or_empty(tmp_path):
    assert git_commit(tmp_path) == ""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    (tmp_path / "inside").mkdir()
    (tmp_path / "file").write_text("one")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *command], check=True)
    assert re.fullmatch("[0-9a-f]{40}", git_commit(tmp_path))
    assert git_commit(tmp_path / "inside") == ""
    (tmp_path / "file").write_text("two")
    assert re.fullmatch(r"[0-9a-f]{40}\+", git_commit(tmp_path))


def test_versions_name_what_the_arithmetic_depends_on():
    assert set(versions()) == {"x-dim", "git", "python", "torch", "transformers", "tokenizers", "numpy"}
    assert (ROOT / "train.py").is_file()
