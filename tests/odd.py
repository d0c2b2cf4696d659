"""Small data sets drawn on the spot, in the layouts that other tools write.

Every situation of `test_odd_data`, `test_layouts` and `test_fuzz` starts from images drawn here (or
from real ones, `from_coco`) and is written by one of the `write_...` functions.
"""

import ast
import errno
import hashlib
import json
import os
import shutil
import xml.etree.ElementTree as ET
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml
from PIL import Image, ImageDraw

KINDS = {
    "partners": (
        "Images and their annotations",
        "A label file belongs to an image by its path. What has no partner, in either direction, "
        "is counted.",
    ),
    "twice": (
        "The same thing twice",
        "In one split it is counted; in two splits it is a leak, and `mhdet study` refuses it "
        "unless `--allow-leak`.",
    ),
    "numbers": (
        "Numbers of the boxes",
        "What a line means is decided by the data set's own declaration and by ranges, not by how "
        "many numbers there are. The size of the image file decides, not the stated one.",
    ),
    "pixels": ("Image files", "Every image becomes 8-bit RGB, turned upright."),
    "told": (
        "What is told",
        "What was skipped, repaired or left out stands in one line of every command that uses the "
        "data, and in `env.json` of the run.",
    ),
    "checks": (
        "Before a training begins",
        "`mhdet train`, `study` and `sweep` check all of this before anything is made.",
    ),
    "outputs": (
        "What is opened and written",
        "Outputs are bounded, and never overwrite each other.",
    ),
    "words": ("Words of the command line", "Text is taken as it stands."),
    "results": (
        "Results files of other tools",
        "A convention is found out where the file leaves no doubt, and told; `--ids` states it.",
    ),
    "library": (
        "Your own training loop",
        "The first targets that `RoutedLoss` gets are checked; with `validate` set, all of them.",
    ),
}


class Situation(NamedTuple):
    "One row of docs/odd_data.md."

    kind: str
    what: str
    happens: str


def situation(kind, what, happens):
    "Say which row of docs/odd_data.md a test stands for."
    assert kind in KINDS

    def mark(test):
        test.situation = Situation(kind, what, happens)
        return test

    return mark


def situations():
    "The rows, as they stand above the tests, in their order; nothing is imported."
    out = []
    for file in sorted(Path(__file__).parent.glob("test_*.py")):
        for node in ast.parse(file.read_text(encoding="utf8")).body:
            for call in getattr(node, "decorator_list", ()):
                if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "situation":
                    out.append(Situation(*(ast.literal_eval(a) for a in call.args)))
    return out


def page():
    "The text of docs/odd_data.md."
    rows = situations()
    parts = [PAGE.format(n=len(rows))]
    for kind, (title, text) in KINDS.items():
        cells = [f"| {s.what} | {s.happens} |" for s in rows if s.kind == kind]
        if cells:
            head = [f"## {title}", "", text, "", "| situation | what happens |", "| --- | --- |"]
            parts.append("\n".join([*head, *cells]))
    return "\n\n".join(parts) + "\n"


PAGE = """# What mhdet does with odd data

Data sets come from many tools, and few are as the textbook has them. Nothing is left out in
silence: what is skipped, repaired or left out is counted under a name, `mhdet data D` lists the
places, and the commands that use the data say it in one line. An error is one line that names the
file, the place and the cause, and leaves nothing half done.

Each of the {n} rows is a test in [tests](../tests); many follow public bug reports
about other tools. This page is made from them: `python docs/build.py odd`."""


COLOURS = [(230, 40, 40), (40, 200, 60), (50, 80, 240), (240, 220, 40)]
SIZE = (96, 72)


@dataclass
class Drawn:
    "An image file and what is in it: boxes (class, x, y, width, height) in px."

    split: str
    stem: str
    file: Path
    size: tuple = SIZE
    boxes: list = field(default_factory=list)

    @property
    def content(self):
        return hashlib.sha1(self.file.read_bytes()).hexdigest()


def draw(rng, size=SIZE, n=2, nc=2):
    "An image with n coloured rectangles of whole pixels, and its boxes."
    w, h = size
    image = Image.new("RGB", size, tuple(int(v) for v in rng.integers(90, 140, 3)))
    pen, boxes = ImageDraw.Draw(image), []
    for _ in range(n):
        bw, bh = int(rng.integers(w // 5, w // 2)), int(rng.integers(h // 5, h // 2))
        x, y = int(rng.integers(0, w - bw)), int(rng.integers(0, h - bh))
        c = int(rng.integers(nc))
        pen.rectangle((x, y, x + bw - 1, y + bh - 1), fill=COLOURS[c % 4])
        boxes.append((c, x, y, bw, bh))
    return image, boxes


def drawn(folder, train=6, val=3, test=0, nc=2, size=SIZE, n=2, seed=0):
    "Draw images into a folder; list of Drawn."
    rng, out = np.random.default_rng(seed), []
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in dict(train=train, val=val, test=test).items():
        for i in range(count):
            image, boxes = draw(rng, size, n, nc)
            file = folder / f"{split}{i:03d}.jpg"
            image.save(file, quality=92)
            out.append(Drawn(split, file.stem, file, size, boxes))
    return out


def from_coco(root, splits=("train", "val")):
    "The images of a COCO folder, list of Drawn, and the class names."
    out, names = [], []
    for split in splits:
        content = json.loads((root / f"annotations/instances_{split}.json").read_text())
        categories = sorted(content["categories"], key=lambda c: c["id"])
        names = [c["name"] for c in categories]
        label = {c["id"]: k for k, c in enumerate(categories)}
        images = {}
        for m in content["images"]:
            file = root / "images" / split / m["file_name"]
            size = m["width"], m["height"]
            images[m["id"]] = Drawn(split, file.stem, file, size)
        for a in content["annotations"]:
            images[a["image_id"]].boxes.append((label[a["category_id"]], *a["bbox"]))
        out += images.values()
    return out, names


# Writing: one function per format; layouts are paths with {split} and {stem}.


def put(source, target):
    "A file again under another name: a hard link, or a copy where that is not possible."
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError as e:
        if e.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK):
            raise
        shutil.copy(source, target)


def place(root, layout, image):
    "Where a layout puts an image, or its label file."
    return root / layout.format(split=image.split, stem=image.stem)


LABELS = "labels/{split}/{stem}.txt"


def label_file(root, image):
    return place(root, LABELS, image)


def image_file(root, image, suffix=".jpg"):
    return place(root, "images/{split}/{stem}" + suffix, image)


def in_train(images):
    return [m for m in images if m.split == "train"]


def read(path):
    "All splits, every image decoded, as `mhdet data` reads them."
    from mhdet.data.overlaps import noted
    from mhdet.data.splits import check_images, open_data

    out = {}
    for split, records in open_data(path, dev=0, test=True).items():
        records = check_images(records, cache=None)
        out[split] = replace(records, problems=records.problems | noted(records, cache=None))
    return out


def put_images(root, images, layout):
    for image in images:
        put(image.file, place(root, layout, image))


def yolo_lines(image):
    "The lines `class cx cy w h` in shares of the image."
    w, h = image.size
    lines = []
    for c, x, y, bw, bh in image.boxes:
        lines.append(f"{c} {(x + bw / 2) / w:.6f} {(y + bh / 2) / h:.6f} {bw / w:.6f} {bh / h:.6f}")
    return lines


def write_yolo(
    root,
    images,
    layout="images/{split}/{stem}.jpg",
    labels="labels/{split}/{stem}.txt",
    yaml_file="data.yaml",
    names=("c0", "c1"),
    **spec,
):
    """Images, label files and a YAML; the path of the YAML.

    The YAML names a folder for each split that occurs; `spec` replaces or adds keys.
    """
    put_images(root, images, layout)
    for image in images:
        file = place(root, labels, image)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(line + "\n" for line in yolo_lines(image)))
    folders = {m.split: place(Path(), layout, m).parent.as_posix() for m in images}
    content = (
        dict(path=".")
        | folders
        | dict(nc=len(names), names=names if isinstance(names, dict) else list(names))
        | spec
    )
    content = {key: value for key, value in content.items() if value is not None}
    (root / yaml_file).write_text(yaml.safe_dump(content, sort_keys=False))
    return root / yaml_file


def coco_content(images, names=("c0", "c1"), first=1, file_name="{stem}.jpg", root_category=None):
    """The content of a COCO file of these images.

    Images and categories are numbered from `first`; with `root_category` a category of this name,
    that nothing uses, comes before the others, as Roboflow writes it.
    """
    categories = [dict(id=first + k, name=name, supercategory="") for k, name in enumerate(names)]
    if root_category:
        for c in categories:
            c |= dict(id=c["id"] - first + 1, supercategory=root_category)
        categories.insert(0, dict(id=0, name=root_category, supercategory="none"))
    ids = [c["id"] for c in categories][-len(names) :]
    listed, notes = [], []
    for i, image in enumerate(images, start=first):
        w, h = image.size
        name = file_name.format(stem=image.stem, split=image.split)
        listed.append(dict(id=i, file_name=name, width=w, height=h))
        for c, *bbox in image.boxes:
            note = dict(id=first + len(notes), image_id=i, category_id=ids[c], bbox=bbox)
            notes.append(note | dict(area=bbox[2] * bbox[3], iscrowd=0, segmentation=[]))
    return dict(images=listed, annotations=notes, categories=categories)


def write_coco(
    root,
    images,
    layout="images/{split}/{stem}.jpg",
    annotations="annotations/instances_{split}.json",
    change=None,
    **content,
):
    """Images and a JSON per split; the root.

    `change(split, content)` may change the content; it returns nothing.
    """
    put_images(root, images, layout)
    for split in dict.fromkeys(m.split for m in images):
        of_split = coco_content([m for m in images if m.split == split], **content)
        if change:
            change(split, of_split)
        file = root / annotations.format(split=split)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(of_split))
    return root


def voc_tree(image, names, filename, extra=()):
    "The annotation of an image: corners counted from 1, the last pixel inside."
    tree = ET.Element("annotation")
    for tag, text in (("folder", ""), ("filename", filename), *extra):
        ET.SubElement(tree, tag).text = text
    size = ET.SubElement(tree, "size")
    for tag, value in zip(("width", "height", "depth"), (*image.size, 3), strict=True):
        ET.SubElement(size, tag).text = str(value)
    ET.SubElement(tree, "segmented").text = "0"
    for c, x, y, w, h in image.boxes:
        element = ET.SubElement(tree, "object")
        for tag, text in dict(name=names[c], pose="Unspecified", truncated="0").items():
            ET.SubElement(element, tag).text = text
        ET.SubElement(element, "difficult").text = "0"
        box = ET.SubElement(element, "bndbox")
        corners = (x + 1, y + 1, x + w, y + h)
        for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True):
            ET.SubElement(box, tag).text = f"{value:.10g}"
    return tree


def write_voc(
    root,
    images,
    layout="JPEGImages/{stem}.jpg",
    annotations="Annotations/{stem}.xml",
    lists="ImageSets/Main/{split}.txt",
    names=("c0", "c1"),
    filename="{stem}.jpg",
    extra=(),
):
    "Images, an XML each, and, unless `lists` is None, a list per split; the root."
    put_images(root, images, layout)
    for image in images:
        file = place(root, annotations, image)
        file.parent.mkdir(parents=True, exist_ok=True)
        tree = voc_tree(image, names, filename.format(stem=image.stem, split=image.split), extra)
        file.write_bytes(ET.tostring(tree))
    for split in dict.fromkeys(m.split for m in images) if lists else ():
        file = root / lists.format(split=split)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(f"{m.stem}\n" for m in images if m.split == split))
    return root


def renamed(images, stem="{stem}", **splits):
    "The images under other stems (a format with {stem}) and other names of their splits."
    out = []
    for m in images:
        other = splits.get(m.split, m.split)
        out.append(replace(m, stem=stem.format(stem=m.stem, split=m.split), split=other))
    return out


# Judging: what was read against what was drawn.


def truth(images, names=("c0", "c1")):
    "Content of an image file -> its split, its classes and its boxes (xyxy px) in order."
    out = {}
    for m in images:
        boxes = np.array([b[1:] for b in m.boxes], float).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        out[m.content] = m.split, [names[b[0]] for b in m.boxes], boxes
    return out


def contents(splits):
    "The same of what was read."
    out = {}
    for split, records in splits.items():
        for i, file in enumerate(records.files):
            rows = slice(*np.searchsorted(records.gt["image"], [i, i + 1]))
            labels = [records.names[c] for c in records.gt["label"][rows]]
            key = hashlib.sha1(Path(file).read_bytes()).hexdigest()
            assert key not in out, f"{file} is read twice"
            out[key] = split, labels, records.gt["box"][rows]
    return out


def check_same(splits, images, names=("c0", "c1"), px=0.01):
    "All images are read, in their splits, with their boxes, and nothing else."
    read, expected = contents(splits), truth(images, names)
    assert read.keys() == expected.keys()
    for key, (split, labels, boxes) in expected.items():
        assert read[key][:2] == (split, labels)
        assert np.abs(read[key][2] - boxes).max(initial=0) < px


def told(splits):
    "Kind of problem -> how many places, over all splits."
    out = {}
    for records in splits.values():
        for kind, places in records.problems.items():
            out[kind] = out.get(kind, 0) + len(places)
    return out
