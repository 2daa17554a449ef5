"""Images to regions, captions to words: padding, normalisation, groups of captions of like length."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from lib.model import encoders, registry
from lib.model.encoders import RegionEncoder, TextEncoder
from lib.model.layers import l2_normalize, pad_rows, real_rows, upload
from lib.model.xdim import XDim
from tests.conftest import TINY_BERT

CONFIG = json.loads((TINY_BERT / "config.json").read_text())
COUNTS = torch.tensor([5, 1, 3])
REAL = torch.arange(5) < COUNTS[:, None]


@pytest.fixture
def features():
    torch.manual_seed(0)
    return torch.randn(3, 5, 8) * REAL[..., None]


@pytest.fixture
def bert():
    torch.manual_seed(0)
    return TextEncoder.make_backbone(CONFIG).eval()


def text_encoder(bert):
    torch.manual_seed(0)
    return TextEncoder(6, CONFIG, backbone=bert)


def test_normalisation_divides_by_the_norm_plus_epsilon(double):
    vectors = torch.tensor([[3e-8, 4e-8], [3.0, 4.0], [0.0, 0.0]])
    expected = torch.tensor([[0.5, 4 / 6], [0.6, 0.8], [0.0, 0.0]])
    torch.testing.assert_close(l2_normalize(vectors), expected, rtol=1e-7, atol=0)
    assert l2_normalize(vectors.bfloat16()).dtype == torch.float32


def test_what_goes_to_cuda_is_pinned_so_that_nothing_waits_and_on_a_cpu_nothing_is_copied(monkeypatch):
    lengths, calls = torch.arange(3), []
    assert upload(lengths, torch.device("cpu")) is lengths
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: calls.append("pinned") or tensor)
    monkeypatch.setattr(torch.Tensor, "to", lambda _, device, non_blocking: calls.append((str(device), non_blocking)))
    upload(lengths, torch.device("cuda:1"))
    assert calls == ["pinned", ("cuda:1", True)]


def test_image_encoder_starts_as_specified():
    torch.manual_seed(0)
    encoder = RegionEncoder(60, 100)
    bound = (6 / 160) ** 0.5
    assert 0.97 * bound < encoder.linear.weight.abs().max() <= bound
    assert not encoder.linear.bias.any()
    assert encoder.mlp[0].weight.shape == (30, 100)


def test_region_embeddings_are_the_linear_layer_plus_the_mlp_normalised(features):
    encoder = RegionEncoder(6, 8).eval()
    rows = features[0]
    plain_rows = encoder.linear(rows) + encoder.mlp[3](torch.relu(encoder.mlp[1](encoder.mlp[0](rows))))
    torch.testing.assert_close(encoder.embed(features)[0], plain_rows / plain_rows.norm(dim=1, keepdim=True))
    encoder.normalize = False
    torch.testing.assert_close(encoder.embed(features)[0], plain_rows)


def test_equal_counts_are_padded_without_a_copy():
    packed, counts = torch.randn(12, 8), torch.full((3,), 4)
    assert pad_rows(packed, counts).data_ptr() == packed.data_ptr()


@settings(deadline=None)
@given(counts=st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_padded_regions_and_their_gradients_are_those_of_the_packed_ones(counts):
    packed = torch.randn(sum(counts), 3, dtype=torch.float64, requires_grad=True)
    real = real_rows(torch.tensor(counts), packed.device)
    assert (real is None) == (len(set(counts)) == 1)
    assert real is None or real.sum(dim=1).tolist() == counts
    weights = torch.randn(len(counts), max(counts), 3, dtype=torch.float64)
    padded = pad_rows(packed, torch.tensor(counts))
    (gradient,) = torch.autograd.grad((padded * weights).sum(), packed)
    for image, (rows, its) in enumerate(zip(packed.split(counts), gradient.split(counts), strict=True)):
        assert torch.equal(padded[image, : len(rows)], rows)
        assert not padded[image, len(rows) :].any()
        assert torch.equal(its, weights[image, : len(rows)])


@pytest.fixture
def model(bert):
    def build(**flags):
        torch.manual_seed(0)
        architecture = registry.describe({"img_dim": 8, "embed_size": 6, **flags})
        architecture["text_encoder"]["options"]["config"] = CONFIG
        return XDim.build(architecture, bert)

    return build


def embed(model, features):
    """Of the images in `features` with two captions each; regions, and which take part."""
    ids = torch.tensor([[2, 12, 31, 3], [2, 5, 3, 0], [2, 7, 8, 3]])
    regions, _, _, real = model.embed(features[REAL], COUNTS, ids, torch.tensor([4, 3, 4]))
    return regions, real


@pytest.mark.parametrize("masked", [False, True])
def test_in_training_padding_takes_part_as_published_and_masked_stays_out_of_batchnorm_and_is_zero(
    model, features, masked
):
    model, reference = model(mask_padding=masked).train(), nn.BatchNorm1d(3)
    regions, real = embed(model, features)
    reference(model.image_encoder.mlp[0](features[REAL] if masked else features.flatten(0, 1)))
    assert torch.equal(real, REAL) if masked else real is None
    torch.testing.assert_close(model.image_encoder.mlp[1].running_mean, reference.running_mean)
    torch.testing.assert_close(model.image_encoder.mlp[1].running_var, reference.running_var)
    torch.testing.assert_close(regions.norm(dim=-1), REAL.float() if masked else torch.ones(3, 5))


@pytest.mark.parametrize("mask_padding", [False, True])
def test_in_evaluation_padding_is_always_masked(model, features, mask_padding):
    model = model(mask_padding=mask_padding).eval()
    regions, real = embed(model, features)
    assert torch.equal(real, REAL)
    for image, count, one in zip(features, COUNTS, regions, strict=True):
        torch.testing.assert_close(one[:count], model.encode_images(image[:count], count[None])[0][0])


@pytest.fixture
def uneven():
    """Token ids and lengths of 11 captions in no order of length."""
    lengths = torch.tensor([4, 9, 3, 12, 5, 9, 3, 7, 2, 12, 6])
    ids = torch.randint(5, 60, (11, 12), generator=torch.Generator().manual_seed(0))
    return ids * (torch.arange(12) < lengths[:, None]), lengths


@pytest.mark.parametrize("size", [1, 3, 100])
def test_encoding_in_groups_of_like_length_equals_one_padded_batch_in_values_and_gradients(
    bert, uneven, double, monkeypatch, size
):
    ids, lengths = uneven
    encoder = text_encoder(bert).double()
    hidden = bert(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state
    expected = l2_normalize(encoder.linear(hidden[torch.arange(12) < lengths[:, None]]))
    weights = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), list(encoder.parameters()))

    monkeypatch.setitem(encoders.GROUP, "cpu", size)
    words = encoder(ids, lengths)
    torch.testing.assert_close(words, expected, rtol=1e-10, atol=1e-12)
    gradients = torch.autograd.grad((words * weights).sum(), list(encoder.parameters()))
    for gradient, its in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, its, rtol=1e-9, atol=1e-12)


def test_groups_hold_little_padding_and_every_caption_once(uneven):
    _, lengths = uneven
    groups = encoders.groups_of_like_length(lengths, 3)
    assert torch.equal(torch.cat(groups).sort().values, torch.arange(11))
    assert [lengths[group].tolist() for group in groups] == [[2, 3, 3], [4, 5, 6], [7, 9, 9], [12, 12]]


def test_bert_attends_with_sdpa_and_without_a_mask_where_nothing_is_padded(bert, uneven, monkeypatch):
    masks = []

    def spy(*args, attn_mask=None, plain=functional.scaled_dot_product_attention, **options):
        masks.append(attn_mask)
        return plain(*args, attn_mask=attn_mask, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", spy)
    encoder = text_encoder(bert)
    ids, lengths = uneven
    for chosen in (lengths >= 9, lengths == 9):
        encoder(ids[chosen], lengths[chosen])
    layers = bert.config.num_hidden_layers
    assert [mask is None for mask in masks] == [False] * layers + [True] * layers
