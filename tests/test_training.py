"""The trainer on the built-in pictures: the ladder of stages, memory that runs out, the golden loss curve."""
import json
import shutil
from pathlib import Path

import pytest
import torch

from mhdet import experiment
from mhdet.core.config import load_config
from mhdet.data.splits import open_data
from mhdet.training.learner import Callback, StopFit
from mhdet.training.checkpoint import flatten, load

ROOT = Path(__file__).resolve().parents[1]
SMALL = "data=toy:64 imgsz=64 width=0.125 batch=8 nominal_batch=8 workers=0 precision=fp32 device=cpu".split()
LADDER = [dict(epochs=1, freeze=50, lr=.01), dict(epochs=1, freeze=30, lr=.001), dict(epochs=1, freeze=10, lr=.0005, warmup_bias_lr=.05),
          dict(epochs=1, freeze=0, lr=.0001, warmup_bias_lr=.01)]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def toys(): return open_data("toy:64")


class Snapshots(Callback):
    "The model before and after every epoch, and which of its layers learn."
    def __init__(self): self.states, self.learn = [], []
    def before_epoch(self, learner): self.start = {k: v.clone() for k, v in learner.model.state_dict().items()}
    def after_epoch(self, learner):
        self.states.append((self.start, {k: v.clone() for k, v in learner.model.state_dict().items()}))
        self.learn.append({n for n, layer in learner.model.trunk.layers() if all(p.requires_grad for p in layer.parameters())})


class Stop(Callback):
    def __init__(self, epoch, batch): self.place = epoch, batch
    def after_batch(self, learner):
        if (learner.epoch, learner.batch) == self.place: raise StopFit("stopped by a test")


def train(root, toys, name, *words, more=(), **kw): return experiment.train(load_config(*SMALL, f"run={name}", *words), toys, root=root, quiet=True, more=more, **kw)


def bits(run): return flatten({k: v for k, v in load(run / "last")[0].items() if k in ("model", "ema", "optimizer", "position")})


def test_every_stage_of_the_ladder_keeps_what_is_frozen(tmp_path, toys):
    seen = Snapshots()
    run = train(tmp_path, toys, "ladder", "epochs=4", "keep_every=1", f"stages={json.dumps(LADDER)}", more=[seen])
    model = experiment.load_run(run)[0]
    name_of = {id(m): name for name, m in model.named_modules()}
    names = {n: name_of[id(layer)] for n, layer in model.trunk.layers()}
    for stage, (before, after), learn in zip(LADDER, seen.states, seen.learn, strict=True):
        assert learn == {n for n in names if n >= stage["freeze"]}
        for n, name in names.items():
            moved = {k for k in before if k.startswith(f"{name}.") and not torch.equal(before[k], after[k])}
            assert bool(moved) == (n >= stage["freeze"]), (stage, n, moved)
            if moved: assert {k.split(".")[-1] for k in moved} >= {"weight", "running_mean", "running_var", "num_batches_tracked"}
    start = experiment.build(load_config(*SMALL, f"weights={run}@2"), toys["train"].names)              # a later stage begun from a kept epoch
    kept = load(run / "epoch_002")[0]["model"]
    assert all(torch.equal(v, kept[k]) for k, v in start.state_dict().items())


def test_a_ladder_goes_on_in_the_middle_of_a_stage(tmp_path, toys):
    words = "epochs=4", f"stages={json.dumps(LADDER)}"
    whole = train(tmp_path, toys, "whole", *words)
    broken = train(tmp_path, toys, "broken", *words, more=[Stop(2, 3)])
    train(tmp_path, toys, "broken", "epochs=4", resume="broken")
    for (k, a), b in zip(bits(whole)[0].items(), bits(broken)[0].values(), strict=True): assert torch.equal(a, b), k
    with pytest.raises(ValueError, match="epochs: 9, but the stages have 4"): train(tmp_path, toys, "broken", "epochs=9", resume="broken")


@pytest.mark.parametrize("reason", ["nan", "out of memory"])
def test_a_stage_that_fails_as_it_thaws_begins_again(tmp_path, toys, monkeypatch, reason):
    made, seen = experiment.make_loss, []

    def once(*args):
        whole = made(*args)
        def loss(raws, targets):
            seen.extend([1] * raws[0].requires_grad)
            if len(seen) != len(toys["train"]) // 8 + 2 or not raws[0].requires_grad: return whole(raws, targets)
            if reason != "nan": raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")
            return {k: v * float("nan") for k, v in whole(raws, targets).items()}
        return loss

    monkeypatch.setattr(experiment, "make_loss", once)
    run = train(tmp_path, toys, "thaw", "epochs=2", 'stages=[{"epochs": 1, "freeze": 10}, {"epochs": 1}]')
    assert (run / "restarts.csv").read_text().splitlines()[1].startswith("2,1,0,") and load(run / "last")[0]["position"]["epoch"] == 2


def test_a_run_killed_before_its_first_state_begins_with_its_weights(tmp_path, toys):
    base = train(tmp_path, toys, "base", "epochs=1")
    run = train(tmp_path, toys, "next", "epochs=1", f"weights={base}", "lr=0.0", "ema=0.0")
    shutil.rmtree(run / "last")
    (run / "last").mkdir()
    train(tmp_path, toys, "next", resume="next")
    want, got = (load(r / "last")[0]["ema" if r == base else "model"] for r in (base, run))
    assert all(torch.equal(want[k], v) for k, v in got.items() if k.endswith("conv.weight"))


def test_memory_that_runs_out_halves_the_batch(tmp_path, toys, monkeypatch):
    made = experiment.make_loss

    def narrow(*args):
        whole = made(*args)
        def loss(raws, targets):
            if raws[0].requires_grad and len(raws[0]) > 2: raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
            return whole(raws, targets)
        return loss

    monkeypatch.setattr(experiment, "make_loss", narrow)
    seen = Snapshots()
    run = train(tmp_path, toys, "narrow", "epochs=2", more=[seen])
    rows = (run / "restarts.csv").read_text().splitlines()
    assert rows[1:] == ["1,0,0,0,0,,out of memory"] * 2                        # 8 pictures, 4, then 2
    tree = load(run / "last")[0]
    assert tree["parts"] == 4 and tree["position"]["steps"] == 2 * (len(toys["train"]) // 8)
    monkeypatch.setattr(experiment, "make_loss", made)
    train(tmp_path, toys, "narrow", "epochs=3", resume="narrow")               # goes on with what it has learned about the machine
    assert load(run / "last")[0]["parts"] == 4


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_golden_loss_curve(tmp_path, toys, device):
    "Twenty steps. With group norm and a small rate rounding does not grow; another device has another curve."
    golden = json.loads((ROOT / "tests/data/golden-loss.json").read_text())
    if device == "cuda" and not torch.cuda.is_available(): pytest.skip("no CUDA device")
    if device not in golden: pytest.skip(f"no curve of {device} was recorded yet")

    class Losses(Callback):
        def __init__(self): self.all = []
        def after_batch(self, learner): self.all.append(float(learner.values[0]))

    losses = Losses()
    train(tmp_path, toys, "golden", f"device={device}", "batch=2", "nominal_batch=2", "epochs=1", "lr=0.002", "norm_layer=gn", more=[losses, Stop(0, 20)])
    assert losses.all == pytest.approx(golden[device], rel=1e-5), losses.all
