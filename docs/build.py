"""Build what is derived from the notebooks.

python docs/build.py [--run]            README.md and the site, in _site/; --run: run all notebooks
python docs/build.py outputs [NB...]    run notebooks and save their outputs
python docs/build.py readme             README.md
python docs/build.py imports            nbs/figures/imports.png: which package imports which
python docs/build.py odd                docs/odd_data.md, from the tests
python docs/build.py site [FOLDER]      the site
"""

import configparser
import json
import os
import re
import shutil
import sys
import tempfile
import textwrap
import time
import uuid
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]
cfg = configparser.ConfigParser(delimiters=["="])
cfg.read(ROOT / "settings.ini", encoding="utf8")
SKIP = set(cfg["DEFAULT"]["tst_flags"].split())
if os.environ.get("MHDET_ALL") == "1":
    SKIP.discard("slow")


class Client(NotebookClient):
    "A kernel that leaves flagged cells, and their saved outputs, alone."

    async def async_execute_cell(self, cell, cell_index, **kw):
        flags = (
            re.findall(r"^#\|\s*(\w+)(?::\s*(\S+))?", cell.source, re.M)
            if cell.cell_type == "code"
            else []
        )
        if (
            any(f in SKIP for f, _ in flags)
            or ("eval", "false") in flags
            or "nbdev_export(" in cell.source
        ):
            return cell
        return await super().async_execute_cell(cell, cell_index, **kw)


def tidy_widgets(nb, stem):
    """Keep the state of widgets that are shown, without what is null.

    Their random ids are numbered, so that a second run leaves no diff.
    """
    view = "application/vnd.jupyter.widget-view+json"
    shown = [
        o.data[view]["model_id"]
        for c in nb.cells
        for o in c.get("outputs", ())
        if view in o.get("data", {})
    ]
    for widgets in nb.metadata.get("widgets", {}).values():
        for model in shown:  # the list grows by what its members hold
            shown += sorted(
                set(re.findall(r"IPY_MODEL_(\w+)", str(widgets["state"][model]))) - set(shown)
            )
        widgets["state"] = {m: s for m, s in widgets["state"].items() if m in shown}
        for s in widgets["state"].values():
            s["state"] = {k: v for k, v in s["state"].items() if v is not None}
        text = nbformat.writes(nb)
        for i, model in enumerate(widgets["state"]):
            text = text.replace(model, uuid.uuid5(uuid.NAMESPACE_URL, f"{stem}/{i}").hex)
        nb.update(nbformat.reads(text, 4))
        return


def outputs(*notebooks):
    "Run notebooks in a real kernel and save what their cells show."
    from nbdev.clean import nbdev_clean

    os.environ["TQDM_DISABLE"] = "1"
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    for path in map(Path, notebooks or sorted((ROOT / "nbs").rglob("[!.]*.ipynb"))):
        start, nb = time.time(), nbformat.read(path, 4)
        Client(
            nb,
            timeout=600,
            kernel_name="python3",
            store_widget_state=True,
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": str(path.parent)}},
        ).execute()
        tidy_widgets(nb, path.stem)
        nbformat.write(nb, path)
        nbdev_clean(str(path))
        print(f"{path.parent.name}/{path.name}: {time.time() - start:.1f} s", flush=True)


def readme():
    "README.md is nbs/index.ipynb in Markdown, the way nbdev writes it, without Quarto."
    nb = nbformat.read(ROOT / "nbs/index.ipynb", 4)
    nb.cells = [
        c
        for c in nb.cells
        if c.cell_type != "code" or not re.search(r"^#\|\s*(hide|default_exp)\b", c.source, re.M)
    ]
    for i, c in enumerate(nb.cells):
        if "#| hide_input" in c.source:
            nb.cells[i] = nbformat.v4.new_markdown_cell(
                "\n".join(o.data["text/markdown"] for o in c.outputs)
            )
        elif c.cell_type == "code":
            c.source = re.sub(r"^#\|.*\n?", "", c.source, flags=re.M)
    nb.metadata["language_info"] = {"name": "python"}
    text, res = MarkdownExporter().from_notebook_node(nb)
    assert not res["outputs"], "README cells must not draw: embed a committed picture instead"
    text = re.sub(r"\n{3,}", "\n\n", text)

    def from_root(match):
        inside = (ROOT / "nbs" / match[0]).exists()
        return os.path.normpath(f"nbs/{match[0]}") if inside else match[0]

    return re.sub(r"(?<=\]\()[^)\s:#]+", from_root, text).strip() + "\n"


def write_readme():
    (ROOT / "README.md").write_text(readme(), encoding="utf8")


def odd_page():
    "docs/odd_data.md, from what stands above the tests."
    sys.path.insert(0, str(ROOT / "tests"))
    import odd

    return odd.page()


def package_imports():
    """Which package imports which, read from the exported code.

    Returns
    -------
    (dict, set)
        Package -> its modules, both in order of their numbers; pairs (importing, imported).
    """
    packages, edges = {}, set()
    for path in sorted((ROOT / "nbs").glob("[0-9][0-9]_*/[0-9][0-9]_*.ipynb")):
        package, module = path.parent.name[3:], path.stem[3:]
        packages.setdefault(package, []).append(module)
        code = ROOT / cfg["DEFAULT"]["lib_path"] / package / f"{module}.py"
        pattern = r"^ *from (?:\.\.|mhdet\.)(\w+)"
        for other in re.findall(pattern, code.read_text(encoding="utf8"), re.M):
            if other != package:
                edges.add((package, other))
    return packages, edges


def imports_text():
    "What the drawing shows, in one line; kept in its file, so that a test can see a stale one."
    packages, edges = package_imports()
    return json.dumps([packages, sorted(edges)])


def draw_imports():
    "Packages as boxes, from the bottom; an arrow leads from a package to one that imports it."
    import matplotlib.pyplot as plt
    import networkx as nx
    from matplotlib.patches import FancyBboxPatch

    packages, edges = package_imports()
    height = {package: i for i, package in enumerate(packages)}
    assert all(height[a] > height[b] for a, b in edges), "an import runs down"
    graph = nx.DiGraph((imported, importing) for importing, imported in edges)
    fig, ax = plt.subplots(figsize=(10, 0.72 * len(packages)), layout="constrained")
    wide = 9.6
    style = dict(boxstyle="round,pad=0.02,rounding_size=.06", fc="#f2f2f2", ec="black", lw=0.9)
    for package, y in height.items():
        ax.add_patch(FancyBboxPatch((0, y - 0.3), wide, 0.6, **style))
        ax.text(0.1, y, package, va="center", weight="bold", size=11)
        names = textwrap.fill("   ".join(packages[package]), 88)
        ax.text(1.75, y, names, va="center", size=8.5)
    long_arrows = 0
    for low, high in sorted(
        nx.transitive_reduction(graph).edges, key=lambda e: (height[e[1]], height[e[0]])
    ):
        span = height[high] - height[low]
        start, end, curve = (wide / 2, height[low] + 0.33), (wide / 2, height[high] - 0.33), 0
        if span > 1:  # past the boxes between, left and right in turn
            right = long_arrows % 2
            long_arrows += 1
            x = wide + 0.03 if right else -0.03
            start, end = (x, height[low] + 0.1), (x, height[high] - 0.1)
            curve = (1 if right else -1) * 0.5 / span**0.5
        arrow = dict(arrowstyle="-|>", color="black", lw=1, connectionstyle=f"arc3,rad={curve}")
        ax.annotate("", end, start, arrowprops=arrow)
    ax.set(xlim=(-1, wide + 1), ylim=(-0.4, len(packages) - 0.5))
    title = "Imports run upward; arrows that follow from others are left out"
    ax.set_title(title, size=10, loc="left")
    ax.axis("off")
    facts = {"Software": None, "Description": imports_text()}
    fig.savefig(ROOT / "nbs/figures/imports.png", dpi=110, metadata=facts)
    plt.close(fig)


def site(folder=ROOT / "_site"):
    "HTML pages from the saved outputs; a warning is an error."
    from sphinx.cmd.build import main as sphinx
    from stage import stage

    start, folder = time.time(), Path(folder)
    with tempfile.TemporaryDirectory() as work:
        stage(Path(work, "pages"))
        places = [
            "-c",
            str(ROOT / "docs"),
            "-d",
            f"{work}/doctrees",
            f"{work}/pages",
            f"{work}/html",
        ]
        if failed := sphinx(["-q", "-W", "-j2", *places]):
            sys.exit(failed)
        for template in Path(work, "html/_static").glob("*webpack-macros.html"):
            template.unlink()  # left by the theme
        if (folder / ".buildinfo").is_file():
            shutil.rmtree(folder)  # an earlier site, which may hold more pages
        shutil.copytree(f"{work}/html", folder, dirs_exist_ok=True)
    print(f"{folder}: {sum(1 for _ in folder.rglob('*.html'))} pages, {time.time() - start:.0f} s")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["outputs", *notebooks]:
            outputs(*notebooks)
        case ["readme"]:
            write_readme()
        case ["imports"]:
            draw_imports()
        case ["odd"]:
            (ROOT / "docs/odd_data.md").write_text(odd_page(), encoding="utf8")
        case ["site", *folder] if len(folder) < 2:
            site(*folder)
        case [] | ["--run"] as run:
            if run:
                outputs()
            write_readme(), site()
        case _:
            sys.exit(__doc__)
