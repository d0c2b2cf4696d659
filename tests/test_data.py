"""What package data must survive and is too slow to show in its chapters.

Broken files, random boxes, workers that are killed, real data sets.
"""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from processes import LIMIT

from mhdet.core.config import DataConfig
from mhdet.data.augment import affine, compose, hflip, random_matrix
from mhdet.data.boxes import to_xyxy, unletterbox
from mhdet.data.coco import read_coco
from mhdet.data.dataset import DetDataset, loader
from mhdet.data.records import ClassMap, Records
from mhdet.data.splits import census, check_images, open_data, resize_copy
from mhdet.data.toy import toy_dataset

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(__file__).resolve().parents[2] / "shared/data"
shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data with real images")


def coco(root, n=40, split="train", **more):
    "A COCO folder of n noise JPEGs, one box each; returns (root, the JSON's content)."
    folder = root / "images" / split
    folder.mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    images, notes = [], []
    for k in range(n):
        Image.fromarray(rng.integers(0, 255, (48, 64, 3), np.uint8)).save(folder / f"{k}.jpg")
        images.append(dict(id=k, file_name=f"{k}.jpg", width=64, height=48))
        notes.append(dict(id=k, image_id=k, category_id=5, bbox=[4, 4, 20, 10], iscrowd=0))
    categories = [dict(id=5, name="noise")]
    data = dict(images=images, annotations=notes, categories=categories) | more
    return write(root, data, split), data


def write(root, data, split="train"):
    (root / f"annotations/instances_{split}.json").write_text(json.dumps(data))
    return root


def break_images(root, zero=0, cut=0, lost=0):
    "Empty some of the image files, cut some, delete some."
    files = sorted((root / "images/train").iterdir())
    for f in files[:zero]:
        f.write_bytes(b"")
    for f in files[zero : zero + cut]:
        f.write_bytes(f.read_bytes()[: len(f.read_bytes()) * 2 // 3])
    for f in files[zero + cut : zero + cut + lost]:
        f.unlink()


@pytest.mark.parametrize("cache", ["ram", "disk", "none"])
def test_broken_images_are_counted_listed_and_left_out(tmp_path, cache):
    root, _ = coco(tmp_path / "theirs")
    break_images(root, zero=1, cut=1)
    before = {f: f.read_bytes() for f in root.rglob("*.*")}
    train = open_data(root, dev=0)["train"]
    ds = DetDataset(train, 32, cache=cache, cache_dir=tmp_path / "squares")
    assert len(ds) == 38 and census(ds.records)["problems"] == {"unreadable image": 2}
    assert any("truncated" in p for p in ds.records.problems["unreadable image"])
    assert {int(i) for b in loader(ds, 8, drop_last=False) for i in b[2]} == set(range(38))
    after = {f: f.read_bytes() for f in root.rglob("*.*")}
    assert before == after  # nothing of the user's is rewritten


@pytest.mark.parametrize(
    "broken", [dict(zero=3), dict(cut=3), dict(lost=3), dict(zero=1, cut=1, lost=1)], ids=str
)
def test_more_than_one_in_twenty_is_an_error(tmp_path, broken):
    root, _ = coco(tmp_path)
    break_images(root, **broken)
    with pytest.raises(ValueError, match="train: 3 of 40 images are missing or unreadable"):
        check_images(open_data(root, dev=0)["train"])
    with pytest.raises(ValueError, match="3 of 40"):
        DetDataset(open_data(root, dev=0)["train"], 32)


def test_a_jpeg_cut_anywhere_is_noticed(tmp_path):
    root, _ = coco(tmp_path, n=60)
    for k, f in enumerate(sorted((root / "images/train").iterdir())[:3]):
        f.write_bytes(f.read_bytes()[: (20, 500, -200)[k]])
    assert len(check_images(read_coco(root / "annotations/instances_train.json"))) == 57


def test_wrong_annotations_are_counted_by_kind(tmp_path):
    root, data = coco(tmp_path)
    good = len(data["annotations"])
    bad = [
        dict(bbox=[float("nan"), 1, 2, 3]),
        dict(bbox=[1, 1, float("inf"), 3]),
        dict(bbox="no"),
        dict(bbox=[1, 1, -5, 5]),
        dict(bbox=[1, 1, 5, 0]),
        dict(category_id=99),
        dict(image_id=12345),
        dict(bbox=[64, 0, 5, 5]),
    ]
    for k, change in enumerate(bad):
        note = dict(id=100 + k, image_id=0, category_id=5, bbox=[1, 1, 9, 9])
        data["annotations"].append(note | change)
    counts = census(open_data(write(root, data), dev=0)["train"])
    assert counts["boxes"] == good
    assert counts["problems"] == {
        "annotation of an unknown image": 1,
        "unknown category": 1,
        "box not finite": 3,
        "box without area": 2,
        "box outside its image": 1,
    }


def test_ids_without_file_and_files_of_another_size(tmp_path):
    root, data = coco(tmp_path)
    data["images"] += [dict(id=77, file_name="gone.jpg", width=9, height=9)]
    data["images"][3] |= dict(width=50)
    data["annotations"] += [dict(id=77, image_id=77, category_id=5, bbox=[1, 1, 5, 5])]
    records = check_images(open_data(write(root, data), dev=0)["train"])
    assert len(records) == len(records.gt["label"]) == 40
    assert records.sizes[3].tolist() == [64, 48]
    assert {k: len(v) for k, v in records.problems.items()} == {
        "image without file": 1,
        "annotation of a lost image": 1,
        "size is not the annotation's": 1,
    }


@pytest.mark.parametrize(
    "content, words",
    [
        ("", "not JSON"),
        ("[1]", "lists images"),
        ('{"images": []}', "'categories' is missing"),
        (
            '{"images": [{"id": 1}], "annotations": [], "categories": []}',
            "lack one of id, file_name",
        ),
    ],
)
def test_a_file_that_is_not_coco(tmp_path, content, words):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/train.json").write_text(content)
    with pytest.raises(ValueError, match=words):
        open_data(tmp_path)


def test_two_candidates_and_splits_with_other_classes(tmp_path):
    root, data = coco(tmp_path)
    coco(root, split="val", categories=[dict(id=5, name="signal")])
    with pytest.raises(ValueError, match="differ in their classes: noise, signal"):
        open_data(root)
    write(root, data, "train2017")
    files = "instances_train.json, instances_train2017.json"
    with pytest.raises(ValueError, match=f"several files for train: {files}"):
        open_data(root)


def assert_same_batches(a, b):
    "Two lists of batches are equal, tensor by tensor."
    for x, y in zip(a, b, strict=True):
        assert all(map(torch.equal, x, y))


def one_box(w, h, box):
    "Records of one black image with one box."
    gt = dict(
        image=np.zeros(1, int),
        label=np.zeros(1, int),
        box=np.array([box], float),
        ignore=np.zeros(1, bool),
        crowd=np.zeros(1, bool),
        area=np.ones(1),
    )
    pixels = np.zeros((1, h, w, 3), np.uint8)
    return Records(ClassMap(["a"], [1]), [0], None, np.array([[w, h]]), gt, pixels=pixels)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(1, 300),
    st.integers(1, 300),
    st.integers(8, 128),
    st.lists(st.floats(0, 1), min_size=4, max_size=4),
)
def test_a_box_comes_back_from_the_square(w, h, size, u):
    x0, x1 = sorted((u[0] * w, u[1] * w))
    y0, y1 = sorted((u[2] * h, u[3] * h))
    box = [x0, y0, x1 + 1e-3, y1 + 1e-3]
    image, targets, _, params = DetDataset(one_box(w, h, box), size)[0]
    assert image.shape == (3, size, size)
    assert ((targets[:, 1:] >= 0) & (targets[:, 1:] <= 1)).all()
    back = unletterbox(to_xyxy(targets[:, 1:]) * size, params)
    inside = torch.tensor(box).clamp(max=torch.tensor([w, h, w, h], dtype=torch.float32))
    assert torch.allclose(back, inside[None], atol=max(w, h) / size * 2e-3 + 2e-3)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.floats(0, 30), st.floats(0, 10), st.floats(0, 0.9))
def test_warped_boxes_stay_inside_and_contain_their_middle(seed, degrees, shear, scale):
    rng = np.random.default_rng(seed)
    matrix = random_matrix((80, 80), 64, rng, degrees=degrees, shear=shear, scale=scale)
    low = rng.uniform(0, 50, (5, 2))
    boxes = torch.from_numpy(np.concatenate([low, low + rng.uniform(4, 30, (5, 2))], 1)).float()
    image, moved, labels = affine(torch.zeros(3, 80, 80), boxes, torch.arange(5), matrix, 64)
    assert image.shape == (3, 64, 64)
    assert len(moved) == len(labels)
    assert ((moved >= 0) & (moved <= 64)).all()
    middle = ((boxes[:, :2] + boxes[:, 2:]) / 2).double().numpy() @ matrix[:, :2].T + matrix[:, 2]
    middle = torch.from_numpy(middle[labels.numpy()]).float()
    inside = ((middle > 0) & (middle < 64)).all(1)
    contained = (middle >= moved[:, :2] - 0.01) & (middle <= moved[:, 2:] + 0.01)
    assert contained.all(1)[inside].all()
    assert torch.allclose(hflip(*hflip(image, moved))[1], moved, atol=1e-4)


@pytest.mark.timeout(200)
def test_workers_and_restarts_change_no_augmented_sample():
    augment = compose(DataConfig(degrees=5.0, flipud=0.3, mixup=0.3))
    ds = DetDataset(toy_dataset(64, size=64), 64, augment=augment, seed=3)

    def batches(workers, start=0):
        out = loader(ds, 16, workers)
        out.batch_sampler.set_epoch(2, start)
        return list(out)

    alone = batches(0)
    for other, first in ((batches(2), 0), (batches(1), 0), (batches(0, 2), 2)):
        assert len(other) == 4 - first
        assert_same_batches(alone[first:], other)


@pytest.mark.filterwarnings("error")
@pytest.mark.timeout(200)
def test_squares_on_disk_make_the_same_batches_and_stay_as_they_are(tmp_path):
    batches = {}
    for cache in ("ram", "disk", "none"):
        augment = compose(DataConfig(mosaic=0.5, degrees=5.0, flipud=0.3, mixup=0.3))
        options = dict(cache=cache, seed=3, cache_dir=tmp_path / "squares")
        ds = DetDataset(toy_dataset(32, size=64), 64, augment, **options)
        before = np.array(ds.squares)
        batches[cache] = [*loader(ds, 8, workers=2), *loader(ds, 8)]
        assert np.array_equal(before, np.array(ds.squares))
    for other in ("disk", "none"):
        assert_same_batches(batches["ram"], batches[other])
    assert len(list(tmp_path.rglob("*.npy"))) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_workers_leave_signals_to_the_main_process(number):
    batches = iter(loader(DetDataset(toy_dataset(64, size=64), 64), 8, workers=2))
    for _ in range(2):  # so that both workers have begun
        next(batches)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for w in workers:
        os.kill(w.pid, number)  # as Ctrl-C does, to the whole group
    assert len(list(batches)) == 6


def test_workers_do_not_outlive_the_main_process():
    "An iterator that an error left behind does not keep the process from ending."
    code = """
from mhdet.data.dataset import DetDataset, loader
from mhdet.data.toy import toy_dataset

left = iter(loader(DetDataset(toy_dataset(64, size=64), 64), 8, workers=2))
next(left)
next(left)
raise SystemExit(7)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=LIMIT).returncode == 7


@shared
def test_a_resized_copy_holds_the_same_boxes(tmp_path):
    val = open_data(SHARED / "voc2007-mini", "val")["val"].subset(range(20))
    copy = open_data(resize_copy({"val": val}, 160, tmp_path / "small"), "val")["val"]
    scale = np.tile(copy.sizes / val.sizes, 2)[val.gt["image"]]
    assert np.abs(copy.gt["box"] - val.gt["box"] * scale).max() < 0.011
    assert (copy.gt["ignore"] == val.gt["ignore"]).all()
    assert (copy.names, copy.ids) == (val.names, val.ids)
    assert max(copy.sizes.max(1)) == 160
    assert copy.image(0).shape[:2] == tuple(copy.sizes[0][::-1])


@shared
@pytest.mark.timeout(200)
def test_five_thousand_images_load_in_seconds():
    start = time.time()
    ds = DetDataset(open_data(SHARED / "voc2007-160", dev=0)["train"], 160)
    assert len(ds) == 5008 and time.time() - start < 90  # 3 to 6 s on an idle machine
    assert sum(len(ds.square(i)[1]) for i in range(len(ds))) == 15655 - 3054
