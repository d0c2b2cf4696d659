"""Every chapter and study runs, cell by cell, in this process.

Cells flagged slow or cuda are left out.
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
NEEDS = dict.fromkeys(["00_onnx", "02_benchmark"], ("onnx", "onnxruntime"))


@pytest.fixture(autouse=True)
def clean_process(monkeypatch):
    """nbdev leaves IN_TEST behind, under which a later export does nothing.

    accelerate keeps its first precision, matplotlib its settings, and the command line the commands
    that a chapter defined.
    """
    rc = matplotlib.rcParams.copy()
    commands = list(app.registered_commands)
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
    for package in NEEDS.get(nb.stem, ()):
        pytest.importorskip(package, reason=f"{package} is not installed")
    ok, _ = run_nb(nb.absolute(), skip_flags=cfg.tst_flags.split(), basepath=cfg.config_path)
    assert ok, capfd.readouterr().err
