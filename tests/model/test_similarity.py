"""The similarity over tiles against the published code's figures and against the formulas as they are written."""

from functools import partial

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.nn import functional as F

from lib.losses import hinge_triplet_loss, violations
from lib.model import dependent_norm, similarity, tiles
from lib.model.dependent_norm import FactorNorm, GramNorm
from lib.model.gate import DependencyGate
from lib.model.similarity import Similarity
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


def summed_loss(similarity, *inputs):
    """The loss over all negatives, by the way that training takes it."""
    return similarity.sum_over_negatives(partial(violations, margin=0.2), *inputs)


@pytest.mark.parametrize("regime", ["init", "trained"])
@pytest.mark.parametrize("way", ["sum", "max", "sum of scores"])
@pytest.mark.parametrize("tile_bytes", [2**22, 10_000])
@pytest.mark.parametrize("few_pairs", [-1, 1])
def test_scores_loss_and_gradients_equal_the_published_code(golden, monkeypatch, regime, way, tile_bytes, few_pairs):
    monkeypatch.setitem(tiles.TILE_BYTES, "cpu", tile_bytes)
    monkeypatch.setattr(dependent_norm, "BLOCK", 24)
    monkeypatch.setattr(similarity, "FEW_PAIRS", few_pairs)
    figures, loss_name = golden(f"similarity_{regime}"), way[:3]
    model = Similarity(64).double()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for ours, published in GOLDEN_PARAMETERS.items():
            value = torch.from_numpy(figures[f"param.{published}"])
            parameters[ours].copy_(value.reshape(parameters[ours].shape))
    regions = torch.from_numpy(figures["regions"]).requires_grad_()
    words = torch.from_numpy(figures["words"]).requires_grad_()
    lengths = torch.from_numpy(figures["lengths"])

    inputs = regions, words[torch.arange(words.shape[1]) < lengths[:, None]], lengths
    scores = model(*inputs)
    loss = summed_loss(model, *inputs) if way == "sum" else hinge_triplet_loss(scores, 0.2, way == "max")
    loss.backward()

    assert_close_to_largest(scores, figures["similarity"], 1e-10)
    assert_close_to_largest(loss, figures[f"loss.{loss_name}"], 1e-10)
    assert_close_to_largest(regions.grad, figures[f"grad.{loss_name}.regions"], 1e-10)
    assert_close_to_largest(words.grad, figures[f"grad.{loss_name}.words"], 1e-10)
    for ours, published in GOLDEN_PARAMETERS.items():
        assert_close_to_largest(parameters[ours].grad, figures[f"grad.{loss_name}.param.{published}"], 1e-10)


@pytest.mark.parametrize("few_pairs", [-1, 1])
@pytest.mark.parametrize(
    ("images", "lengths", "regions", "dims", "tile_bytes", "block"),
    [
        (1, [1], 1, 8, 2**22, 128),
        (5, [1, 9, 2, 30, 4, 9], 7, 12, 5000, 5),
        (3, [70], 36, 16, 2000, 16),
        (7, [2, 2, 2], 3, 10, 1, 3),
    ],
)
def test_tiles_equal_the_formulas_values_and_gradients(
    monkeypatch, images, lengths, regions, dims, tile_bytes, block, few_pairs
):
    monkeypatch.setitem(tiles.TILE_BYTES, "cpu", tile_bytes)
    monkeypatch.setattr(dependent_norm, "BLOCK", block)
    monkeypatch.setattr(similarity, "FEW_PAIRS", few_pairs)
    model = random_similarity(dims)
    inputs = random_inputs(images, lengths, regions, dims)
    actual, expected = model(*inputs), oracle_scores(model, *inputs)
    assert_close_to_largest(actual, expected, 1e-12)
    for ours, plain in zip(gradients(model, actual, *inputs[:2]), gradients(model, expected, *inputs[:2]), strict=True):
        assert_close_to_largest(ours, plain, 1e-10)


@pytest.mark.parametrize("few_pairs", [-1, 1])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("lengths", "regions", "dims", "tile_bytes", "block"),
    [
        ([3], 2, 8, 2**22, 128),
        ([1, 9, 2, 30, 4, 9], 7, 12, 5000, 5),
        ([70, 1], 36, 16, 2000, 16),
        ([2] * 7, 1, 10, 1, 3),
    ],
)
def test_a_loss_summed_over_negatives_equals_that_of_the_formulas_values_and_gradients(
    monkeypatch, lengths, regions, dims, tile_bytes, block, masked, few_pairs
):
    monkeypatch.setattr(similarity, "FEW_PAIRS", few_pairs)
    monkeypatch.setitem(tiles.TILE_BYTES, "cpu", tile_bytes)
    monkeypatch.setattr(dependent_norm, "BLOCK", block)
    model = random_similarity(dims)
    inputs = random_inputs(len(lengths), lengths, regions, dims)
    counts = [1 + k % regions for k in range(len(lengths))] if masked else None
    real = torch.arange(regions) < torch.tensor(counts)[:, None] if masked else None
    actual = 3 * summed_loss(model, *inputs, real)
    expected = 3 * hinge_triplet_loss(oracle_scores(model, *inputs, counts), 0.2, hardest=False)
    assert_close_to_largest(actual, expected, 1e-12)
    parts = [*inputs[:2], *model.parameters()]
    for ours, plain in zip(torch.autograd.grad(actual, parts), torch.autograd.grad(expected, parts), strict=True):
        assert_close_to_largest(ours, plain, 1e-10)


@pytest.mark.parametrize("few_pairs", [-1, 1])
@pytest.mark.parametrize(("autocast", "tolerance"), [(False, 1e-4), (True, 0.3)])
def test_a_summed_loss_in_float32_and_bfloat16_stays_near_float64(monkeypatch, autocast, tolerance, few_pairs):
    monkeypatch.setattr(similarity, "FEW_PAIRS", few_pairs)
    exact = random_similarity(64)
    inputs = random_inputs(12, [5, 9, 14] * 4, 11, 64)
    expected = summed_loss(exact, *inputs)
    plain = torch.autograd.grad(expected, [*inputs[:2], *exact.parameters()])
    single = exact.float()
    regions, words = (tensor.detach().float().requires_grad_() for tensor in inputs[:2])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        actual = summed_loss(single, regions, words, inputs[2])
    assert actual.dtype == torch.float32
    assert actual.item() == pytest.approx(expected.item(), rel=0.02 if autocast else 1e-5)
    ours = torch.autograd.grad(actual, [regions, words, *single.parameters()])
    for one, other in zip(ours, plain, strict=True):
        assert one.dtype == torch.float32
        assert_close_to_largest(one.double(), other, tolerance)


def test_a_summed_loss_of_most_pairs_scores_wrong_ones_once_and_true_ones_with_their_gradient(monkeypatch):
    scored = []

    def count(self, regions, queries, *others, tile=similarity.Scorer.tile):
        scored.append(len(regions) * queries.shape[1])
        return tile(self, regions, queries, *others)

    monkeypatch.setattr(similarity.Scorer, "tile", count)
    monkeypatch.setattr(Similarity, "_share_that_counts", lambda *_: 1.0)
    summed_loss(random_similarity(12), *random_inputs(16, [3, 8, 1, 5] * 4, 6, 12)).backward()
    assert sum(scored) == 16 + 16 * 16 + 16


def test_the_share_of_pairs_that_count_is_about_that_of_the_exact_scores():
    model = random_similarity(48, half_open=False)
    inputs = random_inputs(64, [3, 8, 1, 5] * 16, 6, 48)
    scores = model(*inputs).detach()
    for margin in (-0.5, -0.1, 0.0, 0.3, 2.0):
        exact = (violations(scores, scores.diagonal()[:, None], scores.diagonal(), margin) != 0).float().mean().item()
        estimate = model._share_that_counts(partial(violations, margin=margin), *inputs, None)
        assert estimate == pytest.approx(exact, abs=0.15)


@settings(deadline=None, max_examples=25)
@given(
    images=st.integers(1, 5),
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    regions=st.integers(1, 8),
    tile_bytes=st.integers(1, 30_000),
    block=st.integers(1, 8),
)
def test_any_sizes_and_tiles_give_the_scores_of_the_formulas(images, lengths, regions, tile_bytes, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiles.TILE_BYTES, "cpu", tile_bytes)
        patch.setattr(dependent_norm, "BLOCK", block)
        model = random_similarity(6)
        inputs = random_inputs(images, lengths, regions, 6)
        assert_close_to_largest(model(*inputs), oracle_scores(model, *inputs), 1e-12)


@settings(deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    pairs=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 100)), min_size=1, max_size=30),
    tile_bytes=st.integers(1, 30_000),
)
def test_chosen_pairs_score_as_they_do_among_all(lengths, pairs, tile_bytes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiles.TILE_BYTES, "cpu", tile_bytes)
        model = random_similarity(6)
        inputs = random_inputs(4, lengths, 5, 6)
        chosen = torch.tensor([image for image, _ in pairs]), torch.tensor([c % len(lengths) for _, c in pairs])
        scorer = model.scorer()
        scores = scorer.pairs(*inputs, *chosen)
        assert_close_to_largest(scores, scorer.all_pairs(*inputs)[chosen], 1e-12)


@pytest.mark.parametrize("chosen", [0, 1, 4, 14, 15])
def test_gradients_of_any_number_of_pairs_equal_the_formulas(chosen):
    model = random_similarity(12)
    inputs = random_inputs(5, [3, 8, 3], 6, 12)
    weights = torch.zeros(15, dtype=torch.float64)
    weights[torch.randperm(15, generator=torch.Generator().manual_seed(3))[:chosen]] = 1
    weights = weights.view(5, 3)
    actual, expected = model(*inputs), oracle_scores(model, *inputs)
    for ours, plain in zip(
        gradients(model, actual * weights, *inputs[:2]), gradients(model, expected * weights, *inputs[:2]), strict=True
    ):
        assert_close_to_largest(ours, plain, 1e-10)


def test_hardest_negatives_differentiate_no_more_than_three_pairs_a_row(monkeypatch):
    differentiated = []

    def count(images, *others):
        differentiated.append(len(images))
        return tiles.pair_tiles(images, *others)

    monkeypatch.setattr(similarity, "pair_tiles", count)
    model = random_similarity(12)
    scores = model(*random_inputs(16, [3, 8, 1, 5] * 4, 6, 12))
    hinge_triplet_loss(scores, 0.2, hardest=True).backward()
    assert 16 < differentiated[0] <= 3 * 16
    assert len(differentiated) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("half_open", [True, False])
@pytest.mark.parametrize("triangular", [True, False])
def test_factor_norm_is_the_norm_of_the_correspondence_with_its_dependencies(dtype, half_open, triangular):
    dependency = random_similarity(300, half_open).gate().detach()
    attention, regions, words = (torch.randn(*shape, dtype=dtype) for shape in ((2, 25, 3), (2, 3, 300), (1, 25, 300)))
    factor = torch.linalg.qr(dependency, mode="r").R if triangular else dependency
    actual = FactorNorm(factor.to(dtype), triangular)(attention, regions, words)
    x = attention.double() @ regions.double() * words.double()
    tolerance = 1e-7 if dtype == torch.float64 else 1e-5  # the guard is about 1e-8 of the norm
    torch.testing.assert_close(actual.double(), (x @ dependency.T).norm(dim=-1), rtol=tolerance, atol=0)


def test_gram_norm_of_nothing_is_almost_nothing_and_has_finite_gradients():
    words = torch.zeros(1, 2, 6, requires_grad=True)
    norm = GramNorm(torch.eye(6), torch.float32)
    norm(torch.ones(1, 2, 3), torch.ones(1, 3, 6), words).sum().backward()
    assert not words.grad.any()
    assert not norm.gradient().any()


def test_coarse_scores_take_only_the_diagonal_of_the_gram_matrix():
    model = random_similarity(12)
    inputs = random_inputs(5, [3, 8, 1], 6, 12)
    dependency = model.gate().detach()
    for chosen, expected in ((False, dependency), (True, dependency.norm(dim=0).diag())):
        scorer = model.scorer(coarse=chosen)
        scorer.delta = expected.sum(dim=0)
        plain = oracle.scores(*(t.detach() for t in inputs[:2]), inputs[2].tolist(), expected, model.log_temperature)
        assert_close_to_largest(scorer.all_pairs(*inputs), plain, 1e-12)


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


@pytest.mark.parametrize("share", [0.1, 1])
@pytest.mark.parametrize(
    ("half_open", "autocast", "tolerance"),
    [(False, False, 1e-4), (True, False, 1e-4), (False, True, 0.1), (True, True, 0.3)],
)
def test_float32_and_bfloat16_gradients_stay_near_float64(share, half_open, autocast, tolerance):
    exact = random_similarity(64, half_open)
    inputs = random_inputs(12, [5, 9, 14] * 4, 11, 64)
    weights = torch.zeros(144, dtype=torch.float64)
    weights[: round(144 * share)] = 1
    weights = weights[torch.randperm(144, generator=torch.Generator().manual_seed(4))].view(12, 12)
    expected = gradients(exact, exact(*inputs) * weights, *inputs[:2])
    single = exact.float()
    regions, words = (tensor.detach().float().requires_grad_() for tensor in inputs[:2])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        scores = single(regions, words, inputs[2])
    for ours, plain in zip(gradients(single, scores * weights, regions, words), expected, strict=True):
        assert ours.dtype == torch.float32
        assert_close_to_largest(ours.double(), plain, 1e-4 if share < 1 else tolerance)  # few pairs: in float32


def test_a_backward_pass_under_autocast_is_one_outside_it():
    model = random_similarity(12).float()
    inputs = [part.detach().float().requires_grad_() for part in random_inputs(4, [3, 8], 6, 12)[:2]]
    with torch.autocast("cpu", torch.bfloat16):
        scores = model(*inputs, torch.tensor([3, 8]))
        within = torch.autograd.grad(scores.sum(), inputs, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(within, torch.autograd.grad(scores.sum(), inputs), strict=True))


def test_a_sharp_gate_keeps_values_and_gradients_finite():
    similarity = random_similarity(16)
    with torch.no_grad():
        similarity.gate.log_sharpness.fill_(8.0)
    inputs = random_inputs(3, [4, 4], 5, 16)
    scores = similarity(*inputs)
    assert scores.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients(similarity, scores, *inputs[:2]))


@pytest.mark.parametrize("scale", [2.5, 1.5])
def test_gate_figures_count_closed_entries_open_rows_and_partners(scale):
    gate = random_similarity(32).gate
    with torch.no_grad():
        gate.threshold_scale.fill_(scale)
    closed = [[bool(value < 0.5) for value in row] for row in gate.mask()[0]]
    figures = gate.figures()
    assert figures["sparsity"] == pytest.approx(sum(map(sum, closed)) / 32**2)
    assert figures["open_rows"] == pytest.approx(sum(not all(row) for row in closed) / 32)
    assert (figures["open_rows"] < 0.3) == (scale == 2.5)
    partners = [1 / sum((value / row.norm().item()) ** 4 for value in row.tolist()) for row in gate().detach()]
    assert figures["partners"] == pytest.approx(sum(partners) / 32, rel=1e-4)
    assert figures["threshold"] == pytest.approx(scale)


def test_a_row_of_k_equal_entries_has_k_partners_and_a_closed_one_is_not_counted():
    gate = DependencyGate(8)
    with torch.no_grad():
        gate.joint_logits.fill_(-9.0)[:, :3] = 9.0
        gate.threshold_scale.fill_(0.5)
    assert gate.figures()["partners"] == pytest.approx(3, rel=1e-3)
    with torch.no_grad():
        gate.threshold_scale[:2] = 100.0  # so far below that nothing is left of these rows
    assert gate.figures()["closed_rows"] == pytest.approx(1 / 4)
    assert gate.figures()["partners"] == pytest.approx(3, rel=1e-3)
    with torch.no_grad():
        gate.threshold_scale.fill_(100.0)
    assert gate.figures()["closed_rows"] == 1
    assert gate.figures()["partners"] == 0


@settings(deadline=None)
@given(
    images=st.integers(1, 50),
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=40),
    rows=st.integers(1, 2000),
)
def test_tiles_cover_every_pair_once_with_all_words_of_each_caption(images, lengths, rows):
    lengths, seen = torch.tensor(lengths), torch.zeros(images, len(lengths), dtype=torch.long)
    starts = lengths.cumsum(0) - lengths
    for tile in tiles.all_tiles(images, lengths, rows, torch.device("cpu")):
        of_tile = torch.arange(images)[tile.images]
        assert tile.places.shape == (len(of_tile), tile.words.shape[1])
        assert tile.words.numel() * len(of_tile) <= max(rows, tile.words.shape[2])
        seen.view(-1)[tile.places] += 1
        for words, caption in zip(tile.words[0], tile.places[0] % len(lengths), strict=True):
            assert words.tolist() == list(range(starts[caption], starts[caption] + lengths[caption]))
        assert torch.equal(tile.places // len(lengths), of_tile[:, None].expand_as(tile.places))
    assert (seen == 1).all()
