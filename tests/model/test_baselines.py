"""Pooling (GPO) against loops written out; what each gate starts with, learns and logs."""

import math

import pytest
import torch
from torch import nn

from lib.model import registry
from lib.model.pooling import GeneralizedPooling, GpoSimilarity
from lib.model.xdim import AdaptiveGate
from tests.model.test_engine import make, random_inputs


def pool(pooling, vectors):
    """One set (n, D) pooled, its positions' weights from GRU cells in a loop."""
    positions = torch.tensor(
        [
            [(math.sin, math.cos)[k % 2](position * 10_000 ** (-(k - k % 2) / 32)) for k in range(32)]
            for position in range(len(vectors))
        ],
        dtype=vectors.dtype,
    )
    states = []
    for suffix, order in (("", range(len(positions))), ("_reverse", reversed(range(len(positions))))):
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        weights = [getattr(pooling.gru, f"{name}_l0{suffix}") for name in names]
        state, of_positions = torch.zeros(32, dtype=vectors.dtype), {}
        for position in order:
            state = of_positions[position] = gru_cell(positions[position], state, *weights)
        states.append(torch.stack([of_positions[position] for position in range(len(positions))]))
    scores = (sum(states) / 2) @ pooling.linear.weight[0]
    ordered = torch.stack([column.sort(descending=True).values for column in vectors.T], dim=1)
    return torch.softmax(scores / 0.1, dim=0) @ ordered


def gru_cell(x, h, weight_ih, weight_hh, bias_ih, bias_hh):
    of_x, of_h = (weight_ih @ x + bias_ih).chunk(3), (weight_hh @ h + bias_hh).chunk(3)
    reset, update = torch.sigmoid(of_x[0] + of_h[0]), torch.sigmoid(of_x[1] + of_h[1])
    return (1 - update) * torch.tanh(of_x[2] + reset * of_h[2]) + update * h


def test_gpo_scores_are_cosines_of_sets_pooled_alone_whatever_padding_stands_beside_them():
    model, (regions, words, lengths) = make("gpo"), random_inputs(3, [4, 9, 4])
    counts = [3, 1, 3]  # two of one size: their positions are weighed together
    scores = model(regions, words, lengths, torch.arange(7) < torch.tensor(counts)[:, None])
    images = [pool(model.image_pooling, image[:count]) for image, count in zip(regions, counts, strict=True)]
    captions = [pool(model.caption_pooling, caption) for caption in words.split(lengths.tolist())]
    for i, image in enumerate(images):
        for j, caption in enumerate(captions):
            torch.testing.assert_close(scores[i, j], torch.cosine_similarity(image, caption, dim=0))


def packed_weights(pooling, counts, longest):
    """Weights (sets, longest) by PyTorch's packed sequences, 0 beyond each count."""
    rates = 10_000 ** (-torch.arange(0, 32, 2) / 32)
    angles = torch.arange(longest)[:, None] * rates
    positions = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1).expand(len(counts), -1, -1)
    packed = nn.utils.rnn.pack_padded_sequence(positions, counts, batch_first=True, enforce_sorted=False)
    states, _ = nn.utils.rnn.pad_packed_sequence(pooling.gru(packed)[0], batch_first=True, total_length=longest)
    scores = pooling.linear(states.unflatten(-1, (2, 32)).mean(dim=2)).squeeze(-1) / 0.1
    return scores.masked_fill(torch.arange(longest) >= counts[:, None], -math.inf).softmax(dim=-1)


@pytest.mark.parametrize("counts", [[3, 1, 9, 3, 6], [9, 9], [1], [1, 2]])
def test_gpo_pools_sets_of_uneven_sizes_and_differentiates_as_with_packed_sequences(counts, double):
    torch.manual_seed(0)
    pooling, counts, longest = GeneralizedPooling(), torch.tensor(counts), max(counts)
    vectors = torch.randn(len(counts), longest, 4, requires_grad=True)
    real = None if counts.min() == longest else torch.arange(longest) < counts[:, None]
    weights = packed_weights(pooling, counts, longest)
    expected = torch.stack(
        [w[:n] @ v[:n].sort(dim=0, descending=True)[0] for w, v, n in zip(weights, vectors, counts, strict=True)]
    )
    pooled, weight = pooling(vectors, real), torch.randn(len(counts), 4)
    torch.testing.assert_close(pooled, expected)
    inputs = [vectors, *pooling.parameters()]
    ours, theirs = (torch.autograd.grad((one * weight).sum(), inputs) for one in (pooled, expected))
    torch.testing.assert_close(ours, theirs)


def test_gpo_asks_the_device_for_no_value():
    """Tensors of PyTorch's meta device have none: what needs one to go on (boolean indices, unique, packing) raises."""
    model = GpoSimilarity(4).to("meta")
    regions, words = (torch.randn(shape, device="meta", requires_grad=True) for shape in ((3, 7, 4), (17, 4)))
    for real in (None, torch.ones(3, 7, dtype=torch.bool, device="meta")):
        scores = model.pool_images(regions, real) @ model.pool_captions(words, torch.tensor([4, 9, 4])).T
        scores.sum().backward()
        assert (scores.shape, words.grad.shape) == ((3, 3), words.shape)
    with pytest.raises(NotImplementedError):
        regions[real]


def test_xdim_without_dependencies_is_independent_aggregation_over_the_norm_of_correspondences(monkeypatch):
    xdim, independent = make(), make("independent")
    monkeypatch.setattr(xdim, "dependency", lambda: torch.eye(12, dtype=torch.float64))
    regions, words, _ = random_inputs(1, [6], 5)
    lengths = torch.ones(6, dtype=torch.long)  # each word is a caption, so that scores are those of words
    ours, theirs = xdim(regions, words, lengths)[0], independent(regions, words, lengths)[0]
    context = torch.softmax(independent.log_temperature.exp() * one_word_attention(regions[0], words), 1) @ regions[0]
    correspondence = torch.nn.functional.normalize(context, dim=1) * words
    torch.testing.assert_close(theirs, correspondence.sum(dim=1))
    torch.testing.assert_close(ours, theirs / correspondence.norm(dim=1))


def one_word_attention(regions, words):
    """Of captions of one word, attention normalised over the caption's words is its sign."""
    attention = torch.nn.functional.leaky_relu((words @ regions.T).tanh(), 0.1)
    return attention / (attention.abs() + 1e-8)


def test_a_fixed_gate_learns_no_thresholds_a_dense_one_has_none_and_independent_has_no_gate():
    fixed = [name for name, parameter in make(gate="fixed").named_parameters() if not parameter.requires_grad]
    assert fixed == ["gate.threshold_scale"]
    assert set(make(gate="dense").state_dict()) == {"gate.joint_logits", "log_temperature"}
    assert set(make("independent").state_dict()) == {"log_temperature"}


def test_the_published_gate_starts_nearly_closed_and_the_open_one_with_open_entries_in_every_row():
    closed, opened = (make(gate=gate, dims=128, half_open=False).gate for gate in ("adaptive", "open"))
    assert torch.equal(closed.joint_logits, opened.joint_logits)
    assert closed.figures()["open_rows"] < 0.1
    assert opened.figures()["open_rows"] == 1
    assert 0.9 < opened.figures()["sparsity"] < 0.95
    assert opened.figures()["partners"] > 5


def test_the_uniform_gate_depends_on_all_dimensions_alike_as_the_open_one_does_on_average_at_its_start():
    uniform, opened = (make(gate=gate, dims=256, half_open=False).gate() for gate in ("uniform", "open"))
    ones = torch.ones(256, 256, dtype=torch.float64)
    torch.testing.assert_close(uniform.T @ uniform, 0.92 * torch.eye(256, dtype=torch.float64) + 0.08 * ones)
    of_open = (opened.T @ opened).detach()
    assert of_open.diagonal().mean() == pytest.approx(1)
    assert (of_open.sum() - of_open.trace()) / (256 * 255) == pytest.approx(0.08, abs=0.02)
    assert set(make(gate="uniform").state_dict()) == {"log_temperature"}


def test_gate_figures_count_closed_entries_open_rows_and_partners():
    gate = make(dims=32).gate
    closed = [[bool(value < 0.5) for value in row] for row in gate.mask()[0]]
    figures = gate.figures()
    assert figures["sparsity"] == pytest.approx(sum(map(sum, closed)) / 32**2)
    assert figures["open_rows"] == pytest.approx(sum(not all(row) for row in closed) / 32)
    partners = [1 / sum((value / row.norm().item()) ** 4 for value in row.tolist()) for row in gate().detach()]
    assert figures["partners"] == pytest.approx(sum(partners) / 32, rel=1e-4)


def test_a_row_of_k_equal_entries_has_k_partners_and_a_closed_one_is_not_counted():
    gate = AdaptiveGate(8)
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


def test_a_part_is_its_name_and_its_options():
    assert registry.parse_part("gate", "open:start=1.4") == {"name": "open", "options": {"start": 1.4}}
    gate = registry.build("gate", registry.parse_part("gate", "open:start=-3"), 500)
    assert gate.threshold_scale.mean().item() == pytest.approx(-3, abs=0.05)
    described = registry.describe({"gate": "fixed:start=2", "no_imgnorm": True, "img_dim": 8})
    assert described["similarity"]["options"]["gate"] == {"name": "fixed", "options": {"start": 2}}
    assert described["image_encoder"]["options"] == {"img_dim": 8, "normalize": False, "mask_padding": False}
    assert not registry.describe({"similarity": "gpo"})["text_encoder"]["options"]["normalize"]


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ({"similarity": "cosine"}, "--similarity cosine: expected xdim, independent, gpo"),
        ({"gate": "ajar"}, "--gate ajar: expected adaptive, open, fixed, dense, diagonal"),
        ({"similarity": "gpo", "gate": "dense"}, "--gate dense: --similarity gpo has no gate"),
        ({"gate": "uniform:correlation=1.0"}, "--gate uniform: correlation=1.0 is not from 0 to below 1"),
        ({"gate": "open:begin=1"}, "--gate open: has no option 'begin'; it takes start"),
        ({"gate": "open:start"}, "--gate open:start: expected open:option=value"),
        ({"gate": "open:start=x"}, "--gate open: start='x' is no float"),
        ({"similarity": "gpo:size=3"}, "--similarity gpo: has no option 'size'; it takes none"),
        ({"image_encoder": "regions:img_dim=3"}, "--image_encoder regions: has no option 'img_dim'"),
    ],
)
def test_unknown_parts_and_options_are_refused(flags, complaint):
    with pytest.raises(ValueError, match=complaint):
        registry.build("similarity", registry.describe(flags)["similarity"], 8)
