"""Every concept of the training notes and of the diary of a detector is asserted somewhere.

The study of the training notes has a table: a concept, the heading it stands under in a chapter,
and a piece of the assertion. No notebook is run here.
"""

import ast
import functools
import json
import re
from pathlib import Path
from typing import NamedTuple

import pytest

NBS = Path(__file__).resolve().parents[1] / "nbs"
STUDY = NBS / "studies/training-notes.ipynb"
SECTION = "Where each concept is asserted"
NOT_RUN = {"slow", "cuda"}

# What the table must have: one id per concept of the notes, per hook and loss described there, per
# experiment of the diary, per part of the diagnosis. What each is stands in the table.
CONCEPTS = """
    flow logistic logistic-gradient descent fp16 fp16-overflow overfitting mismatch weight-decay
    dropout early-stopping lr-decay clipping augmentation mixup cutmix erasing save-the-best
    pseudo-labels transfer saddle saddle-escape momentum batch-size rms adam bowl warm-up softmax
    two-class-softmax softmax-shift cross-entropy depth gan attention multi-head attention-rows cnn
    rnn norms group-norm layer-norm running-statistics norm-batch teacher-forcing causal-mask l1
    smooth-l1 giou focal

    hook-order hook-priority hook-rate resume load non-finite norm-reg bag bag-gradient bag-negative
    noisy-or

    late-map size-census loss-scale three-losses one-class-cut two-maps class-maps loss-parts
    anchors-drawn score-sweep one-threshold few-images census telemetry

    anchors-189 anchor-decode anchor-matching anchor-coverage census-defects focal-ratio focal-half
    adam-scale voc07 voc10 coco voc-matching difficult histogram near-zero log-image good-start
    hooks dead-layer
"""
EXPECTED = CONCEPTS.split()

# Numbers that must stand together in an assertion, or in the cells that lead to it.
ANCHORS = "07_probe/04_anchors.ipynb"
LOSSES = "04_model/06_loss.ipynb 04_model/12_box_losses.ipynb"
TRAINING = "05_training/*.ipynb studies/*.ipynb"
GOLDEN = [
    ("189", ANCHORS),  # grids of 4, 2, 1; nine per cell
    ("10.5", ANCHORS),  # px, the smallest side that can be decoded at 224
    ("42 21", ANCHORS),  # px, the smallest anchors
    ("291", ANCHORS),  # px, the largest
    ("5343 2501 7844", ANCHORS),  # counted, images, all: the last box of each was skipped
    ("468 5343 .0876", ANCHORS),  # with a side of 10 px or less; the share
    (".11 .53 .76 .94", ANCHORS),  # squares of 20, 40, 60, 100 px with a best IoU over .4
    (".13 .23 .42 .69", ANCHORS),  # of 30, 40, 60, 100 px over .5
    ("2.67 10 66.7 8", LOSSES),  # cross-entropy over focal loss
    (".133 .02", LOSSES),  # at these probabilities
    (".754545 .281640", LOSSES),  # bag of .9, .1, .1, and its loss
    (".9802", LOSSES),  # bag of .99, .01
    (".848485 .834983 .833333", "02_evaluation/00_metrics.ipynb"),  # right, wrong, right of two
    ("1 11", "02_evaluation/00_metrics.ipynb"),  # a sweep, where nothing is found
    (".9", "07_probe/00_activations.ipynb"),  # near zero, by the default start
    (".2", "04_model/00_backbone.ipynb 07_probe/00_activations.ipynb"),  # by a good one
    ("8 3", "04_model/00_backbone.ipynb"),  # layer norms of 2 x 4 x 3
    ("16", "05_training/00_learner.ipynb"),  # a loss times 2^16
    ("1e-4", TRAINING),  # weight decay
    ("0 10 30 40 50 70 90 100", TRAINING),  # priorities of hooks
    ("2 -2", "07_probe/02_landscape.ipynb"),  # eigenvalues of the saddle
    ("0.5", "studies/training-notes.ipynb"),  # the probability that is class 0
]


class Cell(NamedTuple):
    heading: tuple  # ((level, title), ...) from the title of the notebook down
    source: str  # without directives and magics; empty for Markdown
    flags: frozenset
    markdown: str = ""


def headings(text):
    "(level, title) of the headings of a Markdown cell."
    text = re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S)
    return [(len(m[1]), m[2].strip()) for m in re.finditer(r"^(#+) (.+)$", text, re.M)]


@functools.cache
def read_cells(path):
    "Cells of a notebook, each with the headings that it is under; of one level the last counts."
    above, out = [], []
    for c in json.loads(path.read_text(encoding="utf8"))["cells"]:
        text = "".join(c["source"])
        if c["cell_type"] != "code":
            for level, title in headings(text):
                above = [h for h in above if h[0] < level] + [(level, title)]
            out.append(Cell(tuple(above), "", frozenset(), text))
            continue
        flags = set(re.findall(r"^#\|\s*(\w+)", text, re.M))
        if re.search(r"^#\|\s*eval:\s*false", text, re.M):
            flags.add("slow")
        source = re.sub(r"^(#\||%|!).*\n?", "", text, flags=re.M)
        out.append(Cell(tuple(above), source, frozenset(flags)))
    return out


@functools.cache
def asserts(cell):
    "Whether a cell has an assertion that is run by the tests."
    if cell.flags & NOT_RUN:
        return False
    for n in ast.walk(ast.parse(cell.source)):
        name = getattr(n.func, "id", "") if isinstance(n, ast.Call) else ""
        if isinstance(n, ast.Assert) or name in ("test_eq", "test_close", "expect_fail"):
            return True
    return False


def read_table(path):
    "Id -> (where, asserted by) of the table; an id that is there twice is an error."
    under = [c.markdown for c in read_cells(path) if SECTION in [h[1] for h in c.heading]]
    rows = {}
    for line in "\n".join(under).splitlines():
        columns = [v.strip() for v in line.strip().strip("|").split("|")]
        if not line.startswith("|") or columns[0] == "concept" or set(columns[0]) == {"-"}:
            continue
        name = columns[0].split(":")[0]
        assert len(columns) == 3, f"{name}: expected 3 columns, got {len(columns)}: {line}"
        assert name not in rows, f"{name}: two rows"
        rows[name] = columns[1], columns[2]
    return rows


def fault(where, piece, folder):
    "What is wrong with a row of the table, or nothing."
    if "open" in (where, piece):
        return "the row is open"
    link = re.fullmatch(r"\[(.+)\]\(([^)#]+\.ipynb)\)", where)
    code = re.fullmatch(r"`([^`]+)`", piece)
    if not link or not code:
        return f"expected [heading](notebook) and `code`, got {where} and {piece}"
    title, path = link[1], folder / link[2]
    if not path.is_file():
        return f"{link[2]} is not there"
    cells = read_cells(path)
    below = [c for c in cells if title in [h[1] for h in c.heading]]
    if not below:
        return f"{link[2]} has no heading '{title}'"
    found = [c for c in below if code[1] in c.source]
    if not found:
        anywhere = [c.heading[-1][1] for c in cells if code[1] in c.source]
        hint = f"; it is under '{anywhere[0]}'" if anywhere else ""
        return f"no cell under '{title}' has {piece}{hint}"
    if not any(map(asserts, found)):
        return f"the cell under '{title}' with {piece} asserts nothing that is run"
    return ""


@functools.cache
def numbers(source):
    "Values of the literals of a source, and of arithmetic with them: 1.5, -2, 8 / 3."
    out = []
    for n in ast.walk(ast.parse(source)):
        if isinstance(n, ast.Constant | ast.UnaryOp | ast.BinOp):
            try:
                value = eval(compile(ast.Expression(n), "", "eval"), {"__builtins__": {}})
            except (ArithmeticError, NameError, TypeError):  # not of literals alone
                continue
            if isinstance(value, int | float) and not isinstance(value, bool):
                out.append(value)
    return out


def steps_to_assertions(cells):
    "Source of each asserting cell, with the cells of its section since the one before."
    out, waiting, heading = [], [], None
    for c in cells:
        if c.heading != heading:
            waiting, heading = [], c.heading
        if c.source and not c.flags & NOT_RUN:
            waiting.append(c.source)
            if asserts(c):
                out.append("\n".join(waiting))
                waiting = []
    return out


def lacking(golden, source):
    "Those of some numbers that a source lacks; one with more digits may stand for 3 or more."
    there, out = numbers(source), []
    for text in golden.split():
        places = len(text.partition(".")[2]) if "e" not in text else 9
        digits = len(text.strip("-0.").replace(".", ""))
        value = float(text)
        equal = value in there
        rounded = digits >= 3 and any(round(v, places) == value for v in there)
        if not equal and not rounded:
            out.append(text)
    return out


def unasserted(golden, patterns, folder):
    "The numbers that are missing where most of them are asserted, or why there is no such place."
    paths = [p for pattern in patterns.split() for p in sorted(folder.glob(pattern))]
    if not paths:
        return f"{patterns} is not there"
    sources = [source for p in paths for source in steps_to_assertions(read_cells(p))]
    missing = [lacking(golden, source) for source in sources]
    fewest = min(missing, key=len, default=golden.split())
    return f"no assertion of {patterns} has {' '.join(fewest)}" if fewest else ""


@pytest.fixture(scope="module")
def table():
    return read_table(STUDY)


def test_no_other_rows(table):
    assert sorted(set(table) - set(EXPECTED)) == []
    assert len(EXPECTED) == len(set(EXPECTED))


@pytest.mark.parametrize("concept", EXPECTED)
def test_concept(table, concept):
    assert concept in table, f"{concept}: the table has no such row"
    reason = fault(*table[concept], STUDY.parent)
    assert not reason, f"{concept}: {reason}"


@pytest.mark.parametrize("golden, patterns", GOLDEN, ids=[golden for golden, _ in GOLDEN])
def test_golden_numbers(golden, patterns):
    reason = unasserted(golden, patterns, NBS)
    assert not reason, reason


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    "A folder with a notebook of two sections."
    sources = [
        ("markdown", "# A\n\n> Why?"),
        ("markdown", "## First\n```\n## Not a heading\n```"),
        ("code", "x = 1.5"),
        ("code", "test_close(x, -2 / 3)"),
        ("markdown", "### Below"),
        ("code", "assert x > 1"),
        ("code", "y = x"),
        ("code", "#| slow\nassert y == 4"),
        ("markdown", "## Second"),
        ("code", "assert x"),
    ]
    folder = tmp_path_factory.mktemp("planted")
    cells = [dict(cell_type=kind, source=[source]) for kind, source in sources]
    (folder / "a.ipynb").write_text(json.dumps({"cells": cells}))
    return folder


@pytest.mark.parametrize(
    "where, piece, reason",
    [
        ("[First](a.ipynb)", "`test_close(x`", ""),
        ("[First](a.ipynb)", "`x > 1`", ""),  # below a lower heading
        ("open", "open", "the row is open"),
        ("First", "`x > 1`", "expected [heading](notebook)"),
        ("[First](b.ipynb)", "`x > 1`", "b.ipynb is not there"),
        ("[Third](a.ipynb)", "`x > 1`", "no heading 'Third'"),
        ("[Not a heading](a.ipynb)", "`x > 1`", "no heading"),
        ("[Second](a.ipynb)", "`x > 1`", "no cell under 'Second' has `x > 1`; it is under 'Below'"),
        ("[First](a.ipynb)", "`y = x`", "asserts nothing that is run"),
        ("[First](a.ipynb)", "`y == 4`", "asserts nothing that is run"),
    ],
)
def test_a_wrong_row_is_found(planted, where, piece, reason):
    found = fault(where, piece, planted)
    assert reason in found and bool(reason) == bool(found), found


def test_a_missing_number_is_found(planted):
    assert unasserted("1.5 -.667", "*.ipynb", planted) == ""
    assert unasserted("1.5 -.668", "*.ipynb", planted).endswith("has -.668")
    assert unasserted("1.5", "b.ipynb", planted) == "b.ipynb is not there"
    assert unasserted("4", "a.ipynb", planted).endswith("has 4")  # the cell is not run
    assert unasserted("1.5 1", "a.ipynb", planted).endswith("has 1")  # of another section


def test_a_wrong_table_is_found(planted):
    lines = ["| concept | where | asserted by |", "| --- | --- | --- |", "| a: b | open | open |"]
    for extra, reason in (("| a: c | open | open |", "two rows"), ("| b | open |", "3 columns")):
        read_cells.cache_clear()
        text = "\n".join([f"# A\n## {SECTION}", *lines, extra])
        cells = [dict(cell_type="markdown", source=[text])]
        (planted / "table.ipynb").write_text(json.dumps({"cells": cells}))
        with pytest.raises(AssertionError, match=reason):
            read_table(planted / "table.ipynb")
