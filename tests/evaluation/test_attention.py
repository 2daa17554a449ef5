"""What a score is made of: the weights and groups that are shown are those that the score is computed from."""

import numpy as np
import pytest
import torch

from lib import load
from lib.cli import InputError
from lib.evaluation.attention import attention, explain_pieces, partners
from lib.model.layers import l2_normalize
from tests.conftest import write_model, write_pictures

CAPTION = "A skateboarder, holding a red ball!"


def make(tmp_path, **settings):
    """A model of random weights, and what it embeds: regions (3, 5, D), which are real, a caption's words (W, D)."""
    checkpoint = write_model(tmp_path / "m.safetensors", tmp_path, img_dim=16, mask_padding=True, **settings)
    model = load(checkpoint, device="cpu")
    features = torch.randn(11, 16, generator=torch.Generator().manual_seed(0)).split([5, 2, 4])
    (block,) = model.embed_images([model.batch(features)])
    words, _ = model.embed_captions(model.tokenizer.tokenize([CAPTION]), 1)
    return model, features, block, words


@pytest.mark.parametrize("gate", ["adaptive", "diagonal", "dense"])
def test_the_score_follows_from_the_weights_and_is_the_sum_of_the_groups(tmp_path, gate):
    model, features, block, words = make(tmp_path, gate=gate)
    similarity, scores = model.model.similarity, model.score(features, [CAPTION])[:, 0]
    D = similarity.dependency().detach()
    for image, (weights, groups) in enumerate(zip(*explain_pieces(model, block, words), strict=True)):
        regions = block.regions[image]
        assert weights.shape == (len(words), len(regions))
        assert weights[:, len(features[image]) :].eq(0).all()
        np.testing.assert_allclose(weights.sum(dim=1), 1, rtol=1e-5)
        S = l2_normalize(weights @ regions) * words
        norm = (S * D.norm(dim=0) if gate == "diagonal" else S @ D.T).norm(dim=1)
        of_pieces = (S * D.sum(dim=0)).sum(dim=1) / norm
        np.testing.assert_allclose(groups.sum(dim=1), of_pieces, atol=1e-5)
        assert of_pieces.mean().item() == pytest.approx(scores[image].item(), abs=1e-5)


@pytest.mark.parametrize("settings", [{}, {"global_head": "gpo"}, {"similarity": "independent"}])
def test_a_pair_has_the_models_score_and_a_row_for_each_word_the_mean_of_its_pieces(tmp_path, settings):
    model, features, block, pieces = make(tmp_path, **settings)
    scores, (numbers, _) = model.score(features, [CAPTION])[:, 0], model.tokenizer.spell(CAPTION)
    word_of = np.array([-1, *numbers, -1])  # of each piece, beside [CLS] and [SEP]
    of_pieces = (part.numpy() for part in explain_pieces(model, block, pieces))
    for image, score, weights, groups in zip(features, scores, *of_pieces, strict=True):
        found = attention(model, image, CAPTION)
        assert found.words == ["A", "skateboarder", ",", "holding", "a", "red", "ball", "!"]
        assert len(word_of) == len(weights) > len(found.words) + 2  # skateboarder is several
        for word, (row, of_word) in enumerate(zip(found.weights, found.scores, strict=True)):
            np.testing.assert_allclose(row, weights[word_of == word, : len(image)].mean(axis=0), rtol=1e-4)
            assert of_word == pytest.approx(groups[word_of == word].sum(axis=1).mean(), abs=1e-5)
        assert found.score == pytest.approx(score.item(), abs=1e-5)
        assert found.boxes is None


def test_pictures_have_boxes_and_a_sentence_of_500_words_ends_where_the_model_does(tmp_path):
    (picture,) = (write_pictures(tmp_path, ["a.png"]) / "a.png",)
    vision = {"image_encoder": "torchvision:squeezenet1_1,regions=4", "image_size": 64, "image_weights": "none"}
    pytest.importorskip("torchvision")
    from torchvision.models import get_model

    torch.save(get_model("squeezenet1_1", weights=None).state_dict(), tmp_path / "weights.pth")
    vision["image_weights"] = str(tmp_path / "weights.pth")
    model = load(write_model(tmp_path / "m.safetensors", tmp_path, **vision), device="cpu")
    found = attention(model, picture, "a red ball " * 500)
    assert found.boxes.shape == (found.weights.shape[1], 4)
    assert found.boxes.max(axis=0).tolist() == [*found.boxes.max(axis=0)[:2], 40, 30]  # the picture's corner
    assert len(found.words) == len(found.scores) == model.tokenizer.max_length - 2


def test_partners_are_the_largest_entries_of_a_row_of_the_dependency_matrix(tmp_path):
    model, _, _, _ = make(tmp_path)
    D = model.model.similarity.dependency().detach()
    for dim, found in zip((3, 0), partners(D, [3, 0], 4), strict=True):
        others = sorted((k for k in range(16) if k != dim), key=lambda k: -D[dim, k].item())[:4]
        assert [k for k, _ in found] == others
        np.testing.assert_allclose([weight for _, weight in found], D[dim, others], rtol=1e-6)


def test_a_similarity_without_attention_says_so(tmp_path):
    model, features, _, _ = make(tmp_path, similarity="gpo")
    with pytest.raises(InputError, match="gpo: compares one vector"):
        attention(model, features[0], CAPTION)
