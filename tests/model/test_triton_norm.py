"""The Triton kernel without a GPU: its arithmetic in Triton's interpreter, and that it compiles for GPUs."""

import subprocess
import sys
from contextlib import nullcontext

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

    small = {64: (16, 32, 16)}
    monkeypatch.setattr(fused_norm, "BLOCKS", {2: small, 4: small})
    fused_norm.works.cache_clear()
    return fused_norm


def random_norm_inputs(images, words, regions, dims, triangular=True, shared=True):
    """Attention as a tile has it, with images second in memory, regions, words, factor."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((words, images, regions), (images, regions, dims), (1 if shared else images, words, dims), (dims, dims))
    attention, *others, factor = (torch.randn(shape, generator=generator) for shape in shapes)
    return attention.transpose(0, 1), *others, factor.triu() if triangular else factor


# the interpreter has no bfloat16
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 0.005)])
@pytest.mark.parametrize("triangular", [True, False])
@pytest.mark.parametrize(("images", "words", "regions", "dims"), [(1, 1, 1, 16), (2, 33, 36, 80), (2, 5, 3, 90)])
def test_the_kernel_gives_the_norms_of_plain_products(
    fused, dtype, tolerance, triangular, images, words, regions, dims
):
    *inputs, factor = random_norm_inputs(images, words, regions, dims, triangular)
    actual = fused.TritonNorm(factor.to(dtype), triangular)(*(part.to(dtype) for part in inputs))
    torch.testing.assert_close(actual, FactorNorm(factor, triangular)(*inputs), rtol=tolerance, atol=tolerance)


def test_the_kernel_is_for_shared_words_and_for_as_many_regions_as_its_blocks_fit(fused, monkeypatch):
    launched = []
    monkeypatch.setattr(fused, "norms", lambda *inputs, norms=fused.norms: launched.append(1) or norms(*inputs))

    def launches(regions, shared):
        *inputs, factor = random_norm_inputs(2, 3, regions, 16, shared=shared)
        norm = fused.TritonNorm(factor, True)
        norm(*inputs)  # looks once whether the kernel works
        launched.clear()
        torch.testing.assert_close(norm(*inputs), FactorNorm(factor, True)(*inputs))
        assert norm.wide(inputs[1]) == (2 if regions > 64 else 0)
        assert norm.wide(inputs[1], pairs=True) == 2  # which the kernel leaves to plain products
        return len(launched)

    assert [launches(64, True), launches(65, True), launches(64, False)] == [1, 0, 0]


def test_scores_and_gradients_by_way_of_the_kernel_are_those_of_the_formulas(fused, monkeypatch):
    monkeypatch.setattr(autograd, "_factor_norm", lambda device, dtype: fused.TritonNorm)
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
    device, small, out_of = torch.device("cpu"), 16, "out of resource: shared memory"
    assert fused.works(device, torch.float32, small)
    assert not fused.works(device, torch.float32, 128)  # no block for so many, which is no fault

    class OutOfResources(Exception):  # no RuntimeError, as Triton's
        pass

    def broken(*_):
        raise OutOfResources(f"{out_of}\nand more")

    monkeypatch.setattr(fused, "norms", broken)
    with pytest.warns(UserWarning, match=f"cpu for 64 regions, scoring is slower: OutOfResources: {out_of}$"):
        assert not fused.works(device, torch.float32, 64)
    *inputs, factor = random_norm_inputs(2, 3, 33, 16)
    torch.testing.assert_close(fused.TritonNorm(factor, True)(*inputs), FactorNorm(factor, True)(*inputs))

    fused.works.cache_clear()
    monkeypatch.setattr(fused, "norms", lambda *_: torch.ones(2, 5))
    with pytest.warns(UserWarning, match="other norms"):
        assert not fused.works(device, torch.float32, small)


def test_only_cuda_with_rounded_products_takes_the_kernel(fused, monkeypatch):
    cuda = torch.device("cuda")
    assert autograd._factor_norm(cuda, torch.bfloat16) is fused.TritonNorm
    assert autograd._factor_norm(cuda, torch.float32) is FactorNorm
    assert autograd._factor_norm(torch.device("cpu"), torch.bfloat16) is FactorNorm
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert autograd._factor_norm(cuda, torch.float32) is fused.TritonNorm
    assert autograd._factor_norm(cuda, torch.float64) is FactorNorm


def test_the_kernel_is_launched_on_the_device_of_its_tensors(fused, monkeypatch):
    """Triton takes the current device."""
    devices = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: devices.append(device) or nullcontext())
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    *inputs, factor = random_norm_inputs(2, 3, 5, 16)
    fused.norms(*inputs, factor, True)
    assert devices == [inputs[0].device]


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from lib.model.engine.triton_norm import BLOCKS, LAUNCH, _squares

LIMITS = {80: 163, 86: 99, 90: 227, 120: 99}  # KiB of shared memory by compute capability
KINDS = [(size, most, blocks) for size, of_size in BLOCKS.items() for most, blocks in of_size.items()]
for capability, limit in LIMITS.items():
    for size, most, (words, rows, dims) in KINDS:
        pointer = {2: "*bf16", 4: "*fp32"}[size]
        constants = dict(PADDED=most, TRIANGULAR=True, WORDS=words, ROWS=rows, DIMS=dims)
        signature = dict.fromkeys(("attention", "regions", "weights", "factor"), pointer) | dict(squares="*fp32")
        signature |= dict.fromkeys(("words", "dims", "count", "image_step", "word_step"), "i32")
        signature |= dict.fromkeys(constants, "constexpr")
        divisible = {(i,): [["tt.divisibility", 16]] for i in (0, 1, 2, 3, 4, 6)}
        source = ASTSource(_squares, signature, constexprs=constants, attrs=divisible)
        compiled = compile(source, target=GPUTarget("cuda", capability, 32), options=LAUNCH)
        assert compiled.asm["cubin"]
        assert compiled.metadata.shared <= 1024 * limit, (capability, size, most)
"""


def test_the_kernel_compiles_for_gpus_and_fits_their_shared_memory(tmp_path, monkeypatch):
    """In a process of its own: here the interpreter may have taken the kernel's place."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
