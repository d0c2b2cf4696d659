"""`mhdet diagnose`.

The bound against an oracle of loops and pycocotools; whole reports; bad input.
"""

import contextlib
import io
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import reference_models as theirs
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from typer.testing import CliRunner

from mhdet.cli.commands import app
from mhdet.data.splits import open_data
from mhdet.evaluation.errors import error_profile, repair_confusions
from mhdet.evaluation.results import read_truth, write_results
from mhdet.experiment.bounds import confusion_bound, confusion_gain, cross_fit, two_halves
from mhdet.partition.heads import load_heads

SHARED = Path(__file__).resolve().parents[2] / "shared/data"
shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data with real images")


def mhdet(line):
    "Exit code, stdout, stderr."
    result = CliRunner().invoke(app, shlex.split(line))
    return result.exit_code, result.stdout, result.stderr


# The oracle: matching, errors and repair one by one, AP by pycocotools.


def iou(a, b):
    w = min(a[2], b[2]) - max(a[0], b[0])
    h = min(a[3], b[3]) - max(a[1], b[1])
    inter = max(w, 0) * max(h, 0)
    return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)


def repair_by_loop(gt, dt, head_of):
    "Detections after repairing the confusions across heads; `head_of[image][class]`."
    objects = list(zip(gt["image"], gt["label"], gt["box"].tolist(), strict=True))
    found = list(zip(dt["image"], dt["label"], dt["box"].tolist(), dt["score"], strict=True))
    taken, right = set(), set()
    for d in sorted(range(len(found)), key=lambda d: -found[d][3]):
        image, label, box, _ = found[d]
        free = []
        for g, (i, c, b) in enumerate(objects):
            if (i, c) == (image, label) and g not in taken and iou(box, b) >= 0.5:
                free.append((iou(box, b), g))
        if free:
            taken.add(max(free)[1])
            right.add(d)
    kind, target = {}, {}
    for d, (image, label, box, _) in enumerate(found):
        if d in right:
            continue
        own, other = (0, None), (0, None)
        for g, (i, c, b) in enumerate(objects):
            if i == image and c == label:
                own = max(own, (iou(box, b), g), key=lambda pair: pair[0])
            elif i == image:
                other = max(other, (iou(box, b), g), key=lambda pair: pair[0])
        if 0.1 <= own[0] <= 0.5:
            kind[d], target[d] = "Loc", own[1]
        elif other[0] >= 0.5:
            kind[d], target[d] = "Cls", other[1]
    best = {}
    for d, g in target.items():
        if g not in taken and (g not in best or found[d][3] > found[best[g]][3]):
            best[g] = d
    out = []
    for d, (image, label, box, score) in enumerate(found):
        if kind.get(d) == "Cls":
            true = objects[target[d]][1]
            if head_of[image][label] != head_of[image][true]:
                if best.get(target[d]) == d:
                    out.append((image, true, box, score))
                continue
        out.append((image, label, box, score))
    return out


def ap50(gt, rows, nc, n_images):
    "AP50 of detections (image, class, box, score), by pycocotools."
    truth = COCO()
    notes = []
    for k, (i, c, b) in enumerate(zip(gt["image"], gt["label"], gt["box"].tolist(), strict=True)):
        bbox = [b[0], b[1], b[2] - b[0], b[3] - b[1]]
        about = dict(image_id=int(i) + 1, category_id=int(c) + 1, bbox=bbox, iscrowd=0)
        notes.append(about | dict(id=k + 1, area=bbox[2] * bbox[3]))
    truth.dataset = dict(
        images=[dict(id=i + 1) for i in range(n_images)],
        categories=[dict(id=c + 1) for c in range(nc)],
        annotations=notes,
    )
    results = []
    for i, c, b, s in rows:
        bbox = [b[0], b[1], b[2] - b[0], b[3] - b[1]]
        results.append(dict(image_id=int(i) + 1, category_id=int(c) + 1, bbox=bbox, score=float(s)))
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        run = COCOeval(truth, truth.loadRes(results), "bbox")
        run.evaluate()
        run.accumulate()
    precision = run.eval["precision"][0, :, :, 0, 2]
    return float(precision[precision > -1].mean())


def problem(seed, n_images=14, nc=6):
    "Crowded images, and detections that miss, shift, repeat and confuse."
    rng = np.random.default_rng(seed)
    n = 6 * n_images
    low = rng.uniform(0, 50, (n, 2))
    box = np.c_[low, low + rng.uniform(15, 50, (n, 2))]
    none = np.zeros(n, bool)
    gt = dict(image=np.repeat(np.arange(n_images), 6), label=rng.integers(0, nc, n), box=box)
    gt |= dict(ignore=none, crowd=none, area=(box[:, 2:] - box[:, :2]).prod(1))
    at = rng.integers(0, n, 2 * n)
    label = np.where(rng.random(2 * n) < 0.5, gt["label"][at], rng.integers(0, nc, 2 * n))
    moved = box[at] + rng.normal(0, rng.choice([1, 6], (2 * n, 1)), (2 * n, 4))
    moved[:, 2:] = np.maximum(moved[:, 2:], moved[:, :2] + 2)
    dt = dict(image=gt["image"][at], label=label, box=moved, score=rng.permutation(2 * n) / (2 * n))
    return gt, dt, rng


@pytest.mark.parametrize("seed", range(8))
def test_the_bound_equals_an_oracle_of_loops_and_pycocotools(seed):
    gt, dt, rng = problem(seed)
    n, nc = 14, 6
    by_image = rng.integers(0, 3, (n, nc))  # as cross-fitting: another partition in each image
    before = ap50(
        gt, list(zip(*(dt[k] for k in ("image", "label", "box", "score")), strict=True)), nc, n
    )
    for head_of in (by_image[0], by_image, np.arange(nc), np.zeros(nc, int)):
        heads = np.broadcast_to(head_of, (n, nc))
        rows = repair_by_loop(gt, dt, heads)
        after = ap50(gt, rows, nc, n)
        assert confusion_gain(gt, dt, nc, head_of) == pytest.approx(after - before, abs=1e-9)
        repaired = repair_confusions(gt, dt, nc, head_of)
        columns = zip(*(repaired[k] for k in ("image", "label", "score")), strict=True)
        assert sorted(columns) == sorted((i, c, s) for i, c, _, s in rows)
    found = error_profile(gt, dt, nc, by_image[0])["errors"]
    assert found["across"]["n"] > 10 and found["across"]["dAP"] > 0.01  # there was much to repair
    bound = confusion_bound(gt, dt, nc, n, by_image[0], n=20)
    assert bound["AP50"] == pytest.approx(found["across"]["dAP"], abs=1e-9)


def test_a_partition_never_sees_the_images_it_is_measured_on():
    gt, dt, _ = problem(0)
    half, seen = two_halves(14), []

    def choose(gt, dt):
        seen.append((set(gt["image"].tolist()), set(dt["image"].tolist())))
        return np.full(6, len(seen))

    fitted = cross_fit(gt, dt, 14, choose)
    for image, row in enumerate(fitted):
        truth, detections = seen[row[0] - 1]
        assert image not in truth and image not in detections
    assert sorted(np.bincount(half)) == [7, 7]


# The command.


def coco(root, names, boxes=3, n=6, size=64):
    "A COCO folder of grey images with boxes side by side, classes in turn."
    from PIL import Image

    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (root / "images" / split).mkdir(parents=True)
        images, notes = [], []
        for i in range(n):
            Image.new("RGB", (size, size), (90, 20 * i, 60)).save(root / f"images/{split}/{i}.png")
            images.append(dict(id=i, file_name=f"{i}.png", width=size, height=size))
            for k in range(boxes):
                about = dict(id=100 * i + k, image_id=i, category_id=(i + k) % len(names) + 1)
                notes.append(about | dict(bbox=[20 * k, 5, 16, 40], area=640, iscrowd=0))
        categories = [dict(id=k + 1, name=name) for k, name in enumerate(names)]
        content = dict(images=images, annotations=notes, categories=categories)
        (root / f"annotations/instances_{split}.json").write_text(json.dumps(content))
    return root


def predictions(root, path, wrong=3):
    "Detections of all boxes of val, every third one of the next class."
    truth = json.loads((root / "annotations/instances_val.json").read_text())
    nc, rows = len(truth["categories"]), []
    for k, note in enumerate(truth["annotations"]):
        label = note["category_id"] % nc + 1 if k % wrong == 0 else note["category_id"]
        about = dict(image_id=note["image_id"], bbox=note["bbox"], score=0.95 - 0.01 * k)
        rows.append(about | dict(category_id=label))
    path.write_text(json.dumps(rows))


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diagnose")
    names = ["car", "truck", "cat", "dog", "chair"]
    with contextlib.chdir(folder):
        predictions(coco(folder / "data", names), folder / "dt.json")
        theirs.save(folder / "best.pt", {"model": theirs.one_head(names), "epoch": 3})
        yield folder


def diagnosis(folder):
    return json.loads((Path(folder) / "diagnosis.json").read_text())


@pytest.mark.slow
def test_somebody_elses_weights(here):
    line = "diagnose best.pt --data data --imgsz 64 --out a --time-limit 2"
    code, out, err = mhdet(line)
    assert code == 0, err
    result = diagnosis("a")
    assert result["exact_split"]["same"] and result["places"]["anchors"] == "its own"
    assert result["exact_split"]["several"]["params"] > result["exact_split"]["one"]["params"]
    assert [row["partition"] for row in result["partitions"]][:2] == ["optimal", "by meaning"]
    assert result["sentence"] in out and not Path("runs").exists()  # no run is left
    heads = load_heads("a/heads-optimal.yaml", ["car", "truck", "cat", "dog", "chair"])
    assert heads.nh == 4
    page = Path("a/report.html").read_text()
    assert (
        page.count("<img")
        == page.count("data:image/png;base64,")
        == len(list(Path("a/fig").iterdir()))
    )
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    # a second time: the same figures, but for milliseconds
    assert mhdet(line)[0] == 0
    again = diagnosis("a")
    for sides in (result, again):
        for side in ("one", "several"):
            del sides["exact_split"][side]["ms"]
    assert again == result


def test_results_of_any_framework(here):
    code, out, err = mhdet("diagnose --gt data --dt dt.json --out b --imgsz 64 --num-heads 2")
    assert code == 0, err
    result = diagnosis("b")
    assert result["exact_split"]["reason"] == "not available: it needs the network"
    assert result["card"]["sizes"] and result["bound"]["AP50"] > 0.1
    assert len(list(Path("b/fig").glob("suspect-*.png"))) == len(result["suspects"]) > 0
    text = Path("b/report.md").read_text()
    assert "64 px with those of YOLOv7-tiny anchors" in text and "Not available: it needs" in text
    # a JSON has no images: suspects are listed, not drawn, and those of before are gone
    gt = "data/annotations/instances_val.json"
    assert mhdet(f"diagnose --gt {gt} --dt dt.json --out b --imgsz 64")[0] == 0
    assert "Not drawn" in Path("b/report.md").read_text()
    assert not list(Path("b/fig").glob("suspect-*.png"))
    assert diagnosis("b")["accuracy"] == result["accuracy"]


def test_no_detections_still_give_a_report(here):
    Path("none.json").write_text("[]")
    code, _, err = mhdet("diagnose --gt data --dt none.json --out c")
    assert code == 0, err
    result = diagnosis("c")
    assert (result["accuracy"]["AP50"]["value"], result["suspects"]) == (0, [])
    assert "No two classes are confused" in result["sentence"]
    assert "missed" in result["sentence"] and "hardly learnt" in result["sentence"]


def test_one_class_has_nothing_to_separate(here):
    predictions(coco(here / "one", ["car"]), here / "one.json")
    code, _, err = mhdet("diagnose --gt one --dt one.json --out d")
    assert code == 0, err
    assert "there is nothing to separate" in err
    assert diagnosis("d")["bound"] is None and not Path("d/heads-optimal.yaml").exists()
    assert "There is one class" in Path("d/report.md").read_text()


REFUSED = {
    "diagnose": "expected either a FILE or RUN, or --gt and --dt; got neither",
    "diagnose --gt data": "got no --dt",
    "diagnose --dt dt.json": "got no --gt",
    "diagnose best.pt --gt data --dt dt.json": "got best.pt and --gt data",
    "diagnose best.pt": "best.pt: expected --data D",
    "diagnose missing.pt --data data": "missing.pt",
    "diagnose --gt data --dt missing.json": "missing.json",
    "diagnose --gt data --dt other.json": "other.json",
    "diagnose --gt bare --dt none.json": "bare: val has no boxes",
    "diagnose --gt bare/annotations/instances_val.json --dt none.json": "no boxes",
    "diagnose best.pt --data one --imgsz 64": "best.pt: has 5 classes",
    "diagnose other.pt --data data": "other.pt: holds a detector of torchvision",
    "diagnose best.pt --data data --split test": "no split 'test'",
    "diagnose --gt data --dt dt.json --num-heads 9": "--num-heads: must be 1..5",
    "diagnose --gt data --dt dt.json --heads 3": "the number is --num-heads 3",
    "diagnose --gt data --dt dt.json --imgsz 100": "imgsz",
    "diagnose --gt data --dt dt.json --groups data": "data",
}


@pytest.mark.parametrize("line", REFUSED)
def test_bad_input_is_one_clear_line(here, line):
    if not Path("one").exists():
        coco(here / "one", ["car"])
    if not Path("bare").exists():
        coco(here / "bare", ["car", "bus"], boxes=0)
    Path("none.json").write_text("[]")
    Path("other.json").write_text(
        '[{"image_id": 1, "category_id": 77, "bbox": [1, 1, 9, 9], "score": 1}]'
    )
    torch.save({"backbone.body.conv1.weight": torch.zeros(2, 2)}, "other.pt")
    code, out, err = mhdet(f"{line} --out refused")
    last = err.splitlines()[-1]
    assert (code, out) == (2, ""), err
    assert last.startswith("mhdet: ") and REFUSED[line] in last
    assert not Path("refused").exists() and not Path("runs").exists()


@shared
def test_real_images_of_coco(tmp_path):
    "A foreign file of 80 classes on coco-mini; by meaning is the hand-made partition."
    data = SHARED / "coco-mini"
    names = open_data(data, "val")["val"].names
    with contextlib.chdir(tmp_path):
        theirs.save("best.pt", {"model": theirs.one_head(names)})
        line = f"diagnose best.pt --data {data} --imgsz 96 --max-images 12 --time-limit 1"
        code, _, err = mhdet(line)
        assert code == 0, err
        result = diagnosis("diagnosis")
        assert result["images"] == 12 and result["exact_split"]["same"]
        assert result["partitions"][1]["partition"] == "by meaning"


@shared
def test_real_images_of_voc(tmp_path):
    "A results file on voc2007-mini: what a made-up detector confuses is found again."
    data = SHARED / "voc2007-mini"
    truth = read_truth(data)
    rng = np.random.default_rng(0)
    hit = np.flatnonzero(rng.random(len(truth.gt["label"])) < 0.7)
    cat, dog = map(truth.names.index, ("cat", "dog"))
    swap = {cat: dog, dog: cat}
    label = np.array([swap.get(c, c) for c in truth.gt["label"][hit]])
    label = np.where(rng.random(len(hit)) < 0.3, label, truth.gt["label"][hit])
    dt = dict(image=truth.gt["image"][hit], label=label, box=truth.gt["box"][hit])
    with contextlib.chdir(tmp_path):
        write_results(
            "dt.json", dt | dict(score=rng.random(len(hit))), truth.ids, truth.category_ids
        )
        code, _, err = mhdet(f"diagnose --gt {data} --dt dt.json --imgsz 320 --suspects 2")
        assert code == 0, err
        pair = diagnosis("diagnosis")["confused"][0]
        assert {pair["a"], pair["b"]} == {"cat", "dog"} and pair["apart"]
