"""Every benchmark runs at toy size and writes its figures. What it would start as a process runs within the test."""

import importlib
import io
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import evaluate

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
SMALL = ["--embed_size", "16", "--rounds", "1", "--device", "cpu", "--toy"]
FLAGS = {
    "evaluate": ["--images", "4", "--ways", "float32, best 20 exact"],
    "loader": ["--batch_size", "8", "--batches", "4", "--img_dim", "4", "--workers", "0"],
    "micro_batch": ["--batch_size", "5", "--steps", "1"],
    "protocols": [],
    "scaling": ["--batch_size", "4", "--steps", "1", "--processes", "1"],
    "similarities": ["--batch_size", "4"],
    "similarity": ["--images", "4", "--captions", "4", "--some", "2", "--loop", "2", "--rerank", "2"],
    "train_step": ["--batch_size", "4"],
    "training": ["--batch_size", "4", "--steps", "1"],
}


class Pool:
    """A pool of processes that is this one."""

    def __init__(self, _): ...

    def __enter__(self):
        return self

    def __exit__(self, *_): ...

    def apply(self, function, arguments):
        return function(*arguments)


def run_within(command, **_):
    """subprocess.run of one of the project's programs, within this process."""
    number = next(k for k, word in enumerate(command) if word.endswith(".py"))
    folder, program = Path(command[number]).parent.name, Path(command[number]).stem
    module = importlib.import_module(f"benchmarks.{program}" if folder == "benchmarks" else program)
    flags = list(map(str, command[number + 1 :]))
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        patch.setattr(sys, "argv", [command[number], *flags])
        patch.setenv("TORCHELASTIC_RUN_ID", "within")  # scaling.py looks whether it is one of the processes
        code = module.main() if folder == "benchmarks" else module.main(flags)
    return SimpleNamespace(returncode=code, poll=lambda: code or 0, stdout=printed.getvalue())


def test_every_benchmark_is_run_here():
    assert {path.stem for path in BENCHMARKS.glob("*.py")} == {*FLAGS, "common"}


@pytest.mark.parametrize("name", FLAGS)
def test_a_benchmark_writes_figures(name, tmp_path, monkeypatch, capsys):
    benchmark = importlib.import_module(f"benchmarks.{name}")
    processes = SimpleNamespace(run=run_within, Popen=run_within, DEVNULL=None, PIPE=None)
    pools = SimpleNamespace(get_context=lambda _: SimpleNamespace(Pool=Pool), active_children=list)
    for module in (benchmark, evaluate):
        monkeypatch.setattr(module, "subprocess", processes, raising=False)
        monkeypatch.setattr(module, "multiprocessing", pools, raising=False)
    folder = ["--folder", str(tmp_path / "data")] if name == "loader" else []
    program = str(BENCHMARKS / f"{name}.py")
    monkeypatch.setattr(sys, "argv", [program, *SMALL, *FLAGS[name], *folder, "--json", str(tmp_path / "figures.json")])
    benchmark.main()
    written = json.loads((tmp_path / "figures.json").read_text())
    assert written["machine"] in capsys.readouterr().out
    assert written["figures"]
