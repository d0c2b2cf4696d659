"""ONNX files: any batch, any sides, heads and suppression inside, the same answers as torch on real pictures."""
import ast
import json
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from mhdet import export
from mhdet.tools.conformance import draw_weights
from mhdet.cli.grammar import app
from mhdet.core.config import load_config
from mhdet.data.dataset import DetDataset
from mhdet.data.splits import open_data
from mhdet.experiment.run import load_run, predict, train
from mhdet.tools.onnx import SHARE, _opened, onnx_facts, run_onnx, to_onnx
from mhdet.model.detector import Detections, Detector, decode, detect
from mhdet.model.weights import load_foreign, to_foreign
from mhdet.model.surgery import split_heads
from mhdet.training.learner import to_unit
from mhdet.partition.heads import Partition
from mhdet.partition.strategies import random_heads
from mhdet.evaluation.results import detections_apart

pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
ROOT = Path(__file__).resolve().parents[1]
VOC = ROOT.parent / "shared/data/voc2007-mini"
NAMES = list("abcdefg")
FORMS = {"one": {}, "many": {}, "group norm": dict(norm="gn"), "shared": dict(boxes="shared"), "adapters": dict(adapter="cbam")}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    "Small layers on a busy machine: threads would wait for each other."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def detector(form):
    "A small detector full of answers: weights by the rule of chapter 19b, where there is one."
    many = random_heads(NAMES, 3, 0)
    if form in ("group norm", "adapters"):
        torch.manual_seed(0)
        model = Detector.make(many, .125, implicit=True, **FORMS[form]).eval()
        for block in model.head.adapters.modules():
            if hasattr(block, "gain"): torch.nn.init.normal_(block.gain)
        return model
    one = Detector.make(Partition.single(NAMES), .125, implicit=True)
    one = load_foreign(draw_weights(to_foreign(one), 0), one.head.partition)
    return one if form == "one" else split_heads(one, many, **FORMS[form])


def noise(b, h, w): return torch.from_numpy(np.random.default_rng(b).integers(0, 256, (b, 3, h, w), np.uint8))


def ran(session, pictures): return [torch.from_numpy(v) for v in session.run(None, dict(pictures=pictures.numpy()))]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_any_batch_any_sides(form, tmp_path):
    model = detector(form)
    assert to_onnx(model, tmp_path / "m.onnx")["error"] < SHARE
    session, _ = onnx_facts(tmp_path / "m.onnx")
    for pictures in map(noise, (1, 3, 8), (320, 256, 640), (320, 416, 640)) if form == "one" else [noise(3, 64, 96)]:
        boxes, scores = ran(session, pictures)
        with torch.no_grad(): due = decode(model(to_unit(pictures)), model.head)
        assert boxes.shape == due[0].shape and (scores - due[1]).abs().max() < SHARE
        assert ((boxes - due[0]).abs() / (max(pictures.shape) + due[0].abs())).max() < SHARE


@pytest.mark.parametrize("form, limits", [("one", {}), ("many", dict(conf=.3, iou=.45, max_det=7, one_label=True)),
                                          ("shared", dict(conf=0, iou=.3)), ("many", dict(conf=1e-5, iou=1., max_det=40))],
                         ids=lambda v: str(v))
def test_suppression_inside_is_detect(form, limits, tmp_path, monkeypatch):
    seen = []                                            # the graph as it is checked, with all its outputs, comes first
    monkeypatch.setattr(export, "_opened", lambda data, *a, **k: seen.append(data) or _opened(data))
    model, limits = detector(form), export.NMS | limits
    to_onnx(model, tmp_path / "m.onnx", nms=limits)
    checked, final = map(_opened, (seen[0], (tmp_path / "m.onnx").read_bytes()))
    for pictures in map(noise, (1, 2, 5), (64, 96, 32), (64, 32, 160)):
        *found, boxes, scores = ran(checked, pictures)
        due = detect(boxes, scores, model.head.head_of, **limits)
        assert len(found[0]) == len(due.score) > 0 and (detections_apart(Detections(*found)._asdict(), due._asdict()) == 0).all()
        assert (found[2].diff()[found[0].diff() == 0] <= 0).all() and (found[0].diff() >= 0).all()      # best first
        assert [len(v) for v in ran(final, pictures)] == [len(due.score)] * 4


def test_a_picture_without_answers(tmp_path):
    to_onnx(detector("one"), tmp_path / "m.onnx", 64, dict(conf=1.))
    found = run_onnx(tmp_path / "m.onnx", [np.zeros((40, 50, 3), np.uint8)] * 3)
    assert [tuple(t.shape) for t in found] == [(0,), (0, 4), (0,), (0,)] and found.label.dtype == torch.int64


def test_every_answer_has_its_like_on_real_pictures(tmp_path):
    if not VOC.is_dir(): pytest.skip("../shared/data is absent")
    splits = open_data(VOC, dev=0)
    splits = dict(train=splits["train"].subset(range(120)), val=splits["val"].subset(range(50)))
    cfg = load_config("imgsz=64", "width=0.125", "epochs=6", "batch=16", "nominal_batch=16", "mosaic=0", "workers=0", "precision=fp32")
    run = train(cfg.override(run="voc"), splits, root=tmp_path, quiet=True)
    model, data, val = load_run(run)[0], DetDataset(splits["val"], 64), splits["val"]
    for m in (model, split_heads(model, random_heads(val.names, 4, 0))):
        dt = predict(m, data, conf=.002)[0]
        assert len(dt["score"]) > 500 and dt["score"].max() > .01
        for nms in (None, dict(conf=.002)):
            file = to_onnx(m, tmp_path / "m.onnx", 64, nms)["path"]
            found = run_onnx(file, val.files, **{} if nms else dict(conf=.002))
            far = detections_apart(found._asdict(), dt, SHARE, val.sizes.max() * SHARE)
            assert np.isinf(far).sum() <= 2              # one pair: of two scores equal but for rounding either may win


def test_nothing_half_written(tmp_path, monkeypatch):
    model, path = detector("one"), tmp_path / "m.onnx"
    path.write_bytes(b"before")
    monkeypatch.setattr(export, "_off", lambda *a: dict(error=1.))
    with pytest.raises(ValueError, match="not written"): to_onnx(model, path)
    monkeypatch.setattr(export, "_off", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt): to_onnx(model, path)
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


def mhdet(line):
    found = CliRunner().invoke(app, shlex.split(line))
    return found.exit_code, found.stdout, found.stderr


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert mhdet("train data=toy:16 imgsz=64 batch=8 width=.125 workers=0 precision=fp32 epochs=1 run=base")[0] == 0
    code, out, err = mhdet("export base@best --out M.onnx --nms --conf .0001 max_det=9 imgsz=96 --json")
    assert (code, out.count("\n")) == (0, 1), err
    found = json.loads(out)
    assert found["bytes"] == Path("M.onnx").stat().st_size and found["error"] < 1e-4 and found["opset"] == export.OPSET
    assert found["inputs"] == {"pictures": "tensor(uint8) ['batch', 3, 'height', 'width']"}
    assert list(found["outputs"]) == list(Detections._fields) and found["outputs"]["box"] == "tensor(float) ['n', 4]"
    facts = onnx_facts("M.onnx")[1]
    assert (facts["imgsz"], facts["nms"]["conf"], facts["nms"]["max_det"], len(facts["names"])) == (96, .0001, 9, 12)
    code, out, _ = mhdet("export base --out plain.onnx")
    assert code == 0 and "boxes" in out and "uint8" in out
    assert sorted(p.name for p in tmp_path.glob("*.onnx*")) == ["M.onnx", "plain.onnx"]
    bad = {"export base --out M.onnx": "M.onnx: exists already", "export absent --out a.onnx": "absent: no run there",
           "export base --out a.onnx --conf .3": "'conf' changes nothing without --nms",
           "export base --out a.onnx --nms --conf 3": "conf and iou lie in 0..1, got 3",
           "export base --out a.onnx imgsz=100": "a multiple of 32, got 100", "export base --out no/a.onnx": "no: no such folder",
           "export base": "Missing option '--out'", "export base --out a.onnx lr=1": "'lr' changes nothing here"}
    for line, words in bad.items():
        code, out, err = mhdet(line)
        assert (code, out, err.count("\n")) == (2, "", 1) and words in err, (line, err)


@pytest.mark.parametrize("lost", ["onnx", "onnxruntime"])
def test_a_missing_package_is_one_line(lost, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, lost, None)
    with pytest.raises(ModuleNotFoundError, match=rf'{lost}.*pip install "mhdet\[onnx\]"'):
        to_onnx(detector("one"), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_nothing_is_imported_before_it_is_needed():
    for module in ("export", "cli"):
        tree = ast.parse((ROOT / f"mhdet/{module}.py").read_text())
        assert not [n for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom)) and "onnx" in ast.unparse(n).split()]
