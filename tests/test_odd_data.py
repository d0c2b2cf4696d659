"""Odd data sets, one test per situation: partners and overlaps, and what the numbers mean.

Most situations are those of public bug reports about other tools; every file is drawn here. The
page docs/odd_data.md is made from what stands above the tests (`python docs/build.py odd`).
"""

import shutil
import unicodedata
from dataclasses import replace

import pytest
from odd import (
    check_same,
    drawn,
    image_file,
    in_train,
    label_file,
    put,
    read,
    renamed,
    situation,
    told,
    write_coco,
    write_voc,
    write_yolo,
)
from PIL import Image


@pytest.fixture
def images(tmp_path):
    "Six drawn images for train, three for val, two boxes each."
    return drawn(tmp_path / "drawn")


@pytest.fixture
def many(tmp_path):
    "Forty images for train, so that one of them may be lost."
    return drawn(tmp_path / "drawn", train=40, val=3)


# Partners of YOLO images.


@situation(
    "partners",
    "YOLO: `images` is part of a file's or a folder's name (`images-3-_jpg.rf.0003.jpg`)",
    "only the folder `images` is exchanged for `labels`; all boxes are read",
)
@pytest.mark.parametrize("layout", ["images/{split}", "images/{split}_images", "images/my images"])
def test_images_in_a_name(images, tmp_path, layout):
    images = [replace(m, stem=f"images-{i}-_jpg.rf.{i}") for i, m in enumerate(images)]
    labels = layout.replace("images", "labels", 1)
    layout, labels = f"{layout}/{{split}}/{{stem}}.jpg", f"{labels}/{{split}}/{{stem}}.txt"
    splits = read(write_yolo(tmp_path / "set", images, layout, labels))
    check_same(splits, images)
    assert told(splits) == {}


@situation(
    "partners",
    "YOLO: the path has a folder `images` above the data set, or two of them",
    "the last one is exchanged for `labels`; if no label file is there, the one beside the image "
    "is read",
)
@pytest.mark.parametrize("labels", ["{split}/{stem}.txt", "labels/{split}/{stem}.txt"])
def test_images_above_the_data_set(images, tmp_path, labels):
    layout = labels.replace("labels", "images").replace(".txt", ".jpg")
    splits = read(write_yolo(tmp_path / "images/set", images, layout, labels))
    check_same(splits, images)
    assert told(splits) == {}


@situation(
    "partners",
    "YOLO: some label files lie beside their images, the others in `labels/`",
    "all are read",
)
def test_label_files_beside_some_images(images, tmp_path):
    yml = write_yolo(tmp_path / "set", images)
    for m in images[::2]:
        file = label_file(yml.parent, m)
        file.rename(image_file(yml.parent, m, ".txt"))
    splits = read(yml)
    check_same(splits, images)
    assert told(splits) == {}


@situation(
    "partners",
    "Folders `Images` and `Labels`, suffixes `.JPG` and `.TXT`, in any mixture of capitals",
    "all are read",
)
@pytest.mark.parametrize(
    "image, label",
    [
        ("images/{split}/{stem}.JPG", "labels/{split}/{stem}.txt"),
        ("images/{split}/{stem}.Jpeg", "labels/{split}/{stem}.TXT"),
        ("Images/{split}/{stem}.jpg", "Labels/{split}/{stem}.txt"),
        ("{split}/{stem}.JPG", "{split}/{stem}.Txt"),
    ],
)
def test_capitals(images, tmp_path, image, label):
    splits = read(write_yolo(tmp_path / "set", images, image, label))
    check_same(splits, images)
    assert told(splits) == {}


@situation(
    "partners",
    "Images that differ in capitals only (`A.jpg`, `a.jpg`), each with its label file",
    "each gets its own boxes",
)
def test_names_that_differ_in_capitals(images, tmp_path):
    images = [replace(m, stem="aA"[i % 2] + str(i // 2)) for i, m in enumerate(images)]
    splits = read(write_yolo(tmp_path / "set", images))
    check_same(splits, images)
    assert told(splits) == {}


@situation(
    "partners",
    "Images with the suffix `.jfif .gif .jp2 .avif .mpo .bmp .webp .tif .png`",
    "read where Pillow reads them, else counted as unreadable",
)
def test_suffixes(images, tmp_path):
    yml = write_yolo(tmp_path / "set", images)
    for m, suffix in zip(images, (".jfif", ".gif", ".jp2", ".avif", ".mpo", ".webp"), strict=False):
        file = image_file(yml.parent, m)
        with Image.open(file) as image:
            image.load()
        if suffix not in (".jfif", ".mpo"):
            image.save(file.with_suffix(suffix))
        else:
            put(file, file.with_suffix(suffix))
        file.unlink()
    splits = read(yml)
    assert [len(r) for r in splits.values()] == [6, 3]
    assert sum(len(r.gt["label"]) for r in splits.values()) == 18
    assert told(splits) == {}


@situation(
    "partners",
    "Names with blanks, dots, signs (`a b (1).jpg`, `10.5 m.webp.jpg`, `50%#+&.jpg`)",
    "taken whole",
)
@pytest.mark.parametrize(
    "stem", ["a b (1) {stem}", " {stem} ", "10.5 m.webp.{stem}", "50%#+&'{stem}"]
)
@pytest.mark.parametrize("source", ["folder", "list", "coco", "voc"])
def test_signs_in_names(images, tmp_path, stem, source):
    images, root = renamed(images, stem), tmp_path / "my set"
    if source == "coco":
        opened = write_coco(root, images)
    elif source == "voc":
        if stem.startswith(" "):
            pytest.skip("a list of VOC cannot say so: blanks follow its names")
        opened = write_voc(root, images)
    else:
        opened = write_yolo(root, images)
    if source == "list":
        for split in ("train", "val"):
            names = [f"images/{split}/{m.stem}.jpg" for m in images if m.split == split]
            (root / f"{split}.txt").write_text("\n".join(names) + "\n")
        opened.write_text("train: train.txt\nval: val.txt\nnames: [c0, c1]\n")
    splits = read(opened)
    check_same(splits, images)
    assert told(splits) == {}


@situation(
    "partners",
    "Letters with accents, composed in the annotation and decomposed on the disk (macOS)",
    "found",
)
@pytest.mark.parametrize("source", ["coco", "list", "yolo"])
def test_accents(images, tmp_path, source):
    root = tmp_path / "set"
    composed = renamed(images, unicodedata.normalize("NFC", "é{stem}"))
    decomposed = renamed(images, unicodedata.normalize("NFD", "é{stem}"))
    if source == "coco":
        write_coco(root, composed)
        for a, b in zip(composed, decomposed, strict=True):
            image_file(root, a).rename(image_file(root, b))
        splits = read(root)
    else:
        yml = write_yolo(root, decomposed)
        if source == "yolo":
            for a, b in zip(composed, decomposed, strict=True):
                label_file(root, b).rename(label_file(root, a))
        else:
            for split in ("train", "val"):
                names = [f"images/{split}/{m.stem}.jpg" for m in composed if m.split == split]
                (root / f"{split}.txt").write_text("\n".join(names) + "\n")
            yml.write_text("train: train.txt\nval: val.txt\nnames: [c0, c1]\n")
        splits = read(yml)
    check_same(splits, images)
    assert set(told(splits)) <= {"image file spelled otherwise"}


@situation(
    "partners",
    "COCO: `file_name` with another suffix or in other capitals than the file",
    "the file is read where just one fits, and listed; never that of another image",
)
@pytest.mark.parametrize("file_name", ["{stem}.png", "{stem}.JPG", "{stem}.jpeg"])
def test_other_spelling_in_coco(images, tmp_path, file_name):
    splits = read(write_coco(tmp_path / "set", images, file_name=file_name))
    check_same(splits, images)
    assert told(splits) == {"image file spelled otherwise": 9}


def test_no_image_stands_for_another(many, tmp_path):
    root = tmp_path / "set"
    many = [replace(m, stem="a") if m is many[0] else m for m in many]
    other = replace(many[1], stem="A")
    images = [many[0], other, *many[2:]]
    write_coco(root, images)
    image_file(root, other).unlink()
    splits = read(root)
    check_same(splits, [many[0], *many[2:]])
    assert told(splits)["image without file"] == 1


@situation(
    "partners",
    "YOLO: an image without label file, and one with an empty label file",
    "both are images without boxes; the first is counted, the second is not",
)
def test_image_without_label_file(images, tmp_path):
    yml = write_yolo(tmp_path / "set", images)
    label_file(yml.parent, images[0]).unlink()
    label_file(yml.parent, images[1]).write_text("\n")
    images = [replace(m, boxes=[]) for m in images[:2]] + images[2:]
    splits = read(yml)
    check_same(splits, images)
    assert told(splits) == {"image without label file": 1}


@situation(
    "partners",
    "YOLO: a label file whose image is gone",
    "counted; `classes.txt` and `notes.json` are no label files",
)
def test_label_file_without_image(images, tmp_path):
    yml = write_yolo(tmp_path / "set", images)
    for m in images[:4]:
        image_file(yml.parent, m).unlink()
    for name in ("classes.txt", "notes.json", "labels.cache"):
        (yml.parent / "labels" / name).write_text("c0\nc1\n")
        (yml.parent / "labels/train" / name).write_text("c0\nc1\n")
    splits = read(yml)
    check_same(splits, images[4:])
    assert told(splits) == {"label file without image": 4}


@situation(
    "partners",
    "YOLO: a label file is called `x.jpg.txt`",
    "it is that of `x.jpg`",
)
def test_label_file_with_two_suffixes(images, tmp_path):
    yml = write_yolo(tmp_path / "set", images)
    for m in images[:2]:
        file = label_file(yml.parent, m)
        file.rename(file.with_name(f"{m.stem}.jpg.txt"))
    splits = read(yml)
    check_same(splits, images)
    assert told(splits) == {}


@situation(
    "partners",
    "YOLO: two images share a label file (`a.jpg`, `a.png`)",
    "counted",
)
def test_two_images_share_a_label_file(images, tmp_path):
    yml = write_yolo(tmp_path / "set", images)
    with Image.open(images[1].file) as other:
        other.save(image_file(yml.parent, images[0], ".png"))
    splits = read(yml)
    assert len(splits["train"]) == 7
    assert told(splits) == {"label file of several images": 1, "same image twice": 1}


@situation(
    "partners",
    "Linked files and folders",
    "followed; a folder that leads back to one above it is entered once",
)
@pytest.mark.parametrize("loop", [False, True])
def test_links(images, tmp_path, loop):
    other, root = drawn(tmp_path / "more", train=4, val=0, seed=1), tmp_path / "set"
    yml = write_yolo(root, images)
    write_yolo(tmp_path / "other", renamed(other, "o{stem}"))
    for kind in ("images", "labels"):
        (root / kind / "train/more").symlink_to(tmp_path / "other" / kind / "train")
    if loop:
        (root / "images/train/loop").symlink_to(root / "images/train")
        (root / "labels/train/loop").symlink_to(root / "labels/train")
    file = image_file(root, images[0])
    file.rename(tmp_path / "elsewhere.jpg")
    file.symlink_to(tmp_path / "elsewhere.jpg")
    splits = read(yml)
    check_same(splits, images + other)
    assert told(splits) == {}


@situation(
    "partners",
    "A link that leads nowhere, called like an image",
    "counted as an image without file",
)
def test_a_broken_link(many, tmp_path):
    yml = write_yolo(tmp_path / "set", many)
    file = image_file(yml.parent, many[0])
    file.unlink()
    file.symlink_to("nowhere.jpg")
    splits = read(yml)
    check_same(splits, many[1:])
    assert told(splits) == {"image without file": 1}


@situation(
    "partners",
    "Files and folders that begin with a dot (`._a.jpg` of macOS, `.ipynb_checkpoints`)",
    "left out and counted",
)
def test_dot_files(images, tmp_path):
    yml = write_yolo(tmp_path / "set", images)
    for m in images[:4]:
        file = image_file(yml.parent, m)
        file.with_name(f"._{file.name}").write_bytes(b"\0\5\x16\7" + b"\0" * 80)
        label = label_file(yml.parent, m)
        label.with_name(f"._{label.name}").write_bytes(b"\0\5\x16\7" + b"\0" * 80)
    folder = yml.parent / "images/train/.ipynb_checkpoints"
    folder.mkdir()
    for m in images[:3]:
        shutil.copy(m.file, folder / f"{m.stem}-checkpoint.jpg")
    splits = read(yml)
    check_same(splits, images)
    assert told(splits) == {"hidden image file": 7}


@situation(
    "partners",
    "The data set itself lies below a folder that begins with a dot (`~/.cache/...`)",
    "read",
)
@pytest.mark.parametrize("write", [write_yolo, write_coco, write_voc])
def test_data_set_below_a_dot_folder(images, tmp_path, write):
    splits = read(write(tmp_path / ".cache/set", images))
    check_same(splits, images)
    assert told(splits) == {}


@situation(
    "partners",
    "Other files among the images (`Thumbs.db`, `desktop.ini`, `.DS_Store`, `readme.txt`, a ZIP)",
    "passed over",
)
def test_other_files(images, tmp_path):
    yml = write_yolo(tmp_path / "set", images)
    for name in ("Thumbs.db", "desktop.ini", "readme.md", "all.zip", "a.xml", "a.json"):
        (yml.parent / "images/train" / name).write_text("x")
    splits = read(yml)
    check_same(splits, images)
    assert told(splits) == {}


# Lists.


def write_lists(root, images, line="images/{split}/{stem}.jpg", end="\n"):
    "A YOLO data set whose splits are list files."
    yml = write_yolo(root, images)
    for split in ("train", "val"):
        lines = [line.format(split=split, stem=m.stem) for m in images if m.split == split]
        (root / f"{split}.txt").write_bytes(end.join([*lines, ""]).encode())
    yml.write_text("train: train.txt\nval: val.txt\nnames: [c0, c1]\n")
    return yml


@situation(
    "partners",
    "A list with CRLF line ends, empty lines, blanks at line ends, a byte-order mark",
    "read",
)
@pytest.mark.parametrize("end", ["\r\n", "\n\n", "  \n", "\t\r\n", "\r\n  \r\n"])
def test_line_ends_of_a_list(images, tmp_path, end):
    yml = write_lists(tmp_path / "set", images, end=end)
    file = yml.parent / "train.txt"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    splits = read(yml)
    check_same(splits, images)
    assert told(splits) == {}


@situation(
    "partners",
    "A list written on Windows, from another folder, or by CVAT (`images\\train\\a.jpg`, "
    "`./images/train/a.jpg`, `data/images/train/a.jpg`)",
    "read; what stands in front of a path that is not there is dropped",
)
@pytest.mark.parametrize(
    "line",
    [
        "images\\{split}\\{stem}.jpg",
        "./images/{split}/{stem}.jpg",
        ".\\images\\{split}\\{stem}.jpg",
        "data/images/{split}/{stem}.jpg",
        "/content/set/images/{split}/{stem}.jpg",
        "C:\\Users\\me\\set\\images\\{split}\\{stem}.jpg",
    ],
)
def test_paths_of_a_list(images, tmp_path, line):
    splits = read(write_lists(tmp_path / "set", images, line))
    check_same(splits, images)
    assert set(told(splits)) <= {"listed paths read otherwise"}


@situation(
    "partners",
    "A list names an image that is not there",
    "counted as an image without file; above 5 % refused, and the first is named",
)
@pytest.mark.parametrize("source", ["yolo", "voc", "coco"])
def test_a_list_names_an_absent_image(many, tmp_path, source):
    root = tmp_path / "set"
    if source == "yolo":
        opened = write_lists(root, many)
    else:
        opened = dict(voc=write_voc, coco=write_coco)[source](root, many)
    folder = "JPEGImages" if source == "voc" else "images/train"
    (root / folder / f"{many[0].stem}.jpg").unlink()
    splits = read(opened)
    check_same(splits, many[1:])
    counts = told(splits)
    assert counts.pop("image without file") == 1
    assert set(counts) <= {"annotation of a lost image", "label file without image"}
    for m in many[1:9]:
        (root / folder / f"{m.stem}.jpg").unlink()
    with pytest.raises(ValueError, match=f"9 of 40 images .*{many[0].stem}.jpg"):
        read(opened)


@situation(
    "partners",
    "All images of a list are missing, the label files with them",
    "refused: the images are missing, not the label files; the first is named",
)
def test_all_images_are_missing(images, tmp_path):
    yml = write_lists(tmp_path / "set", images, "elsewhere/{split}/{stem}x.jpg")
    with pytest.raises((ValueError, OSError), match="elsewhere/train/train000x.jpg") as caught:
        read(yml)
    assert "label" not in str(caught.value)


# COCO and VOC.


@situation(
    "partners",
    "COCO: `file_name` is a path of Windows, of a server, or has `%20` for blanks",
    "the image of that name is read, if there is one",
)
@pytest.mark.parametrize(
    "file_name",
    [
        "images\\{stem}.jpg",
        "../../label-studio/data/media/upload/1/{stem}.jpg",
        "/data/upload/1/{stem}.jpg",
        "C:\\Users\\me\\{stem}.jpg",
    ],
)
@pytest.mark.parametrize("layout", ["images/{stem}.jpg", "images/{split}/{stem}.jpg"])
def test_paths_of_coco(images, tmp_path, file_name, layout):
    splits = read(write_coco(tmp_path / "set", images, layout, file_name=file_name))
    check_same(splits, images)
    assert told(splits) == {"listed paths read otherwise": 2}


def test_blanks_as_percent_20(images, tmp_path):
    images = renamed(images, "my {stem}")
    root = write_coco(tmp_path / "set", images, file_name="images/my%20{stem}.jpg")
    for file in (root / "annotations").iterdir():
        file.write_text(file.read_text().replace("%20my ", "%20"))
    check_same(read(root), images)


@situation(
    "partners",
    "COCO: none of the images is where `file_name` says",
    "refused: the folders that were looked in, and the first name",
)
def test_coco_images_in_folders_below(images, tmp_path):
    root = write_coco(tmp_path / "set", images, "images/{split}/camera 1/{stem}.jpg")
    with pytest.raises(FileNotFoundError, match="images/train,.* the first is 'train000.jpg'"):
        read(root)


@situation(
    "partners",
    "COCO: an image in the folder that the JSON does not name",
    "counted; it is no part of the split",
)
def test_coco_image_that_is_not_listed(images, tmp_path):
    root = write_coco(tmp_path / "set", images)
    more = drawn(tmp_path / "more", train=2, val=0, seed=1)
    for m in renamed(more, "more{stem}"):
        put(m.file, image_file(root, m))
    splits = read(root)
    check_same(splits, images)
    assert told(splits) == {"image file in no split": 2}


@situation(
    "partners",
    'COCO: ids that are text in one list and numbers in the other (`"image_id": "7"`)',
    "skipped and counted, with the cause",
)
@pytest.mark.parametrize("key", ["image_id", "category_id"])
def test_coco_ids_as_text(images, tmp_path, key):
    def change(split, content):
        for note in content["annotations"]:
            note[key] = str(note[key])

    splits = read(write_coco(tmp_path / "set", images, change=change))
    ((kind, n),) = told(splits).items()
    assert kind.endswith("(text in one list, a number in the other)")
    assert n == 18


@situation(
    "partners",
    "COCO: annotations of an unknown image or category; the same image twice",
    "counted by kind, the rest is read",
)
def test_coco_annotations_without_partner(images, tmp_path):
    def change(split, content):
        if split == "train":
            notes = content["annotations"]
            notes += [dict(notes[0], id=900, image_id=77), dict(notes[0], id=901, category_id=9)]
            content["images"].append(dict(content["images"][0]))

    splits = read(write_coco(tmp_path / "set", images, change=change))
    check_same(splits, images)
    kinds = {"annotation of an unknown image", "unknown category", "image listed twice"}
    assert told(splits) == dict.fromkeys(kinds, 1)


@situation(
    "partners",
    "VOC: images with another suffix than `.jpg`, or in capitals; `<filename>` with or without it",
    "found by `<filename>`, else by the name of the XML and any readable suffix",
)
@pytest.mark.parametrize("suffix", [".png", ".JPG", ".jpeg", ".bmp"])
@pytest.mark.parametrize("filename", ["{stem}.jpg", "{stem}", "{stem}.png"])
def test_suffixes_of_voc(images, tmp_path, suffix, filename):
    root = write_voc(tmp_path / "set", images, filename=filename)
    for m in images:
        file = root / f"JPEGImages/{m.stem}.jpg"
        file.rename(file.with_suffix(suffix))
    splits = read(root)
    check_same(splits, images)
    assert told(splits) == {}


@situation(
    "partners",
    "VOC: the image is called as `<filename>` says, the XML otherwise",
    "the image of `<filename>` is read",
)
def test_filename_of_voc(images, tmp_path):
    root = write_voc(
        tmp_path / "set", images, "JPEGImages/img-{stem}.jpg", filename="img-{stem}.jpg"
    )
    splits = read(root)
    check_same(splits, images)
    assert told(splits) == {}


@situation(
    "partners",
    "VOC: every `<filename>` is that of one image (copied from a template)",
    "the images are those that are called like the XML",
)
def test_the_same_filename_in_all_voc_files(images, tmp_path):
    splits = read(write_voc(tmp_path / "set", images, filename="train000.jpg"))
    check_same(splits, images)
    assert told(splits) == {}


@situation(
    "partners",
    "VOC: a name of the list has no XML; an XML that no list names",
    "both counted",
)
def test_voc_partners(many, tmp_path):
    root = write_voc(tmp_path / "set", many)
    (root / f"Annotations/{many[0].stem}.xml").unlink()
    lines = (root / "ImageSets/Main/train.txt").read_text().replace(f"{many[1].stem}\n", "")
    (root / "ImageSets/Main/train.txt").write_text(lines)
    splits = read(root)
    counts = told(splits)
    assert counts.pop("XML in no list") >= 1
    assert counts == {"image without XML": 1, "image file in no split": 2}


# The same thing twice.


@situation(
    "twice",
    "A box twice in a label file, an annotation twice in a JSON or XML",
    "counted by `mhdet data`, and kept",
)
@pytest.mark.parametrize("source", ["yolo", "coco", "voc"])
def test_boxes_given_twice(images, tmp_path, source):
    twice = [replace(m, boxes=[*m.boxes, m.boxes[0]]) for m in images[:3]] + images[3:]
    write = dict(yolo=write_yolo, coco=write_coco, voc=write_voc)[source]
    splits = read(write(tmp_path / "set", twice))
    check_same(splits, twice)
    assert told(splits) == {"same box twice": 3}


@situation(
    "twice",
    "One box with two classes",
    "both are read: an object may have two labels",
)
@pytest.mark.parametrize("write", [write_yolo, write_coco, write_voc])
def test_one_box_with_two_classes(images, tmp_path, write):
    both = [replace(m, boxes=[(0, 5, 6, 20, 30), (1, 5, 6, 20, 30)]) for m in images]
    splits = read(write(tmp_path / "set", both))
    check_same(splits, both)
    assert told(splits) == {}


@situation(
    "twice",
    "A list names an image twice, in one or two spellings (`a.jpg`, `./a.jpg`)",
    "counted, and used once",
)
@pytest.mark.parametrize("again", ["images/train/train000.jpg", "./images/train//train000.jpg"])
def test_image_listed_twice(images, tmp_path, again):
    yml = write_lists(tmp_path / "set", images)
    with (yml.parent / "train.txt").open("a") as f:
        f.write(again + "\n")
    splits = read(yml)
    check_same(splits, images)
    assert told(splits) == {"image listed twice": 1}


@situation(
    "twice",
    "Of two folders of a split one lies in the other (`train: [images, images/train]`)",
    "counted, and used once",
)
def test_folder_inside_a_folder(images, tmp_path):
    yml = write_yolo(tmp_path / "set", in_train(images))
    yml.write_text("train: [images, images/train]\nnames: [c0, c1]\n")
    splits = read(yml)
    check_same(splits, in_train(images))
    assert told(splits) == {"image listed twice": 6}


@situation(
    "twice",
    "`annotations/trainval.json` alone: its name says train and val",
    "it is train; it never serves as two splits",
)
@pytest.mark.parametrize("name", ["trainval", "instances_trainval", "train_val2017"])
def test_trainval_is_not_two_splits(images, tmp_path, name):
    images = in_train(images)
    annotations = f"annotations/{name}.json"
    root = write_coco(tmp_path / "set", images, "images/{stem}.jpg", annotations)
    try:
        splits = read(root)
    except ValueError as e:
        assert f"{name}.json" in str(e)
    else:
        assert list(splits) == ["train"]
