"""A training on the built-in images is killed again and again and ends at the same bits.

Also inside its saves. This file is also the program that is killed, and `python
tests/test_kill.py 30` does it thirty times with 0, 1 and 2 loader workers. The test runs with
MHDET_ALL=1; a training of pairs is killed in every run of the tests (`test_pairs_kill.py`).
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from processes import LIMIT

ROOT = Path(__file__).resolve().parents[1]
WORDS = [
    *("data=toy:160", "imgsz=64", "width=0.125", "batch=8", "nominal_batch=16", "epochs=4"),
    *("save_steps=2", "keep_every=2", "mosaic=1", "precision=fp32", "device=cpu", "run=run"),
]
TIMES = ("seconds", "eval_seconds", "pictures_per_s", "data_ready")  # differ from run to run


def main(root, workers, moment, pause):
    "Train or continue; die by SIGKILL at the given disk operation, if it comes to that."
    from mhdet.core.config import load_config
    from mhdet.experiment.run import train
    from mhdet.training.learner import Callback

    torch.set_num_threads(1)
    operations = 0

    def deadly(operation):
        def counted(*args, **kw):
            nonlocal operations
            operations += 1
            if operations == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*args, **kw)

        return counted

    class Slow(Callback):
        def before_batch(self, learner):
            time.sleep(pause)

    os.fsync, os.replace = deadly(os.fsync), deadly(os.replace)
    cfg = load_config(*WORDS, f"workers={workers}")
    resume = "run" if (root / "run").exists() else None
    train(cfg, resume=resume, root=root, quiet=True, more=[Slow()])


def start(root, workers, moment=0, pause=0.0):
    command = [sys.executable, __file__, "child", str(root), str(workers), str(moment), str(pause)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=env, start_new_session=True)


def outcome(root):
    "What a run ended with: tensors, log without times, position, kept epochs."
    from mhdet.core.runs import JsonLog
    from mhdet.training.checkpoint import flatten, load

    run = root / "run"
    tree = load(run / "last")[0]
    rows = []
    for row in JsonLog(run / "log.jsonl").rows():
        rows.append({k: v for k, v in row.items() if k not in TIMES})
    tensors = flatten({k: tree[k] for k in ("model", "ema", "optimizer", "position")})[0]
    epochs = {p.name: load(p)[0]["model"] for p in run.glob("epoch_*")}
    return tensors, rows, tree["position"], epochs


def assert_same_tensors(a, b, where=""):
    assert a.keys() == b.keys(), where
    for name in a:
        assert torch.equal(a[name], b[name]), (where, name)


def assert_same(a, b):
    assert a[1:3] == b[1:3]
    assert_same_tensors(a[0], b[0])
    assert a[3].keys() == b[3].keys()
    for epoch in a[3]:
        assert_same_tensors(a[3][epoch], b[3][epoch], epoch)


def steps(root):
    from mhdet.training.checkpoint import read_meta

    return read_meta(root / "run/last").get("steps", 0)


def kill_and_finish(root, workers, kills, rng):
    """Kill a run so often, then let it end.

    By turns after a stored state and at a disk operation. Returns how many runs died, and how
    many of them inside a save.
    """
    died = inside = 0
    while died < kills:
        in_save, before = died % 2 == 1, steps(root)
        child = start(root, workers, rng.randint(1, 40) if in_save else 0, 0.02)
        if not in_save:
            while steps(root) == before and child.poll() is None:
                time.sleep(0.01)
            time.sleep(0.4 * rng.random())
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
        if child.wait(LIMIT) == 0:  # it was faster
            break
        assert child.returncode == -signal.SIGKILL, child.returncode
        died, inside = died + 1, inside + in_save
    assert start(root, workers).wait(LIMIT) == 0
    return died, inside


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    assert start(root, 0).wait(LIMIT) == 0
    return outcome(root)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_killed_runs_end_at_the_same_bits(tmp_path, whole, workers):
    assert kill_and_finish(tmp_path, workers, 2, random.Random(workers)) == (2, 1)
    assert_same(outcome(tmp_path), whole)


def kill_many(folder, kills):
    "So many kills with each number of workers, in runs of at most six."
    assert start(folder / "whole", 0).wait() == 0
    expected, rng = outcome(folder / "whole"), random.Random(0)
    for workers in (0, 1, 2):
        died = inside = runs = 0
        while died < kills:
            runs += 1
            root = folder / f"{workers}-{runs}"
            new_died, new_inside = kill_and_finish(root, workers, min(kills - died, 6), rng)
            assert_same(outcome(root), expected)
            died, inside = died + new_died, inside + new_inside
            summary = f"{died} kills, {inside} of them inside a save, {runs} runs, all bit-equal"
            print(f"workers={workers}: {summary}", flush=True)


if __name__ == "__main__" and sys.argv[1] == "child":
    main(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5]))
elif __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        kill_many(Path(temporary), int(sys.argv[1]))
