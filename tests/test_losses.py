"""Losses: they are what the protocol says, their gradients are right, and nothing turns them into NaN."""
import copy
import pickle
from collections import Counter

import cv2
import numpy as np
import pandas as pd
import pytest
import segmentation_models_pytorch as smp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import jaccard_score
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conftest import patch
from dli.data.magnetic import MT_CLASSES, find_magnetic_tiles
from dli.data.masks import one_hot, values_can_be_read
from dli.network.losses import LOSSES, Dice, FocalOfMeans, Loss, Lovasz, WeightedBCE, lovasz_slopes, make_loss
from dli.network.weights import authors_weights, effective_weights, image_weights, pixel_weights

IMAGES, PIXELS = [92, 68, 46, 26, 82], [700, 10540, 820, 15990, 71950]
seeds = st.integers(0, 2**31 - 1)


def batch(seed, b=2, k=5, h=6, w=7, scale=3.0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(b, k, h, w, generator=g, dtype=dtype) * scale, torch.randint(0, k + 1, (b, h, w), generator=g)


def loss_of(name, **kwargs):
    return make_loss(name, IMAGES, PIXELS, **kwargs)


# Targets

@given(seeds, st.integers(1, 7), st.sampled_from([torch.uint8, torch.int32, torch.int64]))
@settings(deadline=None)
def test_one_hot_and_back(seed, classes, dtype):
    masks = torch.randint(0, classes + 1, (2, 5, 4), generator=torch.Generator().manual_seed(seed)).to(dtype)
    target = one_hot(masks, classes)
    assert target.shape == (2, classes, 5, 4) and target.sum(1).max() <= 1
    assert torch.equal((target * torch.arange(1, classes + 1)[:, None, None]).sum(1), masks.long())


@pytest.mark.parametrize(
    "masks, words",
    [
        (torch.zeros(2, 3, 3), "integers .B, H, W.,.* got torch.float32"),
        (torch.zeros(3, 3, dtype=torch.int64), r"got torch.int64 \(3, 3\)"),
        (torch.full((1, 2, 2), 255), r"values 0..5, got 255..255"),
        (torch.full((1, 2, 2), -1), r"got -1..-1"),
        (torch.zeros(1, 2, 2, dtype=torch.bool), "got torch.bool"),
    ],
)
def test_one_hot_refuses(masks, words):
    with pytest.raises(ValueError, match=words):
        one_hot(masks, 5)


# Against formulas written another way, in NumPy

def parts_by_hand(name, logits, masks, dice):
    p, t = 1 / (1 + np.exp(-logits.numpy())), one_hot(masks, 5).numpy().astype(float)
    bce = -(t * np.log(p) + (1 - t) * np.log(1 - p))
    right = np.where(t == 1, p, 1 - p)
    n, share = np.array(IMAGES), np.array(PIXELS) / sum(PIXELS)
    wce = (1 - share) / 4
    w = {"balanced": 0.0001 / (1 - 0.9999 ** n), "wce": wce, "balanced-authors": 0.0001 / (1 - 0.9999 ** wce)}
    w = w.get(name, np.ones(5))
    classification = ((1 - right) ** 2 * bce).mean() if name == "focal" else (bce.mean((0, 2, 3)) * w / w.sum()).sum()
    if name == "focal-authors":
        of_class = [bce[:, k].mean() for k in range(5)]
        classification = sum((1 - np.exp(-x)) ** 2 * x for x in of_class)
    tp, fp, fn = (p * t), p * (1 - t), (1 - p) * t
    if name == "tversky":
        tp, fp, fn = (x.sum((0, 2, 3)) for x in (tp, fp, fn))
        return classification, np.where(t.sum((0, 2, 3)) > 0, 1 - tp / (tp + 0.3 * fp + 0.7 * fn), 0).mean()
    axes = (1, 2, 3) if dice == "image" else (0, 1, 2, 3)
    return classification, (1 - (2 * tp.sum(axes) + 1e-8) / ((p + t).sum(axes) + 1e-8)).mean()


@pytest.mark.parametrize("dice", ["image", "batch"])
@pytest.mark.parametrize("name", [name for name in LOSSES if name != "lovasz"])
@given(seeds)
@settings(max_examples=10, deadline=None)
def test_formula(name, dice, seed):
    logits, masks = batch(seed)
    np.testing.assert_allclose(
        [x.item() for x in loss_of(name, dice=dice).parts(logits, masks)],
        parts_by_hand(name, logits, masks, dice),
        rtol=1e-6,
    )


@pytest.mark.parametrize("name", LOSSES)
def test_the_total_is_the_mean_of_the_parts(name):
    logits, masks = batch(1)
    classification, overlap = loss_of(name).parts(logits, masks)
    torch.testing.assert_close(loss_of(name)(logits, masks), (classification + overlap) / 2)


@given(seeds)
@settings(max_examples=30, deadline=None)
def test_lovasz_of_decisions_is_the_jaccard_loss(seed):
    decisions, masks = batch(seed, k=3)
    target = one_hot(masks % 3, 3)  # the third class is absent
    expected = [
        1 - jaccard_score(target[:, k].flatten(), decisions[:, k].flatten() > 0, zero_division=0.0) for k in range(2)
    ]
    np.testing.assert_allclose(Lovasz()(decisions.sign() * 60, target.double()).item(), np.mean(expected), rtol=1e-6)


def lovasz_by_sets(errors, truth):
    "The extension as an integral over thresholds: the mean Jaccard loss of the sets {error >= level}."
    levels = np.r_[np.sort(errors)[::-1], 0]
    loss = lambda wrong: 1 - (truth & ~wrong).sum() / (truth | wrong).sum()
    return sum((high - low) * loss(errors >= high) for high, low in zip(levels, levels[1:]))


@given(seeds)
@settings(max_examples=30, deadline=None)
def test_lovasz_of_probabilities_is_the_extension(seed):
    logits, masks = batch(seed, k=1, b=1)
    target = one_hot(masks, 1)
    errors = (target.double() - logits.sigmoid()).abs().flatten().numpy()
    np.testing.assert_allclose(
        Lovasz()(logits, target.double()).item(), lovasz_by_sets(errors, target.flatten().numpy()), rtol=1e-8
    )


def test_lovasz_slopes_add_up_to_the_whole_loss():
    truth = (torch.rand(4, 50, generator=torch.Generator().manual_seed(0)) < 0.3).double()
    torch.testing.assert_close(lovasz_slopes(truth).sum(1), torch.ones(4, dtype=torch.float64))
    assert (lovasz_slopes(truth) >= 0).all()


def test_lovasz_takes_the_mean_over_present_channels():
    logits, masks = batch(0, k=3)
    masks[masks == 2] = 0
    both = [Lovasz()(logits[:, [k]], one_hot(masks, 3)[:, [k]].double()) for k in (0, 2)]
    torch.testing.assert_close(Lovasz()(logits, one_hot(masks, 3).double()), sum(both) / 2)
    assert Lovasz()(logits, torch.zeros_like(logits)) == 0


def test_dice_is_not_smps():
    logits, masks = batch(0)
    target = one_hot(masks, 5).double()
    values = [
        Dice("image")(logits, target),
        Dice("batch")(logits, target),
        smp.losses.DiceLoss("multilabel")(logits, target),
    ]
    assert len({round(v.item(), 6) for v in values}) == 3


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_dice_of_one_image_is_the_same_either_way(seed):
    logits, masks = batch(seed, b=1)
    torch.testing.assert_close(
        loss_of("baseline", dice="image")(logits, masks), loss_of("baseline", dice="batch")(logits, masks)
    )


@pytest.mark.parametrize("name", LOSSES)
@given(seeds)
@settings(max_examples=5, deadline=None)
def test_order_of_images_does_not_matter(name, seed):
    logits, masks = batch(seed, b=4)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(loss_of(name)(logits, masks), loss_of(name)(logits[order], masks[order]))


@pytest.mark.parametrize("name", LOSSES)
def test_memory_layout_does_not_matter(name):
    logits, masks = batch(4)
    torch.testing.assert_close(
        loss_of(name)(logits.to(memory_format=torch.channels_last), masks.mT.contiguous().mT),
        loss_of(name)(logits, masks),
    )


@pytest.mark.parametrize("name", LOSSES)
@given(seeds)
@settings(max_examples=5, deadline=None)
def test_inputs_are_not_modified(name, seed):
    logits, masks = batch(seed)
    before = logits.clone(), masks.clone()
    loss_of(name)(logits, masks)
    assert torch.equal(logits, before[0]) and torch.equal(masks, before[1])


# Gradients, and numbers that would break them

@pytest.mark.parametrize("name", LOSSES)
@given(seeds, st.sampled_from(["image", "batch"]))
@settings(max_examples=4, deadline=None)
def test_gradient(name, seed, dice):
    logits, masks = batch(seed, b=2, k=3, h=3, w=3, scale=2.0)
    masks[masks == 2] = 0
    masks[1] = 0
    loss = make_loss(name, [5, 0, 7], [50, 0, 90], dice)
    assert torch.autograd.gradcheck(lambda x: loss(x, masks), (logits.requires_grad_(),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [0.0, 1e-6, 88.0, -88.0, 6e4, -6e4])
@pytest.mark.parametrize("name", LOSSES)
def test_extremes_are_finite(name, value, dtype):
    _, masks = batch(0)
    for truth in (masks, masks * 0, masks * 0 + 5):
        logits = torch.full((2, 5, 6, 7), value, dtype=dtype, requires_grad=True)
        result = make_loss(name, [3, 0, 1, 0, 9], [3, 0, 1, 0, 9])(logits, truth)
        result.backward()
        most = 6.1e4 * (5 if name == "focal-authors" else 1)  # a sum over the classes
        assert result.dtype == torch.float32 and 0 <= result < most and logits.grad.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_logits_are_computed_in_float32(name):
    logits, masks = batch(2)
    low = logits.bfloat16()
    torch.testing.assert_close(loss_of(name)(low, masks), loss_of(name)(low.float(), masks), rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss_of(name)(low, masks)
    torch.testing.assert_close(inside, loss_of(name)(low.float(), masks))


@pytest.mark.parametrize("name", LOSSES)
def test_descent_finds_the_masks(name):
    _, masks = batch(3, dtype=torch.float32)
    logits = torch.zeros(2, 5, 6, 7, requires_grad=True)
    optimizer, loss = torch.optim.Adam([logits], lr=0.3), loss_of(name)
    for _ in range(80):
        optimizer.zero_grad()
        loss(logits, masks).backward()
        optimizer.step()
    assert torch.equal(logits > 0, one_hot(masks, 5))


# Weights

counts = st.lists(st.integers(0, 10**6), min_size=1, max_size=8).filter(any)


@given(counts)
def test_weights_sum_to_one_and_are_never_nan(n):
    for weights in (pixel_weights(n), image_weights(n)):
        assert len(weights) == len(n) and min(weights) >= 0 and abs(sum(weights) - 1) < 1e-9
    assert all((w == 0) == (c == 0) for w, c in zip(image_weights(n), n))


@given(counts.filter(lambda n: len(n) > 1), st.randoms())
def test_rarer_never_weighs_less(n, random):
    for weights, present in ((pixel_weights(n), n), (image_weights(n), n)):
        pairs = sorted((c, w) for c, w in zip(present, weights) if c)
        assert all(a[1] >= b[1] - 1e-12 for a, b in zip(pairs, pairs[1:]))


def test_a_class_without_pixels_has_the_largest_pixel_weight():
    assert pixel_weights([0, 5, 10]) == [0.5, pytest.approx(1 / 3), pytest.approx(1 / 6)]
    assert pixel_weights([7]) == [1.0] and image_weights([7]) == [1.0]


def test_equal_counts_are_the_baseline():
    logits, masks = batch(5)
    for name in ("balanced", "wce", "balanced-authors"):
        torch.testing.assert_close(
            make_loss(name, [9] * 5, [9] * 5)(logits, masks), make_loss("baseline")(logits, masks)
        )


def test_an_absent_class_has_no_part_in_balanced():
    logits, masks = batch(6)
    loss = make_loss("balanced", [4, 0, 4, 4, 4]).classification
    changed = logits.clone()
    changed[:, 1] += 3
    assert loss(logits, one_hot(masks, 5).double()) == loss(changed, one_hot(masks, 5).double())


@pytest.mark.parametrize("bad", [[0, 0], [], [3, -1], [[1, 2], [3, 4]], [float("nan"), 1.0]])
@pytest.mark.parametrize("weights, name", [(pixel_weights, "pixels_per_class"), (image_weights, "images_per_class")])
def test_counts_that_make_no_sense(bad, weights, name):
    with pytest.raises(ValueError, match=f"{name}: expected one count per class"):
        weights(bad)


def test_the_authors_weights():
    "Printed by the authors' code; uneven, with the most pixels, weighs the most in their balanced loss."
    wce, balanced = [0.2490, 0.2294, 0.2483, 0.2005, 0.0729], [0.129, 0.140, 0.129, 0.160, 0.441]
    np.testing.assert_allclose(effective_weights(torch.tensor(wce).double(), 0.9999), balanced, atol=6e-4)
    assert authors_weights([3, 1]) == effective_weights(torch.tensor(pixel_weights([3, 1])).double(), 0.9999)
    pixels = np.round((1 - 4 * np.array(wce)) * 1e6)  # counts that have these weights
    loss = make_loss("balanced-authors", pixels_per_class=pixels).classification
    np.testing.assert_allclose(loss.weights, balanced, atol=6e-4)


@pytest.mark.skipif(find_magnetic_tiles() is None, reason="needs the Magnetic Tiles")
def test_the_authors_weights_from_the_photographs():
    "All masks at their own size, thresholded at 127: the printed weights to the last digit."
    folders = [find_magnetic_tiles() / f"MT_{name}" / "Imgs" for name in MT_CLASSES]
    masks = [[cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) for path in folder.glob("*.png")] for folder in folders]
    pixels = [sum((mask > 127).sum() for mask in of_class) for of_class in masks]
    assert pixels == [14311, 291489, 24742, 701215, 2508124]
    assert np.round(pixel_weights(pixels), 4).tolist() == [0.2490, 0.2294, 0.2483, 0.2005, 0.0729]
    weights = make_loss("balanced-authors", pixels_per_class=pixels).classification.weights
    np.testing.assert_allclose(weights, [0.129, 0.140, 0.129, 0.160, 0.441], atol=5e-4)


def test_focal_of_means_is_a_sum_over_channels():
    logits, masks = batch(7)
    target = one_hot(masks, 5).double()
    alone = [FocalOfMeans()(logits[:, [k]], target[:, [k]]) for k in range(5)]
    torch.testing.assert_close(FocalOfMeans()(logits, target), sum(alone))
    assert FocalOfMeans()(target * 200 - 100, target) == 0


NAMES = ("Blowhole", "Break", "Crack", "Fray", "Uneven")
SHUFFLED = (3, 1, 5, 2, 4)


@pytest.mark.parametrize("counted, classes", [
    (lambda: {k: IMAGES[k - 1] for k in SHUFFLED}, None), (lambda: {np.int64(k): IMAGES[k - 1] for k in SHUFFLED}, 5),
    (lambda: Counter({k: IMAGES[k - 1] for k in SHUFFLED}), None),
    (lambda: Counter({k: IMAGES[k - 1] for k in SHUFFLED}), NAMES),
    (lambda: {NAMES[k - 1]: IMAGES[k - 1] for k in SHUFFLED}, NAMES),
    (lambda: Counter({NAMES[k - 1]: IMAGES[k - 1] for k in SHUFFLED}), list(NAMES)),
    (lambda: pd.Series({NAMES[k - 1]: IMAGES[k - 1] for k in SHUFFLED}), NAMES),
    (lambda: pd.Series({k: IMAGES[k - 1] for k in SHUFFLED}), None),
    (lambda: pd.Series(IMAGES), None), (lambda: np.array(IMAGES), 5), (lambda: torch.tensor(IMAGES), NAMES),
    (lambda: (x for x in IMAGES), None),
    (lambda: dict(zip(NAMES, IMAGES)).values(), NAMES), (lambda: [np.float64(x) for x in IMAGES], None),
    (lambda: list(torch.tensor(IMAGES)), None),
])
def test_counts_in_any_order_that_is_certain(counted, classes):
    assert image_weights(counted(), classes=classes) == image_weights(IMAGES)
    assert pixel_weights(counted(), classes) == pixel_weights(IMAGES)
    for name, row in LOSSES.items():
        if row.counts is None:
            continue
        loss, plain = (make_loss(name, **{row.counts: c}, classes=k) for c, k in ((counted(), classes), (IMAGES, None)))
        assert torch.equal(loss.classification.weights, plain.classification.weights)


@pytest.mark.parametrize("counted, classes, words", [
    (dict(zip(NAMES, IMAGES)), None,
     "order of the classes, got a dict with the keys .'Blowhole', .*pass .counts.c. for c in classes."),
    (dict(zip(NAMES, IMAGES)), 5, "order of the classes, got a dict"),
    (Counter(dict(zip(NAMES, IMAGES))), None, "order of the classes, got a Counter"),
    (pd.Series(IMAGES, NAMES), None, "order of the classes, got a dict"),
    ({0: 900, 1: 3, 2: 4}, None, "a count for each of .1, 2, 3., none for the background, got the keys .0, 1, 2."),
    (Counter({0: 900, 1: 3}), 2, "a count for each of .1, 2., none for the background"),
    ({1: 3, 2: 4}, 3, "a count for each of .1, 2, 3.*got the keys .1, 2."),
    ({2: 3, 3: 4}, None, "a count for each of .1, 2.*got the keys .2, 3."),
    ({"Free": 900, "A": 3, "B": 4}, ("A", "B"), "a count for each of .'A', 'B'.* got the keys .'Free'"),
    ({"A": 3}, ("A", "B"), "a count for each of .'A', 'B'"), ({"A": 3, 2: 4}, ("A", "B"), "a count for each of"),
    ({}, None, "one count per class"),
    (pd.Series([3, 4], [1, 1]), None, "some classes twice"),
    ({3, 4}, None, "in the order of the classes, got {3, 4}"),
    ({1: 3, 2: 4}.keys(), None, "one count per class"), ("34", None, "one count per class"),
    (b"34", None, "one count per class"),
    (["3", "4"], None, "one count per class"), ([True, False], None, "one count per class"),
    (7, None, "one count per class.* got 7"),
    ([None, 3], None, "one count per class"), ([np.inf, 3], None, "one count per class"),
    ([np.nan, 3], None, "one count per class"),
    ([900, *IMAGES], 5, "for 5 classes, got 6; does the first count the background. Leave it out"),
    (IMAGES[:3], NAMES, "for 5 classes, got 3$"),
    (IMAGES, 0, "classes: expected the number of classes, at least 1"),
    (IMAGES, "ABCDE", "classes: expected the number of classes"),
])
def test_counts_that_can_be_taken_two_ways(counted, classes, words):
    for call in (lambda: image_weights(counted, classes=classes), lambda: pixel_weights(counted, classes),
                 lambda: make_loss("balanced", counted, classes=classes),
                 lambda: make_loss("balanced-authors", None, counted, classes=classes)):
        with pytest.raises(ValueError, match=words):
            call()


def test_a_counter_lacks_what_was_never_counted():
    assert image_weights(Counter("aab"), classes=("a", "b", "c")) == image_weights([2, 1, 0])
    assert pixel_weights(Counter({2: 5}), 3) == pixel_weights([0, 5, 0])


def test_value_counts_of_a_table():
    "pandas sorts them by frequency: their order is not that of the classes."
    labels = pd.Series(np.repeat(NAMES, IMAGES)).sample(frac=1, random_state=0)
    assert image_weights(labels.value_counts(), classes=NAMES) == image_weights(IMAGES)
    assert image_weights(labels.map({n: k for k, n in enumerate(NAMES, 1)}).value_counts()) == image_weights(IMAGES)
    with pytest.raises(ValueError, match="whose order is not known"):
        image_weights(labels.value_counts())


@pytest.mark.parametrize("beta", [0, 1, -0.5, 1.5, float("nan")])
def test_beta_between_0_and_1(beta):
    with pytest.raises(ValueError, match="beta: expected a number between 0 and 1"):
        image_weights(IMAGES, beta)


def test_shares_are_no_images():
    with pytest.raises(ValueError,
                       match="images_per_class: .*, whole numbers and no shares, got .0.2, 0.8"):
        image_weights([0.2, 0.8])
    assert pixel_weights([0.2, 0.8]) == pytest.approx([0.8, 0.2]), "where only shares matter they will do"


@pytest.mark.parametrize("weights", [[0.5, 0.6], [-0.5, 1.5], [np.nan, 1], [1.0, 2.0, 3.0]])
def test_weights_sum_to_one(weights):
    with pytest.raises(ValueError, match="weights: expected one per class, none negative, with sum 1"):
        WeightedBCE(weights)


# Pixels without weight

@pytest.mark.parametrize("dice", ["image", "batch"])
@pytest.mark.parametrize("name", LOSSES)
@given(seeds, st.sampled_from((255, -1, -100)), st.sampled_from(("columns", "rows", "an image")))
@settings(max_examples=12, deadline=None)
def test_ignored_pixels_might_not_be_there(name, dice, seed, ignore, what):
    "The loss of an image of which a part is marked is that of the rest, and its gradient is zero at what is marked."
    logits, masks = batch(seed, b=3)
    part = dict(columns=(slice(None), slice(None), slice(0, 3)), rows=(slice(None), slice(4, 6)),
                **{"an image": slice(2, 3)})[what]
    rest = dict(columns=(slice(None), slice(None), slice(3, 7)), rows=(slice(None), slice(0, 4)),
                **{"an image": slice(0, 2)})[what]
    of_rest = logits.movedim(1, 0)[(slice(None), *np.atleast_1d(rest))].movedim(0, 1)
    z, cut = (x.clone().requires_grad_() for x in (logits, of_rest))
    marked = masks.clone()
    marked[part] = ignore
    result = loss_of(name, dice=dice, ignore_index=ignore).parts(z, marked)
    expected = loss_of(name, dice=dice).parts(cut, masks[rest])
    gradient, by_rest = (torch.autograd.grad(sum(r), x)[0].transpose(0, 1) for r, x in ((result, z), (expected, cut)))
    assert not gradient[(slice(None), *np.atleast_1d(part))].any()
    if what == "an image" and dice == "image" and isinstance(loss_of(name).overlap, Dice):  # its ratio costs 0
        torch.testing.assert_close(result[1], expected[1] * 2 / 3)
        result, expected = result[:1], expected[:1]
    else:
        torch.testing.assert_close(gradient[(slice(None), *np.atleast_1d(rest))], by_rest)
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf, -torch.inf, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", LOSSES)
def test_whatever_is_at_ignored_pixels(name, dtype, value):
    logits, masks = batch(0, dtype=torch.float32)
    logits, masks[:, 2:4] = logits.to(dtype), 255
    other = logits.clone()
    other[:, :, 2:4] = value
    results = []
    for z in (logits.requires_grad_(), other.requires_grad_()):
        value_ = loss_of(name, ignore_index=255)(z, masks)
        value_.backward()
        results.append((value_.detach(), z.grad))
    for a, b in zip(*results):
        assert torch.equal(a, b)
    assert not results[1][1][:, :, 2:4].any()


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_to_learn_from(name):
    logits, masks = batch(0)
    loss = loss_of(name, ignore_index=255)(logits.requires_grad_(), masks * 0 + 255)
    loss.backward()
    assert loss == 0 and not logits.grad.any()


@pytest.mark.parametrize("name", LOSSES)
def test_without_marks_it_is_the_same(name):
    logits, masks = batch(0)
    torch.testing.assert_close(loss_of(name, ignore_index=255)(logits, masks), loss_of(name)(logits, masks))


def test_a_byte_of_255_is_not_minus_one():
    logits, masks = batch(0)
    masks = masks.byte()
    masks[0, 0, 0] = 255
    with pytest.raises(ValueError,
                       match="values 0..5, got 0..255 .255 in images .0..: where 255 marks .*pass ignore_index=255"):
        loss_of("baseline", ignore_index=-1)(logits, masks)


@pytest.mark.parametrize("args, error, words", [
    (dict(ignore_index=3), ValueError, "outside 0..5, got 3"),
    (dict(ignore_index=0), ValueError, "outside 0..5, got 0"),
    (dict(ignore_index=True), TypeError, "got True"), (dict(ignore_index=1.5), TypeError, "got 1.5")])
def test_ignore_index_is_no_class(args, error, words):
    with pytest.raises(error, match=f"ignore_index: .*{words}"):
        make_loss("baseline", classes=5, **args)
    logits, masks = batch(0)
    if args == dict(ignore_index=3):
        with pytest.raises(ValueError, match=words):
            make_loss("baseline", **args)(logits, masks)


# What goes in

@pytest.mark.parametrize("name", LOSSES)
def test_probabilities_are_no_logits(name):
    logits, masks = batch(0, h=16, w=16)
    for wrong in (logits.sigmoid(), logits.softmax(1), (logits > 0).double(), (logits * 0.1).softmax(1).bfloat16()):
        with pytest.raises(ValueError,
                           match="logits: expected values below 0, too, got .*leave the sigmoid or softmax out"):
            loss_of(name)(wrong, masks)
    with pytest.raises(ValueError, match="logits: expected floats, .* got torch.bool: predictions after a threshold"):
        loss_of(name)(logits > 0, masks)
    with pytest.raises(ValueError, match="logits: expected floats, .* got torch.int64"):
        loss_of(name)(logits.long(), masks)
    with pytest.raises(TypeError, match="logits: expected a torch tensor, got numpy.ndarray"):
        loss_of(name)(logits.numpy(), masks)
    with pytest.raises(TypeError, match="masks: expected a torch tensor, got numpy.ndarray"):
        loss_of(name)(logits, masks.numpy())


def test_logits_that_look_like_probabilities_are_doubted():
    logits, masks = batch(0, h=16, w=16)
    with pytest.warns(UserWarning, match="all values lie in 0.*before the sigmoid") as heard:
        loss_of("baseline")((logits * 0.1).sigmoid(), masks)
    assert heard[0].filename == __file__


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 100.0])
def test_logits_are_not_doubted(scale):
    loss, (logits, masks) = loss_of("baseline"), batch(0, h=16, w=16)
    for z in (logits * scale, logits * 0 + 0.3, logits.sigmoid()):
        assert loss(z, masks).isfinite()  # the first batch is looked at, others may be anything


def test_a_channel_for_each_class():
    logits, masks = batch(0, k=6)
    masks = masks.clamp(max=5)
    for classes in (5, NAMES, list(NAMES)):
        with pytest.raises(ValueError,
                           match="expected 5 channels, one for each class and none for the background, got 6"):
            make_loss("baseline", classes=classes)(logits, masks)
        make_loss("baseline", classes=classes)(logits[:, :5], masks)


@pytest.mark.parametrize("name", LOSSES)
def test_empty_batches(name):
    logits, masks = batch(0)
    for z, m in ((logits[:0], masks[:0]), (logits[:, :, :0], masks[:, :0])):
        with pytest.raises(ValueError, match="expected at least one image, got logits"):
            loss_of(name)(z, m)


@pytest.mark.parametrize("masks, words", [
    (lambda m: one_hot(m, 5), r"got \(2, 5, 6, 7\) and \(2, 5, 6, 7\): a channel for each class: pass masks.any"),
    (lambda m: one_hot(m, 5).float(), r"and \(2, 5, 6, 7\): a channel for each class: pass masks.any"),
    (lambda m: m[:, None], r"and \(2, 1, 6, 7\): pass masks\[:, 0\]$"),
    (lambda m: m / 255,
     r"got torch.float32 \(2, 6, 7\): the values are 1/255, 2/255, 3/255, as a ToTensor .* pass \(masks \* 255\)"),
    (lambda m: (m > 0).byte() * 255, "values 0..5, got 0..255 .*these look like masks of 0 and 255"),
    (lambda m: m.to(torch.uint16), r"got torch.uint16 .*: pass masks.long\(\)"),
])
def test_masks_that_say_what_to_pass(masks, words):
    logits, good = batch(0)
    for loss in (loss_of("baseline"), loss_of("focal", classes=5)):
        with pytest.raises(ValueError, match=words):
            loss(logits, masks(good))


# The environment

@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("ignore", [None, 255])
def test_surroundings_change_nothing(name, ignore):
    logits, masks = batch(0, dtype=torch.float32)
    expected = loss_of(name, ignore_index=ignore)(logits, masks)
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            results = [loss_of(name, ignore_index=ignore)(logits, masks)]
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        results.append(loss_of(name, ignore_index=ignore)(logits, masks))
    results += [copied(loss_of(name, ignore_index=ignore))(logits, masks)
                for copied in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)))]
    assert all(torch.equal(r, expected) for r in results)


def test_weights_without_float64():
    "Apple's GPU has no float64: `to` raises TypeError there."
    def move(tensor):
        if tensor.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return tensor.clone()

    loss, (logits, masks) = loss_of("wce"), batch(0, dtype=torch.float32)
    expected = loss(logits, masks)
    loss._apply(move)
    assert loss.classification.weights.dtype == torch.float32 and torch.equal(loss(logits, masks), expected)


@pytest.mark.parametrize("name", LOSSES)
def test_traced_with_ignored_pixels(name):
    logits, masks = batch(0, dtype=torch.float32)
    masks[:, 1:3] = 255
    torch._dynamo.reset()
    loss = loss_of(name, ignore_index=255, classes=5)
    compiled = torch.compile(lambda z, m: loss(z + 0, m), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(logits, masks), loss(logits, masks))


# Compiled, and on a device

class Devices(TorchDispatchMode):
    "Notes the device of every tensor that an operation takes or returns."

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.seen |= {x.device.type for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)}
        return result


@pytest.mark.parametrize("name", LOSSES)
def test_a_moved_loss_copies_nothing_from_the_cpu(name, monkeypatch):
    "On the meta device, which stands for any other than the CPU; values are not looked at, as inside a capture."
    patch(monkeypatch, "values_can_be_read", lambda tensor: False)
    loss, logits = loss_of(name).to("meta"), torch.randn(2, 5, 6, 7, device="meta", requires_grad=True)
    masks = torch.zeros(2, 6, 7, dtype=torch.uint8, device="meta")
    with Devices() as devices:
        loss(logits, masks).backward()
    assert devices.seen == {"meta"} and logits.grad.shape == logits.shape
    assert all(x.dtype == torch.float64 for x in loss.buffers())


@pytest.mark.parametrize("name", [name for name, row in LOSSES.items() if row.counts])
def test_a_loss_that_was_not_moved_copies_its_weights(name, monkeypatch):
    patch(monkeypatch, "values_can_be_read", lambda tensor: False)
    with Devices() as devices:
        loss_of(name)(torch.randn(2, 5, 6, 7, device="meta"), torch.zeros(2, 6, 7, dtype=torch.uint8, device="meta"))
    assert devices.seen == {"meta", "cpu"}


def test_values_are_not_looked_at_during_a_capture(monkeypatch):
    class OnDevice(torch.Tensor):
        is_cuda = True

    masks = torch.full((1, 2, 2), 7).as_subclass(OnDevice)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not one_hot(masks, 5).any() and not values_can_be_read(masks)
    with pytest.raises(ValueError, match="expected integers"):
        one_hot(masks.float(), 5)
    with pytest.raises(ValueError, match="got 7..7"):
        one_hot(torch.full((1, 2, 2), 7), 5)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with pytest.raises(ValueError, match="masks: expected values 0..5"):
        one_hot(masks, 5)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_compiled_in_one_graph(name):
    logits, masks = batch(0, dtype=torch.float32)
    torch._dynamo.reset()
    loss, results = loss_of(name), []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        x = logits.clone().requires_grad_()
        value = function(x, masks)
        value.backward()
        results.append((value.detach(), x.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-7)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize("name", LOSSES)
def test_captured_in_a_cuda_graph(name):
    logits, masks = batch(0, dtype=torch.float32)
    loss, x, shown = loss_of(name).cuda(), logits.cuda().requires_grad_(), torch.zeros_like(masks).cuda()

    def step():
        x.grad = None
        value = loss(x, shown)
        value.backward()
        return value

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    x.grad = None
    with torch.cuda.graph(graph):
        value = step()
    shown.copy_(masks)
    graph.replay()
    captured = value.item(), x.grad.clone()
    torch.testing.assert_close((torch.tensor(captured[0]), captured[1]), (step().detach().cpu(), x.grad))


# One row of one table

class Everywhere(torch.nn.Module):
    "Twice the mean logit: its mean over the pixels that count needs the share itself."
    takes_share = True

    def __init__(self, weights=None):
        super().__init__()
        self.weights = weights

    def forward(self, logits, target, share=1.0):
        return 2 * logits.mean() * share


def test_a_loss_is_added_by_one_row(monkeypatch):
    "Its terms, its counts and its weights are read from the row; nothing else knows the name."
    seen = []
    row = Loss(Everywhere, lambda dice: seen.append(dice) or Lovasz(), "pixels_per_class", lambda n, classes: [sum(n)])
    monkeypatch.setitem(LOSSES, "everywhere", row)
    logits, masks = batch(0)
    loss = make_loss("everywhere", pixels_per_class=PIXELS, dice="batch", classes=5)
    expected = 2 * logits.mean(), Lovasz()(logits, one_hot(masks, 5).double())
    torch.testing.assert_close(loss.parts(logits, masks), expected)
    assert loss.classification.weights == [sum(PIXELS)] and seen == ["batch"]
    marked = masks.clone()
    marked[:, :3] = 255
    ignoring = make_loss("everywhere", None, PIXELS, ignore_index=255)
    filled = logits.masked_fill((marked == 255)[:, None], -1e4)
    torch.testing.assert_close(ignoring.parts(logits, marked)[0], 2 * filled.mean() * 2)
    with pytest.raises(ValueError, match="loss 'everywhere' needs pixels_per_class"):
        make_loss("everywhere", images_per_class=IMAGES)
    with pytest.raises(ValueError, match="expected one of baseline, .*, everywhere, got 'nowhere'"):
        make_loss("nowhere")


# Wrong arguments

@pytest.mark.parametrize("args, words", [
    (dict(name="dice"), "baseline, focal, balanced, wce, lovasz, tversky, focal-authors, balanced-authors, got 'dice'"),
    (dict(name=["wce"]), "got .'wce'."), (dict(name=None), "got None"),
    (dict(name="wce"), "needs pixels_per_class"),
    (dict(name="balanced", pixels_per_class=[1]), "needs images_per_class"),
    (dict(name="balanced-authors", images_per_class=[1]), "'balanced-authors' needs pixels_per_class: a count per"),
    (dict(name="focal", dice="pixel"), "'image' or 'batch', got 'pixel'"),
    (dict(name="lovasz", dice="pixel"), "'image' or 'batch', got 'pixel'"),
])
def test_wrong_arguments(args, words):
    with pytest.raises(ValueError, match=words):
        make_loss(**args)


@pytest.mark.parametrize("name", LOSSES)
def test_shapes_that_differ(name):
    logits, masks = batch(0)
    for other in (masks[:1], masks[:, :-1], masks[:, None]):
        with pytest.raises(ValueError, match=r"of one size, got \(2, 5, 6, 7\)"):
            loss_of(name)(logits, other)
    with pytest.raises(ValueError, match="of one size"):
        loss_of(name)(logits[0], masks)


def test_a_weight_for_each_channel():
    logits, masks = batch(0, k=4)
    with pytest.raises(ValueError, match="expected 5 channels, one per class weight, got 4"):
        loss_of("wce")(logits, masks)
    with pytest.raises(ValueError, match="expected 2 channels"):
        WeightedBCE([0.5, 0.5])(logits, logits)
