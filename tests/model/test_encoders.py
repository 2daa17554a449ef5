import pytest
import torch
from torch import nn
from torch.nn import functional

from lib.bert import build_bert, plain, read_config
from lib.model import text_encoder
from lib.model.image_encoder import ImageEncoder
from lib.model.norm import l2_normalize
from lib.model.text_encoder import TextEncoder
from tests.conftest import TINY_BERT

COUNTS = torch.tensor([5, 1, 3])
REAL = torch.arange(5) < COUNTS[:, None]


@pytest.fixture
def features():
    torch.manual_seed(0)
    return torch.randn(3, 5, 8) * REAL[..., None]


@pytest.fixture
def bert():
    torch.manual_seed(0)
    return build_bert(plain(read_config(str(TINY_BERT)))).eval()


def test_normalisation_divides_by_the_norm_plus_epsilon(double):
    vectors = torch.tensor([[3e-8, 4e-8], [3.0, 4.0], [0.0, 0.0]])
    expected = torch.tensor([[0.5, 4 / 6], [0.6, 0.8], [0.0, 0.0]])
    torch.testing.assert_close(l2_normalize(vectors), expected, rtol=1e-7, atol=0)
    assert l2_normalize(vectors.bfloat16()).dtype == torch.float32


def test_image_encoder_starts_as_specified():
    torch.manual_seed(0)
    encoder = ImageEncoder(100, 60)
    bound = (6 / 160) ** 0.5
    assert 0.97 * bound < encoder.linear.weight.abs().max() <= bound
    assert not encoder.linear.bias.any()
    assert encoder.mlp[0].weight.shape == (30, 100)


def test_region_embeddings_are_the_linear_layer_plus_the_mlp_normalised(features):
    encoder = ImageEncoder(8, 6).eval()
    rows = features[0]
    plain_rows = encoder.linear(rows) + encoder.mlp[3](torch.relu(encoder.mlp[1](encoder.mlp[0](rows))))
    torch.testing.assert_close(encoder(features)[0], plain_rows / plain_rows.norm(dim=1, keepdim=True))
    encoder.normalize = False
    torch.testing.assert_close(encoder(features)[0], plain_rows)


def test_attended_padding_counts_in_batchnorm_and_becomes_unit_vectors(features):
    encoder = ImageEncoder(8, 6)
    reference = nn.BatchNorm1d(3)
    reference(encoder.mlp[0](features.flatten(0, 1)))
    embedded = encoder(features)
    torch.testing.assert_close(encoder.mlp[1].running_mean, reference.running_mean)
    torch.testing.assert_close(embedded.norm(dim=-1), torch.ones(3, 5))


def test_masked_padding_stays_out_of_batchnorm_and_is_zero(features):
    encoder = ImageEncoder(8, 6)
    reference = nn.BatchNorm1d(3)
    reference(encoder.mlp[0](features[REAL]))
    embedded = encoder(features, REAL)
    torch.testing.assert_close(encoder.mlp[1].running_mean, reference.running_mean)
    torch.testing.assert_close(encoder.mlp[1].running_var, reference.running_var)
    torch.testing.assert_close(embedded.norm(dim=-1), REAL.float())


def test_masked_padding_gets_no_gradient_and_real_rows_get_theirs(features):
    encoder = ImageEncoder(8, 6)
    features.requires_grad_()
    (encoder(features, REAL) * torch.randn(3, 5, 6)).sum().backward()
    assert not features.grad[~REAL].any()
    assert features.grad[REAL].abs().amax(dim=-1).all()


def test_words_are_packed_in_order_without_padding(bert):
    torch.manual_seed(0)
    encoder = TextEncoder(bert, 6)
    ids, lengths = (
        torch.tensor([[2, 12, 31, 3, 0, 0], [2, 5, 3, 0, 0, 0], [2, 7, 8, 9, 10, 3]]),
        torch.tensor([4, 3, 6]),
    )
    words = encoder(ids, lengths)
    assert words.shape == (13, 6)
    for one, length, packed in zip(ids, lengths, words.split(lengths.tolist()), strict=True):
        alone = encoder(one[None, :length], length[None])
        torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-6)


def test_a_zero_id_within_a_caption_is_not_attended_to_but_is_a_word(bert):
    encoder = TextEncoder(bert, 6)
    ids, lengths = torch.tensor([[2, 12, 0, 31, 3]]), torch.tensor([5])
    words = encoder(ids, lengths)
    assert words.shape == (5, 6)
    hidden = bert(input_ids=ids, attention_mask=torch.tensor([[1, 1, 0, 1, 1]])).last_hidden_state
    torch.testing.assert_close(words, l2_normalize(encoder.linear(hidden[0])))


@pytest.fixture
def uneven():
    """Token ids and lengths of 11 captions in no order of length."""
    lengths = torch.tensor([4, 9, 3, 12, 5, 9, 3, 7, 2, 12, 6])
    ids = torch.randint(5, 60, (11, 12), generator=torch.Generator().manual_seed(0))
    return ids * (torch.arange(12) < lengths[:, None]), lengths


@pytest.mark.parametrize("size", [1, 2, 3, 5, 10, 11, 100])
def test_encoding_in_groups_of_like_length_equals_one_padded_batch_in_values_and_gradients(
    bert, uneven, double, monkeypatch, size
):
    ids, lengths = uneven
    encoder = TextEncoder(bert, 6).double()
    hidden = bert(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state
    expected = l2_normalize(encoder.linear(hidden[torch.arange(12) < lengths[:, None]]))
    weights = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), list(encoder.parameters()))

    monkeypatch.setitem(text_encoder.GROUP, "cpu", size)
    words = encoder(ids, lengths)
    torch.testing.assert_close(words, expected, rtol=1e-10, atol=1e-12)
    gradients = torch.autograd.grad((words * weights).sum(), list(encoder.parameters()))
    for gradient, its in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, its, rtol=1e-9, atol=1e-12)


def test_groups_hold_little_padding_and_every_caption_once(uneven):
    _, lengths = uneven
    groups = text_encoder.groups_of_like_length(lengths, 3)
    assert torch.equal(torch.cat(groups).sort().values, torch.arange(11))
    assert [lengths[group].tolist() for group in groups] == [[2, 3, 3], [4, 5, 6], [7, 9, 9], [12, 12]]


def test_bert_attends_with_sdpa_and_without_a_mask_where_nothing_is_padded(bert, uneven, monkeypatch):
    masks = []

    def spy(*args, attn_mask=None, plain=functional.scaled_dot_product_attention, **options):
        masks.append(attn_mask)
        return plain(*args, attn_mask=attn_mask, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", spy)
    encoder = TextEncoder(bert, 6)
    ids, lengths = uneven
    for chosen in (lengths >= 9, lengths == 9):
        encoder(ids[chosen], lengths[chosen])
    layers = bert.config.num_hidden_layers
    assert [mask is None for mask in masks] == [False] * layers + [True] * layers
