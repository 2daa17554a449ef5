"""Kills real trainings at random moments and compares what comes of them with one that ran through.

python -m tests.crash --kills 20

Each training is train.py with --resume auto in a process of its own, ended by SIGKILL while it starts, between
steps, in the middle of a save or of an evaluation, and started again by the same command. At the end all losses, the
weights, the scores on dev and the random state have to equal, to the bit, those of the uninterrupted run.
"""

import argparse
import math
import os
import random
import re
import sys
import tempfile
import time
from multiprocessing import Process
from pathlib import Path

import torch

import train
from lib.checkpoints.native import BEST, LAST, read_checkpoint
from tests.conftest import TINY_BERT, write_data
from tests.ranks import start

LOSS = re.compile(r"step (\d+) loss ([\d.]+) gradient ([\d.]+)")
MOMENTS = ("save", "step", "start", "save")
STEPS_BETWEEN_KILLS = 6  # at the most, where a kill waits for steps
STEPS_LATE = 30  # a kill may come this much later on a busy machine and still find the training running
STEPS_AN_EPOCH = 15  # of the tiny data set at batch 8


def flags_of(data: Path, folder: Path, epochs: int, workers: int) -> list[str]:
    flags = f"--img_dim 16 --embed_size 64 --batch_size 8 --device cpu --log_step 1 --save_steps 2 --workers {workers}"
    places = ["--data_path", str(data.parent), "--data_name", data.name, "--model_name", str(folder)]
    places += ["--bert", str(TINY_BERT), "--bert_from_scratch"]
    recipe = ["--num_epochs", str(epochs), "--lr_update", str(epochs - 1)]
    return [*flags.split(), *places, *recipe, "--resume", "auto"]


def run(flags: list[str], said: Path) -> None:
    """train.py in this process, which prints into a file."""
    with open(said, "w") as sys.stdout, open(said.with_suffix(".err"), "w") as sys.stderr:
        sys.exit(train.main(flags))


def steps_logged(folder: Path) -> int:
    log = folder / "run.log"
    return len(LOSS.findall(log.read_text())) if log.is_file() else 0


def wait_for(moment: str, process: Process, folder: Path, startup: float, rng: random.Random) -> None:
    """Come back at a moment of the training, or when it has ended."""
    starting = moment == "start"
    goal = steps_logged(folder) + (1 if starting else rng.randint(1, STEPS_BETWEEN_KILLS))
    latest = time.perf_counter() + rng.uniform(0, startup) if starting else math.inf
    while process.is_alive() and steps_logged(folder) < goal and time.perf_counter() < latest:
        time.sleep(0.001)
    if moment == "step":
        time.sleep(rng.uniform(0, 0.02))
    while moment == "save" and process.is_alive() and not any(n.endswith(".tmp") for n in os.listdir(folder)):
        pass


def kill_and_resume(flags: list[str], folder: Path, kills: int, startup: float, rng: random.Random) -> list[str]:
    """Train to the end in spite of all kills. Returns at which moments they came."""
    moments, said = [], folder.with_suffix(".out")
    while True:
        process = start(run, flags, said)
        if len(moments) < kills:
            moment = MOMENTS[len(moments) % len(MOMENTS)]
            wait_for(moment, process, folder, startup, rng)
            process.kill()
        process.join()
        if process.exitcode == 0:
            return moments
        if process.exitcode != -9:
            raise SystemExit(f"the resumed training failed: {said.with_suffix('.err').read_text()}")
        half_written = folder.is_dir() and any(folder.glob("*.tmp"))
        moments.append("save" if half_written else "start" if moment == "start" else "step")


def differences(one: Path, other: Path) -> list[str]:
    """What is not equal to the bit in two finished runs."""
    found = []
    losses = [{step: rest for step, *rest in LOSS.findall((f / "run.log").read_text())} for f in (one, other)]
    found += [f"the loss of step {step}" for step in losses[0] if losses[0][step] != losses[1].get(step)]
    for name in (LAST, BEST):
        a, b = (read_checkpoint(folder / name) for folder in (one, other))
        found += [f"{key} of {name}" for key in a["model"] if not torch.equal(a["model"][key], b["model"][key])]
        found += [f"progress of {name}"] * (a["progress"] != b["progress"])
    a, b = (read_checkpoint(folder / LAST)["random_state"]["torch"] for folder in (one, other))
    found += ["the random state"] * (not torch.equal(a, b))
    return found


def crash_test(scratch: Path, kills: int, seed: int, workers: int) -> str:
    """Run the whole comparison. Returns a line on what was done; raises SystemExit where the runs differ."""
    data = write_data(scratch / "data" / "tiny_precomp")
    epochs = 2 + kills * (STEPS_BETWEEN_KILLS + STEPS_LATE) // STEPS_AN_EPOCH
    started = time.perf_counter()
    kill_and_resume(flags_of(data, scratch / "whole", epochs, workers), scratch / "whole", 0, 0.0, random.Random())
    seconds, steps = time.perf_counter() - started, STEPS_AN_EPOCH * epochs

    flags = flags_of(data, scratch / "killed", epochs, workers)
    moments = kill_and_resume(flags, scratch / "killed", kills, seconds / epochs, random.Random(seed))
    if found := differences(scratch / "whole", scratch / "killed"):
        raise SystemExit(f"not equal after {len(moments)} kills: {', '.join(found)}")
    counts = ", ".join(f"{moments.count(name)} {words}" for name, words in WORDS.items())
    again = steps_logged(scratch / "killed") - steps
    return (
        f"{len(moments)} kills ({counts}), {steps} steps, {again} of them done twice: "
        "losses, weights, scores and random state equal the uninterrupted run's to the bit"
    )


WORDS = {"start": "while starting", "step": "between saves", "save": "in the middle of a save"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="how often training is killed")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--workers", type=int, default=0, help="loader processes of the trainings")
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        print(crash_test(Path(scratch), settings.kills, settings.seed, settings.workers))


if __name__ == "__main__":
    main()
