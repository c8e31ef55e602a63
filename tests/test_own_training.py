"""Photographs of one's own: a data file goes in; a row, counts, regions, pictures and a model file come out."""
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import cv2
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from conftest import patch
from dli.data import Samples, check_folder, split_samples
from dli.data.folders import WINDOW
from dli.data.synthetic import synthetic_tiles
from dli.experiment import (RunConfig, find_dataset, fit, load_model, load_runs, plot_predictions, predict_samples,
                            resolve, run, run_folder, run_samples, runs_in)
from dli.experiment.config import run_key
from dli.experiment.datasets import data_name, grey_levels
from dli.experiment.loader import as_batch, batches, run_injection
from dli.experiment.report import run_report
from dli.experiment.state import advance
from dli.experiment.steps import torch_dtype
from dli.network.modelfile import read_notes
from dli.scoring.metrics import count_batch, counts_table
from dli.study.matrix import run_matrix

ROOT = Path(__file__).parent.parent
BALL_SCREWS = ROOT.parent / "shared/own-data/bsdata"
KINDS = ("one class", "no clean photograph", "several classes", "large")


def draw(mask: np.ndarray, rng, value: int, side: int):
    "A square defect somewhere."
    y, x = (rng.integers(0, length - side) for length in mask.shape)
    mask[y:y + side, x:x + side] = value


def write(folder: Path, masks: list[np.ndarray], yaml: str, names: list[str], deep: bool = False):
    "Photographs of grey noise in which class k is a square of its own grey; the layout index."
    rng = np.random.default_rng(1)
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for name, mask in zip(names, masks):
        noise = rng.integers(-12, 13, [side // 4 for side in mask.shape]).repeat(4, 0).repeat(4, 1)
        image = np.choose(mask, [128, 40, 220, 80]) + noise
        image = (image * 16).astype(np.uint16) if deep else image.astype(np.uint8)
        assert cv2.imwrite(str(folder / "images" / f"{name}.png"), image)
        assert cv2.imwrite(str(folder / "masks" / f"{name}.png"), mask)
    (folder / "parts.yaml").write_text(f"layout: index\n{yaml}")
    return folder


def make(folder: Path, kind: str, deep: bool = False) -> Path:
    "The data set of a kind; part p3 has the photographs p3_0 and p3_1."
    rng, part = np.random.default_rng(0), "part: '^(p\\d+)_'\n"
    sizes = {"no clean photograph": (96, 128), "large": (256, 3000)}
    masks = [np.zeros(sizes.get(kind, (48, 64)), np.uint8) for _ in range(16 if kind == "large" else 40)]
    for i, mask in enumerate(masks):
        if kind == "several classes" and i % 4:
            draw(mask, rng, 1 + i % 3, 10)
            if i % 8 > 5:
                draw(mask, rng, 1 + (i + 1) % 3, 8)
        if kind == "no clean photograph" or (kind == "one class" and i % 2) or (kind == "large" and i % 4):
            draw(mask, rng, 1, 6 if kind == "large" else 10)
    yaml = {"several classes": "classes: [pit, scratch, dent]\n", "large": "classes: [pit]\ncrop: 128\n",
            "no clean photograph": "classes: [pit]\ncrop: [48, 64]\n"}.get(kind, "classes: [pit]\n")
    return write(folder, masks, yaml + part, [f"p{i // 2}_{i % 2}" for i in range(len(masks))], deep)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    "The folder of a kind, made once."
    made = {}

    def of(kind):
        if kind not in made:
            made[kind] = make(tmp_path_factory.mktemp("own") / "screws", kind)
        return made[kind]
    return of


@pytest.fixture(autouse=True)
def without_pictures(request, monkeypatch):
    "Drawing takes longer than training here."
    if "pictures" not in request.node.name:
        patch(monkeypatch, "save_pictures", lambda *given: None)


def config(folder, **given):
    return RunConfig(**dict(dataset=folder, preset="smoke", weights=None, batch_size=8, evaluations=1) | given)


def outcome(c):
    "All that a finished run leaves, times and places left out."
    folder = run_folder(resolve(c))
    row = json.loads((folder / "row.json").read_text())
    row = {k: v for k, v in row.items() if not k.startswith("seconds") and k not in ("finished", "out", "commit")}
    notes = asdict(read_notes(folder / "model.safetensors"))
    assert notes.pop("config")["data"] == row["data"]
    weights = load_model(c, run_samples(c)[0]).state_dict()
    files = [(folder / name).read_bytes() for name in ("counts.csv", "regions.npz")]
    return row, notes, files, {name: value.tolist() for name, value in weights.items()}


def trains(folder, out, **given):
    "Train once as it is, once stopped and continued; check what is left."
    whole, stopped = (config(folder, out=str(out / name), **given) for name in ("whole", "stopped"))
    row = run(whole, progress=False)
    assert sum(n for name, n in row.items() if name.startswith("injected_")) > 0
    curve = pd.read_csv(run_folder(resolve(whole)) / "curve.csv")
    assert np.isfinite(curve["loss"]).all() and curve["step"].iloc[-1] == row["steps"]
    (stored,) = load_runs(out / "whole").to_dict("records")
    assert stored["key"] == row["key"] == run_key(whole) and stored["dataset"] == row["dataset"] == folder.name
    assert runs_in(out / "whole") == {run_folder(resolve(whole)): resolve(whole)}
    half = row["steps"] // 2 + 1

    def dies(state, *batch):
        if state.step + 1 == half:
            raise KeyboardInterrupt
        advance(state, *batch)
    with pytest.MonkeyPatch.context() as m:
        patch(m, "advance", dies)
        patch(m, "CHECKPOINT_SECONDS", 0)
        with pytest.raises(KeyboardInterrupt):
            run(stopped, progress=False)
    assert run(stopped, progress=False)["key"] == row["key"]
    for left, expected in zip(outcome(stopped), outcome(whole)):
        assert left == expected
    return row


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_data_trains_injects_and_survives_a_stop(kind, folders, tmp_path):
    small = dict(steps=2, batch_size=4) if kind == "large" else dict(steps=4)
    row = trains(folders(kind), tmp_path, **small)
    assert row["source"] == f"folder {row['data']}" and row["train_tiles"] + row["val_tiles"] in (8, 20)
    assert row["fill"] == ("uniform" if kind == "several classes" else 0.5) and row["margin"] == "defect"


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_data_trains_some_hundred_steps(kind, folders, tmp_path):
    row = trains(folders(kind), tmp_path, steps=300, evaluations=3)
    injected = {name: n for name, n in row.items() if name.startswith("injected_")}
    assert all(injected.values()) and len(injected) == (3 if kind == "several classes" else 1)
    assert row["iou_micro"] > (0.1 if kind == "large" else 0.3)


def test_pictures_model_and_log_are_left(folders, tmp_path, capsys):
    c, lines = config(folders("one class"), steps=25, evaluations=2, out=str(tmp_path)), []
    row = run(c, log=lines.append)
    folder = run_folder(resolve(c))
    left = {"config.json", "row.json", "curve.csv", "curve.png", "predictions.png", "counts.csv", "regions.npz"}
    assert {p.name for p in folder.iterdir()} == left | {"model.safetensors"}
    assert [line["step"] for line in lines] == [12, 25] and lines[1]["iou_macro"] == row["iou_macro"]
    said = capsys.readouterr()
    assert "dli on screws" in said.out and "25 steps of 8 images to go" in said.out and "minute" in said.out
    train, val = run_samples(c)
    counts, regions = predict_samples(load_model(c, train), val, find_dataset(c.dataset, train=train),
                                      torch_dtype(resolve(c)))
    assert counts.filter(like="tp_").equals(pd.read_csv(folder / "counts.csv").filter(like="tp_"))
    assert (regions == np.load(folder / "regions.npz")["regions"]).all()
    notes = read_notes(folder / "model.safetensors")
    assert (notes.mean, notes.deviation) == grey_levels(train.images) and notes.size == (48, 64)
    assert set(notes.train_parts) == set(train.table["tile"]) and not set(notes.train_parts) & set(notes.val_parts)
    again = []
    assert run(c, progress=False, log=again.append) == row and not again


def test_the_key_holds_the_photographs_and_not_where_they_are(folders, tmp_path, monkeypatch):
    here = folders("one class")
    there = Path(shutil.copytree(here, tmp_path / "elsewhere" / "screws"))
    monkeypatch.chdir(there)
    spellings = [here, here / "parts.yaml", there, "parts.yaml", Path("parts.yaml"), "../screws"]
    done = [resolve(config(place)) for place in spellings]
    assert len({run_key(c) for c in done}) == 1 and len({run_folder(c).name for c in done}) == 1
    assert all(Path(c.dataset).is_absolute() for c in done) and done[3].dataset == str((there / "parts.yaml").resolve())
    moved = replace(done[0], dataset="/no/such/place/parts.yaml")
    assert run_key(moved) == run_key(done[0]), "a row is read where its photographs are not"
    mask = there / "masks" / "p1_0.png"
    cv2.imwrite(str(mask), 1 - cv2.imread(str(mask), cv2.IMREAD_UNCHANGED))
    assert run_key(config(there)) != run_key(config(here))
    for look in (resolve, run_samples):
        with pytest.raises(ValueError, match="made for another data"):
            look(done[2])


def test_a_run_continues_where_its_photographs_have_moved(folders, tmp_path, monkeypatch):
    here, there = (tmp_path / place / "screws" for place in ("here", "there"))
    shutil.copytree(folders("one class"), here)
    with pytest.MonkeyPatch.context() as m:
        patch(m, "advance", lambda state, *batch: (_ for _ in ()).throw(KeyboardInterrupt) if state.step == 2
              else advance(state, *batch))
        patch(m, "CHECKPOINT_SECONDS", 0)
        with pytest.raises(KeyboardInterrupt):
            run(config(here, steps=4, out=str(tmp_path / "runs")), progress=False)
    shutil.move(here, there)
    steps = []
    patch(monkeypatch, "advance", lambda state, *batch: (steps.append(state.step), advance(state, *batch)))
    run(config(there, steps=4, out=str(tmp_path / "runs")), progress=False)
    assert steps == [2, 3]


@pytest.mark.parametrize("given, size, windows", [
    (dict(), (48, 64), False),
    (dict(image_size=32), 32, False),
    (dict(image_size=[24, 40]), (24, 40), False),
    (dict(image_size=(32, 32)), 32, True),
])
def test_a_run_may_ask_for_another_size(given, size, windows, folders):
    c = resolve(config(folders("no clean photograph" if windows else "one class"), **given))
    assert c.image_size == size and resolve(c) == c and resolve(RunConfig(**json.loads(json.dumps(asdict(c))))) == c
    train, _ = run_samples(c)
    assert train.images.shape[1:] == ((size, size) if isinstance(size, int) else size)
    assert len(train) > 32 * windows
    images, masks = next(batches(c, train, run_injection(c, train), torch.device("cpu")))
    assert images.shape[2:] == masks.shape[1:] == train.images.shape[1:]


@pytest.mark.parametrize("given, message", [
    (dict(image_size=20), "multiple of 8"),
    (dict(image_size=[32, 64, 32]), "one number, or height and width"),
    (dict(fill=0.0), "fill=0.0"),
    (dict(fill=1), "fill=1"),
    (dict(fill="some"), "choose one of None, uniform, all"),
    (dict(margin="image"), "choose one of None, defect"),
    (dict(min_contrast=2), "from 0 to 1"),
    (dict(components=1), "True or False"),
    (dict(method="baseline", components=True), "injects nothing"),
    (dict(method="baseline", fill=0.5), "injects nothing"),
    (dict(method="dli-all", fill=0.5), "means fill='all'"),
])
def test_wrong_fields_are_refused(given, message, folders):
    with pytest.raises(ValueError, match=message):
        config(folders("one class"), **given)


def test_the_study_keeps_square_images():
    with pytest.raises(ValueError, match="height and width are for a data file"):
        RunConfig(dataset="synthetic", image_size=(32, 64))


def test_a_data_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no .*parts.yaml"):
        resolve(config(tmp_path / "parts.yaml"))


def test_photographs_of_several_sizes_need_a_size(tmp_path):
    masks = [np.zeros((40, 48 + 8 * (i % 2)), np.uint8) for i in range(4)]
    folder = write(tmp_path / "own", masks, "classes: [pit]\n", [f"p{i}_0" for i in range(4)])
    with pytest.raises(ValueError, match=r"photographs of one size, in multiples of 8, got 40 x 48, 40 x 56: say size"):
        resolve(config(folder))


def test_a_split_that_is_given_is_followed(folders, tmp_path):
    folder = Path(shutil.copytree(folders("one class"), tmp_path / "own"))
    sides = ["val", "test", "train", "train", "train"] * 4
    rows = [f"p{i}_{k},p{i},{side}" for i, side in enumerate(sides) for k in (0, 1)]
    (folder / "parts.csv").write_text("\n".join(["name,part,split", *rows]))
    c = resolve(config(folder))
    assert c.split == "given" and run_key(c) != run_key(config(folder, split="tile"))
    train, val = run_samples(c)
    assert set(val.table["tile"]) == {f"p{i}" for i in (0, 5, 10, 15)} and len(train) == 24
    dealt = [set(part.table["tile"]) for part in run_samples(config(folder, split="tile"))]
    assert not any({f"p{i}" for i in (1, 6, 11, 16)} & part for part in dealt), "a test part takes no part"


def test_fewer_parts_make_fewer_folds(tmp_path):
    masks = [np.zeros((48, 64), np.uint8) for _ in range(12)]
    for mask in masks[:3]:
        draw(mask, np.random.default_rng(0), 1, 8)
    folder = write(tmp_path / "own", masks, "classes: [pit]\npart: '^(p\\d+)_'\n", [f"p{i}_0" for i in range(12)])
    with pytest.warns(UserWarning, match="'pit' is seen on 3 parts"):
        parts = [run_samples(config(folder, fold=k))[1] for k in range(3)]
    assert sum(map(len, parts)) == 12 and all((~part.clean).any() for part in parts)
    with pytest.raises(ValueError, match=r"fold=3: these photographs allow 3 folds, 0\.\.2"):
        run_samples(config(folder, fold=3))


@pytest.mark.parametrize("kind", ["one class", "no clean photograph"])
def test_the_range_of_deep_photographs_is_that_of_the_training_part(tmp_path, kind):
    folder = make(tmp_path / "own", kind, deep=True)
    _, val = run_samples(config(folder))
    of = lambda table: [folder / "images" / f"{WINDOW.sub('', name)}.png" for name in table["name"]]
    bright = of(val.table)[0]
    image = cv2.imread(str(bright), cv2.IMREAD_UNCHANGED)
    image[0, 0] = 65535
    cv2.imwrite(str(bright), image)
    c = config(folder, steps=1, out=str(tmp_path / "runs"))
    train, val = run_samples(c)
    read = [cv2.imread(str(path), cv2.IMREAD_UNCHANGED) for path in of(train.table)]
    assert train.levels == val.levels == (np.min(read), np.max(read)) and train.images.max() == 255
    assert val.images[0][0, 0] == 255
    row = run(c, progress=False)
    assert read_notes(run_folder(resolve(c)) / "model.safetensors").levels == train.levels
    cut = kind == "no clean photograph"
    text = run_report(run_folder(resolve(c)))
    assert f"scored on {row['val_images']} {'windows' if cut else 'images'} of" in text
    assert f"share of clean {'windows' if cut else 'images'} with an alarm" in text


def test_other_samples_than_the_configs_do_not_train(folders):
    c = config(folders("one class"), steps=1)
    others = run_samples(config(folders("several classes")))
    arrays = Samples.from_arrays(others[0].images, others[0].masks, others[0].classes, parts=others[0].table["tile"])
    for train, val in (others, split_samples(arrays)):
        for wrong in (c, RunConfig(preset="smoke", dataset="synthetic", weights=None)):
            with pytest.raises(ValueError, match="the training samples are of .*: take them from run_samples"):
                fit(wrong, train, val, progress=False)
    train, val = run_samples(c)
    with pytest.raises(ValueError, match="training images shows a defect: there is nothing to learn"):
        fit(c, train[train.clean], val, progress=False)


def test_a_row_never_bears_the_name_of_a_known_data_set():
    assert data_name("/there/synthetic/parts.yaml") == "synthetic-folder"
    assert data_name("/there/auto.yaml") == "auto-folder" and data_name("/there/screws.yaml") == "screws"


def test_workers_of_a_matrix_train_from_a_configs_json(folders, tmp_path):
    configs = [config(folders("one class"), steps=1, method=method, out=str(tmp_path))
               for method in ("dli", "baseline")]
    runs = run_matrix(configs, jobs=2, progress=False)
    assert runs["method"].tolist() == ["dli", "baseline"] and set(runs["dataset"]) == {"screws"}
    assert run(configs[0], progress=False)["key"] == runs["key"][0]


def test_the_notebook_trains_on_a_data_file(folders, tmp_path):
    folder = Path(shutil.copytree(folders("one class"), tmp_path / "screws"))
    given = dict(dataset="parts.yaml", method="dli", preset="smoke", steps=2, weights=None, out=tmp_path / "runs")
    flags = [word for name, value in given.items() for word in ("-p", name, str(value))]
    environment = os.environ | dict(PYTHONPATH=os.pathsep.join([str(ROOT), *filter(None, sys.path)]))
    done = subprocess.run([sys.executable, "-m", "papermill", str(ROOT / "nbs/experiments.ipynb"), "out.ipynb", *flags,
                           "-k", "python3"], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (left,) = (tmp_path / "runs").iterdir()
    assert json.loads((left / "row.json").read_text())["dataset"] == "screws"
    assert (left / "predictions.png").is_file() and (left / "curve.png").is_file()
    assert f"Trained on screws (folder " in (folder / "out.ipynb").read_text()


def test_names_of_windows_stand_beside_each_other_in_the_picture():
    samples = synthetic_tiles(n=60, size=32, seed=1)
    table = samples.table.assign(name=[f"01_200908071718_305000_090_crop_1_{i:03d}_064" for i in range(60)])
    samples = replace(samples, table=table)
    logits = torch.full((60, len(samples.classes), 32, 32), -9.0)
    counts = counts_table(table, count_batch(logits, torch.from_numpy(samples.masks)), samples.classes)
    figure = plot_predictions(samples, counts, np.zeros((60, len(samples.classes), 32, 4), np.uint8))
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles and all("_crop_1_" in title.replace("\n", "") for title in titles)
    assert max(len(line) for title in titles for line in title.split("\n")) <= 20
    plt.close(figure)


@pytest.mark.slow
def test_a_network_learns_ball_screws_in_windows(tmp_path):
    if not BALL_SCREWS.is_dir():
        pytest.skip("the ball screws are not here")
    for name in ("data", "label"):
        shutil.copytree(BALL_SCREWS / name, tmp_path / name, copy_function=shutil.copyfile)
    (tmp_path / "parts.yaml").write_text(
        "layout: labelme\nimages: data\nannotations: label\nclasses: [Pitting]\nclean: all\nscale: 0.25\n"
        "crop: 64\npart: '^(?:\\d+_\\d+_(\\d+_\\d+)|(KGT.+?))_crop'\n")
    assert check_folder(tmp_path).ok
    config = RunConfig(dataset=str(tmp_path), preset="smoke", steps=6, evaluations=1, out=str(tmp_path / "runs"))
    row = run(config, progress=False)
    assert row["fill"] == 0.5 and row["injected_Pitting"] > 0
    train, val = run_samples(resolve(config))
    assert len(set(train.table["tile"]) | set(val.table["tile"])) == 8
    assert not set(train.table["tile"]) & set(val.table["tile"])


def test_a_batch_of_colour_photographs_has_no_memory_format_of_its_own():
    "In channels_last the backward pass of mobileone_s1 ends the process on the CPU."
    images = np.zeros((2, 16, 24, 3), np.uint8)
    samples = Samples.from_arrays(images, np.zeros((2, 16, 24), np.uint8), ("red",), parts=["a", "b"])
    batch, _ = as_batch(samples, np.array([0, 1]))
    assert batch.shape == (2, 3, 16, 24) and batch.is_contiguous()
