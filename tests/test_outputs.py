"""What is written stays within bounds and apart: figures of any shape, names of any ids."""

import contextlib
import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import pyplot as plt
from PIL import Image
from typer.testing import CliRunner

from mhdet.cli import images as cli_images
from mhdet.cli.commands import app
from mhdet.cli.images import draw_detections
from mhdet.core.files import file_names
from mhdet.core.plotting import image_figsize, theme
from mhdet.data.records import ClassMap, Records
from mhdet.data.toy import toy_dataset
from mhdet.evaluation.compare import comparison_figures
from mhdet.evaluation.confusion import plot_confusion
from mhdet.evaluation.errors import plot_suspect
from mhdet.evaluation.results import plot_boxes
from mhdet.evaluation.statistics import plot_diffs
from mhdet.partition.heads import Head, Partition
from mhdet.tools.browse import plot_sample

TINY = "data=toy:16 imgsz=64 batch=8 width=0.125 workers=0 precision=fp32 device=cpu epochs=1"
SHAPES = [(8, 500), (3, 1500), (6000, 1), (2100, 2300), (1, 1)]
ODD = r"$\q$"  # matplotlib would take it for mathematics, and fail
MOST = 5000  # pixels of a figure along a side


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    "A working directory with one trained run."
    with contextlib.chdir(tmp_path_factory.mktemp("outputs")):
        assert mhdet(f"train {TINY} run=r")[0] == 0
        yield Path()


def mhdet(line):
    "Exit code, stdout, stderr."
    result = CliRunner().invoke(app, shlex.split(line))
    assert "Traceback" not in result.stderr
    return result.exit_code, result.stdout, result.stderr


def detect(where, *more):
    "Exit code, facts, lines of stderr, of a command that keeps some detections."
    line = shlex.join(["detect", "r", *map(str, where), "--conf", "1e-5", "max_det=2", *more])
    code, out, err = mhdet(f"{line} --json")
    return code, json.loads(out) if code < 2 else out, err.splitlines()


def draw(file, width=80, height=60):
    "An image file of noise."
    file.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    Image.fromarray(noise).save(file)
    return file


@pytest.fixture
def folder():
    "A new folder `in`; nothing is left of earlier drawings."
    for name in ("in", "detections"):
        shutil.rmtree(name, ignore_errors=True)
    Path("in").mkdir()
    return Path("in")


def saved_size(ax_or_figure, file):
    "Width and height of the figure as it is saved, px; it is closed."
    figure = getattr(ax_or_figure, "figure", ax_or_figure)
    figure.savefig(file)
    plt.close(figure)
    with Image.open(file) as image:
        return image.size


@pytest.mark.parametrize("width, height", SHAPES)
def test_figures_of_images_of_any_shape(tmp_path, width, height):
    theme()
    image = np.zeros((height, width, 3), np.uint8)
    box = np.array([[0.0, 0, width, height]])
    boxes = dict(box=box, label=np.array([0]), score=np.array([0.5]))
    one = {"image": np.array([0]), "label": boxes["label"], "box": box}
    gt = one | dict(area=box[:, 2] * box[:, 3], ignore=np.zeros(1, bool), crowd=np.zeros(1, bool))
    sizes = np.array([[width, height]])
    records = Records(ClassMap([ODD, "b"], [1, 2]), [1], None, sizes, gt, pixels=image[None])
    suspect = dict(image=0, box=box[0], label=0, seen=0, kind="mislabelled", suspicion=0.5)
    heads = Partition([Head(ODD, [0]), Head("b", [1])], [ODD, "b"])
    figures = [
        plot_boxes(image, boxes, records.names),
        plot_suspect(image, suspect, records.names),
        plot_sample(records, 0, heads, {ODD: one | {"score": boxes["score"]}})[0],
        draw_detections(image, boxes, heads, plt.subplots(figsize=image_figsize(width, height))[1]),
    ]
    for ax in figures:
        assert max(saved_size(ax, tmp_path / "f.png")) <= MOST


@pytest.mark.parametrize("nc", [81, 170])
def test_figures_of_any_number_of_classes(tmp_path, nc):
    theme()
    names = [f"{ODD}{k}" for k in range(nc)]
    matrix = np.eye(nc + 1) * 3
    ax = plot_confusion(matrix, names, np.arange(nc) % 4)
    assert len(ax.get_xticks()) == len(ax.get_yticks()) <= 81
    assert len(ax.get_xticks()) > 40
    assert max(saved_size(ax, tmp_path / "f.png")) <= MOST
    # each name stands at its own row, in the order of the heads
    order = np.argsort(np.arange(nc) % 4, kind="stable")
    for place, text in zip(ax.get_yticks(), ax.get_yticklabels(), strict=True):
        row = int(place - 0.5)
        assert text.get_text() == ("background" if row == nc else names[order[row]])


@pytest.mark.parametrize("n", [1, 300])
def test_figures_of_any_number_of_differences(tmp_path, n):
    diffs = {f"{ODD}{k}": dict(delta=0.1, low=0.0, high=0.2) for k in range(n)}
    assert max(saved_size(plot_diffs(diffs), tmp_path / "f.png")) <= MOST


def test_a_comparison_shows_the_classes_that_differ_most(tmp_path):
    nc = 120
    names = [f"c{k}" for k in range(nc)]
    span = dict(delta=0.0, low=-0.1, high=0.1)
    kinds = ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss")
    profile = {"errors": {kind: dict(n=1, dAP=0.1) for kind in kinds}}
    per_class = {}
    for k, name in enumerate(names):
        per_class[name] = {"AP50": span | dict(delta=k / nc if k % 2 else -k / nc)}
    result = span | dict(AP=span, per_class=per_class, margin=0.01, verdict="undecided")
    result |= dict(errors={"a": profile}, names=names)
    result["confusion"] = {"a": np.eye(nc + 1), "b": np.eye(nc + 1)}
    figures = comparison_figures(result)
    ax = figures["classes"].axes[0]
    shown = [text.get_text() for text in ax.get_yticklabels()]
    assert set(shown) == set(names[-80:])
    assert shown[0] == "c119" and shown[-1] == "c118"  # from most gained to most lost
    assert "80 of 120 classes" in ax.get_title(loc="left")
    for figure in figures.values():
        assert max(saved_size(figure, tmp_path / "f.png")) <= MOST


def test_detect_answers_images_of_any_shape(here, folder):
    for k, (width, height) in enumerate(SHAPES):
        draw(folder / f"{k}.png", width, height)
    code, facts, err = detect([folder])
    assert (code, facts["pictures"], err) == (0, len(SHAPES), [])
    for k in range(len(SHAPES)):
        with Image.open(f"detections/{k}.png") as drawing:
            assert max(drawing.size) <= MOST


def test_detect_names_folders_of_images_that_it_does_not_enter(here, folder):
    for name in ("a.png", "day 2/b.png", "notes/c.txt", ".cache/d.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        draw(folder / name) if name.endswith("png") else (folder / name).touch()
    code, facts, err = detect([folder])
    assert (code, facts["pictures"], facts["passed_over"]) == (0, 1, 1)
    assert err == ["mhdet: passed over: folder of images inside: 1 (in/day 2)"]


def test_detect_names_what_it_cannot_read_and_answers_the_rest(here, folder):
    "More than the 5 % of a data set: it is somebody's folder."
    for name in ("good.JPG", "good two.jpeg", "._mac.jpg", ".hidden.png"):
        draw(folder / name)
    (folder / "empty.jpg").touch()
    (folder / "text.png").write_text("<html>404</html>")
    (folder / "half.jpg").write_bytes((folder / "good.JPG").read_bytes()[:800])
    (folder / "lost.jpg").symlink_to("nowhere.jpg")
    (folder / "photo.heic").write_bytes(b"of a kind that Pillow does not read")
    (folder / "notes.txt").write_text("no image")
    (folder / "folder.jpg").mkdir()
    code, facts, err = detect([folder, "absent.jpg", folder / "good.JPG"])
    assert code == 1
    counts = {k: facts[k] for k in ("pictures", "unreadable", "passed_over")}
    assert counts == dict(pictures=2, unreadable=5, passed_over=3)
    for name in ("in/empty.jpg", "in/text.png", "in/half.jpg", "in/lost.jpg", "absent.jpg"):
        assert [line.startswith(f"mhdet: not read: {name}: ") for line in err].count(True) == 1
    assert "mhdet: passed over: hidden image file: 2 (in/._mac.jpg)" in err
    assert sorted(p.name for p in Path("detections").iterdir()) == [
        "detections.json",
        "good two.png",
        "good.png",
    ]
    ids = {row["image_id"] for row in json.loads(Path("detections/detections.json").read_text())}
    assert ids == {"good", "good two"}


def test_detect_of_nothing_readable_is_bad_input(here, folder):
    code, _, err = detect([folder])
    assert code == 2 and err[0].startswith("mhdet: in: no images; expected files .")
    (folder / "a.jpg").touch()
    (folder / "b.jpg").touch()
    code, _, err = detect([folder])
    assert code == 2 and err[-1].startswith("mhdet: in/a.jpg: ") and "(and 1 more)" in err[-1]
    draw(folder / "c.jpg")
    (folder / "none").mkdir()
    code, facts, err = detect([folder / "c.jpg", folder / "none"])
    assert (code, facts["pictures"]) == (1, 1)
    assert err[0].startswith("mhdet: in/none: no images; expected files .")


@pytest.mark.parametrize(
    "names",
    [
        ["a/1.jpg", "b/1.jpg"],
        ["1.jpg", "1.png"],
        ["1.jpg", "01.jpg", "2.jpg"],
        ["a/b.jpg", "a_b.jpg", "c/b.jpg"],
        ["A.png", "a.png"],
        ["x:y.png", "x?y.png", "x_y.png"],
        ["\u00e9.png", "e\u0301.png"],
        ["a.b.png", "a.png", "a..png"],
        ["detections.png"],
        ["n" * 240 + "1.png", "n" * 240 + "2.png"],
    ],
)
def test_no_input_overwrites_the_output_of_another(here, folder, names):
    files = [draw(folder / name) for name in names]
    if len({f.stat().st_ino for f in files}) < len(files):
        pytest.skip("a file system on which these are one file")
    drawn = []
    for _ in range(2):  # the same names again
        shutil.rmtree("detections", ignore_errors=True)
        code, facts, err = detect(files)
        assert (code, facts["pictures"], err) == (0, len(names), [])
        drawn.append(sorted(p.name for p in Path("detections").glob("*.png")))
    assert drawn[0] == drawn[1]
    assert len({name.casefold() for name in drawn[0]}) == len(names)
    rows = json.loads(Path("detections/detections.json").read_text())
    assert len({row["image_id"] for row in rows}) == len(names)


def test_a_large_folder_is_answered_part_by_part(here, folder, monkeypatch):
    toy = toy_dataset(5, size=64)
    for k in range(5):
        Image.fromarray(toy.image(k)).save(folder / f"{k}.png")
    results = []
    for n in (256, 2):
        monkeypatch.setattr(cli_images, "AT_ONCE", n)
        code, facts, _ = detect([folder])
        assert (code, facts["pictures"]) == (0, 5)
        rows = json.loads(Path("detections/detections.json").read_text())
        results.append([(row["image_id"], row["category_id"]) for row in rows])
    assert results[0] == results[1]
    assert {image for image, _ in results[0]} == set(range(5))


def test_curves_of_two_runs_are_two_files(here):
    for name in ("a/b", "a-b", "plateau", "Plateau"):
        shutil.copytree("runs/r", f"runs/{name}", dirs_exist_ok=True)
    code, out, err = mhdet("plot a/b a-b plateau Plateau --out fig --json")
    assert code == 0, err
    tables = [file for file in json.loads(out) if file.endswith(".csv")]
    assert len({file.casefold() for file in tables}) == 4 + 5
    assert "run" in Path("fig/plateau.csv").read_text().splitlines()[0]


words = st.lists(st.text(max_size=300) | st.integers(), max_size=8, unique=True)


@settings(max_examples=60, deadline=None)
@given(words, st.lists(st.text(max_size=5), max_size=3))
def test_file_names_are_apart_and_possible_everywhere(words, taken):
    names = file_names(words, taken)
    assert names == file_names(words, taken)
    assert len(names) == len(words)
    folded = [name.casefold() for name in names]
    assert len(set(folded)) == len(names)
    assert not {t.casefold() for t in taken} & set(folded)
    for name in names:
        assert name and len(name.encode()) <= 220
        assert not set(name) & set('/\\:*?"<>|\0\n') and name.strip(" .") == name
