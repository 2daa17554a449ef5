"""What gpu.sh runs beside the benchmarks.

python benchmarks/gpu.py tests --json FILE     # tests/test_cuda.py, on what device and versions
python benchmarks/gpu.py demo --json FILE      # train_demo.sh: rSum beside that of the CPU
python benchmarks/gpu.py summary OUT           # gpu.md and gpu.json of the parts that have ended so far
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

CPU_RSUM = 413.7  # of the demo on two CPU threads, README.md
OUT_OF_TIME = ("124", "137")  # exit codes of timeout


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("what", choices=["tests", "demo", "summary"])
    flags.add_argument("folder", nargs="?", type=Path, help="where the parts have written, for the summary")
    flags.add_argument("--json", default="", help="write the figures to this file")
    flags.add_argument("--toy", action="store_true", help="changes nothing")
    settings = flags.parse_args()
    if settings.what == "summary":
        summarize(settings.folder)
    elif settings.what == "demo":
        run_demo(settings.json)
    else:
        sys.exit(run_tests(settings.json))


# Tests


class Outcomes:
    """A plugin of pytest that writes what became of the tests after each of them."""

    def __init__(self, path: str):
        self.path, self.about, self.started = path, describe_device(), time.perf_counter()
        self.counts, self.failures, self.skipped = Counter(passed=0, failed=0, skipped=0), {}, Counter()
        self.write()

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed:
            errors = [line[1:].strip() for line in report.longreprtext.splitlines() if line.startswith("E ")]
            self.failures[report.nodeid] = (errors or [""])[0]
        if report.skipped:
            self.skipped[report.longrepr[2]] += 1
        if report.when == "call" or not report.passed:
            self.counts[report.outcome] += 1
        self.write()

    def write(self) -> None:
        from benchmarks.common import write_json

        figures = {"tests/test_cuda.py": {**self.counts, "seconds": time.perf_counter() - self.started}}
        found = {"figures": figures, "failures": self.failures, "skipped": self.skipped, "about": self.about}
        write_json(self.path, found, "cuda" if self.about["gpus"] else "cpu")


def run_tests(path: str) -> int:
    """pytest's exit code; all tests are skipped where there is no GPU."""
    import pytest

    return pytest.main([str(ROOT / "tests" / "test_cuda.py"), "--durations=10"], plugins=[Outcomes(path)])


def describe_device() -> dict:
    import torch

    from lib.runtime import versions

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    about = {"gpus": count, "date": str(date.today()), "cuda": torch.version.cuda, **versions()}
    about["git"] = about["git"] or os.environ.get("COMMIT", "")
    if count:
        memory = torch.cuda.get_device_properties(0).total_memory
        about |= {"gpu": torch.cuda.get_device_name(), "memory_gib": memory / 2**30, "driver": driver()}
    try:
        import triton

        about["triton"] = triton.__version__
    except ImportError:
        about["triton"] = ""
    return about


def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return ""


# The demo


def run_demo(path: str) -> None:
    """Draw the data set, train and test as README.md says; its table gives the rSum."""
    import torch

    from benchmarks.common import write_json

    started, device = time.perf_counter(), "cuda" if torch.cuda.is_available() else "cpu"
    environment = {**os.environ, "RUN": str(Path(path).resolve().parent / "demo")}
    process = subprocess.Popen(["sh", "train_demo.sh"], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    figures = {"cpu_rsum": CPU_RSUM}
    for line in process.stdout:
        print(line, end="")
        if found := re.match(r"epoch (\d+) dev: .* rSum ([\d.]+)", line):
            figures |= {f"dev_rsum_{found[1]}": float(found[2])}
        if found := re.match(r"X-Dim .* ([\d.]+)$", line):
            figures |= {"rsum": float(found[1])}
        write_json(path, {"figures": {"demo": {**figures, "seconds": time.perf_counter() - started}}}, device)
    if process.wait() or "rsum" not in figures:
        sys.exit(process.returncode or "no table of results")


# The summary


def summarize(folder: Path) -> None:
    rows = [line.split("\t") for line in (folder / "parts.tsv").read_text(encoding="utf-8").splitlines()]
    parts = {name: {"outcome": outcome(code, said), "seconds": int(seconds)} for name, code, seconds, said in rows}
    for name, part in parts.items():
        if (path := folder / f"{name}.json").exists():
            part |= json.loads(path.read_text(encoding="utf-8"))
    (folder / "gpu.json").write_text(json.dumps(parts, indent=2) + "\n", encoding="utf-8")
    (folder / "gpu.md").write_text(report(parts), encoding="utf-8")


def outcome(code: str, said: str) -> str:
    if code == "skipped":
        return f"skipped: {said}"
    if code in OUT_OF_TIME:
        return f"out of time; its last line: {said}"
    return "done" if code == "0" else f"exit code {code}; its last line: {said}"


def report(parts: dict[str, dict]) -> str:
    tests = parts.get("tests", {})
    about = ", ".join(f"{name} {cell(value)}" for name, value in tests.get("about", {}).items() if value)
    lines = [tests.get("machine", "unknown machine"), "", about, "", "| part | seconds | outcome |", "|---|---|---|"]
    lines += [f"| {name} | {part['seconds']} | {cell(part['outcome'])} |" for name, part in parts.items()]
    for name, part in parts.items():
        lines += ["", f"### {name}", "", *table(part["figures"])] if part.get("figures") else []
        notes = [f"* failed: {test}: {why}" for test, why in part.get("failures", {}).items()]
        notes += [f"* {count} tests: {why}" for why, count in part.get("skipped", {}).items()]
        lines += ["", *notes] if notes else []
    return "\n".join(lines) + "\n"


def table(figures: dict[str, dict]) -> list[str]:
    """Rows by name, a column for each figure that any of them has."""
    columns = list(dict.fromkeys(key for row in figures.values() for key in row))
    names = [{"bytes": "GB"}.get(key, key.replace("_", " ")) for key in columns]
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(columns) + 1) + "|"]
    for name, row in figures.items():
        gigabytes = {"bytes": row["bytes"] / 1e9} if "bytes" in row else {}
        lines.append(f"| {name} | {' | '.join(cell((row | gigabytes).get(key)) for key in columns)} |")
    return lines


def cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    return "" if value is None else str(value).replace("|", "/")


if __name__ == "__main__":
    main()
