"""Two processes train what one trains; one that dies ends the other, and leaves a state.

This file is also the program they run.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import LIMIT, until

from mhdet.core.runs import JsonLog
from mhdet.training.checkpoint import load, read_meta

ROOT = Path(__file__).resolve().parents[1]
SMALL = "data=toy:200 imgsz=64 width=0.125 batch=16 nominal_batch=16"
WORDS = f"{SMALL} precision=fp32 device=cpu workers=0".split()


def main(root, *words):
    import torch

    from mhdet.core.config import load_config
    from mhdet.experiment.run import train
    from mhdet.training.learner import Callback

    torch.set_num_threads(1)

    class Note(Callback):
        "Loss of every batch over all processes; a pause to be killed in; on request a NaN."

        spoil = bool(os.environ.get("SPOIL"))

        def __init__(self, run):
            self.run, self.rows = run, []

        def before_batch(self, learner):
            time.sleep(float(os.environ.get("PAUSE", 0)))
            if not self.spoil or (learner.epoch, learner.batch) != (1, 3):
                return
            self.spoil, sound = False, learner.loss

            def spoiled(*args):
                learner.loss = sound
                return {
                    k: v * (float("nan") if learner.accelerator.is_last_process else 1)
                    for k, v in sound(*args).items()
                }

            learner.loss = spoiled

        def after_batch(self, learner):
            values = learner.accelerator.reduce(learner.values, "mean").tolist()
            self.rows.append(
                {
                    k: v * (learner.world if k == "loss" else 1)
                    for k, v in zip(learner.names, values, strict=True)
                }
            )

        def after_fit(self, learner):
            if learner.accelerator.is_main_process:
                (root / f"{self.run}.json").write_text(json.dumps(self.rows))

    for part in " ".join(words).split(" + "):  # several runs, one after the other
        cfg = load_config(*WORDS, *part.split())
        name = cfg.training.run
        train(
            cfg,
            resume=name if (root / name).exists() else None,
            root=root,
            quiet=True,
            more=[Note(name)],
        )


def start(root, processes, *words, pause=0.0, spoil=""):
    launch = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        if processes > 1
        else []
    )
    root.mkdir(exist_ok=True)
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "PAUSE": str(pause),
        "SPOIL": spoil,
    }
    return subprocess.Popen(
        [sys.executable, *launch, __file__, str(root), *words],
        env=env,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def losses(root, processes, *words):
    "Those of every run, by its name."
    child = start(root, processes, *words)
    _, err = child.communicate(timeout=LIMIT)
    assert child.returncode == 0, err
    return {f.stem: json.loads(f.read_text()) for f in root.glob("*.json")}


def apart(a, b):
    return max(
        abs(x[k] - y[k]) / max(abs(x[k]), 1e-3) for x, y in zip(a, b, strict=True) for k in x
    )


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    "Two runs, with group norm and batch norm, by one process and by two; a small rate: rounding."
    root, words = (
        tmp_path_factory.mktemp("both"),
        " + ".join(f"run={n} norm_layer={n} epochs=1 lr=0.0002" for n in ("gn", "bn")).split(),
    )
    return root, losses(root / "one", 1, *words), losses(root / "two", 2, *words)


@pytest.mark.slow
def test_two_processes_train_what_one_trains(both):
    root, one, two = both
    assert len(one["gn"]) == 10 and apart(one["gn"], two["gn"]) < 1e-5
    rows = [JsonLog(root / f"{n}/gn/log.jsonl").rows() for n in ("one", "two")]
    assert [len(r) for r in rows] == [1, 1]  # the first process alone writes
    for k in (k for k in rows[0][0] if k.split("/")[0] in ("train", "dev", "AP", "AP50")):
        assert rows[0][0][k] == pytest.approx(rows[1][0][k], rel=1e-4), k
    assert not list(root.rglob("*.part"))


@pytest.mark.slow
def test_batch_norm_sees_only_its_share(both):
    assert apart(both[1]["bn"][:1], both[2]["bn"][:1]) > 1e-3


@pytest.mark.slow
def test_one_process_goes_on_where_two_stopped(both):
    root = both[0] / "two"
    assert (
        len(losses(root, 1, "run=gn", "epochs=2")["gn"]) == 10
        and read_meta(root / "gn/last")["epoch"] == 2
    )


@pytest.mark.slow
def test_a_process_that_dies_ends_the_other(tmp_path):
    child = start(tmp_path, 2, "run=run", "norm_layer=gn", "epochs=20", "save_steps=2", pause=0.05)
    until(lambda: read_meta(tmp_path / "run/last").get("steps", 0) >= 2, child)
    ranks = [
        int(p)
        for p in subprocess.run(
            ["pgrep", "-P", str(child.pid)], capture_output=True, text=True
        ).stdout.split()
    ]
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    start_at = time.monotonic()
    child.communicate(timeout=LIMIT)
    assert child.returncode != 0 and time.monotonic() - start_at < 30
    for pid in ranks:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    tree, meta = load(tmp_path / "run/last")
    assert meta["steps"] >= 2 and tree["position"]["steps"] == meta["steps"]
    stopped = meta["steps"]
    rest = losses(tmp_path, 2, "run=run", f"epochs={meta['epoch'] + 1}")["run"]
    assert (
        read_meta(tmp_path / "run/last")["epoch"] == meta["epoch"] + 1
        and len(rest) == (meta["epoch"] + 1) * 10 - stopped
    )


@pytest.mark.slow
def test_what_one_process_meets_all_obey(tmp_path):
    "A loss of NaN in one process takes both back; SIGTERM to one stops both in good order."
    child = start(tmp_path, 2, "run=run", "norm_layer=gn", "epochs=40", pause=0.02, spoil="yes")
    until(lambda: read_meta(tmp_path / "run/last").get("epoch", 0) >= 2, child)
    ranks = [
        int(p)
        for p in subprocess.run(
            ["pgrep", "-P", str(child.pid)], capture_output=True, text=True
        ).stdout.split()
    ]
    os.kill(ranks[1], signal.SIGTERM)
    _, err = child.communicate(timeout=LIMIT)
    assert child.returncode == 0, err
    first, row = (tmp_path / "run/restarts.csv").read_text().splitlines()[1:]
    assert first.startswith("1,0,,0,0,,normal start,")
    assert row.startswith("2,1,0,1,13,") and ",nan," in row
    env, meta = (
        json.loads((tmp_path / "run/env.json").read_text()),
        read_meta(tmp_path / "run/last"),
    )
    assert env["stopped"] in ("SIGTERM", "another process was stopped") and 2 <= meta["epoch"] < 40


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
