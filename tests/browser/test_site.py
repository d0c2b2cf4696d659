"""The site as a visitor meets it: links, scripts, widgets, mathematics, search.

Building it takes minutes: MHDET_ALL=1 asks for it.
"""

import functools
import http.server
import importlib.util
import os
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[2]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    "The site, built once."
    if os.environ.get("MHDET_ALL") != "1":
        pytest.skip("building the whole site takes minutes: MHDET_ALL=1 asks for it")
    for module in ("myst_nb", "sphinx_book_theme"):
        if not importlib.util.find_spec(module):
            pytest.skip(f"{module} is not installed (pip install -e '.[docs]')")
    if not (shutil.which("npm") or (ROOT / "docs/node_modules/fetched.json").is_file()):
        pytest.skip("npm, which fetches the scripts of the site, is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, ROOT / "docs/build.py", "site", folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    if "npm ci failed" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="session")
def url(site):
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=site)
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


class Page(HTMLParser):
    "What a page has (ids) and what it asks for (addresses)."

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.needs = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs[k] for k in ("id", "name") if attrs.get(k)}
        if tag == "a" and attrs.get("href"):
            self.links.append(attrs["href"])
        if tag == "link" and attrs.get("rel") != "canonical":
            self.needs.append(attrs["href"])
        if tag in ("img", "script", "source", "iframe") and attrs.get("src"):
            self.needs.append(attrs["src"])


def broken(folder):
    "Links that lead nowhere, and what a page wants from outside."
    pages = {p: Page(p.read_text(encoding="utf8")) for p in folder.rglob("*.html")}
    out = []
    for page, content in pages.items():
        for address in content.links + content.needs:
            to = urlsplit(address)
            if to.scheme == "data" or (to.scheme and address not in content.needs):
                continue
            target = (page.parent / unquote(to.path)).resolve() if to.path else page
            line = f"{page.relative_to(folder)}: {address[:200]}"
            if to.scheme or not target.exists():
                out.append(line)
                continue
            ids = pages[target].ids if target in pages else {unquote(to.fragment)}
            if to.fragment and unquote(to.fragment) not in ids:
                out.append(f"{line} (no such anchor)")
    return out


def test_every_link_resolves(site, tmp_path):
    assert broken(site) == []
    assert len(list(site.rglob("*.html"))) > 60
    (tmp_path / "a.html").write_text(
        '<a href="b.html">b</a><a href="#c">c</a><a href="#d" id="d">d</a><img src="https://x/y">'
    )
    assert [b.split(" ", 1)[1] for b in broken(tmp_path)] == [
        "b.html",
        "#c (no such anchor)",
        "https://x/y",
    ]


def test_staged_links(monkeypatch):
    """Links to pages stay, those to files lead to the repository, badges become words.

    Code is left alone; a dead link is an error.
    """
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    from stage import relink

    links = {
        "[a](../docs/scale.md#x)": "[a](docs/scale.md#x)",
        "[b](log.md)": "[b](nbs/log.md)",
        "[c](../LICENSE)": "[c](https://github.com/mhdet/mhdet/blob/main/LICENSE)",
        "[![d](https://e/f.svg)](https://g)": "[d](https://g)",
        "`[h](i)`": "`[h](i)`",
    }
    pages = {"docs/scale.md", "nbs/log.md"}
    assert relink(" ".join(links), "nbs/index.ipynb", pages) == " ".join(links.values())
    with pytest.raises(ValueError, match="docs/coco.md: links to absent.md, which is not there"):
        relink("[a](absent.md)", "docs/coco.md", set())


def test_figures_name_their_cells(site):
    "Every figure names its cell, every function its definition; no directive of nbdev is left."
    chapter = (site / "nbs/03_partition/04_optimal.html").read_text(encoding="utf8")
    assert chapter.count('class="made-by"') == chapter.count('src="../../_images/') > 0
    assert "#|" not in chapter and "nbdev_export" not in chapter
    reference = (site / "api/model.surgery.html").read_text(encoding="utf8")
    assert 'href="../nbs/04_model/03_surgery.html#cell-' in reference


@pytest.mark.parametrize(
    "path, shows",
    [
        ("index.html", "img[src*=front]"),
        ("nbs/04_model/06_loss.html", "mjx-container"),
        ("nbs/03_partition/04_optimal.html", ".cell_output img"),
        ("nbs/10_tools/04_widgets.html", ".widget-slider"),
        ("nbs/studies/partition.html", ".dataframe thead th:text('AP50')"),
        ("api/model.surgery.html", "[id='mhdet.model.surgery.split_heads']"),
        ("nbs/log.html", "table"),
    ],
)
def test_page(page, url, path, shows):
    "Typical pages load completely, without errors, and show what they are for."
    page.goto(url + path)
    page.locator(shows).first.wait_for(timeout=60_000)
    page.wait_for_load_state("networkidle")
    assert (
        page.evaluate("[...document.images].filter(i => !i.complete || !i.naturalWidth).length")
        == 0
    )
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.errors == []


@pytest.mark.parametrize("scheme", ["http", "file"])
def test_search(page, url, site, scheme):
    "Typed into the box, a function is found in the reference; from a server and from a folder."
    page.goto((url if scheme == "http" else site.as_uri() + "/") + "index.html")
    page.keyboard.press("Control+k")
    box = page.locator("input[type=search]:visible").last
    box.fill("split_heads")
    box.press("Enter")
    target = "api/model.surgery.html#mhdet.model.surgery.split_heads"
    link = page.locator(f"#search-results a[href*='{target}']").first
    link.wait_for()
    # a click would abort the excerpts that are still loading
    page.wait_for_load_state("networkidle")
    link.click()
    page.locator("[id='mhdet.model.surgery.split_heads']").wait_for()
    # a folder gives no excerpts, which is an error on the console
    assert [e for e in page.errors if scheme == "http" or "outside" in e] == []
