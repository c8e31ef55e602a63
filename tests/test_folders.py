"""Other people's folders: every layout, damage file by file, readers fed with anything."""
import base64
import io
import json
import os
import random
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given, settings, strategies as st
from PIL import Image

from dli.data.annotations import BadFile, index_mask, read_labelme, read_levels, read_values, read_yolo
from dli.data.check import check_folder
from dli.data.folders import DataFile, find_entries, make_data_file, read_data_file, read_folder
from dli.data.samples import FREE
from dli.data.splits import possible_folds, split_samples
from dli.data.synthetic import synthetic_tiles
from dli.files import is_mapped

LAYOUTS_HERE = Path(__file__).resolve().parent.parent.parent / "shared/own-data/layouts"
BALL_SCREWS = LAYOUTS_HERE.parent / "bsdata"
CLASSES = ["Blowhole", "Break", "Crack", "Fray", "Uneven"]
PART = r"synthetic_(\d+)_"
STORED = {
    "palette": dict(layout="index", annotations="palette_masks", classes=CLASSES, part="part"),
    "colour": dict(layout="colour", annotations="colour_masks", part="part"),
    "per-class": dict(layout="per-class", annotations="masks_per_class", clean="all", part="part"),
    "mvtec": dict(layout="mvtec", root="mvtec", part=PART),
    "folder-per-class": dict(layout="folder-per-class", root="folder_per_class", part=PART),
    "labelme": dict(layout="labelme", annotations="labelme", clean="all", part="part"),
    "yolo": dict(layout="yolo", annotations="yolo/labels", clean="all", part="part"),
    "16 bit": dict(layout="index", images="images_16bit", annotations="index_masks", classes=CLASSES, part="part"),
}


def stored(**content):
    if not LAYOUTS_HERE.is_dir():
        pytest.skip("the folders of layouts are not here")
    return make_data_file(content, LAYOUTS_HERE)


@pytest.fixture(scope="module")
def reference():
    data = stored(layout="index", annotations="index_masks", classes=CLASSES, part="part")
    return read_folder(data)


def aligned(samples, reference):
    "Images, masks in the reference's numbers, parts and classes, in the reference's order."
    names = [n.split("/")[-1] for n in samples.table["name"]]
    order = [names.index(n) for n in reference.table["name"]]
    numbers = np.array([0] + [reference.classes.index(c) + 1 for c in samples.classes])
    table = samples.table.iloc[order]
    return samples.images[order], numbers[samples.masks[order]], list(table["tile"]), list(table["class"])


@pytest.mark.parametrize("name", STORED)
def test_every_layout_is_read_to_the_same_samples(name, reference):
    images, masks, parts, classes = aligned(read_folder(stored(**STORED[name])), reference)
    assert (masks == reference.masks).all()
    assert parts == list(reference.table["tile"]) and classes == list(reference.table["class"])
    assert (images == reference.images).all()


def test_coco_is_filled_as_its_own_tools_do(reference):
    pytest.importorskip("pycocotools")
    from pycocotools import mask as tools

    images, masks, parts, classes = aligned(read_folder(stored(layout="coco", annotations="coco.json", clean="all",
                                                               part="part")), reference)
    content = json.loads((LAYOUTS_HERE / "coco.json").read_text())
    names = {row["id"]: Path(row["file_name"]).stem for row in content["images"]}
    order = reference.table["name"].tolist()
    for annotation in content["annotations"]:
        i, outline = order.index(names[annotation["image_id"]]), annotation["segmentation"]
        if isinstance(outline, dict):
            assert ((masks[i] > 0) == (reference.masks[i] > 0)).all(), "runs are exact"
        else:
            theirs = tools.decode(tools.merge(tools.frPyObjects(outline, *masks[i].shape))) > 0
            if theirs.any():
                assert ((masks[i] > 0) == theirs).all()
    assert parts == list(reference.table["tile"]) and classes == list(reference.table["class"])
    assert (masks != reference.masks).sum() < 0.05 * (reference.masks > 0).sum(), "a rim of pixels"
    assert (images == reference.images).all()


def test_mixed_sizes_are_refused_resized_or_cut():
    content = dict(layout="index", root="mixed_sizes", classes=CLASSES, part=PART)
    with pytest.raises(ValueError, match="different sizes"):
        read_folder(stored(**content))
    assert read_folder(stored(**content, size=96)).images.shape == (36, 96, 96)
    padded = read_folder(stored(**content, size=[80, 160], pad=True))
    assert padded.images.shape == (36, 80, 160)
    windows = read_folder(stored(**content, crop=64))
    assert windows.images.shape[1:] == (64, 64) and windows.table["tile"].nunique() == padded.table["tile"].nunique()


def test_small_defects_of_a_large_photograph_survive_as_windows():
    data = stored(layout="index", root="large", classes=["a", "b"], part="(.+)", crop=512)
    samples = read_folder(data)
    truth = read_values(LAYOUTS_HERE / "large/masks/plate.png")
    assert samples.clean.any() and (~samples.clean).any()
    seen = sorted(set(np.unique(samples.masks)) - {0})
    assert seen == sorted(set(np.unique(truth)) - {0}) == [1, 2]
    with pytest.warns(UserWarning, match="lost"):
        read_folder(replace(data, crop=None, size=(64, 96)))


def test_ball_screws_and_the_leak_of_their_own_split(tmp_path):
    if not BALL_SCREWS.is_dir():
        pytest.skip("the ball screws are not here")
    data = make_data_file(dict(layout="labelme", images="data", annotations="label", clean="all", size=[128, 320],
                               part=r"^(?:\d+_\d+_(\d+_\d+)|(KGT.+?))_crop"), BALL_SCREWS)
    samples = read_folder(data)
    assert len(samples) == 32 and samples.classes == ("Pitting",) and samples.clean.sum() == 12
    rows = json.loads((BALL_SCREWS / "image_data.json").read_text())["images"]
    pd.DataFrame([(r["filename"], r["train_test_split"]) for r in rows], columns=["name", "split"]).to_csv(
        tmp_path / "split.csv", index=False)
    check = check_folder(data, tmp_path / "split.csv", pictures=True)
    assert check.ok and any(n.kind == "leak" and "5 parts" in n.text for n in check.notes)
    assert "<img" in check.to_html() and "http" not in check.to_html()


def test_the_report_names_a_folder_below_the_current_one_without_the_way_to_it(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    check = check_folder(folder)
    assert str(check).startswith(f"{folder.name} (") and check.root == str(folder)


# A small folder of one's own, and damage to it

TILES = synthetic_tiles(n=60, size=32, seed=1)


@pytest.fixture
def folder(tmp_path):
    for kind, arrays in (("images", TILES.images), ("masks", TILES.masks)):
        (tmp_path / kind).mkdir()
        for name, array in zip(TILES.table["name"], arrays):
            Image.fromarray(array).save(tmp_path / kind / f"{name}.png")
    content = dict(layout="index", classes=list(TILES.classes), part=PART)
    (tmp_path / "parts.yaml").write_text(yaml.safe_dump(content))
    return tmp_path


def first(kind, folder, n=0):
    return folder / kind / f"{TILES.table['name'][n]}.png"


def state(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def turned_exif():
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def store(folder, kind, array, n=0):
    Image.fromarray(array).save(first(kind, folder, n))


def drop(folder, which):
    "Take photographs and their masks away."
    for n in np.flatnonzero(which):
        for kind in ("images", "masks"):
            first(kind, folder, n).unlink()


def cut_short(path):
    path.write_bytes(path.read_bytes()[:60])


def as_jpeg(path):
    Image.open(path).save(path.with_suffix(".jpg"))
    path.unlink()


def both(folder, change):
    "Do the same to the first photograph and its mask."
    for kind in ("images", "masks"):
        change(first(kind, folder))


def without_class(folder, k):
    for n, mask in enumerate(TILES.masks):
        store(folder, "masks", np.where(mask == k, 0, mask).astype(np.uint8), n)


def copy_as(name):
    return lambda path: shutil.copy(path, path.with_name(name))


def enlarge_as(name):
    return lambda path: Image.open(path).resize((64, 64), Image.NEAREST).save(path.with_name(name))


def replace_by_folder(path):
    path.unlink()
    path.mkdir()


def replace_by_broken_link(path):
    path.unlink()
    os.symlink(path.with_name("nowhere.png"), path)


def add_line(folder, line):
    with open(folder / "parts.yaml", "a") as file:
        file.write(f"\n{line}\n")


def split_through_parts(folder):
    table = pd.DataFrame({"name": TILES.table["name"], "split": ["train", "test"] * 30})
    table.to_csv(folder / "parts.csv", index=False)


LATER_FRAY = (TILES.label == 4) & (np.arange(60) != np.argmax(TILES.label == 4))
COLOURED = np.random.default_rng(0).integers(0, 9, (32, 32, 3), np.uint8)
SECOND_MASK = f"{TILES.table['name'][0]}_mask.png"
DAMAGE = {  # what is done to the folder, and the kind of finding that it must give
    "half a photograph": (lambda f: cut_short(first("images", f)), "file"),
    "an empty photograph": (lambda f: first("images", f).write_bytes(b""), "file"),
    "text as a photograph": (lambda f: first("images", f).write_text("hello"), "file"),
    "half a mask": (lambda f: cut_short(first("masks", f)), "file"),
    "an empty mask": (lambda f: first("masks", f).write_bytes(b""), "file"),
    "a mask too few": (lambda f: first("masks", f).unlink(), "mask"),
    "a mask too many": (lambda f: copy_as("other.png")(first("masks", f)), "alone"),
    "a photograph too many": (lambda f: copy_as("synthetic_900_x.png")(first("images", f)), "mask"),
    "two masks": (lambda f: copy_as(SECOND_MASK)(first("masks", f)), "masks"),
    "two photographs of one name": (lambda f: Image.open(p := first("images", f)).save(p.with_suffix(".bmp")), "twice"),
    "a mask of another size": (lambda f: store(f, "masks", TILES.masks[0][:16]), "file"),
    "a photograph of another size": (lambda f: store(f, "images", TILES.images[0][:16]), "file"),
    "another size of both": (lambda f: both(f, lambda p: Image.open(p).crop((0, 0, 32, 16)).save(p)), "size"),
    "a value beyond the classes": (lambda f: store(f, "masks", TILES.masks[0] + 9), "file"),
    "black and white for many classes": (lambda f: store(f, "masks", (TILES.masks[0] == 0) * np.uint8(255)), "file"),
    "a mask in colours": (lambda f: store(f, "masks", COLOURED), "file"),
    "a mask as JPEG": (lambda f: as_jpeg(first("masks", f)), "file"),
    "a mask of sixteen bits": (lambda f: store(f, "masks", TILES.masks[0].astype(np.uint16) * 300 + 300), "file"),
    "a class that no mask shows": (lambda f: without_class(f, 3), "class"),
    "nothing clean": (lambda f: drop(f, TILES.clean), "clean"),
    "a name without a part": (lambda f: both(f, lambda p: p.rename(p.with_name("unnamed.png"))), "part"),
    "a class of one part": (lambda f: drop(f, LATER_FRAY), "parts"),
    "the same photograph as another part": (lambda f: both(f, copy_as("synthetic_901_x.png")), "copy"),
    "a copy made larger": (lambda f: both(f, enlarge_as("synthetic_902_x.png")), "copy"),
    "sixteen bits among eight": (lambda f: store(f, "images", TILES.images[0].astype(np.uint16) * 256), "bits"),
    "a split through parts": (split_through_parts, "leak"),
    "a photograph that is a folder": (lambda f: replace_by_folder(first("images", f)), "alone"),
    "a broken link": (lambda f: replace_by_broken_link(first("images", f)), "alone"),
    "a mask of another name": (lambda f: first("masks", f).rename(f / "masks/synthetic_903_x.png"), "alone"),
    "a defect lost when made smaller": (lambda f: add_line(f, "size: 8"), "lost"),
    "no part": (lambda f: (f / "parts.yaml").write_text(f"layout: index\nclasses: {list(TILES.classes)}"), "part"),
}
STOPS = ("file", "mask", "alone", "masks", "twice")  # kinds that reading refuses, too


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_and_nothing_is_written(folder, name):
    assert check_folder(folder).ok
    damage, kind = DAMAGE[name]
    damage(folder)
    before = state(folder)
    check = check_folder(folder, pictures=True)
    found = {n.kind for n in check.problems + check.notes}
    assert kind in found, str(check)
    assert state(folder) == before
    assert json.loads(check.to_json())["ok"] == check.ok and check.to_html() and str(check)


@pytest.mark.parametrize("name", [n for n, (_, kind) in DAMAGE.items() if kind in STOPS])
def test_reading_refuses_what_the_check_calls_a_problem(folder, name):
    DAMAGE[name][0](folder)
    with pytest.raises(ValueError) as info:
        read_folder(folder)
    assert len(str(info.value)) > 20


def test_other_files_are_left_alone(folder):
    (folder / "images/notes.txt").write_text("x")
    (folder / "images/.hidden.png").write_bytes(b"x")
    (folder / "images/__MACOSX").mkdir()
    (folder / "images/__MACOSX/a.png").write_bytes(b"x")
    (folder / "images/Thumbs.db").write_bytes(b"x")
    assert len(read_folder(folder)) == len(TILES)


@pytest.mark.parametrize("ending", ["_mask", "_GT", "_label", "_seg"])
def test_masks_are_known_by_their_ending(folder, ending):
    for path in list((folder / "masks").iterdir()):
        path.rename(path.with_name(path.stem + ending + ".PNG"))
    samples = read_folder(folder)
    order = [samples.table["name"].tolist().index(n) for n in TILES.table["name"]]
    assert (samples.masks[order] == TILES.masks).all()


def test_masks_beside_their_photographs(folder):
    for path in list((folder / "masks").iterdir()):
        path.rename(folder / "images" / f"{path.stem}_mask.png")
    (folder / "masks").rmdir()
    samples = read_folder(replace(read_data_file(folder), annotations="images"))
    assert len(samples) == len(TILES)


def test_names_in_either_unicode_form(folder):
    first("images", folder).rename(folder / "images/synthetic_0_o\u0308l.png")
    first("masks", folder).rename(folder / "masks/synthetic_0_\u00f6l.png")
    assert "synthetic_0_\u00f6l" in read_folder(folder).table["name"].tolist()


def test_the_fingerprint_follows_bytes_and_choices_not_the_place(folder, tmp_path_factory):
    usual = read_folder(folder).source
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "copy"
    shutil.copytree(folder, elsewhere)
    assert read_folder(elsewhere).source == usual
    assert read_folder(replace(read_data_file(folder), size=(24, 24))).source != usual
    image = TILES.images[0].copy()
    image[0, 0] ^= 1
    Image.fromarray(image).save(first("images", elsewhere))
    assert read_folder(elsewhere).source != usual


def test_orientation_turns_photograph_and_mask(folder):
    exif = turned_exif()
    upright_image = np.arange(32 * 24, dtype=np.uint8).reshape(24, 32)
    upright_mask = np.zeros((24, 32), np.uint8)
    upright_mask[3:9, 20:30] = 1
    for mask in (upright_mask, np.rot90(upright_mask)):
        Image.fromarray(np.ascontiguousarray(np.rot90(upright_image))).save(first("images", folder), exif=exif)
        Image.fromarray(np.ascontiguousarray(mask)).save(first("masks", folder))
        samples = read_folder(replace(read_data_file(folder), crop=(24, 24)))
        own = samples.table["name"].str.startswith(TILES.table["name"][0] + "_y")
        assert (samples.masks[own].max(0)[3:9, 20:24] == 1).all()


@pytest.mark.parametrize("path", ["a.png", "..\\images\\a.png", "C:\\Users\\me\\a.png", "/home/me/a.png",
                                  "..%2Fimages%2Fa.png", ""])
def test_labelme_paths_of_other_machines(tmp_path, path):
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    Image.fromarray(TILES.images[0]).save(tmp_path / "images/a.png")
    shape = dict(label="pit", points=[[3, 3], [9, 3], [9, 9]], shape_type="polygon")
    content = dict(shapes=[shape], imagePath=path, imageHeight=32, imageWidth=32)
    (tmp_path / "labels/a.json").write_text(json.dumps(content))
    samples = read_folder(DataFile(tmp_path, "labelme", part="(.+)"))
    assert samples.classes == ("pit",) and samples.masks.any()


def test_labelme_mask_shapes(tmp_path):
    picture = io.BytesIO()
    Image.fromarray(np.full((3, 4), 255, np.uint8)).save(picture, "PNG")
    stored_picture = base64.b64encode(picture.getvalue()).decode()
    shape = dict(label="pit", points=[[5, 6], [8, 8]], shape_type="mask", mask=stored_picture)
    (tmp_path / "a.json").write_text(json.dumps(dict(shapes=[shape])))
    mask = read_labelme(tmp_path / "a.json", (20, 20), 1, ("pit",), [])
    assert mask.sum() == 12 and mask[6:9, 5:9].all()


@pytest.mark.parametrize("size, points, right", [
    ((20, 30), [[25, 5]], True), ((30, 20), [[25, 5]], True), ((30, 20), [[5, 25]], False),
    ((40, 60), [[25, 5]], False)])
def test_the_annotations_own_size_decides(tmp_path, size, points, right):
    shape = dict(label="pit", points=points, shape_type="point")
    (tmp_path / "a.json").write_text(json.dumps(dict(shapes=[shape], imageHeight=size[0], imageWidth=size[1])))
    if right:
        assert read_labelme(tmp_path / "a.json", (20, 30), 1, ("pit",), [])[5, 25]
    else:
        with pytest.raises(BadFile, match="a.json"):
            read_labelme(tmp_path / "a.json", (20, 30), 1, ("pit",), [])


COCO = dict(images=[dict(id=7, file_name="sub/a.png", height=32, width=32)],
            categories=[dict(id=90, name="pit"), dict(id=5, name="dent")])
SQUARE = [4, 4, 12, 4, 12, 12, 4, 12]


@pytest.mark.parametrize("segmentation, message", [
    ([SQUARE], None), ([SQUARE, [1, 1, 2, 2]], None), ([[1, 1, 5, 5]], "outline"), ([], "outline"), (None, "outline"),
    (dict(size=[32, 32], counts=[100, 50, 874]), None), (dict(size=[9, 9], counts=[81]), "runs"), ("x", "outline"),
    ([["a"] * 6], "drawn")])
def test_coco_outlines(tmp_path, segmentation, message):
    pytest.importorskip("pycocotools")
    (tmp_path / "images").mkdir()
    Image.fromarray(TILES.images[0]).save(tmp_path / "images/a.png")
    annotation = dict(id=1, image_id=7, category_id=90, bbox=[1, 1, 5, 5], segmentation=segmentation)
    (tmp_path / "coco.json").write_text(json.dumps(COCO | dict(annotations=[annotation])))
    data = DataFile(tmp_path, "coco", part="(.+)")
    if message is None:
        samples = read_folder(data)
        assert samples.classes == ("dent", "pit") and set(np.unique(samples.masks)) == {0, 2}
    else:
        with pytest.raises(ValueError, match=message):
            read_folder(data)


@pytest.mark.parametrize("content, message", [
    ("layout: tiff", "layout"),
    ("classes: [a]", "layout is missing"),
    ("layout: index", "classes is missing"),
    ("just text", "expected lines"),
    ("layout: index\nsize: 1", "size"),
    ("layout: index\nsize: [1, 2, 3]", "size"),
    ("layout: index\nsize: 64\ncrop: 64", "choose one"),
    ("layout: index\nchannels: 2", "channels"),
    ("layout: index\nscale: 0", "scale"),
    ("layout: index\npart: '('", "no pattern"),
    ("layout: index\npart: 'a b'", "group"),
    ("layout: index\nclean: maybe", "clean"),
    ("layout: index\nsizes: 4", "unknown key"),
    ("layout: index\nroot: nowhere", "no folder"),
    ("layout: index\nclasses: pit", "classes"),
    ("a: [", "YAML"),
    ("layout: index\nclasses: [pit]\nimages: elsewhere", "elsewhere"),
    ("layout: index\nclasses: [pit]\npad: 3", "pad"),
])
def test_a_data_file_is_refused_in_a_sentence(folder, content, message):
    (folder / "parts.yaml").write_text(content)
    with pytest.raises(ValueError, match=message):
        find_entries(read_data_file(folder))


def test_no_part_is_said_loudly(folder):
    with pytest.warns(UserWarning, match="part of its own"):
        read_folder(replace(read_data_file(folder), part=""))


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=400), st.sampled_from([".png", ".jpg", ".bmp", ".tif", ".json", ".txt"]))
def test_readers_refuse_anything_else_by_name(tmp_path_factory, content, suffix):
    path = tmp_path_factory.mktemp("any") / f"file{suffix}"
    path.write_bytes(content)
    readers = [lambda: read_levels(path), lambda: index_mask(path, ("a",), None, []),
               lambda: read_labelme(path, (9, 9), 1, ("a",), []), lambda: read_yolo(path, (9, 9), ("a",), [])]
    for read in readers:
        try:
            read()
        except BadFile as e:
            assert "file" in str(e)


VALUES = st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5)
KEYS = st.sampled_from(["points", "label", "shape_type", "mask", "x"])
JSON = st.recursive(VALUES, lambda x: st.lists(x, max_size=4) | st.dictionaries(KEYS, x, max_size=4), max_leaves=12)


@settings(max_examples=150, deadline=None)
@given(JSON, JSON, st.sampled_from(["polygon", "rectangle", "circle", "line", "mask", "point", None, "cube"]))
def test_labelme_files_of_any_content(tmp_path_factory, points, label, kind):
    path = tmp_path_factory.mktemp("any") / "file.json"
    shape = dict(label=label, points=points, shape_type=kind, mask="AAAA")
    path.write_text(json.dumps(dict(shapes=[shape], imageHeight=9, imageWidth=9)))
    try:
        mask = read_labelme(path, (9, 9), 1, (str(label),), [])
    except BadFile as e:
        assert "file.json" in str(e)
    else:
        assert mask.shape == (9, 9) and mask.any()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.floats(-2, 3) | st.integers(0, 3) | st.text(max_size=3), max_size=10), max_size=3))
def test_yolo_files_of_any_content(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("any") / "file.txt"
    path.write_text("\n".join(" ".join(map(str, line)) for line in lines))
    try:
        read_yolo(path, (9, 9), ("a", "b"), [])
    except BadFile as e:
        assert "file.txt" in str(e)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from([f for f in DataFile.__dataclass_fields__] + ["other"]), JSON, max_size=5))
def test_data_files_of_any_content(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("any")
    try:
        made = make_data_file(content, folder)
    except ValueError:
        return
    assert isinstance(made, DataFile)


# Names that meet in several folders, masks beside photographs, annotations of copies

CAMS = ("cam1", "cam2")


def put(path, array=TILES.images[0]):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def put_mask(path, value=1):
    mask = np.zeros((32, 32), np.uint8)
    mask[4:12, 4:12] = value
    put(path, mask)


def entries_of(root, **content):
    "Photographs' names -> files of their annotations; and the findings."
    data, found = find_entries(make_data_file({"layout": "index", "classes": ["pit"], **content}, root))
    names = {e.name: [f.relative_to(root).as_posix() for f in e.files] for e in found.entries}
    return names, found.problems, data


def test_a_mask_of_another_folder_is_not_given_away(tmp_path):
    for cam in CAMS:
        put(tmp_path / f"images/{cam}/001.png")
    put_mask(tmp_path / "masks/cam1/001.png")
    names, problems, _ = entries_of(tmp_path)
    assert names == {"cam1/001": ["masks/cam1/001.png"], "cam2/001": []}
    assert [(p.file, p.kind) for p in problems] == [("cam2/001", "mask")]


@pytest.mark.parametrize("photographs, masks, kinds", [
    (["cam1/001", "cam2/001"], ["001"], {"alone"}),  # of which?
    (["cam1/001"], ["a/001", "b/001"], {"masks"}),
    (["cam1/001"], ["cam1/001", "001"], {"alone"}),
    (["cam1/001", "cam2/002"], ["001", "002_mask"], set()),
    (["cam1/001_seg", "cam1/001"], ["cam1/001_seg", "cam1/001"], set()),
])
def test_the_file_name_alone_must_be_unique_on_both_sides(tmp_path, photographs, masks, kinds):
    for name in photographs:
        put(tmp_path / f"images/{name}.png")
    for name in masks:
        put_mask(tmp_path / f"masks/{name}.png")
    names, problems, _ = entries_of(tmp_path, clean="all")
    assert {p.kind for p in problems} == kinds
    given_masks = [m for own in names.values() for m in own]
    assert len(given_masks) == len(set(given_masks))


def test_the_usual_mvtec_folder(tmp_path):
    for name in ("train/good/000", "train/good/001", "test/good/000", "test/pit/000"):
        put(tmp_path / f"{name}.png")
    put_mask(tmp_path / "ground_truth/pit/000_mask.png", 255)
    names, problems, _ = entries_of(tmp_path, layout="mvtec", classes=[])
    assert not problems and set(names) == {"train/good/000", "train/good/001", "test/good/000", "test/pit/000"}
    assert names["test/pit/000"] == ["ground_truth/pit/000_mask.png"]
    put(tmp_path / "train/pit/000.png")
    assert [p.file for p in entries_of(tmp_path, layout="mvtec", classes=[])[1]] == ["train/pit"]


def test_masks_of_a_class_without_photographs_are_said(tmp_path):
    for name in ("train/good/000", "test/pit/000"):
        put(tmp_path / f"{name}.png")
    for name in ("pit", "dent"):
        put_mask(tmp_path / f"ground_truth/{name}/000.png", 255)
    assert [p.kind for p in entries_of(tmp_path, layout="mvtec", classes=[])[1]] == ["alone"]


def put_labelme(path, image, label="pit"):
    shape = dict(label=label, points=[[2, 2], [9, 2], [9, 9]], shape_type="polygon")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(shapes=[shape], imagePath=image, imageHeight=32, imageWidth=32)))


def test_a_labelme_file_with_a_copy_beside_it_is_of_the_listed_photograph(tmp_path):
    put(tmp_path / "images/a.png")
    put(tmp_path / "labels/a.png")
    put_labelme(tmp_path / "labels/a.json", "a.png")
    names, problems, _ = entries_of(tmp_path, layout="labelme", clean="all")
    assert not problems and names == {"a": ["labels/a.json"]}


def test_an_annotation_of_no_listed_photograph_is_a_problem(tmp_path):
    put(tmp_path / "images/a.png")
    put(tmp_path / "labels/b.png")
    put_labelme(tmp_path / "labels/b.json", "b.png")
    assert [p.kind for p in entries_of(tmp_path, layout="labelme", clean="all")[1]] == ["alone"]


def coco_of(root, files, annotations, name="annotations.json"):
    rows = [dict(id=i, file_name=f, height=32, width=32) for i, f in files]
    notes = [dict(id=n, image_id=i, category_id=1, segmentation=[SQUARE]) for n, i in enumerate(annotations)]
    path = root / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(dict(images=rows, annotations=notes, categories=[dict(id=1, name="pit")])))


@pytest.mark.parametrize("files, annotations, kinds", [
    ([(1, "a.png")], [1], []), ([(1, "../outside/a.png")], [1], []), ([(1, "c.png")], [1], ["alone"]),
    ([(1, "a.png")], [1, 2], ["alone"]), ([(1, "cam1/a.png"), (2, "cam2/a.png")], [1, 2], ["masks"]),
    ([(1, "a.png"), (1, "b.png")], [1], ["masks"]),
])
def test_every_coco_annotation_has_its_photograph(tmp_path, files, annotations, kinds):
    put(tmp_path / "images/a.png")
    put(tmp_path / "images/b.png")
    put(tmp_path / "outside/a.png")
    coco_of(tmp_path, files, annotations)
    names, problems, _ = entries_of(tmp_path, layout="coco", clean="all", classes=[])
    assert [p.kind for p in problems] == kinds
    assert kinds or names["a"] == ["annotations.json"]


def test_several_coco_files_are_refused_by_name(tmp_path):
    put(tmp_path / "images/a.png")
    for name in ("train", "val"):
        coco_of(tmp_path, [(1, "a.png")], [1], f"annotations/{name}.json")
    with pytest.raises(ValueError, match="train.json, annotations/val.json"):
        entries_of(tmp_path, layout="coco", clean="all", classes=[])
    assert entries_of(tmp_path, layout="coco", annotations="annotations/val.json", classes=[])[0] == {
        "a": ["annotations/val.json"]}


@pytest.mark.parametrize("photographs, masks", [(".", "."), ("images", "."), ("images", "masks"), (".", "masks")])
def test_class_folders_hold_no_photographs(tmp_path, photographs, masks):
    for name in "ab":
        put(tmp_path / photographs / f"{name}.png")
    put_mask(tmp_path / masks / "pit/a.png", 255)
    put_mask(tmp_path / masks / "dent/a.png", 255)
    names, problems, data = entries_of(tmp_path, layout="per-class", clean="all", classes=[])
    assert not problems and data.classes == ("dent", "pit")
    assert set(names) == {"a", "b"} and len(names["a"]) == 2 and not names["b"]


def test_a_folder_of_masks_of_no_class_is_a_problem(tmp_path):
    put(tmp_path / "images/a.png")
    put_mask(tmp_path / "masks/dent/a.png", 255)
    assert "class" in {p.kind for p in entries_of(tmp_path, layout="per-class", clean="all")[1]}


@pytest.mark.parametrize("photographs", ["images", "images/cam1", "."])
def test_masks_beside_photographs_in_any_folder(tmp_path, photographs):
    for name in ("a", "b_label", "c_seg"):
        put(tmp_path / photographs / f"{name}.png")
        put_mask(tmp_path / photographs / f"{name}_mask.png")
    names, problems, _ = entries_of(tmp_path)
    assert not problems and [n.split("/")[-1] for n in names] == ["a", "b_label", "c_seg"]
    assert all(own[0].endswith(f"{name}_mask.png") for name, own in names.items() for name in [name.split("/")[-1]])


def test_photographs_whose_names_end_like_masks(tmp_path):
    for name in ("a_label", "b_seg"):
        put(tmp_path / f"images/{name}.png")
        put_mask(tmp_path / f"masks/{name}.png")
    names, problems, _ = entries_of(tmp_path)
    assert not problems and names == {"a_label": ["masks/a_label.png"], "b_seg": ["masks/b_seg.png"]}


def test_a_mask_beside_that_lost_its_photograph_is_no_clean_photograph(tmp_path):
    put(tmp_path / "images/a.png")
    for name in "ab":
        put_mask(tmp_path / f"images/{name}_mask.png")
    names, problems, _ = entries_of(tmp_path, clean="all")
    assert set(names) == {"a"} and [p.kind for p in problems] == ["alone"]


# Parts

def parts_folder(root, lines, names=("cam1/001", "cam2/001", "cam2/002")):
    for name in names:
        put(root / f"images/{name}.png")
        put_mask(root / f"masks/{name}.png")
    (root / "parts.csv").write_text("name,part\n" + "\n".join(lines) + "\n")
    return make_data_file(dict(layout="index", classes=["pit"], part="part"), root)


def test_parts_by_file_name_only_where_it_is_unique(tmp_path):
    usual = parts_folder(tmp_path / "a", ["cam1/001,7", "cam2/001.png,8", "002,9"])
    assert read_folder(usual).table["tile"].tolist() == ["7", "8", "9"]
    for k, lines in enumerate((["cam1/001,7", "002,9"], ["001,7", "002,9"])):
        with pytest.raises(ValueError, match="finds no part.*cam2/001"):
            read_folder(parts_folder(tmp_path / f"b{k}", lines))


def test_lines_of_parts_that_contradict_each_other(tmp_path):
    lines = ["cam1/001,7", "cam2/001,8", "002,9"]
    assert len(read_folder(parts_folder(tmp_path / "a", [*lines, "002,9"]))) == 3
    data = parts_folder(tmp_path / "b", [*lines, "cam1/001.png,8"])
    with pytest.raises(ValueError, match="parts.csv.*cam1/001"):
        read_folder(data)
    assert "part" in {p.kind for p in check_folder(data).problems}


def test_parts_are_looked_up_before_photographs_are_read(folder):
    first("images", folder).write_bytes(b"x")
    with pytest.raises(ValueError, match="finds no part"):
        read_folder(replace(read_data_file(folder), part="nothing(x)"))


def test_the_fingerprint_follows_parts_and_colours(tmp_path):
    lines = ["cam1/001,7", "cam2/001,8", "002,9"]
    sources = [read_folder(parts_folder(tmp_path / str(k), [*lines[:2], f"002,{k}"])).source for k in (9, 8)]
    assert len(set(sources)) == 2
    root, colours = tmp_path / "colours", dict(pit=[255, 0, 0], dent=[0, 255, 0])
    put(root / "images/a.png")
    put(root / "masks/a.png", np.tile(np.uint8([255, 0, 0]), (32, 32, 1)))
    data = make_data_file(dict(layout="colour", part="(.+)"), root)
    sources = []
    for own in (colours, colours | dict(dent=[0, 0, 255])):
        (root / "masks/classes.json").write_text(json.dumps(own))
        sources.append(read_folder(data).source)
    assert len(set(sources)) == 2


# Keys, damage and folds

@pytest.mark.parametrize("content, message", [
    ("layout: colour\nclasses: [pit, dent]\ncolours: {pit: [255, 0, 0]}", "'dent'"),
    ("layout: colour\ncolours: {pit: [255, 0]}", "three whole numbers.*'pit'"),
    ("layout: colour\ncolours: {pit: [256, 0, 0]}", "three whole numbers.*'pit'"),
    ("layout: colour\ncolours: {pit: red}", "three whole numbers.*'pit'"),
    ("layout: colour\ncolours: {pit: [0, 0, 0]}", "'pit' is black"),
    ("layout: colour\ncolours: {pit: [9, 0, 0], dent: [9, 0, 0]}", "'dent' has the colour"),
    ("layout: colour\ncolours: [1]", "colours"),
    ("layout: index\nclasses: [pit]\nignore: '255'", "ignore.*whole number"),
    ("layout: index\nclasses: [pit]\nignore: 1", "ignore: 1 is the number of the class 'pit'"),
    ("layout: index\nclasses: [pit]\nignore: 0", "ignore"),
    ("layout: index\nclasses: [pit]\nignore: 256", "ignore"),
    ("layout: index\nclasses: [yes]", "quotes"),
    ("layout: index\nclasses: [1.5]", "quotes"),
    ("layout: index\nclasses: [Pit, pit]", "one name"),
])
def test_colours_ignore_and_classes_are_checked(folder, content, message):
    (folder / "parts.yaml").write_text(content)
    with pytest.raises(ValueError, match=message):
        find_entries(read_data_file(folder))


def test_labels_in_small_and_capital_letters_are_one_class(tmp_path):
    for name, label in (("a", "Pit"), ("b", "pit"), ("c", "dent")):
        put(tmp_path / f"images/{name}.png")
        put_labelme(tmp_path / f"labels/{name}.json", f"{name}.png", label)
    samples = read_folder(DataFile(tmp_path, "labelme", part="(.+)"))
    assert samples.classes == ("Pit", "dent") and samples.table["class"].tolist() == ["Pit", "Pit", "dent"]


def test_a_damaged_file_of_sixteen_bits_is_a_finding(folder):
    for n in range(3):
        store(folder, "images", TILES.images[n].astype(np.uint16) * 256, n)
    path = first("images", folder)
    path.write_bytes(path.read_bytes()[:-400])
    assert "file" in {p.kind for p in check_folder(folder).problems}
    with pytest.raises(ValueError, match="read right"):
        read_folder(folder)


@pytest.mark.parametrize("left", [1, 3, 4, 5])
def test_the_check_and_the_split_agree_on_classes_of_few_parts(folder, left):
    frays = np.flatnonzero(TILES.label == 4)
    parts = list(dict.fromkeys(TILES.table["tile"][frays]))
    away = np.zeros(len(TILES), bool)
    away[frays] = ~TILES.table["tile"][frays].isin(parts[:left])
    drop(folder, away)
    check = check_folder(folder)
    samples = read_folder(folder)
    if left == 1:
        assert check.breaks and check.folds == 0 and any(p.kind == "parts" for p in check.problems)
        with pytest.raises(ValueError, match="'Fray' is seen on 1 parts"):
            possible_folds(samples)
        return
    assert check.ok and check.folds == left, str(check)
    if left < 5:
        with pytest.raises(ValueError, match="5 folds need at least 5"):
            split_samples(samples)
        with pytest.warns(UserWarning, match=f"'Fray' is seen on {left} parts: there are {left} folds"):
            assert possible_folds(samples) == left
    sides = [split_samples(samples, fold=fold, folds=left)[1] for fold in range(left)]
    validated = [name for side in sides for name in side.table["name"]]
    assert sorted(validated) == sorted(samples.table["name"])


# Regions, transforms and splits

def with_key(folder, **content):
    return make_data_file(yaml.safe_load((folder / "parts.yaml").read_text()) | content, folder)


def test_one_region_for_all_or_one_for_each_photograph(folder):
    region = np.zeros((32, 32), np.uint8)
    region[:, 8:] = 255
    Image.fromarray(region).save(folder / "roi.png")
    one = read_folder(with_key(folder, roi="roi.png", crop=16))
    assert one.roi.shape == one.images.shape and one.roi.dtype == bool
    left = one.table["name"].str.endswith("_x0").to_numpy()
    assert (one.roi[left].mean((1, 2)) == 0.5).all() and one.roi[~left].all()
    (folder / "masks/roi").mkdir()
    for n, name in enumerate(TILES.table["name"]):
        Image.fromarray(np.full((32, 32), 255 * (n % 2), np.uint8)).save(folder / f"masks/roi/{name}_mask.png")
    each = read_folder(with_key(folder, roi="masks/roi"))
    order = [each.table["name"].tolist().index(n) for n in TILES.table["name"]]
    assert (each.roi[order].all((1, 2)) == np.arange(60) % 2).all()
    assert (each.masks[order] == TILES.masks).all(), "regions are no masks"
    assert each[3:5].roi.shape == (2, 32, 32) and replace(each, source="x").roi is not None
    first("masks/roi", folder).with_name(f"{TILES.table['name'][0]}_mask.png").unlink()
    with pytest.raises(ValueError, match="has no region in masks/roi"):
        read_folder(with_key(folder, roi="masks/roi"))
    assert "roi" in {p.kind for p in check_folder(with_key(folder, roi="masks/roi")).problems}


def test_a_clean_image_outside_of_its_region_takes_no_defect(folder):
    Image.fromarray(np.zeros((32, 32), np.uint8)).save(folder / "roi.png")
    check = check_folder(with_key(folder, roi="roi.png"))
    assert check.clean == 0 and check.breaks and any(p.kind == "clean" for p in check.problems)
    assert check_folder(folder).clean == TILES.clean.sum()


@pytest.mark.parametrize("content, message", [
    (dict(transforms=dict(Fray=dict(turn=4))), "expected some of p, flip, rotate"),
    (dict(transforms=dict(Fray=dict(rotate=181))), "rotate of 'Fray' in 0..180"),
    (dict(transforms=dict(Fray=dict(p=True))), "p of 'Fray'"),
    (dict(transforms=[1]), "transforms"),
    (dict(transforms=dict(Dent=dict(p=1))), "'Dent' is none of the classes"),
    (dict(roi="nowhere"), "roi: nowhere is not in"),
    (dict(split="nowhere"), "neither a file"),
])
def test_new_keys_are_refused_in_a_sentence(folder, content, message):
    with pytest.raises(ValueError, match=message):
        read_folder(with_key(folder, **content))


def test_transforms_are_plain_numbers_of_a_class(folder):
    data = with_key(folder, transforms=dict(Fray=dict(rotate=180, p=1)))
    assert data.transforms == dict(Fray=dict(rotate=180.0, p=1.0))
    assert read_folder(data).source != read_folder(folder).source


@pytest.mark.parametrize("where", ["file", "column", "usual"])
def test_a_given_split_is_followed_and_its_test_takes_no_part(folder, where):
    parts = TILES.table["tile"].unique()
    side_of = dict(zip(parts, ["train", "Valid", "train", "training", "test", "train"] * len(parts)))
    own = [side_of[t] for t in TILES.table["tile"]]
    column = "side" if where == "column" else "split"
    table = pd.DataFrame({"name": TILES.table["name"], column: own})
    table.to_csv(folder / ("given.csv" if where == "file" else "parts.csv"), index=False)
    samples = read_folder(with_key(folder, split=dict(file="given.csv", column="side", usual="")[where]))
    assert set(samples.table["split"]) == {"train", "val", "test"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a class may be absent from a side
        train, val = split_samples(samples, split="given")
        assert set(train.table["split"]) == {"train"} and set(val.table["split"]) == {"val"}
        count = possible_folds(samples)
        for side in split_samples(samples, fold=1, folds=count):
            assert "test" not in set(side.table["split"])
    table.assign(**{column: "left"}).to_csv(folder / ("given.csv" if where == "file" else "parts.csv"), index=False)
    with pytest.raises(ValueError, match="expected train, val or test, got 'left'"):
        read_folder(with_key(folder, split=dict(file="given.csv", column="side", usual="")[where]))


def test_a_given_split_without_validation_is_refused(folder):
    split_through_parts(folder)
    with pytest.raises(ValueError, match='use split="tile"'):
        split_samples(read_folder(folder), split="given")


# Many photographs

def same_samples(a, b):
    assert (a.images == b.images).all() and (a.masks == b.masks).all() and a.table.equals(b.table)
    assert (a.source, a.classes, a.levels) == (b.source, b.classes, b.levels)


def test_windows_are_written_once_and_mapped(folder, tmp_path_factory, monkeypatch):
    cache = tmp_path_factory.mktemp("cache")
    data, notes = with_key(folder, crop=16), []
    usual, mapped = read_folder(data), read_folder(data, notes, crops_in=cache)
    same_samples(usual, mapped)
    assert is_mapped(mapped.images) and is_mapped(mapped.masks) and not is_mapped(usual.images)
    same_samples(usual[::3], mapped[::3])
    monkeypatch.setattr("dli.data.folders.read_pair", None)  # nothing is read again
    same_samples(usual, read_folder(data, crops_in=cache))


def test_taking_many_rows_of_a_mapped_array_leaves_them_on_the_disk(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("DLI_CACHE", str(tmp_path / "cache"))
    mapped = read_folder(folder, crops_in=tmp_path / "crops")
    monkeypatch.setattr("dli.files.MANY", 1)
    taken = mapped[mapped.clean]
    assert is_mapped(taken.images) and (taken.images == np.asarray(mapped.images)[mapped.clean]).all()


def test_an_interrupted_reading_leaves_nothing_and_a_damaged_cache_is_made_again(folder, tmp_path, monkeypatch):
    import dli.data.folders as room

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(room, "read_pair", stop)
        with pytest.raises(KeyboardInterrupt):
            read_folder(folder, crops_in=tmp_path / "crops")
    assert [p.name for p in (tmp_path / "crops").iterdir() if p.is_dir()] == []
    usual = read_folder(folder)
    read_folder(folder, crops_in=tmp_path / "crops")
    kept = next(p for p in (tmp_path / "crops").iterdir() if p.is_dir())
    (kept / "masks.npy").write_bytes((kept / "masks.npy").read_bytes()[:500])
    same_samples(usual, read_folder(folder, crops_in=tmp_path / "crops"))
    (kept.with_name(kept.name + ".part")).mkdir()  # of a process that was killed
    shutil.rmtree(kept)
    same_samples(usual, read_folder(folder, crops_in=tmp_path / "crops"))


READS = """
import sys
from pathlib import Path
from dli.data.folders import read_folder
samples = read_folder(sys.argv[1], crops_in=sys.argv[2])
print(samples.source, int(samples.images.sum()), len(list(Path(sys.argv[2]).glob("*/images.npy"))))
"""


def test_two_processes_read_at_once(folder, tmp_path):
    command = [sys.executable, "-c", READS, str(folder), str(tmp_path / "crops")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = [process.communicate(timeout=300)[0] for process in running]
    assert told[0] == told[1] and told[0].split()[-1] == "1"


PEAK = """
import sys, tracemalloc
from dli.data.folders import DataFile, read_folder
data = DataFile(__import__("pathlib").Path(sys.argv[1]), "index", classes=("pit",), part="(.+)", crop=(256, 256))
tracemalloc.start()
samples = read_folder(data, crops_in=sys.argv[2])
print(samples.images.nbytes + samples.masks.nbytes, tracemalloc.get_traced_memory()[1])
"""


def test_the_memory_never_holds_all_photographs(tmp_path):
    mask = np.zeros((1024, 1024), np.uint8)
    mask[100:110, 100:110] = 1
    for n in range(48):
        put(tmp_path / f"images/{n}.png", np.full((1024, 1024), n, np.uint8))
        put(tmp_path / f"masks/{n}.png", mask)
    command = [sys.executable, "-c", PEAK, str(tmp_path), str(tmp_path / "crops")]
    whole, peak = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert whole == 96 * 2**20 and peak < whole / 3


# Faults of single files

def test_a_tiff_with_holes_is_named(folder):
    levels = TILES.images[0].astype(np.float32)
    levels[3, 4] = np.nan
    path = first("images", folder)
    path.unlink()
    cv2.imwrite(str(path.with_suffix(".tiff")), levels)
    with pytest.raises(ValueError, match="1 pixels are no numbers"):
        read_folder(folder)
    assert any(p.kind == "file" and "no numbers" in p.text for p in check_folder(folder).problems)


@pytest.mark.parametrize("image_path", ["a.png", "", "..\\..\\images\\cam2\\a.png"])
def test_labelme_files_of_two_folders_with_the_same_names(tmp_path, image_path):
    for cam, label in (("cam1", "pit"), ("cam2", "dent")):
        put(tmp_path / f"images/{cam}/a.png", np.full((32, 32), int(cam[-1]), np.uint8))
        put_labelme(tmp_path / f"labels/{cam}/a.json", image_path.replace("cam2", cam), label)
    samples = read_folder(DataFile(tmp_path, "labelme", part="(.+)"))
    assert dict(zip(samples.table["name"], samples.table["class"])) == {"cam1/a": "pit", "cam2/a": "dent"}


JUNK = st.recursive(st.none() | st.booleans() | st.integers(-2, 99) | st.floats() | st.text(max_size=3),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2))


@given(kind=st.sampled_from(["images", "annotations", "categories"]), key=st.sampled_from(
    ["id", "file_name", "image_id", "category_id", "name", "segmentation", "bbox", "row"]), junk=JUNK)
@settings(max_examples=150, deadline=None)
def test_rows_of_coco_hold_anything(tmp_path_factory, kind, key, junk):
    pytest.importorskip("pycocotools")
    root = tmp_path_factory.mktemp("coco")
    put(root / "images/a.png")
    content = dict(images=[dict(id=7, file_name="a.png")], categories=[dict(id=90, name="pit")],
                   annotations=[dict(id=1, image_id=7, category_id=90, segmentation=[SQUARE])])
    content[kind][0] = junk if key == "row" else content[kind][0] | {key: junk}
    (root / "coco.json").write_text(json.dumps(content))
    data = DataFile(root, "coco", part="(.+)", clean="all")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            assert len(read_folder(data)) == 1
        except ValueError as error:
            assert len(str(error)) > 20


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("how", [dict(), dict(crop=16), dict(size=16), dict(crop=8, scale=0.5)], ids=str)
def test_the_rows_of_a_check_are_counted_as_by_pandas(folder, how, seed):
    parts = np.random.default_rng(seed).integers(0, 25, len(TILES)).astype(str)
    pd.DataFrame(dict(name=TILES.table["name"], part=parts)).to_csv(folder / "parts.csv", index=False)
    check = check_folder(with_key(folder, part="part", **how))
    truth = pd.DataFrame(dict(part=parts, clean=~(TILES.masks > 0).any((1, 2))))
    for k, name in enumerate(TILES.classes, 1):
        truth[name] = (TILES.masks == k).any((1, 2))
    for name, row in check.classes.iterrows():
        own = truth[truth["clean" if name == FREE else name]]
        assert row["images"] == len(own), name
        assert row["parts"] == own["part"].nunique() or row["lost"], name
    assert (check.photographs, check.parts) == (len(truth), truth["part"].nunique())


def test_parts_with_clean_windows_are_enough_without_a_clean_photograph(folder):
    drop(folder, ~(TILES.masks > 0).any((1, 2)))
    check = check_folder(with_key(folder, crop=16))
    assert check.classes.loc[FREE, ["images", "parts"]].tolist() == [0, 0]
    assert check.ok and check.folds == possible_folds(read_folder(with_key(folder, crop=16)))


def test_the_parts_of_clean_ball_screws():
    if not BALL_SCREWS.is_dir():
        pytest.skip("the ball screws are not here")
    part = r"^(?:\d+_\d+_(\d+_\d+)|(KGT.+?))_crop"
    check = check_folder(make_data_file(dict(layout="labelme", images="data", annotations="label", clean="all",
                                             crop=448, part=part), BALL_SCREWS))
    assert check.classes.loc[FREE, ["images", "parts"]].tolist() == [12, 6]


def move_to(folder, kind, at, which):
    "Put photographs or masks into folders: each n-th of them into the n-th."
    for n, name in enumerate(TILES.table["name"]):
        if n % len(which) == which.index(at):
            path = folder / kind / at / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            first(kind, folder, n).rename(path)


@pytest.mark.parametrize("parallel", [True, False], ids=["masks in folders", "all masks in one folder"])
def test_photographs_beside_those_that_are_read_are_noted(folder, parallel):
    for kind in ("images", "masks"):
        for at in ("a", "b/c"):
            move_to(folder, kind, at, ("a", "b/c"))
    whole = check_folder(folder)
    assert whole.photographs == len(TILES) and not any(n.kind == "unread" for n in whole.notes)
    half = check_folder(with_key(folder, images="images/a", annotations="masks/a" if parallel else "masks"))
    note, = (n for n in half.notes if n.kind == "unread")
    assert note.file == "images" and "holds 30 pictures that are not read, such as images/b/c/" in note.text
    assert "photographs are read from images/a only" in note.text and "images holds 30" in str(half)
    assert half.ok == parallel  # masks of photographs that are not read are a problem of their own


def test_masks_regions_and_drawings_are_no_photographs_that_are_not_read(folder):
    (folder / "set").mkdir()
    for kind in ("images", "masks"):
        (folder / kind).rename(folder / "set" / kind)
    for kind in ("drawings", "old_masks", "regions"):
        shutil.copytree(folder / "set/masks", folder / "set" / kind)
    for path in (folder / "set/old_masks").iterdir():
        path.rename(path.with_stem(f"{path.stem}_mask"))
    shutil.copytree(folder / "set/images", folder / "elsewhere")
    check = check_folder(with_key(folder, images="set/images", annotations="set/masks", roi="set/regions"))
    assert not any(n.kind == "unread" for n in check.notes)


@pytest.mark.parametrize("name", STORED)
def test_no_stored_folder_is_said_to_be_read_in_part(name):
    assert not any(n.kind == "unread" for n in check_folder(stored(**STORED[name])).notes)
