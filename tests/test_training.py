"""Training on the built-in images: stages, memory that runs out, the golden loss curve."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from trainings import Stop

from mhdet.core.config import load_config
from mhdet.data.splits import open_data
from mhdet.experiment import run as experiment
from mhdet.experiment.models import build, load_run
from mhdet.training.checkpoint import flatten, load
from mhdet.training.learner import Callback

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[1]
SMALL = [
    *("data=toy:64", "imgsz=64", "width=0.125", "batch=8", "nominal_batch=8"),
    *("workers=0", "precision=fp32", "device=cpu"),
]
STAGES = [
    dict(epochs=1, freeze=50, lr=0.01),
    dict(epochs=1, freeze=30, lr=0.001),
    dict(epochs=1, freeze=10, lr=0.0005, warmup_bias_lr=0.05),
    dict(epochs=1, freeze=0, lr=0.0001, warmup_bias_lr=0.01),
]


@pytest.fixture(scope="module")
def toys():
    return open_data("toy:64")


def weights(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


class Snapshots(Callback):
    "The model before and after every epoch, and which of its layers learn."

    def __init__(self):
        self.states, self.learning = [], []

    def before_epoch(self, learner):
        self.start = weights(learner.model)

    def after_epoch(self, learner):
        self.states.append((self.start, weights(learner.model)))
        learning = set()
        for n, layer in learner.model.trunk.layers():
            if all(p.requires_grad for p in layer.parameters()):
                learning.add(n)
        self.learning.append(learning)


class Losses(Callback):
    "The loss of every batch."

    def __init__(self):
        self.values = []

    def after_batch(self, learner):
        self.values.append(float(learner.values[0]))


def train(root, toys, name, *words, more=(), **kw):
    cfg = load_config(*SMALL, f"run={name}", *words)
    return experiment.train(cfg, toys, root=root, quiet=True, more=more, **kw)


def stored_tensors(run):
    tree = load(run / "last")[0]
    return flatten({k: tree[k] for k in ("model", "ema", "optimizer", "position")})[0]


def test_every_stage_keeps_what_is_frozen(tmp_path, toys):
    snapshots = Snapshots()
    stages = f"stages={json.dumps(STAGES)}"
    run = train(tmp_path, toys, "stages", "epochs=4", "keep_every=1", stages, more=[snapshots])
    model = load_run(run)[0]
    name_of = {id(m): name for name, m in model.named_modules()}
    names = {n: name_of[id(layer)] for n, layer in model.trunk.layers()}
    epochs = zip(STAGES, snapshots.states, snapshots.learning, strict=True)
    for stage, (before, after), learning in epochs:
        assert learning == {n for n in names if n >= stage["freeze"]}
        for n, name in names.items():
            inside = [k for k in before if k.startswith(f"{name}.")]
            changed = {k for k in inside if not torch.equal(before[k], after[k])}
            assert bool(changed) == (n >= stage["freeze"]), (stage, n, changed)
            if changed:
                kinds = {k.split(".")[-1] for k in changed}
                statistics = {"running_mean", "running_var", "num_batches_tracked"}
                assert kinds >= {"weight"} | statistics
    # a later stage that starts from a kept epoch
    cfg = load_config(*SMALL, f"weights={run}@2")
    start = build(cfg, toys["train"].names)
    kept = load(run / "epoch_002")[0]["ema"]
    assert all(torch.equal(v, kept[k]) for k, v in start.state_dict().items())


ADAMW = ["optimizer=adamw", "lr=0.002"]


@pytest.mark.parametrize("optimizer", [[], ADAMW], ids=["sgd", "adamw"])
def test_stages_continue_in_the_middle_of_one(tmp_path, toys, optimizer):
    words = "epochs=4", f"stages={json.dumps(STAGES)}", *optimizer
    whole = train(tmp_path, toys, "whole", *words)
    broken = train(tmp_path, toys, "broken", *words, more=[Stop(2, 3)])
    train(tmp_path, toys, "broken", "epochs=4", resume="broken")
    expected, resumed = stored_tensors(whole), stored_tensors(broken)
    for (name, a), b in zip(expected.items(), resumed.values(), strict=True):
        assert torch.equal(a, b), name
    with pytest.raises(ValueError, match="epochs: 9, but the stages have 4"):
        train(tmp_path, toys, "broken", "epochs=9", resume="broken")


@pytest.mark.parametrize(
    ("reason", "optimizer"), [("nan", []), ("nan", ADAMW), ("out of memory", [])]
)
def test_a_stage_that_fails_as_it_thaws_begins_again(
    tmp_path, toys, monkeypatch, reason, optimizer
):
    make_loss, calls = experiment.make_loss, []
    first_of_second_stage = len(toys["train"]) // 8 + 2

    def failing_once(*args):
        whole = make_loss(*args)

        def loss(raws, targets):
            training = raws[0].requires_grad
            calls.extend([1] * training)
            if len(calls) != first_of_second_stage or not training:
                return whole(raws, targets)
            if reason != "nan":
                raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")
            return {k: v * float("nan") for k, v in whole(raws, targets).items()}

        return loss

    monkeypatch.setattr(experiment, "make_loss", failing_once)
    stages = 'stages=[{"epochs": 1, "freeze": 10}, {"epochs": 1}]'
    run = train(tmp_path, toys, "thaw", "epochs=2", stages, *optimizer)
    assert (run / "restarts.csv").read_text().splitlines()[2].startswith("2,1,0,")
    assert load(run / "last")[0]["position"]["epoch"] == 2


def test_adamw_starts_with_its_own_rate_of_biases_and_keeps_beta1(tmp_path, toys):
    seen = []

    class Look(Callback):
        def after_batch(self, learner):
            seen.append([dict(g, params=None) for g in learner.optimizer.param_groups])

    words = "epochs=2", "keep_every=1", "freeze=10", "warmup=1", *ADAMW
    run = train(tmp_path, toys, "adamw", *words, more=[Look()])
    rates = [{g["kind"]: g["lr"] for g in groups} for groups in seen]
    assert 0.0019 < rates[0]["bias"] <= 0.002
    assert rates[-1]["weight"] == pytest.approx(rates[-1]["bias"])
    assert rates[-1]["weight"] < 0.001
    assert {tuple(g["betas"]) for groups in seen for g in groups} == {(0.937, 0.999)}
    assert {(g["kind"], g["weight_decay"]) for g in seen[-1]} == {
        ("weight", 5e-4),
        ("norm", 0.0),
        ("bias", 0.0),
    }
    state = load(run / "last")[0]["optimizer"]["state"].values()
    assert {frozenset(kept) for kept in state} == {frozenset(["step", "exp_avg", "exp_avg_sq"])}
    assert {int(kept["step"]) for kept in state} == {len(seen)}
    everything = sum(1 for _ in load_run(run)[0].parameters())
    assert 0 < len(state) < everything  # what is frozen has none


@pytest.mark.slow
def test_a_run_killed_before_its_first_state_begins_with_its_weights(tmp_path, toys):
    base = train(tmp_path, toys, "base", "epochs=1")
    run = train(tmp_path, toys, "next", "epochs=1", f"weights={base}", "lr=0.0", "ema=0.0")
    shutil.rmtree(run / "last")
    (run / "last").mkdir()
    train(tmp_path, toys, "next", resume="next")
    expected, actual = load(base / "last")[0]["ema"], load(run / "last")[0]["model"]
    for name, value in actual.items():
        if name.endswith("conv.weight"):
            assert torch.equal(expected[name], value), name


def test_memory_that_runs_out_halves_the_batch(tmp_path, toys, monkeypatch):
    make_loss = experiment.make_loss

    def room_for_two(*args):
        whole = make_loss(*args)

        def loss(raws, targets):
            if raws[0].requires_grad and len(raws[0]) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
            return whole(raws, targets)

        return loss

    monkeypatch.setattr(experiment, "make_loss", room_for_two)
    run = train(tmp_path, toys, "narrow", "epochs=2", more=[Snapshots()])
    with (run / "restarts.csv").open() as file:
        rows = [row[:7] for row in csv.reader(file)]
    # 8 images, 4, then 2
    assert rows[2:] == [["1", "0", "0", "0", "0", "", "out of memory"]] * 2
    tree = load(run / "last")[0]
    assert tree["parts"] == 4
    assert tree["position"]["steps"] == 2 * (len(toys["train"]) // 8)
    monkeypatch.setattr(experiment, "make_loss", make_loss)
    train(tmp_path, toys, "narrow", "epochs=3", resume="narrow")
    assert load(run / "last")[0]["parts"] == 4  # a resumed run remembers what fits


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_golden_loss_curve(tmp_path, toys, device):
    """Twenty steps, compared with the recorded curve of this device.

    With group norm and a small learning rate rounding does not grow.
    """
    golden = json.loads((ROOT / "tests/data/golden-loss.json").read_text())
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if device not in golden:
        pytest.skip(f"no curve of {device} was recorded yet")
    words = ("batch=2", "nominal_batch=2", "epochs=1", "lr=0.002", "norm_layer=gn")
    losses = Losses()
    more = [losses, Stop(0, 20)]
    train(tmp_path, toys, "golden", f"device={device}", *words, more=more)
    assert losses.values == pytest.approx(golden[device], rel=1e-5), losses.values
