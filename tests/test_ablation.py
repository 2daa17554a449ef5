"""ablate.py: variants x seeds from training to one table, against what each run gives alone."""

import csv
import json
import shutil
import statistics
import sys

import numpy as np
import pytest

import ablate
import eval as eval_program
import train
from lib import ablation
from lib.evaluation.metrics import bootstrap, interval, p_value, rank_matrix, retrieval_metrics, t_test

FOLDERS = {"xdim:diagonal": "xdim-diagonal", "independent --margin 0.3": "independent-margin-0.3"}
VARIANTS, SEEDS = tuple(FOLDERS), (0, 1)
IMAGE_OF_CAPTION = np.repeat(np.arange(10), 5)


def flags_of(folder):
    return ["--folder", str(folder), "--variants", *VARIANTS, "--seeds", *map(str, SEEDS)]


def train_here(command):
    """Run train.py within this process."""
    assert command[:2] == [sys.executable, train.__file__]
    return train.main(command[2:])


@pytest.fixture(scope="module")
def ablated(tiny_flags, tmp_path_factory):
    """The folder of two variants with two seeds each."""
    folder = tmp_path_factory.mktemp("runs") / "ablation"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablation, "_run", train_here)
        assert ablate.main([*flags_of(folder), "--", *tiny_flags]) == 0
    return folder


def test_the_table_holds_mean_spread_and_paired_difference_of_the_runs(ablated, tmp_path):
    table = json.loads((ablated / "table.json").read_text())
    assert (table["split"], table["stopped"]) == ("dev", [])
    files = {v: [ablated / f"{name}-seed{seed}" / "dev_sims.npy" for seed in SEEDS] for v, name in FOLDERS.items()}
    flags = ["--split", "dev", "--save_sims", str(tmp_path / "sims.npy"), "--device", "cpu", "--workers", "0"]
    assert eval_program.main(["--checkpoint", str(files[VARIANTS[1]][1].parent), *flags]) == 0
    np.testing.assert_allclose(np.load(tmp_path / "sims.npy"), np.load(files[VARIANTS[1]][1]), atol=1e-6)
    ranks = {name: [rank_matrix(np.load(one), IMAGE_OF_CAPTION) for one in kept] for name, kept in files.items()}
    drawn = {name: np.mean([bootstrap(one, IMAGE_OF_CAPTION)["rsum"] for one in ranks[name]], axis=0) for name in ranks}
    rsums = {name: [retrieval_metrics(one)["rsum"] for one in ranks[name]] for name in ranks}
    for name in VARIANTS:
        row, differences = table["variants"][name], drawn[name] - drawn[VARIANTS[0]]
        assert row["rsums"] == pytest.approx(rsums[name])
        assert row["rsum"] == pytest.approx(statistics.mean(rsums[name]))
        assert row["spread"] == pytest.approx(statistics.stdev(rsums[name]))
        assert row["difference"] == pytest.approx(row["rsum"] - statistics.mean(rsums[VARIANTS[0]]))
        assert row["of_queries"] == {"interval": pytest.approx(interval(differences)), "p": p_value(differences)}
        of_each = np.subtract(rsums[name], rsums[VARIANTS[0]])
        assert row["of_seeds"] == {"interval": pytest.approx(t_test(of_each)["interval"]), "p": t_test(of_each)["p"]}
        assert row["step_ms"] > 0
    assert table["variants"][VARIANTS[0]]["of_queries"]["p"] == 1


def test_curves_hold_every_epoch_of_every_run_and_a_variants_own_flags_reach_its_runs_alone(ablated):
    records = {path.parent.name: json.loads(path.read_text()) for path in ablated.glob("*/run.json")}
    margins = {f"{FOLDERS[v]}-seed{s}": 0.3 if "--margin" in v else 0.2 for v in VARIANTS for s in SEEDS}
    assert {name: record["settings"]["margin"] for name, record in records.items()} == margins
    with open(ablated / "curves.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["variant"], int(row["seed"])) for row in rows} == {(v, s) for v in VARIANTS for s in SEEDS}
    for row in rows:
        (epoch,) = records[f"{FOLDERS[row['variant']]}-seed{row['seed']}"]["history"]
        assert (int(row["epoch"]), int(row["step"])) == (epoch["epoch"], epoch["step"]) == (1, 15)
        assert float(row["dev_rsum"]) == epoch["dev"]["rsum"]


def test_a_rerun_trains_nothing_again_and_says_the_same(ablated, tiny_flags, monkeypatch, capsys):
    monkeypatch.setattr(ablation, "_run", train_here)
    before = {path: path.stat().st_mtime_ns for path in ablated.glob("*/step-*.pt")}
    table = (ablated / "table.json").read_text()
    assert ablate.main([*flags_of(ablated), "--", *tiny_flags]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in ablated.glob("*/step-*.pt")}
    assert (ablated / "table.json").read_text() == table
    out = capsys.readouterr().out
    assert out.count("all 1 epochs are done") == 4
    lines = out[out.rindex("rSum  spread") :].splitlines()
    assert [line.startswith(variant) for line, variant in zip(lines[1:3], VARIANTS, strict=True)] == [True, True]
    row = json.loads(table)["variants"][VARIANTS[1]]
    assert f"{row['difference']:+.1f}" in lines[2]
    assert f"{row['of_seeds']['p']:.3f}  " + " ".join(f"{rsum:.1f}" for rsum in row["rsums"]) in lines[2]


def test_a_log_without_a_speed_leaves_its_cell_empty_and_the_table_valid_json(
    ablated, tiny_flags, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(ablation, "_run", lambda command: 0)
    copy = shutil.copytree(ablated, tmp_path / "copy")
    for path in copy.glob("*/run.log"):
        path.write_text("epoch 1 step 1 loss 3.1 gradient 2.0 rate 5.0e-04\n")
    assert ablate.main([*flags_of(copy), "--", *tiny_flags]) == 0
    table = json.loads((copy / "table.json").read_text(), parse_constant=pytest.fail)
    assert [row["step_ms"] for row in table["variants"].values()] == [None, None]
    assert "nan" not in capsys.readouterr().out


def test_a_run_that_stops_is_left_out_and_said(ablated, tiny_flags, monkeypatch, capsys):
    def start(command):
        stops = "independent" in command and command[command.index("--seed") + 1] == "1"
        return int(stops)

    monkeypatch.setattr(ablation, "_run", start)
    before = (ablated / "table.json").read_text()
    assert ablate.main([*flags_of(ablated), "--", *tiny_flags]) == 0
    table = json.loads((ablated / "table.json").read_text())
    (ablated / "table.json").write_text(before)
    assert table["stopped"] == [f"{VARIANTS[1]} seed 1"]
    assert len(table["variants"][VARIANTS[1]]["rsums"]) == 1
    assert (row := table["variants"][VARIANTS[1]])["spread"] is row["of_seeds"] is None
    assert row["difference"] == row["rsums"][0] - table["variants"][VARIANTS[0]]["rsums"][0]
    assert f"stopped before the end, not counted: {VARIANTS[1]} seed 1" in capsys.readouterr().out


def test_what_train_refuses_ends_the_ablation_with_its_one_line(tiny_flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ablation, "_run", train_here)
    with pytest.raises(SystemExit) as ended:
        ablate.main(["--folder", str(tmp_path / "runs"), "--seeds", "0", "--", *tiny_flags, "--bert", "nowhere/here"])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "nowhere" in line


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--variants", "cosine"], "--similarity cosine: expected xdim, independent, gpo"),
        (["--variants", "gpo:dense"], "--variants gpo:dense: --gate dense: "),
        (["--variants", "xdim", "gpo --no_such_flag"], "--no_such_flag"),
        (["--variants", ""], "--variants: one is empty"),
        (["--seeds", "1", "1"], "--seeds 1 1: one is there twice"),
        (["--batch_size", "3"], "unrecognized arguments"),
        (["--split", "tset"], "tset"),
        (["--", "--data_path", "nowhere"], "nowhere"),
    ],
)
def test_wrong_flags_are_refused_before_anything_is_trained(flags, complaint, tiny_flags, tmp_path, capsys):
    folder = tmp_path / "runs"
    of_train = [] if "--" in flags else ["--", *tiny_flags]
    try:
        code = ablate.main(["--folder", str(folder), *flags, *of_train])
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert complaint in line
    assert not folder.exists()


def test_ctrl_c_waits_for_the_training_that_saves():
    child = "import os, signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    child += "os.kill(os.getppid(), signal.SIGINT); time.sleep(0.5); os._exit(130)"
    assert ablation._run([sys.executable, "-c", child]) == 130
