"""`check` on folders of reference numbers: the peers' own, one that our model wrote, and planted errors in it."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from mhdet.model.assign import match_anchors
from mhdet.data.boxes import to_cxcywh
from mhdet.tools.conformance import check, draw_images, draw_weights
from mhdet.model.detector import Detector, decode
from mhdet.model.multihead import per_anchor
from mhdet.model.weights import load_foreign, to_foreign
from mhdet.model.loss import RoutedLoss
from mhdet.partition.heads import Head, Partition

FIXTURES = Path(__file__).resolve().parents[2] / "shared/fixtures"
needs_fixtures = pytest.mark.skipif(not FIXTURES.is_dir(), reason="../shared/fixtures is absent")
judged = lambda folder: [r for r in check(folder) if r["ok"] is not None]


def write(folder, name, spec, **arrays):
    (folder / f"{name}.json").write_text(json.dumps(spec))
    np.savez(folder / f"{name}.npz", **arrays)


def parts(raw, partition):
    "Rows of each head of a raw map, (B, A, H, W, 5 + nc of the head), as numpy."
    rows, nh = per_anchor(raw).detach().numpy(), partition.nh
    return [rows[..., [*range(5 * h, 5 * h + 5), *(5 * nh + c for c in head.classes)]]
            for h, head in enumerate(partition.heads)]


def named(classes, weights=None):
    names = [str(c) for c in range(sum(map(len, classes)))]
    weights = weights or [1.] * len(classes)
    return Partition([Head(str(h), c, w) for h, (c, w) in enumerate(zip(classes, weights))], names)


def answers(raws, model):
    "Decoded rows, heads one after the other."
    head, boxes = model.head, decode(raws, model.head)[0]
    rows = torch.cat([per_anchor(r).flatten(1, 3) for r in raws], 1).sigmoid()
    out = torch.zeros(len(rows), head.nh, rows.shape[1], 5 + head.nc)
    for h in range(head.nh):
        mine = head.partition.heads[h].classes
        out[:, h, :, :4] = to_cxcywh(boxes[:, :, h])
        out[:, h, :, 4] = rows[..., 5 * h + 4]
        out[:, h][..., [5 + c for c in mine]] = rows[..., [5 * head.nh + c for c in mine]]
    return out.flatten(1, 2).numpy()


def write_tiny(folder, nc=3, seed=41, size=64):
    one = named([list(range(nc))])
    state = draw_weights(to_foreign(Detector.make(one, implicit=True)), seed)
    model, images = load_foreign(state, one), draw_images(2, size, seed + 1)
    with torch.no_grad(): raws = model(images.float() / 255)
    sums = {k: state[k].double().sum().item() for k in ("model.0.conv.weight", "model.77.m.1.weight")}
    spec = dict(tiny_forward=dict(weight_seed=seed, image_seed=seed + 1, n_tensors=len(state), checksum=sums))
    write(folder, "tiny_forward", spec, image_u8=images.numpy(), decoded=answers(raws, model),
          **{f"raw{l}": parts(r, one)[0] for l, r in enumerate(raws)})


def write_multi(folder, classes, seed=51, rule_nc=7):
    many = named(classes)
    trunk = draw_weights(to_foreign(Detector.make(named([list(range(rule_nc))]), implicit=True)), seed)
    state = draw_weights(to_foreign(Detector.make(many), fused=False), seed + 1, only="model.77.")
    state |= {k: v for k, v in trunk.items() if not k.startswith("model.77.")}
    model, images = load_foreign(state, many), draw_images(1, 96, seed + 2)
    with torch.no_grad(): raws = model(images.float() / 255)
    spec = dict(trunk_weight_seed=seed, head_weight_seed=seed + 1, image_seed=seed + 2, config="own", classes=classes,
                trunk_rule_nc=rule_nc)
    write(folder, "multihead_forward", spec, image_u8=images.numpy(), merged=answers(raws, model),
          **{f"head{h}_raw{l}": p for l, r in enumerate(raws) for h, p in enumerate(parts(r, many))})


def draw_targets(rng, n, images, nc):
    place = rng.random((n, 2)), np.exp(rng.uniform(-3, -.5, (n, 2)))
    whose = rng.integers(images, size=(n, 1)), rng.integers(nc, size=(n, 1))
    return torch.tensor(np.concatenate([*whose, *place], 1), dtype=torch.float32)


def draw_maps(rng, partition):
    sizes = [(3, 3 * (5 * partition.nh + partition.nc), s, s) for s in (12, 6, 3)]
    return [torch.tensor(rng.normal(size=s), dtype=torch.float32).requires_grad_() for s in sizes]


def losses(loss, raws, targets, partition):
    "What a reference file says of one call."
    out, L = loss(raws, targets), range(len(raws))
    grads = [parts(g, partition) for g in torch.autograd.grad(out["loss"], raws)]
    norms = [[float(np.linalg.norm(grads[l][h])) for l in L] for h in range(partition.nh)]
    heads = [{f"{k}_unweighted": out[f"h{h}/{k}"].item() for k in ("box", "obj", "cls")} for h in range(partition.nh)]
    return {k: out[k].item() for k in ("loss", "box", "obj", "cls")}, norms, heads


def write_losses(folder, classes, weights, seed=61):
    rng = np.random.default_rng(seed)
    many, one = named(classes, weights), named([list(range(sum(map(len, classes))))])
    targets, raws = draw_targets(rng, 17, 3, one.nc), draw_maps(rng, one)
    hyp, spec = dict(box=.07, obj=.9, cls=.4), dict(variants=[])
    settings = dict(box_gain=.07, obj_gain=.9, cls_gain=.4)
    for smooth in (0., .2):
        values, norms, _ = losses(RoutedLoss(one, **settings, label_smoothing=smooth), raws, targets, one)
        spec["variants"].append(values | dict(label_smoothing=smooth, fl_gamma=0., grad_l2=norms[0]))
    spec |= {"hyp": hyp, "anchor_t_3.3": losses(RoutedLoss(one, **settings, anchor_t=3.3), raws, targets, one)[0],
             "empty_targets": losses(RoutedLoss(one, **settings), raws, targets[:0], one)[0]}
    loss = RoutedLoss(one)
    m = match_anchors(targets, [r.shape[2:] for r in raws], loss.anchors, loss.strides)
    lists = dict(match=torch.stack([m.image, m.anchor, m.gy, m.gx, m.cls], 1), tbox=m.tbox, anch=m.anch)
    write(folder, "plain_loss", spec, targets=targets.numpy(),
          **{f"pred{l}": parts(r, one)[0] for l, r in enumerate(raws)},
          **{f"{k}{l}": v.numpy() for k, column in lists.items() for l, v in enumerate(column.split(m.sizes))})
    raws = draw_maps(rng, many)
    values, norms, heads = losses(RoutedLoss(many, reduce="head", negatives="head", single="skip"), raws, targets, many)
    head = many.head_of[m.cls.numpy()]
    for h, due in enumerate(heads): due["matched"] = np.bincount(m.level.numpy()[head == h], minlength=3).tolist()
    variant = values | dict(label_smoothing=0., fl_gamma=0., grad_l2=norms, per_head=heads)
    spec = dict(own=dict(classes=classes, weights=weights, variants=[variant]))
    write(folder, "router_loss", spec, targets=targets.numpy(),
          **{f"own_head{h}_pred{l}": p for l, r in enumerate(raws) for h, p in enumerate(parts(r, many))})


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    "A folder of every kind, of other seeds, classes and heads than the peers'."
    folder = tmp_path_factory.mktemp("own")
    write_tiny(folder)
    write_multi(folder, [[4], [0, 3], [2, 5, 1]])
    write_losses(folder, [[2, 0], [5], [1, 4, 3]], [1., .5, 2.])
    return folder


def test_own_folder_passes(own):
    rows = judged(own)
    assert {r["fixture"] for r in rows} == {"tiny_forward", "multihead_forward", "plain_loss", "router_loss"}
    assert [r for r in rows if not r["ok"]] == []
    assert {"decoded", "merged", "matched", "match0", "box_unweighted", "grad_l2"} <= {r["quantity"] for r in rows}
    assert {"anchor_t_3.3", "empty_targets"} <= {r["variant"] for r in rows}


PLANTED = [("tiny_forward", "raw1", 0, 2e-4), ("tiny_forward", "decoded", 0, .01), ("tiny_forward", "decoded", 4, .01),
           ("tiny_forward", "image_u8", 0, 1), ("multihead_forward", "head1_raw0", 0, 2e-4),
           ("multihead_forward", "merged", 0, .01), ("plain_loss", "match0", 3, 1), ("plain_loss", "tbox2", 0, .01),
           ("plain_loss", "pred0", 4, .1), ("router_loss", "own_head2_pred1", 4, .1)]


@pytest.mark.parametrize("name, array, at, off", PLANTED, ids=lambda v: str(v))
def test_planted_error_is_found(own, tmp_path, name, array, at, off):
    for suffix in (".json", ".npz"): shutil.copy(own / (name + suffix), tmp_path)
    z = dict(np.load(tmp_path / f"{name}.npz"))
    z[array] = z[array].copy()
    z[array].flat[at] += np.asarray(off, z[array].dtype)
    np.savez(tmp_path / f"{name}.npz", **z)
    rows = judged(tmp_path)
    assert {r["fixture"] for r in rows} == {name} and not all(r["ok"] for r in rows)


def test_another_seed_is_another_network(own, tmp_path):
    for suffix in (".json", ".npz"): shutil.copy(own / f"tiny_forward{suffix}", tmp_path)
    spec = json.loads((tmp_path / "tiny_forward.json").read_text())
    spec["tiny_forward"]["weight_seed"] += 1
    (tmp_path / "tiny_forward.json").write_text(json.dumps(spec))
    wrong = {r["quantity"] for r in judged(tmp_path) if not r["ok"]}
    assert wrong >= {"raw0", "raw1", "raw2", "decoded_end_to_end", "sum of model.0.conv.weight"}
    assert "decoded" not in wrong


def test_empty_and_unknown(tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path)): check(tmp_path)
    write(tmp_path, "ap", {})
    assert [(r["fixture"], r["ok"]) for r in check(tmp_path)] == [("ap", None)]


@needs_fixtures
def test_the_peers_numbers():
    rows = judged(FIXTURES)
    assert [r for r in rows if not r["ok"]] == [] and len(rows) > 150
