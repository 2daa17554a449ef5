"""COCO's further protocols over its own 5,000 test images, against the package eccv_caption that defines them."""

import contextlib
import copy
import io
import json
import re
import sys
from collections import Counter
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
import torch
from eccv_caption import Metrics
from torch.nn import functional as F

import eval as eval_program
import train
from lib.checkpoints.native import build_model, read_checkpoint
from lib.data.dataset import Split, open_split
from lib.evaluation.coco import open_coco
from lib.evaluation.metrics import bootstrap_means, interval
from tests.conftest import write_data
from tests.data.samples import refusal
from tests.evaluation.test_rankings import sorted_items

IMAGES = 5000
FEW = 100  # of the images, where these are enough
WAYS = ("i2t", "t2i")
RECALLS = ("r1", "r5", "r10")
PROTOCOLS = ("COCO 1K", "COCO 5K", "CxC", "ECCV Caption", "PMRP")
PLAUSIBLE = {"i2t": "pm_image_to_caption.json", "t2i": "pm_caption_to_image.json"}


class Ids(NamedTuple):
    """COCO's ids in the order of a split: five captions for each image."""

    images: list[int]
    captions: list[int]


@pytest.fixture(scope="module")
def package():
    return Metrics()


@pytest.fixture(scope="module")
def package_order(package):
    captions = package.coco_ids.tolist()
    return Ids([package.coco_gts["t2i"][caption][0] for caption in captions[::5]], captions)


def write_lines(path, lines):
    path.write_text("".join(f"{line}\n" for line in lines))


def make_split(folder, images=(), captions=(), counts=(5,) * IMAGES):
    """A split without features. images, captions: lines of its files of ids; without lines there is no file."""
    folder.mkdir(exist_ok=True)
    for name, lines in (("testall_ids.txt", images), ("testall_capids.txt", captions)):
        if len(lines):
            write_lines(folder / name, lines)
    image_of_caption = np.repeat(np.arange(len(counts)), counts)
    return Split("testall", folder, range(len(counts)), ["a dog"] * sum(counts), image_of_caption)


@pytest.fixture(scope="module")
def few_package(package, package_order):
    """The package as if COCO had a few test images only: to open and to evaluate it takes no time."""
    few, captions = copy.copy(package), package_order.captions[: 5 * FEW]
    there = {"i2t": {*package_order.images[:FEW]}, "t2i": {*captions}}
    few.coco_ids = np.array(captions)
    for name in ("coco_gts", "cxc_gts", "eccv_gts"):
        pairs = {way: {q: right for q, right in getattr(package, name)[way].items() if q in there[way]} for way in WAYS}
        setattr(few, name, pairs)
    return few


@pytest.fixture
def few(few_package, package_order, monkeypatch):
    """The ids of a few images, which are all for as long as a test runs."""
    monkeypatch.setattr("eccv_caption.Metrics", lambda: copy.copy(few_package))
    return Ids(package_order.images[:FEW], package_order.captions[: 5 * FEW])


def split_of_few(folder, images=(), captions=(), counts=(5,) * FEW):
    return make_split(folder, images, captions, counts)


# Metrics, against the package's


class Evaluated(NamedTuple):
    """What eval.py has made of scores, and the ranked lists of ids as the package takes them."""

    results: dict
    records: list[dict]  # the lines of --ranks
    printed: str
    package: Metrics  # with plausible matches


@pytest.fixture(scope="module")
def evaluated(few_package, package_order, tmp_path_factory):
    """eval.py --eccv of saved scores of a few images, in an order of its own and with many equal scores."""
    data, made = tmp_path_factory.mktemp("coco") / "coco_precomp", tmp_path_factory.mktemp("made")
    rng = np.random.default_rng(0)
    order = rng.permutation(FEW)
    captions = rng.permuted(np.reshape(package_order.captions, (IMAGES, 5))[order], axis=1).ravel().tolist()
    ids = Ids(np.array(package_order.images)[order].tolist(), captions)
    few = copy.copy(few_package)
    few.pm_gts = {
        way: {q: [*few.coco_gts[way][q], *rng.choice(items, 3).tolist()] for q in queries}
        for way, queries, items in zip(WAYS, ids, reversed(ids), strict=True)
    }
    make_split(data, *ids)
    np.save(data / "testall_ims.npy", np.zeros((FEW, 1, 1), np.float32))
    write_lines(data / "testall_caps.txt", (f"caption {caption}" for caption in ids.captions))
    write_plausible(data / "cxc_annots", few.pm_gts)
    scores = rng.integers(40, size=(FEW, 5 * FEW)).astype(np.float32)
    number = [{one: k for k, one in enumerate(each)} for each in ids]
    for pairs in (few.coco_gts, few.cxc_gts, few.eccv_gts):
        for image, some in pairs["i2t"].items():
            for caption in set(some) & set(ids.captions):
                scores[number[0][image], number[1][caption]] += rng.integers(6)
    np.save(made / "scores.npy", scores)
    flags = ["--data_path", data.parent, "--data_name", data.name, "--split", "testall", "--device", "cpu", "--eccv"]
    files = ["--checkpoint", made / "scores.npy", "--json", made / "results.json", "--ranks", made / "ranks.jsonl"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr("eccv_caption.Metrics", lambda: copy.copy(few_package))
        assert eval_program.main([str(flag) for flag in (*flags, *files)]) == 0
    results, lines = (made / "results.json").read_text(), (made / "ranks.jsonl").read_text().splitlines()
    few.lists = {"i2t": (ids.images, ids.captions, scores), "t2i": (ids.captions, ids.images, scores.T)}
    return Evaluated(json.loads(results), [json.loads(line) for line in lines[1:]], printed.getvalue(), few)


def write_plausible(folder, pairs):
    folder.mkdir(exist_ok=True)
    for way, name in PLAUSIBLE.items():
        (folder / name).write_text(json.dumps(pairs[way]))


def ranked_ids(package, fits):
    """The lists as the package takes them: ids, best first, wrong ones first among equal scores."""
    ranked = {}
    for way, (queries, items, scores) in package.lists.items():
        rows = {query: row for query, row in zip(queries, scores, strict=True) if query in fits[way]}
        right = {query: {k for k, one in enumerate(items) if one in fits[way][query]} for query in rows}
        ranked[way] = {query: [items[k] for k in sorted_items(row, right[query])] for query, row in rows.items()}
    return ranked


def metrics_of(evaluated, protocol):
    (of_protocols,) = evaluated.results["coco"]["rows"].values()
    return of_protocols[protocol]


def assert_equal(found, expected):
    """found: {way: {metric: percent}}; expected: {metric: {way: part of 1}}."""
    for way in WAYS:
        assert found[way] == pytest.approx({name: 100 * ways[way] for name, ways in expected.items()}, abs=1e-9)
        assert all(0 < percent < 100 for percent in found[way].values())


@pytest.mark.parametrize(
    ("protocol", "name", "fits"),
    [("COCO 1K", "coco_1k", "coco_gts"), ("COCO 5K", "coco_5k", "coco_gts"), ("CxC", "cxc", "cxc_gts")],
)
def test_recalls_equal_those_of_the_package(evaluated, protocol, name, fits):
    package = evaluated.package
    ranked = ranked_ids(package, getattr(package, fits))
    theirs = package.compute_all_metrics(ranked["i2t"], ranked["t2i"], target_metrics=[f"{name}_recalls"])
    recalls = {recall: theirs[f"{name}_{recall}"] for recall in RECALLS}
    average = {way: np.mean([recalls[recall][way] for recall in RECALLS]) for way in WAYS}
    assert_equal(metrics_of(evaluated, protocol), {**recalls, "avg": average})


def test_eccv_caption_and_plausible_matches_equal_those_of_the_package(evaluated):
    package = evaluated.package
    ranked = ranked_ids(package, package.eccv_gts)
    names = {"map_at_r": "eccv_map_at_r", "r_precision": "eccv_rprecision", "r1": "eccv_r1"}
    theirs = package.compute_all_metrics(ranked["i2t"], ranked["t2i"], target_metrics=names.values())
    assert_equal(metrics_of(evaluated, "ECCV Caption"), {metric: theirs[name] for metric, name in names.items()})
    of_plausible = package.pmrp(ranked_ids(package, package.pm_gts), "all")
    assert_equal(metrics_of(evaluated, "PMRP"), {"r_precision": of_plausible})


# --ranks and the tables say the same


def test_a_query_has_ranks_by_those_protocols_that_know_it_and_intervals_come_from_them(evaluated):
    counted = Counter((one["way"], name) for one in evaluated.records for name in one["ranks"])
    for way, queries in zip(WAYS, (FEW, 5 * FEW), strict=True):
        assert {counted[way, name] for name in ("all", "COCO 1K", "COCO 5K", "PMRP")} == {queries}
        assert counted[way, "CxC"] == len(evaluated.package.cxc_gts[way])
        some = [one for one in evaluated.records if one["way"] == way and "ECCV Caption" in one["ranks"]]
        assert len(some) == len(evaluated.package.eccv_gts[way])
        first = np.array([[100 * (min(one["ranks"]["ECCV Caption"]) == 1)] for one in some])
        images = np.array([one["query"] if way == "i2t" else one["right"][0] for one in some])
        found = metrics_of(evaluated, "ECCV Caption")
        assert found[way]["r1"] == pytest.approx(first.mean())
        assert found["interval"][way]["r1"] == pytest.approx(interval(bootstrap_means(first, images)[:, 0]))


def test_a_table_has_a_row_and_an_interval_for_each_protocol(evaluated):
    lines = evaluated.printed.splitlines()
    for protocol in PROTOCOLS:
        (at,) = (k for k, line in enumerate(lines) if line.startswith(f"{protocol}  "))
        found, names = metrics_of(evaluated, protocol), (protocol, "  95 % from", "  95 % to")
        ends = [both for way in WAYS for both in found["interval"][way].values()]
        printed = [[percent for way in WAYS for percent in found[way].values()], *zip(*ends, strict=True)]
        for line, name, values in zip(lines[at : at + 3], names, printed, strict=True):
            assert line.startswith(f"{name}  ")
            assert line.removeprefix(name).split() == [f"{value:.1f}" for value in values]
    assert "ids: testall_ids.txt; testall_capids.txt\n" in evaluated.printed
    assert "CxC's images among images and captions among captions need cxc_annots/" in evaluated.printed


# What is refused


def test_without_a_file_of_ids_the_packages_order_is_taken_and_the_note_says_so(tmp_path, few):
    without, given = open_coco(split_of_few(tmp_path / "a")), open_coco(split_of_few(tmp_path / "b", few.images))
    assert "ids: testall_ids.txt is missing, the order of eccv_caption is taken; captions of an image" in without.note
    for one, other in zip(without.protocols, given.protocols, strict=True):
        assert [{q: right.tolist() for q, right in one.right[way].items()} for way in WAYS] == [
            {q: right.tolist() for q, right in other.right[way].items()} for way in WAYS
        ]


def test_a_missing_package_is_an_error_that_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "eccv_caption", None)
    assert "--eccv needs eccv_caption: pip install eccv_caption" in refusal(open_coco, split_of_few(tmp_path))


@pytest.mark.parametrize("counts", [(5,) * 19, (4, 6, *(5,) * (FEW - 2))])
def test_other_numbers_of_images_or_captions_are_an_error(tmp_path, few, counts):
    found = f"{tmp_path} testall has {len(counts)} images and {sum(counts)} captions, but these protocols are for"
    expected = f"--eccv: {found} COCO's {FEW} test images with five captions each (--split testall)"
    assert refusal(open_coco, split_of_few(tmp_path, counts=counts)) == expected


@pytest.mark.parametrize(
    "other", [999999999, "COCO_val2014_000000391895.jpg", None], ids=["another", "a file", "twice"]
)
def test_ids_that_are_not_those_of_cocos_images_are_an_error(tmp_path, few, other):
    images = [other or few.images[1], *few.images[1:]]
    complaint = f"{tmp_path / 'testall_ids.txt'}: these are not the ids (numbers) of COCO's {FEW} test images"
    assert refusal(open_coco, split_of_few(tmp_path, images)) == f"--eccv: {complaint}"


@pytest.mark.parametrize("captions", [lambda ids: ids[::-1], lambda ids: ["a", *ids[1:]]])
def test_ids_that_are_not_those_of_the_images_captions_are_an_error(tmp_path, few, captions):
    complaint = f"{tmp_path / 'testall_capids.txt'}: its ids are not those of the captions of testall_ids.txt's images"
    assert refusal(open_coco, split_of_few(tmp_path, few.images, captions(few.captions))) == f"--eccv: {complaint}"


@pytest.mark.parametrize("text", ['{"391895": [770337', "{}"])
def test_damaged_files_of_plausible_matches_are_an_error(tmp_path, few, few_package, text):
    write_plausible(tmp_path / "cxc_annots", few_package.coco_gts)
    (tmp_path / "cxc_annots" / PLAUSIBLE["i2t"]).write_text(text)
    what = "pm_image_to_caption.json or pm_caption_to_image.json is damaged, or not of COCO's testall ("
    assert refusal(open_coco, split_of_few(tmp_path)).startswith(f"{tmp_path / 'cxc_annots'}: {what}")


# Right answers among images, and among captions


def write_ratings(path, kind, pairs):
    """CxC's official CSV, or GPO's JSON by the name of the file. pairs: (id, id, rating)."""
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".json":
        both = [*pairs, *((b, a, rating) for a, b, rating in pairs if a != b)]
        listed = {a: [[str(other), rating] for one, other, rating in both if one == a] for a, _, _ in both}
        path.write_text(json.dumps(listed))
        return
    form = {"image": "COCO_val2014_{:012}.jpg", "caption": "COCO_val2014:sentid:{}"}[kind]
    rows = [f"{form.format(one)},{form.format(other)},{rating},i2i_csim" for one, other, rating in pairs]
    write_lines(path, [f"{kind}1,{kind}2,agg_score,sampling_method", *rows])


def in_lists(right):
    return {query: answers.tolist() for query, answers in right.items()}


@pytest.mark.parametrize("name", ["sis_test.csv", "cxc_i2i.json"])
@pytest.mark.parametrize("beside", [False, True], ids=["within the data set", "beside it"])
def test_images_that_people_rated_two_and_a_half_or_better_fit_each_other_both_ways_round(tmp_path, few, beside, name):
    a, b, c, d, e, *_ = few.images
    pairs = [(a, b, 3.6), (c, a, 2.5), (a, d, 2.499), (b, b, 5.0), (e, 9, 5.0), (c, b, "4"), (a, b, 3.1)]
    split = split_of_few(tmp_path / "coco_precomp", few.images[::-1])
    write_ratings((tmp_path if beside else split.folder) / "cxc_annots" / name, "image", pairs)
    opened = open_coco(split)
    assert list(opened.intra) == ["i2i"]
    assert in_lists(opened.intra["i2i"]) == {97: [98, 99], 98: [97, 99], 99: [97, 98]}
    assert "cxc_annots" not in opened.note


@pytest.mark.parametrize("name", ["sts_test.csv", "cxc_t2t.json"])
def test_captions_fit_those_of_their_image_whatever_their_rating_and_others_from_three_on(tmp_path, few, name):
    captions = np.reshape(few.captions, (FEW, 5))[::-1].ravel().tolist()
    pairs = [(0, 1, 0.5), (0, 9, 3.0), (2, 9, 2.9), (99, 3, 4.2)]
    named = [(captions[one], captions[other], rating) for one, other, rating in pairs]
    write_ratings(tmp_path / "cxc_annots" / name, "caption", named)
    right = in_lists(open_coco(split_of_few(tmp_path, few.images[::-1])).intra["t2t"])
    more = {0: [9], 9: [0], 99: [3], 3: [99]}
    others = {c: [k for k in range(c - c % 5, c - c % 5 + 5) if k != c] for c in range(5 * FEW)}
    assert right == {caption: sorted(some + more.get(caption, [])) for caption, some in others.items()}


def test_gpos_file_of_ratings_goes_before_the_official_one(tmp_path, few):
    a, b, c, *_ = few.images
    write_ratings(tmp_path / "cxc_annots" / "sis_test.csv", "image", [(a, b, 5)])
    write_ratings(tmp_path / "cxc_annots" / "cxc_i2i.json", "image", [(a, c, 5)])
    assert in_lists(open_coco(split_of_few(tmp_path, few.images)).intra["i2i"]) == {0: [2], 2: [0]}


HEADER = b"image1,image2,agg_score,sampling_method\n"


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("sis_test.csv", HEADER + b"COCO_val2014_000000205866.jpg,CO", "damaged, or not CxC's ("),
        ("cxc_i2i.json", b'{"391895": [["770337", 3.0', "damaged, or not CxC's ("),
        ("sis_test.csv", HEADER + b"a_1,a_2,5.0,i2i_csim\n", "none of its pairs is of this split"),
    ],
)
def test_annotations_that_are_damaged_or_of_another_split_are_an_error_that_names_the_file(
    tmp_path, few, name, content, complaint
):
    path = tmp_path / "cxc_annots" / name
    path.parent.mkdir()
    path.write_bytes(content)
    assert refusal(open_coco, split_of_few(tmp_path)).startswith(f"{path}: {complaint}")


# Metrics of images among images, and of captions among captions


def plain_recalls(vectors, right):
    """Percentages by sorting the mean of all models' cosines, without the query itself."""
    cosines = np.mean([each.numpy().astype(np.float64) @ each.numpy().T for each in vectors], axis=0)
    first = []
    for query, answers in right.items():
        order = [item for item in np.argsort(-cosines[query]) if item != query]
        first.append(min(order.index(answer) for answer in answers))
    recalls = {f"r{k}": 100 * np.mean(np.array(first) < k) for k in (1, 5, 10)}
    return {**recalls, "avg": np.mean(list(recalls.values()))}


# Several models


@pytest.fixture
def few_data(few, few_package, tmp_path):
    """A data set of the few images, with all further annotations."""
    folder = write_data(tmp_path / "coco_precomp", images={"testall": FEW})
    write_lines(folder / "testall_ids.txt", few.images[::-1])
    write_plausible(folder / "cxc_annots", few_package.coco_gts)
    write_ratings(folder / "cxc_annots" / "sis_test.csv", "image", [(a, b, 3) for a, b in pairwise(few.images)])
    write_ratings(folder / "cxc_annots" / "sts_test.csv", "caption", [(a, b, 3) for a, b in pairwise(few.captions)])
    return folder


def evaluate(folder, data, *checkpoints):
    """Results of eval.py --eccv."""
    flags = [*("--data_path", data.parent, "--data_name", data.name, "--split", "testall", "--device", "cpu", "--eccv")]
    flags += [*("--workers", 0, "--json", folder / "results.json")]
    flags += [flag for one in checkpoints for flag in ("--checkpoint", one)]
    assert eval_program.main([str(flag) for flag in flags]) == 0
    return json.loads((folder / "results.json").read_text())["coco"]


def plain_pooled(run, data):
    """Mean region of each image and mean word of each caption, one at a time."""
    model, tokenizer = build_model(read_checkpoint(run / "model_best.safetensors"))
    model.eval()
    images, captions = torch.from_numpy(np.load(data / "testall_ims.npy")[::5]), []
    with torch.no_grad():
        regions = [model.encode_images(image, torch.tensor([len(image)]))[0][0].mean(dim=0) for image in images]
        for caption in (data / "testall_caps.txt").read_text().splitlines():
            ids, lengths = map(torch.from_numpy, tokenizer.pad(tokenizer.tokenize([caption])))
            captions.append(model.encode_captions(ids, lengths).mean(dim=0))
    return F.normalize(torch.stack(regions), dim=1), F.normalize(torch.stack(captions), dim=1)


def test_each_model_and_their_ensemble_have_metrics_of_their_own(trained_run, tiny_flags, few_data, tmp_path, capsys):
    runs = trained_run, tmp_path / "another"
    assert train.main([*tiny_flags, "--seed", "1", "--model_name", str(runs[1])]) == 0
    capsys.readouterr()
    several = evaluate(tmp_path / "several", few_data, *runs)
    tables = capsys.readouterr().out
    names = [f"{name}, zero-shot" for name in ("single 1", "single 2", "ensemble of 2")]
    assert list(several["rows"]) == list(several["intra"]) == names
    alone = evaluate(tmp_path / "alone", few_data, runs[0])
    for part in ("rows", "intra"):
        assert several[part][names[0]] == alone[part]["X-Dim, zero-shot"]
    assert len({json.dumps(of_row) for of_row in several["rows"].values()}) == 3
    pooled = [plain_pooled(run, few_data) for run in runs]
    right = open_coco(open_split(str(few_data.parent), few_data.name, "testall")).intra
    for name, some in zip(names, ([pooled[0]], [pooled[1]], pooled), strict=True):
        for kind, way in enumerate(("i2i", "t2t")):
            assert several["intra"][name][way] == pytest.approx(
                plain_recalls([each[kind] for each in some], right[way])
            )
        for row in ("COCO 1K", "PMRP", "CxC"):
            assert len(re.findall(rf"^{name}: {row}  ", tables, re.MULTILINE)) == (2 if row == "CxC" else 1)
    assert re.search(r"^ +image to image +text to text$", tables, re.MULTILINE)


def test_saved_scores_have_no_metrics_of_images_among_images(few_data, tmp_path):
    np.save(tmp_path / "scores.npy", np.random.default_rng(0).random((FEW, 5 * FEW), np.float32))
    found = evaluate(tmp_path / "saved", few_data, tmp_path / "scores.npy")
    assert (list(found["rows"]), found["intra"]) == (["saved scores"], {})
    assert found["note"].endswith("saved scores do not say how images compare with images, or captions with captions")
