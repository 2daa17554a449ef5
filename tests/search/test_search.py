"""The search: its answers are eval.py's ranking, whatever comes between the first picture and the last."""

import json
import os
import random
import resource
import shutil
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock

import eval as eval_program
import search
from lib import load
from lib.checkpoints.native import read_checkpoint
from lib.config import parse_command
from lib.evaluation.score import SEEN, Matcher
from lib.model.xdim import score_words
from tests.conftest import write_data, write_model, write_pictures
from tests.ranks import run_ranks

pytest.importorskip("lancedb")

from lib.search import Index, fill, index
from lib.search.index import decode, encode

DEVICE = ["--device", "cpu"]
QUERY = "a red ball"


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """A data set of features with images of 1 to 8 regions."""
    folder = write_data(tmp_path_factory.mktemp("data") / "tiny_precomp", images={"test": 30})
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 9, size=30)
    np.save(folder / "test_ims.npy", rng.standard_normal((counts.sum(), 16)).astype(np.float32))
    np.save(folder / "test_offsets.npy", np.cumsum([0, *counts]))
    np.save(folder / "test_boxes.npy", rng.uniform(size=(counts.sum(), 4)).astype(np.float32))
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("photos") / "all", [f"{k}.png" for k in range(12)])


def run(*flags):
    return search.main([*map(str, flags), *DEVICE])


def index_pictures(photos, checkpoint, uri, *flags):
    return run("index", photos, "--checkpoint", checkpoint, "--index", uri, *flags)


def stored(uri, name="pictures"):
    """The rows of a table, by what identifies them, without the files' times."""
    rows = index.connect(str(uri)).open_table(name).to_arrow().to_pylist()
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: {key: value for key, value in row.items() if key != "time"} for row in rows}


@pytest.mark.parametrize("head", ["", "gpo"])
@pytest.mark.parametrize("form", ["float32", "float16", "int8"])
def test_with_all_pictures_as_candidates_the_answer_is_the_ranking_of_eval(features, tmp_path, form, head, capsys):
    checkpoint, uri = (
        write_model(tmp_path / "m.safetensors", features, img_dim=16, global_head=head),
        tmp_path / "index",
    )
    data = ["--data_path", features.parent, "--data_name", features.name, "--split", "test"]
    sims = ["--save_sims", str(tmp_path / "sims.npy"), "--workers", "0", *DEVICE]
    assert eval_program.main(["--checkpoint", str(checkpoint), *map(str, data), *sims]) == 0
    assert run("index", *data, "--checkpoint", checkpoint, "--index", uri, "--compress", form) == 0
    assert "global head" in capsys.readouterr().out
    expected, ids = np.load(tmp_path / "sims.npy"), (features / "test_ids.txt").read_text().split()
    captions, searched = (features / "test_caps.txt").read_text().splitlines(), Index.open(uri, device="cpu")
    tolerance = {"float32": 1e-5, "float16": 2e-3, "int8": 5e-2}[form]
    for caption in range(0, len(captions), 10):
        found = searched.query(captions[caption], top=30, candidates=30)
        scores = np.array([expected[ids.index(one.id), caption] for one in found])
        np.testing.assert_allclose([one.score for one in found], scores, atol=tolerance)
        assert sorted(one.id for one in found) == sorted(ids)
        assert (np.diff(scores) <= 2 * tolerance).all()
        if form == "float32":
            assert [one.id for one in found] == [ids[k] for k in np.argsort(-expected[:, caption], kind="stable")]
    for one in searched.query(QUERY, top=3):
        seen = searched.explain(one.id, QUERY)
        assert seen.score == pytest.approx(one.score, abs=1e-5)
        assert seen.words == [word for word, _ in one.words]
        assert seen.scores == pytest.approx([score for _, score in one.words], abs=1e-5)
        np.testing.assert_array_equal(seen.boxes, one.boxes)
    if not head:  # X-Dim alone: its score is the mean over all pieces
        (first, *_), tokenizer = searched.query(QUERY, top=1), searched.matcher.tokenizer
        assert [word for word, _ in first.words] == QUERY.split()
        words = searched.encode(QUERY)[0]
        rows = searched.pictures.search().where(f"id = '{first.id}'").to_arrow()
        with torch.inference_mode():
            D, temperature = (similarity := searched.matcher.model.similarity).dependency(), similarity.log_temperature
            scores = score_words(searched.read_regions(rows).regions, words, D, temperature.exp())[0]
        assert first.score == pytest.approx(scores.mean().item(), abs=1e-5)
        pieces = tokenizer.tokenize([QUERY]).words
        for number, (_, of_word) in enumerate(first.words):
            assert of_word == pytest.approx(scores[1:-1][pieces == number].mean().item(), abs=1e-5)
        boxes = np.split(np.load(features / "test_boxes.npy"), np.load(features / "test_offsets.npy")[1:-1])
        np.testing.assert_array_equal(first.boxes, boxes[ids.index(first.id)])


def test_new_changed_unreadable_and_deleted_pictures_are_found_out_and_nothing_else_is_embedded(
    pixels, tmp_path, capsys, monkeypatch
):
    names = ["a.png", 'собака\'s "ball" 写真/b.png', "c.png"]
    photos, uri = write_pictures(tmp_path / "сад", names), tmp_path / "индекс"
    (photos / "d.jpg").write_bytes(b"no picture")
    assert index_pictures(photos, pixels, uri) == 0
    out = capsys.readouterr().out
    assert f"unreadable: {photos / 'd.jpg'}: not a picture" in out
    assert "3 pictures, 3 new, 1 unreadable; found by mean region and mean word" in out
    before, seen, see = stored(uri), [], Matcher.see
    assert before.keys() == set(names)
    monkeypatch.setattr(Matcher, "see", lambda self, *args: seen.append(len(args[0])) or see(self, *args))
    assert index_pictures(photos, pixels, uri) == 0
    assert "3 pictures, nothing new" in capsys.readouterr().out
    assert not seen
    shutil.copy(photos / "c.png", photos / "a.png")  # changed
    (photos / "c.png").write_bytes(b"no picture any more")
    write_pictures(photos, ["d.jpg", "e.png"])
    (photos / names[1]).unlink()
    assert index_pictures(photos, pixels, uri) == 0
    assert "3 pictures, 2 new, 1 changed, 1 unreadable, 1 removed" in capsys.readouterr().out
    after = stored(uri)
    assert sum(seen) == 3
    assert after.keys() == {"a.png", "d.jpg", "e.png"}
    assert after["a.png"]["vector"] == before["c.png"]["vector"] != before["a.png"]["vector"]
    assert stored(uri, "unreadable").keys() == {"c.png"}


def test_a_picture_finds_itself_and_what_is_said_of_it(pixels, photos, tmp_path, capsys):
    data, names = tmp_path / "data", [f"{k}.png" for k in range(12)]
    shutil.copytree(photos, data / "images")
    (data / "test_ids.txt").write_text("".join(f"{name}\n" for name in names))
    (data / "test_caps.txt").write_text("".join(f"a dog in {name} {k}\n" for name in names for k in range(5)))
    flags = ["--data_path", tmp_path, "--data_name", "data", "--checkpoint", pixels, "--index", tmp_path / "index"]
    for _ in range(2):
        assert run("index", *flags) == 0
    capsys.readouterr()
    assert run("query", "--image", photos / "3.png", "--index", tmp_path / "index", "--top", "4", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["pictures"]) == len(found["captions"]) == 4
    assert (found["pictures"][0]["id"], found["pictures"][0]["path"]) == ("3.png", str(data / "images" / "3.png"))
    assert found["pictures"][0]["score"] == pytest.approx(1, abs=1e-5)
    matcher = load(pixels, device="cpu")
    captions = (data / "test_caps.txt").read_text().splitlines()
    vectors = index.encode_captions(matcher, captions)[2] @ torch.tensor(stored(tmp_path / "index")["3.png"]["vector"])
    assert [one["caption"] for one in found["captions"]] == [captions[k] for k in vectors.argsort(descending=True)[:4]]

    captions[15] = "a cat, it is a cat"  # of 3.png
    (data / "test_caps.txt").write_text("\n".join(captions) + "\n")
    (data / "images" / "0.png").write_bytes(b"no picture any more")
    assert run("index", *flags) == 0
    assert "11 pictures, 1 changed, 1 unreadable" in capsys.readouterr().out
    kept = index.connect(str(tmp_path / "index")).open_table("captions").to_arrow()["caption"].to_pylist()
    assert sorted(kept) == sorted(captions[5:])


def test_features_lead_to_the_pictures_that_they_were_made_of(features, tmp_path, monkeypatch):
    data = shutil.copytree(features, tmp_path / "data")
    checkpoint = write_model(tmp_path / "m.safetensors", features, img_dim=16)
    monkeypatch.chdir(tmp_path)
    record = {"encoder": "other", "weights": "0", "regions": 8, "whole": True, "preprocessing": {"size": [0, 0]}}
    for folder, pictures in (("images", data / "images"), ("/photos", Path("/photos"))):
        (data / "encoder.json").write_text(json.dumps({**record, "folder": folder}))
        flags = ["--data_path", ".", "--data_name", "data", "--checkpoint", checkpoint]
        assert run("index", *flags, "--index", pictures.name) == 0
        assert all(row["path"] == str(pictures / name) for name, row in stored(pictures.name).items())


def test_a_sentence_of_any_length_is_scored_as_everywhere(pixels, photos, tmp_path, capsys):
    assert index_pictures(photos, pixels, tmp_path / "index") == 0
    searched, names = Index.open(tmp_path / "index", device="cpu"), [f"{k}.png" for k in range(12)]
    assert len(searched) == 12
    for sentence in ("dog", " ".join(f"the {word} man" for word in ["black", "red"] * 125)):
        found = searched.query(sentence)
        expected = load(pixels, device="cpu").score([photos / name for name in names], [sentence])[:, 0]
        assert len(found) == 10
        for one in found:
            assert one.score == pytest.approx(expected[names.index(one.id)].item(), abs=3e-3)
        words = [word for word, _ in found[0].words]
        assert words == sentence.split()[: len(words)]
        assert len(words) == 1 if sentence == "dog" else 10 < len(words) < 500  # the text model takes no more
    capsys.readouterr()
    assert run("query", "dog", "--index", tmp_path / "index", "--top", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert str(photos) in lines[0]
    assert "dog " in lines[1]


def test_a_large_index_is_searched_in_parts_and_its_small_files_are_joined(features, tmp_path, monkeypatch):
    checkpoint, uri = write_model(tmp_path / "m.safetensors", features, img_dim=16), tmp_path / "index"
    data = ["--data_path", features.parent, "--data_name", features.name, "--checkpoint", checkpoint]
    assert run("index", *data, "--index", uri) == 0
    for name, value in {
        "BLOCK": 4,
        "COMMIT": 4,
        "FILES": 3,
        "APPROXIMATE": 10,
        "OLD": timedelta(milliseconds=100),
    }.items():
        monkeypatch.setattr(fill, name, value)
    parts = tmp_path / "parts"
    assert run("index", *data, "--index", parts) == 0
    whole, searched = (Index.open(one, device="cpu") for one in (uri, parts))
    assert not whole.pictures.list_indices()
    (made,) = searched.pictures.list_indices()
    assert searched.pictures.index_stats(made.name).num_unindexed_rows == 0
    assert searched.pictures.stats()["fragment_stats"]["num_fragments"] == 1
    monkeypatch.setattr(index, "PROBES", 1)
    vector = whole.encode(QUERY)[2]
    assert len(searched.nearest(searched.pictures, vector, 29, ["id"])) < 29  # one part of five
    for found, same in zip(*(one.query(QUERY, candidates=30) for one in (whole, searched)), strict=True):
        assert (found.id, found.score) == (same.id, pytest.approx(same.score, abs=2e-3))


# Processes

SMALL = 2  # pictures of a commit


def killed(flags, delay):
    """search.py index, killed so many seconds after its second write has begun; there is no third one."""
    write, writes, fill.COMMIT = fill.Filling._write, [], SMALL

    def write_and_die(*args):
        writes.append(args)
        if len(writes) == 2:
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        write(*args)
        time.sleep(60 * (len(writes) == 2))

    fill.Filling._write = write_and_die
    return search.main(flags)


def job(flags):
    """search.py index in a job of several processes."""
    fill.COMMIT = SMALL
    return search.main(flags)


def index_flags(photos, checkpoint, uri):
    return ["index", str(photos), "--checkpoint", str(checkpoint), "--index", str(uri), *DEVICE]


def assert_equal_rows(one, other):
    assert one.keys() == other.keys()
    for name, row in one.items():
        np.testing.assert_allclose(row["vector"], other[name]["vector"], atol=1e-5)
        regions = (decode(each["regions"], 16, "float16") for each in (row, other[name]))
        np.testing.assert_allclose(*regions, atol=1e-3)


def test_after_three_kills_the_same_command_ends_with_every_picture_once(pixels, tmp_path):
    photos = write_pictures(tmp_path / "photos", [f"{k}.png" for k in range(60)])
    flags, rng, counts = index_flags(photos, pixels, tmp_path / "index"), random.Random(0), [0]
    for _ in range(3):
        (outcome,) = run_ranks(killed, 1, flags, rng.uniform(0, 0.1), check=False)
        assert outcome.exitcode == -signal.SIGKILL, outcome.err
        counts.append(len(stored(tmp_path / "index")))
        assert counts[-2] + SEEN <= counts[-1] <= counts[-2] + 2 * SEEN  # the write under way is there, or is not
    assert index_pictures(photos, pixels, tmp_path / "index") == 0
    assert index_pictures(photos, pixels, tmp_path / "whole") == 0
    assert_equal_rows(stored(tmp_path / "index"), stored(tmp_path / "whole"))


def test_two_processes_make_the_index_that_one_makes(pixels, photos, tmp_path):
    outcomes = run_ranks(job, 2, index_flags(photos, pixels, tmp_path / "two"))
    assert [one.value for one in outcomes] == [0, 0]
    assert "12 pictures, 12 new" in outcomes[0].out
    assert index_pictures(photos, pixels, tmp_path / "one") == 0
    assert_equal_rows(stored(tmp_path / "two"), stored(tmp_path / "one"))
    answers = [Index.open(tmp_path / name, device="cpu").query(QUERY) for name in ("one", "two")]
    for one, two in zip(*answers, strict=True):
        assert (one.id, one.score) == (two.id, pytest.approx(two.score, abs=1e-3))


def read_or_write(flags, uri, done, known):
    """In rank 0 one more picture a commit; in the others queries until it has ended. Returns the numbers of answers."""
    rank = int(os.environ.pop("RANK"))  # no job, but processes on their own
    if rank == 0:
        fill.COMMIT = SMALL
        code = search.main(flags)
        Path(done).touch()
        return code
    searched, counts = Index.open(uri, device="cpu"), []
    while not (ended := Path(done).exists()) or not counts:
        answers = searched.query(QUERY, top=100)
        assert answers == sorted(answers, key=lambda one: (-one.score, one.id))
        assert {one.id for one in answers} <= set(known)
        counts.append(len(answers))
        time.sleep(0.05)
    time.sleep(index.FRESH.total_seconds())
    return [*counts, len(searched.query(QUERY, top=100)), ended]


def test_four_processes_read_while_one_writes(pixels, tmp_path):
    photos, uri = write_pictures(tmp_path / "photos", ["0.png", "1.png", "2.png"]), str(tmp_path / "index")
    assert index_pictures(photos, pixels, uri) == 0
    names = [f"{k}.png" for k in range(30)]
    write_pictures(photos, names)
    flags = index_flags(photos, pixels, uri)
    writer, *readers = run_ranks(read_or_write, 5, flags, uri, str(tmp_path / "done"), names)
    assert writer.value == 0
    for reader in readers:
        *counts, last, _ = reader.value
        assert counts == sorted(counts)
        assert 3 <= counts[0] <= last == 30


def on_a_full_disk(flags, size):
    """search.py index where no file can grow beyond so many bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    return search.main(flags)


def test_a_full_disk_leaves_the_index_as_it_was(pixels, photos, tmp_path):
    folder, uri = write_pictures(tmp_path / "photos", ["0.png", "1.png"]), tmp_path / "index"
    assert index_pictures(folder, pixels, uri) == 0
    before = stored(uri)
    write_pictures(folder, [f"{k}.png" for k in range(200)])
    (outcome,) = run_ranks(on_a_full_disk, 1, index_flags(folder, pixels, uri), 16_000)
    assert outcome.value == 2
    assert len(outcome.err.splitlines()) == 1
    assert f"error: --index {uri}: could not be written (" in outcome.err
    assert stored(uri) == before


# Refusals


def refusal(capfd, *flags):
    capfd.readouterr()
    assert run(*flags) == 2
    line = capfd.readouterr().err
    assert len(line.splitlines()) == 1, line
    return line


def test_what_cannot_be_is_refused_in_one_line(pixels, photos, features, tmp_path, capfd, monkeypatch):
    (tmp_path / "empty").mkdir()
    uri, other = tmp_path / "index", write_model(tmp_path / "other.safetensors", features, img_dim=16, seed=1)
    assert "no pictures in it" in refusal(capfd, "index", tmp_path / "empty", "--checkpoint", pixels, "--index", uri)
    assert "no such folder" in refusal(capfd, "index", tmp_path / "none", "--checkpoint", pixels, "--index", uri)
    assert "no index there; make one" in refusal(capfd, "query", "dog", "--index", uri)
    assert "no such checkpoint" in refusal(capfd, "index", photos, "--checkpoint", tmp_path / "x", "--index", uri)
    assert "nothing says which program" in refusal(capfd, "index", photos, "--checkpoint", other, "--index", uri)
    assert "give a folder of pictures, or --data_name" in refusal(capfd, "index", "--index", uri)
    assert "give a sentence, or --image" in refusal(capfd, "query", "--index", uri)
    assert "--index: say where" in refusal(capfd, "query", "dog")
    assert parse_command(search.COMMANDS, ["query", "two", "dogs", "--index", "x"]).text == "two dogs"
    assert " index or query or serve, and flags" in refusal(capfd)
    assert not uri.exists()
    (tmp_path / "empty" / "a.png").write_bytes(b"no picture")
    assert index_pictures(tmp_path / "empty", pixels, uri) == 0
    assert "no pictures in it" in refusal(capfd, "query", "dog", "--index", uri)
    write_pictures(tmp_path / "empty", ["a.png"])
    assert index_pictures(tmp_path / "empty", pixels, uri) == 0
    for command in (["query", "dog"], ["index", tmp_path / "empty"]):
        assert "was made by the model" in refusal(capfd, *command, "--index", uri, "--checkpoint", other)
    assert f"was made with {tmp_path / 'empty'}, not {photos}" in refusal(capfd, "index", photos, "--index", uri)
    flags = ["index", tmp_path / "empty", "--index", uri, "--compress", "int8"]
    assert "made with --compress float16, not int8" in refusal(capfd, *flags)
    assert "not a picture" in refusal(capfd, "query", "--image", pixels, "--index", uri)
    with FileLock(uri / fill.LOCK):
        assert "another process is writing it" in refusal(capfd, "index", tmp_path / "empty", "--index", uri)
    assert run("query", "dog", "--index", uri) == 0
    moved = shutil.copy(pixels, tmp_path / "moved.safetensors")
    assert run("query", "dog", "--index", uri, "--checkpoint", moved) == 0
    monkeypatch.setitem(__import__("sys").modules, "lancedb", None)
    assert "pip install lancedb" in refusal(capfd, "query", "dog", "--index", uri)


def test_a_checkpoint_that_carries_no_checksum_is_known_by_its_weights(features, tmp_path):
    prints = []
    for seed in (0, 0, 1):
        written = write_model(tmp_path / "m.safetensors", features, img_dim=16, seed=seed)
        matcher = load(written, device="cpu")
        assert matcher.content["sha256"] == index.fingerprint(matcher)
        del matcher.content["sha256"]
        prints.append(index.fingerprint(matcher))
    assert prints[0] == prints[1] != prints[2]
    assert read_checkpoint(written)["sha256"] not in prints


def test_a_region_takes_a_byte_a_number_and_loses_little():
    regions = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    regions[3] = 0
    stored = encode(regions, "int8")
    assert len(stored) == 5 * (64 + 4)
    error = np.abs(decode(stored, 64, "int8") - regions).max(axis=1)
    assert (error <= np.abs(regions).max(axis=1) / 254 + 1e-7).all()
    assert decode(stored, 64, "int8").dtype == np.float32
