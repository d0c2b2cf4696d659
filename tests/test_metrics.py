"""Metrics and differences on random problems, against other programs, loops and simulation."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from mhdet.evaluation.calibration import reliability
from mhdet.evaluation.confusion import confusion
from mhdet.evaluation.errors import error_profile
from mhdet.evaluation.metrics import (
    ENGINES,
    IOUS,
    _coco_side,
    ap_area,
    ap_coco,
    ap_source,
    ap_voc07,
    evaluate,
    match_dets,
    pr_curve,
)
from mhdet.evaluation.results import read_gt, read_results, write_results
from mhdet.evaluation.statistics import (
    compare_ap,
    holm,
    paired_diff,
    permutation_test,
    plot_diffs,
    weighted_ap,
)

NC = 3
NAMES = list("abc")


def random_problem(seed, n_images=12, per=3, extra=4, crowded=False):
    """Random objects, and detections of them: jittered, some twice, some of the wrong class.

    Scores tie, some images are empty. crowded: more than 100 detections of a class in one image.
    """
    rng = np.random.default_rng(seed)
    per_image = rng.poisson(per, n_images) * (rng.random(n_images) < 0.8)
    image = np.repeat(np.arange(n_images), per_image)
    m = len(image)
    xy, wh = rng.integers(0, 60, (m, 2)), rng.integers(4, 120, (m, 2))
    gt = dict(
        image=image,
        label=rng.integers(0, NC, m),
        box=np.c_[xy, xy + wh].astype(float),
        area=wh.prod(1) * rng.uniform(0.5, 1, m),
        ignore=rng.random(m) < 0.15,
        crowd=rng.random(m) < 0.1,
    )
    hit = np.repeat(np.arange(m), rng.integers(0, 3, m))
    jitter = rng.integers(-6, 7, (len(hit), 4)) * (rng.random((len(hit), 1)) < 0.8)
    box = gt["box"][hit] + jitter
    k = extra * n_images
    low = rng.integers(0, 100, (k, 2))
    box = np.r_[box, np.c_[low, low + rng.integers(1, 80, (k, 2))]]
    box[:, 2:] = np.maximum(box[:, 2:], box[:, :2] + 1)
    image = np.r_[gt["image"][hit], rng.integers(0, n_images, k)]
    label = np.r_[gt["label"][hit], rng.integers(0, NC, k)]
    renamed = rng.random(len(image)) < 0.2
    label = np.where(renamed, rng.integers(0, NC, len(image)), label)
    if crowded:
        image, label = image * 0, label * 0
    return gt, dict(image=image, label=label, box=box, score=rng.integers(0, 12, len(image)) / 11)


def iou(p, q, one=0):
    "IoU of two boxes; one=1: widths count both end pixels."
    w, h = (max(0, min(p[i + 2], q[i + 2]) - max(p[i], q[i]) + one) for i in (0, 1))
    area_p, area_q = ((b[2] - b[0] + one) * (b[3] - b[1] + one) for b in (p, q))
    return w * h / (area_p + area_q - w * h)


def by_score(dt, c):
    "Detections of a class by falling score."
    of_class = np.flatnonzero(dt["label"] == c)
    return sorted(of_class, key=lambda i: (-dt["score"][i], dt["image"][i], i))


def area_under_steps(r, p):
    "Area under the envelope, step by step."
    return sum((r[i] - (r[i - 1] if i else 0)) * p[i:].max() for i in range(len(r)))


def voc_loop(gt, dt, c, points=None, one=0):
    "VOC AP of one class at IoU .5, detection by detection."
    off, used, marks = gt["ignore"] | gt["crowd"], set(), []
    npos = ((gt["label"] == c) & ~off).sum()
    if not npos:
        return np.nan
    for i in by_score(dt, c):
        here = np.flatnonzero((gt["image"] == dt["image"][i]) & (gt["label"] == c))
        ious = [iou(gt["box"][j], dt["box"][i], one) for j in here]
        if not ious or max(ious) < 0.5:
            marks.append(0)
            continue
        best = here[np.argmax(ious)]
        if not off[best]:
            marks.append(int(best not in used))
            used.add(best)
    r, p = np.cumsum(marks) / npos, np.cumsum(marks) / np.arange(1, len(marks) + 1)
    if points is not None:
        return np.mean([max(p[r >= t], default=0) for t in points])
    return area_under_steps(r, p)


def source_loop(gt, dt, c, threshold):
    "The source's tester: best object of the class, IoU > .5, taken at all thresholds by the first."
    keep, used, marks = ~gt["crowd"], set(), []
    npos = ((gt["label"] == c) & keep).sum()
    if not npos:
        return np.nan
    for i in by_score(dt, c):
        here = np.flatnonzero((gt["image"] == dt["image"][i]) & (gt["label"] == c) & keep)
        ious = [iou(gt["box"][j], dt["box"][i]) for j in here]
        best, v = (here[np.argmax(ious)], max(ious)) if ious else (None, 0)
        free = v > 0.5 and best not in used
        if free:
            used.add(best)
        marks.append(int(free and v > threshold))
    if not marks:
        return 0.0
    r, p = np.cumsum(marks) / npos, np.cumsum(marks) / np.arange(1, len(marks) + 1)
    r, p = [0, *r, r[-1] + 0.01], [1, *p, 0]
    envelope = [max(p[i:]) for i in range(len(p))]
    y = [np.interp(t, r, envelope) for t in np.linspace(0, 1, 101)]
    return sum((left + right) / 2 / 100 for left, right in zip(y[:-1], y[1:], strict=True))


def mean(values):
    return float(np.nanmean(values)) if not np.isnan(values).all() else None


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_the_twelve_coco_figures(seed, crowded):
    gt, dt = random_problem(seed, extra=12 if crowded else 4, crowded=crowded)
    engines = ("own", "fast", "pycocotools")
    own, fast, slow = (evaluate(gt, dt, NAMES, 12, "coco", engine=e) for e in engines)
    sizes = ("small", "medium", "large")
    figures = {"AP", "AP50", "AP75", "AR1", "AR10", "AR100"}
    assert set(fast["coco"]) == figures | {f"{k}{size}" for k in ("AP", "AR") for size in sizes}
    for result in (own, fast):
        for k, v in slow["coco"].items():
            assert result["coco"][k] == pytest.approx(v, abs=1e-9), k
        for k, row in slow["per_class"].items():
            assert result["per_class"][k] == pytest.approx(row, abs=1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_a_third_engine(seed, monkeypatch, capfd):
    "hotcoco, written in Rust by others, gives the twelve figures too."
    hotcoco = pytest.importorskip("hotcoco", reason="hotcoco has no wheel for this machine")
    monkeypatch.setitem(ENGINES, "hotcoco", lambda: (hotcoco.COCO, hotcoco.COCOeval))
    gt, dt = random_problem(seed, extra=12, crowded=seed % 4 == 0)
    engines = ("own", "hotcoco")
    own, third = (evaluate(gt, dt, NAMES, 12, "coco", engine=e)["coco"] for e in engines)
    assert third == pytest.approx(own, abs=1e-9)
    run = hotcoco_run(hotcoco, gt, dt)
    error = reliability(match_dets(gt, dt, NC, rule="coco"))[0]["ece"]
    theirs = run.calibration(n_bins=10, iou_threshold=0.5)["ece"]
    assert theirs == pytest.approx(error, abs=1e-9)


def hotcoco_run(hotcoco, gt, dt):
    "hotcoco's evaluation of the same arrays."
    area = (dt["box"][:, 2:] - dt["box"][:, :2]).prod(1)
    truth = _coco_side(hotcoco.COCO, gt, gt["area"], gt["crowd"], gt["label"], NC, 12)
    result = _coco_side(hotcoco.COCO, dt, area, 0 * dt["label"], dt["score"], NC, 12)
    run = hotcoco.COCOeval(truth, result, "bbox")
    run.evaluate()
    return run


@pytest.mark.parametrize("seed", range(20))
def test_error_profile_is_hotcocos(seed):
    "On COCO's own grid of recalls; without crowds, which hotcoco counts among the errors."
    hotcoco = pytest.importorskip("hotcoco", reason="hotcoco has no wheel for this machine")
    gt, dt = random_problem(seed)
    gt = {k: v[~gt["crowd"]] for k, v in gt.items()}
    dt["score"] = np.random.default_rng(seed).permutation(len(dt["score"])) / len(dt["score"])
    theirs = hotcoco_run(hotcoco, gt, dt).tide_errors()
    ours = error_profile(gt, dt, NC)["errors"]
    for k, gain in theirs["delta_ap"].items():
        assert ours[k]["dAP"] == pytest.approx(gain, abs=1e-9), k
    for k, n in theirs["counts"].items():
        assert ours[k]["n"] == n, k


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_voc_and_source_against_loops(seed, inclusive):
    gt, dt = random_problem(seed)
    result = evaluate(gt, dt, NAMES, 12, ("voc07", "voc", "source"), inclusive)
    one = int(inclusive)
    area = [voc_loop(gt, dt, c, None, one) for c in range(NC)]
    assert result["voc"]["AP50"] == pytest.approx(mean(area), abs=1e-9)
    eleven = [voc_loop(gt, dt, c, np.arange(11) / 10, one) for c in range(NC)]
    assert result["voc07"]["AP50"] == pytest.approx(mean(eleven), abs=1e-9)
    table = np.array([[source_loop(gt, dt, c, t) for c in range(NC)] for t in IOUS])
    assert result["source"]["AP50"] == pytest.approx(mean(table[0]), abs=1e-9)
    assert result["source"]["AP"] == pytest.approx(mean(table), abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 0.9))
def test_confusion_against_greedy(seed, conf):
    gt, dt = random_problem(seed)
    keep = ~(gt["ignore"] | gt["crowd"])
    gt = {k: v[keep] for k, v in gt.items()}
    above = {k: v[dt["score"] >= conf] for k, v in dt.items()}
    pairs = []
    for d in range(len(above["label"])):
        for g in range(len(gt["label"])):
            overlap = iou(gt["box"][g], above["box"][d])
            if above["image"][d] == gt["image"][g] and overlap >= 0.5:
                pairs.append((-overlap, -above["score"][d], d, g))
    expected, used_d, used_g = np.zeros((NC + 1, NC + 1), int), set(), set()
    for _, _, d, g in sorted(pairs, key=lambda r: (r[0], r[1], r[3])):
        if d in used_d or g in used_g:
            continue
        expected[gt["label"][g], above["label"][d]] += 1
        used_d.add(d)
        used_g.add(g)
    for g in set(range(len(gt["label"]))) - used_g:
        expected[gt["label"][g], NC] += 1
    for d in set(range(len(above["label"]))) - used_d:
        expected[NC, above["label"][d]] += 1
    result = confusion(gt, dt, NC, 12, conf)
    assert (result.sum(0) == expected.sum(0)).all()
    assert (result.sum(1) == expected.sum(1)).all()
    if len({p[:2] for p in pairs}) == len(pairs):  # equal pairs may be taken in any order
        assert (result == expected).all()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.booleans(), max_size=30), st.integers(0, 5))
def test_formulas_differ_by_a_step_at_most(ticks, missed):
    npos = max(sum(ticks) + missed, 1)
    curve = pr_curve(ticks, npos)
    values = [f(*curve) for f in (ap_area, ap_coco, ap_voc07, ap_source)]
    assert all(0 <= v <= 1 + 1e-12 for v in values)
    assert abs(values[1] - values[0]) <= 0.01 + 1e-12
    assert abs(values[2] - values[0]) <= 0.1 + 1e-12
    if ticks and all(ticks) and not missed:
        assert values[:3] == pytest.approx([1, 1, 1])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["AP50", "AP", "voc", "voc07"]))
def test_weights_are_copies(seed, metric):
    gt, dt = random_problem(seed)
    rng = np.random.default_rng(seed)
    # no ties: copies of tied detections have no order
    dt["score"] = rng.permutation(len(dt["score"])) / len(dt["score"])
    w = rng.integers(0, 4, 12)

    def copied(arrays):
        rows = [np.flatnonzero(arrays["image"] == i) for i in np.repeat(np.arange(12), w)]
        taken = np.concatenate([np.zeros(0, int), *rows])
        image = np.repeat(np.arange(len(rows)), [len(x) for x in rows])
        return {**{k: v[taken] for k, v in arrays.items()}, "image": image}

    n = int(w.sum())
    result = weighted_ap(gt, dt, NC, 12, w[:, None], metric)
    expected = weighted_ap(copied(gt), copied(dt), NC, n, np.ones((n, 1)), metric)
    np.testing.assert_allclose(result, expected, atol=1e-12)
    plain = evaluate(gt, dt, NAMES, 12, engine="pycocotools")
    plain = dict(plain["coco"], voc=plain["voc"]["AP50"], voc07=plain["voc07"]["AP50"])
    one = mean(weighted_ap(gt, dt, NC, 12, np.ones((12, 1)), metric))
    assert one == pytest.approx(plain[metric], abs=1e-12)


def tide(gt, dt):
    """AP50, gains and counts by kind from TIDE's own program.

    Crowds, and the detections that lie on them, are left out.
    """
    tidecv = pytest.importorskip(
        "tidecv", reason="tidecv needs a working OpenCV", exc_type=ImportError
    )
    truth, result = tidecv.Data("gt"), tidecv.Data("dt")
    m = match_dets(gt, dt, NC, rule="coco")
    on_crowd = np.isin(np.arange(len(dt["score"])), m.order[m.skip[0]])
    for i in range(12):
        truth.add_image(i, str(i))

    def xywh(arrays, i):
        return np.r_[arrays["box"][i, :2], arrays["box"][i, 2:] - arrays["box"][i, :2]]

    def place(arrays, i):
        return int(arrays["image"][i]), int(arrays["label"][i])

    for i in np.flatnonzero(~gt["crowd"]):
        truth.add_ground_truth(*place(gt, i), xywh(gt, i))
    for i in np.flatnonzero(~on_crowd):
        result.add_detection(*place(dt, i), float(dt["score"][i]), xywh(dt, i))
    program = tidecv.TIDE()
    run = program.evaluate(truth, result, mode=tidecv.TIDE.BOX, name="run")
    name = {"FalsePos": "FP", "FalseNeg": "FN"}
    gains = {}
    for part in program.get_all_errors().values():
        gains |= {name.get(k, k): v / 100 for k, v in part["run"].items()}
    return run.ap / 100, gains, {k.short_name: len(v) for k, v in run.error_dict.items()}


@pytest.mark.parametrize("seed", range(50))
def test_error_profile_is_tides(seed, monkeypatch):
    gt, dt = random_problem(seed)
    rng = np.random.default_rng(seed)
    dt["score"] = rng.permutation(len(dt["score"])) / len(dt["score"])
    dt["box"] = dt["box"] + rng.normal(0, 0.01, dt["box"].shape)
    ap, gains, counts = tide(gt, dt)
    # its 101 points are k / 100, COCO's a linspace: recalls such as 7/25 fall to either side
    grid = [k / 100 for k in range(101)]

    def ap_tide(r, p):
        return ap_area(np.searchsorted(grid, r, side="right") / 101, p)

    monkeypatch.setattr("mhdet.evaluation.errors.ap_coco", ap_tide)
    ours = error_profile(gt, dt, NC, head_of=[0, 1, 0])
    assert ours["AP50"] == pytest.approx(ap, abs=1e-9)
    errors = ours["errors"]
    for k, gain in gains.items():
        assert errors[k]["dAP"] == pytest.approx(gain, abs=1e-9), k
    for k, n in counts.items():
        assert errors[k]["n"] == n, k
    n = {k: e["n"] for k, e in errors.items()}
    assert n["swap"] + n["double"] == n["within"] + n["across"] == n["Cls"]


def test_error_profile_has_cocos_ap():
    gt, dt = random_problem(5)
    expected = evaluate(gt, dt, NAMES, 12, engine="pycocotools")["coco"]["AP50"]
    assert error_profile(gt, dt, NC)["AP50"] == pytest.approx(expected, abs=1e-9)


def test_files_round_trip(tmp_path):
    gt, dt = random_problem(3)
    ids, cats = [f"p{i}" for i in range(12)], [7, 9, 30]
    keys = ("image", "label", "box", "area", "ignore", "crowd")
    annotations = []
    for i, c, (x, y, x2, y2), area, ignore, crowd in zip(
        *(gt[k].tolist() for k in keys), strict=True
    ):
        row = dict(image_id=ids[i], category_id=cats[c], bbox=[x, y, x2 - x, y2 - y], area=area)
        annotations.append(row | dict(ignore=int(ignore), iscrowd=int(crowd)))
    categories = [dict(id=c, name=n) for c, n in zip(cats, NAMES, strict=True)][::-1]
    whole = dict(images=[dict(id=i) for i in ids], categories=categories, annotations=annotations)
    (tmp_path / "gt.json").write_text(json.dumps(whole))
    write_results(tmp_path / "dt.json", dt, ids, cats)
    names, gt_read, ids_read, cats_read = read_gt(tmp_path / "gt.json")
    dt_read = read_results(tmp_path / "dt.json", ids_read, cats_read)
    result = evaluate(gt_read, dt_read, names, len(ids_read))
    assert result == evaluate(gt, dt, NAMES, 12)


def test_engines_print_nothing(capfd):
    for engine in ENGINES:
        evaluate(*random_problem(0), NAMES, 12, engine=engine)
    assert capfd.readouterr() == ("", "")


# Differences: a simulated world in which the truth is known.


def world(seed, skills, n_images=100, nc=4, seed_noise=0.0):
    "Ground truth, and for each skill the detections of one training; hard images are hard for all."
    rng = np.random.default_rng(seed)
    image = np.repeat(np.arange(n_images), rng.poisson(3, n_images))
    m, x = len(image), 20.0 * np.arange(len(image))
    gt = dict(
        image=image,
        label=rng.integers(0, nc, m),
        box=np.c_[x, 0 * x, x + 10, 0 * x + 10],
        area=np.full(m, 100.0),
        ignore=np.zeros(m, bool),
        crowd=np.zeros(m, bool),
    )
    luck = rng.random(n_images)[image] / 2 + rng.random(m) / 2
    trainings = []
    for skill in skills:
        hit = luck + rng.normal(0, 0.1, m) < skill + rng.normal(0, seed_noise)
        k, n = n_images, hit.sum()
        trainings.append(
            dict(
                image=np.r_[image[hit], rng.integers(0, n_images, k)],
                label=np.r_[gt["label"][hit], rng.integers(0, nc, k)],
                box=np.r_[gt["box"][hit], np.tile([-50.0, 0, -40, 10], (k, 1))],
                score=np.r_[rng.beta(4, 3, n), rng.beta(2, 4, k)],
            )
        )
    return gt, trainings


@pytest.mark.slow
def test_interval_covers_zero():
    "500 pairs without a true difference: the 95 % interval covers zero in 93-97 % of them."
    covered = []
    for seed in range(500):
        gt, (a, b) = world(seed, (0.55, 0.55))
        r = paired_diff(gt, a, b, 4, 100, n=400, seed=seed)
        covered.append(r["low"] <= 0 <= r["high"])
    assert 0.93 <= np.mean(covered) <= 0.97, np.mean(covered)


def test_exchanging_detections_is_a_fair_test():
    "Without a true difference p is below .05 in one case of twenty, and below .5 in half of them."
    p = []
    for seed in range(200):
        gt, (a, b) = world(20_000 + seed, (0.55, 0.55), n_images=60)
        p.append(permutation_test(gt, a, b, 4, 60, n=199, seed=seed))
    p = np.array(p)
    assert 0.01 <= np.mean(p <= 0.05) <= 0.09
    assert 0.4 <= np.mean(p <= 0.5) <= 0.6


def test_a_known_difference_is_detected_as_often_as_promised():
    "Intervals exclude zero as often as the power formula says, and the sd stated is that observed."
    runs = []
    for seed in range(150):
        gt, (a, b) = world(seed, (0.55, 0.62))
        runs.append(paired_diff(gt, a, b, 4, 100, n=300, seed=seed))
    delta, sd = (np.mean([r[k] for r in runs]) for k in ("delta", "sd"))
    expected = norm.cdf(delta / sd - norm.ppf(0.975))
    share = np.mean([r["low"] > 0 for r in runs])
    assert abs(share - expected) < 0.1, (share, expected)
    assert np.std([r["delta"] for r in runs]) == pytest.approx(sd, rel=0.2)


@pytest.mark.slow
def test_interval_with_seeds():
    "Three noisy trainings per side: images alone cover too rarely, images and seeds do not."
    both, images = [], []
    for seed in range(120):
        gt, dts = world(10_000 + seed, (0.55,) * 6, seed_noise=0.08)
        r = paired_diff(gt, dts[:3], dts[3:], 4, 100, n=300, seed=seed)
        both.append(r["low"] <= 0 <= r["high"])
        images.append(abs(r["delta"]) <= 1.96 * r["sd_pictures"])
    assert np.mean(both) >= 0.9 > np.mean(images), (np.mean(both), np.mean(images))


def test_verdicts():
    gt, (a, b, c) = world(1, (0.5, 0.7, 0.5))
    assert compare_ap(gt, a, b, 4, 100, n=300)["verdict"] == "better"
    assert compare_ap(gt, b, a, 4, 100, n=300)["verdict"] == "worse"
    assert compare_ap(gt, a, a, 4, 100, n=300)["verdict"] == "equivalent"
    assert compare_ap(gt, a, c, 4, 100, n=300, margin=0.001)["verdict"] == "undecided"


def test_the_forest_plot_draws_the_verdict_it_is_given():
    "Three intervals exclude zero; Holm's correction leaves one claim, in table and figure."
    interval = dict(delta=0.02, low=0.001, high=0.039)
    p = (0.01, 0.04, 0.03)
    arms = {}
    for k, corrected in enumerate(holm(p)):
        verdict = "better" if corrected <= 0.05 else "undecided"
        arms[f"arm {k}"] = dict(interval, p=p[k], verdict=verdict)
    verdicts = [arm["verdict"] for arm in arms.values()]
    assert verdicts == ["better", "undecided", "undecided"]
    assert [text.get_text() for text in plot_diffs(arms).texts] == verdicts
    # without a verdict, or with an empty cell of a table, the interval decides
    alone = plot_diffs({"none": interval, "empty": dict(interval, verdict=float("nan"))})
    assert [text.get_text() for text in alone.texts] == ["better", "better"]
