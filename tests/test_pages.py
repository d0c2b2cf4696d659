"""What the pages tell people to type exists: commands, options, config keys; and links point to files."""

import json
import re
import shlex
from pathlib import Path

import pytest
import typer

from mhdet.cli.commands import app
from mhdet.cli.grammar import spread_values
from mhdet.core.config import load_config

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("nbs/*.md"))]
COMMANDS = typer.main.get_command(app).commands


def bash(text):
    "Command lines of the fenced bash blocks, continued lines joined."
    blocks = re.findall(r"^ *```bash\n(.*?)^ *```", text, re.M | re.S)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def asked(line):
    "The words after each `mhdet` that begins a command, or is run with -m, in a line."
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
    lexer.whitespace_split = True
    words, out = list(lexer), []
    for k, word in enumerate(words):
        before = words[k - 1] if k else ";"
        begins = (
            set(before) <= set(";&|(){}")
            or before in ("exec", "then", "do", "-m")
            or re.match("[A-Z_]+=", before)
        )
        if word == "mhdet" and begins:
            end = next((j for j in range(k, len(words)) if set(words[j]) & set(";&|}")), len(words))
            out.append(words[k + 1 : end])
    return out


def check(words):
    "Parse the words as the command would; nothing is run."
    name, *rest = spread_values(
        [re.sub(r"\$\{?\w+\}?", "1", w) for w in words if w != "$@"]
    )  # a variable may be a number
    if "--help" in words:
        return
    assert name in COMMANDS, f"no command {name}"
    if name == "lab":
        return  # the words are JupyterLab's
    with COMMANDS[name].make_context(name, rest) as ctx:
        given = ctx.params
    for word in given["words"] or ():
        if "=" in word:
            load_config(word)
    for key in given.keys() & {"seed", "device"}:
        if given[key]:
            load_config({key: given[key]})


TEXTS = {page: page.read_text(encoding="utf8") for page in PAGES}
LINES = [
    (page.name, words)
    for page, text in TEXTS.items()
    for line in bash(text)
    for words in asked(line)
]


@pytest.mark.parametrize(
    "words", [w for _, w in LINES], ids=[f"{page}: {' '.join(w)[:60]}" for page, w in LINES]
)
def test_lines(words):
    check(words)


def test_a_breach_is_found():
    assert asked("cd x && mhdet train epochs=3 # note") == [["train", "epochs=3"]]
    assert asked("accelerate launch -m mhdet train --data D; ls") == [["train", "--data", "D"]]
    for line in (
        "trian",
        "train epoch=3",
        "train --rezume a",
        "train epochs=few",
        "split RUN --heads H",
        "runs --all",
    ):
        with pytest.raises(Exception):
            check(line.split())


def links(path):
    "Relative targets of the Markdown links of a page or a notebook."
    text = path.read_text(encoding="utf8")
    if path.suffix == ".ipynb":
        text = "\n".join(
            "".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "markdown"
        )
    text = re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S)
    return [t for t in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+:|#", t)]


def test_links_point_to_files():
    notebooks = (
        p for p in sorted(ROOT.glob("nbs/**/*.ipynb")) if ".ipynb_checkpoints" not in p.parts
    )
    pages = [
        *PAGES,
        *(p for p in notebooks if p.stem != "index"),
    ]  # the index is README's, at the root
    lost = [
        f"{p.relative_to(ROOT)}: {t}"
        for p in pages
        for t in links(p)
        if not (p.parent / t.split("#")[0]).exists()
    ]
    assert not lost, lost
