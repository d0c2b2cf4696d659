"""What a user of the library hands over is understood, or refused in one line that says why.

Targets of torchvision's dicts, the values that the loss is given, and maps of other trunks.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from odd import situation
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import FeaturePyramidNetwork
from torchvision.tv_tensors import BoundingBoxes

from mhdet.data.dataset import DetDataset, collate
from mhdet.data.splits import open_data
from mhdet.model import loss as loss_module
from mhdet.model.assign import check_targets, match_anchors, targets_from_boxes
from mhdet.model.detector import Detector, decode
from mhdet.model.loss import RoutedLoss
from mhdet.model.multihead import ANCHORS, STRIDES, MultiHead, check_levels
from mhdet.partition.heads import Head, Partition

NAMES = list("abcdef")
ONE, TWO = Partition.single(NAMES), Partition([Head("l", [0, 2, 4]), Head("r", [1, 3, 5])], NAMES)
SIZE = (96, 64)  # height, width


def maps(channels=3 * (5 + 6), B=2, size=SIZE, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(B, channels, size[0] // s, size[1] // s, generator=g) for s in STRIDES]


def rows(n=6, seed=0, B=2):
    "Targets (n, 6) inside the image."
    g = torch.Generator().manual_seed(seed)
    wh = 0.1 + 0.3 * torch.rand(n, 2, generator=g)
    centre = wh / 2 + (1 - wh) * torch.rand(n, 2, generator=g)
    image = torch.randint(B, (n, 1), generator=g).sort(0).values
    return torch.cat([image, torch.randint(6, (n, 1), generator=g), centre, wh], 1)


def one_line(call, words, error=ValueError):
    with pytest.raises(error) as e:
        call()
    text = str(e.value)
    assert words in text and "\n" not in text and len(text) < 400, text


# From torchvision's dicts.


def as_dicts(targets, B, size, **more):
    "The same targets as torchvision's dicts."
    sides = torch.tensor([size[1], size[0]] * 2)
    out = []
    for i in range(B):
        own = targets[targets[:, 0] == i]
        centre, half = own[:, 2:4], own[:, 4:] / 2
        boxes = torch.cat([centre - half, centre + half], 1) * sides
        out.append({"boxes": boxes, "labels": own[:, 1].long()} | more)
    return out


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 12), st.sampled_from([SIZE, (320, 320), (32, 640)]))
def test_dicts_give_the_targets_they_were_made_of(seed, n, size):
    targets = rows(n, seed, B=3)
    dicts = as_dicts(targets, 3, size, image_id=7, area=torch.ones(n), iscrowd=torch.zeros(n))
    torch.testing.assert_close(targets_from_boxes(dicts, size, 6), targets)
    torch.testing.assert_close(targets_from_boxes(dicts, size), targets)
    for d in dicts:
        d["boxes"] = BoundingBoxes(d["boxes"], format="XYXY", canvas_size=size)
    torch.testing.assert_close(targets_from_boxes(dicts, size, 6), targets)


def test_formats_of_bounding_boxes():
    xywh = [[8.0, 16, 32, 48], [0, 0, 64, 96]]
    centres = [[24.0, 40, 32, 48], [32, 48, 64, 96]]
    corners = [[8.0, 16, 40, 64], [0, 0, 64, 96]]
    results = []
    for kind, boxes in (("XYWH", xywh), ("CXCYWH", centres), ("XYXY", corners)):
        boxes = BoundingBoxes(boxes, format=kind, canvas_size=SIZE)
        results.append(targets_from_boxes([{"boxes": boxes, "labels": [1, 2]}], SIZE, 6))
    assert torch.equal(results[0], results[1]) and torch.equal(results[1], results[2])
    assert type(results[0]) is torch.Tensor
    assert results[0][1].tolist() == [0, 2, 0.5, 0.5, 1, 1]


def test_the_data_set_gives_the_same_targets():
    data = DetDataset(open_data("toy:24")["train"], 64)
    items = [data[i] for i in range(8)]
    dicts = []
    for i in range(8):
        _, boxes, labels, _ = data.square(i)
        dicts.append({"boxes": boxes, "labels": labels})
    expected = collate(items)[1]
    assert torch.equal(targets_from_boxes(dicts, 64, len(data.records.names)), expected)
    assert check_targets(expected, 8, 12) is expected


def test_images_without_boxes():
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    bare = {"boxes": torch.tensor([]), "labels": torch.tensor([])}
    for dicts in ([], [empty], [bare], [empty, bare, {"boxes": [], "labels": []}]):
        assert targets_from_boxes(dicts, 64, 6).shape == (0, 6)
    some = as_dicts(rows(3), 2, SIZE)
    made = targets_from_boxes([empty, *some, bare], SIZE)
    assert (made[:, 0] - rows(3)[:, 0] == 1).all()


GOOD = {"boxes": torch.tensor([[8.0, 16, 40, 64], [2, 2, 60, 90]]), "labels": torch.tensor([0, 5])}
SHARES = GOOD["boxes"] / torch.tensor([64, 96, 64, 96])
WRONG = {
    "negative width": (
        dict(boxes=torch.tensor([[40.0, 16, 8, 64]]), labels=torch.tensor([0])),
        "image 1: box 0 (40, 16, 8, 64): x2 and y2 must be above x1 and y1",
    ),
    "no area": (
        dict(boxes=torch.tensor([[8.0, 16, 40, 64], [8, 16, 8, 64]])),
        "image 1: box 1 (8, 16, 8, 64): x2 and y2 must be above x1 and y1",
    ),
    "x, y, w, h": (
        dict(boxes=torch.tensor([[40.0, 50, 20, 30], [30, 60, 9, 9]])),
        "image 1: box 0 (40, 50, 20, 30): x2 and y2 must be above x1 and y1; is it x, y, width",
    ),
    "beyond the right": (
        dict(boxes=torch.tensor([[8.0, 16, 40, 64], [8, 16, 65, 64]])),
        "image 1: box 1 (8, 16, 65, 64): beyond the input of 64 x 96 px; of the image before",
    ),
    "beyond the top": (
        dict(boxes=torch.tensor([[8.0, -1, 40, 64], [8, 16, 60, 64]])),
        "image 1: box 0 (8, -1, 40, 64): beyond the input of 64 x 96 px",
    ),
    "not finite": (
        dict(boxes=torch.tensor([[8.0, 16, 40, 64], [8, math.nan, 60, 64]])),
        "image 1: box 1 (8, nan, 60, 64): must be finite",
    ),
    "float labels": (
        dict(labels=torch.tensor([0.0, 5])),
        "image 1: labels: expected whole numbers",
    ),
    "bool labels": (dict(labels=torch.tensor([True, False])), "expected whole numbers"),
    "a label missing": (
        dict(labels=torch.tensor([0])),
        "image 1: 2 boxes, but labels of shape (1,)",
    ),
    "labels one-hot": (dict(labels=torch.eye(6)[:2].long()), "2 boxes, but labels of shape (2, 6)"),
    "negative label": (dict(labels=torch.tensor([-1, 2])), "class must be 0..5"),
    "label too large": (dict(labels=torch.tensor([0, 6])), "class must be 0..5"),
    "rotated": (dict(boxes=torch.ones(2, 5)), "image 1: boxes: expected (N, 4) xyxy, got shape"),
    "of another image": (
        dict(boxes=BoundingBoxes(GOOD["boxes"], format="XYXY", canvas_size=(480, 640))),
        "image 1: boxes of an image of height, width 480 x 640 px, but the input has 96 x 64",
    ),
}


@situation(
    "library",
    "torchvision's dicts with a key missing, other lengths, shares, empty boxes",
    "one line names the image, the box and what is wrong",
)
@pytest.mark.parametrize("case", WRONG)
def test_wrong_dicts(case):
    changes, words = WRONG[case]
    one_line(lambda: targets_from_boxes([GOOD, GOOD | changes], SIZE, 6), words)


def test_wrong_units_and_labels_of_a_whole_batch():
    shares = [{"boxes": SHARES, "labels": GOOD["labels"]}] * 2
    words = "image 0: box 0 (0.125, 0.166667, 0.625, 0.666667): all boxes lie in 0..1; pixels"
    one_line(lambda: targets_from_boxes(shares, SIZE, 6), words)
    from_one = [{"boxes": GOOD["boxes"], "labels": torch.tensor([1, 6])}] * 2
    one_line(lambda: targets_from_boxes(from_one, SIZE, 6), "do your labels begin at 1? subtract 1")
    no_zero = [{"boxes": GOOD["boxes"], "labels": torch.tensor([1, 5])}]
    assert targets_from_boxes(no_zero, SIZE, 6)[:, 1].tolist() == [1, 5]
    for dicts, words in (
        (GOOD, "expected a list of dicts, one for each image, got one dict"),
        (
            [{"boxes": GOOD["boxes"]}],
            "image 0: expected a dict with 'boxes' and 'labels', no 'labels'",
        ),
        ([GOOD["boxes"]], "image 0: expected a dict with 'boxes' and 'labels', no 'boxes'"),
    ):
        one_line(lambda dicts=dicts: targets_from_boxes(dicts, SIZE, 6), words)


# What the loss is given.


def changed(row, column, value):
    targets = rows()
    targets[row, column] = value
    return targets


TARGETS = {
    "pixels": (rows() * torch.tensor([1, 1, 64, 96, 64, 96]), "are they pixels? divide them"),
    "a little outside": (changed(3, 2, 1.2), "row 3 "),
    "negative centre": (changed(2, 3, -0.1), "must be shares of the input, 0..1"),
    "negative width": (changed(1, 4, -0.1), "must be shares of the input, 0..1"),
    "nan": (changed(4, 5, math.nan), "must be finite"),
    "inf": (changed(4, 5, math.inf), "must be finite"),
    "labels 1..n": (rows(60) + torch.tensor([0, 1, 0, 0, 0, 0]), "do your labels begin at 1?"),
    "class n": (changed(0, 1, 6), "class must be 0..5"),
    "class -1": (changed(0, 1, -1), "class must be 0..5"),
    "class 1.5": (changed(0, 1, 1.5), "image and class must be whole numbers"),
    "image of another batch": (changed(5, 0, 2), "image must be 0..1 in a batch of 2"),
    "image -1": (changed(0, 0, -1), "image must be 0..1 in a batch of 2"),
    "columns of class and box": (rows()[:, 1:], "expected (M, 6) image, class, cx, cy, w, h, got"),
    "one row": (rows()[0], "got shape (6,)"),
    "dicts": (as_dicts(rows(), 2, SIZE), "got list; targets_from_boxes makes it"),
    "one dict": (GOOD, "got dict; targets_from_boxes makes it"),
}


@situation(
    "library",
    "Targets in pixels, classes from 1..n, images that are not there",
    "refused in the first call of the loss that has targets",
)
@pytest.mark.parametrize("case", TARGETS)
@pytest.mark.parametrize("route", [dict(), dict(assign="ota"), dict(others="ignore_iou")])
def test_wrong_targets_are_refused_at_the_first_call(case, route):
    targets, words = TARGETS[case]
    one_line(lambda: RoutedLoss(TWO, **route)(maps(3 * 16), targets), words)
    loss = RoutedLoss(TWO, **route, validate=True)
    loss(maps(3 * 16), rows())
    one_line(lambda: loss(maps(3 * 16), targets), words)


@situation(
    "library",
    "Targets that are corners instead of centre and size",
    "refused in the first call",
)
def test_corners_in_place_of_centres():
    targets = rows(24)
    corners = targets.clone()
    corners[:, 2:4], corners[:, 4:] = (
        targets[:, 2:4] - targets[:, 4:] / 2,
        targets[:, 2:4] + targets[:, 4:] / 2,
    )
    one_line(lambda: RoutedLoss(ONE)(maps(), corners), "is it x1, y1, x2, y2, not cx, cy, w, h?")


def test_the_first_call_with_targets_is_checked_and_no_other(monkeypatch):
    seen = []

    def counted(targets, *more):
        seen.append(len(targets))
        return check_targets(targets, *more)

    monkeypatch.setattr(loss_module, "check_targets", counted)
    loss = RoutedLoss(ONE)
    none, some = rows()[:0], rows()
    for targets in (none, none, some, some, none, some):
        loss(maps(), targets)
    assert seen == [0, 0, 6]
    strict = RoutedLoss(ONE, validate=True)
    for targets in (none, some, some):
        strict(maps(), targets)
    assert seen == [0, 0, 6, 0, 6, 6]
    loss.validate = True
    one_line(lambda: loss(maps(), some * 50), "targets: row")


class Reads(TorchDispatchMode):
    "Counts the operations by which a value leaves the device, and all operations."

    def __init__(self):
        super().__init__()
        self.reads, self.all = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.all += 1
        self.reads += "_local_scalar_dense" in str(func)
        return func(*args, **(kwargs or {}))


def test_later_steps_do_nothing_that_was_not_done_before():
    "As many operations, and reads of single values, as with the checks taken out."
    loss, bare = RoutedLoss(TWO), RoutedLoss(TWO)
    bare._seen_targets = True
    raws, targets = maps(3 * 16), rows()
    counts = []
    for module in (loss, loss, bare):
        with Reads() as reads:
            module(raws, targets)
        counts.append((reads.all, reads.reads))
    assert counts[1] == counts[2] and counts[0] > counts[1]


@pytest.mark.parametrize("route", [dict(), dict(assign="ota"), dict(reduce="head")])
def test_checks_change_no_number(route):
    targets = rows(20)
    results = []
    for validate in (False, True):
        raws = [r.requires_grad_() for r in maps(3 * 16)]
        out = RoutedLoss(TWO, validate=validate, **route)(raws, targets)
        results.append([*out.values(), *torch.autograd.grad(out["loss"], raws)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_boxes_at_the_edges_and_rounding_are_fine():
    targets = torch.tensor(
        [[0, 0, 0.5, 0.5, 1, 1], [1, 5, 0, 1, 1, 1], [1, 3, 1 + 1e-6, -1e-6, 0, 0]]
    )
    assert check_targets(targets, 2, 6) is targets
    assert torch.isfinite(RoutedLoss(ONE)(maps(), targets)["loss"])
    half = targets.half()
    assert check_targets(half, 2, 6) is half


# Maps and levels.


class Dict(nn.Module):
    "A trunk that returns what torchvision's feature pyramid does."

    def __init__(self, trunk):
        super().__init__()
        self.trunk, self.channels = trunk, [16, 16, 16]
        self.pyramid = FeaturePyramidNetwork(trunk.channels, 16)

    def forward(self, x):
        return self.pyramid(dict(zip("abc", self.trunk(x), strict=True)))


class Listed(Dict):
    "The remedy that the message names."

    def forward(self, x):
        return list(super().forward(x).values())


@situation(
    "library",
    "A trunk that returns a dict",
    "refused: a list of maps is expected",
)
def test_a_trunk_that_returns_a_dict():
    trunk, head = Detector.make(ONE, 0.125).trunk, MultiHead(ONE, [16, 16, 16])
    x = torch.rand(2, 3, *SIZE)
    words = "maps: expected a list of 3 maps (B, C, H, W), got a dict with the keys 'a', 'b', 'c'"
    detector = Detector(Dict(trunk), head)
    one_line(lambda: detector(x), words)
    one_line(lambda: detector.detect(x), words)
    raws = Detector(Listed(trunk), head)(x)
    assert torch.isfinite(RoutedLoss(ONE)(raws, rows())["loss"])


WRONG_MAPS = {
    "a dict": (lambda m: dict(enumerate(m)), "got a dict with the keys 0, 1, 2"),
    "one tensor": (lambda m: m[0], "got a Tensor"),
    "nothing": (lambda m: None, "got a NoneType"),
    "too few": (lambda m: m[:2], "expected a list of 3 maps (B, C, H, W), got 2"),
    "too many": (lambda m: [*m, m[2]], "expected a list of 3 maps (B, C, H, W), got 4"),
    "maps and features": (lambda m: (m, m), "got 2"),
    "one image": (lambda m: [x[0] for x in m], "among them"),
    "other batches": (lambda m: [m[0], m[1][:1], m[2]], "among them"),
}


@situation(
    "library",
    "More or fewer maps than levels",
    "refused, with both numbers",
)
@pytest.mark.parametrize("case", WRONG_MAPS)
def test_other_than_one_map_per_level(case):
    change, words = WRONG_MAPS[case]
    head = MultiHead(ONE, [16, 32, 64])
    features = [
        torch.rand(2, c, 96 // s, 64 // s) for c, s in zip((16, 32, 64), STRIDES, strict=True)
    ]
    for call in (
        lambda: head(change(features)),
        lambda: RoutedLoss(ONE)(change(maps()), rows()),
        lambda: decode(change(maps()), head),
        lambda: check_levels(change(features), 3),
    ):
        one_line(call, words)
    assert len(head(tuple(features))) == 3


def test_channels_and_order_of_levels():
    head = MultiHead(ONE, [16, 32, 64])
    features = [torch.rand(2, c, 12, 8) for c in (16, 64, 32)]
    one_line(lambda: head(features), "maps: level 1: expected 32 channels, got 64")
    one_line(lambda: RoutedLoss(ONE)(maps(3 * 16), rows()), "expected 33 channels = 3 anchors x")
    coarse_first = "raws: levels of one input must be equally high, got 3 cells x 8 px"
    one_line(lambda: RoutedLoss(ONE)(maps()[::-1], rows()), coarse_first)
    odd = [torch.randn(2, 33, math.ceil(100 / s), math.ceil(70 / s)) for s in STRIDES]
    assert torch.isfinite(RoutedLoss(ONE)(odd, rows())["loss"])  # a side that is no multiple of 32


@situation(
    "library",
    "`balance` or weights that do not fit the levels or the classes",
    "refused, with both numbers",
)
@pytest.mark.parametrize(
    "numbers, words",
    [
        (dict(balance=(4.0, 1.0)), "3 strides, anchors of shape (3, 3, 2), balance of 2"),
        (dict(balance=(1.0,)), "balance of 1"),
        (dict(balance=(4.0, 1.0, 0.4, 0.1)), "balance of 4"),
        (dict(strides=(8, 16)), "2 strides, anchors of shape (3, 3, 2), balance of 3"),
        (dict(anchors=ANCHORS[:2]), "3 strides, anchors of shape (2, 3, 2), balance of 3"),
        (dict(anchors=ANCHORS[0]), "anchors of shape (3, 2)"),
        (dict(class_weights=[1.0, 2.0]), "class_weights: 2 for 6 classes"),
        (
            dict(anchors=ANCHORS[::2], strides=(8, 32), balance=(4, 1), autobalance=True),
            "autobalance: no level of stride 16 among (8, 32)",
        ),
    ],
)
def test_numbers_per_level_and_per_class(numbers, words):
    one_line(lambda: RoutedLoss(ONE, **numbers), words)


def test_matching_alone_says_it_too():
    shapes = [(12, 8), (6, 4), (3, 2)]
    one_line(lambda: match_anchors([GOOD], shapes, ANCHORS, STRIDES), "targets_from_boxes makes it")
    one_line(lambda: match_anchors(rows()[:, 1:], shapes, ANCHORS, STRIDES), "got shape (6, 5)")


def test_a_training_by_hand_from_dicts():
    torch.manual_seed(0)
    detector, loss = Detector.make(TWO, 0.125), RoutedLoss(TWO)
    optimizer = torch.optim.SGD(detector.parameters(), 0.05, momentum=0.9)
    images = torch.rand(2, 3, *SIZE)
    targets = targets_from_boxes([GOOD, GOOD], SIZE, 6)
    values = []
    for _ in range(20):
        optimizer.zero_grad()
        value = loss(detector(images), targets)["loss"]
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.9 * values[0]
