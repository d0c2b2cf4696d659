"""The tree that Sphinx reads: chapters without nbdev's comments, a page a module, links that hold, scripts from npm."""
import ast
import configparser
import fnmatch
import posixpath
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
cfg = configparser.ConfigParser(delimiters=["="])
cfg.read(ROOT / "settings.ini", encoding="utf8")
cfg = cfg["DEFAULT"]

MANAGER = "@jupyter-widgets/html-manager/dist"
FONTS = "output/chtml/fonts/woff-v2"
SCRIPTS = [("mathjax/es5/tex-mml-chtml.js", "mathjax"), (f"mathjax/es5/{FONTS}/*", f"mathjax/{FONTS}"),
           ("requirejs/require.js", ""), (f"{MANAGER}/embed-amd.js", ""), (f"{MANAGER}/*.woff2", MANAGER),
           (f"{MANAGER}/*.woff2", "@jupyter-widgets")]                     # two parts of the manager look in two places
PAGES = "docs/*.md", "nbs/**/*.ipynb", "nbs/**/*.md", "nbs/figures/*", "data/**/*.*", "[A-Z]*.md"
TAGS = {"export": "hide-input", "exporti": "hide-input", "hide_input": "remove-input", "hide_output": "remove-output"}
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|[#/])([^)\s#]+)(?=[)\s#])")
BADGE = re.compile(r"!\[([^\]]*)\]\(https?:[^)]*\)")
CODE = re.compile(r"(^ *```.*?^ *```|``.*?``|`[^`\n]*`)", re.M | re.S)
KERNEL = nbformat.v4.new_markdown_cell(id="kernel", source="""```{note}
The board below shows the state it was saved in. Its dials compute in a running kernel: `mhdet lab` opens this notebook.
```""")


BEGIN = ["nbs/tutorials/own_data", "nbs/tutorials/compare", "docs/coco", "docs/from_yolov7", "docs/scale", "docs/remote", "docs/colab",
         "nbs/tutorials/colab", "docs/troubleshooting"]
CONTENTS = {"Begin": BEGIN, "Ground": ["nbs/00*"], "Boxes": ["nbs/0[1-9]*", "nbs/10*"],
            "Training": ["nbs/1[1-4]*"], "Meeting": ["nbs/1[5-8]*"], "Doors": ["nbs/19*", "nbs/2*"], "Studies": ["nbs/studies/*"],
            "House": ["nbs/log", "nbs/design", "[A-Z]*"], "Reference": ["api/index"]}
FRONT = "nbs/index.ipynb"


def placed(page):
    "Where a file of the repository stands in the tree."
    return "index.ipynb" if page == FRONT else page


def repo_url(path=""):
    "Where a file of the repository can be read."
    kind = "tree" if path and (ROOT / path).is_dir() else "blob"
    return f"{cfg['git_url']}/{kind}/{cfg['branch']}/{path}"


def vendor():
    "Fetch the scripts that package-lock.json pins, unless they are there; those that pages need go to node_modules/site."
    lock, kept, modules = DOCS / "package-lock.json", DOCS / "node_modules/fetched.json", DOCS / "node_modules"
    if kept.is_file() and kept.read_bytes() == lock.read_bytes(): return
    if not shutil.which("npm"): sys.exit("docs/build.py: npm, which fetches the scripts of the site, is not installed")
    done = subprocess.run(["npm", "ci", "--silent"], cwd=DOCS, capture_output=True, text=True)
    said = (done.stderr or done.stdout).strip()[-500:] or done.returncode
    if done.returncode: sys.exit(f"docs/build.py: npm ci failed: {said}")
    for pattern, target in SCRIPTS:
        (target := modules / "site/vendor" / target).mkdir(parents=True, exist_ok=True)
        for source in modules.glob(pattern): shutil.copy(source, target)
    shutil.copy(lock, kept)


def relink(text, page, files):
    """Links hold: to pages as they are, to other files in the repository; one that leads nowhere is an error. A picture from
    elsewhere (a badge) becomes its words, since no page asks for anything from outside."""
    here = posixpath.dirname(placed(page)) or "."
    def target(match):
        near = posixpath.normpath(posixpath.join(posixpath.dirname(page), match[1]))
        for path in near, posixpath.normpath(match[1]):          # the front page may write links as README.md needs them
            if path in files: return posixpath.relpath(placed(path), here)
            if not path.startswith("..") and (ROOT / path).exists(): return repo_url(path)
        raise ValueError(f"{page}: links to {match[1]}, which is not there")
    return "".join(p if i % 2 else LINK.sub(target, p) for i, p in enumerate(CODE.split(BADGE.sub(r"\1", text))))


def public():
    "Module -> its public names."
    files = {p.stem: p.read_text(encoding="utf8") for p in sorted((ROOT / cfg["lib_path"]).glob("[!_]*.py"))}
    lists = {module: re.search(r"^__all__ = (\[.*?\])", text, re.M | re.S) for module, text in files.items()}
    return {module: ast.literal_eval(found[1]) for module, found in lists.items() if found}


def plain(source):
    "The Python of a cell."
    return re.sub(r"^(#\||[%!]).*", "", source, flags=re.M)


def definitions(source):
    "Public name -> its node, of what a cell defines."
    out = {}
    for n in ast.parse(plain(source)).body:
        if isinstance(n, (ast.FunctionDef, ast.ClassDef)): out[n.name] = n
        if isinstance(n, ast.Assign): out |= {t.id: n for t in n.targets if isinstance(t, ast.Name)}
    return {name: n for name, n in out.items() if not name.startswith("_")}


def chapter(nb, page, files):
    "A notebook as a page: numbered title, no directives, exported cells folded, every cell named, widgets explained."
    cells = []
    for c in nb.cells:
        if c.cell_type == "raw": continue                                # front matter
        if c.cell_type == "markdown": c.source = relink(c.source, page, files)
        else:
            flags = set(re.findall(r"^#\|\s*(\w+)", c.source, re.M))
            what = ", ".join(definitions(c.source)) if "export" in flags else ""
            c.source = re.sub(r"^#\|.*\n?", "", c.source, flags=re.M)
            if flags & {"hide", "default_exp"} or not c.source.strip(): continue
            label = what or ("imports" if "import " in c.source else "helpers")
            c.metadata = nbformat.from_dict(dict(anchor=c.id, tags=[TAGS[f] for f in sorted(flags & set(TAGS))],
                                                 mystnb=dict(code_prompt_show=label, code_prompt_hide=label)))
            boards = any("widget-view" in kind for o in c.outputs for kind in o.get("data", {}))
            if boards and KERNEL not in cells: cells.append(KERNEL)
        cells.append(c)
    if number := re.match(r"nbs/(\d\d[a-z]?)_", page): cells[0].source = cells[0].source.replace("# ", f"# {number[1]} ", 1)
    nb.cells = cells
    return nb


def api(nb, page, known):
    "The page of a chapter's module, (name, question, text): every public name, and the cell that defines it."
    module = re.search(r"^#\|\s*default_exp (\w+)", "\n".join(c.source for c in nb.cells), re.M)[1]
    title, question = re.match(r"# (.*)\s+> (.*)", nb.cells[0].source).groups()
    exported = [c for c in nb.cells if c.cell_type == "code" and re.search(r"^#\|\s*export\b", c.source, re.M)]
    number = re.match(r"nbs/(\d\d[a-z]?)", page)[1]
    out = [f"# mhdet.{module}", "", f"> {question}", "", f"Written in chapter [{number} {title}](../{page}).", "",
           "```{eval-rst}", f".. py:module:: mhdet.{module}", ""]
    for c in exported:
        for name, node in definitions(c.source).items():
            if name not in known[module]: continue
            if isinstance(node, ast.Assign):
                value = ast.unparse(node.value)
                out += [f".. py:data:: {name}", f"   :value: {value if len(value) < 70 else value[:66] + ' ...'}"]
            else:
                kind = "class" if isinstance(node, ast.ClassDef) else "function"
                out += [f".. auto{kind}:: {name}"] + ["   :members:"] * (kind == "class")
            cell = f"`{page}, cell {c.id} <../{page[:-6]}.html#cell-{c.id}>`__"
            out += ["", "   .. container:: made-by", "", f"      {cell}", ""]
    if module == "cli":
        text = subprocess.check_output([sys.executable, "-m", "mhdet", "--help"], cwd=ROOT, text=True)
        out[(i := out.index("```{eval-rst}")):i] = ["```text", text.strip(), "```", ""]
    return module, question, "\n".join(out + ["```", ""])


def contents(pages):
    "The tables of contents, of the pages that are there."
    out = []
    for caption, patterns in CONTENTS.items():
        kept = [p for p in patterns if fnmatch.filter(pages, p)]
        if kept: out += ["```{toctree}", f":caption: {caption}", ":hidden:", ":glob:", "", *kept, "```", ""]
    return nbformat.v4.new_markdown_cell("\n".join(out), id="contents")


def stage(folder):
    "Write everything that Sphinx reads into an empty folder."
    found = [p for pattern in PAGES for p in ROOT.glob(pattern)]
    pages = {p.relative_to(ROOT).as_posix() for p in found if not re.search(r"/[._]|README", p.relative_to(ROOT).as_posix())}
    notebooks = {p: nbformat.read(ROOT / p, 4) for p in sorted(pages) if p.endswith(".ipynb")}
    known = public()
    modules = [api(nb, p, known) for p, nb in notebooks.items() if re.match(r"nbs/\d\d", p)]
    texts = {f"api/{module}.md": text for module, _, text in modules}
    rows = [f"| [{module}]({module}.md) | {question} |" for module, question, _ in modules]
    toc = ["```{toctree}", ":hidden:", *(module for module, *_ in modules), "```"]
    head = ["# Modules", "", "Each is written in the chapter of its name.", "", "| module | question |", "| --- | --- |"]
    texts["api/index.md"] = "\n".join([*head, *rows, "", *toc, ""])
    texts |= {p: relink((ROOT / p).read_text(encoding="utf8"), p, pages | set(texts)) for p in pages if p.endswith(".md")}
    notebooks[FRONT].cells.append(contents([p.rsplit(".")[0] for p in pages | set(texts)]))
    texts |= {p: nbformat.writes(chapter(nb, p, pages | set(texts))) for p, nb in notebooks.items()}
    for page in sorted(pages | set(texts)):
        target = folder / placed(page)
        target.parent.mkdir(parents=True, exist_ok=True)
        if page in texts: target.write_text(texts[page], encoding="utf8")
        else: shutil.copy(ROOT / page, target)
    vendor()
