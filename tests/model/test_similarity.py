"""The similarity over tiles against the published code's figures and against the formulas as they are written."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.nn import functional as F

from lib.loss import hinge_triplet_loss
from lib.model import similarity as module
from lib.model.similarity import Similarity, tile_blocks
from tests.model import oracle

GOLDEN_PARAMETERS = {  # ours -> published
    "gate.joint_logits": "weights.weight",
    "gate.threshold_scale": "sim_map.weight",
    "gate.log_sharpness": "temp_learnable.weight",
    "log_temperature": "temp_scale.weight",
}


def assert_close_to_largest(actual, expected, tolerance):
    """Differences relative to the largest expected entry."""
    expected = torch.as_tensor(expected).reshape(actual.shape)
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def random_inputs(images, lengths, regions, dims, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    make = lambda *shape: F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1).to(dtype)  # noqa: E731
    return (
        make(images, regions, dims).requires_grad_(),
        make(sum(lengths), dims).requires_grad_(),
        torch.tensor(lengths),
    )


def random_similarity(dims, half_open=True):
    torch.manual_seed(0)
    similarity = Similarity(dims).double()
    if half_open:  # as the gate is at its start nearly all of it is closed
        with torch.no_grad():
            similarity.gate.log_sharpness.fill_(2.0)
            similarity.gate.threshold_scale.fill_(0.5)
    return similarity


def oracle_scores(similarity, regions, words, lengths, counts=None):
    gate = similarity.gate
    dependency = oracle.dependency_matrix(gate.joint_logits, gate.threshold_scale, gate.log_sharpness)
    return oracle.scores(regions, words, lengths.tolist(), dependency, similarity.log_temperature, counts)


def gradients(similarity, scores, *inputs):
    generator = torch.Generator().manual_seed(2)
    weights = torch.randn(scores.shape, generator=generator, dtype=scores.dtype)
    return torch.autograd.grad((scores * weights).sum(), [*inputs, *similarity.parameters()])


@pytest.mark.parametrize("regime", ["init", "trained"])
@pytest.mark.parametrize("hardest", [False, True])
@pytest.mark.parametrize("tile", [2**21, 1000])
def test_scores_loss_and_gradients_equal_the_published_code(golden, monkeypatch, regime, hardest, tile):
    monkeypatch.setitem(module.TILE_NUMBERS, "cpu", tile)
    figures, loss_name = golden(f"similarity_{regime}"), "max" if hardest else "sum"
    similarity = Similarity(64).double()
    parameters = dict(similarity.named_parameters())
    with torch.no_grad():
        for ours, published in GOLDEN_PARAMETERS.items():
            value = torch.from_numpy(figures[f"param.{published}"])
            parameters[ours].copy_(value.reshape(parameters[ours].shape))
    regions = torch.from_numpy(figures["regions"]).requires_grad_()
    words = torch.from_numpy(figures["words"]).requires_grad_()
    lengths = torch.from_numpy(figures["lengths"])

    scores = similarity(regions, words[torch.arange(words.shape[1]) < lengths[:, None]], lengths)
    loss = hinge_triplet_loss(scores, 0.2, hardest)
    loss.backward()

    assert_close_to_largest(scores, figures["similarity"], 1e-10)
    assert_close_to_largest(loss, figures[f"loss.{loss_name}"], 1e-10)
    assert_close_to_largest(regions.grad, figures[f"grad.{loss_name}.regions"], 1e-10)
    assert_close_to_largest(words.grad, figures[f"grad.{loss_name}.words"], 1e-10)
    for ours, published in GOLDEN_PARAMETERS.items():
        assert_close_to_largest(parameters[ours].grad, figures[f"grad.{loss_name}.param.{published}"], 1e-10)


@pytest.mark.parametrize(
    ("images", "lengths", "regions", "dims", "tile"),
    [(1, [1], 1, 8, 2**21), (5, [1, 9, 2, 30, 4], 7, 12, 300), (3, [70], 36, 16, 100), (4, [2, 2, 2], 3, 10, 1)],
)
def test_tiles_equal_the_formulas_values_and_gradients(monkeypatch, images, lengths, regions, dims, tile):
    monkeypatch.setitem(module.TILE_NUMBERS, "cpu", tile)
    similarity = random_similarity(dims)
    inputs = random_inputs(images, lengths, regions, dims)
    actual, expected = similarity(*inputs), oracle_scores(similarity, *inputs)
    assert_close_to_largest(actual, expected, 1e-12)
    for ours, plain in zip(
        gradients(similarity, actual, *inputs[:2]), gradients(similarity, expected, *inputs[:2]), strict=True
    ):
        assert_close_to_largest(ours, plain, 1e-10)


@settings(deadline=None, max_examples=25)
@given(
    images=st.integers(1, 5),
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    regions=st.integers(1, 8),
    tile=st.integers(1, 4000),
)
def test_any_sizes_and_tiles_give_the_scores_of_the_formulas(images, lengths, regions, tile):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(module.TILE_NUMBERS, "cpu", tile)
        similarity = random_similarity(6)
        inputs = random_inputs(images, lengths, regions, 6)
        assert_close_to_largest(similarity(*inputs), oracle_scores(similarity, *inputs), 1e-12)


def test_recomputed_tiles_give_the_same_gradients(monkeypatch):
    similarity = random_similarity(12)
    inputs = random_inputs(5, [3, 8, 1], 6, 12)
    kept = gradients(similarity, similarity(*inputs), *inputs[:2])
    monkeypatch.setattr(module, "KEEP_NUMBERS", 0)
    recomputed = gradients(similarity, similarity(*inputs), *inputs[:2])
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))


def test_masked_padding_regions_count_for_nothing_in_values_and_gradients():
    similarity = random_similarity(12)
    regions, words, lengths = random_inputs(4, [3, 8, 1], 6, 12)
    counts = torch.tensor([6, 1, 3, 5])
    real = torch.arange(6) < counts[:, None]
    actual = similarity(regions * real[..., None], words, lengths, real)
    expected = oracle_scores(similarity, regions, words, lengths, counts.tolist())
    assert_close_to_largest(actual, expected, 1e-12)
    for ours, plain in zip(
        gradients(similarity, actual, regions, words), gradients(similarity, expected, regions, words), strict=True
    ):
        assert_close_to_largest(ours, plain, 1e-10)


def test_float32_and_bfloat16_scores_stay_near_float64():
    exact = random_similarity(64)
    inputs = random_inputs(6, [5, 9, 14], 11, 64)
    expected = exact(*inputs)
    single = exact.float()
    regions, words = (tensor.detach().float() for tensor in inputs[:2])
    assert (single(regions, words, inputs[2]) - expected).abs().max() < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        half = single(regions, words, inputs[2])
    assert half.dtype == torch.float32
    assert (half - expected).abs().max() < 0.05


def test_a_sharp_gate_keeps_values_and_gradients_finite():
    similarity = random_similarity(16)
    with torch.no_grad():
        similarity.gate.log_sharpness.fill_(8.0)
    inputs = random_inputs(3, [4, 4], 5, 16)
    scores = similarity(*inputs)
    assert scores.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients(similarity, scores, *inputs[:2]))


def test_gate_sparsity_is_the_share_of_closed_entries():
    gate = random_similarity(32).gate
    closed = [[bool(value < 0.5) for value in row] for row in gate.mask()[0]]
    assert gate.sparsity() == pytest.approx(sum(map(sum, closed)) / 32**2)


@settings(deadline=None)
@given(
    images=st.integers(1, 200), lengths=st.lists(st.integers(1, 90), min_size=1, max_size=60), dims=st.integers(1, 3000)
)
def test_blocks_cover_every_image_and_caption_once_without_cutting_a_caption(images, lengths, dims):
    image_blocks, caption_blocks = tile_blocks(images, lengths, torch.empty(0, dims))
    assert [i for block in image_blocks for i in range(images)[block]] == list(range(images))
    assert [c for block, _ in caption_blocks for c in range(len(lengths))[block]] == list(range(len(lengths)))
    for captions, span in caption_blocks:
        assert span.stop - span.start == sum(lengths[captions])
        assert span.start == sum(lengths[: captions.start])
