"""A checkpoint exactly as the published code writes it: it loads, scores and trains on as it does there."""

import torch

import eval as eval_program
from lib.checkpoint import build_model, read_checkpoint
from lib.loss import hinge_triplet_loss
from lib.training.optimizer import build_optimizer, set_learning_rate
from tests.conftest import GOLDEN, TINY_BERT

PUBLISHED = GOLDEN / "official_format_checkpoint.pth.tar"


def published_model():
    return build_model(read_checkpoint(PUBLISHED), str(TINY_BERT))[0]


def test_embeddings_and_scores_equal_the_published_code(golden):
    figures, model = golden("official_format_expected"), published_model().eval()
    images, ids, lengths = (torch.from_numpy(figures[name]) for name in ("images", "caption_ids", "lengths"))
    with torch.no_grad():
        regions = model.encode_images(images, torch.full((len(images),), images.shape[1]))
        words = model.encode_captions(ids, lengths)
        scores = model.similarity(regions, words, lengths)
    is_word = torch.arange(ids.shape[1]) < lengths[:, None]
    expected_words = torch.from_numpy(figures["word_embeddings"])[is_word]
    torch.testing.assert_close(regions, torch.from_numpy(figures["region_embeddings"]), rtol=0, atol=1e-5)
    torch.testing.assert_close(words, expected_words, rtol=0, atol=1e-5)
    torch.testing.assert_close(scores, torch.from_numpy(figures["similarity"]), rtol=0, atol=1e-5)


def test_five_training_steps_give_the_published_losses(golden):
    figures, model = golden("training_trajectory"), published_model()
    optimizer = build_optimizer(model, 5e-4)
    set_learning_rate(optimizer, 5e-4)
    model.train()
    model.text_encoder.bert.eval()  # so that no dropout acts
    losses = []
    for step in range(len(figures["losses"])):
        counts, lengths = (torch.from_numpy(figures[name][step]) for name in ("region_counts", "caption_lengths"))
        images = torch.from_numpy(figures["images"][step])[:, : counts.max()]
        ids = torch.from_numpy(figures["caption_ids"][step])[:, : lengths.max()]
        loss = hinge_triplet_loss(model(images, counts, ids, lengths), 0.2, hardest=True)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()
        losses.append(loss.item())
    torch.testing.assert_close(torch.tensor(losses), torch.from_numpy(figures["losses"]).float(), rtol=1e-5, atol=0)


def test_a_published_checkpoint_is_evaluated_from_the_command_line(make_data, tmp_path, capsys):
    folder = make_data(tmp_path / "f30k_precomp", img_dim=48)
    flags = ["--checkpoint", str(PUBLISHED), "--data_path", str(tmp_path), "--bert", str(TINY_BERT), "--device", "cpu"]
    assert eval_program.main([*flags, "--workers", "0"]) == 0
    out = capsys.readouterr().out
    assert f"{PUBLISHED}, 1 epochs, dev rSum 123.4" in out
    assert f"{folder} test: 10 images, 50 captions" in out


def test_the_prefix_of_data_parallel_may_be_missing(tmp_path):
    with torch.serialization.safe_globals(__import__("lib.published").published.ALLOWED_TYPES):
        content = torch.load(PUBLISHED, weights_only=True)
    content["model"] = [{name.removeprefix("module."): w for name, w in part.items()} for part in content["model"]]
    torch.save(content, tmp_path / "bare.pth.tar")
    bare = build_model(read_checkpoint(tmp_path / "bare.pth.tar"), str(TINY_BERT))[0].state_dict()
    assert all(torch.equal(weight, bare[name]) for name, weight in published_model().state_dict().items())
