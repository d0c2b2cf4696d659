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


PLAIN = {
    *("Add", "Concat", "Constant", "Conv", "Identity", "LeakyRelu", "MaxPool", "Mul", "Resize"),
}


def decode_maps(maps, facts):
    "A reader of raw maps from what their metadata say, with a loop over everything."
    boxes, scores, nh = [], [], len(facts["heads"])
    channel = facts["channel_of"]
    for raw, anchors, stride in zip(maps, facts["anchors"], facts["strides"], strict=True):
        _, _, height, width = raw.shape
        t = 1 / (1 + np.exp(-raw.reshape(len(anchors), -1, height, width)))
        for a, anchor in enumerate(anchors):
            for y, x in np.ndindex(height, width):
                v = t[a, channel, y, x]
                own = []
                for h in range(nh):
                    tx, ty, tw, th, _ = v[5 * h : 5 * h + 5]
                    cx, cy = (2 * tx - 0.5 + x) * stride, (2 * ty - 0.5 + y) * stride
                    w, h = (2 * tw) ** 2 * anchor[0], (2 * th) ** 2 * anchor[1]
                    own.append([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])
                boxes.append(own)
                scores.append(
                    [v[5 * h + 4] * v[5 * nh + c] for c, h in enumerate(facts["head_of"])]
                )
    return np.array(boxes), np.array(scores)


@pytest.mark.parametrize("form", FORMS)
def test_raw_maps(form, tmp_path):
    import onnx

    model = detector(form)
    facts = to_onnx(model, tmp_path / "m.onnx", 64, raw=True)
    assert facts["error"] < TOLERANCE and facts["opset"] == 12
    if form not in ("group norm", "adapters"):
        assert set(facts["ops"]) <= PLAIN
    graph = onnx.load(tmp_path / "m.onnx").graph
    for tensor in (*graph.input, *graph.output):  # no axis is free
        assert all(side.dim_value > 0 for side in tensor.type.tensor_type.shape.dim)
    session, told = onnx_facts(tmp_path / "m.onnx")
    pixels = noise(1, 64, 64)
    maps = session.run(None, dict(pictures=to_unit(pixels).numpy()))
    with torch.no_grad():
        expected = decode(model(to_unit(pixels)), model.head)
    boxes, scores = decode_maps(maps, told)
    expected_boxes = expected[0][0].numpy()
    assert (np.abs(boxes - expected_boxes) / (64 + np.abs(expected_boxes))).max() < TOLERANCE
    assert np.abs(scores - expected[1][0].numpy()).max() < TOLERANCE
    with pytest.raises(ValueError, match="holds raw maps; its metadata say under 'decode'"):
        run_onnx(session, [np.zeros((64, 64, 3), np.uint8)])


@pytest.mark.parametrize("form", ["one", "shared"])
def test_opencv_reads_raw_maps(form, tmp_path):
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")
    model = detector(form)
    to_onnx(model, tmp_path / "m.onnx", 64, raw=True)
    bgr = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    net = cv2.dnn.readNetFromONNX(str(tmp_path / "m.onnx"))
    net.setInput(cv2.dnn.blobFromImage(bgr, 1 / 255, swapRB=True))
    names = net.getUnconnectedOutLayersNames()
    maps = dict(zip(names, net.forward(names), strict=True))
    rgb = torch.from_numpy(bgr[..., ::-1].copy()).permute(2, 0, 1)[None]
    with torch.no_grad():
        expected = model(to_unit(rgb))
    for stride, raw in zip(model.head.strides, expected, strict=True):
        scale = raw.abs().max().item()
        assert np.abs(maps[f"map{stride}"] - raw.numpy()).max() < TOLERANCE * scale


def test_the_program_with_opencv_on_the_page(tmp_path, monkeypatch):
    "What docs/deploy.md shows finds what `run_onnx` finds."
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")
    page = (ROOT / "docs/deploy.md").read_text(encoding="utf8")
    program = page.split("```python")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    image = noise(1, 48, 64)[0].permute(1, 2, 0).numpy()
    cv2.imwrite("street.png", image[..., ::-1])
    model = detector("many")
    to_onnx(model, "raw.onnx", 64, raw=True)
    to_onnx(model, "nms.onnx", 64, dict(conf=0.25, one_label=True))
    names = dict(cv2=cv2, np=np, facts=onnx_facts("raw.onnx")[1], decode_maps=decode_maps)
    exec(program.replace("street.jpg", "street.png"), names)
    box, label = (np.asarray(names[k]) for k in ("box", "label"))
    label = label[names["kept"]]
    expected = run_onnx("nms.onnx", [image])
    assert len(box) == len(expected.box) > 5
    apart = np.abs(box[:, None].clip(0, [64, 48] * 2) - expected.box.numpy()).max(-1)
    apart[label[:, None] != expected.label.numpy()] = np.inf
    assert apart.min(1).max() < 0.1  # px


@pytest.mark.parametrize("kind", ["plain", "nms", "raw"])
def test_metadata_say_what_a_deployer_needs(kind, tmp_path):
    nms = dict(conf=0.1) if kind == "nms" else None
    facts = to_onnx(detector("many"), tmp_path / "m.onnx", 96, nms, kind == "raw")
    told = onnx_facts(tmp_path / "m.onnx")[1]
    assert (told["color"], told["imgsz"], told["strides"]) == ("RGB", 96, [8, 16, 32])
    assert (told["names"], len(told["heads"]), len(told["head_of"])) == (NAMES, 3, 7)
    assert "NCHW" in told["input"] and told["box"].startswith("x1, y1, x2, y2 in px of the input")
    assert "objectness" in told["score"] and "114" in told["letterbox"]
    given = facts["inputs"]["pictures"]
    kinds = {"uint8": "tensor(uint8)", "float32": "tensor(float)"}
    assert given.startswith(kinds[told["input"].split()[0]])  # the words are those of the graph
    assert (told["raw"], "anchors" in told, "decode" in told) == ((kind == "raw"),) * 3


def test_an_image_without_detections(tmp_path):
    to_onnx(detector("one"), tmp_path / "m.onnx", 64, dict(conf=1.0))
    dt = run_onnx(tmp_path / "m.onnx", [np.zeros((40, 50, 3), np.uint8)] * 3)
    assert [tuple(t.shape) for t in dt] == [(0,), (0, 4), (0,), (0,)]
    assert dt.label.dtype == torch.int64


@pytest.mark.slow
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
    "export base --out a.onnx --raw --nms": "leave out --nms",
    "export base --out a.onnx --raw --conf .3": "'conf' changes nothing without --nms",
    "export base --out a.onnx --raw imgsz=100": "a multiple of 32, got 100",
    "export base --out a.onnx lr=1": "'lr' changes nothing here",
    "export base --out a.onnx --nms max_det_per=head": "give max_det_per=image, or leave out --nms",
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
    code, out, err = mhdet("export base --out raw.onnx --raw imgsz=96 --json")
    assert code == 0, err
    assert json.loads(out)["inputs"] == {"pictures": "tensor(float) [1, 3, 96, 96]"}
    names = ["M.onnx", "plain.onnx", "raw.onnx"]
    assert sorted(p.name for p in tmp_path.glob("*.onnx*")) == names
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
