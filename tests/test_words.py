"""Words are text: keys that take text get all of it, and names that cannot work are refused.

A name is kept whole and can be given again to every command, or it is refused in one line before
anything is made.
"""

import json
import shlex
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from mhdet.cli.commands import app
from mhdet.core.config import Config, as_word, load_config
from mhdet.core.runs import check_run_name, find_run, new_run
from mhdet.experiment.history import load_runs
from mhdet.experiment.models import load_run
from mhdet.experiment.run import train
from mhdet.experiment.study import study
from mhdet.experiment.sweep import sweep, sweep_command, sweep_rows
from mhdet.partition.heads import Partition, save_heads

ROOT = Path(__file__).resolve().parents[1]
TEXT_KEYS = ["data", "device", "head_aware", "heads", "pretrained", "run", "trunk", "weights"]
SMALL = "imgsz=64 batch=8 width=0.125 workers=0 precision=fp32 epochs=1 device=cpu"
# what YAML reads as something else, or as less
TEXTS = [
    *("try #4", "#4", "a: b", "- a", "? a", "'a'", '"a"', '"a', "~", "Null", "none", "7", "007"),
    *("1:30", "1e3", "0x1F", "on", "no", "true", "2026-11-29", "[1, 2]", "{a: 1}", "[", "*a", "&a"),
    *("!!int 7", "!a", "|", ">", "%a", "@a", "`a`", " a ", "a\tb", "a=b", "größe", "数据", "a,b"),
    *("in/set #2/data.yaml", "C:\\data", "<<", "---", "...", "$HOME", "*", ".5", ".inf", ".nan"),
]
KEPT = [
    *("try #4", "#4", "a b", "a: b", "'a'", '"a"', "a's", "7", "007", "1:30", "1e3", "on", "no"),
    *(
        "true",
        "Null",
        "none",
        "2026-11-29",
        "[1]",
        "{a}",
        "*a",
        "&a",
        "!a",
        "|",
        "%a",
        "`a`",
        "a,b",
    ),
    *("$HOME", "größe", "数据", "é" * 100, "v1.5", "a+b", "(a)", "a;b", "a|b", "_a", "a" * 200),
    *("sub/run", "a b/c #1/d", "base-s0", "last", "best"),
]
REFUSED = {
    "a@b": "'@' means a state",
    "a@": "'@' means a state",
    "sub/a@b": "'@' means a state",
    "lr=0.1": "'=' means a key",
    "a\\b": "'\\' means a folder",
    "../up": "outside the folder 'runs'",
    "..": "outside the folder 'runs'",
    "a/../../up": "outside the folder 'runs'",
    "/abs": "outside the folder 'runs'",
    " ": "it is empty",
    "\t": "it is empty",
    "a//b": "it is empty, or a folder in it is",
    "a/": "it is empty, or a folder in it is",
    " a": "a blank at the start or the end",
    "a ": "a blank at the start or the end",
    "a /b": "a blank at the start or the end",
    ".": "'.' at the start",
    ".hidden": "'.' at the start",
    ".cache": "'.' at the start",
    "a/.cache/b": "'.' at the start",
    "-a": "'-' at the start",
    "--resume": "'-' at the start",
    "~": "'~' at the start",
    "~root": "'~' at the start",
    "a\x00b": "characters that cannot be shown",
    "a\nb": "characters that cannot be shown",
    "a\x1b[31mb": "characters that cannot be shown",
    "a\u200bb": "characters that cannot be shown",
    "\udcff": "characters that cannot be shown",
    "a.part": "not complete",
    "a.part/b": "not complete",
    "data.yaml": "'.yaml' means a file",
    "sets/data.YML": "'.yml' means a file",
    "gt.json": "'.json' means a file",
    "best.pt": "'.pt' means a file",
    "x" * 201: "longer than 200 bytes",
    "é" * 101: "longer than 200 bytes",
    "a/" * 120 + "b": "longer than 200 bytes",
}


def mhdet(*words):
    done = CliRunner().invoke(app, list(words))
    return done.exit_code, done.stdout, done.stderr


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_key_gets_the_word_as_it_stands(text):
    for key in TEXT_KEYS:
        if key != "data" or text != "[1, 2]":  # several data sets
            assert load_config(f"{key}={text}").flat()[key] == text
    assert load_config(f"training.run={text}").training.run == text


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_any_text_comes_back_from_a_word_and_from_a_saved_config(tmp_path_factory, text):
    for key in ("run", "data", "weights"):
        if key == "data" and text.startswith("[") and text.endswith("]"):
            continue  # several data sets
        value = None if text == "null" and key != "data" else text
        assert load_config(f"{key}={text}").flat()[key] == value
        assert load_config(as_word(key, text)).flat()[key] == value
    file = tmp_path_factory.getbasetemp() / "text.yaml"
    cfg = load_config({"run": text})
    cfg.save(file)
    assert load_config(file) == cfg


def test_nothing_and_null_are_none_where_none_is_allowed():
    flat = Config().flat()
    for key in flat:
        for word in (f"{key}=", f"{key}=null"):
            try:
                value = load_config(word).flat()[key]
            except ValueError as e:
                assert str(e).startswith(f"command line: {key}: "), word
                assert flat[key] is not None
            else:
                assert value is None or (value == "null" and key in TEXT_KEYS), word
    for key in ("run", "heads", "weights", "head_aware", "freeze", "max_hours", "multi_scale"):
        assert load_config(f"{key}=").flat()[key] is None


@pytest.mark.parametrize(
    "word, words",
    {
        "epochs=2 #3": "epochs: Expected `int`, got '2 #3'",
        "epochs=2\n# 3": "epochs: Expected `int`, got '2\\n# 3'",
        "epochs=#2": "epochs: Expected `int`, got '#2'",
        "seed=010": "seed: Expected `int`, got '010'",
        "seed=-010": "seed: Expected `int`, got '-010'",
        "max_hours=1:30": "max_hours: Expected `float | null`, got '1:30'",
        "lr=1:30.5": "lr: Expected `float`, got '1:30.5'",
        "cache=ram #4": "cache: must be 'disk', 'none' or 'ram', got 'ram #4'",
        "implicit=true #": "implicit: Expected `bool`, got 'true #'",
        "restart_seeds=[1, 2] # 3": "restart_seeds: Expected `array`, got '[1, 2] # 3'",
        "multi_scale=[64, 96] #": "multi_scale: Expected `array | null`, got '[64, 96] #'",
        "data=": "data: Expected `str` of length >= 1",
    }.items(),
)
def test_a_word_is_never_cut_or_read_as_another_number(word, words):
    with pytest.raises(ValueError) as e:
        load_config(word)
    assert str(e.value) == f"command line: {words}"


def test_what_is_text_or_number_stays_whole():
    "`freeze` is the name of a part or the number of a layer."
    given_freezes = {"p3": "p3", "50": 50, '"50"': "50", "p3 #2": "p3 #2", "#": "#", "010": "010"}
    for text, value in given_freezes.items():
        assert load_config(f"freeze={text}").training.freeze == value
        assert load_config(as_word("freeze", value)).training.freeze == value
    staged = load_config("epochs=2", 'stages=[{epochs: 2, freeze: "p3 #2"}]')
    assert staged.training.stages[0].freeze == "p3 #2"
    assert load_config("epochs=0x10", "seed=1_000", "implicit=on", "lr=1e-3").training.seed == 1000


def test_a_word_that_is_a_file_is_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("lr=0.5").write_text("epochs: 7")
    assert load_config("lr=0.5").training.epochs == 7
    assert load_config(Path("lr=0.5")).training.epochs == 7
    code, _, err = mhdet("train", "lr=0.5")
    assert (code, "expected no name, got lr=0.5" in err) == (2, True)
    code, out, _ = mhdet("doctor", "--config", "lr=0.5", "imgsz=64", "width=.125", "--json")
    assert code == 0 and json.loads(out)["imgsz"] == 64


@pytest.mark.parametrize("name", KEPT)
def test_a_kept_name_names_the_run_again(name, tmp_path):
    cfg = load_config(f"run={name}")
    run = new_run(cfg, tmp_path, lambda f: save_heads(f / "heads.yaml", Partition.single(["a"])))
    assert run == tmp_path / name
    assert load_config(run / "config.yaml").training.run == name
    assert find_run(name, tmp_path) == (run, run / "last")
    assert find_run(f"{name}@", tmp_path) == (run, run / "last")
    (run / "best").mkdir()
    assert find_run(f"{name}@best", tmp_path) == (run, run / "best")
    assert load_runs(tmp_path)["run"].tolist() == [name]
    with pytest.raises(FileExistsError) as e:
        new_run(cfg, tmp_path)
    assert shlex.split(str(e.value).split("--resume ")[1]) == [name]


@pytest.mark.parametrize("name", REFUSED)
def test_a_name_that_cannot_work_is_refused_everywhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words, cfg = REFUSED[name], load_config({"data": "absent", "run": name})
    makers = {
        "check": lambda: check_run_name(name),
        "new_run": lambda: new_run(cfg),
        "train": lambda: train(cfg),
        "study": lambda: study(cfg),
    }
    for make in makers.values():
        with pytest.raises(ValueError, match="^run: .* cannot be the name: ") as e:
            make()
        assert words in str(e.value) and "\n" not in str(e.value)
    assert list(tmp_path.iterdir()) == []


PIECES = [
    "a",
    "run 1",
    "#",
    "@",
    "/",
    "..",
    ".",
    " ",
    "-",
    "~",
    "=",
    "\\",
    "\n",
    "\0",
    "é",
    ".part",
]
PIECES += [".yaml", "best", "last", "config.yaml", "'", '"', "*", "x" * 150, "\u200d", "\ud800"]


def test_any_name_works_or_is_refused(tmp_path):
    outcomes = {True: 0, False: 0}

    @seed(0)
    @settings(max_examples=150, deadline=None, database=None, phases=[Phase.generate])
    @given(
        st.lists(st.sampled_from(PIECES), min_size=1, max_size=4).map("".join) | st.text(min_size=1)
    )
    def make(name):
        root = Path(tempfile.mkdtemp(dir=tmp_path)) / "runs"
        try:
            cfg = load_config(f"run={name}")
        except ValueError as e:  # no Unicode
            assert "\n" not in str(e)
            return
        if cfg.training.run is None:
            return
        heads = Partition.single(["a"])
        try:
            run = new_run(cfg, root, lambda folder: save_heads(folder / "heads.yaml", heads))
        except ValueError as e:
            assert "cannot be the name" in str(e) and len(str(e).splitlines()) == 1
            assert not list(root.parent.iterdir())
            outcomes[False] += 1
            return
        outcomes[True] += 1
        (run / "epoch_007").mkdir()
        assert find_run(name, root)[0] == find_run(f"{name}@7", root)[0] == run
        assert root in run.parents and run.resolve().is_relative_to(root.resolve())
        assert load_config(run / "config.yaml").training.run == name
        assert load_runs(root)["run"].tolist() == [name]

    make()
    assert min(outcomes.values()) > 20


def test_the_commands_refuse_it_before_any_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in (
        ["train", "--data", "toy:8", "run=a@b"],
        ["train", "--data", "toy:8", "run=../up"],
        ["train", "--data", "toy:8", "run= "],
        ["study", "a@b", "--data", "toy:8"],
        ["study", "toys.yaml"],  # meant: --data, of a file that is not there
        ["study", "--data", "toy:8", "run=../up"],
        ["study", " "],
        ["study", ""],
        ["study", "a", "run=b"],
        ["split", "absent", "--heads", "absent.yaml", "--out", "a@b"],
        ["split", "absent", "--heads", "absent.yaml", "--out", "runs/a@b"],
        ["split", "absent", "--heads", "absent.yaml", "--out", ""],
    ):
        code, out, err = mhdet(*words)
        assert (code, out, err.count("\n")) == (2, "", 1), words
        named = "two names for one study: a and run=b" if "run=b" in words else "cannot be the name"
        assert named in err, words
        assert list(tmp_path.iterdir()) == [], words


def test_nothing_is_made_inside_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    new_run(load_config("run=sub/a"))
    for name in ("sub/a/best", "sub/a/b/c"):
        with pytest.raises(ValueError, match="sub/a is a run, which cannot hold another"):
            train(load_config({"run": name, "data": "absent"}))
    with pytest.raises(FileExistsError, match="sub/a: is a run; give the study another name"):
        study(load_config({"run": "sub/a", "data": "absent"}))
    Path("sweep-sub.yaml").write_text("rows: {a: {}}")
    Path("runs/sub/config.yaml").touch()
    with pytest.raises(ValueError, match="sweep-sub.yaml: run: .*runs/sub is a run"):
        sweep_rows("sweep-sub.yaml")


def test_runs_of_earlier_versions_are_found_by_their_whole_name(tmp_path):
    for name in ("a", "a@b", "a@best", "x=1", ".h", "c.part"):
        new_run(load_config("run=new"), tmp_path).rename(tmp_path / name)
    (tmp_path / "a/best").mkdir()
    for name in ("a@b", "a@best", "x=1", ".h", "c.part"):
        assert find_run(name, tmp_path)[0] == tmp_path / name
        assert find_run(f"{name}@", tmp_path)[0] == tmp_path / name
        assert find_run(tmp_path / name)[0] == tmp_path / name
    (tmp_path / "a@best").rename(tmp_path / "gone")
    assert find_run("a@best", tmp_path) == (tmp_path / "a", tmp_path / "a/best")
    with pytest.raises(FileNotFoundError, match="a: no run there"):
        find_run("x/a@b", tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="no state '²'"):
        find_run("a@²", tmp_path)


def write_set(folder, n=24):
    "A YOLO data set of noise with one box per image, classes x and y in turn."
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        (folder / "images" / split).mkdir(parents=True)
        (folder / "labels" / split).mkdir(parents=True)
        for i in range(n):
            pixels = rng.integers(0, 255, (64, 64, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"images/{split}/{i}.png")
            (folder / f"labels/{split}/{i}.txt").write_text(f"{i % 2} .5 .5 .4 .4\n")
    (folder / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [x, y]\n")
    return folder / "data.yaml"


def test_odd_names_through_the_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data, run = str(write_set(Path("in/set #2"))), "a b/try #4: 'x'"
    heads = Path("h #1.yaml")
    save_heads(heads, Partition.single(["x", "y"]))
    lines = [
        ["data", f"data={data}"],
        ["data", "--data", data],
        ["train", f"data={data}", f"heads={heads}", f"run={run}", *SMALL.split()],
        ["train", "--resume", run, "epochs=2", "device=cpu"],
        ["eval", run],
        ["eval", f"{run}@best"],
        ["plot", run],
        ["detect", run, "in/set #2/images/val/0.png"],
        ["confuse", run],
        ["split", run, "--heads", str(heads), "--out", "split #1"],
        ["train", f"data={data}", f"weights={run}@best", "run=next #1", *SMALL.split()],
    ]
    for words in lines:
        code, _, err = mhdet(*words)
        assert code == 0, (words, err)
    runs = {row["run"] for row in json.loads(mhdet("runs", "--json")[1])}
    assert runs == {run, "split #1", "next #1"}
    assert load_run(run)[1].data.data == data
    assert load_run("next #1")[1].network.weights == f"{run}@best"
    code, _, err = mhdet("train", f"data={data}", f"run={run}", *SMALL.split())
    assert code == 2 and shlex.split(err.split("--resume ")[1]) == [run]


@pytest.mark.slow
def test_a_study_with_an_odd_name_goes_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = str(write_set(Path("set #2"), 40))
    words = [*SMALL.split(), "extra_epochs=1", "max_hours=1e-9"]
    code, _, err = mhdet("study", "sub/my study #1", f"data={data}", *words)
    assert code != 0 and shlex.split(err.split("--resume ")[1])[0] == "sub/my study #1", err
    again = ["max_hours=null", "--arms", "control"]
    code, _, err = mhdet("study", "sub/my study #1", f"data={data}", *words)
    assert code == 2 and "exists already; --resume 'sub/my study #1'?" in err
    code, out, err = mhdet("study", "--resume", *again)
    assert code == 0 and "sub/my study #1/report.md" in out, err
    assert find_run("sub/my study #1/base-s0")[1].is_dir()


def test_rows_of_a_sweep(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("sweep-a.yaml").write_text(
        "base: {data: 'in/set #2', epochs: 2, weights: 'b #1@best'}\n"
        "rows: {'v1.5 #4': {freeze: '7'}, v1.4: {freeze: p3}, b/c: {freeze: 7}}\n"
    )
    rows = sweep_rows("sweep-a.yaml")
    assert [row["name"] for row in rows] == ["v1.5-4_s0", "v1.4_s0", "b-c_s0"]
    for row in rows:
        command, *words = sweep_command(row)
        assert command == "train"
        assert load_config(*words) == load_config(row["choices"], {"run": f"a/{row['name']}"})
    code, out, _ = mhdet("sweep", "sweep-a.yaml", "--list", "--json")
    for row, listed in zip(rows, json.loads(out), strict=True):
        assert shlex.split(listed["command"]) == ["mhdet", *sweep_command(row)]
    elsewhere = sweep_command(sweep_rows("sweep-a.yaml", tmp_path / "other #1")[0])
    assert elsewhere[:4] == ["train", "--root", str(tmp_path / "other #1"), "run=a/v1.5-4_s0"]
    for text, words in {
        "rows: {.a: {}}": "'.' at the start",
        f"rows: {{{'x' * 300}: {{}}}}": "longer than 200 bytes",
        f"grid: {{heads: [{'x' * 200}.yaml]}}": "longer than 200 bytes",
    }.items():
        Path("b.yaml").write_text(text)
        with pytest.raises(ValueError, match="^b.yaml: run: ") as e:
            sweep_rows("b.yaml")
        assert words in str(e.value)
    for name in ("sweep-a@b.yaml", "sweep-.yaml", ".a.yaml", "sweep-a=b.yaml", "sweep- .yaml"):
        Path(name).write_text("rows: {a: {}}")
        with pytest.raises(ValueError, match="cannot be the name"):
            sweep_rows(name)
    assert not Path("runs").exists()


@pytest.mark.slow
def test_a_sweep_elsewhere_trains_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    keys = ", ".join(word.replace("=", ": ") for word in SMALL.split())
    Path("sweep-a.yaml").write_text(f"base: {{data: 'toy:16', {keys}}}")
    table = sweep("sweep-a.yaml", "other #1", say=str)
    assert table["state"].tolist() == ["finished"]
    assert find_run("a/s0", "other #1")[1].is_dir() and not Path("runs").exists()
