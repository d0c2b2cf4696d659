"""The house rules of nbs/design.md. Every rule is shown twice: the tree keeps it, and a planted breach is found."""
import ast
import configparser
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from pyflakes import api, messages, reporter

ROOT = Path(__file__).resolve().parents[1]
CFG = configparser.ConfigParser(delimiters=["="])
CFG.read(ROOT / "settings.ini", encoding="utf8")
SKIPPED = set(CFG["DEFAULT"]["tst_flags"].split())
BAD_NAMES = messages.UndefinedName, messages.UndefinedLocal, messages.ImportStarUsed, messages.ImportStarUsage
DEV_ONLY = {"nbdev", "fastcore", "execnb", "IPython", "jupyterlab"}
CEILING = dict(chapter=250, cell=40, package=5600, cells=70, width=120, kilobytes=500)


class Cell(NamedTuple):
    source: str
    flags: set


class Chapter(NamedTuple):
    number: float
    name: str
    cells: list
    bytes: int = 0

    def code(self, keep=lambda c: True): return "\n\n".join(c.source for c in self.cells if keep(c))
    @property
    def exported(self): return self.code(lambda c: "export" in c.flags)


def cell(source):
    "A code cell without its directives and magics."
    flags = set(re.findall(r"^#\|\s*(\w+)", source, re.M))
    if re.search(r"^#\|\s*eval:\s*false", source, re.M): flags |= SKIPPED
    return Cell(re.sub(r"^(#\||%|!).*\n?", "", source, flags=re.M), flags)


def chapter(path):
    "A notebook as a chapter; Markdown cells count as empty code."
    nb = json.loads(path.read_text(encoding="utf8"))
    number, letter, name = re.fullmatch(r"(?:(\d\d)([a-z]?)_)?(.*)", path.stem).groups()      # 05b lies between 05 and 06
    cells = [cell("".join(c["source"]) if c["cell_type"] == "code" else "") for c in nb["cells"]]
    return Chapter(int(number or 99) + " abcdefghi".index(letter or " ") / 10, name, cells, path.stat().st_size)


def planted(*sources, number=5, name="planted", size=0):
    return Chapter(number, name, [cell(s) for s in sources], size)


CHAPTERS = [chapter(p) for p in sorted((ROOT / "nbs").glob("[0-9][0-9]*_*.ipynb"))]
STUDIES = [chapter(p) for p in sorted(p for d in ("studies", "tutorials") for p in (ROOT / "nbs" / d).glob("[!.]*.ipynb"))]
LOG = (ROOT / "nbs/log.md").read_text(encoding="utf8") if (ROOT / "nbs/log.md").is_file() else ""
# a line of the log, "Ceiling broken: `learner`, lines in exported cell: why", waives that ceiling there
WAIVED = tuple(f"{name}: {what}" for name, what in re.findall(r"Ceiling broken: `(\w+)`, ([\w ]+): \w", LOG))
NUMBER = {c.name: c.number for c in CHAPTERS}


def defined(source):
    "Public functions and classes of a module."
    return [n for n in ast.parse(source).body
            if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not n.name.startswith("_")]


def code_lines(source):
    "Line numbers that hold code: no blanks, comments or docstrings."
    docs = set()
    for n in ast.walk(ast.parse(source)):
        if isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.Module)) and ast.get_docstring(n):
            docs |= set(range(n.body[0].lineno, n.body[0].end_lineno + 1))
    return {i for i, s in enumerate(source.splitlines(), 1) if s.strip() and not s.strip().startswith("#")} - docs


# Rules: a chapter in, a list of breaches out.

def upward(ch):
    "A chapter imports only lower numbers, names by name, and nothing that only developers have."
    out = []
    for n in ast.walk(ast.parse(ch.exported)):
        if not isinstance(n, (ast.Import, ast.ImportFrom)): continue
        for root in [n.module or ""] if isinstance(n, ast.ImportFrom) else [a.name for a in n.names]:
            top, _, rest = root.partition(".")
            if top in DEV_ONLY: out.append(f"{ch.name} imports {top}, which only developers have")
            if top != "mhdet" or ast.unparse(n) == "from mhdet import __version__": continue
            if isinstance(n, ast.Import) or rest not in NUMBER:
                out.append(f"{ch.name} imports {root}: names are imported by name, from a chapter")
            elif NUMBER[rest] >= ch.number: out.append(f"{ch.name} ({ch.number:02g}) imports {rest} ({NUMBER[rest]:02g})")
            elif 11 <= ch.number <= 14 and 1 <= NUMBER[rest] <= 10:
                out.append(f"the hinge: {ch.name} must not know of {rest}")
    return out


def resolved(ch):
    "No star import; every name is defined, in the module alone and in the whole notebook, skipped cells included."
    out = []
    for what, source in (("module", ch.exported), ("notebook", ch.code())):
        found = []
        rep = reporter.Reporter(io.StringIO(), io.StringIO())
        rep.flake = found.append
        api.check(source + "\n", ch.name, rep)
        for m in found:
            given = what == "notebook" and m.message_args and m.message_args[0] in ("display", "get_ipython")
            if isinstance(m, BAD_NAMES) and not given:
                out.append(f"{ch.name} ({what}): {m.message % m.message_args}")
    return out


def ceilings(ch):
    "Sizes of a chapter, its exported cells and functions, its lines and its file."
    out = []
    def check(what, value, ceiling): out.extend([f"{ch.name}: {what} {value} > {ceiling}"] if value > ceiling else [])
    check("exported lines", len(code_lines(ch.exported)), CEILING["chapter"])
    check("cells", len(ch.cells), CEILING["cells"])
    check("kilobytes", ch.bytes // 1000, CEILING["kilobytes"])
    for i, c in enumerate(ch.cells):
        check(f"width in cell {i}", max(map(len, c.source.splitlines()), default=0), CEILING["width"])
        if "export" not in c.flags: continue
        lines = code_lines(c.source)
        check(f"lines in exported cell {i}", len(lines), CEILING["cell"])
        for f in ast.walk(ast.parse(c.source)):
            if isinstance(f, ast.FunctionDef):
                check(f"lines in {f.name}", len(lines & set(range(f.lineno, f.end_lineno + 1))), CEILING["cell"])
    return out


def own_body(f):
    "Nodes of a function, nested functions left out."
    todo = list(f.body)
    while todo:
        n = todo.pop()
        yield n
        if not isinstance(n, (ast.FunctionDef, ast.Lambda, ast.ClassDef)): todo += ast.iter_child_nodes(n)


def docstrings(ch):
    "Shape, unit, error, source: which sections a public docstring must have, and that no argument is forgotten."
    out = []
    for n in defined(ch.exported):
        doc = ast.get_docstring(n) or ""
        if isinstance(n, ast.ClassDef):
            forms = dict(errors=r"[Ee]rror|[Rr]aise", source=r"Source|References")
            lacks = [what for what, form in forms.items() if not re.search(form, doc)]
        else:
            parts = dict(re.findall(r"^([A-Z]\w+)\n-+\n(.*?)(?=^[A-Z]\w+\n-+\n|\Z)", doc, re.M | re.S))
            spec = n.args
            args = [a.arg for a in (*spec.posonlyargs, *spec.args, *spec.kwonlyargs, spec.vararg, spec.kwarg) if a]
            for word, other in (("Yields", "Returns"), ("Source", "References")):
                if word in parts: parts[other] = parts[word]
            gives = any(isinstance(x, (ast.Yield, ast.Return)) and getattr(x.value, "value", x.value) is not None
                        for x in own_body(n))
            due = dict(Parameters=args, Returns=gives, Raises=True, References=True)
            lacks = [section for section in due if due[section] and section not in parts]
            named = parts.get("Parameters", " ".join(args))
            lacks += [f"'{a}' in Parameters" for a in args if not re.search(rf"^[\w*, ]*\b{a}\b", named, re.M)]
        if not doc: lacks = ["a docstring"]
        out += [f"{ch.name}.{n.name} lacks {what}" for what in lacks]
    return out


def used(*trees):
    return {x.id if isinstance(x, ast.Name) else x.attr
            for t in trees if t for x in ast.walk(t) if isinstance(x, (ast.Name, ast.Attribute))}


def asserted(ch):
    "Every public name, or something made from it, stands in a cell with an assertion that the tests run."
    trees = [ast.parse(c.source) for c in ch.cells if "export" not in c.flags and not c.flags & SKIPPED]
    made, tested = [], set()               # (names given, names they were made from); names beside an assertion
    for t in trees:
        nodes = list(ast.walk(t))
        calls = {n.func.id for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
        asserts = any(isinstance(n, ast.Assert) for n in nodes)
        if asserts or any(c.startswith(("test_", "expect_fail")) for c in calls): tested |= used(t)
        for n in nodes:
            if isinstance(n, (ast.FunctionDef, ast.ClassDef)): made.append(({n.name}, used(n)))
            elif isinstance(n, ast.Assign): made.append((used(*n.targets), used(n.value)))
            elif isinstance(n, (ast.For, ast.comprehension)): made.append((used(n.target), used(n.iter)))
            elif isinstance(n, ast.withitem): made.append((used(n.optional_vars), used(n.context_expr)))
    for _ in made:                                   # what a tested thing was made from is tested too
        tested |= set().union(*(source for given, source in made if given & tested))
    return [f"{ch.name}.{n.name} is in no assertion" for n in defined(ch.exported) if n.name not in tested]


def half(drop="nothing", args="x"):
    "Source of a small exported function, with one section of its docstring left out."
    sections = dict(Parameters="x : float", Returns="float", Raises="Nothing.", References="own")
    doc = "".join(f"\n\n    {k}\n    {'-' * len(k)}\n    {v}" for k, v in sections.items() if k != drop)
    return f'#| export\ndef half({args}):\n    """Half.{doc}\n    """\n    return x / 2'


BREACHES = [
    (upward, "#| export\nfrom mhdet.planted9 import f", "by name, from a chapter"),
    (upward, "#| export\nimport mhdet.core", "by name, from a chapter"),
    (upward, "#| export\nfrom fastcore.all import L", "only developers have"),
    (resolved, "#| export\nfrom math import *\nx = sin(1)", "import *"),
    (resolved, "#| export\ndef f(): return plt", "undefined name 'plt'"),
    (resolved, "#| cuda\nfigure()", "undefined name 'figure'"),
    (ceilings, "#| export\n" + "x = 1\n" * 41, "lines in exported cell 0 41 > 40"),
    (ceilings, "#| export\ndef f():\n" + "    x = 1\n" * 40, "lines in f 41 > 40"),
    (ceilings, "x = '" + "-" * 120 + "'", "width in cell 0 126 > 120"),
    (docstrings, "#| export\ndef half(x): return x / 2", "half lacks a docstring"),
    *((docstrings, half(drop=s), f"half lacks {s}") for s in ("Parameters", "Returns", "Raises", "References")),
    (docstrings, half(args="x, y"), "half lacks 'y' in Parameters"),
    (docstrings, '#| export\nclass A:\n    "Holds a thing. Source: own."', "A lacks errors"),
    (asserted, "#| export\ndef half(x): return x / 2", "half is in no assertion"),
]
CHAPTER_BREACHES = [
    (upward, planted("#| export\nfrom mhdet.core import load_config", number=0), "imports core (00)"),
    (upward, planted("#| export\nfrom mhdet.boxes import nms", number=12), "the hinge"),
    (ceilings, planted(*["#| export\nx = 1"] * 251), "exported lines 251 > 250"),
    (ceilings, planted(*["x = 1"] * 71), "cells 71 > 70"),
    (ceilings, planted(size=600_000), "kilobytes 600 > 500"),
    (asserted, planted(half(), "y = half(2)", "#| slow\nassert y == 1"), "half is in no assertion"),
]
RULES = [upward, resolved, ceilings, docstrings, asserted]


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.__name__)
@pytest.mark.parametrize("ch", CHAPTERS, ids=lambda c: c.name)
def test_chapter(rule, ch): assert [b for b in rule(ch) if not b.startswith(WAIVED)] == []


@pytest.mark.parametrize("ch", STUDIES, ids=lambda c: c.name)
def test_study(ch): assert not ch.exported and resolved(ch) + ceilings(ch) == []


@pytest.mark.parametrize("rule, ch, words", [(r, planted(s), w) for r, s, w in BREACHES] + CHAPTER_BREACHES,
                         ids=[f"{b[0].__name__}-{i}" for i, b in enumerate(BREACHES + CHAPTER_BREACHES)])
def test_breach(rule, ch, words): assert any(words in b for b in rule(ch)), rule(ch)


def test_a_good_chapter_passes():
    good = planted(half(), "y = half(2)", "assert y == 1")
    assert [b for rule in RULES for b in rule(good)] == []


# Rules about the whole tree.

def bijection(notebooks, modules):
    "One module for one chapter, and the reverse; numbers are given once."
    extra = {"__init__", "_modidx", "__main__"}
    names, numbers = [n.split("_", 1)[1] for n in notebooks], [n.split("_", 1)[0] for n in notebooks]
    return ([f"{m}.py has no chapter" for m in sorted(set(modules) - set(names) - extra)]
            + [f"chapter {n} has no module" for n in sorted(set(names) - set(modules))]
            + [f"number {n} is given twice" for n in sorted(set(numbers)) if numbers.count(n) > 1])


def not_derived(root, tmp):
    "Files that change when a copy of the tree is exported and cleaned."
    copy, drop = tmp / "copy", shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for name in ("settings.ini", "setup.py", "README.md"):
        if (root / name).exists(): copy.mkdir(exist_ok=True); shutil.copy(root / name, copy / name)
    for name in ("nbs", "mhdet"): shutil.copytree(root / name, copy / name, ignore=drop)
    before = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    env = {k: v for k, v in os.environ.items() if k not in ("IN_TEST", "PYTHONPATH")}
    steps = "import nbdev; from nbdev.clean import nbdev_clean; nbdev.nbdev_export(); nbdev_clean()"
    subprocess.run([sys.executable, "-c", steps], cwd=copy, env=env, check=True)
    after = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    return sorted(str(p.relative_to(copy)) for p in before.keys() | after.keys() if before.get(p) != after.get(p))


def not_alone(root, package="mhdet"):
    "Modules that do not import alone: each in its own fork of an interpreter that has the heavy libraries, no developers' packages and no GPU."
    modules = sorted(p.stem for p in (root / package).glob("*.py") if not p.stem.startswith("_"))
    code = f"""
import importlib, os, sys
sys.modules.update(dict.fromkeys({sorted(DEV_ONLY - {'IPython'})}))
import accelerate, matplotlib.pyplot, pandas, torch, torchvision
for module in {modules}:
    if not os.fork():
        try: importlib.import_module("{package}." + module)
        except BaseException as e: print(f"{{module}}: {{type(e).__name__}}: {{e}}", flush=True)
        os._exit(0)
    os.wait()
"""
    env = os.environ | dict(PYTHONPATH=str(root), CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout.splitlines()


def stale(path, text):
    "A file that is not what it is derived to be."
    found = path.read_text(encoding="utf8") if path.is_file() else None
    state = "missing" if found is None else "stale"
    return [] if found == text else [f"{path.name} is {state}: run python docs/build.py readme"]


def build():
    spec = importlib.util.spec_from_file_location("build", ROOT / "docs/build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_bijection():
    notebooks, modules = (ROOT / "nbs").glob("[0-9]*.ipynb"), (ROOT / "mhdet").glob("*.py")
    assert bijection([p.stem for p in notebooks], [p.stem for p in modules]) == []
    assert bijection(["00_a", "01_b", "01_c"], ["a", "b", "utils", "__init__"]) == [
        "utils.py has no chapter", "chapter c has no module", "number 01 is given twice"]


def package_size(chapters):
    lines = sum(len(code_lines(c.exported)) for c in chapters)
    return [f"the package has {lines} lines > {CEILING['package']}"] if lines > CEILING["package"] else []


def test_package_size():
    assert package_size(CHAPTERS) == []
    assert package_size([planted(half())] * 2801) == ["the package has 5602 lines > 5600"]


def test_export_and_clean_leave_the_tree_unchanged(tmp_path): assert not_derived(ROOT, tmp_path) == []


def test_a_hand_edited_module_is_found(tmp_path):
    for name in ("nbs", "mhdet"): (tmp_path / "tree" / name).mkdir(parents=True)
    tree = tmp_path / "tree"
    shutil.copy(ROOT / "settings.ini", tree)
    shutil.copy(ROOT / "nbs/00_core.ipynb", tree / "nbs")
    source = (ROOT / "mhdet/core.py").read_text(encoding="utf8")
    (tree / "mhdet/core.py").write_text(source + "\nx = 1\n", encoding="utf8")
    assert "mhdet/core.py" in not_derived(tree, tmp_path)


@pytest.mark.timeout(400)
def test_every_module_imports_alone(): assert not_alone(ROOT) == []


def test_a_module_that_needs_nbdev_is_found(tmp_path):
    (tmp_path / "house").mkdir()
    for name, source in dict(__init__="", good="x = 1", bad="import nbdev").items():
        (tmp_path / f"house/{name}.py").write_text(source)
    broken = not_alone(tmp_path, "house")
    assert len(broken) == 1 and broken[0].startswith("bad: ModuleNotFoundError")


def test_readme_is_derived(): assert stale(ROOT / "README.md", build().readme()) == []


def test_a_stale_readme_is_found(tmp_path):
    (tmp_path / "README.md").write_text("old")
    assert "stale" in stale(tmp_path / "README.md", "new")[0] and "missing" in stale(tmp_path / "absent.md", "new")[0]


if __name__ == "__main__":                           # python tests/test_house.py: every breach, one a line
    print(*[f"{rule.__name__}: {b}" for ch in CHAPTERS + STUDIES for rule in RULES for b in rule(ch)], sep="\n")
