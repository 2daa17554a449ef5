"""Converting checkpoints: nothing is lost on the way, and damaged folders are refused."""

import argparse
import json
import os
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import convert as convert_program
import eval as eval_program
from lib.checkpoints import exchange
from lib.checkpoints.exchange import BERT, SETTINGS, TOKENIZER, WEIGHTS
from lib.checkpoints.native import BEST, build_model, read_checkpoint, verify
from lib.cli import InputError
from tests.checkpoints.test_checkpoint import CASES, VALUES, read_or_refuse, same, set_in
from tests.conftest import GOLDEN, TINY_BERT

PUBLISHED = GOLDEN / "official_format_checkpoint.pth.tar"


def convert(*flags):
    assert convert_program.main([str(flag) for flag in flags]) == 0


@pytest.fixture
def refusal(capfd):
    """Converts with flags that must be refused; returns the line that convert.py says."""

    def call(*flags):
        capfd.readouterr()
        assert convert_program.main([str(flag) for flag in flags]) == 2
        said = capfd.readouterr().err
        assert said.startswith("error: ")
        assert said.count("\n") == 1
        return said

    return call


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The published checkpoint as an exchange folder that knows its BERT."""
    folder = tmp_path_factory.mktemp("exchange") / "published"
    convert(PUBLISHED, folder, "--bert", TINY_BERT)
    return folder


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of that folder to spoil."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def unpickled(path) -> dict:
    """A published file as PyTorch reads it."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


def weights_of(path, bert=""):
    return dict(build_model(read_checkpoint(path), bert)[0].state_dict())


def test_published_to_folder_and_back_is_equal_to_the_bit(folder, tmp_path):
    convert(folder, tmp_path / "back.pth.tar")
    before, after = unpickled(PUBLISHED), unpickled(tmp_path / "back.pth.tar")
    assert list(vars(before["opt"]).items()) == list(vars(after["opt"]).items())
    assert same({**before, "opt": None}, {**after, "opt": None})


UNUSED = ("pooler", "bns.1", "sim_eval")
ODD_KEYS = {
    "without the prefix": lambda part: {key.removeprefix("module."): weight for key, weight in part.items()},
    "in another order": lambda part: dict(reversed(part.items())),
    "half precision": lambda part: {key: w.half() if w.is_floating_point() else w for key, w in part.items()},
    "with position_ids": lambda part: {
        **part,
        **({"module.bert.embeddings.position_ids": torch.arange(64)[None]} if "module.linear.bias" in part else {}),
    },
    "without those never used": lambda part: {
        key: weight
        for key, weight in part.items()
        if not any(f".{name}." in key for name in ("pooler", "bns.1", "sim_eval"))
    },
}


@pytest.mark.parametrize("how", ODD_KEYS)
def test_odd_published_files_come_back_equal_to_the_bit_too(tmp_path, how):
    content = unpickled(PUBLISHED)
    odd = {"Eiters": 6, "opt": content["opt"], "model": [ODD_KEYS[how](part) for part in content["model"]], "epoch": 2}
    torch.save(odd, tmp_path / "odd.pth.tar")
    convert(tmp_path / "odd.pth.tar", tmp_path / "folder", "--bert", TINY_BERT)
    convert(tmp_path / "folder", tmp_path / "back.pth.tar")
    back = unpickled(tmp_path / "back.pth.tar")
    assert vars(back["opt"]) == vars(odd["opt"])
    back["model"] = [dict(part) for part in back["model"]]
    assert same({**odd, "opt": None}, {**back, "opt": None})


def test_every_form_gives_the_same_weights_and_tokenizer(folder, tmp_path):
    convert(folder, tmp_path / "back.pth")
    expected, tokenizer = build_model(read_checkpoint(PUBLISHED), str(TINY_BERT))
    found, found_tokenizer = build_model(read_checkpoint(folder))
    assert found_tokenizer.specification == tokenizer.specification
    assert same(dict(found.state_dict()), dict(expected.state_dict()))
    assert same(weights_of(tmp_path / "back.pth", str(TINY_BERT)), dict(expected.state_dict()))


def test_a_run_can_be_converted_to_both_forms(trained_run, tmp_path):
    convert(trained_run, tmp_path / "folder")
    convert(trained_run, tmp_path / "run.tar")
    convert(tmp_path / "folder", tmp_path / "again.tar")
    own = read_checkpoint(trained_run / BEST)
    expected = weights_of(trained_run / BEST)
    assert same(weights_of(tmp_path / "folder"), expected)
    for name in ("run.tar", "again.tar"):
        assert same(weights_of(tmp_path / name, str(TINY_BERT)), expected)
        content = unpickled(tmp_path / name)
        assert vars(content["opt"]) == own["settings"]
        assert (content["epoch"], content["Eiters"]) == (own["progress"]["epoch"], own["progress"]["step"])
        assert content["best_rsum"] == own["progress"]["best_rsum"]
        assert all(key.startswith("module.") for part in content["model"] for key in part)
    folder = read_checkpoint(tmp_path / "folder")
    assert all(
        folder[part] == own[part] for part in ("architecture", "settings", "progress", "bert_config", "tokenizer")
    )


def test_an_exchange_folder_is_evaluated_without_bert_s_folder(make_data, folder, tmp_path, capsys):
    make_data(tmp_path / "f30k_precomp", img_dim=48)
    flags = ["--checkpoint", str(folder), "--data_path", str(tmp_path), "--device", "cpu", "--workers", "0"]
    assert eval_program.main(flags) == 0
    assert f"{folder}, 1 epochs, dev rSum 123.4" in capsys.readouterr().out


def test_what_was_written_is_said(tmp_path, capsys):
    convert(PUBLISHED, tmp_path / "out")
    files = [tmp_path / "out" / name for name in (WEIGHTS, SETTINGS)]
    size = sum(path.stat().st_size for path in files)
    assert capsys.readouterr().out == f"written: {files[0]}, {files[1]}\n54 weights, {size:,} bytes\n"
    assert sorted((tmp_path / "out").iterdir()) == sorted(files)


def test_without_bert_the_folder_asks_for_it_as_the_file_does(tmp_path, make_data):
    convert(PUBLISHED, tmp_path / "out")
    assert same(weights_of(tmp_path / "out", str(TINY_BERT)), weights_of(PUBLISHED, str(TINY_BERT)))


def test_weights_that_do_not_fit_bert_are_not_converted(refusal, tmp_path):
    content = unpickled(PUBLISHED)
    del content["model"][1]["module.bert.encoder.layer.1.output.dense.bias"]
    torch.save(content, tmp_path / "less.pth.tar")
    said = refusal(tmp_path / "less.pth.tar", tmp_path / "out", "--bert", TINY_BERT)
    assert "missing bert.encoder.layer.1.output.dense.bias" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["there", "there.pth.tar"])
def test_nothing_is_written_over(refusal, tmp_path, name):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "kept").write_text("kept")
    (tmp_path / "there.pth.tar").write_text("kept")
    assert f"{tmp_path / name}: is there already" in refusal(PUBLISHED, tmp_path / name)
    assert (tmp_path / "there" / "kept").read_text() == (tmp_path / "there.pth.tar").read_text() == "kept"


def test_an_opt_that_json_cannot_keep_is_refused(refusal, tmp_path):
    content = unpickled(PUBLISHED)
    content["opt"].sizes = (3, 4)
    torch.save(content, tmp_path / "tuple.pth.tar")
    assert "values that JSON cannot keep" in refusal(tmp_path / "tuple.pth.tar", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_conversion_that_is_killed_leaves_no_folder_that_looks_complete(tmp_path, monkeypatch):
    replace, replaced = os.replace, []

    def die_at_the_third(source, target):
        replaced.append(target)
        if len(replaced) == 3:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", die_at_the_third)
    flags = [str(flag) for flag in (PUBLISHED, tmp_path / "out", "--bert", TINY_BERT)]
    assert convert_program.main(flags) == 130
    with pytest.raises(InputError, match=f"{SETTINGS}: missing; the folder is not complete"):
        read_checkpoint(tmp_path / "out")


# Damaged and hostile folders


@pytest.mark.parametrize("name", [WEIGHTS, SETTINGS, BERT, TOKENIZER])
def test_a_file_that_is_missing_is_named(copy, name):
    (copy / name).unlink()
    for call in (read_checkpoint, verify):
        with pytest.raises(InputError, match=f"{copy / name}: missing; the folder is not complete"):
            call(copy)


@pytest.mark.parametrize("name", [WEIGHTS, SETTINGS, BERT, TOKENIZER])
@settings(deadline=None, max_examples=CASES // 2)
@given(data=st.data())
def test_a_flipped_bit_in_a_folder_is_refused_or_changes_nothing(folder, tmp_path_factory, name, data):
    copy = tmp_path_factory.getbasetemp() / "flipped"
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    flipped = bytearray((folder / name).read_bytes())
    place = data.draw(st.integers(0, 8 * len(flipped) - 1))
    flipped[place // 8] ^= 1 << place % 8
    (copy / name).write_bytes(flipped)
    content = read_or_refuse(copy)
    assert content is None or same({**content, "path": ""}, {**read_checkpoint(folder), "path": ""})


def rewrite(copy, change):
    """Change the settings of a folder, checksums included."""
    content = json.loads((copy / SETTINGS).read_text())
    del content["checksum"]
    change(content)
    content["sha256"] = {name: exchange._sha256(copy / name) for name in content["sha256"]}
    (copy / SETTINGS).write_text(json.dumps({**content, "checksum": exchange._checksum(content)}))


JSON = VALUES.filter(lambda value: not isinstance(value, (torch.Tensor, bytes, tuple)))


@settings(deadline=None, max_examples=CASES)
@given(data=st.data())
def test_settings_of_any_other_type_are_read_or_refused(folder, tmp_path_factory, data):
    copy = tmp_path_factory.getbasetemp() / "other_types"
    shutil.copytree(folder, copy, dirs_exist_ok=True)

    def change(content):
        part = data.draw(st.sampled_from(sorted(content)))
        if isinstance(content[part], dict) and part != "sha256" and data.draw(st.booleans()):
            content = content[part]
            part = data.draw(st.sampled_from(sorted(content)))
        if part != "sha256":
            content[part] = data.draw(JSON)

    rewrite(copy, change)
    content = read_or_refuse(copy)
    if content is None:
        return
    exchange.export(content, str(copy / "out.pth.tar"))
    (copy / "out.pth.tar").unlink()


def safetensors_file(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


LIES = {
    "empty": b"",
    "a header longer than the file": (2**40).to_bytes(8, "little") + b"{}",
    "no JSON": safetensors_file(b"no JSON"),
    "numbers beyond the end": safetensors_file(
        b'{"a":{"dtype":"F32","shape":[1000],"data_offsets":[0,4000]}}', bytes(8)
    ),
    "a shape that is too large": safetensors_file(
        b'{"a":{"dtype":"F32","shape":[99,99],"data_offsets":[0,8]}}', bytes(8)
    ),
    "sizes that overflow": safetensors_file(
        b'{"a":{"dtype":"F32","shape":[%d,%d],"data_offsets":[0,8]}}' % (2**62, 2**62), bytes(8)
    ),
    "no such type": safetensors_file(b'{"a":{"dtype":"F33","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
    "two of one place": safetensors_file(
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        bytes(8),
    ),
    "a pickle": b"\x80\x02cbuiltins\nprint\nX\1\0\0\0a\x85R.",
}


@pytest.mark.parametrize("lie", LIES)
def test_weights_that_lie_are_refused(copy, lie):
    (copy / WEIGHTS).write_bytes(LIES[lie])
    rewrite(copy, lambda content: None)
    with pytest.raises(InputError, match=f"{copy / WEIGHTS}: damaged, or not of safetensors"):
        read_checkpoint(copy)


def test_a_weight_is_never_written_by_its_name(copy, tmp_path):
    weights = safetensors.torch.load_file(copy / WEIGHTS)
    weights["never_used.bert.pooler./../../climbed"] = torch.zeros(2)
    (copy / WEIGHTS).write_bytes(safetensors.torch.save(weights))
    rewrite(copy, lambda content: content["published"]["keys"][1].append("module.bert.pooler./../../climbed"))
    convert(copy, tmp_path / "out")
    convert(tmp_path / "out", tmp_path / "out.tar")
    assert {path.name for path in tmp_path.iterdir()} == {copy.name, "out", "out.tar"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {WEIGHTS, SETTINGS, BERT, TOKENIZER}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (set_in("format", value="x-dim exchange 7"), "'x-dim exchange 7', from another version of this code"),
        (set_in("architecture", "embed_size", value=10**6), "its weights do not fit the model"),
        (set_in("architecture", value=None), "lacks architecture"),
        (set_in("settings", "margin", value="wide"), "settings: margin is no float"),
        (set_in("published", "keys", 0, value=[]), "does not fit weights.safetensors"),
        (set_in("published", "keys", value=[1, 2, 3]), "does not fit weights.safetensors"),
        (set_in("published", "keys", 0, 0, value="../x"), "does not fit weights.safetensors"),
        (set_in("published", "keys", 0, 0, value=[]), "does not fit weights.safetensors"),
        (set_in("published", "entries", value=[[]]), "does not fit weights.safetensors"),
    ],
)
def test_what_is_wrong_in_a_folder_is_named(copy, change, words):
    rewrite(copy, change)
    with pytest.raises(InputError, match=words) as error:
        build_model(read_checkpoint(copy))
    assert str(error.value).startswith(str(copy))


@pytest.mark.parametrize("text", ["[" * 100_000, "3", "{", "9" * 5000, '{"format": "x-dim exchange 1"}'])
def test_settings_that_are_none_are_refused(copy, text):
    (copy / SETTINGS).write_text(text)
    with pytest.raises(InputError, match=f"{copy / SETTINGS}: damaged"):
        read_checkpoint(copy)


def test_a_tokenizer_that_is_no_text_is_refused(copy):
    (copy / TOKENIZER).write_bytes(b"\xff\xfe")
    rewrite(copy, lambda content: None)
    with pytest.raises(InputError, match=f"{copy / TOKENIZER}: damaged, or not UTF-8"):
        read_checkpoint(copy)


def test_settings_beyond_all_bounds_are_not_parsed(copy):
    with open(copy / SETTINGS, "wb") as file:
        file.truncate(2**40)  # takes no place on the disk
    with pytest.raises(InputError, match=f"{copy / SETTINGS}: larger than 8388608 bytes"):
        read_checkpoint(copy)


def test_a_surplus_weight_of_a_folder_is_refused_by_its_name(trained_run, tmp_path):
    convert(trained_run, tmp_path / "folder")
    weights = safetensors.torch.load_file(tmp_path / "folder" / WEIGHTS)
    weights["image_encoder.extra"] = torch.zeros(2)
    weights["image_encoder.linear.bias"] = weights["image_encoder.linear.bias"][:3].clone()
    (tmp_path / "folder" / WEIGHTS).write_bytes(safetensors.torch.save(weights))
    rewrite(tmp_path / "folder", lambda content: None)
    with pytest.raises(InputError, match=r"surplus image_encoder\.extra, image_encoder\.linear\.bias is \(3,\)"):
        build_model(read_checkpoint(tmp_path / "folder"))
