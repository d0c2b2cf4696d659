"""Three scales: what is too slow or too dull for the chapters."""

import copy
import shlex

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from mhdet.cli.commands import app
from mhdet.data.dataset import DetDataset, loader
from mhdet.data.toy import toy_dataset
from mhdet.model.multihead import per_anchor
from mhdet.threescale.detector import PRIORS, ThreeScale, decode, select_confident
from mhdet.threescale.loss import PRESETS, LossEpoch, ThreeScaleLoss, fill_slots, yolo_terms
from mhdet.training.learner import Learner
from mhdet.training.schedules import FreezeStages, make_optimizer


@pytest.fixture(scope="module")
def toys():
    return DetDataset(toy_dataset(16, size=64), 64)


def make(names=12, **options):
    torch.manual_seed(0)
    return ThreeScale(names, **(dict(trunk="toy", width=0.125, norm="gn") | options))


def maps(images, nc, shapes, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(images, 3 * (5 + nc), *s, generator=g) for s in shapes]


def some_targets(n, images, nc, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randint(m, (n,), generator=g) for m in (images, nc)], 1)
    return torch.cat([ids.float(), torch.rand(n, 4, generator=g) * 0.9 + 0.05], 1)


WIDE = [(8, 12), (4, 6), (2, 3)]  # 64 x 96 px


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("w", ["exp", "power"])
def test_terms_do_not_depend_on_memory_order_or_on_the_order_of_images(preset, w):
    model = make(5, w=w)
    raws, t = maps(3, 5, WIDE), some_targets(20, 3, 5)
    expected = ThreeScaleLoss(model, preset)(raws, t)
    last = [r.contiguous(memory_format=torch.channels_last) for r in raws]
    turned = [r.flip(0) for r in raws]
    other = t.clone()
    other[:, 0] = 2 - t[:, 0]
    for a, b in ((last, t), (turned, other)):
        for name, value in ThreeScaleLoss(model, preset)(a, b).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4)


def test_a_batch_is_the_sum_of_its_images():
    raws, t = maps(3, 4, WIDE), some_targets(15, 3, 4)
    whole, parts = yolo_terms(raws, t), []
    for i in range(3):
        own = t[t[:, 0] == i].clone()
        own[:, 0] = 0
        parts.append(yolo_terms([r[i : i + 1] for r in raws], own))
    for name, value in whole.items():
        torch.testing.assert_close(value, sum(p[name] for p in parts), rtol=1e-4, atol=1e-4)


def test_many_objects_in_few_cells():
    t = some_targets(2000, 2, 3)
    s = fill_slots(t, WIDE)
    for level, (H, W) in enumerate(WIDE):
        cell = (s.image * H + s.gy[level]) * W + s.gx[level]
        counts = torch.bincount(cell, minlength=2 * H * W)
        assert int(s.dropped[level]) == int((counts - 3).clamp(min=0).sum())
        kept = s.kept[level]
        place = cell[kept] * 3 + s.slot[level][kept]
        assert len(place.unique()) == len(place)  # nobody shares a slot
    assert all(v.isfinite() for v in yolo_terms(maps(2, 3, WIDE), t).values())


def test_extreme_maps_are_finite_but_for_the_prior_term():
    raws = [50 * m for m in maps(1, 3, WIDE)]
    raws = [m.clamp(-80, 40).requires_grad_() for m in raws]
    terms = yolo_terms(raws, some_targets(6, 1, 3), epoch=60)
    sum(terms.values()).backward()
    assert all(v.isfinite() for v in terms.values())
    assert all(m.grad.isfinite().all() for m in raws)


def test_no_gradient_reaches_what_has_no_loss():
    "Without objects only objectness, and sides by the prior term, have gradients."
    raws = [m.requires_grad_() for m in maps(1, 3, WIDE)]
    sum(yolo_terms(raws, torch.zeros(0, 6)).values()).backward()
    for m in raws:
        grad = per_anchor(m.grad)
        assert not grad[..., :2].any() and not grad[..., 5:].any()
        assert grad[..., 2:5].all()


def weights_after(model, ds, batch, accumulate, clip=0.0):
    model = copy.deepcopy(model)
    optimizer = make_optimizer(model, "sgd", lr=1e-3 / 16, momentum=0.9, weight_decay=0.0)
    batches = loader(ds, batch, shuffle=False, drop_last=True)
    options = dict(device="cpu", precision="fp32", accumulate=accumulate, clip=clip)
    Learner(model, ThreeScaleLoss(model), optimizer, batches, [LossEpoch()], **options).fit(2)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("clip", [0.0, 20.0])
def test_accumulated_batches_are_one_batch(toys, clip):
    model = make()
    whole = weights_after(model, toys, 16, 1, clip)
    parts = weights_after(model, toys, 4, 4, clip)
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert (whole - parts).norm() < 1e-3 * (whole - start).norm()


def test_bf16_and_a_frozen_backbone(toys):
    model = make()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = make_optimizer(model, "sgd", lr=1e-3 / 16)
    callbacks = [LossEpoch(), FreezeStages(model.parts(), {0: "backbone", 1: None})]
    batches = loader(toys, 8, shuffle=False)
    learner = Learner(
        model, ThreeScaleLoss(model), optimizer, batches, callbacks, device="cpu", precision="bf16"
    )
    learner.fit(1)
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved and not any(k.startswith("trunk") for k in moved)
    learner.fit(2)
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert any(k.startswith("trunk") for k in moved)


def test_decode_ends_what_training_perfects():
    "Maps whose loss is minimal decode to the targets."
    t = torch.tensor([[0, 2, 0.3, 0.4, 0.2, 0.3], [0, 0, 0.8, 0.7, 0.25, 0.2]])
    raws = [torch.zeros_like(m).requires_grad_() for m in maps(1, 3, WIDE)]
    optimizer = torch.optim.Adam(raws, lr=0.3)
    for _ in range(150):
        optimizer.zero_grad()
        sum(yolo_terms(raws, t, PRIORS, epoch=60).values()).backward()
        optimizer.step()
    model = make(3)
    d = model.detections([r.detach() for r in raws], conf=0.5)
    assert sorted(d.label.tolist()) == [0, 2]  # suppression leaves one of three grids
    for box, label in zip(d.box, d.label, strict=True):
        cx, cy, w, h = next(r[2:] for r in t if r[1] == label) * torch.tensor([96, 64, 96, 64])
        expected = torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])
        torch.testing.assert_close(box, expected, atol=0.5, rtol=0)
    assert decode(raws)[0].shape == (1, 3 * (96 + 24 + 6), 1, 4)


def test_equal_scores_are_cut_by_number():
    score = torch.full((100,), 0.5)
    assert int(select_confident(score).sum()) == 5
    assert int(select_confident(score, rule="source").sum()) == 0


def test_resnet18_takes_a_step(toys):
    model = make(12, trunk="torchvision/resnet18", width=0.25, norm="bn")
    images, targets, _, _ = next(iter(loader(toys, 4, shuffle=False)))
    loss = ThreeScaleLoss(model)(model(images.float() / 255), targets)["loss"]
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_gives_the_terms_of_the_cpu():
    raws, t = maps(3, 5, WIDE), some_targets(30, 3, 5)
    for preset in PRESETS:
        model = make(5)
        here = ThreeScaleLoss(model, preset)(raws, t)
        there = ThreeScaleLoss(model.cuda(), preset)([r.cuda() for r in raws], t.cuda())
        for name, value in here.items():
            torch.testing.assert_close(there[name].cpu(), value, rtol=1e-4, atol=1e-3)
    assert len(model.detect(torch.rand(1, 3, 64, 96, device="cuda"), conf=0.0).score) > 0


def test_commands_on_a_run_of_three_scales(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def mhdet(line):
        found = CliRunner().invoke(app, shlex.split(line))
        return found.exit_code, found.stdout, found.stderr

    words = "data=toy:40 imgsz=64 batch=8 width=0.125 workers=0 trunk=toy lr=0.002 clip=20"
    line = f"train {words} 'three_scale={{lambda_obj: 20}}' epochs=2 keep_every=1 run=scales"
    assert mhdet(line)[0] == 0
    code, out, err = mhdet("eval scales --json")
    assert code == 0 and "AP50" in out, err
    code, _, err = mhdet("train --from scales@1 run=further epochs=3 schedule=constant")
    assert code == 0, err
    flow = pd.read_csv("runs/further/restarts.csv")
    assert flow["epoch"].tolist() == [2] and flow["reason"].tolist() == ["from scales@1"]
    refused = {
        "export scales --out x.onnx": "to_onnx: expected a Detector, got a ThreeScale",
        "train run=x weights=scales data=toy:40 width=0.125 imgsz=64": "of another design",
        "train run=x data=toy:40 three_scale=5": "three_scale: Expected `object | null`, got 5",
    }
    for line, words in refused.items():
        code, _, err = mhdet(line)
        assert code != 0 and words in err and err.count("\n") == 1, (line, err)
