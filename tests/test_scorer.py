"""The scorer: equals counting by hand, names every fault in one message, and does the same from the command line."""
import json
import subprocess
import sys
import unicodedata
import warnings
from dataclasses import replace
from hashlib import sha256
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dli import cli
from dli.data.folders import read_data_file, read_folder
from dli.data.magnetic import find_magnetic_tiles, magnetic_tiles, read_index
from dli.data.samples import Samples
from dli.data.splits import find_folds, split_samples
from dli.data.synthetic import synthetic_tiles
from dli.scoring.metrics import columns_of, summarize
from dli.scoring.scorer import (PARTITIONS, BadPredictions, fold_samples, fold_table, read_folds, read_mask,
                                score, score_counts)

CLASSES = ("Blowhole", "Break", "Crack", "Fray", "Uneven")
TILES = synthetic_tiles(n=120, size=32)
real = pytest.mark.skipif(find_magnetic_tiles() is None, reason="the Magnetic Tiles are not on this machine")


def write(folder, masks, names):
    folder.mkdir(exist_ok=True)
    for name, mask in zip(names, masks):
        Image.fromarray(mask).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def photographs():
    return magnetic_tiles()


@pytest.fixture
def predicted(tmp_path):
    "Perfect predictions of fold 1."
    part = fold_samples(TILES, 1)
    return write(tmp_path / "masks", part.masks, part.table["name"]), part


# ---- folds --------------------

def test_shipped_folds_fit_the_shipped_index():
    folds, index = read_folds(), read_index()
    assert folds[["name", "class", "tile"]].equals(index[["name", "class", "tile"]])
    columns = [f"{split}_{k}" for k in range(4) for split in ("tile", "image")]
    assert list(folds.columns) == ["name", "class", "tile", *columns] and PARTITIONS == (0, 1, 2, 3)
    for column in columns:
        assert (folds[column].notna() == index["usable"]).all() and set(folds[column].dropna()) == set(range(5))
    for k in PARTITIONS:
        assert (folds.groupby("tile")[f"tile_{k}"].nunique() <= 1).all()


FROZEN = {  # SHA-256 over each partition's two columns: published rows and other people's scores depend on them
    0: "443507db53a339c3", 1: "534b749c56a110cd", 2: "3c82ed5310f8af29", 3: "cb28c291814608d9"}


@pytest.mark.parametrize("partition", FROZEN)
def test_shipped_folds_are_frozen(partition):
    columns = read_folds()[["name", f"tile_{partition}", f"image_{partition}"]]
    assert sha256(columns.to_csv(index=False, lineterminator="\n").encode()).hexdigest()[:16] == FROZEN[partition]


def test_partitions_differ():
    folds = read_folds().dropna()
    for split in ("tile", "image"):
        for a, b in combinations(PARTITIONS, 2):
            assert (folds[f"{split}_{a}"] == folds[f"{split}_{b}"]).mean() < 0.4


@real
@pytest.mark.parametrize("split", ["tile", "image"])
def test_shipped_folds_are_those_of_split_samples(split):
    samples, folds = magnetic_tiles(size=16), read_folds()
    for partition in range(4):
        for fold in range(5):
            _, val = split_samples(samples, split, fold, partition)
            assert set(val.table["name"]) == set(folds["name"][folds[f"{split}_{partition}"] == fold])


@real
@pytest.mark.parametrize("split", ["tile", "image"])
def test_keeping_empty_masks_leaves_the_shipped_folds_alone(split):
    samples, folds = magnetic_tiles(size=16), read_folds()
    for partition in PARTITIONS:
        shipped, kept = folds[f"{split}_{partition}"], find_folds(samples, split, partition, keep_empty=True)
        assert (kept == shipped)[shipped.notna()].all() and (kept >= 0).sum() == shipped.notna().sum() + 6


def test_the_folds_together_are_all_usable_images():
    parts = [set(fold_samples(TILES, fold).table["name"]) for fold in range(5)]
    whole = set(fold_samples(TILES, None).table["name"])
    assert set.union(*parts) == whole == set(TILES.table["name"][TILES.table["usable"]]) and sum(
        map(len, parts)
    ) == len(whole)


def test_a_fold_is_what_the_table_says():
    folds = fold_table(TILES)
    for split, partition, fold in (("tile", 0, 3), ("image", 0, 3), ("tile", 1, 0), ("image", 3, 4)):
        assert list(fold_samples(TILES, fold, partition, split).table["name"]) == list(
            folds["name"][folds[f"{split}_{partition}"] == fold]
        )


def test_an_image_that_takes_no_part_is_not_asked_for(tmp_path):
    table = TILES.table.copy()
    table.loc[TILES.clean.argmax(), "usable"] = False
    samples = Samples(TILES.images, TILES.masks, table, TILES.classes, TILES.source)
    rest = samples[table["usable"].to_numpy()]
    assert fold_table(samples).loc[TILES.clean.argmax(), "tile_0":].isna().all()
    assert score(write(tmp_path / "m", rest.masks, rest.table["name"]), samples=samples)["iou_macro"] == 1


@pytest.mark.parametrize("wrong, message", [
    (dict(fold=5), r"expected a fold in 0\.\.4, got 5"),
    (dict(partition=-1), "expected a partition >= 0, a whole number, got -1"),
    (dict(fold=1, partition=0.5), "expected a partition >= 0, a whole number, got 0.5"),
    (dict(split="random"), "unknown split 'random': expected one of tile, image")])
def test_unknown_choices_are_refused(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        score(tmp_path, samples=TILES, **wrong)


# ---- scores --------------------

@given(st.integers(0, 2**31), st.floats(0, 1))
@settings(max_examples=15, deadline=None)
def test_score_equals_counting_by_hand(tmp_path_factory, seed, wrong):
    rng, part = np.random.default_rng(seed), fold_samples(TILES, 2)
    masks = np.where(rng.random(part.masks.shape) < wrong, rng.integers(0, 6, part.masks.shape), part.masks).astype(
        np.uint8
    )
    result = score(write(tmp_path_factory.mktemp("s") / "m", masks, part.table["name"]), 2, samples=TILES)
    truth, guess = part.masks[~part.clean], masks[~part.clean]
    for k, c in enumerate(CLASSES, 1):
        either = ((truth == k) | (guess == k)).sum()
        expected = ((truth == k) & (guess == k)).sum() / either if either else None
        assert result[f"iou_{c}"] == (expected if expected is None else pytest.approx(expected))
    largest = np.stack([(masks[part.clean] == k).sum((1, 2)) for k in range(1, 6)]).max(0)
    assert result["clean_alarm"] == pytest.approx((largest >= 0.0002 * 32 * 32).mean())
    assert result["auroc_image"] is None and result["alarm_at_95"] is None


def test_all_folds_are_scored_as_the_pool_of_their_counts(tmp_path):
    folder = write(tmp_path / "m", np.roll(TILES.masks, 1, axis=2), TILES.table["name"])
    pooled = summarize([score_counts(folder, fold, samples=TILES) for fold in range(5)], CLASSES)["pooled"]
    whole = score(folder, samples=TILES)
    assert 0 < whole["iou_macro"] < 1 and all(
        whole[name] == pytest.approx(pooled[name]) for name in whole if whole[name] is not None
    )


def test_empty_masks_find_nothing(tmp_path):
    folder = write(tmp_path / "m", np.zeros_like(TILES.masks), TILES.table["name"])
    result = score(folder, samples=TILES)
    assert all(result[f"iou_{c}"] == 0 for c in ("macro", "micro", *CLASSES)) and result["clean_alarm"] == 0


def test_masks_of_the_photographs_own_size(tmp_path):
    table = TILES.table.assign(width=96, height=64)
    samples = Samples(TILES.images, TILES.masks, table, TILES.classes, TILES.source)
    part = fold_samples(samples, 0)
    large = part.masks.repeat(2, axis=1).repeat(3, axis=2)
    assert score(write(tmp_path / "m", large, part.table["name"]), 0, samples=samples)["iou_micro"] == 1


@real
def test_published_masks_at_full_size_are_perfect(tmp_path, photographs):
    samples, root = photographs, find_magnetic_tiles()
    part = fold_samples(samples, 3)
    for row in part.table.itertuples():
        kind = CLASSES.index(row._2) + 1 if row._2 in CLASSES else 0
        mask = np.asarray(Image.open(root / f"MT_{row._2}/Imgs/{row.name}.png").convert("L"))
        Image.fromarray(((mask > 127) * kind).astype(np.uint8)).save(tmp_path / f"{row.name}.png")
    result = score(tmp_path, 3, samples=samples)
    assert result["iou_macro"] == result["iou_micro"] == 1 and result["clean_alarm"] == 0


def test_palette_masks_are_read_by_index(predicted):
    folder, part = predicted
    for name, mask in zip(part.table["name"], part.masks):
        image = Image.fromarray(mask)
        image.putpalette([v for k in range(256) for v in (255 - k, k, 128)])
        image.save(folder / f"{name}.png")
    with Image.open(folder / f"{part.table['name'][0]}.png") as image:
        assert image.mode == "P"
    assert score(folder, 1, samples=TILES)["iou_macro"] == 1


def test_other_folds_may_lie_beside(predicted):
    folder, _ = predicted
    write(folder, TILES.masks, TILES.table["name"])
    assert score(folder, 1, samples=TILES)["iou_macro"] == 1 and len(score_counts(folder, samples=TILES)) == len(TILES)


# ---- own samples --------------------

def own(names=None, size=(9, 14), channels=0, **columns):
    "Thirty images that are not square: five parts of a class, of another and clean ones, two photographs each."
    kinds = np.arange(30) // 10
    masks = np.zeros((30, *size), np.uint8)
    masks[:, 2:5, 3:8] = kinds[:, None, None]
    names = [f"{i:03}" for i in range(30)] if names is None else names
    table = pd.DataFrame(
        {
            "name": names,
            "class": np.array(["Free", "A", "B"])[kinds],
            "tile": np.arange(30) // 2,
            "exposure": 1,
            "width": size[1],
            "height": size[0],
            "usable": True,
        }
    ).assign(**columns)
    images = np.zeros((30, *size, *[channels] * (channels > 0)), np.uint8)
    return Samples(images, masks, table, ("A", "B"), "own")


def write_as(folder, masks, files):
    for file, mask in zip(files, masks):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(folder / file, "PNG")
    return folder


@pytest.mark.parametrize("channels", [0, 1, 3])
@pytest.mark.parametrize("size", [(9, 14), (14, 9), (9, 200)])
@pytest.mark.parametrize("fold, partition, split", [(None, 0, "tile"), (2, 0, "tile"), (1, 9, "image")])
def test_own_samples_of_any_shape(tmp_path, size, channels, fold, partition, split):
    samples = own(size=size, channels=channels)
    folder = write(tmp_path / "m", samples.masks, samples.table["name"])
    result = score(folder, fold, partition, split, samples)
    assert result["iou_macro"] == result["iou_of_images_B"] == 1 and result["clean_alarm"] == 0


def test_own_masks_of_the_photographs_own_shape(tmp_path):
    samples = own(width=42, height=18)
    folder = write(tmp_path / "m", samples.masks.repeat(2, axis=1).repeat(3, axis=2), samples.table["name"])
    assert score(folder, samples=samples)["iou_macro"] == 1
    with pytest.raises(BadPredictions, match="expected 14 x 9 or 42 x 18 pixels, got 9 x 14"):
        score(write(tmp_path / "t", samples.masks.transpose(0, 2, 1), samples.table["name"]), samples=samples)


NAMES = {
    "spaces": "part {} of 3",
    "dots": "v1.2.{}",
    "suffix": "{}.png",
    "upper": "{}.PNG",
    "hidden": ".{}",
    "comma": "a,{}",
    "quote": '"{}"',
    "accent": "caf\u00e9 {}",
    "korean": "\ud55c\uae00 {}",
    "glob": "[{}]*?",
    "folder": "Crack/{}",
    "deep": "a/b.c/{}",
    "dollar": "${}$",
    "colon": "12:{}",
}


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("suffix", [".png", ".PNG", ".Png"])
def test_names_that_people_use(tmp_path, kind, form, suffix):
    names = [NAMES[kind].format(f"{i:03}") for i in range(30)]
    other = "NFD" if form == "NFC" else "NFC"
    samples = own([unicodedata.normalize(form, n) for n in names])
    folder = write_as(tmp_path, samples.masks, [unicodedata.normalize(other, n) + suffix for n in names])
    assert score(folder, samples=samples)["iou_macro"] == score(folder, 3, samples=samples)["iou_macro"] == 1


def test_names_that_differ_in_their_folder_alone(tmp_path):
    samples = own([f"{k}/{i:03}" for k in "abc" for i in range(10)])
    masks = samples.masks.copy()
    masks[10:12] = 0  # a/000 and a/001 would do for b/000 and b/001 otherwise
    folder = write_as(tmp_path, masks, [f"{n}.png" for n in samples.table["name"]])
    assert score(folder, samples=samples)["iou_A"] == 0.8
    (folder / "b/000.png").rename(folder / "000.png")
    with pytest.raises(BadPredictions, match="(?s)b/000.png: missing.*000.png: unknown"):
        score(folder, samples=samples)


def test_files_in_folders_are_not_looked_at_where_no_name_holds_one(tmp_path):
    samples = own()
    folder = write_as(tmp_path, samples.masks, [f"{n}.png" for n in samples.table["name"]])
    write_as(tmp_path / "overlays", samples.masks[:2] * 0, ["000.png", "x.png"])
    assert score(folder, samples=samples)["iou_macro"] == 1


def test_two_files_for_one_name_are_named(tmp_path):
    samples = own(["caf\u00e9", *(f"{i:03}" for i in range(1, 30))])
    folder = write_as(tmp_path, samples.masks, [f"{n}.png" for n in samples.table["name"]])
    write_as(tmp_path, samples.masks[:2], ["cafe\u0301.png", "001.PNG"])
    with pytest.raises(
        BadPredictions,
        match="(?s)2 problems.*: expected one file, got .* and .*001.png: expected one file, got 001.PNG and 001.png",
    ):
        score(folder, samples=samples)


def test_hidden_files_beside_the_masks_are_harmless(tmp_path):
    samples = own()
    folder = write_as(tmp_path, samples.masks, [f"{n}.png" for n in samples.table["name"]])
    for name in (".DS_Store", "._000.png"):
        (folder / name).write_bytes(b"x")
    assert score(folder, samples=samples)["iou_macro"] == 1


def test_usable_as_numbers_scores_the_same(tmp_path):
    found = np.where(np.arange(30)[:, None, None] < 12, own().masks, 0).astype(np.uint8)
    folder = write(tmp_path / "m", found, own().table["name"])
    scores = [score(folder, samples=own(usable=usable)) for usable in (True, 1, 1.0)]
    assert scores[0] == scores[1] == scores[2] and scores[0]["iou_A"] == 0.2


def test_a_missing_class_is_named(tmp_path):
    samples = own(usable=np.arange(30) < 20)
    folder = write(tmp_path / "m", samples.masks, samples.table["name"])
    with pytest.warns(UserWarning, match="the dataset has no usable image of B: iou_macro"):
        score(folder, samples=samples)
    with pytest.raises(ValueError, match="5 folds need at least 5 tiles .* got {'B': 0}"):
        score(folder, 0, samples=samples)
    with pytest.raises(ValueError, match="the dataset has no usable image: there is nothing to score"):
        score(folder, samples=own(usable=False))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score(folder, samples=own())


def test_a_part_numbered_minus_one_stays_in_the_table():
    samples = own(tile=np.arange(30) // 2 - 1)
    table = fold_table(samples)
    assert table["tile"].tolist() == samples.table["tile"].tolist() and table["tile_0"].notna().all()


# ---- photographs of a data file --------------------

GEOMETRIES = {"as they are": "", "size": "size: 24", "oblong": "size: [20, 33]", "padded": "size: 24\npad: true",
              "scale": "scale: 0.6", "crop": "crop: 24", "scale and crop": "scale: 0.6\ncrop: 16",
              "large windows": "crop: 90"}
SIZES = {"one size": ((40, 56),), "mixed sizes": ((40, 56), (33, 71), (90, 20))}
GEOMETRY = [(a, b) for a in GEOMETRIES for b in SIZES]
KINDS = ("A", "B", "C")


def photographs_of(folder, geometry, sizes=((40, 56),), seed=0):
    "Two photographs of each of 24 parts: six parts of each class and of clean ones. Some pixels are ignored."
    rng, masks = np.random.default_rng(seed), {}
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for i in range(48):
        mask = np.zeros(sizes[i % len(sizes)], np.uint8)
        y, x = rng.integers(0, 10, 2)
        mask[y:y + 9, x:x + 9] = i // 2 % 4
        mask[y + 1, x:x + 9:2] = 3 * (i % 8 == 2)  # of single pixels: lost when the mask is made smaller
        mask[-3:, -5:] = 255
        masks[f"p{i // 2:02}_{i % 2}"] = mask
    for name, mask in masks.items():
        Image.fromarray(40 * (mask % 255)).save(folder / f"images/{name}.png")
        Image.fromarray(mask).save(folder / f"masks/{name}.png")
    (folder / "parts.yaml").write_text(
        f"layout: index\nclasses: [{', '.join(KINDS)}]\npart: '(p\\d+)_'\nignore: 255\n{geometry}\n")
    return masks


def predicted_as(folder, masks):
    "Masks as predictions: 0 where the truth is ignored."
    return write(folder, [np.where(m == 255, 0, m).astype(np.uint8) for m in masks.values()], masks)


@pytest.mark.parametrize("geometry, sizes", GEOMETRY)
def test_the_annotations_of_a_data_file_score_1(tmp_path, geometry, sizes):
    masks = photographs_of(tmp_path / "own", GEOMETRIES[geometry], SIZES[sizes])
    folder, data = predicted_as(tmp_path / "p", masks), read_data_file(tmp_path / "own")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = score(folder, samples=data)
    assert all(value == 1 for name, value in found.items() if name.startswith("iou_")) and found["clean_alarm"] == 0
    counts = score_counts(folder, samples=data)
    assert counts["name"].tolist() == list(masks)
    assert counts["pixels"].tolist() == [m.size - 15 for m in masks.values()]


@pytest.mark.parametrize("geometry, sizes", GEOMETRY)
@pytest.mark.parametrize("seed", range(3))
def test_wrong_blocks_are_counted_as_numpy_counts_them(tmp_path, geometry, sizes, seed):
    masks = photographs_of(tmp_path / "own", GEOMETRIES[geometry], SIZES[sizes], seed)
    rng = np.random.default_rng(seed)
    guesses = {name: np.where(m == 255, 0, m).astype(np.uint8) for name, m in masks.items()}
    for name in rng.choice(list(masks), 7, replace=False):
        y, x = rng.integers(0, 18, 2)
        guesses[name][y:y + 4, x:x + 25] = rng.integers(0, 4)
    guesses["p00_0"][-4:, -6:] = 1  # most of it over ignored pixels
    counts = score_counts(write(tmp_path / "p", guesses.values(), guesses), samples=read_data_file(tmp_path / "own"))
    kinds = {kind: columns_of(counts, kind, KINDS) for kind in ("tp", "fp", "fn", "p")}
    for i, (name, truth) in enumerate(masks.items()):
        guess, known = guesses[name], truth != 255
        for k in range(3):
            true, said = (truth == k + 1) & known, (guess == k + 1) & known
            expected = (true & said).sum(), (~true & said).sum(), (true & ~said).sum(), said.any()
            assert tuple(kinds[kind][i, k] for kind in kinds) == expected, (name, k)
    assert (kinds["fp"][0, 0], counts["class"][0]) == (4 * 6 - 3 * 5, "Free")


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("split", ["tile", "image"])
def test_folds_of_a_data_file_are_those_of_its_samples(tmp_path, geometry, split):
    masks = photographs_of(tmp_path / "own", GEOMETRIES[geometry])
    folder, data = predicted_as(tmp_path / "p", masks), read_data_file(tmp_path / "own")
    samples, seen = read_folder(data), []
    if split == "image" and geometry in ("crop", "scale and crop"):
        with pytest.raises(ValueError, match="deals the windows of a photograph into several, such as those of 'p0"):
            score(folder, 0, samples=data, split=split)
        return
    for fold in range(5):
        counts, val = score_counts(folder, fold, 2, split, data), split_samples(samples, split, fold, 2)[1]
        assert set(counts["name"]) == {n[:5] for n in val.table["name"]} and not columns_of(counts, "fp", KINDS).any()
        seen += counts["name"].tolist()
    assert sorted(seen) == list(masks)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_wrong_files_for_a_data_file_are_named(tmp_path, geometry):
    masks = photographs_of(tmp_path / "own", GEOMETRIES[geometry])
    folder = predicted_as(tmp_path / "p", masks)
    (folder / "p03_1.png").unlink()
    write(folder, [np.zeros((24, 24), np.uint8)] * 2, ["p04_0", "p05_0_y0_x0"])
    write(folder, [np.full((40, 56), 255, np.uint8)], ["p06_1"])
    with pytest.raises(BadPredictions) as error:
        score(folder, samples=read_data_file(tmp_path / "own"))
    said = str(error.value)
    assert "expected 48 index masks, one PNG per image. 4 problems" in said and "p03_1.png: missing" in said
    assert "p04_0.png: expected 56 x 40 pixels, got 24 x 24" in said and "p05_0_y0_x0.png: unknown" in said
    assert "p06_1.png: expected values 0..3, got 255; a prediction ignores nothing" in said


def test_a_broken_photograph_of_a_data_file_is_named(tmp_path):
    folder = predicted_as(tmp_path / "p", photographs_of(tmp_path / "own", "size: 24"))
    (tmp_path / "own/images/p02_1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="1 files can't be read right:\n  p02_1"):
        score(folder, samples=read_data_file(tmp_path / "own"))


def test_a_class_that_a_data_file_never_shows_is_named(tmp_path):
    folder = predicted_as(tmp_path / "p", photographs_of(tmp_path / "own", "crop: 24"))
    data = read_data_file(tmp_path / "own")
    with pytest.warns(UserWarning, match="the dataset has no usable image of D: iou_macro"):
        assert score(folder, samples=replace(data, classes=(*KINDS, "D")))["iou_D"] is None


def test_sixteen_bits_and_folders_of_photographs_are_scored(tmp_path):
    masks = photographs_of(tmp_path / "own", "size: 24\npad: true")
    for name in masks:
        for kind in ("images", "masks"):
            (tmp_path / "own" / kind / name[:3]).mkdir(exist_ok=True)
            (tmp_path / "own" / kind / f"{name}.png").rename(tmp_path / "own" / kind / name[:3] / f"{name}.png")
        Image.fromarray(np.full((40, 56), 3000, np.uint16)).save(tmp_path / f"own/images/{name[:3]}/{name}.png")
        (tmp_path / "p" / name[:3]).mkdir(exist_ok=True, parents=True)
    names = {f"{name[:3]}/{name}": mask for name, mask in masks.items()}
    assert score(predicted_as(tmp_path / "p", names), samples=read_data_file(tmp_path / "own"))["iou_macro"] == 1


def test_samples_of_a_data_file_take_masks_of_their_own_size_only(tmp_path):
    masks = photographs_of(tmp_path / "own", "size: 24\npad: true")
    samples = read_folder(tmp_path / "own")
    small = dict(zip(samples.table["name"], samples.masks))
    assert score(predicted_as(tmp_path / "small", small), samples=samples)["iou_macro"] == 1
    with pytest.raises(BadPredictions, match="p00_0.png: expected 24 x 24 pixels, got 56 x 40"):
        score(predicted_as(tmp_path / "p", masks), samples=samples)


# ---- faults --------------------

def image(mask):
    return lambda path: Image.fromarray(mask).save(path)


FAULTS = {
    "missing": (lambda path: path.unlink(), "missing"),
    "misnamed": (
        lambda path: path.rename(path.with_name("other.png")),
        "other.png: unknown; the dataset has no image of that name",
    ),
    "size": (image(np.zeros((32, 31), np.uint8)), "expected 32 x 32 pixels, got 31 x 32"),
    "white": (image(np.full((32, 32), 255, np.uint8)), "expected values 0..5, got 255; white for a defect"),
    "one bit": (image(np.eye(32, dtype=bool)), "expected values 0..5, got 255; white for a defect"),
    "six": (image(np.full((32, 32), 6, np.uint8)), "expected values 0..5, got 6"),
    "many": (image(np.arange(1024, dtype=np.uint8).reshape(32, 32)), r"expected values 0..5, got 6, 7, 8 \.\.\."),
    "colours": (
        image(np.zeros((32, 32, 3), np.uint8)),
        "expected one channel of class indices, got an image of mode RGB",
    ),
    "alpha": (image(np.zeros((32, 32, 2), np.uint8)), "got an image of mode LA"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:50]), "can't be read: truncated, or not an image"),
    "text": (lambda path: path.write_text("mask"), "can't be read: truncated, or not an image"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named(predicted, fault):
    folder, part = predicted
    spoil, message = FAULTS[fault]
    spoil(folder / f"{part.table['name'][3]}.png")
    with pytest.raises(BadPredictions, match=message) as error:
        score(folder, 1, samples=TILES)
    assert part.table["name"][3] in str(error.value) and str(folder) in str(error.value)


def test_all_faults_are_in_one_message(predicted):
    folder, part = predicted
    for name, (spoil, _) in zip(part.table["name"], FAULTS.values()):
        spoil(folder / f"{name}.png")
    with pytest.raises(BadPredictions, match=f"{len(FAULTS) + 1} problems") as error:
        score(folder, 1, samples=TILES)
    assert all(name in str(error.value) for name in part.table["name"][:len(FAULTS)])


def test_long_lists_are_cut(tmp_path):
    with pytest.raises(BadPredictions, match=r"120 problems(.|\n)*and 100 more"):
        score(tmp_path, samples=TILES)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(BadPredictions, match="no such folder"):
        score(tmp_path / "x", samples=TILES)


# ---- the command --------------------

def command(*words):
    return subprocess.run([sys.executable, "-m", "dli", "score", *map(str, words)], capture_output=True, text=True)


def main(words):
    return cli.main(["score", *words])


@real
def test_command(tmp_path, photographs):
    part = fold_samples(photographs, 4)
    folder = write(tmp_path / "masks", part.masks, part.table["name"])
    done = command(folder, "--fold", 4, "--json")
    assert done.returncode == 0 and json.loads(done.stdout) == score(folder, 4, samples=photographs)


@real
def test_command_prints_a_table_or_what_is_wrong(tmp_path, capsys, photographs):
    part = fold_samples(photographs, 4, 2, "image")
    folder = str(write(tmp_path / "masks", part.masks, part.table["name"]))
    assert main([folder, "--fold", "4", "--partition", "2", "--split", "image"]) == 0
    assert dict(line.split() for line in capsys.readouterr().out.splitlines())["iou_macro"] == "1.0000"
    assert main([folder, "--fold", "3"]) == 1
    said = capsys.readouterr()
    assert "problems" in said.err and "missing" in said.err and not said.out


def test_command_says_what_is_wrong(tmp_path):
    done = command(tmp_path, "--data", tmp_path / "nowhere")
    assert (
        done.returncode == 1 and "no such folder" in done.stderr and "Traceback" not in done.stderr and not done.stdout
    )


@pytest.mark.parametrize("words", [[], *(["masks", *option.split()] for option in (
    "--fold 7", "--partition 4", "--split random", "--size 64"))])
def test_command_refuses_wrong_usage(words, capsys):
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "Usage: dli score" in said or said.startswith("dli score: ")


def test_read_mask_resizes_to_the_nearest(tmp_path):
    mask = np.arange(6, dtype=np.uint8).repeat(4).reshape(1, 24).repeat(12, 0)
    Image.fromarray(mask).save(tmp_path / "m.png")
    assert (read_mask(tmp_path / "m.png", ((24, 12),), 5, (6, 6)) == np.arange(6)).all()
    assert (read_mask(tmp_path / "m.png", ((24, 12),), 5, (3, 12)) == np.arange(6).repeat(2)).all()


def test_the_command_scores_photographs_of_your_own(tmp_path, capsys):
    own = synthetic_tiles(n=60, size=32, seed=3)
    for kind, arrays in (("images", own.images), ("masks", own.masks)):
        (tmp_path / kind).mkdir()
        for name, array in zip(own.table["name"], arrays):
            Image.fromarray(array).save(tmp_path / kind / f"{name}.png")
    lines = f"layout: index\nclasses: {list(own.classes)}\npart: '^synthetic_(\\d+)_'\n"
    (tmp_path / "parts.yaml").write_text(lines)
    for data in (tmp_path, tmp_path / "parts.yaml"):
        assert main([str(tmp_path / "masks"), "--data", str(data), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["iou_macro"] == 1
    (tmp_path / "parts.yaml").write_text(lines + "crop: 20\n")
    assert main([str(tmp_path / "masks"), "--data", str(tmp_path), "--fold", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["iou_macro"] == 1
    assert main([str(tmp_path / "masks"), "--data", str(tmp_path), "--fold", "1", "--split", "image"]) == 1
    assert "choose split='tile', or score all folds" in capsys.readouterr().err
    (tmp_path / "parts.yaml").write_text("layout: index")
    assert main([str(tmp_path / "masks"), "--data", str(tmp_path)]) == 1
    assert "classes is missing" in capsys.readouterr().err
