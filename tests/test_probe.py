"""`mhdet probe`: every kind of run, what is left out and why, bad input, and no hook that stays."""

import contextlib
import hashlib
import importlib.util
import json
import shlex
import shutil
from pathlib import Path

import pytest
import reference_models as theirs
import torch
from typer.testing import CliRunner

from mhdet.cli import probe
from mhdet.cli.commands import app
from mhdet.data.toy import TOY_CLASSES
from mhdet.model.detector import Detector
from mhdet.partition.heads import Partition
from mhdet.probe.activations import ActStats
from mhdet.probe.symptoms import SYMPTOMS, examine, norm_drift

SMALL = "data=toy:24 imgsz=64 batch=8 width=0.125 workers=0 epochs=1 precision=fp32 device=cpu"
ONE_HEAD = "one head: there is no second one to pull against"
timm = pytest.mark.skipif(not importlib.util.find_spec("timm"), reason="timm is not installed")


def mhdet(line):
    "Exit code, stdout, stderr."
    result = CliRunner().invoke(app, shlex.split(line))
    return result.exit_code, result.stdout, result.stderr


def contents(folder):
    "Every file, by its hash."
    files = (p for p in sorted(Path(folder).rglob("*")) if p.is_file())
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def here(tmp_path_factory, one_thread):
    "A folder with a head file, another's weights and a run of one head."
    folder = tmp_path_factory.mktemp("probe")
    with contextlib.chdir(folder):
        halves = "head_0: {classes: [0, 1, 2, 3, 4, 5]}, head_1: {classes: [6, 7, 8, 9, 10, 11]}"
        Path("heads.yaml").write_text(f"head_assignments: {{{halves}}}")
        theirs.save("best.pt", {"model": theirs.one_head(TOY_CLASSES)})
        code, _, err = mhdet(f"train {SMALL} run=one")
        assert code == 0, err
        yield folder


# run -> how it is made, and what cannot be read of it
KINDS = {
    "shared": (f"train {SMALL} boxes=shared --heads heads.yaml run=shared", {}),
    "foreign": (
        "import best.pt data=toy:24 imgsz=64 --out foreign",
        {"gradients": ONE_HEAD, "range test": "this run was not trained here"},
    ),
    "backbone": (f"train {SMALL} trunk=timm/test_resnet run=backbone", {"gradients": ONE_HEAD}),
    "scales": (
        f"train {SMALL} trunk=toy lr=.002 clip=20 'three_scale={{lambda_obj: 20}}' run=scales",
        dict.fromkeys(
            ("class maps", "gradients"),
            "model: expected a detector with a MultiHead, got ThreeScale",
        ),
    ),
}


@pytest.mark.parametrize(
    "run", [pytest.param(k, marks=timm if k == "backbone" else ()) for k in KINDS]
)
def test_every_kind_of_run(here, run, monkeypatch):
    made, reasons = KINDS[run]
    monkeypatch.setattr(probe, "_write", lambda out, found, rows: [*map(str, found.drawings)])
    assert mhdet(made)[0] == 0
    before = contents(f"runs/{run}")
    steps = "--range-steps 10" if run == "foreign" else "--range-steps 0"
    code, out, err = mhdet(f"probe {run} {steps} --json")
    assert code == 0, err
    value = json.loads(out)
    assert contents(f"runs/{run}") == before
    for instrument, reason in reasons.items():
        assert value["left_out"][instrument] == reason
    read = [row["symptom"] for row in value["readings"]]
    assert {"dead layer", "batch-norm drift", "anchor scale", "other images"} <= set(read)
    assert ("heads cancel" in read) == (run == "shared")
    assert ("class-maps" in value["files"]) == (run != "scales")


def test_bad_input_is_one_line(here):
    shutil.copytree("runs/one", "runs/empty")
    for state in ("last", "best"):
        shutil.rmtree(f"runs/empty/{state}", ignore_errors=True)
    other = Path("other/annotations")
    other.mkdir(parents=True)
    images = [{"id": 1, "file_name": "1.png", "width": 32, "height": 32}]
    truth = {"images": images, "categories": [{"id": 1, "name": "cat"}]}
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9], "area": 81, "iscrowd": 0}
    from PIL import Image

    for split in ("train", "val"):
        notes = [box] if split == "train" else []
        (other / f"instances_{split}.json").write_text(json.dumps(truth | {"annotations": notes}))
        Path(f"other/images/{split}").mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(f"other/images/{split}/1.png")
    lines = {
        "probe ghost": "ghost: no run there",
        "probe one@best7": "one@best7: no state",
        "probe empty": "runs/empty/last",
        "probe one --data other --split train dev=0": "its classes are not those of run one",
        "probe one --data other --split val": "val",
        "probe one --split test": "toy:24: no split 'test'",
        "probe one epochs=3": "'epochs' changes nothing here",
        "probe one --range-steps 3": "--range-steps 3: must be 0, or 10 or more",
    }
    for line, words in lines.items():
        code, out, err = mhdet(line)
        last = err.splitlines()[-1]
        assert (code, out) == (2, "") and words in last and "Traceback" not in err, (line, err)


def test_a_run_that_moves_away_from_its_data(here, monkeypatch):
    "Without the training images brightness and range test are left out, with the reason."
    monkeypatch.setattr(probe, "_write", lambda out, found, rows: [])
    shutil.copytree("runs/one", "runs/moved")
    config = Path("runs/moved/config.yaml")
    config.write_text(config.read_text().replace("toy:24", "gone"))
    code, out, err = mhdet("probe moved --data toy:24 --json")
    assert code == 0, err
    left_out = json.loads(out)["left_out"]
    assert left_out["brightness"] == left_out["range test"] == "gone: no such folder or YAML"


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("layer", ["trunk.stem.0", "trunk.p4.cv5.bn", "head"])
def test_no_hook_and_no_mode_survives_an_error_in_a_layer(layer):
    model = Detector.make(Partition.single(["a", "b"]), width=0.125)
    model.trunk.p3.eval()
    modes = [m.training for m in model.modules()]

    def broken(*_):
        raise OSError("planted")

    model.get_submodule(layer).forward = broken
    images = torch.rand(2, 3, 64, 64)

    def watched():
        with ActStats(model):
            model(images)

    with pytest.raises(OSError, match="planted"):
        watched()
    assert hooks(model) == 0
    buffers = [b.clone() for b in model.buffers()]
    target = torch.tensor([[0, 0, 0.5, 0.5, 0.2, 0.2]])
    for look in (lambda: norm_drift(model, images), lambda: examine(model, images, target)):
        with pytest.raises(OSError, match="planted"):
            look()
        assert hooks(model) == 0
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))


def test_every_symptom_stands_on_the_page_for_users():
    page = (Path(__file__).resolve().parents[1] / "docs/probe.md").read_text(encoding="utf8")
    for name, symptom in SYMPTOMS.items():
        row = next(line for line in page.splitlines() if line.startswith(f"| {name} |"))
        assert symptom.instrument in row and f"probe-{symptom.figure}.png" in row
        assert f"{symptom.limit:g}" in row
