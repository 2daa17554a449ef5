"""BERT in micro batches: the whole batch's loss and gradients, with fewer activations held."""

import weakref
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lib.losses import hinge, hinge_all
from lib.model import encoders, registry
from lib.model.xdim import XDim
from tests.model.test_encoders import CONFIG

PAIRS = 11
LENGTHS = torch.tensor([4, 9, 3, 12, 5, 9, 3, 7, 2, 12, 6])


@pytest.fixture
def model():
    """Builds a model in training; dropout: BERT's."""

    def build(dropout: float = 0.0, dtype=torch.float32) -> XDim:
        torch.manual_seed(0)
        architecture = registry.describe({"img_dim": 8, "embed_size": 16})
        architecture["text_encoder"]["options"]["config"] = CONFIG
        model = XDim.build(architecture).to(dtype).train()
        for part in model.text_encoder.backbone.modules():
            if isinstance(part, nn.Dropout):
                part.p = dropout
        return model

    return build


def random_batch(dtype=torch.float32) -> tuple[Tensor, ...]:
    """What the model takes of 11 pairs: images of 5 random regions, captions in no order of length."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(PAIRS * 5, 8, generator=generator, dtype=torch.float64).to(dtype)
    ids = torch.randint(5, 60, (PAIRS, 12), generator=generator) * (torch.arange(12) < LENGTHS[:, None])
    return features, torch.full((PAIRS,), 5), ids, LENGTHS


def loss_and_gradients(model: XDim, micro_batch: int, hardest: bool = False, **autocast) -> dict[str, Tensor]:
    """The batch's loss and every parameter's gradient, by name; the same dropout where the groups are the same."""
    model.text_encoder.micro_batch = micro_batch
    torch.manual_seed(2)
    with torch.autocast("cpu", torch.bfloat16, **{"enabled": False, **autocast}):
        scores = model(*random_batch(next(model.parameters()).dtype))
        loss = (hinge if hardest else hinge_all)(scores, 0.2)
    names, parameters = zip(*model.named_parameters(), strict=True)
    return {"loss": loss.detach(), **dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))}


def largest_difference(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Of the loss relative to it, of gradients to the largest entry of all (some are zero but for rounding)."""
    largest = {name: one.abs().max().item() for name, one in expected.items()}
    largest |= dict.fromkeys(largest.keys() - {"loss"}, max(largest[name] for name in largest.keys() - {"loss"}))
    return max((ours[name] - one).abs().max().item() / largest[name] for name, one in expected.items())


@pytest.mark.parametrize("micro_batch", [1, 3, 100])
@pytest.mark.parametrize("hardest", [False, True], ids=["all negatives", "hardest negatives"])
def test_micro_batches_give_the_whole_batchs_loss_and_gradients(model, micro_batch, hardest):
    model = model(dtype=torch.float64)
    whole = loss_and_gradients(model, 0, hardest)
    assert all(one.any() for one in whole.values())
    assert largest_difference(loss_and_gradients(model, micro_batch, hardest), whole) <= 1e-13


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_the_backward_pass_repeats_each_groups_dropout_and_leaves_the_random_state_alone(
    model, monkeypatch, micro_batch
):
    model = model(dropout=0.3)
    micro, after = loss_and_gradients(model, micro_batch), torch.get_rng_state()
    monkeypatch.setitem(encoders.GROUP, "cpu", micro_batch)
    expected = loss_and_gradients(model, 0)
    assert torch.equal(torch.get_rng_state(), after)
    assert all(torch.equal(micro[name], one) for name, one in expected.items())


def test_under_autocast_the_second_pass_rounds_as_the_first(model, monkeypatch):
    model = model()
    micro = loss_and_gradients(model, 3, enabled=True)
    monkeypatch.setitem(encoders.GROUP, "cpu", 3)
    expected = loss_and_gradients(model, 0, enabled=True, cache_enabled=False)
    assert all(torch.equal(micro[name], one) for name, one in expected.items())
    assert largest_difference(micro, loss_and_gradients(model, 0)) > 1e-4  # it is bfloat16


def test_under_autocast_the_gradients_of_groups_add_up_in_float32(model):
    encoder = model().text_encoder
    ids, lengths = equal_captions(64)
    weights = torch.randn(64 * 12, 16)

    def gradients(micro_batch: int, half: bool) -> Tensor:
        encoder.micro_batch = micro_batch
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            words = encoder(ids, lengths)
        gradients = torch.autograd.grad((words * weights).sum(), list(encoder.backbone.encoder.parameters()))
        return torch.cat([gradient.flatten() for gradient in gradients])

    exact, whole, micro = gradients(0, False), gradients(64, True), gradients(1, True)
    error = (whole - exact).norm()
    assert error > 1e-4 * exact.norm()
    assert (micro - exact).norm() <= 1.02 * error  # added up in bfloat16: twice as much


def equal_captions(count: int) -> tuple[Tensor, Tensor]:
    """Token ids and lengths of captions of 12 tokens."""
    return torch.randint(5, 60, (count, 12), generator=torch.Generator().manual_seed(3)), torch.full((count,), 12)


class Held(TorchDispatchMode):
    """Bytes of the tensors that are made under it, a module's parameters' not: held `now`, and `most` at any time."""

    def __init__(self, module: nn.Module | None = None):
        super().__init__()
        self.now = self.most = 0
        self.known = {one.untyped_storage().data_ptr() for one in module.parameters()} if module else set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage: torch.UntypedStorage) -> None:
        place, size = storage.data_ptr(), storage.nbytes()
        if size and place not in self.known:
            self.known.add(place)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.remove, place, size)

    def remove(self, place: int, size: int) -> None:
        self.known.remove(place)
        self.now -= size


def held_by_bert(model: XDim, micro_batch: int) -> tuple[int, int]:
    """Bytes that 32 captions take between forward and backward pass, and the most at any time."""
    encoder = model.text_encoder
    encoder.micro_batch = micro_batch
    encoder.zero_grad()
    with Held(encoder) as held:
        words = encoder(*equal_captions(32))
        between = held.now
        words.sum().backward()
    return between, held.most


def test_smaller_micro_batches_hold_fewer_activations(model):
    model = model(dropout=0.1)
    of_gradients = sum(parameter.nbytes for parameter in model.text_encoder.parameters())
    whole_between, whole_most = held_by_bert(model, 0)
    between, most = zip(*(held_by_bert(model, size) for size in (16, 8, 4, 2, 1)), strict=True)
    assert max(between) < whole_between / 8
    excess = [one - of_gradients for one in (whole_most, *most)]
    assert all(smaller < 0.8 * larger for larger, smaller in pairwise(excess))


@pytest.mark.parametrize("where", ["evaluation", "training without gradients"])
def test_where_no_gradient_is_to_come_nothing_is_split_or_computed_again(model, monkeypatch, where):
    model, sizes = model(), []
    model.train(where != "evaluation")
    plain_groups = encoders.groups_of_like_length
    monkeypatch.setattr(encoders, "checkpoint", None)
    monkeypatch.setattr(encoders, "groups_of_like_length", lambda *args: sizes.append(args[1]) or plain_groups(*args))
    _, _, ids, lengths = random_batch()
    with torch.set_grad_enabled(where == "evaluation"):
        expected = model.encode_captions(ids, lengths)
        model.text_encoder.micro_batch = 1
        assert torch.equal(model.encode_captions(ids, lengths), expected)
    assert sizes == [32, 32]
