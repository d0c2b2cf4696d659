"""Metrics and differences on random problems: against pycocotools, loops from the definitions, and simulation."""
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from mhdet.evaluation.calibration import reliability
from mhdet.evaluation.statistics import compare_ap, holm, paired_diff, permutation_test, plot_diffs, weighted_ap
from mhdet.evaluation.errors import error_profile
from mhdet.evaluation.metrics import ENGINES, IOUS, _coco_side, ap_area, ap_coco, ap_per_class, ap_source, ap_voc07, evaluate, match_dets, pr_curve
from mhdet.evaluation.confusion import confusion
from mhdet.evaluation.results import read_gt, read_results, write_results

NC = 3


def problem(seed, n_images=12, per=3, extra=4, crowded=False):
    "Random boxes, found with jitter, some twice, some under the wrong name; scores tie; some pictures are empty."
    rng = np.random.default_rng(seed)
    image = np.repeat(np.arange(n_images), rng.poisson(per, n_images) * (rng.random(n_images) < .8))
    m = len(image)
    xy, wh = rng.integers(0, 60, (m, 2)), rng.integers(4, 120, (m, 2))
    gt = dict(image=image, label=rng.integers(0, NC, m), box=np.c_[xy, xy + wh].astype(float),
              area=wh.prod(1) * rng.uniform(.5, 1, m), ignore=rng.random(m) < .15, crowd=rng.random(m) < .1)
    hit = np.repeat(np.arange(m), rng.integers(0, 3, m))
    box = gt["box"][hit] + rng.integers(-6, 7, (len(hit), 4)) * (rng.random((len(hit), 1)) < .8)
    k = extra * n_images
    low = rng.integers(0, 100, (k, 2))
    box = np.r_[box, np.c_[low, low + rng.integers(1, 80, (k, 2))]]
    box[:, 2:] = np.maximum(box[:, 2:], box[:, :2] + 1)
    at = np.r_[gt["image"][hit], rng.integers(0, n_images, k)]
    label = np.r_[gt["label"][hit], rng.integers(0, NC, k)]
    label = np.where(rng.random(len(at)) < .2, rng.integers(0, NC, len(at)), label)
    if crowded: at, label = at * 0, label * 0        # more than 100 detections of a class in one picture
    return gt, dict(image=at, label=label, box=box, score=rng.integers(0, 12, len(at)) / 11)


def iou(p, q, one=0):
    w, h = (max(0, min(p[i + 2], q[i + 2]) - max(p[i], q[i]) + one) for i in (0, 1))
    area = lambda b: (b[2] - b[0] + one) * (b[3] - b[1] + one)
    return w * h / (area(p) + area(q) - w * h)


def voc_loop(gt, dt, c, points=None, one=0):
    "VOC AP of one class at IoU .5, detection by detection."
    off, used, marks = gt["ignore"] | gt["crowd"], set(), []
    npos = ((gt["label"] == c) & ~off).sum()
    if not npos: return np.nan
    for i in sorted(np.flatnonzero(dt["label"] == c), key=lambda i: (-dt["score"][i], dt["image"][i], i)):
        mine = np.flatnonzero((gt["image"] == dt["image"][i]) & (gt["label"] == c))
        best = max(mine, key=lambda j: iou(gt["box"][j], dt["box"][i], one), default=None)
        if best is None or iou(gt["box"][best], dt["box"][i], one) < .5: marks.append(0)
        elif not off[best]:
            marks.append(int(best not in used))
            used.add(best)
    r, p = np.cumsum(marks) / npos, np.cumsum(marks) / np.arange(1, len(marks) + 1)
    if points is not None: return np.mean([max(p[r >= t], default=0) for t in points])
    return sum((r[i] - (r[i - 1] if i else 0)) * p[i:].max() for i in range(len(r)))


def source_loop(gt, dt, c, threshold):
    "The source's tester: best target of the class, IoU > .5, taken at every threshold by the first."
    keep, used, marks = ~gt["crowd"], set(), []
    npos = ((gt["label"] == c) & keep).sum()
    if not npos: return np.nan
    for i in sorted(np.flatnonzero(dt["label"] == c), key=lambda i: (-dt["score"][i], dt["image"][i], i)):
        mine = np.flatnonzero((gt["image"] == dt["image"][i]) & (gt["label"] == c) & keep)
        best = max(mine, key=lambda j: iou(gt["box"][j], dt["box"][i]), default=None)
        v = 0 if best is None else iou(gt["box"][best], dt["box"][i])
        free = v > .5 and best not in used
        if free: used.add(best)
        marks.append(int(free and v > threshold))
    if not marks: return 0.
    r, p = np.cumsum(marks) / npos, np.cumsum(marks) / np.arange(1, len(marks) + 1)
    r, p = [0, *r, r[-1] + .01], [1, *p, 0]
    env = [max(p[i:]) for i in range(len(p))]
    y = [np.interp(t, r, env) for t in np.linspace(0, 1, 101)]
    return sum((a + b) / 2 / 100 for a, b in zip(y[:-1], y[1:]))


def mean(values): return float(np.nanmean(values)) if not np.isnan(values).all() else None


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_the_twelve_coco_figures(seed, crowded):
    gt, dt = problem(seed, extra=12 if crowded else 4, crowded=crowded)
    ours, fast, slow = (evaluate(gt, dt, list("abc"), 12, "coco", engine=e) for e in ("own", "fast", "pycocotools"))
    assert set(fast["coco"]) == {"AP", "AP50", "AP75", "APsmall", "APmedium", "APlarge", "AR1", "AR10", "AR100",
                                 "ARsmall", "ARmedium", "ARlarge"}
    for found in (ours, fast):
        for k, v in slow["coco"].items(): assert found["coco"][k] == pytest.approx(v, abs=1e-9), k
        for k, row in slow["per_class"].items(): assert found["per_class"][k] == pytest.approx(row, abs=1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_a_third_engine(seed, monkeypatch, capfd):
    "hotcoco, written in Rust by others, gives the twelve figures too."
    hotcoco = pytest.importorskip("hotcoco", reason="hotcoco has no wheel for this machine")
    monkeypatch.setitem(ENGINES, "hotcoco", lambda: (hotcoco.COCO, hotcoco.COCOeval))
    gt, dt = problem(seed, extra=12, crowded=seed % 4 == 0)
    ours, third = (evaluate(gt, dt, list("abc"), 12, "coco", engine=e)["coco"] for e in ("own", "hotcoco"))
    assert third == pytest.approx(ours, abs=1e-9)
    ev = hotcoco_of(hotcoco, gt, dt)
    error = reliability(match_dets(gt, dt, NC, rule="coco"))[0]["ece"]
    assert ev.calibration(n_bins=10, iou_threshold=.5)["ece"] == pytest.approx(error, abs=1e-9)


def hotcoco_of(hotcoco, gt, dt):
    "hotcoco's evaluation of the same arrays."
    size = (dt["box"][:, 2:] - dt["box"][:, :2]).prod(1)
    ev = hotcoco.COCOeval(_coco_side(hotcoco.COCO, gt, gt["area"], gt["crowd"], gt["label"], NC, 12),
                          _coco_side(hotcoco.COCO, dt, size, 0 * dt["label"], dt["score"], NC, 12), "bbox")
    ev.evaluate()
    return ev


@pytest.mark.parametrize("seed", range(20))
def test_error_profile_is_hotcocos(seed):
    "On COCO's own grid of recalls; without crowds, which hotcoco counts among the mistakes."
    hotcoco = pytest.importorskip("hotcoco", reason="hotcoco has no wheel for this machine")
    gt, dt = problem(seed)
    gt = {k: v[~gt["crowd"]] for k, v in gt.items()}
    dt["score"] = np.random.default_rng(seed).permutation(len(dt["score"])) / len(dt["score"])
    theirs, ours = hotcoco_of(hotcoco, gt, dt).tide_errors(), error_profile(gt, dt, NC)["errors"]
    for k, gain in theirs["delta_ap"].items(): assert ours[k]["dAP"] == pytest.approx(gain, abs=1e-9), k
    for k, n in theirs["counts"].items(): assert ours[k]["n"] == n, k


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_voc_and_source_against_loops(seed, inclusive):
    gt, dt = problem(seed)
    got = evaluate(gt, dt, list("abc"), 12, ("voc07", "voc", "source"), inclusive)
    one = int(inclusive)
    assert got["voc"]["AP50"] == pytest.approx(mean([voc_loop(gt, dt, c, None, one) for c in range(NC)]), abs=1e-9)
    eleven = [voc_loop(gt, dt, c, np.arange(11) / 10, one) for c in range(NC)]
    assert got["voc07"]["AP50"] == pytest.approx(mean(eleven), abs=1e-9)
    table = np.array([[source_loop(gt, dt, c, t) for c in range(NC)] for t in IOUS])
    assert got["source"]["AP50"] == pytest.approx(mean(table[0]), abs=1e-9)
    assert got["source"]["AP"] == pytest.approx(mean(table), abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, .9))
def test_confusion_against_greedy(seed, conf):
    gt, dt = problem(seed)
    keep = ~(gt["ignore"] | gt["crowd"])
    gt, dt_ = {k: v[keep] for k, v in gt.items()}, {k: v[dt["score"] >= conf] for k, v in dt.items()}
    pairs = [(-v, -dt_["score"][d], d, g) for d in range(len(dt_["label"])) for g in range(len(gt["label"]))
             if dt_["image"][d] == gt["image"][g] and (v := iou(gt["box"][g], dt_["box"][d])) >= .5]
    want, used_d, used_g = np.zeros((NC + 1, NC + 1), int), set(), set()
    for _, _, d, g in sorted(pairs, key=lambda r: (r[0], r[1], r[3])):
        if d in used_d or g in used_g: continue
        want[gt["label"][g], dt_["label"][d]] += 1
        used_d.add(d), used_g.add(g)
    for g in set(range(len(gt["label"]))) - used_g: want[gt["label"][g], NC] += 1
    for d in set(range(len(dt_["label"]))) - used_d: want[NC, dt_["label"][d]] += 1
    got = confusion(gt, dt, NC, 12, conf)
    assert (got.sum(0) == want.sum(0)).all() and (got.sum(1) == want.sum(1)).all()
    if len({p[:2] for p in pairs}) == len(pairs): assert (got == want).all()     # equal pairs may be taken in any order


@settings(max_examples=200, deadline=None)
@given(st.lists(st.booleans(), max_size=30), st.integers(0, 5))
def test_readings_differ_by_a_step_at_most(ticks, missed):
    npos = max(sum(ticks) + missed, 1)
    curve = pr_curve(ticks, npos)
    values = [f(*curve) for f in (ap_area, ap_coco, ap_voc07, ap_source)]
    assert all(0 <= v <= 1 + 1e-12 for v in values)
    assert abs(values[1] - values[0]) <= .01 + 1e-12 and abs(values[2] - values[0]) <= .1 + 1e-12
    if ticks and all(ticks) and not missed: assert values[:3] == pytest.approx([1, 1, 1])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["AP50", "AP", "voc", "voc07"]))
def test_weights_are_copies(seed, metric):
    gt, dt = problem(seed)
    rng = np.random.default_rng(seed)
    dt["score"] = rng.permutation(len(dt["score"])) / len(dt["score"])   # copies of tied detections have no order
    w = rng.integers(0, 4, 12)
    def copied(a):
        rows = [np.flatnonzero(a["image"] == i) for i in np.repeat(np.arange(12), w)]
        taken = np.concatenate([np.zeros(0, int), *rows])
        return {**{k: v[taken] for k, v in a.items()}, "image": np.repeat(np.arange(len(rows)), [len(x) for x in rows])}
    n = int(w.sum())
    got = weighted_ap(gt, dt, NC, 12, w[:, None], metric)
    want = weighted_ap(copied(gt), copied(dt), NC, n, np.ones((n, 1)), metric)
    np.testing.assert_allclose(got, want, atol=1e-12)
    plain = evaluate(gt, dt, list("abc"), 12, engine="pycocotools")
    one = mean(weighted_ap(gt, dt, NC, 12, np.ones((12, 1)), metric))
    truth = {"AP50": plain["coco"]["AP50"], "AP": plain["coco"]["AP"],
             "voc": plain["voc"]["AP50"], "voc07": plain["voc07"]["AP50"]}
    assert one == pytest.approx(truth[metric], abs=1e-12)


def tide(gt, dt):
    "What TIDE's own program finds: AP50, gains and counts by kind. Crowds, and what they swallow, are left out."
    tidecv = pytest.importorskip("tidecv", reason="tidecv needs a working OpenCV", exc_type=ImportError)
    sides = tidecv.Data("gt"), tidecv.Data("dt")
    m = match_dets(gt, dt, NC, rule="coco")
    swallowed = np.isin(np.arange(len(dt["score"])), m.order[m.skip[0]])
    for i in range(12): sides[0].add_image(i, str(i))
    xywh = lambda a, i: np.r_[a["box"][i, :2], a["box"][i, 2:] - a["box"][i, :2]]
    place = lambda a, i: (int(a["image"][i]), int(a["label"][i]))
    for i in np.flatnonzero(~gt["crowd"]): sides[0].add_ground_truth(*place(gt, i), xywh(gt, i))
    for i in np.flatnonzero(~swallowed): sides[1].add_detection(*place(dt, i), float(dt["score"][i]), xywh(dt, i))
    t = tidecv.TIDE()
    run, name = t.evaluate(*sides, mode=tidecv.TIDE.BOX, name="run"), {"FalsePos": "FP", "FalseNeg": "FN"}
    gains = {name.get(k, k): v / 100 for part in t.get_all_errors().values() for k, v in part["run"].items()}
    return run.ap / 100, gains, {k.short_name: len(v) for k, v in run.error_dict.items()}


@pytest.mark.parametrize("seed", range(50))
def test_error_profile_is_tides(seed, monkeypatch):
    gt, dt = problem(seed)
    rng = np.random.default_rng(seed)
    dt["score"] = rng.permutation(len(dt["score"])) / len(dt["score"])
    dt["box"] = dt["box"] + rng.normal(0, .01, dt["box"].shape)
    ap, gains, counts = tide(gt, dt)
    # its 101 points are k / 100, COCO's a linspace: recalls such as 7/25 fall to either side
    grid = [k / 100 for k in range(101)]
    monkeypatch.setattr("mhdet.evaluation.errors.ap_coco", lambda r, p: ap_area(np.searchsorted(grid, r, side="right") / 101, p))
    ours = error_profile(gt, dt, NC, head_of=[0, 1, 0])
    assert ours["AP50"] == pytest.approx(ap, abs=1e-9)
    found = ours["errors"]
    for k, gain in gains.items(): assert found[k]["dAP"] == pytest.approx(gain, abs=1e-9), k
    for k, n in counts.items(): assert found[k]["n"] == n, k
    assert found["swap"]["n"] + found["double"]["n"] == found["within"]["n"] + found["across"]["n"] == found["Cls"]["n"]


def test_error_profile_has_cocos_ap():
    gt, dt = problem(5)
    truth = evaluate(gt, dt, list("abc"), 12, engine="pycocotools")["coco"]["AP50"]
    assert error_profile(gt, dt, NC)["AP50"] == pytest.approx(truth, abs=1e-9)


def test_files_round_trip(tmp_path):
    gt, dt = problem(3)
    ids, cats = [f"p{i}" for i in range(12)], [7, 9, 30]
    xywh = lambda b: [*b[:2], b[2] - b[0], b[3] - b[1]]
    columns = (gt["image"], gt["label"], gt["box"].tolist(), gt["area"].tolist(), gt["ignore"], gt["crowd"])
    rows = [dict(image_id=ids[i], category_id=cats[c], bbox=xywh(b), area=a, ignore=int(ig), iscrowd=int(cr))
            for i, c, b, a, ig, cr in zip(*columns)]
    categories = [dict(id=c, name=n) for c, n in zip(cats, "abc")][::-1]
    whole = dict(images=[dict(id=i) for i in ids], categories=categories, annotations=rows)
    (tmp_path / "gt.json").write_text(json.dumps(whole))
    write_results(tmp_path / "dt.json", dt, ids, cats)
    names, gt2, ids2, cats2 = read_gt(tmp_path / "gt.json")
    dt2 = read_results(tmp_path / "dt.json", ids2, cats2)
    assert evaluate(gt2, dt2, names, len(ids2)) == evaluate(gt, dt, list("abc"), 12)


def test_engines_print_nothing(capfd):
    for engine in ENGINES: evaluate(*problem(0), list("abc"), 12, engine=engine)
    assert capfd.readouterr() == ("", "")


# Differences: a simulated world in which the truth is known.

def world(seed, skills, n_images=100, nc=4, seed_noise=0.):
    "Ground truth, and for each skill the detections of one training; hard pictures are hard for all."
    rng = np.random.default_rng(seed)
    image = np.repeat(np.arange(n_images), rng.poisson(3, n_images))
    m, x = len(image), 20. * np.arange(len(image))
    gt = dict(image=image, label=rng.integers(0, nc, m), box=np.c_[x, 0 * x, x + 10, 0 * x + 10], area=np.full(m, 100.),
              ignore=np.zeros(m, bool), crowd=np.zeros(m, bool))
    luck = rng.random(n_images)[image] / 2 + rng.random(m) / 2
    out = []
    for skill in skills:
        hit = luck + rng.normal(0, .1, m) < skill + rng.normal(0, seed_noise)
        k, n = n_images, hit.sum()
        out.append(dict(image=np.r_[image[hit], rng.integers(0, n_images, k)],
                        label=np.r_[gt["label"][hit], rng.integers(0, nc, k)],
                        box=np.r_[gt["box"][hit], np.tile([-50., 0, -40, 10], (k, 1))],
                        score=np.r_[rng.beta(4, 3, n), rng.beta(2, 4, k)]))
    return gt, out


def test_interval_covers_zero():
    "500 pairs without a true difference: the 95 % interval covers zero in 93-97 % of them."
    covered = []
    for seed in range(500):
        gt, (a, b) = world(seed, (.55, .55))
        r = paired_diff(gt, a, b, 4, 100, n=400, seed=seed)
        covered.append(r["low"] <= 0 <= r["high"])
    assert .93 <= np.mean(covered) <= .97, np.mean(covered)


def test_exchanging_answers_is_a_fair_test():
    "Without a true difference the permutation p is below .05 in one case of twenty, and below .5 in half."
    p = []
    for seed in range(200):
        gt, (a, b) = world(20_000 + seed, (.55, .55), n_images=60)
        p.append(permutation_test(gt, a, b, 4, 60, n=199, seed=seed))
    assert .01 <= np.mean(np.array(p) <= .05) <= .09 and .4 <= np.mean(np.array(p) <= .5) <= .6


def test_a_known_difference_is_found_as_often_as_promised():
    "With a true difference of the size `mde`, four intervals in five exclude zero."
    runs = [paired_diff(gt, a, b, 4, 100, n=300, seed=s) for s in range(150) for gt, (a, b) in [world(s, (.55, .62))]]
    delta, sd = np.mean([r["delta"] for r in runs]), np.mean([r["sd"] for r in runs])
    expected = norm.cdf(delta / sd - norm.ppf(.975))
    found = np.mean([r["low"] > 0 for r in runs])
    assert abs(found - expected) < .1, (found, expected)
    assert np.std([r["delta"] for r in runs]) == pytest.approx(sd, rel=.2)            # the sd stated is the sd seen


def test_interval_with_seeds():
    "Three trainings a side that differ by chance: pictures alone cover too rarely, pictures and seeds do not."
    both, pictures = [], []
    for seed in range(120):
        gt, dts = world(10_000 + seed, (.55,) * 6, seed_noise=.08)
        r = paired_diff(gt, dts[:3], dts[3:], 4, 100, n=300, seed=seed)
        both.append(r["low"] <= 0 <= r["high"])
        pictures.append(abs(r["delta"]) <= 1.96 * r["sd_pictures"])
    assert np.mean(both) >= .9 > np.mean(pictures), (np.mean(both), np.mean(pictures))


def test_verdicts():
    gt, (a, b, c) = world(1, (.5, .7, .5))
    assert compare_ap(gt, a, b, 4, 100, n=300)["verdict"] == "better"
    assert compare_ap(gt, b, a, 4, 100, n=300)["verdict"] == "worse"
    assert compare_ap(gt, a, a, 4, 100, n=300)["verdict"] == "equivalent"
    assert compare_ap(gt, a, c, 4, 100, n=300, margin=.001)["verdict"] == "undecided"


def test_the_forest_plot_draws_the_verdict_it_is_given():
    "Three arms whose intervals leave zero out; after Holm's correction only one claim is left, in table and figure."
    arms = {f"arm {k}": dict(delta=.02, low=.001, high=.039, p=p, verdict="better") for k, p in enumerate((.01, .04, .03))}
    for arm, p in zip(arms.values(), holm([arm["p"] for arm in arms.values()]), strict=True):
        if p > .05: arm["verdict"] = "undecided"
    assert [arm["verdict"] for arm in arms.values()] == ["better", "undecided", "undecided"]
    ax = plot_diffs(arms)
    assert [text.get_text() for text in ax.texts] == [arm["verdict"] for arm in arms.values()]
    raw = plot_diffs({name: {k: v for k, v in arm.items() if k != "verdict"} for name, arm in arms.items()})
    assert [text.get_text() for text in raw.texts] == ["better"] * 3        # without one, the interval decides
