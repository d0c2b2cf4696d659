"""Rows of a sweep and runs of a study as tasks of a Ray cluster: two workers on this machine.

The study is trained twice, on the cluster and without it: MHDET_ALL=1 asks for that.
"""

import json
import shlex
import threading
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
from processes import LIMIT
from typer.testing import CliRunner

from mhdet.cli.commands import app
from mhdet.core.runs import JsonLog
from mhdet.experiment.sweep import train_rows

ray = pytest.importorskip("ray", reason='needs Ray: pip install "mhdet[ray]"')
TINY = "data=toy:40 imgsz=64 batch=8 width=0.125 workers=0 device=cpu precision=fp32"
ROWS = """
base: {data: 'toy:40', imgsz: 64, width: 0.125, batch: 8, workers: 0, device: cpu, precision: fp32}
rows: {short: {epochs: 1}, long: {epochs: 8}}
"""
TIMES = ("ms", "seconds")  # differ from one time to the next


def mhdet(line):
    "Exit code, stdout, stderr."
    found = CliRunner().invoke(app, shlex.split(line))
    return found.exit_code, found.stdout, found.stderr


@pytest.fixture(scope="module")
def cluster():
    patch = pytest.MonkeyPatch()
    patch.setenv(
        "RAY_worker_niceness", "0"
    )  # Ray's workers are nice, the tests beside them are not
    try:
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    except Exception as e:  # of many kinds: no shared memory, ports in use, a machine too slow
        pytest.skip(f"no Ray cluster can be started here: {type(e).__name__}")
    yield
    ray.shutdown()
    patch.undo()


@pytest.fixture
def here(tmp_path, monkeypatch, one_thread):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def epochs(name):
    return [row["epoch"] for row in JsonLog(f"runs/{name}/log.jsonl").rows()]


def program(name):
    "The process that trains a run."
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "train" in words and {f"run={name}", name} & set(words):
            return process
    return None


def lose_machine(name, killed):
    "As if the machine went that trains a run: its process and the worker of Ray above it."
    end = time.monotonic() + LIMIT
    while not (process := program(name)) or len(epochs(name)) < 2:
        if time.monotonic() > end:
            return
        time.sleep(0.05)
    worker = process.parent()
    for victim in (worker, process):
        victim.kill()
    killed.append(worker.pid)


@pytest.mark.slow
def test_a_killed_worker_costs_one_row_one_restart(here, cluster):
    Path("sweep-r.yaml").write_text(ROWS)
    killed = []
    killer = threading.Thread(target=lose_machine, args=("r/long_s0", killed))
    killer.start()
    code, out, err = mhdet("sweep sweep-r.yaml --engine ray --json")
    killer.join()
    assert code == 0 and killed, err
    assert [row["state"] for row in json.loads(out)] == ["finished", "finished"]
    assert epochs("r/long_s0") == list(range(1, 9))  # none twice, none left out
    starts = {row: pd.read_csv(f"runs/r/{row}_s0/restarts.csv") for row in ("short", "long")}
    assert len(starts["short"]) == 1
    assert starts["long"]["reason"].tolist() == ["normal start", "killed or power loss"]


@pytest.mark.slow
def test_a_study_on_a_cluster_equals_the_same_study_without(here, cluster):
    keys = f"{TINY} epochs=1 extra_epochs=1 --seeds 2"
    assert mhdet(f"study near {keys}")[0] == 0
    code, _, err = mhdet(f"study far {keys} --engine ray")
    assert code == 0 and "base-s1: ended" in err and "split-s1: ended" in err
    near, far = (pd.read_csv(f"runs/{name}/table.csv") for name in ("near", "far"))
    assert near.drop(columns=[c for c in TIMES if c in near]).equals(
        far.drop(columns=[c for c in TIMES if c in far])
    )
    for run in ("base-s0", "split-s1"):
        logs = [JsonLog(f"runs/{name}/{run}/log.jsonl").rows() for name in ("near", "far")]
        assert logs[0][-1]["AP50"] == logs[1][-1]["AP50"]
        assert logs[0][-1]["train/loss"] == logs[1][-1]["train/loss"]


REFUSED = {
    "--engine slurm": "--engine: must be one of local, ray; got 'slurm'",
    "--engine ray --jobs 2": "jobs=2: on Ray --cpus-per-row and --gpus-per-row say how many fit",
    "--cpus-per-row 2": "--cpus-per-row, --gpus-per-row: only with --engine ray",
    "--engine ray --cpus-per-row 64": "--cpus-per-row 64: no machine of the cluster has more than",
    "--engine ray --gpus-per-row -1": "--gpus-per-row: expected 0 or more, got -1",
}


@pytest.mark.slow
@pytest.mark.parametrize("words", REFUSED)
def test_refused_in_one_line(here, cluster, words):
    Path("sweep-r.yaml").write_text(ROWS)
    code, _, err = mhdet(f"sweep sweep-r.yaml {words}")
    assert code == 2 and REFUSED[words] in err and err.count("\n") == 1


def test_a_cluster_that_is_gone(here, monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(ValueError, match="Ray: nothing answers at 127.0.0.1:9, RAY_ADDRESS"):
        next(train_rows([], "ray"))
