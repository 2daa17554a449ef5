"""The gallery shows what eval.py finds; curves are what a run's files hold."""

import base64
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

import eval as evaluation
import show
from lib.checkpoints.record import read_record
from lib.figures import results
from tests.conftest import write_data

pytest.importorskip("matplotlib")

CARD = re.compile(r'<article id="(\w+)-(\d+)" class="\w+" data-rank="(\d+)">(.*?)</article>')
SCORE = re.compile(r"<small>([-\d.]+)</small>")


def gallery(out, *flags) -> str:
    assert show.main(["retrieval", *map(str, flags), "--out", str(out)]) == 0
    return out.read_text(encoding="utf-8")


@pytest.fixture
def pictures(tmp_path) -> Path:
    """A picture for each id of the tiny data set's test split."""
    (tmp_path / "pictures").mkdir()
    for image in range(10):
        PIL.Image.new("RGB", (400, 300), (25 * image, 0, 0)).save(tmp_path / "pictures" / f"{image}.png")
    return tmp_path / "pictures"


def test_ranks_scores_and_right_answers_of_a_gallery_are_those_of_an_evaluation(trained_run, pictures, tmp_path):
    flags = ["--checkpoint", str(trained_run), "--split", "test", "--device", "cpu", "--workers", "0"]
    page = gallery(tmp_path / "gallery.html", *flags, "--image_path", pictures)
    assert evaluation.main([*flags, "--ranks", str(tmp_path / "ranks")]) == 0
    _, *queries = map(json.loads, (tmp_path / "ranks").read_text().splitlines())
    expected = {(one["way"], one["query"]): one for one in queries}
    cards = {(way, int(number)): (int(rank), card) for way, number, rank, card in CARD.findall(page)}
    assert cards.keys() == expected.keys()
    for key, (rank, card) in cards.items():
        query = expected[key]
        assert rank == min(query["ranks"]["all"])
        scores = [float(score) for score in SCORE.findall(card)]
        assert scores[:5] == pytest.approx([score for _, score in query["top"][:5]], abs=1e-4)
        framed = [int(one) for one in re.findall(r'<li class="right(?: behind)?"><p><b>\S right</b> (\d+)\.', card)]
        wanted = sorted(one for one in query["ranks"]["all"] if one <= 5) or [rank]
        assert framed == wanted
    ranks = [rank for rank, _ in cards.values()]
    assert ranks == sorted(ranks, reverse=True)
    drawn = json.loads(re.search(r"const pictures = (.*)", page)[1])
    assert len(drawn) == 10  # each once, however often it is shown
    for image, jpeg in drawn.items():
        picture = PIL.Image.open(io.BytesIO(base64.b64decode(jpeg)))
        assert picture.size == (160, 120)
        assert picture.getpixel((0, 0))[0] == pytest.approx(25 * int(image), abs=5)


def test_a_gallery_holds_the_worst_queries_and_says_what_is_left_out(trained_run, pictures, tmp_path):
    flags = ["--checkpoint", trained_run, "--device", "cpu", "--workers", "0", "--image_path", pictures]
    whole, part = (gallery(tmp_path / f"{n}.html", *flags, "--queries", n) for n in (200, 4))
    cards = [[(way, int(rank)) for way, _, rank, _ in CARD.findall(page)] for page in (whole, part)]
    for way, queries in (("t2i", 50), ("i2t", 10)):
        ranks, kept = ([rank for of_way, rank in some if of_way == way] for some in cards)
        assert kept == ranks[:4]
        rest = f"the 4 worst are here, {queries - 4} of rank {ranks[4]} or better are left out"
        assert rest in part
        assert rest not in whole


def test_captions_and_ids_are_text_on_the_page_whatever_is_in_them_and_missing_pictures_are_explained(tmp_path):
    """They are foreign: a data set from elsewhere."""
    folder, script = write_data(tmp_path / "own_precomp", {"test": 2}), "<script>alert('1')</script> $cards & more"
    (folder / "test_caps.txt").write_text(f"{script}\n" * 10)
    (folder / "test_ids.txt").write_text('a"><img src=x onerror=alert(1)>\nb\n')
    np.save(tmp_path / "scores.npy", np.random.default_rng(0).random((2, 10), np.float32))
    flags = ["--checkpoint", tmp_path / "scores.npy", "--data_path", tmp_path, "--data_name", folder.name]
    page = gallery(tmp_path / "gallery.html", *flags)
    assert page.count("<script>") == 1  # the page's own
    assert page.count("&lt;script&gt;alert(&#x27;1&#x27;)&lt;/script&gt; $cards &amp; more") == 10 + 2 * 5
    assert "<img" not in page
    assert "a&quot;&gt;&lt;img src=x onerror=alert(1)&gt;" in page
    assert "2 of 2 pictures are missing" in page
    assert "say where they are with --image_path" in page


def test_curves_are_those_of_the_runs_files_and_need_no_tensorboard(trained_run, tmp_path, capsys):
    record, found = read_record(trained_run), results.read_curves(trained_run)
    np.testing.assert_array_equal(found.loss[:, 0] * 15, [1, 5, 10, 15])
    lines = re.findall(r"step \d+ loss ([\d.]+)", (trained_run / "run.log").read_text())
    assert found.loss[:, 1] == pytest.approx([float(loss) for loss in lines], abs=1e-4)
    assert found.rsum.tolist() == [[1.0, record["history"][0]["dev"]["rsum"]]]
    assert len(found.sparsity) == 4
    assert f"chance {found.chance:.1f}\n" in (trained_run / "run.log").read_text()
    bare = tmp_path / "bare"
    bare.mkdir()
    record["settings"]["logger_name"] = str(bare)
    (bare / "run.json").write_text(json.dumps(record))
    assert len(results.read_curves(bare).loss) == 0
    figure = results.draw_curves({name: results.read_curves(path) for name, path in (("a", trained_run), ("b", bare))})
    assert [line.get_label() for line in figure.axes[1].lines[:2]] == ["a", "b"]
    again = shutil.copytree(bare, tmp_path / "again" / "_$x_{$")
    for runs in ([bare], [trained_run, bare, again]):
        assert show.main(["training", *map(str, runs), "--out", str(tmp_path / "curves.png")]) == 0
    legend = results.draw_curves({again.name: results.read_curves(again)}).legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["_$x_{$"]
    (again / "run.json").unlink()
    capsys.readouterr()
    assert show.main(["training", str(bare), str(again), "--out", str(tmp_path / "curves.png")]) == 2
    assert capsys.readouterr().err == f"error: {again}: not the folder of a run: no run.json in it\n"
