"""Evaluation in several processes of a job: the same to the last bit as in one."""

import json
import re

import numpy as np
import pytest
import torch

import eval as eval_program
import train
from lib import distributed, load
from lib.evaluation import score
from lib.model.engine.autograd import Scorer
from tests.conftest import write_varying_data
from tests.ranks import run_ranks

FLAGS = ["--split", "testall", "--device", "cpu", "--workers", "0", "--batch_size", "32"]  # five blocks of images
CHUNK = 200  # captions: three chunks


@pytest.fixture(scope="module")
def run(tiny_flags, tmp_path_factory):
    """A run on images with 1 to 8 regions and 1 to 7 captions of 1 to 8 words, with an odd number of dimensions: rows
    of embeddings then start anywhere in memory."""
    images = {"train": 24, "dev": 10, "testall": 150}
    folder = write_varying_data(tmp_path_factory.mktemp("shared") / "varying_precomp", images)
    run = tmp_path_factory.mktemp("runs") / "shared"
    flags = ["--data_path", str(folder.parent), "--data_name", folder.name, "--embed_size", "11"]
    assert train.main([*tiny_flags, *flags, "--model_name", str(run)]) == 0
    return run


def in_rank(flags):
    """The exit code of eval.py with small chunks."""
    score.CHUNK = {"cpu": CHUNK}
    return eval_program.main(flags)


def evaluate(count, folder, *flags):
    """What eval.py prints and writes in so many processes, without device and seconds."""
    folder.mkdir()
    written = {"--json": folder / "results.json"}
    if "--rerank" not in flags and flags[0] != "compare":
        written.update({"--save_sims": folder / "sims.npy", "--ranks": folder / "ranks.jsonl"})
    outcomes = run_ranks(in_rank, count, [*flags, *FLAGS, *(str(one) for item in written.items() for one in item)])
    assert [one.value for one in outcomes] == [0] * count, outcomes[0].err
    assert not any(one.out for one in outcomes[1:])
    assert {path.name for path in folder.iterdir()} == {path.name for path in written.values()}
    out, results = outcomes[0].out, json.loads(written["--json"].read_text())
    assert re.search(rf"^device .*, {count} processes$", out, re.MULTILINE) or count == 1
    del results["timing"]
    files = [path.read_bytes() for flag, path in written.items() if flag != "--json"]
    return re.sub(r"^(device|seconds) .*\n", "", out, flags=re.MULTILINE), results, files


@pytest.mark.parametrize(
    "flags",
    [
        ["--fold5"],
        ["--precision", "bf16"],
        ["--fold5", "--rerank", "auto"],
        ["--checkpoint", "SAVED"],
        ["compare", "RUN", "SAVED"],
    ],
    ids=lambda flags: " ".join(flags),
)
def test_tables_results_scores_and_ranks_are_the_same_to_the_bit_in_any_number_of_processes(flags, run, tmp_path):
    saved = tmp_path / "saved.npy"
    if "SAVED" in flags:
        assert eval_program.main(["--checkpoint", str(run), *FLAGS, "--save_sims", str(saved)]) == 0
        noise = np.random.default_rng(0).normal(0, 0.1, np.load(saved).shape).astype(np.float32)
        np.save(saved, np.load(saved) + noise)
    flags = [{"RUN": str(run), "SAVED": str(saved)}.get(flag, flag) for flag in flags]
    if flags[0] != "compare":
        flags = ["--checkpoint", str(run), *flags]
    alone = evaluate(1, tmp_path / "1", *flags)
    for count in (2, 3) if flags[-1] == "--fold5" else (3,):
        assert evaluate(count, tmp_path / str(count), *flags) == alone


def test_more_processes_than_blocks_of_images_change_nothing(run, tmp_path):
    flags = ["--checkpoint", str(run), "--split", "dev"]  # after FLAGS: the last one counts
    one, three = (run_ranks(in_rank, count, [*FLAGS, *flags]) for count in (1, 3))
    table = [outcome.out.split("seconds")[1].split("\n", 1)[1] for outcome in (one[0], three[0])]
    assert table[0] == table[1]


def test_the_size_of_blocks_and_chunks_changes_nothing_but_the_last_digits(run, tmp_path):
    paths = [tmp_path / f"{size}.npy" for size in (7, 64)]
    for path in paths:
        flags = [*FLAGS, "--batch_size", path.stem, "--save_sims", str(path)]
        assert eval_program.main(["--checkpoint", str(run), *flags]) == 0
    np.testing.assert_allclose(*map(np.load, paths), atol=1e-5)


def with_a_nan_in_the_second(flags):
    if distributed.rank() == 1:
        Scorer.all_pairs = lambda self, regions, captions, real: torch.full(
            (len(regions), len(captions.bags.lengths)), torch.nan
        )
    return eval_program.main(flags)


def test_nan_scores_of_one_process_end_all_processes_alike_and_leave_no_file(run, tmp_path):
    flags = ["--checkpoint", str(run), *FLAGS, "--save_sims", str(tmp_path / "sims.npy")]
    outcomes = run_ranks(with_a_nan_in_the_second, 3, flags)
    assert [one.value for one in outcomes] == [2] * 3
    assert "NaN" in outcomes[0].err
    assert not list(tmp_path.iterdir())


def score_in_the_first(run, features):
    """Scores from Python's interface, in one process only of a job whose processes could talk."""
    with distributed.joined(torch.device("cpu")):
        return load(run, device="cpu").score(features, ["a red ball", "a dog"]) if distributed.is_first() else None


def test_scoring_from_python_takes_no_other_process(run):
    features = np.random.default_rng(0).standard_normal((3, 6, 16)).astype(np.float32)
    scores, nothing = (one.value for one in run_ranks(score_in_the_first, 2, run, features))
    assert nothing is None
    torch.testing.assert_close(scores, load(run, device="cpu").score(features, ["a red ball", "a dog"]))
