"""A run folder that version 0.1 left behind (commit 289b8bf) is still opened by today's package."""

import json
import shutil
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch

from mhdet.core.config import load_config
from mhdet.core.runs import OLD_KEYS, find_run, run_state
from mhdet.experiment.history import load_runs, plot_runs
from mhdet.experiment.inference import evaluate_run
from mhdet.experiment.models import load_run
from mhdet.experiment.run import train
from mhdet.training.checkpoint import load

RUN = Path(__file__).resolve().parent / "run-v0.1"


def test_its_config_opens_without_a_warning():
    with warnings.catch_warnings(action="error"):
        cfg = load_config(RUN / "config.yaml")
    assert (cfg.data.data, cfg.data.imgsz, cfg.data.batch) == ("toy:16", 64, 8)
    assert (cfg.network.width, cfg.network.boxes) == (0.125, "shared")
    assert (cfg.training.run, cfg.training.epochs, cfg.training.device) == ("v0", 2, "cpu")
    assert load_config(cfg.flat()) == cfg


def test_dotted_keys_of_its_time_are_accepted():
    words = {
        "train.boxes=shared": ("network", "boxes", "shared"),
        "train.others=background": ("loss", "others", "background"),
        "train.conf=0.25": ("evaluation", "conf", 0.25),
        "train.lr=0.5": ("training", "lr", 0.5),
        "net.width=2.0": ("network", "width", 2.0),
    }
    for word, (group, key, value) in words.items():
        with pytest.warns(UserWarning, match=f"is now '{group}.{key}'"):
            cfg = load_config(word)
        assert getattr(getattr(cfg, group), key) == value


def test_its_weights_give_the_outputs_of_its_time():
    model, cfg = load_run(RUN)
    assert cfg == load_config(RUN / "config.yaml")
    torch.manual_seed(0)
    with torch.no_grad():
        maps = model(torch.rand(2, 3, 64, 64))
    assert [tuple(m.shape) for m in maps] == [(2, 51, 8, 8), (2, 51, 4, 4), (2, 51, 2, 2)]
    # as printed by the build that trained it
    sums = [m.double().abs().sum().item() for m in maps]
    assert sums == pytest.approx(
        [16277.260264721233, 3892.852265547961, 931.1931586912833], rel=1e-5
    )


def test_its_state_and_environment_are_read():
    tree, meta = load(find_run(RUN)[1])
    assert {"model", "optimizer", "position", "ema", "rng"} <= set(tree)
    assert (meta["epoch"], meta["steps"], tree["position"]["epoch"]) == (2, 2, 2)
    assert run_state(RUN) is None
    assert json.loads((RUN / "env.json").read_text())["format"] == 1


def test_its_figures_and_tables_are_made(tmp_path):
    shutil.copytree(RUN, tmp_path / "v0")
    table = load_runs(tmp_path)
    assert len(table) == 1
    assert table.iloc[0]["epoch"] == 2
    axes = plot_runs({"v0.1": tmp_path / "v0"})
    assert any(line.get_xydata().size for ax in axes.flat for line in ax.lines)
    plt.close("all")


def test_it_is_evaluated_and_continued(tmp_path):
    shutil.copytree(RUN, tmp_path / "v0")
    result = evaluate_run(tmp_path / "v0", split="train")
    assert result is not None
    run = train(load_config("epochs=3", "device=cpu"), resume="v0", root=tmp_path, quiet=True)
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    old_rows = [json.loads(line) for line in (RUN / "log.jsonl").read_text().splitlines()]
    assert rows[:2] == [{OLD_KEYS.get(k, k): v for k, v in row.items()} for row in old_rows]
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert load_config(run / "config.yaml").network.boxes == "shared"
