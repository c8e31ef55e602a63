"""Deployment: model files, prediction on photographs, thresholds, and the scores of a model."""
import itertools
import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from conftest import patch
from dli.data.folders import DataFile, geometry, read_folder
from dli.data.samples import FREE, Samples
from dli.deploy.judging import judge, read_samples
from dli.deploy.prediction import predict_files
from dli.deploy.predictor import Predictor, load
from dli.deploy.stitching import (Rows, at_scale, drop_small, drop_small_claims, find_claims, find_defects, join_claims,
                                  settle, spans)
from dli.deploy.thresholds import allowed_alarms, choose_thresholds, share_alarms
from dli.experiment.config import RunConfig, resolve
from dli.experiment.datasets import DATASETS
from dli.experiment.loader import run_samples
from dli.experiment.store import run_folder
from dli.experiment.training import load_model, run
from dli.files import read_table
from dli.network.modelfile import ModelNotes, build_model, find_models, read_notes, save_model, save_notes
from dli.network.models import lightweight_unet, save_weights
from dli.network.speed import faster

NOTES = ModelNotes(("Crack", "Fray"), "efficientnet_lite0", (64, 32), channels=1, mean=0.43, deviation=0.12,
                   levels=(0, 4095), ignore=255, thresholds={"Fray": (0.8, 40)}, train_parts=("1", "2"),
                   config=dict(steps=3, decoder=[64, 32]))


def small_network(classes=2, channels=1, decoder=(64, 32), encoder="efficientnet_lite0") -> torch.nn.Module:
    return lightweight_unet(encoder, classes=classes, weights=None, channels=channels, decoder_channels=decoder)


@pytest.fixture
def stored(tmp_path):
    path = tmp_path / "model.safetensors"
    save_model(small_network(), path, NOTES)
    return path


# ---- model files -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("encoder", ["resnet18", "resnest50d", "mobileone_s1", "efficientnet_lite0"])
def test_a_network_made_faster_comes_back_plain(encoder, tmp_path):
    network = faster(small_network(encoder=encoder), "cpu", torch.bfloat16).eval()
    save_model(network, tmp_path / "model.safetensors", replace(NOTES, encoder=encoder))
    again = build_model(tmp_path / "model.safetensors", "cpu")
    assert not again.training and again.state_dict().keys() == network.state_dict().keys()
    assert not any("Folded" in type(m).__name__ or "Sliced" in type(m).__name__ for m in again.modules())
    image = torch.rand(1, 1, 32, 40, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(again(image), network(image), rtol=1e-3, atol=1e-3)


def test_notes_come_back_as_they_were(stored):
    assert read_notes(stored) == NOTES
    assert json.loads(json.dumps(NOTES.config)) == NOTES.config


def test_building_a_network_draws_no_random_number(stored):
    torch.manual_seed(3)
    build_model(stored, "cpu")
    drawn = torch.rand(2)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(2), drawn)


def write_notes(path, text: str) -> None:
    save_file(load_file(path), path, {"dli": text})


@pytest.mark.parametrize("damage, said", [
    (lambda p: p.write_bytes(p.read_bytes()[:1000]), "is it complete"),
    (lambda p: p.write_bytes(b""), "is it complete"),
    (lambda p: p.write_bytes(b"\x80\x04}." * 20), "is it complete"),
    (lambda p: save_weights(small_network(), p), "weights without notes"),
    (lambda p: write_notes(p, "{"), "are no JSON"),
    (lambda p: write_notes(p, "[" * 100_000), "are no JSON"),
    (lambda p: write_notes(p, "[]"), "expected notes of format 1"),
    (lambda p: write_notes(p, '{"format": 2}'), "another version of dli"),
    (lambda p: write_notes(p, '{"format": 1, "colour": 1}'), "unknown notes colour"),
    (lambda p: write_notes(p, '{"format": 1}'), "missing"),
])
def test_a_file_that_is_no_model_is_refused_by_name(stored, damage, said):
    damage(stored)
    for read in (read_notes, lambda p: build_model(p, "cpu")):
        with pytest.raises(ValueError, match=said) as caught:
            read(stored)
        assert str(stored) in str(caught.value)


def test_weights_of_another_network_are_refused(stored, tmp_path):
    with pytest.raises(ValueError, match="model: the weights are not those"):
        save_model(small_network(classes=3), tmp_path / "other.safetensors", NOTES)
    assert not (tmp_path / "other.safetensors").exists()
    write_notes(stored, json.dumps(dict(format=1, classes=["Crack"], encoder="efficientnet_lite0", decoder=[64, 32],
                                        channels=1, mean=0.4, deviation=0.1)))
    with pytest.raises(ValueError, match="not those of the network in the notes"):
        build_model(stored, "cpu")
    with pytest.raises(ValueError, match="expected the path of a .safetensors file"):
        read_notes(tmp_path / "model.pth")
    with pytest.raises(FileNotFoundError, match="no such model file"):
        read_notes(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize("wrong", [
    dict(classes=()), dict(classes="Crack"), dict(classes=("Crack", "Crack")), dict(encoder="vgg"), dict(channels=2),
    dict(decoder=(1,)), dict(mean=float("nan")), dict(deviation=0), dict(scale=0), dict(size=(0, 8)), dict(size=8),
    dict(size=(8, 8), crop=(8, 8)), dict(levels=(1, 1)), dict(levels=3), dict(ignore=2), dict(ignore=256),
    dict(thresholds={"Frey": (0.5, 1)}), dict(thresholds={"Fray": (0, 1)}), dict(thresholds={"Fray": (1.1, 1)}),
    dict(thresholds={"Fray": (0.5, 0)}), dict(thresholds={"Fray": 0.5}), dict(thresholds=[]), dict(config=None)])
def test_notes_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        replace(NOTES, **wrong)


def test_new_notes_leave_the_weights(stored):
    before = load_file(stored)
    save_notes(stored, replace(NOTES, thresholds={}))
    assert read_notes(stored).threshold("Fray") == (0.5, 1)
    after = load_file(stored)
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert [p.name for p in stored.parent.iterdir()] == [stored.name]


def test_models_are_found_in_runs_and_folders_of_runs(tmp_path, stored):
    for name in ("b", "a"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "model.safetensors").write_bytes(stored.read_bytes())
    (tmp_path / "runs" / "unfinished").mkdir()
    assert [p.parent.name for p in find_models(tmp_path / "runs")] == ["a", "b"]
    assert find_models(tmp_path / "runs" / "a") == [tmp_path / "runs" / "a" / "model.safetensors"]
    assert find_models(str(stored)) == [stored]
    for wrong in (tmp_path / "runs" / "unfinished", tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=str(wrong)):
            find_models(wrong)


# ---- a model file as a start -----------------------------------------------------------------------------------------

def test_a_model_file_is_a_start(stored):
    own = load_file(stored)
    same = lightweight_unet("efficientnet_lite0", 2, stored, channels=1, decoder_channels=(64, 32)).state_dict()
    assert all(torch.equal(same[k], own[k]) for k in own)
    other = lightweight_unet("efficientnet_lite0", 5, stored, channels=1, decoder_channels=(64, 32)).state_dict()
    equal = {k for k in own if own[k].shape == other[k].shape and torch.equal(own[k], other[k])}
    assert {k for k in own if k.startswith("encoder.")} <= equal
    assert not any(own[k].ndim == 4 for k in equal if k.startswith("decoder."))
    with pytest.raises(ValueError, match="does not fit the encoder"):
        lightweight_unet("resnet18", 2, stored, channels=1)


def test_a_grey_start_sees_equal_channels_as_it_saw_one(stored):
    grey = build_model(stored, "cpu")
    rgb = lightweight_unet("efficientnet_lite0", 2, stored, decoder_channels=(64, 32)).eval()
    image = torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rgb(image.expand(1, 3, 32, 32)), grey(image), rtol=1e-4, atol=1e-4)


# ---- to the network's scale and back ---------------------------------------------------------------------------------

class Threshold(torch.nn.Module):
    "A network that looks at one pixel: channel k is the grey level against (k + 1) / (K + 1)."
    def __init__(self, classes=2):
        super().__init__()
        self.classes = classes

    def forward(self, x):
        levels = torch.arange(1, self.classes + 1).view(1, -1, 1, 1) / (self.classes + 1)
        return 8 * (x[:, :1] - levels)


class Convolutions(torch.nn.Module):
    "A network that is the same function everywhere, with the strides of the real one; it sees 22 pixels far."
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.down = torch.nn.Conv2d(1, 4, 8, stride=8)
        self.middle = torch.nn.Conv2d(4, 8, 3, padding=1)
        self.up = torch.nn.ConvTranspose2d(8, 2, 8, stride=8)

    def forward(self, x):
        return 20 * self.up(torch.tanh(self.middle(torch.tanh(self.down(x)))))


def predictor_of(network, **how) -> Predictor:
    plain = dict(classes=("Crack", "Fray"), encoder="efficientnet_lite0", decoder=(64, 32), channels=1, mean=0.0,
                 deviation=1.0)
    return Predictor(network.eval(), ModelNotes(**plain | how), torch.device("cpu"))


def noise(*shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


SIDE = st.integers(1, 150)
SCALED = st.one_of(st.fixed_dictionaries(dict(size=st.tuples(st.integers(8, 70), st.integers(8, 70)), pad=st.booleans(),
                                              scale=st.sampled_from([0.3, 1.0, 2.0]))),
                   st.fixed_dictionaries(dict(crop=st.tuples(st.integers(8, 70), st.integers(8, 70)),
                                              scale=st.sampled_from([0.3, 1.0, 2.0]))))


@settings(deadline=None, max_examples=150)
@given(SIDE, SIDE, SCALED)
def test_the_network_sees_what_training_showed_it(height, width, how):
    image = noise(height, width)
    seen, inner = at_scale(image, predictor_of(Threshold(), **how).notes)
    windows = geometry(image, image, DataFile(Path(), "index", **how))
    assert not (seen.shape[0] % 8 or seen.shape[1] % 8) and seen.shape[0] >= inner[0] and seen.shape[1] >= inner[1]
    for end, window, _ in windows:
        y, x = map(int, re.fullmatch(r"_y(\d+)_x(\d+)", end).groups()) if end else (0, 0)
        assert np.array_equal(seen[y:y + window.shape[0], x:x + window.shape[1]], window)


@given(st.integers(1, 60), st.integers(1, 60))
def test_each_pixel_is_taken_from_the_window_whose_border_is_furthest(length, window):
    length, window = 8 * max(length, window), 8 * window
    found = spans(length, window)
    assert [first for _, first, _ in found] == [0, *[last for *_, last in found[:-1]]] and found[-1][2] == length
    assert all(start % 8 == 0 and 0 <= start <= length - window for start, *_ in found)
    starts = np.array([start for start, *_ in found])
    inside = lambda p, s: min(p - s + 1 if s else length, s + window - p if s + window < length else length)
    for start, first, last in found:
        for p in {first, (first + last) // 2, last - 1} & set(range(first, last)):
            best = max(inside(p, s) for s in starts if s <= p < s + window)
            assert inside(p, start) >= best - 1  # in the middle of an overlap both are as near


@settings(deadline=None, max_examples=60)
@given(SIDE, SIDE, SCALED)
def test_masks_have_the_size_of_the_photograph_and_are_what_the_probabilities_say(height, width, how):
    found = predictor_of(Threshold(), **how)(noise(height, width))
    mask, probabilities = found.masks[0], found.probabilities[0]
    assert mask.shape == (height, width) and mask.dtype == np.uint8
    assert probabilities.shape == (2, height, width) and probabilities.dtype == np.float32
    assert ((0 <= probabilities) & (probabilities <= 1)).all()
    above = np.where(probabilities >= 0.5, probabilities, -1)
    assert np.array_equal(mask, np.where(above.max(0) > 0, above.argmax(0) + 1, 0))
    assert found.defective.tolist() == [len(found.defects) > 0]


@pytest.mark.parametrize("shape", [(200, 264), (203, 270), (64, 500), (72, 72)])
def test_stitched_windows_are_the_whole_image_where_the_network_sees_enough(shape):
    image = noise(*shape)
    network = Convolutions()  # sees the pixel's block of 8 and the blocks beside it; windows overlap by 24 and more
    whole, stitched = (predictor_of(network, crop=crop)(image) for crop in ((512, 512), (96, 96)))
    inner = tuple(slice(8, -8) for _ in shape)  # what is beyond the edge depends on how much is filled up
    np.testing.assert_allclose(stitched.probabilities[0][:, *inner], whole.probabilities[0][:, *inner], atol=1e-6)
    if shape[0] >= 96:
        direct = torch.from_numpy(image[None, None, :200, :264].astype(np.float32)) / 255
        with torch.inference_mode():
            expected = network(direct).sigmoid()[0].numpy()
        inner = slice(8, 192), slice(8, 256)
        np.testing.assert_allclose(stitched.probabilities[0][:, *inner], expected[:, *inner], atol=1e-6)


def test_the_shape_of_the_photograph_does_not_change_what_a_batch_gives():
    predictor = predictor_of(Convolutions(), crop=(32, 40))
    images = [noise(20, 100, seed=1), noise(64, 64, seed=2), noise(7, 7, seed=3), noise(64, 64, seed=4)]
    together = predictor(images)
    for i, image in enumerate(images):
        np.testing.assert_allclose(predictor(image).probabilities[0], together.probabilities[i], atol=1e-6)
    assert len(predictor([])) == 0


# ---- regions, masks, defects -----------------------------------------------------------------------------------------

def expected_mask(probabilities, limits) -> np.ndarray:
    regions = np.stack([drop_small(p >= limit, area) for p, (limit, area) in zip(probabilities, limits)])
    best = np.where(regions, probabilities, -1).argmax(0) + 1
    return np.where(regions.any(0), best, 0)


def expected_defects(mask, probabilities, names) -> list[tuple]:
    "Class, box, area and largest probability of each region, by OpenCV."
    found = []
    for k, name in enumerate(names):
        _, labels, stats, _ = cv2.connectedComponentsWithStats((mask == k + 1).astype(np.uint8), connectivity=8)
        for label, (left, top, width, height, area) in enumerate(stats[1:].tolist(), 1):
            score = round(float(probabilities[k][labels == label].max()), 6)
            found.append((name, top, left, height, width, area, score))
    return sorted(found)


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 10**6), st.integers(1, 4), st.lists(st.integers(1, 30), min_size=4, max_size=4), st.booleans(),
       st.integers(1, 40), st.floats(0, 2))
def test_a_mask_made_row_by_row_is_the_definition(seed, classes, areas, coarse, width, smooth):
    rng = np.random.default_rng(seed)
    probabilities = rng.random((24, width, classes)).astype(np.float32)
    if smooth > 0.3:
        probabilities = cv2.GaussianBlur(probabilities, (0, 0), smooth)
    probabilities = np.moveaxis(probabilities.reshape(24, width, classes), 2, 0)
    if coarse:
        probabilities = np.round(probabilities, 1).astype(np.float32)  # ties
    limits, names = [(float(rng.uniform(0.4, 0.6)), area) for area in areas[:classes]], tuple("abcd"[:classes])
    claims = []
    for (limit, area), own in zip(limits, probabilities):
        pieces = [find_claims(own[start:stop], limit, start) for start, stop in ((0, 1), (1, 10), (10, 24))]
        claims.append(drop_small_claims(join_claims(pieces), area))
    mask = settle(claims, (24, width))
    assert np.array_equal(mask, expected_mask(probabilities, limits))
    shown = [own[mask.ravel()[own.place] == k] for k, own in enumerate(claims, 1)]
    defects = [tuple(d.values()) for own, name in zip(shown, names) for d in find_defects(own, name)]
    assert sorted(defects) == expected_defects(mask, probabilities, names)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 90), st.integers(1, 90), st.data())
def test_rows_of_a_photograph_are_those_of_the_whole(height, width, rows, columns, data):
    cuts = sorted({0, height, *data.draw(st.lists(st.integers(0, height), max_size=4))})
    small = np.random.default_rng(height).random((1, height, width)).astype(np.float32)
    under_way, made = Rows((height, width), (rows, columns)), []
    for start, stop in zip(cuts, cuts[1:]):
        under_way.add(small[:, start:stop])
        made.append(under_way.make(0))
    whole = cv2.resize(small[0], (columns, rows), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_allclose(np.concatenate(made), whole, atol=2e-6)


# ---- photographs -----------------------------------------------------------------------------------------------------

def test_deep_photographs_are_scaled_as_in_training(tmp_path):
    deep = np.linspace(0, 4095, 32 * 32).reshape(32, 32).astype(np.uint16)
    cv2.imwrite(str(tmp_path / "deep.png"), deep)
    predictor = predictor_of(Threshold(), levels=(0, 4095))
    shallow = np.rint(deep / 4095 * 255).astype(np.uint8)
    expected = predictor_of(Threshold())(shallow).probabilities[0]
    for given in (deep, tmp_path / "deep.png", deep.astype(np.float32)):
        assert np.array_equal(predictor(given).probabilities[0], expected)
    for wrong, said in ((shallow, "holds uint8"), (deep.astype(np.float32) + 5000, "holds grey levels 5000..9095")):
        with pytest.raises(ValueError, match=f"image 0: {said}, the model was trained on photographs of more than"):
            predictor(wrong)
    with pytest.raises(ValueError, match="image 0: holds uint16, the model was trained on photographs of eight bits"):
        predictor_of(Threshold())(deep)


def test_phones_turn_photographs(tmp_path):
    upright = noise(24, 40)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(upright)).save(tmp_path / "turned.png", exif=exif)
    predictor = predictor_of(Threshold())
    assert np.array_equal(predictor(tmp_path / "turned.png").masks[0], predictor(upright).masks[0])


def test_grey_models_take_rgb_photographs_and_the_other_way_round():
    grey = noise(16, 16)
    rgb = np.repeat(grey[:, :, None], 3, axis=2)
    for channels in (1, 3):
        predictor = predictor_of(Threshold(), channels=channels)
        assert np.array_equal(predictor(grey).masks[0], predictor(rgb).masks[0])
        assert np.array_equal(predictor(torch.from_numpy(rgb)).masks[0], predictor([rgb]).masks[0])


@pytest.mark.parametrize("wrong, said", [
    (noise(3, 64, 64), "channels come last"), (noise(16, 16, 4), "without transparency"),
    ([noise(16, 16, 4)], "image 0: expected a photograph"),
    (noise(0, 16), "image 0: expected a photograph"), (np.zeros((8, 8)), "holds float64"),
    (np.zeros((8, 8), bool), "holds bool"), ([noise(8, 8), "nothing.png"], "nothing.png: no such file")])
def test_what_is_no_photograph_is_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        predictor_of(Threshold())(wrong)


def test_a_photograph_of_another_kind_is_a_type_error():
    for wrong in (3, b"abc", [3], {"image": noise(8, 8)}):
        with pytest.raises(TypeError, match="images: expected paths or arrays"):
            predictor_of(Threshold())(wrong)


def test_a_diverged_network_is_an_error():
    class Broken(torch.nn.Module):
        def forward(self, x):
            return torch.full_like(x, float("nan")).expand(-1, 2, -1, -1)
    with pytest.raises(FloatingPointError, match="diverged"):
        predictor_of(Broken())(noise(16, 16))


# ---- folders ---------------------------------------------------------------------------------------------------------

@pytest.fixture
def folder(tmp_path):
    "Eight photographs in two folders: one broken, one empty, one a text, one of another size."
    for i in range(6):
        path = tmp_path / "photos" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(20 + 10 * i, 30, seed=i)).save(path)
    (tmp_path / "photos" / "a" / "4.png").write_bytes((tmp_path / "photos" / "a" / "0.png").read_bytes()[:60])
    (tmp_path / "photos" / "a" / "empty.jpg").write_bytes(b"")
    (tmp_path / "photos" / "notes.txt").write_text("no photograph")
    return tmp_path / "photos"


def test_a_folder_is_predicted_though_files_are_broken(folder, tmp_path):
    predictor, out = predictor_of(Threshold(), crop=(16, 16)), tmp_path / "out"
    table = predict_files(predictor, folder, out, overlays=True, progress=False)
    assert table["image"].tolist() == ["a/0.png", "a/2.png", "a/4.png", "a/empty.jpg", "b/1.png", "b/3.png", "b/5.png"]
    broken = table["verdict"] == "unreadable"
    assert table["image"][broken].tolist() == ["a/4.png", "a/empty.jpg"]
    assert all("can't be read" in reason for reason in table["reason"][broken])
    rows = []
    for name in table["image"][~broken]:
        mask = np.asarray(Image.open(out / "masks" / name))
        found = predictor(folder / name)
        assert np.array_equal(mask, found.masks[0])
        rows += found.defects.assign(image=name).to_dict("records")
        overlay = np.asarray(Image.open((out / "overlays" / name).with_suffix(".jpg")))
        assert overlay.shape == (*mask.shape, 3)
    stored = read_table(out / "defects.csv", text=("image", "class"))
    assert stored.to_dict("records") == rows
    assert read_table(out / "images.csv", text=("image", "reason")).equals(table)
    verdict = dict(zip(table["image"], table["verdict"]))
    assert all(verdict[row["image"]] == "defect" for row in rows)


def test_tables_keep_what_earlier_calls_wrote_of_other_photographs(folder, tmp_path):
    predictor, out = predictor_of(Threshold()), tmp_path / "out"
    predict_files(predictor, folder, out, progress=False)
    before = {name: read_table(out / name, text=("image", "reason", "class")) for name in ("images.csv", "defects.csv")}
    one = predict_files(predictor, folder / "b" / "1.png", out, progress=False)
    assert one["image"].tolist() == ["1.png"]
    for name, table in before.items():
        after = read_table(out / name, text=("image", "reason", "class"))
        assert after[after["image"] != "1.png"].equals(table) and (after["image"] == "1.png").any()
    predict_files(predictor, folder, out, progress=False)
    images = read_table(out / "images.csv", text=("image", "reason"))
    assert sorted(images["image"]) == sorted([*before["images.csv"]["image"], "1.png"])
    finished = {p.relative_to(out / "masks").with_suffix("").as_posix() for p in (out / "masks").rglob("*.png")}
    assert {Path(n).with_suffix("").as_posix() for n in images["image"][images["verdict"] != "unreadable"]} == finished


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"a,b\n1\n1,2,3\n", b"image,verdict\nx.png,ok\n"])
def test_a_foreign_table_costs_no_result(folder, tmp_path, content):
    (tmp_path / "out").mkdir()
    for name in ("images.csv", "defects.csv"):
        (tmp_path / "out" / name).write_bytes(content)
    table = predict_files(predictor_of(Threshold()), folder, tmp_path / "out", progress=False)
    assert read_table(tmp_path / "out" / "images.csv", text=("image", "reason")).equals(table)


def test_results_within_the_folder_are_no_photographs(folder):
    predictor = predictor_of(Threshold())
    first = predict_files(predictor, folder, folder / "found", progress=False)
    assert predict_files(predictor, folder, folder / "found", progress=False).equals(first)


def test_photographs_of_one_name(tmp_path):
    for name in ("1.png", "1.bmp", "2.png", "2_mask.png"):
        Image.fromarray(noise(16, 16)).save(tmp_path / name)
    table = predict_files(predictor_of(Threshold()), tmp_path, tmp_path / "out", progress=False)
    assert table["image"].tolist() == ["1.bmp", "1.png", "2.png"]
    assert sorted(p.name for p in (tmp_path / "out" / "masks").iterdir()) == ["1.bmp.png", "1.png.png", "2.png"]
    (tmp_path / "more").mkdir()
    Image.fromarray(noise(16, 16)).save(tmp_path / "more" / "2.png")
    with pytest.raises(ValueError, match="would both be named 2.png"):
        predict_files(predictor_of(Threshold()), [tmp_path / "2.png", tmp_path / "more"], tmp_path / "out2")
    assert not (tmp_path / "out2").exists()


@pytest.mark.parametrize("paths, error, said", [
    ("nowhere", FileNotFoundError, "no such file or folder"), ([], ValueError, "expected photographs or folders"),
    (".", ValueError, "no photograph in it")])
def test_paths_without_photographs(paths, error, said, tmp_path):
    paths = tmp_path / paths if isinstance(paths, str) else paths
    with pytest.raises(error, match=said):
        predict_files(predictor_of(Threshold()), paths, tmp_path / "out", progress=False)


def test_what_is_finished_stays(folder, tmp_path):
    class Stopped(Threshold):
        batches = 0

        def forward(self, x):
            self.batches += 1
            if self.batches > 2:
                raise KeyboardInterrupt
            return super().forward(x)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        predict_files(predictor_of(Stopped()), folder, out, progress=False)
    table = read_table(out / "images.csv", text=("image", "reason"))
    written = {f"{p.parent.name}/{p.name}" for p in (out / "masks").rglob("*.png")}
    assert 0 < len(table) < 7 and written == set(table["image"][table["verdict"] != "unreadable"])
    assert not list(out.rglob("*.part"))


def test_a_large_photograph_is_never_in_the_network_whole():
    class Watched(Threshold):
        seen = 0

        def forward(self, x):
            self.seen = max(self.seen, x.numel())
            return super().forward(x)
    for how in (dict(crop=(64, 64)), {}):
        network = Watched()
        predictor_of(network, **how)(np.full((2100, 2500), 200, np.uint8))
        assert 0 < network.seen <= (2**20 if how else 2048**2)


# ---- thresholds ------------------------------------------------------------------------------------------------------

class Grey(torch.nn.Module):
    "The probability of class k is channel k of an RGB photograph."
    def forward(self, x):
        return torch.logit(x[:, :2].clamp(1e-4, 1 - 1e-4))


def grey_predictor() -> Predictor:
    return predictor_of(Grey(), channels=3)


def random_samples(seed, clean, defective, seen=2) -> Samples:
    "Photographs whose first two channels are probabilities, those of the defects a little higher."
    rng = np.random.default_rng(seed)
    n = clean + defective
    images = rng.integers(0, rng.integers(100, 256), (n, 16, 16, 3))
    images = np.stack([cv2.GaussianBlur(i.astype(np.float32), (0, 0), rng.uniform(0.3, 1.5)) for i in images])
    label = np.array([0] * clean + [1 + i % seen for i in range(defective)])
    masks = np.zeros((n, 16, 16), np.uint8)
    for i in np.flatnonzero(label):
        y, x, side = rng.integers(0, 10, 2).tolist() + [rng.integers(2, 6)]
        masks[i, y:y + side, x:x + side] = label[i]
        images[i, y:y + side, x:x + side, label[i] - 1] += rng.uniform(0, 120)
    names = np.array([FREE, "Crack", "Fray"])[label]
    table = pd.DataFrame({"name": [f"{i}" for i in range(n)], "class": names, "tile": range(n), "exposure": 0,
                          "width": 16, "height": 16, "usable": True})
    return Samples(images.clip(0, 255).astype(np.uint8), masks, table, ("Crack", "Fray"), "own")


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 25), st.integers(2, 8), st.floats(0, 1))
def test_the_promised_share_of_alarms_holds(seed, clean, defective, share):
    samples, predictor = random_samples(seed, clean, defective), grey_predictor()
    chosen = choose_thresholds(predictor, samples, share)
    found = predictor.with_thresholds(chosen)(samples.images)
    assert found.defective[samples.clean].mean() <= share
    assert chosen.clean_alarm == found.defective[samples.clean].mean() and chosen.clean == clean
    assert chosen.table["alarms"].sum() <= share * clean + 1e-9
    for k, name in enumerate(samples.classes, 1):
        own = [regions_touch(found.probabilities[i][k - 1], chosen[name], samples.masks[i] == k)
               for i in np.flatnonzero(samples.label == k)]
        assert chosen.table["found"][name] == sum(own) and chosen.table["shown"][name] == len(own)
    more = choose_thresholds(predictor, samples, min(1.0, share + 0.2))
    assert more.table["found"].sum() >= chosen.table["found"].sum()


def regions_touch(probability, limit, true) -> bool:
    return bool((drop_small(probability >= limit[0], limit[1]) & true).any())


@settings(deadline=None, max_examples=100)
@given(st.lists(st.lists(st.integers(0, 4), min_size=5, max_size=5).map(np.cumsum), min_size=1, max_size=4),
       st.integers(0, 4))
def test_alarms_are_shared_as_well_as_they_can_be(found, budget):
    shares = share_alarms(found, budget)
    total = lambda each: sum(int(own[b]) for own, b in zip(found, each))
    ways = [w for w in itertools.product(range(budget + 1), repeat=len(found)) if sum(w) <= budget]
    assert total(shares) == max(map(total, ways)) and sum(shares) <= budget
    assert sum(shares) == min(sum(w) for w in ways if total(w) == total(shares))


@given(st.integers(0, 500), st.floats(0, 1))
def test_the_number_of_alarms_is_the_largest_within_the_share(clean, share):
    count = allowed_alarms(clean, share)
    assert 0 <= count <= clean and (not count or count / clean <= share)
    assert count == clean or (count + 1) / clean > share


@pytest.mark.parametrize("level, expected", [(40, (0.5, 1)), (255, (pytest.approx(1 - 1e-4, abs=1e-6), 5))])
def test_a_class_that_is_never_seen_gets_no_low_threshold(level, expected):
    samples = random_samples(0, 6, 4, seen=1)
    samples.images[..., 1] = 0
    samples.images[0, :2, :2, 1] = level  # the largest clean score
    with pytest.warns(UserWarning, match="Fray: no image shows it, so its threshold is the largest score"):
        chosen = choose_thresholds(grey_predictor(), samples, 1.0)
    assert chosen["Fray"] == expected and "Fray: no image shows it" in str(chosen)
    found = grey_predictor().with_thresholds(chosen)(samples.images)
    assert not any((mask == 2).any() for mask in found.masks)


def test_without_a_defect_every_class_is_never_seen():
    with pytest.warns(UserWarning, match="Fray: no image shows it"), pytest.warns(UserWarning, match="Crack: no image"):
        chosen = choose_thresholds(grey_predictor(), random_samples(1, 5, 0), 0.5)
    assert all(p >= 0.5 for p, _ in chosen.values()) and chosen.alarms == 0


def test_without_a_clean_image_thresholds_stay():
    predictor = grey_predictor().with_thresholds(dict(Crack=(0.7, 3)))
    with pytest.warns(UserWarning, match="no image is clean"):
        chosen = choose_thresholds(predictor, random_samples(1, 0, 5))
    assert chosen == dict(Crack=(0.7, 3), Fray=(0.5, 1)) and chosen.clean_alarm is None


def test_images_that_tie():
    "Ten clean images with the same score: with room for one alarm, none may have it."
    samples = random_samples(2, 10, 4)
    samples.images[:10] = samples.images[0]
    chosen = choose_thresholds(grey_predictor(), samples, 0.1)
    assert chosen.alarms == 0


@pytest.mark.parametrize("share", [-0.1, 1.1, "2 %", None, True, float("nan")])
def test_a_share_that_is_none(share):
    with pytest.raises(ValueError, match="max_clean_alarm: expected a share"):
        choose_thresholds(grey_predictor(), random_samples(0, 2, 2), share)


def test_samples_of_another_model_are_refused():
    samples = random_samples(0, 2, 2)
    with pytest.raises(ValueError, match="expected grey images"):
        choose_thresholds(predictor_of(Threshold()), samples)
    with pytest.raises(ValueError, match=r"expected the classes \('Crack', 'Fray'\)"):
        choose_thresholds(grey_predictor(), replace(samples, classes=("Crack", "Pit"), table=samples.table.replace(
            "Fray", "Pit")))


def test_thresholds_are_stored_in_the_model_file(stored):
    predictor = load(stored, "cpu").with_thresholds(dict(Crack=(0.25, 7)))
    assert read_notes(stored).threshold("Crack") == (0.5, 1)
    predictor.save()
    assert load(stored, "cpu").notes.thresholds == {"Fray": (0.8, 40), "Crack": (0.25, 7)}
    with pytest.raises(ValueError, match="comes from no file"):
        replace(predictor, path=None).save()


def test_one_of_several_models_must_be_chosen(tmp_path, stored):
    for name in ("a", "b"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "model.safetensors").write_bytes(stored.read_bytes())
    with pytest.raises(ValueError, match="expected one model, got 2: choose one of a, b"):
        load(tmp_path / "runs")


# ---- photographs that training cut into windows ----------------------------------------------------------------------

def cut_photographs(folder: Path, clean: int, defective: int, **how) -> tuple[Samples, list[np.ndarray]]:
    "Smooth photographs of several sizes as files; as samples, cut; and as arrays."
    rng, images = np.random.default_rng(clean), []
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    for i in range(clean + defective):
        shape = [(50, 70), (24, 32), (10, 45), (61, 33)][i % 4]
        image = cv2.GaussianBlur(rng.random(shape), (0, 0), 3)
        image = np.rint(255 * (image - image.min()) / (image.max() - image.min())).astype(np.uint8)
        mask = np.zeros(shape, np.uint8)
        if i >= clean:
            mask[:6, :6], image[:6, :6] = 1 + i % 2, 250
        images.append(image)
        cv2.imwrite(str(folder / f"images/{i:02}.png"), image)
        cv2.imwrite(str(folder / f"masks/{i:02}.png"), mask)
    file = DataFile(folder, "index", classes=("Crack", "Fray"), part=r"^(\d+)", crop=(24, 32), **how)
    return read_folder(file), images


@pytest.mark.parametrize("share", [0, 0.2, 0.6])
def test_thresholds_and_scores_count_whole_photographs_as_prediction_does(tmp_path, share):
    samples, images = cut_photographs(tmp_path, 8, 4)
    assert len(samples) > len(images)
    predictor = predictor_of(Threshold(), crop=(24, 32))
    chosen = choose_thresholds(predictor, samples, share)
    tuned = predictor.with_thresholds(chosen)
    found = tuned(images)
    assert chosen.unit == "photograph" and chosen.clean == 8 and chosen.alarms == found.defective[:8].sum() <= 8 * share
    assert f"alarms on {chosen.alarms} of 8 clean photographs" in str(chosen)
    evaluation = judge(tuned, samples, "all")
    assert evaluation.images["name"].tolist() == [f"{i:02}" for i in range(12)]
    assert evaluation.clean_alarms == [f"{i:02}" for i in np.flatnonzero(found.defective[:8])]
    assert evaluation.images["area"].tolist() == [(mask > 0).sum() for mask in found.masks]
    assert evaluation.confusion_pixels.to_numpy().sum() == sum(image.size for image in images)  # each pixel once
    assert "12 photographs (all) of 12 parts, 4 of them defective" in str(evaluation)


def test_the_scale_of_windows_is_that_of_their_photograph(tmp_path):
    samples, images = cut_photographs(tmp_path, 4, 2, scale=2.0)
    evaluation = judge(predictor_of(Threshold(), crop=(24, 32), scale=2.0), samples, "all")
    assert evaluation.unit == "photograph" and len(evaluation.images) == 6
    assert evaluation.confusion_pixels.to_numpy().sum() == sum(4 * image.size for image in images)


@pytest.mark.parametrize("how", [dict(size=(40, 40)), dict(size=(40, 48), pad=True), dict(crop=(24, 32), scale=0.5)])
@pytest.mark.parametrize("share", [0.2, 0.6])
def test_alarms_are_those_of_prediction_at_the_photographs_own_size(tmp_path, how, share):
    _, images = cut_photographs(tmp_path, 10, 5)
    file = DataFile(tmp_path, "index", classes=("Crack", "Fray"), part=r"^(\d+)", **how)
    samples = read_folder(file)
    chosen = choose_thresholds(predictor_of(Threshold(), **how), samples, share)
    tuned = predictor_of(Threshold(), **how).with_thresholds(chosen)
    found = tuned(images)
    assert chosen.alarms == found.defective[:10].sum() <= 10 * share
    assert 0 < chosen.table["found"].max() <= found.defective[10:].sum()
    evaluation = judge(tuned, samples, "all")
    assert evaluation.clean_alarms == [f"{i:02}" for i in np.flatnonzero(found.defective[:10])]
    assert evaluation.images["area"].tolist() == [(mask > 0).sum() for mask in found.masks]
    if "pad" in how:  # what was filled up is no pixel of a photograph
        pixels = sum(np.prod(geometry_shape(image.shape, how["size"])) for image in images)
        assert evaluation.confusion_pixels.to_numpy().sum() == pixels


def geometry_shape(shape, size) -> tuple[int, int]:
    factor = min(t / s for t, s in zip(size, shape))
    return tuple(min(max(round(s * factor), 1), t) for s, t in zip(shape, size))


def test_windows_are_counted_where_no_photograph_is_clean_or_some_are_missing(tmp_path):
    predictor = predictor_of(Threshold(), crop=(24, 32))
    defective = cut_photographs(tmp_path / "defective", 0, 4)[0]
    whole = cut_photographs(tmp_path / "mixed", 4, 2)[0]
    for samples in (defective, whole[1:]):
        with pytest.warns(UserWarning, match="counted by window, .* windows, and each can raise an alarm"):
            chosen = choose_thresholds(predictor, samples, 0.1)
        assert chosen.unit == "window" and chosen.clean == samples.clean.sum()
        evaluation = judge(predictor, samples, "all")
        assert len(evaluation.images) == len(samples) and "counted by window" in str(evaluation)


# ---- a run, its model, its scores ------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A smoke run: its configuration, its row, and its folder with a model file."
    out = tmp_path_factory.mktemp("runs")
    config = resolve(RunConfig(method="dli", preset="smoke", dataset="synthetic", out=str(out)))
    row, data = run(config, progress=False), DATASETS["synthetic"]
    train, val = run_samples(config)
    notes = ModelNotes(val.classes, config.encoder, config.decoder, channels=1, mean=data.mean,
                       deviation=data.deviation, size=(config.image_size,) * 2,
                       config=json.loads(json.dumps(asdict(config))),
                       val_parts=tuple(map(str, val.table["tile"].unique())))
    save_model(load_model(config, train), run_folder(config) / "model.safetensors", notes)
    return row, run_folder(config), val


def test_masks_of_a_loaded_model_are_the_regions_of_its_run(trained):
    _, folder, val = trained
    with np.load(folder / "regions.npz") as file:
        regions = np.unpackbits(file["regions"], axis=-1, count=64).astype(bool)
    found = load(folder, "cpu")(val.images)
    assert regions.any()
    probabilities = np.stack(found.probabilities)
    assert np.array_equal(probabilities >= 0.5, regions)
    masks = np.stack(found.masks)
    assert np.array_equal(masks > 0, regions.any(1))
    assert np.take_along_axis(regions, masks[:, None].astype(int) - 1, 1)[:, 0][masks > 0].all()


def test_judging_a_run_gives_the_scores_of_its_row(trained):
    row, folder, val = trained
    evaluation = judge(folder)
    for name, value in evaluation.scores.items():
        assert value == (row[name] if row[name] is None else pytest.approx(row[name], abs=1e-6)), name
    assert evaluation.confusion.values.sum() == len(val) and evaluation.parts["images"].sum() == len(val)
    assert evaluation.confusion_pixels.values.sum() == val.masks.size
    clean = evaluation.images["true"] == FREE
    masks = load(folder, "cpu")(val.images).defective
    assert evaluation.clean_alarms == evaluation.images["name"][clean & masks].tolist()
    assert judge(folder, val, part="all").counts.equals(evaluation.counts)


def test_a_report_is_one_page_and_json(trained):
    _, folder, val = trained
    evaluation = judge(folder)
    text = evaluation.to_html()
    assert "<script" not in text and "http" not in text.replace("http-equiv", "")
    assert text.count("data:image/png;base64") == len(evaluation.pictures) > 0
    content = json.loads(evaluation.to_json())
    assert content["scores"].keys() == evaluation.scores.keys() and len(content["images"]) == len(val)
    assert str(evaluation).count("\n") > 10


def test_parts_that_are_not_there(trained):
    _, folder, val = trained
    with pytest.raises(ValueError, match="part: expected one of val, test, all"):
        judge(folder, part="train")
    with pytest.raises(ValueError, match="no column split"):
        judge(folder, part="test")
    with pytest.raises(ValueError, match="none of the 3 images belongs to it"):
        judge(folder, replace(val[:3], table=val[:3].table.assign(tile=["x", "y", "z"])))
    assert len(judge(folder, "synthetic").images) == len(val)


def test_stricter_thresholds_give_fewer_alarms(trained):
    _, folder, val = trained
    predictor = load(folder, "cpu")
    plain = judge(predictor, val, part="all")
    strict = judge(predictor.with_thresholds({c: (0.9, 20) for c in val.classes}), val, part="all")
    assert set(strict.clean_alarms) <= set(plain.clean_alarms) and set(strict.missed) >= set(plain.missed)
    fp = lambda e: sum(e.counts[f"fp_{c}"].sum() for c in val.classes)
    assert fp(strict) < fp(plain)


def test_a_data_set_of_the_table_is_read_as_it_was_for_the_run(monkeypatch):
    patch(monkeypatch, "load_dataset", lambda *how: how)
    notes = replace(NOTES, size=(96, 96), config=dict(threshold=0))
    assert read_samples("magnetic-tiles", notes) == ("magnetic-tiles", 96, 0)
    assert read_samples("magnetic-tiles", replace(notes, config={})) == ("magnetic-tiles", 96, 127)
