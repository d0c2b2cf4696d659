"""Odd data sets, one test per situation: what the numbers and the pixels mean.

Most situations are those of public bug reports about other tools; every file is drawn here. The
page docs/odd_data.md is made from what stands above the tests (`python docs/build.py odd`).
"""

import re
import struct
import xml.etree.ElementTree as ET
import zlib
from dataclasses import replace

import numpy as np
import pytest
from odd import (
    SIZE,
    check_same,
    drawn,
    image_file,
    label_file,
    read,
    situation,
    told,
    write_coco,
    write_voc,
    write_yolo,
    yolo_lines,
)
from PIL import Image

from mhdet.data.images import read_image


@pytest.fixture
def images(tmp_path):
    "Six drawn images for train, three for val, two boxes each."
    return drawn(tmp_path / "drawn")


@pytest.fixture
def many(tmp_path):
    "Forty images for train, so that one of them may be lost."
    return drawn(tmp_path / "drawn", train=40, val=3)


# Numbers of YOLO.


def relabel(yml, images, change):
    "Write each label file again, its lines changed by `change(image, list of numbers)`."
    for m in images:
        lines = [" ".join(map(str, change(m, line.split()))) for line in yolo_lines(m)]
        label_file(yml.parent, m).write_text("".join(f"{line}\n" for line in lines))


def count_of(counts, words):
    "How many places the kinds with these words have."
    return sum(n for kind, n in counts.items() if words in kind)


@situation(
    "numbers",
    "YOLO pose: keypoints behind the box, `kpt_shape` in the YAML",
    "the box is read, the keypoints are not",
)
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("n", [1, 4, 17])
def test_keypoints(images, tmp_path, dims, n):
    yml = write_yolo(tmp_path / "set", images, kpt_shape=[n, dims])
    relabel(yml, images, lambda m, v: v + [".4", ".9", "2"][:dims] * n)
    splits = read(yml)
    check_same(splits, images)
    assert told(splits) == {}


@situation(
    "numbers",
    "YOLO pose without `kpt_shape`",
    "no box is made of keypoints: the lines are counted",
)
@pytest.mark.parametrize("n", [1, 2, 4, 5, 17])
@pytest.mark.parametrize("more", [[], ["0"], ["1"], ["2"]])
def test_keypoints_that_are_not_declared(images, tmp_path, n, more):
    yml, rng = write_yolo(tmp_path / "set", images), np.random.default_rng(0)

    def change(m, v):
        cx, cy, w, h = map(float, v[1:])
        points = []
        for x, y in rng.uniform(-0.5, 0.5, (n, 2)):
            points += [f"{cx + x * w:.6f}", f"{cy + y * h:.6f}", *more]
        if m is images[0]:  # one keypoint may lie outside its box
            points[0] = f"{cx + 0.6 * w:.6f}"
        return v + points

    relabel(yml, images, change)
    splits = read(yml)
    assert sum(len(r.gt["label"]) for r in splits.values()) == 0
    assert sum(told(splits).values()) == 18


@situation(
    "numbers",
    "YOLO: a sixth number (the confidence), a seventh (the track) of a prediction",
    "no outline is made of them: the lines are counted, with the likely cause",
)
@pytest.mark.parametrize("more", [[".87"], [".87", "3"], ["1", "12"], [".87", "1"]])
def test_confidence_and_track(images, tmp_path, more):
    yml = write_yolo(tmp_path / "set", images)
    relabel(yml, images, lambda m, v: v + more)
    splits = read(yml)
    assert sum(len(r.gt["label"]) for r in splits.values()) == 0
    assert sum(told(splits).values()) == 18
    assert all("looks like" in kind for kind in told(splits))


def outline(box, points=4):
    "Points on the border of a box cx, cy, w, h: its corners, and others between."
    cx, cy, w, h = map(float, box)
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) / 2 * [w, h] + [cx, cy]
    more = np.linspace(corners[3], corners[0], points - 2)[1:-1]
    return [f"{v:.6f}" for v in np.concatenate([corners, more]).clip(0, 1).ravel()][: 2 * points]


@situation(
    "numbers",
    "YOLO: outlines (segments, turned boxes of 4 points) and boxes in one file",
    "an outline becomes the box around it",
)
@pytest.mark.parametrize("points", [4, 5, 12])
def test_outlines(images, tmp_path, points):
    yml = write_yolo(tmp_path / "set", images)

    def change(m, v):
        return v if v == yolo_lines(m)[0].split() else [v[0], *outline(v[1:], points)]

    relabel(yml, images, change)
    splits = read(yml)
    check_same(splits, images)
    assert told(splits) == {}


@situation(
    "numbers",
    "YOLO: outlines of objects that are small in their images (turned boxes of aerial images)",
    "an outline becomes the box around it, wherever the objects are; none is taken for keypoints",
)
@pytest.mark.parametrize("points", [3, 4, 5, 7, 8, 16])
@pytest.mark.parametrize("end", [0.9, 0.5])  # all over the image, or above and left
def test_small_outlines(images, tmp_path, points, end):
    yml, rng = write_yolo(tmp_path / "set", images), np.random.default_rng(points)
    due = []

    def change(m, v):
        angle = rng.uniform(0, 6.3) + np.linspace(0, 6.3, points, endpoint=False)
        radius = 0.02 + 0.01 * rng.random((points, 1))
        xy = rng.uniform(0.2, end, 2) + radius * np.c_[np.cos(angle), np.sin(angle)]
        due.append(np.r_[xy.min(0), xy.max(0)] * np.tile(m.size, 2))
        return [v[0], *(f"{u:.9f}" for u in xy.ravel())]

    relabel(yml, images, change)
    splits = read(yml)
    assert told(splits) == {}
    boxes = np.concatenate([r.gt["box"] for r in splits.values()])
    assert np.allclose(sorted(boxes.tolist()), sorted(map(list, due)), atol=1e-4)


@situation(
    "numbers",
    "YOLOv7 segments: the outline follows the box in one line",
    "the box is read",
)
def test_box_and_outline(images, tmp_path):
    yml = write_yolo(tmp_path / "set", images)
    relabel(yml, images, lambda m, v: v + outline(v[1:], 6))
    splits = read(yml)
    check_same(splits, images)
    assert told(splits) == {}


@situation(
    "numbers",
    "YOLO: pixels instead of shares, in all or some of the numbers",
    "skipped and counted, with the likely cause",
)
@pytest.mark.parametrize("columns", [(1, 2, 3, 4), (3, 4), (1, 2)])
def test_pixels_instead_of_shares(images, tmp_path, columns):
    yml = write_yolo(tmp_path / "set", images)

    def change(m, v):
        scale = [1, *m.size, *m.size]
        return [float(x) * (scale[k] if k in columns else 1) for k, x in enumerate(v)]

    relabel(yml, images, change)
    splits = read(yml)
    assert sum(len(r.gt["label"]) for r in splits.values()) == 0
    counts = told(splits)
    assert count_of(counts, "pixel") == sum(counts.values()) == 18


@situation(
    "numbers",
    "YOLO: lines of corners (x1 y1 x2 y2 in shares) instead of middle, width, height",
    "skipped and counted, with the likely cause (looks like x1, y1, x2, y2: 12 of 12)",
)
def test_corners_in_shares(images, tmp_path):
    yml = write_yolo(tmp_path / "set", images)

    def change(m, v):
        cx, cy, w, h = map(float, v[1:])
        return [v[0], cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]

    relabel(yml, images, change)
    splits = read(yml)
    assert told(splits) == {
        "box in another form (looks like x1, y1, x2, y2: 12 of 12)": 12,
        "box in another form (looks like x1, y1, x2, y2: 6 of 6)": 6,
    }


@situation(
    "numbers",
    "YOLO: a box that ends at 1.0000005 by rounding",
    "read, and not counted",
)
def test_rounded_numbers(images, tmp_path):
    edge = [replace(m, boxes=[(0, 1, 2, SIZE[0] - 1, SIZE[1] - 2)]) for m in images]
    yml = write_yolo(tmp_path / "set", edge)
    relabel(yml, edge, lambda m, v: [v[0], *(float(x) + 5e-7 for x in v[1:])])
    splits = read(yml)
    check_same(splits, edge)
    assert told(splits) == {}


@situation(
    "numbers",
    "YOLO: a class as `1.0` or `1.000e+00` (numpy.savetxt), numbers apart by tabs",
    "read",
)
def test_spellings_of_numbers(images, tmp_path):
    yml = write_yolo(tmp_path / "set", images)
    for m in images:
        rows = [list(map(float, line.split())) for line in yolo_lines(m)]
        np.savetxt(label_file(yml.parent, m), rows, delimiter="\t")
    splits = read(yml)
    check_same(splits, images)
    assert told(splits) == {}


@situation(
    "numbers",
    "YOLO: commas between the numbers, names instead of class numbers",
    "skipped and counted",
)
@pytest.mark.parametrize("change", [lambda v: [", ".join(v)], lambda v: [f"c{v[0]}", *v[1:]]])
def test_no_numbers(images, tmp_path, change):
    yml = write_yolo(tmp_path / "set", images)
    relabel(yml, images[:3], lambda m, v: change(v))
    splits = read(yml)
    assert sum(told(splits).values()) == 6


@situation(
    "numbers",
    "YOLO: classes that begin at 1, so that the last is past the names",
    "skipped and counted: unknown category (looks like 1..2, expected 0..1)",
)
def test_classes_from_1(images, tmp_path):
    images = [replace(m, boxes=[(c, 5 + 30 * c, 9, 20, 30) for c in (0, 1)]) for m in images]
    yml = write_yolo(tmp_path / "set", images)
    relabel(yml, images, lambda m, v: [int(v[0]) + 1, *v[1:]])
    splits = read(yml)
    assert count_of(told(splits), "unknown category") == 9


@situation(
    "numbers",
    "Width or height 0 or below, NaN, infinity; x2 left of x1",
    "skipped and counted by kind",
)
@pytest.mark.parametrize("value", ["0", "-.2", "nan", "inf", "1e400"])
def test_widths(images, tmp_path, value):
    yml = write_yolo(tmp_path / "set", images)
    relabel(yml, images[:2], lambda m, v: [*v[:3], value, v[4]])
    splits = read(yml)
    check_same(splits, [replace(m, boxes=[]) for m in images[:2]] + images[2:])
    assert sum(told(splits).values()) == 4


# Numbers of COCO and VOC.


def coco_boxes(change):
    "A change of every bbox of a COCO file by `change(bbox, image)`."

    def of_content(split, content):
        images = {m["id"]: m for m in content["images"]}
        for a in content["annotations"]:
            a["bbox"] = change(a["bbox"], images[a["image_id"]])
            del a["area"]

    return of_content


@situation(
    "numbers",
    "COCO: boxes in shares of the image (0..1) instead of pixels",
    "skipped and counted, with the likely cause",
)
def test_shares_instead_of_pixels(images, tmp_path):
    def shares(box, m):
        w, h = m["width"], m["height"]
        return [box[0] / w, box[1] / h, box[2] / w, box[3] / h]

    splits = read(write_coco(tmp_path / "set", images, change=coco_boxes(shares)))
    assert sum(len(r.gt["label"]) for r in splits.values()) == 0
    counts = told(splits)
    assert count_of(counts, "shares of the image") == sum(counts.values()) == 18


@situation(
    "numbers",
    "COCO: x1, y1, x2, y2 instead of x, y, width, height",
    "skipped and counted, with the likely cause (looks like x1, y1, x2, y2: 12 of 12)",
)
def test_corners_instead_of_sizes(images, tmp_path):
    def corners(box, m):
        return [box[0], box[1], box[0] + box[2], box[1] + box[3]]

    splits = read(write_coco(tmp_path / "set", images, change=coco_boxes(corners)))
    assert count_of(told(splits), "x1, y1, x2, y2") > 0


@situation(
    "numbers",
    "A box that is partly outside its image",
    "kept as it is, and counted",
)
@pytest.mark.parametrize("write", [write_yolo, write_coco, write_voc])
def test_box_partly_outside(images, tmp_path, write):
    outside = [replace(m, boxes=[(1, 60, 40, 60, 30)]) for m in images[:2]] + images[2:]
    splits = read(write(tmp_path / "set", outside))
    check_same(splits, outside)
    assert told(splits) == {"box goes past its image": 2}


@situation(
    "numbers",
    "COCO: `bbox` is empty, all 0, text, or not there",
    "skipped and counted",
)
@pytest.mark.parametrize("bbox", [[], [0, 0, 0, 0], ["1", "2", "3", "4"], None, [1, 2, 3], {}])
def test_no_bbox(images, tmp_path, bbox):
    def change(split, content):
        note = content["annotations"][0]
        if bbox is None:
            del note["bbox"]
        else:
            note["bbox"] = bbox

    splits = read(write_coco(tmp_path / "set", images, change=change))
    counts = told(splits)
    assert sum(counts.values()) == 2
    assert sum(len(r.gt["label"]) for r in splits.values()) == 16


@situation(
    "numbers",
    "The stated size of an image is 0 or not there",
    "the file's own is used",
)
@pytest.mark.parametrize("value", [0, None])
@pytest.mark.parametrize("source", ["coco", "voc"])
def test_no_size(images, tmp_path, value, source):
    def change(split, content):
        for m in content["images"]:
            m |= dict(width=value, height=value)

    root = tmp_path / "set"
    if source == "coco":
        write_coco(root, images, change=change)
    else:
        write_voc(root, images)
        for file in (root / "Annotations").iterdir():
            tree = ET.parse(file)
            for side in ("width", "height"):
                tree.find(f"size/{side}").text = None if value is None else str(value)
            tree.write(file)
    splits = read(root)
    check_same(splits, images)
    assert told(splits) == {}


@situation(
    "numbers",
    "The stated width and height are swapped, or wrong",
    "the file's own size decides which boxes are inside; the image is listed",
)
@pytest.mark.parametrize("size", [(72, 96), (960, 720), (10, 10)])
@pytest.mark.parametrize("source", ["coco", "voc"])
def test_wrong_size(images, tmp_path, size, source):
    wrong = [replace(m, size=size) for m in images]
    splits = read(dict(coco=write_coco, voc=write_voc)[source](tmp_path / "set", wrong))
    check_same(splits, images)
    assert told(splits) == {"size is not the annotation's": 9}
    assert all((r.sizes == SIZE).all() for r in splits.values())


@situation(
    "numbers",
    "An image that its EXIF tag turns, annotated as it is seen, the size stated as it is stored",
    "turned upright, its boxes stay; the image is listed",
)
def test_turned_images(tmp_path):
    images = drawn(tmp_path / "drawn", size=(72, 96))
    root = tmp_path / "set"
    write_coco(root, [replace(m, size=(96, 72)) for m in images])
    exif = Image.Exif()
    exif[0x0112] = 6
    for m in images:
        file = image_file(root, m)
        with Image.open(m.file) as image:
            stored = image.transpose(Image.Transpose.ROTATE_90)
        file.unlink()
        stored.save(file, quality=95, exif=exif)
    splits = read(root)
    assert told(splits) == {"size is not the annotation's": 9}
    assert all((r.sizes == (72, 96)).all() for r in splits.values())
    first = splits["train"].image(0)
    with Image.open(images[0].file) as image:
        upright = np.asarray(image).astype(int)
    assert np.abs(first.astype(int) - upright).mean() < 4


@situation(
    "numbers",
    "VOC: corners with decimals, in another order of the tags, with blanks around",
    "read",
)
def test_corners_of_voc(images, tmp_path):
    root = write_voc(tmp_path / "set", images)
    for file in (root / "Annotations").iterdir():
        tree = ET.parse(file)
        for box in tree.iter("bndbox"):
            box[:] = list(box)[::-1]
            for side in box:
                side.text = f"\n {float(side.text):.2f} \n"
        tree.write(file)
    splits = read(root)
    check_same(splits, images)
    assert told(splits) == {}


@situation(
    "numbers",
    "VOC: xmin and xmax exchanged",
    "skipped and counted",
)
def test_exchanged_corners(images, tmp_path):
    root = write_voc(tmp_path / "set", images)
    file = root / f"Annotations/{images[0].stem}.xml"
    text = file.read_text().replace("xmin", "*").replace("xmax", "xmin").replace("*", "xmax")
    file.write_text(text)
    splits = read(root)
    check_same(splits, [replace(images[0], boxes=[]), *images[1:]])
    assert told(splits) == {"box without area": 2}


@situation(
    "numbers",
    "VOC: corners that are counted from 0 (xmin is 0)",
    "counted: VOC counts from 1",
)
def test_corners_from_0(images, tmp_path):
    zero = [replace(m, boxes=[(0, -1, -1, 30, 30)]) for m in images]  # written as 0, 0
    splits = read(write_voc(tmp_path / "set", zero))
    assert sum(told(splits).values()) == 9
    assert sum(len(r.gt["label"]) for r in splits.values()) == 9


@situation(
    "partners",
    "VOC: a list has `000.jpg` or `JPEGImages/000.jpg` instead of `000`",
    "the XML of that name is read",
)
@pytest.mark.parametrize("line", ["{}.jpg", "JPEGImages/{}.jpg", "C:\\d\\{}.JPG", "{}.jpg 1"])
def test_voc_list_of_files(images, tmp_path, line):
    root = write_voc(tmp_path / "set", images)
    for file in (root / "ImageSets/Main").glob("*.txt"):
        file.write_text("".join(line.format(s) + "\n" for s in file.read_text().split()))
    splits = read(root)
    check_same(splits, images)
    assert told(splits) == {}


@situation(
    "numbers",
    "VOC: blanks around a class name; an object without a name",
    "the same class; skipped and counted",
)
def test_voc_names(images, tmp_path):
    root = write_voc(tmp_path / "set", images)
    files = sorted((root / "Annotations").glob("*.xml"))
    for file in files[1:]:
        file.write_text(re.sub(r"<name>(\w+)</name>", r"<name> \1\n</name>", file.read_text()))
    nameless = re.sub(r"<name>\w+</name>", "<name></name>", files[0].read_text())
    files[0].write_text(nameless)
    splits = read(root)
    assert {tuple(r.names) for r in splits.values()} == {("c0", "c1")}
    assert told(splits) == {"unknown category": 2}


# Image files.


def grey(image):
    with Image.open(image.file) as opened:
        return np.asarray(opened.convert("L"))


DEPTHS = {
    "floats of 0..1": lambda a: Image.fromarray(a.astype(np.float32) / 255),
    "floats of 0..255": lambda a: Image.fromarray(a.astype(np.float32)),
    "32-bit whole numbers of 0..255": lambda a: Image.fromarray(a.astype(np.int32)),
    "16 bits": lambda a: Image.fromarray(a.astype(np.uint16) * 257),
    "12 bits in 16": lambda a: Image.fromarray(a.astype(np.uint16) * 16),
    "8 bits in 16": lambda a: Image.fromarray(a.astype(np.uint16)),
    "a palette": lambda a: Image.fromarray(a).convert("P"),
    "grey with transparency": lambda a: Image.fromarray(a).convert("LA"),
}


@situation(
    "pixels",
    "TIFF or PNG of floats (0..1, 0..255), 32-bit or 16-bit numbers, 12 bits in 16, a palette, "
    "transparency",
    "scaled to 8 bits by what the values say, and counted; never black",
)
@pytest.mark.parametrize("depth", DEPTHS)
def test_depths(images, tmp_path, depth):
    yml = write_yolo(tmp_path / "set", images)
    suffix = ".tif" if depth != "12 bits in 16" else ".png"
    for m in images:
        image_file(yml.parent, m).unlink()
        DEPTHS[depth](grey(m)).save(image_file(yml.parent, m, suffix))
    splits = read(yml)
    assert [len(r) for r in splits.values()] == [6, 3]
    for m, file in zip(images, splits["train"].files, strict=False):
        seen = np.asarray(read_image(file)).astype(int)
        assert np.abs(seen - grey(m)[..., None]).max() <= 2
    assert set(told(splits)) <= {"pixels scaled to 8 bits"}


def png_of_16_bits(values):
    "The file of an image of 16 bits a colour (H, W, 3 or 4), which Pillow does not write."
    height, width, colours = values.shape
    form = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[colours], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    out = b"\x89PNG\r\n\x1a\n"
    for name, content in ((b"IHDR", form), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        check = struct.pack(">I", zlib.crc32(name + content))
        out += struct.pack(">I", len(content)) + name + content + check
    return out


@situation(
    "pixels",
    "Colour PNG of 16 bits a colour, in which 8, 12 or all of them are used",
    "all are read and scaled; where fewer than 16 are used, it is counted",
)
@pytest.mark.parametrize("bits", [8, 10, 12, 16])
@pytest.mark.parametrize("opaque", [False, True])
def test_deep_colours(images, tmp_path, bits, opaque):
    yml = write_yolo(tmp_path / "set", images)
    values = np.random.default_rng(bits).integers(0, 2**bits, (*SIZE[::-1], 3))
    alpha = np.full((*SIZE[::-1], 1), 65535)
    stored = np.concatenate([values, alpha], 2) if opaque else values
    image_file(yml.parent, images[0]).unlink()
    file = image_file(yml.parent, images[0], ".png")
    file.write_bytes(png_of_16_bits(stored))
    assert (np.asarray(read_image(file)) == values >> (bits - 8)).all()
    assert told(read(yml)) == ({"pixels scaled to 8 bits": 1} if bits < 16 else {})


@situation(
    "pixels",
    "An image whose pixels are all of one value (black, white, grey)",
    "counted, and kept",
)
@pytest.mark.parametrize("colour", ["black", "white", "grey"])
def test_images_of_one_value(images, tmp_path, colour):
    yml = write_yolo(tmp_path / "set", images)
    for m in images[:2]:
        file = image_file(yml.parent, m)
        file.unlink()
        Image.new("RGB", SIZE, colour).save(file)
    splits = read(yml)
    assert [len(r) for r in splits.values()] == [6, 3]
    assert told(splits) == {"pixels all one value": 2}


@situation(
    "pixels",
    "A file whose suffix is not that of its content (a PNG called `.jpg`)",
    "read as what it is",
)
def test_wrong_suffix(images, tmp_path):
    yml = write_yolo(tmp_path / "set", images)
    for m, kind in zip(images, ("PNG", "GIF", "BMP", "WEBP", "TIFF", "JPEG2000"), strict=False):
        file = image_file(yml.parent, m)
        with Image.open(m.file) as image:
            image.load()
        file.unlink()
        image.save(file, kind)
    splits = read(yml)
    assert [len(r) for r in splits.values()] == [6, 3]
    assert told(splits) == {}


@situation(
    "pixels",
    "An image file that is empty, cut off, or a saved web page",
    "left out and counted with the reason; above 5 % refused, and the first is named",
)
@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html><p>404", "cut", b"\xff\xd8\xff\xe0"])
def test_unreadable_images(many, tmp_path, content):
    yml = write_yolo(tmp_path / "set", many)
    file = image_file(yml.parent, many[0])
    whole = file.read_bytes()
    file.unlink()
    file.write_bytes(whole[: len(whole) // 2] if content == "cut" else content)
    splits = read(yml)
    check_same(splits, many[1:])
    assert told(splits)["unreadable image"] == 1
    assert file.name in str(splits["train"].problems["unreadable image"])


@situation(
    "pixels",
    "An image above Pillow's limit of 179 million pixels",
    "left out and counted; the reason names the limit",
)
def test_a_huge_image(many, tmp_path):
    yml = write_yolo(tmp_path / "set", many)
    file = image_file(yml.parent, many[0])
    file.unlink()
    Image.new("1", (14000, 13000)).save(file.with_suffix(".png"))
    splits = read(yml)
    assert told(splits)["unreadable image"] == 1
    assert "178,956,970 pixels" in splits["train"].problems["unreadable image"][0]


@situation(
    "pixels",
    "Images of 1 x 1, 1 x 300 and 300 x 2 px",
    "read",
)
@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 2)])
def test_small_images(tmp_path, size):
    rng = np.random.default_rng(0)
    images = []
    for m in drawn(tmp_path / "drawn"):
        file = m.file.with_suffix(".png")
        Image.fromarray(rng.integers(0, 255, (*size[::-1], 3), np.uint8)).save(file)
        images.append(replace(m, file=file, size=size, boxes=[(0, 0, 0, *size)]))
    splits = read(write_yolo(tmp_path / "set", images, "images/{split}/{stem}.png"))
    check_same(splits, images)


@situation(
    "pixels",
    "Files with several frames (GIF, TIFF, MPO)",
    "the first frame is read",
)
@pytest.mark.parametrize("suffix", [".gif", ".tif"])
def test_several_frames(images, tmp_path, suffix):
    yml = write_yolo(tmp_path / "set", images)
    for m in images:
        image_file(yml.parent, m).unlink()
        first, second = Image.fromarray(grey(m)), Image.new("L", SIZE)
        file = image_file(yml.parent, m, suffix)
        first.save(file, save_all=True, append_images=[second])
    splits = read(yml)
    assert [len(r) for r in splits.values()] == [6, 3]
    for m, file in zip(images, splits["train"].files, strict=False):
        assert np.abs(np.asarray(read_image(file)).astype(int) - grey(m)[..., None]).max() <= 8
