"""The installed form: commands and the package xdim, which does what lib does, from any folder."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lib import load
from tests.conftest import ROOT

NEEDED = ("pyproject.toml", "requirements.txt", "README.md", "LICENSE", *(path.name for path in ROOT.glob("*.py")))
PIP = ("-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--no-compile")
COMMANDS = """
import sys
from importlib.metadata import distribution
for command in sorted(distribution("x-dim").entry_points, key=lambda one: one.name):
    sys.argv[0] = command.name
    try:
        code = command.load()(["--help"])
    except SystemExit as stopped:
        code = stopped.code
    print("done", command.name, code)
assert "torch" not in sys.modules
"""
SCORE = """
import runpy, sys, torch, xdim
from xdim.ablation import TRAIN
from xdim.training.run_folder import command_to_resume
run, regions, *sys.argv = sys.argv[1:]
print(xdim.load(run, device="cpu").score(torch.load(regions), ["a dog", "two men"]).tolist())
assert TRAIN.is_file() and command_to_resume("runs/a") == "xdim-train --resume runs/a"
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    assert not {"lib", "train"} & set(sys.modules)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The folder that pip has installed into, without a network."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "lib", source / "lib", ignore=shutil.ignore_patterns("__pycache__"))
    for name in NEEDED:
        shutil.copy(ROOT / name, source)
    subprocess.run([sys.executable, *PIP, "--target", str(target), str(source)], check=True, cwd=source)
    return target


def run(installed: Path, folder: Path, *arguments: object) -> str:
    """What Python prints in an empty folder, where only the installed form can be imported."""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=folder, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def test_only_xdim_is_installed_and_every_program_is_a_command(installed, tmp_path):
    folders = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert folders == {"bin", "xdim"}
    printed = run(installed, tmp_path, "-c", COMMANDS)
    wanted = {f"xdim-{name.removesuffix('.py')}" for name in NEEDED if name.endswith(".py")} - {"xdim-setup"}
    assert {path.name for path in (installed / "bin").iterdir()} == wanted | {"xdim-prepare"}
    assert [line for line in printed.splitlines() if line.startswith("done")] == [
        f"done {name} 0" for name in sorted(wanted | {"xdim-prepare"})
    ]
    assert "usage: xdim-prepare " in printed
    assert set(re.findall(r"[\w-]+\.py\b", printed)) == {"xdim.py"}  # the page of the paper, not a program


def test_the_installed_form_scores_as_lib_does_and_each_loads_what_the_other_wrote(installed, trained_run, tmp_path):
    regions = torch.randn(3, 6, 16, generator=torch.Generator().manual_seed(0))
    torch.save(regions, tmp_path / "regions.pt")
    scores = load(trained_run, device="cpu").score(regions, ["a dog", "two men"])
    share = [installed / "bin" / "xdim-share", "push", trained_run, "user/a", "--dry_run", "written"]
    printed = run(installed, tmp_path, "-c", SCORE, trained_run, tmp_path / "regions.pt", *share)
    assert printed.startswith(f"{scores.tolist()}\n")
    assert "xdim-train --data_name" in (tmp_path / "written" / "README.md").read_text()
    again = load(tmp_path / "written", device="cpu").score(regions, ["a dog", "two men"])
    assert torch.equal(again, scores)
