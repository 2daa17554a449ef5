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
from lib.evaluation.bootstrap import bootstrap_means, interval
from lib.evaluation.coco import Coco, open_coco
from lib.evaluation.rankings import ABSENT
from tests.conftest import write_data
from tests.evaluation.test_rankings import slow_figures

IMAGES, CAPTIONS = 5000, 25000
FEW = 20  # of the images, where these are enough
DEEP, TOP = 50, 10  # how far the package's metrics look down a list, and down that of a fold
WAYS = ("i2t", "t2i")
RECALLS = ("r1", "r5", "r10")
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


def shuffle(package, ids, seed=0):
    """Images in another order, and the captions of each."""
    rng = np.random.default_rng(seed)
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


# Figures, against the package's


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
    write_data_set(data, ids)
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
    rng, (images, captions) = np.random.default_rng(1), package_order
    more = {"i2t": rng.choice(captions, size=(IMAGES, 3)), "t2i": rng.choice(images, size=(CAPTIONS, 3))}
    return {
        way: {
            query: [*package.coco_gts[way][query], *some] for query, some in zip(ids, more[way].tolist(), strict=True)
        }
        for way, ids in zip(WAYS, package_order, strict=True)
    }


def write_data_set(folder, ids):
    make_split(folder, *ids)
    np.save(folder / "testall_ims.npy", np.arange(IMAGES, dtype=np.float32)[:, None, None])
    write_lines(folder / "testall_caps.txt", (f"caption {caption}" for caption in ids.captions))


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
        pairs = [(image, caption) for image, those in fits["i2t"].items() for caption in those]
        pairs += [(image, caption) for caption, those in fits["t2i"].items() for image in those]
        rows, columns = np.array([(number[0][i], number[1][c]) for i, c in pairs if c in number[1]]).T
        scores[rows, columns] += most * rng.random(len(rows), np.float32)
    scores *= 16
    np.round(scores, out=scores)
    scores /= 16
    return scores


def fold_of_images(package_order, ids):
    """In which consecutive fifth of the package's images each of a split's is."""
    place = {image: k for k, image in enumerate(package_order.images)}
    return np.array([place[image] for image in ids.images]) // (IMAGES // 5)


def beginnings_of_lists(scores, fold_of_image):
    fold_of_caption = np.repeat(fold_of_image, 5)
    lists = {}
    for way, rows, fold_of_query, fold_of_item in (
        ("i2t", scores, fold_of_image, fold_of_caption),
        ("t2i", scores.T, fold_of_caption, fold_of_image),
    ):
        folds = [np.flatnonzero(fold_of_item == fold) for fold in range(5)]
        for query, row in enumerate(map(np.ascontiguousarray, rows)):
            items = beginning(row, folds[fold_of_query[query]])
            lists[way, query] = items, row[items]
    return lists


def beginning(row, fold):
    """The first DEEP items of a list and the first TOP among a fold's, ascending, with all that score the same."""
    of_all = np.flatnonzero(row >= np.partition(row, -DEEP)[-DEEP])
    of_fold = fold[row[fold] >= np.partition(row[fold], -TOP)[-TOP]]
    return np.union1d(of_all, of_fold)


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


def figures_of(evaluated, protocol):
    (of_protocols,) = evaluated.results["coco"]["rows"].values()
    return of_protocols[protocol]


def assert_equal(found, expected):
    """found: {way: {figure: percent}}; expected: {figure: {way: part of 1}}."""
    for way in WAYS:
        assert found[way] == pytest.approx({name: 100 * ways[way] for name, ways in expected.items()}, abs=1e-9)
        assert all(5 < figure < 95 for figure in found[way].values())


@pytest.mark.parametrize(
    ("protocol", "name", "fits"),
    [("COCO 1K", "coco_1k", "coco_gts"), ("COCO 5K", "coco_5k", "coco_gts"), ("CxC", "cxc", "cxc_gts")],
)
def test_recalls_equal_those_of_the_package(evaluated, package, protocol, name, fits):
    ranked = ranked_ids(evaluated, getattr(package, fits))
    theirs = package.compute_all_metrics(ranked["i2t"], ranked["t2i"], target_metrics=[f"{name}_recalls"])
    recalls = {figure: theirs[f"{name}_{figure}"] for figure in RECALLS}
    average = {way: np.mean([recalls[figure][way] for figure in RECALLS]) for way in WAYS}
    assert_equal(figures_of(evaluated, protocol), {**recalls, "avg": average})


def test_figures_of_eccv_caption_equal_those_of_the_package(evaluated, package):
    ranked = ranked_ids(evaluated, package.eccv_gts)
    names = {"map_at_r": "eccv_map_at_r", "r_precision": "eccv_rprecision", "r1": "eccv_r1"}
    theirs = package.compute_all_metrics(ranked["i2t"], ranked["t2i"], target_metrics=names.values())
    assert_equal(figures_of(evaluated, "ECCV Caption"), {figure: theirs[name] for figure, name in names.items()})


def test_precision_of_plausible_matches_equals_that_of_the_package(evaluated, package, plausible, monkeypatch):
    monkeypatch.setattr(package, "pm_gts", plausible)
    theirs = package.pmrp(ranked_ids(evaluated, plausible), "all")
    assert_equal(figures_of(evaluated, "PMRP"), {"r_precision": theirs})


def test_coco_5k_is_what_the_data_sets_own_pairs_give(evaluated):
    found = figures_of(evaluated, "COCO 5K")
    for way in WAYS:
        own = evaluated.results[way]
        assert found[way] == pytest.approx({name: own[name] for name in (*RECALLS, "avg")}, abs=1e-9)


# --ranks tells the same


def test_lines_of_ranks_alone_give_the_figures_of_every_protocol_and_their_intervals(evaluated):
    assert [(one["way"], one["query"]) for one in evaluated.records] == list(evaluated.lists)
    for protocol in ("COCO 1K", "COCO 5K", "CxC", "ECCV Caption", "PMRP"):
        assert_redone(figures_of(evaluated, protocol), evaluated.records, protocol)


def assert_redone(found, records, protocol):
    """That figures of a protocol, and their intervals, are those of its ranks."""
    for way in WAYS:
        those = [one for one in records if one["way"] == way and protocol in one["ranks"]]
        of_each = [figures_of_ranks(one["ranks"][protocol]) for one in those]
        values = 100 * np.array([[figures[name] for name in found[way]] for figures in of_each])
        np.testing.assert_allclose(list(found[way].values()), values.mean(axis=0), atol=1e-9)
        draws = bootstrap_means(values, np.array([image_of(one) for one in those]))
        intervals = [interval(column) for column in draws.T]
        np.testing.assert_allclose(list(found["interval"][way].values()), intervals, atol=1e-9)


def image_of(record):
    return record["query"] if record["way"] == "i2t" else record["right"][0]


def figures_of_ranks(ranks):
    """The figures of one query from its ranks, which PMRP's lines hold as the figure itself."""
    if isinstance(ranks, float):
        return {"r_precision": ranks}
    fits = np.zeros(max(ranks), bool)
    fits[np.array(ranks) - 1] = True
    return slow_figures(fits[: max(10, len(ranks))].tolist(), right=len(ranks))


def test_lines_of_ranks_hold_coco_ids_captions_and_the_first_ten(evaluated):
    for one in evaluated.records:
        way, query = one["way"], one["query"]
        if way == "i2t":
            assert (one["id"], one["right"]) == (str(evaluated.ids.images[query]), [5 * query + k for k in range(5)])
        else:
            assert (one["caption"], one["right"]) == (f"caption {evaluated.ids.captions[query]}", [query // 5])
        items, scores = evaluated.lists[way, query]
        order = np.lexsort((np.isin(items, one["right"]), -scores))[:TOP]
        assert one["top"] == [[item, score] for item, score in zip(items[order], scores[order], strict=True)]


def test_only_those_queries_count_that_a_protocol_has(evaluated, package):
    counted = Counter((one["way"], name) for one in evaluated.records for name in one["ranks"])
    for way, queries in zip(WAYS, (IMAGES, CAPTIONS), strict=True):
        assert {counted[way, name] for name in ("all", "COCO 1K", "COCO 5K", "PMRP")} == {queries}
        assert counted[way, "CxC"] == len(package.cxc_gts[way])
        assert counted[way, "ECCV Caption"] == len(package.eccv_gts[way])


# What is printed


def test_a_table_has_a_row_and_an_interval_for_each_protocol(evaluated):
    lines = evaluated.printed.splitlines()
    for protocol in ("COCO 1K", "COCO 5K", "CxC", "ECCV Caption", "PMRP"):
        (at,) = (k for k, line in enumerate(lines) if line.startswith(f"{protocol}  "))
        found, names = figures_of(evaluated, protocol), (protocol, "  95 % from", "  95 % to")
        ends = [both for way in WAYS for both in found["interval"][way].values()]
        printed = [[figure for way in WAYS for figure in found[way].values()], *zip(*ends, strict=True)]
        for line, name, figures in zip(lines[at : at + 3], names, printed, strict=True):
            assert line.startswith(f"{name}  ")
            assert line.removeprefix(name).split() == [f"{figure:.1f}" for figure in figures]
    assert "ids: testall_ids.txt; testall_capids.txt\n" in evaluated.printed
    assert "CxC's images among images and captions among captions need cxc_annots/" in evaluated.printed


def flat_figures(names, ways, percent):
    """The same figure everywhere, with an interval of two around it."""
    figures = {way: dict.fromkeys(names, percent) for way in ways}
    return {**figures, "interval": {way: {name: [percent - 1, percent + 1] for name in names} for way in ways}}


def test_a_table_of_images_among_images_alone_leaves_captions_among_captions_blank():
    rows = {"X-Dim": {"CxC": flat_figures((*RECALLS, "avg"), WAYS, 40.0)}}
    rows["X-Dim"]["ECCV Caption"] = flat_figures(("map_at_r", "r_precision", "r1"), WAYS, 20.0)
    made = coco.tables(rows, {"X-Dim": flat_figures((*RECALLS, "avg"), ("i2i",), 60.0)}, "a note")
    assert made.split("\n\n")[2].splitlines()[2].split() == ["CxC,", "pooled", "cosine", *["60.0"] * 4]


def test_tables_of_several_rows_name_each_and_have_one_for_images_among_images():
    rows = {
        f"single {k}": {
            "CxC": flat_figures((*RECALLS, "avg"), WAYS, 40.0 + k),
            "ECCV Caption": flat_figures(("map_at_r", "r_precision", "r1"), WAYS, 20.0 + k),
        }
        for k in (1, 2)
    }
    intra = {f"single {k}": flat_figures((*RECALLS, "avg"), ("i2i", "t2t"), 60.0 + k) for k in (1, 2)}
    made = coco.tables(rows, intra, "a note")
    recalls, rankings, among_themselves, note = made.split("\n\n")
    assert note == "a note"
    for table, row, percent, figures in (
        (recalls, "CxC", 40, 8),
        (rankings, "ECCV Caption", 20, 6),
        (among_themselves, "CxC", 60, 8),
    ):
        for k in (1, 2):
            assert re.search(rf"^single {k}: {row} +({percent + k}\.0 *){{{figures}}}$", table, re.MULTILINE)
            assert re.search(rf"^  95 % from +({percent + k - 1}\.0 *){{{figures}}}$", table, re.MULTILINE)
            assert re.search(rf"^  95 % to +({percent + k + 1}\.0 *){{{figures}}}$", table, re.MULTILINE)
    assert "image to image" in among_themselves
    assert "text to text" in among_themselves
    alone = coco.tables({"X-Dim": rows["single 1"]}, {"X-Dim": intra["single 1"]}, "a note")
    assert "\nCxC  " in alone
    assert "\nCxC, pooled cosine  " in alone
    assert "X-Dim" not in alone


# Which number an id has


def by_ids(opened, ids):
    """A protocol's right answers and folds in COCO's ids; those that are not there only counted."""
    images, captions = ids

    def answers(right, queries, items):
        return {
            queries[q]: Counter(None if k == ABSENT else items[k] for k in those.tolist()) for q, those in right.items()
        }

    return {
        protocol.name: (
            answers(protocol.captions, images, captions),
            answers(protocol.images, captions, images),
            [({images[i] for i in fold[0]}, {captions[c] for c in fold[1]}) for fold in protocol.folds],
        )
        for protocol in opened.protocols
    }


def of_package(package, package_order):
    """The same of the package's own pairs and order."""
    there = [set(each) for each in package_order]

    def answers(pairs, items):
        return {query: Counter(one if one in items else None for one in set(those)) for query, those in pairs.items()}

    fold = range(0, IMAGES, IMAGES // 5)
    images, captions = package_order
    folds = [(set(images[k : k + 1000]), set(captions[5 * k : 5 * k + 5000])) for k in fold]
    pairs = {
        "COCO 1K": package.coco_gts,
        "COCO 5K": package.coco_gts,
        "CxC": package.cxc_gts,
        "ECCV Caption": package.eccv_gts,
    }
    return {
        name: (answers(those["i2t"], there[1]), answers(those["t2i"], there[0]), folds if name == "COCO 1K" else [])
        for name, those in pairs.items()
    }


@pytest.fixture(scope="module")
def expected(package, package_order):
    return of_package(package, package_order)


def test_without_a_file_of_ids_the_packages_order_is_taken_and_the_note_says_so(tmp_path, package_order, expected):
    opened = open_coco(make_split(tmp_path))
    assert by_ids(opened, package_order) == expected
    assert "ids: testall_ids.txt is missing, the order of eccv_caption is taken" in opened.note


@pytest.mark.parametrize("repeats", [1, 5])
def test_images_in_another_order_have_the_same_right_answers_and_folds(
    tmp_path, package, package_order, expected, repeats
):
    images, _ = shuffle(package, package_order)
    of_image = {image: package_order.captions[5 * k : 5 * k + 5] for k, image in enumerate(package_order.images)}
    opened = open_coco(make_split(tmp_path, np.repeat(images, repeats)))
    assert by_ids(opened, Ids(images, [caption for image in images for caption in of_image[image]])) == expected
    assert opened.note.startswith("ids: testall_ids.txt; captions of an image in its order there")


def test_captions_in_another_order_have_them_too(tmp_path, package, package_order, expected):
    ids = shuffle(package, package_order)
    opened = open_coco(make_split(tmp_path, *ids))
    assert by_ids(opened, ids) == expected
    assert opened.note.startswith("ids: testall_ids.txt; testall_capids.txt")


def test_captions_in_another_order_may_come_without_ids_of_images(tmp_path, package_order, expected):
    captions = np.reshape(package_order.captions, (IMAGES, 5))[:, ::-1].ravel().tolist()
    opened = open_coco(make_split(tmp_path, captions=captions))
    assert by_ids(opened, Ids(package_order.images, captions)) == expected


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


def test_a_split_of_another_size_is_an_error(tmp_path):
    assert refusal(make_split(tmp_path, counts=(5,) * 1000)) == (
        f"--eccv: {tmp_path} testall has 1000 images and 5000 captions, but these protocols are for COCO's 5000 test "
        "images with five captions each (--split testall)"
    )


@pytest.mark.parametrize("counts", [(5,) * 19, (4, 6, *(5,) * 18), (6, *(5,) * 19)])
def test_other_numbers_of_captions_than_five_each_are_an_error(tmp_path, few, counts):
    complaint = refusal(split_of_few(tmp_path, counts=counts))
    assert f"testall has {len(counts)} images and {sum(counts)} captions, but these protocols are for" in complaint


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda ids: range(FEW), "these are not COCO's 20 test images (0 is on one side only)"),
        (
            lambda ids: replaced(ids, 7, 999999999),
            "these are not COCO's 20 test images",
        ),
        (lambda ids: replaced(ids, 7, ids[8]), "these are not COCO's 20 test images"),
        (lambda ids: replaced(ids, 7, f"COCO_val2014_{ids[7]:012}.jpg"), "expected COCO's numbers"),
        (lambda ids: ids[:-1], "19 ids do not fit 20 images"),
    ],
    ids=["others", "one other", "one twice", "names of files", "too few"],
)
def test_ids_that_are_not_those_of_cocos_images_are_an_error(tmp_path, few, change, complaint):
    found = refusal(split_of_few(tmp_path, change(sorted(few.images))))
    assert complaint in found
    assert str(tmp_path / "testall_ids.txt") in found


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda ids: [*ids[5:10], *ids[:5], *ids[10:]], "its ids are not those of the captions of testall_ids.txt's"),
        (lambda ids: ids[:-1], "its ids are not those of the captions of testall_ids.txt's images"),
        (lambda ids: replaced(ids, 7, 1), "its ids are not those of the captions of testall_ids.txt's images"),
        (lambda ids: replaced(ids, 7, ids[8]), "its ids are not those of the captions of testall_ids.txt's images"),
        (lambda ids: replaced(ids, 7, "seven"), "expected COCO's numbers"),
    ],
    ids=["of other images", "too few", "of none", "one twice", "a word"],
)
def test_ids_that_are_not_those_of_the_images_captions_are_an_error(tmp_path, few, change, complaint):
    found = refusal(split_of_few(tmp_path, few.images, change(few.captions)))
    assert found.startswith(f"--eccv: {tmp_path / 'testall_capids.txt'}: ")
    assert complaint in found


# Plausible matches


def test_plausible_matches_need_both_files(tmp_path, few, few_package):
    write_plausible(tmp_path / "cxc_annots", few_package.coco_gts)
    split = split_of_few(tmp_path)
    assert [protocol.name for protocol in open_coco(split).protocols][-1] == "PMRP"
    (tmp_path / "cxc_annots" / PLAUSIBLE["t2i"]).unlink()
    assert [protocol.name for protocol in open_coco(split).protocols][-1] == "ECCV Caption"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"QUERY": [ITEM',
        "[QUERY]",
        '{"QUERY": ITEM}',
        '{"QUERY": ["a dog"]}',
        '{"QUERY": []}',
        '{"QUERY": [1e999]}',
        '{"QUERY": [null]}',
        '{"1": [ITEM]}',
        "{}",
        "\0\1\2",
        "[" * 100_000,
    ],
    ids=[
        *("empty", "cut", "list", "number", "words", "no answers", "infinite", "null", "unknown query", "no queries"),
        *("binary", "deep"),
    ],
)
def test_damaged_files_of_plausible_matches_are_an_error(tmp_path, few, few_package, way, text):
    query, item = (few.images[0], few.captions[0]) if way == "i2t" else (few.captions[0], few.images[0])
    write_plausible(tmp_path / "cxc_annots", few_package.coco_gts)
    damaged = text.replace("QUERY", str(query)).replace("ITEM", str(item))
    (tmp_path / "cxc_annots" / PLAUSIBLE[way]).write_text(damaged)
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
    folder = tmp_path / "coco_precomp"
    split = split_of_few(folder)
    write_csv((tmp_path if beside else folder) / "cxc_annots" / "sis_test.csv", "image", pairs)
    opened = open_coco(split)
    assert in_lists(opened.intra["i2i"]) == {0: [1, 2], 1: [0, 2], 2: [0, 1]}
    assert list(opened.intra) == ["i2i"]
    assert "cxc_annots" not in opened.note


def test_images_have_the_numbers_that_the_splits_ids_give_them(tmp_path, few):
    images = few.images[::-1]
    write_csv(tmp_path / "cxc_annots" / "sis_test.csv", "image", [(few.images[0], few.images[3], 5)])
    assert in_lists(open_coco(split_of_few(tmp_path, images)).intra["i2i"]) == {16: [19], 19: [16]}


def test_captions_fit_those_of_their_image_whatever_their_rating_and_others_from_three_on(tmp_path, few):
    captions = np.reshape(few.captions, (FEW, 5))[::-1, ::-1].ravel().tolist()
    pairs = [(0, 1, 0.5), (0, 9, 3.0), (2, 9, 2.9), (99, 3, 4.2)]
    named = [(captions[one], captions[other], rating) for one, other, rating in pairs]
    write_csv(tmp_path / "cxc_annots" / "sts_test.csv", "caption", named)
    right = in_lists(open_coco(split_of_few(tmp_path, few.images[::-1], captions)).intra["t2t"])
    more = {0: [9], 9: [0], 99: [3], 3: [99]}
    others = {c: [k for k in range(c - c % 5, c - c % 5 + 5) if k != c] for c in range(5 * FEW)}
    assert right == {caption: sorted(those + more.get(caption, [])) for caption, those in others.items()}


@pytest.mark.parametrize(
    ("way", "name", "csv"), [("i2i", "cxc_i2i.json", "sis_test.csv"), ("t2t", "cxc_t2t.json", "sts_test.csv")]
)
def test_all_that_gpos_file_lists_fits_in_that_direction_only_and_it_goes_before_the_official_one(
    tmp_path, few, way, name, csv
):
    ids = Ids(few.images[::-1], np.reshape(few.captions, (FEW, 5))[::-1].ravel().tolist())
    those = ids.images if way == "i2i" else ids.captions
    listed = {
        those[7]: [[str(those[2]), 1.5], [those[1], 4], [those[7], 5.0]],
        those[0]: [[those[7], 3.0]],
        9: [[those[1], 5]],
    }
    write_csv(tmp_path / "cxc_annots" / csv, "image", [(those[0], those[5], 5)])
    (tmp_path / "cxc_annots" / name).write_text(json.dumps(listed))
    assert in_lists(open_coco(split_of_few(tmp_path, *ids)).intra[way]) == {0: [7], 7: [1, 2]}


HEADER = "image1,image2,agg_score,sampling_method\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("sis_test.csv", b""),
        ("sis_test.csv", f"{HEADER}COCO_val2014_000000205866.jpg,CO".encode()),
        ("sis_test.csv", f"{HEADER}a_1.jpg,a_2.jpg,good,i2i_csim\n".encode()),
        ("sis_test.csv", f"{HEADER}a.jpg,b.jpg,4,i2i_csim\n".encode()),
        ("sis_test.csv", HEADER.encode() + b"9" * 200_000),
        ("sts_test.csv", b"\xff\xfe"),
        ("cxc_i2i.json", b""),
        ("cxc_i2i.json", b'{"391895": [["770337", 3.0'),
        ("cxc_i2i.json", b"[1, 2]"),
        ("cxc_i2i.json", b'{"391895": 3}'),
        ("cxc_t2t.json", b'{"770337": [[]]}'),
        ("cxc_t2t.json", b'{"770337": [[1e999, 3.0]]}'),
        ("cxc_t2t.json", b'{"770337": [[null, 3.0]]}'),
        ("cxc_t2t.json", b"[" * 100_000),
    ],
    ids=[
        *("empty csv", "cut csv", "no rating", "no ids", "long field", "no text"),
        *("empty json", "cut json", "list", "number", "no answer", "infinite", "null", "deep"),
    ],
)
def test_damaged_annotations_are_an_error_that_names_the_file(tmp_path, few, name, content):
    path = tmp_path / "cxc_annots" / name
    path.parent.mkdir()
    path.write_bytes(content)
    assert refusal(split_of_few(tmp_path)).startswith(f"{path}: damaged, or not CxC's (")


@pytest.mark.parametrize(("name", "kind"), [("sis_test.csv", "image"), ("sts_test.csv", "caption")])
def test_annotations_of_another_split_are_an_error(tmp_path, few, name, kind):
    path = tmp_path / "cxc_annots" / name
    write_csv(path, kind, [(1, 2, 5.0)])
    assert refusal(split_of_few(tmp_path)) == f"{path}: none of its pairs is of this split"


# Figures of images among images, and of captions among captions


def pooled_vectors(size, seed):
    return F.normalize(torch.randn(size, 8, generator=torch.Generator().manual_seed(seed)), dim=1)


def draw_answers(vectors, queries, seed):
    """One to four of the twenty nearest others fit each of some queries."""
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.choice(len(vectors), size=queries, replace=False)).tolist()
    nearest = {query: np.argsort(-(vectors @ vectors[query]).numpy())[1:21] for query in chosen}
    return {query: np.sort(rng.choice(nearest[query], size=rng.integers(1, 5), replace=False)) for query in chosen}


def plain_recalls(vectors, right):
    """Percentages by sorting the mean of all models' cosines, without the query itself."""
    cosines = np.mean([each.numpy().astype(np.float64) @ each.numpy().T for each in vectors], axis=0)
    first = []
    for query, answers in right.items():
        order = [item for item in np.argsort(-cosines[query]) if item != query]
        first.append(min(order.index(answer) for answer in answers))
    recalls = {f"r{k}": 100 * np.mean(np.array(first) < k) for k in (1, 5, 10)}
    return {**recalls, "avg": np.mean(list(recalls.values()))}


@pytest.mark.parametrize("models", [1, 3])
def test_recalls_among_images_and_among_captions_equal_a_sort_of_the_mean_cosines(models):
    images, captions = 60, 600
    pooled = [(pooled_vectors(images, seed), pooled_vectors(captions, 100 + seed)) for seed in range(models)]
    queries = {"i2i": 45, "t2t": 300}  # more captions than are taken at a time
    right = {way: draw_answers(pooled[0][kind], queries[way], seed=kind) for kind, way in enumerate(queries)}
    found = Coco([], right, np.repeat(np.arange(images), 10), "").intra_figures(pooled)
    for kind, (way, answers) in enumerate(right.items()):
        assert found[way] == pytest.approx(plain_recalls([each[kind] for each in pooled], answers))
        for name, (low, high) in found["interval"][way].items():
            assert 0 < low < found[way][name] < high < 100


def test_a_query_is_no_answer_to_itself():
    twins = pooled_vectors(6, seed=0).repeat(2, 1)
    right = {query: np.array([(query + 6) % 12]) for query in range(12)}
    found = Coco([], {"i2i": right}, np.arange(12), "").intra_figures([(twins, twins)])
    assert found["i2i"] == {"r1": 100, "r5": 100, "r10": 100, "avg": 100}


def test_intervals_among_captions_come_from_drawing_images_with_all_their_captions():
    hits, image_of_caption = np.arange(40) // 10 % 2 == 0, np.repeat(np.arange(4), 10)  # of two images all, of two none
    twins = pooled_vectors(20, seed=0).repeat_interleave(2, dim=0)
    right = {caption: np.array([caption ^ 1 if hits[caption] else caption ^ 2]) for caption in range(40)}
    found = Coco([], {"t2t": right}, image_of_caption, "").intra_figures([(twins, twins)])
    assert found["t2t"]["r1"] == 50
    assert found["interval"]["t2t"]["r1"] == [0, 100]


# Several models


@pytest.fixture(scope="module")
def runs(trained_run, tiny_flags, tmp_path_factory):
    another = tmp_path_factory.mktemp("runs") / "another"
    assert train.main([*tiny_flags, "--seed", "1", "--model_name", str(another)]) == 0
    return trained_run, another


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
    model, tokenizer = build_model(read_checkpoint(run / "model_best.pt"))
    model.eval()
    images, captions = torch.from_numpy(np.load(data / "testall_ims.npy")[::5]), []
    with torch.no_grad():
        regions = [model.image_encoder.embed(image).mean(dim=0) for image in images]
        for caption in (data / "testall_caps.txt").read_text().splitlines():
            ids, lengths = map(torch.from_numpy, tokenizer.pad(tokenizer.tokenize([caption])))
            captions.append(model.encode_captions(ids, lengths).mean(dim=0))
    return F.normalize(torch.stack(regions), dim=1), F.normalize(torch.stack(captions), dim=1)


def test_each_model_and_their_ensemble_have_figures_of_their_own_and_ranks_are_the_ensembles(runs, few_data, tmp_path):
    several, records = evaluate(tmp_path / "several", few_data, *runs)
    names = [f"{name}, zero-shot" for name in ("single 1", "single 2", "ensemble of 2")]
    assert list(several["rows"]) == list(several["intra"]) == names
    alone = [evaluate(tmp_path / f"alone{k}", few_data, run)[0] for k, run in enumerate(runs)]
    for part in ("rows", "intra"):
        assert [several[part][name] for name in names[:2]] == [one[part]["X-Dim, zero-shot"] for one in alone]
    for protocol, found in several["rows"][names[2]].items():
        assert_redone(found, records, protocol)
    assert several["rows"][names[2]] not in [several["rows"][name] for name in names[:2]]


def test_images_and_captions_are_compared_by_the_mean_of_their_regions_and_words(runs, few_data, tmp_path):
    found, _ = evaluate(tmp_path / "several", few_data, *runs)
    pooled = [plain_pooled(run, few_data) for run in runs]
    right = open_coco(open_split(str(few_data.parent), few_data.name, "testall")).intra
    for row, some in zip(found["intra"].values(), ([pooled[0]], [pooled[1]], pooled), strict=True):
        for kind, way in enumerate(("i2i", "t2t")):
            assert row[way] == pytest.approx(plain_recalls([each[kind] for each in some], right[way]))


def test_saved_scores_have_no_figures_of_images_among_images(few_data, tmp_path):
    np.save(tmp_path / "scores.npy", np.random.default_rng(0).random((FEW, 5 * FEW), np.float32))
    found, _ = evaluate(tmp_path / "saved", few_data, tmp_path / "scores.npy")
    assert list(found["rows"]) == ["saved scores"]
    assert found["intra"] == {}
    assert found["note"].endswith(coco.NOT_EMBEDDED)
