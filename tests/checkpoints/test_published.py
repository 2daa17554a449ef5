"""A checkpoint exactly as the published code writes it: it loads, scores and trains on as it does there."""

import argparse
import json
import os
import shutil
import zipfile

import numpy as np
import pytest
import torch

import convert as convert_program
import eval as eval_program
from lib.checkpoints.native import build_model, find_checkpoint, read_checkpoint, write_published
from lib.checkpoints.published import NEVER, published_name
from lib.cli import InputError
from lib.losses import hinge
from lib.training.optim import build_optimizer, set_learning_rate
from tests.checkpoints.test_native import same
from tests.conftest import PUBLISHED, TINY_BERT


def published_model():
    return build_model(read_checkpoint(PUBLISHED), str(TINY_BERT))[0]


def test_embeddings_and_scores_equal_the_published_code(golden):
    figures, model = golden("official_format_expected"), published_model().eval()
    images, ids, lengths = (torch.from_numpy(figures[name]) for name in ("images", "caption_ids", "lengths"))
    with torch.no_grad():
        regions, _ = model.encode_images(images.flatten(0, 1), torch.full((len(images),), images.shape[1]))
        words = model.encode_captions(ids, lengths)
        scores, plain = model.engine(regions, words, lengths), model.similarity(regions, words, lengths)
    is_word = torch.arange(ids.shape[1]) < lengths[:, None]
    expected_words = torch.from_numpy(figures["word_embeddings"])[is_word]
    torch.testing.assert_close(regions, torch.from_numpy(figures["region_embeddings"]), rtol=0, atol=1e-5)
    torch.testing.assert_close(words, expected_words, rtol=0, atol=1e-5)
    for one in (scores, plain):
        torch.testing.assert_close(one, torch.from_numpy(figures["similarity"]), rtol=0, atol=1e-5)


def test_five_training_steps_give_the_published_losses(golden):
    figures, model = golden("training_trajectory"), published_model()
    optimizer = build_optimizer(model, 5e-4)
    set_learning_rate(optimizer, 0, 5e-4, 15)
    model.train()
    model.text_encoder.backbone.eval()  # so that no dropout acts
    losses = []
    for step in range(len(figures["losses"])):
        counts, lengths = (torch.from_numpy(figures[name][step]) for name in ("region_counts", "caption_lengths"))
        images = torch.from_numpy(figures["images"][step])
        images = torch.cat([image[:count] for image, count in zip(images, counts, strict=True)])
        ids = torch.from_numpy(figures["caption_ids"][step])[:, : lengths.max()]
        loss = hinge(model(images, counts, ids, lengths), 0.2)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()
        losses.append(loss.item())
    torch.testing.assert_close(torch.tensor(losses), torch.from_numpy(figures["losses"]).float(), rtol=1e-5, atol=0)


@pytest.fixture
def altered(tmp_path):
    """Writes a copy of the published checkpoint whose content a function has changed."""

    def write(change):
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(PUBLISHED, weights_only=True)
        change(content)
        torch.save(content, tmp_path / "altered.pth.tar")
        return tmp_path / "altered.pth.tar"

    return write


def test_the_command_line_gives_the_published_scores(golden, tmp_path, capsys):
    """BERT is a folder of configuration and vocabulary only, here with words that name their own ids."""
    figures, bert, data = golden("official_format_expected"), tmp_path / "bert", tmp_path / "f30k_precomp"
    for folder in (bert, data):
        folder.mkdir()
    vocabulary = (TINY_BERT / "vocab.txt").read_text().split()
    special, words = vocabulary[:5], [f"word{entry}" for entry in range(5, len(vocabulary))]
    (bert / "vocab.txt").write_text("\n".join(special + words) + "\n")
    (bert / "config.json").write_bytes((TINY_BERT / "config.json").read_bytes())
    captions = [
        " ".join(f"word{entry}" for entry in ids[1 : length - 1])
        for ids, length in zip(figures["caption_ids"], figures["lengths"], strict=True)
    ]
    np.save(data / "test_ims.npy", figures["images"])
    (data / "test_caps.txt").write_text("\n".join(5 * captions) + "\n")  # five captions to an image
    flags = ["--checkpoint", PUBLISHED, "--bert", bert, "--data_path", tmp_path, "--save_sims", tmp_path / "scores.npy"]
    assert eval_program.main([*map(str, flags), "--device", "cpu", "--workers", "0"]) == 0
    out = capsys.readouterr().out
    assert f"{PUBLISHED}, 1 epochs, dev rSum 123.4" in out
    assert f"{data} test: 10 images, 50 captions" in out
    scores, expected = np.load(tmp_path / "scores.npy"), np.tile(figures["similarity"], 5)
    assert scores.shape == expected.shape == (10, 50)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)


def same_weights(path) -> bool:
    found = build_model(read_checkpoint(path), str(TINY_BERT))[0].state_dict()
    expected = published_model().state_dict()
    return all(torch.equal(weight, found[name]) for name, weight in expected.items())


def without_prefix(content):
    content["model"] = [{name.removeprefix("module."): w for name, w in part.items()} for part in content["model"]]


def with_position_ids(content):
    content["model"][1]["module.bert.embeddings.position_ids"] = torch.arange(64)[None]


def without_never_used(content):
    never_used = ("module.mlp.bns.1.", "module.bert.pooler.", "module.sim_eval.weight")
    content["model"] = [
        {name: weight for name, weight in part.items() if not name.startswith(never_used)} for part in content["model"]
    ]
    assert sum(map(len, content["model"])) == 54


@pytest.mark.parametrize("change", [without_prefix, with_position_ids, without_never_used])
def test_prefix_position_ids_and_weights_that_are_never_used_do_not_matter(altered, change):
    assert same_weights(altered(change))


def test_every_weight_is_needed_by_its_published_name(altered):
    names = [published_name(name) for name in read_checkpoint(PUBLISHED)["model"] if not name.startswith(NEVER)]
    assert len(names) == 54
    for name in names[::6]:
        part = 0 if name.startswith(("fc.", "mlp.")) else 1 if name.startswith(("bert.", "linear.")) else 2
        path = altered(lambda content, part=part, name=name: content["model"][part].pop(f"module.{name}"))
        with pytest.raises(InputError, match=rf"altered\.pth\.tar: .*: {name} is missing, expected "):
            build_model(read_checkpoint(path), str(TINY_BERT))


@pytest.mark.parametrize(
    ("part", "name", "words"),
    [
        (0, "module.fc.wieght", "fc.wieght is (2, 3), expected no such weight"),
        (0, "module.bert.pooler.dense.bias", "bert.pooler.dense.bias is (2, 3), expected no such weight"),  # elsewhere
        (2, "module.sim_map.weight", "sim_map.weight is (2, 3), expected (64,)"),
    ],
)
def test_surplus_and_misshapen_weights_are_refused_by_their_published_names(altered, part, name, words):
    path = altered(lambda content: content["model"][part].update({name: torch.zeros(2, 3)}))
    with pytest.raises(InputError) as error:
        build_model(read_checkpoint(path), str(TINY_BERT))
    assert str(error.value).startswith(f"{path}: ")
    assert words in str(error.value)


def test_settings_and_progress_are_the_published_entries_without_the_places_of_another_machine(altered):
    content = read_checkpoint(PUBLISHED)
    settings = content["settings"]
    assert settings["batch_size"] == 16
    assert settings["max_violation"] is True
    assert settings["data_name"] == "f30k_precomp"
    assert settings.keys().isdisjoint({"data_path", "model_name", "logger_name", "workers", "resume", "vocab_size"})
    progress = {"epoch": 1, "batch": 0, "step": 6, "best_rsum": 123.4, "best_epoch": 0, "history": []}
    assert content["progress"] == progress
    assert same_weights(altered(lambda content: content.update(opt=argparse.Namespace(embed_size=64, img_dim=48))))
    content = read_checkpoint(altered(lambda content: content.update(opt=argparse.Namespace())))
    assert content["architecture"]["embed_size"] == 1024


def test_another_bert_than_the_one_it_was_trained_with_is_refused(tmp_path):
    bert = shutil.copytree(TINY_BERT, tmp_path / "bert")
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    with pytest.raises(InputError, match=r"bert\.encoder\.layer\.2\.\S+ is missing, .* and 28 more\)?$"):
        build_model(read_checkpoint(PUBLISHED), str(tmp_path / "bert"))


def test_numpy_numbers_are_read_as_pythons_and_other_objects_are_named(altered):
    def with_numpy(content):
        content.update(best_rsum=np.float64(123.4), Eiters=np.int32(6), epoch=np.uint8(1))
        content["opt"].margin, content["opt"].max_violation = np.float32(0.5), np.bool_(True)

    path, old = altered(with_numpy), altered(with_numpy).with_name("old.pth.tar")
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(old, "w") as as_numpy_1:
        for name in archive.namelist():
            as_numpy_1.writestr(name, archive.read(name).replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    for content in map(read_checkpoint, (path, old)):
        read = [content["progress"][name] for name in ("best_rsum", "step", "epoch")]
        read += [content["settings"][name] for name in ("margin", "max_violation")]
        assert same(read, [123.4, 6, 1, 0.5, True])
    with pytest.raises(InputError, match=r": holds numpy\S+; torch\.load it where you trust it, .* plain types$"):
        read_checkpoint(altered(lambda content: content.update(best_rsum=np.array([1.0]))))
    with pytest.raises(InputError, match=r": holds posix\.system; "):
        read_checkpoint(altered(lambda content: content.update(best_rsum=RunsCode())))


class RunsCode:
    def __reduce__(self):
        return os.system, ("exit 1",)


def unpickled(path) -> dict:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


def convert(*flags):
    assert convert_program.main([str(flag) for flag in flags]) == 0


def test_a_published_file_comes_back_to_the_bit_from_weights_for_use(tmp_path):
    convert(PUBLISHED, tmp_path / "weights.safetensors", "--bert", TINY_BERT)
    assert same_weights(tmp_path / "weights.safetensors")
    convert(tmp_path / "weights.safetensors", tmp_path / "back.pth.tar")
    back, before = unpickled(tmp_path / "back.pth.tar"), unpickled(PUBLISHED)
    for content in (back, before):
        content["model"] = [dict(sorted(part.items())) for part in content["model"]]
    assert same(back, before)


def test_a_trained_model_becomes_a_published_file_that_scores_the_same(trained_run, tmp_path):
    convert(trained_run, tmp_path / "published.pth.tar")
    ours, _ = build_model(read_checkpoint(find_checkpoint(str(trained_run))))
    published, _ = build_model(read_checkpoint(tmp_path / "published.pth.tar"), str(TINY_BERT))
    assert same(dict(published.state_dict()), dict(ours.state_dict()))
    content = unpickled(tmp_path / "published.pth.tar")
    assert list(content) == ["epoch", "model", "best_rsum", "opt", "Eiters"]
    assert (content["opt"].img_dim, content["opt"].embed_size, content["opt"].margin) == (16, 16, 0.2)


@pytest.mark.parametrize(
    ("part", "given", "said"),
    [
        ("global_head", {"name": "gpo", "options": {}}, "a global head"),
        ("image_encoder", {"name": "pixels", "options": {}}, "--image_encoder pixels"),
        ("text_encoder", {"name": "transformer", "options": {"config": {"model_type": "roberta"}}}, "kind roberta"),
    ],
)
def test_what_the_published_code_does_not_know_is_not_written_for_it(trained_run, tmp_path, part, given, said):
    content = read_checkpoint(find_checkpoint(str(trained_run)))
    content["architecture"][part] = given
    with pytest.raises(InputError, match=f"the published code does not know .*{said}"):
        write_published(tmp_path / "published.pth.tar", content)


@pytest.mark.parametrize(
    ("out", "words"),
    [("model.bin", "expected a name that ends in .safetensors or .pth.tar"), ("here.pth.tar", "is there already")],
)
def test_converting_never_overwrites_and_knows_two_forms(tmp_path, capfd, out, words):
    (tmp_path / "here.pth.tar").write_text("precious")
    assert convert_program.main([str(PUBLISHED), str(tmp_path / out)]) == 2
    assert words in capfd.readouterr().err
    assert (tmp_path / "here.pth.tar").read_text() == "precious"
