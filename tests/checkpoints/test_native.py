"""Checkpoints give back what was written; damage, other files and weights that do not fit are refused in one line."""

import copy
import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

import convert
from lib.checkpoints.native import (
    BEST,
    ENTRIES,
    LAST,
    OLD_BEST,
    build_model,
    find_checkpoint,
    read_checkpoint,
    verify,
    write_state,
    write_weights,
)
from lib.cli import InputError
from lib.evaluation.report import describe_source
from tests.conftest import PUBLISHED
from tests.data.samples import refusal


def same(one, other) -> bool:
    """Equal to the bit, types included."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def refused(read, path) -> str:
    """The one line with which a file is refused; it starts with the file's name."""
    message = refusal(read, path)
    assert message.startswith(f"{path}: ")
    return message


@pytest.fixture(scope="module")
def content(trained_run):
    """The entries of a trained run's last checkpoint."""
    return read_checkpoint(trained_run / LAST)


@pytest.fixture
def altered(content, tmp_path):
    """Writes a state file whose entries a function has changed."""

    def write(change):
        changed = copy.deepcopy(content)
        change(changed)
        write_state(tmp_path / "altered.pt", changed)
        return tmp_path / "altered.pt"

    return write


@pytest.fixture(scope="module")
def files(content, tmp_path_factory):
    """The bytes of each form of a checkpoint."""
    folder = tmp_path_factory.mktemp("checkpoints")
    write_weights(folder / "weights.safetensors", content)
    write_state(folder / "state.pt", content)
    return {path.name: path.read_bytes() for path in folder.iterdir()} | {"published.pth.tar": PUBLISHED.read_bytes()}


def test_a_state_file_gives_back_every_entry(content, tmp_path):
    write_state(tmp_path / "state.pt", content)
    again = read_checkpoint(tmp_path / "state.pt", mapped=True)
    assert {"optimizer", "random_state", *ENTRIES} <= set(again)
    assert same({**again, "path": ""}, {**content, "path": ""})


def test_a_weights_file_gives_back_all_but_what_only_training_needs(content, tmp_path):
    write_weights(tmp_path / BEST, content)
    again = read_checkpoint(tmp_path / BEST)
    assert {"optimizer", "random_state"}.isdisjoint(again)
    assert again["model"].keys() == content["model"].keys()
    assert all(same(again["model"][name], weight) for name, weight in content["model"].items())
    assert all(same(again[name], content[name]) for name in ENTRIES)
    model, tokenizer = build_model(again)
    assert all(torch.equal(weight, content["model"][name]) for name, weight in model.state_dict().items())
    assert tokenizer.specification == content["tokenizer"]


@pytest.mark.parametrize("name", ["weights.safetensors", "state.pt", "published.pth.tar"])
@settings(deadline=None, max_examples=30)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_is_refused_or_changes_nothing(files, tmp_path_factory, name, place, bit):
    path = tmp_path_factory.getbasetemp() / f"flipped_{name}"
    path.write_bytes(files[name])
    expected = read_checkpoint(path)
    flipped = bytearray(files[name])
    flipped[int(place * len(flipped))] ^= 1 << bit
    path.unlink()
    path.write_bytes(flipped)
    try:
        assert same(read_checkpoint(path), expected)
    except InputError:
        refused(read_checkpoint, path)


@pytest.mark.parametrize("name", ["weights.safetensors", "state.pt", "published.pth.tar"])
@pytest.mark.parametrize("kept", [0, 1000, -1])
def test_a_file_that_was_cut_off_is_refused(files, tmp_path, name, kept):
    (tmp_path / name).write_bytes(files[name][:kept])
    for read in (read_checkpoint, verify):
        line = refused(read, tmp_path / name)
        assert "damaged, or not a checkpoint" in line
        assert "weights_only" not in line  # PyTorch's advice to load it all the same


def test_files_without_checksums_or_of_something_else_are_refused(content, tmp_path):
    torch.save({"model": content["model"]}, tmp_path / "older.pt", _use_new_zipfile_serialization=False)
    assert "no checksums, as before PyTorch 1.6" in refused(read_checkpoint, tmp_path / "older.pt")
    torch.save({"format": "x-dim checkpoint 9"}, tmp_path / "newer.pt")
    assert "'x-dim checkpoint 9', from another version" in refused(read_checkpoint, tmp_path / "newer.pt")
    safetensors.torch.save_file(content["model"], tmp_path / "other.safetensors")
    assert "do not say what model" in refused(read_checkpoint, tmp_path / "other.safetensors")


def test_a_setting_that_this_version_does_not_know_is_ignored_with_a_note(altered):
    content = read_checkpoint(altered(lambda content: content["settings"].update(no_such="x", wide=2)))
    assert content["notes"] == ["settings that this version does not know are ignored: no_such='x', wide=2"]
    assert "no_such" not in content["settings"]
    assert "\nnote        settings that this version does not know" in describe_source("", content, "checkpoint")


def test_a_history_of_20000_epochs_is_read_again(content, tmp_path):
    history = [{"epoch": k, "step": 100 * k, "dev": {"rsum": 123.456789, "i2t": {}, "t2i": {}}} for k in range(20_000)]
    progress = {**content["progress"], "history": history}
    write_weights(tmp_path / "long.safetensors", {**content, "progress": progress})
    assert read_checkpoint(tmp_path / "long.safetensors")["progress"] == progress


@pytest.mark.parametrize(
    ("part", "values"),
    [
        ("settings", {"precision": "fp8"}),
        ("settings", {"engine": "fast"}),
        ("settings", {"margin": "0.2"}),
        ("settings", {"batch_size": True}),
        ("progress", {"step": 10**400}),
        ("progress", {"best_rsum": float("nan")}),
        ("progress", {"epoch": 1.5}),
        ("progress", {"batch": -3}),
        ("progress", {"history": [{"epoch": 1, "step": 1, "dev": {}}]}),
    ],
)
def test_values_that_no_flag_and_no_training_gives_are_refused(altered, part, values):
    path = altered(lambda content: content[part].update(values))
    assert "holds what no version of this program writes" in refused(read_checkpoint, path)


def test_what_a_heading_quotes_of_a_file_gives_the_terminal_no_commands(altered):
    content = read_checkpoint(altered(lambda content: content["settings"].update({"\x1b[2J": 1})))
    record = content["path"].replace("altered.pt", "run.json")
    Path(record).write_text('{"format": "x-dim run 1", "chosen": {"rsum": 1e999, "split": "\\u001b[2J"}}')
    heading = describe_source("", content, "checkpoint")
    assert "damaged, it does not say how the checkpoint was chosen" in heading
    assert all(line.isprintable() for line in heading.splitlines())


def test_a_checkpoint_of_the_version_before_is_read_as_todays(content, tmp_path):
    """Its architecture were flags, its text model a BERT; its tokenizer knew neither lengths nor padding."""
    text = content["architecture"]["text_encoder"]["options"]
    tokenizer = Backend.from_str(content["tokenizer"])
    tokenizer.no_truncation()
    tokenizer.no_padding()
    old = {
        **content,
        "format": "x-dim checkpoint 2",
        "architecture": {"img_dim": 16, "embed_size": 16, **dict.fromkeys(("no_imgnorm", "no_txtnorm"), False)},
        "bert_config": text["config"],
        "tokenizer": tokenizer.to_str(),
        "model": {name.replace(".backbone.", ".bert."): weight for name, weight in content["model"].items()},
    }
    old["settings"] = {name: value for name, value in content["settings"].items() if name != "loss"}
    old["settings"]["hardness"] = "recall"
    del old["path"], old["notes"]
    torch.save(old, tmp_path / OLD_BEST)
    again = read_checkpoint(find_checkpoint(str(tmp_path)))
    assert {name: again[name] for name in ("architecture", "tokenizer")} == {
        name: content[name] for name in ("architecture", "tokenizer")
    }
    assert same(again["model"], dict(content["model"]))
    assert (again["settings"], again["notes"]) == ({**content["settings"], "loss": "ramped"}, [])
    build_model(again)


WEIGHT = "image_encoder.linear.bias"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda weights: weights.pop(WEIGHT), f"{WEIGHT} is missing, expected (16,)"),
        (lambda weights: weights.update({f"{WEIGHT}s": torch.zeros(3)}), f"{WEIGHT}s is (3,), expected no such weight"),
        (lambda weights: weights.update({WEIGHT: torch.zeros(3)}), f"{WEIGHT} is (3,), expected (16,)"),
    ],
)
def test_weights_that_are_missing_surplus_or_misshapen_are_listed(altered, change, words):
    path = altered(lambda content: change(content["model"]))
    assert words in refused(lambda path: build_model(read_checkpoint(path)), path)


def test_a_model_of_a_size_that_no_memory_holds_is_refused_before_it_takes_any(altered):
    path = altered(lambda content: content["architecture"].update(embed_size=10**9))
    with pytest.raises(InputError, match=r"its weights do not fit the model .* expected \(1000000000, "):
        build_model(read_checkpoint(path))


@pytest.mark.parametrize(("kept", "words"), [(5, "it knows special tokens only"), (128, "a vocabulary of 128 entries")])
def test_a_tokenizer_that_is_not_the_embedding_tables_is_neither_used_nor_converted(altered, capfd, kept, words):
    def cut(content):
        tokenizer = json.loads(content["tokenizer"])
        vocabulary = tokenizer["model"]["vocab"]
        tokenizer["model"]["vocab"] = {entry: number for entry, number in vocabulary.items() if number < kept}
        content["tokenizer"] = json.dumps(tokenizer)

    path = altered(cut)
    assert words in refused(lambda path: build_model(read_checkpoint(path)), path)
    for out in (path.with_name("weights.safetensors"), path.with_name("published.pth.tar")):
        assert convert.main([str(path), str(out)]) == 2
        assert f"error: {path}: its tokenizer cannot be used" in capfd.readouterr().err
        assert not out.exists()


def test_a_checkpoint_is_found_by_file_by_run_folder_and_as_the_newest_below_runs(tmp_path):
    for age, name in enumerate((f"new/{BEST}", f"old/{OLD_BEST}", "old/last.pt")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (10**9 - age, 10**9 - age))
    assert find_checkpoint("", runs=str(tmp_path)) == find_checkpoint(str(tmp_path / "new")) == tmp_path / "new" / BEST
    assert find_checkpoint(str(tmp_path / "old")) == tmp_path / "old" / OLD_BEST
    assert find_checkpoint(str(tmp_path / "old" / LAST)) == tmp_path / "old" / LAST
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / LAST).touch()
    newest = f"no epoch has ended; {tmp_path / 'begun' / LAST} is the newest one"
    for missing, words in ((tmp_path / "no.pt", "no such"), (tmp_path, "no such"), (tmp_path / "begun", newest)):
        with pytest.raises(InputError, match=words):
            find_checkpoint(str(missing))
    with pytest.raises(InputError, match="train first"):
        find_checkpoint("", runs=str(tmp_path / "nothing"))
