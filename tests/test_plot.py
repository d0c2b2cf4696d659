"""`mhdet plot`: logs of four programs in one figure and one summary; what is damaged is refused."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import mhdet.cli.commands  # noqa: F401  registers all commands
from mhdet.cli.grammar import run_line
from mhdet.core.config import load_config
from mhdet.core.runs import JsonLog, new_run, note_run
from mhdet.experiment.curves import read_curves, read_results_csv, read_results_txt
from mhdet.experiment.plateau import plateau
from mhdet.partition.heads import Partition, save_heads

HEADER = (
    "epoch,time,train/box_loss,train/cls_loss,train/dfl_loss,metrics/precision(B),"
    "metrics/recall(B),metrics/mAP50(B),metrics/mAP50-95(B),val/box_loss,val/cls_loss,val/dfl_loss"
)


def curve(epochs, best, gain, seed):
    "AP50 that saturates and then gains so many points per 100 epochs."
    epoch = np.arange(1, epochs + 1)
    noise = np.random.default_rng(seed).normal(0, 0.002, epochs)
    return np.clip(best * (1 - np.exp(-epoch / 15)) + gain / 1e4 * epoch + noise, 0, 1)


def our_run(name, AP50, **choices):
    "A run's folder, with a log."
    single = Partition.single(["a", "b"])
    cfg = load_config({"run": name, "epochs": len(AP50)} | choices)
    run = new_run(cfg, "runs", lambda folder: save_heads(folder / "heads.yaml", single))
    note_run(run, host="atlas", device="cpu")
    log = JsonLog(run / "log.jsonl")
    rows = []
    for epoch, ap in enumerate(AP50, 1):
        row = {
            f"{side}/{k}": 0.1 - ap / 8 for side in ("train", "dev") for k in ("box", "obj", "cls")
        }
        rows.append(
            {"epoch": epoch, **row, "AP50": ap, "AP": ap / 2, "P": ap, "R": ap, "seconds": 36}
        )
    log.path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def their_txt(AP50):
    "A results.txt of YOLOv7 whose losses on val were not measured."
    lines = []
    for k, ap in enumerate(AP50):
        shares = " ".join(f"{x:.4g}" for x in (ap, ap, ap, ap / 2))
        lines.append(f"{k}/{len(AP50) - 1} 7.1G .05 .02 .01 .08 12 320 {shares} 0 0 0")
    return "\n".join(lines) + "\n"


def their_csv(AP50):
    "A results.csv of Ultralytics."
    lines = [HEADER]
    for k, ap in enumerate(AP50, 1):
        lines.append(f"{k},{60 * k},1.5,2,1.2,{ap:.5f},{ap:.5f},{ap:.5f},{ap / 2:.5f},1.6,2.1,1.3")
    return "\n".join(lines) + "\n"


@pytest.fixture
def here(tmp_path, monkeypatch):
    "A folder with two seeds and another run of ours, a results.txt and a results.csv."
    monkeypatch.chdir(tmp_path)
    stages = [{"epochs": 100, "freeze": "backbone"}, {"epochs": 100}]
    for seed in (0, 1):
        our_run(f"single-s{seed}", curve(200, 0.35, 2.5, seed), seed=seed, stages=stages)
    run = our_run("four", curve(150, 0.41, 0.3, 2))
    (run / "restarts.csv").write_text(
        "epoch,load_epoch,old_seed,new_seed,step,terms,reason\n61,60,0,1,9,box,nan\n"
    )
    for folder, name, text in (
        ("exp", "results.txt", their_txt(curve(200, 0.40, 0, 3))),
        ("nano", "results.csv", their_csv(curve(180, 0.37, -2, 4))),
    ):
        Path(folder).mkdir()
        Path(folder, name).write_text(text)
    return tmp_path


ALL = "single-s0 single-s1 four exp/results.txt nano"


def test_one_figure_and_one_summary(here):
    code, out, err = run_line(f"plot {ALL} --baseline single --per 50 --out fig --json")
    assert code == 0, err
    files = [Path(file) for file in json.loads(out)]
    assert all(file.parent == Path("fig") and file.stat().st_size for file in files)
    figures = {"dynamics", "ap50", "losses", "gains", "precision_recall"}
    assert {file.stem for file in files if file.suffix == ".png"} == figures
    for name in figures:
        pixels = np.asarray(Image.open(f"fig/{name}.png").convert("L"))
        assert 0.005 < (pixels < 250).mean() < 0.5
    summary = pd.read_csv("fig/summary.csv").set_index("run")
    assert list(summary.index) == ["single-s0", "single-s1", "four", "exp", "nano"]
    assert summary["experiment"].tolist() == ["single", "single", "four", "exp", "nano"]
    assert summary["epochs"].tolist() == [200, 200, 150, 200, 180]
    assert set(summary["at"]) == {150}  # the last epoch that all have
    assert summary["program"].tolist() == ["mhdet"] * 3 + ["YOLOv7", "Ultralytics"]
    assert summary.loc["four", ["host", "device"]].tolist() == ["atlas", "cpu"]
    assert summary["hours"].round(3).tolist()[:3] == [2, 2, 1.5]
    assert summary.loc["nano", "hours"] == pytest.approx(3)
    rows = JsonLog("runs/four/log.jsonl").rows()
    best = max(rows, key=lambda row: row["AP50"])
    assert summary.loc["four", "best_epoch"] == best["epoch"]
    assert summary.loc["four", "AP50_best"] == pytest.approx(best["AP50"])
    assert summary.loc["four", "AP50_final"] == pytest.approx(rows[-1]["AP50"])
    equal = pd.read_csv("fig/equal_epochs.csv").set_index(["experiment", "epoch"])
    assert sorted({epoch for _, epoch in equal.index}) == [50, 100, 150, 200]
    for epoch in (50, 150):
        seeds = [JsonLog(f"runs/single-s{k}/log.jsonl").rows()[epoch - 1]["AP50"] for k in (0, 1)]
        ratio = rows[epoch - 1]["AP50"] / np.mean(seeds)
        assert equal.loc[("four", epoch), "percent"] == pytest.approx(100 * (ratio - 1))
    assert np.isnan(equal.loc[("four", 200), "AP50"])
    gains = pd.read_csv("fig/gains.csv")
    mine = gains[gains["run"] == "four"]
    assert mine[["first", "last"]].values.tolist() == [[1, 50], [50, 100], [100, 150]]
    assert mine["gain"].sum() == pytest.approx(rows[149]["AP50"] - rows[0]["AP50"])
    full = pd.read_csv("fig/full_epochs.csv")
    assert full.groupby("run").size().to_dict() == summary["epochs"].to_dict()
    ends = pd.read_csv("fig/plateau.csv").set_index("run")["verdict"].to_dict()
    assert ends == {
        "single-s0": "growing",
        "single-s1": "growing",
        "four": "plateau",
        "exp": "plateau",
        "nano": "falling",
    }


@pytest.mark.slow
def test_the_table_is_printed_with_actions(here):
    Path("rules.yaml").write_text(
        "rules: [{above: .43, action: go on}, {below: .42, action: stop}, {action: wait}]"
    )
    out = run_line(f"plot {ALL} --rules rules.yaml --at 100")[1]
    assert "AP50 at 100" in out and "percent from single" in out
    lines = {line.split()[0]: line.split() for line in out.splitlines() if line.strip()}
    assert "nano" in lines
    actions = pd.read_csv("figures/plateau.csv").set_index("run")
    for action, best in actions[["action", "best"]].itertuples(index=False):
        assert action == ("go on" if best > 0.43 else "stop" if best <= 0.42 else "wait")


def test_window_and_gain_are_options(here):
    rows = JsonLog("runs/single-s0/log.jsonl").rows()  # it gains 2.5 points per 100 epochs
    assert plateau(rows)["window"] == 100
    assert plateau(rows, gain=2.5)["verdict"] == "undecided"
    assert run_line("plot single-s0 --out w --window 40 --gain 4.5")[0] == 0
    row = pd.read_csv("w/plateau.csv").iloc[0]
    assert (row["window"], row["verdict"]) == (40, "plateau")


def damage(file, old, new):
    text = Path(file).read_text()
    assert old in text
    Path(file).write_text(text.replace(old, new, 1))


REFUSED = {
    "plot absent": "absent: no run there (looked for runs/absent/config.yaml)",
    "plot four --per 0": "Invalid value for '--per'",
    "plot four --at 0": "Invalid value for '--at'",
    "plot four --window 5": "Invalid value for '--window'",
    "plot four --gain 0": "gain=0: expected points per 100 epochs, more than 0",
    "plot four exp --baseline singel": "not among the experiments; there is four, exp",
    "plot four --rules nowhere.yaml": "nowhere.yaml: no such file",
    "plot notes.md": "notes.md: expected a run, a results.txt or a results.csv",
    "plot other.csv": "other.csv: expected the columns 'epoch' and 'metrics/mAP_0.5' (YOLOv5)",
    "plot empty.txt": "empty.txt: no line of results",
    "plot bytes.txt": "bytes.txt: not text",
    "plot": "expected RUN_or_results.txt..., got none",
}


@pytest.mark.parametrize("line", REFUSED)
def test_refused_in_one_line(here, line):
    Path("notes.md").write_text("x")
    Path("other.csv").write_text("step,loss\n1,2\n")
    Path("empty.txt").write_text("\n")
    Path("bytes.txt").write_bytes(b"\xff\xfe\x00\x01\n")
    code, out, err = run_line(f"{line} --out not")
    assert (code, out) == (2, "")
    assert REFUSED[line] in err and err.count("\n") == 1 and "Traceback" not in err
    assert not Path("not").exists()


DAMAGED = [
    ("exp/results.txt", "7/199 7.1G", "7/199", "line 8: expected 15 columns (epoch/last, GPU"),
    ("exp/results.txt", "7/199", "7-199", "line 8, column 1 (epoch/last): expected as 0/299"),
    (
        "exp/results.txt",
        "8/199 7.1G .05",
        "8/199 7.1G ,05",
        "line 9, column 3 (train/box): expected",
    ),
    ("nano/results.csv", "\n9,540,", "\n9,", "line 10: expected 12 cells, as in line 1, got 11"),
    (
        "nano/results.csv",
        "\n9,540,1.5",
        "\n9,540,x",
        "line 10, column 3 (train/box): expected a num",
    ),
    ("nano/results.csv", "\n9,", "\n9.5,", "line 10 (epoch): expected a whole number"),
]


@pytest.mark.parametrize("file, old, new, words", DAMAGED)
def test_a_damaged_line_is_named(here, file, old, new, words):
    damage(file, old, new)
    code, _, err = run_line(f"plot four {file} --out not")
    assert code == 2 and f"mhdet: {file}: {words}" in err and err.count("\n") == 1
    assert not Path("not").exists()


def test_shares_are_shares(here):
    "Percent instead of fractions, or another column order, is seen."
    lines = Path("exp/results.txt").read_text().splitlines()
    cells = lines[9].split()
    cells[10] = "41.2"
    Path("exp/results.txt").write_text("\n".join([*lines[:9], " ".join(cells)]))
    with pytest.raises(ValueError, match=r"line 10, column 11 \(AP50\): expected 0..1, got 41.2"):
        read_results_txt("exp/results.txt")


def test_what_was_not_measured_is_not_zero(here):
    log = read_results_txt("exp/results.txt")
    assert not any(key.startswith("dev/") for row in log.rows for key in row)
    text = Path("nano/results.csv").read_text().splitlines()
    text[3] = "3,180,1.5,2,1.2" + ",0" * 7  # an epoch without evaluation
    Path("nano/results.csv").write_text("\n".join(text))
    rows = read_results_csv("nano/results.csv").rows
    assert "AP50" not in rows[2] and rows[2]["train/box"] == 1.5 and "AP50" in rows[3]


def test_a_resumed_training_counts_once(here):
    "Its file has epochs twice, and a time that begins again."
    lines = Path("exp/results.txt").read_text().splitlines()
    Path("exp/results.txt").write_text("\n".join(lines[:120] + lines[110:]))
    log = read_results_txt("exp/results.txt")
    assert [row["epoch"] for row in log.rows] == list(range(1, 201))
    assert log.events == {110: "resumed"}
    head, *rows = Path("nano/results.csv").read_text().splitlines()
    again = [
        ",".join([c[0], str(60 * k), *c[2:]])
        for k, c in enumerate((r.split(",") for r in rows[90:]), 1)
    ]
    Path("nano/results.csv").write_text("\n".join([head, *rows[:100], *again]))
    log = read_results_csv("nano/results.csv")
    assert [row["epoch"] for row in log.rows] == list(range(1, 181))
    assert {row["seconds"] for row in log.rows} == {60}
    assert log.events == {90: "resumed"}


@pytest.mark.parametrize("first", [0, 1])
def test_epochs_count_from_one(tmp_path, first):
    file = tmp_path / "results.csv"
    row = ",60,1.5,2,1.2,.5,.5,.4,.2,1.6,2.1,1.3"
    file.write_text("\n".join([HEADER, *(f"{k}{row}" for k in (first, first + 1))]))
    assert [row["epoch"] for row in read_results_csv(file).rows] == [1, 2]


def test_names_of_files_with_one_name(here):
    for folder in ("a/exp", "b/exp"):
        Path(folder).mkdir(parents=True)
        Path(folder, "results.txt").write_text(their_txt([0.1, 0.2]))
    names = [c.name for c in read_curves(["a/exp", "b/exp/results.txt", "exp", "exp"])]
    assert names == ["a/exp", "b/exp/results.txt", "exp"]
    assert run_line("plot a/exp b/exp/results.txt exp --out fig")[0] == 0
    assert Path("fig/a-exp.csv").is_file() and Path("fig/exp.csv").is_file()


def test_eight_curves_are_named():
    "Growing .02 to .03 per 100 epochs, flat, slow, falling, noisy: three lengths, other seeds."
    kinds = {2.0: "growing", 2.5: "growing", 3.0: "growing", 0: "plateau", 0.3: "plateau"}
    kinds |= {-2.0: "falling"}
    for gain, expected in kinds.items():
        for epochs in (200, 500, 1000):
            for seed in (100, 101, 102):
                rows = enumerate(curve(epochs, 0.3, gain, seed), 1)
                log = [{"epoch": epoch, "AP50": float(ap)} for epoch, ap in rows]
                assert plateau(log)["verdict"] == expected, (gain, epochs, seed)


def test_reported_rows_are_called_reported():
    "One row per figure of the source's documents, one seed each, none of them ours."
    table = pd.read_csv(Path(__file__).parents[1] / "data/results/reported-yolov7fast.csv")
    assert set(table["status"]) == {"reported"} and set(table["n"]) == {1}
    assert table["provenance"].str.startswith("jimmychintw/Yolov7fast").all()
    assert not table.duplicated(["name", "kind", "epoch"]).any()
    at = table.set_index(["name", "kind", "epoch"])["AP50"]
    assert at[("freeze29", "at", 42)] == 0.3959 and at[("1B4H hybrid", "at", 297)] == 0.4258
    assert at[("1B1H", "best", 481)] == 0.4353 and at[("1B4H hybrid", "best", 445)] == 0.4320
