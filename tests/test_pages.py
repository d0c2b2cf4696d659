"""What the pages tell people to type exists: commands, options, config keys, modules and functions.

Pages are README, docs, design and the markdown cells of the notebooks. The log may mention what is
gone; only its command lines are checked. Links point to files.
"""

import ast
import builtins
import functools
import importlib
import json
import pkgutil
import re
import shlex
from pathlib import Path

import pytest
import typer

import mhdet
from mhdet.cli.commands import app
from mhdet.cli.grammar import spread_values
from mhdet.core.config import load_config, options
from mhdet.pairs.config import load_pairs_config, pairs_options

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("nbs/*.md"))]
NOTEBOOKS = [
    path
    for path in sorted(ROOT.glob("nbs/**/*.ipynb"))
    if ".ipynb_checkpoints" not in path.parts and path.stem != "index"  # the index is README's
]
COMMANDS = {}  # by name; `pairs train` stands under the word `pairs`
for name, found in typer.main.get_command(app).commands.items():
    below = {f"{name} {k}": v for k, v in getattr(found, "commands", {}).items()}
    COMMANDS |= below or {name: found}
# options of other programs that the pages mention: docker, jupyter
FOREIGN_OPTIONS = {"--shm-size", "--ip", "--bind_all", "--help"}
GROUP = {row["key"]: row["group"] for row in options()}
PAIR_KEYS = {row["key"] for row in pairs_options()}
# names of nbdev and fastcore, and keys of other people's files
FOREIGN_NAMES = {"expect_fail", "nbdev_export", "gaussian_noise", "sample_count"}
PACKAGES = [module.name for module in pkgutil.iter_modules(mhdet.__path__) if module.ispkg]


# Command lines in bash blocks


def bash(text):
    "Command lines of the fenced bash blocks, continued lines joined."
    blocks = re.findall(r"^ *```bash\n(.*?)^ *```", text, re.M | re.S)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def command_words(line):
    "The words after each `mhdet` that begins a command, or is run with -m, in a line."
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
    lexer.whitespace_split = True
    words, out = list(lexer), []
    for k, word in enumerate(words):
        before = words[k - 1] if k else ";"
        begins = set(before) <= set(";&|(){}") or before in ("exec", "then", "do", "-m")
        if word == "mhdet" and (begins or re.match("[A-Z_]+=", before)):
            ends = [j for j in range(k, len(words)) if set(words[j]) & set(";&|}")]
            out.append(words[k + 1 : ends[0] if ends else len(words)])
    return out


def command_and_rest(words):
    "Name of the command, of one word or two, and the words after it."
    n = 2 if " ".join(words[:2]) in COMMANDS else 1
    return " ".join(words[:n]), words[n:]


def check_line(words):
    "Parse the words as the command would; nothing is run."
    # a variable may be a number
    plain = [re.sub(r"\$\{?\w+\}?", "1", word) for word in words if word != "$@"]
    name, rest = command_and_rest(spread_values(plain))
    if "--help" in words:
        return
    assert name in COMMANDS, f"no command {name}"
    if name == "lab":
        return  # the words are JupyterLab's
    with COMMANDS[name].make_context(name, rest) as ctx:
        given = ctx.params
    read = load_pairs_config if name.startswith("pairs ") else load_config
    for word in given["words"] or ():
        if "=" in word:
            read(word)
    for key in given.keys() & {"seed", "device"}:
        if given[key]:
            read({key: given[key]})
    if "heads" in given and "num_heads" in given:
        assert not (given["heads"] or "").isdecimal(), "the number of heads is --num-heads"


TEXTS = {page: page.read_text(encoding="utf8") for page in PAGES}
LINES = [
    (page.name, words)
    for page, text in TEXTS.items()
    for line in bash(text)
    for words in command_words(line)
]


@pytest.mark.parametrize(
    "words", [w for _, w in LINES], ids=[f"{page}: {' '.join(w)[:60]}" for page, w in LINES]
)
def test_lines(words):
    check_line(words)


def test_a_wrong_line_is_found():
    assert command_words("cd x && mhdet train epochs=3 # note") == [["train", "epochs=3"]]
    launched = command_words("accelerate launch -m mhdet train --data D; ls")
    assert launched == [["train", "--data", "D"]]
    wrong = [
        "trian",
        "train epoch=3",
        "train --rezume a",
        "train epochs=few",
        "split RUN --heads H",
        "runs --all",
        "partition --heads 4",
        "study --heads 4",
    ]
    for line in wrong:
        with pytest.raises(Exception):  # noqa: B017 - typer, msgspec and assert raise different ones
            check_line(line.split())


# Names in the text


def markdown(path):
    "Text of a page, or of the markdown cells of a notebook."
    text = path.read_text(encoding="utf8")
    if path.suffix != ".ipynb":
        return text
    cells = json.loads(text)["cells"]
    return "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


def code(path):
    "Code of a notebook; of a page nothing."
    if path.suffix != ".ipynb":
        return ""
    cells = json.loads(path.read_text(encoding="utf8"))["cells"]
    return "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")


def inline(text):
    "Inline code, without that of fenced blocks."
    text = re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S)
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)


@functools.cache
def resolves(name):
    "Whether a dotted name is a module or an attribute of one."
    parts = name.split(".")
    for k in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:k]))
        except ModuleNotFoundError:
            continue
        for part in parts[k:]:
            if part in getattr(found, "__struct_fields__", ()):
                return True
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


@functools.cache
def public_names():
    "Every name that a module of the package has, and the methods of its classes."
    names = set(dir(builtins))
    for info in pkgutil.walk_packages(mhdet.__path__, "mhdet."):
        if info.name.endswith("__main__"):
            continue
        for name, value in vars(importlib.import_module(info.name)).items():
            names.add(name)
            if isinstance(value, type):
                names |= set(dir(value))
    return names


def wrong_modules(text, *_):
    "Names `mhdet.x.y`, `package.module`, imports and `group.key` that do not resolve."
    out = []
    for dotted in re.findall(r"(?<![\w/.@-])mhdet(?:\.[A-Za-z_]\w*)+", text):
        if not resolves(dotted):
            out.append(dotted)
    for module, names in re.findall(r"from (mhdet[\w.]*) import ([\w, ]+)", text):
        out += [f"{module}.{n}" for n in re.findall(r"\w+", names) if not resolves(f"{module}.{n}")]
    links = re.findall(r"\[([\w.]+)\]\([^)]*\.ipynb[^)]*\)", text)
    groups = "|".join([*PACKAGES, "train", "net"])
    for word in [*inline(text), *links]:
        found = re.match(rf"(?:{groups})(?:\.[a-z_A-Z]\w*)+(?=$|[(=])", word)
        if not found or re.search(r"\.(ya?ml|csv|json|ipynb|md|py|png|pt|txt)$", found[0]):
            continue
        group, _, key = found[0].partition(".")
        if not resolves(f"mhdet.{found[0]}") and GROUP.get(key) != group:
            out.append(found[0])
    return out


def has_option(command, word):
    return any(word in param.opts for param in COMMANDS[command].params)


def wrong_key(word, names=()):
    "What is wrong with a word `key=value`; a value in capitals or with dots stands for any."
    key, _, value = word.partition("=")
    name = key.split(".")[-1]
    if key in names or key in PAIR_KEYS - {*GROUP} or word == "key=value":
        return ""
    if name not in GROUP:
        return key
    if not value or re.search(r"^[A-Z]+\b|\.\.\.", value) or "/" in value:
        return ""
    try:
        load_config(word)
    except (ValueError, KeyError) as error:
        return f"{word} ({error})"
    return ""


def wrong_commands(text, source=""):
    "Commands, options and keys in inline code that do not exist."
    out = []
    names = set(re.findall(r"\w+", source))
    for words in inline(text):
        for line in filter(None, command_words(re.sub(r"[\"'()]", "", words))):
            name, rest = command_and_rest(line)
            if name.startswith("-") or name == "lab":
                continue
            if name not in COMMANDS:
                out.append(f"mhdet {name}")
                continue
            for word in rest:
                option = word.split("=")[0]
                if word.startswith("--") and not has_option(name, option):
                    out.append(f"mhdet {name} {option}")
                elif "=" in word and not word.startswith("-"):
                    out += filter(None, [wrong_key(word)])
            if has_option(name, "--num-heads") and "--heads" in rest:
                out.append(f"mhdet {name} --heads")
        option = re.match(r"--[a-z][\w-]*", words)
        known = option and any(has_option(name, option[0]) for name in COMMANDS)
        if option and not known and option[0] not in FOREIGN_OPTIONS:
            out.append(option[0])
        if re.fullmatch(r"(\w+=[^\s()]*\s*)+", words):
            for word in words.split():
                # a chapter may mean an argument of its functions
                out += filter(None, [wrong_key(word, names)])
    return out


def wrong_functions(text, source=""):
    "Functions in inline code, `name(...)`, of neither the package, Python nor this notebook."
    out, own = [], set(re.findall(r"\w+", source))
    for words in inline(text):
        call = re.fullmatch(r"([A-Za-z_][\w.]*)\((.*)\)", words)
        if not call or call[2].isdecimal():  # rename(2) is a manual page
            continue
        name = call[1]
        known = name.split(".")[-1] in public_names() | own
        if name.startswith("mhdet.") or name.split(".")[0] in PACKAGES:
            known = resolves(f"mhdet.{name.removeprefix('mhdet.')}")
        if not known:
            out.append(f"{name}()")
    return out


@functools.cache
def package_words():
    "Every word of the package and of the YAML files in data: keys, columns, names of files."
    paths = [*ROOT.glob("mhdet/**/*.py"), *ROOT.glob("data/*.yaml")]
    return set(re.findall(r"\w+", "\n".join(p.read_text(encoding="utf8") for p in paths)))


def wrong_identifiers(text, source=""):
    "Names with an underscore in inline code that occur nowhere in the package."
    own = set(re.findall(r"\w+", source))
    names = [word for word in inline(text) if re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)+", word)]
    return [name for name in names if name not in package_words() | own | FOREIGN_NAMES]


def shown(path):
    "Text to be checked; flags of YOLOv7 are in the first column of that page's tables."
    text = markdown(path)
    if path.stem == "from_yolov7":
        text = re.sub(r"^\|[^|]*\|", "|", text, flags=re.M)
    return text


CHECKED = [p for p in [*PAGES, ROOT / "CONTRIBUTING.md", *NOTEBOOKS] if p.stem != "log"]
RULES = [wrong_modules, wrong_commands, wrong_functions, wrong_identifiers]


@pytest.mark.parametrize("rule", RULES)
def test_names_exist(rule):
    wrong = {}
    for path in CHECKED:
        if found := rule(shown(path), code(path)):
            wrong[str(path.relative_to(ROOT))] = found
    assert not wrong


@pytest.mark.parametrize(
    "rule, text, expected",
    [
        (wrong_modules, "`mhdet.assign.anchor_stats` looks", ["mhdet.assign.anchor_stats"]),
        (wrong_modules, "`mhdet.model.loss.nothing`", ["mhdet.model.loss.nothing"]),
        (wrong_modules, "```python\nfrom mhdet.core import load_cfg\n```", ["mhdet.core.load_cfg"]),
        (wrong_modules, "`train.lr`, `net.width`", ["train.lr", "net.width"]),
        (wrong_modules, "[evaluation.versus](../02_evaluation/x.ipynb)", ["evaluation.versus"]),
        (wrong_modules, "`mhdet.core.config.load_config`, `training.lr`, `core.runs`", []),
        (wrong_commands, "`mhdet trian`", ["mhdet trian"]),
        (wrong_commands, "`mhdet train --rezume a`", ["mhdet train --rezume"]),
        (wrong_commands, "`mhdet train epoch=3`", ["epoch"]),
        (wrong_commands, "`mhdet partition --heads 4`", ["mhdet partition --heads"]),
        (wrong_commands, "`--rezume`", ["--rezume"]),
        (wrong_commands, "`epoch=3 lr=.1`", ["epoch"]),
        (wrong_commands, "`mhdet split RUN --heads H.yaml`, `--data D`, `weights=RUN@best`", []),
        (wrong_functions, "`fit_boxes(data)`", ["fit_boxes()"]),
        (wrong_functions, "`mhdet.model.loss.nothing(x)`", ["mhdet.model.loss.nothing()"]),
        (wrong_identifiers, "`fit_boxes`, `label_smoothing`", ["fit_boxes"]),
        (wrong_functions, "`load_config(file)`, `rename(2)`, `max(a, b)`", []),
    ],
)
def test_a_wrong_name_is_found(rule, text, expected):
    assert rule(text) == expected


def test_a_wrong_value_is_found():
    assert wrong_commands("`precision=fp64`")[0].startswith("precision=fp64 (")


# Python blocks and links


def test_python_blocks_parse():
    for path in PAGES:
        for block in re.findall(r"^ *```python\n(.*?)^ *```", TEXTS[path], re.M | re.S):
            lines = [
                line for line in block.splitlines() if not line.lstrip().startswith(("%", "!"))
            ]
            indent = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
            ast.parse("\n".join(line[indent:] for line in lines))


def links(path):
    "Relative targets of the links of a page or a notebook."
    text = re.sub(r"^ *```.*?^ *```", "", markdown(path), flags=re.M | re.S)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    return [target for target in targets if not re.match(r"[a-z]+:|#", target)]


def test_links_point_to_files():
    lost = []
    for path in [*PAGES, *NOTEBOOKS]:
        for target in links(path):
            if not (path.parent / target.split("#")[0]).exists():
                lost.append(f"{path.relative_to(ROOT)}: {target}")
    assert not lost, lost
