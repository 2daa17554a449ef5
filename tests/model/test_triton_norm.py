"""The Triton kernel without a GPU: its arithmetic in Triton's interpreter, and that it compiles for GPUs."""

import subprocess
import sys

import pytest
import torch

from lib.model.engine import autograd, make_engine
from lib.model.engine.norms import FactorNorm
from tests.model.test_engine import assert_close_to_largest, make, random_inputs, single

pytest.importorskip("triton", reason="PyTorch without CUDA comes without Triton")


@pytest.fixture
def fused(monkeypatch):
    """The module, its kernel run by the interpreter (tests/conftest.py) in small blocks."""
    from lib.model.engine import triton_norm as fused_norm

    small = {"WORDS": 16, "ROWS": 32, "DIMS": 16}
    monkeypatch.setattr(fused_norm, "BLOCKS", {torch.float16: small, torch.float32: small})  # it has no bfloat16
    fused_norm.works.cache_clear()
    return fused_norm


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 0.005)])
@pytest.mark.parametrize("triangular", [True, False])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("images", "words", "regions", "dims"), [(1, 1, 1, 16), (2, 33, 36, 80), (1, 5, 3, 90)])
def test_the_kernel_gives_the_norms_of_plain_products(
    fused, dtype, tolerance, triangular, shared, images, words, regions, dims
):
    generator = torch.Generator().manual_seed(0)
    shapes = ((images, words, regions), (images, regions, dims), (1 if shared else images, words, dims), (dims, dims))
    *inputs, factor = (torch.randn(shape, generator=generator) for shape in shapes)
    factor = factor.triu() if triangular else factor
    actual = fused.TritonNorm(factor.to(dtype), triangular)(*(part.to(dtype) for part in inputs))
    torch.testing.assert_close(actual, FactorNorm(factor, triangular)(*inputs), rtol=tolerance, atol=tolerance)


def test_scores_and_gradients_by_way_of_the_kernel_are_those_of_the_formulas(fused, monkeypatch):
    monkeypatch.setattr(autograd, "_triton_norm", lambda device, dtype: fused.TritonNorm)
    model, inputs = make(dims=32), random_inputs(4, [3, 8, 1, 3], 6, 32)
    expected = model(*inputs)
    plain = torch.autograd.grad(expected[0].sum(), inputs[:2], retain_graph=True)
    model, inputs = model.float(), single(inputs)
    engine = make_engine("tiled", model)
    scores = engine(*inputs)
    scorer = engine.scorer()
    coarse = scorer.all_pairs(inputs[0], scorer.captions(*inputs[1:]))
    assert_close_to_largest(coarse.double(), expected, 1e-5)
    assert_close_to_largest(scores.double(), expected, 1e-5)
    for ours, theirs in zip(torch.autograd.grad(scores[0].sum(), inputs[:2]), plain, strict=True):
        assert_close_to_largest(ours.double(), theirs, 1e-4)


def test_a_kernel_that_cannot_be_built_or_computes_nonsense_is_said_and_not_used(fused, monkeypatch):
    assert fused.works(torch.device("cpu"), torch.float32)

    def broken(*_):
        raise RuntimeError("Failed to find C compiler\nand more")

    monkeypatch.setattr(fused.TritonNorm, "__call__", broken)
    with pytest.warns(UserWarning, match="scoring is slower: RuntimeError: Failed to find C compiler$"):
        assert not fused.works(torch.device("cpu"), torch.bfloat16)
    fused.works.cache_clear()
    monkeypatch.setattr(fused.TritonNorm, "__call__", lambda *_: torch.ones(2, 5))
    with pytest.warns(UserWarning, match="other norms"):
        assert not fused.works(torch.device("cpu"), torch.bfloat16)


def test_only_cuda_with_rounded_products_takes_the_kernel(monkeypatch):
    monkeypatch.setattr("lib.model.engine.triton_norm.works", lambda *_: True)
    cuda = torch.device("cuda")
    assert autograd._triton_norm(cuda, torch.bfloat16)
    assert not autograd._triton_norm(cuda, torch.float32)
    assert not autograd._triton_norm(torch.device("cpu"), torch.bfloat16)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert autograd._triton_norm(cuda, torch.float32)
    assert not autograd._triton_norm(cuda, torch.float64)


COMPILE = """
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from lib.model.engine.triton_norm import BLOCKS, LAUNCH, _squares

for capability, limit in {80: 163, 86: 99, 89: 99, 90: 227, 120: 99}.items():  # KiB of shared memory
    for dtype, pointer in ((torch.bfloat16, "*bf16"), (torch.float32, "*fp32")):
        constants = dict(COUNT=36, PADDED=64, TRIANGULAR=True, **BLOCKS[dtype])
        signature = dict.fromkeys(("attention", "regions", "weights", "factor"), pointer) | dict(squares="*fp32")
        signature |= dict.fromkeys(("words", "dims", "weights_step"), "i32") | dict.fromkeys(constants, "constexpr")
        divisible = {(i,): [["tt.divisibility", 16]] for i in (0, 1, 2, 3, 4, 6, 7)}
        source = ASTSource(_squares, signature, constexprs=constants, attrs=divisible)
        compiled = compile(source, target=GPUTarget("cuda", capability, 32), options=LAUNCH)
        assert compiled.asm["cubin"]
        assert compiled.metadata.shared <= 1024 * limit, (capability, dtype)
"""


def test_the_kernel_compiles_for_gpus_and_fits_their_shared_memory(tmp_path, monkeypatch):
    """In a process of its own: here the interpreter may have taken the kernel's place."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
