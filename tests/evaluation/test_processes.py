"""Evaluation on several processes of a job: the same to the last bit as on one, with a share of the memory."""

import json
import re
from io import BytesIO

import numpy as np
import pytest
import torch

import eval as eval_program
import train
from lib import distributed, load
from lib.evaluation import parts, sources
from lib.model.engine.autograd import Scorer
from tests.ranks import run_ranks

IMAGES = 150
SMALL = (32, 200)  # blocks and chunks, to have several in this data: five of 32 images, of which the last has 22; three
FLAGS = ["--split", "testall", "--device", "cpu", "--workers", "0", "--batch_size", "7"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Images with 1 to 8 regions and 1 to 7 captions of 1 to 8 words."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("shared") / "varying_precomp"
    folder.mkdir()
    for split, images in (("train", 24), ("dev", 10), ("testall", IMAGES)):
        regions, captions = rng.integers(1, 9, size=images), rng.integers(1, 8, size=images)
        np.save(folder / f"{split}_ims.npy", rng.standard_normal((regions.sum(), 16)).astype(np.float32))
        np.save(folder / f"{split}_offsets.npy", np.cumsum([0, *regions]))
        words = ["man", "dog", "ball", "park", "bench", "red", "black"]
        lines = [" ".join(rng.choice(words, size=rng.integers(1, 9))) for _ in range(captions.sum())]
        (folder / f"{split}_caps.txt").write_text("".join(f"{line}\n" for line in lines))
        (folder / f"{split}_caps_counts.txt").write_text("".join(f"{count}\n" for count in captions))
    return folder


@pytest.fixture(scope="module")
def run(data, tiny_flags, tmp_path_factory):
    """A run of 10 dimensions: a row of embeddings then starts at any place in memory, not only at an even one."""
    folder = tmp_path_factory.mktemp("runs") / "shared"
    flags = ["--data_path", str(data.parent), "--data_name", data.name, "--embed_size", "10"]
    assert train.main([*tiny_flags, *flags, "--model_name", str(folder)]) == 0
    return folder


def evaluate_in_rank(flags, sizes):
    """The exit code of eval.py with blocks and chunks of other sizes, and the regions and words that this rank held."""
    parts.BLOCK, parts.CHUNK = sizes
    embed_split, held = sources.embed_split, []

    def embed(*given):
        embeddings = embed_split(*given)
        held.extend([len(embeddings.regions), len(embeddings.words)])
        return embeddings

    sources.embed_split = embed
    return eval_program.main(flags), held


@pytest.fixture(scope="module")
def evaluated(run, tmp_path_factory):
    """What eval.py with some flags prints and writes in so many ranks, and the rows that each of them held."""
    done = {}

    def evaluate(count, *flags, sizes=SMALL):
        if (count, flags, sizes) not in done:
            folder = tmp_path_factory.mktemp("results")
            written = {"--json": folder / "results.json"}
            if "--rerank" not in flags:
                written.update({"--save_sims": folder / "sims.npy", "--ranks": folder / "ranks.jsonl"})
            given = ["--checkpoint", str(run), *FLAGS, *flags, *(str(one) for item in written.items() for one in item)]
            outcomes = run_ranks(evaluate_in_rank, count, given, sizes)
            assert [one.value[0] for one in outcomes] == [0] * count, outcomes[0].err
            assert not any(one.out for one in outcomes[1:])
            assert {path.name for path in folder.iterdir()} == {path.name for path in written.values()}
            results = json.loads(written["--json"].read_text())
            del results["timing"]
            scores, ranks = (written[f].read_bytes() if f in written else b"" for f in ("--save_sims", "--ranks"))
            held = np.array([one.value[1] for one in outcomes])
            done[count, flags, sizes] = outcomes[0].out, results, scores, held, ranks
        return done[count, flags, sizes]

    return evaluate


def without_device_and_seconds(out):
    assert len(re.findall(r"^(?:device|seconds) .*\n", out, flags=re.MULTILINE)) == 2
    return re.sub(r"^(device|seconds) .*\n", "", out, flags=re.MULTILINE)


def assert_equal(one, other):
    assert without_device_and_seconds(one[0]) == without_device_and_seconds(other[0])
    assert one[1] == other[1]
    assert one[2] == other[2]
    assert one[4] == other[4]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("count", [2, 3])
def test_table_results_and_scores_are_the_same_to_the_bit_on_any_number_of_processes(evaluated, count, precision):
    flags = ["--fold5", "--precision", precision]
    assert "mean of 5 folds of 30" in evaluated(1, *flags)[0]
    assert_equal(evaluated(count, *flags), evaluated(1, *flags))


def test_an_ensemble_with_saved_scores_is_the_same_on_any_number_of_processes(evaluated, run, tmp_path):
    flags = ["--checkpoint", str(run), *FLAGS, "--save_sims", str(tmp_path / "half.npy"), "--precision", "bf16"]
    assert eval_program.main(flags) == 0
    flags = ["--fold5", "--checkpoint", str(tmp_path / "half.npy")]
    alone = evaluated(1, *flags)
    assert {"single 1", "single 2", "ensemble of 2"} == {*alone[1]["singles"], alone[1]["row"]}
    assert alone[1]["rsum"] != evaluated(1, "--fold5", "--precision", "fp32")[1]["rsum"]
    assert_equal(evaluated(3, *flags), alone)


def compare_in_rank(flags):
    return eval_program.main(flags)


def test_a_comparison_is_the_same_on_any_number_of_processes(run, tmp_path):
    scores = tmp_path / "scores.npy"
    assert eval_program.main(["--checkpoint", str(run), *FLAGS, "--save_sims", str(scores)]) == 0
    np.save(scores, np.load(scores) + np.random.default_rng(0).normal(0, 0.1, np.load(scores).shape).astype("f4"))
    flags = ["compare", str(run), str(scores), *FLAGS]
    alone, several = (run_ranks(compare_in_rank, count, flags) for count in (1, 2))
    assert [one.value for one in (*alone, *several)] == [0, 0, 0]
    assert without_device_and_seconds(alone[0].out) == without_device_and_seconds(several[0].out)
    assert not several[1].out


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("k", ["5", "auto"])
def test_coarse_to_fine_ranks_are_the_same_on_any_number_of_processes(evaluated, count, k):
    flags = ["--fold5", "--rerank", k]
    assert 0 < evaluated(1, *flags)[1]["rerank"]["exact_pairs"] < evaluated(1, *flags)[1]["rerank"]["pairs"]
    assert_equal(evaluated(count, *flags), evaluated(1, *flags))


@pytest.mark.parametrize("flags", [(), ("--rerank", "5")])
def test_where_there_are_more_processes_than_blocks_some_have_nothing_and_the_results_are_the_same(evaluated, flags):
    sizes = (parts.BLOCK, parts.CHUNK)
    many, one = (evaluated(count, *flags, sizes=sizes) for count in (4, 1))
    assert sorted((many[3] == 0).all(axis=1)) == [False, False, False, True]
    assert_equal(many, one)


def test_sizes_of_blocks_and_chunks_change_nothing_but_the_last_digits(evaluated):
    small, large = (
        evaluated(1, *flags, sizes=sizes)[2]
        for flags, sizes in (
            (("--fold5", "--precision", "fp32"), SMALL),
            ((), (parts.BLOCK, parts.CHUNK)),
        )
    )
    np.testing.assert_allclose(*(np.load(BytesIO(scores)) for scores in (small, large)), atol=1e-5)


def test_a_process_holds_its_share_of_the_embeddings_only(evaluated):
    flags = ["--fold5", "--precision", "fp32"]
    (whole,) = evaluated(1, *flags)[3]
    for count in (2, 3):
        held = evaluated(count, *flags)[3]  # (processes, 2): regions and words of each
        assert held.sum(axis=0).tolist() == whole.tolist()
        assert (held.max(axis=0) < 1.3 * whole / count).all()


def test_the_heading_says_how_many_processes_there_are(evaluated):
    assert re.search(r"device      cpu \(1 threads\), fp32, 3 processes\n", evaluated(3, "--fold5", "--rerank", "5")[0])
    assert re.search(r"device      cpu \(1 threads\), fp32\n", evaluated(1, "--fold5", "--rerank", "5")[0])


def score_alone(run, features):
    """Scores from Python's interface, in one rank only of a job whose ranks could exchange something."""
    with distributed.joined(torch.device("cpu")):
        return load(run, device="cpu").score(features, ["a red ball", "a dog"]) if distributed.is_first() else None


def test_scoring_from_python_takes_no_other_process(run):
    features = np.random.default_rng(0).standard_normal((3, 6, 16)).astype(np.float32)
    scores, nothing = (one.value for one in run_ranks(score_alone, 2, run, features))
    assert nothing is None
    torch.testing.assert_close(scores, load(run, device="cpu").score(features, ["a red ball", "a dog"]))


def evaluate_with_a_nan_in_the_second(flags):
    if distributed.rank() == 1:
        Scorer.all_pairs = lambda self, regions, words, lengths, real: torch.full(
            (len(regions), len(lengths)), torch.nan
        )
    return evaluate_in_rank(flags, SMALL)


def test_scores_of_one_process_that_are_not_numbers_end_all_alike_and_leave_no_file(run, tmp_path):
    flags = ["--checkpoint", str(run), *FLAGS, "--save_sims", str(tmp_path / "sims.npy")]
    outcomes = run_ranks(evaluate_with_a_nan_in_the_second, 3, flags)
    assert [one.value[0] for one in outcomes] == [2] * 3
    assert "NaN" in outcomes[0].err
    assert not list(tmp_path.iterdir())


def test_shares_are_whole_blocks_that_divide_a_split(monkeypatch):
    image_of_caption = np.repeat(np.arange(150), 3)
    for count in (1, 2, 3, 5):
        monkeypatch.setattr("lib.distributed.world_size", lambda count=count: count)
        shares = parts.share_out(150, image_of_caption).parts
        assert len(shares) == count
        images = [image for share in shares for image in range(150)[share.images]]
        assert images == list(range(150))
        assert all(share.captions == slice(3 * share.images.start, 3 * share.images.stop) for share in shares)
        assert all(share.images.start % parts.BLOCK == 0 for share in shares)
