"""Every public function with photographs of any shape: not square, grey or in colour, one class or several."""
import ast
from importlib import import_module
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import dli
from dli.data import Samples, dataset_table, one_hot, show_samples
from dli.experiment import DATASETS, RunConfig, evaluate, fit, plot_predictions, predict, predict_samples
from dli.experiment.loader import batches, run_injection
from dli.experiment.evaluation import with_patches
from dli.experiment.steps import run_loss
from dli.experiment.training import make_row
from dli.method import BLENDS, InjectBatch, InjectionPlan, default_margin, find_clean, grow_mask, poisson_blend_image
from dli.network import (LOSSES, Dice, FocalOfMeans, Lovasz, SegmentationLoss, WeightedBCE, faster, image_weights,
                         load_weights, pixel_weights, save_weights)
from dli.pictures import plot_curve
from dli.scoring import influence, score_counts

SHAPES = st.tuples(st.sampled_from((24, 40, 64)), st.sampled_from((32, 48, 72)), st.sampled_from((1, 3)))
CLASSES = st.sampled_from((("pitting",), ("a b", "Straße"), ("0", "$\\frac$", "_under")))

TABLES = {"BLENDS", "DATASETS", "ENCODERS", "FREE", "METHODS", "MT_CLASSES", "PRESETS", "RESULTS"}
ROWS_AND_TYPES = {"BlendOptions", "Comparison", "Counts", "Dataset", "Encoder", "Loss", "Method", "Preset"}
ERRORS = {"BadPredictions", "DamagedDataset", "DownloadError", "WeightsUnavailable"}
OF_SQUARE_TILES = {"fetch_magnetic_tiles", "find_magnetic_tiles", "fold_table", "load_dataset", "magnetic_tiles",
                   "read_folds", "synthetic_tiles", "verify_magnetic_tiles"}
OF_RUNS = {"load_model", "load_runs", "notebook_config", "publish", "resolve", "run", "run_folder", "run_key",
           "run_name", "run_samples", "runs_in", "find_dataset"}
OF_FOLDERS = {"DataFile", "FolderCheck", "Guess", "LAYOUTS", "check_folder", "guess_data_file", "possible_folds",
              "read_data_file", "read_folder"}  # test_folders.py, test_guess.py
OF_MODEL_FILES = {"ModelNotes", "build_model", "find_models", "read_notes", "save_model"}  # test_deploy.py
OF_PAGES = {"logger", "preview_page", "write_report"}  # test_cli.py
NOT_WALKED = TABLES | ROWS_AND_TYPES | ERRORS | OF_SQUARE_TILES | OF_RUNS | OF_FOLDERS | OF_MODEL_FILES | OF_PAGES


def parts(height: int, width: int, channels: int, classes: tuple[str, ...], seed: int = 0) -> Samples:
    "Six parts of each class and twelve clean ones, a photograph each: a blob of its own grey on noise."
    rng, images, masks, rows = np.random.default_rng(seed), [], [], []
    for kind in [c for c in classes for _ in range(6)] + ["Free"] * 12:
        mask = np.zeros((height, width), np.uint8)
        if kind != "Free":
            y, x = rng.integers(0, height - 8), rng.integers(0, width - 8)
            mask[y:y + rng.integers(2, 9), x:x + rng.integers(2, 9)] = classes.index(kind) + 1
        image = rng.integers(60, 140, (height, width, channels)).astype(np.uint8)
        image[mask > 0] += 60
        images.append(image[..., 0] if channels == 1 else image)
        masks.append(mask)
        rows.append((f"photo {len(rows):03d}", kind, len(rows), 1, width, height, True))
    table = pd.DataFrame(rows, columns=["name", "class", "tile", "exposure", "width", "height", "usable"])
    return Samples(np.stack(images), np.stack(masks), table, classes, "own")


def public_names(*wings: str) -> set[str]:
    "What the doors of some wings hand out."
    return {name for wing in wings for name in import_module(f"dli.{wing}").__all__}


def as_tensors(samples: Samples) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.from_numpy(samples.images)
    return (images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)), torch.from_numpy(samples.masks)


def test_every_public_name_that_takes_images_is_walked():
    "The study's names take rows; those listed here are tables, names of runs, or make a data set of their own."
    here = {node.id for node in ast.walk(ast.parse(Path(__file__).read_text())) if isinstance(node, ast.Name)}
    here |= {node.attr for node in ast.walk(ast.parse(Path(__file__).read_text())) if isinstance(node, ast.Attribute)}
    public = public_names("data", "method", "network", "scoring", "experiment")
    assert sorted(public - here - NOT_WALKED) == [], "walk it below, or say in NOT_WALKED why not"
    assert sorted(NOT_WALKED - public) == []


@given(SHAPES, CLASSES)
@settings(max_examples=8, deadline=None)
def test_samples_splits_and_injection(shape, classes):
    samples = parts(*shape, classes)
    train, val = dli.split_samples(samples, fold=1)
    assert not set(train.table["tile"]) & set(val.table["tile"]) and len(train) + len(val) == len(samples)
    assert dataset_table(samples).loc[list(classes), "images"].tolist() == [6] * len(classes)
    images, masks = as_tensors(train)
    assert (find_clean(masks) == np.flatnonzero(train.clean)).all()
    assert torch.equal(one_hot(masks, len(classes)).sum(1), (masks > 0).long())
    pool = dli.DonorPool(train, transforms={classes[0]: dli.DonorTransform(rotate=90)})
    inject = dli.DynamicLabelInjection(pool, fill="all")
    plan = inject.make_params(masks, torch.Generator().manual_seed(0))
    after, labels = inject.transform(images, masks, InjectionPlan.from_json(plan.to_json()))
    assert after.shape == images.shape and after.dtype == images.dtype and (labels > 0).flatten(1).any(1).all()
    batch = InjectBatch(inject, ("x", "y"))(dict(x=images, y=masks), torch.Generator().manual_seed(0))
    assert torch.equal(batch["x"], after) and torch.equal(batch["y"], labels)
    untouched = (masks > 0).flatten(1).any(1)
    assert torch.equal(after[untouched], images[untouched]) and torch.equal(labels[untouched], masks[untouched])
    for figure in (dli.show_batch(images, after, labels, plan, classes), show_samples(train)):
        figure.canvas.draw()
        plt.close(figure)


@given(SHAPES, st.booleans())
@settings(max_examples=8, deadline=None)
def test_blends(shape, mixed):
    height, width, channels = shape
    rng = torch.Generator().manual_seed(height + width)
    target, source = torch.rand(2, 2, channels, height, width, generator=rng)
    mask = torch.zeros(2, height, width, dtype=torch.bool)
    mask[0, 3:9, 2:13] = mask[1, :, -4:] = True
    for blend in (dli.cut_paste(target, source, mask), dli.poisson_blend(target, source, mask, mixed)):
        outside = (~mask)[:, None].expand_as(target)
        assert blend.shape == target.shape and torch.equal(blend[outside], target[outside]) and blend.isfinite().all()
        assert not torch.equal(blend, target)
    grown = grow_mask(mask, default_margin((height, width)))
    whole = poisson_blend_image(target, source, grown, mixed)
    assert (grown | ~mask).all() and whole.shape == target.shape and whole.isfinite().all()


@given(SHAPES, CLASSES, st.sampled_from(sorted(BLENDS)))
@settings(max_examples=8, deadline=None)
def test_blends_by_name(shape, classes, name):
    samples = parts(*shape, classes)
    images, masks = as_tensors(samples)
    inject = dli.DynamicLabelInjection(dli.DonorPool(samples), fill="all", blend=name, p_poisson=1.0)
    plan = inject.make_params(masks, torch.Generator().manual_seed(0))
    after, _ = inject.transform(images, masks, plan)
    assert set(plan.blend) == {name} and after.shape == images.shape and not torch.equal(after, images)


@pytest.mark.parametrize("shape", [(24, 72, 1), (64, 32, 3)])
@pytest.mark.parametrize("classes", [("pitting",), ("0", "$\\frac$", "_under")])
def test_networks_losses_and_scores(shape, classes, tmp_path):
    samples, k = parts(*shape, classes), len(classes)
    images, masks = as_tensors(samples)
    model = dli.lightweight_unet("efficientnet_lite0", classes=k, channels=shape[2], weights=None)
    logits = model(images[:4].float() / 255)
    assert logits.shape == (4, k, *shape[:2])
    for name in LOSSES:
        loss = dli.make_loss(name, images_per_class=[6] * k, pixels_per_class=[20 + i for i in range(k)])
        value = loss(logits, masks[:4])
        assert value.ndim == 0 and value.isfinite()
    weights = (image_weights([6] * k), pixel_weights([20 + i for i in range(k)]))
    for classification in (WeightedBCE(), FocalOfMeans(), *map(WeightedBCE, weights)):
        for overlap in (Dice(), Lovasz()):
            assert SegmentationLoss(classification, overlap, classes=k)(logits, masks[:4]).isfinite()
    save_weights(model, tmp_path / "network.safetensors")
    again = dli.lightweight_unet("efficientnet_lite0", classes=k, channels=shape[2], weights=None)
    again = faster(load_weights(again, tmp_path / "network.safetensors"), "cpu")
    levels = dli.experiment.find_dataset("synthetic")
    torch.testing.assert_close(predict(again, images[:4], levels), predict(model, images[:4], levels), rtol=1e-3,
                               atol=1e-3)
    perfect = torch.stack([masks == i + 1 for i in range(k)], 1) * 40.0 - 20
    counts = dli.counts_table(samples.table, dli.count_batch(perfect, masks), classes)
    assert dli.scores(counts, classes)["iou_macro"] == 1
    halves = [counts[counts["tile"] % 2 == i] for i in (0, 1)]
    assert dli.summarize(halves, classes).loc["iou_macro", "pooled"] == 1
    assert dli.compare(halves, halves, classes).difference == 0
    assert (influence(halves, halves, classes)["moves"] == 0).all()
    for name, mask in zip(samples.table["name"], samples.masks):
        Image.fromarray(mask).save(tmp_path / f"{name}.png")
    assert dli.score(tmp_path, samples=samples)["iou_macro"] == 1
    assert len(score_counts(tmp_path, samples=samples)) == len(samples)
    found, packed = predict_samples(model, samples, levels)
    assert found.equals(evaluate(model, samples, levels))
    regions = np.unpackbits(packed, axis=-1)
    predicted = found.filter(like="tp_").to_numpy() + found.filter(like="fp_").to_numpy()
    assert (regions[..., :shape[1]].sum((2, 3)) == predicted).all()
    curve = pd.DataFrame([dict(step=step, loss=1.0, **dli.scores(found, classes)) for step in (1, 2)])
    for figure in (plot_curve(curve, classes), plot_predictions(samples, found, packed)):
        figure.canvas.draw()
        plt.close(figure)


# ---- with pixels that count for nothing ---------------------------------------------------------------------------

def marked_parts(shape: tuple[int, int, int], classes: tuple[str, ...], seed: int = 0) -> tuple[Samples, np.ndarray]:
    "The same with white pixels around each defect and in a strip at the left, marked by 255; and which they are."
    samples = parts(*shape, classes, seed)
    images, masks = samples.images.copy(), samples.masks.copy()
    band = torch.nn.functional.max_pool2d(torch.from_numpy(masks).float()[:, None], 3, 1, 1)[:, 0].numpy() > 0
    marked = (band | (np.arange(shape[1]) < 3)) & (masks == 0)
    images[marked], masks[marked] = 255, 255
    return Samples(images, masks, samples.table, classes, "own", ignore_index=255), marked


def unmarked(samples: Samples) -> Samples:
    "The same with background in the place of what is marked."
    masks = np.where(samples.masks == 255, 0, samples.masks)
    return Samples(samples.images, masks, samples.table, samples.classes, "own")


@given(SHAPES, CLASSES, st.integers(0, 99))
@settings(max_examples=8, deadline=None)
def test_ignored_pixels_in_samples_and_injection(shape, classes, seed):
    samples, marked = marked_parts(shape, classes, seed)
    train, val = dli.split_samples(samples, fold=1)
    for part, plain in zip((train, val), dli.split_samples(unmarked(samples), fold=1)):
        assert part.ignore_index == part[:2].ignore_index == 255 and part.table.equals(plain.table)
    areas = [100 * np.mean((m == 1).sum() / (m != 255).sum()) for m in samples.masks[:6]]
    table, plain = dataset_table(samples), dataset_table(unmarked(samples))
    assert table.loc[classes[0], "area"] == pytest.approx(np.mean(areas))
    assert table[["images", "tiles", "empty"]].equals(plain[["images", "tiles", "empty"]])
    images, masks = as_tensors(train)
    pool = dli.DonorPool(train)
    assert pool.ignore_index == 255 and pool.counts == dli.DonorPool(unmarked(train)).counts
    for donor in pool.donors:
        assert donor.image.max() < 255, "what is not known was cut out with a donor"
    inject = dli.DynamicLabelInjection(pool, fill="all")
    plan = inject.make_params(masks, torch.Generator().manual_seed(seed))
    after, labels = inject.transform(images, masks, InjectionPlan.from_json(plan.to_json()))
    assert torch.equal(labels == 255, masks == 255) and len(plan) == train.clean.sum()
    assert torch.equal(inject(images, masks, torch.Generator().manual_seed(seed))[1], labels)
    with pytest.raises(ValueError, match="pass ignore_index=255"):
        dli.show_batch(images, after, labels, plan, classes)
    for figure in (dli.show_batch(images, after, labels, plan, classes, ignore_index=255), show_samples(train)):
        figure.canvas.draw()
        plt.close(figure)


@pytest.mark.parametrize("shape, classes", [((24, 72, 1), ("pitting",)), ((64, 32, 3), ("0", "$\\frac$", "_under"))])
def test_ignored_pixels_in_networks_losses_and_scores(shape, classes, tmp_path):
    "Whatever is predicted on them: the same scores as of a network that predicts nothing there."
    (samples, marked), k = marked_parts(shape, classes), len(classes)
    _, masks = as_tensors(samples)
    ignored = torch.from_numpy(marked)[:, None]
    logits = torch.randn(len(masks), k, *shape[:2], generator=torch.Generator().manual_seed(0)) * 3
    for name in LOSSES:
        assert run_loss(RunConfig(method=name, preset="smoke"), samples).ignore_index == 255
        loss = dli.make_loss(name, [6] * k, [20 + i for i in range(k)], ignore_index=samples.ignore_index)
        assert torch.equal(loss(logits, masks), loss(logits.masked_fill(ignored, 50.0), masks))
    count = lambda *batch: dli.counts_table(samples.table, dli.count_batch(*batch), classes)
    counts = count(logits.masked_fill(ignored, 50.0), masks, 255)
    expected = count(logits.masked_fill(ignored, -1e4), masks.masked_fill(ignored[:, 0], 0))
    assert counts["pixels"].tolist() == (~marked).sum((1, 2)).tolist()
    assert counts.drop(columns="pixels").equals(expected.drop(columns="pixels"))
    for name, mask in zip(samples.table["name"], samples.masks):  # of the first class wherever nothing counts
        Image.fromarray(np.where(mask == 255, 1, mask).astype(np.uint8)).save(tmp_path / f"{name}.png")
    found = dli.score(tmp_path, samples=samples)
    assert found["iou_macro"] == found["iou_micro"] == 1 and found["clean_alarm"] == 0
    Image.fromarray(samples.masks[0]).save(tmp_path / f"{samples.table['name'][0]}.png")
    with pytest.raises(ValueError, match="got 255; a prediction ignores nothing"):
        dli.score(tmp_path, samples=samples)


@pytest.mark.parametrize("method", ["baseline", "wce", "dli"])
def test_a_run_on_samples_with_ignored_pixels(method, monkeypatch):
    "Counts, regions and patches leave out what the samples mark; the checkpoint knows the mark, the row is as ever."
    samples, _ = marked_parts((32, 48, 1), ("pitting", "scratch"))
    monkeypatch.setitem(DATASETS, "own", DATASETS["synthetic"])
    config = RunConfig(method=method, preset="smoke", weights=None, dataset="own", steps=2, evaluations=1)
    train, val = dli.split_samples(samples, fold=1)
    images, masks = next(batches(config, train, run_injection(config, train), torch.device("cpu")))
    assert images.shape == (8, 1, 32, 48) and masks.shape == (8, 32, 48)
    done = fit(config, train, val, progress=False, device="cpu")
    assert done.counts["pixels"].tolist() == (val.masks != 255).sum((1, 2)).tolist()
    assert done.inject is None or done.inject.ignore_index == 255
    known = val.masks != 255
    regions = np.unpackbits(done.regions, axis=-1).astype(bool)
    assert not (regions & ~known[:, None]).any()
    predicted = done.counts.filter(like="tp_").to_numpy() + done.counts.filter(like="fp_").to_numpy()
    assert (regions.sum((2, 3)) == predicted).all()
    assert "own, 255 ignored" == done.source
    assert make_row(done, train, val)["source"] == "own"
    patched = with_patches(train, val, 0, 1.0, DATASETS["own"])
    assert np.array_equal(patched.masks, val.masks[val.clean]) and patched.ignore_index == 255
    figure = plot_predictions(val, done.counts, done.regions)
    figure.canvas.draw()
    plt.close(figure)
