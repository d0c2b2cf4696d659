"""`check` on fixtures: the reference's own, one that our model wrote, and planted errors in it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from mhdet.data.boxes import to_cxcywh
from mhdet.model.assign import match_anchors
from mhdet.model.detector import Detector, decode
from mhdet.model.loss import RoutedLoss
from mhdet.model.multihead import per_anchor
from mhdet.model.weight_files import to_foreign
from mhdet.model.weights import load_foreign
from mhdet.partition.heads import Head, Partition
from mhdet.tools.conformance import check, draw_images, draw_weights

FIXTURES = Path(__file__).resolve().parents[2] / "shared/fixtures"
needs_fixtures = pytest.mark.skipif(not FIXTURES.is_dir(), reason="../shared/fixtures is absent")


def judged(folder):
    return [r for r in check(folder) if r["ok"] is not None]


def write(folder, name, spec, **arrays):
    (folder / f"{name}.json").write_text(json.dumps(spec))
    np.savez(folder / f"{name}.npz", **arrays)


def parts(raw, partition):
    "Channels of each head of a raw map, (B, A, H, W, 5 + nc of the head), as numpy."
    channels = per_anchor(raw).detach().numpy()
    out = []
    for h, head in enumerate(partition.heads):
        own = range(5 * h, 5 * h + 5)
        classes = [5 * partition.nh + c for c in head.classes]
        out.append(channels[..., [*own, *classes]])
    return out


def named(classes, weights=None):
    names = [str(c) for c in range(sum(map(len, classes)))]
    weights = weights or [1.0] * len(classes)
    heads = []
    for h, (ids, weight) in enumerate(zip(classes, weights, strict=True)):
        heads.append(Head(str(h), ids, weight))
    return Partition(heads, names)


def predictions(raws, model):
    "Decoded predictions, heads one after the other."
    head = model.head
    boxes = decode(raws, head)[0]
    prob = torch.cat([per_anchor(r).flatten(1, 3) for r in raws], 1).sigmoid()
    out = torch.zeros(len(prob), head.nh, prob.shape[1], 5 + head.nc)
    for h in range(head.nh):
        classes = head.partition.heads[h].classes
        out[:, h, :, :4] = to_cxcywh(boxes[:, :, h])
        out[:, h, :, 4] = prob[..., 5 * h + 4]
        out[:, h][..., [5 + c for c in classes]] = prob[..., [5 * head.nh + c for c in classes]]
    return out.flatten(1, 2).numpy()


def write_tiny(folder, nc=3, seed=41, size=64):
    one = named([list(range(nc))])
    state = draw_weights(to_foreign(Detector.make(one, implicit=True)), seed)
    model = load_foreign(state, one, implicit=True)
    images = draw_images(2, size, seed + 1)
    with torch.no_grad():
        raws = model(images.float() / 255)
    summed = "model.0.conv.weight", "model.77.m.1.weight"
    spec = dict(
        weight_seed=seed,
        image_seed=seed + 1,
        n_tensors=len(state),
        checksum={k: state[k].double().sum().item() for k in summed},
    )
    arrays = {f"raw{l}": parts(r, one)[0] for l, r in enumerate(raws)}
    arrays |= dict(image_u8=images.numpy(), decoded=predictions(raws, model))
    write(folder, "tiny_forward", dict(tiny_forward=spec), **arrays)


def write_multi(folder, classes, seed=51, rule_nc=7):
    many = named(classes)
    single = named([list(range(rule_nc))])
    trunk = draw_weights(to_foreign(Detector.make(single, implicit=True)), seed)
    state = draw_weights(to_foreign(Detector.make(many), fused=False), seed + 1, only="model.77.")
    state |= {k: v for k, v in trunk.items() if not k.startswith("model.77.")}
    model = load_foreign(state, many)
    images = draw_images(1, 96, seed + 2)
    with torch.no_grad():
        raws = model(images.float() / 255)
    spec = dict(
        trunk_weight_seed=seed,
        head_weight_seed=seed + 1,
        image_seed=seed + 2,
        config="own",
        classes=classes,
        trunk_rule_nc=rule_nc,
    )
    arrays = dict(image_u8=images.numpy(), merged=predictions(raws, model))
    for l, r in enumerate(raws):
        arrays |= {f"head{h}_raw{l}": part for h, part in enumerate(parts(r, many))}
    write(folder, "multihead_forward", spec, **arrays)


def draw_targets(rng, n, images, nc):
    centre, size = rng.random((n, 2)), np.exp(rng.uniform(-3, -0.5, (n, 2)))
    image, label = rng.integers(images, size=(n, 1)), rng.integers(nc, size=(n, 1))
    return torch.tensor(np.concatenate([image, label, centre, size], 1), dtype=torch.float32)


def draw_maps(rng, partition):
    maps = []
    for side in (12, 6, 3):
        values = rng.normal(size=(3, 3 * (5 * partition.nh + partition.nc), side, side))
        maps.append(torch.tensor(values, dtype=torch.float32).requires_grad_())
    return maps


def losses(loss, raws, targets, partition):
    "What a reference file holds about one call: values, gradient norms, terms per head."
    out = loss(raws, targets)
    grads = [parts(g, partition) for g in torch.autograd.grad(out["loss"], raws)]
    terms = "box", "obj", "cls"
    norms, heads = [], []
    for h in range(partition.nh):
        norms.append([float(np.linalg.norm(level[h])) for level in grads])
        heads.append({f"{k}_unweighted": out[f"h{h}/{k}"].item() for k in terms})
    return {k: out[k].item() for k in ("loss", *terms)}, norms, heads


def write_plain_loss(folder, one, raws, targets):
    "Returns the matches."
    settings = dict(box_gain=0.07, obj_gain=0.9, cls_gain=0.4)
    variants = []
    for smooth in (0.0, 0.2):
        loss = RoutedLoss(one, **settings, label_smoothing=smooth)
        values, norms, _ = losses(loss, raws, targets, one)
        variants.append(values | dict(label_smoothing=smooth, fl_gamma=0.0, grad_l2=norms[0]))
    spec = {
        "hyp": dict(box=0.07, obj=0.9, cls=0.4),
        "variants": variants,
        "anchor_t_3.3": losses(RoutedLoss(one, **settings, anchor_t=3.3), raws, targets, one)[0],
        "empty_targets": losses(RoutedLoss(one, **settings), raws, targets[:0], one)[0],
    }
    loss = RoutedLoss(one)
    m = match_anchors(targets, [r.shape[2:] for r in raws], loss.anchors, loss.strides)
    match = torch.stack([m.image, m.anchor, m.gy, m.gx, m.cls], 1)
    arrays = {f"pred{l}": parts(r, one)[0] for l, r in enumerate(raws)}
    for k, column in dict(match=match, tbox=m.tbox, anch=m.anch).items():
        arrays |= {f"{k}{l}": v.numpy() for l, v in enumerate(column.split(m.sizes))}
    write(folder, "plain_loss", spec, targets=targets.numpy(), **arrays)
    return m


def write_losses(folder, classes, weights, seed=61):
    rng = np.random.default_rng(seed)
    many, one = named(classes, weights), named([list(range(sum(map(len, classes))))])
    targets = draw_targets(rng, 17, 3, one.nc)
    m = write_plain_loss(folder, one, draw_maps(rng, one), targets)
    raws = draw_maps(rng, many)
    loss = RoutedLoss(many, reduce="head", negatives="head", single="skip")
    values, norms, heads = losses(loss, raws, targets, many)
    head = many.head_of[m.cls.numpy()]
    for h, expected in enumerate(heads):
        expected["matched"] = np.bincount(m.level.numpy()[head == h], minlength=3).tolist()
    variant = values | dict(label_smoothing=0.0, fl_gamma=0.0, grad_l2=norms, per_head=heads)
    spec = dict(own=dict(classes=classes, weights=weights, variants=[variant]))
    arrays = {}
    for l, r in enumerate(raws):
        arrays |= {f"own_head{h}_pred{l}": part for h, part in enumerate(parts(r, many))}
    write(folder, "router_loss", spec, targets=targets.numpy(), **arrays)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    "A folder of every kind, with other seeds, classes and heads than the reference's."
    folder = tmp_path_factory.mktemp("own")
    write_tiny(folder)
    write_multi(folder, [[4], [0, 3], [2, 5, 1]])
    write_losses(folder, [[2, 0], [5], [1, 4, 3]], [1.0, 0.5, 2.0])
    return folder


def test_own_folder_passes(own):
    rows = judged(own)
    kinds = {"tiny_forward", "multihead_forward", "plain_loss", "router_loss"}
    assert {r["fixture"] for r in rows} == kinds
    assert [r for r in rows if not r["ok"]] == []
    quantities = {"decoded", "merged", "matched", "match0", "box_unweighted", "grad_l2"}
    assert quantities <= {r["quantity"] for r in rows}
    assert {"anchor_t_3.3", "empty_targets"} <= {r["variant"] for r in rows}


PLANTED = [
    ("tiny_forward", "raw1", 0, 2e-4),
    ("tiny_forward", "decoded", 0, 0.01),
    ("tiny_forward", "decoded", 4, 0.01),
    ("tiny_forward", "image_u8", 0, 1),
    ("multihead_forward", "head1_raw0", 0, 2e-4),
    ("multihead_forward", "merged", 0, 0.01),
    ("plain_loss", "match0", 3, 1),
    ("plain_loss", "tbox2", 0, 0.01),
    ("plain_loss", "pred0", 4, 0.1),
    ("router_loss", "own_head2_pred1", 4, 0.1),
]


@pytest.mark.parametrize("name, array, at, off", PLANTED, ids=lambda v: str(v))
def test_planted_error_is_detected(own, tmp_path, name, array, at, off):
    for suffix in (".json", ".npz"):
        shutil.copy(own / (name + suffix), tmp_path)
    z = dict(np.load(tmp_path / f"{name}.npz"))
    z[array] = z[array].copy()
    z[array].flat[at] += np.asarray(off, z[array].dtype)
    np.savez(tmp_path / f"{name}.npz", **z)
    rows = judged(tmp_path)
    assert {r["fixture"] for r in rows} == {name} and not all(r["ok"] for r in rows)


def test_another_seed_is_another_network(own, tmp_path):
    for suffix in (".json", ".npz"):
        shutil.copy(own / f"tiny_forward{suffix}", tmp_path)
    spec = json.loads((tmp_path / "tiny_forward.json").read_text())
    spec["tiny_forward"]["weight_seed"] += 1
    (tmp_path / "tiny_forward.json").write_text(json.dumps(spec))
    wrong = {r["quantity"] for r in judged(tmp_path) if not r["ok"]}
    assert wrong >= {"raw0", "raw1", "raw2", "decoded_end_to_end", "sum of model.0.conv.weight"}
    assert "decoded" not in wrong


def test_empty_and_unknown(tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        check(tmp_path)
    write(tmp_path, "ap", {})
    assert [(r["fixture"], r["ok"]) for r in check(tmp_path)] == [("ap", None)]


@needs_fixtures
def test_the_references_numbers():
    rows = judged(FIXTURES)
    assert [r for r in rows if not r["ok"]] == [] and len(rows) > 150
