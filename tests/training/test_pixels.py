"""Training from pixels: the vision model is frozen, warms up and thaws, and runs are the same however they are run."""

import json
import shutil

import numpy as np
import PIL.Image
import pytest
import torch
from torchvision.models import get_model

import eval as eval_program
import train
from lib import ablation, load
from lib.checkpoints.native import BEST, build_model, read_checkpoint
from lib.cli import InputError
from lib.config import EvaluationSettings, TrainSettings
from lib.data.batches import choose_cells
from lib.data.images import augment
from lib.evaluation.evaluate import evaluate, open_split_of
from lib.evaluation.score import Matcher
from lib.model.encoders import PixelEncoder, Pixels
from lib.model.vision import Preprocessing
from lib.prepare import __main__ as prepare
from lib.runtime import choose_compute
from lib.training import loop
from lib.training.optim import thawed_stages
from lib.training.resume import find_origin
from tests.conftest import TINY_BERT, assert_same_weights, bert_without_dropout
from tests.model.test_vision import write_transformer
from tests.ranks import run_ranks
from tests.text_models import make_text_model
from tests.training.test_processes import assert_close, train_in_float64
from tests.training.test_resume import assert_equal_runs, crashed

SIZE = 64
IMAGES = {"train": 12, "dev": 6}
KINDS = ("squeezenet1_1", "shufflenet_v2_x0_5")  # without and with BatchNorm
DEVICE = ["--device", "cpu", "--workers", "0"]


def write_pictures(folder):
    """A data set of pictures alone, in folder images/ beside its captions; above it weights of two vision models."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    for split, count in IMAGES.items():
        ids = [f"{split}_{number}" for number in range(count)]
        for name in ids:
            height, width = rng.integers(40, 100, 2)
            coarse = PIL.Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
            coarse.resize((width, height)).save(folder / "images" / f"{name}.png")
        captions = [f"a {name.replace('_', ' ')} seen {k} times" for name in ids for k in range(5)]
        (folder / f"{split}_ids.txt").write_text("\n".join(ids) + "\n")
        (folder / f"{split}_caps.txt").write_text("\n".join(captions) + "\n")
    for kind in KINDS:
        torch.manual_seed(0)
        torch.save(get_model(kind, weights=None).state_dict(), folder.parent / f"{kind}.pth")
    return folder


def vision_flags(pictures, kind):
    return ["--image_encoder", f"torchvision:{kind}", "--image_weights", str(pictures.parent / f"{kind}.pth")]


def flags_of(pictures, bert):
    """train.py's flags for a run of three epochs, the first with a frozen vision model; all but the run folder."""
    return [
        *("--data_path", str(pictures.parent), "--data_name", pictures.name, "--bert", bert, "--bert_from_scratch"),
        *(*vision_flags(pictures, KINDS[0]), "--image_size", str(SIZE), "--encoder_lr", "0.1"),
        *("--embed_size", "16", "--batch_size", "8", *DEVICE, "--log_step", "1"),
        *("--num_epochs", "3", "--freeze_epochs", "1", "--thaw_epochs", "1"),
    ]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("data") / "mine")


@pytest.fixture(scope="module")
def flags(pictures, tmp_path_factory):
    return flags_of(pictures, bert_without_dropout(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert train.main([*flags, "--model_name", str(folder)]) == 0
    return folder


def changed_stages(flags, folder, monkeypatch):
    """Which stages' weights each epoch has changed, and the vision model's share of its rate in each step."""
    epochs, rates = [], []
    train_epoch, train_step = loop.train_epoch, loop.train_step

    def spy(run):
        stages = run.model.image_encoder.vision.stages()
        old = [[p.clone() for p in stage.state_dict().values()] for stage in stages]
        train_epoch(run)
        new = [list(stage.state_dict().values()) for stage in stages]
        epochs.append(
            [any(not torch.equal(*pair) for pair in zip(*both, strict=True)) for both in zip(old, new, strict=True)]
        )

    def spy_step(run, batch, loss_function, warmth):
        rates.append((run.optimizer.param_groups[2]["lr"], warmth))
        return train_step(run, batch, loss_function, warmth)

    monkeypatch.setattr(loop, "train_epoch", spy)
    monkeypatch.setattr(loop, "train_step", spy_step)
    assert train.main([*flags, "--model_name", str(folder)]) == 0
    return epochs, rates


@pytest.mark.parametrize("kind", KINDS)
def test_the_vision_model_is_frozen_then_warms_up_and_thaws_from_the_top(pictures, flags, tmp_path, monkeypatch, kind):
    epochs, rates = changed_stages([*flags, *vision_flags(pictures, kind)], tmp_path / "run", monkeypatch)
    frozen, top, two = epochs  # BatchNorm's averages count, too
    assert not any(frozen)
    assert top == [True] + [False] * (len(top) - 1)
    assert two == [True, True] + [False] * (len(two) - 2)
    full = 0.0005 * 0.1
    steps = len(rates) // 3
    warm = [(k + 1) / steps for k in range(steps)]
    assert rates == [
        *[(full, 1.0)] * steps,
        *[(pytest.approx(full * one), one) for one in warm],
        *[(full, 1.0)] * steps,
    ]


def test_the_published_schedule_thaws_a_stage_every_five_epochs():
    stages = [thawed_stages(epoch, 2, 5) for epoch in range(13)]
    assert stages == [0, 0, *[1] * 5, *[2] * 5, 3]
    assert thawed_stages(1, 1, 0) > 10


def test_a_run_that_crashed_in_the_first_thawed_epoch_ends_as_if_it_had_not(flags, whole, tmp_path, monkeypatch):
    command = [*flags, "--model_name", str(tmp_path / "run"), "--save_steps", "2", "--resume", "auto"]
    crashed(monkeypatch, 12, command)
    assert train.main(command) == 0
    assert_equal_runs(tmp_path / "run", whole)


WAYS = {
    "no BatchNorm, in micro batches": (KINDS[0], ["--micro_batch", "2"]),
    "BatchNorm over all processes": (KINDS[1], []),
}


@pytest.mark.parametrize("way", WAYS)
def test_losses_and_gradients_of_two_processes_are_those_of_one(pictures, flags, tmp_path, way):
    kind, more = WAYS[way]
    thawed = ["--freeze_epochs", "0", "--thaw_epochs", "0", "--batch_size", "7"]
    runs = []
    for count in (1, 2):
        folder = ["--model_name", str(tmp_path / str(count))]
        runs.append(
            run_ranks(train_in_float64, count, [*flags, *vision_flags(pictures, kind), *thawed, *more, *folder], 3)
        )
    ((one,), ranks) = runs
    for rank in ranks:
        for (figures, gradients), (others, theirs) in zip(rank.value[0], one.value[0], strict=True):
            assert figures == pytest.approx(others, rel=1e-6, nan_ok=True)
            assert_close(gradients, theirs, exact=1e-6)


def encoder(kind="squeezenet1_1", **options):
    torch.manual_seed(0)
    return PixelEncoder(16, f"torchvision:{kind}", image_size=SIZE, **options)


def gradients(model, images, counts):
    model.zero_grad()
    regions, _ = model(images, counts)
    (regions * torch.arange(regions.numel()).view(regions.shape).sin()).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_less_memory_gives_the_same_gradients_and_the_same_averages(double, kind):
    pictures = torch.randint(256, (5, 3, SIZE, SIZE), dtype=torch.uint8)
    model, counts = encoder(kind), None
    cells = model.vision.regions
    rows, kept = choose_cells(5, cells, np.random.default_rng(0))
    images, counts = Pixels(pictures, torch.from_numpy(rows)), torch.from_numpy(kept)
    model.thaw(100)
    expected = [gradients(model.train(), images, counts) for _ in range(2)][-1]
    averages = {k: v.clone() for k, v in model.named_buffers()}
    other = encoder(kind)
    other.thaw(100)
    other.vision.checkpoint_activations()
    assert_close([gradients(other.train(), images, counts) for _ in range(2)][-1], expected)
    for name, buffer in other.named_buffers():
        assert name.endswith("num_batches_tracked") or torch.equal(buffer, averages[name]), name
    by_parts, whole = encoder(kind), encoder(kind)
    by_parts.micro_batch = 2
    for one in (by_parts, whole):
        one.thaw(100)
    for norm in whole.train().norms:  # in parts BatchNorm keeps its averages
        norm.eval()
    assert_close(gradients(by_parts.train(), images, counts), gradients(whole, images, counts))


def test_pictures_lose_cells_as_published():
    rng, images, cells = np.random.default_rng(0), 4000, 64
    rows, kept = choose_cells(images, cells, rng)
    assert kept.min() >= 1
    assert kept.sum() == len(rows)
    assert (np.diff(rows) > 0).all()
    assert (np.bincount(rows // cells, minlength=images) == kept).all()
    assert (kept == cells).mean() == pytest.approx(0.2 + 0.8 / (65 * 0.2), abs=0.03)  # mean of (1 - p)**64 below 0.2
    assert 1 - kept.sum() / (images * cells) == pytest.approx(0.8 * 0.1, abs=0.005)
    assert choose_cells(50, 1, rng)[1].tolist() == [1] * 50


def test_a_picture_is_cropped_resized_and_flipped_as_the_numbers_say():
    x, y = np.meshgrid(np.arange(200), np.arange(100))
    picture = PIL.Image.fromarray(np.stack([x, y, 0 * x], axis=-1).astype(np.uint8))
    look = Preprocessing((10, 20), (0, 0), "bilinear", (0.0,) * 3, (1.0,) * 3)
    left_top = augment(picture, look, np.array([0.0, 0.0, 0.0, 0.0, 0.9]))  # 120 x 60 pixels
    assert (left_top[0, :, 0].max(), left_top[0, :, -1].min(), left_top[1, -1].min()) <= (4, 114, 54)
    assert left_top[0, :, -1].max() <= 120
    assert left_top[1].max() <= 60
    right_bottom = augment(picture, look, np.array([0.0, 0.0, 1.0, 1.0, 0.1]))
    assert right_bottom[0, :, 0].min() >= 190
    assert right_bottom[0, :, -1].max() <= 90
    assert right_bottom[1].min() >= 40
    everything = augment(picture, look, np.array([0.99999, 0.99999, 0.0, 0.0, 0.9]))
    assert everything[0].max() >= 190
    assert everything[0].min() <= 6


def test_pictures_scored_by_their_paths_have_the_scores_of_the_data_set(pictures, whole, tmp_path):
    scores = tmp_path / "scores.npy"
    flags = {"checkpoint": (str(whole),), "split": "dev", "save_sims": str(scores), "workers": 0, "device": "cpu"}
    evaluate(EvaluationSettings(**flags))
    captions = (pictures / "dev_caps.txt").read_text().splitlines()
    paths = [pictures / "images" / f"dev_{number}.png" for number in range(IMAGES["dev"])]
    model = load(whole, device="cpu")
    found = model.score(paths, captions).numpy()
    np.testing.assert_allclose(found, np.load(scores), atol=1e-5)
    opened = [PIL.Image.open(path) for path in paths]
    np.testing.assert_allclose(model.score(opened, captions).numpy(), found, atol=1e-6)
    with pytest.raises(InputError, match="expected a list of one path or PIL picture or more"):
        model.score(opened[0], captions)


def test_a_run_is_evaluated_again_with_the_pictures_of_its_training(pictures, whole, tmp_path):
    run, data = shutil.copytree(whole, tmp_path / "run"), tmp_path / "alone"
    best = json.loads((run / "run.json").read_text())["chosen"]["rsum"]
    of_run, _ = open_split_of([read_checkpoint(run / BEST)], EvaluationSettings(split="dev"))
    assert ablation._evaluate(run, "dev", of_run.image_of_caption).rsum == pytest.approx(best)
    shutil.copytree(pictures, data, ignore=shutil.ignore_patterns("images"))
    content = read_checkpoint(run / BEST)
    content["settings"] |= {"data_path": str(tmp_path), "data_name": "alone", "image_path": str(pictures / "images")}
    split, _ = open_split_of([content], EvaluationSettings(split="dev"))
    assert {path.parent for path in split.features.paths} == {pictures / "images"}
    with pytest.raises(InputError, match="pictures are missing"):
        open_split_of([content], EvaluationSettings(split="dev", data_path=str(tmp_path)))


def test_gpos_layout_is_found_by_its_mapping_of_ids(pictures, flags, whole, tmp_path):
    root = tmp_path / "f30k"
    (root / "precomp").mkdir(parents=True)
    (root / "flickr30k-images").symlink_to(pictures / "images")
    mapping = {}
    for split, count in IMAGES.items():
        (root / "precomp" / f"{split}_caps.txt").write_bytes((pictures / f"{split}_caps.txt").read_bytes())
        ids = [len(mapping) + number for number in range(count)]
        mapping |= {str(one): f"{split}_{number}.png" for number, one in enumerate(ids)}
        lines = [one for one in ids for _ in range(5 if split == "dev" else 1)]
        (root / "precomp" / f"{split}_ids.txt").write_text("".join(f"{one}\n" for one in lines))
    (root / "id_mapping.json").write_text(json.dumps(mapping))
    data = ["--data_path", str(root), "--data_name", "f30k_precomp", "--model_name", str(tmp_path / "run")]
    assert train.main([*flags, *data]) == 0
    assert_same_weights(whole, tmp_path / "run")


def test_what_cannot_train_from_pixels_is_refused_in_one_line(pictures, flags, tiny_flags, whole, tmp_path, capsys):
    def refused(*more, said):
        assert train.main([*flags, "--model_name", str(tmp_path / "none"), *more]) == 2
        assert said in capsys.readouterr().err

    refused("--device_features", said="--device_features: a model from pixels has no features")
    refused("--img_dim", "512", said="--img_dim 512: the vision model says it")
    refused("--image_path", str(tmp_path), said="pictures are missing")
    refused("--image_encoder", "torchvision:squeezenet1_2", said="squeezenet1_1")
    refused("--image_encoder", "scenes", "--image_weights", "", "--image_size", "128", said="cannot be trained along")
    refused("--image_encoder", "pixels", said="--image_encoder pixels: needs the option 'model'")
    for value, fault in (("x", "regions='x' is no int"), ("1.5", "regions=1.5 is no int"), ("-1", "expected 0 or mor")):
        refused("--image_encoder", f"torchvision:squeezenet1_1,regions={value}", said=fault)
    broken = tmp_path / "images"
    broken.mkdir()
    for path in (pictures / "images").iterdir():
        (broken / path.name).write_bytes(path.read_bytes()[:60])
    for workers in ("0", "2"):
        refused("--image_path", str(broken), "--workers", workers, said="take it and its captions out of the data set")
    regions = ["--model_name", str(tmp_path / "regions"), "--bert", str(TINY_BERT)]
    assert train.main([*tiny_flags, *regions, "--image_size", "64"]) == 2
    assert "--image_size: --image_encoder regions takes no pictures" in capsys.readouterr().err
    assert train.main([*tiny_flags, *regions]) == 0
    flags = {"checkpoint": (str(whole), str(tmp_path / "regions")), "split": "dev", "workers": 0, "device": "cpu"}
    with pytest.raises(Exception, match="some of the models start from pixels"):
        evaluate(EvaluationSettings(**flags))
    with pytest.raises(Exception, match="starts from pixels"):
        load(whole, device="cpu").score(np.zeros((1, 4, 512)), ["a"])
    with pytest.raises(Exception, match="nothing says which program made the regions"):
        load(tmp_path / "regions", device="cpu").score([str(pictures / "images" / "dev_0.png")], ["a"])


# Regions that a vision model has made


@pytest.fixture(scope="module")
def prepared(pictures, flags, tmp_path_factory):
    """The run of a model on regions, made of the pictures by `prepare images`; and the data sets of two encoders."""
    root = tmp_path_factory.mktemp("prepared")
    rows = [["image", "caption", "split"]]
    for split in IMAGES:
        names = (pictures / f"{split}_ids.txt").read_text().split()
        captions = (pictures / f"{split}_caps.txt").read_text().splitlines()
        rows += [[f"{names[k // 5]}.png", caption, split] for k, caption in enumerate(captions)]
    (root / "captions.csv").write_text("".join(f"{','.join(row)}\n" for row in rows))
    for kind in KINDS:
        encoder = ["--encoder", f"torchvision:{kind}", "--weights", str(pictures.parent / f"{kind}.pth")]
        data = ["--data_path", str(root), "--data_name", kind, "--regions", "4", "--image_size", str(SIZE)]
        photos = [str(pictures / "images"), str(root / "captions.csv")]
        assert prepare.main(["images", *photos, *encoder, *data, "--device", "cpu", "--workers", "0"]) == 0
    bert = flags[flags.index("--bert") :][:3]
    training = ["--data_path", str(root), "--data_name", KINDS[0], *bert, "--embed_size", "16", "--batch_size", "8"]
    assert train.main([*training, *DEVICE, "--num_epochs", "2", "--model_name", str(root / "run")]) == 0
    return root


def saved_scores(checkpoint, data, folder):
    flags = ["--data_path", str(data.parent), "--data_name", data.name, "--split", "dev", *DEVICE]
    scores = folder / "scores.npy"
    return eval_program.main([str(checkpoint), *flags, "--save_sims", str(scores)]), scores


def test_a_pictures_score_is_the_one_of_the_regions_that_were_prepared_of_it(pictures, prepared, tmp_path):
    code, scores = saved_scores(prepared / "run", prepared / KINDS[0], tmp_path)
    captions = (prepared / KINDS[0] / "dev_caps.txt").read_text().splitlines()
    names = (prepared / KINDS[0] / "dev_ids.txt").read_text().split()
    found = load(prepared / "run", device="cpu").score([pictures / "images" / name for name in names], captions)
    np.testing.assert_allclose(found.numpy(), np.load(scores), atol=1e-4)
    assert code == 0
    assert np.ptp(found.numpy()) > 0.1


def test_a_record_that_lacks_an_entry_is_refused(prepared, tmp_path, capsys):
    data, entries = tmp_path / "mine", json.loads((prepared / KINDS[0] / "encoder.json").read_text())
    shutil.copytree(prepared / KINDS[0], data)
    for name in ("encoder", "weights", "preprocessing", "regions", "whole"):
        damaged = {key: value for key, value in entries.items() if key != name}
        (data / "encoder.json").write_text(json.dumps(damaged))
        assert saved_scores(prepared / "run", data, tmp_path)[0] == 2
        assert f"encoder.json: damaged; make the data set again ('{name}')" in capsys.readouterr().err


def test_pictures_and_regions_of_another_vision_model_are_refused_naming_both(pictures, prepared, tmp_path, capsys):
    assert saved_scores(prepared / "run", prepared / KINDS[1], tmp_path)[0] == 2
    error = capsys.readouterr().err
    assert all(f"torchvision:{kind} (weights " in error for kind in KINDS)
    silent = tmp_path / "silent"
    shutil.copytree(prepared / KINDS[0], silent)
    (silent / "encoder.json").unlink()
    assert saved_scores(prepared / "run", silent, tmp_path)[0] == 0
    assert f"does not say that its regions are by torchvision:{KINDS[0]}" in capsys.readouterr().out
    other = load(prepared / "run", device="cpu", image_weights=str(tmp_path / "other.pth"))
    torch.manual_seed(1)
    torch.save(get_model(KINDS[0], weights=None).state_dict(), tmp_path / "other.pth")
    first = json.loads((prepared / KINDS[0] / "encoder.json").read_text())["weights"]
    with pytest.raises(InputError, match=f"weights [0-9a-f]{{16}} are not those .*made with, {first}"):
        other.score([pictures / "images" / "dev_0.png"], ["a"])


def test_a_model_on_regions_goes_on_from_their_pixels(pictures, prepared, tmp_path, capsys):
    start = {"init_from": str(prepared / "run"), "image_encoder": f"torchvision:{KINDS[0]}"}
    captions = (prepared / KINDS[0] / "dev_caps.txt").read_text().splitlines()
    paths = [pictures / "images" / name for name in (prepared / KINDS[0] / "dev_ids.txt").read_text().split()]
    origin = find_origin(TrainSettings(**start))
    from_pixels = Matcher(*build_model(origin.content), choose_compute("cpu"))
    scores = [model.score(paths, captions).numpy() for model in (from_pixels, load(prepared / "run", device="cpu"))]
    np.testing.assert_allclose(*scores, atol=0.005)  # regions are rounded to float16
    flags = [part for name, value in start.items() for part in (f"--{name}", value)]
    run = [*flags, "--data_path", str(prepared), "--data_name", KINDS[0], *DEVICE, "--batch_size", "8"]
    assert train.main([*run, "--num_epochs", "1", "--freeze_epochs", "0", "--model_name", str(tmp_path / "run")]) == 0
    assert train.main([*run, "--image_encoder", f"torchvision:{KINDS[1]}", "--model_name", str(tmp_path / "x")]) == 2
    assert f"its regions were made by torchvision:{KINDS[0]}, not by torchvision:{KINDS[1]}" in capsys.readouterr().err


def test_two_transformers_are_trained_together_and_their_checkpoint_needs_no_other_file(
    pictures, tmp_path, monkeypatch
):
    def spy(run, *args, train_step=loop.train_step):
        text, image, warmth = run.model.text_encoder, run.model.image_encoder, args[-1]
        seen.append((text.backbone.is_gradient_checkpointing, text.micro_batch, image.micro_batch, warmth))
        return train_step(run, *args)

    monkeypatch.setattr(loop, "train_step", spy)
    text, vision = make_text_model("siglip", tmp_path / "text"), write_transformer("siglip", tmp_path / "vision")
    data = ["--data_path", str(pictures.parent), "--data_name", "mine", "--embed_size", "16", "--batch_size", "8"]
    model = ["--text_encoder", str(text), "--image_encoder", f"{vision},regions=4"]
    losses, seen = [], []
    for memory in ([], ["--gradient_checkpointing"], ["--micro_batch", "3"]):
        run = tmp_path / f"run{len(losses)}"
        recipe = ["--num_epochs", "1", "--freeze_epochs", "0", "--model_name", str(run), "--log_step", "1", *memory]
        assert train.main([*data, *model, *recipe, *DEVICE]) == 0
        log = (run / "run.log").read_text()
        losses.append([float(line.split()[5]) for line in log.splitlines() if " loss " in line])
    assert "4 cells of pictures of 32 x 32 pixels; frozen for 0 epochs, then a stage every 5 trains at 0.1" in log
    assert list(dict.fromkeys(seen)) == [(False, 0, 0, 1), (True, 0, 0, 1), (False, 3, 3, 1)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2] == pytest.approx(losses[0], rel=1e-4)
    for folder in ("text", "vision"):
        shutil.rmtree(tmp_path / folder)
    scores = load(tmp_path / "run0", device="cpu").score([pictures / "images" / "dev_0.png"], ["a dev seen"])
    assert scores.shape == (1, 1)
    assert (tmp_path / "run0" / "run.log").read_text().count("text_encoder=") == 0  # --bert is its name in the settings
