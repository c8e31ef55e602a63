"""Batches: drawn by seed and step alone, the same photographs for every method; a data set is one row of a table."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dli.data.samples import Samples
from dli.data.synthetic import synthetic_tiles
from dli.experiment.loader import (DRAWN, batches, chance, clean_share_after_dli, draw_weights, drawn_indices,
                                   normalise, run_injection, run_samples, shuffled)
from dli.experiment.config import RunConfig, resolve
from dli.experiment.datasets import DATASETS, Dataset, data_fingerprint, load_dataset, resolve_dataset
from dli.experiment.state import fit
from dli.method.donors import DonorTransform


def config(**kwargs):
    return resolve(RunConfig(**dict(preset="smoke", dataset="synthetic", weights=None) | kwargs))


def test_methods_of_one_seed_see_the_same_photographs():
    c = [config(method=m) for m in ("baseline", "wce", "dli")]
    train, _ = run_samples(c[0])
    streams = [batches(x, train, run_injection(x, train), torch.device("cpu")) for x in c]
    for _ in range(5):
        (a, ma), (b, mb), (d, md) = map(next, streams)
        assert torch.equal(a, b) and torch.equal(ma, mb)
        defective = (ma > 0).flatten(1).any(1)
        assert torch.equal(a[defective], d[defective]) and torch.equal(ma[defective], md[defective])


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 5), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_shuffled_epochs_show_each_image_at_most_once(n, size, seed, epoch):
    if size > n:
        with pytest.raises(ValueError, match="larger than the"):
            shuffled(n, size, seed, 0)
        return
    steps = range(epoch * (n // size), (epoch + 1) * (n // size))
    shown = torch.cat([shuffled(n, size, seed, step) for step in steps])
    assert len(shown.unique()) == len(shown) == n // size * size and shown.max() < n


def test_chance_is_independent_of_seed_purpose_and_step():
    drawn = {(seed, what, step): torch.rand(4, generator=chance(seed, what, step)).tolist()
             for seed in (0, 1, 2**20) for what in DRAWN for step in (0, 1, 10**6)}
    assert len({tuple(v) for v in drawn.values()}) == 9 * len(DRAWN)
    assert drawn[1, "flips", 1] == torch.rand(4, generator=chance(1, "flips", 1)).tolist()


def test_balanced_draws_have_dlis_clean_share():
    labels = np.repeat([0, 1, 3], [300, 40, 10])
    share, weight = clean_share_after_dli(labels, 16), draw_weights(labels, 16, "balanced").numpy()
    drawn = np.bincount(labels, weight, minlength=4)
    np.testing.assert_allclose(drawn, [share, (1 - share) / 2, 0, (1 - share) / 2])
    assert len(np.unique(weight[labels == 1])) == 1
    assert 0 < share < 300 / 350  # some clean images are filled, others stay


def test_shares_without_balancing_keep_the_classes_proportions():
    labels = np.repeat([0, 1, 3], [300, 40, 10])
    clean, weight = clean_share_after_dli(labels, 16), draw_weights(labels, 16, "share").numpy()
    drawn = np.bincount(labels, weight, minlength=4)
    np.testing.assert_allclose(drawn, [clean, (1 - clean) * 0.8, 0, (1 - clean) * 0.2])


@pytest.mark.parametrize("defective,expected", [(20, 0.5), (240, 0.2)])
def test_with_one_class_the_share_is_that_of_a_number_to_fill(defective, expected):
    labels = np.repeat([0, 1], [300 - defective, defective])
    assert clean_share_after_dli(labels, 10, 0.5) == pytest.approx(expected, abs=0.01)
    drawn = np.bincount(labels, draw_weights(labels, 10, "share", 0.5).numpy())
    np.testing.assert_allclose(drawn, [expected, 1 - expected], atol=0.01)


def test_the_control_of_a_run_with_one_class_shows_as_many_defects_as_dli_does():
    tiles = synthetic_tiles(n=120, size=32, seed=0)
    own = tiles[np.flatnonzero(tiles.clean | (tiles.table["class"] == "Blowhole"))]
    train = Samples.from_arrays(own.images, own.masks, ["Blowhole"], parts=own.table["tile"])
    config = RunConfig(method="share", preset="smoke", dataset="synthetic", batch_size=16)
    draw = drawn_indices(config, train)
    shown = np.concatenate([train.label[draw(step).numpy()] for step in range(200)])
    assert 0.45 < (shown > 0).mean() < 0.55


@pytest.mark.parametrize("draw", ["shares", "shuffled", None])
def test_an_unknown_draw_has_no_weights(draw):
    with pytest.raises(ValueError, match="is not known: choose one of balanced, share"):
        draw_weights(np.repeat([0, 1], 20), 4, draw)


@pytest.fixture
def own(monkeypatch):
    "A data set of our own: one row, as the extend page adds it."
    transforms = dict(Crack=DonorTransform(rotate=180))
    row = Dataset(load=lambda size, threshold: replace(synthetic_tiles(n=90, size=size), source="own"),
                  fingerprint=lambda: "0123456789abcdef", mean=0.25, deviation=0.5, transforms=transforms)
    monkeypatch.setitem(DATASETS, "own", row)
    return row


def test_a_data_set_is_a_row_of_one_table(own):
    c = config(dataset="own", steps=2, evaluations=1)
    assert resolve_dataset("own") == "own" and c.data == data_fingerprint("own") == "0123456789abcdef"
    assert len(load_dataset("own", size=32)) == 90
    with pytest.raises(ValueError, match="expected one of auto, magnetic-tiles, synthetic, own"):
        load_dataset("other")
    train, val = run_samples(c)
    pool = run_injection(c, train).pool
    assert pool.transforms[train.classes.index("Crack")] == DonorTransform(rotate=180)
    assert pool.transforms[train.classes.index("Break")] == DonorTransform()
    assert fit(c, train, val, progress=False).source == "own"


def test_images_are_normalised_by_their_data_set(own):
    images = torch.full((1, 1, 2, 2), 255, dtype=torch.uint8)
    assert normalise(images, own).unique().item() == 1.5
    assert torch.equal(normalise(images, DATASETS["magnetic-tiles"]), (images.float() / 255 - 0.4319) / 0.1196)
    with pytest.raises(ValueError, match="measured on the images that train"):
        normalise(images, replace(own, mean=None, deviation=None))


def test_mean_and_deviation_of_the_data_set_reach_training_and_evaluation(own, monkeypatch):
    c = config(dataset="own", steps=1, evaluations=1, method="baseline")
    train, val = run_samples(c)
    first = fit(c, train, val, progress=False)
    monkeypatch.setitem(DATASETS, "own", replace(own, mean=0.75))
    second = fit(c, train, val, progress=False)
    assert first.curve[0]["loss"] != second.curve[0]["loss"]
    assert not first.counts.equals(second.counts)
