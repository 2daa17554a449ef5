"""No command holds a data set's features in memory."""

import tracemalloc

import pytest

from tests.prepare import samples
from tests.prepare.samples import make_images, prepare, write_captions, write_store, write_tsv

IMAGES, REGIONS, IMG_DIM = 150, 100, 100  # 6 MB


@pytest.mark.parametrize("command", ["tsv", "own", "pack", "verify"])
def test_memory_stays_below_a_quarter_of_the_features(tmp_path, capsys, monkeypatch, command):
    monkeypatch.setattr(samples, "IMG_DIM", IMG_DIM)
    images = make_images(range(1_000, 1_000 + IMAGES), (REGIONS,))
    store = write_store(tmp_path / "old", images, "train", boxes=False)
    rows = [{"image_id": image_id, "caption": f"a dog {k}"} for image_id in images for k in range(5)]
    argv = {
        "tsv": [write_tsv(tmp_path / "a.tsv", images), "--data_name", "new"],
        "own": [write_captions(tmp_path / "c.jsonl", rows), "--features", store, "--data_name", "new"],
        "pack": ["--data_name", "old"],
        "verify": ["--data_name", "old"],
    }[command]
    (store / "train_caps.txt").write_text("".join(f"{row['caption']}\n" for row in rows))
    del images
    tracemalloc.start()
    try:
        assert prepare(capsys, command, *argv, "--data_path", tmp_path)[0] == 0
        assert tracemalloc.get_traced_memory()[1] < (store / "train_ims.npy").stat().st_size / 4
    finally:
        tracemalloc.stop()
