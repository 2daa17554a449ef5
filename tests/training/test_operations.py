"""How many operations a step and a scoring start on a device where tiles are large, and how often Python waits for it.

Counted on the CPU with such a device's tiles. An operation is one on floating-point tensors that is no view and no mere
allocation: on a GPU it launches one kernel or more. The language model is left out, as it is not this project's.
"""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from benchmarks import training
from lib.evaluation.score import Block, Embeddings, score_all
from lib.losses import hinge, hinge_all, ramped
from lib.model import registry
from lib.model.engine import make_engine, norms, tiles
from lib.model.layers import Shard
from lib.training.loop import train_step
from tests.model.test_micro_batch import Held

NO_KERNEL = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "_unsafe_view"}
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2"}
DIMS = 32


class Operations(TorchDispatchMode):
    """Counts kernels and waits by name."""

    def __init__(self):
        super().__init__()
        self.kernels, self.waits = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        tensors = [x for x in tree_flatten((args, kwargs, results))[0] if isinstance(x, torch.Tensor)]
        is_view = any(one.alias_info and not one.alias_info.is_write for one in func._schema.returns)
        masked = name.startswith("index") and any(x.dtype == torch.bool for x in tensors)
        if any(x.is_floating_point() for x in tensors) and not is_view and name not in NO_KERNEL:
            self.kernels[name] += 1
            self.waits[name] += name in WAITS or masked
        return results


@pytest.fixture
def large_tiles(monkeypatch):
    """Tiles on the CPU as they are on a device with much memory."""
    monkeypatch.delitem(tiles.CACHE_BYTES, "cpu")
    monkeypatch.setattr(tiles, "memory", lambda device: 80 * 2**30)
    monkeypatch.setitem(norms.BLOCK, "cpu", DIMS // 2)  # two blocks, as on a GPU: 512 of 1024


# Before tiles packed captions of different lengths: 3,000 operations, 7,200 and 3,300.
@pytest.mark.parametrize(("loss", "most"), [(hinge, 305), (hinge_all, 310), (ramped, 320)])
def test_a_training_step_starts_few_operations_and_waits_once(large_tiles, monkeypatch, loss, most):
    settings = SimpleNamespace(device="cpu", batch_size=12, embed_size=DIMS, toy=True)
    run, (batch, *_) = training.start(settings, "bf16")
    hidden = torch.randn(*batch.ids.shape, run.model.text_encoder.linear.in_features)
    monkeypatch.setattr(run.model.text_encoder, "_hidden", lambda *_: hidden)
    train_step(run, batch, loss)  # creates the optimiser's state
    with Operations() as counted:
        train_step(run, batch, loss)
    assert counted.kernels.total() <= most, counted.kernels
    assert counted.waits.total() <= 1, counted.waits


def test_scoring_starts_few_operations_for_each_block_of_images_and_chunk_of_captions(large_tiles, monkeypatch):
    """COCO 5K has 79 blocks of 64 images and 7 chunks of 4,096 captions: less than 20,000 operations."""
    monkeypatch.setattr("lib.evaluation.score.CHUNK", {"cpu": 4})
    similarity = registry.build("similarity", registry.describe({})["similarity"], DIMS)
    scorer = make_engine("tiled", similarity).scorer()
    lengths = torch.tensor([3, 1, 2, 5] * 6)
    words, regions = torch.randn(int(lengths.sum()), DIMS), torch.randn(3, 5, DIMS)

    def operations(blocks):
        of_images = [Block(slice(3 * k, 3 * k + 3), regions, None) for k in range(blocks)]
        with Operations() as counted:
            score_all(scorer, Embeddings(of_images, 3 * blocks, words, lengths, Shard(blocks)))
        assert not counted.waits.total(), counted.waits
        return counted.kernels.total()

    for_each = (operations(5) - operations(2)) / (3 * 6)
    for_each_chunk = operations(2) / 6
    assert for_each * 79 * 7 + for_each_chunk * 7 <= 20_000


@pytest.mark.parametrize("name", ["xdim", "independent"])
@pytest.mark.parametrize("share_of_pairs", [0.3, 1])
def test_large_tiles_take_about_their_share_of_the_memory(large_tiles, monkeypatch, name, share_of_pairs):
    share = 2**24
    monkeypatch.setattr(tiles, "memory", lambda device: share / tiles.MEMORY_SHARE)
    similarity = registry.build("similarity", registry.describe({"similarity": name})["similarity"], 256)
    engine, lengths = make_engine("tiled", similarity), torch.tensor([5, 9, 14] * 10)
    regions = torch.randn(30, 36, 256, requires_grad=True)
    words = torch.randn(int(lengths.sum()), 256, requires_grad=True)
    scores, (images, captions) = engine(regions, words, lengths), torch.cartesian_prod(*2 * [torch.arange(30)]).T
    weights = torch.rand(30, 30) < share_of_pairs
    with Held() as held:
        scores.backward(weights.to(scores.dtype))
    assert 0.5 * share <= held.most <= 1.6 * share
    with Held() as held:
        engine.scorer().pairs(regions, words, lengths, images, captions)
    assert held.most <= 1.6 * share
