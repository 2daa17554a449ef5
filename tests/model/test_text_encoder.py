"""Language models of every kind behind one text encoder: masks, weights, checkpoints."""

import os
import shutil
import socket
import subprocess
import sys
from dataclasses import asdict

import pytest
import safetensors.torch
import torch
import transformers

import train
from lib.checkpoints.native import BEST, build_model, find_checkpoint, new_model, read_checkpoint, write_weights
from lib.data.tokenizer import load_tokenizer
from lib.model.backbone import WEIGHTS, build_backbone, load_backbone, read_config
from lib.model.encoders import TextEncoder
from lib.training.run_folder import Progress
from tests.conftest import QUIET, ROOT, TINY_BERT
from tests.data.samples import refusal
from tests.text_models import KINDS, TEXTS, make_text_model

CAPTIONS = ["a dog", TEXTS[0], "two dogs on a black bench"]


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    """The folder of a tiny text model of each kind."""
    return make_text_model(request.param, tmp_path_factory.mktemp("model") / request.param)


def make_encoder(folder) -> TextEncoder:
    torch.manual_seed(1)
    return new_model({"bert": str(folder), "img_dim": 4, "embed_size": 8})[0].text_encoder.eval()


def tokens(folder):
    tokenizer = load_tokenizer(str(folder))
    return map(torch.from_numpy, tokenizer.pad(tokenizer.tokenize(CAPTIONS)))


def test_words_do_not_depend_on_the_captions_beside_them(folder):
    encoder, (ids, lengths) = make_encoder(folder), tokens(folder)
    with torch.no_grad():
        together = encoder(ids, lengths).split(lengths.tolist())
        for row, length, words in zip(ids, lengths, together, strict=True):
            hidden = encoder.backbone(input_ids=row[None, :length]).last_hidden_state[0]
            alone = encoder.linear(hidden)
            torch.testing.assert_close(words, alone / (alone.norm(dim=1, keepdim=True) + 1e-8), rtol=0, atol=1e-5)


def test_a_padding_token_within_a_caption_is_not_attended_to(tmp_path):
    """As published: the augmentation may put one there."""
    encoder, (ids, lengths) = make_encoder(folder := make_text_model("bert", tmp_path)), tokens(folder)
    ids[1, 2] = 0
    with torch.no_grad():
        words = encoder(ids, lengths).split(lengths.tolist())[1]
        hidden = encoder.backbone(input_ids=ids[1:2], attention_mask=(ids[1:2] != 0).long()).last_hidden_state
        expected = encoder.linear(hidden[0, : lengths[1]])
    torch.testing.assert_close(words, expected / expected.norm(dim=1, keepdim=True), rtol=0, atol=1e-5)


def test_pretrained_weights_are_those_of_the_file_without_pooling_layers(folder):
    own = transformers.AutoModel.from_pretrained(folder)
    own = getattr(own, "text_model", own).state_dict()
    found = load_backbone(str(folder)).state_dict()
    assert all(torch.equal(weight, own[name]) for name, weight in found.items())
    assert all(name.startswith(("pooler.", "head.")) for name in own.keys() - found.keys())
    assert build_backbone(read_config(str(folder))).state_dict().keys() == found.keys()


def test_every_parameter_gets_a_gradient(folder):
    encoder, (ids, lengths) = make_encoder(folder), tokens(folder)
    (encoder(ids, lengths) * torch.randn(8)).sum().backward()
    assert [name for name, parameter in encoder.named_parameters() if parameter.grad is None] == []
    assert {id(p) for p in encoder.backbone_parameters()} == {id(p) for p in encoder.backbone.parameters()}


def test_a_checkpoint_brings_the_language_model_back(folder, tmp_path):
    model, tokenizer, note = new_model({"bert": str(folder), "img_dim": 4, "embed_size": 8})
    assert f"starts from the weights of {folder}" in note
    entries = {"settings": {}, "progress": asdict(Progress()), "data": {}, "versions": {}}
    about = {"architecture": model.architecture, "tokenizer": tokenizer.specification, **entries}
    write_weights(tmp_path / BEST, {"model": model.state_dict(), **about})
    again, tokenizer_again = build_model(read_checkpoint(tmp_path / BEST))
    ids, lengths = map(torch.from_numpy, tokenizer_again.pad(tokenizer.tokenize(CAPTIONS)))
    with torch.no_grad():
        expected = model.eval().encode_captions(ids, lengths)
        assert torch.equal(again.eval().encode_captions(ids, lengths), expected)


def test_a_language_model_starts_at_random_where_that_is_asked_for(tmp_path):
    settings = {"bert": str(make_text_model("bert", tmp_path / "bert")), "img_dim": 4, "embed_size": 8}
    (model, _, note), (pretrained, _, _) = new_model({**settings, "bert_from_scratch": True}), new_model(settings)
    assert note == "the language model (bert) starts at random (--bert_from_scratch)"
    one, other = (next(each.text_encoder.backbone_parameters()) for each in (model, pretrained))
    assert not torch.equal(one, other)
    new_model({**settings, "bert": str(TINY_BERT), "bert_from_scratch": True})


def test_a_model_with_clips_text_tower_is_trained_and_evaluated(tiny_flags, tmp_path, capsys):
    folder = make_text_model("clip", tmp_path / "clip")
    assert train.main([*tiny_flags, "--bert", str(folder), "--model_name", str(tmp_path / "run")]) == 0
    content = read_checkpoint(find_checkpoint(str(tmp_path / "run")))
    assert content["architecture"]["text_encoder"]["options"]["config"]["model_type"] == "clip_text_model"
    assert content["progress"]["epoch"] == 1
    build_model(content)


# What is refused


@pytest.mark.parametrize("name", ["tf_model.h5", "model.bin", "weights.safetensors", ""])
def test_weights_under_another_name_are_not_passed_over(tmp_path, name):
    folder = make_text_model("bert", tmp_path / "bert")
    weights = folder / "model.safetensors"
    weights.rename(folder / name) if name else weights.unlink()
    line = refused(folder)
    assert f"--bert {folder}: no weights to start from; --bert_from_scratch starts at random" in line
    listed = sorted(path.name for path in folder.iterdir())
    assert f"neither model.safetensors nor pytorch_model.bin among its files, which are {', '.join(listed)}" in line


def refused(bert) -> str:
    return refusal(new_model, {"bert": str(bert), "img_dim": 4, "embed_size": 8})


def test_a_language_model_that_is_nowhere_or_a_file_is_refused_without_asking_the_hub(tmp_path, capsys):
    for name in (str(tmp_path / "nothing"), "vocab/nope", "../nope"):
        line = refused(name)
        assert line.startswith(f"--bert {name}: no such folder, nor had ")
        assert line.endswith("(no such folder)")
    assert capsys.readouterr().out == ""
    (tmp_path / "file").touch()
    assert "is a file; give the folder" in refused(tmp_path / "file")


ASKING = """
import socket
from lib.checkpoints.native import new_model
from lib.cli import InputError
from lib.model import backbone

server, backbone.HUB_SECONDS = socket.socket(fileno={server}), 0.5
for name in ("tiny/whole", "tiny/nothing", "tiny/no_vocabulary", "tiny/no_weights"):
    try:
        print(new_model({{"bert": name, "img_dim": 4, "embed_size": 8}})[2])
    except InputError as error:
        print(error)
    if name == "tiny/whole":
        server.settimeout(0)
        try:
            server.accept()
        except BlockingIOError:
            print("the hub was not asked")
"""


def test_the_cache_is_read_without_the_hub_and_a_hub_that_does_not_answer_is_given_up(tmp_path):
    model = make_text_model("bert", tmp_path / "model")
    for name, missing in (("whole", ()), ("no_vocabulary", ("tokenizer.json", "vocab.txt")), ("no_weights", WEIGHTS)):
        folder = tmp_path / "hub" / f"models--tiny--{name}"
        shutil.copytree(model, folder / "snapshots" / "abc", ignore=shutil.ignore_patterns(*missing))
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("abc")
    with socket.create_server(("127.0.0.1", 0)) as server:
        environment = {**os.environ, **QUIET, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        environment["HF_ENDPOINT"] = f"http://127.0.0.1:{server.getsockname()[1]}"
        command, sockets = [sys.executable, "-c", ASKING.format(server=server.fileno())], [server.fileno()]
        printed = subprocess.check_output(command, cwd=ROOT, env=environment, pass_fds=sockets, text=True)
    asking, given_up = "the Hugging Face hub has 0.5 seconds to answer", "(TimeoutError)"
    nowhere = f"no such folder, nor had from the Hugging Face hub; give a whole model's folder {given_up}"
    assert printed.splitlines() == [
        "the language model (bert) starts from the weights of tiny/whole",
        "the hub was not asked",
        f"tiny/nothing: configuration and vocabulary are not in the cache; {asking}",
        f"--bert tiny/nothing: {nowhere}",
        f"tiny/no_vocabulary: configuration and vocabulary are not in the cache; {asking}",
        f"--bert tiny/no_vocabulary: {nowhere}",
        f"tiny/no_weights: weights are not in the cache; {asking}",
        f"--bert tiny/no_weights: no weights to start from; --bert_from_scratch starts at random {given_up}",
    ]


def spoil_weights(folder):
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    del weights["encoder.layer.1.output.dense.bias"]
    safetensors.torch.save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no language model"),
        (lambda folder: (folder / "config.json").write_text("{"), "no language model"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"junk" * 100), "no weights to start from"),
        (spoil_weights, "its weights lack encoder.layer.1.output.dense.bias"),
    ],
)
def test_a_folder_that_holds_no_whole_language_model_is_named(tmp_path, spoil, words):
    folder = make_text_model("bert", tmp_path / "bert")
    spoil(folder)
    message = refused(folder)
    assert message.startswith(f"--bert {folder}: ")
    assert words in message
