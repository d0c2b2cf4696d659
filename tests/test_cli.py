"""The command line: one clear line and code 2 for bad input, counted problems below 5 %, and what survives a signal."""
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
from typer.testing import CliRunner

from mhdet.cli.grammar import stdout_to_stderr
from mhdet.tools import conformance
from mhdet.cli.commands import app
from mhdet.core.runs import JsonLog
from mhdet.core.files import read_yaml
from mhdet.data.splits import open_data
from mhdet.partition.heads import load_heads
from processes import LIMIT, until

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
    found = CliRunner().invoke(app, shlex.split(line))
    return found.exit_code, found.stdout, found.stderr


def mhdet_json(line):
    code, out, err = mhdet(f"{line} --json")
    assert code == 0 and out.count("\n") == 1, err
    return json.loads(out)


def coco(root, n=100, size=64):
    "A data set of noise with one box a picture, classes a to f by turns."
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        (root / "images" / split).mkdir(parents=True)
        for i in range(n): Image.fromarray(rng.integers(0, 255, (size, size, 3), np.uint8)).save(root / f"images/{split}/{i}.jpg")
        notes = [dict(id=i, image_id=i, category_id=i % 6 + 1, bbox=[4, 4, 30, 40], area=1200, iscrowd=0) for i in range(n)]
        images = [dict(id=i, file_name=f"{i}.jpg", width=size, height=size) for i in range(n)]
        write(root, split, dict(images=images, annotations=notes, categories=[dict(id=k + 1, name=c) for k, c in enumerate("abcdef")]))
    return root


def write(root, split, data):
    (root / "annotations").mkdir(exist_ok=True)
    (root / f"annotations/instances_{split}.json").write_text(json.dumps(data))


def read(root, split): return json.loads((root / f"annotations/instances_{split}.json").read_text())


def results(path, found=.8, swap=0., seed=0):
    "Answers that find a share of the objects of val, some by the wrong name."
    rng = np.random.default_rng(seed)
    rows = [dict(image_id=a["image_id"], bbox=[a["bbox"][0] + rng.normal(), *a["bbox"][1:]], score=float(rng.beta(4, 2)),
                 category_id=a["category_id"] if rng.random() > swap else a["category_id"] % 6 + 1)
            for a in read(Path("data"), "val")["annotations"] if rng.random() < found or path == "a.json"]
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
    "train reduce=sum": "reduce: Invalid enum value 'sum'",
    "train --data data --heads twice.yaml": "twice.yaml: class 'b' (1) is in heads 0 and 1",
    "train --data data --heads none.yaml": "'c' (2) is in no head",
    "train --data data --heads other.yaml": "other.yaml: made for other classes: class 1 is 'x' in the file, 'b' in the data",
    "train --data data --heads absent.yaml": "absent.yaml: no such file; mhdet partition makes head files",
    "train epochs=0": "epochs: Expected `int` >= 1, got 0",
    "train imgsz=100": "imgsz: Expected `int` that's a multiple of 32, got 100",
    "train dev=1.5": "dev: Expected `float` < 1.0, got 1.5",
    "train momentum=2": "momentum: Expected `float` < 1.0, got 2",
    "train device=0": "device: must be auto, cpu or cuda, got '0'",
    "eval base --conf 25": "Invalid value for '--conf'",
    "data toy:16 --data toy:3": "toy:16 and data=toy:3: one data set is due",
    "detect base": "RUN PICTURE... is due here, got base",
    "detect base data/annotations": "data/annotations: no pictures; those are files .bmp, .jpeg",
    "train --data data freeze=p9": "p9",
    "train --resume absent": "absent: no run there",
    "train --resume base width=1": "'width' cannot be changed; allowed are epochs, max_hours, device, workers",
    "train --data data run=base": "runs/base: exists already",
    "train --data data weights=absent": "absent: no run there",
    "eval absent": "absent: no run there",
    "eval base@7": "there is best, last",
    "eval base --split test": "no split 'test'",
    "eval base --data toy:16": "toy:16: its classes are not those of run base",
    "eval --gt bad.yaml --dt bad.yaml": "bad.yaml: not JSON",
    "confuse": "either a RUN is due, or --gt and --dt",
    "errors": "either a RUN is due, or --gt and --dt",
    "errors base --gt G --dt a.json": "either a RUN is due, or --gt and --dt",
    "errors absent": "absent: no run there",
    "eval --gt G --dt picture.json": "picture.json: 1 of 100 entries have an unknown image_id, the first is entry 0: {'image_id': 9999",
    "eval --gt G --dt class.json": "class.json: 1 of 100 entries have an unknown category_id",
    "errors --gt G --dt a.json nan.json": "nan.json: 1 of 100 entries have a score that is not a finite number",
    "confuse --gt G --dt negative.json": "negative.json: 1 of 100 entries have a box that is not finite or of negative size",
    "compare --gt G --a a.json --b dict.json": "dict.json: expected a list of detections, got dict",
    "compare --gt bare.json --a a.json --b a.json": "bare.json: no annotations, so there is nothing to be found",
    "compare --gt G --a a.json": "Missing option '--b'",
    "compare --gt G --a a.json --b a.json a.json --paired": "seeds in pairs, but 1 and 2 of them",
    "compare --gt G --a a.json --b a.json --fail-if bad": "--fail-if: 'bad' is none of better, worse, equivalent, undecided",
    "compare --gt G --a a.json --b a.json --margin -1": "margin -1.0: low <= high, margin >= 0",
    "calibrate absent": "absent: no run there",
    "detect base data/images/val/7.jpg --calibrated": "calibration.json: no such file; mhdet calibrate base makes it",
    "partition --strategy clever": "'clever' is none of anti_confusion, optimal, together, standard, geometry, hybrid",
    "partition --strategy geometry": "geometry: --data is due",
    "partition --strategy together": "together: --confusion or a RUN is due",
    "partition base --confusion C.csv": "either a RUN or --confusion is due, got base and C.csv",
    "partition base --weights light": "'light' is none of equal, balanced",
    "partition base --strategy optimal --imbalance .5": "imbalance must be 1 or more, got 0.5",
    "partition --strategy hybrid --data data --alpha 2": "alpha must be 0..1, got 2.0",
    "partition --strategy standard --groups absent.yaml --data data": "absent.yaml: no such file",
    "partition --strategy optimal --pairs foes.yaml --heads 2 --data data": "into 2 heads has all of: a and b apart; b and c apart; a and c apart",
    "partition --confusion absent.csv": "absent.csv: no such file",
    "partition --strategy standard --data data": "standard is made for COCO's 80 classes",
    "partition --strategy random --heads 9 --data data": "heads must be 1..6",
    "split base --heads twice.yaml --out x": "twice.yaml: class 'b' (1) is in heads 0 and 1",
    "split base --heads two.yaml --out base": "runs/base: exists already",
    "plot absent": "absent: no run there",
    "detect base absent.jpg": "absent.jpg: no such picture",
    "detect base empty.jpg": "1 of 1 images are missing or unreadable",
    "study --arms all": "'all' is none of control, split",
    "study --resume": "no study there to go on with",
    "check --fixtures absent": "absent",
    "export absent --out m.onnx": "absent: no run there",
    "export base --out two.yaml": "two.yaml: exists already; give another --out",
    "export base --out m.onnx --one-label": "'one_label' changes nothing without --nms",
    "runs base": "no name is due here, got base",
    "train --fast": "; choices are words: fast=...",
    "train data": "no name is due here, got data; a data set is given as --data data",
    "study data": "data is a file or folder, no name for a study; data are given as --data data",
    "partition --heads many": "Invalid value for '--heads'",
    "trian": "Did you mean 'train'?",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_one_line_and_code_2(here, line):
    files = {"key.yaml": "learning_rate: 1", "bad.yaml": "a: [", "twice.yaml": heads([0, 1], [1, 2, 3, 4, 5]), "none.yaml": heads([0, 3, 4, 5], [1]),
             "other.yaml": heads([0, 3, 4], [1, 2, 5], names="[a, x, c, d, e, f]"), "two.yaml": heads([0, 1, 2], [3, 4, 5]), "empty.jpg": "",
             "foes.yaml": "pairs: [[a, b], [b, c], [c, a], [d, e]]"}
    for name, text in files.items(): Path(name).write_text(text)
    answers = results("a.json")
    for name, change in dict(picture=dict(image_id=9999), nan=dict(score=float("nan")), negative=dict(bbox=[1, 1, -5, 5]),
                             **{"class": dict(category_id=7)}).items():
        Path(f"{name}.json").write_text(json.dumps([answers[0] | change] + answers[1:]))
    Path("dict.json").write_text("{}")
    Path("bare.json").write_text(json.dumps(read(here / "data", "val") | dict(annotations=[])))
    code, out, err = mhdet(line.replace(" G", " data/annotations/instances_val.json"))
    assert (code, out) == (2, "") and BAD[line] in err
    assert err.startswith("mhdet: ") and err.count("\n") == 1 and "'\"" not in err


def test_two_methods_from_files(here):
    truth = "--gt data/annotations/instances_val.json"
    for seed in range(3): results(f"old{seed}.json", .6, .3, seed), results(f"new{seed}.json", .8, .1, 10 + seed)
    old, new = (" ".join(f"{k}{seed}.json" for seed in range(3)) for k in ("old", "new"))
    found = mhdet_json(f"compare {truth} --a {old} --b {new} --out compare --fail-if worse")
    assert (found["verdict"], found["seeds_a"], found["seeds_b"]) == ("better", 3, 3) and found["low"] > 0
    assert {"delta", "low", "high", "p", "p_pictures", "mde", "AP", "per_class", "errors", "confusion"} <= set(found)
    report = Path("compare/report.md").read_text()
    assert found["sentence"] in report and all(Path("compare", f.split(")")[0]).is_file() for f in report.split("](")[1:])
    code, out, _ = mhdet(f"compare {truth} --a {new} --b={old.split()[0]} --fail-if worse --replicates 200 --swaps 0")
    assert code == 1 and "worse" in out
    same = mhdet_json(f"compare {truth} --a old0.json --b old0.json --replicates 200 --swaps 0")
    assert (same["delta"], same["verdict"]) == (0, "equivalent") and "about these files" in same["sentence"]
    Path("two.yaml").write_text(heads([0, 1, 2], [3, 4, 5]))
    found = mhdet_json(f"errors {truth} --dt {old} --heads two.yaml --out mistakes")
    assert set(found["profiles"]) == {f"old{seed}.json" for seed in range(3)} and Path("mistakes/errors.png").is_file()
    seen = mhdet_json(f"confuse {truth} --dt old0.json --heads two.yaml")
    assert np.shape(seen["blocks"]) == (3, 3) and np.sum(seen["blocks"]) == np.sum(seen["matrix"])
    cls = found["profiles"]["old0.json"]["errors"]
    assert cls["within"]["n"] + cls["across"]["n"] == cls["Cls"]["n"] > 0


def test_mistakes_of_a_run_are_drawn(here):
    found = mhdet_json("errors base --split val --out wrong")
    assert set(found["profiles"]) == {"base"} and Path("wrong/errors.png").is_file()
    assert len(list(Path("wrong").glob("suspect-*.png"))) == len(found["suspects"])


def test_planted_annotation_mistakes_are_suspected(here):
    truth = read(here / "data", "val")
    note = truth["annotations"][30]
    Path("spoilt.json").write_text(json.dumps(truth | dict(annotations=[
        n if n is not note else n | dict(category_id=n["category_id"] % 6 + 1) for n in truth["annotations"] if n["id"] != 31])))
    for seed in range(2): results("a.json", seed=seed), Path("a.json").rename(f"seen{seed}.json")
    found = mhdet_json("errors --gt spoilt.json --dt seen0.json seen1.json")["suspects"]
    assert {(r["kind"], r["image"]) for r in found} == {("mislabelled", 30), ("missing", 31)}


def test_empty_answers_are_defined(here):
    Path("none.json").write_text("[]")
    truth = "--gt data/annotations/instances_val.json --dt none.json"
    found = mhdet_json(f"eval {truth}")
    assert {found[k]["AP50"] for k in ("coco", "voc07", "voc", "source")} == {0} and found["P"] is None and found["R"] == 0
    assert mhdet_json(f"errors {truth}")["profiles"]["none.json"]["errors"]["Miss"]["n"] == 100
    assert np.sum(mhdet_json(f"confuse {truth}")["matrix"]) == 100
    Path("bare.json").write_text(json.dumps(read(here / "data", "val") | dict(annotations=[])))
    results("a.json")
    assert mhdet_json("eval --gt bare.json --dt a.json")["coco"]["AP"] is None
    assert mhdet_json("errors --gt bare.json --dt a.json")["profiles"]["a.json"]["AP50"] is None


def test_calibration_is_kept_and_used(here):
    found = mhdet_json("calibrate base --conf .001")
    before, after = found["use"]
    assert before["AP50"] == pytest.approx(after["AP50"], abs=1e-9) and Path(found["path"]).is_file()
    seen = mhdet_json("detect base data/images/val/7.jpg --calibrated --conf .0001 --out calibrated")
    assert seen["pictures"] == 1
    Path(found["path"]).unlink()


def test_a_traceback_only_with_debug(here):
    with pytest.raises(FileNotFoundError): app(["eval", "absent", "--debug"])


def test_problems_below_five_percent_are_counted_listed_and_skipped(here):
    data = coco(Path("broken"))
    empty, cut, lost, *more = (data / f"images/train/{i}.jpg" for i in open_data(data)["train"].ids[:6])
    empty.write_bytes(b"")
    cut.write_bytes(cut.read_bytes()[:400])
    lost.unlink()
    spec = read(data, "train")
    spec["annotations"] += [dict(id=90 + k, image_id=5, category_id=c, bbox=b) for k, (c, b) in
                            enumerate([(1, [float("nan"), 1, 9, 9]), (1, [1, 1, -9, 9]), (8, [1, 1, 9, 9])])]
    spec["annotations"].append(dict(id=99, image_id=777, category_id=1, bbox=[1, 1, 9, 9]))
    write(data, "train", spec)
    found = mhdet_json("data broken")["splits"]["train"]
    assert (found["images"], found["boxes"]) == (97, 97)
    assert found["problems"] == {"unreadable image": 2, "image without file": 1, "box not finite": 1, "box without area": 1,
                                 "unknown category": 1, "annotation of an unknown image": 1, "annotation of a lost image": 1}
    assert len(found["listed"]["unreadable image"]) == 2 and str(empty) in " ".join(found["listed"]["unreadable image"])
    assert "train: image without file: 1\n  " in mhdet("data broken")[1]
    assert mhdet(f"train --data broken {TINY} epochs=1 run=broken")[0] == 0
    for path in more: path.write_bytes(b"")
    for line, words in (("data broken", "6 of 100 images"), ("train --data broken run=worse", "images are missing")):
        code, out, err = mhdet(line)
        assert (code, out, err.count("\n")) == (2, "", 1) and words in err and "at most 5%" in err
    assert not Path("runs/worse").exists()


def test_later_wins_and_a_run_says_what_it_resolved(here):
    Path("hyp.yaml").write_text("lr: 0.5\nseed: 5\n")
    line = f"train lr=.25 --config hyp.yaml {TINY} --data data epochs=1 --seed 6 seed=7 train.momentum=.9 run=order"
    assert mhdet(line)[0] == 0
    kept = read_yaml("runs/order/config.yaml")
    assert (kept["lr"], kept["seed"], kept["momentum"], kept["data"]) == (.5, 7, .9, "data")


def test_one_run_through_all_commands(here):
    figures = mhdet_json("eval base")
    assert {"coco", "voc07", "voc", "source", "per_class"} <= set(figures) and set(figures["per_class"]) == set("abcdef")
    assert set(figures["coco"]) >= {"AP", "AP50", "AP75", "APsmall", "APmedium", "APlarge", "AR1", "AR10", "AR100"}
    rows = json.loads(Path("runs/base/detections.json").read_text())
    assert len(mhdet_json("confuse base --conf .001 --out C.csv")["matrix"]) == 7 and Path("C.csv").is_file()
    facts = mhdet_json("partition --confusion C.csv --data data --heads 2 --out H.yaml")
    assert sum(facts["sizes"]) == 6 and load_heads("H.yaml", list("abcdef")).nh == 2
    again = mhdet_json("partition base --conf .001 --data data --heads 2 --strategy optimal")
    assert again["gap"] == 0 and again["inside_confusion"] <= facts["inside_confusion"]
    assert mhdet("partition base --heads 2")[1].startswith("confusion: dev of base, held back from train: ")
    for strategy in ("hybrid", "random", "together --confusion C.csv"):
        assert sum(mhdet_json(f"partition --strategy {strategy} --data data --heads 3 --weights balanced")["sizes"]) == 6
    assert mhdet_json("split base --heads H.yaml --out parted")["heads"] == 2
    again = mhdet_json("eval parted")
    assert again["coco"]["AP50"] == pytest.approx(figures["coco"]["AP50"], abs=1e-9)
    assert len(json.loads(Path("runs/parted/detections.json").read_text())) == len(rows)
    assert mhdet(f"train --data data {TINY} epochs=1 weights=parted --heads H.yaml run=onward")[0] == 0
    made = mhdet_json("plot base onward --out fig")
    assert "fig/dynamics.png" in made and all(Path(p).stat().st_size for p in made)
    seen = mhdet_json("detect parted data/images/val/7.jpg data/images/val/8.jpg --conf .001 --out seen")
    assert seen["pictures"] == 2 and Path("seen/7.png").is_file() and {"base", "parted"} <= {r["run"] for r in mhdet_json("runs")}


def test_study_is_finished_once(here, monkeypatch):
    line = f"study --data data {TINY} epochs=1 extra_epochs=1 --heads 2 run=small"
    found = mhdet_json(line)
    assert set(found) >= {"baseline", "split", "arms", "seconds"} and found["split"]["same_detections"]
    assert {a["name"] for a in found["arms"]} == {"control", "split"} and Path("runs/small/report.md").is_file()
    assert mhdet(line)[0] == 2
    assert mhdet_json("study --resume")["baseline"]["AP50"] == found["baseline"]["AP50"]
    assert "'lr' cannot be changed" in mhdet("study small --resume lr=1")[2]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "a study is one process" in mhdet("study --resume")[2]


def test_resized_copy_and_standard_heads(here):
    assert mhdet("data data --resize 32 --out small")[0] == 0
    assert mhdet_json("data small")["splits"]["val"]["boxes"] == 100
    assert mhdet("partition --strategy standard --out standard.yaml")[0] == 0
    assert (load_heads("standard.yaml").head_of == load_heads(ROOT / "data/heads-coco-standard.yaml").head_of).all()
    published = f"--pairs {ROOT}/data/pairs-coco.yaml --counts {ROOT}/data/coco_train2017_class_counts.csv"
    facts = mhdet_json(f"partition {published}")
    assert facts["boxes"] == [262465, 199806, 198854, 198876] and facts["pairs_apart"] == facts["pairs_total"]
    facts = mhdet_json(f"partition {published} --strategy optimal")
    assert max(facts["boxes"][1:]) == facts["bound"] == 199179 and facts["pairs_apart"] == 19 and facts["gap"] == 0


def test_stdout_is_for_the_answer(capfd):
    "What a library in C prints, as HiGHS does, goes to stderr."
    with stdout_to_stderr(): ctypes.CDLL(None).puts(b"noise")
    assert capfd.readouterr() == ("", "noise\n")


def test_a_check_that_fails_is_code_1(here, monkeypatch):
    row = dict(fixture="f", variant="v", quantity="q", error=1., tolerance=.1)
    for ok, code in ((True, 0), (None, 0), (False, 1)):
        monkeypatch.setattr(conformance, "check", lambda folder: [row | dict(ok=ok)])
        assert mhdet("check --fixtures anywhere")[0] == code


def test_lab_hands_its_words_on(here, monkeypatch):
    called = []
    monkeypatch.chdir(here)                                                  # and back: the command changes the folder
    monkeypatch.setattr(os, "execv", lambda *args: called.append(args))
    assert mhdet("lab --no-browser --port=9999")[0] == 0
    assert called[0][1][1:3] == ["-m", "jupyterlab"] and called[0][1][-2:] == ["--no-browser", "--port=9999"]


def test_help_and_typing_errors_do_not_wait_for_torch():
    code = "import sys; from mhdet.cli.commands import app\ntry: app(['--help'])\nexcept SystemExit: print(sorted({'torch', 'pandas'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.endswith("[]\n") and "study" in out


def process(line):
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "mhdet", *shlex.split(line)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["term", "int"])    # kills: test_kill
def test_a_stopped_training_goes_on(here, number, code):
    name = signal.Signals(number).name
    child = process(f"train data=toy:120 {TINY} batch=4 epochs=2 save_steps=5 nominal_batch=4 run={name}")
    until((here / "runs" / name / "last").is_dir, child)
    child.send_signal(number)
    out, err = child.communicate(timeout=LIMIT)
    assert (child.returncode, out) == (code, "")
    assert f"mhdet: {name}; saved, go on with: mhdet train --resume {name}" in err
    assert {r["run"]: r["state"] for r in mhdet_json("runs")}[name] == name
    found = mhdet_json(f"train --resume {name}")
    assert (found["epoch"], found["stopped"]) == (2, None)
    assert [r["epoch"] for r in JsonLog(f"runs/{name}/log.jsonl").rows()] == [1, 2]
