"""Variants of the model x seeds: trained one after the other, evaluated on one split, compared on the same queries.

FOLDER/VARIANT-seedN/     the run folders; a rerun continues what is not finished
FOLDER/table.json         the table               FOLDER/curves.csv   rSum on dev after each epoch of each run
"""

import csv
import io
import re
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lib.checkpoints.native import BEST
from lib.checkpoints.record import read_record
from lib.cli import InputError, TrainingStopped
from lib.config import AblationSettings, EvaluationSettings, TrainSettings, parse
from lib.evaluation.evaluate import evaluate, open_split_of, write_json
from lib.evaluation.metrics import bootstrap, interval, p_value, rank_matrix, retrieval_metrics, t_test
from lib.files import replacing
from lib.model.registry import PAPERS_GATE, describe
from lib.runtime import ROOT

INSTALLED = Path(__file__).with_name("programs")  # of the package xdim, see setup.py
TRAIN = (INSTALLED if INSTALLED.is_dir() else ROOT) / "train.py"
SPEED = re.compile(r" ([\d.]+) pairs/s")


class Run(NamedTuple):
    """One variant with one seed."""

    variant: str  # SIMILARITY or SIMILARITY:GATE, and further flags for train.py
    seed: int
    folder: Path

    def flags(self) -> list[str]:
        """What the run has beyond the flags of all: the variant's, its seed and its folder."""
        name, *others = self.variant.split()
        similarity, _, gate = name.partition(":")
        of_variant = ["--similarity", similarity, "--gate", gate or PAPERS_GATE, *others]
        return [*of_variant, "--seed", str(self.seed), "--model_name", str(self.folder), "--resume", "auto"]


class Outcome(NamedTuple):
    """The result of a run on the split."""

    rsum: float
    draws: np.ndarray  # rSum of each draw of the bootstrap
    step_ms: float | None  # median over the lines of its log, if they have a speed


def ablate(settings: AblationSettings, flags: Sequence[str]) -> dict:
    """Train and evaluate what is not done yet, print the table, write it and the curves. flags: for train.py.

    A run that stops (with a NaN loss, say) is left out of the table, which says so. Returns the table's content. Raises
    InputError, or TrainingStopped where nothing is left to compare with.
    """
    folder, reference = Path(settings.folder), settings.variants[0]
    runs = [
        Run(variant, seed, folder / "-".join([*re.findall(r"[\w.]+", variant), f"seed{seed}"]))
        for seed in settings.seeds
        for variant in settings.variants
    ]
    contents = [_untrained(run, flags) for run in runs]  # all flags and the split, before hours of training
    split, _ = open_split_of(contents[:1], EvaluationSettings(checkpoint=(str(folder),), split=settings.split))
    of_runs = {run: _evaluate(run.folder, settings.split, split.image_of_caption) for run in runs if _train(run, flags)}
    stopped = [f"{run.variant} seed {run.seed}" for run in runs if run not in of_runs]
    outcomes: dict[str, dict[int, Outcome]] = {variant: {} for variant in settings.variants}
    for run, outcome in of_runs.items():
        outcomes[run.variant][run.seed] = outcome
    if not outcomes[reference]:
        raise TrainingStopped(f"no run of {reference} has come to its end: there is nothing to compare with")
    table = {variant: _summarize(some, outcomes[reference]) for variant, some in outcomes.items() if some}
    results = {"split": settings.split, "flags": list(flags), "variants": table, "stopped": stopped}
    print(f"\n{_show(results)}")
    write_json(str(folder / "table.json"), results)
    _write_curves(folder / "curves.csv", of_runs)
    return results


def _untrained(run: Run, flags: Sequence[str]) -> dict:
    """What a run's checkpoints will say of its model and its data. Raises InputError for wrong flags."""
    trained = vars(parse(TrainSettings, "", [*flags, *run.flags()], command="train.py"))
    try:
        return {"settings": trained, "architecture": describe(trained), "path": run.folder, "notes": []}
    except ValueError as error:
        raise InputError(f"--variants {run.variant}: {error}") from None


def _train(run: Run, flags: Sequence[str]) -> bool:
    """Train what is left of a run, in a process of its own; whether it has come to its end."""
    print(f"\n{run.variant}, seed {run.seed}", flush=True)
    code = _run([sys.executable, str(TRAIN), *flags, *run.flags()])
    if code not in (0, TrainingStopped.exit_code):
        sys.exit(code)  # train.py has said why: wrong flags, or an interruption
    return code == 0


def _run(command: Sequence[str]) -> int:
    """Run a program to its end; its exit code. It gets a Ctrl-C too, and is waited for while it saves."""
    process = subprocess.Popen(command)
    while True:
        with suppress(KeyboardInterrupt):
            return process.wait()


def _evaluate(folder: Path, split_name: str, image_of_caption: np.ndarray) -> Outcome:
    """The outcome of a run's best checkpoint, whose scores are kept beside it."""
    trained, scores = (read_record(folder) or {})["settings"], folder / f"{split_name}_sims.npy"
    same = {name: trained[name] for name in ("batch_size", "workers", "device", "precision")}
    settings = EvaluationSettings(checkpoint=(str(folder),), split=split_name, **same)
    if not scores.is_file() or scores.stat().st_mtime < (folder / BEST).stat().st_mtime:
        evaluate(replace(settings, save_sims=str(scores)))
    ranks = rank_matrix(np.load(scores), image_of_caption)
    speeds = [float(speed) for speed in SPEED.findall((folder / "run.log").read_text(encoding="utf-8"))]
    speed = statistics.median(speeds) if speeds else 0.0
    step = 1000 * trained["batch_size"] / speed if speed else None
    return Outcome(retrieval_metrics(ranks)["rsum"], bootstrap(ranks, image_of_caption)["rsum"], step)


def _summarize(outcomes: Mapping[int, Outcome], reference: Mapping[int, Outcome]) -> dict:
    """Mean and spread over seeds; the difference from the reference on the seeds that both have: over draws of queries,
    the same for both, and over seeds.
    """
    rsums = [outcome.rsum for outcome in outcomes.values()]
    steps = [outcome.step_ms for outcome in outcomes.values() if outcome.step_ms]
    pairs = [(outcomes[seed], reference[seed]) for seed in outcomes if seed in reference]
    differences = np.array([ours.rsum - theirs.rsum for ours, theirs in pairs])
    of_queries = None
    if pairs:
        draws = np.mean([ours.draws - theirs.draws for ours, theirs in pairs], axis=0)
        of_queries = {"interval": interval(draws), "p": p_value(draws)}
    return {
        "rsum": statistics.mean(rsums),
        "spread": statistics.stdev(rsums) if len(rsums) > 1 else None,
        "rsums": rsums,
        "step_ms": statistics.median(steps) if steps else None,
        "difference": differences.mean() if pairs else None,
        "of_queries": of_queries,
        "of_seeds": t_test(differences),
    }


def _show(results: dict) -> str:
    """The table; differences are from its first row."""
    first = f"{{:<{max(map(len, results['variants'])) + 2}}}"
    layout = first + "{:>7}{:>8}{:>11}{:>12}{:>18}{:>7}{:>18}{:>7}  {}"
    head = "", "rSum", "spread", "ms a step", "difference", "95 % of queries", "p", "95 % of seeds", "p", "of each seed"
    lines = [layout.format(*head)]
    for name, row in results["variants"].items():
        shown = {} if len(lines) == 1 else row
        cells = [_format(row[key], form) for key, form in (("rsum", ".1f"), ("spread", ".1f"), ("step_ms", ".0f"))]
        cells.append(_format(shown.get("difference"), "+.1f"))
        for test in (shown.get("of_queries"), shown.get("of_seeds")):
            cells += ["{:+.1f} to {:+.1f}".format(*test["interval"]), f"{test['p']:.3f}"] if test else ["", ""]
        lines.append(layout.format(name, *cells, " ".join(f"{rsum:.1f}" for rsum in row["rsums"])))
    what = "95 % and p: of queries, bootstrap over images; of seeds, paired t-test"
    lines += ["", f"rSum on {results['split']}; spread: standard deviation over seeds; {what}"]
    if results["stopped"]:
        lines.append(f"stopped before the end, not counted: {', '.join(results['stopped'])}")
    return "\n".join(lines)


def _format(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _write_curves(path: Path, runs: Iterable[Run]) -> None:
    """rSum on dev after each epoch."""
    text = io.StringIO()
    rows = csv.writer(text)
    rows.writerow(["variant", "seed", "epoch", "step", "dev_rsum"])
    for run in runs:
        for epoch in (read_record(run.folder) or {})["history"]:
            rows.writerow([run.variant, run.seed, epoch["epoch"], epoch["step"], epoch["dev"]["rsum"]])
    with replacing(path) as file:
        file.write(text.getvalue().encode())
