"""What the programs share: progress in a terminal and in a log file, exit codes."""

import signal
import sys

import pytest

from lib import cli, distributed
from lib.cli import InputError, Interrupted, TrainingStopped, program, progress_bar, with_bar
from lib.config import EvaluationSettings, IndexSettings, TrainSettings, parse


@pytest.fixture
def often(monkeypatch):
    monkeypatch.setattr(cli, "LINE_INTERVAL", 0.0)


def test_a_log_file_gets_whole_lines_of_progress(often, capsys):
    assert list(with_bar(range(3), "captions")) == [0, 1, 2]
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("captions: 3 of 3 in 00:00, 00:00 left")
    assert list(with_bar(iter("ab"), "images")) == ["a", "b"]
    assert capsys.readouterr().err.splitlines()[-1].startswith("images: 2 in 00:00")
    with progress_bar("archive", 4_000_000, unit="B") as bar:
        bar.update(2_000_000)
    assert "archive: 2.00M of 4.00MB in" in capsys.readouterr().err


def test_a_terminal_gets_a_bar_that_vanishes(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    list(with_bar(range(3), "captions"))
    assert "\rcaptions:   0%|" in (text := capsys.readouterr().err)
    assert text.endswith("\r")


def test_only_the_first_process_has_a_bar_and_all_have_heartbeats(often, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    before = distributed._heartbeats
    list(with_bar(range(3), "captions"))
    assert capsys.readouterr().err == ""
    assert distributed._heartbeats == before + 3


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("a.npy: NaN"), 2, "error: a.npy: NaN\n"),
        (InputError("Traceback ...\nlib.cli.InputError: a.npy: NaN"), 2, "error: a.npy: NaN\n"),  # of a worker
        (TrainingStopped("the loss is NaN"), 1, "error: the loss is NaN\n"),
        (Interrupted("saved", signal.SIGTERM), 143, "saved\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (RuntimeError("DefaultCPUAllocator: can't allocate"), 1, "error: out of memory (DefaultCPUAllocator: can't"),
    ],
)
def test_known_errors_are_one_line_and_an_exit_code(capsys, error, code, line):
    @program
    def main(argv):
        raise error

    assert main([]) == code
    assert capsys.readouterr().err.startswith(line)


def test_a_bug_keeps_its_traceback():
    @program
    def main(argv):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        main([])


@pytest.mark.parametrize("settings", [TrainSettings, IndexSettings, EvaluationSettings])
def test_help_names_the_default_of_a_flag_once(capsys, settings):
    with pytest.raises(SystemExit):
        parse(settings, "", ["--help"])
    flags = " ".join(capsys.readouterr().out.split()).split(" --")
    named = {flag.split()[0]: flag.count("(default:") for flag in flags}
    assert max(named.values()) == 1
    assert named["workers"] == 1
    assert "(default: ())" not in " ".join(flags)
