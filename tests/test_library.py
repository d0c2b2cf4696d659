"""Heads and loss in somebody else's training loop: compiled, copied, pickled, in two processes."""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import mhdet

ROOT = Path(__file__).resolve().parents[1]
NAMES = list("abcdef")
TWO = mhdet.Partition([mhdet.Head("x", [0, 2, 4]), mhdet.Head("y", [1, 3, 5])], NAMES)


def slow(form):
    return pytest.param(form, marks=pytest.mark.slow)


FORMS = [{}, {"implicit": True}, {"boxes": "shared"}, {"adapter": "cbam"}]
LOSSES = [{"autobalance": True}, {"assign": "ota", "others": "ignore_iou", "reduce": "head"}]


pytestmark = pytest.mark.usefixtures("one_thread")


class Own(nn.Module):
    "A backbone that knows nothing of mhdet: three maps and their channels."

    channels = (8, 12, 16)

    def __init__(self):
        super().__init__()
        strides = (8, 16, 32)
        self.convs = nn.ModuleList(
            nn.Conv2d(3, c, s, s) for c, s in zip(self.channels, strides, strict=True)
        )

    def forward(self, x):
        return [conv(x).relu() for conv in self.convs]


def own_detector(**form):
    torch.manual_seed(0)
    return mhdet.Detector(Own(), mhdet.MultiHead(TWO, Own.channels, **form))


def batch(n=4, objects=9, seed=0):
    "Images (n, 3, 64, 96) and torchvision's dicts; one image has no object."
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(n, 3, 64, 96, generator=generator)
    dicts = []
    for i in range(n):
        m = objects if i else 0
        size = 6 + 40 * torch.rand(m, 2, generator=generator)
        low = torch.rand(m, 2, generator=generator) * (torch.tensor([96, 64]) - size)
        labels = torch.randint(len(NAMES), (m,), generator=generator)
        dicts.append(dict(boxes=torch.cat([low, low + size], 1), labels=labels))
    return images, mhdet.targets_from_boxes(dicts, (64, 96), TWO.nc)


def gradients(model, loss, images, targets):
    model.zero_grad()
    terms = loss(model(images), targets)
    terms["loss"].backward()
    return terms, [p.grad.clone() for p in model.parameters()]


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("form", [FORMS[0], *map(slow, FORMS[1:])], ids=str)
def test_a_detector_is_one_graph(form, fresh_compiler):
    model = own_detector(**form)
    images, _ = batch()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for x in (images, images[:2].transpose(2, 3).contiguous()):
        for a, b in zip(compiled(x), model(x), strict=True):
            assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("options", [slow(LOSSES[0]), LOSSES[1]], ids=str)
def test_a_compiled_loss_gives_the_same_numbers(options, fresh_compiler):
    model, loss = own_detector(), mhdet.RoutedLoss(TWO, **options)
    compiled = torch.compile(copy.deepcopy(loss), backend="eager")
    for seed, objects in enumerate((9, 0)):
        data = batch(objects=objects, seed=seed)
        expected, whole = gradients(model, loss, *data)
        terms, parts = gradients(model, compiled, *data)
        assert terms.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.allclose(terms[key], value, rtol=1e-5, atol=1e-7), key
        for a, b in zip(parts, whole, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_decoding_compiles(fresh_compiler):
    model = own_detector().eval()
    images, _ = batch()
    compiled = torch.compile(lambda x: mhdet.decode(model(x), model.head), backend="eager")
    for a, b in zip(compiled(images), mhdet.decode(model(images), model.head), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_copies_and_pickles(form):
    boxes = form.get("boxes", "head")
    model, loss = own_detector(**form), mhdet.RoutedLoss(TWO, boxes=boxes, autobalance=True)
    data = batch()
    gradients(model, loss, *data)  # after a step: nothing in them refers to a graph
    together = [model, loss, TWO]
    twins = copy.deepcopy(together), pickle.loads(pickle.dumps(together))
    expected, whole = gradients(model, loss, *data)
    for twin_model, twin_loss, partition in twins:
        assert partition == TWO and (partition.head_of == TWO.head_of).all()
        terms, parts = gradients(twin_model, twin_loss, *data)
        assert all(torch.equal(terms[k], v) for k, v in expected.items())
        assert all(torch.equal(a, b) for a, b in zip(parts, whole, strict=True))
        assert twin_model.head.m[0].weight.data_ptr() != model.head.m[0].weight.data_ptr()


CHILD = """
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import mhdet

torch.set_num_threads(1)
rank, world = int(sys.argv[1]), 2
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=world)
out = []
for model, loss, images, targets in torch.load("start.pt", weights_only=False):
    parallel = DistributedDataParallel(model)
    own = targets[targets[:, 0] % world == rank].clone()
    own[:, 0] = own[:, 0] // world
    terms = loss(parallel(images[rank::world]), own)
    (terms["loss"] * world).backward()
    out.append((terms["loss"].detach(), [p.grad for p in model.parameters()]))
torch.save(out, f"out{rank}.pt")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_are_one_batch(tmp_path):
    cases = []
    for options in ({}, {"assign": "ota"}, {"reduce": "head", "others": "ignore"}):
        torch.manual_seed(0)
        model = mhdet.Detector.make(TWO, width=0.125, norm="gn")
        cases.append((model, mhdet.RoutedLoss(TWO, **options), *batch()))
    torch.save(cases, tmp_path / "start.pt")
    words = [sys.executable, "-c", CHILD]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    children = [
        subprocess.Popen([*words, str(rank), tmp_path / "meeting"], cwd=tmp_path, env=env)
        for rank in (0, 1)
    ]
    assert [child.wait(timeout=300) for child in children] == [0, 0]
    first, second = (torch.load(tmp_path / f"out{rank}.pt") for rank in (0, 1))
    for case, (loss_a, grads_a), (loss_b, grads_b) in zip(cases, first, second, strict=True):
        terms, whole = gradients(*case)
        assert torch.allclose(loss_a + loss_b, terms["loss"], rtol=1e-5)
        for a, b, expected in zip(grads_a, grads_b, whole, strict=True):
            assert torch.equal(a, b)
            assert (a - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1e-3)


def dicts_of(box, label=0):
    return [dict(boxes=torch.tensor([box]).float(), labels=torch.tensor([label]))]


def check(*args):
    return mhdet.targets_from_boxes(dicts_of(*args), (64, 96), TWO.nc)


MISTAKES = {
    "class must be 0..5": lambda m, x: check([8, 8, 40, 40], 6),
    "expected whole numbers, got torch.float32": lambda m, x: check([8, 8, 40, 40], 1.0),
    "is it x, y, width, height?": lambda m, x: check([60, 30, 24, 24]),
    "pixels are expected, not shares": lambda m, x: check([0.1, 0.1, 0.4, 0.4]),
    "beyond the input of 96 x 64 px": lambda m, x: check([40, 8, 90, 90]),
    "targets_from_boxes makes it of": lambda m, x: mhdet.RoutedLoss(TWO)(m(x), dicts_of([1] * 4)),
    "got torch.uint8; divide bytes by 255": lambda m, x: m((x * 255).byte()),
    "got list; torch.stack makes one": lambda m, x: m(list(x)),
    "a tensor (B, 3, H, W), got shape (3, 64, 96)": lambda m, x: m(x[0]),
    "has 64; its stride is 8": lambda m, x: mhdet.Detector(
        m.trunk, mhdet.MultiHead(TWO, Own.channels, strides=(4, 8, 16))
    )(x),
    "level 2: expected 20 channels, got 16": lambda m, x: mhdet.MultiHead(TWO, (8, 12, 20))(
        m.trunk(x)
    ),
    "expected 33 channels = 3 anchors x (5 x 1 heads + 6 classes), got 48": lambda m, x: (
        mhdet.RoutedLoss(mhdet.Partition.single(NAMES))(m(x), batch()[1])
    ),
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes_are_one_line(words):
    with pytest.raises(ValueError) as caught:
        MISTAKES[words](own_detector(), batch()[0])
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("side", [60, 64, 66])
def test_sides_between_two_strides(side):
    "A backbone may round cells up or down; both are accepted."
    for padding in (0, 3):
        trunk = Own()
        for conv in trunk.convs:
            conv.padding = (padding, padding)
        model = mhdet.Detector(trunk, mhdet.MultiHead(TWO, Own.channels))
        assert len(model(torch.rand(1, 3, side, side))) == 3
