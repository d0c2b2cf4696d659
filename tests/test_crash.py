"""A run is killed, interrupted or starved of disk, and continues.

This file is also the program that is killed.
"""

import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import LIMIT, until
from torch import nn
from torch.utils.data import DataLoader, Dataset

from mhdet.core.config import load_config
from mhdet.core.runs import JsonLog, set_seed
from mhdet.data.splits import open_data
from mhdet.experiment import run as experiment
from mhdet.training.callbacks import Checkpoint, Recorder
from mhdet.training.checkpoint import load, read_meta, resume_state
from mhdet.training.learner import Callback, Learner
from mhdet.training.schedules import EMA, Schedule, make_optimizer

EPOCHS, BATCHES = 4, 12
ROOT = Path(__file__).resolve().parents[1]


class Points(Dataset):
    "Noisy points; each is drawn by (epoch, index), so nothing depends on who draws it."

    def __getitem__(self, key):
        g = torch.Generator().manual_seed(1000 * key[0] + key[1])
        x = torch.randn(8, generator=g)
        return x, (x.sum() > 0).long()


class Batches:
    "Lists of (epoch, index) from a batch on."

    epoch = start = 0

    def set_epoch(self, epoch, start):
        self.epoch, self.start = epoch, start

    def __len__(self):
        return BATCHES

    def __iter__(self):
        for k in range(self.start, BATCHES):
            yield [(self.epoch, 8 * k + i) for i in range(8)]


class Slow(Callback):
    "Time for somebody to kill it."

    def __init__(self, seconds):
        self.seconds = seconds

    def before_batch(self, learner):
        time.sleep(self.seconds)


def entropy(out, target):
    return {"loss": nn.functional.cross_entropy(out, target, reduction="sum")}


def toy_learner(run, pause=0.0, workers=0):
    "A net with dropout and batch-norm, all that keeps a state, a checkpoint every second step."
    torch.set_num_threads(1)
    set_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 2)
    )
    loader = DataLoader(Points(), batch_sampler=Batches(), num_workers=workers)
    callbacks = [
        EMA(model, 0.97, tau=20),
        Schedule(0.01),
        Recorder(JsonLog(run / "log.jsonl")),
        Checkpoint(run, save_steps=2),
        Slow(pause),
    ]
    optimizer = make_optimizer(model, "sgd", 0.01)
    return Learner(model, entropy, optimizer, loader, callbacks, device="cpu", accumulate=2)


def main(run, pause, workers):
    learner = toy_learner(run, pause, workers)
    resume_state(run / "last", learner)
    print("from", learner.epoch, learner.batch, flush=True)
    learner.fit(EPOCHS)
    return {"SIGINT": 130, "SIGTERM": 143, None: 0}[learner.stopped]


def start(run, pause=0.0, workers=0):
    command = [sys.executable, __file__, str(run), str(pause), str(workers)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=env, start_new_session=True
    )


def steps(run):
    return read_meta(run / "last").get("steps", 0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "The state that an uninterrupted run ends with, and its log."
    run = tmp_path_factory.mktemp("whole")
    assert main(run, 0.0, 0) == 0
    return load(run / "last")[0], JsonLog(run / "log.jsonl").rows()


def losses(rows):
    return [(row["epoch"], row["train/loss"]) for row in rows]


def assert_same(run, whole):
    "The run ended at the same bits, with the same log."
    tree, rows = load(run / "last")[0], JsonLog(run / "log.jsonl").rows()
    assert tree["position"] == dict(epoch=EPOCHS, batch=0, steps=EPOCHS * BATCHES // 2)
    for part in ("model", "ema"):
        for k, v in whole[0][part].items():
            assert torch.equal(v, tree[part][k]), f"{part}/{k}"
    assert losses(rows) == losses(whole[1])


@pytest.mark.parametrize("workers, number, code", [(1, signal.SIGINT, 130)])
def test_killed_then_stopped_then_finished(tmp_path, whole, workers, number, code):
    process = start(tmp_path, 0.03, workers)
    until(lambda: steps(tmp_path) >= 3, process)  # in the first epoch
    time.sleep(random.random() * 0.1)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert read_meta(tmp_path / "last")["epoch"] < EPOCHS

    process = start(tmp_path, 0.03, workers)
    until(lambda: steps(tmp_path) >= 15, process)  # in the third
    if workers:
        os.killpg(process.pid, number)  # Ctrl-C in a terminal goes to the workers too
    else:
        process.send_signal(number)
    assert process.wait(LIMIT) == code
    stopped = read_meta(tmp_path / "last")
    assert 15 <= stopped["steps"] < EPOCHS * BATCHES // 2

    process = start(tmp_path, 0.0, workers)
    out, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 0
    assert out.split() == ["from", str(stopped["epoch"]), str(stopped["batch"])]
    assert_same(tmp_path, whole)


def test_full_disk_keeps_the_old_state(tmp_path, monkeypatch):
    learner = toy_learner(tmp_path).fit(1)
    before = load(tmp_path / "last")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    learner.callbacks = [cb for cb in learner.callbacks if not isinstance(cb, Recorder)]
    with pytest.raises(OSError, match="the disk is full; what was there before is unchanged"):
        learner.fit(2)
    after = load(tmp_path / "last")
    assert after[1] == before[1]
    assert not list(tmp_path.rglob("*.part"))
    for k, v in before[0]["model"].items():
        assert torch.equal(v, after[0]["model"][k])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loss_of_nan_costs_an_epoch(tmp_path, monkeypatch, workers):
    "NaN in training of epoch 3 and on dev after epoch 5: both begin again with the next seed."
    cfg = load_config(
        *("data=toy:80", "imgsz=64", "epochs=6", "batch=16", "nominal_batch=16", "width=0.125"),
        *("precision=fp32", f"workers={workers}", "seed=3", "restart_seeds=[11, 12]", "run=flow"),
    )
    make_loss, calls = experiment.make_loss, dict(train=0, val=0)
    batches = len(open_data("toy:80", dev=cfg.data.dev)["train"]) // 16

    def failing_twice(*args):
        whole = make_loss(*args)

        def loss(raws, targets):
            part = "train" if raws[0].requires_grad else "val"
            calls[part] += 1
            terms = whole(raws, targets)
            if (part, calls[part]) in (("train", 2 * batches + 2), ("val", 5)):
                return {k: v * math.nan for k, v in terms.items()}
            return terms

        return loss

    monkeypatch.setattr(experiment, "make_loss", failing_twice)
    run = experiment.train(cfg, root=tmp_path, quiet=True)
    table = [line.split(",") for line in (run / "restarts.csv").read_text().splitlines()]
    columns = ["epoch", "load_epoch", "old_seed", "new_seed", "step", "terms", "reason"]
    assert table[0] == [*columns, "time", "host", "device"]
    assert [row[:4] + row[6:7] for row in table[1:]] == [
        ["1", "0", "", "3", "normal start"],
        ["3", "2", "3", "11", "nan"],
        ["5", "4", "11", "12", "val nan"],
    ]
    rows = JsonLog(run / "log.jsonl").rows()
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(math.isfinite(row["dev/box"]) for row in rows)
    assert all(v.isfinite().all() for v in load(run / "best")[0]["model"].values())


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])))
