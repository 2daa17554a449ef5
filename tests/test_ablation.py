"""ablate.py: variants x seeds from training to one table, against what each run gives alone."""

import csv
import json
import statistics
import subprocess

import numpy as np
import pytest

import ablate
import eval as eval_program
from lib import ablation
from lib.evaluation.metrics import bootstrap, interval, p_value, rank_matrix, retrieval_metrics

FOLDERS = {"xdim:diagonal": "xdim-diagonal", "independent --margin 0.3": "independent-margin-0.3"}
VARIANTS, SEEDS = tuple(FOLDERS), (0, 1)
IMAGE_OF_CAPTION = np.repeat(np.arange(10), 5)


def flags_of(folder):
    return ["--folder", str(folder), "--variants", *VARIANTS, "--seeds", *map(str, SEEDS)]


@pytest.fixture(scope="module")
def ablated(tiny_flags, tmp_path_factory):
    """The folder of two variants with two seeds each."""
    folder = tmp_path_factory.mktemp("runs") / "ablation"
    assert ablate.main([*flags_of(folder), "--", *tiny_flags]) == 0
    return folder


@pytest.fixture(scope="module")
def alone(ablated, tmp_path_factory):
    """Ranks on dev of each run's best checkpoint: {variant: [of each seed]}."""
    scores, ranks = tmp_path_factory.mktemp("scores") / "sims.npy", {}
    for variant in VARIANTS:
        ranks[variant] = []
        for seed in SEEDS:
            run = ablated / f"{FOLDERS[variant]}-seed{seed}"
            flags = ["--split", "dev", "--save_sims", str(scores), "--device", "cpu", "--workers", "0"]
            assert eval_program.main(["--checkpoint", str(run), *flags]) == 0
            ranks[variant].append(rank_matrix(np.load(scores), IMAGE_OF_CAPTION))
    return ranks


def test_the_table_holds_mean_spread_and_paired_difference_of_the_runs(ablated, alone):
    table = json.loads((ablated / "table.json").read_text())
    assert (table["split"], table["stopped"]) == ("dev", [])
    drawn = {
        variant: np.mean([bootstrap(one, IMAGE_OF_CAPTION)["rsum"] for one in ranks], axis=0)
        for variant, ranks in alone.items()
    }
    first = [retrieval_metrics(ranks)["rsum"] for ranks in alone[VARIANTS[0]]]
    for variant, ranks in alone.items():
        row, rsums = table["variants"][variant], [retrieval_metrics(one)["rsum"] for one in ranks]
        assert row["rsums"] == pytest.approx(rsums)
        assert row["rsum"] == pytest.approx(statistics.mean(rsums))
        assert row["spread"] == pytest.approx(statistics.stdev(rsums))
        assert row["difference"] == pytest.approx(statistics.mean(rsums) - statistics.mean(first))
        differences = drawn[variant] - drawn[VARIANTS[0]]
        assert row["interval"] == pytest.approx(interval(differences))
        assert row["p"] == p_value(differences)
        assert row["step_ms"] > 0
    assert table["variants"][VARIANTS[0]]["p"] == 1


def test_a_rerun_trains_nothing_again_and_says_the_same(ablated, tiny_flags, capfd):
    before = {path: path.stat().st_mtime_ns for path in ablated.glob("*/*.pt")}
    table = (ablated / "table.json").read_text()
    assert ablate.main([*flags_of(ablated), "--", *tiny_flags]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in ablated.glob("*/*.pt")}
    assert (ablated / "table.json").read_text() == table
    out = capfd.readouterr().out
    assert out.count("all 1 epochs are done") == 4
    lines = out[out.rindex("rSum  spread") :].splitlines()
    assert [line.startswith(variant) for line, variant in zip(lines[1:3], VARIANTS, strict=True)] == [True, True]
    row = json.loads(table)["variants"][VARIANTS[1]]
    assert f"{row['difference']:+.1f}" in lines[2]
    assert lines[2].endswith(" ".join(f"{rsum:.1f}" for rsum in row["rsums"]))


def test_curves_hold_every_epoch_of_every_run(ablated):
    with open(ablated / "curves.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["variant"], int(row["seed"])) for row in rows} == {(v, s) for v in VARIANTS for s in SEEDS}
    for row in rows:
        record = json.loads((ablated / f"{FOLDERS[row['variant']]}-seed{row['seed']}/run.json").read_text())
        assert (int(row["epoch"]), int(row["step"])) == (1, 15)
        assert float(row["dev_rsum"]) == record["history"][0]["dev"]["rsum"]


def test_a_run_that_stops_is_left_out_and_said(ablated, tiny_flags, monkeypatch, capsys):
    started = []

    def start(command, run=subprocess.run):
        started.append(command)
        stops = command[command.index("--similarity") + 1] == "independent" and "1" in command
        return subprocess.CompletedProcess(command, int(stops and command[command.index("--seed") + 1] == "1"))

    monkeypatch.setattr(ablation.subprocess, "run", start)
    before = (ablated / "table.json").read_text()
    assert ablate.main([*flags_of(ablated), "--", *tiny_flags]) == 0
    assert len(started) == 4
    table = json.loads((ablated / "table.json").read_text())
    (ablated / "table.json").write_text(before)
    assert table["stopped"] == [f"{VARIANTS[1]} seed 1"]
    assert len(table["variants"][VARIANTS[1]]["rsums"]) == 1
    assert table["variants"][VARIANTS[1]]["spread"] is None
    assert f"stopped before the end, not counted: {VARIANTS[1]} seed 1" in capsys.readouterr().out


def test_a_variants_own_flags_reach_its_runs_alone(ablated):
    margins = {
        path.parent.name: json.loads(path.read_text())["settings"]["margin"] for path in ablated.glob("*/run.json")
    }
    assert margins == {f"{FOLDERS[v]}-seed{s}": 0.3 if "--margin" in v else 0.2 for v in VARIANTS for s in SEEDS}


@pytest.mark.parametrize("flags", [["--batch_size", "1"], ["--no_such_flag"]])
def test_a_later_variants_wrong_flags_are_refused_before_anything_is_trained(flags, tmp_path, capfd):
    folder = tmp_path / "runs"
    try:
        code = ablate.main(["--folder", str(folder), "--variants", "xdim", f"gpo {' '.join(flags)}"])
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert " ".join(flags) in line
    assert not folder.exists()


def test_what_train_refuses_ends_the_ablation_with_its_one_line(tmp_path, capfd):
    with pytest.raises(SystemExit) as ended:
        ablate.main(["--folder", str(tmp_path / "runs"), "--seeds", "0", "--", "--data_path", "nowhere"])
    assert ended.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "nowhere" in line


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--variants", "cosine"], "--similarity cosine: expected xdim, independent, gpo"),
        (["--variants", "gpo:dense"], "--variants gpo:dense: --gate dense: "),
        (["--variants", ""], "--variants: one is empty"),
        (["--variants", "xdim", "xdim"], "--variants xdim xdim: one is there twice"),
        (["--seeds", "1", "1"], "--seeds 1 1: one is there twice"),
        (["--batch_size", "3"], "unrecognized arguments"),
    ],
)
def test_wrong_flags_are_refused(flags, complaint, capsys):
    try:
        code = ablate.main(flags)
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert complaint in line
