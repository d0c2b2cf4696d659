"""Properties of assignment and loss that no option may break, on small random batches."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mhdet.model.assign import match_anchors
from mhdet.model.loss import RoutedLoss, naive_loss
from mhdet.model.multihead import ANCHORS, STRIDES, per_anchor
from mhdet.partition.heads import Head, Partition

ROUTES = dict(
    reduce=st.sampled_from(["trunk", "head", "balanced"]),
    others=st.sampled_from(["background", "ignore"]),
    negatives=st.sampled_from(["all", "head"]),
    single=st.sampled_from(["train", "skip"]),
)
routes, seeds = st.fixed_dictionaries(ROUTES), st.integers(0, 10**6)
quick = settings(max_examples=25, deadline=None)


def random_batch(seed, channels, most=12, nc=6, B=2, size=(96, 64)):
    "Raw maps in a random memory layout, and 0 to `most` targets, some of them twice."
    g = torch.Generator().manual_seed(seed)
    H, W = size
    raws = [torch.randn(B, 3 * channels, H // s, W // s, generator=g) for s in STRIDES]
    if seed % 2:
        raws = [r.contiguous(memory_format=torch.channels_last) for r in raws]
    n = int(torch.randint(most + 1, (1,), generator=g))
    image = torch.randint(B, (n, 1), generator=g)
    cls = torch.randint(nc, (n, 1), generator=g)
    centre = torch.rand(n, 2, generator=g)
    size = 0.05 + 0.6 * torch.rand(n, 2, generator=g)
    targets = torch.cat([image, cls, centre, size], 1)
    return [r.requires_grad_() for r in raws], torch.cat([targets, targets[: n // 3]])


def random_partition(seed, nh=3, nc=6):
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(nc, generator=g).tolist()
    cuts = 1 + torch.randperm(nc - 1, generator=g)[: nh - 1].sort().values
    edges = [0, *cuts.tolist(), nc]
    heads = []
    for h in range(nh):
        heads.append(Head(str(h), order[edges[h] : edges[h + 1]], 1 + 0.25 * h))
    return Partition(heads, list("abcdefghij"[:nc]), "random")


def random_order(seed, n):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()


def value_and_grads(loss, raws, targets):
    out = loss(raws, targets)
    return out, torch.autograd.grad(out["loss"], raws)


def close(a, b, tol=1e-5):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


@quick
@given(seeds, routes)
def test_one_head_is_the_plain_loss(seed, route):
    raws, targets = random_batch(seed, 5 + 6)
    one = Partition.single(list("abcdef"))
    out, grads = value_and_grads(RoutedLoss(one, **route), raws, targets)
    expected, expected_grads = value_and_grads(naive_loss, raws, targets)
    for k in expected:
        close(out[k], expected[k])
    for a, b in zip(grads, expected_grads, strict=True):
        close(a, b, 1e-6)


@quick
@given(seeds, routes)
def test_permuting_heads_changes_nothing(seed, route):
    part, order = random_partition(seed), random_order(seed, 3)
    raws, targets = random_batch(seed, 5 * 3 + 6)
    out, grads = value_and_grads(RoutedLoss(part, **route), raws, targets)
    other = Partition([part.heads[h] for h in order], part.names, "permuted")
    of_anchor = [*(5 * h + i for h in order for i in range(5)), *range(15, 21)]
    channels = [a * 21 + c for a in range(3) for c in of_anchor]
    swapped = [r[:, channels].detach().requires_grad_() for r in raws]
    moved, moved_grads = value_and_grads(RoutedLoss(other, **route), swapped, targets)
    close(moved["loss"], out["loss"])
    for i, h in enumerate(order):
        close(moved[f"h{i}/obj"], out[f"h{h}/obj"])
    for a, b in zip(moved_grads, grads, strict=True):
        close(a, b[:, channels], 1e-6)


@quick
@given(seeds, routes)
def test_permuting_classes_changes_nothing(seed, route):
    part, order = random_partition(seed), random_order(seed, 6)
    raws, targets = random_batch(seed, 5 * 3 + 6)
    out = RoutedLoss(part, **route)(raws, targets)
    position = {c: i for i, c in enumerate(order)}
    heads = [Head(h.name, [position[c] for c in h.classes], h.weight) for h in part.heads]
    other = Partition(heads, [part.names[c] for c in order], "permuted")
    of_anchor = [*range(15), *(15 + c for c in order)]
    channels = [a * 21 + c for a in range(3) for c in of_anchor]
    renamed = targets.clone()
    renamed[:, 1] = torch.tensor([position[int(c)] for c in targets[:, 1]])
    moved = RoutedLoss(other, **route)([r[:, channels] for r in raws], renamed)
    for k in out:
        close(moved[k], out[k])


@quick
@given(seeds, routes)
def test_parts_add_up(seed, route):
    part, (raws, targets) = random_partition(seed), random_batch(seed, 5 * 3 + 6)
    out = RoutedLoss(part, **route)(raws, targets)
    close(out["loss"], 2 * (out["box"] + out["obj"] + out["cls"]))
    for k, gain in dict(box=0.05, obj=1.0, cls=0.5).items():
        weighted = sum(float(w) * out[f"h{h}/{k}"] for h, w in enumerate(part.weights))
        close(out[k], gain * weighted)


@quick
@given(seeds)
def test_split_leaves_the_trunk_gradient(seed):
    part = random_partition(seed)
    part = Partition([Head(h.name, h.classes) for h in part.heads], part.names, "equal weights")
    raws, targets = random_batch(seed, 5 + 6)
    _, expected = value_and_grads(RoutedLoss(Partition.single(part.names)), raws, targets)
    channels = [a * 11 + c for a in range(3) for c in [*range(5)] * 3 + [*range(5, 11)]]
    loss = RoutedLoss(part, reduce="trunk", others="ignore", negatives="all")
    out = loss([r[:, channels] for r in raws], targets)
    for a, b in zip(torch.autograd.grad(out["loss"], raws), expected, strict=True):
        close(a, b, 1e-6)


@quick
@given(seeds)
def test_ignored_objects_leave_other_heads_alone(seed):
    part, (raws, targets) = random_partition(seed), random_batch(seed, 5 * 3 + 6)
    targets = targets[torch.tensor(part.head_of)[targets[:, 1].long()] == 0]
    m = match_anchors(targets, [r.shape[2:] for r in raws], ANCHORS, STRIDES)
    others = [*range(5, 15), *(15 + c for h in part.heads[1:] for c in h.classes)]
    for reduce in ("trunk", "head", "balanced"):
        loss = RoutedLoss(part, reduce=reduce, others="ignore", negatives="head")
        _, grads = value_and_grads(loss, raws, targets)
        for g, place in zip(grads, m.places(), strict=True):
            assert (per_anchor(g)[place][:, others] == 0).all()


@pytest.mark.parametrize("nh", [1, 3])
@pytest.mark.parametrize("focal", [0.0, 0.5, 1.5])
def test_extreme_logits_stay_finite(nh, focal):
    raws, targets = random_batch(1, 5 * nh + 6)
    raws = [(100 * r.detach()).requires_grad_() for r in raws]
    part = random_partition(1) if nh == 3 else Partition.single(list("abcdef"))
    loss = RoutedLoss(part, others="ignore", focal=focal)
    out, grads = value_and_grads(loss, raws, targets)
    assert all(torch.isfinite(v).all() for v in (*out.values(), *grads))


def test_without_targets_there_is_objectness_loss_only():
    raws, _ = random_batch(2, 5 * 3 + 6)
    out, grads = value_and_grads(RoutedLoss(random_partition(2)), raws, torch.zeros(0, 6))
    assert out["box"] == out["cls"] == 0 and out["obj"] > 0
    for g in grads:
        outputs = per_anchor(g)
        assert (outputs[..., 4:15:5] > 0).all() and (outputs[..., 15:] == 0).all()


def test_half_precision_and_autocast():
    raws, targets = random_batch(3, 5 * 3 + 6)
    loss = RoutedLoss(random_partition(3))
    expected = loss(raws, targets)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        out = loss(raws, targets)
    torch.testing.assert_close(out["loss"], expected, rtol=0, atol=0)
    low = [r.detach().bfloat16().requires_grad_() for r in raws]
    grads = torch.autograd.grad(loss(low, targets)["loss"], low)
    assert {g.dtype for g in grads} == {torch.bfloat16}
