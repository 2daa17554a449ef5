"""A training as a whole, through train.py."""

import io
import json
import re
import shutil
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams.api_pb2 import ListSessionGroupsRequest
from tensorboard.plugins.hparams.backend_context import Context
from tensorboard.plugins.hparams.list_session_groups import Handler

import train
from lib import load
from lib.checkpoints.native import build_model, read_checkpoint
from lib.checkpoints.record import read_record
from lib.config import TrainSettings, parse
from lib.data.dataset import open_split
from lib.evaluation.attention import attention, find_pairs, light
from lib.evaluation.metrics import chance_metrics
from lib.prepare import scenes
from lib.runtime import Compute, versions
from lib.training import log, loop
from lib.training.log import COLLAPSED_STEPS, RunLog, StepFigures
from lib.training.run_folder import Progress
from tests.conftest import GOLDEN, TINY_BERT, assert_same_weights, bert_without_dropout

STEPS = 15  # of an epoch of the tiny data set


def run(flags, folder, *more) -> dict[int, float]:
    """Train; returns the losses as printed, by step."""
    assert train.main([*flags, "--model_name", str(folder), "--log_step", "1", *more]) == 0
    losses = re.findall(r"step (\d+) loss ([\d.]+)", (folder / "run.log").read_text())
    return {int(step): float(loss) for step, loss in losses}


# What it computes


def test_the_loss_curve_is_the_committed_one(tiny_flags, tmp_path):
    """Any change to model, loss, recipe, order or augmentation shows here; tests/golden/README.md says how to renew it.

    Without dropout, whose random numbers differ between processors.
    """
    losses = run(tiny_flags, tmp_path / "run", "--num_epochs", "2", "--bert", bert_without_dropout(tmp_path))
    curve = json.loads((GOLDEN / "loss_curve.json").read_text())
    assert list(losses.values()) == pytest.approx(curve, rel=1e-4)


def test_a_short_training_on_the_embedded_scenes_reaches_three_times_chance(tmp_path, monkeypatch):
    """Seeds 0 to 2 reach 125 to 160, four to five times chance."""
    sizes = {"train": 400, "dev": 100, "testall": 10, "test": 2}
    monkeypatch.setattr(scenes, "split_sizes", lambda _: sizes)
    scenes.write_scenes(tmp_path / "scenes_precomp", tmp_path / "vocab", images=400, seed=0)
    flags = ["--data_path", str(tmp_path), "--data_name", "scenes_precomp", "--img_dim", "414", "--device", "cpu"]
    flags += ["--bert", str(tmp_path / "vocab"), "--bert_from_scratch", "--gate", "open", "--batch_size", "16"]
    flags += ["--embed_size", "128", "--learning_rate", "0.002", "--num_epochs", "1", "--workers", "0"]
    run(flags, tmp_path / "run")
    chance = 2 * (1 + 5 + 10) * 100 / sizes["dev"]  # about: R@1, R@5 and R@10 in both directions
    assert read_record(tmp_path / "run")["history"][0]["dev"]["rsum"] > 3 * chance


def test_the_same_seed_gives_the_same_losses_and_weights_to_the_bit(tiny_flags, tmp_path):
    one, two = run(tiny_flags, tmp_path / "one"), run(tiny_flags, tmp_path / "two", "--workers", "2")
    assert len(one) == STEPS
    assert one == two
    assert_same_weights(tmp_path / "one", tmp_path / "two")
    assert run(tiny_flags, tmp_path / "three", "--seed", "1") != one


def test_an_images_other_captions_are_negatives_unless_the_flag_leaves_them_out(tiny_flags, tmp_path):
    """Both say so, since the share of such pairs is large."""
    with_them, without = (
        run(tiny_flags, tmp_path / name, *flags)
        for name, flags in (("with", []), ("without", ["--no_same_image_negatives"]))
    )
    first = min(step for step in with_them if with_them[step] != without[step])  # with such a pair in its batch
    assert first <= 5
    assert without[first] < with_them[first]  # from the same weights, with terms left out
    share = "negatives   22 % of a batch's pairs have another caption of their image in the batch, which is "
    assert f"{share}a negative; --no_same_image_neg" in (tmp_path / "with" / "run.log").read_text()
    assert f"{share}left out\n" in (tmp_path / "without" / "run.log").read_text()


def test_features_on_the_device_train_like_float16_ones_in_the_file(make_data, tiny_flags, tmp_path):
    device = ["--device_features", "--workers", "2"]
    for name, dtype, more in (("half", np.float16, []), ("device", np.float32, device)):
        make_data(tmp_path / name / "tiny_precomp", {"train": 24, "dev": 10}, dtype=dtype)  # no test split
        run([*tiny_flags, "--data_path", str(tmp_path / name)], tmp_path / f"run-{name}", *more)
    assert_same_weights(tmp_path / "run-half", tmp_path / "run-device")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], ["hinge_all", "hinge", "hinge"]),
        (["--max_violation"], ["hinge"] * 3),
        (["--vse_mean_warmup_epochs", "2"], ["hinge_all", "hinge_all", "hinge"]),
        (["--loss", "ramped"], ["ramped"] * 3),
    ],
)
def test_the_hardest_negatives_take_over_after_the_warmup(flags, expected):
    settings = parse(TrainSettings, "", flags)
    assert [loop.loss_of(settings, epoch).__name__ for epoch in range(3)] == expected


@pytest.mark.parametrize("clip", [0.0, 1e-3])
def test_clipping_bounds_the_norm_over_all_parameters_and_zero_switches_it_off(tiny_flags, tmp_path, monkeypatch, clip):
    norms = []

    def spy(optimizer, *args, step=torch.optim.AdamW.step):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.cat([gradient.flatten() for gradient in gradients]).norm().item())
        return step(optimizer)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    run(tiny_flags, tmp_path / "run", "--grad_clip", str(clip))
    printed = re.findall(r"gradient ([\d.]+)", (tmp_path / "run" / "run.log").read_text())
    expected = [clip] * STEPS if clip else [float(norm) for norm in printed]
    assert norms == pytest.approx(expected, rel=1e-3, abs=0.0 if clip else 0.01)


def test_gradients_of_the_step_before_are_gone_before_the_forward_pass_and_warmth_scales_the_loss():
    """Activations take their memory."""
    weight, seen = torch.nn.Parameter(torch.ones(())), []

    def batch_loss(*_):
        seen.append(weight.grad)
        return weight * 2, weight.detach()

    model, optimizer = torch.nn.Module(), torch.optim.SGD([weight], lr=1.0)
    model.weight = weight
    compute, settings = Compute(torch.device("cpu"), "fp32"), SimpleNamespace(grad_clip=0.0)
    run = SimpleNamespace(model=model, batch_loss=batch_loss, optimizer=optimizer, compute=compute, settings=settings)
    for warmth in (1.0, 0.5):
        loop.train_step(run, None, None, warmth)
    assert (seen, weight.grad.item(), weight.item()) == ([None, None], 1, -2)


# What it writes


def test_a_run_folder_holds_checkpoints_record_log_and_tensorboard_files(trained_run, tiny_data):
    names = {path.name for path in trained_run.iterdir() if not path.name.startswith("events.")}
    assert names == {"last.pt", "model_best.safetensors", "step-00000015.pt", "run.json", "run.log", "run.lock"}
    content = torch.load(trained_run / "last.pt", weights_only=True)  # of plain types
    progress = content["progress"]
    assert (progress["epoch"], progress["batch"], progress["step"]) == (1, 0, STEPS)
    record, split = read_record(trained_run), open_split(*tiny_data, "train", 16)
    assert record["settings"]["batch_size"] == content["settings"]["batch_size"] == 8
    about = {"folder": str(split.folder), "images": 24, "captions": 120, "fingerprint": split.fingerprint()}
    assert record["data"]["train"] == content["data"]["train"] == about
    assert set(record["data"]) == {"train", "dev"}
    assert record["sessions"][0]["versions"] == versions()
    rsum = record["history"][0]["dev"]["rsum"]
    assert record["chosen"] == {"split": "dev", "epoch": 1, "rsum": rsum, "checkpoint": "model_best.safetensors"}
    text = (trained_run / "run.log").read_text()
    assert "1 epochs of 15, batches of 8 pairs" in text
    chance = chance_metrics(open_split(*tiny_data, "dev").image_of_caption)["rsum"]
    assert f"rSum {rsum:.1f} (best); chance {chance:.1f}\n" in text


def test_there_is_a_line_of_the_first_step_of_each_epochs_end_and_every_half_minute(
    tiny_flags, tmp_path, capsys, monkeypatch
):
    """With the mean loss since the last line, pairs a second and the time left, also without a terminal."""
    each = run(tiny_flags, tmp_path / "each", "--num_epochs", "2")
    capsys.readouterr()
    losses = run(tiny_flags, tmp_path / "few", "--num_epochs", "2", "--log_step", "99")
    out, text = capsys.readouterr().out, (tmp_path / "few" / "run.log").read_text()
    first, last = range(2, STEPS + 1), range(STEPS + 1, 2 * STEPS + 1)
    means = [each[1], *(np.mean([each[step] for step in steps]) for steps in (first, last))]
    assert losses == pytest.approx(dict(zip((1, STEPS, 2 * STEPS), means, strict=True)), abs=1e-4)
    lines = [line for line in text.splitlines() if " loss " in line]
    assert lines == [line for line in out.splitlines() if " loss " in line]
    assert ["left" in line for line in lines] == [False, True, True]
    assert re.search(r"rate 5\.0e-04 [\d.]+ pairs/s, 0:00:00 left$", lines[2])
    monkeypatch.setattr(log, "LINE_INTERVAL", 0.0)
    assert run(tiny_flags, tmp_path / "slow", "--num_epochs", "2", "--log_step", "99") == each


def test_the_size_of_features_is_taken_from_the_data_and_only_what_was_chosen_is_listed(tiny_data, tmp_path):
    flags = ["--data_path", tiny_data[0], "--data_name", tiny_data[1], "--bert", str(TINY_BERT), "--device", "cpu"]
    flags += ["--bert_from_scratch", "--embed_size", "16", "--batch_size", "8", "--workers", "0", "--num_epochs", "1"]
    run(flags, tmp_path / "run")
    content, text = read_checkpoint(tmp_path / "run" / "last.pt"), (tmp_path / "run" / "run.log").read_text()
    assert content["settings"]["img_dim"] == content["architecture"]["image_encoder"]["options"]["img_dim"] == 16
    listed = re.search(r"^settings {4}((.|\n {12})*)$", text, re.MULTILINE)[1]
    names = {"data_path", "data_name", "workers", "bert", "bert_from_scratch", "img_dim", "embed_size", "batch_size"}
    names |= {"num_epochs", "device", "log_step", "model_name", "logger_name"}
    assert {one.partition("=")[0] for one in listed.split()} == names
    assert "\n" in listed


def test_tensorboard_shows_losses_rates_gate_and_dev_recall(trained_run):
    events = EventAccumulator(str(trained_run))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {
        *("train/loss", "train/gradient_norm", "train/pairs_per_second", "rate/learning", "rate/bert"),
        *("gate/sparsity", "gate/open_rows", "gate/closed_rows", "gate/partners", "gate/sharpness", "gate/threshold"),
        *("gate/temperature", "dev/rsum"),
        *(f"dev/{way}_{recall}" for way in ("i2t", "t2i") for recall in ("r1", "r5", "r10")),
    }
    assert [event.step for event in events.Scalars("train/loss")] == [1, 5, 10, 15]
    assert events.Scalars("rate/bert")[0].value == pytest.approx(5e-5)


def pictures(folder, name):
    """Pictures (H, W, 3) of TensorBoard by step."""
    events = EventAccumulator(str(folder))
    events.Reload()
    images = events.Images(name) if name in events.Tags()["images"] else ()
    return {one.step: np.array(PIL.Image.open(io.BytesIO(one.encoded_image_string))) for one in images}


def test_tensorboard_shows_the_dependency_matrix_and_the_mask_as_they_are_after_each_epoch(trained_run):
    model, _ = build_model(read_checkpoint(trained_run / "last.pt"))
    D, M = (one.detach().numpy() for one in (model.similarity.dependency(), model.similarity.gate.mask()[0]))
    for name, expected in (("dependency", D / D.max()), ("mask", M)):
        ((step, found),) = pictures(trained_run, f"gate/{name}").items()
        assert step == STEPS
        assert np.abs(found - 255 * expected[..., None]).max() <= 0.5 + 1e-3
    large = torch.zeros(1023, 1023)
    large[7, 1022] = 0.25
    drawn = log.draw_matrix(large)
    assert (drawn.shape, drawn[3, 511], drawn.sum()) == ((512, 512), 255, 255)  # no entry is averaged away


def test_tensorboard_shows_where_words_of_dev_look_and_no_picture_changes_the_training(tmp_path, monkeypatch):
    """Nor does a data set without pictures."""
    monkeypatch.setattr(scenes, "split_sizes", lambda _: {"train": 16, "dev": 6, "testall": 5, "test": 1})
    folder, vocab = tmp_path / "scenes_precomp", tmp_path / "vocab"
    scenes.write_scenes(folder, vocab, images=16, seed=0)
    flags = ["--data_path", str(tmp_path), "--data_name", folder.name, "--bert", str(vocab), "--bert_from_scratch"]
    flags += ["--embed_size", "16", "--batch_size", "16", "--workers", "0", "--device", "cpu", "--num_epochs", "2"]
    losses = run(flags, tmp_path / "with")
    drawn = pictures(tmp_path / "with", "attention/2")
    assert list(drawn) == [5, 10]
    matcher = load(tmp_path / "with" / "last.pt", device="cpu")
    (pair,) = find_pairs(matcher, open_split(str(tmp_path), folder.name, "dev"), [1])  # of 0, 1, 3, 5
    found, shown = attention(matcher, pair.image, pair.caption), drawn[10][:128, 160:288].astype(float)
    _, expected, *_ = light(pair.picture, pair.boxes, found.weights, 128)  # the first word's panel
    assert np.abs(shown - expected).mean() < 4  # it is a JPEG
    shutil.rmtree(folder / "images")
    assert run(flags, tmp_path / "without") == losses
    assert not pictures(tmp_path / "without", "attention/1")
    monkeypatch.setattr(loop, "draw_epoch", lambda *_: 1 / 0)
    assert run(flags, tmp_path / "failing") == losses
    folders = [tmp_path / name for name in ("with", "without", "failing")]
    first, *others = (read_checkpoint(one / "last.pt")["random_state"]["torch"] for one in folders)
    assert all(torch.equal(other, first) for other in others)
    for one in folders[1:]:
        assert_same_weights(one, folders[0])


def test_tensorboard_lists_a_run_once_with_its_settings_and_its_final_rsum(trained_run):
    """As its own page of hyperparameters asks for them."""
    runs = EventMultiplexer().AddRunsFromDirectory(str(trained_run))
    runs.Reload()
    board = TBContext(data_provider=MultiplexerDataProvider(runs, str(trained_run)))
    request = ListSessionGroupsRequest(allowed_statuses=[1], slice_size=9)  # 1: of runs that have ended well
    (group,) = Handler(RequestContext(), Context(board), "", request).run().session_groups
    assert group.hparams["margin"].number_value == pytest.approx(0.2)
    (final,) = group.metric_values
    assert final.value == pytest.approx(read_record(trained_run)["history"][-1]["dev"]["rsum"])
    text = runs.Tensors(".", "settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| batch_size | `8` |\n" in text


class Tracker(ModuleType):
    """What trackio and wandb have in common."""

    def __init__(self, breaks_after=10**9):
        super().__init__("trackio")
        self.calls, self.logged, self.breaks_after = [], [], breaks_after

    def init(self, project, name, config, resume):
        self.calls.append((project, name, config["batch_size"], resume))
        return self

    def log(self, values, step):
        if len(self.logged) >= self.breaks_after:
            raise ValueError("the server has gone")
        self.logged += [(name, step, value) for name, value in values.items()]

    def finish(self):
        self.calls.append("finish")


def test_a_tracker_gets_what_tensorboard_gets_also_of_a_resumed_run(tiny_flags, tmp_path, monkeypatch):
    tracker, folder = Tracker(), tmp_path / "mine"
    monkeypatch.setitem(sys.modules, "trackio", tracker)
    run(tiny_flags, folder, "--track", "trackio")
    assert train.main(["--resume", str(folder), "--num_epochs", "2"]) == 0
    began = ["x-dim", "mine", 8]
    assert tracker.calls == [(*began, "never"), "finish", (*began, "allow"), "finish"]
    events = EventAccumulator(str(folder))
    events.Reload()
    written = {(name, one.step): one.value for name in events.Tags()["scalars"] for one in events.Scalars(name)}
    assert {(name, step): pytest.approx(value) for name, step, value in tracker.logged} == written
    assert len(tracker.logged) == len(written)


def test_a_tracker_that_breaks_costs_the_run_nothing_and_one_that_is_missing_is_refused_at_once(
    tiny_flags, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "trackio", Tracker(breaks_after=9))
    with_it = run(tiny_flags, tmp_path / "broken", "--track", "trackio")
    err = capsys.readouterr().err
    assert err == "warning: --track trackio cannot be written (the server has gone); the run goes on\n"
    assert with_it == run(tiny_flags, tmp_path / "without")
    monkeypatch.setitem(sys.modules, "wandb", None)  # cannot be imported
    assert train.main([*tiny_flags, "--model_name", str(tmp_path / "none"), "--track", "wandb"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: --track needs wandb: pip install wandb (")
    assert not (tmp_path / "none").exists()


# When it goes wrong


@pytest.mark.parametrize(("step", "saved"), [(1, []), (12, [4, 8]), (15, [4, 8, 12])])
def test_a_loss_that_is_not_finite_stops_the_run_and_nothing_is_saved_from_its_step_on(
    tiny_flags, tmp_path, monkeypatch, capsys, step, saved
):
    """Figures are read some steps late, but before anything is saved."""
    train_step = loop.train_step

    def failing(run, *args):
        figures = train_step(run, *args)
        return figures * float("nan") if run.progress.step + 1 == step else figures

    monkeypatch.setattr(loop, "train_step", failing)
    folder = tmp_path / "run"
    flags = ["--model_name", str(folder), "--save_steps", "4", "--log_step", "99", "--keep", "99"]
    assert train.main([*tiny_flags, *flags]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: step {step}: the loss is nan, the gradient norm nan; ")
    assert "--learning_rate" in error
    assert ("the last checkpoint in" in error) == bool(saved)
    assert sorted(folder.glob("step-*.pt")) == [folder / f"step-{done:08d}.pt" for done in saved]


@pytest.mark.parametrize(("spreads", "warnings"), [([0.039], 1), ([0.041], 0), ([0.039, float("nan")], 0)])
def test_scores_that_stay_equal_are_reported_once_with_what_to_do(tmp_path, capsys, spreads, warnings):
    """NaN: the step did not compute all scores. An infinite gradient of a finite loss stops the run."""
    figures = StepFigures(0.4, RunLog(tmp_path, tmp_path, 0, TrainSettings()), Progress(), "run")
    for step in range(2 * COLLAPSED_STEPS):
        figures.add(step, torch.tensor([1.0, 1.0, spreads[step % len(spreads)]]))
    figures.read()
    out = capsys.readouterr().out
    assert out.count("the scores have collapsed to one value") == out.count("--loss ramped") == warnings
    figures.add(7, torch.tensor([1.0, float("inf"), 0.5]))
    with pytest.raises(log.TrainingStopped, match=r"step 7: the loss is 1\.0, the gradient norm inf"):
        figures.read()


def test_a_collapse_is_reported_once_however_short_epochs_are_and_wherever_the_run_was_resumed(
    tiny_flags, tmp_path, monkeypatch
):
    train_step, folder = loop.train_step, tmp_path / "run"
    monkeypatch.setattr(loop, "train_step", lambda *args: train_step(*args) * torch.tensor([1.0, 1.0, 0.0]) + 1e-3)
    command, warnings = [*tiny_flags, "--max_violation", "--model_name", str(folder), "--resume", "auto"], []
    for epochs in range(1, 5):
        assert STEPS < COLLAPSED_STEPS < 2 * STEPS
        assert train.main([*command, "--num_epochs", str(epochs)]) == 0
        warnings.append((folder / "run.log").read_text().count("the scores have collapsed"))
    assert warnings == [0, 1, 1, 1]
