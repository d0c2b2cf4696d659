"""The workbook in a real JupyterLab: a notebook opens, Run All succeeds, the boards react.

`python -m pytest tests/browser/test_lab.py` takes the notebooks with widgets; MHDET_ALL=1 before it
takes every chapter and tutorial, which is a matter of half an hour. As in the other tests, cells
flagged slow or cuda are left out.
"""

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest

from mhdet.cli import machine
from mhdet.data.toy import TOY_CLASSES
from mhdet.partition.heads import load_heads

ROOT = Path(__file__).resolve().parents[2]
BOARDS = "nbs/10_tools/04_widgets.ipynb"
SETTINGS = {
    "apputils-extension/notification": '{"fetchNews": "false", "checkForUpdates": false}',
    "notebook-extension/tracker": '{"windowingMode": "none"}',  # all cells are in the page
}
CHAPTERS = sorted(
    str(p.relative_to(ROOT))
    for p in (ROOT / "nbs").rglob("[!.]*.ipynb")
    if ".ipynb_checkpoints" not in p.parts
)
ALL = os.environ.get("MHDET_ALL") == "1"
ERROR = '[data-mime-type="application/vnd.jupyter.error"]'
STDERR = '[data-mime-type="application/vnd.jupyter.stderr"]'
DONE = f"""() => {{
    const cells = document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')
    const prompts = [...cells].map(p => p.innerText)
    return !prompts.length || /\\d/.test(prompts.at(-1)) || document.querySelector('{ERROR}')
}}"""  # the last cell has a number, or one has failed


def copy_workbook(folder):
    "Notebooks and data, without the cells that tests leave out."
    ignored = shutil.ignore_patterns(".ipynb_checkpoints", "runs")
    shutil.copytree(ROOT / "nbs", folder / "nbs", ignore=ignored)
    shutil.copytree(ROOT / "data", folder / "data")
    for path in (folder / "nbs").rglob("*.ipynb"):
        nb = json.loads(path.read_text(encoding="utf8"))
        cells = []
        for cell in nb["cells"]:
            if not re.match(r"#\|\s*(slow|cuda)\b", "".join(cell["source"])):
                cells.append(cell)
        nb["cells"] = cells
        path.write_text(json.dumps(nb), encoding="utf8")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for(address):
    for _ in range(240):
        try:
            urllib.request.urlopen(address, timeout=1)
        except OSError:
            time.sleep(0.25)
        else:
            return


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "Folder and address of a JupyterLab on copies of the notebooks, which it may save."
    if not importlib.util.find_spec("jupyterlab"):
        pytest.skip("jupyterlab is not installed (pip install jupyterlab)")
    folder, home = tmp_path_factory.mktemp("lab"), tmp_path_factory.mktemp("home")
    copy_workbook(folder)
    for name, text in SETTINGS.items():
        file = home / f"@jupyterlab/{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    port = free_port()
    folders = "JUPYTER_CONFIG_DIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR"
    env = os.environ | dict.fromkeys(folders, str(home))
    env["IN_TEST"] = "1"  # nbdev exports nothing
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    env.pop("TQDM_DISABLE", None)
    options = [
        "--no-browser",
        "--allow-root",
        "--ip=127.0.0.1",
        f"--port={port}",
        "--IdentityProvider.token=lab",
        f"--ServerApp.root_dir={folder}",
    ]
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", *options],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(f"http://127.0.0.1:{port}/api?token=lab")
        yield folder, f"http://127.0.0.1:{port}/lab/tree/{{}}?token=lab&reset"
    finally:
        server.terminate()
        server.wait()


def run_all(page, address, notebook, seconds=180):
    """Open a notebook and run all its cells.

    Returns its panel when the last cell is done; fails if a cell has failed.
    """
    page.set_default_timeout(60_000)
    page.goto(address.format(notebook))
    panel = page.locator(".jp-NotebookPanel:visible")
    # before the kernel is idle, Run All is lost
    page.locator("#jp-main-statusbar").get_by_text("| Idle").wait_for()
    page.locator(".lm-MenuBar-itemLabel", has_text="Run").first.click()
    page.locator(".lm-Menu-itemLabel", has_text="Run All Cells").first.click()
    page.wait_for_function(DONE, timeout=1000 * seconds)
    failed = panel.locator(ERROR).all_inner_texts()
    assert not failed, f"{notebook}: {failed[0][-2000:]}"
    return panel


@pytest.fixture(scope="module")
def boards(lab, browser):
    "The outputs of tools.widgets that hold a board: partition, samples, runs."
    _, address = lab
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    panel = run_all(page, address, BOARDS)
    assert not panel.locator(STDERR).count()
    outputs = panel.locator(".jp-OutputArea-output:has(.widget-image)")
    assert outputs.count() == 3
    yield [outputs.nth(k) for k in range(3)]
    page.close()


def image(board, k=0):
    return board.locator("img.widget-image").nth(k)


def choose(board, name, option):
    dropdown = board.locator(".widget-dropdown", has_text=name).first
    dropdown.locator("select").select_option(label=option)


def changes(image, act):
    "Act, and wait until the image changes."
    from playwright.sync_api import expect

    before = image.get_attribute("src")
    act()
    expect(image).not_to_have_attribute("src", before, timeout=60_000)


def test_partition_board(lab, boards):
    board = boards[0]
    slider = board.locator(".widget-slider", has_text="heads")
    knob = slider.locator(".noUi-handle")

    def move_left():
        knob.focus()
        board.page.keyboard.press("ArrowLeft")

    changes(image(board), lambda: choose(board, "strategy", "together"))
    changes(image(board), move_left)
    heads = int(slider.locator(".widget-readout").inner_text())
    board.get_by_role("button", name="save head file").click()
    board.get_by_text("saved heads.yaml").wait_for()
    partition = load_heads((lab[0] / BOARDS).parent / "heads.yaml", TOY_CLASSES)
    assert (partition.nh, partition.grouping) == (heads, "together")


SELECTIONS = [
    ("kind", "any"),
    ("class", "tent"),
    ("class", "any"),
    ("truth", "disc"),
    ("detected as", "background"),
]


def test_sample_board(boards):
    board = boards[1]
    for name, option in SELECTIONS:
        changes(image(board), lambda name=name, option=option: choose(board, name, option))
    changes(image(board), lambda: board.get_by_title("next").click())
    board.get_by_text("2 of ").wait_for()
    choose(board, "size", "large")
    board.get_by_text("no image has such a box").wait_for()


def test_runs_board(boards):
    board = boards[2]
    changes(image(board), lambda: choose(board, "loss", "cls"))
    number = board.get_by_title("disc detected as disc").first
    changes(image(board, 1), number.click)
    board.get_by_text("1 of ").wait_for()
    changes(image(board, 1), lambda: choose(board, "second run", "nothing"))


def test_mhdet_lab_opens_the_right_folder(tmp_path, monkeypatch, capsys):
    started = []

    def execv(program, words):
        started.append((Path.cwd(), words[1:]))

    monkeypatch.setattr(os, "execv", execv)
    # inside a clone; outside, but installed from one
    for start in (ROOT / "tests", ROOT / "nbs/tutorials", tmp_path):
        monkeypatch.chdir(start)
        machine._lab(SimpleNamespace(args=["--port", "9999"]))
    assert started == [(ROOT / "nbs", ["-m", "jupyterlab", "--port", "9999"])] * 3
    assert capsys.readouterr().err == ""
    elsewhere = tmp_path / "site-packages/mhdet/cli/machine.py"
    monkeypatch.setattr(machine, "__file__", str(elsewhere))
    monkeypatch.chdir(tmp_path)
    machine._lab(SimpleNamespace(args=[]))
    assert started[-1] == (tmp_path, ["-m", "jupyterlab"])
    assert "no workbook here" in capsys.readouterr().err


@pytest.mark.skipif(not ALL, reason="every chapter takes half an hour: MHDET_ALL=1 asks for it")
@pytest.mark.timeout(4000)
@pytest.mark.parametrize("notebook", CHAPTERS)
def test_chapter(lab, page, notebook):
    run_all(page, lab[1], notebook, 3600)
    kernels = lab[1].split("/lab/")[0] + "/api/kernels"
    for kernel in page.request.get(f"{kernels}?token=lab").json():
        page.request.delete(f"{kernels}/{kernel['id']}?token=lab")
