"""Guessed data files: every layout is guessed to one that reads to the same samples; what is not sure is said."""
import json
import shutil
import warnings
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given, settings, strategies as st
from PIL import Image

from dli.data.annotations import part_by_pattern
from dli.data.folders import make_data_file, read_folder
from dli.data.guess import guess_data_file, pattern_of
from dli.data.synthetic import synthetic_tiles

LAYOUTS_HERE = Path(__file__).resolve().parent.parent.parent / "shared/own-data/layouts"
BALL_SCREWS = LAYOUTS_HERE.parent / "bsdata"
CLASSES = ["Blowhole", "Break", "Crack", "Fray", "Uneven"]
TILES = synthetic_tiles(n=60, size=32, seed=1)
PIECES = {
    "index": ("images", "index_masks", "parts.csv"), "palette": ("images", "palette_masks", "parts.csv"),
    "colour": ("images", "colour_masks"), "per-class": ("images", "masks_per_class"), "mvtec": ("mvtec",),
    "folder-per-class": ("folder_per_class",), "labelme": ("images", "labelme"), "yolo": ("images", "yolo"),
    "coco": ("images", "coco.json"), "16 bit": ("images_16bit", "index_masks", "parts.csv"),
}


def read_guess(folder, text):
    "The samples that a guessed data file gives, through the file as a user would have it."
    (folder / "parts.yaml").write_text(text)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return read_folder(folder)


@pytest.mark.parametrize("name", PIECES)
def test_every_layout_is_guessed_to_the_same_samples(name, tmp_path):
    if not LAYOUTS_HERE.is_dir():
        pytest.skip("the folders of layouts are not here")
    if name == "coco":
        pytest.importorskip("pycocotools")
    truth = read_folder(make_data_file(dict(layout="index", annotations="index_masks", classes=CLASSES, part="part"),
                                       LAYOUTS_HERE))
    for piece in PIECES[name]:
        (shutil.copytree if (LAYOUTS_HERE / piece).is_dir() else shutil.copy)(LAYOUTS_HERE / piece, tmp_path / piece)
    guess = guess_data_file(tmp_path)
    samples = read_guess(tmp_path, guess.text)
    names = [n.split("/")[-1] for n in samples.table["name"]]
    order = [names.index(n) for n in truth.table["name"]]
    numbers = np.array([0] + [truth.classes.index(c) + 1 for c in samples.classes])
    assert (samples.images[order] == truth.images).all()
    assert (numbers[samples.masks[order]] == truth.masks).mean() > (0.99 if name == "coco" else 0.999999)
    assert samples.table["class"].to_numpy()[order].tolist() == truth.table["class"].tolist()
    assert samples.table["tile"].to_numpy()[order].tolist() == truth.table["tile"].tolist()


def test_mixed_sizes_large_photographs_and_ball_screws(tmp_path):
    if not LAYOUTS_HERE.is_dir():
        pytest.skip("the folders of layouts are not here")
    for name in ("mixed_sizes", "large"):
        shutil.copytree(LAYOUTS_HERE / name, tmp_path / name)
    mixed, large = (guess_data_file(tmp_path / name) for name in ("mixed_sizes", "large"))
    assert len(read_guess(tmp_path / "mixed_sizes", mixed.text)) == 36 and "pad: true" in mixed.text
    windows = read_guess(tmp_path / "large", large.text)
    assert windows.clean.any() and (~windows.clean).any() and "crop: 512" in large.text
    guess = guess_data_file(BALL_SCREWS)
    data = make_data_file(yaml.safe_load(guess.text), BALL_SCREWS)
    assert (data.layout, data.clean, data.channels) == ("labelme", "all", 3) and data.crop
    assert any("taken for clean" in r for r in guess.reasons) and any("not sure" in r for r in guess.reasons)
    assert read_folder(data).classes == ("Pitting",)
    assert list(BALL_SCREWS.glob("*.yaml")) == []


def store(folder, masks, ending="", name="{}"):
    for kind, arrays, end in (("pictures", TILES.images, ""), ("truth", masks, ending)):
        (folder / kind).mkdir()
        for n, array in zip(TILES.table["name"], arrays):
            Image.fromarray(array).save(folder / kind / f"{name.format(n)}{end}.png")


def test_black_and_white_masks_are_one_class_and_255_beside_numbers_is_ignored(tmp_path):
    (tmp_path / "a").mkdir()
    store(tmp_path / "a", np.uint8(255) * (TILES.masks > 0), "_GT")
    guess = guess_data_file(tmp_path / "a")
    samples = read_guess(tmp_path / "a", guess.text)
    assert samples.classes == ("defect",) and samples.ignore_index is None
    assert sorted((samples.masks > 0).sum((1, 2))) == sorted((TILES.masks > 0).sum((1, 2)))
    (tmp_path / "b").mkdir()
    marked = TILES.masks.copy()
    marked[:, 0] = 255
    store(tmp_path / "b", marked)
    assert read_guess(tmp_path / "b", guess_data_file(tmp_path / "b").text).ignore_index == 255


def test_colours_without_names_are_listed(tmp_path):
    colours = np.array([[0, 0, 0], [200, 0, 0], [0, 200, 0], [0, 0, 200], [200, 200, 0], [0, 200, 200]], np.uint8)
    store(tmp_path, colours[TILES.masks])
    guess = guess_data_file(tmp_path)
    samples = read_guess(tmp_path, guess.text)
    assert len(samples.classes) == 5 and samples.table["tile"].nunique() == TILES.table["tile"].nunique()
    assert ((samples.masks > 0).sum() == (TILES.masks > 0).sum()) and any("5 colours" in r for r in guess.reasons)


def test_labelme_files_beside_photographs_with_clean_ones_in_a_folder(tmp_path):
    for n, name in enumerate(TILES.table["name"]):
        folder = tmp_path / ("ok" if n % 2 else "bad")
        folder.mkdir(exist_ok=True)
        Image.fromarray(TILES.images[n]).save(folder / f"{name}.png")
        if n % 2 == 0:
            shape = dict(label="pit", points=[[2, 2], [9, 2], [9, 9]], shape_type="polygon")
            (folder / f"{name}.json").write_text(json.dumps(dict(shapes=[shape], imagePath=f"{name}.png")))
    samples = read_guess(tmp_path, guess_data_file(tmp_path).text)
    assert (len(samples), samples.clean.sum(), samples.classes) == (60, 30, ("pit",))


def test_nothing_is_written_and_nothing_found_is_said(tmp_path):
    Image.fromarray(TILES.images[0]).save(tmp_path / "a.png")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="photographs were found in 1 folder, but no annotation"):
        guess_data_file(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(ValueError, match="expected a folder"):
        guess_data_file(tmp_path / "a.png")


WORD = st.text("abc19", min_size=1, max_size=4)


@given(st.lists(st.lists(WORD, min_size=1, max_size=4).map("_".join), min_size=1, max_size=30, unique=True))
@settings(max_examples=100, deadline=None)
def test_a_pattern_groups_and_finds_a_part_for_every_name(names):
    pattern = pattern_of(names)
    if pattern is not None:
        parts = [part_by_pattern(n, pattern) for n in names]
        assert all(parts) and 1 < len(set(parts)) < len(names)


@pytest.mark.parametrize("names,parts", [
    ([f"p{part}-{shot}" for part in range(3) for shot in range(4)], 3),
    ([f"part {part} exposure {shot}" for part in range(6) for shot in range(9)], 6),
    ([f"line2_{part:03d}_{shot}" for part in range(5) for shot in range(8)], 5),
])
def test_a_part_is_what_names_begin_with_however_many_shots_there_are(names, parts):
    pattern = pattern_of(names)
    assert len({part_by_pattern(name, pattern) for name in names}) == parts


def test_no_part_is_most_of_the_photographs():
    names = [f"{'01' if i else '02'}_{1000 + 5 * part + i}_spindle{part}" for part in range(6) for i in range(5)]
    assert part_by_pattern(names[7], pattern_of(names)) == "spindle1"


def test_a_table_of_parts_is_preferred(tmp_path):
    store(tmp_path, TILES.masks)
    table = pd.DataFrame({"name": TILES.table["name"], "serial": TILES.table["tile"], "label": TILES.table["class"]})
    table.to_csv(tmp_path / "parts.csv", index=False)
    samples = read_guess(tmp_path, guess_data_file(tmp_path).text)
    assert samples.classes == TILES.classes
    assert sorted(samples.table["class"]) == sorted(TILES.table["class"])


def test_many_small_defects_are_no_large_one(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    rng = np.random.default_rng(0)
    for i in range(12):
        mask = np.zeros((1000, 1500), np.uint8)
        mask[100:900:80, 100:1400:80] = 1
        mask = cv2.dilate(mask, np.ones((12, 12), np.uint8))  # 170 defects, 12 pixels across
        cv2.imwrite(str(tmp_path / f"images/{i}.png"), rng.integers(0, 256, mask.shape, np.uint8))
        cv2.imwrite(str(tmp_path / f"masks/{i}.png"), mask)
    guess = guess_data_file(tmp_path)
    assert "crop: the smaller defects are 12 pixels across" in "\n".join(guess.reasons)


# Nested folders

NESTED = [("a", "b/c"), ("a", "b"), ("line/1", "line/2", "other/3/x"), ("", "more")]


def outline(mask):
    "Corners x, y of a box about the defect."
    rows, columns = np.nonzero(mask)
    left, right, top, bottom = columns.min(), columns.max() + 1, rows.min(), rows.max() + 1
    return [[int(x), int(y)] for x, y in ((left, top), (right, top), (right, bottom), (left, bottom))]


def write_annotation(kind, path, corners, mask):
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "masks":
        Image.fromarray(np.uint8(255) * (mask > 0)).save(path.with_suffix(".png"))
    elif kind == "labelme":
        shapes = [dict(label="pit", points=corners, shape_type="polygon")] if corners else []
        path.with_suffix(".json").write_text(json.dumps(dict(shapes=shapes, imagePath=f"{path.name}.png")))
    elif kind == "yolo":
        line = " ".join(f"{v / 32:.6f}" for corner in corners for v in corner)
        path.with_suffix(".txt").write_text(f"0 {line}\n" if corners else "")


def coco_content(names, corners):
    images = [dict(id=i, file_name=f"{name}.png", width=32, height=32) for i, name in enumerate(names)]
    shapes = [dict(id=i, image_id=i, category_id=1, segmentation=[[v for corner in own for v in corner]])
              for i, own in enumerate(corners) if own]
    return dict(images=images, annotations=shapes, categories=[dict(id=1, name="pit")])


def store_nested(root, kind, folders, twice=False, left_out=()):
    "Photographs in nested folders, their annotations in parallel ones; twice: file names occur in each folder again."
    names = []
    corners = [outline(mask) if mask.any() else [] for mask in TILES.masks]
    for i, (image, mask) in enumerate(zip(TILES.images, TILES.masks)):
        at = folders[i % len(folders)]
        names.append(f"{at}/p_{i // len(folders) if twice else i}".strip("/"))
        path = root / "images" / f"{names[-1]}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
        if at not in left_out:
            write_annotation(kind, root / "annotations" / names[-1], corners[i], mask)
    if kind == "coco":
        (root / "coco.json").write_text(json.dumps(coco_content(names, corners)))
    return names


@pytest.mark.parametrize("twice", [False, True], ids=["names differ", "names occur again"])
@pytest.mark.parametrize("folders", NESTED, ids=" ".join)
@pytest.mark.parametrize("kind", ["masks", "labelme", "yolo", "coco"])
def test_nested_folders_are_read_as_one(kind, folders, twice, tmp_path):
    if kind == "coco":
        pytest.importorskip("pycocotools")
    names = store_nested(tmp_path, kind, folders, twice)
    guess = guess_data_file(tmp_path)
    content = yaml.safe_load(guess.text)
    assert content["layout"] == dict(masks="index").get(kind, kind) and content["images"] == "images"
    assert guess.reasons[0].startswith(f"layout: {content['layout']} fits 60 of 60 photographs")
    assert not any("not read" in reason for reason in guess.reasons)
    samples = read_guess(tmp_path, guess.text)
    assert sorted(samples.table["name"]) == sorted(names)
    order = samples.table["name"].tolist()
    order = [order.index(name) for name in names]
    shown = samples.masks[order] > 0
    assert (shown.any((1, 2)) == TILES.masks.any((1, 2))).all() and len(samples.classes) == 1
    assert kind != "masks" or (shown == (TILES.masks > 0)).all()


@pytest.mark.parametrize("kind", ["masks", "labelme", "yolo"])
def test_photographs_that_are_not_read_are_counted(kind, tmp_path):
    store_nested(tmp_path, kind, ("a", "b/c"), left_out=["b/c"])
    (tmp_path / "images").rename(tmp_path / "first")
    (tmp_path / "second").mkdir()
    (tmp_path / "first/b").rename(tmp_path / "second/b")
    guess = guess_data_file(tmp_path)
    assert "30 of 60 photographs are not read: 30 in second/b/c" in guess.reasons[0]
    assert len(read_guess(tmp_path, guess.text)) == 30


def test_folders_of_masks_beside_clean_photographs_are_classes(tmp_path):
    folders = ("scratch", "pit", "ok")
    store_nested(tmp_path, "masks", folders, left_out=["ok"])
    guess = guess_data_file(tmp_path)
    assert yaml.safe_load(guess.text)["layout"] == "per-class"
    assert read_guess(tmp_path, guess.text).classes == ("pit", "scratch")


def test_nested_labels_have_the_names_of_their_files_of_classes(tmp_path):
    store_nested(tmp_path, "yolo", ("a", "b/c"))
    for at in ("a", "b/c"):
        (tmp_path / "annotations" / at / "classes.txt").write_text("pit\nscratch")
    assert yaml.safe_load(guess_data_file(tmp_path).text)["classes"] == ["pit", "scratch"]
    (tmp_path / "annotations/a/classes.txt").write_text("scratch\npit")
    assert yaml.safe_load(guess_data_file(tmp_path).text)["classes"] == ["class 1"]


@pytest.mark.parametrize("kind", ["masks", "labelme", "yolo"])
def test_a_large_part_of_nested_folders_is_no_other_reading(kind, tmp_path):
    store_nested(tmp_path, kind, ("a",) * 19 + ("b/c",))
    reason = guess_data_file(tmp_path).reasons[0]
    assert "fits 60 of 60" in reason and "annotations/a)" not in reason
