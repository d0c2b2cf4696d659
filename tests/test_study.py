"""A study from a trained single head: its arms, their keys, its sweeps, and what it refuses.

Everything is trained for an epoch on forty drawn images: what is tested is who gets which keys.
"""

import json
import shlex
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from mhdet.cli.commands import app
from mhdet.core.config import load_config
from mhdet.core.runs import JsonLog
from mhdet.data.splits import open_data
from mhdet.experiment.models import load_run
from mhdet.experiment.study import study
from mhdet.model.weight_files import Checkpoint, to_foreign, write_tensors
from mhdet.partition.heads import Partition, save_heads

DATA = Path(__file__).parents[1] / "data"
TINY = "data=toy:40 imgsz=64 batch=8 width=0.125 workers=0 device=cpu precision=fp32"
NAMES = open_data("toy:40")["train"].names


def mhdet(line):
    "Exit code, stdout, stderr."
    found = CliRunner().invoke(app, shlex.split(line))
    return found.exit_code, found.stdout, found.stderr


def result(line):
    code, out, err = mhdet(f"{line} --json")
    assert code == 0, err
    return json.loads(out)


def config(run):
    return load_config(Path("runs", run, "config.yaml")).flat()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder with a run of one head, one of two heads, head files, and a weight file."
    folder = tmp_path_factory.mktemp("studies")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        halves = Partition.from_groups([range(6), range(6, 12)], NAMES, "half", "halves")
        save_heads("halves.yaml", halves)
        thirds = Partition.from_groups([range(i, 12, 3) for i in range(3)], NAMES, "t", "thirds")
        save_heads("thirds.yaml", thirds)
        save_heads("others.yaml", Partition.single(["cat", "dog"]))
        Path("more").mkdir()
        Path("more/halves.yaml").write_bytes(Path("halves.yaml").read_bytes())
        for line in ("run=first", "run=second seed=1", "run=two heads=halves.yaml"):
            assert mhdet(f"train {TINY} epochs=1 {line}")[0] == 0
        tensors = to_foreign(load_run("first")[0])
        write_tensors("single.safetensors", Checkpoint(tensors, NAMES))
    return folder


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    return place


@pytest.mark.slow
def test_head_files_are_arms_and_the_base_is_not_trained(here):
    line = "study files --base first --arms split,halves.yaml,thirds.yaml extra_epochs=1"
    study = result(f"{line} arm.freeze=stem others=background")
    assert [arm["name"] for arm in study["arms"]] == ["control", "split", "halves", "thirds"]
    assert [len(arm["per_head"]) for arm in study["arms"]] == [0, 4, 2, 3]
    old, new = (load_run(run)[0].state_dict() for run in ("first", "files/base-s0"))
    assert all((old[key] == new[key]).all() for key in old)
    first = config("first")
    for arm in ("control", "split", "halves", "thirds"):
        own = config(f"files/{arm}-s0")
        changed = {key for key in own if own[key] != first[key]} - {"device", "extra_epochs"}
        expected = {"run", "weights", "freeze", "others", "lr", "heads"}
        assert changed == expected - ({"heads"} if arm == "control" else set())
        assert (own["freeze"], own["others"], own["lr"]) == ("stem", "background", 0.005)
    report = Path("runs/files/report.md").read_text()
    for words in ("Single head: first, 1 epochs.", "`epochs=1 lr=0.005 freeze=stem`", "## Heads"):
        assert words in report
    assert {p.stem for p in Path("runs/files/fig").iterdir()} == {
        *("curves", "heads", "confusion", "differences", "errors")
    }


def test_a_row_of_a_log_has_its_heads_only_where_there_are_several(here):
    heads = {"AP50/h0", "AP50/h1"}
    (one,), (two,) = (JsonLog(Path("runs", run, "log.jsonl")).rows() for run in ("first", "two"))
    assert not any("AP50/" in key for key in one)
    assert {key for key in two if "AP50/" in key} == heads
    runs = {run["run"]: run for run in result("runs --per-head")}
    assert {key: runs["two"][key] for key in heads} == {key: two[key] for key in heads}
    assert runs["first"]["AP50/h0"] is None
    assert "AP50/h0" not in result("runs")[0]


@pytest.mark.slow
def test_a_weight_file_is_a_base(here):
    line = f"study file --base single.safetensors {TINY} extra_epochs=1 --arms control"
    study = result(line)
    assert study["base"] == ["single.safetensors"] and study["bases"] == 1
    assert config("file/base-s0")["weights"] == "single.safetensors"
    given = result("study run --base first extra_epochs=1 --arms control")
    assert study["baseline"]["AP50"] == pytest.approx(given["baseline"]["AP50"], abs=1e-6)


@pytest.mark.slow
def test_a_base_for_each_seed_or_one_for_all(here):
    line = "study {} --base first {} --arms control extra_epochs=1"
    each = result(line.format("each", "--base second"))
    assert (each["bases"], each["arms"][0]["n"]) == (2, 2)
    weights = [Path(config(f"each/control-s{seed}")["weights"]).name for seed in (0, 1)]
    assert weights == ["base-s0", "base-s1"]
    assert "pseudo-replication" not in Path("runs/each/report.md").read_text()
    shared = result(line.format("shared", "--seeds 2"))
    assert (shared["bases"], shared["arms"][0]["n"]) == (1, 2)
    assert "**One base, 2 seeds.**" in Path("runs/shared/report.md").read_text()
    first = JsonLog("runs/each/control-s0/log.jsonl").rows()[0]["train/loss"]
    assert JsonLog("runs/shared/control-s0/log.jsonl").rows()[0]["train/loss"] == first


def test_every_base_has_its_own_partition_and_studies_add_up(here):
    text = "rows: {taught: {heads: null, distill: start}, random: {head_aware: aware.yaml}}"
    Path("taught.yaml").write_text(text)
    Path("aware.yaml").write_text("\n".join(f"head_{h}: {{degrees: {h}}}" for h in range(4)))
    bases = "--base first --base second --arms again --arms-file taught.yaml"
    study = result(f"study own {bases} --metric voc --on dev extra_epochs=1")
    arms = {arm["name"]: arm for arm in study["arms"]}
    assert arms.keys() == {"control", "random", "again", "taught"}
    files = [Path("runs/own", f"heads-random{more}.yaml").read_text() for more in ("", "-s1")]
    assert files[0] != files[1]
    for seed, file in enumerate(files):
        assert Path(config(f"own/random-s{seed}")["heads"]).read_text() == file
    assert [row["seed"] for row in arms["random"]["per_head"]] == [0] * 4 + [1] * 4
    assert [config(f"own/again-s{seed}")["seed"] for seed in (0, 1)] == [1000, 1001]
    log = JsonLog("runs/own/taught-s0/log.jsonl").rows()[-1]
    assert log["train/distil"] > 0 and config("own/taught-s0")["distill"] == "start"
    assert "VOC AP50" in study["sentence"] and study["on"] == "dev"
    pooled = {row["name"]: row for row in result("study --pool own")}
    assert pooled["random"]["delta"] == pytest.approx(arms["random"]["delta"], abs=1e-5)
    assert (pooled["random"]["n"], pooled["control"]["delta"]) == (2, None)
    for words, message in (
        ("own,runs/own/runs.csv", "--pool own,runs/own/runs.csv: arm control, seed 0: twice"),
        ("runs/own/table.csv", "table.csv: expected the runs.csv of a study"),
        ("none", "runs.csv: no such file"),
    ):
        code, out, err = mhdet(f"study --pool {words}")
        assert (code, out, err.count("\n")) == (2, "", 1) and message in err


def test_frozen_parts_of_the_single_head_are_not_the_arms(here):
    line = (
        f"study bare {TINY} epochs=1 extra_epochs=1 freeze=p3 'stages=[{{epochs: 1, freeze: p3}}]'"
    )
    code, _, err = mhdet(f"{line} --arms control")
    assert code == 0, err
    assert "freeze=p3: freezes parts of the single head, which begins with random weights" in err
    base, control = config("bare/base-s0"), config("bare/control-s0")
    assert (base["freeze"], len(base["stages"])) == ("p3", 1)
    assert (control["freeze"], len(control["stages"])) == (None, 0)


def test_short_forms_and_arm_keys_are_one_thing(here):
    for name, words in (
        ("short", "extra_epochs=1 extra_lr=.01"),
        ("long", "arm.epochs=1 arm.lr=.01"),
    ):
        study = result(f"study {name} --base first --arms control {words}")
        assert study["keys"] == {"epochs": 1, "lr": 0.01}
    ends = [JsonLog(f"runs/{name}/control-s0/log.jsonl").rows()[-1] for name in ("short", "long")]
    assert ends[0]["train/loss"] == ends[1]["train/loss"]
    assert "`epochs=1 lr=0.01`" in Path("runs/long/report.md").read_text()


SWEEPS = [
    ("strategy-a", "background"),
    pytest.param("freeze", "free", marks=pytest.mark.slow),
    pytest.param("ladder", "ladder", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("sweep, against", SWEEPS)
def test_the_sweeps_of_the_source(here, sweep, against):
    file = DATA / f"sweep-{sweep}.yaml"
    epochs = "" if sweep == "ladder" else "extra_epochs=1"
    line = f"study {sweep} --base first --arms-file {file} --against {against} {epochs}"
    study = result(line)
    rows = yaml.safe_load(file.read_text())["rows"]
    arms = {arm["name"]: arm for arm in study["arms"]}
    assert arms.keys() == {"control", *rows} and study["against"] == against
    assert f"against {against}: AP50" in study["sentence"]
    configs = {arm: config(f"{sweep}/{arm}-s0") for arm in arms}
    assert len({own["epochs"] for own in configs.values()}) == 1  # matched budget
    if sweep == "strategy-a":
        a, b = (configs[arm] for arm in rows)
        assert {key for key in a if a[key] != b[key]} == {"run", "heads", "others"}
        files = [Path(own["heads"]).read_text() for own in (a, b)]
        assert files[0] == files[1]  # one argument apart
        assert {own["freeze"] for own in configs.values()} == {50}
    if sweep == "freeze":  # the same layers under two names
        values = [JsonLog(f"runs/freeze/freeze-{n}-s0/log.jsonl").rows() for n in (29, "backbone")]
        for key in ("train/loss", "AP50", "dev/box"):
            assert values[0][-1][key] == values[1][-1][key]
    if sweep == "ladder":
        rates = [row["lr"] for row in JsonLog("runs/ladder/ladder-s0/log.jsonl").rows()]
        assert len(rates) == 8 and rates[0] > rates[2] > rates[-1]


@pytest.mark.slow
def test_a_run_that_fails_in_a_process_of_its_own_names_its_output(here):
    cfg = load_config(*TINY.split(), "epochs=1", "lr=1e30", "restarts=0", "run=bad")
    with pytest.raises(RuntimeError, match="base-s0 not finished; what happened is in base-s0.out"):
        study(cfg, engine=dict(engine="local"), say=lambda line: None)
    assert "not finite" in Path("runs/bad/base-s0.out").read_text()


@pytest.mark.slow
def test_two_runs_at_a_time_give_the_figures_of_one_after_the_other(here, monkeypatch):
    cfg, figures = load_config(*TINY.split(), "epochs=1", "extra_epochs=1"), []
    for jobs in (1, 2):
        monkeypatch.setattr("mhdet.experiment.study._side_by_side", lambda *args, n=jobs: n)
        made = study(cfg.override(run=f"jobs{jobs}"), seeds=2, quiet=True, say=lambda line: None)
        figures.append(
            [{k: row[k] for k in ("name", "AP50", "delta", "p")} for row in made["arms"]]
        )
    assert Path("runs/jobs2/base-s1.out").is_file() and not Path("runs/jobs1/base-s1.out").exists()
    assert figures[0] == figures[1]


def test_runs_elsewhere_that_are_interrupted_go_on_with_resume(here, monkeypatch):
    def interrupted(rows, **engine):
        raise InterruptedError("SIGINT; what was trained is saved, the same command goes on")
        yield

    monkeypatch.setattr("mhdet.experiment.study.train_rows", interrupted)
    cfg = load_config(*TINY.split(), "epochs=1", "run=cut")
    with pytest.raises(InterruptedError, match="^SIGINT; go on with --resume cut$"):
        study(cfg, engine=dict(engine="local"), say=lambda line: None)


REFUSED = {
    "study new --base absent": "absent: no run there",
    "study new --base two": "--base two: has 2 heads; expected one",
    "study new --base first data=other": "its classes are not those of other: new: cat, dog",
    "study new --base single.safetensors": "expected --data D, the data set whose classes it",
    "study new --base first --base second --seeds 3": "--base: 2 given, expected 1 or 3, one per",
    "study new --base first --base two": "--base two: has ",
    "study new --base first epochs=3": "epochs: changes nothing with --base; expected arm.epochs",
    "study new --base first width=.25": "of another width",
    "study new --base first --arms others.yaml": "others.yaml: made for other classes",
    "study new --base first --arms none": "or a head file; got 'none'",
    "study new --base first --arms split-13": "--arms: arm split-13: 13 heads, but 12 classes",
    "study new --base first --on test": "--on: must be val or dev; got 'test'",
    "study new --base first --metric f1": "--metric: must be one of AP50, AP, voc; got 'f1'",
    "study new --base first distill=absent": "distill=absent: absent: no run there",
    "study new --base first --arms halves.yaml,more/halves.yaml": "would both be arm 'halves'",
    "study new --base first arm.freez=50": "arm.freez=50: unknown key 'freez'; did you mean",
    "study new --base first arm.imgsz=96": "arm.imgsz: must be the same",
    "study new --base first arm.freeze=p9": "freeze=p9: known parts are stem",
    "study new --base first --against none": "--against: must be one of control, split; got 'none'",
    "study new --base first --arms-file bad.yaml": "bad.yaml: arm a: unknown key 'freez'",
    "study new --base first --arms-file none.yaml": "none.yaml: no such file",
}


@pytest.mark.parametrize("line", REFUSED)
def test_refused_in_one_line_before_anything_is_made(here, line):
    other = Path("other")
    if not other.is_dir():
        for split in ("train", "val"):
            (other / "images" / split).mkdir(parents=True)
            (other / "labels" / split).mkdir(parents=True)
            for i in range(12):
                image = Path("runs").parent / f"other/images/{split}/{i}.png"
                draw(image, i)
                label = f"{i % 2} .5 .5 .4 .4\n"
                Path(f"other/labels/{split}/{i}.txt").write_text(label)
        (other / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [cat, dog]")
    Path("bad.yaml").write_text("rows: {a: {freez: 50}}")
    code, out, err = mhdet(line)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert REFUSED[line] in err
    assert not Path("runs/new").exists()


def draw(path, i):
    from PIL import Image

    Image.new("RGB", (64, 64), (20 * i, 90, 200 - 10 * i)).save(path)
