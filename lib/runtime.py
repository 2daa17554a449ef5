"""The machine a program runs on: device, precision, random state, versions of packages."""

import os
import platform
import random
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lib import __version__, distributed
from lib.cli import InputError


@dataclass(frozen=True)
class Compute:
    """A device and the precision of matrix products: fp32, tf32 (CUDA: 10 bits of mantissa) or bf16 (bfloat16)."""

    device: torch.device
    precision: str

    def autocast(self) -> torch.autocast:
        """The context in which forward passes run; parameters, norms, exp and softmax stay in float32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    @property
    def half_features(self) -> bool:
        """Whether region features may be sent to the device in float16: the products round them as much anyway."""
        return self.precision != "fp32"

    def synchronize(self) -> None:
        """Wait until the device has done its work, before a clock is read."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def __str__(self) -> str:
        cuda = self.device.type == "cuda"
        name = torch.cuda.get_device_name(self.device) if cuda else f"{torch.get_num_threads()} threads"
        job = f", {distributed.world_size()} processes" if distributed.world_size() > 1 else ""
        return f"{self.device} ({name}), {self.precision}{job}"


def choose_compute(device: str = "auto", precision: str = "") -> Compute:
    """Resolve --device and --precision, and set PyTorch up for them. Raises InputError for a device that is not there.

    Each process of a job takes a GPU of its node.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if distributed.world_size() > 1 and device.startswith("cuda"):
        device = _gpu_of_this_process(device)
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise InputError(f"--device {device}: expected auto, cpu, cuda or cuda:N") from None
    if chosen.type not in ("cpu", "cuda"):
        raise InputError(f"--device {device}: expected auto, cpu, cuda or cuda:N")
    if chosen.type == "cuda" and not 0 <= (chosen.index or 0) < torch.cuda.device_count():
        raise InputError(
            f"--device {device}: PyTorch sees {torch.cuda.device_count()} CUDA devices here; use --device cpu"
        )
    precision = precision or ("tf32" if chosen.type == "cuda" else "fp32")
    if precision == "tf32" and chosen.type == "cpu":
        raise InputError("--precision tf32: needs a CUDA device; a CPU takes fp32 or bf16")
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    if chosen.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with it
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return Compute(chosen, precision)


def _gpu_of_this_process(device: str) -> str:
    if device != "cuda":
        raise InputError(f"--device {device}: each process of a job takes a GPU of its own; leave the number out")
    processes, devices = distributed.local_count(), torch.cuda.device_count()
    if processes > devices:
        raise InputError(f"--nproc_per_node {processes}: PyTorch sees {devices} CUDA devices here; or use --device cpu")
    return f"cuda:{distributed.local_rank()}"


ROOT = Path(__file__).resolve().parent.parent


def versions() -> dict[str, str]:
    """Versions by name. `git`: this code's commit, see `git_commit`."""
    packages = {name: metadata.version(name) for name in ("torch", "transformers", "tokenizers", "numpy")}
    return {"x-dim": __version__, "git": git_commit(ROOT), "python": platform.python_version(), **packages}


def git_commit(root: Path) -> str:
    """The commit checked out in a folder, with a + if tracked files differ from it; empty without git."""
    try:
        top, commit = _git(root, "rev-parse", "--show-toplevel", "HEAD").splitlines()
        if Path(top).resolve() != root.resolve():  # a folder within another project's checkout
            return ""
        return commit + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, ValueError, subprocess.SubprocessError):
        return ""


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's generators, those of all CUDA devices too."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state(device: torch.device) -> dict:
    """The state of all generators, in plain types and tensors."""
    numpy: Any = np.random.get_state()
    name, keys, *rest = numpy
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def restore_random_state(state: dict, device: torch.device) -> None:
    """Set all generators to a saved state; CUDA's only if it was saved and is there now."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
