"""Precision, determinism and the current device: in force while a model computes, and as they were afterwards."""

import os
from contextlib import contextmanager

import pytest
import torch

from lib.runtime import Compute, choose_compute

backends = torch.backends
PARTS = (backends.cuda.matmul, backends.mkldnn.matmul, backends.cudnn.conv, backends.cudnn.rnn)


def switches():
    """All that a `Compute` may set."""
    return {
        "newer": [part.fp32_precision for part in PARTS],
        "matmul": readable(torch.get_float32_matmul_precision),
        "cudnn": readable(lambda: backends.cudnn.allow_tf32),
        "deterministic": torch.get_deterministic_debug_mode(),
        "fill": torch.utils.deterministic.fill_uninitialized_memory,
        "cublas": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        "device": current[-1],
    }


def readable(read):
    try:
        return read()
    except RuntimeError:
        return "not readable"


def as_it_was(before):
    """A switch of the older kind that contradicts the newer ones cannot be read, nor put back; PyTorch ignores it."""
    after = switches()
    return before == {name: old if old == "not readable" else after[name] for name, old in before.items()}


current = [0]


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A stand-in for the current CUDA device; this process's own switches are put back."""

    @contextmanager
    def device(chosen):
        current.append(chosen.index)
        try:
            yield
        finally:
            current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = switches()
    yield
    older(before["matmul"], before["cudnn"])
    for part, precision in zip(PARTS, before["newer"], strict=True):
        newer(part, precision)
    torch.set_deterministic_debug_mode(before["deterministic"])
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def older(matmul, cudnn):
    torch.set_float32_matmul_precision(matmul)
    backends.cudnn.allow_tf32 = cudnn


def newer(part, precision):
    part.fp32_precision = precision


@pytest.mark.parametrize(
    "host",
    [
        lambda: None,
        lambda: older("medium", True),
        lambda: older("highest", False),
        lambda: newer(backends.cuda.matmul, "tf32"),
        lambda: newer(backends.cudnn.rnn, "ieee"),
        lambda: torch.use_deterministic_algorithms(True),
        lambda: os.environ.update(CUBLAS_WORKSPACE_CONFIG=":16:8"),
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.filterwarnings("error")
def test_what_a_model_computes_with_is_in_force_for_it_and_afterwards_all_is_as_it_was(host, precision):
    host()
    before, tf32 = switches(), precision == "tf32"
    compute = Compute(torch.device("cuda:1"), precision)
    with pytest.raises(KeyError), compute.in_force(), Compute(torch.device("cpu"), "bf16").in_force():
        raise KeyError
    assert as_it_was(before)
    with compute.in_force():
        here = switches()
        assert (here["matmul"], here["cudnn"]) == ("high" if tf32 else "highest", tf32)
        assert ["tf32" in one for one in here["newer"]] == [tf32] * 4
        assert (here["deterministic"], here["fill"], here["device"]) == (1, False, 1)
        assert here["cublas"] == (before["cublas"] or ":4096:8")
        with Compute(torch.device("cpu"), "fp32").in_force():
            assert torch.get_float32_matmul_precision() == "highest"
        assert switches() == here
    assert as_it_was(before)


def test_a_cpu_has_its_algorithms_as_they_are_and_choosing_a_device_sets_nothing(monkeypatch):
    before = switches()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_compute("cuda:1", "tf32") == Compute(torch.device("cuda:1"), "tf32")
    assert switches() == before
    with choose_compute("cpu").in_force():
        assert switches()["deterministic"] == before["deterministic"] == 0
