"""Anchors of a run: fitted once, kept as numbers, the same ones wherever the run goes on."""

import re
import shlex
import shutil

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from mhdet.cli.commands import app
from mhdet.core.config import load_config
from mhdet.data.splits import open_data
from mhdet.experiment import models
from mhdet.experiment import run as experiment
from mhdet.experiment.arms import Arm, arm_config
from mhdet.experiment.models import build, load_run, make_loss, with_anchors
from mhdet.model.assign import anchor_coverage
from mhdet.model.multihead import ANCHORS
from mhdet.model.weight_files import to_foreign
from mhdet.model.weights import load_foreign
from mhdet.partition.heads import save_heads
from mhdet.partition.strategies import random_heads
from mhdet.training.learner import Callback

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = "data=toy:24 imgsz=64 width=0.125 batch=8 nominal_batch=8 workers=0 device=cpu keep_every=1"
SMALL = [*SMALL.split(), "precision=fp32"]
WORD = "[[[4,5],[8,7],[9,9]],[[12,9],[11,13],[16,13]],[[16,19],[22,17],[23,23]]]"


def mhdet(line):
    "Exit code and what was printed, on stdout and stderr."
    result = CliRunner().invoke(app, shlex.split(line))
    assert "Traceback" not in result.stderr
    return result.exit_code, result.stdout + result.stderr


def anchors_of(run):
    "Anchors in the configuration of a run, those of its network, and those of its loss."
    cfg = load_config(run / "config.yaml")
    model = load_run(run)[0]
    given = torch.tensor(cfg.network.anchors)
    assert torch.equal(given, model.head.anchors)
    assert torch.equal(given, make_loss(cfg, model).anchors)
    return cfg.network.anchors


class Seen(Callback):
    "The anchors with which a run is trained, of network and loss."

    def after_batch(self, learner):
        self.anchors = learner.model.head.anchors.tolist()
        self.of_loss = learner.loss.anchors.tolist()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A folder with a run of one epoch, `anchors=fit`, and what was printed."
    folder = tmp_path_factory.mktemp("anchors")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        code, printed = mhdet(shlex.join(["train", *SMALL, "run=a", "epochs=1", "anchors=fit"]))
    assert code == 0, printed
    return folder, printed


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    "A folder of its own with that run, in which nothing is fitted any more."
    shutil.copytree(made[0] / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)

    def refuse(*args, **kw):
        raise AssertionError("fitted again")

    monkeypatch.setattr(models, "fit_anchors", refuse)
    return tmp_path / "runs"


def test_train_says_what_was_fitted_and_keeps_it(made):
    folder, printed = made
    line = next(line for line in printed.splitlines() if "anchors=fit" in line)
    boxes, before, after = re.search(
        r"(\d+) boxes of train at 64 px.*mean best IoU (\S+) -> (\S+),", line
    ).groups()
    gt = open_data("toy:24")["train"].gt
    sizes = (gt["box"][:, 2:] - gt["box"][:, :2]) / 2  # 128 px at 64
    anchors = np.array(anchors_of(folder / "runs/a"))
    assert anchors.shape == (3, 3, 2) and (np.diff(anchors.prod(2).ravel()) >= 0).all()
    assert int(boxes) == len(sizes)
    ious = [anchor_coverage(sizes, a)["iou"] for a in (ANCHORS, anchors)]
    assert [before, after] == [f"{iou:.3f}" for iou in ious]
    assert ious[1] > ious[0] + 0.1


def test_whoever_uses_the_run_has_its_anchors(here):
    anchors, seen = anchors_of(here / "a"), Seen()
    save_heads("H.yaml", random_heads(load_run("a")[0].head.partition.names, 3, 0))
    assert mhdet("split a --heads H.yaml --out apart")[0] == 0
    assert anchors_of(here / "apart") == anchors
    cfg = load_config(*SMALL, "run=c", "epochs=1", "weights=apart", "heads=H.yaml")
    experiment.train(cfg, quiet=True, more=(seen,))
    assert anchors_of(here / "c") == anchors
    torch.testing.assert_close(seen.anchors, anchors)
    torch.testing.assert_close(seen.of_loss, anchors)
    cfg = experiment.branch_config("a@1", dict(run="b", epochs=2))
    experiment.train(cfg, quiet=True, start="a@1", more=(seen,))
    assert anchors_of(here / "b") == anchors
    more = load_config(here / "a/config.yaml", dict(epochs=2))
    experiment.train(more, resume="a", quiet=True, more=(seen,))
    assert anchors_of(here / "a") == anchors
    torch.testing.assert_close(seen.of_loss, anchors)
    foreign = to_foreign(load_run("a")[0])  # the file of an export
    torch.save(foreign, "a.pt")
    torch.testing.assert_close(load_foreign("a.pt").head.anchors.tolist(), anchors)
    code, printed = mhdet("import a.pt --data toy:24 --out e anchors=fit")
    assert (code, "'anchors' changes nothing here" in printed) == (2, True)
    code, printed = mhdet("import a.pt --data toy:24 --out e")
    assert (code, anchors_of(here / "e")) == (0, anchors), printed
    with pytest.raises(ValueError, match="--from a@1: 'anchors' changes the network"):
        experiment.branch_config("a@1", dict(run="d", epochs=2, anchors="fit"))


@pytest.mark.parametrize("boxes", ["head", "shared"])
def test_several_heads_and_shared_boxes(boxes, tmp_path):
    splits = open_data("toy:24")
    save_heads(tmp_path / "H.yaml", random_heads(splits["train"].names, 3, 0))
    words = [f"heads={tmp_path / 'H.yaml'}", f"boxes={boxes}", f"anchors={WORD}"]
    cfg = load_config(*SMALL, *words)
    model = build(cfg, splits["train"].names)
    assert torch.equal(model.head.anchors, torch.tensor(cfg.network.anchors).float())
    assert torch.equal(make_loss(cfg, model).anchors.cpu(), model.head.anchors)
    assert with_anchors(cfg, splits["train"]) is cfg  # numbers need no data


def test_arms_of_a_study_have_the_anchors_of_their_base():
    cfg = load_config(*SMALL, "anchors=fit")
    assert arm_config(cfg, "control", Arm(None, {}), {"epochs": 1}).network.anchors is None
    with pytest.raises(ValueError, match="anchors: must be the same for the single head and all"):
        arm_config(cfg, "odd", Arm(None, {"anchors": None}), {"epochs": 1})


@pytest.mark.parametrize(
    "words, expected",
    [
        ("anchors=auto", "anchors: must be null, fit or 3 levels of 3 [width, height] above 0 px"),
        ("anchors=[[[1,2]]]", "anchors: must be null, fit or 3 levels of 3 [width, height]"),
        ("anchors=3", "anchors: "),
        (f"anchors={WORD.replace('[4,5]', '[4,-5]')}", "above 0 px, got [[[4, -5]"),
        (f"anchors={WORD.replace('[4,5]', '[4,5,6]')}", "3 levels of 3 [width, height]"),
        (f"anchors={WORD.replace('[4,5]', '[4,.inf]')}", "anchors: must be finite"),
        (f"anchors={WORD.replace('[4,5]', '[4,.nan]')}", "anchors: must be null, fit or"),
        ("anchors=fit three_scale={}", "anchors=fit: means nothing with three_scale"),
        ("anchors=fit weights=a", "transfer=exact takes over these"),
        (f"anchors={WORD} weights=a", "transfer=exact takes over these"),
    ],
)
def test_wrong_anchors_are_refused_in_one_line(here, words, expected):
    code, printed = mhdet(shlex.join(["train", *SMALL, "run=z", "epochs=1", *words.split()]))
    assert code == 2
    (line,) = [line for line in printed.splitlines() if "anchors" in line]
    assert expected in line
    assert not (here / "z").exists()
