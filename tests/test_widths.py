"""Every width that the configuration allows builds, runs, and goes through the whole program."""

import shlex
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mhdet.cli.commands import app
from mhdet.core.config import load_config, options
from mhdet.model.backbone import Trunk, count, yolov7_tiny
from mhdet.model.detector import Detector
from mhdet.model.weight_files import to_foreign
from mhdet.model.weights import load_foreign
from mhdet.partition.heads import Head, Partition

# YOLOv5 and YOLOX (.33 and .5; .375 and 1.25), halves between two multiples of 8, the smallest
ODD = [1e-9, 0.01, 0.02, 0.05, 0.0625, 0.1, 0.2, 0.3, 0.33, 0.45, 0.66, 0.7, 0.9, 1.1, 1.33, 2.7]
EIGHTHS = {  # width -> parameters
    0.125: 98_072,
    0.25: 377_800,
    0.375: 853_536,
    0.5: 1_503_376,
    0.625: 2_337_536,
    0.75: 3_376_728,
    1: 5_997_856,
    1.25: 9_366_760,
    1.5: 13_483_440,
    2: 23_960_128,
    4: 95_777_920,
}
TWO = Partition([Head("a", [0, 2]), Head("b", [1])], ["x", "y", "z"])


def mhdet(line):
    done = CliRunner().invoke(app, shlex.split(line))
    return done.exit_code, done.stdout, done.stderr


@pytest.mark.parametrize("norm", ["bn", "gn"])
@pytest.mark.parametrize("width", [*ODD, *EIGHTHS, 8])
def test_any_width_gives_three_maps(width, norm):
    with torch.device("meta"):  # shapes alone
        trunk = Trunk(width, norm)
        maps = trunk(torch.empty(1, 3, 64, 96))
    channels = [max(round(n * width / 8), 1) * 8 for n in (128, 256, 512)]
    shapes = [(1, c, 64 // s, 96 // s) for c, s in zip(channels, (8, 16, 32), strict=True)]
    assert [tuple(m.shape) for m in maps] == shapes
    assert trunk.channels == channels


@pytest.mark.parametrize("width", EIGHTHS)
def test_multiples_of_an_eighth_are_what_they_were(width):
    "Runs of earlier versions have stored these shapes."

    def channels(n):
        return max(round(n * width / 8), 1) * 8

    with torch.device("meta"):
        trunk = Trunk(width)
    for stage, n in ((trunk.up4, 256), (trunk.up3, 128), (trunk.down4, 256), (trunk.down5, 512)):
        for conv in (stage[-1].cv1, stage[-1].cv2):
            assert conv.conv.in_channels == channels(n)
    assert count(trunk)["params"] == EIGHTHS[width]


@pytest.mark.parametrize("width", [0.05, 0.33, 0.2, 1.1])
def test_heads_losses_and_foreign_names(width):
    detector = Detector.make(TWO, width)
    raws = detector(torch.rand(2, 3, 64, 64))
    assert [r.shape[1] for r in raws] == [3 * (5 * 2 + 3)] * 3
    sum(r.sum() for r in raws).backward()
    assert all(p.grad is not None for p in detector.parameters())
    again = load_foreign(to_foreign(detector), TWO)
    detector.eval()
    x = torch.rand(1, 3, 64, 64)
    for a, b in zip(detector(x), again(x), strict=True):
        assert torch.equal(a, b)
    assert count(detector, 64)["macs"] > 0


def test_allowed_widths_are_named():
    allowed = {row["key"]: row["allowed"] for row in options()}["width"]
    assert allowed == "> 0 and <= 8"
    for wrong in ("0", "-1", "8.5", "inf", ".nan"):
        with pytest.raises(ValueError, match="width: "):
            load_config(f"width={wrong}")
    for wrong in (0, -0.5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="width must be above 0 and finite"):
            yolov7_tiny(wrong)


@pytest.mark.slow
def test_an_odd_width_through_the_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train = "train data=toy:16 imgsz=64 batch=8 workers=0 precision=fp32 epochs=1 device=cpu"
    code, _, err = mhdet(f"{train} run=w width=0.33")
    assert code == 0, err
    for line in (
        "partition --data toy:16 --strategy random --num-heads 2 --out H.yaml",
        "split w --heads H.yaml --out w2",
        "eval w2",
        f"{train} run=w3 width=0.33 weights=w2 --heads H.yaml",
        "export w2 --out w.onnx",
        "doctor width=0.2 imgsz=64",
    ):
        code, _, err = mhdet(line)
        assert code == 0, (line, err)
    code, _, err = mhdet(f"{train} run=no width=9")
    assert (code, err.count("\n"), Path("runs/no").exists()) == (2, 1, False)
    assert "width: Expected `float` <= 8.0, got 9" in err
