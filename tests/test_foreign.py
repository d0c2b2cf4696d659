"""Results files as other tools write them: read as they are meant, or refused by name.

Every convention is drawn: twelve scenes with objects of six classes, and a detector that is right
about nearly all of them. The files of ../shared/cases/foreign_results are the same in the large.
"""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from odd import situation
from PIL import Image

import mhdet.cli.commands  # noqa: F401 - it registers the commands
from mhdet.cli.grammar import run_line
from mhdet.data.splits import open_data, resize_copy
from mhdet.evaluation.compare import compare
from mhdet.evaluation.foreign import read_predictions
from mhdet.evaluation.metrics import evaluate
from mhdet.evaluation.results import read_gt, read_results, read_truth

ROOT = Path(__file__).resolve().parents[1]
SHARED = next((p for p in (ROOT / "../shared", ROOT / "../../shared") if p.is_dir()), None)
CASE = SHARED and SHARED / "cases/foreign_results"
shared = pytest.mark.skipif(not (CASE and CASE.is_dir()), reason="no ../shared/cases")
NAMES = ["ant", "bee", "cow", "dog", "eel", "fox"]
W, H = 120, 90


def drawn(seed=0, images=12, per_image=4):
    "Image, class and xyxy box of every object."
    rng = np.random.default_rng(seed)
    n = images * per_image
    size = rng.uniform(12, 40, (n, 2))
    corner = rng.uniform(0, 1, (n, 2)) * ([W, H] - size)
    label = rng.permutation(np.arange(n) % len(NAMES))
    return np.arange(n) // per_image, label, np.c_[corner, corner + size].round(1)


IMAGE, LABEL, BOX = drawn()
XYWH = np.c_[BOX[:, :2], BOX[:, 2:] - BOX[:, :2]]


def truth_json(first=1, names=NAMES, file_name="{:06d}.jpg", image_id=lambda i: 10 + i, **extra):
    "The objects as a COCO object; categories count from `first`."
    images = []
    for i in range(IMAGE.max() + 1):
        images.append(dict(id=image_id(i), width=W, height=H, file_name=file_name.format(100 + i)))
    categories = [dict(id=first + k, name=name) for k, name in enumerate(names)]
    rows = []
    for k, box in enumerate(XYWH.tolist()):
        ids = dict(image_id=image_id(int(IMAGE[k])), category_id=first + int(LABEL[k]))
        rows.append(dict(id=k, bbox=box, area=box[2] * box[3], iscrowd=0, **ids))
    return dict(images=images, categories=extra.get("root", []) + categories, annotations=rows)


def rows(first=1, image_id=lambda i: 10 + i, skip=(), bbox=XYWH, score=1.0, label=LABEL):
    "A detection of every object but those of the classes `skip`."
    out = []
    for k in range(len(LABEL)):
        if LABEL[k] not in skip:
            ids = dict(image_id=image_id(int(IMAGE[k])), category_id=first + int(label[k]))
            out.append(ids | dict(bbox=list(map(float, bbox[k])), score=score * (0.9 - k / 100)))
    return out


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("gt.json", truth_json())
    return tmp_path


def write(name, data):
    Path(name).write_text(json.dumps(data))
    return name


def read(results, truth="gt.json", **options):
    "Detections, ground truth, and what was said."
    source = read_truth(truth)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = read_predictions(write("dt.json", results), source, **options)
    return found, source, " | ".join(str(line.message) for line in said)


def right(results, truth="gt.json", skip=(), **options):
    "What is said of a file that must be read so that all is right."
    found, source, said = read(results, truth, **options)
    figures = evaluate(source.gt, found, source.names, len(source.ids), "voc")["per_class"]
    for k, name in enumerate(NAMES):
        assert figures[name]["AP50"] == (0 if k in skip else 1), (name, said)
    return said


def refusal(results, truth="gt.json", **options):
    with pytest.raises(ValueError) as error:
        read(results, truth, **options)
    assert "\n" not in str(error.value) and str(error.value).startswith("dt.json: ")
    return str(error.value)


# Category ids


def test_a_file_as_coco_says_is_read_as_it_stands(here):
    write("dt.json", rows())
    names, gt, ids, cats = read_gt("gt.json")
    strict = read_results("dt.json", ids, cats)
    found, _, said = read(rows())
    assert said == "" and found.keys() == strict.keys()
    assert all((found[k] == strict[k]).all() for k in strict)


@situation(
    "results",
    "Categories are positions from 0 (YOLOv7, YOLOv5) or 1 (Ultralytics); some are no ids "
    "of the truth",
    "read so, and told; `--ids` states it",
)
@pytest.mark.parametrize(
    "truth_first, first, option",
    [(1, 0, "position0"), (0, 1, "position1"), (5, 0, "position0"), (5, 1, "position1")],
)
def test_positions_that_cannot_be_ids_are_read_and_said(here, truth_first, first, option):
    write("gt.json", truth_json(truth_first))
    said = right(rows(first))
    assert f"--ids {option}" in said and "would have an unknown one" in said
    assert right(rows(first), ids=option) == ""


@situation(
    "results",
    "The same where every number is an id by chance, such as class 0 never predicted",
    "refused, with how many detections have the class of their object in either reading; "
    "`--ids` reads it",
)
@pytest.mark.parametrize(
    "truth_first, first, skip, option",
    [(1, 0, 0, "position0"), (0, 1, 5, "position1"), (2, 1, 5, "position1")],
)
def test_a_shift_that_ids_do_not_show_is_refused_by_name(here, truth_first, first, skip, option):
    "The class that would give it away was never predicted."
    write("gt.json", truth_json(truth_first))
    shifted = rows(first, skip=[skip])
    text = refusal(shifted)
    assert f"--ids {option} reads it so" in text
    if truth_first != 2:
        assert "--ids category as it stands" in text
        assert "40 of 40 detections that lie on an object have its class" in text
    assert right(shifted, skip=[skip], ids=option) == ""


def test_ids_with_gaps_and_positions(here):
    "As COCO's 1..90 against 1..80: here 1, 2, 3, 5, 7, 9."
    truth = truth_json()
    ids = dict(zip(range(1, 7), (1, 2, 3, 5, 7, 9), strict=True))
    for part, key in (("categories", "id"), ("annotations", "category_id")):
        for row in truth[part]:
            row[key] = ids[row[key]]
    write("gt.json", truth)
    assert "positions from 1" in right(rows(1))
    assert "positions from 0" in right(rows(0))
    both = refusal(rows(1, skip=[5]))  # 1..5: 4 is no id, and 0 and 6 do not say which
    assert "--ids position1 reads it so" in both


@situation(
    "results",
    "The truth has a root category 0 that nothing uses (Roboflow)",
    "it is no position: results of a detector without it are read",
)
@pytest.mark.parametrize("linked", [True, False])
def test_a_root_category_is_no_position(here, linked):
    truth = truth_json(root=[dict(id=0, name="animals", supercategory="none")])
    if linked:
        for category in truth["categories"][1:]:
            category["supercategory"] = "animals"
    write("gt.json", truth)
    assert right(rows(1)) == ""
    assert right(rows(0), ids="position0") == ""
    if linked:
        assert "--ids position0" in right(rows(0))
    else:
        assert "--ids position0 reads it so" in refusal(rows(0))


def test_a_class_that_no_object_has_is_a_position(here):
    "Category 0 without objects is not always a root."
    truth = truth_json(0, names=["none", *NAMES[1:]])
    truth["annotations"] = [a for a in truth["annotations"] if a["category_id"] > 0]
    write("gt.json", truth)
    found = read(rows(0, skip=[0]), ids="position0")[0]
    assert (found["label"] == LABEL[LABEL > 0]).all()


@situation(
    "results",
    "`category_id` is the name of the class",
    "read, and told",
)
def test_names_are_ids_too(here):
    by_name = [row | dict(category_id=NAMES[row["category_id"] - 1]) for row in rows()]
    assert "is the name of the class" in right(by_name)


def test_an_unknown_id_stays_refused(here):
    for odd in (7, -1, 99, "ant colony"):
        text = refusal([*rows()[:-1], rows()[-1] | dict(category_id=odd)])
        assert "1 of 48 entries have an unknown category_id, the first is entry 47" in text
    assert "--ids position0, the first is entry" in refusal(rows(), ids="position0")
    # a background class among ids that are otherwise right
    text = refusal([rows(skip=[5])[0] | dict(category_id=0), *rows(skip=[5])[1:]])
    assert "1 of 40 entries have an unknown category_id" in text


@situation(
    "results",
    "The classes of the results are in another order",
    "told, with the class that is most often mistaken",
)
def test_another_order_of_the_classes_is_said(here):
    "As of a YAML whose names are not in the order of the categories."
    found, _, said = read(rows(label=np.array([3, 5, 1, 0, 4, 2])[LABEL]))
    assert "are its classes in another order? Most detections of" in said
    assert "8 of 48 have the class of the object they lie on, in the likely order 48" in said
    assert (found["label"] == np.array([3, 5, 1, 0, 4, 2])[LABEL]).all()  # told, not changed


WEAK = ["random", "one", "frequent", "two", "mostly random"]


@situation(
    "results",
    "A detector that is simply bad",
    "never taken for another convention",
)
@pytest.mark.parametrize("kind", WEAK)
@pytest.mark.parametrize("first", [0, 1])
def test_an_honest_weak_detector_is_never_refused(here, kind, first):
    "Random classes, always the same, few detections, tiny sets: forty draws of each."
    write("gt.json", truth_json(first))
    rng = np.random.default_rng(WEAK.index(kind))
    for draw in range(40):
        # the ids leave room for a shift: the first or the last class is never predicted
        low, high = (0, 5) if draw % 2 else (1, 6)
        label = rng.integers(low, high, len(LABEL))
        if kind == "one":
            label[:] = label[0]
        elif kind == "frequent":
            label = np.where(rng.random(len(LABEL)) < 0.9, low, label)
        elif kind == "two":
            label = rng.choice(label[:2], len(LABEL))
        elif kind == "mostly random":
            label = np.where(rng.random(len(LABEL)) < 0.8, label, LABEL.clip(low, high - 1))
        box = XYWH + rng.normal(0, rng.choice([0.5, 5]), XYWH.shape)
        box[:, 2:] = np.maximum(box[:, 2:], 1)
        some = rng.choice(len(LABEL), rng.choice([1, 2, 5, len(LABEL)]), replace=False)
        every = rows(first, label=label, bbox=box.round(2))
        found, _, said = read([every[k] for k in some])
        assert (found["label"] == label[some]).all() and "order" not in said, said


def test_one_class_is_never_in_doubt(here):
    for first in (0, 1):
        truth = truth_json(first, names=["thing"])
        truth["annotations"] = [a | dict(category_id=first) for a in truth["annotations"]]
        write("gt.json", truth)
        assert read(rows(first, label=0 * LABEL))[2] == ""
        assert "--ids position" in read(rows(1 - first, label=0 * LABEL))[2]


def test_an_empty_file_and_empty_truth(here):
    assert len(read([])[0]["score"]) == 0
    assert len(read(dict(annotations=[]))[0]["score"]) == 0
    write("none.json", truth_json() | dict(annotations=[]))
    assert len(read(rows(), "none.json")[0]["score"]) == len(LABEL)


# Images


@situation(
    "results",
    "`image_id` is a stem, a file name, or a path",
    "found by the file name where that is one to one, and told",
)
@pytest.mark.parametrize(
    "given",
    [
        lambda i: f"{100 + i:06d}",
        lambda i: 100 + i,
        lambda i: f"{100 + i:06d}.jpg",
        lambda i: f"/data/val/{100 + i:06d}.jpg",
        lambda i: f"val\\{100 + i:06d}.png",
    ],
)
def test_images_are_found_by_file_name(here, given):
    said = right(rows(image_id=given))
    assert "images are looked up by file name" in said
    assert right(rows(image_id=given), images="name")


def test_zeros_in_front_of_an_id(here):
    write("gt.json", truth_json(file_name="frog-{}.jpg"))
    assert "the number in their id" in right(rows(image_id=lambda i: f"{10 + i:012d}"))
    write("gt.json", truth_json(image_id=lambda i: f"{10 + i:012d}", file_name="frog-{}.jpg"))
    assert "the number in their id" in right(rows())


@situation(
    "results",
    "The same file name in several folders",
    "the longest common end of the path decides; otherwise refused",
)
def test_names_in_several_folders(here):
    truth = truth_json()
    for i, image in enumerate(truth["images"]):
        image["file_name"] = f"{'ab'[i % 2]}/{i // 2}.jpg"
    write("gt.json", truth)

    def path(i):
        return f"{'ab'[i % 2]}/{i // 2}"

    assert "file name" in right(rows(image_id=path))
    assert "file name" in right(rows(image_id=lambda i: f"/c/{path(i)}.png"))
    text = refusal(rows(image_id=lambda i: str(i // 2)))
    assert "image_id '0' fits several images" in text
    assert "'x'" in refusal([rows()[0] | dict(image_id="x")])


def test_two_names_of_one_image(here):
    twice = [rows()[0] | dict(image_id=v) for v in ("100.jpg", "0100")]
    assert "'100.jpg' and '0100' both fit the image 000100.jpg" in refusal(twice)


def test_ids_and_names_of_different_images(here):
    "Ids 0..11, and files whose numbers are the same ones in another order."
    turned = truth_json(image_id=lambda i: i)
    for i, image in enumerate(turned["images"]):
        image["file_name"] = f"{(i + 5) % 12:06d}.jpg"
    write("gt.json", turned)
    by_name = rows(image_id=lambda i: (i + 5) % 12)
    assert "--images name reads it so" in refusal(by_name)
    assert "by file name" in right(by_name, images="name")
    assert right(rows(image_id=lambda i: i)) == ""


@situation(
    "results",
    "Detections on images that the truth does not have",
    "refused; `--extra-images drop` leaves them out and counts them",
)
def test_more_images_than_the_truth_has(here):
    more = [row | dict(image_id=500 + k) for k, row in enumerate(rows()[:3])]
    text = refusal(rows() + more)
    assert "3 of 51 entries have an unknown image_id, the first is entry 48" in text
    assert "3 of 15 images are unknown; --extra-images drop leaves them out" in text
    said = right(rows() + more, extra_images="drop")
    assert "left out: 3 of 51 detections, on 3 images" in said
    # nothing fits: that is not a part of a larger set
    assert "unknown image_id" in refusal(more, extra_images="drop")


# Wrappers


@situation(
    "results",
    "Detections as a COCO data set with scores (FiftyOne)",
    "read",
)
def test_a_data_set_object_with_scores(here):
    "FiftyOne numbers images and categories as it likes."
    own = truth_json(0, names=NAMES[::-1], image_id=lambda i: 11 - i)
    own["annotations"] = rows(0, image_id=lambda i: 11 - i, label=5 - LABEL)
    said = right(own)
    assert "names of the file's own categories" in said and "by file name" in said
    same = truth_json() | dict(annotations=rows())
    assert right(same) == ""
    assert right(dict(annotations=rows())) == ""
    own["categories"][0]["name"] = "gnu"
    assert "its category 'gnu' is not a class of the ground truth" in refusal(own)


@pytest.mark.parametrize(
    "data, words",
    [
        (dict(predictions=[], info=1), "got an object with 'predictions', 'info'"),
        ({}, "got an object with nothing in it"),
        ("x", "got str"),
        (truth_json(), "no annotation has a 'score': ground truth, not detections"),
        ([dict(image_id=10, detections=[])], "entries lack one of image_id, category_id, bbox"),
    ],
)
def test_other_wrappers_are_refused_by_what_is_there(here, data, words):
    assert words in refusal(data)


# Boxes and scores

FORMS = {
    "xyxy": BOX,
    "cxcywh": np.c_[XYWH[:, :2] + XYWH[:, 2:] / 2, XYWH[:, 2:]],
    "xywh-share": XYWH / [W, H, W, H],
    "xyxy-share": BOX / [W, H, W, H],
    "cxcywh-share": np.c_[XYWH[:, :2] + XYWH[:, 2:] / 2, XYWH[:, 2:]] / [W, H, W, H],
}


@situation(
    "results",
    "Boxes are x1, y1, x2, y2, or centre and size, or shares of the image",
    "refused, with how many objects are covered in either reading; `--boxes` reads it",
)
@pytest.mark.parametrize("form", FORMS)
def test_other_boxes_are_refused_by_name(here, form):
    text = refusal(rows(bbox=FORMS[form]))
    assert f"--boxes {form} reads it so" in text
    assert right(rows(bbox=FORMS[form]), boxes=form) == ""
    assert "--boxes: must be one of xywh, xyxy" in str(
        pytest.raises(ValueError, read, rows(), boxes="yxyx").value
    )


def test_boxes_that_cannot_be_of_the_form(here):
    assert "have a bbox that is not xyxy" in refusal(rows(), boxes="xyxy")
    truth = truth_json()
    for image in truth["images"]:
        del image["width"]
    write("gt.json", truth)
    assert "states no size" in refusal(rows(bbox=FORMS["xywh-share"]), boxes="xywh-share")


@situation(
    "results",
    "Boxes past their images",
    "counted: were the images of another size?",
)
def test_boxes_past_the_image_are_counted(here):
    found, _, said = read(rows(bbox=XYWH * 3))
    assert "of 48 boxes go past their image" in said and len(found["score"]) == 48


@situation(
    "results",
    "Boxes in pixels of the square that the network saw",
    "told, with the side of the square; read as they stand",
)
def test_boxes_of_the_network_are_noticed(here):
    square = XYWH * (64 / W) + [0, (64 - 64 * H / W) / 2, 0, 0]
    assert "looks like pixels of a square of 64 px" in read(rows(bbox=square))[2]
    assert "looks like" not in read(rows())[2]


@situation(
    "results",
    "Scores of 0..100",
    "told, and read",
)
def test_scores_in_per_cent(here):
    assert "read as per cent, divided by 100" in right(rows(score=100.0))
    found, _, said = read(rows(score=100.0))
    assert found["score"].max() == pytest.approx(0.9)
    logits = [row | dict(score=row["score"] * 8 - 4) for row in rows()]
    found, _, said = read(logits)
    assert found["score"].min() < 0 and "a least score (--conf) means nothing" in said


# Ground truth of any layout, and commands


def folders():
    "The objects as COCO folder, YOLO folder with YAML, and VOC folder."
    truth = truth_json()
    for i in range(12):
        for place in ("coco/images/val", "yolo/images/val", "voc/JPEGImages"):
            Path(place).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (W, H), (i, 0, 0)).save(f"{place}/{100 + i:06d}.jpg")
    for place in ("coco/annotations", "yolo/labels/val", "voc/Annotations", "voc/ImageSets/Main"):
        Path(place).mkdir(parents=True)
    write("coco/annotations/instances_val.json", truth)
    for i in range(12):
        labels, objects = [], []
        for k in np.flatnonzero(i == IMAGE):
            shares = " ".join(f"{v:.6f}" for v in FORMS["cxcywh-share"][k])
            labels.append(f"{LABEL[k]} {shares}")
            sides = zip(("xmin", "ymin", "xmax", "ymax"), BOX[k] + [1, 1, 0, 0], strict=True)
            sides = "".join(f"<{side}>{v}</{side}>" for side, v in sides)
            objects.append(
                f"<object><name>{NAMES[LABEL[k]]}</name><bndbox>{sides}</bndbox></object>"
            )
        Path(f"yolo/labels/val/{100 + i:06d}.txt").write_text("\n".join(labels))
        size = f"<size><width>{W}</width><height>{H}</height></size>"
        xml = f"<annotation>{size}{''.join(objects)}</annotation>"
        Path(f"voc/Annotations/{100 + i:06d}.xml").write_text(xml)
    Path("yolo/data.yaml").write_text(f"val: images/val\nnames: {NAMES}")
    Path("voc/ImageSets/Main/val.txt").write_text("\n".join(f"{100 + i:06d}" for i in range(12)))


@situation(
    "results",
    "`--gt` is a folder or a YAML instead of a COCO file",
    "read, as `mhdet data` reads it",
)
def test_any_data_set_is_ground_truth(here):
    folders()
    for source in ("coco", "yolo/data.yaml", "voc"):
        for first, option in ((0, "position0"), (1, "position1")):
            results = rows(first, image_id=lambda i: 100 + i)
            right(results, source, ids=option)
            right(results, source)
    line = "eval --gt yolo/data.yaml --dt dt.json --json"
    write("dt.json", rows(0, image_id=lambda i: f"{100 + i:06d}"))
    code, out, err = run_line(line)
    assert (code, json.loads(out)["coco"]["AP50"], err) == (0, 1, "")
    assert "no split 'train'" in run_line(f"{line} --split train")[2]


def test_the_commands_take_the_options(here):
    shifted = write("dt.json", rows(0, skip=[0]))
    for command in ("eval", "confuse", "errors"):
        line = f"{command} --gt gt.json --dt {shifted}"
        code, out, err = run_line(line)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith("mhdet: dt.json: category_id looks like positions from 0")
        assert run_line(f"{line} --ids position0")[0] == 0
        assert "--ids: must be one of" in run_line(f"{line} --ids three")[2]
        assert "--ids is about a file" in run_line(f"{command} RUN --ids category")[2]
    write("plain.json", rows())
    write("corners.json", rows(bbox=BOX))
    line = "compare --gt gt.json --replicates 20 --swaps 0 --json"
    sides = f"--a plain.json --b {shifted}"
    assert "--ids position0" in run_line(f"{line} {sides}")[2]
    code, out, err = run_line(f"{line} {sides} --ids category,position0")
    assert (code, json.loads(out)["b"]) == (0, pytest.approx(5 / 6)), err
    code, out, err = run_line(f"{line} --a plain.json --b corners.json --boxes xywh,xyxy")
    assert (code, json.loads(out)["delta"]) == (0, 0), err
    line = "errors --gt gt.json --dt plain.json corners.json --boxes xywh,xyxy,xywh"
    assert "--boxes: expected 2 values or one, got 3" in run_line(line)[2]


def test_what_is_found_out_is_one_line_on_stderr(here):
    write("dt.json", rows(0, image_id=lambda i: f"{100 + i:06d}", score=100.0))
    code, out, err = run_line("eval --gt gt.json --dt dt.json --json")
    assert code == 0 and json.loads(out)["coco"]["AP50"] == 1
    lines = err.splitlines()
    assert len(lines) == 3 and all(line.startswith("mhdet: dt.json: ") for line in lines)


def test_compare_reads_each_side_in_its_own_way(here):
    write("a.json", rows())
    write("b.json", rows(0, skip=[0]))
    how = dict(n=20, swaps=0)
    with pytest.raises(ValueError, match="--ids position0"):
        compare("gt.json", ["a.json"], ["b.json"], **how)
    result = compare(
        read_truth("gt.json"), ["a.json"], ["b.json"], reading=(None, dict(ids="position0")), **how
    )
    assert (result["a"], result["b"]) == (1, pytest.approx(5 / 6))


@pytest.mark.parametrize("layout", ["coco", "yolo/data.yaml", "voc"])
def test_ids_of_a_resized_copy_are_those_of_its_files(here, layout):
    "What YOLOv7 and Ultralytics write about the copy's images fits its JSON without options."
    folders()
    resize_copy(open_data(layout, dev=0), 60, "small")
    truth = json.loads(Path("small/annotations/instances_val.json").read_text())
    for image in truth["images"]:
        stem = Path(image["file_name"]).stem
        assert image["id"] == (int(stem) if stem.isnumeric() else stem)
        assert Path("small/images/val", image["file_name"]).is_file()
    first = min(c["id"] for c in truth["categories"])
    number = {i: m["id"] for i, m in enumerate(truth["images"])}
    half = rows(first, image_id=number.get, bbox=XYWH / 2)
    assert right(half, "small/annotations/instances_val.json") == ""


# The files of the case


@shared
@pytest.mark.parametrize(
    "file, truth, options, words, ap50",
    [
        ("voc_plain", "voc2007-mini", {}, "", 0.98),
        ("voc_v7_0based_no0", "voc2007-mini", {}, "--ids position0 reads it so", None),
        ("voc_v7_0based_no0", "voc2007-mini", dict(ids="position0"), "", 0.93),
        ("roboflow_v7", "gt_roboflow.json", {}, "--ids position0", 0.98),
        ("roboflow_v7", "gt_roboflow.json", dict(ids="position0"), "", 0.98),
        ("cat80_1", "coco-mini", {}, "--ids position1", 0.45),
        ("cat80_1", "coco-mini", dict(ids="position1"), "", 0.45),
        ("id_stem", "coco-mini", {}, "by file name", 0.45),
        ("as_dataset", "coco-mini", {}, "", 0.45),
    ],
)
def test_files_of_the_case(file, truth, options, words, ap50):
    own = truth.endswith(".json")
    source = CASE / truth if own else SHARED / f"data/{truth}/annotations/instances_val.json"
    if not source.is_file():
        pytest.skip(f"{truth} is not there")
    source = read_truth(source)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            found = read_predictions(CASE / f"{file}.json", source, **options)
        except ValueError as error:
            assert ap50 is None and words in str(error)
            return
    assert words in " ".join(str(line.message) for line in said) and len(said) == bool(words)
    figures = evaluate(source.gt, found, source.names, len(source.ids), "coco")
    assert figures["coco"]["AP50"] == pytest.approx(ap50, abs=0.01)
