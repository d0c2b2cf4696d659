"""One data set in the layouts that other tools write gives the same boxes from all of them.

Layouts as documented by Roboflow (export formats), CVAT (export formats), Label Studio (export
formats), Ultralytics (detection datasets) and in the readme files that lie in their exports.
"""

from pathlib import Path

import pytest
from odd import (
    check_same,
    drawn,
    from_coco,
    place,
    put_images,
    renamed,
    situation,
    told,
    write_coco,
    write_voc,
    write_yolo,
)

from mhdet.data.splits import open_data

MINI = Path(__file__).resolve().parents[2] / "shared/data/voc2007-mini"


# Layouts: each writes the images below a root and returns what is opened.


def coco(root, images, names):
    return write_coco(root, images, names=names)


def coco_2017(root, images, names):
    "As cocodataset.org hands it out."
    layout, annotations = "{split}2017/{stem}.jpg", "annotations/instances_{split}2017.json"
    return write_coco(root, images, layout, annotations, names=names)


def roboflow_coco(root, images, names):
    "The JSON lies among the images of its split; category 0 is the project's name."
    images = renamed(images, "{stem}_jpg.rf.0a1b2c3d4e5f", val="valid")
    where = "{split}/{stem}.jpg", "{split}/_annotations.coco.json"
    return write_coco(root, images, *where, names=names, first=0, root_category="my-project")


def roboflow_coco_root_is_a_class(root, images, names):
    "A project that is called like one of its classes."
    where = "{split}/{stem}.jpg", "{split}/_annotations.coco.json"
    images = renamed(images, val="valid")
    return write_coco(root, images, *where, names=names, first=0, root_category=names[0])


def cvat_coco(root, images, names):
    "COCO 1.0, with the subsets that CVAT's tasks offer."
    images = renamed(images, train="Train", val="Validation", test="Test")
    return write_coco(root, images, names=names)


def label_studio_coco(root, images, names):
    "file_name is a path, here with the separators of Windows."
    return write_coco(
        root, images, "images/{stem}.jpg", names=names, file_name="images\\{stem}.jpg"
    )


def label_studio_coco_upload(root, images, names):
    "file_name is the path on the server; the images are in images/."
    path = "../../label-studio/data/media/upload/1/{stem}.jpg"
    images = renamed(images, "8f3a2b1c-{stem}")
    return write_coco(root, images, "images/{stem}.jpg", names=names, file_name=path)


def label_studio_coco_folders(root, images, names):
    "One export per split, as it is unpacked: result.json and images/."
    images = renamed(images, "8f3a2b1c-{stem}")
    where = "{split}/images/{stem}.jpg", "{split}/result.json"
    return write_coco(root, images, *where, names=names, file_name="images/{stem}.jpg", first=0)


def ultralytics(root, images, names):
    return write_yolo(root, images, names=dict(enumerate(names)), nc=None)


def ultralytics_whole_path(root, images, names):
    "path: is absolute, and a split is a list file with ./ in front."
    yml = write_yolo(root, images, path=str(root.resolve()), names=names, train="train.txt")
    lines = [place(Path(), "images/{split}/{stem}.jpg", m) for m in images if m.split == "train"]
    (root / "train.txt").write_text("".join(f"./{line}\n" for line in lines))
    return yml


def ultralytics_split_first(root, images, names):
    "train/images instead of images/train."
    return write_yolo(
        root, images, "{split}/images/{stem}.jpg", "{split}/labels/{stem}.txt", names=names
    )


def roboflow_yolo(root, images, names):
    "The YAML lies beside train/, but says ../train/images."
    images = renamed(images, "{stem}_jpg.rf.0a1b2c3d4e5f", val="valid")
    layout, labels = "{split}/images/{stem}.jpg", "{split}/labels/{stem}.txt"
    folders = {s: f"../{s}/images" for s in {m.split for m in images} - {"valid"}}
    more = dict(path=None, valid=None, val="../valid/images", roboflow=dict(version=1))
    return write_yolo(root, images, layout, labels, names=names, **folders, **more)


def cvat_yolo(root, images, names):
    "YOLO 1.1: obj.data, obj.names, lists with data/ in front, label files beside the images."
    folder = dict(train="obj_train_data", val="obj_valid_data", test="obj_test_data")
    images = renamed(images, **folder)
    write_yolo(root, images, "{split}/{stem}.jpg", "{split}/{stem}.txt", names=names)
    (root / "data.yaml").unlink()
    (root / "obj.names").write_text("".join(f"{name}\n" for name in names))
    lines = [f"classes = {len(names)}"]
    for key, split in dict(train="train", valid="val", test="test").items():
        stems = [m.stem for m in images if m.split == folder[split]]
        if stems:
            text = "".join(f"data/{folder[split]}/{stem}.jpg\n" for stem in stems)
            (root / f"{key}.txt").write_text(text)
            lines.append(f"{key} = data/{key}.txt")
    lines += ["names = data/obj.names", "backup = backup/"]
    (root / "obj.data").write_text("\n".join(lines) + "\n")
    return root / "obj.data"


def cvat_yolo_yaml(root, images, names):
    "The same with a YAML that its user wrote."
    cvat_yolo(root, images, names)
    lines = ["train: train.txt", "val: valid.txt"]
    lines += ["test: test.txt"] * (root / "test.txt").exists()
    (root / "data.yaml").write_text("\n".join([*lines, f"names: {list(names)}"]) + "\n")
    return root / "data.yaml"


def cvat_ultralytics(root, images, names):
    "Ultralytics YOLO Detection 1.0: lists with data/ in front, images/, labels/."
    images = renamed(images, train="Train", val="Validation", test="Test")
    keys = dict(Train="train", Validation="val", Test="test")
    present = {m.split for m in images}
    lists = {keys[s]: f"{s}.txt" for s in present}
    nothing = dict.fromkeys(present)
    yml = write_yolo(root, images, names=dict(enumerate(names)), nc=None, **nothing, **lists)
    for split in present:
        stems = [m.stem for m in images if m.split == split]
        text = "".join(f"data/images/{split}/{stem}.jpg\n" for stem in stems)
        (root / f"{split}.txt").write_text(text)
    return yml


def label_studio_yolo(root, images, names):
    "One export per split (images, labels, classes.txt, notes.json) and a YAML that its user wrote."
    images = renamed(images, "8f3a2b1c-{stem}")
    layout, labels = "{split}/images/{stem}.jpg", "{split}/labels/{stem}.txt"
    yml = write_yolo(root, images, layout, labels, names=names)
    for split in {m.split for m in images}:
        (root / split / "classes.txt").write_text("".join(f"{name}\n" for name in names))
        (root / split / "notes.json").write_text('{"categories": [], "info": {"year": 2024}}')
    return yml


def voc(root, images, names):
    return write_voc(root, images, names=names)


def voc_2007(root, images, names):
    "The lists of the challenge: trainval and test, and one per class, in VOCdevkit/VOC2007."
    images = renamed(images, train="trainval", val="test")
    write_voc(root / "VOC2007", images, names=names)
    lists = root / "VOC2007/ImageSets/Main"
    for name in names:
        for file in ("trainval", "test"):
            stems = [m.stem for m in images if m.split == file]
            (lists / f"{name}_{file}.txt").write_text("".join(f"{stem} -1\n" for stem in stems))
    return root / "VOC2007"


def cvat_voc(root, images, names):
    "PASCAL VOC 1.1: lists of the subsets with their classes, corners with decimals."
    images = renamed(images, train="Train", val="Validation", test="Test")
    write_voc(root, images, names=names)
    (root / "labelmap.txt").write_text("# label:color_rgb:parts:actions\n")
    for name in names:
        for split in {m.split for m in images}:
            lines = [f"{m.stem}  -1\n" for m in images if m.split == split]
            (root / f"ImageSets/Main/{name}_{split}.txt").write_text("".join(lines))
    return root


def roboflow_voc(root, images, names):
    "The XML beside its image, a folder per split."
    images = renamed(images, "{stem}_jpg.rf.0a1b2c3d4e5f", val="valid")
    where = "{split}/{stem}.jpg", "{split}/{stem}.xml"
    return write_voc(root, images, *where, lists=None, names=names)


def labelimg_voc(root, images, names):
    "The XML beside its image, with the path on the computer where it was drawn."
    extra = [("path", r"C:\Users\me\images\some.jpg"), ("source", "")]
    where = "{split}/{stem}.jpg", "{split}/{stem}.xml"
    return write_voc(root, images, *where, lists=None, names=names, extra=extra)


def label_studio_voc(root, images, names):
    "One export per split: Annotations/ and images/, no list."
    where = "{split}/images/{stem}.jpg", "{split}/Annotations/{stem}.xml"
    return write_voc(root, images, *where, lists=None, names=names)


# fmt: off
LAYOUTS = [
    coco, coco_2017, roboflow_coco, roboflow_coco_root_is_a_class, cvat_coco, label_studio_coco,
    label_studio_coco_upload, label_studio_coco_folders, ultralytics, ultralytics_whole_path,
    ultralytics_split_first, roboflow_yolo, cvat_yolo, cvat_yolo_yaml, cvat_ultralytics,
    label_studio_yolo, voc, voc_2007, cvat_voc, roboflow_voc, labelimg_voc, label_studio_voc,
]
# fmt: on
NO_TEST_SPLIT = {voc_2007}  # its `test` is what is called val here


def check(splits, images, names):
    assert set(splits) == {m.split for m in images}
    check_same(splits, images, names)
    for records in splits.values():
        assert records.names == list(names) and not records.lost()


@situation(
    "partners",
    "Exports of Roboflow, CVAT, Label Studio, Ultralytics and LabelImg as COCO, VOC and YOLO, "
    "in 22 layouts",
    "read as they are, with the same boxes from all",
)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_drawn_images_are_read_from(layout, tmp_path):
    test = 0 if layout in NO_TEST_SPLIT else 3
    images = drawn(tmp_path / "drawn", train=8, val=4, test=test)
    splits = open_data(layout(tmp_path / "set", images, ["c0", "c1"]), dev=0, test=True)
    check(splits, images, ["c0", "c1"])
    # paths of another computer: noted, as they are not where the list says
    assert set(told(splits)) <= {"listed paths read otherwise"}


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    "The real images on the disk of the tests, where they can be linked."
    if not MINI.is_dir():
        pytest.skip(f"{MINI} is not there")
    images, names = from_coco(MINI)
    root = tmp_path_factory.mktemp("mini")
    put_images(root, images, "{split}/{stem}.jpg")
    for m in images:
        m.file = place(root, "{split}/{stem}.jpg", m)
    return images, names


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_real_images_are_read_from(layout, mini, tmp_path):
    images, names = mini
    check(open_data(layout(tmp_path / "set", images, names), dev=0, test=True), images, names)
