"""A training of a pair classifier is killed in either stage and ends at the same bits.

This file is also the program that is killed, by SIGKILL, between two of its batches.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import LIMIT

from mhdet.core.runs import JsonLog
from mhdet.pairs.config import load_pairs_config
from mhdet.pairs.panorama import read_panoramas
from mhdet.pairs.toy import write_toy
from mhdet.pairs.training import train_pairs
from mhdet.training.checkpoint import flatten, load
from mhdet.training.learner import Callback

ROOT = Path(__file__).resolve().parents[1]
WORDS = [
    *("image_size=32", "tiny_width=8", "hidden=[16]", "batch=8", "device=cpu", "run=run"),
    *("stage1_epochs=2", "stage2_epochs=2", "save_steps=2", "stage1_keep_every=1"),
]


def main(root, stage, steps):
    "Train or continue; die in a stage after so many steps of it, if it comes to that."
    torch.set_num_threads(1)

    class Die(Callback):
        def after_batch(self, learner):
            if learner.loss.stage == stage and learner.steps == steps:
                os.kill(os.getpid(), signal.SIGKILL)

    frames = read_panoramas(root.parent / "toy")
    resume = "run" if (root / "run").exists() else None
    train_pairs(
        load_pairs_config(*WORDS), frames, resume=resume, root=root, quiet=True, more=[Die()]
    )


class Program:
    "This file as a program that has its libraries imported, and trains each time in a fork."

    def __enter__(self):
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process = subprocess.Popen([sys.executable, __file__], env=env, **pipes)
        return self

    def start(self, root, stage=0, steps=0):
        "The exit code of a training."
        print(json.dumps([str(root), stage, steps]), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def __exit__(self, *_):
        self.process.communicate(timeout=LIMIT)


def outcome(root):
    "Tensors of every stored state, and the log without times."
    run, tensors, rows = root / "run", {}, []
    for path in sorted(run.glob("stage*/*/0.json")):
        tree = load(path.parent)[0]
        kept = {k: tree[k] for k in ("model", "optimizer", "position") if k in tree}
        for name, value in flatten(kept)[0].items():
            tensors[f"{path.parent.relative_to(run)}/{name}"] = value
    for stage in (1, 2):
        for row in JsonLog(run / f"stage{stage}/log.jsonl").rows():
            row = {k: v for k, v in row.items() if "second" not in k and not k.endswith("_per_s")}
            rows.append({k: v for k, v in row.items() if k != "data_ready"})
    return tensors, rows


@pytest.fixture(scope="module")
def program():
    with Program() as program:
        yield program


@pytest.fixture(scope="module")
def toy(tmp_path_factory, program):
    folder = tmp_path_factory.mktemp("pairs")
    write_toy(folder / "toy", scenes=8, frames=2)
    (folder / "whole").mkdir()
    assert program.start(folder / "whole") == 0
    return folder


@pytest.mark.slow
def test_killed_in_both_stages_it_ends_at_the_same_bits(toy, program):
    start, root = program.start, toy / "killed"
    root.mkdir()
    assert start(root, 1, 9) == -signal.SIGKILL
    assert (root / "run/stage1/last").is_dir() and not (root / "run/stage2").exists()
    assert start(root, 2, 5) == -signal.SIGKILL
    assert start(root) == 0
    tensors, rows = outcome(root)
    expected, log = outcome(toy / "whole")
    assert rows == log
    assert tensors.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(tensors[name], value), name
    reasons = (root / "run/stage1/restarts.csv").read_text()
    assert "killed or power loss" in reasons
    for stage in (1, 2):
        text = [
            (r / f"run/stage{stage}/evaluation_report.txt").read_text()
            for r in (root, toy / "whole")
        ]
        assert text[0] == text[1]


if __name__ == "__main__":
    for line in sys.stdin:
        place, stage, steps = json.loads(line)
        child = os.fork()
        if not child:
            main(Path(place), stage, steps)
            break
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
