"""The command line.

Exit code 2 and one clear line for bad input, counted problems below 5 %, what survives a signal.
"""

import contextlib
import ctypes
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processes import LIMIT, until
from typer.testing import CliRunner

from mhdet.cli.commands import app
from mhdet.cli.grammar import stdout_to_stderr
from mhdet.core.config import load_config
from mhdet.core.files import read_yaml
from mhdet.core.runs import JsonLog
from mhdet.data.splits import open_data
from mhdet.partition.heads import load_heads
from mhdet.tools import conformance

ROOT = Path(__file__).resolve().parents[1]
TINY = "imgsz=64 batch=8 width=0.125 workers=0 precision=fp32"


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    "A working directory with one trained run."
    folder = tmp_path_factory.mktemp("cli")
    with contextlib.chdir(folder):
        coco(folder / "data")
        assert mhdet(f"train --data data {TINY} epochs=1 run=base")[0] == 0
        yield folder


def mhdet(line):
    "Exit code, stdout, stderr."
    result = CliRunner().invoke(app, shlex.split(line))
    return result.exit_code, result.stdout, result.stderr


def mhdet_json(line):
    code, out, err = mhdet(f"{line} --json")
    assert code == 0 and out.count("\n") == 1, err
    return json.loads(out)


def coco(root, n=100, size=64):
    "A data set of noise with one box per image, classes a to f in turn."
    rng = np.random.default_rng(0)
    categories = [dict(id=k + 1, name=c) for k, c in enumerate("abcdef")]
    for split in ("train", "val"):
        (root / "images" / split).mkdir(parents=True)
        images, annotations = [], []
        for i in range(n):
            pixels = rng.integers(0, 255, (size, size, 3), np.uint8)
            Image.fromarray(pixels).save(root / f"images/{split}/{i}.jpg")
            images.append(dict(id=i, file_name=f"{i}.jpg", width=size, height=size))
            box = dict(bbox=[4, 4, 30, 40], area=1200, iscrowd=0)
            annotations.append(dict(id=i, image_id=i, category_id=i % 6 + 1, **box))
        write(root, split, dict(images=images, annotations=annotations, categories=categories))
    return root


def write(root, split, data):
    (root / "annotations").mkdir(exist_ok=True)
    (root / f"annotations/instances_{split}.json").write_text(json.dumps(data))


def read(root, split):
    return json.loads((root / f"annotations/instances_{split}.json").read_text())


def results(path, detected=0.8, swap=0.0, seed=0):
    "Predictions that detect a share of the objects of val, some with the wrong class."
    rng = np.random.default_rng(seed)
    rows = []
    for a in read(Path("data"), "val")["annotations"]:
        if rng.random() >= detected and path != "a.json":
            continue
        box = [a["bbox"][0] + rng.normal(), *a["bbox"][1:]]
        score = float(rng.beta(4, 2))
        label = a["category_id"] if rng.random() > swap else a["category_id"] % 6 + 1
        rows.append(dict(image_id=a["image_id"], bbox=box, score=score, category_id=label))
    Path(path).write_text(json.dumps(rows))
    return rows


def heads(*groups, names="[a, b, c, d, e, f]"):
    listed = ", ".join(f"head_{i}: {{classes: {g}}}" for i, g in enumerate(groups))
    return f"names: {names}\nhead_assignments: {{{listed}}}"


BAD = {
    "train --data absent": "absent: no such folder or YAML",
    "data absent": "absent: no such folder or YAML",
    "train epoch=3": "unknown key 'epoch'; did you mean 'epochs'?",
    "train --config key.yaml": "key.yaml: unknown key 'learning_rate'",
    "train --config bad.yaml": "bad.yaml: not YAML",
    "train reduce=sum": "reduce: must be 'balanced', 'head' or 'trunk', got 'sum'",
    "train --data data --heads twice.yaml": "twice.yaml: class 'b' (1) is in heads 0 and 1",
    "train --data data --heads none.yaml": "'c' (2) is in no head",
    "train --data data --heads other.yaml": (
        "other.yaml: made for other classes: class 1 is 'x' in the file, 'b' in the data"
    ),
    "train --data data --heads absent.yaml": (
        "absent.yaml: no such file; mhdet partition makes head files"
    ),
    "train epochs=0": "epochs: Expected `int` >= 1, got 0",
    "train seed=99999999999999999999": "seed: Expected `int` <= 4294967295",
    "train imgsz=100": "imgsz: Expected `int` that's a multiple of 32, got 100",
    "train dev=1.5": "dev: Expected `float` < 1.0, got 1.5",
    "train momentum=2": "momentum: Expected `float` < 1.0, got 2",
    "train device=0": "device: must be auto, cpu or cuda, got '0'",
    "eval base --conf 25": "Invalid value for '--conf'",
    "data toy:16 --data toy:3": "toy:16 and data=toy:3: expected one data set",
    "detect base": "expected RUN IMAGE..., got base",
    "detect base data/annotations": "data/annotations: no images; expected files .",
    "train --data data freeze=p9": "p9",
    "train --resume absent": "absent: no run there",
    "train --resume base width=1": (
        "'width' cannot be changed; allowed: epochs, max_hours, device, workers"
    ),
    "train --data data run=base": "runs/base: exists already",
    "train --data data weights=absent": "absent: no run there",
    "eval absent": "absent: no run there",
    "eval base@7": "there is best, last",
    "eval base --split test": "no split 'test'",
    "eval base --data toy:16": "toy:16: its classes are not those of run base",
    "eval --gt bad.yaml --dt bad.yaml": "bad.yaml: not YAML",
    "confuse": "expected either a RUN, or --gt and --dt",
    "errors": "expected either a RUN, or --gt and --dt",
    "errors base --gt G --dt a.json": "expected either a RUN, or --gt and --dt",
    "errors absent": "absent: no run there",
    "eval --gt G --dt image.json": (
        "image.json: 1 of 100 entries have an unknown image_id, the first is entry 0: "
        "{'image_id': 9999"
    ),
    "eval --gt G --dt class.json": "class.json: 1 of 100 entries have an unknown category_id",
    "errors --gt G --dt a.json nan.json": (
        "nan.json: 1 of 100 entries have a score that is not a finite number"
    ),
    "confuse --gt G --dt negative.json": (
        "negative.json: 1 of 100 entries have a box that is not finite or of negative size"
    ),
    "compare --gt G --a a.json --b dict.json": (
        "dict.json: expected a list of detections, or an object with 'annotations'"
    ),
    "compare --gt bare.json --a a.json --b a.json": (
        "bare.json: no annotations, so there is nothing to detect"
    ),
    "compare --gt G --a a.json": "Missing option '--b'",
    "compare --gt G --a a.json --b a.json a.json --paired": (
        "paired seeds: expected equal numbers, got 1 and 2"
    ),
    "compare --gt G --a a.json --b a.json --fail-if bad": (
        "--fail-if: must be one of better, worse, equivalent, undecided, got 'bad'"
    ),
    "compare --gt G --a a.json --b a.json --margin -1": (
        "expected low <= high and margin >= 0, got [0.0, 0.0] and margin -1.0"
    ),
    "calibrate absent": "absent: no run there",
    "detect base data/images/val/7.jpg --calibrated": (
        "calibration.json: no such file; mhdet calibrate base makes it"
    ),
    "partition --strategy clever": (
        "must be one of anti_confusion, optimal, together, standard, geometry, hybrid"
    ),
    "partition --strategy geometry": "geometry: expected --data",
    "partition --strategy together": "together: expected --confusion or a RUN",
    "partition base --confusion C.csv": "expected either a RUN or --confusion, got base and C.csv",
    "partition base --weights light": "must be 'equal' or 'balanced', got 'light'",
    "partition base --strategy optimal --imbalance .5": "imbalance must be 1 or more, got 0.5",
    "partition --strategy hybrid --data data --alpha 2": "alpha must be 0..1, got 2.0",
    "partition --strategy standard --groups absent.yaml --data data": "absent.yaml: no such file",
    "partition --strategy optimal --pairs foes.yaml --num-heads 2 --data data": (
        "into 2 heads has all of: a and b apart; b and c apart; a and c apart"
    ),
    "partition --confusion absent.csv": "absent.csv: no such file",
    "partition --strategy standard --data data": "standard is made for COCO's 80 classes",
    "partition --strategy random --num-heads 9 --data data": (
        "--num-heads: must be 1..6 for 6 classes, got 9"
    ),
    "split base --heads twice.yaml --out x": "twice.yaml: class 'b' (1) is in heads 0 and 1",
    "split base --heads two.yaml --out base": "runs/base: exists already",
    "plot absent": "absent: no run there",
    "detect base absent.jpg": "absent.jpg: no such image",
    "detect base empty.jpg": "empty.jpg: UnidentifiedImageError: cannot identify image file",
    "study --arms all": "must be one of control, split",
    "study --resume": "no study there to go on with",
    "check --fixtures absent": "absent",
    "export absent --out m.onnx": "absent: no run there",
    "export base --out two.yaml": "two.yaml: exists already; give another --out",
    "export base --out m.onnx --one-label": "'one_label' changes nothing without --nms",
    "runs base": "expected no name, got base",
    "train --fast": "No such option: --fast",
    "train --epochs 3": "No such option: --epochs; a config key is written epochs=...",
    "train data": "expected no name, got data; a data set is given as --data data",
    "study data": "data is a file or folder, not a name for a study; data are given as --data data",
    "partition --num-heads many": "Invalid value for '--num-heads'",
    "partition --heads 3": (
        "--heads 3: partition makes the head file itself; the number of heads is --num-heads 3"
    ),
    "study --heads 3": (
        "--heads 3: study makes the head file itself; the number of heads is --num-heads 3"
    ),
    "study --heads two.yaml": "one of yours is an arm, --arms two.yaml",
    "study heads=3": "the number of heads is --num-heads 3",
    "options epohcs": "epohcs: in no config key; did you mean 'epochs'?",
    "options lr=1": "'lr' changes nothing here; allowed: no config keys",
    "trian": "Did you mean 'train'?",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_one_line_and_code_2(here, line):
    files = {
        "key.yaml": "learning_rate: 1",
        "bad.yaml": "a: [",
        "twice.yaml": heads([0, 1], [1, 2, 3, 4, 5]),
        "none.yaml": heads([0, 3, 4, 5], [1]),
        "other.yaml": heads([0, 3, 4], [1, 2, 5], names="[a, x, c, d, e, f]"),
        "two.yaml": heads([0, 1, 2], [3, 4, 5]),
        "empty.jpg": "",
        "foes.yaml": "pairs: [[a, b], [b, c], [c, a], [d, e]]",
    }
    for name, text in files.items():
        Path(name).write_text(text)
    first, *others = results("a.json")
    changes = {
        "image": dict(image_id=9999),
        "nan": dict(score=float("nan")),
        "negative": dict(bbox=[1, 1, -5, 5]),
        "class": dict(category_id=7),
    }
    for name, change in changes.items():
        Path(f"{name}.json").write_text(json.dumps([first | change, *others]))
    Path("dict.json").write_text("{}")
    Path("bare.json").write_text(json.dumps(read(here / "data", "val") | dict(annotations=[])))
    code, out, err = mhdet(line.replace(" G", " data/annotations/instances_val.json"))
    assert (code, out) == (2, "")
    assert BAD[line] in err
    assert err.startswith("mhdet: ") and err.count("\n") == 1 and "'\"" not in err


def test_two_methods_from_files(here):
    truth = "--gt data/annotations/instances_val.json"
    for seed in range(3):
        results(f"old{seed}.json", 0.6, 0.3, seed)
        results(f"new{seed}.json", 0.8, 0.1, 10 + seed)
    old, new = (" ".join(f"{k}{seed}.json" for seed in range(3)) for k in ("old", "new"))
    result = mhdet_json(f"compare {truth} --a {old} --b {new} --out compare --fail-if worse")
    assert (result["verdict"], result["seeds_a"], result["seeds_b"]) == ("better", 3, 3)
    assert result["low"] > 0
    keys = "delta low high p p_pictures mde AP per_class errors confusion"
    assert set(keys.split()) <= set(result)
    report = Path("compare/report.md").read_text()
    assert result["sentence"] in report
    figures = [link.split(")")[0] for link in report.split("](")[1:]]
    assert all(Path("compare", figure).is_file() for figure in figures)
    fast = "--replicates 200 --swaps 0"
    code, out, _ = mhdet(f"compare {truth} --a {new} --b={old.split()[0]} --fail-if worse {fast}")
    assert code == 1 and "worse" in out
    same = mhdet_json(f"compare {truth} --a old0.json --b old0.json {fast}")
    assert (same["delta"], same["verdict"]) == (0, "equivalent")
    assert "about these files" in same["sentence"]
    Path("two.yaml").write_text(heads([0, 1, 2], [3, 4, 5]))
    result = mhdet_json(f"errors {truth} --dt {old} --heads two.yaml --out mistakes")
    assert set(result["profiles"]) == {f"old{seed}.json" for seed in range(3)}
    assert Path("mistakes/errors.png").is_file()
    confused = mhdet_json(f"confuse {truth} --dt old0.json --heads two.yaml")
    assert np.shape(confused["blocks"]) == (3, 3)
    assert np.sum(confused["blocks"]) == np.sum(confused["matrix"])
    kinds = result["profiles"]["old0.json"]["errors"]
    assert kinds["within"]["n"] + kinds["across"]["n"] == kinds["Cls"]["n"] > 0


def test_errors_of_a_run_are_drawn(here):
    result = mhdet_json("errors base --split val --out wrong")
    assert set(result["profiles"]) == {"base"} and Path("wrong/errors.png").is_file()
    assert len(list(Path("wrong").glob("suspect-*.png"))) == len(result["suspects"])


def test_planted_annotation_errors_are_suspected(here):
    truth = read(here / "data", "val")
    annotations = [a for a in truth["annotations"] if a["id"] != 31]
    annotations[30] = annotations[30] | dict(category_id=annotations[30]["category_id"] % 6 + 1)
    Path("spoilt.json").write_text(json.dumps(truth | dict(annotations=annotations)))
    for seed in range(2):
        results("a.json", seed=seed)
        Path("a.json").rename(f"dt{seed}.json")
    suspects = mhdet_json("errors --gt spoilt.json --dt dt0.json dt1.json")["suspects"]
    assert {(r["kind"], r["image"]) for r in suspects} == {("mislabelled", 30), ("missing", 31)}


def test_empty_predictions_are_defined(here):
    Path("none.json").write_text("[]")
    truth = "--gt data/annotations/instances_val.json --dt none.json"
    result = mhdet_json(f"eval {truth}")
    assert {result[k]["AP50"] for k in ("coco", "voc07", "voc", "source")} == {0}
    assert result["P"] is None and result["R"] == 0
    assert mhdet_json(f"errors {truth}")["profiles"]["none.json"]["errors"]["Miss"]["n"] == 100
    assert np.sum(mhdet_json(f"confuse {truth}")["matrix"]) == 100
    Path("bare.json").write_text(json.dumps(read(here / "data", "val") | dict(annotations=[])))
    results("a.json")
    assert mhdet_json("eval --gt bare.json --dt a.json")["coco"]["AP"] is None
    assert mhdet_json("errors --gt bare.json --dt a.json")["profiles"]["a.json"]["AP50"] is None


def test_calibration_is_kept_and_used(here):
    result = mhdet_json("calibrate base --conf .001")
    before, after = result["use"]
    assert before["AP50"] == pytest.approx(after["AP50"], abs=1e-9)
    assert Path(result["path"]).is_file()
    image = "data/images/val/7.jpg"
    facts = mhdet_json(f"detect base {image} --calibrated --conf .0001 --out calibrated")
    assert facts["pictures"] == 1
    Path(result["path"]).unlink()


def test_a_traceback_only_with_debug(here):
    with pytest.raises(FileNotFoundError):
        app(["eval", "absent", "--debug"])


def test_problems_below_five_percent_are_counted_listed_and_skipped(here):
    data = coco(Path("broken"))
    files = [data / f"images/train/{i}.jpg" for i in open_data(data)["train"].ids[:6]]
    empty, cut, lost, *more = files
    empty.write_bytes(b"")
    cut.write_bytes(cut.read_bytes()[:400])
    lost.unlink()
    spec = read(data, "train")
    wrong = [(1, [float("nan"), 1, 9, 9]), (1, [1, 1, -9, 9]), (8, [1, 1, 9, 9])]
    for k, (label, box) in enumerate(wrong):
        spec["annotations"].append(dict(id=90 + k, image_id=5, category_id=label, bbox=box))
    spec["annotations"].append(dict(id=99, image_id=777, category_id=1, bbox=[1, 1, 9, 9]))
    write(data, "train", spec)
    facts = mhdet_json("data broken")["splits"]["train"]
    assert (facts["images"], facts["boxes"]) == (97, 97)
    assert facts["problems"] == {
        "unreadable image": 2,
        "image without file": 1,
        "box not finite": 1,
        "box without area": 1,
        "unknown category": 1,
        "annotation of an unknown image": 1,
        "annotation of a lost image": 1,
        "same annotation id twice": 4,
    }
    listed = facts["listed"]["unreadable image"]
    assert len(listed) == 2 and str(empty) in " ".join(listed)
    assert "train: image without file: 1\n  " in mhdet("data broken")[1]
    assert mhdet(f"train --data broken {TINY} epochs=1 run=broken")[0] == 0
    for path in more:
        path.write_bytes(b"")
    for line, words in (
        ("data broken", "6 of 100 images"),
        ("train --data broken run=worse", "images are missing"),
    ):
        code, out, err = mhdet(line)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert words in err and "at most 5%" in err
    assert not Path("runs/worse").exists()


def test_later_wins_and_a_run_says_what_it_resolved(here):
    Path("hyp.yaml").write_text("lr: 0.5\nseed: 5\n")
    keys = "--data data epochs=1 --seed 6 seed=7 training.momentum=.9 run=order"
    assert mhdet(f"train lr=.25 --config hyp.yaml {TINY} {keys}")[0] == 0
    kept = read_yaml("runs/order/config.yaml")
    assert (kept["lr"], kept["seed"], kept["momentum"], kept["data"]) == (0.5, 7, 0.9, "data")


def test_a_moved_group_is_one_line_on_stderr(here):
    "Also from a file, and beside --json."
    Path("moved.yaml").write_text("train.seed: 3\n")
    line = "partition --strategy random --data data --num-heads 2 --json"
    code, out, err = mhdet(f"{line} --config moved.yaml")
    assert (code, err) == (0, "mhdet: moved.yaml: 'train.seed' is now 'training.seed'\n")
    assert json.loads(out)["sizes"] == [3, 3]
    child = process(f"{line} train.seed=3")
    again, err = child.communicate(timeout=LIMIT)
    assert err == "mhdet: command line: 'train.seed' is now 'training.seed'\n"
    assert again == out


def test_options_lists_every_config_key():
    rows = mhdet_json("options")
    assert {row["key"] for row in rows} == set(load_config().flat())
    assert all(row["meaning"] for row in rows)
    assert [row["key"] for row in mhdet_json("options label smooth")] == ["label_smoothing"]


def test_one_run_through_all_commands(here):
    figures = mhdet_json("eval base")
    assert {"coco", "voc07", "voc", "source", "per_class"} <= set(figures)
    assert set(figures["per_class"]) == set("abcdef")
    keys = "AP AP50 AP75 APsmall APmedium APlarge AR1 AR10 AR100"
    assert set(figures["coco"]) >= set(keys.split())
    rows = json.loads(Path("runs/base/detections.json").read_text())
    assert len(mhdet_json("confuse base --conf .001 --out C.csv")["matrix"]) == 7
    assert Path("C.csv").is_file()
    facts = mhdet_json("partition --confusion C.csv --data data --num-heads 2 --out H.yaml")
    assert sum(facts["sizes"]) == 6 and load_heads("H.yaml", list("abcdef")).nh == 2
    again = mhdet_json("partition base --conf .001 --data data --num-heads 2 --strategy optimal")
    assert again["gap"] == 0 and again["inside_confusion"] <= facts["inside_confusion"]
    card = mhdet("partition base --num-heads 2")[1]
    assert card.startswith("confusion: dev of base, held back from train: ")
    three = "--data data --num-heads 3 --weights balanced"
    for strategy in ("hybrid", "random", "together --confusion C.csv"):
        assert sum(mhdet_json(f"partition --strategy {strategy} {three}")["sizes"]) == 6
    assert mhdet_json("split base --heads H.yaml --out parted")["heads"] == 2
    again = mhdet_json("eval parted")
    assert again["coco"]["AP50"] == pytest.approx(figures["coco"]["AP50"], abs=1e-9)
    assert len(json.loads(Path("runs/parted/detections.json").read_text())) == len(rows)
    line = f"train --data data {TINY} epochs=1 weights=parted --heads H.yaml run=onward"
    assert mhdet(line)[0] == 0
    files = mhdet_json("plot base onward --out fig")
    assert "fig/dynamics.png" in files and all(Path(file).stat().st_size for file in files)
    images = "data/images/val/7.jpg data/images/val/8.jpg"
    facts = mhdet_json(f"detect parted {images} --conf .001 --out found")
    assert facts["pictures"] == 2 and Path("found/7.png").is_file()
    assert {"base", "parted"} <= {r["run"] for r in mhdet_json("runs")}


def test_study_is_finished_once(here, monkeypatch):
    line = f"study --data data {TINY} epochs=1 extra_epochs=1 --num-heads 2 run=small"
    result = mhdet_json(line)
    assert set(result) >= {"baseline", "split", "arms", "seconds"}
    assert result["split"]["same_detections"]
    assert {a["name"] for a in result["arms"]} == {"control", "split"}
    assert Path("runs/small/report.md").is_file()
    assert mhdet(line)[0] == 2
    assert mhdet_json("study --resume")["baseline"]["AP50"] == result["baseline"]["AP50"]
    assert "'lr' cannot be changed" in mhdet("study small --resume lr=1")[2]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "a study is one process" in mhdet("study --resume")[2]


def test_resized_copy_and_standard_heads(here):
    assert mhdet("data data --resize 32 --out small")[0] == 0
    assert mhdet_json("data small")["splits"]["val"]["boxes"] == 100
    assert mhdet("partition --strategy standard --out standard.yaml")[0] == 0
    head_of = load_heads("standard.yaml").head_of
    assert (head_of == load_heads(ROOT / "data/heads-coco-standard.yaml").head_of).all()
    counts = f"{ROOT}/data/coco_train2017_class_counts.csv"
    published = f"--pairs {ROOT}/data/pairs-coco.yaml --counts {counts}"
    facts = mhdet_json(f"partition {published}")
    assert facts["boxes"] == [262465, 199806, 198854, 198876]
    assert facts["pairs_apart"] == facts["pairs_total"]
    facts = mhdet_json(f"partition {published} --strategy optimal")
    assert max(facts["boxes"][1:]) == facts["bound"] == 199179
    assert facts["pairs_apart"] == 19 and facts["gap"] == 0


def test_stdout_is_for_the_result(capfd):
    "What a library in C prints, as HiGHS does, goes to stderr."
    with stdout_to_stderr():
        ctypes.CDLL(None).puts(b"noise")
    assert capfd.readouterr() == ("", "noise\n")


@pytest.mark.parametrize("ok, code", [(True, 0), (None, 0), (False, 1)])
def test_a_check_that_fails_is_code_1(here, monkeypatch, ok, code):
    row = dict(fixture="f", variant="v", quantity="q", error=1.0, tolerance=0.1, ok=ok)
    monkeypatch.setattr(conformance, "check", lambda folder: [row])
    assert mhdet("check --fixtures anywhere")[0] == code


def test_lab_hands_its_words_on(here, monkeypatch):
    called = []
    monkeypatch.chdir(here)  # and back: the command changes the folder
    monkeypatch.setattr(os, "execv", lambda *args: called.append(args))
    assert mhdet("lab --no-browser --port=9999")[0] == 0
    words = called[0][1]
    assert words[1:3] == ["-m", "jupyterlab"]
    assert words[-2:] == ["--no-browser", "--port=9999"]


def process(line):
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, "-m", "mhdet", *shlex.split(line)], env=env, **pipes)


# for kills see test_kill; an interrupt stops a training in test_crash too
@pytest.mark.slow
@pytest.mark.parametrize(
    "number, code",
    [
        pytest.param(signal.SIGTERM, 143, id="term"),
        pytest.param(signal.SIGINT, 130, id="int"),
    ],
)
def test_a_stopped_training_goes_on(here, number, code):
    name = signal.Signals(number).name
    length = "batch=4 epochs=2 save_steps=5 nominal_batch=4"
    child = process(f"train data=toy:120 {TINY} {length} run={name}")
    until((here / "runs" / name / "last").is_dir, child)
    child.send_signal(number)
    out, err = child.communicate(timeout=LIMIT)
    assert (child.returncode, out) == (code, "")
    assert f"mhdet: {name}; saved, go on with: mhdet train --resume {name}" in err
    assert {r["run"]: r["state"] for r in mhdet_json("runs")}[name] == name
    facts = mhdet_json(f"train --resume {name}")
    assert (facts["epoch"], facts["stopped"]) == (2, None)
    assert [r["epoch"] for r in JsonLog(f"runs/{name}/log.jsonl").rows()] == [1, 2]
