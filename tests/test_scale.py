"""Two processes train what one trains; one that dies takes the other along, and leaves a state to go on from. This file is also the program they run."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mhdet.core import JsonLog
from mhdet.store import load, read_meta

ROOT = Path(__file__).resolve().parents[1]
WORDS = "data=toy:200 imgsz=64 width=0.125 batch=16 nominal_batch=16 precision=fp32 device=cpu workers=0".split()


def main(root, *words):
    import torch
    from mhdet.core import load_cfg
    from mhdet.experiment import train
    from mhdet.learner import Callback
    torch.set_num_threads(1)

    class Note(Callback):
        "The loss of every batch, of all processes; and time to be killed in."
        rows = []
        def before_batch(self, learner): time.sleep(float(os.environ.get("PAUSE", 0)))
        def after_batch(self, learner):
            values = learner.accelerator.reduce(learner.values, "mean").tolist()
            self.rows.append({k: v * (learner.world if k == "loss" else 1) for k, v in zip(learner.names, values)})
        def after_fit(self, learner):
            if learner.accelerator.is_main_process: (root / "losses.json").write_text(json.dumps(self.rows))

    cfg = load_cfg(*WORDS, "run=run", *words)
    train(cfg, resume="run" if (root / "run").exists() else None, root=root, quiet=True, more=[Note()])


def start(root, processes, *words, pause=0.):
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    root.mkdir(exist_ok=True)
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PAUSE": str(pause)}
    return subprocess.Popen([sys.executable, *launch, __file__, str(root), *words], env=env, stderr=subprocess.PIPE, text=True, start_new_session=True)


def losses(root, processes, *words):
    child = start(root, processes, *words)
    _, err = child.communicate(timeout=180)
    assert child.returncode == 0, err
    return json.loads((root / "losses.json").read_text())


def apart(a, b): return max(abs(x[k] - y[k]) / max(abs(x[k]), 1e-3) for x, y in zip(a, b, strict=True) for k in x)


def test_two_processes_train_what_one_trains(tmp_path):
    words = "norm_layer=gn", "epochs=1", "lr=0.002"                    # a small rate: rounding does not grow
    one, two = losses(tmp_path / "one", 1, *words), losses(tmp_path / "two", 2, *words)
    assert len(one) == 10 and apart(one, two) < 1e-5
    rows = [JsonLog(tmp_path / f"{n}/run/log.jsonl").rows() for n in ("one", "two")]
    assert [len(r) for r in rows] == [1, 1]                            # the first process alone writes
    for k in (k for k in rows[0][0] if k.split("/")[0] in ("train", "dev", "AP", "AP50")): assert rows[0][0][k] == pytest.approx(rows[1][0][k], rel=1e-4), k
    assert not list(tmp_path.rglob("*.part"))


def test_batch_norm_sees_only_its_share(tmp_path):
    words = "norm_layer=bn", "epochs=1", "lr=0.002"
    assert apart(losses(tmp_path / "one", 1, *words)[:1], losses(tmp_path / "two", 2, *words)[:1]) > 1e-3


def test_one_process_goes_on_where_two_stopped(tmp_path):
    root, words = tmp_path / "run", ("norm_layer=gn", "lr=0.002")
    losses(root, 2, *words, "epochs=1")
    assert len(losses(root, 1, "epochs=2")) == 10 and read_meta(root / "run/last")["epoch"] == 2


def test_a_process_that_dies_ends_the_other(tmp_path):
    child = start(tmp_path, 2, "norm_layer=gn", "epochs=20", "save_steps=2", pause=.05)
    limit = time.monotonic() + 120
    while read_meta(tmp_path / "run/last").get("steps", 0) < 2:
        assert time.monotonic() < limit and child.poll() is None
        time.sleep(.05)
    ranks = [int(p) for p in subprocess.run(["pgrep", "-P", str(child.pid)], capture_output=True, text=True).stdout.split()]
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    start_at = time.monotonic()
    child.communicate(timeout=60)
    assert child.returncode != 0 and time.monotonic() - start_at < 30
    for pid in ranks:
        with pytest.raises(ProcessLookupError): os.kill(pid, 0)
    tree, meta = load(tmp_path / "run/last")
    assert meta["steps"] >= 2 and tree["position"]["steps"] == meta["steps"]
    stopped = meta["steps"]
    (tmp_path / "losses.json").unlink(missing_ok=True)
    rest = losses(tmp_path, 2, f"epochs={meta['epoch'] + 1}")
    assert read_meta(tmp_path / "run/last")["epoch"] == meta["epoch"] + 1 and len(rest) == (meta["epoch"] + 1) * 10 - stopped


if __name__ == "__main__": main(Path(sys.argv[1]), *sys.argv[2:])
