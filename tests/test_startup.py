"""What each command imports: help and options nothing large, the reading commands no torch.

torch takes seconds to import, so commands that read files start without it.
"""

import ast
import importlib
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "torchvision", "accelerate", "sklearn")
LARGE = (*HEAVY, "pandas", "numpy", "scipy", "matplotlib", "seaborn")

# words of the command line -> modules that must not be imported; all in one process, in this order
LINES = {
    "--help": LARGE,
    "trian": LARGE,
    "train --help": LARGE,
    "diagnose --help": LARGE,
    "probe --help": LARGE,
    "options": LARGE,
    "options warmup --json": LARGE,
    "train epoch=3": LARGE,
    "runs": HEAVY,
    "plot one --out figures": HEAVY,
    "plot --help": HEAVY,
    "plot one exp/results.txt --out figures": HEAVY,
    "confuse --gt gt.json --dt dt.json --out C.csv": HEAVY,
    "partition --confusion C.csv --num-heads 2 --out H.yaml": HEAVY,
    "partition --strategy optimal --confusion C.csv --num-heads 2": HEAVY,
    "partition --strategy random --confusion C.csv --num-heads 2": HEAVY,
    "partition --strategy standard": HEAVY,
    "partition --data data --counts N.csv --pairs P.yaml --num-heads 2": HEAVY,
    "confuse --gt gt.json --dt dt.json --heads H.yaml": HEAVY,
    "errors --gt gt.json --dt dt.json dt.json --heads H.yaml --out errors": HEAVY,
    "compare --gt gt.json --a dt.json --b dt.json --replicates 20 --swaps 20": HEAVY,
    "eval --gt gt.json --dt dt.json": HEAVY,
    "data data": HEAVY,
    "data toy:8": HEAVY,
    "data data --resize 32 --out small": HEAVY,
}
REFUSED = ("trian", "train epoch=3")

CHILD = """
import contextlib, io, json, shlex, sys
from mhdet.cli.commands import app
LINES = json.loads(sys.argv[1])
for line in LINES:
    errors = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        try:
            app(shlex.split(line))
        except SystemExit as stop:
            code = stop.code
    print(json.dumps([line, code, errors.getvalue(), sorted(sys.modules)]), flush=True)
"""


def write_inputs(folder):
    "A finished run, a COCO folder, results, counts, pairs: as little as the commands accept."
    from mhdet.core.config import load_config
    from mhdet.data.toy import toy_dataset

    names = ["car", "truck", "bus"]
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(names)]
    images = [{"id": i, "file_name": f"{i}.png", "width": 64, "height": 64} for i in range(4)]
    annotations, predictions = [], []
    for i in range(8):
        box = {"image_id": i % 4, "bbox": [8 * (i // 4), 4, 6, 9], "category_id": i % 3 + 1}
        annotations.append({"id": i, "area": 54, "iscrowd": 0, **box})
        label = (i + i % 2) % 3 + 1
        predictions.append({**box, "category_id": label, "score": 0.9 - 0.05 * i})
    truth = {"images": images, "categories": categories, "annotations": annotations}
    (folder / "gt.json").write_text(json.dumps(truth))
    (folder / "dt.json").write_text(json.dumps(predictions))
    (folder / "N.csv").write_text("name,instances\ncar,3\ntruck,3\nbus,2\n")
    (folder / "P.yaml").write_text("pairs: [[car, truck]]\n")
    (folder / "data/annotations").mkdir(parents=True)
    from PIL import Image

    for split in ("train", "val"):
        (folder / "data/images" / split).mkdir(parents=True)
        for i in range(4):
            picture = Image.fromarray(toy_dataset(1, size=64).image(0))
            picture.save(folder / f"data/images/{split}/{i}.png")
        (folder / f"data/annotations/instances_{split}.json").write_text(json.dumps(truth))
    (folder / "exp").mkdir()
    line = "0/0 1G .1 .1 .1 .3 4 64 .5 .5 .4 .2 .1 .1 .1\n"
    (folder / "exp/results.txt").write_text(line)
    run = folder / "runs/one"
    run.mkdir(parents=True)
    load_config({"data": "data", "epochs": 3}).save(run / "config.yaml")
    env = {"seed": 0, "commit": None, "date": "2026-01-01", "stopped": None, "device": "cpu"}
    (run / "env.json").write_text(json.dumps(env))
    rows = []
    for epoch in (1, 2, 3):
        losses = {f"train/{term}": 1 / epoch for term in ("box", "obj", "cls")}
        figures = {"AP50": 0.1 * epoch, "AP": 0.05 * epoch, "P": 0.5, "R": 0.5, "lr": 0.01}
        speed = {"seconds": 1.0, "eval_seconds": 0.1, "pictures_per_s": 9.0, "data_ready": 0.9}
        rows.append(json.dumps({"epoch": epoch, **losses, **figures, **speed}))
    (run / "log.jsonl").write_text("\n".join(rows) + "\n")


@pytest.fixture(scope="module")
def imports(tmp_path_factory):
    "Per line: exit code, stderr, modules imported so far."
    folder = tmp_path_factory.mktemp("startup")
    write_inputs(folder)
    env = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
    words = [sys.executable, "-c", CHILD, json.dumps(list(LINES))]
    child = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    rows = map(json.loads, child.stdout.splitlines())
    return {line: (code, errors, set(modules)) for line, code, errors, modules in rows}


@pytest.mark.parametrize("line", LINES)
def test_imports(imports, line):
    code, errors, modules = imports[line]
    assert code == (2 if line in REFUSED else 0), errors
    assert sorted(modules & set(LINES[line])) == []


def test_a_breach_is_found():
    "torch is seen where it is imported."
    code = "import sys, torch; print(sorted(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert set(HEAVY) & set(ast.literal_eval(out))


def seconds(line):
    "Processor seconds of a command, the least of three."
    env, least = os.environ | {"PYTHONPATH": str(ROOT)}, float("inf")
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        words = [sys.executable, "-m", "mhdet", *line.split()]
        subprocess.run(words, env=env, capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        least = min(least, spent)
    return least


@pytest.mark.parametrize("line", ["--help", "options"])
def test_help_and_options_start_at_once(line):
    "Half a second on an idle machine; up to twice as much where processors are shared."
    assert seconds(line) < 1.0


def lazy_imports():
    "(module, imported module, name) of the imports inside the functions of the command line."
    out = []
    for path in sorted((ROOT / "mhdet/cli").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                package = ["mhdet", "cli"][: 3 - node.level]
                module = ".".join([*package, *filter(None, [node.module])])
                out += [(path.stem, module, alias.name) for alias in node.names]
    return out


def test_every_import_inside_a_command_resolves():
    wrong = []
    for where, module, name in lazy_imports():
        imported = importlib.import_module(module)
        if not hasattr(imported, name):
            try:
                importlib.import_module(f"{module}.{name}")
            except ModuleNotFoundError:
                wrong.append(f"cli.{where}: {module} has no {name}")
    assert lazy_imports() and not wrong


BASE = """
import configparser, importlib.metadata, re, shlex, socket, sys
from importlib.metadata import packages_distributions

cfg = configparser.ConfigParser(delimiters=["="])
cfg.read(sys.argv[1], encoding="utf8")
values = {k: v for k, v in cfg["DEFAULT"].items() if "requirements" in k}
groups = {k: re.findall(r"(?:^| )([\\w.-]+)", v.lower()) for k, v in values.items()}
base = set(groups.pop("requirements"))
extra = {name for names in groups.values() for name in names} - base
owners = packages_distributions()
hidden = {m for m, names in owners.items() if {n.lower() for n in names} & extra}
hidden |= {"timm", "onnx", "onnxruntime"}
sys.modules.update(dict.fromkeys(hidden))


def refuse(*args, **kwargs):
    raise OSError("no network")


socket.socket.connect = socket.getaddrinfo = refuse
from mhdet.cli.commands import app

for line in sys.argv[2:]:
    try:
        app(shlex.split(line))
    except SystemExit as stop:
        assert not stop.code, line
"""


def test_the_base_needs_no_extra_and_no_network(tmp_path):
    "Training and evaluating the built-in data where only the base is installed."
    lines = (
        "train data=toy:24 imgsz=64 width=.125 batch=8 epochs=1 workers=0 precision=fp32 run=r",
        "eval r",
    )
    words = [sys.executable, "-c", BASE, str(ROOT / "settings.ini"), *lines]
    env = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "AP50" in done.stdout
