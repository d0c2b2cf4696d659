"""The tree that Sphinx reads.

Chapters without nbdev's comments, a page per module, links that hold, scripts from npm.
"""

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
SCRIPTS = [
    ("mathjax/es5/tex-mml-chtml.js", "mathjax"),
    (f"mathjax/es5/{FONTS}/*", f"mathjax/{FONTS}"),
    ("requirejs/require.js", ""),
    (f"{MANAGER}/embed-amd.js", ""),
    (f"{MANAGER}/*.woff2", MANAGER),
    (f"{MANAGER}/*.woff2", "@jupyter-widgets"),
]  # two parts of the manager look in two places
PAGES = "docs/*.md", "nbs/**/*.ipynb", "nbs/**/*.md", "nbs/figures/*", "data/**/*.*", "[A-Z]*.md"
TAGS = {
    "export": "hide-input",
    "exporti": "hide-input",
    "hide_input": "remove-input",
    "hide_output": "remove-output",
}
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|[#/])([^)\s#]+)(?=[)\s#])")
BADGE = re.compile(r"!\[([^\]]*)\]\(https?:[^)]*\)")
CODE = re.compile(r"(^ *```.*?^ *```|``.*?``|`[^`\n]*`)", re.M | re.S)
KERNEL = nbformat.v4.new_markdown_cell(
    id="kernel",
    source="""```{note}
The board below shows the state it was saved in. Its dials compute in a running kernel:
`mhdet lab` opens this notebook.
```""",
)


BEGIN = [
    "docs/diagnose",
    "docs/probe",
    "nbs/tutorials/own_data",
    "nbs/tutorials/compare",
    "nbs/tutorials/torchvision",
    "nbs/tutorials/library",
    "docs/study",
    "nbs/tutorials/new_class",
    "docs/grow",
    "docs/coco",
    "docs/from_yolov7",
    "docs/results",
    "docs/scale",
    "docs/remote",
    "docs/colab",
    "nbs/tutorials/colab",
    "docs/backbones",
    "docs/deploy",
    "docs/pairs",
    "docs/threescale",
    "docs/odd_data",
    "docs/troubleshooting",
]
PACKAGES = [p.name for p in sorted((ROOT / "nbs").glob("[0-9][0-9]_*"))]
CONTENTS = {
    "Begin": BEGIN,
    **{p[3:].capitalize().replace("Cli", "Command line"): [f"nbs/{p}/*"] for p in PACKAGES},
    "Studies": ["nbs/studies/*"],
    "Project": ["nbs/log", "nbs/design", "[A-Z]*"],
    "Reference": ["api/index", "api/options"],
}
FRONT = "nbs/index.ipynb"


def placed(page):
    "Where a file of the repository stands in the tree."
    return "index.ipynb" if page == FRONT else page


def repo_url(path=""):
    "Where a file of the repository can be read."
    kind = "tree" if path and (ROOT / path).is_dir() else "blob"
    return f"{cfg['git_url']}/{kind}/{cfg['branch']}/{path}"


def vendor():
    """Fetch the scripts that package-lock.json pins, unless they are there.

    Those that pages need go to node_modules/site.
    """
    modules = DOCS / "node_modules"
    lock, kept = DOCS / "package-lock.json", modules / "fetched.json"
    if kept.is_file() and kept.read_bytes() == lock.read_bytes():
        return
    if not shutil.which("npm"):
        sys.exit("docs/build.py: npm, which fetches the scripts of the site, is not installed")
    done = subprocess.run(["npm", "ci", "--silent"], cwd=DOCS, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr or done.stdout).strip()[-500:] or done.returncode
        sys.exit(f"docs/build.py: npm ci failed: {reason}")
    for pattern, folder in SCRIPTS:
        target = modules / "site/vendor" / folder
        target.mkdir(parents=True, exist_ok=True)
        for source in modules.glob(pattern):
            shutil.copy(source, target)
    shutil.copy(lock, kept)


def relink(text, page, files):
    """Links hold: to pages as they are, to other files in the repository.

    One that leads nowhere is an error. An image from elsewhere (a badge) becomes its words, since
    no page asks for anything from outside.
    """
    here = posixpath.dirname(placed(page)) or "."

    def target(match):
        near = posixpath.normpath(posixpath.join(posixpath.dirname(page), match[1]))
        # The front page may write links as README.md needs them.
        for path in near, posixpath.normpath(match[1]):
            if path in files:
                return posixpath.relpath(placed(path), here)
            if not path.startswith("..") and (ROOT / path).exists():
                return repo_url(path)
        raise ValueError(f"{page}: links to {match[1]}, which is not there")

    parts = CODE.split(BADGE.sub(r"\1", text))  # every second one is code
    parts[::2] = [LINK.sub(target, part) for part in parts[::2]]
    return "".join(parts)


def public():
    "Module (package.module) -> its public names."
    out = {}
    for path in sorted((ROOT / cfg["lib_path"]).rglob("[!_]*.py")):
        names = re.search(r"^__all__ = (\[.*?\])", path.read_text(encoding="utf8"), re.M | re.S)
        if names:
            module = path.relative_to(ROOT / cfg["lib_path"]).with_suffix("").parts
            out[".".join(module)] = ast.literal_eval(names[1])
    return out


def plain(source):
    "The Python of a cell."
    return re.sub(r"^(#\||[%!]).*", "", source, flags=re.M)


def definitions(source):
    "Public name -> its node, of what a cell defines."
    out = {}
    for n in ast.parse(plain(source)).body:
        if isinstance(n, (ast.FunctionDef, ast.ClassDef)):
            out[n.name] = n
        if isinstance(n, ast.Assign):
            for t in n.targets:
                if isinstance(t, ast.Name):
                    out[t.id] = n
    return {name: n for name, n in out.items() if not name.startswith("_")}


def chapter(nb, page, files):
    """A notebook as a page.

    Directives of nbdev go, exported cells are folded, cells get anchors, widgets are explained.
    """
    cells = []
    for c in nb.cells:
        if c.cell_type == "raw":  # front matter
            continue
        if c.cell_type == "markdown":
            c.source = relink(c.source, page, files)
            cells.append(c)
            continue
        flags = set(re.findall(r"^#\|\s*(\w+)", c.source, re.M))
        if "hide_input" in flags and all("text/markdown" in o.get("data", {}) for o in c.outputs):
            text = "\n".join(o.data["text/markdown"] for o in c.outputs)
            cells.append(nbformat.v4.new_markdown_cell(relink(text, page, files), id=c.id))
            continue
        names = ", ".join(definitions(c.source)) if "export" in flags else ""
        c.source = re.sub(r"^#\|.*\n?", "", c.source, flags=re.M)
        if flags & {"hide", "default_exp"} or not c.source.strip():
            continue
        label = names or ("imports" if "import " in c.source else "helpers")
        tags = [TAGS[f] for f in sorted(flags & set(TAGS))]
        prompts = dict(code_prompt_show=label, code_prompt_hide=label)
        c.metadata = nbformat.from_dict(dict(anchor=c.id, tags=tags, mystnb=prompts))
        boards = any("widget-view" in kind for o in c.outputs for kind in o.get("data", {}))
        if boards and KERNEL not in cells:
            cells.append(KERNEL)
        cells.append(c)
    nb.cells = cells
    return nb


def api(nb, page, known):
    """The page of a chapter's module: every public name, and the cell that defines it.

    Returns
    -------
    (str, str, str)
        Name, question, Markdown.
    """
    code = [c for c in nb.cells if c.cell_type == "code"]
    module = re.search(r"^#\|\s*default_exp ([\w.]+)", "\n".join(c.source for c in code), re.M)[1]
    title, question = re.match(r"# (.*)\s+> (.*)", nb.cells[0].source).groups()
    exported = [c for c in code if re.search(r"^#\|\s*export\b", c.source, re.M)]
    out = [f"# mhdet.{module}", "", f"> {question}", "", f"Chapter: [{title}](../{page}).", ""]
    if module == "cli.commands":
        text = subprocess.check_output(
            [sys.executable, "-m", "mhdet", "--help"], cwd=ROOT, text=True
        )
        out += ["```text", text.strip(), "```", ""]
    out += ["```{eval-rst}", f".. py:module:: mhdet.{module}", ""]
    for c in exported:
        for name, node in definitions(c.source).items():
            if name not in known.get(module, ()):
                continue
            if isinstance(node, ast.Assign):
                value = ast.unparse(node.value)
                value = value if len(value) < 70 else value[:66] + " ..."
                out += [f".. py:data:: {name}", f"   :value: {value}"]
            elif isinstance(node, ast.ClassDef):
                out += [f".. autoclass:: {name}", "   :members:"]
            else:
                out += [f".. autofunction:: {name}"]
            cell = f"`{page}, cell {c.id} <../{page[:-6]}.html#cell-{c.id}>`__"
            out += ["", "   .. container:: made-by", "", f"      {cell}", ""]
    return module, question, "\n".join([*out, "```", ""])


def table(head, rows):
    "A Markdown table; bars in cells are escaped."
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(v).replace("|", "\\|") for v in r) + " |" for r in lines)


def options_page():
    "The table of `mhdet options`, group by group."
    from mhdet.core.config import options

    out = [
        "# Options",
        "",
        "Every key of a configuration file and every `key=value` of the command line.",
    ]
    rows = {}
    for o in options():
        default = "" if o["default"] is None else f"`{o['default']}`"
        cells = [f"`{o['key']}`", default, o["unit"], o["meaning"], o["allowed"]]
        rows.setdefault(o["group"], []).append(cells)
    for group, lines in rows.items():
        head = ["key", "default", "unit", "meaning", "allowed"]
        out += ["", f"## {group.capitalize()}", "", table(head, lines)]
    return "\n".join(out) + "\n"


def modules_page(modules):
    "The index of the reference: the names of `import mhdet`, then every module with its question."
    import mhdet

    names = []
    for name in mhdet.__all__:
        home = mhdet._HOME[name]
        names.append([f"{{py:obj}}`{name} <mhdet.{home}.{name}>`", f"[mhdet.{home}]({home}.md)"])
    rows = [[f"[{module}]({module}.md)", question] for module, question, _ in modules]
    toc = ["```{toctree}", ":hidden:", "", *(module for module, *_ in modules), "```"]
    return "\n".join(
        [
            "# Modules",
            "",
            "What `import mhdet` gives; nothing is imported before it is used.",
            "",
            table(["name", "from"], names),
            "",
            "Every module is written in the chapter of its name.",
            "",
            table(["module", "question"], rows),
            "",
            *toc,
            "",
        ]
    )


def contents(pages):
    "The tables of contents, of the pages that are there."
    out = []
    for caption, patterns in CONTENTS.items():
        kept = [p for p in patterns if fnmatch.filter(pages, p)]
        if kept:
            out += [
                "```{toctree}",
                f":caption: {caption}",
                ":hidden:",
                ":glob:",
                "",
                *kept,
                "```",
                "",
            ]
    return nbformat.v4.new_markdown_cell("\n".join(out), id="contents")


def stage(folder):
    "Write everything that Sphinx reads into an empty folder."
    paths = [p.relative_to(ROOT).as_posix() for pattern in PAGES for p in ROOT.glob(pattern)]
    pages = {p for p in paths if not re.search(r"/[._]|README", p) and (ROOT / p).is_file()}
    notebooks = {p: nbformat.read(ROOT / p, 4) for p in sorted(pages) if p.endswith(".ipynb")}
    known = public()
    modules = [api(nb, p, known) for p, nb in notebooks.items() if re.match(r"nbs/\d\d_", p)]
    texts = {f"api/{module}.md": text for module, _, text in modules}
    texts |= {"api/index.md": modules_page(modules), "api/options.md": options_page()}
    files = pages | set(texts)
    for p in pages:
        if p.endswith(".md"):
            texts[p] = relink((ROOT / p).read_text(encoding="utf8"), p, files)
    notebooks[FRONT].cells.append(
        contents([p.removesuffix(".md").removesuffix(".ipynb") for p in files])
    )
    for p, nb in notebooks.items():
        texts[p] = nbformat.writes(chapter(nb, p, files))
    for page in sorted(files):
        target = folder / placed(page)
        target.parent.mkdir(parents=True, exist_ok=True)
        if page in texts:
            target.write_text(texts[page], encoding="utf8")
        else:
            shutil.copy(ROOT / page, target)
    vendor()
