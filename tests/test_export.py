"The exported network gives what PyTorch gives, on any size, and a file that is not right is never written."
import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

from dli.data import find_magnetic_tiles, split_samples, synthetic_tiles
from dli.deploy import export, export_onnx, load
from dli.deploy.stitching import drop_small
from dli.experiment import load_dataset
from dli.network import ENCODERS, ModelNotes, build_model, lightweight_unet, save_model, save_weights

NOTEBOOK = Path(__file__).resolve().parent.parent / "nbs/74_export.ipynb"
THRESHOLDS = {"B": (0.3, 1), "C": (0.7, 25)}


def write_model(folder, encoder="resnet18", weights=None, channels=1, decoder=(16, 8), **more):
    "A model file whose network, though not trained, finds every class somewhere."
    folder.mkdir(exist_ok=True)
    torch.manual_seed(3)
    model = lightweight_unet(encoder, classes=3, weights=weights, channels=channels, decoder_channels=decoder)
    for _ in range(20):  # batch statistics of their own, as after training
        model(torch.randn(8, channels, 64, 64))
    last = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)][-1]
    last.weight.data *= 3
    notes = ModelNotes(("A", "B", "C"), encoder, decoder, channels, mean=0.4, deviation=0.2, thresholds=THRESHOLDS,
                       **more)
    save_model(model, folder / "model.safetensors", notes)
    return folder


def outputs(path, images):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(["probabilities", "mask"], {"images": images})


def validation_set(size):
    samples = load_dataset("auto", size=size)
    return split_samples(samples, fold=0)[1] if find_magnetic_tiles() else samples


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    "A model's folder; its ONNX file lies in it."
    folder = write_model(tmp_path_factory.mktemp("run"), channels=3, size=(48, 72))
    grey = synthetic_tiles(size=64, seed=0)[:6]
    colour = type(grey)(np.repeat(grey.images[..., None], 3, 3), grey.masks, grey.table, grey.classes, grey.source)
    return folder, export_onnx(folder, folder / "model.onnx", colour)


# ---- parity ----------------------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("encoder, weights", [*((e, None) for e in ENCODERS), ("efficientnet_lite0", "imagenet")])
def test_every_encoder_agrees_with_pytorch_over_a_validation_set(encoder, weights, tmp_path):
    samples = validation_set(64)
    report = export_onnx(write_model(tmp_path / "run", encoder, weights), tmp_path / "model.onnx", samples)
    print(encoder, weights, report)
    assert report.real and report.images == len(samples)
    assert report.difference < 2e-5
    assert report.flipped <= 1e-5 * report.pixels
    _, masks = outputs(tmp_path / "model.onnx", samples.images[:32, None])
    assert len(np.unique(masks)) > 1, "a mask that shows nothing can't show a difference"


@pytest.mark.parametrize("shape", [(1, 48, 72), (3, 64, 40), (1, 61, 83), (2, 9, 130), (1, 8, 8), (1, 1, 3)])
def test_any_number_height_and_width(exported, shape):
    "Sides that are no multiples of 8 are filled up with the edge, which is cut off again."
    n, height, width = shape
    images = np.random.default_rng(0).integers(0, 256, (n, 3, height, width), np.uint8)
    filled = np.pad(images, ((0, 0), (0, 0), (0, -height % 8), (0, -width % 8)), "edge")
    with torch.no_grad():
        logits = build_model(exported[0] / "model.safetensors", "cpu")((torch.from_numpy(filled) / 255 - 0.4) / 0.2)
    probabilities, masks = outputs(exported[0] / "model.onnx", images)
    assert probabilities.dtype == np.float32 and masks.dtype == np.uint8
    assert masks.shape == shape and probabilities.shape == (n, 3, height, width)
    np.testing.assert_allclose(probabilities, logits.sigmoid().numpy()[:, :, :height, :width], atol=2e-5)


def test_each_class_has_its_own_threshold(exported):
    images = np.random.default_rng(1).integers(0, 256, (4, 3, 64, 64), np.uint8)
    probabilities, masks = outputs(exported[0] / "model.onnx", images)
    reached = probabilities >= np.float32([0.5, 0.3, 0.7])[:, None, None]
    best = np.where(reached, probabilities, -1).argmax(1) + 1
    assert np.array_equal(masks, np.where(reached.any(1), best, 0))
    same_for_all = np.where((probabilities >= 0.5).any(1), probabilities.argmax(1) + 1, 0)
    assert (masks != same_for_all).any(), "the thresholds of the notes make no difference here"


def test_the_usage_in_words_gives_the_masks_of_prediction(exported):
    folder, report = exported
    predictor, rng = load(folder, "cpu"), np.random.default_rng(2)
    predictor = predictor.with_thresholds(dict(A=(0.5, 40), B=(0.5, 5), C=(0.6, 90)))
    dropped = 0
    for _ in range(6):
        photograph = cv2.GaussianBlur(rng.integers(0, 256, (100, 150, 3)).astype(np.uint8), (0, 0), 2)
        small = cv2.resize(photograph, (72, 48), interpolation=cv2.INTER_AREA)
        probabilities = outputs(report.path, small[None].transpose(0, 3, 1, 2))[0][0]
        whole = [cv2.resize(p, (150, 100), interpolation=cv2.INTER_LINEAR) for p in probabilities]
        limits = [predictor.notes.threshold(name) for name in "ABC"]
        regions = np.stack([drop_small(p >= limit, area) for p, (limit, area) in zip(whole, limits)])
        mask = np.where(regions.any(0), np.where(regions, whole, -1).argmax(0) + 1, 0)
        assert (mask != predictor(photograph).masks[0]).sum() <= 3  # at a threshold the last digit decides
        dropped += sum(int((p >= limit).sum()) for p, (limit, _) in zip(whole, limits)) - int(regions.sum())
    assert dropped > 50, "no region is small here"


# ---- what is in the file ---------------------------------------------------------------------------------------------

def test_the_file_says_what_it_is_and_nothing_of_this_machine(exported):
    folder, report = exported
    assert report.images == 6 and report.pixels == 6 * 64 * 64 + 61 * 59 and report.real
    assert "6 real images" in str(report) and f"of {report.pixels} pixels" in str(report)
    held = onnxruntime.InferenceSession(report.path).get_modelmeta().custom_metadata_map
    notes = json.loads(held["dli"])
    assert notes["classes"] == ["A", "B", "C"] and notes["thresholds"]["C"] == [0.7, 25] and notes["size"] == [48, 72]
    assert "48 rows and 72 columns" in held["usage"] and "C from 0.7, 25 pixels" in held["usage"]
    content = report.path.read_bytes()
    assert b"site-packages" not in content and str(Path(export.__file__).parent).encode() not in content


def test_usage_says_what_the_notes_say():
    notes = ModelNotes(("A",), "resnet18", (16, 8), 1, 0.4, 0.2, scale=0.5, crop=(256, 128), levels=(16, 4095))
    words = export.usage(notes)
    for part in ("grey levels", "(level - 16) / (4095 - 16)", "factor 0.5", "256 rows and 128 columns", "no defect"):
        assert part in words
    assert "leave out the small ones" not in words


def test_the_program_of_the_notebook_runs_without_dli(exported):
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    program, = ["".join(c["source"]) for c in cells if "".join(c["source"]).startswith("PROGRAM = '''")]
    program = program.removeprefix("PROGRAM = '''").removesuffix("'''")
    Image.new("RGB", (100, 50), "gray").save(exported[0] / "part.png")
    alone = "import sys\nsys.modules['dli'] = sys.modules['torch'] = None\n" + program
    done = subprocess.run([sys.executable, "-I", "-c", alone], cwd=exported[0], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("{'A': ") and Image.open(exported[0] / "mask.png").size == (100, 50)


# ---- what is refused -------------------------------------------------------------------------------------------------

def test_wrong_files_and_samples_are_refused_before_the_export(exported, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "as_onnx", lambda *_: pytest.fail("exported before it was checked"))
    folder = exported[0]
    with pytest.raises(ValueError, match="expected the path of an .onnx file, got 'model.pt'"):
        export_onnx(folder, "model.pt")
    with pytest.raises(FileNotFoundError, match="no folder .*missing: make it first"):
        export_onnx(folder, tmp_path / "missing/model.onnx")
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        export_onnx(tmp_path / "nothing", tmp_path / "model.onnx")
    model = lightweight_unet("resnet18", classes=1, weights=None, channels=1, decoder_channels=(16, 8))
    save_weights(model, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="weights without notes"):
        export_onnx(tmp_path / "weights.safetensors", tmp_path / "model.onnx")
    grey = synthetic_tiles(size=64, seed=0)
    with pytest.raises(ValueError, match="samples: the model takes images of 3 channels, got 1"):
        export_onnx(folder, tmp_path / "model.onnx", grey)
    with pytest.raises(ValueError, match="expected at least one image, got none"):
        export_onnx(folder, tmp_path / "model.onnx", grey[:0])
    write_model(tmp_path / "one")
    write_model(tmp_path / "two")
    with pytest.raises(ValueError, match="expected one model, got 2: choose one of one, two"):
        export_onnx(tmp_path, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize("change", [lambda p, m: (p + 0.01, m), lambda p, m: (p * np.nan, m),
                                    lambda p, m: (p, m * 0 + 1)], ids=["other", "nan", "mask"])
def test_a_network_that_differs_is_not_written(exported, change, tmp_path, monkeypatch):
    folder, target = exported[0], tmp_path / "model.onnx"
    target.write_bytes(b"the one before")
    own = export.runner
    monkeypatch.setattr(export, "as_onnx", lambda *_: onnx.load(folder / "model.onnx"))
    monkeypatch.setattr(export, "runner", lambda content: lambda images: change(*own(content)(images)))
    with pytest.raises(RuntimeError, match="the exported network"):
        export_onnx(folder, target)
    assert target.read_bytes() == b"the one before" and list(tmp_path.iterdir()) == [target]


def test_a_missing_package_is_named(exported, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ModuleNotFoundError, match=r"onnxscript is not installed; .* pip install '.*\[onnx\]'"):
        export_onnx(exported[0], tmp_path / "model.onnx")
