"""Every kept epoch can be trained on from; where, how and why a run was trained stays known."""

import csv
import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mhdet.cli import training as commands
from mhdet.cli.commands import app
from mhdet.core.config import load_config
from mhdet.core.runs import JsonLog, environment, note_run
from mhdet.experiment import run as experiment
from mhdet.experiment.history import load_runs, plot_runs
from mhdet.experiment.models import load_run
from mhdet.training.checkpoint import load, save
from mhdet.training.learner import Callback, NonFinite

TINY = "data=toy:24 imgsz=64 width=0.125 batch=8 nominal_batch=16 workers=0 device=cpu"
TINY = f"{TINY} precision=fp32 norm_layer=gn"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A folder with a finished run of four epochs, each of them kept."
    folder = tmp_path_factory.mktemp("from")
    words = ["run=base", "epochs=4", "keep_every=1", "mosaic=0.5", "seed=3"]
    experiment.train(load_config(*TINY.split(), *words), root=folder / "runs", quiet=True)
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    "A folder of its own with that run in it."
    shutil.copytree(made / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def mhdet(line):
    "Exit code, stdout, stderr."
    result = CliRunner().invoke(app, shlex.split(line))
    assert "Traceback" not in result.stderr
    return result.exit_code, result.stdout, result.stderr


def flow(run):
    "Rows of the flow table."
    with (run / "restarts.csv").open() as file:
        return list(csv.DictReader(file))


def differing(a, b, parts=("model", "ema", "optimizer")):
    "Tensors that differ between the last states of two runs."
    trees = [load(run / "last")[0] for run in (a, b)]
    flat = [[], []]
    for tree, tensors in zip(trees, flat, strict=True):
        for part in parts:
            leaves = torch.utils._pytree.tree_leaves(tree[part])
            tensors += [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    pairs = list(zip(*flat, strict=True))
    assert len(pairs) > 50
    return sum(not torch.equal(x, y) for x, y in pairs)


def test_with_unchanged_keys_it_is_the_uninterrupted_run(here):
    "Weights, averages, momentum and the rows of the log, to the bit; the old run stays as it is."
    before = {p: p.read_bytes() for p in (here / "base").rglob("*") if p.is_file()}
    code, out, err = mhdet("train --from base@2 run=next --json")
    assert (code, json.loads(out)["epoch"]) == (0, 4)
    assert "base@2: its schedule goes on; epochs=4 in all" in err
    assert differing(here / "base", here / "next") == 0
    logs = [JsonLog(here / name / "log.jsonl").rows() for name in ("base", "next")]
    times = ("seconds", "eval_seconds", "pictures_per_s", "data_ready")
    rows = [[{k: v for k, v in r.items() if k not in times} for r in log] for log in logs]
    assert rows[0][2:] == rows[1]
    assert before == {p: p.read_bytes() for p in (here / "base").rglob("*") if p.is_file()}
    assert json.loads((here / "next/env.json").read_text())["begun_from"] == "base@2"
    (first,) = flow(here / "next")
    assert (first["epoch"], first["load_epoch"], first["reason"]) == ("3", "2", "from base@2")


def test_a_second_cosine_and_other_keys(here):
    "A finished run goes on, as a new one, with a schedule of its own, another decay and batch."
    words = "epochs=6 lr=0.004 warmup=0 weight_decay=0.01 nominal_batch=8 assign=ota"
    code, _, err = mhdet(f"train --from base run=next {words}")
    assert code == 0 and "a new schedule begins (epochs, lr, warmup); epochs=6 in all" in err
    rows = JsonLog(here / "next/log.jsonl").rows()
    assert [row["epoch"] for row in rows] == [5, 6]
    assert rows[0]["lr"] > rows[1]["lr"] > 0 and rows[0]["lr"] <= 0.004
    tree, meta = load(here / "next/last")
    assert tree["optimizer"]["param_groups"][0]["weight_decay"] == 0.01
    # twice as many steps in an epoch as the old run had
    assert meta["steps"] == 2 * load(here / "base/last")[1]["steps"] / 4 * 6
    cfg = load_run("next")[1]
    assert (cfg.training.epochs, [s.epochs for s in cfg.training.stages]) == (6, [4, 2])
    assert cfg.loss.assign == "ota"
    assert load_run("next@best")[1].training.run == "next"  # the best of its own epochs
    code, out, _ = mhdet("train --resume next epochs=6 --json")
    assert (code, json.loads(out)["epoch"]) == (0, 6)


def test_what_is_frozen_goes_on_in_a_new_schedule(here):
    stages = 'stages=[{"epochs": 1, "freeze": "stem"}, {"epochs": 3, "freeze": 10}]'
    cfg = load_config(*TINY.split(), "run=staged", "epochs=4", stages, "keep_every=1")
    experiment.train(cfg, quiet=True)
    new = experiment.branch_config("staged@1", {"run": "a", "epochs": 3, "lr": 0.01})
    assert [(s.epochs, s.freeze) for s in new.training.stages] == [(1, "stem"), (2, 10)]
    new = experiment.branch_config("staged@2", {"run": "a", "freeze": None})
    kept = [(s.epochs, s.freeze) for s in new.training.stages]
    assert kept == [(1, "stem"), (1, 10), (2, None)]
    given = [{"epochs": 2}, {"epochs": 5}]
    new = experiment.branch_config("staged@2", {"run": "a", "epochs": 7, "stages": given})
    assert [s.epochs for s in new.training.stages] == [2, 5]


def test_killed_before_its_first_epoch_it_still_begins_there(here):
    "The state is stored before the first step: a resumed run does not begin with random weights."

    class Kill(BaseException):
        pass

    class Dies(Callback):
        def before_epoch(self, learner):
            raise Kill

    cfg = experiment.branch_config("base@2", {"run": "next"})
    with pytest.raises(Kill):
        experiment.train(cfg, quiet=True, start="base@2", more=[Dies()])
    assert load(here / "next/last")[1]["epoch"] == 2
    note_run(here / "next", process=["elsewhere", 7, 0.0])  # a kill leaves no word
    experiment.train(None, resume="next", quiet=True)
    assert differing(here / "base", here / "next") == 0
    assert [row["reason"] for row in flow(here / "next")] == ["from base@2", "killed or power loss"]


def test_bad_input_makes_nothing(here):
    shutil.copytree(here / "base", here / "old")
    weights = {"model": load(here / "base/epoch_002")[0]["ema"]}
    shutil.rmtree(here / "old/epoch_002")
    save(here / "old/epoch_002", weights, {"epoch": 2})  # as earlier versions kept it
    names = sorted(path.name for path in here.iterdir())
    for line, words in {
        "--from base@9 run=x": "base@9: no state 'epoch_009' in runs/base; there is best",
        "--from base@2": "--from base@2: expected run=NAME, a name for the new run",
        "--from base@2 run=base": "runs/base: exists already; give another run=",
        "--from ghost@2 run=x": "ghost: no run there",
        "--from base@2 run=x width=0.5": "'width' changes the network; ",
        "--from base@2 run=x trunk=torchvision/resnet18": "'trunk' changes the network",
        "--from base@2 run=x --heads h.yaml": "'heads' changes the network",
        "--from base@4 run=x": "4 epochs are done, epochs=4 leaves none to train",
        "--from base@best run=x": "best has weights only",
        "--from old@2 run=x": "weights=old@2 begins with these",
        "--from base@2 --resume base run=x": "give one of the two",
        "--from base@2 run=x data=nowhere": "nowhere: no such folder or YAML",
        "--from base@2 run=x epoch=9": "unknown key 'epoch'",
    }.items():
        code, out, err = mhdet(f"train {line}")
        last = err.splitlines()[-1]
        assert (code, out) == (2, "") and words.split(";")[0] in last, (line, err)
        assert len([text for text in err.splitlines() if "schedule" not in text]) == 1
    assert sorted(path.name for path in here.iterdir()) == names


def test_host_and_device_stay_known(here):
    env = json.loads((here / "base/env.json").read_text())
    here_now = environment()
    assert (env["host"], env["device"]) == (here_now["host"], "cpu") and env["process"] is None
    row = load_runs(here).iloc[0]
    assert (row["state"], row["host"], row["device"]) == ("finished", here_now["host"], "cpu")
    code, out, _ = mhdet("runs --json")
    assert code == 0 and json.loads(out)[0]["device"] == "cpu"


def test_the_flow_of_a_run_is_complete(here):
    "Start, resumed, killed; a loss of NaN that ends the run is its last row."
    assert [row["reason"] for row in flow(here / "base")] == ["normal start"]
    experiment.train(load_config("epochs=5"), resume="base", quiet=True)
    note_run(here / "base", process=["elsewhere", 7, 0.0])

    class Breaks(Callback):
        def after_batch(self, learner):
            raise NonFinite(learner.steps, {"loss": float("nan")})

    with pytest.raises(NonFinite):
        experiment.train(load_config("epochs=6"), resume="base", quiet=True, more=[Breaks()])
    rows = flow(here / "base")
    reasons = [row["reason"] for row in rows]
    assert reasons[:4] == ["normal start", "resumed", "killed or power loss", "nan"]
    assert [row["epoch"] for row in rows[:3]] == ["1", "5", "6"]
    assert reasons[-1] == "nan" and rows[-1]["new_seed"] == ""
    assert all(row["host"] and row["device"] == "cpu" and row["time"] for row in rows)
    labels = {text.get_text() for text in plot_runs({"base": here / "base"}, ("box",))[0].texts}
    assert "resumed" in " ".join(labels) and "normal start" not in " ".join(labels)


def test_watching_shows_the_table_again_until_ctrl_c(here, monkeypatch):
    naps = []

    def nap(seconds):
        naps.append(seconds)
        if len(naps) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(commands.time, "sleep", nap)
    code, out, err = mhdet("runs --watch --every 2")
    assert (code, naps) == (0, [2.0] * 3)
    assert err.count("Ctrl-C ends it") == 3 and err.count("base") == 3
    assert out.count("base") == 1  # the last table, for whoever reads stdout


def test_every_kept_epoch_is_a_whole_state(here):
    for epoch in (1, 2, 3, 4):
        tree, meta = load(Path(here / f"base/epoch_{epoch:03d}"))
        assert {"model", "ema", "optimizer", "position", "rng"} <= set(tree)
        assert meta["epoch"] == epoch
    kept = load_run("base@4")[0].state_dict().values()
    last = load_run("base")[0].state_dict().values()
    assert all(torch.equal(a, b) for a, b in zip(kept, last, strict=True))
