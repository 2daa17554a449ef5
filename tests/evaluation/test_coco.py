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
from lib.cli import InputError
from lib.data.dataset import Split, open_split
from lib.evaluation import coco
from lib.evaluation.coco import Coco, open_coco
from lib.evaluation.metrics import bootstrap_means, interval
from lib.evaluation.rankings import ABSENT
from tests.conftest import write_data
from tests.evaluation.test_rankings import slow_metrics

IMAGES, CAPTIONS = 5000, 25000
FEW = 20  # of the images, where these are enough
DEEP, TOP = 50, 10  # how far the package's metrics look down a list, and down that of a fold
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


def shuffle(package, ids):
    """Images in another order, and the captions of each."""
    rng = np.random.default_rng(0)
    images = rng.permutation(ids.images).tolist()
    return Ids(images, [c for image in images for c in rng.permutation(package.coco_gts["i2t"][image]).tolist()])


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


# Metrics, against the package's


class Evaluated(NamedTuple):
    """What eval.py has made of scores, and of each list as much as the package needs."""

    results: dict
    records: list[dict]  # the lines of --ranks
    printed: str
    ids: Ids
    lists: dict[tuple[str, int], tuple[np.ndarray, np.ndarray]]  # by way and query: items, ascending, and their scores


@pytest.fixture(scope="module")
def evaluated(package, package_order, plausible, tmp_path_factory):
    """eval.py --eccv of saved scores, with images and captions in an order of their own."""
    data, made = tmp_path_factory.mktemp("coco") / "coco_precomp", tmp_path_factory.mktemp("made")
    ids = shuffle(package, package_order)
    make_split(data, *ids)
    np.save(data / "testall_ims.npy", np.arange(IMAGES, dtype=np.float32)[:, None, None])
    write_lines(data / "testall_caps.txt", (f"caption {caption}" for caption in ids.captions))
    write_plausible(data / "cxc_annots", plausible)
    scores = draw_scores(package, ids)
    np.save(made / "scores.npy", scores.astype(np.float16))
    lists = beginnings_of_lists(scores, fold_of_images(package_order, ids))
    del scores  # 500 MB
    flags = ["--data_path", data.parent, "--data_name", data.name, "--split", "testall", "--device", "cpu", "--eccv"]
    files = ["--checkpoint", made / "scores.npy", "--json", made / "results.json", "--ranks", made / "ranks.jsonl"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert eval_program.main([str(flag) for flag in (*flags, *files)]) == 0
    (made / "scores.npy").unlink()  # 250 MB
    results, lines = (made / "results.json").read_text(), (made / "ranks.jsonl").read_text().splitlines()
    return Evaluated(json.loads(results), [json.loads(line) for line in lines[1:]], printed.getvalue(), ids, lists)


@pytest.fixture(scope="module")
def plausible(package, package_order):
    """For each query its own items and three at random: {"i2t": {id: ids}, "t2i": ...}."""
    rng, pairs = np.random.default_rng(1), {}
    for way, queries, items in zip(WAYS, package_order, reversed(package_order), strict=True):
        more = rng.choice(items, size=(len(queries), 3)).tolist()
        pairs[way] = {q: [*package.coco_gts[way][q], *some] for q, some in zip(queries, more, strict=True)}
    return pairs


def write_plausible(folder, pairs):
    folder.mkdir(exist_ok=True)
    for way, name in PLAUSIBLE.items():
        (folder / name).write_text(json.dumps(pairs[way]))


def draw_scores(package, ids):
    """Products of 16 random numbers, more for what fits; rounded, so that many are equal and float16 holds them."""
    rng = np.random.default_rng(0)
    images, captions = (rng.standard_normal((size, 16), np.float32) for size in (IMAGES, CAPTIONS))
    scores = images @ captions.T
    number = [{one: k for k, one in enumerate(each)} for each in ids]
    for fits, most in ((package.coco_gts, 10), (package.cxc_gts, 8), (package.eccv_gts, 12)):
        pairs = [(image, caption) for image, some in fits["i2t"].items() for caption in some]
        pairs += [(image, caption) for caption, some in fits["t2i"].items() for image in some]
        rows, columns = np.array([(number[0][i], number[1][c]) for i, c in pairs if c in number[1]]).T
        scores[rows, columns] += most * rng.random(len(rows), np.float32)
    return np.round(scores * 16) / 16


def fold_of_images(package_order, ids):
    """In which consecutive fifth of the package's images each of a split's is."""
    place = {image: k for k, image in enumerate(package_order.images)}
    return np.array([place[image] for image in ids.images]) // (IMAGES // 5)


def beginnings_of_lists(scores, fold_of_image):
    """The first DEEP items of each list and the first TOP within its fold, ascending, with all that score the same."""
    fold_of_caption, lists = np.repeat(fold_of_image, 5), {}
    for way, rows, fold_of_query, fold_of_item in (
        ("i2t", scores, fold_of_image, fold_of_caption),
        ("t2i", scores.T, fold_of_caption, fold_of_image),
    ):
        folds = [np.flatnonzero(fold_of_item == fold) for fold in range(5)]
        for query, row in enumerate(map(np.ascontiguousarray, rows)):
            fold = folds[fold_of_query[query]]
            of_all = np.flatnonzero(row >= np.partition(row, -DEEP)[-DEEP])
            items = np.union1d(of_all, fold[row[fold] >= np.partition(row[fold], -TOP)[-TOP]])
            lists[way, query] = items, row[items]
    return lists


def ranked_ids(evaluated, fits):
    """The lists as the package takes them, of all queries of a protocol: ids, wrong ones first among equal scores.

    They begin as the whole lists do, which is all that matters: the package's metrics look at the first 10 items, at
    as many as fit the query (no more than DEEP), or at the first 10 of those that are in the query's fold.
    """
    ranked = {}
    for way, queries, ids in zip(WAYS, evaluated.ids, reversed(evaluated.ids), strict=True):
        assert max(map(len, fits[way].values())) <= DEEP
        ranked[way] = {}
        for number, query in enumerate(queries):
            if query in fits[way]:
                items, scores = evaluated.lists[way, number]
                listed, right = [ids[item] for item in items.tolist()], set(fits[way][query])
                order = np.lexsort(([one in right for one in listed], -scores))
                ranked[way][query] = [listed[place] for place in order.tolist()]
    return ranked


def metrics_of(evaluated, protocol):
    (of_protocols,) = evaluated.results["coco"]["rows"].values()
    return of_protocols[protocol]


def assert_equal(found, expected):
    """found: {way: {metric: percent}}; expected: {metric: {way: part of 1}}."""
    for way in WAYS:
        assert found[way] == pytest.approx({name: 100 * ways[way] for name, ways in expected.items()}, abs=1e-9)
        assert all(5 < percent < 95 for percent in found[way].values())


@pytest.mark.parametrize(
    ("protocol", "name", "fits"),
    [("COCO 1K", "coco_1k", "coco_gts"), ("COCO 5K", "coco_5k", "coco_gts"), ("CxC", "cxc", "cxc_gts")],
)
def test_recalls_equal_those_of_the_package(evaluated, package, protocol, name, fits):
    ranked = ranked_ids(evaluated, getattr(package, fits))
    theirs = package.compute_all_metrics(ranked["i2t"], ranked["t2i"], target_metrics=[f"{name}_recalls"])
    recalls = {recall: theirs[f"{name}_{recall}"] for recall in RECALLS}
    average = {way: np.mean([recalls[recall][way] for recall in RECALLS]) for way in WAYS}
    assert_equal(metrics_of(evaluated, protocol), {**recalls, "avg": average})


def test_eccv_caption_and_plausible_matches_equal_those_of_the_package(evaluated, package, plausible, monkeypatch):
    ranked = ranked_ids(evaluated, package.eccv_gts)
    names = {"map_at_r": "eccv_map_at_r", "r_precision": "eccv_rprecision", "r1": "eccv_r1"}
    theirs = package.compute_all_metrics(ranked["i2t"], ranked["t2i"], target_metrics=names.values())
    assert_equal(metrics_of(evaluated, "ECCV Caption"), {metric: theirs[name] for metric, name in names.items()})
    monkeypatch.setattr(package, "pm_gts", plausible)
    of_plausible = package.pmrp(ranked_ids(evaluated, plausible), "all")
    assert_equal(metrics_of(evaluated, "PMRP"), {"r_precision": of_plausible})


def test_coco_5k_is_what_the_data_sets_own_pairs_give(evaluated):
    found = metrics_of(evaluated, "COCO 5K")
    for way in WAYS:
        assert found[way] == pytest.approx({name: evaluated.results[way][name] for name in (*RECALLS, "avg")}, abs=1e-9)


# --ranks and the tables say the same


def metrics_of_ranks(ranks):
    """The metrics of one query from its ranks; PMRP's lines hold the metric itself."""
    if isinstance(ranks, float):
        return {"r_precision": ranks}
    fits = np.zeros(max(ranks), bool)
    fits[np.array(ranks) - 1] = True
    return slow_metrics(fits[: max(10, len(ranks))].tolist(), right=len(ranks))


def assert_redone(found, records, protocol):
    """That the metrics of a protocol, and their intervals, are those of its ranks."""
    for way in WAYS:
        some = [one for one in records if one["way"] == way and protocol in one["ranks"]]
        of_each = [metrics_of_ranks(one["ranks"][protocol]) for one in some]
        values = 100 * np.array([[metrics[name] for name in found[way]] for metrics in of_each])
        np.testing.assert_allclose(list(found[way].values()), values.mean(axis=0), atol=1e-9)
        image = [one["query"] if way == "i2t" else one["right"][0] for one in some]
        intervals = [interval(column) for column in bootstrap_means(values, np.array(image)).T]
        np.testing.assert_allclose(list(found["interval"][way].values()), intervals, atol=1e-9)


def test_lines_of_ranks_alone_give_every_protocol_and_its_intervals(evaluated, package):
    assert [(one["way"], one["query"]) for one in evaluated.records] == list(evaluated.lists)
    for protocol in PROTOCOLS:
        assert_redone(metrics_of(evaluated, protocol), evaluated.records, protocol)
    counted = Counter((one["way"], name) for one in evaluated.records for name in one["ranks"])
    for way, queries in zip(WAYS, (IMAGES, CAPTIONS), strict=True):
        assert {counted[way, name] for name in ("all", "COCO 1K", "COCO 5K", "PMRP")} == {queries}
        assert counted[way, "CxC"] == len(package.cxc_gts[way])
        assert counted[way, "ECCV Caption"] == len(package.eccv_gts[way])
    for one in evaluated.records:
        items, scores = evaluated.lists[one["way"], one["query"]]
        order = np.lexsort((np.isin(items, one["right"]), -scores))[:TOP]
        assert one["top"] == [[item, score] for item, score in zip(items[order], scores[order], strict=True)]


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


# Which number an id has


def by_ids(opened, ids):
    """A protocol's right answers and folds in COCO's ids; those that are not there only counted."""
    found = {}
    for protocol in opened.protocols:
        answers = [
            {
                queries[q]: Counter(None if k == ABSENT else items[k] for k in some.tolist())
                for q, some in protocol.right[way].items()
            }
            for way, queries, items in zip(WAYS, ids, reversed(ids), strict=True)
        ]
        members = lambda way, each, fold, of=protocol.fold_of: {each[k] for k in np.flatnonzero(of[way] == fold)}  # noqa: E731
        folds = range(5 if protocol.fold_of else 0)
        found[protocol.name] = (*answers, [[members("i2t", ids[0], k), members("t2i", ids[1], k)] for k in folds])
    return found


@pytest.fixture(scope="module")
def expected(package, package_order):
    """The same of the package's own pairs and order."""

    def answers(pairs, items):
        items = set(items)
        return {query: Counter(one if one in items else None for one in set(some)) for query, some in pairs.items()}

    images, captions = package_order
    folds = [[set(images[k : k + 1000]), set(captions[5 * k : 5 * k + 5000])] for k in range(0, IMAGES, IMAGES // 5)]
    pairs = dict.fromkeys(("COCO 1K", "COCO 5K"), package.coco_gts)
    pairs |= {"CxC": package.cxc_gts, "ECCV Caption": package.eccv_gts}
    return {
        name: (answers(some["i2t"], captions), answers(some["t2i"], images), folds if name == "COCO 1K" else [])
        for name, some in pairs.items()
    }


def test_without_files_of_ids_the_packages_order_is_taken_and_the_note_says_so(tmp_path, package_order, expected):
    opened = open_coco(make_split(tmp_path))
    assert by_ids(opened, package_order) == expected
    assert "ids: testall_ids.txt is missing, the order of eccv_caption is taken" in opened.note


def test_images_in_another_order_have_the_same_right_answers_and_folds(tmp_path, package, package_order, expected):
    images, _ = shuffle(package, package_order)
    of_image = {image: package_order.captions[5 * k : 5 * k + 5] for k, image in enumerate(package_order.images)}
    opened = open_coco(make_split(tmp_path, np.repeat(images, 5)))  # a line a caption
    assert by_ids(opened, Ids(images, [caption for image in images for caption in of_image[image]])) == expected
    assert opened.note.startswith("ids: testall_ids.txt; captions of an image in its order there")


def test_captions_in_another_order_have_them_too(tmp_path, package, package_order, expected):
    ids = shuffle(package, package_order)
    opened = open_coco(make_split(tmp_path, *ids))
    assert by_ids(opened, ids) == expected
    assert opened.note.startswith("ids: testall_ids.txt; testall_capids.txt")


# What is refused


@pytest.fixture(scope="module")
def few_package(package, package_order):
    """The package as if COCO had a few test images only: to open it takes no time."""
    few, captions = copy.copy(package), package_order.captions[: 5 * FEW]
    there = {*package_order.images[:FEW], *captions}
    few.coco_ids = np.array(captions)
    for name in ("coco_gts", "cxc_gts", "eccv_gts"):
        pairs = {way: {q: right for q, right in getattr(package, name)[way].items() if q in there} for way in WAYS}
        setattr(few, name, pairs)
    return few


@pytest.fixture
def few(few_package, package_order, monkeypatch):
    """The ids of a few images, which are all for as long as a test runs."""
    monkeypatch.setattr("eccv_caption.Metrics", lambda: copy.copy(few_package))
    return Ids(package_order.images[:FEW], package_order.captions[: 5 * FEW])


def split_of_few(folder, images=(), captions=(), counts=(5,) * FEW):
    return make_split(folder, images, captions, counts)


def refusal(split):
    """The one line that says why a split is refused."""
    with pytest.raises(InputError) as caught:
        open_coco(split)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def replaced(ids, number, other):
    return [*ids[:number], other, *ids[number + 1 :]]


def test_a_missing_package_is_an_error_that_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "eccv_caption", None)
    assert refusal(split_of_few(tmp_path)) == "--eccv: needs the package eccv_caption: pip install eccv_caption"


@pytest.mark.parametrize("counts", [(5,) * 19, (4, 6, *(5,) * 18)])
def test_other_numbers_of_images_or_captions_are_an_error(tmp_path, few, counts):
    found = f"{tmp_path} testall has {len(counts)} images and {sum(counts)} captions"
    assert refusal(split_of_few(tmp_path, counts=counts)) == (
        f"--eccv: {found}, but these protocols are for COCO's 20 test images with five captions each (--split testall)"
    )


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda ids: replaced(ids, 7, 999999999), "these are not COCO's 20 test images"),
        (lambda ids: replaced(ids, 7, ids[8]), "these are not COCO's 20 test images"),
        (lambda ids: replaced(ids, 7, f"COCO_val2014_{ids[7]:012}.jpg"), "expected COCO's numbers"),
    ],
    ids=["another", "one twice", "name of a file"],
)
def test_ids_that_are_not_those_of_cocos_images_are_an_error(tmp_path, few, change, complaint):
    found = refusal(split_of_few(tmp_path, change(sorted(few.images))))
    assert complaint in found
    assert str(tmp_path / "testall_ids.txt") in found


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda ids: [*ids[5:10], *ids[:5], *ids[10:]], "its ids are not those of the captions of testall_ids.txt's"),
        (lambda ids: replaced(ids, 7, ids[8]), "its ids are not those of the captions of testall_ids.txt's images"),
        (lambda ids: replaced(ids, 7, "seven"), "expected COCO's numbers"),
    ],
    ids=["of other images", "one twice", "a word"],
)
def test_ids_that_are_not_those_of_the_images_captions_are_an_error(tmp_path, few, change, complaint):
    found = refusal(split_of_few(tmp_path, few.images, change(few.captions)))
    assert found.startswith(f"--eccv: {tmp_path / 'testall_capids.txt'}: ")
    assert complaint in found


def test_plausible_matches_need_both_files(tmp_path, few, few_package):
    write_plausible(tmp_path / "cxc_annots", few_package.coco_gts)
    split = split_of_few(tmp_path)
    assert open_coco(split).protocols[-1].name == "PMRP"
    (tmp_path / "cxc_annots" / PLAUSIBLE["t2i"]).unlink()
    assert open_coco(split).protocols[-1].name == "ECCV Caption"


@pytest.mark.parametrize("text", ['{"391895": [770337', '{"391895": []}', '{"1": [770337]}', "{}"])
def test_damaged_files_of_plausible_matches_are_an_error(tmp_path, few, few_package, text):
    write_plausible(tmp_path / "cxc_annots", few_package.coco_gts)
    (tmp_path / "cxc_annots" / PLAUSIBLE["i2t"]).write_text(text)
    what = "pm_image_to_caption.json or pm_caption_to_image.json is damaged, or not of COCO's testall ("
    assert refusal(split_of_few(tmp_path)).startswith(f"{tmp_path / 'cxc_annots'}: {what}")


# Right answers among images, and among captions


def write_csv(path, kind, pairs):
    """The official form. pairs: (id, id, rating)."""
    path.parent.mkdir(exist_ok=True)
    form = {"image": "COCO_val2014_{:012}.jpg", "caption": "COCO_val2014:sentid:{}"}[kind]
    rows = [f"{form.format(one)},{form.format(other)},{rating},i2i_csim" for one, other, rating in pairs]
    write_lines(path, [f"{kind}1,{kind}2,agg_score,sampling_method", *rows])


def in_lists(right):
    return {query: answers.tolist() for query, answers in right.items()}


@pytest.mark.parametrize("beside", [False, True], ids=["within the data set", "beside it"])
def test_images_that_people_rated_three_or_better_fit_each_other_both_ways_round(tmp_path, few, beside):
    a, b, c, d, e, *_ = few.images
    pairs = [(a, b, 3.6), (c, a, 3.0), (a, d, 2.999), (b, b, 5.0), (e, 9, 5.0), (c, b, "4"), (a, b, 3.1)]
    split = split_of_few(tmp_path / "coco_precomp", few.images[::-1])
    write_csv((tmp_path if beside else split.folder) / "cxc_annots" / "sis_test.csv", "image", pairs)
    opened = open_coco(split)
    assert list(opened.intra) == ["i2i"]
    assert in_lists(opened.intra["i2i"]) == {17: [18, 19], 18: [17, 19], 19: [17, 18]}
    assert "cxc_annots" not in opened.note


def test_captions_fit_those_of_their_image_whatever_their_rating_and_others_from_three_on(tmp_path, few):
    captions = np.reshape(few.captions, (FEW, 5))[::-1, ::-1].ravel().tolist()
    pairs = [(0, 1, 0.5), (0, 9, 3.0), (2, 9, 2.9), (99, 3, 4.2)]
    named = [(captions[one], captions[other], rating) for one, other, rating in pairs]
    write_csv(tmp_path / "cxc_annots" / "sts_test.csv", "caption", named)
    right = in_lists(open_coco(split_of_few(tmp_path, few.images[::-1], captions)).intra["t2t"])
    more = {0: [9], 9: [0], 99: [3], 3: [99]}
    others = {c: [k for k in range(c - c % 5, c - c % 5 + 5) if k != c] for c in range(5 * FEW)}
    assert right == {caption: sorted(some + more.get(caption, [])) for caption, some in others.items()}


@pytest.mark.parametrize(
    ("way", "name", "csv"), [("i2i", "cxc_i2i.json", "sis_test.csv"), ("t2t", "cxc_t2t.json", "sts_test.csv")]
)
def test_all_that_gpos_file_lists_fits_in_that_direction_only_and_it_goes_before_the_official_one(
    tmp_path, few, way, name, csv
):
    ids = Ids(few.images[::-1], np.reshape(few.captions, (FEW, 5))[::-1].ravel().tolist())
    some = ids.images if way == "i2i" else ids.captions
    listed = {
        some[7]: [[str(some[2]), 1.5], [some[1], 4], [some[7], 5.0]],
        some[0]: [[some[7], 3.0]],
        9: [[some[1], 5]],
    }
    write_csv(tmp_path / "cxc_annots" / csv, "image", [(some[0], some[5], 5)])
    (tmp_path / "cxc_annots" / name).write_text(json.dumps(listed))
    assert in_lists(open_coco(split_of_few(tmp_path, *ids)).intra[way]) == {0: [7], 7: [1, 2]}


HEADER = b"image1,image2,agg_score,sampling_method\n"


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("sis_test.csv", b"", "damaged, or not CxC's ("),
        ("sis_test.csv", HEADER + b"COCO_val2014_000000205866.jpg,CO", "damaged, or not CxC's ("),
        ("sts_test.csv", HEADER + b"a_1,a_2,good,i2i_csim\n", "damaged, or not CxC's ("),
        ("cxc_i2i.json", b'{"391895": [["770337", 3.0', "damaged, or not CxC's ("),
        ("cxc_t2t.json", b"[1, 2]", "damaged, or not CxC's ("),
        ("sis_test.csv", HEADER + b"a_1,a_2,5.0,i2i_csim\n", "none of its pairs is of this split"),
    ],
    ids=["empty", "cut", "no rating", "cut json", "list", "of another split"],
)
def test_annotations_that_are_damaged_or_of_another_split_are_an_error_that_names_the_file(
    tmp_path, few, name, content, complaint
):
    path = tmp_path / "cxc_annots" / name
    path.parent.mkdir()
    path.write_bytes(content)
    assert refusal(split_of_few(tmp_path)).startswith(f"{path}: {complaint}")


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


def test_a_query_is_no_answer_to_itself_and_images_are_drawn_with_all_their_captions():
    hits, image_of_caption = np.arange(40) // 10 % 2 == 0, np.repeat(np.arange(4), 10)  # of two images all, of two none
    vectors = F.normalize(torch.randn(20, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    twins = vectors.repeat_interleave(2, dim=0)
    right = {caption: np.array([caption ^ 1 if hits[caption] else caption ^ 2]) for caption in range(40)}
    found = Coco([], {"t2t": right}, image_of_caption, "").intra_metrics([(twins, twins)])
    assert found["t2t"]["r1"] == 50
    assert found["interval"]["t2t"]["r1"] == [0, 100]


# Several models


@pytest.fixture
def few_data(few, few_package, tmp_path):
    """A data set of the few images, with all further annotations."""
    folder = write_data(tmp_path / "coco_precomp", images={"testall": FEW})
    write_lines(folder / "testall_ids.txt", few.images[::-1])
    write_plausible(folder / "cxc_annots", few_package.coco_gts)
    write_csv(folder / "cxc_annots" / "sis_test.csv", "image", [(a, b, 3) for a, b in pairwise(few.images)])
    write_csv(folder / "cxc_annots" / "sts_test.csv", "caption", [(a, b, 3) for a, b in pairwise(few.captions)])
    return folder


def evaluate(folder, data, *checkpoints):
    """Results of eval.py --eccv and the lines of --ranks."""
    folder.mkdir()
    flags = [*("--data_path", data.parent, "--data_name", data.name, "--split", "testall", "--device", "cpu", "--eccv")]
    flags += [*("--workers", 0, "--json", folder / "results.json", "--ranks", folder / "ranks.jsonl")]
    flags += [flag for one in checkpoints for flag in ("--checkpoint", one)]
    assert eval_program.main([str(flag) for flag in flags]) == 0
    lines = (folder / "ranks.jsonl").read_text().splitlines()[1:]
    return json.loads((folder / "results.json").read_text())["coco"], [json.loads(line) for line in lines]


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
    several, records = evaluate(tmp_path / "several", few_data, *runs)
    tables = capsys.readouterr().out
    names = [f"{name}, zero-shot" for name in ("single 1", "single 2", "ensemble of 2")]
    assert list(several["rows"]) == list(several["intra"]) == names
    alone = evaluate(tmp_path / "alone", few_data, runs[0])[0]
    for part in ("rows", "intra"):
        assert several[part][names[0]] == alone[part]["X-Dim, zero-shot"]
    for protocol, found in several["rows"][names[2]].items():
        assert_redone(found, records, protocol)
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
    found, _ = evaluate(tmp_path / "saved", few_data, tmp_path / "scores.npy")
    assert (list(found["rows"]), found["intra"]) == (["saved scores"], {})
    assert found["note"].endswith(coco.NOT_EMBEDDED)
