"""Images and boxes that are there twice: every kind of copy is found, nothing else is.

Copies under other names and in other formats, images that only look alike, splits of all layouts,
and what is kept between two calls.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image

import mhdet.cli.commands  # noqa: F401
from mhdet.cli.grammar import run_line
from mhdet.data import overlaps
from mhdet.data.coco import read_coco
from mhdet.data.images import read_image
from mhdet.data.overlaps import (
    fingerprints,
    first_copies,
    leak_line,
    leaks,
    noted,
    repeated_boxes,
    twins,
)
from mhdet.data.records import ClassMap, Records
from mhdet.data.splits import _is_dev, check_images, open_data
from mhdet.data.toy import toy_dataset

ROOT = Path(__file__).resolve().parents[1]
TOY = toy_dataset(60, seed=0)
LARGE, SMALL = (301, 322), (61, 50)  # JPEGs of the one are decoded at an eighth first


def drawing(k, size=LARGE):
    return Image.fromarray(TOY.pixels[k]).resize(size)


def records_of(files, gt=None):
    "Records of these files, without boxes or with these (image, label, x0, y0, x1, y1)."
    rows = np.array(gt or [], float).reshape(-1, 6)
    none = np.zeros(len(rows), bool)
    columns = dict(image=rows[:, 0].astype(int), label=rows[:, 1].astype(int), box=rows[:, 2:])
    columns |= dict(ignore=none, crowd=none, area=np.ones(len(rows)))
    sizes = np.full((len(files), 2), 64)
    classes = ClassMap(["car", "bus"], [1, 2])
    return Records(classes, list(range(len(files))), list(files), sizes, columns)


def are_same(*files):
    "Whether two files are found to show the same, in one split and in two."
    inside = len(twins(records_of(files), None)) == 1
    across = leaks(dict(zip("ab", [records_of([f]) for f in files], strict=True)), None)
    assert inside == bool(across)
    return inside


@pytest.fixture
def settled(monkeypatch):
    "Files just written count as old ones; nothing is known of any; names of those decoded whole."
    calls, decode, read = [], overlaps._decode, overlaps.read_image

    def counted_decode(image):
        calls.append(Path(image.filename).name)
        return decode(image)

    def counted_read(path):
        calls.append(Path(path).name)
        return read(path)

    monkeypatch.setattr(overlaps, "_SETTLED", -(10**18))
    monkeypatch.setattr(overlaps, "_memory", {})
    monkeypatch.setattr(overlaps, "_decode", counted_decode)
    monkeypatch.setattr(overlaps, "read_image", counted_read)
    return calls


def forget():
    "As a new process would."
    overlaps._memory.clear()


# What is the same, and what is not.


def exif_of(tag, value):
    exif = Image.Exif()
    exif[tag] = value
    return exif


FORMATS = {
    "a.png": {},
    "a.bmp": {},
    "a.tif": {},
    "a.webp": dict(lossless=True),
    "b.tif": dict(compression="tiff_lzw"),
    "b.png": dict(compress_level=0, exif=exif_of(0x010F, "camera")),
}


@pytest.mark.parametrize("size", [LARGE, SMALL], ids=str)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", ["RGB", "L"])
def test_a_jpeg_saved_without_loss_is_the_same(tmp_path, kind, name, size):
    jpeg = tmp_path / "original.jpg"
    drawing(1, size).convert(kind).save(jpeg, quality=85)
    read_image(jpeg).save(tmp_path / name, **FORMATS[name])
    assert are_same(jpeg, tmp_path / name)


@pytest.mark.parametrize("size", [LARGE, SMALL], ids=str)
def test_cmyk(tmp_path, size):
    "Pixels of cyan and black in turn have no red; half cyan and half black has some."
    inks = np.zeros((size[1], size[0], 4), np.uint8)
    is_black = np.add.outer(np.arange(size[1]), np.arange(size[0])) % 2 > 0
    inks[..., 0], inks[..., 3] = 255 * ~is_black, 255 * is_black
    Image.fromarray(inks, "CMYK").save(tmp_path / "a.jpg", quality=95)
    read_image(tmp_path / "a.jpg").save(tmp_path / "a.png")
    assert are_same(tmp_path / "a.jpg", tmp_path / "a.png")


def cut_app_segments(data):
    "A JPEG without its APPn segments (JFIF, EXIF) and comments."
    out, at = data[:2], 2
    while data[at + 1] != 0xDA:
        length = int.from_bytes(data[at + 2 : at + 4], "big") + 2
        if not (0xE0 <= data[at + 1] <= 0xEF or data[at + 1] == 0xFE):
            out += data[at : at + length]
        at += length
    return out + data[at:]


@pytest.mark.parametrize("size", [LARGE, SMALL], ids=str)
def test_metadata_does_not_count(tmp_path, size):
    full, bare = tmp_path / "full.jpg", tmp_path / "bare.jpg"
    drawing(2, size).save(full, exif=exif_of(0x010F, "camera"), comment=b"street 7", dpi=(72, 72))
    bare.write_bytes(cut_app_segments(full.read_bytes()))
    assert full.stat().st_size > bare.stat().st_size + 40
    assert are_same(full, bare)


@pytest.mark.parametrize("size", [LARGE, (304, 320), SMALL], ids=str)
@pytest.mark.parametrize("orientation", [3, 5, 6, 8])
def test_a_turned_jpeg_is_what_it_shows(tmp_path, orientation, size):
    "The same as its upright copy, not as the pixels it stores."
    turned, stored, upright = (tmp_path / name for name in ("turned.jpg", "stored.jpg", "up.png"))
    drawing(3, size).save(turned, exif=exif_of(0x0112, orientation))
    drawing(3, size).save(stored)
    read_image(turned).save(upright)
    assert are_same(turned, upright)
    assert not are_same(turned, stored) and not are_same(stored, upright)
    (print_,) = fingerprints(records_of([turned]), None)
    assert print_.size == read_image(turned).size


def test_modes_that_look_the_same_are_the_same(tmp_path):
    "The network gets RGB: grey or palette, 8 bits or 16, with or without transparency."
    grey = drawing(4).convert("L")
    files = [tmp_path / f"{k}.png" for k in range(4)]
    images = [grey, grey.convert("RGB"), grey.convert("P"), grey.convert("LA")]
    for file, image in zip(files, images, strict=True):
        image.save(file)
    assert len(twins(records_of(files), None)) == 3


def one_pixel(image, to=(1, 2, 3)):
    image = image.copy()
    image.putpixel((image.width - 1, image.height - 1), to)
    return image


def alternating(sign):
    "Pixels 128 +- 20 in turn: every 8 x 8 block has the same mean, so an eighth of it is flat."
    even = np.add.outer(np.arange(320), np.arange(320)) % 2
    return Image.fromarray((128 + sign * 20 * (2 * even - 1)).astype(np.uint8))


LOOK_ALIKE = {
    "one pixel": (".png", drawing(5), one_pixel(drawing(5))),
    "one pixel of a small one": (
        ".jpg",
        drawing(5, SMALL),
        one_pixel(drawing(5, SMALL), (255,) * 3),
    ),
    "same draft": (".jpg", alternating(1), alternating(-1)),
    "another size": (".png", drawing(5), drawing(5).crop((0, 0, 300, 322))),
    "mirrored": (".jpg", drawing(5), drawing(5).transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
    "same mean": (".jpg", drawing(5), drawing(5).rotate(180)),
}


@pytest.mark.parametrize("case", LOOK_ALIKE)
def test_different_images_are_different(tmp_path, case):
    suffix, a, b = LOOK_ALIKE[case]
    files = [tmp_path / f"{k}{suffix}" for k in range(2)]
    for file, image in zip(files, (a, b), strict=True):
        image.save(file, **(dict(quality=95) if suffix == ".jpg" else {}))
    assert read_image(files[0]).tobytes() != read_image(files[1]).tobytes()
    assert not are_same(*files)


def test_a_jpeg_saved_as_jpeg_is_another(tmp_path):
    drawing(6).save(tmp_path / "a.jpg", quality=90)
    read_image(tmp_path / "a.jpg").save(tmp_path / "b.jpg", quality=60)
    read_image(tmp_path / "b.jpg").save(tmp_path / "b.png")
    assert not are_same(tmp_path / "a.jpg", tmp_path / "b.jpg")
    assert not are_same(tmp_path / "a.jpg", tmp_path / "b.png")


def test_drafts_of_hard_edges_are_recognised(tmp_path):
    "Edges where the fields of the small version meet, and off its blocks."
    rng = np.random.default_rng(0)
    for k, (w, h) in enumerate([(257, 256), (263, 300), (500, 375), (321, 999), (256, 4000)]):
        cells = rng.integers(0, 2, (int(rng.integers(2, 9)), int(rng.integers(2, 9)), 3)) * 255
        image = Image.fromarray(cells.astype(np.uint8)).resize((w, h), Image.NEAREST)
        image.save(tmp_path / f"{k}.jpg", quality=75)
        read_image(tmp_path / f"{k}.jpg").save(tmp_path / f"{k}.png")
        assert are_same(tmp_path / f"{k}.jpg", tmp_path / f"{k}.png"), (w, h)


def test_three_copies_of_one_and_two_of_another(tmp_path):
    names = ["a.jpg", "b.png", "b again.png", "a (copy).jpg", "c.png", "a.png"]
    drawing(7).save(tmp_path / "a.jpg")
    shutil.copy(tmp_path / "a.jpg", tmp_path / "a (copy).jpg")
    read_image(tmp_path / "a.jpg").save(tmp_path / "a.png")
    for name, k in (("b.png", 8), ("b again.png", 8), ("c.png", 9)):
        drawing(k).save(tmp_path / name)
    pairs = twins(records_of([tmp_path / name for name in names]), None)
    found = [(Path(a).name, Path(b).name) for a, b in pairs]
    assert found == [("b.png", "b again.png"), ("a.jpg", "a (copy).jpg"), ("a.jpg", "a.png")]


def test_unreadable_files_are_no_copies(tmp_path):
    "They are not the same image: they are none; what is wrong is said of each."
    for k in range(2):
        (tmp_path / f"{k}.png").write_bytes(b"")
        (tmp_path / f"{k}.jpg").write_bytes(b"\xff\xd8\xff\xe0 no image")
    files = sorted(tmp_path.iterdir())
    records = records_of([*files, tmp_path / "absent.png"])
    assert twins(records, None) == []
    errors = [f.error for f in fingerprints(records, None)]
    assert all(errors) and errors[-1].startswith("FileNotFoundError")


# Images of one colour.


@pytest.mark.parametrize("size", [LARGE, SMALL], ids=str)
@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize("color", ["black", "white", (200, 30, 90)], ids=str)
def test_one_colour_is_noted_and_no_copy(tmp_path, color, suffix, size):
    files = [tmp_path / f"{k}{suffix}" for k in range(3)]
    for file in files[:2]:
        Image.new("RGB", size, color).save(file)
    drawing(0, size).save(files[2])
    records = records_of(files)
    assert noted(records, None) == {"pixels all one value": [str(f) for f in files[:2]]}
    assert leaks({"train": records_of(files[:1]), "val": records_of(files[1:])}, None) == []
    same = leaks({"train": records, "val": records}, None)[0]  # one file in both is a leak
    assert (same["count"], same["same_file"]) == (3, 3)


@pytest.mark.parametrize("image", [alternating(1), one_pixel(Image.new("RGB", LARGE))])
@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_nearly_one_colour_is_not_noted(tmp_path, suffix, image):
    file = tmp_path / f"a{suffix}"
    image.save(file, **(dict(quality=100) if suffix == ".jpg" else {}))
    assert np.ptp(np.asarray(read_image(file)).reshape(-1, 3), 0).any()
    assert noted(records_of([file]), None) == {}


def test_unusual_depth_is_noted(tmp_path):
    "Scaled by what the file holds, and said; 8 bits, and all 16, are plain."
    grey = np.asarray(drawing(0).convert("L"))
    kinds = {
        "plain.png": grey,
        "all16.png": grey.astype(np.uint16) * 257,
        "twelve.png": grey.astype(np.uint16) * 16,
        "floats.tif": (grey / 255).astype(np.float32),
    }
    for name, values in kinds.items():
        Image.fromarray(values).save(tmp_path / name)
    found = noted(records_of([tmp_path / name for name in kinds]), None)
    places = [p.rpartition("/")[2] for p in found["pixels scaled to 8 bits"]]
    assert places == ["twelve.png: 12 bits", "floats.tif: floats from 0 to 1"]
    # after scaling they show the same, give or take the rounding of floats
    assert len(found["same image twice"]) >= 2


# Copies of a file.


def test_first_copies_reads_ends_first(tmp_path):
    "Files that differ in the first byte only, in the last only, in length only; links."
    middle = os.urandom(20_000)
    contents = [b"a" + middle + b"z", b"b" + middle + b"z", b"a" + middle + b"y"]
    contents += [contents[0], contents[0][:-1], contents[1], b"", b""]
    files = [tmp_path / str(k) for k in range(len(contents))]
    for file, content in zip(files, contents, strict=True):
        file.write_bytes(content)
    (tmp_path / "link").symlink_to(files[2])
    files.append(tmp_path / "link")
    assert first_copies(files).tolist() == [0, 1, 2, 0, 4, 1, 6, 6, 2]
    with pytest.raises(FileNotFoundError, match="absent"):
        first_copies([*files, tmp_path / "absent"])


def yolo(root, names, split="train"):
    "A YOLO split: file name -> image, or a file to copy."
    for kind in ("images", "labels"):
        (root / kind / split).mkdir(parents=True, exist_ok=True)
    for name, image in names.items():
        file = root / "images" / split / name
        if isinstance(image, Path):
            shutil.copy(image, file)
        else:
            image.save(file)
        (root / "labels" / split / name).with_suffix(".txt").write_text("0 .5 .5 .25 .5\n")
    lines = [f"{s}: images/{s}" for s in ("train", "val") if (root / "images" / s).is_dir()]
    (root / "data.yaml").write_text("\n".join([*lines, "names: [car]\n"]))
    return root / "data.yaml"


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_copies_stay_on_one_side_of_train_and_dev(tmp_path, suffix):
    "Each of 40 images a second time, in the order of the list before or after its original."
    originals = {f"m{k:02d}{suffix}": drawing(k, SMALL) for k in range(40)}
    yolo(tmp_path, originals)
    for k in range(40):
        original = tmp_path / f"images/train/m{k:02d}{suffix}"
        yolo(tmp_path, {f"{'az'[k % 2]}{k:02d}{suffix}": original})
    splits = open_data(tmp_path / "data.yaml")
    side = {i: s for s in ("train", "dev") for i in splits[s].ids}
    for k in range(40):
        first, second = sorted(f"{letter}{k:02d}" for letter in ("m", "az"[k % 2]))
        assert side[first] == side[second] == ("dev" if _is_dev(first, 0.15) else "train")
    assert len(side) == 80 and set(side.values()) == {"train", "dev"}


def test_without_copies_dev_is_what_it_was(tmp_path):
    "The hash of the id alone decides, also where sizes and ends of files are the same."
    images = {f"{k}.bmp": drawing(k, SMALL) for k in range(60)}
    assert len({image.size for image in images.values()}) == 1
    splits = open_data(yolo(tmp_path, images))
    expected = [i for i in sorted(map(str, range(60))) if _is_dev(i, 0.15)]
    assert sorted(splits["dev"].ids) == expected
    drawn = open_data("toy:60")
    assert drawn["dev"].ids == [i for i in range(60) if _is_dev(i, 0.15)]


# Splits.


def test_every_pair_of_splits_is_compared(tmp_path):
    for k in range(4):
        drawing(k).save(tmp_path / f"{k}.jpg")
    files = [tmp_path / f"{k}.jpg" for k in range(4)]
    members = {"train": [0, 1], "dev": [1, 2], "val": [2, 3], "test": [3, 0]}
    splits = {s: records_of([files[k] for k in m]) for s, m in members.items()}
    found = {leak["splits"]: leak["count"] for leak in leaks(splits, None)}
    # train and dev come from one source, which open_data divides
    assert found == {("train", "test"): 1, ("dev", "val"): 1, ("val", "test"): 1}


def test_a_leak_is_counted_whole_and_listed_in_part(tmp_path):
    train, val = tmp_path / "train", tmp_path / "val"
    for folder in (train, val):
        folder.mkdir()
    for k in range(25):
        drawing(k, SMALL).save(train / f"{k:02d}.png")
    for k in range(20):
        shutil.copy(train / f"{k:02d}.png", val / f"other {k:02d}.png")
    splits = {
        "train": records_of(sorted(train.iterdir())),
        "val": records_of(sorted(val.iterdir())),
    }
    (leak,) = leaks(splits, None)
    assert leak_line(leak) == "20 of 20 images of val are in train too"
    assert (len(leak["places"]), leak["same_file"]) == (10, 0)
    assert leak["places"][0] == (str(train / "00.png"), str(val / "other 00.png"))


def test_splits_in_memory():
    "Drawn sets: none in common; a part of one is found; dev is a part of train."
    splits = open_data("toy:40")
    assert leaks(splits, None) == [] and noted(splits["train"], None) == {}
    again = {"train": TOY.subset(range(10)), "val": TOY.subset([50, 3, 51])}
    (leak,) = leaks(again, None)
    assert (leak["count"], leak["places"], leak["same_file"]) == (1, [("image 3", "image 3")], 0)


def test_a_drawing_in_memory_and_its_file(tmp_path):
    Image.fromarray(TOY.pixels[0]).save(tmp_path / "a.png")
    (leak,) = leaks({"train": TOY, "val": records_of([tmp_path / "a.png"])}, None)
    assert leak["places"] == [("image 0", str(tmp_path / "a.png"))]


# Boxes.


def test_boxes_given_twice(tmp_path):
    rows = [
        (0, 0, 1, 1, 9, 9),
        (0, 1, 1, 1, 9, 9),  # another class
        (0, 0, 1, 1, 9, 9),
        (0, 0, 1, 1, 9, 9.001),  # another box
        (1, 0, 1, 1, 9, 9),  # another image
        (1, 1, 0.5, 0, 7, 7),
        (1, 1, 0.5, 0, 7, 7),
        (1, 1, 0.5, 0, 7, 7),
    ]
    files = [tmp_path / "a b.png", tmp_path / "c.png"]
    found = repeated_boxes(records_of(files, rows))
    assert found == [f"{files[0]}: car 1, 1, 9, 9"] + [f"{files[1]}: bus 0.5, 0, 7, 7"] * 2
    assert repeated_boxes(records_of(files)) == []


def test_boxes_given_twice_are_kept(tmp_path):
    "As pycocotools keeps them: figures would differ otherwise."
    (tmp_path / "annotations").mkdir()
    drawing(0).save(tmp_path / "a.png")
    box = dict(image_id=1, category_id=1, bbox=[5, 5, 20, 30], iscrowd=0, area=600)
    content = dict(images=[dict(id=1, file_name="a.png")], categories=[dict(id=1, name="car")])
    notes = [box | {"id": k} for k in (1, 2)] + [box | {"id": 3, "iscrowd": 1}]
    file = tmp_path / "annotations/train.json"
    file.write_text(json.dumps(content | {"annotations": notes}))
    records = read_coco(file)
    assert len(records.gt["label"]) == 3 and len(repeated_boxes(records)) == 2


def test_annotation_ids_given_twice(tmp_path):
    "Listed once each, of whatever type; annotations without id, or with none that is one, are not."
    drawing(0).save(tmp_path / "a.png")
    ids = [3, 3.0, "3", "x", "x", "x", None, None, [3], True, True, 4]
    box = dict(image_id=1, category_id=1, bbox=[5, 5, 20, 30])
    notes = [box | {"id": i, "bbox": [k, 5, 20, 30]} for k, i in enumerate(ids)] + [box, box]
    content = dict(images=[dict(id=1, file_name="a.png")], categories=[dict(id=1, name="car")])
    file = tmp_path / "train.json"
    file.write_text(json.dumps(content | {"annotations": notes}))
    records = read_coco(file)
    places = ["train.json: annotation 3", "train.json: annotation x"]
    assert records.problems == {"same annotation id twice": places}
    assert len(records.gt["label"]) == len(notes)


# What is kept between calls.


def some_files(folder, n=6):
    folder.mkdir()
    for k in range(n):
        drawing(k, LARGE if k % 2 else SMALL).save(folder / f"{k}.{'jpg' if k % 2 else 'png'}")
    return records_of(sorted(folder.iterdir()))


def tables(cache):
    return sorted((cache / "images").glob("*.msgpack"))


def snapshot(folder):
    return {p: p.stat().st_mtime_ns for p in [folder, *folder.rglob("*")]}


def test_files_are_decoded_once(tmp_path, settled):
    "By several calls of a process, and by several processes; the images' folder stays as it is."
    records, cache = some_files(tmp_path / "images"), tmp_path / "cache"
    before = snapshot(tmp_path / "images")
    first = fingerprints(records, cache)
    assert len(settled) == 3  # PNGs; the JPEGs are drafts
    settled.clear()
    assert (check_images(records, cache).ids, twins(records, cache)) == (records.ids, [])
    forget()
    assert fingerprints(records, cache) == first and settled == []
    assert snapshot(tmp_path / "images") == before


def test_copies_are_settled_once(tmp_path, settled):
    "Also images that had to be decoded whole."
    records, cache = some_files(tmp_path / "images"), tmp_path / "cache"
    read_image(records.files[1]).save(tmp_path / "images/z.png")
    records = records_of(sorted((tmp_path / "images").iterdir()))
    assert len(twins(records, cache)) == 1 and "1.jpg" in settled
    settled.clear()
    forget()
    assert len(twins(records, cache)) == 1 and settled == []


def test_what_changes_is_decoded_again(tmp_path, settled):
    records, cache = some_files(tmp_path / "images"), tmp_path / "cache"
    fingerprints(records, cache)
    changed = records.files[0]
    Image.new("RGB", SMALL).save(changed)
    os.utime(changed, ns=(1, 1))  # a copy with its old time
    settled.clear()
    assert fingerprints(records, cache)[0].constant and settled == ["0.png"]
    forget()
    settled.clear()
    assert fingerprints(records, cache)[0].constant and settled == []
    changed.unlink()
    assert fingerprints(records, cache)[0].error.startswith("FileNotFoundError")


def test_an_error_is_not_kept(tmp_path, settled, monkeypatch):
    "The file may be good, and memory short for a moment."
    records, cache = some_files(tmp_path / "images"), tmp_path / "cache"

    def fails(image):
        raise MemoryError

    with monkeypatch.context() as context:
        context.setattr(overlaps, "_decode", fails)
        errors = [f.error for f in fingerprints(records, cache)]
        assert errors == ["MemoryError: ", ""] * 3
    assert [f.error for f in fingerprints(records, cache)] == [""] * 6
    assert len(settled) == 3


def test_files_just_written_are_not_kept(tmp_path, settled, monkeypatch):
    "Their times may be too coarse to show the next change."
    monkeypatch.setattr(overlaps, "_SETTLED", 10**18)
    records, cache = some_files(tmp_path / "images"), tmp_path / "cache"
    for _ in range(2):
        settled.clear()
        fingerprints(records, cache)
        assert len(settled) == 3 and not cache.exists()


DAMAGE = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "one bit": lambda data: data[:100] + bytes([data[100] ^ 1]) + data[101:],
    "something else": lambda data: b"\x00" * 1000,
    "other code": lambda data: bytes(16) + data[16:],
    "longer": lambda data: data + b"\x00",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_table_is_made_again(tmp_path, settled, damage):
    records, cache = some_files(tmp_path / "images"), tmp_path / "cache"
    first = fingerprints(records, cache)
    (table,) = tables(cache)
    table.write_bytes(DAMAGE[damage](table.read_bytes()))
    for n in (3, 0):
        settled.clear()
        forget()
        assert fingerprints(records, cache) == first and len(settled) == n


def test_a_table_of_other_things_is_made_again(tmp_path, settled):
    "Right checksum, wrong content."
    records, cache = some_files(tmp_path / "images"), tmp_path / "cache"
    first = fingerprints(records, cache)
    (table,) = tables(cache)
    body = msgspec.msgpack.encode({"a": 1})
    table.write_bytes(overlaps._checksum(overlaps._look_at, body) + body)
    forget()
    assert fingerprints(records, cache) == first


def block_with_a_file(cache):
    cache.write_text("not a folder")


def block_below(cache):
    cache.mkdir()
    (cache / "images").write_text("not a folder")


def block_table(cache):
    "Folders where the files should be."
    (cache / "images/.lock").mkdir(parents=True)


def block_with_a_link(cache):
    cache.symlink_to(cache / "loop")


@pytest.mark.parametrize("block", [block_with_a_file, block_below, block_table, block_with_a_link])
def test_without_a_place_all_goes_on(tmp_path, settled, block):
    records, cache = some_files(tmp_path / "images"), tmp_path / "cache"
    block(cache)
    assert [f.error for f in fingerprints(records, cache)] == [""] * 6
    settled.clear()
    assert twins(records, cache) == [] and settled == []  # this process knows


def test_a_full_disk(tmp_path, settled, monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(overlaps, "write_atomic", full)
    records = some_files(tmp_path / "images")
    assert [f.error for f in fingerprints(records, tmp_path / "cache")] == [""] * 6
    assert tables(tmp_path / "cache") == []


def test_tables_are_bounded(tmp_path, settled, monkeypatch):
    "In number and in bytes; the least recently used go first."
    cache = tmp_path / "cache"
    several = [some_files(tmp_path / f"set{k}", 2) for k in range(6)]
    monkeypatch.setattr(overlaps, "_TABLES", 3)
    for k, records in enumerate(several):
        forget()
        fingerprints(several[0], cache)  # used all the time
        for table in tables(cache):  # as if some time had passed
            os.utime(table, ns=(table.stat().st_mtime_ns - 10**9,) * 2)
        os.utime(tables(cache)[0]) if k == 0 else fingerprints(records, cache)
    assert len(tables(cache)) == 3
    monkeypatch.setattr(overlaps, "_TABLES_LIMIT", 10)
    forget()
    fingerprints(several[1], cache)
    assert sum(t.stat().st_size for t in tables(cache)) < 3000  # too large itself: not written


def test_files_that_are_gone_leave_the_table(tmp_path, settled):
    records, cache = some_files(tmp_path / "images"), tmp_path / "cache"
    fingerprints(records, cache)
    for file in records.files[:3]:
        file.unlink()
    drawing(9, SMALL).save(tmp_path / "images/new.png")
    fingerprints(records_of([tmp_path / "images/new.png", *records.files[3:5]]), cache)
    (table,) = tables(cache)
    kept = overlaps._read_table(table, overlaps._look_at, overlaps.Fingerprint)
    names = sorted(Path(os.fsdecode(path)).name for path in kept)
    assert names == ["3.jpg", "4.png", "5.jpg", "new.png"]


def test_names_that_are_no_text(tmp_path, settled):
    "A file name is bytes."
    name = os.fsdecode(b"\xff\xfe image.png")
    try:
        drawing(0, SMALL).save(tmp_path / "a.png")
        os.rename(tmp_path / "a.png", tmp_path / name)
    except OSError:
        pytest.skip("this file system wants text")
    records, cache = records_of([tmp_path / name]), tmp_path / "cache"
    first = fingerprints(records, cache)
    settled.clear()
    forget()
    assert fingerprints(records, cache) == first and settled == []


CHILD = """
import sys
from pathlib import Path
from mhdet.data import overlaps
overlaps._SETTLED = -(10**18)
for _ in range(20):
    overlaps._memory.clear()
    files = sorted(Path("images").iterdir())[int(sys.argv[1])::2]
    found = overlaps._remembered(overlaps._look_at, overlaps.Fingerprint, files, "cache")
    assert not any(f.error for f in found)
    if _ % 5 == 0:
        for table in Path("cache/images").glob("*.msgpack"):
            table.unlink(missing_ok=True)
"""


def test_processes_share_a_table(tmp_path):
    "Two write and remove it all the time; neither fails, and what is left is whole."
    records = some_files(tmp_path / "images", 8)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", CHILD]
    both = [subprocess.Popen([*words, str(k)], cwd=tmp_path, env=env) for k in range(2)]
    assert [child.wait(120) for child in both] == [0, 0]
    (table,) = tables(tmp_path / "cache")
    kept = overlaps._read_table(table, overlaps._look_at, overlaps.Fingerprint)
    assert set(kept) <= {os.fsencode(f) for f in records.files} and kept
    assert list((tmp_path / "cache/images").glob("*.part")) == []


# The command.


def test_the_command_shows_what_is_there_twice(tmp_path):
    names = {f"t{k}.jpg": drawing(k) for k in range(8)}
    yolo(tmp_path, names | {"black.png": Image.new("RGB", SMALL)})
    images = tmp_path / "images/train"
    yolo(tmp_path, {"again.jpg": images / "t3.jpg"})
    val = {"v0.jpg": drawing(20), "v1.png": read_image(images / "t5.jpg")}
    yolo(tmp_path, val | {"street.jpg": images / "t0.jpg"}, "val")
    (tmp_path / "labels/val/v0.txt").write_text("0 .5 .5 .25 .5\n0 0.50 .5 .25 .500\n0 .4 .4 .1 .1")
    code, text, err = run_line("data data.yaml", tmp_path)
    assert (code, err) == (0, "")
    lines = text.partition("\n\n")[2].partition("\n\n")[2].splitlines()
    assert [line for line in lines if line] == [
        "2 of 3 images of val are in train too",
        "  images/train/t0.jpg = images/val/street.jpg",
        "  images/train/t5.jpg = images/val/v1.png",
        "train: pixels all one value: 1",
        "  images/train/black.png",
        "train: same image twice: 1",
        "  images/train/t3.jpg = images/train/again.jpg",
        "val: same box twice: 1",
        "  images/val/v0.jpg: car 112.875, 80.5, 188.125, 241.5",
    ]
    facts = json.loads(run_line("data data.yaml --json", tmp_path)[1])
    (leak,) = facts["leaks"]
    assert (leak["splits"], leak["count"], leak["images"]) == (["train", "val"], 2, 3)
    assert facts["splits"]["val"]["problems"] == {"same box twice": 1}
    assert facts["splits"]["val"]["boxes"] == 5  # counted and kept


def coco_layout(root, files):
    (root / "annotations").mkdir()
    for split in ("train", "val"):
        listed = [dict(id=k, file_name=f.name) for k, f in enumerate(files)]
        box = [dict(image_id=0, category_id=1, bbox=[1, 1, 9, 9])]
        content = dict(images=listed, annotations=box, categories=[dict(id=1, name="car")])
        (root / f"annotations/{split}.json").write_text(json.dumps(content))


def voc_layout(root, files):
    for folder in ("Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    (root / "images").rename(root / "JPEGImages")
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
    for file in files:
        content = f"<annotation><object><name>car</name>{box}</object></annotation>"
        (root / f"Annotations/{file.stem}.xml").write_text(content)
    for split in ("trainval", "test"):
        (root / f"ImageSets/Main/{split}.txt").write_text("\n".join(f.stem for f in files))


@pytest.mark.parametrize("layout", [coco_layout, voc_layout])
def test_one_list_for_two_splits(tmp_path, layout):
    (tmp_path / "images").mkdir()
    for k in range(4):
        drawing(k).save(tmp_path / f"images/{k}.jpg")
    layout(tmp_path, sorted((tmp_path / "images").iterdir()))
    text = run_line("data .", tmp_path)[1]
    assert "4 of 4 images of val are in train too (the same file: 4)" in text


def test_a_good_set_stays_good(tmp_path):
    yolo(tmp_path, {f"{k}.jpg": drawing(k) for k in range(4)})
    yolo(tmp_path, {f"{k}.jpg": drawing(k + 10) for k in range(4)}, "val")  # the same names
    code, text, _ = run_line("data data.yaml", tmp_path)
    assert code == 0 and "nothing wrong" in text
    assert json.loads(run_line("data data.yaml --json", tmp_path)[1])["leaks"] == []
