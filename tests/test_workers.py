"""What a training opens is closed: processes, memory, and the time Python needs to tidy up."""

import gc
import multiprocessing
import os
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from processes import LIMIT

from mhdet.core.config import load_config
from mhdet.data.dataset import DetDataset, loader
from mhdet.data.toy import toy_dataset
from mhdet.experiment import inference
from mhdet.experiment import run as experiment
from mhdet.experiment.study import study
from mhdet.training.learner import Callback, Learner, NonFinite

ROOT = Path(__file__).resolve().parents[1]
WORDS = [
    *("data=toy:40", "imgsz=64", "batch=8", "nominal_batch=8", "width=0.125", "epochs=2"),
    *("precision=fp32", "device=cpu", "mosaic=1"),
]


def children():
    return psutil.Process().children(recursive=True)


def toy(n=32):
    return DetDataset(toy_dataset(n, size=64), 64)


class Sleeping(DetDataset):
    "Samples that no test waits for."

    def __getitem__(self, key):
        time.sleep(2 * LIMIT)


class Raise(Callback):
    "Ends the training in its second batch."

    def __init__(self, error):
        self.error = error

    def after_batch(self, learner):
        if learner.batch == 2:
            raise self.error


@pytest.fixture
def made(monkeypatch):
    "References to all data sets that are made, which do not keep them; each holds 60 MB more."
    references = []

    class Heavy(DetDataset):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.more = np.ones(60 << 20, np.uint8)
            references.append(weakref.ref(self))

    monkeypatch.setattr(inference, "DetDataset", Heavy)
    return references


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_training_leaves_no_process_and_no_image(tmp_path, made, workers):
    "Without the help of the garbage collector, which comes late and would have to wait."
    gc.collect()
    gc.disable()
    used = []
    try:
        for k in range(3):
            cfg = load_config(*WORDS, f"workers={workers}", f"run={k}")
            experiment.train(cfg, root=tmp_path, quiet=True)
            assert children() == []
            assert [r() for r in made] == [None] * 2 * (k + 1)  # train and dev
            used.append(psutil.Process().memory_info().rss)
    finally:
        gc.enable()
    assert used[2] - used[0] < 60 << 20


@pytest.mark.parametrize("error", [OSError("disk"), KeyboardInterrupt(), NonFinite(1, {})])
def test_a_training_that_fails_leaves_none_either(tmp_path, made, error):
    cfg = load_config(*WORDS, "workers=1", "restarts=0", "run=a")
    with pytest.raises(type(error)):
        experiment.train(cfg, root=tmp_path, quiet=True, more=[Raise(error)])
    assert children() == []
    error.__traceback__ = None  # its frames refer to what was used in them
    gc.collect()
    assert [r() for r in made] == [None, None]


def test_one_that_begins_again_has_the_workers_of_one_training(tmp_path):
    seen = []

    class Look(Callback):
        failed = False

        def after_batch(self, learner):
            seen.append(len(children()))
            if learner.epoch == 1 and not self.failed:
                self.failed = True
                raise NonFinite(learner.steps, {"loss": float("nan")})

    cfg = load_config(*WORDS, "workers=1", "restart_seeds=[5]", "run=a")
    run = experiment.train(cfg, root=tmp_path, quiet=True, more=[Look()])
    assert (run / "restarts.csv").exists()
    assert set(seen) == {1}
    assert children() == []


@pytest.mark.slow
def test_a_study_leaves_no_process(tmp_path):
    cfg = load_config(*WORDS, "workers=1", "extra_epochs=1", "run=s")
    study(cfg, root=tmp_path, heads=2, quiet=True, say=lambda line: None)
    assert children() == []


class Sum(torch.nn.Module):
    "All pixels times a weight."

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.weight * x.flatten(1).mean(1)


class Keep(Callback):
    def __init__(self):
        self.images = []

    def before_batch(self, learner):
        self.images.append(learner.data[2].tolist())


def summed(ds, workers, fits):
    "Order of the images in fits with the same loader, and the weight afterwards."
    model, keep = Sum(), Keep()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    batches = loader(ds, 8, workers, seed=3)

    def loss(outputs, targets):
        return {"loss": outputs.sum()}

    learner = Learner(model, loss, optimizer, batches, [keep], device="cpu")
    for epochs in fits:
        learner.fit(epochs)
        assert children() == []
    return keep.images, model.weight.item()


def test_closing_between_fits_changes_no_batch():
    ds = toy()
    whole = summed(ds, 0, [3])
    assert len(whole[0]) == 12
    assert summed(ds, 1, [3]) == whole
    assert summed(ds, 2, [1, 3]) == whole
    assert summed(ds, 0, [1, 2, 3]) == whole


def test_a_loader_keeps_its_workers_as_long_as_somebody_reads():
    counts = []
    for _ in loader(toy(), 8, workers=1):  # nobody else refers to this loader
        gc.collect()
        counts.append(len(multiprocessing.active_children()))
    assert counts == [1] * 4
    assert children() == []
    with loader(toy(), 8, workers=1) as batches:
        first = [batch[2].tolist() for batch in batches]
        assert len(children()) == 1
        batches.batch_sampler.set_epoch(0, 2)
        assert [batch[2].tolist() for batch in batches] == first[2:]
        assert len(children()) == 1  # the same one
    assert children() == []
    assert len(list(batches)) == 2  # opened again
    batches.close()
    batches.close()
    assert children() == []


def test_readers_of_a_closed_loader_are_told():
    for read in (0, 1):
        batches = loader(toy(), 8, workers=1)
        started = iter(batches)
        for _ in range(read):
            next(started)
        batches.close()
        with pytest.raises(RuntimeError, match="the loader was closed before its last batch"):
            list(started)


@pytest.mark.parametrize("how", ["close", "forget", "cycle"])
def test_workers_that_are_busy_are_not_waited_for(how):
    batches = loader(Sleeping(toy_dataset(16, size=64), 64), 8, workers=2)
    started = iter(batches)
    assert len(children()) == 2
    if how == "close":
        batches.close()
    elif how == "cycle":
        cycle = [batches, started]
        cycle.append(cycle)
        del cycle
    del batches, started
    gc.collect()
    assert children() == []


@pytest.mark.slow
def test_busy_workers_do_not_outlive_the_main_process():
    code = """
import test_workers as t

left = iter(t.loader(t.Sleeping(t.toy_dataset(16, size=64), 64), 8, workers=1))
print(t.children()[0].pid)
raise SystemExit(7)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT / "tests",
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        timeout=LIMIT,
        text=True,
    )
    assert done.returncode == 7
    assert not psutil.pid_exists(int(done.stdout))


@pytest.mark.filterwarnings("error")
def test_a_forgotten_loader_does_not_disturb_the_next_one(capfd):
    "The next one's worker inherits what nobody refers to, and may find it first."

    class Collecting(DetDataset):
        def __getitem__(self, key):
            gc.collect()
            return super().__getitem__(key)

    gc.disable()
    gc.freeze()  # what is older is not looked through for every image: seconds with torch and all
    try:
        batches = loader(toy(), 8, workers=1)
        cycle = [batches, iter(batches)]
        cycle.append(cycle)
        del cycle, batches
        with loader(Collecting(toy_dataset(16, size=64), 64), 8, workers=1) as batches:
            assert len(list(batches)) == 2
            assert len(children()) == 2
    finally:
        gc.unfreeze()
        gc.enable()
    gc.collect()
    assert children() == []
    assert capfd.readouterr().err == ""
