"The notebooks of benchmarks run through papermill at their smallest setting, and refuse parameters they do not know."
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

FOLDER = Path(__file__).resolve().parent.parent / "nbs"
INJECTION = dict(dataset="synthetic", size=64, largest=128, per_class=2, rivals_per_class=1, batch=16, repeats=2)
TRAINING = dict(dataset="synthetic", size=64, train_batch=4, train_repeats=1, epoch_images=16, epoch_repeats=1,
                side_repeats=1, window=0.5, format_steps=5, format_seeds=2)
PARTS = dict(dataset="synthetic", size=64, photographs=8, side=96, large=256, repeats=2, steps=2, images=8)


def papermill(notebook, cwd, **parameters):
    flags = [str(word) for name, value in parameters.items() for word in ("-p", name, value)]
    done = [str(a) for a in (Path(sys.executable).parent / "papermill", FOLDER / f"{notebook}.ipynb", cwd / "out.ipynb",
                             *flags)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(done, cwd=cwd, env=environment, capture_output=True, text=True, timeout=900)


def measures(path):
    return pd.read_csv(path).set_index("measure")["measured here"]


def assert_lines(found, *starts):
    for start in starts:
        assert found.index.str.startswith(start).any(), f"no line for: {start}"
    assert found.notna().all()


@pytest.mark.slow
def test_every_measure_of_the_injection_has_its_line_and_its_files(tmp_path):
    done = papermill("benchmarks", tmp_path, **INJECTION, out="kept")
    assert done.returncode == 0, done.stderr
    assert_lines(measures(tmp_path / "kept/summary.csv"),
                 "largest error", "mean error", "times faster than seamlessClone, RGB", "the same, the worst class",
                 "times faster than seamlessClone, grey", "times faster than fpie", "times faster than pie-torch",
                 "a whole call on a batch of 16, 12 injections", "cost grows", "peak extra memory")
    figures = {"error", "opencv", "rivals", "whole_call", "size", "memory", "parts"}
    names = {*figures, "opencv_fates", "opencv_milliseconds", "summary"}
    assert names <= {p.stem for p in (tmp_path / "kept").glob("*.csv")}
    assert figures <= {p.stem for p in (tmp_path / "kept").glob("*.png")}
    assert "synthetic, 64x64, 2 injections of each class, medians of 2" in (tmp_path / "kept/machine.txt").read_text()


@pytest.mark.slow
def test_every_measure_of_training_has_its_line_and_its_files(tmp_path):
    done = papermill("benchmarks_training", tmp_path, **TRAINING, out="kept")
    assert done.returncode == 0, done.stderr
    assert_lines(measures(tmp_path / "kept/training_summary.csv"),
                 "a step, resnet18", "an epoch, mobileone_s1", "two processes, quick preset, efficientnet_lite0")
    tables = ("step", "gain", "epoch", "side_by_side", "limit", "memory", "tried", "formats", "summary")
    assert {f"training_{name}" for name in tables} <= {p.stem for p in (tmp_path / "kept").glob("*.csv")}
    assert "synthetic, 64x64, medians of 1 steps" in (tmp_path / "kept/training_machine.txt").read_text()


@pytest.mark.slow
def test_every_measure_of_the_parts_has_its_line_and_its_files(tmp_path):
    done = papermill("benchmarks_parts", tmp_path, **PARTS, out="kept")
    assert done.returncode == 0, done.stderr
    assert_lines(measures(tmp_path / "kept/parts_summary.csv"),
                 "reading", "checking", "prediction on a folder", "memory of", "ONNX Runtime", "latency")
    tables = ("reading", "prediction", "memory", "onnx", "formats", "latency", "summary")
    assert {f"parts_{name}" for name in tables} <= {p.stem for p in (tmp_path / "kept").glob("*.csv")}


@pytest.mark.slow
def test_packages_that_are_absent_are_named(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['fpie'] = sys.modules['pietorch'] = None\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(FOLDER.parent)]))
    done = papermill("benchmarks", tmp_path, **INJECTION | dict(repeats=1, batch=8), out="kept")
    assert done.returncode == 0, done.stderr
    found = measures(tmp_path / "kept/summary.csv")
    assert (found[found.index.str.contains("fpie|pie-torch")] == "not installed").sum() == 3
    assert "pip install fpie taichi" in (tmp_path / "out.ipynb").read_text()


@pytest.mark.parametrize("notebook, first", [("benchmarks", "dataset, size, per_class"),
                                             ("benchmarks_training", "dataset, size, train_batch"),
                                             ("benchmarks_parts", "dataset, size, photographs")])
def test_unknown_parameter_is_refused(notebook, first, tmp_path):
    done = papermill(notebook, tmp_path, repeat=3)
    assert done.returncode != 0 and f"unknown parameter repeat: the parameters are {first}" in done.stderr
