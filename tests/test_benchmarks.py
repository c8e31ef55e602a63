"The benchmarks notebook runs through papermill at its smallest setting, and refuses parameters it does not know."
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

NOTEBOOK = Path(__file__).resolve().parent.parent / "nbs/benchmarks.ipynb"
SMALL = dict(dataset="synthetic", size=64, largest=128, per_class=2, rivals_per_class=1, batch=16, repeats=2,
             train_batch=4, train_repeats=1, epoch_images=16, epoch_repeats=1, side_repeats=1, window=0.5,
             format_steps=5, format_seeds=2)


def papermill(cwd, **parameters):
    flags = [str(word) for name, value in parameters.items() for word in ("-p", name, value)]
    done = [str(a) for a in (Path(sys.executable).parent / "papermill", NOTEBOOK, cwd / "out.ipynb", *flags)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(done, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)


def measures(folder):
    return pd.read_csv(folder / "summary.csv").set_index("measure")["measured here"]


@pytest.mark.slow
def test_every_measure_has_its_line_and_its_files(tmp_path):
    done = papermill(tmp_path, **SMALL, out="kept")
    assert done.returncode == 0, done.stderr
    found = measures(tmp_path / "kept")
    for start in ("largest error", "mean error", "times faster than seamlessClone, RGB", "the same, the worst class",
                  "times faster than seamlessClone, grey", "times faster than fpie", "times faster than pie-torch",
                  "a whole call on a batch of 16, 12 injections", "cost grows", "peak extra memory", "a step, resnet18",
                  "an epoch, mobileone_s1", "two processes, quick preset, efficientnet_lite0"):
        assert found.index.str.startswith(start).any(), f"no line for: {start}"
    assert found.notna().all()
    figures = {"error", "opencv", "rivals", "whole_call", "size", "memory", "parts"}
    training = ("step", "gain", "epoch", "side_by_side", "limit", "memory", "tried", "formats")
    names = {*figures, "opencv_fates", "opencv_milliseconds", "summary", *(f"training_{name}" for name in training)}
    assert names <= {p.stem for p in (tmp_path / "kept").glob("*.csv")}
    assert figures <= {p.stem for p in (tmp_path / "kept").glob("*.png")}
    assert "synthetic, 64x64, 2 injections of each class, medians of 2" in (tmp_path / "kept/machine.txt").read_text()


@pytest.mark.slow
def test_packages_that_are_absent_are_named(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['fpie'] = sys.modules['pietorch'] = None\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(NOTEBOOK.parent.parent)]))
    done = papermill(tmp_path, **SMALL | dict(repeats=1, batch=8), out="kept")
    assert done.returncode == 0, done.stderr
    found = measures(tmp_path / "kept")
    assert (found[found.index.str.contains("fpie|pie-torch")] == "not installed").sum() == 3
    assert "pip install fpie taichi" in (tmp_path / "out.ipynb").read_text()


def test_unknown_parameter_is_refused(tmp_path):
    done = papermill(tmp_path, repeat=3)
    assert done.returncode != 0 and "unknown parameter repeat: the parameters are dataset, size" in done.stderr
