"""Series, similarity, tiles and the audit: properties on made-up photographs; the shipped index against its rules."""
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st

import dli
from dli.data.magnetic import find_magnetic_tiles, read_index
from dli.data.tiles import (REPEATED, SAME_TILE, audit_labels, connected, find_candidates, find_tiles, fingerprint,
                            number_series, photographs, series_similarity, shared_exposures, similarity,
                            suspect_images, texture, turned, write_tiles)

SHIPPED = Path(dli.__file__).parent / "data"  # tables that come with the package

ROOT = find_magnetic_tiles()
needs_real = pytest.mark.skipif(ROOT is None, reason="the Magnetic Tiles are not on this machine (set DLI_DATA)")
INDEX = read_index()


def made(photos, size=(100, 100)):
    numbers, exposures = map(np.array, zip(*photos))
    return pd.DataFrame(dict(number=numbers, exposure=exposures, width=size[0], height=size[1]))


# ---- series ------------------------------------------------------------------------------------------------------

PHOTOS = st.lists(st.tuples(st.integers(1, 5000), st.integers(0, 6)), unique_by=lambda p: p[0], min_size=1, max_size=60)
PAIR = st.tuples(st.integers(0, 30), st.integers(0, 30)).filter(lambda p: p[0] != p[1])


@given(PHOTOS, st.randoms())
@settings(max_examples=100, deadline=None)
def test_series_rise_and_do_not_jump(photos, random):
    index = made(photos)
    series = number_series(index)
    for s in np.unique(series):
        own = index[series == s].sort_values("number")
        assert s == own["number"].min()
        assert (np.diff(own["number"]) <= 200).all() and (np.diff(own["exposure"]) > 0).all()
    order = np.random.RandomState(random.randint(0, 999)).permutation(len(index))
    assert (number_series(index.iloc[order]) == series[order]).all()


@given(st.integers(0, 100), st.lists(st.booleans(), min_size=12, max_size=12))
@settings(max_examples=50, deadline=None)
def test_tiles_photographed_in_turns_are_told_apart_by_size(start, turns):
    """However two runs of exposures 1-6 are interleaved, the crop's size separates them."""
    left, rows = {True: list(range(1, 7)), False: list(range(1, 7))}, []
    for k, turn in enumerate(turns):
        which = turn if left[turn] else not turn
        rows.append((start + 10 * k, left[which].pop(0), 480 if which else 120, 360 if which else 280, which))
    index = pd.DataFrame(rows, columns=["number", "exposure", "width", "height", "tile"])
    assert pd.crosstab(number_series(index), index["tile"]).gt(0).sum(axis=1).eq(1).all()


def test_a_second_first_exposure_opens_a_series():
    assert number_series(made([(10, 1), (20, 2), (30, 1), (40, 3)])).tolist() == [10, 10, 30, 10]


# ---- similarity --------------------------------------------------------------------------------------------------

def surface(seed, shape=(300, 400)):
    rng = np.random.default_rng(seed)
    return cv2.GaussianBlur(rng.normal(120, 60, shape), (0, 0), 3) * 3 - 240


def picture(x, gain=1.0):
    return np.clip(x * gain, 0, 255).astype(np.uint8)


@given(seed=st.integers(0, 1000), dx=st.integers(0, 60), dy=st.integers(0, 40), gain=st.floats(0.5, 1.6))
@settings(max_examples=20, deadline=None)
def test_a_moved_and_brighter_photograph_is_the_same_tile(seed, dx, dy, gain):
    whole = surface(seed)
    a, b = picture(whole[:-40, :-60]), picture(whole[dy:dy + 260, dx:dx + 340], gain)
    other = picture(surface(seed + 1001)[:260, :340], gain)
    one, same, stranger = (fingerprint(texture(x)) for x in (a, b, other))
    alike, unlike = similarity(one, torch.stack([same, stranger]))
    assert alike > SAME_TILE > unlike


@given(seed=st.integers(0, 1000), turn=st.sampled_from([-3.0, -1.5, 2.0, 178.0, 180.0, 183.0]))
@settings(max_examples=12, deadline=None)
def test_turned_photographs_are_found(seed, turn):
    a = picture(surface(seed))
    matrix = cv2.getRotationMatrix2D((199.5, 149.5), turn, 1)
    b = cv2.warpAffine(a, matrix, (400, 300), borderMode=cv2.BORDER_REFLECT)
    assert similarity(fingerprint(texture(a)), turned(b)).max() > SAME_TILE


@given(seed=st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_similarity_is_symmetric_and_at_most_one(seed):
    rng = np.random.default_rng(seed)
    a, b = (fingerprint(rng.normal(size=rng.integers(20, (102, 159))).astype(np.float32)) for _ in range(2))
    assert similarity(a, b[None])[0] == pytest.approx(similarity(b, a[None])[0], abs=1e-5)
    assert similarity(a, a[None])[0] == pytest.approx(1, abs=1e-4) and similarity(a, b[None])[0] < 1


def test_shared_exposures():
    a, b = made([(1, 1), (2, 2), (3, 3)]), made([(7, 2), (8, 3), (9, 4)])
    assert shared_exposures(a, b) == [(2, 7), (3, 8)]
    assert shared_exposures(a.iloc[:1], b) == [(1, 7)]


@given(st.lists(PAIR, min_size=1, max_size=30))
def test_connected_groups_partition_and_keep_pairs(pairs):
    groups = connected(pairs)
    of = {n: k for k, g in enumerate(groups) for n in g}
    assert sum(map(len, groups)) == len(of) == len({n for p in pairs for n in p})
    assert all(of[a] == of[b] for a, b in pairs)
    reached = {g[0]: {g[0]} for g in groups}
    for g in groups:  # nothing is in a group that no chain of pairs leads to
        for _ in g:
            reached[g[0]] |= {n for p in pairs if set(p) & reached[g[0]] for n in p}
        assert reached[g[0]] == set(g)


# ---- the audit ---------------------------------------------------------------------------------------------------

def test_audit_by_hand():
    classes = ["Fray", "Free", "Crack", "Break", "Free", "Free", "Crack"]
    index = pd.DataFrame({"tile": [1, 1, 2, 2, 3, 3, 4], "class": classes})
    audit = audit_labels(index)
    assert audit["tile"].tolist() == [1, 2] and audit["finding"].tolist() == ["partly free", "classes disagree"]
    assert audit.loc[0, ["Fray", "Free", "Crack"]].tolist() == [1, 1, 0]
    suspect = suspect_images(index["tile"].to_numpy(), (index["class"] == "Free").to_numpy())
    assert suspect.tolist() == [False, True] + [False] * 5


# ---- the shipped index -------------------------------------------------------------------------------------------

def test_shipped_index_follows_from_the_rules():
    assert (find_tiles(INDEX) == INDEX["tile"]).all()
    assert (suspect_images(INDEX["tile"].to_numpy(), (INDEX["class"] == "Free").to_numpy()) == INDEX["suspect"]).all()
    shipped = pd.read_csv(SHIPPED.joinpath("magnetic_tiles_audit.csv"))
    assert shipped.equals(audit_labels(INDEX))


@pytest.mark.parametrize("together", [
    (85602, 85998, 88149), (108719, 108889), (853, 797), (346311, 346332, 346347, 346361, 346381, 346414)])
def test_protocols_examples(together):
    assert INDEX.set_index("number")["tile"][list(together)].nunique() == 1


@needs_real
def test_shipped_files_are_what_write_tiles_writes(tmp_path):
    write_tiles(ROOT, tmp_path)
    for name in ("magnetic_tiles.csv", "magnetic_tiles_audit.csv"):
        assert (tmp_path / name).read_bytes() == SHIPPED.joinpath(name).read_bytes(), name


@needs_real
def test_joined_series_are_alike_and_the_hardest_others_are_not():
    index = INDEX.assign(series=number_series(INDEX))
    of = dict(tuple(index.groupby("series")))
    hard = [(6539, 37262), (54901, 68359), (258819, 260482), (241352, 319420)]
    pairs = [(a, b) for g in REPEATED for a, b in zip(g, g[1:])]
    needed = index[index["series"].isin({s for p in pairs + hard for s in p})]
    pictures = dict(zip(needed["number"], photographs(ROOT, needed)))
    assert min(series_similarity(pictures, of[a], of[b]) for a, b in pairs) > SAME_TILE
    assert max(series_similarity(pictures, of[a], of[b]) for a, b in hard) < SAME_TILE - 0.05


@needs_real
@pytest.mark.slow
def test_search_finds_exactly_the_repeated_series():
    index = INDEX.assign(series=number_series(INDEX))
    of, pictures = dict(tuple(index.groupby("series"))), dict(zip(INDEX["number"], photographs(ROOT, INDEX)))
    found = find_candidates(pictures, index)
    alike = [(a, b) for a, b in zip(found["a"], found["b"]) if series_similarity(pictures, of[a], of[b]) > SAME_TILE]
    assert connected(alike) == list(REPEATED)
