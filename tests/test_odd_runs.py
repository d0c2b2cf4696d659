"""Odd inputs of the commands, one test per situation: what is told, what is refused before work
begins, and what is written."""

import json
import multiprocessing
import shutil
from dataclasses import replace

import pytest
from odd import (
    drawn,
    place,
    put,
    situation,
    write_coco,
    write_voc,
    write_yolo,
)
from PIL import Image

import mhdet.cli.commands  # noqa: F401 - registers the commands
from mhdet.cli.grammar import run_line
from mhdet.data.splits import _is_dev

TINY = "imgsz=64 batch=4 epochs=1 workers=0 device=cpu width=0.125 precision=fp32"
LABELS = "labels/{split}/{stem}.txt"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A working directory with a data set, in three formats, and a run on it."
    folder = tmp_path_factory.mktemp("runs")
    images = drawn(folder / "drawn", train=24, val=8)
    write_yolo(folder / "yolo", images)
    write_coco(folder / "coco", images)
    write_voc(folder / "voc", images)
    done(f"train --data yolo/data.yaml run=a {TINY}", folder)
    return folder, images


@pytest.fixture
def here(trained, tmp_path):
    "A copy of it, and the images."
    folder, images = trained
    shutil.copytree(folder, tmp_path / "here")
    return tmp_path / "here", images


@pytest.fixture
def images(tmp_path):
    return drawn(tmp_path / "drawn", train=24, val=8)


def done(line, folder):
    "What a command prints to stdout; it must end with 0."
    code, out, err = run_line(line, folder)
    assert code == 0, err
    return out + err


def refused(line, folder, *words, runs=False):
    "The one line of a refused command; nothing was made, unless `runs`."
    before = sorted(folder.rglob("runs/*"))
    code, out, err = run_line(line, folder)
    assert code == 2, out + err
    last = err.strip().splitlines()[-1]
    assert last.startswith("mhdet: ") and "Error" not in last and "--debug" not in last, last
    for word in words:
        assert word in last, last
    if not runs:
        assert sorted(folder.rglob("runs/*")) == before
    return last


# What is told.


def skip_boxes(root, images, n=3):
    "Move the first boxes of val outside their images, in all three formats that are there."
    val = [m for m in images if m.split == "val"][:n]
    outside = {
        m.stem: replace(m, boxes=[(c, x + 200, y, w, h) for c, x, y, w, h in m.boxes]) for m in val
    }
    return [outside.get(m.stem, m) for m in images]


@pytest.fixture(scope="module")
def skipping(tmp_path_factory):
    "A data set with 6 of 16 boxes of val outside their images, and a run on it."
    folder = tmp_path_factory.mktemp("skips")
    images = drawn(folder / "drawn", train=24, val=8)
    write_coco(folder / "data", skip_boxes(folder, images))
    told = done(f"train --data data run=a {TINY}", folder)
    return folder, told


@situation(
    "told",
    "Boxes of val lie outside their images: `mhdet train`, `study`, `eval`, `confuse`, `errors`",
    "one line says how many of how many, why, and which is the first",
)
@pytest.mark.parametrize(
    "line", ["train", "eval a", "confuse a --split val", "errors a --split val"]
)
def test_skipped_boxes_are_told(skipping, line):
    folder, told = skipping
    told = told if line == "train" else done(line, folder)
    line = next(s for s in told.splitlines() if "val: 6 of 16 boxes" in s)
    assert "outside" in line and "instances_val.json" in line and "mhdet data" in line


@situation(
    "told",
    "The same, later",
    "`env.json` of the run holds the counts",
)
def test_skipped_boxes_are_stored(skipping):
    folder, _ = skipping
    env = json.loads((folder / "runs/a/env.json").read_text())
    assert "outside" in json.dumps(env) and "6" in json.dumps(env)


@situation(
    "told",
    "`eval RUN` skips boxes of its data set, `eval --gt --dt` reads the same files",
    "the same figures, or a line that explains the difference",
)
def test_eval_of_a_run_and_of_its_files(skipping):
    folder, _ = skipping
    run = done("eval a --metric coco", folder)
    truth = "data/annotations/instances_val.json"
    files = done(f"eval --metric coco --gt {truth} --dt runs/a/detections.json", folder)
    figures = [s.splitlines()[-1] for s in (run, files)]
    assert figures[0] == figures[1] or "6 of 16 boxes" in files


@situation(
    "told",
    "A data set without any fault",
    "nothing is told",
)
@pytest.mark.parametrize("data", ["yolo/data.yaml", "coco", "voc"])
def test_nothing_to_tell(trained, data):
    folder, _ = trained
    assert "nothing wrong" in done(f"data {data}", folder)
    told = done(f"eval a --data {data}", folder)
    assert "skipped" not in told and "mhdet data" not in told


@situation(
    "told",
    "The classes of the data are no longer those of the run",
    "refused: the data set is named, and what differs",
)
def test_other_classes_than_the_run(here):
    folder, _ = here
    yml = folder / "yolo/data.yaml"
    text = yml.read_text().replace("nc: 2", "nc: 3").replace("- c1", "- c1\n- new")
    yml.write_text(text)
    refused("eval a", folder, "data.yaml", "classes", "a")


@situation(
    "told",
    "A folder, a YAML or a list that is not there",
    "one line names it",
)
@pytest.mark.parametrize("what", ["absent", "absent.yaml", "yolo/absent"])
def test_nothing_there(trained, what):
    refused(f"data {what}", trained[0], what)


@situation(
    "told",
    "An image in two splits, under whatever name: `mhdet data`, `mhdet study`",
    "counted; `study` refuses it unless `--allow-leak`",
)
@pytest.mark.parametrize(
    "how", ["same folder", "val in train", "copies", "links", "another format"]
)
def test_leaks(images, tmp_path, how):
    root = tmp_path / "set"
    yml = write_yolo(root, images)
    val = [m for m in images if m.split == "val"]
    text = yml.read_text()
    if how == "same folder":
        yml.write_text(text.replace("images/val", "images/train"))
    elif how == "val in train":
        yml.write_text(text.replace("train: images/train", "train: images"))
    for i, m in enumerate(val[:4]):
        file = place(root, "images/{split}/{stem}.jpg", replace(m, split="train", stem=f"other{i}"))
        if how == "copies":
            shutil.copy(m.file, file)
        elif how == "links":
            file.symlink_to(place(root, "images/{split}/{stem}.jpg", m))
        elif how == "another format":
            with Image.open(m.file) as image:
                image.save(file.with_suffix(".png"))
        else:
            continue
        shutil.copy(place(root, LABELS, m), root / f"labels/train/other{i}.txt")
    n = {"same folder": 24, "val in train": 8}.get(how, 4)
    assert f"{n} of" in done(f"data {yml}", tmp_path)
    line = f"study s --data {yml} --heads 2 {TINY} extra_epochs=1"
    line = line.replace("--heads", "--num-heads")
    refused(line, tmp_path, "val", "train", "--allow-leak")


# Checks before work begins.


@situation(
    "checks",
    "A split has images and no boxes: val",
    "`train` goes on, with AP unknown, or refuses; `study` refuses before it trains",
)
@pytest.mark.parametrize("command", ["train", "study"])
def test_val_without_boxes(images, tmp_path, command):
    empty = [replace(m, boxes=[]) if m.split == "val" else m for m in images]
    yml = write_yolo(tmp_path / "set", empty)
    if command == "study":
        refused(f"study s --data {yml} {TINY} extra_epochs=1 --num-heads 2", tmp_path, "val", "box")
    else:
        code, _, err = run_line(f"train --data {yml} run=k {TINY}", tmp_path)
        assert code == 0 or ("val" in err and "box" in err and not (tmp_path / "runs/k").exists())


@situation(
    "checks",
    "A split has images and no boxes: dev, the share that is set aside of train",
    "`train` refuses or goes on with AP unknown; `study` refuses",
)
@pytest.mark.parametrize("command", ["train", "study"])
def test_dev_without_boxes(images, tmp_path, command):
    empty = []
    for m in images:
        in_dev = m.split == "train" and _is_dev(m.stem, 0.15)
        empty.append(replace(m, boxes=[]) if in_dev else m)
    yml = write_yolo(tmp_path / "set", empty)
    if command == "study":
        refused(f"study s --data {yml} {TINY} extra_epochs=1 --num-heads 2", tmp_path, "dev", "box")
    else:
        code, _, err = run_line(f"train --data {yml} run=k {TINY} epochs=2", tmp_path)
        assert code == 0 or ("dev" in err and "box" in err and not (tmp_path / "runs/k").exists())


@situation(
    "checks",
    "No box in the whole data set",
    "refused before a run is made",
)
def test_no_boxes(images, tmp_path):
    yml = write_yolo(tmp_path / "set", [replace(m, boxes=[]) for m in images])
    refused(f"train --data {yml} run=k {TINY}", tmp_path, "box")


@situation(
    "checks",
    "One class",
    "`train` works; `study` refuses: there is nothing to part",
)
def test_one_class(tmp_path):
    images = drawn(tmp_path / "drawn", train=24, val=8, nc=1)
    yml = write_yolo(tmp_path / "set", images, names=["thing"])
    done(f"train --data {yml} run=k {TINY}", tmp_path)
    refused(f"study s --data {yml} {TINY} extra_epochs=1", tmp_path, "class")


@situation(
    "checks",
    "Fewer classes than heads",
    "the number of heads that is used is said, or the study is refused",
)
def test_fewer_classes_than_heads(trained):
    folder, _ = trained
    line = f"study few --data yolo/data.yaml {TINY} extra_epochs=1 --num-heads 5"
    code, out, err = run_line(line, folder)
    assert "2" in out + err and "head" in out + err
    if code:
        assert "5" in err and not (folder / "runs/few").exists()


@situation(
    "checks",
    "A class called like a word of ours (`background`, `all`, `mean`, `head`)",
    "it works, or is refused at once",
)
@pytest.mark.parametrize(
    "name", ["background", "all", "mean", "name", "none", "no", "1", "c 0", "ü"]
)
def test_class_names(images, tmp_path, name):
    yml = write_yolo(tmp_path / "set", images, names=[name, "other"])
    code, out, err = run_line(f"train --data {yml} run=k {TINY}", tmp_path)
    if code:
        assert code == 2 and name in err and not (tmp_path / "runs/k").exists()
        return
    done("eval k", tmp_path)
    done("confuse k --split train --out c.csv conf=0.001".replace("conf=", "--conf "), tmp_path)
    done("partition k --num-heads 2 --out h.yaml", tmp_path)


@situation(
    "checks",
    "`width=0.33`, or any other that is no multiple of 1/8",
    "the network is built",
)
@pytest.mark.parametrize("width", ["0.33", "0.0625", "0.2", "0.7"])
def test_widths(trained, width):
    folder, _ = trained
    line = TINY.replace("0.125", width)
    done(f"train --data yolo/data.yaml run=w{width} {line}", folder)


@situation(
    "checks",
    "`batch=1 imgsz=32`: batch normalisation of one value",
    "refused, with what helps; `norm_layer=gn` works",
)
def test_batch_norm_of_one_value(trained):
    folder, _ = trained
    line = TINY.replace("batch=4", "batch=1").replace("imgsz=64", "imgsz=32")
    refused(f"train --data yolo/data.yaml run=b {line}", folder, "batch", "norm_layer=gn")
    done(f"train --data yolo/data.yaml run=gn norm_layer=gn {line}", folder)


@situation(
    "checks",
    "`--resume` with fewer epochs than are done",
    "refused",
)
def test_resume_with_fewer_epochs(here):
    folder, _ = here
    done("train --resume a epochs=2", folder)
    refused("train --resume a epochs=1", folder, "epochs", "2")


@situation(
    "checks",
    "A run that failed in its first epoch, or whose data set lost images since",
    "goes on once the cause is gone; lost images are named",
)
def test_resume_after_a_failure(here):
    folder, images = here
    gone = folder / "yolo/images"
    gone.rename(folder / "away")
    refused("train --resume a epochs=2", folder, "images", runs=True)
    (folder / "away").rename(gone)
    for m in images[:3]:
        place(folder / "yolo", "images/{split}/{stem}.jpg", m).unlink()
    code, out, err = run_line("train --resume a epochs=3", folder)
    assert "label file without image" in out + err or "images" in err
    for m in images[:3]:
        put(m.file, place(folder / "yolo", "images/{split}/{stem}.jpg", m))
    done("train --resume a epochs=3", folder)


# Outputs.


@situation(
    "outputs",
    "`detect` on a folder with one file that cannot be read",
    "it is named, the rest is done; exit code 1",
)
def test_detect_with_an_unreadable_image(here):
    folder, _ = here
    (folder / "yolo/images/val/broken.jpg").write_bytes(b"no image")
    code, _, err = run_line("detect a yolo/images/val --out d", folder)
    assert code == 1 and "broken.jpg" in err
    assert len(list((folder / "d").glob("*.png"))) == 8


@situation(
    "outputs",
    "`detect` on images of 8 x 500, 3 x 1500, 1 x 1 px",
    "figures of a bounded size",
)
@pytest.mark.parametrize("size", [(8, 500), (500, 8), (3, 1500), (1, 1)])
def test_detect_on_narrow_images(here, size):
    folder, _ = here
    Image.new("RGB", size, "red").save(folder / "narrow.png")
    done("detect a narrow.png --out d", folder)
    (figure,) = (folder / "d").glob("*.png")
    with Image.open(figure) as drawing:
        assert drawing.width * drawing.height < 4e6


@situation(
    "outputs",
    "`detect` on two images of one name, or of names that differ in signs (`a/b.jpg`, `a_b.jpg`)",
    "one figure each",
)
@pytest.mark.parametrize(
    "names",
    [("x/a.png", "y/a.png"), ("x/a.png", "x/a.jpg"), ("x/a.png", "x_a.png"), ("1.png", "01.png")],
)
def test_detect_on_two_images_of_one_name(here, names):
    folder, _ = here
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (64, 48), "red").save(folder / name)
    done(f"detect a {' '.join(names)} --out d", folder)
    assert len(list((folder / "d").glob("*.png"))) == 2
    ids = {r["image_id"] for r in json.loads((folder / "d/detections.json").read_text())}
    assert len(ids) in (0, 2)


@situation(
    "outputs",
    "The processes that load images",
    "end with the training",
)
def test_loaders_end(trained):
    folder, _ = trained
    before = set(multiprocessing.active_children())
    line = TINY.replace("workers=0", "workers=1")
    done(f"train --data yolo/data.yaml run=loaders {line}", folder)
    assert set(multiprocessing.active_children()) <= before


@situation(
    "outputs",
    "Commands that read a data set",
    "nothing is written or changed in its folder",
)
def test_the_data_set_is_left_as_it_is(here):
    folder, _ = here

    def state():
        files = [f for name in ("yolo", "coco", "voc") for f in (folder / name).rglob("*")]
        return {f: (f.stat().st_size, f.stat().st_mtime_ns) for f in files}

    before = state()
    for data in ("yolo/data.yaml", "coco", "voc"):
        done(f"data {data}", folder)
        done(f"eval a --data {data}", folder)
    assert state() == before


# Words.


@situation(
    "words",
    "`run=` or `data=` with ` #`, quotes, brackets, `true`, `1e3`, accents",
    "taken as it stands",
)
@pytest.mark.parametrize("name", ["try #4", "true", "1e3", "a: b", "[x]", "a'b", "é", "null x"])
def test_names_as_they_stand(trained, name):
    folder, images = trained
    write_yolo(folder / name, images)
    quoted = name.replace("'", "\\'") if "'" in name else f"'{name}'"
    done(f"data data={quoted}/data.yaml", folder)
    done(f"train data={quoted}/data.yaml run={quoted} {TINY}", folder)
    assert (folder / "runs" / name / "config.yaml").is_file()
    if not name.startswith("-"):
        done(f"eval {quoted}", folder)


@situation(
    "words",
    "`run=a@b`, `run=../up`, `run=x/../../y`, `run=.`, `run=-1`",
    "refused: such a run could not be named again, or would lie elsewhere",
)
@pytest.mark.parametrize("name", ["a@b", "-1", "../up", "x/../../y", ".", "..", "a@best"])
def test_names_that_cannot_work(trained, name):
    folder, _ = trained
    refused(f"train --data yolo/data.yaml run={name} {TINY}", folder, "run", name)
    assert not (folder / "up").exists()
