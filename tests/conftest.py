"""What many tests share: reference figures, a tiny data set, a tiny training run."""

import json
import os
from dataclasses import asdict
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # tensors are tiny: more threads only wait for each other
os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton: kernels run without a GPU; 0: on it

from lib.cli import QUIET

os.environ.update(QUIET)  # as in a program of its own: before anything imports transformers

import numpy as np
import PIL.Image
import pytest
import torch
import torch.utils.data._utils

import train
from lib.checkpoints.native import LAST, new_model, read_checkpoint, write_weights
from lib.config import TrainSettings
from lib.runtime import versions
from lib.training.run_folder import Progress

torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.2  # seconds that a loader waits for a worker that met an error
ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
TINY_BERT = GOLDEN / "tiny_bert"
PUBLISHED = GOLDEN / "official_format_checkpoint.pth.tar"
SUBJECTS = ("man", "child", "boy", "dog", "woman", "skateboarder")
ACTIONS = ("holding a red ball", "near the park", "is jumping", "on a black bench", "and two dogs")


@pytest.fixture(scope="session")
def golden():
    """Reads a file of reference figures: golden("hinge_loss")["scores"]."""
    return lambda name: np.load(GOLDEN / f"{name}.npz")


@pytest.fixture(scope="session")
def make_data():
    """Writes a data set of random features in SCAN's layout; see `write_data`."""
    return write_data


def write_data(
    folder, images=None, regions=6, img_dim=16, repeats=("dev", "test", "testall"), dtype=np.float32
) -> Path:
    """images: number for each split. repeats: the splits whose file holds each image five times in a row."""
    rng = np.random.default_rng(0)
    folder = Path(folder)
    folder.mkdir(parents=True)
    for split, count in (images or {"train": 24, "dev": 10, "test": 10, "testall": 20}).items():
        features = rng.standard_normal((count, regions, img_dim)).astype(dtype)
        np.save(folder / f"{split}_ims.npy", features.repeat(5, axis=0) if split in repeats else features)
        captions = [
            f"A {rng.choice(SUBJECTS)} {rng.choice(ACTIONS)} number {' '.join(str(i))}." for i in range(5 * count)
        ]
        (folder / f"{split}_caps.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
        (folder / f"{split}_ids.txt").write_text("".join(f"{i}\n" for i in range(count)))
    return folder


def write_varying_data(folder, images) -> Path:
    """Images with 1 to 8 regions and 1 to 7 captions of 1 to 8 words and a number. images: number for each split."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for split, count in images.items():
        regions, captions = rng.integers(1, 9, size=count), rng.integers(1, 8, size=count)
        np.save(folder / f"{split}_ims.npy", rng.standard_normal((regions.sum(), 16)).astype(np.float32))
        np.save(folder / f"{split}_offsets.npy", np.cumsum([0, *regions]))
        words = ["man", "dog", "ball", "park", "bench", "red", "black"]
        lines = [" ".join([*rng.choice(words, size=rng.integers(1, 9)), *str(k)]) for k in range(captions.sum())]
        (folder / f"{split}_caps.txt").write_text("".join(f"{line}\n" for line in lines))
        (folder / f"{split}_caps_counts.txt").write_text("".join(f"{one}\n" for one in captions))
    return folder


def write_model(path, data, **settings):
    """A checkpoint of random weights."""
    torch.manual_seed(settings.pop("seed", 0))
    flags = TrainSettings(
        **{"bert": str(TINY_BERT), "bert_from_scratch": True, "embed_size": 16, "device": "cpu"},
        **{"data_path": str(data.parent), "data_name": data.name, **settings},
    )
    model, tokenizer, _ = new_model(asdict(flags))
    content = {"model": model.state_dict(), "architecture": model.architecture, "tokenizer": tokenizer.specification}
    content |= {"settings": asdict(flags), "progress": asdict(Progress()), "data": {}, "versions": versions()}
    write_weights(path, content)
    return path


def assert_same_weights(one, other):
    """Of two checkpoints, or of the last ones of two run folders: equal to the bit."""
    ours, theirs = (read_checkpoint(path / LAST if path.is_dir() else path)["model"] for path in (one, other))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


def write_pictures(folder, names):
    """Pictures of random colours, each another one."""
    for name in names:
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(list(name.encode()))
        coarse = PIL.Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((40, 30)).save(path)
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> tuple[str, str]:
    """(data_path, data_name) of a small random data set."""
    folder = write_data(tmp_path_factory.mktemp("data") / "tiny_precomp")
    return str(folder.parent), folder.name


@pytest.fixture(scope="session")
def tiny_flags(tiny_data) -> list[str]:
    """train.py's flags for a model and recipe small enough for a test; the run folder is to be added."""
    return [
        *("--data_path", tiny_data[0], "--data_name", tiny_data[1], "--bert", str(TINY_BERT)),
        "--bert_from_scratch",
        *("--img_dim", "16", "--embed_size", "16", "--batch_size", "8", "--workers", "0", "--device", "cpu"),
        *("--num_epochs", "1", "--log_step", "5"),
    ]


@pytest.fixture(scope="session")
def trained_run(tiny_flags, tmp_path_factory) -> Path:
    """The folder of a run of one epoch."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    assert train.main([*tiny_flags, "--model_name", str(folder)]) == 0
    return folder


@pytest.fixture
def double():
    """float64 as the default for new tensors."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def bert_without_dropout(folder: Path) -> str:
    """A copy of the tiny BERT, made in a folder, whose training draws no random numbers."""
    bert = folder / "bert"
    bert.mkdir()
    config = json.loads((TINY_BERT / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (bert / "config.json").write_text(json.dumps(config))
    (bert / "vocab.txt").write_bytes((TINY_BERT / "vocab.txt").read_bytes())
    return str(bert)
