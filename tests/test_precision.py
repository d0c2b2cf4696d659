"""Training in bf16: who decides, what is kept, what stays fp32; and the figures on accuracy.

`python tests/test_precision.py NAME=FOLDER...` evaluates the runs of a sweep over `precision` on
val and writes `data/results/precision.csv`, e.g. `toy=runs/precision-toy`. Do it where they were
trained: the column `bf16` is of this processor.

A processor without instructions for bf16 takes eight times as long. `python tests/test_precision.py
rounded train WORDS...` is `mhdet train WORDS...` with what these instructions compute: operands and
results rounded to bf16, products summed in fp32.
"""

import contextlib
import json
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from torch.overrides import TorchFunctionMode

from mhdet.cli.commands import app
from mhdet.core.config import load_config
from mhdet.core.files import write_atomic
from mhdet.core.runs import JsonLog
from mhdet.data.splits import open_data
from mhdet.evaluation.metrics import evaluate
from mhdet.evaluation.statistics import compare_ap
from mhdet.experiment.inference import dataset, limits, predict
from mhdet.experiment.models import load_run, with_precision
from mhdet.experiment.run import train
from mhdet.experiment.study import _same_precision
from mhdet.experiment.sweep import sweep_command, sweep_rows
from mhdet.model.loss import RoutedLoss
from mhdet.model.trunks import make_trunk
from mhdet.training import learner as learning
from mhdet.training.checkpoint import flatten, load
from mhdet.training.learner import Callback, StopFit

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[1]
SMALL = [
    *("data=some/data", "imgsz=64", "width=0.125", "batch=8", "nominal_batch=8", "workers=0"),
    *("device=cpu", "epochs=2"),
]


@pytest.fixture(scope="module")
def images():
    return open_data("toy:48")


@pytest.fixture
def processor(monkeypatch):
    "Makes this processor have the given flags, and `auto` choose by them."
    monkeypatch.setattr(learning, "BF16_ON_CPU", True)

    def make(*flags):
        known = dict.fromkeys(("avx512_bf16", "amx_bf16"), False) | dict.fromkeys(flags, True)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)

    return make


def decided(*words):
    return with_precision(load_config(*SMALL, *words)).training.precision


def to_bf16(x):
    "A tensor rounded to bf16 and kept in fp32; its gradient is rounded too."
    return x.bfloat16().float()


class Rounded(TorchFunctionMode):
    "What autocast to bf16 computes, in fp32: convolutions of rounded operands, rounded results."

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = function.__name__
        if name == "conv2d":
            args = [to_bf16(arg) if torch.is_tensor(arg) else arg for arg in args]
        result = function(*args, **(kwargs or {}))
        changes = ("conv2d", "batch_norm", "leaky_relu", "leaky_relu_", "silu", "silu_")
        return to_bf16(result) if name in changes else result


def rounded_autocast(accelerator):
    "In place of `Accelerator.autocast`."
    return Rounded() if accelerator.mixed_precision == "bf16" else contextlib.nullcontext()


def stored(run):
    tree = load(run / "last")[0]
    return flatten({k: tree[k] for k in ("model", "ema", "optimizer", "position")})[0]


class StopAt(Callback):
    "Ends the training in the middle of an epoch."

    def after_batch(self, learner):
        if (learner.epoch, learner.batch) == (1, 2):
            raise StopFit("SIGINT")


@pytest.mark.parametrize("flag", ["avx512_bf16", "amx_bf16"])
def test_flags_and_kind_of_trunk_decide(processor, monkeypatch, flag):
    "One flag is enough; depthwise convolutions, the built-in images and a given word are kept."
    processor(flag)
    assert decided() == decided("device=auto") == "bf16"
    assert decided("trunk=torchvision/resnet18") == "bf16"
    assert decided("trunk=torchvision/mobilenet_v3_large") == "fp32"
    assert decided("data=toy") == decided("data=toy:600") == "fp32"
    assert decided("precision=fp32") == "fp32"
    monkeypatch.setattr(learning, "BF16_ON_CPU", False)
    assert decided() == "fp32"
    assert decided("precision=bf16") == "bf16"


def test_a_depthwise_timm_trunk_stays_fp32(processor):
    pytest.importorskip("timm")
    processor("avx512_bf16", "amx_bf16")
    assert decided("trunk=timm/tf_efficientnet_lite0") == "fp32"


def test_without_flags_and_with_a_gpu(processor, monkeypatch):
    "Without flags fp32; a torch that tells none; on a GPU `auto` stays and means what it did."
    processor()
    assert decided() == "fp32"
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert decided() == "fp32"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for has_bf16, precision in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda has=has_bf16, **_: has)
        assert decided("device=cuda") == "auto"
        assert learning.choose_precision("cuda") == precision


def test_a_run_keeps_what_was_decided(processor, images, tmp_path, monkeypatch):
    "In config.yaml and env.json; resumed on a processor without flags it is bf16, and says so."
    processor("amx_bf16")
    seen = {"maps": set(), "dev": set(), "training": set()}
    forward = RoutedLoss.forward

    def watch(loss, raws, targets, *more):
        terms = forward(loss, raws, targets, *more)
        seen["maps" if raws[0].requires_grad else "dev"] |= {raw.dtype for raw in raws}
        assert all(term.dtype == torch.float32 for term in terms.values())
        return terms

    class Watch(Callback):
        def before_fit(self, learner):
            def note(module, inputs, output):
                if module.training:
                    seen["training"] |= {t.dtype for t in output}

            learner.model.trunk.register_forward_hook(note)

    monkeypatch.setattr(RoutedLoss, "forward", watch)
    cfg = load_config(*SMALL, "run=r")
    run = train(cfg, images, root=tmp_path, quiet=True, more=[Watch(), StopAt()])
    assert load_config(run / "config.yaml").training.precision == "bf16"
    assert json.loads((run / "env.json").read_text())["precision"] == "auto: bf16"
    processor()
    with pytest.warns(UserWarning, match="no instructions for it"):
        train(None, images, resume="r", root=tmp_path, quiet=True, more=[Watch()])
    assert load_config(run / "config.yaml").training.precision == "bf16"
    assert json.loads((run / "env.json").read_text())["precision"] == "bf16: bf16"
    assert seen == {
        "maps": {torch.float32},  # of the loss
        "dev": {torch.float32},
        "training": {torch.bfloat16},
    }
    rows = JsonLog(run / "log.jsonl").rows()
    assert [row["epoch"] for row in rows] == [1, 2]
    for row in rows:
        assert all(
            abs(row[f"{part}/{k}"]) < 10 for part in ("train", "dev") for k in ("box", "obj")
        )
    model = load_run(run)[0]
    assert all(t.isfinite().all() for t in model.state_dict().values())
    assert {t.dtype for t in model.parameters()} == {torch.float32}


def test_resumed_to_the_bit(images, tmp_path):
    for name, more in (("whole", []), ("broken", [StopAt()])):
        cfg = load_config(*SMALL, "precision=bf16", f"run={name}")
        train(cfg, images, root=tmp_path, quiet=True, more=more)
    train(None, images, resume="broken", root=tmp_path, quiet=True)
    whole, broken = (stored(tmp_path / name) for name in ("whole", "broken"))
    for (name, a), b in zip(whole.items(), broken.values(), strict=True):
        assert torch.equal(a, b), name


def test_an_old_run_that_says_auto_stays_fp32(processor, images, tmp_path):
    "Its configuration was written before `auto` was decided for good."
    processor()
    cfg = load_config(*SMALL, "run=old")
    run = train(cfg, images, root=tmp_path, quiet=True, more=[StopAt()])
    load_config(run / "config.yaml").override(precision="auto").save(run / "config.yaml")
    processor("amx_bf16")
    train(None, images, resume="old", root=tmp_path, quiet=True)
    assert json.loads((run / "env.json").read_text())["precision"] == "auto: no"


def test_runs_of_a_study_have_one_precision(processor, tmp_path):
    processor("amx_bf16")
    cfg = load_config(*SMALL)
    assert _same_precision(cfg, tmp_path).training.precision == "bf16"
    (tmp_path / "base-s0").mkdir()
    for kept, expected in (("bf16", "bf16"), ("fp32", "fp32"), ("auto", "fp32")):
        cfg.override(precision=kept).save(tmp_path / "base-s0/config.yaml")
        processor()
        assert _same_precision(cfg, tmp_path).training.precision == expected
        processor("amx_bf16")
        assert _same_precision(cfg, tmp_path).training.precision == expected


def test_a_sweep_goes_on_with_what_was_decided(processor, images, tmp_path):
    "The row says auto, its run bf16: no other choice."
    processor("amx_bf16")
    file = tmp_path / "sweep-s.yaml"
    words = [word for word in SMALL if not word.startswith("epochs")]
    file.write_text(f"base: {json.dumps(dict(w.split('=') for w in words))}\n")
    row = sweep_rows(file, tmp_path, {"epochs": 2})[0]
    cfg = load_config(row["choices"], "run=s/s0")
    train(cfg, images, root=tmp_path, quiet=True, more=[StopAt()])
    assert "--resume" in sweep_command(row)


def test_fp16_needs_cuda(images, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(ValueError, match="precision: fp16 needs CUDA; must be fp32 or bf16 here"):
        train(load_config(*SMALL, "precision=fp16", "run=half"), images, root=tmp_path)
    assert not (tmp_path / "half").exists()


def test_rounded_is_bf16():
    "Maps are nearer to those of autocast than those are to fp32 (often equal)."
    torch.manual_seed(0)
    trunk, images, maps = make_trunk(width=0.25).train(), torch.rand(4, 3, 64, 64), {}
    modes = dict(fp32=contextlib.nullcontext(), rounded=Rounded())
    modes["bf16"] = torch.autocast("cpu", torch.bfloat16)
    for name, mode in modes.items():
        with mode, torch.no_grad():
            maps[name] = torch.cat([one.float().flatten() for one in trunk(images)])
    error = {k: (maps[k] - maps["bf16"]).norm() for k in ("fp32", "rounded")}
    assert error["rounded"] < 0.6 * error["fp32"], error


def precision_rows(name, folder):
    """Figures on val of every run in a folder, and the differences bf16 minus fp32.

    The k-th run of either side has the same seed. `low` and `high` are of images and seeds, as in
    `compare_ap`; `low_images` and `high_images` of images alone, for these very trainings.
    """
    rows, predictions = [], {"fp32": [], "bf16": []}
    for config in sorted(Path(folder).glob("*/config.yaml")):
        run = config.parent
        model, cfg = load_run(run)
        training, env = cfg.training, json.loads((run / "env.json").read_text())
        val = dataset(cfg, open_data(cfg.data.data, "val", cfg.data.dev)["val"])
        dt = predict(model, val, **limits(cfg))[0]
        predictions[training.precision].append(dt)
        records = val.records
        gt, names = records.gt, records.names
        result = evaluate(gt, dt, names, len(val), ("coco", "voc"), records.inclusive)
        log = pd.DataFrame(JsonLog(run / "log.jsonl").rows())
        figures = {k: result["coco"][k] for k in ("AP50", "AP")}
        conditions = {k: env[k] for k in ("device", "threads", "commit", "date")}
        conditions |= dict(data=Path(cfg.data.data).name, epochs=training.epochs)
        conditions["bf16"] = "instructions" if learning.bf16_flags() else "rounded"
        conditions |= dict(width=cfg.network.width, imgsz=cfg.data.imgsz, images=len(val))
        row = dict(name=name, precision=training.precision, seed=training.seed, n=1)
        voc = result["voc"]
        figures["voc"] = voc["AP50"] if isinstance(voc, dict) else voc
        rows.append(row | figures | dict(epoch_s=log["seconds"].median()) | conditions)
    low, high = predictions["fp32"], predictions["bf16"]
    for metric in ("AP50", "AP"):
        how = dict(metric=metric, inclusive=records.inclusive)
        both = compare_ap(gt, low, high, len(names), len(val), paired_seeds=True, **how)
        spread = 1.96 * both["sd_pictures"]
        difference = {k: both[k] for k in ("delta", "low", "high", "verdict")}
        difference["low_images"] = both["delta"] - spread
        difference["high_images"] = both["delta"] + spread
        row = dict(name=name, precision="bf16 - fp32", metric=metric, n=len(low))
        rows.append(row | difference | conditions)
    return rows


def test_figures_on_accuracy(tmp_path):
    "Two runs of each precision become four rows and two differences."
    for precision in ("fp32", "bf16"):
        for seed in (0, 1):
            words = f"data=toy:48 precision={precision} seed={seed} run={precision}-{seed} epochs=1"
            train(load_config(*SMALL, *words.split()), root=tmp_path, quiet=True)
    table = pd.DataFrame(precision_rows("toy", tmp_path))
    assert table["precision"].tolist() == ["bf16", "bf16", "fp32", "fp32", *["bf16 - fp32"] * 2]
    means = table[:4].groupby("precision")["AP50"].mean()
    assert table["delta"][4] == pytest.approx(means["bf16"] - means["fp32"], abs=1e-9)
    assert (table["low"][4:] <= table["delta"][4:]).all()


if __name__ == "__main__" and sys.argv[1:2] == ["rounded"]:
    Accelerator.autocast = rounded_autocast
    app(sys.argv[2:])
elif __name__ == "__main__":
    found = []
    for word in sys.argv[1:]:
        found += precision_rows(*word.split("=", 1))
    target = ROOT / "data/results/precision.csv"
    old = pd.read_csv(target) if target.is_file() else pd.DataFrame(columns=["name"])
    new = pd.DataFrame(found)
    table = pd.concat([old[~old["name"].isin(new["name"])], new]) if len(old) else new
    write_atomic(target, table.round(6).to_csv(index=False).encode())
    print(table.to_string(index=False))
