"Algorithm 1: what is planned, what is injected where, and that nothing goes wrong in the middle of an epoch."
import copy
import hashlib
import json
import os
import pickle
import re
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st

from dli.data.samples import Samples
from dli.data.masks import MASK_DTYPES, one_hot
from dli.method.blending import BLENDS, grow_mask, poisson_blend, poisson_blend_image
from dli.method.donors import Donor, DonorPool, DonorTransform, default_margin, defect_margin
from dli.method.plan import InjectionPlan, choose_labels, class_presence, find_clean, look_at
from dli.method.placing import crop_places, find_places, place_donors, place_turned, target_windows
from dli.method.injection import (COUNTING, PATIENCE, DynamicLabelInjection, InjectionStats, apply_plan,
                                  from_working, goes_through_cpu, show_batch, to_working)
from dli.network.losses import make_loss
from dli.scoring.metrics import count_batch
from conftest import patch

CLASSES = ("Blowhole", "Break", "Crack")
STILL = dict.fromkeys(CLASSES, DonorTransform(flip=0, p=0))
FLIPS = dict.fromkeys(CLASSES, DonorTransform(p=0))
WILD = dict.fromkeys(CLASSES, DonorTransform(p=1, rotate=90, shift=0.5, scale=0.4))
properties = settings(deadline=None, max_examples=40)


def make_samples(masks, images=None, classes=CLASSES):
    "Samples from masks; images are random unless given."
    masks = np.asarray(masks, np.uint8)
    if images is None:
        images = np.random.default_rng(0).integers(0, 256, masks.shape, np.uint8)
    images = np.asarray(images, np.uint8)
    names = [classes[m.max() - 1] if m.any() else "Free" for m in masks]
    table = pd.DataFrame({"name": [f"image {i}" for i in range(len(masks))], "class": names,
                          "tile": range(len(masks)), "exposure": 1, "width": 1, "height": 1, "usable": True})
    return Samples(images, masks, table, classes, "by hand")


def random_samples(seed, n=8, size=(16, 12), classes=CLASSES, colour=False):
    "Rectangular defects of random classes anywhere, borders included."
    rng = np.random.default_rng(seed)
    masks = np.zeros((n, *size), np.uint8)
    for mask in masks:
        (y0, y1), (x0, x1) = (sorted(rng.choice(s + 1, 2, replace=False)) for s in size)
        mask[y0:y1, x0:x1] = rng.integers(1, len(classes) + 1)
    return make_samples(masks, rng.integers(0, 256, (n, *size, 3) if colour else (n, *size), np.uint8), classes)


def random_batch(seed, n=6, size=(16, 12), channels=1, dtype=torch.uint8, mask_dtype=torch.uint8):
    "Images, and masks of which about half are clean; some show several classes."
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, len(CLASSES) + 1, (n, *size))
    defective = (rng.random((n, *size)) < 0.01) * (rng.random(n) < 0.6)[:, None, None]
    masks = labels * defective
    images = torch.from_numpy(rng.integers(0, 256, (n, channels, *size), np.uint8))
    return images if dtype == torch.uint8 else images.to(dtype) / 255, torch.from_numpy(masks).to(mask_dtype)


def full_pool(classes, size=(16, 12)):
    "A pool with two donors of each class."
    masks = np.zeros((2 * len(classes), *size), np.uint8)
    masks[:, 4:7, 3:6] = np.repeat(np.arange(1, len(classes) + 1), 2)[:, None, None]
    return DonorPool(make_samples(masks, classes=tuple(classes)))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# -- the pool ---------------------------------------------------------------------------------------------------------

def test_a_donor_per_image_and_class():
    masks = np.zeros((4, 10, 10), np.uint8)
    masks[0, 2:4, 2:4], masks[0, 7:9, 5:8], masks[2, :3, 4:] = 1, 3, 3
    pool = DonorPool(make_samples(masks))
    assert len(pool) == 3 and pool.counts == {"Blowhole": 1, "Break": 0, "Crack": 2}
    assert [(d.name, d.label, d.box) for d in pool.donors] == [
        ("image 0", 1, (2, 2, 2, 2)), ("image 0", 3, (7, 5, 2, 3)), ("image 2", 3, (0, 4, 3, 6))]


@properties
@given(st.integers(0, 10**6), st.sampled_from((STILL, FLIPS, WILD)), st.integers(0, 3))
def test_crops_are_pieces_of_their_images(seed, transforms, margin):
    samples = random_samples(seed)
    pool = DonorPool(samples, transforms, margin)
    for donor, image, mask in zip(pool.donors, samples.images, samples.masks):
        (y, x), (h, w) = donor.corner, donor.mask.shape
        ys, xs = np.arange(y, y + h), np.arange(x, x + w)
        inside = np.ix_((ys >= 0) & (ys < mask.shape[0]), (xs >= 0) & (xs < mask.shape[1]))
        there = np.ix_(ys[(ys >= 0) & (ys < mask.shape[0])], xs[(xs >= 0) & (xs < mask.shape[1])])
        assert donor.image.dtype == np.uint8 and (donor.image[0][inside] == image[there]).all()
        assert (donor.mask[inside] == (mask[there] > 0)).all()
        assert donor.mask[inside].sum() == (mask > 0).sum() and mask[donor.anchor] == donor.label
        top, left, height, width = donor.box
        rows, columns = (y, y + h, top, height, mask.shape[0]), (x, x + w, left, width, mask.shape[1])
        for low, high, begin, length, size in (rows, columns):
            assert low <= max(begin - margin - 1, 0), "room for the margin and one pixel"
            assert high >= min(begin + length + margin + 1, size), "room for the margin and one pixel"


@pytest.mark.parametrize("side", [70, 200, 500])
def test_a_pool_grows_with_the_defects_and_not_with_the_images(side):
    masks = np.zeros((5, side, side), np.uint8)
    masks[:3, 50:54, 60:65], masks[4, 20:40, 20:40] = 2, 2
    pool = DonorPool(make_samples(masks), FLIPS, margin=2)
    assert [d.image.nbytes for d in pool.donors] == [d.mask.nbytes for d in pool.donors] == [10 * 11] * 3 + [26 * 26]
    kept = [x if x.base is None else x.base for d in pool.donors for x in (d.image, d.mask)]
    assert sum(x.nbytes for x in kept) == 2 * (3 * 10 * 11 + 26 * 26), "no view keeps an image alive"


def test_transforms_by_class():
    still = DonorTransform(p=0)
    pool = DonorPool(random_samples(0, classes=("Crack", "Dent")), {"Crack": still})
    assert pool.transforms == [still, DonorTransform()]
    assert DonorPool(random_samples(0)).transforms == [DonorTransform()] * 3, "no class name is known"
    with pytest.raises(ValueError, match=r"expected class names out of .*Crack.*got \['Craks'\]"):
        DonorPool(random_samples(0), {"Craks": DonorTransform()})


@pytest.mark.parametrize("wrong", [
    dict(flip=1.1), dict(p=-0.1), dict(rotate=181), dict(shift=2), dict(scale=1), dict(scale=float("nan"))])
def test_wrong_ranges(wrong):
    with pytest.raises(ValueError, match=f"expected 0 <= {next(iter(wrong))} <= "):
        DonorTransform(**wrong)


def test_margin():
    assert [default_margin((s, s)) for s in (32, 128, 256, 512, 1024)] == [1, 1, 2, 4, 8]
    assert DonorPool(random_samples(0)).margin == 1 and DonorPool(random_samples(0), margin=0).margin == 0
    with pytest.raises(ValueError, match="margin: expected a whole number of pixels, 0 or more, got -1"):
        DonorPool(random_samples(0), margin=-1)


def test_no_donors_at_all():
    with pytest.raises(ValueError, match="expected samples with defects, got 3 images from 'by hand'"):
        DonorPool(make_samples(np.zeros((3, 8, 8))))


# -- the plan ---------------------------------------------------------------------------------------------------------

counts_of = st.lists(st.integers(0, 9), min_size=1, max_size=6).map(np.array)


@properties
@given(counts_of, st.integers(0, 40), st.integers(0, 10**6), st.data())
def test_uniform_raises_classes_to_the_largest(counts, clean, seed, data):
    donors = np.array(data.draw(st.lists(st.integers(0, 2), min_size=len(counts), max_size=len(counts))))
    labels = choose_labels(counts, donors, clean, "uniform", seeded(seed))
    after = counts + np.bincount(labels, minlength=len(counts) + 1)[1:]
    wanted = np.where(donors > 0, counts.max() - counts, 0).sum()
    assert len(labels) == min(clean, wanted)
    assert (after[donors == 0] == counts[donors == 0]).all() and after.max() == counts.max()
    if clean >= wanted:
        assert (after[donors > 0] == counts.max()).all()
    running = counts.copy()
    for k in labels:  # rarest first
        assert running[k - 1] == running[donors > 0].min()
        running[k - 1] += 1


@properties
@given(counts_of, st.integers(0, 40), st.integers(0, 10**6))
def test_all_uses_every_clean_image(counts, clean, seed):
    donors = np.ones_like(counts)
    donors[0] = len(counts) == 1  # the first class has none, unless it is the only one
    labels = choose_labels(counts, donors, clean, "all", seeded(seed))
    assert len(labels) == clean
    running = counts.copy()
    for k in labels:
        assert donors[k - 1] and running[k - 1] == running[donors > 0].min()
        running[k - 1] += 1


def test_ties_are_broken_at_random():
    first = {choose_labels(np.zeros(3, int), np.ones(3), 1, "all", seeded(s))[0] for s in range(40)}
    assert first == {1, 2, 3}


@properties
@given(st.integers(0, 10**6), st.sampled_from(("uniform", "all")), st.sampled_from(("rarest", "random")))
def test_plans_are_legal(seed, fill, choose):
    pool, (images, masks) = DonorPool(random_samples(seed)), random_batch(seed + 1)
    plan = DynamicLabelInjection(pool, fill=fill, choose=choose).make_params(masks, seeded(seed))
    clean, counts = find_clean(masks), class_presence(masks, 3).sum(0)
    assert set(plan.target) <= set(clean) and len(set(plan.target)) == len(plan)
    assert (plan.label == pool.labels[plan.donor]).all()
    assert len(plan) == len(choose_labels(counts, np.array(list(pool.counts.values())), len(clean), fill, seeded(0)))
    assert ((0 <= plan.y) & (plan.y < 16) & (0 <= plan.x) & (plan.x < 12)).all()
    for k in set(plan.label):  # without replacement until exhausted
        uses = np.bincount(plan.donor[plan.label == k], minlength=len(pool))[pool.labels == k]
        assert uses.max() - uses.min() <= 1


@properties
@given(st.integers(0, 10**6), st.sampled_from(("uniform", "all")), st.integers(0, 3),
       st.sampled_from((torch.uint8, torch.int64)))
def test_class_counts_of_a_batch_after_injection(seed, fill, absent, mask_dtype):
    "As the protocol says, counted in the masks that come back; a class may have no donors."
    samples, (images, masks) = random_samples(seed, n=12), random_batch(seed + 1, n=14, mask_dtype=mask_dtype)
    samples.masks[samples.masks == absent] = 0 if (samples.masks != absent).any(where=samples.masks > 0) else absent
    inject = DynamicLabelInjection(DonorPool(make_samples(samples.masks, samples.images)), fill=fill)
    labels = inject(images, masks, seeded(seed))[1]
    before, after = (class_presence(m, 3).sum(0) for m in (masks, labels))
    has, clean = np.array(list(inject.pool.counts.values())) > 0, len(find_clean(masks))
    wanted = clean if fill == "all" else min(clean, (before.max() - before)[has].sum())
    assert (after >= before).all() and (after - before).sum() == wanted and (after == before)[~has].all()
    assert len(find_clean(labels)) == clean - wanted and inject.stats.injected == dict(zip(CLASSES, after - before))
    if (raised := after > before).any():
        assert after[raised].max() <= after[has].min() + 1, "rarest first"
    if fill == "uniform":
        assert after.max() == before.max() and (wanted == clean or (after[has] == before.max()).all())


def test_several_classes_in_one_image_count_for_each():
    masks = torch.zeros(6, 8, 8, dtype=torch.long)
    masks[0, 0, 0], masks[0, 1, 1], masks[1, 2, 2] = 1, 2, 1
    assert class_presence(masks, 3).sum(0).tolist() == [2, 1, 0]
    pool = DonorPool(make_samples(np.eye(3, 64, dtype=np.uint8).reshape(3, 8, 8) * np.arange(1, 4).reshape(3, 1, 1)))
    after = DynamicLabelInjection(pool)(torch.zeros(6, 1, 8, 8), masks, seeded(0))[1]
    assert class_presence(after, 3).sum(0).tolist() == [2, 2, 2] and len(find_clean(after)) == 1


def test_random_follows_the_training_distribution():
    masks = np.ones((10, 4, 4), np.uint8)
    masks[9] = 2
    inject = DynamicLabelInjection(DonorPool(make_samples(masks)), fill="all", choose="random")
    labels = inject.make_params(torch.zeros(2000, 4, 4, dtype=torch.uint8), seeded(0)).label
    assert 0.87 < (labels == 1).mean() < 0.93 and set(labels) == {1, 2}


def test_clean_targets_and_donors_vary():
    pool, masks = DonorPool(random_samples(3)), torch.zeros(8, 16, 12, dtype=torch.uint8)
    masks[0, 0, 0] = 1
    plans = [DynamicLabelInjection(pool).make_params(masks, seeded(s)) for s in range(30)]
    assert {t for p in plans for t in p.target} == set(range(1, 8))
    assert len({p.to_json() for p in plans}) == 30


@properties
@given(st.integers(0, 10**6), st.floats(0, 1))
def test_p_poisson_changes_nothing_else(seed, p):
    pool, masks = DonorPool(random_samples(seed), WILD), random_batch(seed)[1]
    plans = [DynamicLabelInjection(pool, q, "all").make_params(masks, seeded(seed)) for q in (0, p, 1)]
    assert set(plans[0].blend) <= {"cutpaste"} and set(plans[2].blend) <= {"poisson"}
    for name in ("target", "donor", "label", "hflip", "vflip", "angle", "scale", "y", "x"):
        assert all((getattr(plan, name) == getattr(plans[0], name)).all() for plan in plans)


def test_ranges_are_used_and_kept():
    ranges = DonorTransform(flip=0.25, p=0.5, rotate=20, shift=0, scale=0.3)
    pool = DonorPool(random_samples(1), dict.fromkeys(CLASSES, ranges))
    plan = DynamicLabelInjection(pool, 0.25, "all").make_params(torch.zeros(4000, 16, 12, dtype=torch.uint8), seeded(0))
    moved = plan.angle != 0
    assert abs(moved.mean() - 0.5) < 0.03 and (plan.scale[~moved] == 1).all()
    assert 19 < plan.angle.max() <= 20 and -20 <= plan.angle.min() < -19
    assert 1.28 < plan.scale.max() <= 1.3 and 0.7 <= plan.scale.min() < 0.72
    for flips in (plan.hflip, plan.vflip, plan.blend == "poisson"):
        assert abs(flips.mean() - 0.25) < 0.03


def test_draws_are_independent():
    mask = np.zeros((1, 41, 41), np.uint8)
    mask[0, 20, 20] = 1
    pool = DonorPool(make_samples(mask), dict(Blowhole=DonorTransform(0.5, 1, 10, 0.4, 0.1)))
    plan = DynamicLabelInjection(pool, 0.5, "all").make_params(torch.zeros(4000, 41, 41, dtype=torch.uint8), seeded(0))
    columns = [getattr(plan, n).astype(float) for n in ("hflip", "vflip", "angle", "scale", "y", "x")]
    columns.append((plan.blend == "poisson").astype(float))
    assert np.abs(np.corrcoef(columns) - np.eye(7)).max() < 0.1


@properties
@given(st.integers(0, 10**6), st.booleans(), st.sampled_from((torch.uint8, torch.float32)))
def test_plans_replay_bit_for_bit(seed, image, dtype):
    images, masks = random_batch(seed, dtype=dtype)
    pool = DonorPool(random_samples(seed), WILD)
    inject = DynamicLabelInjection(pool, fill="all", region="image" if image else "exact")
    plan = inject.make_params(masks, seeded(seed))
    again = InjectionPlan.from_json(plan.to_json())
    assert again == plan and all(getattr(again, n).dtype == getattr(plan, n).dtype for n in vars(plan))
    drawn = inject(images, masks, seeded(seed))
    planned, replayed = (inject.transform(images, masks, p) for p in (plan, again))
    for a, b, c in zip(drawn, planned, replayed):
        assert torch.equal(a, b) and torch.equal(b, c)


def test_plans_replay_with_any_number_of_threads():
    images, masks = random_batch(0, n=12, size=(90, 80), channels=3, dtype=torch.float32)
    inject = DynamicLabelInjection(DonorPool(random_samples(0, size=(90, 80)), WILD), fill="all")
    threads = torch.get_num_threads()
    plan, results = inject.make_params(masks, seeded(0)), []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        results.append(inject.transform(images, masks, plan))
    torch.set_num_threads(threads)
    assert set(plan.blend) == {"poisson", "cutpaste"}
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


def all_injected(pool, n=6):
    "An injector, images, masks and a plan that fills them."
    inject = DynamicLabelInjection(pool, fill="all")
    images, masks = torch.zeros(n, 1, 16, 12), torch.zeros(n, 16, 12, dtype=torch.uint8)
    return inject, images, masks, inject.make_params(masks, seeded(0))


def test_damaged_plans():
    inject = DynamicLabelInjection(DonorPool(random_samples(0)))
    text = inject.make_params(torch.zeros(2, 16, 12, dtype=torch.uint8)).to_json()
    assert len(InjectionPlan.from_json(text)) == 0
    for wrong, message in ((text.replace('"angle"', '"angel"'), "expected a list for each of target, donor"),
                           (text.replace('"y": []', '"y": [1]'), "expected columns of one length, got .*'y': 1")):
        with pytest.raises(ValueError, match=f"InjectionPlan: {message}"):
            InjectionPlan.from_json(wrong)


@pytest.mark.parametrize("text, message", [
    ("[]", r"expected a list for each of target, donor.*got \[\]"),
    ("3", "expected a list for each of target, donor.*got 3"),
    ('{"target": [0], "donor": [1]}', "expected a list for each of target, donor.*got {'target': .0"),
    ("runs/plan.json", "expected the text that `to_json` wrote, got 'runs/plan.json'.*read_text"),
    ("", "expected the text that `to_json` wrote, got ''"),
    (Path("plan.json"), "expected the text that `to_json` wrote, got PosixPath"),
    (None, "expected the text that `to_json` wrote, got None"),
])
def test_text_that_is_no_plan(text, message):
    with pytest.raises(ValueError, match=message):
        InjectionPlan.from_json(text)


@pytest.mark.parametrize("name, value", [
    ("target", "1.5"), ("donor", '"0"'), ("label", "null"), ("hflip", "2"), ("angle", '"a"'), ("scale", "NaN"),
    ("y", "[1]"), ("x", "1" + 30 * "0"), ("blend", "1"),
])
def test_values_that_a_column_would_alter(name, value):
    text = all_injected(DonorPool(random_samples(0)), 1)[3].to_json()
    column = json.dumps({name: json.loads(text)[name]})[1:-1]
    assert text.count(column) == 1
    with pytest.raises(ValueError, match=f"InjectionPlan: expected a list of .* for {name}, got"):
        InjectionPlan.from_json(text.replace(column, f'"{name}": [{value}]'))


@pytest.mark.parametrize("column, value, message", [
    ("target", -1, "expected 0 <= target <= 5, got -1 in injection 2"),
    ("target", 6, "expected 0 <= target <= 5, got 6"),
    ("donor", -1, "expected 0 <= donor <= 7, got -1"),
    ("donor", 8, "expected 0 <= donor <= 7, got 8"),
    ("y", -1, "expected 0 <= y <= 15, got -1"),
    ("y", 16, "expected 0 <= y <= 15, got 16"),
    ("x", 12, "expected 0 <= x <= 11, got 12"),
    ("angle", np.nan, "expected .* <= angle <= .*, got nan"),
    ("angle", -np.inf, "expected .* <= angle <= .*, got -inf"),
    ("scale", 0, "expected 1e-06 <= scale <= .*, got 0"),
    ("scale", -1, "expected 1e-06 <= scale <= .*, got -1"),
    ("scale", np.nan, "expected .* <= scale <= .*, got nan"),
    ("scale", np.inf, "expected .* <= scale <= .*, got inf"),
    ("scale", 1e-200, "expected .* <= scale <= .*, got 1e-200"),
    ("label", 9, "expected the labels of its donors, got 9 for donor .* is it the plan of another pool"),
])
def test_impossible_plans(column, value, message):
    inject, images, masks, plan = all_injected(DonorPool(random_samples(0)))
    getattr(plan, column)[2] = value
    with pytest.raises(ValueError, match="plan: " + message):
        inject.transform(images, masks, plan)


@pytest.mark.parametrize("column", [np.zeros(5, int), np.zeros((6, 1), int), np.full(6, 0.5), np.full(6, "a"), 0, None])
def test_columns_of_another_type_or_length(column):
    plan = all_injected(DonorPool(random_samples(0)))[3]
    with pytest.raises(ValueError, match="InjectionPlan: expected (a list of int for donor|columns of one length)"):
        replace(plan, donor=column)


def test_columns_are_made_of_lists():
    plan = all_injected(DonorPool(random_samples(0)))[3]
    again = replace(plan, **{name: column.tolist() for name, column in vars(plan).items()})
    assert again == plan and [c.dtype for c in vars(again).values()] == [c.dtype for c in vars(plan).values()]


def test_plans_of_earlier_versions_are_read():
    plan = all_injected(DonorPool(random_samples(0)))[3]
    columns = json.loads(plan.to_json())
    columns["poisson"] = [name == "poisson" for name in columns.pop("blend")]
    assert InjectionPlan.from_json(json.dumps(columns)) == plan


# -- blends by name ---------------------------------------------------------------------------------------------------

def invert(targets, patches, masks, options):
    "A blend that no table has: the donor's negative."
    for target, patch, mask in zip(targets, patches, masks):
        target[:, mask] = 1 - patch[:, mask]
    return masks


def test_a_blend_is_added_by_a_row_of_the_table(monkeypatch):
    monkeypatch.setitem(BLENDS, "invert", invert)
    pool = DonorPool(random_samples(0))
    images, masks = random_batch(1, dtype=torch.float32)
    for p, names in ((1, {"invert"}), (0.5, {"invert", "cutpaste"}), (0, {"cutpaste"})):
        inject = DynamicLabelInjection(pool, p, fill="all", blend="invert")
        plan = inject.make_params(masks, seeded(3))
        after, labels = inject.transform(images, masks, plan)
        pasted, same_labels = inject.transform(images, masks, replace(plan, blend=["cutpaste"] * len(plan)))
        assert set(plan.blend) <= names and torch.equal(labels, same_labels)
        for t, name in zip(plan.target, plan.blend):
            where = labels[t] > 0
            expected = 1 - pasted[t][:, where] if name == "invert" else pasted[t][:, where]
            assert torch.equal(after[t][:, where], expected)
        assert InjectionPlan.from_json(plan.to_json()) == plan and all(name in repr(plan) for name in plan.blend)


@pytest.mark.parametrize("region", ["exact", "image"])
def test_a_new_blend_labels_what_it_says_it_replaced(monkeypatch, region):
    def everything(targets, patches, masks, options):
        for target in targets:
            target[:] = 0
        return [torch.ones_like(mask) for mask in masks]

    monkeypatch.setitem(BLENDS, "everything", everything)
    images, masks = torch.ones(3, 1, 16, 12), torch.zeros(3, 16, 12, dtype=torch.uint8)
    pool = DonorPool(random_samples(0))
    inject = DynamicLabelInjection(pool, 1, "all", region=region, grow_label=True, blend="everything")
    after, labels = inject(images, masks, seeded(0))
    assert torch.equal(after[:, 0] == 0, labels > 0)
    assert region == "exact" or (labels > 0).all()


@pytest.mark.parametrize("regions, message", [
    (lambda masks: masks[1:], "expected 6 regions, one per window, got 5"),
    (lambda masks: [*masks, masks[0]], "expected 6 regions, one per window, got 7"),
    (lambda masks: [mask.byte() for mask in masks], "expected regions like the masks, torch.bool .*, got torch.uint8"),
    (lambda masks: [mask[:, 1:] for mask in masks], "expected regions like the masks, torch.bool .*, got torch.bool"),
    (lambda masks: [mask.numpy() for mask in masks], "expected regions like the masks, torch.bool .*, got bool"),
    (lambda masks: [None for mask in masks], "expected regions like the masks, torch.bool .*, got NoneType"),
])
def test_a_blend_says_what_it_replaced_in_every_window(monkeypatch, regions, message):
    monkeypatch.setitem(BLENDS, "careless", lambda targets, patches, masks, options: regions(masks))
    inject, images, masks, plan = all_injected(DonorPool(random_samples(0)))
    with pytest.raises(ValueError, match=f"blend 'careless': {message}"):
        inject.transform(images, masks, replace(plan, blend=["careless"] * len(plan)))


def test_a_blend_may_yield_its_regions(monkeypatch):
    monkeypatch.setitem(BLENDS, "yielding", lambda *given: iter(BLENDS["cutpaste"](*given)))
    inject, images, masks, plan = all_injected(DonorPool(random_samples(0)))
    names = "yielding", "cutpaste"
    made = [inject.transform(images, masks, replace(plan, blend=[name] * len(plan))) for name in names]
    assert all(map(torch.equal, *made))


def test_a_plan_with_an_unknown_blend():
    inject, images, masks, plan = all_injected(DonorPool(random_samples(0)))
    with pytest.raises(ValueError, match="plan: expected blends out of poisson, cutpaste, got 'sticker': add a blend"):
        inject.transform(images, masks, replace(plan, blend=["sticker"] * len(plan)))


def test_text_in_the_place_of_a_plan():
    inject, images, masks, plan = all_injected(DonorPool(random_samples(0)))
    message = "plan: expected an InjectionPlan, got str; JSON text is read by InjectionPlan.from_json"
    with pytest.raises(TypeError, match=message):
        inject.transform(images, masks, plan.to_json())


@properties
@given(st.integers(0, 10**6), st.sampled_from(("target", "donor", "label", "y", "x", "angle", "scale")), st.data())
def test_a_plan_is_refused_or_applied(seed, column, data):
    "Whatever number a hand puts into it: an injection, or a ValueError that names the column; never a crash."
    inject, images, masks, plan = all_injected(DonorPool(random_samples(seed), WILD), 2)
    if column in ("angle", "scale"):
        numbers = st.floats() | st.floats(0, 4)
    else:
        numbers = st.integers(-2**40, 2**40) | st.integers(-1, 20)
    getattr(plan, column)[1] = data.draw(numbers)
    try:
        after, labels = inject.transform(images, masks, plan)
    except ValueError as error:
        message = str(error)
        assert message.startswith("plan: expected") and (column in message or "image" in message or column == "donor")
    else:
        assert after.isfinite().all() and (0 <= after).all() and (after <= 1).all()
        assert set(labels[plan.target[1]].unique().tolist()) <= {0, plan.label[1]}


def test_plan_for_another_batch():
    inject, images, masks, plan = all_injected(DonorPool(random_samples(0)), 9)
    with pytest.raises(ValueError, match="plan: expected 0 <= target <= 5, got .* as many and as large as"):
        inject.transform(images[:6], masks[:6], plan)


def test_plan_for_larger_images():
    inject = DynamicLabelInjection(DonorPool(random_samples(0, size=(96, 128))), fill="all")
    plan = inject.make_params(torch.zeros(6, 96, 128, dtype=torch.uint8), seeded(0))
    with pytest.raises(ValueError, match="plan: expected 0 <= y <= 3, got .* as many and as large as it was made for"):
        inject.transform(torch.zeros(6, 1, 4, 5), torch.zeros(6, 4, 5, dtype=torch.uint8), plan)


def test_plan_with_an_image_twice():
    images, masks = torch.zeros(9, 1, 16, 12), torch.zeros(9, 16, 12, dtype=torch.uint8)
    inject = DynamicLabelInjection(DonorPool(random_samples(0)), fill="all")
    plan = inject.make_params(masks, seeded(0))
    plan.target[:2] = 5
    with pytest.raises(ValueError, match="plan: expected each image once, got image 5 more often"):
        inject.transform(images, masks, plan)


# -- where it lands ---------------------------------------------------------------------------------------------------

@properties
@given(st.integers(0, 10**6))
def test_unturned_donors_are_copied_to_the_pixel(seed):
    "Every pixel of the donor image has its own value, so each pixel of the label says where it came from."
    samples = random_samples(seed, n=1, size=(15, 16))
    numbered = np.arange(240, dtype=np.uint8).reshape(1, 15, 16)
    pool = DonorPool(make_samples(samples.masks, numbered), FLIPS)
    inject = DynamicLabelInjection(pool, p_poisson=0, fill="all")
    images, masks = torch.full((4, 1, 15, 16), 255, dtype=torch.uint8), torch.zeros(4, 15, 16, dtype=torch.uint8)
    plan = inject.make_params(masks, seeded(seed))
    after, labels = inject.transform(images, masks, plan)
    for i, t in enumerate(plan.target):
        axes = [axis for axis, flip in ((0, plan.vflip[i]), (1, plan.hflip[i])) if flip]
        turned = [np.flip(x[0], axes) for x in (numbered, samples.masks)]
        assert (labels[t].numpy() == turned[1]).all()
        assert (after[t, 0].numpy() == np.where(turned[1] > 0, turned[0], 255)).all()


@properties
@given(st.integers(0, 10**6), st.sampled_from((torch.float32, torch.float64)))
def test_floats_are_the_donors_bytes(seed, dtype):
    samples = random_samples(seed, n=1)
    inject = DynamicLabelInjection(DonorPool(samples, STILL), p_poisson=0, fill="all")
    after, labels = inject(torch.zeros(1, 1, 16, 12, dtype=dtype), torch.zeros(1, 16, 12, dtype=torch.int32))
    inside = labels[0] > 0
    donor = torch.from_numpy(samples.images[0]).to(dtype)
    assert after.dtype == dtype and torch.equal(after[0, 0][inside], donor[inside] / 255)


@properties
@given(st.integers(0, 10**6), st.tuples(st.integers(3, 24), st.integers(3, 24)))
def test_label_equals_the_placed_mask_when_turned(seed, size):
    """Donors white wherever they are defect and black elsewhere, in targets of any size: grey of 128 or more is where
    the label is."""
    masks = random_samples(seed).masks
    pool = DonorPool(make_samples(masks, (masks > 0) * 255), WILD, margin=3)
    inject = DynamicLabelInjection(pool, p_poisson=0, fill="all")
    blank = torch.zeros(6, *size, dtype=torch.uint8)
    after, labels = inject(blank[:, None], blank, seeded(seed))
    assert (labels > 0).flatten(1).any(1).all(), "the anchor is always seen"
    assert (after[:, 0][labels == 0] == 0).all() and (after[:, 0][labels > 0] >= 128).all()


@properties
@given(st.integers(0, 10**6), st.tuples(st.integers(3, 30), st.integers(3, 30)))
def test_what_touches_a_border_still_does(seed, size):
    samples = random_samples(seed)
    inject = DynamicLabelInjection(DonorPool(samples, FLIPS), p_poisson=0, fill="all")
    masks = torch.zeros(6, *size, dtype=torch.uint8)
    plan = inject.make_params(masks, seeded(seed))
    labels = inject.transform(masks[:, None], masks, plan)[1]
    for i, t in enumerate(plan.target):
        mask, placed = inject.pool.donors[plan.donor[i]].box, labels[t].numpy() > 0
        for axis, flip in ((0, plan.vflip[i]), (1, plan.hflip[i])):
            start, length, n = mask[axis], mask[axis + 2], samples.masks.shape[axis + 1]
            if length == n:
                continue
            touch = [start == 0, start + length == n][:: -1 if flip else 1]
            line = placed.any(axis=1 - axis)
            assert line[0] >= touch[0] and line[-1] >= touch[1]
            if size[axis] >= n:
                assert line.sum() == length


def test_a_donor_pulled_from_the_border_is_continued_by_its_mirror_image():
    mask, image = np.zeros((1, 9, 20), np.uint8), np.full((1, 9, 20), 100, np.uint8)
    mask[0, 3:6, :4], image[0, 3:6, :4] = 1, [10, 20, 30, 40]
    pool = DonorPool(make_samples(mask, image), dict(Blowhole=DonorTransform(0, 1, 0, 0.2, 0)))
    inject = DynamicLabelInjection(pool, 0, "all")
    plan = inject.make_params(torch.zeros(200, 9, 20, dtype=torch.uint8), seeded(0))
    i = int(np.flatnonzero((plan.x == plan.x.max()) & (plan.y == 4))[0])
    after, labels = inject.transform(*(torch.zeros(200, *s, dtype=torch.uint8) for s in ((1, 9, 20), (9, 20))), plan)
    assert plan.x.max() - inject.pool.donors[0].anchor[1] == 4
    assert after[plan.target[i], 0, 4, :9].tolist() == [0, 40, 30, 20, 10, 20, 30, 40, 0]
    assert (labels[plan.target[i], 4, :9] > 0).sum() == 7


@properties
@given(st.integers(0, 10**6), st.sampled_from((STILL, FLIPS, WILD)), st.integers(0, 15), st.integers(0, 11),
       st.integers(0, 3))
def test_a_donor_that_leaves_the_target_is_clipped(seed, transforms, y, x, margin):
    "Wherever in the target a plan puts a donor's anchor: it receives what a canvas around it would."
    inject = DynamicLabelInjection(DonorPool(random_samples(seed), transforms, margin), p_poisson=0.5, fill="all")
    target, canvas = (torch.zeros(1, *size, dtype=torch.uint8) for size in ((16, 12), (116, 112)))
    plan = inject.make_params(target, seeded(seed))
    plan.y[:], plan.x[:] = y, x
    seen, whole = (inject.transform(m[:, None], m, replace(plan, y=plan.y + room, x=plan.x + room))
                   for m, room in ((target, 0), (canvas, 50)))
    assert torch.equal(seen[1], whole[1][:, 50:66, 50:62])
    if plan.blend[0] == "cutpaste":
        assert torch.equal(seen[0], whole[0][:, :, 50:66, 50:62])


@properties
@given(st.integers(0, 10**6), st.sampled_from((FLIPS, WILD)), st.tuples(st.integers(3, 24), st.integers(3, 24)),
       st.booleans())
def test_the_label_is_the_placed_mask_whatever_the_blend(seed, transforms, size, mix):
    pool = DonorPool(random_samples(seed), transforms)
    images, masks = torch.rand(4, 1, *size), torch.zeros(4, *size, dtype=torch.int64)
    plan = DynamicLabelInjection(pool, fill="all").make_params(masks, seeded(seed))
    labels = []
    for blend in BLENDS:
        for region in ("exact", "image"):
            inject = DynamicLabelInjection(pool, mix_gradients=mix, region=region)
            labels.append(inject.transform(images, masks, replace(plan, blend=[blend] * 4))[1])
    assert all(torch.equal(labels[0], other) for other in labels[1:])
    for p in place_donors(pool, plan, images):
        label = labels[0][p.target] > 0
        assert p.mask.sum() == label.sum() and torch.equal(label[p.window], p.mask)


def turned_label(angle, scale):
    "The label of an L of 2 x 7 pixels, its anchor in the middle of a target of 41 x 41."
    mask = np.zeros((1, 41, 41), np.uint8)
    mask[0, 14:21, 10:12], mask[0, 19:21, 10:20] = 1, 1
    inject = DynamicLabelInjection(DonorPool(make_samples(mask), STILL), 0, "all")
    masks = torch.zeros(1, 41, 41, dtype=torch.uint8)
    plan = inject.make_params(masks)
    plan.y[:], plan.x[:], plan.angle[:], plan.scale[:] = 20, 20, angle, scale
    return inject.transform(masks[:, None], masks, plan)[1][0].numpy()


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_positive_angles_turn_counter_clockwise(quarters):
    "About the anchor, which lies in the middle here, so that the whole picture turns."
    assert (turned_label(90 * quarters, 1) == np.rot90(turned_label(0, 1), quarters)).all()


def test_scale_enlarges():
    areas = [(turned_label(30, s) > 0).sum() / (turned_label(0, 1) > 0).sum() for s in (0.8, 1, 1.5)]
    assert areas == pytest.approx([0.64, 1, 2.25], rel=0.15)


def between_pixels(plane, y, x):
    "Bilinear, in float64, by hand: plane (h, w) at places (...); beyond the border its last pixel."
    h, w = plane.shape
    y, x = np.clip(y, 0, h - 1), np.clip(x, 0, w - 1)
    y0, x0 = np.floor(y).astype(int), np.floor(x).astype(int)
    y1, x1, fy, fx = np.minimum(y0 + 1, h - 1), np.minimum(x0 + 1, w - 1), y - y0, x - x0
    upper = plane[y0, x0] * (1 - fx) + plane[y0, x1] * fx
    return upper * (1 - fy) + (plane[y1, x0] * (1 - fx) + plane[y1, x1] * fx) * fy


@properties
@given(st.integers(0, 10**6), st.booleans(), st.tuples(st.integers(3, 90), st.integers(3, 90)))
def test_turned_donors_are_interpolated_exactly(seed, colour, size):
    "OpenCV before version 5 fails here: it rounds places to 1/32 of a pixel."
    pool = DonorPool(random_samples(seed, size=(48, 40), colour=colour), WILD)
    plan = DynamicLabelInjection(pool, fill="all").make_params(torch.zeros(6, *size, dtype=torch.uint8), seeded(seed))
    windows = target_windows(pool, plan, size)
    for d, start, step, (rows, cols) in zip(plan.donor, *crop_places(pool, plan, windows), windows):
        donor, shape = pool.donors[d], np.array([rows[1] - rows[0], cols[1] - cols[0]])
        places = start[:, None, None] + np.tensordot(step, np.mgrid[:shape[0], :shape[1]], 1)
        patch, mask = place_turned(donor, start, step, shape)
        share = between_pixels(donor.mask.astype(float), *places)
        assert patch.dtype == np.float32 and patch.shape == (len(donor.image), *shape) and mask.shape == tuple(shape)
        expected = np.stack([between_pixels(plane.astype(float), *places) for plane in donor.image])
        np.testing.assert_allclose(patch, expected, atol=0.02, rtol=0)
        assert (mask == (share >= 0.5))[abs(share - 0.5) > 1e-4].all()


def test_crops_may_be_longer_than_32767_pixels():
    image = (np.arange(40000) // 200).astype(np.uint8).reshape(1, 1, 40000).repeat(3, 1)
    donor = Donor("long", 1, image, image[0] > 190, (0, 0), (1, 39000), (0, 38200, 3, 1800), 1)
    patch, mask = place_turned(donor, np.array([1, 39800.0]), -np.eye(2), np.array([2, 36000]))
    assert (patch[0, 0] == image[0, 1, 39800:3800:-1]).all() and (mask[1] == donor.mask[0, 39800:3800:-1]).all()


def test_a_donor_across_its_image_does_not_grow_in_a_larger_target():
    mask = np.zeros((1, 6, 8), np.uint8)
    mask[0, 2:4] = 1
    inject = DynamicLabelInjection(DonorPool(make_samples(mask), FLIPS, margin=2), fill="all")
    labels = inject(torch.zeros(4, 1, 20, 20), torch.zeros(4, 20, 20, dtype=torch.uint8), seeded(0))[1]
    assert (labels > 0).sum((1, 2)).tolist() == [16] * 4 and (labels[:, :, 0] > 0).any(1).all()


# -- blending and labels ----------------------------------------------------------------------------------------------

def test_poisson_takes_the_margin_and_the_label_does_not():
    samples = random_samples(5, n=1, size=(32, 32))
    samples.masks[:], samples.masks[0, 10:16, 12:20] = 0, 2
    samples = make_samples(samples.masks, samples.images)
    images, masks = random_batch(7, n=1, size=(32, 32))
    masks[:] = 0
    donors, mask = torch.from_numpy(samples.images)[:, None], torch.from_numpy(samples.masks > 0)
    for margin in (0, 1, 4):
        pool = DonorPool(samples, STILL, margin)
        after, labels = DynamicLabelInjection(pool, p_poisson=1, fill="all")(images, masks)
        assert torch.equal(labels, torch.from_numpy(samples.masks))
        assert torch.equal(after, poisson_blend(images, donors, grow_mask(mask, margin)))
    inject = DynamicLabelInjection(pool, 1, "all", mix_gradients=True, region="image", grow_label=True)
    after, labels = inject(images, masks)
    assert torch.equal(labels, grow_mask(mask, 4) * 2)
    assert torch.equal(after, poisson_blend_image(images, donors, grow_mask(mask, 4)))
    labels = DynamicLabelInjection(pool, 0, "all", grow_label=True)(images, masks)[1]
    assert torch.equal(labels, torch.from_numpy(samples.masks)), "cut-paste keeps the mask"


@properties
@given(st.integers(0, 10**6), st.booleans(), st.sampled_from((1, 3)),
       st.sampled_from((torch.uint8, torch.float32, torch.float64)),
       st.sampled_from((torch.uint8, torch.int16, torch.int32, torch.int64)), st.sampled_from((STILL, FLIPS, WILD)))
def test_only_clean_images_change_and_only_near_the_label(seed, mix, channels, dtype, mask_dtype, transforms):
    images, masks = random_batch(seed, channels=channels, dtype=dtype, mask_dtype=mask_dtype)
    kept = images.clone(), masks.clone()
    inject = DynamicLabelInjection(DonorPool(random_samples(seed), transforms, margin=2), mix_gradients=mix)
    plan = inject.make_params(masks, seeded(seed))
    after, labels = inject(images, masks, seeded(seed))
    assert torch.equal(images, kept[0]) and torch.equal(masks, kept[1]), "inputs unchanged"
    assert after.dtype == dtype and labels.dtype == mask_dtype and after.shape == images.shape
    assert after.data_ptr() != images.data_ptr() and labels.data_ptr() != masks.data_ptr()
    others = np.setdiff1d(np.arange(len(images)), plan.target)
    assert torch.equal(after[others], images[others]) and torch.equal(labels[others], masks[others])
    near = grow_mask(labels > 0, 2)[:, None].expand_as(images)
    assert torch.equal(after[~near], images[~near])
    assert dtype == torch.uint8 or (0 <= after.min() and after.max() <= 1)
    for i, t in enumerate(plan.target):
        assert set(labels[t].unique().tolist()) <= {0, plan.label[i]}


@properties
@given(st.integers(0, 10**6))
def test_grey_donors_serve_colour_images(seed):
    images, masks = random_batch(seed, channels=1)
    inject = DynamicLabelInjection(DonorPool(random_samples(seed)))
    grey, colour = (inject(x, masks, seeded(seed))[0] for x in (images, images.expand(-1, 3, -1, -1)))
    assert torch.equal(colour, grey.expand(-1, 3, -1, -1))


@properties
@given(st.integers(0, 10**6), st.sampled_from((FLIPS, WILD)))
def test_colour_donors_are_three_grey_ones(seed, transforms):
    samples, (images, masks) = random_samples(seed, colour=True), random_batch(seed, channels=3)
    def inject(samples, images):
        return DynamicLabelInjection(DonorPool(samples, transforms), fill="all")(images, masks, seeded(seed))
    after, labels = inject(samples, images)
    for c in range(3):
        channel, same = inject(make_samples(samples.masks, samples.images[..., c]), images[:, c:c + 1])
        assert torch.equal(after[:, c:c + 1], channel) and torch.equal(labels, same)


def test_colour_donors():
    samples = random_samples(0, n=1, colour=True)
    inject = DynamicLabelInjection(DonorPool(samples, STILL), 0, "all")
    after, labels = inject(torch.zeros(1, 3, 16, 12, dtype=torch.uint8), torch.zeros(1, 16, 12, dtype=torch.uint8))
    inside = labels[0] > 0
    assert torch.equal(after[0][:, inside], torch.from_numpy(samples.images[0]).permute(2, 0, 1)[:, inside])
    with pytest.raises(ValueError, match="expected 3 channels like the donors, got 1"):
        inject(*random_batch(0))


# -- nothing goes wrong in the middle of an epoch ---------------------------------------------------------------------

def test_all_clean_and_no_clean():
    pool, (images, masks) = DonorPool(random_samples(0)), random_batch(0)
    for fill in ("uniform", "all"):
        inject, defective = DynamicLabelInjection(pool, fill=fill), masks.clone()
        defective[:, 0, 0] = 1
        after, labels = inject(images, defective)
        assert torch.equal(after, images) and torch.equal(labels, defective) and after is not images
        after, labels = inject(images, torch.zeros_like(masks))
        assert len(find_clean(labels)) == (6 if fill == "uniform" else 0)


def test_class_without_donors_is_passed_over():
    samples = random_samples(0)
    pool = DonorPool(make_samples(np.where(samples.masks == 2, 1, samples.masks), samples.images))
    masks = torch.zeros(20, 16, 12, dtype=torch.uint8)
    masks[:3, 0, 0] = 1
    after = DynamicLabelInjection(pool)(masks[:, None], masks, seeded(0))[1]
    assert pool.counts["Break"] == 0 and class_presence(after, 3).sum(0).tolist() == [3, 0, 3]


def test_an_empty_batch():
    images, masks = torch.zeros(0, 1, 16, 12), torch.zeros(0, 16, 12, dtype=torch.uint8)
    after, labels = DynamicLabelInjection(DonorPool(random_samples(0)))(images, masks)
    assert after.shape == images.shape and labels.shape == masks.shape


def test_a_donor_may_shrink_to_its_anchor():
    inject, images, masks, plan = all_injected(DonorPool(random_samples(0)))
    plan.scale[:] = 1e-6
    for blend in BLENDS:
        after, labels = inject.transform(images, masks, replace(plan, blend=[blend] * 6))
        places = labels.nonzero()[:, 1:][plan.target].T
        assert after.isfinite().all() and torch.equal(places, torch.from_numpy(np.stack([plan.y, plan.x])))


@properties
@given(st.integers(0, 10**6), st.tuples(st.integers(1, 20), st.integers(1, 20)), st.sampled_from(("exact", "image")),
       st.booleans())
def test_any_size_of_target_and_donor(seed, size, region, mix):
    rng = np.random.default_rng(seed)
    samples = random_samples(seed, n=4, size=tuple(rng.integers(1, 20, 2)))
    pool = DonorPool(samples, rng.choice([FLIPS, WILD]), margin=int(rng.integers(0, 4)))
    inject = DynamicLabelInjection(pool, fill="all", region=region, mix_gradients=mix, grow_label=mix)
    images, masks = torch.rand(3, 1, *size), torch.zeros(3, *size, dtype=torch.uint8)
    after, labels = inject(images, masks, seeded(seed))
    assert after.isfinite().all() and (labels > 0).flatten(1).any(1).all()


def test_stats_count():
    inject = DynamicLabelInjection(DonorPool(random_samples(0)))
    total = np.zeros(3, int)
    for seed in range(5):
        images, masks = random_batch(seed)
        total += class_presence(inject(images, masks, seeded(seed))[1], 3).sum(0) - class_presence(masks, 3).sum(0)
    clean = sum(len(find_clean(random_batch(s)[1])) for s in range(5))
    assert inject.stats.injected == dict(zip(CLASSES, total.tolist())) and total.sum() > 0
    assert (inject.stats.batches, inject.stats.images, inject.stats.clean) == (5, 30, clean)


@pytest.mark.parametrize("masks, reason", [
    (torch.ones(4, 16, 12, dtype=torch.uint8), "no image was defect-free"),
    (torch.zeros(4, 16, 12, dtype=torch.uint8), "all images were defect-free"),
    (torch.tensor([0, 0, 1, 2, 3]).reshape(5, 1, 1).expand(5, 16, 12), "no class that has donors was ever rarer"),
])
def test_doing_nothing_warns_once(masks, reason):
    inject = DynamicLabelInjection(DonorPool(random_samples(0)))
    images = torch.zeros(len(masks), 1, 16, 12, dtype=torch.uint8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2 * PATIENCE + 1):
            inject(images, masks)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert reason in str(caught[0].message) and "Crack" in str(caught[0].message)


def test_doing_something_does_not_warn():
    inject = DynamicLabelInjection(DonorPool(random_samples(0)), p_poisson=0, fill="all")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(PATIENCE + 1):
            inject(*random_batch(seed))
    assert sum(inject.stats.injected.values()) > 0


@pytest.mark.parametrize("change, message", [
    (dict(images=torch.zeros(2, 0, 8, 8)), r"images: expected \(B, C, H, W\), got \(2, 0, 8, 8\)"),
    (dict(images=torch.zeros(2, 8, 8, 3)), r"got \(2, 8, 8\) .*Channels come second: pass images.permute"),
    (dict(images=torch.zeros(2, 8, 8)), r"images: expected \(B, C, H, W\)"),
    (dict(images=torch.zeros(2, 1, 8, 8).int()), "expected uint8, uint16 or floats in 0..1 .*, got torch.int32"),
    (dict(images=torch.full((2, 1, 8, 8), -0.4)), "got -0.4 .. -0.4: inject before normalising"),
    (dict(images=torch.full((2, 1, 8, 8), torch.nan)), r"got NaN in images \[0, 1\]"),
    (dict(images=torch.rand(2, 1, 8, 8) * 200 + 2), r"got .* .. .*: divide by 255 or pass uint8"),
    (dict(images=torch.full((2, 1, 8, 8), 300.0)), "got 300 .. 300: inject before normalising"),
    (dict(masks=torch.zeros(2, 8, 8)),
     r"masks: expected integers .* got torch.float32 \(2, 8, 8\): they are all 0: pass masks.long\(\) if"),
    (dict(masks=torch.zeros(2, 8, 8, dtype=torch.bool)),
     r"got torch.bool .* True does not say of which class .*: pass masks.long\(\) \* k"),
    (dict(masks=torch.zeros(2, 8, 8, dtype=torch.uint16)),
     r"masks: expected integers .* got torch.uint16 .*: pass masks.long\(\)$"),
    (dict(masks=torch.zeros(2, 1, 8, 8, dtype=torch.long)),
     r"masks: expected integers \(B, H, W\).* got torch.int64 \(2, 1, 8, 8\): pass masks\[:, 0\]$"),
    (dict(masks=torch.full((2, 1, 8, 8), 2.0)), r"got torch.float32 \(2, 1, 8, 8\): pass masks\[:, 0\].long\(\)$"),
    (dict(masks=torch.zeros(2, 5, 8, 8, dtype=torch.long)), r"got torch.int64 \(2, 5, 8, 8\): .*without channels$"),
    (dict(masks=torch.full((2, 8, 8), 0.3)),
     "got torch.float32 .* fractions such as 0.3, .* resize masks without interpolation"),
    (dict(masks=torch.full((2, 8, 8), torch.nan)), "got torch.float32 .* there are NaN or infinite values among them"),
    (dict(masks=torch.ones(2, 3, 8, 8, dtype=torch.uint8)), r"the channels are equal: pass masks\[:, 0\]"),
    (dict(masks=torch.ones(2, 4, 8, 8, dtype=torch.uint8)), r"the channels are equal: pass masks\[:, 0\]"),
    (dict(masks=torch.ones(2, 8, 8, 1)), r"got torch.float32 \(2, 8, 8, 1\): .* pass masks\[..., 0\].long\(\) if"),
    (dict(masks=torch.zeros(2, 1, 1, 8, 8)), r"got torch.float32 \(2, 1, 1, 8, 8\): a mask holds one index"),
    (dict(images=torch.zeros(2, 8, 8).byte(), masks=torch.zeros(2, 1, 8, 8)),
     "images: expected .*Were images and masks swapped"),
    (dict(images=torch.zeros(2, 1, 8, 8).long()),
     r"got torch.int64: pass images.to\(torch.uint8\), if they are in 0..255"),
    (dict(images=torch.full((2, 1, 8, 8), -0.4).bfloat16()), "got -0.4.* .. -0.4.*: inject before normalising"),
    (dict(images=torch.zeros(2, 1, 8, 8).to(torch.float8_e5m2)), r"got torch.float8_e5m2: pass images.float\(\)"),
    (dict(masks=torch.zeros(8, 8, dtype=torch.long)), r"got torch.int64 \(8, 8\): pass masks\[None\]$"),
    (dict(masks=torch.zeros(3, 8, 8, dtype=torch.long)),
     r"masks: expected \(2, 8, 8\) on cpu like the images, got \(3, 8, 8\)"),
])
def test_wrong_batches(change, message):
    good = dict(images=torch.zeros(2, 1, 8, 8), masks=torch.zeros(2, 8, 8, dtype=torch.long))
    with pytest.raises(ValueError, match=message):
        DynamicLabelInjection(DonorPool(random_samples(0)))(**good | change)


@pytest.mark.parametrize("call, message", [
    (lambda s: DynamicLabelInjection(s), r"pool: expected a DonorPool, got Samples: make one by DonorPool\(samples\)"),
    (lambda s: DynamicLabelInjection(None), "pool: expected a DonorPool, got NoneType"),
    (lambda s: DonorPool((s.images, s.masks)), "DonorPool: expected Samples .*, got tuple"),
    (lambda s: DonorPool([s]), "DonorPool: expected Samples .*, got list"),
    (lambda s: DonorPool(s, {"Crack": dict(rotate=5)}),
     r"transforms: expected a DonorTransform for 'Crack', got dict: pass DonorTransform\("),
    (lambda s: DonorPool(s, DonorTransform()),
     "transforms: expected a dict with a DonorTransform for each class name, got DonorTransform"),
    (lambda s: DonorPool(s, ["Crack"]), "transforms: expected a dict .*, got list"),
    (lambda s: DonorPool(s, margin=2.5), "margin: expected a whole number of pixels, 0 or more, got 2.5"),
    (lambda s: DonorPool(s, margin="2"), "margin: expected a whole number of pixels, 0 or more, got '2'; .*'defect'"),
    (lambda s: DonorPool(s, margin=True), "margin: expected a whole number of pixels, 0 or more, got True"),
    (lambda s: DonorPool(s, components=1), "components: expected True or False, got 1"),
])
def test_wrong_types_of_a_pool(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call(random_samples(0))


@pytest.mark.parametrize("change, message", [
    (dict(images=np.zeros((2, 1, 8, 8))), "images: expected a torch tensor, got numpy.ndarray: torch.from_numpy"),
    (dict(masks=np.zeros((2, 8, 8), int)), "masks: expected a torch tensor, got numpy.ndarray: torch.from_numpy"),
    (dict(images=[torch.zeros(1, 8, 8)] * 2), "images: expected a torch tensor, got list"),
    (dict(masks=None), "masks: expected a torch tensor, got NoneType"),
    (dict(generator=0),
     r"generator: expected a torch.Generator on the CPU, .*, got 0: pass torch.Generator\(\).manual_seed\(0\)"),
    (dict(generator=np.random.default_rng(0)),
     r"generator: expected a torch.Generator on the CPU, .*, got Generator\(PCG64\) at"),
])
def test_wrong_types_of_a_batch(change, message):
    good = dict(images=torch.zeros(2, 1, 8, 8), masks=torch.zeros(2, 8, 8, dtype=torch.long))
    with pytest.raises(TypeError, match=message):
        DynamicLabelInjection(DonorPool(random_samples(0)))(**good | change)


# -- what masks hold --------------------------------------------------------------------------------------------------

ONE_CLASS = ("Defect",)


def remedy_of(inject, masks):
    "What the error says to pass, as code."
    with pytest.raises(ValueError, match="^masks: expected ") as refused:
        inject.make_params(masks)
    return re.search(r"pass (.+?)(?:, or |, if | if |; or|$)", str(refused.value))[1]


def index_masks(seed, classes, n=6, size=(16, 12)):
    "Masks of indices, each class in at least one pixel, and defect-free ones."
    masks = torch.randint(0, classes + 1, (n, *size), generator=seeded(seed)) * (torch.rand(n, *size,
        generator=seeded(seed)) < 0.1)
    masks[0, 0, :classes] = torch.arange(1, classes + 1)
    masks[-2:] = 0
    return masks


def channels_of(masks, classes, background):
    planes = torch.nn.functional.one_hot(masks, classes + 1).movedim(-1, 1)
    return planes if background else planes[:, 1:]


SPOILT = {
    "uint16": lambda m, k: m.to(torch.uint16), "float64": lambda m, k: m.double(), "float16": lambda m, k: m.half(),
    "a ToTensor": lambda m, k: m.float() / 255, "a ToTensor, half": lambda m, k: (m.float() / 255).half(),
    "a ToTensor, bfloat16": lambda m, k: (m.float() / 255).bfloat16(), "a ToTensor, channel": lambda m,
    k: m[:, None].float() / 255,
    "channel": lambda m, k: m[:, None], "channel behind": lambda m, k: m[..., None], "RGB": lambda m,
    k: m[:, None].expand(-1, 3, -1, -1),
    "one-hot": lambda m, k: channels_of(m, k, False), "one-hot bool": lambda m, k: channels_of(m, k, False).bool(),
    "one-hot float": lambda m, k: channels_of(m, k, False).float(), "one-hot behind": lambda m,
    k: channels_of(m, k, False).movedim(1, -1),
    "with background": lambda m, k: channels_of(m, k, True), "with background, bool": lambda m,
    k: channels_of(m, k, True).bool(),
    "of one image": lambda m, k: m[0]}


@properties
@given(st.integers(0, 10**6), st.integers(2, 7), st.sampled_from(sorted(SPOILT)))
def test_the_remedy_for_masks_works(seed, classes, kind):
    "Whatever a loader made of masks: what the error says to pass has the classes that the masks had."
    names = tuple("ABCDEFG"[:classes])
    inject, masks = DynamicLabelInjection(full_pool(names)), index_masks(seed, classes)
    passed = eval(remedy_of(inject, SPOILT[kind](masks, classes)),
                  dict(masks=SPOILT[kind](masks, classes), torch=torch))
    assert passed.ndim == 3 and torch.equal(passed.long(), masks[:1] if kind == "of one image" else masks)
    inject.make_params(passed)


@pytest.mark.parametrize("spoil", [lambda m: m.bool(), lambda m: m.float(), lambda m: m.byte() * 255,
                                   lambda m: m[:, None].bool(), lambda m: m.half()])
def test_the_remedy_for_one_class(spoil):
    inject, masks = DynamicLabelInjection(full_pool(ONE_CLASS), fill="all"), index_masks(0, 1)
    assert torch.equal(eval(remedy_of(inject, spoil(masks)), dict(masks=spoil(masks), torch=torch)).long(), masks)


def test_no_advice_erases_defects():
    "All that a ToTensor may make of masks: never is a cast advised that makes zeros of them."
    inject = DynamicLabelInjection(full_pool(CLASSES))
    for masks in (index_masks(0, 3) / 255, index_masks(0, 3)[:, None] / 255, (index_masks(0, 3) / 255).half(),
                  index_masks(0, 3) / 3):
        with pytest.raises(ValueError) as refused:
            inject(torch.zeros(6, 1, 16, 12), masks)
        assert ".long()" not in str(refused.value)


@pytest.mark.parametrize("change, message", [
    (lambda m: (m > 0).byte() * 255,
     "these look like masks of 0 and 255: write the index of its class, .* pass ignore_index=255$"),
    (lambda m: m.masked_fill(m == 2, 255),
     r"got 0..255 \(255 in images \[0.*: where 255 marks pixels .*, pass ignore_index=255$"),
    (lambda m: m.masked_fill(m == 2, -1), r"got -1..3 \(-1 in images \[0.*pass ignore_index=-1$"),
    (lambda m: m.masked_fill(m == 2, -100), r"got -100..3 \(-100 in images \[0.*pass ignore_index=-100$"),
    (lambda m: m + 1,
     r"got 1..4 \(4 in images .*the background is 0 and the classes are 1..3; do the masks hold one more"),
    (lambda m: m * 60, r"got 0..180 \(60, 120, 180 in images .*grey levels"),
    (lambda m: m * 2**40, r"\(1099511627776, 2199023255552, 3298534883328 in images .*grey levels"),
    (lambda m: m.char() - 2, r"got -2..1 \(-2, -1 in images \[0, 1, 2, 3, 4, 5\]"),
])
def test_values_that_are_no_class(change, message):
    inject, masks = DynamicLabelInjection(full_pool(CLASSES)), change(index_masks(0, 3))
    plan, state = inject.make_params(index_masks(0, 3)), torch.get_rng_state()
    for call in (lambda: inject(torch.zeros(6, 1, 16, 12), masks), lambda: inject.make_params(masks),
                 lambda: inject.transform(torch.zeros(6, 1, 16, 12), masks, plan)):
        with pytest.raises(ValueError, match=f"^masks: .*(?:{message})"):
            call()
    assert inject.stats.batches == 0 and torch.equal(torch.get_rng_state(), state), "nothing was drawn, nothing counted"


def test_classes_that_overlap():
    planes = channels_of(index_masks(0, 3), 3, False)
    planes[1] = 1
    with pytest.raises(ValueError, match=r"the classes overlap in images \[1\]: a mask holds one class"):
        DynamicLabelInjection(full_pool(CLASSES)).make_params(planes)


@properties
@given(st.integers(0, 10**6), st.integers(1, 7), st.sampled_from(MASK_DTYPES),
       st.sampled_from((None, 99, -1)))
def test_a_look_at_masks(seed, classes, dtype, ignore):
    masks = index_masks(seed, classes).to(dtype)
    if ignore == 99 or (ignore and dtype.is_signed):
        masks[torch.rand(masks.shape, generator=seeded(seed)) < 0.3] = ignore
        masks[-1] = ignore
    shown = look_at(masks, classes, ignore)
    by_hand = [[bool((m == k).any()) for k in range(1, classes + 1)] for m in masks]
    clean = [i for i, m in enumerate(masks) if ((m == 0) | (m == (ignore or 0))).all() and (m == 0).any()]
    assert shown.classes.tolist() == by_hand == class_presence(masks, classes).tolist()
    assert shown.clean.tolist() == clean == find_clean(masks, ignore).tolist()
    for other in (masks.mT.contiguous().mT, masks.repeat(1, 1, 2)[..., ::2].contiguous(), masks[:0]):
        if len(other) and other.stride() != masks.stride():
            assert look_at(other, classes, ignore).clean.tolist() == clean
    assert look_at(masks[:0], classes, ignore).classes.shape == (0, classes)


def test_more_classes_than_a_byte_counts():
    masks = torch.tensor([0, 255, 256, 300]).reshape(4, 1, 1)
    shown = look_at(masks, 300)
    assert np.argwhere(shown.classes).tolist() == [[1, 254], [2, 255], [3, 299]] and shown.clean.tolist() == [0]


# -- pixels that count for nothing ------------------------------------------------------------------------------------

@properties
@given(st.integers(0, 10**6), st.sampled_from((255, -1, -100)), st.sampled_from(("uniform", "all")), st.booleans(),
       st.floats(0, 1))
def test_ignored_pixels_keep_their_mark(seed, ignore, fill, grow, p):
    images, masks = random_batch(seed, mask_dtype=torch.int64)
    ignored = torch.rand(masks.shape, generator=seeded(seed)) < 0.3
    marked, shown = masks.masked_fill(ignored, ignore), masks.masked_fill(ignored, 0)
    settings = dict(p_poisson=p, fill=fill, grow_label=grow)
    after, labels = DynamicLabelInjection(DonorPool(random_samples(seed)), ignore_index=ignore, **settings)(images,
        marked, seeded(seed))
    expected = DynamicLabelInjection(DonorPool(random_samples(seed)), **settings)(images, shown, seeded(seed))
    assert torch.equal(labels == ignore, ignored) and torch.equal(after, expected[0])
    assert torch.equal(labels, expected[1].masked_fill(ignored, ignore)), "as if they were background, but for the mark"


def test_a_mask_of_nothing_known_is_no_target():
    masks = torch.zeros(4, 16, 12, dtype=torch.uint8)
    masks[0], masks[1], masks[1, 0, 0], masks[2, 0, 0] = 255, 255, 0, 255
    plan = DynamicLabelInjection(full_pool(CLASSES), fill="all", ignore_index=255).make_params(masks)
    assert sorted(plan.target) == [1, 2, 3]


@pytest.mark.parametrize("ignore, error, message", [
    (2, ValueError, "a value that masks have for no class, outside 0..3, got 2"),
    (0, ValueError, "outside 0..3, got 0"),
    (True, TypeError, "whole number such as 255, or None, got True"), (255.0, TypeError, "got 255.0"),
    ("255", TypeError, "got '255'")])
def test_ignore_index_is_no_class(ignore, error, message):
    with pytest.raises(error, match=f"ignore_index: expected .*{message}"):
        DynamicLabelInjection(full_pool(CLASSES), ignore_index=ignore)


def test_ignore_index_means_the_same_for_losses():
    images, masks = random_batch(0, mask_dtype=torch.int64)
    masks[:, :4] = 255
    labels = DynamicLabelInjection(full_pool(CLASSES), fill="all", ignore_index=255)(images, masks, seeded(0))[1]
    logits = torch.randn(6, 3, 16, 12, requires_grad=True)
    make_loss("baseline", ignore_index=255, classes=CLASSES)(logits, labels).backward()
    assert not logits.grad[:, :, :4].any() and logits.grad[:, :, 4:].all()
    assert count_batch(logits, labels, ignore_index=255).tp.sum() == ((logits > 0) & one_hot(labels, 3, 255)).sum()


# -- said when it is made ---------------------------------------------------------------------------------------------

def said(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    assert all(w.filename == __file__ for w in caught), "warnings point to the line that calls"
    return [str(w.message) for w in caught]


def test_what_can_never_be_injected_is_said():
    one = full_pool(ONE_CLASS)
    for choose in ("rarest", "random"):
        with pytest.raises(ValueError, match=r"'uniform' never injects .* one class \('Defect'\).*fill=0.5 "):
            DynamicLabelInjection(one, choose=choose)
    assert said(lambda: [DynamicLabelInjection(one, fill=fill) for fill in ("all", 0.5)]) == []
    assert said(lambda: DynamicLabelInjection(full_pool(CLASSES))) == []
    masks = np.zeros((2, 8, 8), np.uint8)
    masks[0, 2, 2] = 3
    without = DonorPool(make_samples(masks))
    for fill in ("uniform", "all"):
        words = said(lambda: DynamicLabelInjection(without, fill=fill))
        assert "for want of donors: Blowhole, Break (DonorPool(0 Blowhole" in words[0]


def test_a_share_that_is_reached_already_is_named():
    images, masks = torch.zeros(4, 1, 16, 12).byte(), index_masks(0, 1)[2:].byte()
    inject = DynamicLabelInjection(full_pool(ONE_CLASS), fill=0.01)
    masks[0] = 0
    words = said(lambda: [inject(images, masks, seeded(k)) for k in range(PATIENCE)])
    assert len(words) == 1 and "at least the share fill=0.01 of the images showed a defect already" in words[0]


def test_nothing_clean_is_said_with_the_first_batch():
    masks = torch.ones(4, 16, 12, dtype=torch.uint8)
    words = said(lambda: DynamicLabelInjection(full_pool(CLASSES))(torch.zeros(4, 1, 16, 12), masks))
    assert len(words) == 1 and "nothing injected in the first batch of 4 images: no image was defect-free" in words[0]
    assert "none of the samples of the pool is" in words[0]
    some = np.zeros((3, 16, 12), np.uint8)
    some[0, 3:5, 3:5] = 1
    pool = DonorPool(make_samples(some))
    inject = DynamicLabelInjection(pool, fill="all")
    assert pool.clean == 2 and said(lambda: inject(torch.zeros(4, 1, 16, 12), masks)) == []


def test_images_of_another_size_are_doubted_once():
    inject = DynamicLabelInjection(full_pool(CLASSES))
    batch = torch.full((2, 1, 20, 12), 9).byte(), torch.zeros(2, 20, 12).byte()
    words = said(lambda: [inject(*batch) for _ in range(3)])
    assert len(words) == 1 and "the images have 20 x 12 pixels, the donors were cut from images of 16 x 12" in words[0]
    assert "right for crops" in words[0] and "wrong for images resized" in words[0]
    assert said(lambda: inject(torch.zeros(2, 1, 16, 12), torch.zeros(2, 16, 12).byte())) == []


@pytest.mark.parametrize("scale, words", [
    (lambda x: (x / 255).byte(), "the largest byte is 1 of 255. Were floats of 0..1 cast to uint8"),
    (lambda x: x / 255**2, "divided by 255 twice"),
    (lambda x: x.byte(), None), (lambda x: x / 255, None), (lambda x: (x * 0).byte(), None), (lambda x: x * 0, None)])
def test_images_that_are_nearly_black(scale, words):
    images = scale(torch.arange(384.0).clamp(max=255).reshape(2, 1, 16, 12))
    inject = DynamicLabelInjection(full_pool(CLASSES))
    heard = said(lambda: [inject(images, torch.zeros(2, 16, 12).byte()) for _ in range(2)])
    assert len(heard) == (words is not None) and (words is None or words in heard[0])


@pytest.mark.parametrize("wrong", [dict(mix_gradients="no"), dict(grow_label=1), dict(grow_label="False")])
def test_switches_are_switches(wrong):
    with pytest.raises(TypeError, match=f"{next(iter(wrong))}: expected True or False, got"):
        DynamicLabelInjection(full_pool(CLASSES), **wrong)


@pytest.mark.parametrize("wrong", [dict(p_poisson=1.5), dict(p_poisson=float("nan")), dict(p_poisson="0.5"),
                                   dict(fill="half"), dict(fill=0), dict(fill=1), dict(fill=True), dict(fill=None),
                                   dict(fill=float("nan")), dict(min_contrast=-0.1), dict(min_contrast="0.1"),
                                   dict(min_contrast=True), dict(choose="first"), dict(region="box"),
                                   dict(blend="poison")])
def test_wrong_choices(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected"):
        DynamicLabelInjection(DonorPool(random_samples(0)), **wrong)


# -- other products ---------------------------------------------------------------------------------------------------

@properties
@given(st.integers(0, 10**6), st.floats(0.01, 0.99), st.integers(1, 12))
def test_a_share_of_the_batch_shows_a_defect(seed, fill, n):
    masks = random_batch(seed, n=n)[1]
    clean, defective = len(find_clean(masks)), n - len(find_clean(masks))
    plan = DynamicLabelInjection(full_pool(CLASSES), fill=fill).make_params(masks, seeded(seed))
    wanted = {int(np.floor(fill * n)), int(np.ceil(fill * n))}
    assert len(plan) in {min(max(w - defective, 0), clean) for w in wanted}
    shown = class_presence(masks, 3).sum(0)
    for k in plan.label:
        assert shown[k - 1] == shown.min(), "rarest first"
        shown[k - 1] += 1


def test_a_share_is_right_on_average():
    inject, masks = DynamicLabelInjection(full_pool(ONE_CLASS), fill=0.3), torch.zeros(4, 16, 12, dtype=torch.uint8)
    counts = [len(inject.make_params(masks, seeded(k))) for k in range(400)]
    assert set(counts) == {1, 2} and abs(np.mean(counts) - 1.2) < 0.1


@properties
@given(st.integers(0, 10**6), st.booleans())
def test_a_donor_for_each_component(seed, margin):
    rng = np.random.default_rng(seed)
    masks = (rng.random((3, 16, 12)) < 0.15) * rng.integers(1, 4, (3, 16, 12))
    masks[0, 5, 5] = 1
    pool = DonorPool(make_samples(masks), STILL, "defect" if margin else None, components=True)
    planes = [(m == k).astype(np.uint8) for m in masks for k in (1, 2, 3)]
    pieces = [cv2.connectedComponents(plane, connectivity=8)[0] - 1 for plane in planes]
    named = [(f"image {i}", k) for i in range(3) for k in (1, 2, 3)]
    assert [[(d.name, d.label) for d in pool.donors].count(each) for each in named] == pieces
    assert sum(d.mask.sum() for d in pool.donors) == (masks > 0).sum()


def test_a_component_comes_without_its_neighbours():
    image, mask = np.full((1, 20, 20), 100, np.uint8), np.zeros((1, 20, 20), np.uint8)
    for k, x in ((1, 4), (1, 7), (2, 10)):
        mask[0, 8:10, x:x + 2], image[0, 8:10, x:x + 2] = k, 10 * x
    pool = DonorPool(make_samples(mask, image), STILL, margin=4, components=True)
    assert [d.label for d in pool.donors] == [1, 1, 2]
    for donor in pool.donors:
        assert (donor.image[0][~donor.mask] == 100).all() and donor.mask.sum() == 4
        assert len(np.unique(donor.image[0][donor.mask])) == 1


def test_a_margin_for_each_defect():
    masks = np.zeros((2, 60, 60), np.uint8)
    masks[0, 4:6, 4:6], masks[1, 10:46, 10:46] = 1, 2
    pool = DonorPool(make_samples(masks), STILL, margin="defect")
    assert pool.margins.tolist() == [1, 4] == [d.margin for d in pool.donors] and "margin 1 to 4" in repr(pool)
    assert [defect_margin(np.ones((s, s), bool)) for s in (1, 6, 18, 90)] == [1, 1, 2, 10]
    targets, blank = torch.full((2, 1, 60, 60), 200, dtype=torch.uint8), torch.zeros(2, 60, 60, dtype=torch.uint8)
    inject = DynamicLabelInjection(pool, 1, "all", grow_label=True)
    plan = inject.make_params(blank, seeded(0))
    labels = inject.transform(targets, blank, plan)[1]
    for row in range(2):
        found = np.argwhere(labels[plan.target[row]].numpy())
        side = {0: 2 + 2 * 1, 1: 36 + 2 * 4}[plan.donor[row]]
        assert (np.ptp(found, axis=0) + 1).tolist() == [side, side]


def random_roi(rng, n, size):
    "Blobs: none, all, a few large, many small; one for all images, or one for each."
    noise = cv2.resize(rng.random((6, 5)).astype(np.float32), size[::-1])
    each = np.stack([cv2.resize(rng.random((6, 5)).astype(np.float32), size[::-1]) for _ in range(n)])
    return torch.from_numpy((noise if rng.random() < 0.5 else each) > rng.choice([-1, 0.2, 0.4, 0.6, 0.8, 2]))


@properties
@given(st.integers(0, 10**6), st.sampled_from((STILL, FLIPS, WILD)), st.sampled_from(("exact", "image")), st.booleans(),
       st.sampled_from((None, 0, 3, "defect")))
def test_nothing_is_injected_outside_the_roi(seed, transforms, region, grow, margin):
    rng, size = np.random.default_rng(seed), (40, 30)
    images, masks = random_batch(seed, size=size, channels=int(rng.integers(1, 4)))
    roi = random_roi(rng, len(images), size)
    pool = DonorPool(random_samples(seed, size=(16, 12)), transforms, margin)
    inject = DynamicLabelInjection(pool, 0.5, "all", region=region, grow_label=grow, min_contrast=0.2)
    after, labels = inject(images, masks, seeded(seed), roi=roi)
    outside = ~roi.broadcast_to(masks.shape)
    assert torch.equal(labels[outside], masks[outside])
    if region == "exact":
        assert torch.equal(after.movedim(1, 3)[outside], images.movedim(1, 3)[outside])
    plan = inject.make_params(masks, seeded(seed), roi)
    assert same(inject.transform(images, masks, InjectionPlan.from_json(plan.to_json())), (after, labels))
    free = inject.make_params(masks, seeded(seed))
    assert len(plan) + inject.stats.outside == len(free)
    assert set(plan.target) <= set(free.target) and sum(inject.stats.injected.values()) == len(plan)
    assert all(labels[i].ne(masks[i]).any() for i in plan.target)
    everywhere = torch.ones_like(roi)
    assert inject.make_params(masks, seeded(seed), everywhere) == free


def test_a_donor_finds_the_only_room_there_is():
    masks = np.zeros((1, 9, 9), np.uint8)
    masks[0, 2:4, 1:4] = 1
    inject = DynamicLabelInjection(DonorPool(make_samples(masks), STILL, margin=0), 0, "all")
    roi = torch.zeros(9, 9, dtype=torch.bool)
    roi[6:8, 5:8] = True
    blank, images = torch.zeros(3, 9, 9, dtype=torch.uint8), torch.zeros(3, 1, 9, 9)
    _, labels = inject(images, blank, roi=roi)
    assert torch.equal(labels == 1, roi.expand(3, 9, 9)) and inject.stats.outside == 0
    roi[7, 5] = False
    _, labels = inject(images, blank, roi=torch.stack([roi, ~roi, ~roi]))
    assert inject.stats.outside == 1 and labels.flatten(1).any(1).tolist() == [False, True, True]
    never = DynamicLabelInjection(DonorPool(make_samples(masks)), fill="all")
    words = said(lambda: [never(images, blank, roi=torch.zeros_like(roi)) for _ in range(PATIENCE)])
    assert "no donor has room inside the roi (150 images)" in words[-1]


def test_places_are_found_like_by_hand():
    rng = np.random.default_rng(0)
    for _ in range(60):
        roi, shape = rng.random(rng.integers(3, 12, 2)) < 0.9, rng.random(rng.integers(1, 5, 2)) < 0.6
        anchor = tuple(rng.integers(0, shape.shape).tolist())
        shape[anchor] = True
        for beyond in (False, True):
            wide = np.pad(roi, 5, constant_values=beyond)
            expected = np.zeros_like(roi)
            for y, x in np.argwhere(roi):
                top, left = y + 5 - anchor[0], x + 5 - anchor[1]
                expected[y, x] = wide[top:top + shape.shape[0], left:left + shape.shape[1]][shape].all()
            assert np.array_equal(find_places(roi, shape, anchor, beyond), expected)


@pytest.mark.parametrize("roi, error, message", [
    (torch.ones(2, 8, 8), TypeError, "got torch.float32: pass roi > 0"),
    (np.ones((8, 8), bool), TypeError, "roi: expected a torch tensor, got numpy.ndarray"),
    (torch.ones(8, 9, dtype=torch.bool), ValueError, r"expected \(8, 8\) for all images or \(2, 8, 8\) for each"),
    (torch.ones(3, 8, 8, dtype=torch.bool), ValueError, r"got \(3, 8, 8\)"),
])
def test_wrong_rois(roi, error, message):
    with pytest.raises(error, match=message):
        DynamicLabelInjection(full_pool(CLASSES))(torch.zeros(2, 1, 8, 8), torch.zeros(2, 8, 8).long(), roi=roi)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16, torch.uint16])
def test_a_blend_that_can_hardly_be_seen_is_pasted(dtype):
    "A step of 10 grey levels is faint, of 60 is not; both lie on another level than the target."
    images, masks = np.full((2, 20, 20), 90, np.uint8), np.zeros((2, 20, 20), np.uint8)
    masks[0, 8:12, 8:12], masks[1, 8:12, 8:12] = 1, 2
    images[0][masks[0] > 0], images[1][masks[1] > 0] = 100, 150
    pool = DonorPool(make_samples(masks, images), STILL)
    targets, blank = torch.full((2, 1, 20, 20), 40, dtype=torch.uint8), torch.zeros(2, 20, 20, dtype=torch.uint8)
    if dtype != torch.uint8:
        targets = from_working(targets / 255, dtype)
    for p, least, faint in ((1, 0, 0), (1, 0.1, 1), (1, 1, 1), (0, 0.1, 0)):
        inject = DynamicLabelInjection(pool, p, "all", min_contrast=least)
        after, labels = inject(targets, blank, seeded(3))
        plan = inject.make_params(blank, seeded(3))
        assert inject.stats.faint == faint and sorted(plan.label) == [1, 2]
        assert same(inject.transform(targets, blank, plan), (after, labels)), "without chance"
        weak = after[plan.target[plan.label == 1][0], 0][labels[plan.target[plan.label == 1][0]] > 0]
        level = (to_working(weak).double() * (1 if dtype == torch.uint8 else 255)).mean()
        assert abs(level - (100 if faint or not p else 50)) < 0.5
        assert set(labels.unique().tolist()) == {0, 1, 2}


@properties
@given(st.integers(0, 10**6), st.sampled_from((torch.float16, torch.bfloat16, torch.uint16)), st.integers(1, 6),
       st.booleans(), st.sampled_from((0.0, 0.5, 1.0)), st.booleans())
def test_other_precisions_are_float32_rounded(seed, dtype, channels, many, p, away):
    samples = random_samples(seed)
    if many and channels > 1:
        rng = np.random.default_rng(seed)
        samples = make_samples(samples.masks, rng.integers(0, 256, (8, 16, 12, channels), np.uint8))
    images, masks = random_batch(seed, channels=channels)
    inject = DynamicLabelInjection(DonorPool(samples), p, "all")
    given_images = from_working(images.float() / 255, dtype)
    kept = given_images.clone()
    with pytest.MonkeyPatch.context() as changed:
        if away:
            patch(changed, "goes_through_cpu", lambda device, plan: True)
        after, labels = inject(given_images, masks, seeded(seed))
    expected, same_labels = inject(to_working(given_images), masks, seeded(seed))
    assert after.dtype == dtype and torch.equal(after, from_working(expected, dtype))
    assert torch.equal(labels, same_labels) and torch.equal(given_images, kept)
    untouched = torch.from_numpy(np.setdiff1d(np.arange(6), find_clean(masks)))
    assert torch.equal(to_working(after)[untouched], to_working(given_images)[untouched])


def test_a_donor_of_sixteen_bits_is_257_times_that_of_eight():
    samples = random_samples(0)
    inject = DynamicLabelInjection(DonorPool(samples, FLIPS), 0, "all")
    images, masks = torch.zeros(6, 2, 16, 12, dtype=torch.uint8), torch.zeros(6, 16, 12, dtype=torch.uint8)
    plain, deep = inject(images, masks, seeded(0))[0], inject(images.to(torch.uint16), masks, seeded(0))[0]
    assert torch.equal(deep.int(), plain.int() * 257) and plain.any()


def test_twelve_bits_in_sixteen_are_doubted():
    images, masks = torch.full((4, 1, 16, 12), 4000).to(torch.uint16), torch.zeros(4, 16, 12, dtype=torch.uint8)
    inject = DynamicLabelInjection(full_pool(CLASSES), fill="all")
    words = said(lambda: [inject(images, masks) for _ in range(2)])
    assert len(words) == 1 and "the largest number is 4000 of 65535. Are they of 12 bits or fewer?" in words[0]


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.bfloat16])
def test_pictures_of_any_images(channels, dtype):
    inject = DynamicLabelInjection(full_pool(CLASSES), fill="all")
    images, masks = random_batch(0, channels=channels)
    images = images if dtype == torch.uint8 else from_working(images / 255, dtype)
    after, labels = inject(images, masks, seeded(0))
    assert len(show_batch(images, after, labels, inject.make_params(masks, seeded(0)), CLASSES).axes)


def test_donors_of_another_number_of_channels():
    samples = random_samples(0, colour=True)
    with pytest.raises(ValueError, match="expected 3 channels like the donors, got 4; make the pool from samples with"):
        DynamicLabelInjection(DonorPool(samples))(*random_batch(0, channels=4))


# -- loaders, pictures, devices ---------------------------------------------------------------------------------------

class Collate:
    def __init__(self, inject, generator=None):
        self.inject, self.generator = inject, generator
    def __call__(self, batch):
        return self.inject(*torch.utils.data.default_collate(batch), generator=self.generator)


def batches_of_workers(generator, start="fork"):
    """Two epochs of four batches of the same two images, each batch by a worker of its own, in which a small defect
    may land anywhere: as bytes, images and masks. Half are Poisson, so that compiled code runs in the workers, after
    it has run here."""
    mask = np.zeros((1, 48, 48), np.uint8)
    mask[0, 20:24, 20:24] = 1
    pool = DonorPool(make_samples(mask), dict(Blowhole=DonorTransform(p=1, shift=0.5)))
    inject = DynamicLabelInjection(pool, fill="all")
    data = [(torch.full((1, 48, 48), 0.5), torch.zeros(48, 48, dtype=torch.uint8))] * 8
    assert (inject(*torch.utils.data.default_collate(data))[1] > 0).any()
    loader = torch.utils.data.DataLoader(
        data, 2, num_workers=4, collate_fn=Collate(inject, generator), generator=seeded(0),
        multiprocessing_context=start, persistent_workers=start == "spawn")
    epochs = [list(loader), list(loader)]
    assert [len(e) for e in epochs] == [4, 4] and all((m > 0).flatten(1).any(1).all() for e in epochs for _, m in e)
    return [[i.numpy().tobytes() + m.numpy().tobytes() for i, m in e] for e in epochs]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_do_not_repeat_each_other(start):
    first, second = batches_of_workers(None, start)
    assert len({*first, *second}) == 8


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_would_repeat_each_other_with_a_generator_of_their_own():
    "What the test above would see if randomness came from anywhere but the generator that the loader reseeds."
    first, second = batches_of_workers(seeded(0))
    assert len({*first, *second}) == 1


def test_global_generator():
    images, masks = random_batch(0)
    inject, results = DynamicLabelInjection(DonorPool(random_samples(0)), fill="all"), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(inject(images, masks)[0])
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda x: pickle.loads(pickle.dumps(x))],
                         ids=["deepcopy", "copy", "pickle"])
def test_copies(copied):
    images, masks = random_batch(0)
    inject = DynamicLabelInjection(DonorPool(random_samples(0)), fill="all", ignore_index=200, mix_gradients=True)
    inject(images, masks, seeded(1))
    again = copied(inject)
    assert repr(again.stats) == repr(inject.stats) and again.ignore_index == 200
    assert same(again(images, masks, seeded(0)), inject(images, masks, seeded(0)))
    if copied is not copy.copy:
        assert again.pool is not inject.pool and again.stats is not inject.stats


# -- the environment --------------------------------------------------------------------------------------------------

def batch_and_result(**choices):
    images, masks = random_batch(0, n=12, dtype=torch.float32)
    inject = DynamicLabelInjection(DonorPool(random_samples(0), FLIPS), fill="all", **choices)
    return inject, images, masks, inject(images, masks, seeded(0))


@pytest.mark.parametrize("p_poisson", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("region", ["exact", "image"])
def test_compiled_is_the_same(p_poisson, region):
    "A plan with mirrors, applied in what `torch.compile` traces: at the first call, and after a graph was broken."
    inject, images, masks, expected = batch_and_result(p_poisson=p_poisson, region=region)
    plan = inject.make_params(masks, seeded(0))
    assert plan.hflip.any() and plan.vflip.any()
    torch._dynamo.reset()
    compiled = torch.compile(lambda i, m: [x + 0 for x in inject.transform(i, m, plan)], backend="eager")
    for _ in range(3):
        assert same(compiled(images, masks), expected)
    planned = torch.compile(lambda m, g: inject.make_params(m + 0, g), backend="eager")
    assert planned(masks, seeded(0)) == plan
    whole = torch.compile(lambda i, m, g: [x + 0 for x in inject(i + 0, m + 0, g)], backend="eager")
    for _ in range(2):
        assert same(whole(images, masks, seeded(0)), expected)


def test_made_in_a_compiled_step():
    inject, images, masks, expected = batch_and_result()
    pool, samples = inject.pool, random_samples(0)
    torch._dynamo.reset()
    step = torch.compile(lambda i, m, g: [x + 0 for x in DynamicLabelInjection(pool, fill="all")(i, m, g)],
                         backend="eager")
    assert same(step(images, masks, seeded(0)), expected)
    cut = torch.compile(lambda x: (x + 0, DonorPool(samples, FLIPS)), backend="eager")(images)[1]
    for a, b in zip(cut.donors, pool.donors):
        assert (a.image == b.image).all() and (a.mask == b.mask).all() and a.anchor == b.anchor


def test_compiled_after_many_graphs():
    "When the compiler gives up on a function it runs it as it is, but goes on to compile what that calls."
    inject, images, masks, expected = batch_and_result()
    torch._dynamo.reset()
    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    with torch._dynamo.config.patch({limit: 1}):
        step = torch.compile(lambda i, m, g: [x + 0 for x in inject(i, m, g)], backend="eager")
        for n in (12, 5, 7, 12):
            result = step(images[:n], masks[:n], seeded(0))
            assert same(result, inject(images[:n], masks[:n], seeded(0)))


def test_a_picture_in_a_compiled_step():
    inject, images, masks, (after, labels) = batch_and_result()
    plan = inject.make_params(masks, seeded(0))
    torch._dynamo.reset()
    drawn = torch.compile(lambda x: show_batch(x, after, labels, plan, CLASSES, limit=2), backend="eager")(images)
    assert len(drawn.axes) == 4


SURROUNDINGS = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16), "no gradients": torch.no_grad,
    "inference": torch.inference_mode,
    "device cpu": lambda: torch.device("cpu"), "device meta": lambda: torch.device("meta")}


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_surroundings_change_nothing(name):
    inject, images, masks, expected = batch_and_result()
    with SURROUNDINGS[name]():
        made = DynamicLabelInjection(DonorPool(random_samples(0), FLIPS), fill="all")
        results = [inject(images, masks, seeded(0)), made(images, masks, seeded(0))]
        random = DynamicLabelInjection(inject.pool, choose="random", fill="all").make_params(masks, seeded(0))
        torch.manual_seed(3)
        drawn = inject.make_params(masks)
    assert all(same(r, expected) for r in results) and len(random) == len(drawn) > 0
    assert random == DynamicLabelInjection(inject.pool, choose="random", fill="all").make_params(masks, seeded(0))
    torch.manual_seed(3)
    assert drawn == inject.make_params(masks), "the global generator is the CPU's"


@pytest.mark.parametrize("setting", ["torch.set_default_dtype(torch.float64)", "torch.set_default_device('meta')",
                                     "torch.set_default_device('cpu')"])
def test_defaults_change_nothing(setting):
    "In a process of its own, where the defaults are set before the library is imported."
    code = f"""
import torch
{setting}
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_injection as t, hashlib
with torch.device("cpu"): inject, images, masks, _ = t.batch_and_result()
pool = t.DonorPool(t.random_samples(0), t.FLIPS)
results = t.DynamicLabelInjection(pool, fill="all")(images, masks, torch.Generator("cpu").manual_seed(0))
print(hashlib.sha256(b"".join(x.numpy().tobytes() for x in results)).hexdigest())
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    expected = batch_and_result()[3]
    assert out.stdout.split()[-1] == hashlib.sha256(b"".join(x.numpy().tobytes() for x in expected)).hexdigest()


def test_four_threads_share_one_injection():
    inject, images, masks, expected = batch_and_result()
    inject.stats, wrong = InjectionStats(dict.fromkeys(CLASSES, 0)), []

    def work():
        for _ in range(25):
            if not same(inject(images, masks, seeded(0)), expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong and (inject.stats.batches, inject.stats.images) == (100, 1200)
    assert sum(inject.stats.injected.values()) == 100 * len(find_clean(masks))


def test_counting_never_waits_for_a_thread_that_was_not_forked():
    held = threading.Event()

    def hold():
        with COUNTING:
            held.set()
            released.wait(20)

    released, inject = threading.Event(), batch_and_result(p_poisson=0)[0]
    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    images, masks = random_batch(0)
    child = os.fork()
    if child == 0:
        inject(images.float() / 255, masks, seeded(0))
        os._exit(0)
    for _ in range(200):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.05)
    else:
        os.kill(child, 9)
    released.set()
    thread.join()
    assert done == child and status == 0


# -- by way of the CPU ------------------------------------------------------------------------------------------------

def test_which_way_a_plan_takes():
    inject, images, masks, _ = batch_and_result()
    plan = inject.make_params(masks, seeded(0))
    pasted = replace(plan, blend=["cutpaste"] * len(plan))
    for device in ("cuda", "cuda:1", "mps", "xpu"):
        assert goes_through_cpu(torch.device(device), plan)
        assert not goes_through_cpu(torch.device(device), pasted)
    assert not goes_through_cpu(torch.device("cpu"), plan)


@properties
@given(st.integers(0, 10**6), st.sampled_from((torch.uint8, torch.float32)), st.sampled_from(("exact", "image")),
       st.booleans())
def test_the_way_through_the_cpu_gives_the_same(seed, dtype, region, marked):
    "Every plan sent that way, here without another device."
    images, masks = random_batch(seed, dtype=dtype, channels=3, mask_dtype=torch.int64)
    if marked:
        masks[:, 3:5] = 255
    inject = DynamicLabelInjection(DonorPool(random_samples(seed)), region=region, ignore_index=255, fill="all")
    expected, kept = inject(images, masks, seeded(seed)), (images.clone(), masks.clone())
    with pytest.MonkeyPatch.context() as changed:
        patch(changed, "goes_through_cpu", lambda device, plan: True)
        assert same(inject(images, masks, seeded(seed)), expected) and same((images, masks), kept)
        assert not inject(images.float().div(300).requires_grad_(), masks)[0].requires_grad


class OnGpu(torch.Tensor):
    "A tensor that says it is on a GPU, as long as it is not copied to the CPU, and notes who copied what."
    copies = []

    @property
    def device(self):
        return torch.device("cuda")

    def cpu(self):
        OnGpu.copies.append(len(self))
        return self.as_subclass(torch.Tensor)


def test_only_targets_travel(monkeypatch):
    inject, images, masks, expected = batch_and_result(p_poisson=1)
    to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *a, **k: to(x) if a
                        and a[0] == torch.device("cuda") else to(x, *a, **k))
    plan, OnGpu.copies = inject.make_params(masks, seeded(0)), []
    got = apply_plan(inject, images.as_subclass(OnGpu), masks.as_subclass(OnGpu), plan)[:2]
    assert OnGpu.copies == [len(plan), len(plan)] and len(plan) < len(images)
    assert same([x.as_subclass(torch.Tensor) for x in got], expected)


@pytest.mark.parametrize("channels, dtype", [(1, torch.uint8), (3, torch.float32)])
def test_show_batch(channels, dtype):
    images, masks = random_batch(0, channels=channels, dtype=dtype)
    inject = DynamicLabelInjection(DonorPool(random_samples(0)), fill="all")
    plan = inject.make_params(masks, seeded(0))
    fig = show_batch(images, *inject.transform(images, masks, plan), plan, CLASSES)
    titles = [ax.get_title() for ax in fig.axes[:len(plan)]]
    assert titles == [f"{CLASSES[k - 1]}\n{name}" for k, name in zip(plan.label, plan.blend)]
    assert [ax.get_ylabel() for ax in (fig.axes[0], fig.axes[len(plan)])] == ["before", "after"]
    empty = InjectionPlan.from_json(json.dumps({name: [] for name in vars(plan)}))
    nothing = show_batch(images, images, masks, empty, CLASSES)
    assert nothing.axes[0].get_title() == "nothing injected"


def test_show_batch_of_what_has_gradients():
    inject, images, masks, plan = all_injected(DonorPool(random_samples(0)))
    after, labels = inject.transform(images.requires_grad_(), masks, plan)
    assert not after.requires_grad and len(show_batch(images, after, labels, plan, CLASSES).axes) == 12


@pytest.mark.parametrize("change, message", [
    (dict(classes=()), r"plan: expected 1 <= label <= 0, .*pass the class names of the plan's pool, not \(\)"),
    (dict(after=torch.zeros(3, 1, 16, 12)),
     "plan: expected 0 <= target <= 2, .*pass the batch of this plan, not 3 images"),
    (dict(masks=torch.zeros(2, 16, 12, dtype=torch.uint8)), "plan: expected 0 <= target <= 1, .*not 2 images"),
])
def test_show_batch_of_another_batch(change, message):
    inject, images, masks, plan = all_injected(DonorPool(random_samples(0)))
    with pytest.raises(ValueError, match=message):
        show_batch(**dict(before=images, after=images, masks=masks, plan=plan, classes=CLASSES) | change)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_cuda_agrees():
    images, masks = random_batch(0, channels=3, dtype=torch.float32)
    for region in ("exact", "image"):
        inject = DynamicLabelInjection(DonorPool(random_samples(0)), fill="all", region=region)
        plan = inject.make_params(masks.cuda(), seeded(0))
        assert plan == inject.make_params(masks, seeded(0))
        (a, la), (b, lb) = inject.transform(images.cuda(), masks.cuda(), plan), inject.transform(images, masks, plan)
        assert a.is_cuda and torch.equal(la.cpu(), lb)
        torch.testing.assert_close(a.cpu(), b, atol=1e-6, rtol=0)


def test_the_mark_of_the_pool_holds_unless_another_is_given():
    plain = random_samples(0)
    marked = Samples(plain.images, plain.masks, plain.table, plain.classes, "own", ignore_index=255)
    pool = DonorPool(marked)
    assert DynamicLabelInjection(pool).ignore_index == 255
    assert DynamicLabelInjection(DonorPool(plain)).ignore_index is None
    assert DynamicLabelInjection(pool, ignore_index=-1).ignore_index == -1, "a loader may mark them otherwise"
    for a, b in zip(pool.donors, DonorPool(plain).donors):
        assert (a.image == b.image).all() and (a.mask == b.mask).all()


@pytest.mark.parametrize("whole", [False, True])
def test_what_is_marked_beside_a_donor_does_not_reach_the_target(whole):
    "Whatever the camera saw on marked pixels, the blends are the same to the bit; an image without background, too."
    masks, rng = np.full((1, 16, 12), 255 if whole else 0, np.uint8), np.random.default_rng(0)
    masks[0, 4:11, 3:10], masks[0, 6:9, 5:8] = 255, 1
    images = rng.integers(60, 200, masks.shape).astype(np.uint8)
    columns = ["name", "class", "tile", "exposure", "width", "height", "usable"]
    table = pd.DataFrame([("a", "A", 0, 1, 12, 16, True)], columns=columns)
    results = []
    for grey in (0, 255):
        shown = np.where(masks == 255, np.uint8(grey), images)
        samples = Samples(shown, masks, table, ("A",), "own", ignore_index=255)
        pool = DonorPool(samples, {"A": DonorTransform(p=1, rotate=20)})
        for p in (0.0, 1.0):
            target = torch.full((2, 1, 16, 12), 100, dtype=torch.uint8)
            clean = torch.zeros(2, 16, 12, dtype=torch.uint8)
            results += DynamicLabelInjection(pool, p_poisson=p, fill="all")(target, clean, seeded(0))
    for a, b in zip(results[:4], results[4:]):
        assert torch.equal(a, b) and (a != a[0, 0, 0]).any()
