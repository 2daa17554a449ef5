"""The training run as a whole, through train.py."""

import json
import re

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from lib import losses
from lib.checkpoints.native import read_checkpoint
from lib.training import train as training
from tests.conftest import GOLDEN, TINY_BERT

LOSS = re.compile(r"step (\d+) loss ([\d.]+)")


def run(flags, folder, *more) -> dict[int, str]:
    """Train; returns the losses as printed, by step."""
    assert train.main([*flags, "--model_name", str(folder), "--log_step", "1", *more]) == 0
    return dict(LOSS.findall((folder / "run.log").read_text()))


def weights(folder, name="last.pt"):
    return read_checkpoint(folder / name)["model"]


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_folder_holds_checkpoints_of_plain_types_log_and_tensorboard_files(trained_run):
    assert {"last.pt", "model_best.pt", "step-00000015.pt", "run.json", "run.log"} <= {
        path.name for path in trained_run.iterdir()
    }
    content = torch.load(trained_run / "last.pt", weights_only=True)
    progress = content["progress"]
    assert (progress["epoch"], progress["batch"], progress["step"]) == (1, 0, 15)
    assert progress["best_rsum"] == progress["history"][-1]["dev"]["rsum"]
    assert content["settings"]["batch_size"] == 8
    log = (trained_run / "run.log").read_text()
    assert "parameters" in log
    assert "1 epochs of 15, batches of 8 pairs" in log
    assert "epoch 1 dev: image to text" in log


def test_tensorboard_shows_losses_rates_gate_and_dev_recall(trained_run):
    events = EventAccumulator(str(trained_run))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {
        *("train/loss", "train/gradient_norm", "train/pairs_per_second", "rate/learning", "rate/bert"),
        *("gate/sparsity", "gate/open_rows", "gate/closed_rows", "gate/partners", "gate/sharpness", "gate/threshold"),
        *("gate/temperature", "dev/rsum"),
        *(f"dev/{way}_{recall}" for way in ("i2t", "t2i") for recall in ("r1", "r5", "r10")),
    }
    assert [event.step for event in events.Scalars("train/loss")] == [5, 10, 15]
    assert events.Scalars("rate/bert")[0].value == pytest.approx(5e-5)


def test_the_same_seed_gives_the_same_losses_and_weights_to_the_bit(tiny_flags, tmp_path):
    one, two = run(tiny_flags, tmp_path / "one"), run(tiny_flags, tmp_path / "two", "--workers", "2")
    assert len(one) == 15
    assert one == two
    assert_same(weights(tmp_path / "one"), weights(tmp_path / "two"))
    assert run(tiny_flags, tmp_path / "three", "--seed", "1") != one


def test_hardest_negatives_start_after_the_warmup_or_at_once(tiny_flags, tmp_path, monkeypatch):
    seen = []

    def spy(run, batch, loss, train_step=training.train_step):
        seen.append(loss.__name__)
        return train_step(run, batch, loss)

    monkeypatch.setattr(training, "train_step", spy)
    run(tiny_flags, tmp_path / "warm", "--num_epochs", "2")
    run(tiny_flags, tmp_path / "hard", "--max_violation")
    run(tiny_flags, tmp_path / "ramped", "--loss", "ramped", "--num_epochs", "2")
    assert seen == ["hinge_all"] * 15 + ["hinge"] * 30 + ["ramped"] * 30


@pytest.mark.parametrize("clip", [0.0, 1e-3, 1e9])
def test_clipping_bounds_the_norm_over_all_parameters_and_zero_switches_it_off(tiny_flags, tmp_path, monkeypatch, clip):
    norms = []

    def spy(optimizer, *args, step=torch.optim.AdamW.step):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.cat([gradient.flatten() for gradient in gradients]).norm().item())
        return step(optimizer)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    run(tiny_flags, tmp_path / "run", "--grad_clip", str(clip))
    printed = re.findall(r"gradient ([\d.]+)", (tmp_path / "run" / "run.log").read_text())
    if clip == 1e-3:
        assert norms == pytest.approx([clip] * 15, rel=1e-3)
    else:
        assert norms == pytest.approx([float(norm) for norm in printed], abs=0.01)


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("step", [1, 4, 14, 15])  # of an epoch of 15
def test_a_step_whose_figures_are_no_numbers_stops_the_run_and_nothing_is_saved_from_it_on(
    tiny_flags, tmp_path, monkeypatch, capsys, step, what
):
    calls = []

    def loss(scores, margin, plain=losses.hinge):
        calls.append(None)
        if len(calls) != step:
            return plain(scores, margin)
        return scores.sum() * float("nan") if what == "loss" else (scores - scores.detach()).abs().sqrt().sum()

    monkeypatch.setattr(losses, "hinge", loss)
    folder = tmp_path / "run"
    flags = ["--model_name", str(folder), "--save_steps", "1", "--keep", "99", "--max_violation"]
    assert train.main([*tiny_flags, *flags]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith(
        f"error: step {step}: the loss is {'nan' if what == 'loss' else '0.0'}, its gradient's norm"
    )
    assert "--learning_rate" in error
    saved = sorted(folder.glob("step-*.pt"))
    assert [path.name for path in saved] == [f"step-{done:08d}.pt" for done in range(1, step)]
    assert all(weight.isfinite().all() for path in saved for weight in weights(folder, path.name).values())


@pytest.mark.parametrize("step", [3, 15])
def test_so_it_is_where_the_step_is_not_saved_itself(tiny_flags, tmp_path, monkeypatch, capsys, step):
    """The figures are looked at late, but before the save of a later step or of the epoch."""
    train_step = training.train_step

    def failing(run, *args):
        figures = train_step(run, *args)
        return figures * float("inf") if run.progress.step + 1 == step else figures

    monkeypatch.setattr(training, "train_step", failing)
    folder = tmp_path / "run"
    flags = ["--model_name", str(folder), "--save_steps", "4", "--log_step", "99", "--keep", "99"]
    assert train.main([*tiny_flags, *flags]) == 1
    assert f"step {step}: the loss is inf" in capsys.readouterr().err
    assert {path.name for path in folder.glob("step-*.pt")} == {
        f"step-{done:08d}.pt" for done in (4, 8, 12) if done < step
    }


def test_a_step_is_enqueued_before_the_figures_of_the_one_before_are_looked_at(tiny_flags, tmp_path, monkeypatch):
    happened = []
    train_step, check = training.train_step, training.check_figures

    def stepping(run, *args):
        happened.append(f"step {run.progress.step + 1}")
        return train_step(run, *args)

    def looking(run, watch, log, step, *figures):
        happened.append(f"look {step}")
        check(run, watch, log, step, *figures)

    monkeypatch.setattr(training, "train_step", stepping)
    monkeypatch.setattr(training, "check_figures", looking)
    assert train.main([*tiny_flags, "--model_name", str(tmp_path / "run"), "--log_step", "4"]) == 0
    assert " ".join(happened).startswith("step 1 step 2 look 1 step 3 look 2 step 4 look 3 look 4 step 5 step 6 look 5")
    assert [what for what in happened if "look" in what] == [f"look {step}" for step in range(1, 16)]


@pytest.mark.parametrize("flag", [["--max_violation"], ["--loss", "ramped"]])
def test_a_collapsed_run_is_warned_of(tiny_flags, tmp_path, monkeypatch, flag):
    def scores(similarity, regions, words, lengths, real):
        return regions.mean() * 1e-3 * torch.arange(len(regions)) + words.new_zeros(len(lengths))[:, None]

    monkeypatch.setattr("lib.training.collapse.WATCHED_STEPS", 10)
    monkeypatch.setattr("lib.model.engine.TiledEngine.__call__", scores)
    run(tiny_flags, tmp_path / "run", *flag)
    assert (tmp_path / "run" / "run.log").read_text().count("they have collapsed to one value") == 1


def test_scripts_of_the_family_may_pass_precomp_enc_type_basic(tiny_flags, tmp_path):
    run(tiny_flags, tmp_path / "run", "--precomp_enc_type", "basic")


def test_float16_features_train_like_float32_ones_within_rounding(make_data, tiny_flags, tmp_path):
    losses = []
    for dtype in (np.float32, np.float16):
        make_data(tmp_path / dtype.__name__ / "tiny_precomp", dtype=dtype)
        flags = [*tiny_flags, "--data_path", str(tmp_path / dtype.__name__)]
        losses.append([float(loss) for loss in run(flags, tmp_path / f"run-{dtype.__name__}").values()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    assert losses[0] != losses[1]


def test_features_kept_on_the_device_train_like_those_of_a_float16_file_to_the_bit(make_data, tiny_flags, tmp_path):
    for dtype, more in ((np.float32, ["--device_features", "--workers", "2"]), (np.float16, [])):
        make_data(tmp_path / dtype.__name__ / "tiny_precomp", dtype=dtype)
        flags = [*tiny_flags, "--data_path", str(tmp_path / dtype.__name__)]
        run(flags, tmp_path / f"run-{dtype.__name__}", *more)
    assert_same(weights(tmp_path / "run-float32"), weights(tmp_path / "run-float16"))


def test_the_loss_curve_is_the_committed_one(tiny_flags, tmp_path):
    """Any change to model, loss, recipe, order or augmentation shows here; tests/golden/README.md says how to renew it.

    Without BERT's dropout, whose random numbers differ between processors.
    """
    config = json.loads((TINY_BERT / "config.json").read_text())
    bert = tmp_path / "bert"
    bert.mkdir()
    (bert / "config.json").write_text(
        json.dumps({**config, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    )
    (bert / "vocab.txt").write_bytes((TINY_BERT / "vocab.txt").read_bytes())
    losses = run(tiny_flags, tmp_path / "run", "--num_epochs", "2", "--bert", str(bert))
    curve = json.loads((GOLDEN / "loss_curve.json").read_text())
    assert [float(loss) for loss in losses.values()] == pytest.approx(curve, rel=1e-4)
