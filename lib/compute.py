"""Where and how exactly tensors are computed: the device and the precision of matrix products."""

import os
from dataclasses import dataclass

import torch

from lib import processes
from lib.errors import InputError


@dataclass(frozen=True)
class Compute:
    """A device and a precision: fp32 exact, tf32 (CUDA: products rounded to 10 bits), bf16 (products in bfloat16)."""

    device: torch.device
    precision: str

    def autocast(self) -> torch.autocast:
        """The context in which forward passes run; parameters, norms, exp and softmax stay in float32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    @property
    def half_features(self) -> bool:
        """Whether region features may travel in float16: where products round them as much anyway."""
        return self.precision != "fp32"

    def synchronize(self) -> None:
        """Wait until the device has done its work, so that a clock reads true."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def __str__(self) -> str:
        name = (
            torch.cuda.get_device_name(self.device)
            if self.device.type == "cuda"
            else f"{torch.get_num_threads()} threads"
        )
        job = f", {processes.count()} processes" if processes.count() > 1 else ""
        return f"{self.device} ({name}), {self.precision}{job}"


def choose_compute(device: str = "auto", precision: str = "") -> Compute:
    """Resolve --device and --precision, and set PyTorch up for them. Raises InputError for what is not there.

    The processes of a job take one GPU of their node each.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if processes.count() > 1 and device.startswith("cuda"):
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
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS may add up in any order
        torch.use_deterministic_algorithms(True, warn_only=True)
    return Compute(chosen, precision)


def _gpu_of_this_process(device: str) -> str:
    if device != "cuda":
        raise InputError(f"--device {device}: the processes of a job take one GPU each; leave the number out")
    if processes.local_count() > torch.cuda.device_count():
        raise InputError(
            f"--nproc_per_node {processes.local_count()}: PyTorch sees {torch.cuda.device_count()} CUDA devices here; "
            "start as many processes, or use --device cpu"
        )
    return f"cuda:{processes.local_rank()}"
