"""What no augmentation may do to boxes.

They leave neither the image nor their object, and depend on nothing but the seed.
"""

import math
from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mhdet.core.config import DataConfig
from mhdet.data.augment import (
    PROBABILITIES,
    HeadAware,
    affine,
    compose,
    cutmix,
    hflip,
    hsv,
    mixup,
    noise,
    pad,
    random_erase,
    random_matrix,
)
from mhdet.data.dataset import DetDataset
from mhdet.data.toy import toy_dataset

pytestmark = pytest.mark.usefixtures("one_thread")

quick = settings(max_examples=30, deadline=None)
seeds, share = st.integers(0, 2**32 - 1), st.floats(0, 1)
SIDE, DS = 64, DetDataset(toy_dataset(24, size=64), 64)
SOURCES = DS.squares.copy()
CFG = st.fixed_dictionaries(
    dict.fromkeys(PROBABILITIES, share)
    | dict(
        degrees=st.floats(0, 180),
        shear=st.floats(0, 20),
        translate=st.floats(0, 0.5),
        scale=st.floats(0, 0.9),
        perspective=st.floats(0, 0.45),
        hsv_h=st.floats(0, 0.5),
        hsv_s=share,
        hsv_v=share,
        noise=st.floats(0, 0.5),
        pad=st.floats(0, 1),
    )
).map(lambda d: DataConfig(**d))


def rng(seed):
    return np.random.default_rng(seed)


def extent(mask):
    "The box around the true pixels of a mask (H, W), float32 (4,)."
    ys, xs = torch.nonzero(mask, as_tuple=True)
    return torch.stack([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]).float()


def painted(seed):
    "A black image with one rectangle of at least 10 px, and its box."
    (x, y), (w, h) = (np.array([[0], [10]]) + rng(seed).integers(0, 40, (2, 2))).tolist()
    x, y = min(x, SIDE - w), min(y, SIDE - h)
    image = torch.zeros(3, SIDE, SIDE)
    image[:, y : y + h, x : x + w] = 255
    return image, torch.tensor([[x, y, x + w, y + h]]).float(), torch.tensor([7])


@quick
@given(CFG, seeds, st.integers(0, 23))
def test_any_recipe_gives_boxes_inside_and_depends_on_the_seed_alone(cfg, seed, i):
    image, boxes, labels = compose(cfg)(DS, i, rng(seed))
    again = compose(cfg, epochs=9, head_of=np.zeros(12, int))(DS, i, rng(seed), epoch=8)
    assert image.shape == (3, SIDE, SIDE)
    assert (image.dtype, boxes.dtype) == (torch.uint8, torch.float32)
    assert len(boxes) == len(labels) and set(labels.tolist()) <= set(range(12))
    assert (boxes >= 0).all() and (boxes <= SIDE).all() and (boxes[:, 2:] > boxes[:, :2]).all()
    assert all(map(torch.equal, (image, boxes, labels), again))
    assert (DS.squares[i] == SOURCES[i]).all()  # the source is not written to


@quick
@given(seeds, st.floats(0, 45), st.floats(0, 15), st.floats(0, 0.4), st.sampled_from([0, 0.2, 0.4]))
def test_a_warped_rectangle_fills_its_box(seed, degrees, shear, scale, perspective):
    sample = painted(seed)
    matrix = random_matrix((SIDE, SIDE), SIDE, rng(seed), degrees, 0.2, scale, shear, perspective)
    image, boxes, labels = affine(*sample, matrix, SIDE)
    assume(len(boxes) and boxes.min() > 0.5 and boxes.max() < SIDE - 0.5)
    white = torch.full_like(sample[0], 255)
    inside = affine(white, *sample[1:], matrix, SIDE)[0][0] > 250  # outside it is grey
    shown = (image[0] > 127) & inside
    assert shown.any() and (extent(shown) - boxes[0]).abs().max() < 2


@quick
@given(seeds, share)
def test_a_padded_rectangle_fills_its_box(seed, most):
    image, boxes, labels = pad(*painted(seed), rng(seed), most)
    if len(boxes):
        assert (extent(image[0] > 127) - boxes[0]).abs().max() < 2
    left, top, right, bottom = rng(seed).uniform(0, most, 4) * SIDE
    full = painted(seed)[1][0].numpy() + np.array([left, top, left, top])
    full *= SIDE / (SIDE + np.tile([left + right, top + bottom], 2))
    assert len(boxes) == (min(full[2:] - full[:2]) > 2)
    assert np.allclose(boxes, full[None][: len(boxes)], atol=1e-3)


@quick
@given(seeds, st.floats(0.01, 0.4))
def test_a_tilt_of_nothing_is_the_plain_warp_and_no_tilt_moves_the_middle(seed, tilt):
    plain = random_matrix((SIDE, SIDE), SIDE, rng(seed), 30, 0.1, 0.3, 10)
    tilted = random_matrix((SIDE, SIDE), SIDE, rng(seed), 30, 0.1, 0.3, 10, tilt)
    image, boxes, labels = affine(*painted(seed), plain, SIDE)
    same, same_boxes, _ = affine(*painted(seed), np.vstack([plain, [0, 0, 1]]), SIDE)
    assert (image - same).abs().max() < 0.1 and torch.allclose(boxes, same_boxes, atol=1e-4)
    middle = [SIDE / 2, SIDE / 2, 1]
    assert np.allclose(tilted @ middle, [*(plain @ middle), 1])


@quick
@given(seeds, st.tuples(share, share).map(sorted))
def test_cutmix_keeps_the_share_it_states_and_boxes_of_what_is_visible(seed, area):
    a, b = painted(seed), painted(seed + 1)
    image, boxes, labels, kept = cutmix(a, (b[0], b[1], b[2] + 1), rng(seed), area)
    black, white = torch.zeros_like(a[0]), torch.full_like(a[0], 255)
    cover = cutmix((black, *a[1:]), (white, *b[1:]), rng(seed), area)[0][0] > 0
    assert torch.equal(image[0], torch.where(cover, b[0][0], a[0][0]))
    assert kept == 1 - cover.sum().item() / SIDE**2
    assert 1 - area[1] - 1e-9 <= kept
    assert kept <= 1 - area[0] + 1e-9 or area[1] - area[0] < 1 / SIDE
    visible = {7: (a[0][0] > 0) & ~cover, 8: (b[0][0] > 0) & cover}
    assert (7 in labels) == bool(visible[7].sum() >= (a[0][0] > 0).sum() / 2)
    w, h = visible[8].any(0).sum().item(), visible[8].any(1).sum().item()
    full = (b[0][0] > 0).sum().item()
    large_enough = min(w, h) > 2 and max(w, h) < 20 * min(w, h) and w * h > 0.1 * full
    assert (8 in labels) == large_enough
    for box, label in zip(boxes, labels.tolist(), strict=True):
        assert torch.equal(box, extent(visible[label]))


@quick
@given(seeds, st.tuples(share, share).map(sorted))
def test_erasing_takes_an_area_in_range(seed, area):
    image, boxes, labels = painted(seed)
    out, left, kept = random_erase(torch.full_like(image, 255), boxes, labels, rng(seed), area)
    gone = out[0] < 255
    share = gone.sum().item() / SIDE**2
    assert share <= area[1] + 1e-9 and (share >= area[0] - 1e-9 or area[1] - area[0] < 1 / SIDE)
    visible = (image[0] > 0) & ~gone
    assert bool(len(kept)) == bool(visible.sum() >= (image[0] > 0).sum() / 2)
    if len(kept):
        assert torch.equal(left[0], extent(visible))


@quick
@given(seeds, st.booleans())
def test_two_mirrors_are_none(seed, vertical):
    image, boxes, _ = painted(seed)
    once = hflip(image, boxes, vertical)
    assert torch.equal(extent(once[0][0] > 0), once[1][0])
    assert all(map(torch.equal, hflip(*once, vertical), (image, boxes)))


@quick
@given(seeds, st.floats(0, 2))
def test_values_stay_in_range(seed, strength):
    image = DS.square(seed % 24)[0]
    noisy = noise(image.float(), rng(seed), strength)
    recoloured = hsv(image, rng(seed), strength, strength, strength)
    for out in (noisy, recoloured):
        assert out.min() >= 0 and out.max() <= 255 and out.isfinite().all()


@quick
@given(seeds)
def test_the_weights_of_a_mixture_add_up_to_one(seed):
    a, b = painted(seed), painted(seed + 1)
    one = mixup(a, b, rng(seed))
    other = mixup(b, a, rng(seed))
    assert torch.allclose(one[0] + other[0], a[0] + b[0], atol=1e-3)
    assert len(one[1]) == len(other[1]) == 2


@quick
@given(st.integers(0, 12), st.integers(1, 12), st.integers(0, 12), seeds)
def test_the_last_epochs_are_single(close, epochs, epoch, seed):
    cfg = DataConfig(mosaic=1.0, mixup=1.0, close_mosaic=close)
    probability = 0.0 if epoch >= epochs - close else 1.0
    constant = compose(DataConfig(mosaic=probability, mixup=probability))
    sample = compose(cfg, epochs=epochs)(DS, 3, rng(seed), epoch=epoch)
    assert all(map(torch.equal, sample, constant(DS, 3, rng(seed))))


@pytest.fixture
def heads(tmp_path):
    def write(*rows):
        path = tmp_path / "heads.yaml"
        path.write_text("\n".join(f"head_{h}: {row}" for h, row in enumerate(rows)))
        return DataConfig(head_aware=str(path))

    return write


def test_a_head_is_drawn_as_often_as_its_objects(heads):
    cfg = heads("{degrees: 1}", "{degrees: 2}", "{degrees: 3}", "{}")
    choose = HeadAware(cfg, [0, 0, 1, 2, 3])
    r = rng(0)
    for counts in ([1, 0, 0, 0], [1, 2, 3, 4], [0, 9, 0, 1], [0, 0, 0, 0]):
        labels = torch.repeat_interleave(torch.tensor([0, 2, 3, 4]), torch.tensor(counts))
        drawn = [[1, 2, 3, 0].index(choose(labels, r).degrees) for _ in range(3000)]
        expected = np.array(counts if sum(counts) else [1] * 4) / (sum(counts) or 4)
        share = np.bincount(drawn, minlength=4) / 3000
        sd = np.sqrt(expected * (1 - expected) / 3000)
        assert (np.abs(share - expected) <= 4.5 * sd).all()


def test_a_mosaic_counts_the_objects_of_all_four_sources(heads):
    "One image of class 0, three of class 1, whose head turns them upside down."
    gt = dict(
        image=np.arange(4),
        label=np.array([0, 1, 1, 1]),
        box=np.tile([20.0, 20, 40, 40], (4, 1)),
        area=np.ones(4),
        ignore=np.zeros(4, bool),
        crowd=np.zeros(4, bool),
    )
    ds = DetDataset(replace(DS.records.subset(range(4)), gt=gt), SIDE)
    table = heads("{flipud: 0}", "{flipud: 1}")
    cfg = msgspec.structs.replace(table, mosaic=1.0, random_ratio=0.0, fliplr=0.0)
    augment = compose(cfg, head_of=[0, 1])
    plain = compose(msgspec.structs.replace(cfg, head_aware=None))
    flips, expected, n = 0, 0, 200
    for k in range(n):
        image = augment(ds, 0, rng(k))[0]
        upright = plain(ds, 0, rng(k))[0]
        flips += torch.equal(image, upright.flip(1))
        assert torch.equal(image, upright) or torch.equal(image, upright.flip(1))
        r = rng(k)
        r.random()  # whether there is a mosaic
        expected += np.mean([0, *(r.integers(4, size=3) > 0)])
    assert abs(flips - expected) < 4 * math.sqrt(n / 4)


@pytest.mark.parametrize(
    "row, words",
    [
        ("{degrees: -1}", "head_0: degrees must be in [0, inf), got -1.0"),
        ("{mixup: 2}", "a probability in [0, 1], got 2.0"),
        ("{scale: 1}", "scale must be in [0, 1), got 1.0"),
        ("{mosaic: 1}", "unknown 'mosaic'"),
        ("{turn: 1}", "unknown 'turn'; allowed are"),
        ("{shear: .nan}", "shear must be in"),
        ("[1]", "Expected `object`"),
        ("{flipud: yes}", "Expected `float`"),
        ("{}\nhead_7: {}", "has head_0, head_7; the classes are in head_0"),
        ("", "Expected `object`"),
    ],
)
def test_a_bad_table_is_refused_in_one_line(heads, row, words):
    with pytest.raises(ValueError) as e:
        compose(heads(row), head_of=[0, 0])
    message = str(e.value)
    assert words in message
    assert "heads.yaml" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(blur=1.5), "blur must be a probability"),
        (dict(random_ratio=-0.1), "random_ratio must be a probability"),
        (dict(perspective=0.5), "perspective must be in [0, 0.5)"),
        (dict(pad=math.nan), "pad must be in"),
        (dict(close_mosaic=-1), "close_mosaic must be in"),
        (dict(head_aware="x.yaml"), "which class is in which head"),
    ],
)
def test_a_bad_config_is_refused(change, words):
    with pytest.raises(ValueError) as e:
        compose(DataConfig(**change))
    assert words in str(e.value)
