"""The workbook in a real JupyterLab: a copy of a notebook opens, Run All succeeds, and hands move the boards.

`python -m pytest tests/browser/test_lab.py` takes the notebooks with widgets; MHDET_ALL=1 before it takes every chapter and
tutorial, which is a matter of half an hour. As in the other tests, cells flagged slow or cuda are left out.
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
SETTINGS = {"apputils-extension/notification": '{"fetchNews": "false", "checkForUpdates": false}',
            "notebook-extension/tracker": '{"windowingMode": "none"}'}                          # all cells are in the page
CHAPTERS = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "nbs").rglob("[!.]*.ipynb") if ".ipynb_checkpoints" not in p.parts)
ALL = os.environ.get("MHDET_ALL") == "1"


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "Folder and address of a JupyterLab on copies of the notebooks, which it saves as it likes."
    if not importlib.util.find_spec("jupyterlab"): pytest.skip("jupyterlab is not installed (pip install jupyterlab)")
    folder, home = tmp_path_factory.mktemp("lab"), tmp_path_factory.mktemp("home")
    shutil.copytree(ROOT / "nbs", folder / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints", "runs"))
    shutil.copytree(ROOT / "data", folder / "data")
    for path in (folder / "nbs").rglob("*.ipynb"):
        nb = json.loads(path.read_text(encoding="utf8"))
        nb["cells"] = [c for c in nb["cells"] if not re.match(r"#\|\s*(slow|cuda)\b", "".join(c["source"]))]
        path.write_text(json.dumps(nb), encoding="utf8")
    for name, text in SETTINGS.items():
        file = home / f"@jupyterlab/{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = os.environ | dict.fromkeys(("JUPYTER_CONFIG_DIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR"), str(home))
    env |= dict(IN_TEST="1", PYTHONPATH=os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")]))    # IN_TEST: nbdev exports nothing
    env.pop("TQDM_DISABLE", None)
    server = subprocess.Popen([sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
                               "--IdentityProvider.token=lab", f"--ServerApp.root_dir={folder}"], env=env,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(240):
            try: urllib.request.urlopen(f"http://127.0.0.1:{port}/api?token=lab", timeout=1)
            except OSError: time.sleep(.25)
            else: break
        yield folder, f"http://127.0.0.1:{port}/lab/tree/{{}}?token=lab&reset"
    finally:
        server.terminate()
        server.wait()


def run_all(page, address, notebook, seconds=180):
    "Open a notebook and run all its cells; returns its panel when the last cell is done, or one has failed."
    page.set_default_timeout(60_000)
    page.goto(address.format(notebook))
    panel = page.locator(".jp-NotebookPanel:visible")
    page.locator("#jp-main-statusbar").get_by_text("| Idle").wait_for()               # before this, Run All is lost
    page.locator(".lm-MenuBar-itemLabel", has_text="Run").first.click()
    page.locator(".lm-Menu-itemLabel", has_text="Run All Cells").first.click()
    page.wait_for_function("""() => {
        const prompts = [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(p => p.innerText)
        return !prompts.length || /\\d/.test(prompts.at(-1)) || document.querySelector('[data-mime-type="application/vnd.jupyter.error"]') }""",
        timeout=1000 * seconds)
    failed = panel.locator('[data-mime-type="application/vnd.jupyter.error"]').all_inner_texts()
    assert not failed, f"{notebook}: {failed[0][-2000:]}"
    return panel


@pytest.fixture(scope="module")
def boards(lab, browser):
    "The outputs of chapter 19 that hold a board: partition, samples, runs."
    folder, address = lab
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    panel = run_all(page, address, "nbs/19_board.ipynb")
    assert not panel.locator('[data-mime-type="application/vnd.jupyter.stderr"]').count()
    found = panel.locator(".jp-OutputArea-output:has(.widget-image)")
    assert found.count() == 3
    yield [found.nth(k) for k in range(3)]
    page.close()


def image(board, k=0): return board.locator("img.widget-image").nth(k)
def choose(board, name, option): board.locator(".widget-dropdown", has_text=name).first.locator("select").select_option(label=option)


def changes(image, act):
    "Act, and see the picture change."
    from playwright.sync_api import expect
    before = image.get_attribute("src")
    act()
    expect(image).not_to_have_attribute("src", before, timeout=60_000)


def test_partition_board(lab, boards):
    board = boards[0]
    changes(picture(board), lambda: choose(board, "strategy", "together"))
    knob = board.locator(".widget-slider", has_text="heads").locator(".noUi-handle")
    changes(picture(board), lambda: (knob.focus(), board.page.keyboard.press("ArrowLeft")))
    heads = int(board.locator(".widget-slider", has_text="heads").locator(".widget-readout").inner_text())
    board.get_by_role("button", name="save head file").click()
    board.get_by_text("saved heads.yaml").wait_for()
    partition = load_heads(lab[0] / "nbs/heads.yaml", TOY_CLASSES)
    assert (partition.nh, partition.grouping) == (heads, "together")


def test_sample_board(boards):
    board = boards[1]
    for name, option in (("only", "everything"), ("class", "tent"), ("class", "any"), ("truth", "disc"), ("taken for", "background")):
        changes(picture(board), lambda: choose(board, name, option))
    changes(picture(board), lambda: board.get_by_title("next").click())
    board.get_by_text("2 of ").wait_for()
    choose(board, "size", "large")
    board.get_by_text("no picture has such a box").wait_for()


def test_runs_board(boards):
    board = boards[2]
    changes(picture(board), lambda: choose(board, "loss", "cls"))
    number = board.get_by_title("disc taken for disc").first
    changes(picture(board, 1), number.click)
    board.get_by_text("1 of ").wait_for()
    changes(picture(board, 1), lambda: choose(board, "beside", "nothing"))


def test_mhdet_lab_opens_the_right_folder(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(os, "execv", lambda program, words: asked.append((Path.cwd(), words[1:])))
    for start in (ROOT / "tests", ROOT / "nbs/tutorials", tmp_path):               # inside a clone; outside, but installed from one
        monkeypatch.chdir(start)
        machine._lab(SimpleNamespace(args=["--port", "9999"]))
    assert asked == [(ROOT / "nbs", ["-m", "jupyterlab", "--port", "9999"])] * 3 and capsys.readouterr().err == ""
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "site-packages/mhdet/cli/machine.py"))
    monkeypatch.chdir(tmp_path)
    machine._lab(SimpleNamespace(args=[]))
    assert asked[-1] == (tmp_path, ["-m", "jupyterlab"]) and "no workbook here" in capsys.readouterr().err


@pytest.mark.skipif(not ALL, reason="every chapter takes half an hour: MHDET_ALL=1 asks for it")
@pytest.mark.timeout(4000)
@pytest.mark.parametrize("notebook", CHAPTERS)
def test_chapter(lab, page, notebook):
    run_all(page, lab[1], notebook, 3600)
    kernels = lab[1].split("/lab/")[0] + "/api/kernels"
    for kernel in page.request.get(f"{kernels}?token=lab").json(): page.request.delete(f"{kernels}/{kernel['id']}?token=lab")
