"""Experiment logs: what lint finds in the reported one, planted faults, our own log, appending."""

import copy
import csv
import json
import os
import random
from pathlib import Path

import pytest
import yaml

import mhdet.cli.commands  # noqa: F401 - registers the commands
from mhdet.cli.grammar import run_line
from mhdet.threescale.experiment_log import RULES, lint, parse_log, read_log
from mhdet.threescale.log_views import append_entry, diff

ROOT = Path(__file__).resolve().parents[1]
REPORTED = read_log(ROOT / "data/explog-resnet18-voc.yaml")
OWN = read_log(ROOT / "data/explog-mhdet.yaml")


def found(log, rule):
    "Numbers of the entries in which a rule finds something, with the finding."
    out = [f for f in lint(log) if f["rule"] == rule]
    return [(log.number(log.get(f["entry"])), f) for f in out]


# The reported log


def test_differences_that_do_not_add_up():
    rows = [(k, f["field"], f["found"], round(f["expected"], 3)) for k, f in found(REPORTED, "a")]
    wrong = {2: (0.11, 0.09), 10: (5.783, 5.773), 11: (6.01, 6.0), 12: (6.43, 6.42)}
    wrong |= {13: (7.91, 7.9), 14: (6.61, 6.6)}
    assert rows == [(k, "deltas: baseline: vocmap", *pair) for k, pair in wrong.items()]


def test_flow_rows():
    rows = [(k, f["found"], f["expected"]) for k, f in found(REPORTED, "b")]
    assert rows == [(13, epoch + 1, epoch - 1) for epoch in (39, 77, 110, 148, 186)]


def test_claim_against_the_parameters():
    assert [(k, f["found"], f["expected"]) for k, f in found(REPORTED, "c")] == [(5, 10, 20)]


def test_comparisons_that_changed_more():
    batch = {"batch_size_train", "accum_batch_num"}
    more = {k: set(f["found"]) for k, f in found(REPORTED, "d")}
    expected = dict.fromkeys((5, 7, 9, 11, 14), batch)
    assert more == expected | {12: {"lambda_obj"}, 13: batch | {"random_ratio"}}


def test_names_of_no_entry():
    names = {k: f["found"].removeprefix("resnet18-voc-") for k, f in found(REPORTED, "e")}
    obj = {4: "cosine-obj-sgd", 6: "cosine-obj-sgd", 10: "cosine-obj"}
    assert names == obj | {7: "renaissance", 8: "renaissance", 13: "random-0.8-sgd"}


def test_size_in_words():
    [(number, finding)] = found(REPORTED, "f")
    assert (number, finding["found"], round(finding["expected"], 2)) == (12, "below 0.5", 0.69)


def test_it_is_reported_and_whole():
    assert {entry.provenance for entry in REPORTED.experiments} == {"reported"}
    assert len(REPORTED.experiments) == 15
    assert all(len(e.parameters) >= 29 and e.aim and e.conclusion for e in REPORTED.experiments)


# Planted faults


def clean_log(draw):
    "A log of six made-up experiments, each one change from the one before, with nothing wrong."
    names = [f"p{k}" for k in range(6)]
    parameters = {name: draw.choice([0.1, 1, 5, 20]) for name in names} | {"size": 32, "accum": 2}
    entries = []
    for k in range(6):
        value = round(draw.uniform(5, 60), 2)
        entry = {"name": f"run-{k}", "parameters": copy.deepcopy(parameters)}
        entry["results"] = {"ap50": {"value": value, "epoch": draw.randrange(9, 99)}}
        epochs = sorted(draw.sample(range(1, 99), 3))
        entry["flow"] = [[0, -1, 28, "normal start"]] + [[e, e - 1, e, "nan"] for e in epochs]
        if k:
            what = draw.choice([*names, "batch"])
            for name in ("size", "accum") if what == "batch" else (what,):
                parameters[name] = parameters[name] * draw.choice([0.5, 2])
            entry["parameters"] = copy.deepcopy(parameters)
            over, first = entries[-1], entries[0]
            gain = round(value - over["results"]["ap50"]["value"], 2)
            from_first = round(value - first["results"]["ap50"]["value"], 2)
            entry["baselines"] = [{"entry": over["name"], "changed": [what]}]
            entry["mentions"] = [over["name"], "baseline"]
            entry["deltas"] = {over["name"]: {"ap50": gain}}
            entry["deltas"]["baseline"] = {"ap50": from_first}
            claim = names[0] if what == "batch" else what
            entry["claims"] = [{"parameter": claim, "value": parameters[claim]}]
            entry["claims"] += [{"gain_below": round(gain + 0.5, 2), "over": over["name"]}]
            if k > 1:
                entry["deltas"][over["name"]]["ap50"] = gain
        entries.append(entry)
    groups, aliases = {"batch": ["size", "accum"]}, {"baseline": "run-0"}
    return {"unit": "percent", "aliases": aliases, "groups": groups, "experiments": entries}


def plant(draw, tree, rule):
    "Put one fault of a rule into an entry; its name."
    entry = tree["experiments"][draw.randrange(1, 6)]
    if rule == "a":
        over = draw.choice(list(entry["deltas"]))
        entry["deltas"][over]["ap50"] += draw.choice([-1, 1]) * draw.choice([0.01, 0.02, 0.5])
    elif rule == "b":
        draw.choice(entry["flow"])[1] += draw.choice([1, 2, -1])
    elif rule == "c":
        entry["claims"][0]["value"] += draw.choice([1, -3])
    elif rule == "d":
        entry = tree["experiments"][-1]  # nothing is compared with the last one
        changed = [entry["claims"][0]["parameter"], *entry["baselines"][0]["changed"]]
        free = [name for name in entry["parameters"] if name not in changed]
        free = [name for name in free if changed[-1] != "batch" or name not in ("size", "accum")]
        entry["parameters"][draw.choice(free)] = 777
    elif rule == "e":
        place = draw.randrange(2)
        entry["mentions"][place] = entry["mentions"][place] + draw.choice(["x", "-sgd"])
    else:
        entry["claims"][1]["gain_below"] -= draw.choice([0.6, 3])
    return entry["name"]


@pytest.mark.parametrize("seed", range(50))
def test_the_planted_fault_and_no_other(seed):
    draw = random.Random(seed)
    tree = clean_log(draw)
    assert lint(parse_log(tree)) == []
    rule = draw.choice(list(RULES))
    name = plant(draw, tree, rule)
    assert [(f["rule"], f["entry"]) for f in lint(parse_log(tree))] == [(rule, name)]


# Bad input


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda e: e.update(detlas={}), "unknown key 'detlas'; did you mean 'deltas'?"),
        (lambda e: e.update(name="run-1"), "the name is given twice"),
        (lambda e: e.pop("parameters"), "no parameters"),
        (lambda e: e["flow"].reverse(), "rows must be in the order of their epochs"),
        (lambda e: e["baselines"][0].update(entry="run-9"), "no entry or alias 'run-9'"),
        (lambda e: e["deltas"]["baseline"].update(ap50="much"), "Expected"),
        (lambda e: e["claims"].append({"gain_below": 1}), "expected parameter and value, or over"),
    ],
)
def test_reading_errors_in_one_line(tmp_path, change, words):
    tree = clean_log(random.Random(0))
    entry = tree["experiments"][2]
    change(entry)
    file = tmp_path / "log.yaml"
    file.write_text(yaml.safe_dump(tree))
    code, out, err = run_line("log lint log.yaml", tmp_path)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"mhdet: log.yaml: entry '{entry['name']}': ") and words in err


def test_a_difference_that_does_not_add_up_is_one_line(tmp_path):
    tree = clean_log(random.Random(1))
    tree["experiments"][3]["deltas"]["baseline"]["ap50"] += 0.4
    (tmp_path / "log.yaml").write_text(yaml.safe_dump(tree))
    code, out, err = run_line("log lint log.yaml", tmp_path)
    assert (code, err) == (1, "")
    [line] = [line for line in out.splitlines() if "entry 'run-3'" in line]
    assert line.startswith("log.yaml: entry 'run-3' (#4): (a) deltas: baseline: ap50: expected")


# Our own log


def test_our_own_log_is_clean():
    assert lint(OWN) == []
    assert {entry.provenance for entry in OWN.experiments} == {"own"}
    assert run_line("log lint data/explog-mhdet.yaml", ROOT)[0] == 0


def rows_of(source):
    "Rows of data/results that a source names: FILE: NAME, then the commit or the precision."
    file, _, words = source.partition(": ")
    name, _, more = words.rpartition(", ")
    with (ROOT / file).open(newline="") as f:
        rows = list(csv.DictReader(f))
    exact = [row for row in rows if row["name"] == words]
    return exact or [
        r for r in rows if r["name"] == name and more in (r["commit"], r.get("precision"))
    ]


@pytest.mark.parametrize("entry", OWN.experiments, ids=OWN.names())
def test_own_figures_are_those_of_the_rows(entry):
    rows = rows_of(entry.source)
    assert rows and {row["date"] for row in rows} == {entry.date}
    assert {row["commit"] for row in rows} == set(entry.commit.split(", "))
    assert rows[0]["device"] in entry.platform
    for measure, figure in entry.results.items():
        mean = sum(float(row[measure]) for row in rows) / len(rows)
        assert abs(figure.value - mean) < 1e-6
        assert figure.n == max(len(rows), *(int(row["n"]) for row in rows))
    for measures in entry.deltas.values():
        if len(rows) == 1 and rows[0].get("delta"):
            for key in ("delta", "low", "high"):
                stated = getattr(measures["AP50"], key.replace("delta", "value"))
                assert abs(stated - float(rows[0][key])) < 1e-6


# Appending


def test_appending_keeps_every_byte_and_a_failure_changes_nothing(tmp_path, monkeypatch):
    file = tmp_path / "log.yaml"
    before = (ROOT / "data/explog-mhdet.yaml").read_bytes()
    file.write_bytes(before)
    entry = copy.deepcopy(OWN.experiments[-1])
    with pytest.raises(ValueError, match="there already"):
        append_entry(file, entry)
    entry.name = "again"

    def fails(*_):
        raise OSError(28, "full")

    with monkeypatch.context() as m:
        m.setattr(os, "replace", fails)
        with pytest.raises(OSError, match="unchanged"):
            append_entry(file, entry)
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]
    log = append_entry(file, entry)
    assert file.read_bytes().startswith(before)
    assert (log.experiments[-1], log.experiments[:-1]) == (entry, OWN.experiments)


# Two spellings of one cosine


def test_one_cosine_has_two_spellings():
    one, four = REPORTED.find(1), REPORTED.find(4)
    assert "lr_T_half" in one.parameters and "lr_T_half_1" in four.parameters
    assert list(diff(REPORTED, 1, 4)["changed"]) == ["lr"]
    assert diff(REPORTED, 1, 4)["clean"] and not diff(REPORTED, 10, 11)["clean"]


def test_json_of_the_commands():
    file = "data/explog-resnet18-voc.yaml"
    code, out, _ = run_line(f"log lint {file} --json", ROOT)
    assert code == 1 and len(json.loads(out)) == len(lint(REPORTED))
    code, out, _ = run_line("log diff 12 13 --json", ROOT)
    assert code == 0 and set(json.loads(out)["changed"]) == {
        "batch",
        "random_ratio",
        "augmentation",
    }
    assert len(json.loads(run_line("log table --json", ROOT)[1])) == 15
