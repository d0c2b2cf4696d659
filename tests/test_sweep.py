"""A sweep is killed, stopped or out of time; some rows cannot work: no epoch is trained twice."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import psutil
import pytest
from processes import LIMIT, until
from typer.testing import CliRunner

from mhdet.cli.commands import app
from mhdet.core.runs import JsonLog
from mhdet.experiment.sweep import sweep_command, sweep_rows

ROOT = Path(__file__).resolve().parents[1]
BASE = (
    "base: {data: 'toy:80', imgsz: 64, width: 0.125, batch: 8, workers: 0, "
    "device: cpu, precision: fp32, epochs: %s}\n"
)
ENV = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for k in ("PYTHONPATH", "OMP_NUM_THREADS"):
        monkeypatch.setenv(k, ENV[k])
    return tmp_path


def mhdet(line):
    "Exit code, stdout, stderr."
    found = CliRunner().invoke(app, shlex.split(line))
    return found.exit_code, found.stdout, found.stderr


def begin(line):
    return subprocess.Popen(
        [sys.executable, "-m", "mhdet", *line.split()], env=ENV, stderr=subprocess.PIPE, text=True
    )


def stamps(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*")}


def states(name):
    return (
        pd.read_csv(table)["state"].tolist()
        if (table := Path("runs", name, "sweep.csv")).exists()
        else []
    )


def epochs(name):
    return [r["epoch"] for r in JsonLog(f"runs/{name}/log.jsonl").rows()]


@pytest.mark.slow
def test_killed_then_interrupted_then_finished(here):
    "As by a power cut; then by Ctrl-C; the third call ends it and leaves finished runs alone."
    Path("sweep-a.yaml").write_text(BASE % 400 + "rows: {short: {epochs: 1}, long: {}}")
    first = begin("sweep sweep-a.yaml --jobs 2")
    until(lambda: states("a")[:1] == ["finished"] and len(epochs("a/long_s0")) >= 2, first)
    own = [first, *psutil.Process(first.pid).children(recursive=True)]
    for p in own:
        p.kill()
    first.communicate()
    psutil.wait_procs(own[1:], 10)
    before, trained = stamps(Path("runs/a/short_s0")), epochs("a/long_s0")

    second = begin("sweep sweep-a.yaml --jobs 2")
    until(lambda: len(epochs("a/long_s0")) > len(trained) + 1, second)
    second.send_signal(signal.SIGINT)
    err = second.communicate(timeout=LIMIT)[1]
    assert second.returncode == 130 and err.endswith(
        "mhdet: SIGINT; what was trained is saved, the same command goes on\n"
    )
    assert "long_s0: SIGTERM, epoch" in err and states("a") == ["finished", "SIGTERM"]

    reached = len(epochs("a/long_s0"))
    assert 3 < reached < 400
    Path("sweep-a.yaml").write_text(BASE % (reached + 2) + "rows: {short: {epochs: 1}, long: {}}")
    code, out, _ = mhdet("sweep sweep-a.yaml --json")
    assert code == 0 and [r["state"] for r in json.loads(out)] == ["finished", "finished"]
    assert (
        epochs("a/long_s0") == list(range(1, reached + 3))
        and stamps(Path("runs/a/short_s0")) == before
    )


@pytest.mark.slow
def test_a_killed_sweep_leaves_its_row_alive_and_the_next_one_leaves_it_alone(here):
    Path("b.yaml").write_text(BASE % 1000)
    first = begin("sweep b.yaml")
    until(lambda: epochs("b/s0"), first)
    row = psutil.Process(first.pid).children()[0]
    first.kill(), first.communicate()
    assert mhdet("sweep b.yaml")[0] == 0 and row.is_running()
    assert not [c for c in psutil.Process().children() if "train" in c.cmdline()]
    row.terminate()
    psutil.wait_procs([row], LIMIT)
    assert sweep_command(sweep_rows("b.yaml")[0])[:3] == ["train", "--resume", "b/s0"]


def test_one_row_of_an_array_and_a_row_that_fails(here):
    bad = "bad: {obj_gain: 1.0e+300, restarts: 0}"
    Path("sweep-c.yaml").write_text(BASE % 1 + f"rows: {{good: {{}}, {bad}, fine: {{}}}}")
    code, out, _ = mhdet("sweep sweep-c.yaml --list")
    assert code == 0 and [s.split()[:3] for s in out.splitlines()] == [
        ["mhdet", "train", f"run=c/{n}_s0"] for n in ("good", "bad", "fine")
    ]
    assert not Path("runs").exists()
    assert mhdet("sweep sweep-c.yaml --row 2")[0] == 0
    assert mhdet("sweep sweep-c.yaml --list")[1].splitlines()[2] == "# fine_s0 is finished"
    code, out, err = mhdet("sweep sweep-c.yaml --jobs 2 max_hours=1e-6")
    assert code == 1 and "bad_s0: failed, mhdet: step 0: loss is not finite" in err
    table = pd.read_csv("runs/c/sweep.csv")
    assert table["state"].tolist() == ["max_hours", "failed", "finished"]
    assert table["epoch"].tolist() == [0, 0, 1]
    assert {"name", "obj_gain", "seed", "AP50", "best", "commit", "device", "date"} <= set(table)
    assert {r["run"]: r["state"] for r in json.loads(mhdet("runs --json")[1])} == {
        "c/good_s0": "max_hours",
        "c/bad_s0": "failed",
        "c/fine_s0": "finished",
    }


@pytest.mark.parametrize(
    "line, words",
    {
        "sweep": "expected one name, got none",
        "sweep absent.yaml": "absent.yaml: no such file",
        "sweep d.yaml --row 2": "no row 2; there are 0..1",
        "sweep d.yaml --jobs 0": "jobs=0: expected 1 or more",
        "sweep d.yaml lr=1": "'lr' differs between the rows",
        "sweep d.yaml seed=1": "'seed' is no choice here",
        "sweep d.yaml epoch=1": "did you mean 'epochs'?",
    }.items(),
)
def test_bad_input_is_one_line_and_code_2(here, line, words):
    Path("d.yaml").write_text("grid: {lr: [.1, .2]}")
    code, out, err = mhdet(line)
    assert (code, out, err.count("\n")) == (2, "", 1) and words in err and not Path("runs").exists()
