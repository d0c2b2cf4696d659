"""Every chapter and study runs, cell by cell, in this process.

Cells flagged cuda are left out; those flagged slow, and the chapters of SLOW, run with MHDET_ALL=1.
"""

import os

import matplotlib
import pytest
from accelerate.state import AcceleratorState
from nbdev.config import get_config
from nbdev.test import test_nb as run_nb

from mhdet.cli.commands import app

matplotlib.use("agg")
cfg = get_config()
NBS = []
for path in sorted(cfg.nbs_path.rglob("*.ipynb")):
    if not path.name.startswith(("_", ".")) and ".ipynb_checkpoints" not in path.parts:
        NBS.append(path)
EVERYTHING = os.environ.get("MHDET_ALL") == "1"
SLOW = {  # what these show has quicker tests of its own
    *(f"tutorials/{name}" for name in ("colab", "compare", "library", "new_class", "own_data")),
    *("tutorials/torchvision", "02_evaluation/06_foreign", "03_partition/03_solver"),
    *("06_experiment/05_sweep", "06_experiment/08_profile", "06_experiment/10_curves"),
    *("06_experiment/14_report", "06_experiment/17_protocols"),
    *("07_probe/03_symptoms", "08_pairs/08_report", "10_tools/00_onnx", "10_tools/04_widgets"),
    *("11_cli/06_diagnose", "11_cli/09_probe"),
}
FLAGS = [flag for flag in cfg.tst_flags.split() if flag != "slow" or not EVERYTHING]
NEEDS = dict.fromkeys(["00_onnx", "02_benchmark"], ("onnx", "onnxruntime"))


def _laid_out(figure, *_, **__):
    "Half of what saving it would do."
    figure.draw_without_rendering()


@pytest.fixture(autouse=True)
def clean_process(monkeypatch):
    """nbdev leaves IN_TEST behind, under which a later export does nothing.

    accelerate keeps its first precision, matplotlib its settings, and the command line the commands
    that a chapter defined.
    """
    rc = matplotlib.rcParams.copy()
    commands = list(app.registered_commands)
    if not EVERYTHING:  # figures are laid out, not made PNGs of
        monkeypatch.setattr("IPython.core.pylabtools.print_figure", _laid_out)
    yield
    app.registered_commands[:] = commands
    os.environ.pop("IN_TEST", None)
    AcceleratorState._reset_state(True)
    matplotlib.pyplot.close("all")
    matplotlib.rcParams.update(rc)


@pytest.mark.parametrize(
    "nb", NBS, ids=lambda p: p.relative_to(cfg.nbs_path).with_suffix("").as_posix()
)
def test_notebook(nb, capfd):
    if f"{nb.parent.name}/{nb.stem}" in SLOW and not EVERYTHING:
        pytest.skip("takes half a minute: MHDET_ALL=1")
    for package in NEEDS.get(nb.stem, ()):
        pytest.importorskip(package, reason=f"{package} is not installed")
    ok, _ = run_nb(nb.absolute(), skip_flags=FLAGS, basepath=cfg.config_path)
    assert ok, capfd.readouterr().err
