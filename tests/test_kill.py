"""A training of the built-in pictures is killed again and again, also inside its saves, and ends at the same bits.

This file is also the program that is killed, and `python tests/test_kill.py 30` does it thirty times with 0, 1 and 2 loader workers. The tests take
2 workers; MHDET_ALL=1 before them takes all three.
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
WORDS = ("data=toy:160 imgsz=64 width=0.125 batch=8 nominal_batch=16 epochs=4 save_steps=2 keep_every=2 mosaic=1 "
         "precision=fp32 device=cpu run=run").split()


def main(root, workers, moment, pause):
    "Train or go on; die by SIGKILL at the given disk operation, if it comes to that."
    from mhdet.core.config import load_config
    from mhdet.experiment.run import train
    from mhdet.training.learner import Callback
    torch.set_num_threads(1)
    done = 0

    def deadly(operation):
        def op(*args, **kw):
            nonlocal done
            done += 1
            if done == moment: os.kill(os.getpid(), signal.SIGKILL)
            return operation(*args, **kw)
        return op

    class Slow(Callback):
        def before_batch(self, learner): time.sleep(pause)

    os.fsync, os.replace = deadly(os.fsync), deadly(os.replace)
    train(load_config(*WORDS, f"workers={workers}"), resume="run" if (root / "run").exists() else None, root=root, quiet=True, more=[Slow()])


def start(root, workers, moment=0, pause=0.):
    command = [sys.executable, __file__, "child", str(root), str(workers), str(moment), str(pause)]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, start_new_session=True)


def bits(root):
    "What a run ended with: weights, average, momentum and the numbers of its log."
    from mhdet.core.runs import JsonLog
    from mhdet.training.checkpoint import flatten, load
    tree = load(root / "run/last")[0]
    rows = [{k: v for k, v in r.items() if k not in ("seconds", "eval_seconds", "pictures_per_s", "busy")} for r in JsonLog(root / "run/log.jsonl").rows()]
    kept = {k: v for k, v in flatten({k: tree[k] for k in ("model", "ema", "optimizer", "position")})[0].items()}
    return kept, rows, tree["position"], {p.name: load(p)[0]["model"] for p in (root / "run").glob("epoch_*")}


def same(a, b):
    assert a[1:3] == b[1:3] and a[0].keys() == b[0].keys() and a[3].keys() == b[3].keys()
    for k in a[0]: assert torch.equal(a[0][k], b[0][k]), k
    for name in a[3]:
        for k in a[3][name]: assert torch.equal(a[3][name][k], b[3][name][k]), (name, k)


def steps(root):
    from mhdet.training.checkpoint import read_meta
    return read_meta(root / "run/last").get("steps", 0)


def killed(root, workers, kills, rng):
    "Kill a run so often, by turns after a stored state and at a disk operation, then let it end; how many died, and how many in a save."
    died = inside = 0
    while died < kills:
        save, before = died % 2 == 1, steps(root)
        child = start(root, workers, rng.randint(1, 40) if save else 0, .02)
        if not save:
            while steps(root) == before and child.poll() is None: time.sleep(.01)
            time.sleep(.4 * rng.random())
            if child.poll() is None: os.killpg(child.pid, signal.SIGKILL)
        if child.wait(LIMIT) == 0: break                        # it was faster
        assert child.returncode == -signal.SIGKILL, child.returncode
        died, inside = died + 1, inside + save
    assert start(root, workers).wait(LIMIT) == 0
    return died, inside


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    assert start(root, 0).wait(LIMIT) == 0
    return bits(root)


@pytest.mark.parametrize("workers", [0, 1, 2] if os.environ.get("MHDET_ALL") == "1" else [2])
def test_killed_runs_end_at_the_same_bits(tmp_path, whole, workers):
    assert killed(tmp_path, workers, 2, random.Random(workers)) == (2, 1)
    same(bits(tmp_path), whole)


if __name__ == "__main__" and sys.argv[1] == "child":
    main(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5]))
elif __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        assert start(folder / "whole", 0).wait() == 0
        due, kills, rng = bits(folder / "whole"), int(sys.argv[1]), random.Random(0)
        for workers in (0, 1, 2):
            died = inside = runs = 0
            while died < kills:
                runs += 1
                root = folder / f"{workers}-{runs}"
                d, i = killed(root, workers, min(kills - died, 6), rng)
                same(bits(root), due)
                died, inside = died + d, inside + i
                print(f"workers={workers}: {died} kills, {inside} of them inside a save, {runs} runs, all bit-equal", flush=True)
