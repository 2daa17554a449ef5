"""The shell scripts: every command that they would run has flags that the programs accept, with the recipe's values."""

import importlib
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lib.cli import Parser
from lib.config import CheckpointSettings, TrainSettings, parse

ROOT = Path(__file__).resolve().parents[1]
PYTHON = f"""#!{sys.executable} -IS
import os, shlex, sys
if sys.argv[1] != "-c" and sys.argv[1:3] != ["-m", "pip"]:  # these find that all packages are there
    open(os.environ["COMMANDS"], "a").write(shlex.join(sys.argv[1:]) + "\\n")
"""
GRID = {"image_encoder": "torchvision:resnet50", "image_size": 256, "encoder_lr": 0.01}
GRID |= {"freeze_epochs": 2, "thaw_epochs": 5}
SCRIPTS = sorted(path.name for path in ROOT.glob("train_*.sh"))


@pytest.fixture
def commands(tmp_path):
    """Runs a script with a stand-in for Python; returns the arguments of each command."""
    python, written = tmp_path / "python3", tmp_path / "commands"
    python.write_text(PYTHON)
    python.chmod(0o755)

    def run(script, *flags, **environment):
        path = f"{tmp_path}:{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "COMMANDS": str(written), "PYTHON": "", **environment}
        subprocess.run(["sh", script, *flags], cwd=ROOT, env=environment, check=True, capture_output=True)
        return [shlex.split(line) for line in written.read_text().splitlines()]

    return run


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_command_of_a_script_is_accepted(commands, script):
    parsed = {"train.py": TrainSettings, "test.py": CheckpointSettings, "testall.py": CheckpointSettings}
    programs = []
    for program, *flags in commands(script, "--log_step", "7", THAW="1"):
        programs.append(program)
        if program == "-m":
            command = importlib.import_module(f"lib.prepare.{flags[1]}")
            command.add_flags(parser := Parser())
            parser.parse_args(flags[2:])
            continue
        settings = parse(parsed[program], "", flags)
        assert program != "train.py" or settings.log_step == 7  # further flags are passed on
    assert "train.py" in programs


@pytest.mark.parametrize(("data", "epochs", "lr_update"), [("f30k", 25, 15), ("coco", 20, 10)])
@pytest.mark.parametrize("recipe", ["region", "ramped", "grid"])
def test_the_published_recipe(commands, recipe, data, epochs, lr_update):
    ((_, *flags),) = commands(f"train_{recipe}_{data}.sh", DATA_PATH="/a folder")
    settings = parse(TrainSettings, "", flags)
    published = TrainSettings(
        **{"data_path": "/a folder", "data_name": f"{data}_precomp", "model_name": f"runs/{data}_{recipe}"},
        **{"num_epochs": epochs, "lr_update": lr_update, "learning_rate": 5e-4, "batch_size": 128, "grad_clip": 2.0},
        **{"margin": 0.2, "vse_mean_warmup_epochs": 1, "log_step": 200, "embed_size": 1024},
        **(GRID if recipe == "grid" else {"img_dim": 2048}),
        **({"loss": "ramped", "gate": "open", "mask_padding": True} if recipe == "ramped" else {}),
    )
    assert settings == published


def test_nproc_starts_as_many_processes(commands):
    ((*launch, _), *_) = [line[:6] for line in commands("train_region_f30k.sh", NPROC="4")]
    assert launch == ["-m", "lib.distributed", "--standalone", "--nproc_per_node", "4"]


def test_a_python_that_is_named_is_taken_as_it_is(commands):
    with pytest.raises(subprocess.CalledProcessError):
        commands("train_region_f30k.sh", PYTHON="false")


def test_several_processes_end_as_one_does_where_there_is_no_data_set(tmp_path):
    processes = {"PYTHON": sys.executable, "NPROC": "2", "DATA_PATH": str(tmp_path)}
    ended = subprocess.run(
        ["sh", "train_region_f30k.sh"], cwd=ROOT, env={**os.environ, **processes}, capture_output=True, text=True
    )
    assert ended.returncode == 2
    assert "error: rank 0: no data set at " in ended.stderr
    assert "Traceback" not in ended.stderr
