"""Partitions on random wishes: what `optimal` returns is the best there is, and what it refuses cannot be had."""
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhdet.partition.solver import Task, cliques, search, swap_changes, swapped
from mhdet.partition.heads import Head, Partition, balanced, card, load_heads, save_heads
from mhdet.partition.evidence import Stats, confused_pairs, confusability
from mhdet.partition.strategies import anti_confusion, hybrid, random_heads, together
from mhdet.partition.optimal import optimal

NAMES = list("abcdef")


def wishes(seed):
    "Counts, a confusion matrix and wishes for six classes, some of which clash."
    rng = np.random.default_rng(seed)
    draw = lambda n: [tuple(rng.choice(6, 2, replace=False).tolist()) for _ in range(n)]
    rules = dict(pairs=draw(rng.integers(0, 5)), join=draw(rng.integers(0, 2)), solo=rng.choice(6, rng.integers(0, 2)).tolist(),
                 imbalance=rng.choice([1.3, 2, 5]), class_imbalance=rng.choice([None, 2]))
    return rng.integers(1, 30, 6), rng.integers(0, 9, (6, 6)) ** 2, int(rng.integers(1, 5)), rules


def keeps(head_of, heads, counts, pairs, join, solo, imbalance, class_imbalance):
    boxes, sizes = (np.bincount(head_of, w, heads) for w in (counts, np.ones(6)))
    lone = set(head_of[solo])
    rest = [h for h in range(heads) if h not in lone]
    level = all(v[rest].max() <= r * v[rest].min() * (1 + 1e-9) for v, r in ((boxes, imbalance), (sizes, class_imbalance)) if rest and r)
    return (sizes.min() > 0 and level and all(sizes[h] == 1 for h in lone) and all(head_of[a] != head_of[b] for a, b in pairs)
            and all(head_of[a] == head_of[b] for a, b in join))


def best(counts, m, heads, rules):
    "Least confusability inside heads over all ways to deal, None where no way keeps the rules."
    mass = confusability(m, 6)
    ways = (np.array(a) for a in itertools.product(range(heads), repeat=6))
    inside = [mass[np.equal.outer(a, a)].sum() / max(mass.sum(), 1e-12) for a in ways if keeps(a, heads, counts, **rules)]
    return min(inside, default=None)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10 ** 6))
def test_optimal_is_the_best_there_is_or_says_what_clashes(seed):
    counts, m, heads, rules = wishes(seed)
    due = best(counts, m, heads, rules)
    if due is None:
        with pytest.raises(ValueError, match=f"no partition into {heads} heads has all of") as refused:
            optimal(NAMES, counts, heads, m, **rules)
        assert refused.value.args[0].split(": ", 1)[1]
        return
    found = optimal(NAMES, counts, heads, m, **rules)
    assert keeps(found.head_of, heads, counts, **rules)
    assert found.proof.value == pytest.approx(due, abs=1e-6) and found.proof.gap < 1e-4
    assert card(found, counts, m)["inside_confusion"] == pytest.approx(found.proof.value, abs=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_a_clash_is_smallest(seed):
    "Every pair of four classes apart in three heads: six pairs clash, and no five of them do."
    rng = np.random.default_rng(seed)
    four = rng.choice(6, 4, replace=False).tolist()
    pairs = list(itertools.combinations(sorted(four), 2))
    with pytest.raises(ValueError) as refused: optimal(NAMES, rng.integers(1, 9, 6), 3, pairs=pairs + [(0, 5), (1, 4)], imbalance=50)
    said = refused.value.args[0].split(": ", 1)[1].split("; ")
    assert set(said) == {f"{NAMES[a]} and {NAMES[b]} apart" for a, b in pairs}


@pytest.mark.parametrize("seed", range(10))
def test_optimal_below_greedy_below_chance(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(8, 16))
    names, counts = [f"c{i}" for i in range(n)], rng.pareto(1.5, n) * 50 + 5
    m = rng.poisson(np.exp(rng.normal(0, 1.5, (n, n)))) + np.diag(rng.integers(20, 90, n))
    inside = lambda p: card(p, counts, m)["inside_confusion"]
    greedy = anti_confusion(names, confused_pairs(m, names, n), counts, 3, share=1 / 3)
    found = optimal(names, counts, 3, m, share=1 / 3, time_limit=10)
    assert inside(found) <= inside(greedy) + 1e-9 and found.nh == greedy.nh == 3
    assert inside(found) < np.mean([inside(random_heads(names, 3, s, counts)) for s in range(20)]) < inside(together(names, m, 3))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 99))
def test_hybrid_keeps_its_range(nc, heads, seed):
    if heads > nc: return
    rng = np.random.default_rng(seed)
    seen = rng.random((60, nc)) < .2
    both = (seen.T.astype(int) @ seen)
    own = both.diagonal()
    jaccard = both / np.maximum(own[:, None] + own - both, 1)
    shape = np.where(rng.random(nc) < .1, np.nan, rng.normal(size=nc)) if nc > 2 else rng.normal(size=nc)
    names = [str(i) for i in range(nc)]
    found = hybrid(names, Stats(own, own, shape, shape, jaccard), heads, rng.random(), slack=max(1, nc / heads / 4))
    assert found.nh == heads and (abs(found.sizes - nc / heads) <= max(1, nc / heads / 4) + 1e-9).all()


def test_weights_survive_the_file(tmp_path):
    weighed = balanced(Partition([Head("x", [0, 5]), Head("y", [1, 2, 3, 4])], NAMES), [30, 1, 2, 3, 4, 10])
    save_heads(tmp_path / "h.yaml", weighed)
    assert load_heads(tmp_path / "h.yaml", NAMES) == weighed and weighed.weights.mean() == pytest.approx(1)
    assert weighed.weights[0] * 40 == pytest.approx(weighed.weights[1] * 10)


def test_search_stops_in_time_and_repeats_itself():
    rng = np.random.default_rng(0)
    cost = rng.random((60, 60)) * (1 - np.eye(60))
    task = Task(4, cost + cost.T, np.zeros((60, 60), bool), rng.random((1, 60)), np.array([np.inf]))
    first = np.arange(60) % 4
    assert (search(task, first, until=0) == first).all()
    assert (search(task, first) == search(task, first)).all()
    place = int(swap_changes(task, first).argmin())
    assert task.paid(swapped(first, place, 4)) - task.paid(first) == pytest.approx(swap_changes(task, first).min())
    assert cliques(task.cost, 5, until=0) == ([], 0.)
