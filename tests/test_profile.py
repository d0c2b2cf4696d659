"""Where the time of a step goes: what is timed is what trains, and the parts are the whole.

How long anything takes is not tested: the machine may be busy.
"""

import json

import pytest
import torch
from typer.testing import CliRunner

from mhdet.cli.commands import app
from mhdet.core.config import load_config
from mhdet.core.runs import JsonLog
from mhdet.experiment import profile as module
from mhdet.experiment.profile import PARTS, StepClock, part_seconds, profile
from mhdet.experiment.run import train
from mhdet.training import callbacks
from mhdet.training.callbacks import device_busy

TINY = "data=toy:24 imgsz=64 width=0.125 batch=4 nominal_batch=8 dev=0 mosaic=0 workers=0"
TINY = f"{TINY} device=cpu precision=fp32 epochs=3"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_parts_are_the_whole_step():
    "Also where nothing is averaged, nothing accumulated, and a step is bound by the network."
    cfg = load_config(*TINY.split(), "ema=0", "nominal_batch=4", "assign=ota")
    timed = profile(cfg, steps=8)
    assert list(timed["parts"]) == list(PARTS)
    assert abs(sum(timed["shares"].values()) - 1) < 0.05
    assert timed["parts"]["ema"] == 0 < min(timed["parts"][k] for k in ("load", "loss", "backward"))
    assert (timed["batches"], timed["images"], timed["precision"]) == (1, 4, "fp32")
    low, high = timed["quartiles_ms"]
    assert 0 < low <= high


def test_steps_with_and_without_marks_alternate(tmp_path):
    clock = StepClock(steps=5, warmup=1)
    run = train(load_config(*TINY.split(), "run=a"), quiet=True, more=[clock])
    assert (len(clock.marked), len(clock.whole)) == (3, 2)  # the first step of all has none
    for seconds, marks in clock.marked:
        # by one clock, read at the same places: no matter how busy the machine is
        assert sum(part_seconds(marks).values()) <= seconds
    assert json.loads((run / "env.json").read_text())["stopped"] == "profiled"


def test_a_step_cut_short_by_the_end_of_an_epoch_is_not_counted():
    "Five batches are two steps of two and one of one."
    clock = StepClock(steps=4, warmup=0)
    cfg = load_config(*TINY.split(), "data=toy:40", "batch=8", "nominal_batch=16", "run=a")
    train(cfg, quiet=True, more=[clock])
    assert clock.facts["batches"] == 2 and clock.seen == 4


def test_starting_weights_are_found_by_the_name_of_a_run(tmp_path):
    "The timed run lies elsewhere, and is gone afterwards."
    train(load_config(*TINY.split(), "run=base", "epochs=1"), quiet=True)
    before = sorted(path.name for path in (tmp_path / "runs").iterdir())
    cfg = load_config(*TINY.split(), "weights=base")
    assert profile(cfg, steps=4)["images"] == 8
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == before


def test_the_trace_of_kernels_covers_a_part_of_the_time():
    trace = module._KernelTrace(steps=2, warmup=1)
    train(load_config(*TINY.split(), "run=a"), quiet=True, more=[trace])
    assert 0 < trace.share <= 1 and trace.seen == 3


class Gpu:
    type = "cuda"


def test_how_busy_a_gpu_is_comes_from_its_driver(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 63)
    assert device_busy(Gpu) == 0.63
    assert device_busy(torch.device("cpu")) is None

    def missing(device):
        raise ModuleNotFoundError("nvidia-ml-py does not seem to be installed")

    monkeypatch.setattr(torch.cuda, "utilization", missing)
    assert device_busy(Gpu) is None
    monkeypatch.setattr(callbacks, "device_busy", lambda device: 0.5)
    run = train(load_config(*TINY.split(), "run=a", "epochs=1"), quiet=True)
    (row,) = JsonLog(run / "log.jsonl").rows()
    assert row["device_busy"] == 0.5 and 0 <= row["data_ready"] <= 1 and "busy" not in row


def test_one_value_as_json():
    words = ["profile", *TINY.split(), "--against", "assign=ota", "--steps", "4", "--json"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.stderr
    profiles = json.loads(result.stdout)["profiles"]
    assert list(profiles) == ["assign=plain", "assign=ota"]
    assert set(profiles["assign=ota"]["parts"]) == set(PARTS)
