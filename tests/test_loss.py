"""Properties of assignment and loss that no option may break, on small random batches."""
import pytest
import torch
from hypothesis import given, settings, strategies as st

from mhdet.model.assign import match_anchors
from mhdet.model.multihead import ANCHORS, STRIDES, per_anchor
from mhdet.model.loss import RoutedLoss, naive_loss
from mhdet.partition.heads import Head, Partition

ROUTES = dict(reduce=st.sampled_from(["trunk", "head"]), others=st.sampled_from(["background", "ignore"]),
              negatives=st.sampled_from(["all", "head"]), single=st.sampled_from(["train", "skip"]))
routes, seeds = st.fixed_dictionaries(ROUTES), st.integers(0, 10**6)
quick = settings(max_examples=25, deadline=None)


def batch(seed, rows, most=12, nc=6, B=2, size=(96, 64)):
    "Raw maps in a random memory layout, and 0 to `most` targets, some of them twice."
    g = torch.Generator().manual_seed(seed)
    raws = [torch.randn(B, 3 * rows, size[0] // s, size[1] // s, generator=g) for s in STRIDES]
    if seed % 2: raws = [r.contiguous(memory_format=torch.channels_last) for r in raws]
    n = int(torch.randint(most + 1, (1,), generator=g))
    t = torch.cat([torch.randint(B, (n, 1), generator=g), torch.randint(nc, (n, 1), generator=g),
                   torch.rand(n, 2, generator=g), .05 + .6 * torch.rand(n, 2, generator=g)], 1)
    return [r.requires_grad_() for r in raws], torch.cat([t, t[:n // 3]])


def partition(seed, nh=3, nc=6):
    g = torch.Generator().manual_seed(seed)
    order, cuts = torch.randperm(nc, generator=g).tolist(), 1 + torch.randperm(nc - 1, generator=g)[:nh - 1].sort().values
    edges = [0, *cuts.tolist(), nc]
    heads = [Head(str(h), order[a:b], 1 + .25 * h) for h, (a, b) in enumerate(zip(edges, edges[1:]))]
    return Partition(heads, list("abcdefghij"[:nc]), "random")


def value_and_grads(loss, raws, targets):
    out = loss(raws, targets)
    return out, torch.autograd.grad(out["loss"], raws)


def close(a, b, tol=1e-5): torch.testing.assert_close(a, b, rtol=tol, atol=tol)


@quick
@given(seeds, routes)
def test_one_head_is_the_plain_loss(seed, route):
    raws, targets = batch(seed, 5 + 6)
    out, grads = value_and_grads(RoutedLoss(Partition.single(list("abcdef")), **route), raws, targets)
    due, due_grads = value_and_grads(naive_loss, raws, targets)
    for k in due: close(out[k], due[k])
    for a, b in zip(grads, due_grads): close(a, b, 1e-6)


@quick
@given(seeds, routes)
def test_permuting_heads_changes_nothing(seed, route):
    part, order = partition(seed), torch.randperm(3, generator=torch.Generator().manual_seed(seed)).tolist()
    raws, targets = batch(seed, 5 * 3 + 6)
    out, grads = value_and_grads(RoutedLoss(part, **route), raws, targets)
    other = Partition([part.heads[h] for h in order], part.names, "permuted")
    rows = [a * 21 + r for a in range(3) for r in [*(5 * h + i for h in order for i in range(5)), *range(15, 21)]]
    swapped = [r[:, rows].detach().requires_grad_() for r in raws]
    moved, moved_grads = value_and_grads(RoutedLoss(other, **route), swapped, targets)
    close(moved["loss"], out["loss"])
    for i, h in enumerate(order): close(moved[f"h{i}/obj"], out[f"h{h}/obj"])
    for a, b in zip(moved_grads, grads): close(a, b[:, rows], 1e-6)


@quick
@given(seeds, routes)
def test_permuting_classes_changes_nothing(seed, route):
    part, order = partition(seed), torch.randperm(6, generator=torch.Generator().manual_seed(seed)).tolist()
    raws, targets = batch(seed, 5 * 3 + 6)
    out = RoutedLoss(part, **route)(raws, targets)
    new = {c: i for i, c in enumerate(order)}
    heads = [Head(h.name, [new[c] for c in h.classes], h.weight) for h in part.heads]
    other = Partition(heads, [part.names[c] for c in order], "permuted")
    rows = [a * 21 + r for a in range(3) for r in [*range(15), *(15 + c for c in order)]]
    renamed = targets.clone()
    renamed[:, 1] = torch.tensor([new[int(c)] for c in targets[:, 1]])
    moved = RoutedLoss(other, **route)([r[:, rows] for r in raws], renamed)
    for k in out: close(moved[k], out[k])


@quick
@given(seeds, routes)
def test_parts_add_up(seed, route):
    part, (raws, targets) = partition(seed), batch(seed, 5 * 3 + 6)
    out = RoutedLoss(part, **route)(raws, targets)
    close(out["loss"], 2 * (out["box"] + out["obj"] + out["cls"]))
    for k, gain in dict(box=.05, obj=1., cls=.5).items():
        close(out[k], gain * sum(float(w) * out[f"h{h}/{k}"] for h, w in enumerate(part.weights)))


@quick
@given(seeds)
def test_split_leaves_the_trunk_gradient(seed):
    part = partition(seed)
    part = Partition([Head(h.name, h.classes) for h in part.heads], part.names, "equal weights")
    raws, targets = batch(seed, 5 + 6)
    _, due = value_and_grads(RoutedLoss(Partition.single(part.names)), raws, targets)
    rows = [a * 11 + r for a in range(3) for r in [*range(5)] * 3 + [*range(5, 11)]]
    loss = RoutedLoss(part, reduce="trunk", others="ignore", negatives="all")
    out = loss([r[:, rows] for r in raws], targets)
    for a, b in zip(torch.autograd.grad(out["loss"], raws), due): close(a, b, 1e-6)


@quick
@given(seeds)
def test_ignored_objects_leave_other_heads_alone(seed):
    part, (raws, targets) = partition(seed), batch(seed, 5 * 3 + 6)
    targets = targets[torch.tensor(part.head_of)[targets[:, 1].long()] == 0]
    m = match_anchors(targets, [r.shape[2:] for r in raws], ANCHORS, STRIDES)
    places = list(zip(*(v.split(m.sizes) for v in (m.image, m.anchor, m.gy, m.gx))))
    for reduce in ("trunk", "head"):
        _, grads = value_and_grads(RoutedLoss(part, reduce=reduce, others="ignore", negatives="head"), raws, targets)
        for g, at in zip(grads, places):
            others = [*range(5, 15), *(15 + c for h in part.heads[1:] for c in h.classes)]
            assert (per_anchor(g)[at][:, others] == 0).all()


@pytest.mark.parametrize("nh", [1, 3])
@pytest.mark.parametrize("focal", [0., .5, 1.5])
def test_extreme_logits_stay_finite(nh, focal):
    raws, targets = batch(1, 5 * nh + 6)
    raws = [(100 * r.detach()).requires_grad_() for r in raws]
    part = partition(1) if nh == 3 else Partition.single(list("abcdef"))
    out, grads = value_and_grads(RoutedLoss(part, others="ignore", focal=focal), raws, targets)
    assert all(torch.isfinite(v).all() for v in (*out.values(), *grads))


def test_no_targets_pays_objectness_only():
    raws, _ = batch(2, 5 * 3 + 6)
    out, grads = value_and_grads(RoutedLoss(partition(2)), raws, torch.zeros(0, 6))
    assert out["box"] == out["cls"] == 0 and out["obj"] > 0
    for g in grads:
        rows = per_anchor(g)
        assert (rows[..., 4:15:5] > 0).all() and (rows[..., 15:] == 0).all()


def test_half_precision_and_autocast():
    raws, targets = batch(3, 5 * 3 + 6)
    loss = RoutedLoss(partition(3))
    due = loss(raws, targets)["loss"]
    with torch.autocast("cpu", torch.bfloat16): out = loss(raws, targets)
    torch.testing.assert_close(out["loss"], due, rtol=0, atol=0)
    low = [r.detach().bfloat16().requires_grad_() for r in raws]
    grads = torch.autograd.grad(loss(low, targets)["loss"], low)
    assert {g.dtype for g in grads} == {torch.bfloat16}
