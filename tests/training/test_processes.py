"""Training by several processes: the same run as by one, whole or ended and gone on with."""

import json
import re

import pytest
import torch

import train
from lib.checkpoints.native import read_checkpoint
from lib.model.engine import autograd
from lib.training import train as training
from tests.conftest import TINY_BERT
from tests.ranks import run_ranks

EXACT = 1e-8


@pytest.fixture(scope="module")
def flags(tiny_flags, tmp_path_factory):
    """A run of BERT without dropout, whose random numbers each process draws for itself."""
    config = json.loads((TINY_BERT / "config.json").read_text())
    bert = tmp_path_factory.mktemp("bert")
    (bert / "config.json").write_text(
        json.dumps({**config, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    )
    (bert / "vocab.txt").write_bytes((TINY_BERT / "vocab.txt").read_bytes())
    return [*tiny_flags, "--bert", str(bert)]


def train_in_float64(flags, steps):
    """A rank's run: figures and gradients of each of the first steps, and the weights after them."""
    torch.set_default_dtype(torch.float64)
    seen, train_step = [], training.train_step

    def spy(run, *args):
        figures = train_step(run, *args)
        gradients = {name: weight.grad.clone() for name, weight in run.model.named_parameters()}
        seen.append((figures.tolist(), gradients))
        if len(seen) == steps:
            weights = {name: weight.clone() for name, weight in run.model.state_dict().items()}
            raise Seen((seen, weights))
        return figures

    training.train_step = spy
    try:
        train.main(flags)
    except Seen as all_seen:
        return all_seen.args[0]
    finally:
        training.train_step = train_step


class Seen(Exception):
    """What a run was started for."""


def assert_equal(one, other):
    """Figures, gradients and weights of two runs."""
    for (figures, gradients), (others, theirs) in zip(one[0], other[0], strict=True):
        assert figures == pytest.approx(others, rel=EXACT, nan_ok=True)
        assert_close(gradients, theirs)
    assert_close(one[1], other[1])


def assert_close(tensors, others):
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        largest = max(others[name].abs().max().item(), 1e-3)
        assert (tensor - others[name]).abs().max().item() <= EXACT * largest, name


RECIPES = {
    "all negatives": [],
    "hardest negatives": ["--max_violation"],
    "ramped": ["--loss", "ramped", "--batch_size", "11"],
    "padding masked": ["--mask_padding", "--max_violation"],
    "captions in micro batches": ["--micro_batch", "2"],
    "uneven batches": ["--batch_size", "11", "--max_violation"],
    "independent": ["--similarity", "independent"],
    "pooled": ["--similarity", "gpo", "--batch_size", "11", "--mask_padding"],
    "diagonal": ["--gate", "diagonal", "--batch_size", "11"],
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_losses_gradients_and_weights_are_those_of_one_process(flags, tmp_path, recipe):
    runs = []
    for count in (1, 2, 3):
        folder = ["--model_name", str(tmp_path / str(count))]
        runs.append([rank.value for rank in run_ranks(train_in_float64, count, [*flags, *RECIPES[recipe], *folder], 5)])
    (whole,), *shared = runs
    for ranks in shared:
        for rank in ranks:
            assert_equal(rank, whole)


def train_as_if_few_negatives_counted(flags, steps):
    autograd.FEW_PAIRS = 1.0
    return train_in_float64(flags, steps)


def test_where_few_negatives_count_so_it_is(flags, tmp_path):
    """All pairs are scored then, and those that count are differentiated."""
    runs = []
    for count in (1, 3):
        folder = ["--model_name", str(tmp_path / str(count))]
        runs.append(run_ranks(train_as_if_few_negatives_counted, count, [*flags, *folder], 3)[0].value)
    assert_equal(*runs)


def run_program(flags):
    return train.main(flags)


def start(flags, count, folder, *more, check=True):
    """A whole run by a number of processes; the outcomes of its ranks."""
    return run_ranks(run_program, count, [*flags, "--model_name", str(folder), "--log_step", "1", *more], check=check)


def losses(folder):
    return dict(re.findall(r"step (\d+) loss ([\d.]+)", (folder / "run.log").read_text()))


def weights(folder):
    return read_checkpoint(folder / "last.pt")["model"]


@pytest.fixture(scope="module")
def by_three(tiny_flags, tmp_path_factory):
    """A run of two epochs by three processes, with BERT's dropout."""
    folder = tmp_path_factory.mktemp("runs") / "three"
    start(tiny_flags, 3, folder, "--num_epochs", "2", "--keep", "99", "--save_steps", "10")
    return folder


def test_the_first_process_alone_prints_and_writes(by_three, tiny_flags, tmp_path):
    ranks = start(tiny_flags, 3, tmp_path / "run")
    assert [rank.value for rank in ranks] == [0, 0, 0]
    assert "epoch 1 step 15 loss" in ranks[0].out
    assert "3 processes" in ranks[0].out
    assert [rank.out for rank in ranks[1:]] == ["", ""]
    assert [rank.err for rank in ranks] == ["", "", ""]
    names = {path.name for path in by_three.iterdir() if not path.name.startswith("events.")}
    steps = {f"step-{step:08d}.pt" for step in (10, 15, 20, 30)}
    assert names == {*steps, "last.pt", "model_best.pt", "run.json", "run.log", "run.lock"}


def test_a_resumed_run_equals_the_undisturbed_one_to_the_bit(by_three, tmp_path):
    """Each process's dropout goes on where it was."""
    content = read_checkpoint(by_three / "step-00000010.pt")
    assert len(content["random_state"]["others"]) == 2
    folder = tmp_path / "run"
    run_ranks(run_program, 3, ["--resume", str(by_three / "step-00000010.pt"), "--model_name", str(folder)])
    ours, theirs = weights(folder), weights(by_three)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_another_number_of_processes_goes_on_and_says_what_changes(flags, tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "changing"
    start(flags, 1, whole, "--num_epochs", "3")
    start(flags, 2, folder, "--num_epochs", "1")
    for count, epochs in ((3, "2"), (1, "3")):
        ranks = run_ranks(run_program, count, ["--resume", str(folder), "--num_epochs", epochs])
        now = f"{count} processes" if count > 1 else "one process"
        assert f"by {now} now: BERT's dropout draws other random numbers" in ranks[0].out
    assert [float(loss) for loss in losses(folder).values()] == pytest.approx(
        [float(loss) for loss in losses(whole).values()], rel=1e-3
    )


def interrupt_one(flags, step, signal_number):
    """A rank's run in which the last rank alone is signalled in a step."""
    import os

    from lib import distributed

    train_step = training.train_step

    def stepping(run, *args):
        if run.progress.step + 1 == step and distributed.rank() == distributed.world_size() - 1:
            os.kill(os.getpid(), signal_number)
        return train_step(run, *args)

    training.train_step = stepping
    return train.main(flags)


def test_a_signal_to_one_process_ends_all_after_the_same_step(tiny_flags, by_three, tmp_path):
    folder = tmp_path / "run"
    flags = [*tiny_flags, "--num_epochs", "2", "--model_name", str(folder), "--log_step", "1", "--save_steps", "10"]
    ranks = run_ranks(interrupt_one, 3, flags, 7, 15)
    assert [rank.value for rank in ranks] == [143, 143, 143]
    assert ranks[0].err == f"SIGTERM: saved after step 7; go on with: python train.py --resume {folder}\n"
    assert [rank.err for rank in ranks[1:]] == ["", ""]
    run_ranks(run_program, 3, ["--resume", str(folder)])
    ours, theirs = weights(folder), weights(by_three)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_processes_with_different_flags_are_refused(tiny_flags, tmp_path):
    ranks = run_ranks(run_with_own_seed, 2, [*tiny_flags, "--model_name", str(tmp_path / "run")])
    assert [rank.value for rank in ranks] == [2, 2]
    said = "error: rank 0: --seed: 0 of rank 0 but 1 of rank 1; start all processes with the same flags\n"
    assert ranks[0].err == said


def run_with_own_seed(flags):
    from lib import distributed

    return train.main([*flags, "--seed", str(distributed.rank())])


def test_fewer_pairs_than_processes_are_refused(tiny_flags, tmp_path):
    ranks = start(tiny_flags, 3, tmp_path / "run", "--batch_size", "2")
    assert [rank.value for rank in ranks] == [2, 2, 2]
    assert "--batch_size 2: fewer pairs than the 3 processes" in ranks[0].err
