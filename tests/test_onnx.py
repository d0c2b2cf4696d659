"""ONNX files: any batch and sides, heads and suppression inside, the same detections as torch."""

import ast
import json
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from mhdet.cli.commands import app
from mhdet.core.config import load_config
from mhdet.data.dataset import DetDataset
from mhdet.data.splits import open_data
from mhdet.evaluation.results import detections_apart
from mhdet.experiment.inference import predict
from mhdet.experiment.models import load_run
from mhdet.experiment.run import train
from mhdet.model.detector import Detections, Detector, decode, detect
from mhdet.model.surgery import split_heads
from mhdet.model.weight_files import to_foreign
from mhdet.model.weights import load_foreign
from mhdet.partition.heads import Partition
from mhdet.partition.strategies import random_heads
from mhdet.tools import onnx as export
from mhdet.tools.conformance import draw_weights
from mhdet.tools.onnx import TOLERANCE, _open_session, onnx_facts, run_onnx, to_onnx
from mhdet.training.learner import to_unit

pytestmark = pytest.mark.usefixtures("one_thread")

pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
ROOT = Path(__file__).resolve().parents[1]
VOC = ROOT.parent / "shared/data/voc2007-mini"
NAMES = list("abcdefg")
FORMS = {
    "one": {},
    "many": {},
    "group norm": dict(norm="gn"),
    "shared": dict(boxes="shared"),
    "adapters": dict(adapter="cbam"),
}


def detector(form):
    "A small detector with many detections: weights by the rule of the fixtures where one exists."
    many = random_heads(NAMES, 3, 0)
    if form in ("group norm", "adapters"):
        torch.manual_seed(0)
        model = Detector.make(many, 0.125, implicit=True, **FORMS[form]).eval()
        for block in model.head.adapters.modules():
            if hasattr(block, "gain"):
                torch.nn.init.normal_(block.gain)
        return model
    one = Detector.make(Partition.single(NAMES), 0.125, implicit=True)
    one = load_foreign(draw_weights(to_foreign(one), 0), one.head.partition, implicit=True)
    return one if form == "one" else split_heads(one, many, **FORMS[form])


def noise(b, h, w):
    return torch.from_numpy(np.random.default_rng(b).integers(0, 256, (b, 3, h, w), np.uint8))


def run_session(session, images):
    return [torch.from_numpy(v) for v in session.run(None, dict(pictures=images.numpy()))]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_any_batch_any_sides(form, tmp_path):
    model = detector(form)
    assert to_onnx(model, tmp_path / "m.onnx")["error"] < TOLERANCE
    session, _ = onnx_facts(tmp_path / "m.onnx")
    sizes = [(3, 64, 96)]
    if form == "one":
        sizes = [(1, 320, 320), (3, 256, 416), (8, 640, 640)]
    for size in sizes:
        images = noise(*size)
        boxes, scores = run_session(session, images)
        with torch.no_grad():
            expected = decode(model(to_unit(images)), model.head)
        assert boxes.shape == expected[0].shape
        assert (scores - expected[1]).abs().max() < TOLERANCE
        scale = max(images.shape) + expected[0].abs()
        assert ((boxes - expected[0]).abs() / scale).max() < TOLERANCE


LIMITS = [
    ("one", {}),
    ("many", dict(conf=0.3, iou=0.45, max_det=7, one_label=True)),
    ("shared", dict(conf=0, iou=0.3)),
    ("many", dict(conf=1e-5, iou=1.0, max_det=40)),
]


@pytest.mark.parametrize("form, limits", LIMITS, ids=str)
def test_suppression_inside_is_detect(form, limits, tmp_path, monkeypatch):
    opened = []  # the graph as it is checked, with all its outputs, comes first

    def spy(data, *args, **kwargs):
        opened.append(data)
        return _open_session(data)

    monkeypatch.setattr(export, "_open_session", spy)
    model = detector(form)
    limits = export.NMS | limits
    to_onnx(model, tmp_path / "m.onnx", nms=limits)
    checked = _open_session(opened[0])
    final = _open_session((tmp_path / "m.onnx").read_bytes())
    for size in ((1, 64, 64), (2, 96, 32), (5, 32, 160)):
        images = noise(*size)
        *detections, boxes, scores = run_session(checked, images)
        expected = detect(boxes, scores, model.head.head_of, **limits)
        assert len(detections[0]) == len(expected.score) > 0
        apart = detections_apart(Detections(*detections)._asdict(), expected._asdict())
        assert (apart == 0).all()
        image, _, score, _ = detections
        assert (score.diff()[image.diff() == 0] <= 0).all()  # best first
        assert (image.diff() >= 0).all()
        assert [len(v) for v in run_session(final, images)] == [len(expected.score)] * 4


def test_an_image_without_detections(tmp_path):
    to_onnx(detector("one"), tmp_path / "m.onnx", 64, dict(conf=1.0))
    dt = run_onnx(tmp_path / "m.onnx", [np.zeros((40, 50, 3), np.uint8)] * 3)
    assert [tuple(t.shape) for t in dt] == [(0,), (0, 4), (0,), (0,)]
    assert dt.label.dtype == torch.int64


def test_every_detection_has_its_counterpart_in_photographs(tmp_path):
    if not VOC.is_dir():
        pytest.skip("../shared/data is absent")
    splits = open_data(VOC, dev=0)
    train_set = splits["train"].subset(range(120))
    val = splits["val"].subset(range(50))
    cfg = load_config(
        "imgsz=64",
        "width=0.125",
        "epochs=6",
        "batch=16",
        "nominal_batch=16",
        "mosaic=0",
        "workers=0",
        "precision=fp32",
    )
    splits = dict(train=train_set, val=val)
    run = train(cfg.override(run="voc"), splits, root=tmp_path, quiet=True)
    model = load_run(run)[0]
    for m in (model, split_heads(model, random_heads(val.names, 4, 0))):
        expected = predict(m, DetDataset(val, 64), conf=0.001)[0]
        assert len(expected["score"]) > 500
        assert expected["score"].max() > 0.01
        for nms in (None, dict(conf=0.001)):
            file = to_onnx(m, tmp_path / "m.onnx", 64, nms)["path"]
            limits = {} if nms else dict(conf=0.001)
            dt = run_onnx(file, val.files, **limits)
            box = val.sizes.max() * TOLERANCE
            apart = detections_apart(dt._asdict(), expected, TOLERANCE, box)
            # one pair: of two scores equal but for rounding either may win
            assert np.isinf(apart).sum() <= 2


def test_nothing_half_written(tmp_path, monkeypatch):
    model = detector("one")
    path = tmp_path / "m.onnx"
    path.write_bytes(b"before")

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "_measure_error", lambda *args: dict(error=1.0))
    with pytest.raises(ValueError, match="not written"):
        to_onnx(model, path)
    monkeypatch.setattr(export, "_measure_error", interrupted)
    with pytest.raises(KeyboardInterrupt):
        to_onnx(model, path)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def mhdet(line):
    done = CliRunner().invoke(app, shlex.split(line))
    return done.exit_code, done.stdout, done.stderr


TRAIN = "train data=toy:16 imgsz=64 batch=8 width=.125 workers=0 precision=fp32 epochs=1 run=base"
REFUSED = {
    "export base --out M.onnx": "M.onnx: exists already",
    "export absent --out a.onnx": "absent: no run there",
    "export base --out a.onnx --conf .3": "'conf' changes nothing without --nms",
    "export base --out a.onnx --nms --conf 3": "got 3",
    "export base --out a.onnx imgsz=100": "a multiple of 32, got 100",
    "export base --out no/a.onnx": "no: no such folder",
    "export base": "Missing option '--out'",
    "export base --out a.onnx lr=1": "'lr' changes nothing here",
}


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert mhdet(TRAIN)[0] == 0
    line = "export base@best --out M.onnx --nms --conf .0001 max_det=9 imgsz=96 --json"
    code, out, err = mhdet(line)
    assert (code, out.count("\n")) == (0, 1), err
    result = json.loads(out)
    assert result["bytes"] == Path("M.onnx").stat().st_size
    assert result["error"] < 1e-4
    assert result["opset"] == export.OPSET
    assert result["inputs"] == {"pictures": "tensor(uint8) ['batch', 3, 'height', 'width']"}
    assert list(result["outputs"]) == list(Detections._fields)
    assert result["outputs"]["box"] == "tensor(float) ['n', 4]"
    facts = onnx_facts("M.onnx")[1]
    assert (facts["imgsz"], len(facts["names"])) == (96, 12)
    assert (facts["nms"]["conf"], facts["nms"]["max_det"]) == (0.0001, 9)
    code, out, _ = mhdet("export base --out plain.onnx")
    assert code == 0 and "boxes" in out and "uint8" in out
    assert sorted(p.name for p in tmp_path.glob("*.onnx*")) == ["M.onnx", "plain.onnx"]
    for refused, words in REFUSED.items():
        code, out, err = mhdet(refused)
        assert (code, out, err.count("\n")) == (2, "", 1), (refused, err)
        assert words in err, (refused, err)


@pytest.mark.parametrize("lost", ["onnx", "onnxruntime"])
def test_a_missing_package_is_one_line(lost, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, lost, None)
    with pytest.raises(ModuleNotFoundError, match=rf'{lost}.*pip install "mhdet\[onnx\]"'):
        to_onnx(detector("one"), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", ["tools/onnx", "cli/grammar", "cli/commands"])
def test_nothing_is_imported_before_it_is_needed(module):
    tree = ast.parse((ROOT / f"mhdet/{module}.py").read_text())
    imports = [n for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom))]
    roots = set()
    for node in imports:
        names = (
            [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        )
        roots |= {name.split(".")[0] for name in names}
    assert not roots & {"onnx", "onnxruntime"}
