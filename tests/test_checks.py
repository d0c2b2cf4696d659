"""What can be known before a run begins is refused or told, and no figure that is unknown is lost.

Data sets are drawn here: a few images of coloured rectangles.
"""

import contextlib
import io
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from typer.testing import CliRunner

from mhdet.cli.commands import app
from mhdet.core.config import load_config
from mhdet.core.runs import JsonLog
from mhdet.data.splits import open_data
from mhdet.experiment import run as experiment
from mhdet.experiment.history import load_runs, plot_runs
from mhdet.experiment.plateau import plateau
from mhdet.training.learner import Callback

TINY = "imgsz=64 batch=4 epochs=1 extra_epochs=1 workers=0 device=cpu width=0.125 precision=fp32"
COLORS = [(230, 40, 40), (40, 200, 60), (50, 80, 240)]
SIDE = 64


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def mhdet(line):
    "Exit code, stdout, stderr."
    found = CliRunner().invoke(app, shlex.split(line))
    return found.exit_code, found.stdout, found.stderr


def works(line):
    code, out, err = mhdet(line)
    assert code == 0, err
    assert "None" not in out + err
    return out, err


def refused(line):
    "The one line of an error."
    code, out, err = mhdet(line)
    assert (code, out) == (2, ""), (code, out, err)
    assert err.startswith("mhdet: ") and err.count("\n") == 1 and "None" not in err, err
    assert "Error:" not in err
    return err


def drawn(rng, nc):
    "An image, and its two boxes as (class, x, y, w, h) px."
    image = Image.new("RGB", (SIDE, SIDE), tuple(int(v) for v in rng.integers(90, 140, 3)))
    boxes = []
    for _ in range(2):
        w, h, x, y = (int(v) for v in rng.integers((12, 12, 0, 0), (30, 30, 32, 32)))
        c = int(rng.integers(nc))
        ImageDraw.Draw(image).rectangle((x, y, x + w - 1, y + h - 1), fill=COLORS[c % 3])
        boxes.append((c, x, y, w, h))
    return image, boxes


def yolo(names=("c0", "c1"), train=24, val=6):
    "A YOLO data set in ./d, and its YAML."
    rng = np.random.default_rng(0)
    for split, n in (("train", train), ("val", val)):
        images, labels = Path("d/images", split), Path("d/labels", split)
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        for i in range(n):
            image, boxes = drawn(rng, len(names))
            image.save(images / f"{split}{i:03d}.png")
            lines = []
            for c, x, y, w, h in boxes:
                shares = np.array([x + w / 2, y + h / 2, w, h]) / SIDE
                lines.append(f"{c} {' '.join(map(str, shares))}\n")
            (labels / f"{split}{i:03d}.txt").write_text("".join(lines))
    write_names(names)
    return "d/data.yaml"


def write_names(names):
    text = f"train: images/train\nval: images/val\nnames: {json.dumps(list(names))}\n"
    Path("d/data.yaml").write_text(text)


def coco(beyond=(1, 6)):
    "A COCO data set in ./d; these boxes of val lie past the right edge of their image."
    rng = np.random.default_rng(0)
    categories = [{"id": 1, "name": "c0"}, {"id": 2, "name": "c1"}]
    Path("d/annotations").mkdir(parents=True)
    for split, n in (("train", 24), ("val", 6)):
        Path("d/images", split).mkdir(parents=True)
        images, notes = [], []
        for i in range(n):
            image, boxes = drawn(rng, 2)
            name = f"{split}{i:03d}.png"
            image.save(Path("d/images", split, name))
            images.append({"id": i, "file_name": name, "width": SIDE, "height": SIDE})
            for c, *xywh in boxes:
                note = {"id": len(notes), "image_id": i, "category_id": c + 1, "bbox": xywh}
                notes.append(note | {"area": xywh[2] * xywh[3], "iscrowd": 0})
        for k in beyond if split == "val" else ():
            notes[k]["bbox"][0] = SIDE + 1
        truth = {"images": images, "annotations": notes, "categories": categories}
        Path(f"d/annotations/instances_{split}.json").write_text(json.dumps(truth))
    return "d"


def empty_labels(split, data):
    for image_id in open_data(data)[split].ids:
        Path("d/labels", "val" if split == "val" else "train", f"{image_id}.txt").write_text("")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_dev_without_boxes_trains_and_ap_is_a_dash(here):
    data = yolo()
    empty_labels("dev", data)
    out, err = works(f"train --data {data} run=k {TINY}")
    assert f"{data}: dev has no boxes: AP50 stays unknown, and no best/ is kept" in err
    header, row = (line.split() for line in out.splitlines())
    assert dict(zip(header, row, strict=True))["AP50"] == "-"
    assert json.loads(works("runs --json")[0])[0]["best"] is None
    works("train --resume k epochs=2")
    works("plot k")
    works("eval k")
    works("confuse k")
    assert "no state 'best' in runs/k; there is last" in refused("eval k@best")
    err = refused(f"train --data {data} run=early early_stop=1 {TINY}")
    assert "early_stop: expected a dev split with boxes, got none" in err
    err = refused(f"study s --data {data} --num-heads 2 {TINY}")
    assert "dev has no boxes (" in err and "images, none with an object)" in err
    assert not Path("runs/s").exists() and not Path("runs/early").exists()


def test_an_unknown_ap_is_shown_drawn_and_stored(here):
    "On a terminal, in the table of runs, in the figures, in the verdict on the last epochs."
    data = yolo()
    empty_labels("dev", data)
    cfg = load_config(*TINY.split(), f"data={data}", "run=k", "epochs=3")
    stderr, stdout = contextlib.redirect_stderr(Terminal()), contextlib.redirect_stdout(Terminal())
    with pytest.warns(UserWarning, match="dev has no boxes"), stderr, stdout as shown:
        run = experiment.train(cfg)
    assert shown.getvalue().count("AP50 -") == 3
    rows = JsonLog(run / "log.jsonl").rows()
    assert [row["AP50"] for row in rows] == [None] * 3
    assert plateau(rows)["verdict"] == "undecided"
    assert load_runs("runs")["AP50"].isna().all()
    plot_runs({"k": run})


def test_val_without_boxes(here):
    "It is evaluated, with dashes; a study refuses before it trains, and says why there are none."
    data = yolo()
    for file in Path("d/labels/val").glob("*.txt"):
        lines = file.read_text().splitlines()
        file.write_text("".join(f"{line} 0.87 0.9 7\n" for line in lines))
    err = works(f"train --data {data} run=k {TINY}")[1]
    assert "val has no boxes: its AP will be unknown" in err and "12 of 12 boxes skipped" in err
    for command in ("eval k", "confuse k --split val", "errors k --split val", "calibrate k"):
        out, err = works(command)
        assert "12 of 12 boxes skipped" in err, command
    rows = [line.split() for line in works("eval k")[0].splitlines()]
    assert ["coco", *["-"] * 12] in rows
    err = refused(f"study v --data {data} --num-heads 2 {TINY}")
    assert f"{data}: val has no boxes (val: 12 of 12 boxes skipped" in err
    assert not Path("runs/v").exists()


REFUSED = {
    "train imgsz=32 batch=1": "batch=1 imgsz=32: batch-norm needs more than one value",
    "train batch=1 multi_scale=[32,64]": "batch=1 multi_scale=[32, 64]: batch-norm needs more",
    "train batch=40": "images, fewer than batch=40; give batch=",
    "train heads=absent.yaml": "absent.yaml",
    "train weights=absent": "absent: no run there",
    "train precision=fp16": "precision: fp16 needs CUDA",
    "study s extra_epochs=0": "extra_epochs=0: expected 1 or more",
    "study s --num-heads 3": "--num-heads: must be 1..2 for 2 classes, got 3",
    "study s --num-heads 0": "--num-heads: must be 1..2 for 2 classes, got 0",
    "study s --num-heads 1": "--num-heads 1: nothing is partitioned and nothing compared",
    "study s precision=fp16": "precision: fp16 needs CUDA",
    "study s arm.stages=[{'epochs':1}] extra_epochs=2": "arm.epochs: 2, but the stages have 1",
    "study s batch=40": "images, fewer than batch=40; give batch=",
    "study s --seeds 0": "--seeds: at least 1, got 0",
}


def test_refused_before_anything_is_made(here):
    data = yolo()
    for line, words in REFUSED.items():
        command, *rest = line.split()
        err = refused(f"{command} --data {data} {TINY} {shlex.join(rest)}")
        assert words in err, (line, err)
        assert not [p for p in Path("runs").glob("*") if p.name != ".cache"], line
    Path("sweep-a.yaml").write_text(
        f"base: {{data: {data}, imgsz: 32, batch: 4, width: 0.125, workers: 0, device: cpu}}\n"
        "rows: {good: {}, bad: {batch: 1}}\n"
    )
    err = refused("sweep sweep-a.yaml")
    assert "sweep-a.yaml: row bad_s0: batch=1 imgsz=32: batch-norm" in err
    assert not Path("runs/a").exists()
    for works_with in ("norm_layer=gn imgsz=32 batch=1", "batch=2 imgsz=32", "batch=1 imgsz=64"):
        works(f"train --data {data} {TINY} {works_with}")


def test_train_without_boxes(here):
    data = yolo()
    for split in ("train", "dev"):
        empty_labels(split, data)
    assert f"{data}: train has no boxes (" in refused(f"train --data {data} run=k {TINY}")
    assert not Path("runs/k").exists()


def test_one_class_has_nothing_to_partition(here):
    data = yolo(["c0"])
    err = refused(f"study s --data {data} {TINY}")
    assert f"{data}: one class: there is nothing to partition" in err
    assert not Path("runs/s").exists()
    works(f"train --data {data} run=k {TINY}")
    assert "1 class: 1 head is used, not 4" in works("partition k --strategy random")[1]


@pytest.mark.slow
def test_a_class_called_background_and_fewer_classes_than_heads(here):
    data = yolo(["background", "objects of"])
    out, err = works(f"study s --data {data} {TINY}")
    assert "2 classes: 2 heads are used, not 4" in err
    works("confuse s/split-s0 --out C.csv --conf 0.001")
    out, err = works("partition --confusion C.csv --out H.yaml")
    assert "2 classes: 2 heads are used, not 4" in err and "heads: 2" in out
    blocks = works("confuse s/split-s0 --heads H.yaml")[0].split("\n\n")[-1].splitlines()
    # two heads, named after their only class, and the background: no column hides another
    head = " ".join(blocks[0].split())
    assert head == "objects of background objects of (1) background (2)"
    for command in ("eval s/split-s0", "plot s/split-s0", "errors s/split-s0"):
        works(command)
    assert "must be 1..2 for 2 classes" in refused("partition --confusion C.csv --num-heads 3")


def test_resume_with_fewer_epochs_or_other_data(here):
    data = yolo()
    works(f"train --data {data} run=k {TINY} epochs=2")
    config = Path("runs/k/config.yaml").read_bytes()
    assert "2 epochs are done, epochs=1 is fewer" in refused("train --resume k epochs=1")
    lost = open_data(data)["train"].files[0]
    kept = lost.read_bytes()
    lost.unlink()
    err = refused("train --resume k epochs=3")
    assert (
        f"train is not what it was when runs/k began: 1 of 18 images are gone ({lost.stem})" in err
    )
    lost.write_bytes(kept)
    new = lost.with_name("new.png")
    new.write_bytes(Path("d/images/val/val000.png").read_bytes())
    assert "1 are new (new)" in refused("train --resume k epochs=3")
    new.unlink()
    write_names(["c0", "c1", "more"])
    assert "its classes are not those of run runs/k: new: more" in refused("train --resume k")
    assert f"{data}: its classes are not those of run k: new: more" in refused("eval k")
    assert f"{data}: its classes are not those of run k: new: more" in refused("confuse k")
    write_names(["c1", "c0"])
    assert "not those of run k: in another order" in refused("eval k")
    write_names(["c0", "c1"])
    assert Path("runs/k/config.yaml").read_bytes() == config  # a refusal changes nothing
    label = Path("d/labels/train", f"{lost.stem}.txt")
    label.write_text(label.read_text().splitlines()[0] + "\n")
    err = works("train --resume k epochs=3")[1]
    assert f"1 have another number of boxes ({lost.stem})" in err


def test_an_evaluation_of_other_images_than_before_says_so(here):
    data = yolo()
    works(f"train --data {data} run=k {TINY}")
    assert works("eval k")[1] == ""
    Path("d/images/val/val003.png").unlink()
    Path("d/labels/val/val003.txt").unlink()
    for command in ("eval k", "confuse k --split val", "errors k k --split val"):
        err = works(command)[1]
        words = "val is not what it was when runs/k began: 1 of 6 images are gone (val003)"
        assert err.count(words) == 1, command


class Fails(Callback):
    "Ends the first epoch with an error, as a full disk does."

    def __init__(self, hook):
        self.hook = hook
        setattr(self, hook, self.fail)

    def fail(self, learner):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("hook", ["before_fit", "after_batch", "after_epoch"])
@pytest.mark.filterwarnings("ignore:.*no label:UserWarning")
def test_a_run_that_failed_in_its_first_epoch_goes_on(here, hook):
    data = yolo()
    cfg = load_config(*TINY.split(), f"data={data}", "precision=fp32", "epochs=2")
    whole = experiment.train(cfg.override(run="whole"), quiet=True)
    with pytest.raises(OSError, match="No space"):
        experiment.train(cfg.override(run="k"), quiet=True, more=[Fails(hook)])
    assert load_runs("runs").set_index("run")["state"]["k"] == "failed"
    if hook == "before_fit":  # nothing was stored at all
        for file in Path("runs/k/last").iterdir():
            file.unlink()
        Path("runs/k/last").rmdir()
    assert "exists already; give another run= or --resume k" in refused(
        f"train --data {data} run=k {TINY}"
    )
    works("train --resume k")
    logs = [JsonLog(run / "log.jsonl").rows() for run in (whole, Path("runs/k"))]
    figures = [[(row["epoch"], row["train/loss"], row["AP50"]) for row in rows] for rows in logs]
    assert figures[0] == figures[1]


def test_a_run_that_could_not_be_made_leaves_its_name_free(here, monkeypatch):
    data = yolo()

    def no_memory(*args):
        raise RuntimeError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "Learner", no_memory)
        assert mhdet(f"train --data {data} run=k {TINY}")[0] == 2
    assert not Path("runs/k").exists()
    works(f"train --data {data} run=k {TINY}")


def test_what_was_skipped_is_told_and_kept(here):
    "The same line in every command, and none where nothing was skipped."
    data = coco()
    line = "mhdet: val: 2 of 12 boxes skipped: outside its image; the first: instances_val.json: "
    err = works(f"train --data {data} run=k {TINY}")[1]
    assert err == f"{line}annotation 1; `mhdet data d` lists them\n"
    env = json.loads(Path("runs/k/env.json").read_text())
    assert env["data_problems"] == {"val": {"box outside its image": 2}}
    for command in ("eval k", "confuse k --split val", "errors k k --split val", "calibrate k"):
        assert works(command)[1].count(line) == 1, command
    for command in ("confuse k", "errors k", "partition --data d --strategy random"):
        assert "skipped" not in works(command)[1], command
    gt, dt = "d/annotations/instances_val.json", "runs/k/detections.json"
    told = f"{gt}: 2 of 12 boxes count as objects here, but are skipped where the file is read as a"
    for command in ("eval", "confuse", "errors"):
        assert works(f"{command} --gt {gt} --dt {dt}")[1].count(told) == 1, command
    draws = "--replicates 20 --swaps 0"
    assert told in works(f"compare --gt {gt} --a {dt} --b {dt} {draws}")[1]
    own = json.loads(works("eval k --json")[0])
    same = json.loads(works(f"eval --gt d --dt {dt} --json")[0])
    assert own["coco"] == same["coco"]


@pytest.mark.slow
def test_a_study_tells_each_line_once(here):
    data = coco()
    out, err = works(f"study s --data {data} --arms control {TINY}")
    assert err.count("boxes skipped") == 1
    assert works("study s --resume")[1].count("boxes skipped") == 1


@pytest.mark.slow
def test_an_image_in_two_splits(here):
    data = yolo()
    train = open_data(data)["train"].files[2]
    Path("d/images/val/copy.png").write_bytes(train.read_bytes())
    label = Path("d/labels/train", f"{train.stem}.txt").read_text()
    Path("d/labels/val/copy.txt").write_text(label)
    found = f"{data}: 1 of 7 images of val are in train too; the first: "
    err = works(f"train --data {data} run=k {TINY}")[1]
    assert found in err and "copy.png" in err and err.count("\n") == 1
    err = refused(f"study s --data {data} {TINY}")
    assert found in err and "--allow-leak" in err
    assert not Path("runs/s").exists()
    out, err = works(f"study s --data {data} {TINY} --allow-leak")
    assert err.count(found) == 1
    assert found in Path("runs/s/report.md").read_text()
    assert found in json.loads(Path("runs/s/study.json").read_text())["leaks"][0]


def test_a_changed_data_set_ends_a_study_that_goes_on(here):
    data = yolo()
    works(f"study s --data {data} --arms control {TINY}")
    open_data(data)["train"].files[0].unlink()
    assert "train is not what it was when runs/s/base-s0 began" in refused("study s --resume")


def test_what_is_found_while_decoding_is_told_too(here):
    data = yolo()
    victim = open_data(data)["train"].files[1]
    victim.write_bytes(victim.read_bytes()[:-60])
    for line in (f"train --data {data} run=k {TINY}", "eval k --split train"):
        err = works(line)[1]
        assert "train: 1 of 24 images left out: unreadable image; the first: " in err
        assert victim.name in err and err.count("\n") == 1
    env = json.loads(Path("runs/k/env.json").read_text())
    assert env["data_problems"] == {"train": {"unreadable image": 1}}
