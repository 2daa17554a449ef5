"""What a GPU computes against what the CPU computes. Skipped without a GPU; how to run it: docs/performance.md.

Scores and gradients are compared with the plain formula in float64 on the CPU, whole runs with those of the CPU in
float32, or with each other to the bit.
"""

import json
import os
import re
from contextlib import contextmanager
from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import eval as eval_program
import train
from lib import load
from lib.data.batches import Batch, EpochBatches, loader, on_device
from lib.data.dataset import open_split
from lib.data.features import DeviceFeatures
from lib.data.tokenizer import load_tokenizer
from lib.losses import hinge, hinge_all, ramped
from lib.model import registry
from lib.model.engine import Embedded, make_engine
from lib.model.xdim import XDim
from lib.runtime import choose_compute
from lib.training import loop
from lib.training.loop import BatchLoss, batch_loss, train_step
from lib.training.optim import build_optimizer
from tests import mishap
from tests.conftest import TINY_BERT, assert_same_weights, bert_without_dropout
from tests.model.test_engine import COUNTS, LENGTHS, VARIANTS, gradients, make, random_inputs
from tests.ranks import run_ranks
from tests.training.test_pixels import KINDS, flags_of, vision_flags, write_pictures

INTERPRETED = os.environ["TRITON_INTERPRET"] != "0"  # by tests/conftest.py, unless it was set
pytestmark = [pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
if not INTERPRETED:  # the interpreter has no bfloat16, a GPU has no excuse
    pytestmark.append(pytest.mark.filterwarnings("error:the Triton kernel is not used"))
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

SCORES = {"fp32": 2e-5, "tf32": 0.02, "bf16": 0.1}  # largest difference by precision
GRADIENTS = {"fp32": 1e-4, "tf32": 0.03, "bf16": 0.15}  # norm of the difference, relative to the norm
LONGER = [5, 9, 14, 30, 4, 9]  # a single word's attention is +1 or -1, which rounding decides where it is near 0
MARGIN, LEARNING_RATE = 0.2, 1e-3
LOSS = re.compile(r"step (\d+) loss ([\d.]+)")


@contextmanager
def computing(precision: str, device: str = "cuda"):
    """The forward pass of a program with --device and --precision; for the backward pass there is `differentiating`."""
    compute = choose_compute(device, precision)
    with compute.in_force(), compute.autocast():
        yield compute.device


def differentiating(precision: str):
    """The backward pass of a program with --precision."""
    return choose_compute("cuda", precision).in_force()


def on_gpu(similarity, inputs, device):
    """Copies of a similarity and its inputs in float32 on a device, as new leaves; lengths stay on the CPU."""
    regions, words, lengths = inputs
    leaves = [part.detach().float().to(device).requires_grad_() for part in (regions, words)]
    return deepcopy(similarity).float().to(device), [*leaves, lengths]


def cpu(tensors):
    return [tensor.detach().cpu().double() for tensor in tensors]


# Scores and gradients


@pytest.mark.parametrize("precision", SCORES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("name", "gate"), VARIANTS)
def test_scores_and_gradients_are_those_of_the_cpu(name, gate, masked, precision):
    lengths = LENGTHS if precision == "fp32" else LONGER
    model, inputs = make(name, gate, dims=64), random_inputs(6, lengths, dims=64)
    real = torch.arange(7) < COUNTS[:, None] if masked else None
    everywhere = torch.randn(6, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    few = everywhere * (torch.arange(36).view(6, 6) % 5 == 0)
    scores = model(*inputs, real)
    expected = [gradients(model, scores, inputs, weights) for weights in (everywhere, few)]
    with computing(precision) as device:
        model, inputs = on_gpu(model, inputs, device)
        ours = make_engine("tiled", model)(*inputs, None if real is None else real.to(device))
    assert ours.device.type == "cuda"
    assert (ours.cpu() - scores).abs().max() < SCORES[precision]
    for weights, theirs in zip((everywhere, few), expected, strict=True):
        with differentiating(precision):
            actual = gradients(model, ours, inputs, weights.float().to(device))
        for one, other in zip(cpu(actual), theirs, strict=True):
            assert (one - other).norm() <= GRADIENTS[precision] * max(other.norm(), 1e-3)


@pytest.mark.parametrize("precision", SCORES)
@pytest.mark.parametrize("loss", [hinge_all, hinge, ramped])
def test_each_loss_and_its_gradients_are_those_of_the_cpu(loss, precision):
    margin = MARGIN if precision == "fp32" else 5.0  # all pairs violate it, so that rounding does not choose
    model, inputs = make(dims=64), random_inputs(12, [5, 9, 14] * 4, 11, 64)
    expected = loss(model(*inputs), margin)
    theirs = torch.autograd.grad(expected, [*inputs[:2], *model.parameters()])
    with computing(precision) as device:
        model, inputs = on_gpu(model, inputs, device)
        value, _ = batch_loss(make_engine("tiled", model), Embedded(*inputs), loss, margin)
    with differentiating(precision):
        ours = torch.autograd.grad(value, [*inputs[:2], *model.parameters()])
    assert value.item() == pytest.approx(expected.item(), rel=SCORES[precision])
    if precision == "fp32" or loss is hinge_all:  # rounded scores may choose other hardest negatives
        for one, other in zip(cpu(ours), theirs, strict=True):
            assert (one - other).norm() <= GRADIENTS[precision] * other.norm()


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
@pytest.mark.parametrize("regions", [1, 36, 100, 256])
def test_the_kernel_gives_the_scores_of_the_formula_for_any_number_of_regions(regions, precision):
    """Where it does not run, a warning says so, but for more regions than it is made for: 256 in TF32."""
    model, inputs = make(dims=160), random_inputs(4, LONGER, regions, 160)
    images, captions = torch.tensor([0, 3, 3, 2]), torch.tensor([5, 0, 3, 1])
    expected = model(*inputs).detach()
    with computing(precision) as device, torch.no_grad():
        model, inputs = on_gpu(model, inputs, device)
        engine = make_engine("tiled", model)
        scorer = engine.scorer()
        for scores in (
            scorer.all_pairs(inputs[0], scorer.captions(*inputs[1:])),
            engine(*inputs),
        ):  # with a triangular factor, and without
            assert (scores.cpu() - expected).abs().max() < SCORES[precision]
        pairs = scorer.pairs(*inputs, images, captions)
        assert (pairs.cpu() - expected[images, captions]).abs().max() < SCORES[precision]


@two_gpus
def test_the_second_gpu_computes_what_the_first_one_does():
    scores = []
    for device in ("cuda:0", "cuda:1"):
        model, inputs = make(dims=64), random_inputs(6, LONGER, dims=64)
        with computing("tf32", device):
            model, inputs = on_gpu(model, inputs, device)
            scorer = make_engine("tiled", model).scorer()
            scores.append(scorer.all_pairs(inputs[0], scorer.captions(*inputs[1:])))
    assert [one.device.index for one in scores] == [0, 1]
    assert torch.equal(*(one.cpu() for one in scores))


# Training


@pytest.fixture(scope="module")
def steady_bert(tmp_path_factory):
    """The folder of a BERT whose training draws no random numbers."""
    return bert_without_dropout(tmp_path_factory.mktemp("bert"))


def three_steps(device, bert, loss, head):
    """Losses and gradient norms of three steps (3, 2), and all parameters before and after them."""
    compute = choose_compute(device, "fp32")
    torch.manual_seed(0)
    architecture = registry.describe({"img_dim": 24, "embed_size": 32, "mask_padding": True, "global_head": head})
    architecture["text_encoder"]["options"]["config"] = json.loads(open(f"{bert}/config.json").read())
    model = XDim.build(architecture).to(compute.device).train()
    before = torch.cat([p.detach().cpu().flatten() for p in model.parameters()])
    parts = {"model": model, "batch_loss": BatchLoss(model, MARGIN), "optimizer": build_optimizer(model, LEARNING_RATE)}
    run = SimpleNamespace(settings=SimpleNamespace(grad_clip=2.0), compute=compute, **parts)
    generator, batches = torch.Generator().manual_seed(1), []
    for _ in range(3):
        counts = torch.randint(1, 9, (10,), generator=generator)
        lengths = torch.randint(3, 12, (10,), generator=generator)
        images = torch.randn(int(counts.sum()), 24, generator=generator)
        ids = torch.randint(1, 134, (10, 12), generator=generator)
        ids = ids.masked_fill(torch.arange(12) >= lengths[:, None], 0)
        batches.append(Batch(images, counts, ids, lengths, torch.arange(10)))
    with compute.in_force():
        figures = [train_step(run, batch, loss)[:2] for batch in on_device(batches, compute.device)]
    return torch.stack(figures).cpu(), before, torch.cat([p.detach().cpu().flatten() for p in model.parameters()])


@pytest.mark.parametrize(("loss", "head"), [(hinge_all, ""), (hinge, ""), (ramped, ""), (ramped, "gpo")])
def test_three_steps_are_those_of_the_cpu(steady_bert, loss, head):
    both = (three_steps(device, steady_bert, loss, head) for device in ("cuda", "cpu"))
    (figures, before, after), (expected, start, end) = both
    assert torch.equal(before, start)
    torch.testing.assert_close(figures, expected, rtol=1e-4, atol=1e-5)
    assert (after - end).norm() < 0.02 * (end - start).norm()  # Adam makes whole steps of gradients that are rounding


def losses(folder):
    return [float(loss) for _, loss in LOSS.findall((folder / "run.log").read_text())]


@pytest.fixture(scope="module")
def flags(tiny_flags):
    return [*tiny_flags, "--device", "cuda", "--log_step", "1"]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """The folder of a run of two epochs with dropout, in the precision that a GPU has by default."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert train.main([*flags, "--num_epochs", "2", "--model_name", str(folder)]) == 0
    return folder


def test_a_run_has_the_losses_of_the_cpu(flags, steady_bert, tmp_path):
    for device in ("cpu", "cuda"):
        steady = ["--bert", steady_bert, "--device", device, "--precision", "fp32", "--gate", "open"]
        assert train.main([*flags, *steady, "--model_name", str(tmp_path / device)]) == 0
    assert losses(tmp_path / "cuda") == pytest.approx(losses(tmp_path / "cpu"), rel=0.01)


def test_an_interrupted_run_equals_to_the_bit_when_it_is_resumed(flags, whole, tmp_path, monkeypatch):
    """Order of additions, dropout's generator, optimiser and loader all continue where they were."""
    folder = tmp_path / "run"
    monkeypatch.setattr(loop, "train_step", loop.train_step)  # to be put back, as the mishap comes only once
    assert mishap.main("SIGTERM", 19, [*flags, "--num_epochs", "2", "--model_name", str(folder)]) == 143
    assert train.main(["--resume", str(folder)]) == 0
    assert losses(folder) == losses(whole)
    assert_same_weights(folder, whole)


def test_batches_on_a_gpu_are_those_of_the_cpu(tiny_data):
    device, tokenizer, split = torch.device("cuda"), load_tokenizer(str(TINY_BERT)), open_split(*tiny_data, "train", 16)
    captions = tokenizer.tokenize(split.captions)
    from_file, indexed = (
        EpochBatches(split, captions, tokenizer, 16, 0, 0, **how) for how in ({"half": True}, {"indexed": True})
    )
    assert indexed[0].images.dtype == torch.int64
    expected = list(on_device(from_file, torch.device("cpu")))
    resident = DeviceFeatures(split.features, device)
    for batches in (from_file, indexed):
        for batch, other in zip(on_device(loader(batches, 0, device), device, resident), expected, strict=True):
            assert [tensor.device.type for tensor in batch] == ["cuda", "cpu", "cuda", "cpu"]
            assert all(torch.equal(tensor.cpu(), its) for tensor, its in zip(batch, other, strict=True))


def test_features_on_the_device_train_to_the_bit_as_a_file_of_float16_does(flags, make_data, tmp_path):
    make_data(tmp_path / "half_precomp", dtype=np.float16)
    flags = [*flags, "--data_path", str(tmp_path), "--data_name", "half_precomp", "--precision", "bf16"]
    for name, more in (("file", []), ("device", ["--device_features"])):
        assert train.main([*flags, *more, "--model_name", str(tmp_path / name)]) == 0
    assert losses(tmp_path / "file") == losses(tmp_path / "device")
    assert_same_weights(tmp_path / "file", tmp_path / "device")


@two_gpus
def test_the_second_gpu_trains_to_the_bit_as_the_first_one_does(flags, whole, tmp_path):
    command = [*flags, "--device", "cuda:1", "--num_epochs", "2", "--model_name", str(tmp_path / "run")]
    assert train.main(command) == 0
    assert losses(tmp_path / "run") == losses(whole)
    assert_same_weights(tmp_path / "run", whole)


@two_gpus
@pytest.mark.skipif(not torch.distributed.is_nccl_available(), reason="PyTorch without NCCL")
@pytest.mark.parametrize("loss", ["hinge", "ramped"])
def test_two_ranks_over_nccl_train_as_one_process_does(flags, steady_bert, tmp_path, loss):
    flags = [*flags, "--bert", steady_bert, "--precision", "fp32", "--loss", loss, "--num_epochs", "2"]
    for count in (1, 2):
        ranks = run_ranks(train.main, count, [*flags, "--model_name", str(tmp_path / str(count))])
        assert [rank.value for rank in ranks] == [0] * count
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "1"), rel=0.01)


def test_a_run_from_pixels_has_the_losses_of_the_cpu(steady_bert, tmp_path):
    pictures = write_pictures(tmp_path / "mine")
    model = [*vision_flags(pictures, KINDS[1]), "--precision", "fp32", "--gate", "open"]
    flags = [*flags_of(pictures, steady_bert), *model]
    for device, memory in (("cpu", []), ("cuda", ["--gradient_checkpointing", "--workers", "2"])):
        run = ["--device", device, *memory, "--model_name", str(tmp_path / device)]
        assert train.main([*flags, *run]) == 0
    assert losses(tmp_path / "cuda") == pytest.approx(losses(tmp_path / "cpu"), rel=0.02)


# Evaluation


def evaluate(run, folder, device, *more):
    """eval.py's results, and the ranks of each query (empty with --rerank)."""
    results, ranks = folder / f"{device}.json", folder / f"{device}.ranks"
    files = ["--json", str(results), *([] if "--rerank" in more else ["--ranks", str(ranks)])]
    where = ["--device", device, "--precision", "fp32", "--workers", "0", "--batch_size", "7"]
    assert eval_program.main(["--checkpoint", str(run), *where, *files, *more]) == 0
    lines = ranks.read_text().splitlines()[1:] if ranks.exists() else []
    found = json.loads(results.read_text())
    return {way: found[way] for way in ("rsum", "i2t", "t2i")}, [json.loads(line)["ranks"] for line in lines]


@pytest.mark.parametrize("more", [[], ["--rerank", "3"], ["--engine", "plain"]])
def test_evaluation_gives_every_rank_that_it_gives_on_the_cpu(whole, tmp_path, more):
    (metrics, ranks), (expected, theirs) = (evaluate(whole, tmp_path, device, *more) for device in ("cuda", "cpu"))
    assert metrics == expected
    assert ranks == theirs
    assert bool(ranks) == ("--rerank" not in more)


@pytest.mark.parametrize("precision", SCORES)
def test_a_loaded_model_scores_as_it_does_on_the_cpu(whole, precision):
    features = [np.random.default_rng(k).standard_normal((5 + k, 16), dtype=np.float32) for k in range(3)]
    captions = ["a man near the park", "two dogs", "a boy on a black bench holding a red ball"]
    scores = load(whole, device="cuda", precision=precision).score(features, captions)
    expected = load(whole, device="cpu", precision="fp32").score(features, captions)
    assert (scores - expected).abs().max() < max(SCORES[precision], 1e-4)
