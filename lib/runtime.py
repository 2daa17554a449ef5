"""The machine a program runs on: device, precision, random state, versions of packages."""

import os
import platform
import random
import re
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, cast

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

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """While it lasts PyTorch computes as chosen here, backward passes too; afterwards its switches are as before.

        float32 products are exact but for tf32, in cuDNN's recurrent layers too, which have a switch of their own. On
        CUDA algorithms are deterministic where there are such, and the device is the current one. All threads share the
        switches: where two overlap in here, they are not put back right.
        """
        backends: Any = torch.backends
        with ExitStack() as undo:
            for part in (backends.cuda.matmul, backends.mkldnn.matmul, backends.cudnn.conv, backends.cudnn.rnn):
                undo.callback(setattr, part, "fp32_precision", part.fp32_precision)
            with suppress(RuntimeError):  # these cannot be read where only the newer switches above have been set
                undo.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            with suppress(RuntimeError):
                undo.callback(setattr, backends.cudnn, "allow_tf32", backends.cudnn.allow_tf32)
            torch.set_float32_matmul_precision("high" if self.precision == "tf32" else "highest")
            backends.cudnn.allow_tf32 = self.precision == "tf32"
            if self.device.type == "cuda":
                more: Any = torch.utils.deterministic
                undo.enter_context(torch.cuda.device(self.device))
                undo.callback(torch.set_deterministic_debug_mode, torch.get_deterministic_debug_mode())
                undo.callback(setattr, more, "fill_uninitialized_memory", more.fill_uninitialized_memory)
                torch.set_deterministic_debug_mode("warn")
                more.fill_uninitialized_memory = False  # else every torch.empty is filled with NaN
                if "CUBLAS_WORKSPACE_CONFIG" not in os.environ:
                    undo.callback(os.environ.pop, "CUBLAS_WORKSPACE_CONFIG", None)
                    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS is deterministic only with it
            yield

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
    """Resolve --device and --precision; each process of a job takes a GPU of its node. Raises InputError."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if distributed.world_size() > 1 and device.startswith("cuda"):
        device = _gpu_of_this_process(device)
    if not re.fullmatch(r"cpu|cuda(:\d{1,2})?", device):
        raise InputError(f"--device {device}: expected auto, cpu, cuda or cuda:N")
    chosen = torch.device(device)
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"--device {device}: PyTorch sees {torch.cuda.device_count()} CUDA devices here; use --device cpu"
        )
    precision = precision or ("tf32" if chosen.type == "cuda" else "fp32")
    if precision == "tf32" and chosen.type == "cpu":
        raise InputError("--precision tf32: needs a CUDA device; a CPU takes fp32 or bf16")
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
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    if (root / ".git").exists():  # it is no folder within another project's checkout
        with suppress(OSError):
            return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return ""


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's generators, those of all CUDA devices too."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state(device: torch.device) -> dict:
    """The state of all generators, in plain types and tensors."""
    name, keys, *rest = cast(Any, np.random.get_state())
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
