"""Every benchmark runs at toy size and writes its figures. What it would start as a process runs within the test."""

import importlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import evaluate, gpu, training

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
SCRIPT = (BENCHMARKS / "gpu.sh").read_text()
PARTS = re.findall(r"^ *part (\w+) (\d+) benchmarks/(\w+)\.py ?(.*)$", SCRIPT, flags=re.MULTILINE)
SMALL = ["--embed_size", "16", "--rounds", "1", "--device", "cpu", "--toy"]
FLAGS = {
    "evaluate": ["--images", "4", "--ways", "float32, best 20 exact"],
    "loader": ["--batch_size", "8", "--batches", "4", "--img_dim", "4", "--workers", "0"],
    "micro_batch": ["--batch_size", "5", "--steps", "1"],
    "protocols": [],
    "scaling": ["--batch_size", "4", "--steps", "1", "--processes", "1"],
    "similarities": ["--batch_size", "4"],
    "search": [],
    **{name: shlex.split(flags) for name, _, program, flags in PARTS if program != "gpu"},
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
    assert {path.stem for path in BENCHMARKS.glob("*.py")} == {*FLAGS, "common", "gpu"}  # the last by gpu.sh, below


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
    if name in [part for part, *_ in PARTS]:
        rows = [line.split(" | ")[0] for line in gpu.table(written["figures"])]
        assert rows[2:] == [f"| {row}" for row in written["figures"]]


def test_the_profile_of_a_step_counts_launches_waits_and_the_share_that_the_gpu_is_busy(monkeypatch):
    def event(name, start, end, device="CUDA"):
        return SimpleNamespace(
            name=name, time_range=SimpleNamespace(start=start, end=end), device_type=SimpleNamespace(name=device)
        )

    seen = [event("mm", 0, 3000), event("add", 3000, 4000), event("mm", 9000, 12000), event("add", 10000, 11000)]
    seen += [event(name, 0, 50, "CPU") for name in ("cudaLaunchKernel", "cudaStreamSynchronize", "cudaMemcpyAsync")]
    monkeypatch.setattr(training, "profile", lambda activities: nullcontext(SimpleNamespace(events=lambda: seen)))
    monkeypatch.setattr(training, "PROFILED", 2)
    monkeypatch.setattr(training.torch.cuda, "synchronize", lambda: None)
    figures, kernels = training.look_at(lambda: None)
    assert figures == pytest.approx({"launches": 2, "waits": 0.5, "busy": 7 / 12, "gap_milliseconds": 5})
    assert kernels == {"mm": pytest.approx([1, 3]), "add": pytest.approx([1, 1])}


# gpu.sh


SUMMARY = f"""#!/bin/sh
[ "$2" = summary ] && exec {sys.executable} "$@"
"""
MISHAPS = f"""{SUMMARY}
case "$1 $2" in
    *"gpu.py tests") cp FOLDER/tests.json FOLDER/out ;;
    *similarity.py*) echo "out of memory"; exit 3 ;;
    *training.py*) exec {sys.executable} -c '
import json, sys
json.dump({{"figures": {{"bf16": {{"bytes": 10**9, "seconds": 0.5}}}}}}, open(sys.argv[-1], "w"))
print("half of it"); sys.exit(124)' "$@" ;;
esac
"""
TESTS = """
import pytest
def test_a(): pass
def test_b(): assert 1 > 2
@pytest.mark.skip(reason="needs a GPU")
def test_c(): pass
"""


def run_script(folder, python, *flags):
    """gpu.sh with a Python that runs the summary, and what is given in place of the parts."""
    (folder / "python").write_text(python)
    (folder / "python").chmod(0o755)
    environment = {**os.environ, "PYTHON": str(folder / "python")}
    command = ["sh", str(BENCHMARKS / "gpu.sh"), str(folder / "out"), *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    parts = json.loads((folder / "out" / "gpu.json").read_text())
    assert list(parts) == [name for name, *_ in PARTS]
    text = (folder / "out" / "gpu.md").read_text()
    assert text in done.stdout
    return done, parts, text


def test_the_script_for_a_gpu_says_in_toy_mode_what_it_leaves_out(tmp_path):
    done, parts, text = run_script(tmp_path, f"{SUMMARY}exit 0", "--toy")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {name for name, part in parts.items() if part["outcome"] != "done"} == {"demo"}
    assert "| demo | 0 | skipped: toy mode" in text


def test_a_part_that_fails_or_is_cut_off_is_reported_and_the_next_one_runs(tmp_path, monkeypatch):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_cuda.py").write_text(TESTS)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    assert gpu.run_tests(str(tmp_path / "tests.json")) == 1
    done, parts, text = run_script(tmp_path, MISHAPS.replace("FOLDER", str(tmp_path)))
    assert done.returncode == 1
    (tests,) = parts["tests"]["figures"].values()
    assert (tests["passed"], tests["failed"], tests["skipped"]) == (1, 1, 1)
    assert parts["tests"]["machine"] in text
    assert "test_cuda.py::test_b: assert 1 > 2\n* 1 tests: Skipped: needs a GPU\n" in text
    assert parts["similarity"]["outcome"] == "exit code 3; its last line: out of memory"
    assert parts["training"]["outcome"] == "out of time; its last line: half of it"
    assert parts["scoring"]["outcome"] == parts["demo"]["outcome"] == "done"
    assert "| bf16 | 1 | 0.5 |" in text
    assert "similarity: exit code 3: out of memory" in done.stdout
    assert sum(int(limit) for _, limit, *_ in PARTS) <= 480
