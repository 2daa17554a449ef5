"""The baselines against their plain formulas, one image and one caption at a time: values and gradients."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lib.losses import violations
from lib.model import similarity, tiles
from lib.model.gate import DependencyGate
from lib.model.gpo import GeneralizedPooling
from lib.model.similarities import GATES, SIMILARITIES, make_similarity
from lib.model.similarity import Similarity
from tests.model.oracle import dependency_matrix, l2
from tests.model.test_similarity import assert_close_to_largest, random_inputs

VARIANTS = [
    *(("xdim", gate) for gate in GATES),
    *((name, "adaptive") for name in SIMILARITIES if name != "xdim"),
]
SHAPES = [
    (1, [1], 1, 8, 2**22),
    (5, [1, 9, 2, 30, 4], 7, 12, 5000),
    (3, [2, 2, 2], 3, 10, 1),
]


def make(name, gate, dims):
    torch.manual_seed(0)
    made = make_similarity(name, dims, gate).double()
    if name == "xdim" and gate != "dense":  # as a gate is at its start nearly all of it is closed
        with torch.no_grad():
            made.gate.log_sharpness.fill_(2.0)
            made.gate.threshold_scale.fill_(0.5)
    return made


# The formulas


def attend(regions, words, delta, log_temperature):
    """Attention (n, R) of a caption's words, and the words' affinities Z."""
    affinity = (words * delta) @ regions.T
    attention = F.leaky_relu(affinity.tanh(), 0.1)
    attention = attention / (attention.norm(dim=0, keepdim=True) + 1e-8)
    return torch.softmax(log_temperature.exp() * attention, dim=1)


def xdim_score(model, regions, words):
    gate = model.gate
    probabilities = gate.joint_logits.sigmoid()
    masked = isinstance(gate, DependencyGate)
    dependency = (
        dependency_matrix(gate.joint_logits, gate.threshold_scale, gate.log_sharpness) if masked else l2(probabilities)
    )
    attention = attend(regions, words, dependency.sum(dim=0), model.log_temperature)
    correspondence = l2(attention @ regions) * words
    if not gate.diagonal:
        return l2(correspondence @ dependency.T).sum(dim=1).mean()
    norm = (correspondence.square() @ (dependency.T @ dependency).diagonal()).sqrt()
    return ((correspondence @ dependency.T).sum(dim=1) / (norm + 1e-8)).mean()


def independent_score(model, regions, words):
    attention = attend(regions, words, torch.ones(words.shape[1], dtype=words.dtype), model.log_temperature)
    return (l2(attention @ regions) * words).sum(dim=1).mean()


def gpo_score(model, regions, words):
    return l2(pool(model.image_pooling, regions)) @ l2(pool(model.caption_pooling, words))


def pool(pooling, vectors):
    """One set (n, D), its places' weights from GRU cells in a loop."""
    places = torch.tensor(
        [
            [(math.sin, math.cos)[k % 2](place * 10_000 ** (-(k - k % 2) / 32)) for k in range(32)]
            for place in range(len(vectors))
        ],
        dtype=vectors.dtype,
    )
    states = []
    for suffix, order in (("", range(len(places))), ("_reverse", reversed(range(len(places))))):
        weights = [
            getattr(pooling.gru, f"{name}_l0{suffix}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        ]
        state, of_places = torch.zeros(32, dtype=vectors.dtype), {}
        for place in order:
            state = of_places[place] = gru_cell(places[place], state, *weights)
        states.append(torch.stack([of_places[place] for place in range(len(places))]))
    scores = (sum(states) / 2) @ pooling.linear.weight[0]
    ordered = torch.stack([column.sort(descending=True).values for column in vectors.T], dim=1)
    return torch.softmax(scores / 0.1, dim=0) @ ordered


def gru_cell(x, h, weight_ih, weight_hh, bias_ih, bias_hh):
    of_x, of_h = (weight_ih @ x + bias_ih).chunk(3), (weight_hh @ h + bias_hh).chunk(3)
    reset, update = torch.sigmoid(of_x[0] + of_h[0]), torch.sigmoid(of_x[1] + of_h[1])
    return (1 - update) * torch.tanh(of_x[2] + reset * of_h[2]) + update * h


FORMULAS = {"xdim": xdim_score, "independent": independent_score, "gpo": gpo_score}


def plain_scores(name, model, regions, words, lengths, counts=None):
    counts = counts or [regions.shape[1]] * len(regions)
    captions = words.split(lengths.tolist())
    rows = [
        [FORMULAS[name](model, image[:n], one) for one in captions] for image, n in zip(regions, counts, strict=True)
    ]
    return torch.stack([torch.stack(row) for row in rows])


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def assert_equal_gradients(model, ours, plain, inputs):
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2), dtype=ours.dtype)
    leaves = [*inputs, *trained(model)]
    both = (torch.autograd.grad((scores * weights).sum(), leaves, allow_unused=True) for scores in (ours, plain))
    for one, other in zip(*both, strict=True):
        if other is None or not other.abs().max():  # one place to pool has a weight of 1 whatever the network says
            assert one is None or one.abs().max() < 1e-12
        else:
            assert_close_to_largest(one, other, 1e-9)


@pytest.mark.parametrize("few_pairs", [-1, 1])
@pytest.mark.parametrize(("images", "lengths", "regions", "dims", "tile_bytes"), SHAPES)
@pytest.mark.parametrize(("name", "gate"), VARIANTS)
def test_scores_and_gradients_equal_the_formulas(
    monkeypatch, name, gate, images, lengths, regions, dims, tile_bytes, few_pairs
):
    monkeypatch.setitem(tiles.TILE_BYTES, "cpu", tile_bytes)
    monkeypatch.setattr(similarity, "FEW_PAIRS", few_pairs)
    model = make(name, gate, dims)
    inputs = random_inputs(images, lengths, regions, dims)
    ours, plain = model(*inputs), plain_scores(name, model, *inputs)
    assert_close_to_largest(ours, plain, 1e-11)
    assert_equal_gradients(model, ours, plain, inputs[:2])


@pytest.mark.parametrize("few_pairs", [-1, 1])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("name", "gate"), VARIANTS)
def test_a_loss_summed_over_negatives_equals_that_of_the_formulas(monkeypatch, name, gate, masked, few_pairs):
    monkeypatch.setattr(similarity, "FEW_PAIRS", few_pairs)
    monkeypatch.setitem(tiles.TILE_BYTES, "cpu", 5000)
    model, counts = make(name, gate, 12), [7, 1, 3, 7, 2]
    regions, words, lengths = random_inputs(5, [1, 9, 2, 30, 4], 7, 12)
    real = torch.arange(7) < torch.tensor(counts)[:, None] if masked else None
    ours = model.sum_over_negatives(partial(violations, margin=0.2), regions, words, lengths, real)
    scores = plain_scores(name, model, regions, words, lengths, counts if masked else None)
    true = scores.diagonal()
    plain = violations(scores, true[:, None], true, 0.2).masked_fill(torch.eye(5, dtype=torch.bool), 0).sum()
    assert_close_to_largest(ours, plain, 1e-11)
    assert_equal_gradients(model, ours, plain, (regions, words))


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize(("name", "gate"), VARIANTS)
def test_a_scorer_gives_the_same_scores_without_gradients(name, gate, coarse):
    model = make(name, gate, 12)
    regions, words, lengths = random_inputs(5, [1, 9, 2, 30, 4], 7, 12)
    real = torch.arange(7) < torch.tensor([7, 1, 3, 7, 2])[:, None]
    scorer, expected = model.scorer(coarse), model(regions, words, lengths, real).detach()
    scores = scorer.all_pairs(regions.detach(), words.detach(), lengths, real)
    if not coarse or name != "xdim" or gate == "diagonal":
        torch.testing.assert_close(scores, expected)
    images, captions = torch.tensor([0, 4, 4, 2]), torch.tensor([3, 0, 4, 2])
    pairs = scorer.pairs(regions.detach(), words.detach(), lengths, images, captions, real)
    torch.testing.assert_close(pairs, scores[images, captions])
    again = scorer.all_pairs(regions[:2].detach(), words.detach(), lengths, real[:2])
    torch.testing.assert_close(again, scores[:2])


@pytest.mark.parametrize(("name", "gate"), VARIANTS)
def test_under_autocast_scores_are_finer_than_bfloat16(name, gate):
    model = make(name, gate, 64).float()
    inputs = [
        tensor.float() if tensor.is_floating_point() else tensor for tensor in random_inputs(4, [2, 5, 3, 4], 6, 64)
    ]
    with torch.autocast("cpu", torch.bfloat16):
        for scores in (model(*inputs), model.scorer().all_pairs(*inputs)):
            assert scores.dtype == torch.float32
            assert not torch.equal(scores, scores.bfloat16().float())


def test_xdim_without_dependencies_is_independent_aggregation_over_the_norm_of_correspondences():
    class Identity(nn.Module):
        diagonal = False

        def forward(self):
            return torch.eye(12, dtype=torch.float64)

    xdim, independent = Similarity(12, Identity()).double(), make("independent", "adaptive", 12)
    regions, words, _ = random_inputs(1, [6], 5, 12)
    lengths = torch.ones(6, dtype=torch.long)  # each word a caption, so that scores are those of words
    ours, theirs = xdim(regions, words, lengths), independent(regions, words, lengths)
    attention = torch.cat([attend(regions[0], word[None], torch.ones(12), xdim.log_temperature) for word in words])
    correspondence = l2(attention @ regions[0]) * words
    torch.testing.assert_close(theirs[0], correspondence.sum(dim=1))
    torch.testing.assert_close(ours[0], theirs[0] / (correspondence.norm(dim=1) + 1e-8))


def test_a_fixed_gate_learns_no_thresholds_and_a_dense_one_has_none():
    fixed, dense = make("xdim", "fixed", 8), make("xdim", "dense", 8)
    assert {name for name, parameter in fixed.named_parameters() if not parameter.requires_grad} == {
        "gate.threshold_scale"
    }
    assert {name for name, _ in dense.named_parameters()} == {"gate.joint_logits", "log_temperature"}
    assert make("independent", "adaptive", 8).state_dict().keys() == {"log_temperature"}


def test_the_published_gate_starts_nearly_closed_and_the_open_one_with_some_open_entries_in_every_row():
    started = {}
    for name in ("adaptive", "open"):
        torch.manual_seed(0)
        started[name] = make_similarity("xdim", 128, name).gate
    assert torch.equal(started["adaptive"].joint_logits, started["open"].joint_logits)
    assert started["adaptive"].figures()["open_rows"] < 0.1
    assert started["open"].figures()["open_rows"] == 1
    assert 0.9 < started["open"].figures()["sparsity"] < 0.95
    assert started["open"].figures()["partners"] > 5


def test_pooling_weighs_places_alike_for_sets_of_one_size_whatever_stands_beside_them():
    torch.manual_seed(0)
    pooling, vectors = GeneralizedPooling().double(), torch.randn(4, 9, 5, dtype=torch.float64)
    counts = torch.tensor([9, 3, 1, 3])
    together = pooling(vectors, counts)
    for one, size, pooled in zip(vectors, counts.tolist(), together, strict=True):
        torch.testing.assert_close(pooling(one[None, :size], torch.tensor([size]))[0], pooled)
        torch.testing.assert_close(pool(pooling, one[:size]), pooled)


@pytest.mark.parametrize(("name", "gate"), VARIANTS)
def test_figures_for_logs_are_numbers(name, gate):
    assert all(math.isfinite(value) for value in make(name, gate, 8).figures().values())
