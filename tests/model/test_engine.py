"""The fast engine against the plain formula, and both against the published code's figures: scores and gradients."""

from functools import partial

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.nn import functional as F

from lib.losses import hinge, hinge_all, violations
from lib.model import registry
from lib.model.engine import Embedded, TiledEngine, autograd, make_engine, norms, tiles
from lib.model.xdim import XDimSimilarity

GOLDEN_PARAMETERS = {  # ours -> published
    "gate.joint_logits": "weights.weight",
    "gate.threshold_scale": "sim_map.weight",
    "gate.log_sharpness": "temp_learnable.weight",
    "log_temperature": "temp_scale.weight",
}
VARIANTS = [
    *(("xdim", gate) for gate in registry.GATES),
    *((name, "adaptive") for name in registry.SIMILARITIES if name != "xdim"),
]
LENGTHS = [1, 9, 2, 30, 4, 9]
WEIGHT = torch.tensor(1.0, dtype=torch.float64)
COUNTS = torch.tensor([7, 1, 3, 7, 2, 5])


def make(name="xdim", gate="adaptive", dims=12, half_open=True):
    """A similarity in float64; half_open: with a gate that is not nearly closed, as it is at its start."""
    torch.manual_seed(0)
    part = registry.describe({"similarity": name, "gate": gate})["similarity"]
    similarity = registry.build("similarity", part, dims).double()
    if half_open and name == "xdim" and gate not in ("dense", "uniform"):
        with torch.no_grad():
            similarity.gate.log_sharpness.fill_(2.0)
            similarity.gate.threshold_scale.fill_(0.5)
    return similarity


def random_inputs(images, lengths, regions=7, dims=12):
    generator = torch.Generator().manual_seed(1)

    def unit(*shape):
        return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1).requires_grad_()

    return unit(images, regions, dims), unit(sum(lengths), dims), torch.tensor(lengths)


def single(inputs):
    """The same in float32, as new leaves."""
    return [t.detach().float().requires_grad_() if t.is_floating_point() else t for t in inputs]


def assert_close_to_largest(actual, expected, tolerance):
    """Differences relative to the largest expected entry."""
    expected = torch.as_tensor(expected).reshape(actual.shape)
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def gradients(similarity, scores, inputs, weights=None):
    if weights is None:
        weights = torch.randn(scores.shape, generator=torch.Generator().manual_seed(2), dtype=scores.dtype)
    leaves = [*inputs[:2], *(parameter for parameter in similarity.parameters() if parameter.requires_grad)]
    return torch.autograd.grad((scores * weights).sum(), leaves, retain_graph=True, materialize_grads=True)


def assert_same(similarity, ours, plain, inputs, tolerance=1e-10, **weights):
    assert_close_to_largest(ours, plain, tolerance)
    both = zip(
        gradients(similarity, ours, inputs, **weights), gradients(similarity, plain, inputs, **weights), strict=True
    )
    for one, other in both:
        if not (size := other.abs().max()) <= 1e-12:  # one that cancels is no more exact than its terms
            assert (one - other).abs().max() <= tolerance * max(size, 1e-4)


def tile(monkeypatch, tile_bytes=5000, block=5, few_pairs=-1):
    """Small, uneven tiles; few_pairs: -1 differentiates all pairs, 1 only those with a gradient."""
    monkeypatch.setitem(tiles.CACHE_BYTES, "cpu", tile_bytes)
    monkeypatch.setitem(norms.BLOCK, "cpu", block)
    monkeypatch.setitem(autograd.FEW_PAIRS, "cpu", few_pairs)


def summed(similarity, inputs, real=None, engine="tiled"):
    """The loss over all negatives, in the way that training takes it."""
    return make_engine(engine, similarity).sum_over_negatives(partial(violations, margin=0.2), Embedded(*inputs, real))


@pytest.mark.parametrize("regime", ["init", "trained"])
@pytest.mark.parametrize("way", ["sum", "max", "sum of scores"])
@pytest.mark.parametrize(("engine", "few_pairs"), [("plain", -1), ("tiled", -1), ("tiled", 1)])
def test_scores_loss_and_gradients_equal_the_published_code(golden, monkeypatch, regime, way, engine, few_pairs):
    tile(monkeypatch, 10_000, 24, few_pairs)
    figures, loss_name = golden(f"similarity_{regime}"), way[:3]
    model = make(dims=64)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for ours, published in GOLDEN_PARAMETERS.items():
            value = torch.from_numpy(figures[f"param.{published}"])
            parameters[ours].copy_(value.reshape(parameters[ours].shape))
    regions, words = (torch.from_numpy(figures[name]).requires_grad_() for name in ("regions", "words"))
    lengths = torch.from_numpy(figures["lengths"])

    inputs = regions, words[torch.arange(words.shape[1]) < lengths[:, None]], lengths
    scores = make_engine(engine, model)(*inputs)
    losses = {"max": lambda: hinge(scores, 0.2), "sum of scores": lambda: hinge_all(scores, 0.2)}
    loss = losses.get(way, lambda: summed(model, inputs, engine=engine))()
    loss.backward()

    assert_close_to_largest(scores, figures["similarity"], 1e-10)
    assert_close_to_largest(loss, figures[f"loss.{loss_name}"], 1e-10)
    assert_close_to_largest(regions.grad, figures[f"grad.{loss_name}.regions"], 1e-10)
    assert_close_to_largest(words.grad, figures[f"grad.{loss_name}.words"], 1e-10)
    for ours, published in GOLDEN_PARAMETERS.items():
        assert_close_to_largest(parameters[ours].grad, figures[f"grad.{loss_name}.param.{published}"], 1e-10)


@pytest.mark.parametrize("few_pairs", [-1, 1])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("name", "gate"), VARIANTS)
def test_the_engine_gives_the_plain_formulas_scores_losses_and_gradients(monkeypatch, name, gate, masked, few_pairs):
    tile(monkeypatch, few_pairs=few_pairs)
    model, inputs = make(name, gate), random_inputs(6, LENGTHS)
    real = torch.arange(7) < COUNTS[:, None] if masked else None
    if masked:
        inputs[0].data[~real] = 0  # as padding is in training; the root of 0 has no finite gradient
    plain = model(*inputs, real)
    assert_same(model, make_engine("tiled", model)(*inputs, real), plain, inputs)
    assert_same(model, 3 * summed(model, inputs, real), 3 * hinge_all(plain, 0.2), inputs)


@settings(deadline=None, max_examples=40)
@given(
    images=st.integers(1, 5),
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    regions=st.integers(1, 8),
    tile_bytes=st.integers(1, 30_000),
    block=st.integers(1, 16),
    share=st.floats(0, 1),
)
def test_any_sizes_tiles_and_any_number_of_pairs_with_a_gradient(images, lengths, regions, tile_bytes, block, share):
    with pytest.MonkeyPatch.context() as patch:
        tile(patch, tile_bytes, block, autograd.FEW_PAIRS["cpu"])
        model, inputs = make(dims=6), random_inputs(images, lengths, regions, 6)
        weights = torch.rand(images, len(lengths), dtype=torch.float64)
        weights = weights * (torch.rand(weights.shape, generator=torch.Generator().manual_seed(3)) < share)
        assert_same(model, make_engine("tiled", model)(*inputs), model(*inputs), inputs, weights=weights)


@pytest.mark.parametrize("engine", ["tiled", "plain"])
@pytest.mark.parametrize(("name", "gate"), VARIANTS)
def test_a_scorer_gives_the_same_scores_without_gradients(monkeypatch, name, gate, engine):
    tile(monkeypatch)
    model, inputs = make(name, gate), random_inputs(6, LENGTHS)
    real, engine = torch.arange(7) < COUNTS[:, None], make_engine(engine, model)
    scorer = engine.scorer()
    captions_of_all = scorer.captions(*inputs[1:])
    scores = scorer.all_pairs(inputs[0], captions_of_all, real)
    assert not scores.requires_grad
    torch.testing.assert_close(scores, engine(*inputs, real).detach())
    images, captions = torch.tensor([0, 4, 4, 2]), torch.tensor([3, 0, 4, 2])
    torch.testing.assert_close(scorer.pairs(*inputs, images, captions, real), scores[images, captions])
    torch.testing.assert_close(scorer.all_pairs(inputs[0][:2], captions_of_all, real[:2]), scores[:2])


def test_a_similarity_with_another_formula_is_not_scored_by_tiles():
    class Nothing(XDimSimilarity):
        def forward(self, regions, words, lengths, real=None):
            return super().forward(regions, words, lengths, real) * 0

    assert isinstance(make_engine("tiled", make("independent")), TiledEngine)
    assert not make_engine("tiled", Nothing(12).double())(*random_inputs(3, LENGTHS)).any()


def test_coarse_scores_take_the_diagonal_of_the_gram_matrix_and_its_approximation_by_the_vector_of_ones():
    model, inputs = make(), random_inputs(5, LENGTHS)
    scorer = make_engine("tiled", model).scorer(coarse=True)
    coarse = scorer.all_pairs(inputs[0], scorer.captions(*inputs[1:]))
    exact, K = model(*inputs).detach(), model.dependency().detach()
    K = K.T @ K
    w = K.sum(dim=1) / K.sum().sqrt()
    model.gate.gram_rows = lambda D: torch.stack([K.diagonal() - w.square(), w])
    torch.testing.assert_close(coarse, make_engine("tiled", model)(*inputs).detach())
    model.gate.gram_rows = lambda D: K.diagonal()[None]
    of_diagonal = make_engine("tiled", model)(*inputs).detach()
    assert (coarse - exact).norm() < (of_diagonal - exact).norm() / 2


@pytest.mark.parametrize("engine", ["tiled", "plain"])
@pytest.mark.parametrize("half_open", [True, False])
@pytest.mark.parametrize(("autocast", "tolerance"), [(False, 1e-4), (True, 0.3)])
def test_float32_and_bfloat16_stay_near_float64_in_scores_and_gradients(engine, half_open, autocast, tolerance):
    model = make(dims=64, half_open=half_open)
    inputs = random_inputs(12, [5, 9, 14] * 4, 11, 64)
    scores = model(*inputs)
    expected = [*gradients(model, scores, inputs), *gradients(model, summed(model, inputs), inputs, WEIGHT)]
    model, inputs = model.float(), single(inputs)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours, loss = make_engine(engine, model)(*inputs), summed(model, inputs, engine=engine)
    assert ours.dtype == loss.dtype == torch.float32
    assert (ours - scores).abs().max() < (0.05 if autocast else 1e-5)
    if autocast:
        assert not torch.equal(ours, ours.bfloat16().float())
        assert half_open or (ours - scores).square().mean().sqrt() < 0.0045  # 0.0064 with softmax in bfloat16
    weights = torch.randn(scores.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).float()
    actual = [*gradients(model, ours, inputs, weights), *gradients(model, loss, inputs, WEIGHT.float())]
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == torch.float32
        assert_close_to_largest(one.double(), other, tolerance)


def test_gradients_of_few_pairs_are_computed_in_float32_under_autocast_too():
    model = make(dims=64)
    inputs = random_inputs(12, [5, 9, 14] * 4, 11, 64)
    weights = torch.zeros(12, 12, dtype=torch.float64)
    weights.view(-1)[::10] = 1
    expected = gradients(model, model(*inputs), inputs, weights)
    model, inputs = model.float(), single(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        scores = make_engine("tiled", model)(*inputs)
        within = gradients(model, scores, inputs, weights.float())
    outside = gradients(model, scores, inputs, weights.float())
    assert all(torch.equal(*both) for both in zip(within[:2], outside[:2], strict=True))  # those of the inputs
    for one, other in zip(outside, expected, strict=True):
        assert_close_to_largest(one.double(), other, 1e-4)


def test_a_dimension_that_no_other_depends_on_has_finite_coarse_norms():
    rows = autograd.coarse_rows(torch.eye(4)[:, [0, 0, 1, 2]] * torch.tensor([1.0, 0, 1, 1]))
    assert norms.RowsNorm(rows, torch.float32).others.isfinite().all()


def test_hardest_negatives_differentiate_no_more_than_three_pairs_a_row(monkeypatch):
    differentiated = []
    monkeypatch.setattr(
        autograd,
        "pair_tiles",
        lambda images, *rest: differentiated.append(len(images)) or tiles.pair_tiles(images, *rest),
    )
    model = make()
    hinge(make_engine("tiled", model)(*random_inputs(16, [3, 8, 1, 5] * 4)), 0.2).backward()
    assert len(differentiated) == 1
    assert 16 < differentiated[0] <= 3 * 16


@pytest.mark.parametrize("engine", ["tiled", "plain"])
def test_a_sharp_gate_keeps_scores_and_gradients_finite(engine):
    model, inputs = make(dims=16), random_inputs(3, [4, 4], 5, 16)
    with torch.no_grad():
        model.gate.log_sharpness.fill_(8.0)
    scores = make_engine(engine, model)(*inputs)
    assert scores.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients(model, scores, inputs))


@pytest.mark.parametrize("gram", [torch.eye(6), torch.ones(1, 2, 6)])
def test_the_norm_of_zeros_has_finite_gradients(gram):
    words = torch.zeros(1, 2, 6, requires_grad=True)
    norm = norms.differentiable_norm(gram, torch.float32)
    divisors = norm(torch.ones(1, 2, 3), torch.ones(1, 3, 6), words)
    of_words, *of_leaves = torch.autograd.grad(divisors.sum(), [words, *norm.leaves])
    assert not of_words.any()
    assert not norm.gradient(of_leaves).any()


def test_padding_of_pairs_does_not_let_other_captions_in():
    similarity, (regions, words, lengths) = make(), random_inputs(6, LENGTHS)
    expected = similarity(regions, words, lengths).diagonal()
    damaged = words.detach().index_fill(0, torch.arange(1, 10), float("nan"))  # all of caption 1
    pairs = TiledEngine(similarity).scorer().pairs(regions, damaged, lengths, *2 * [torch.arange(6)])
    assert pairs.isnan().tolist() == [False, True, *4 * [False]]
    torch.testing.assert_close(pairs[2:], expected[2:])
