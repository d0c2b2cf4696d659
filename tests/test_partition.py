"""Partitions under random rules: `optimal` returns the best, and refuses what is infeasible."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhdet.partition.evidence import Stats, confusability, confused_pairs
from mhdet.partition.heads import Head, Partition, balanced, card, load_heads, save_heads
from mhdet.partition.optimal import optimal
from mhdet.partition.solver import Task, apply_swap, clique_bound, local_search, swap_changes
from mhdet.partition.strategies import anti_confusion, hybrid, random_heads, together

NAMES = list("abcdef")


def random_rules(seed):
    "Counts, a confusion matrix, heads and rules for six classes, some of which conflict."
    rng = np.random.default_rng(seed)

    def random_pairs(n):
        return [tuple(rng.choice(6, 2, replace=False).tolist()) for _ in range(n)]

    rules = dict(
        pairs=random_pairs(rng.integers(0, 5)),
        join=random_pairs(rng.integers(0, 2)),
        solo=rng.choice(6, rng.integers(0, 2)).tolist(),
        imbalance=rng.choice([1.3, 2, 5]),
        class_imbalance=rng.choice([None, 2]),
    )
    counts = rng.integers(1, 30, 6)
    matrix = rng.integers(0, 9, (6, 6)) ** 2
    return counts, matrix, int(rng.integers(1, 5)), rules


def keeps_rules(head_of, heads, counts, pairs, join, solo, imbalance, class_imbalance):
    boxes = np.bincount(head_of, counts, heads)
    sizes = np.bincount(head_of, minlength=heads)
    solo_heads = set(head_of[solo])
    rest = [h for h in range(heads) if h not in solo_heads]
    for load, factor in ((boxes, imbalance), (sizes, class_imbalance)):
        if rest and factor and load[rest].max() > factor * load[rest].min() * (1 + 1e-9):
            return False
    return (
        sizes.min() > 0
        and all(sizes[h] == 1 for h in solo_heads)
        and all(head_of[a] != head_of[b] for a, b in pairs)
        and all(head_of[a] == head_of[b] for a, b in join)
    )


def least_inside(counts, matrix, heads, rules):
    "Least confusability inside heads over all assignments; None where none keeps the rules."
    values = confusability(matrix, 6)
    inside = []
    for head_of in map(np.array, itertools.product(range(heads), repeat=6)):
        if keeps_rules(head_of, heads, counts, **rules):
            same_head = np.equal.outer(head_of, head_of)
            inside.append(values[same_head].sum() / max(values.sum(), 1e-12))
    return min(inside, default=None)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_optimal_is_the_best_or_names_a_conflict(seed):
    counts, matrix, heads, rules = random_rules(seed)
    least = least_inside(counts, matrix, heads, rules)
    if least is None:
        message = f"no partition into {heads} heads has all of"
        with pytest.raises(ValueError, match=message) as refused:
            optimal(NAMES, counts, heads, matrix, **rules)
        assert refused.value.args[0].split(": ", 1)[1]
        return
    partition = optimal(NAMES, counts, heads, matrix, **rules)
    assert keeps_rules(partition.head_of, heads, counts, **rules)
    assert partition.proof.value == pytest.approx(least, abs=1e-6)
    assert partition.proof.gap < 1e-4
    inside = card(partition, counts, matrix)["inside_confusion"]
    assert inside == pytest.approx(partition.proof.value, abs=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_a_conflict_is_smallest(seed):
    "Every pair of four classes apart in three heads: six rules conflict, and no five of them do."
    rng = np.random.default_rng(seed)
    four = rng.choice(6, 4, replace=False).tolist()
    pairs = list(itertools.combinations(sorted(four), 2))
    counts = rng.integers(1, 9, 6)
    with pytest.raises(ValueError, match="has all of") as refused:
        optimal(NAMES, counts, 3, pairs=[*pairs, (0, 5), (1, 4)], imbalance=50)
    conflict = refused.value.args[0].split(": ", 1)[1].split("; ")
    assert set(conflict) == {f"{NAMES[a]} and {NAMES[b]} apart" for a, b in pairs}


@pytest.mark.parametrize("seed", range(10))
def test_optimal_below_greedy_below_chance(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(8, 16))
    names = [f"c{i}" for i in range(n)]
    counts = rng.pareto(1.5, n) * 50 + 5
    matrix = rng.poisson(np.exp(rng.normal(0, 1.5, (n, n)))) + np.diag(rng.integers(20, 90, n))

    def inside(partition):
        return card(partition, counts, matrix)["inside_confusion"]

    greedy = anti_confusion(names, confused_pairs(matrix, names, n), counts, 3, share=1 / 3)
    best = optimal(names, counts, 3, matrix, share=1 / 3, time_limit=10)
    assert inside(best) <= inside(greedy) + 1e-9
    assert best.nh == greedy.nh == 3
    chance = np.mean([inside(random_heads(names, 3, s, counts)) for s in range(20)])
    assert inside(best) < chance < inside(together(names, matrix, 3))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 99))
def test_hybrid_keeps_its_range(nc, heads, seed):
    if heads > nc:
        return
    rng = np.random.default_rng(seed)
    present = (rng.random((60, nc)) < 0.2).astype(int)
    both = present.T @ present
    images = both.diagonal()
    jaccard = both / np.maximum(images[:, None] + images - both, 1)
    if nc > 2:
        shape = np.where(rng.random(nc) < 0.1, np.nan, rng.normal(size=nc))
    else:
        shape = rng.normal(size=nc)
    names = [str(i) for i in range(nc)]
    stats = Stats(images, images, shape, shape, jaccard)
    slack = max(1, nc / heads / 4)
    partition = hybrid(names, stats, heads, rng.random(), slack=slack)
    assert partition.nh == heads
    assert (abs(partition.sizes - nc / heads) <= slack + 1e-9).all()


def test_weights_survive_the_file(tmp_path):
    heads = [Head("x", [0, 5]), Head("y", [1, 2, 3, 4])]
    weighted = balanced(Partition(heads, NAMES), [30, 1, 2, 3, 4, 10])
    save_heads(tmp_path / "h.yaml", weighted)
    assert load_heads(tmp_path / "h.yaml", NAMES) == weighted
    assert weighted.weights.mean() == pytest.approx(1)
    assert weighted.weights[0] * 40 == pytest.approx(weighted.weights[1] * 10)


@pytest.mark.slow
def test_search_stops_in_time_and_repeats_itself():
    rng = np.random.default_rng(0)
    cost = rng.random((60, 60)) * (1 - np.eye(60))
    no_pairs = np.zeros((60, 60), bool)
    task = Task(4, cost + cost.T, no_pairs, rng.random((1, 60)), np.array([np.inf]))
    start = np.arange(60) % 4
    assert (local_search(task, start, until=0) == start).all()
    assert (local_search(task, start) == local_search(task, start)).all()
    changes = swap_changes(task, start)
    after = apply_swap(start, int(changes.argmin()), 4)
    assert task.total_cost(after) - task.total_cost(start) == pytest.approx(changes.min())
    assert clique_bound(task.cost, 5, until=0) == ([], 0.0)
