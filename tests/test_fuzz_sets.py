"""Data sets as other tools write them, drawn with several oddities at once.

Whatever is combined: no traceback, nothing of the user's is changed, and every image and every box
is either read right or named among the problems.
"""

import itertools
import json
import os
import shutil
import warnings
import xml.etree.ElementTree as ET
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import strategies as st
from odd import SIZE, Drawn, coco_content, drawn, put, voc_tree, yolo_lines
from PIL import Image
from test_fuzz import judged, many, one_of

from mhdet.core.config import load_config
from mhdet.data.images import read_image
from mhdet.data.overlaps import noted
from mhdet.data.splits import check_images, open_data

TIMES = 10 if os.environ.get("MHDET_ALL") == "1" else 1  # as many inputs
NAMES = ["c0", "c1"]
SIGNS = ["a b ", "10.5 m.", "images-", "labels ", "(1) ", "é", "50% #", "x.jpg.", "UPPER"]
FORMATS = {".png": "PNG", ".bmp": "BMP", ".tif": "TIFF", ".gif": "GIF", ".webp": "WEBP"}


@dataclass
class Entry:
    "An image of a data set: what is in it, and how it is written."

    image: Drawn
    path: str  # of the image below the root
    boxes: list  # what is to be read, or named: (class, x, y, w, h)
    name: str = ""  # by which problems may name it
    facts: dict = field(default_factory=dict)


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    "Images of two splits, each in several formats, and a folder for the data sets."
    root = tmp_path_factory.mktemp("pool")
    images = drawn(root / "drawn", train=24, val=3)
    for m in images:
        with Image.open(m.file) as image:
            for suffix, kind in FORMATS.items():
                image.save(m.file.with_suffix(suffix), kind)
    return root, images, itertools.count()


def named(splits, kind=""):
    "All places of problems, or of those whose kind begins so, as one text."
    kinds = [item for r in splits.values() for item in r.problems.items()]
    return " ".join(
        str(place) for name, places in kinds if name.startswith(kind) for place in places
    )


def judge(splits, entries):
    "Every image and box is read right, or named; nothing else is read."
    places, twice = named(splits), named(splits, "same box twice")
    past = named(splits, "box goes past its image")
    by_content = {e.image.content: e for e in entries}
    unread = dict(by_content)
    for split, records in splits.items():
        for i, file in enumerate(records.files):
            entry = unread.pop(Drawn("", "", Path(file)).content, None)
            assert entry is not None, f"{file}: not of the data set, or read twice"
            assert entry.image.split == split
            rows = slice(*np.searchsorted(records.gt["image"], [i, i + 1]))
            labels = [records.names[c] for c in records.gt["label"][rows]]
            excused = (str(file) in twice, entry.name in past)
            left = boxes_left(entry, labels, records.gt["box"][rows], *excused)
            for name in left:
                assert name in places, f"{name}: a box is neither read nor named: {entry}"
    for entry in unread.values():
        assert entry.name in places, f"{entry.path}: neither read nor named"


def boxes_left(entry, labels, boxes, twice, past):
    """What names the boxes that were not read.

    One that the image does not have is an error, unless it is there twice or goes past the image
    and that is told.
    """
    left = dict(enumerate(entry.boxes))
    for label, box in zip(labels, boxes, strict=True):
        equal = []
        for k, (c, x, y, w, h) in enumerate(entry.boxes):
            if NAMES[c] == label and np.abs(box - [x, y, x + w, y + h]).max() < 0.02:
                equal.append(k)
        fresh = [k for k in equal if k in left]
        assert fresh or (equal and twice) or past, f"{entry.path}: {label} {box} is not in it"
        if fresh:
            del left[fresh[0]]
    return [entry.facts.get("notes", {}).get(k, entry.name) for k in left]


def spoilt(draw, entry, root):
    "An image file that is gone, empty or cut."
    file = root / entry.path
    content = file.read_bytes()
    file.unlink()
    what = one_of(draw, ["gone", "empty", "cut", "page"])
    if what != "gone":
        parts = dict(empty=b"", cut=content[: len(content) // 2], page=b"<!DOCTYPE html>")
        file.write_bytes(parts[what])


def other_format(draw, entry):
    "The image with another suffix, of its own format or not."
    suffix = one_of(draw, [*FORMATS, ".JPG", ".jpeg", ".Jpg", ".jfif"])
    stem = entry.path.rsplit(".", 1)[0]
    file = entry.image.file.with_suffix(suffix)
    if file.exists() and suffix in FORMATS:
        entry.image = replace(entry.image, file=file)
    entry.path = stem + suffix


def with_sign(draw, entry):
    "The image under a name with blanks, dots or signs."
    folder, _, name = entry.path.rpartition("/")
    entry.path = f"{folder}/{one_of(draw, SIGNS)}{name}"


def run(base, make, n):
    "Draw n data sets with `make(draw, root, images)`, which returns what to open and its entries."
    root, images, number = base

    def example(draw):
        folder = root / str(next(number))
        opened, entries = make(draw, folder, images)

        def read():
            splits = {}
            for split, records in open_data(opened, dev=0).items():
                records = check_images(records, cache=None)
                kinds = records.problems | noted(records, cache=None)
                splits[split] = replace(records, problems=kinds)
            return splits

        splits = judged(read, folder)
        if splits is not None:
            judge(splits, entries)
        shutil.rmtree(folder)
        return splits

    many(n * TIMES, example, 0)


# YOLO.

YOLO_LAYOUTS = [
    ("images/{split}", "labels/{split}"),
    ("{split}/images", "{split}/labels"),
    ("images/{split}_images", "labels/{split}_images"),
    ("images of mine/{split}", "images of mine/{split}"),
    ("{split}", "{split}"),
    ("images/a/images/{split}", "images/a/labels/{split}"),
]


def yolo_line_change(draw, entry):
    "The lines of a label file written in another way, or wrongly."
    w, h = entry.image.size
    if not entry.facts["lines"]:
        return
    lines = [line.split() for line in entry.facts["lines"]]
    what = one_of(draw, list(LINE_CHANGES))
    if all(len(v) == 5 for v in lines):  # not changed already
        entry.facts["lines"] = [" ".join(map(str, LINE_CHANGES[what](v, w, h))) for v in lines]


LINE_CHANGES = {
    "confidence": lambda v, w, h: [*v, "0.9"],
    "track": lambda v, w, h: [*v, "0.9", "3"],
    "pixels": lambda v, w, h: [
        v[0],
        *(float(x) * s for x, s in zip(v[1:], (w, h) * 2, strict=True)),
    ],
    "wide pixels": lambda v, w, h: [*v[:3], float(v[3]) * w, float(v[4]) * h],
    "decimals": lambda v, w, h: [f"{float(x):.18e}" for x in v],
    "nan": lambda v, w, h: [*v[:4], "nan"],
    "negative": lambda v, w, h: [*v[:3], "-" + v[3], v[4]],
    "class": lambda v, w, h: ["7", *v[1:]],
    "half a class": lambda v, w, h: [v[0] + ".5", *v[1:]],
    "name": lambda v, w, h: ["c" + v[0], *v[1:]],
    "commas": lambda v, w, h: [", ".join(v)],
    "tabs": lambda v, w, h: ["\t".join(v), "\t"],
    "short": lambda v, w, h: v[:4],
    "outline": lambda v, w, h: [v[0], *corners(*map(float, v[1:]))],
    "keypoints": lambda v, w, h: [*v, *["0.1", "0.2", "2", "0.3", "0.4", "1"]],
}


def corners(cx, cy, w, h):
    x0, y0, x1, y1 = cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def yolo_entries(draw, images):
    folder, labels = one_of(draw, YOLO_LAYOUTS)
    entries = []
    for m in images:
        path = folder.format(split=m.split) + f"/{m.stem}.jpg"
        facts = dict(labels=labels.format(split=m.split), lines=yolo_lines(m))
        entries.append(Entry(m, path, list(m.boxes), facts=facts))
    return entries


def yolo_odd(draw, root, entries, spec):
    "One oddity, before anything is written; what is to be done afterwards is returned."
    entry = one_of(draw, entries)
    what = one_of(draw, YOLO_ODDITIES)
    if what == "format":
        other_format(draw, entry)
    elif what == "sign":
        with_sign(draw, entry)
    elif what == "lines":
        yolo_line_change(draw, entry)
    elif what == "all lines":
        for e in entries:
            e.facts["lines"] = e.facts["lines"] and [
                f"{line} .1 .2 2 .3 .4 1" for line in e.facts["lines"]
            ]
        spec["kpt_shape"] = [2, 3]
    elif what == "twice":
        lines = entry.facts["lines"]
        entry.facts["lines"] = lines and lines + lines[:1]
    elif what == "no label":
        entry.facts["lines"] = None
    elif what == "empty label":
        entry.facts["lines"], entry.boxes = [], []
    elif what == "beside":
        entry.facts["labels"] = entry.path.rpartition("/")[0]
    elif what == "label suffix":
        entry.facts["suffix"] = one_of(draw, [".TXT", ".Txt"])
    elif what == "ends":
        entry.facts["end"] = one_of(draw, ["\r\n", "\n\n", "  \n", "\r", " \t\r\n"])
    elif what == "mark":
        entry.facts["mark"] = "\ufeff"
    elif what == "deeper":
        for key in ("path", "labels"):
            deeper(entry, key)
    else:
        entry.facts["after"] = what


def deeper(entry, key):
    "One more folder, for the image and its label file alike."
    if key == "path":
        folder, _, name = entry.path.rpartition("/")
        entry.path = f"{folder}/more/{name}"
    else:
        entry.facts["labels"] += "/more"


YOLO_ODDITIES = [
    *("format", "sign", "lines", "lines", "lines", "all lines", "twice", "no label"),
    *("empty label", "beside", "label suffix", "ends", "mark", "deeper", "spoilt", "dot", "link"),
    *("checkpoint", "more labels", "other file"),
]


def after(draw, root, entry):
    "Oddities of a data set that is written."
    file, what = root / entry.path, entry.facts.get("after")
    if what == "spoilt":
        spoilt(draw, entry, root)
    elif what == "dot":
        put(entry.image.file, file.with_name("._" + file.name))
    elif what == "link":
        real = root / f"real-{file.name}"
        file.rename(real)
        file.symlink_to(real)
    elif what == "checkpoint":
        put(entry.image.file, file.parent / f".ipynb_checkpoints/{file.stem}-checkpoint.jpg")
    elif what == "more labels":
        (root / entry.facts["labels"] / "nobody's.txt").write_text("0 .5 .5 .1 .1\n")
    elif what == "other file":
        (file.parent / "Thumbs.db").write_bytes(b"\0")


def write_yolo_entries(draw, root, entries, spec):
    for e in entries:
        put(e.image.file, root / e.path)
        stem = e.path.rpartition("/")[2].rsplit(".", 1)[0]
        e.name = stem
        label = root / e.facts["labels"] / (stem + e.facts.get("suffix", ".txt"))
        label.parent.mkdir(parents=True, exist_ok=True)
        if e.facts["lines"] is not None:
            end = e.facts.get("end", "\n")
            text = e.facts.get("mark", "") + "".join(line + end for line in e.facts["lines"])
            label.write_bytes(text.encode())
    for e in entries:
        after(draw, root, e)
    if one_of(draw, [True, False, False]):
        lists(draw, root, entries, spec)
    (root / "data.yaml").write_text(yaml.safe_dump(spec))


def lists(draw, root, entries, spec):
    "List files instead of folders."
    before = one_of(draw, ["", "", "./", "data/", "/content/set/"])
    end = one_of(draw, ["\n", "\r\n", "\n\n", " \n"])
    slash = one_of(draw, ["/", "/", "\\"])
    for split in ("train", "val"):
        paths = [before + e.path for e in entries if e.image.split == split]
        if one_of(draw, [True, False, False]):
            paths.append(one_of(draw, paths))
        text = "".join(path.replace("/", slash) + end for path in paths)
        (root / f"{split}.txt").write_text(text, newline="")
        spec[split] = f"{split}.txt"


def make_yolo(draw, root, images):
    entries = yolo_entries(draw, images)
    spec = dict(names=one_of(draw, [NAMES, dict(enumerate(NAMES))]))
    for split in ("train", "val"):
        folder = next(e.path for e in entries if e.image.split == split).rpartition("/")[0]
        spec[split] = one_of(draw, [folder, f"./{folder}", f"../{folder}", [folder]])
    for _ in range(draw(st.integers(1, 4))):
        yolo_odd(draw, root, entries, spec)
    root.mkdir()
    write_yolo_entries(draw, root, entries, spec)
    return root / "data.yaml", entries


def test_yolo_sets(pool):
    run(pool, make_yolo, 80)


# COCO.

COCO_LAYOUTS = [
    ("images/{split}", "annotations/instances_{split}.json", ""),
    ("{split}2017", "annotations/instances_{split}2017.json", ""),
    ("images", "annotations/instances_{split}.json", "images/"),
    ("images", "annotations/instances_{split}.json", "images\\"),
    ("images", "annotations/{split}.json", "../../upload/1/"),
    ("{split}", "{split}/_annotations.coco.json", ""),
    ("images/{split}", "annotations/{split}.json", "{split}/"),
]


def change_note(draw, note, content):
    "One annotation, wrong or written in another way."
    if not isinstance(note["bbox"], list) or len(note["bbox"]) < 4:
        return  # it was changed already
    x, y, w, h = map(float, note["bbox"])
    changes = [
        dict(bbox=[]),
        dict(bbox=None),
        dict(bbox=[0, 0, 0, 0]),
        dict(bbox=[x, y, -w, h]),
        dict(bbox=[str(v) for v in note["bbox"]]),
        dict(bbox=[x, y, float("nan"), h]),
        dict(bbox=[x + 1000, y, w, h]),
        dict(bbox=[x * 100, y * 100, w * 100, h * 100]),
        dict(category_id=99),
        dict(category_id=None),
        dict(image_id=9999),
        dict(image_id=float(note["image_id"])),
        dict(image_id=str(note["image_id"])),
        dict(area=-1),
        dict(iscrowd="yes"),
        dict(bbox=[x, y, w, h], segmentation=[[x, y, x + w, y, x + w, y + h]]),
    ]
    note.update(one_of(draw, changes))
    if one_of(draw, [True, False, False, False]):
        content["annotations"].append(dict(note, id=note["id"] + 5000))


def change_image(draw, entry, listed):
    "The entry of an image, wrong or written in another way."
    w, h = SIZE
    sizes = [dict(width=h, height=w), dict(width=0, height=0), dict(width=w * 9, height=h * 9)]
    sizes += [
        dict(width=float(w), height=h),
        dict(width=None, height=None),
        dict(width=9, height=9),
    ]
    what = one_of(draw, ["size", "size", "sign", "format", "spoilt", "link", "dot", "other file"])
    if what == "size":
        listed.update(one_of(draw, sizes))
    else:
        entry.facts["after"] = what


def make_coco(draw, root, images):
    layout, annotations, before = one_of(draw, COCO_LAYOUTS)
    first = one_of(draw, [0, 1, 700])
    odd_root = one_of(draw, [None, None, "things", "c0"])
    entries = []
    for split in ("train", "val"):
        of_split = [m for m in images if m.split == split]
        name = before.format(split=split) + "{stem}.jpg"
        content = coco_content(of_split, NAMES, first, name, odd_root)
        mine = []
        for m, listed in zip(of_split, content["images"], strict=True):
            path = f"{layout.format(split=split)}/{m.stem}.jpg"
            notes = [a for a in content["annotations"] if a["image_id"] == listed["id"]]
            for a in notes:
                a["id"] = 100_000 + a["id"]
            notes = {k: f"annotation {a['id']}" for k, a in enumerate(notes)}
            mine.append(Entry(m, path, list(m.boxes), m.stem, dict(notes=notes)))
        for _ in range(draw(st.integers(0, 2))):
            change_note(draw, one_of(draw, content["annotations"]), content)
        for _ in range(draw(st.integers(0, 1))):
            k = draw(st.integers(0, len(mine) - 1))
            change_image(draw, mine[k], content["images"][k])
        write_entries(draw, root, mine)
        file = root / annotations.format(split=split)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))
        entries += mine
    return root, entries


def write_entries(draw, root, entries):
    for e in entries:
        put(e.image.file, root / e.path)
    for e in entries:
        if e.facts.get("after") == "format":  # the annotation keeps the name it had
            old = e.path
            other_format(draw, e)
            (root / old).unlink()
            put(e.image.file, root / e.path)
        else:
            after(draw, root, e)


def test_coco_sets(pool):
    run(pool, make_coco, 80)


# VOC.


def change_xml(draw, tree, m):
    "An annotation, wrong or written in another way."
    what = one_of(
        draw, ["order", "blanks", "size", "filename", "exchanged", "text", "no box", "copy"]
    )
    objects = tree.findall("object")
    thing = one_of(draw, objects)
    box = thing.find("bndbox")
    if box is None or len(box) < 4:
        return  # it was changed already
    if what == "order":
        box[:] = [box[k] for k in (1, 0, 3, 2)]
    elif what == "blanks":
        for side in box:
            side.text = f"\n  {side.text}.00\t"
    elif what == "size":
        w, h = one_of(draw, [(72, 96), (0, 0), (960, 720), (9, 9)])
        tree.find("size/width").text, tree.find("size/height").text = str(w), str(h)
    elif what == "filename":
        names = [m.stem, f"{m.stem}.png", "train000.jpg", "", f"C:\\a\\{m.stem}.jpg", "other.jpg"]
        tree.find("filename").text = one_of(draw, names)
    elif what == "exchanged":
        box.find("xmin").text, box.find("xmax").text = box.findtext("xmax"), box.findtext("xmin")
    elif what == "text":
        one_of(draw, list(box)).text = one_of(draw, ["", "nan", "x", "1_0", "-5000", "9" * 30])
    elif what == "no box":
        thing.remove(box)
    else:
        tree.append(objects[0])


def make_voc(draw, root, images):
    entries, beside = [], one_of(draw, [False, False, True])
    folder = "{split}" if beside else "JPEGImages"
    for m in images:
        path = f"{folder.format(split=m.split)}/{m.stem}.jpg"
        entries.append(Entry(m, path, list(m.boxes), m.stem))
    trees = {m.stem: voc_tree(m, NAMES, f"{m.stem}.jpg") for m in images}
    for _ in range(draw(st.integers(0, 3))):
        m = one_of(draw, images)
        change_xml(draw, trees[m.stem], m)
    one_of(draw, entries).facts["after"] = one_of(
        draw, ["format", "spoilt", "link", "other file", "-"]
    )
    write_entries(draw, root, entries)
    for m in images:
        file = root / (f"{m.split}" if beside else "Annotations") / f"{m.stem}.xml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(ET.tostring(trees[m.stem]))
    if not beside:
        end = one_of(draw, ["\n", "\r\n", "\n\n", "  1\n", " \n"])
        for split in ("train", "val"):
            file = root / f"ImageSets/Main/{split}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            stems = [m.stem for m in images if m.split == split]
            if one_of(draw, [True, False, False]):
                stems.append(one_of(draw, stems))
            file.write_text("".join(s + end for s in stems), newline="")
    return root, entries


def test_voc_sets(pool):
    run(pool, make_voc, 70)


# Image files.


def stored(draw, values):
    "An image of 8-bit grey values as another tool would store it, and how far off it may be read."
    h, w = values.shape
    wide = np.uint16
    kinds = {
        "uint8": (lambda: Image.fromarray(values), 0),
        "float shares": (lambda: Image.fromarray(values.astype(np.float32) / 255), 1),
        "float": (lambda: Image.fromarray(values.astype(np.float32)), 1),
        "int32": (lambda: Image.fromarray(values.astype(np.int32)), 1),
        "16 bits": (lambda: Image.fromarray(values.astype(wide) * 257), 1),
        "12 bits": (lambda: Image.fromarray(values.astype(wide) * 16), 2),
        "10 bits": (lambda: Image.fromarray(values.astype(wide) * 4), 2),
        "palette": (lambda: Image.fromarray(values).convert("P"), 0),
        "two": (lambda: Image.fromarray(values).convert("1").convert("L").convert("1"), 255),
        "alpha": (lambda: Image.fromarray(np.dstack([values] * 3 + [values * 0 + 255])), 0),
        "la": (lambda: Image.fromarray(np.dstack([values, values * 0 + 255])), 0),
        "rgb": (lambda: Image.fromarray(np.dstack([values] * 3)), 0),
    }
    make, off = kinds[one_of(draw, list(kinds))]
    return make(), off


def test_depths_and_sizes(pool):
    "Whatever the depth, the size and the suffix: 8-bit RGB of the same brightness, or an error."
    root, _, number = pool

    def example(draw):
        w, h = (one_of(draw, [1, 2, 3, 17, 64, 300]) for _ in range(2))
        rng = np.random.default_rng(draw(st.integers(0, 99)))
        values = rng.integers(0, 256, (h, w), np.uint8)
        values.flat[0], values.flat[-1] = 0, 255
        image, off = stored(draw, values)
        suffixes = [".png", ".tif", ".tiff"]
        if image.mode[0] not in "IF":
            suffixes += [".bmp", ".webp"]  # of 8 bits only
        if image.mode in "LP1":
            suffixes += [".gif"]
        file = root / f"{next(number)}{one_of(draw, suffixes)}"
        try:
            image.save(file, lossless=True)
        except OSError:  # this format cannot store it
            return None
        if one_of(draw, [True, False, False, False]):
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
            off = 255
        with warnings.catch_warnings(action="ignore"):  # Pillow's, of a file that is cut
            try:
                read = np.asarray(read_image(file)).astype(int)
            except OSError:
                return None
        assert read.shape == (h, w, 3) and file.exists()
        assert np.abs(read - values[..., None]).max() <= off, file
        return read

    many(60 * TIMES, example, 0.02)


# Words of the command line.

TEXT = ["data", "run", "heads", "weights"]
# fmt: off
PIECES = [
    "a", "try 4", " #4", "a@b", "..", "/", "x", ":", "{", "}", "[", "]", "'", '"', "null", "true",
    "1e3", "0x1", "~", "&", "*", "!", "|", "é", "-", ",", "= ", "\t", "no", "1_0", ".", "\\",
]
# fmt: on


def test_text_stands_as_it_is_written():
    "A text key holds the very word, or the word is refused in one line that shows the key."

    def example(draw):
        key = one_of(draw, TEXT)
        word = "".join(draw(st.lists(st.sampled_from(PIECES), min_size=1, max_size=3)))
        try:
            out = load_config(f"{key}={word}").flat()[key]
        except (ValueError, KeyError) as e:
            assert "\n" not in e.args[0] and key in e.args[0]
            return None
        assert out == word or (out is None and word == "null")  # null stands for none
        return out

    many(60 * TIMES, example, 0)
