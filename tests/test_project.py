"""The repository as a whole: exports, README, notebooks and versions are fresh; papermill runs the experiment."""
import filecmp
import json
import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

import dli

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def command(*args, cwd, **env):
    words = [str(a) for a in args]
    return subprocess.run(words, cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=600)


def differing(left: Path, right: Path, pattern: str) -> list[str]:
    names = {str(p.relative_to(side)) for side in (left, right) for p in side.rglob(pattern)}
    both = {n for n in names if (left / n).is_file() and (right / n).is_file()}
    return sorted(names - {n for n in both if filecmp.cmp(left / n, right / n, shallow=False)})


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "A copy of the project's sources, exported and cleaned anew."
    there = tmp_path_factory.mktemp("project")
    for name in ("settings.ini", "setup.py", "pyproject.toml", "README.md", "nbs", "dli"):
        source = ROOT / name
        shutil.copytree(source, there / name) if source.is_dir() else shutil.copy(source, there / name)
    command("git", "init", "-q", cwd=there)
    for tool in ("nbdev_export", "nbdev_clean"):
        done = command(BIN / tool, cwd=there)
        assert done.returncode == 0, done.stderr
    return there


def test_exports_are_fresh(copy):
    assert differing(ROOT / "dli", copy / "dli", "*.py") == [], "run `make prepare` and commit dli/"


def test_notebooks_are_clean(copy):
    assert differing(ROOT / "nbs", copy / "nbs", "*.ipynb") == [], "run `make prepare` and commit nbs/"


def test_readme_is_fresh(tmp_path):
    done = command("make", "readme", f"BIN={BIN}", f"README={tmp_path / 'README.md'}", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    rendered = (tmp_path / "README.md").read_text()
    assert rendered == (ROOT / "README.md").read_text(), "run `make readme` and commit README.md"


def test_one_version_everywhere():
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    version = parser["DEFAULT"]["version"]
    assert dli.__version__ == version
    assert f"\n## {version}\n" in (ROOT / "CHANGELOG.md").read_text()
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()


def test_parameters_tag_survives_cleaning(copy):
    cells = json.loads((copy / "nbs/experiments.ipynb").read_text())["cells"]
    assert sum("parameters" in c["metadata"].get("tags", []) for c in cells) == 1


@pytest.mark.parametrize("path", sorted((ROOT / "nbs").glob("*.ipynb")), ids=lambda p: p.stem)
def test_the_title_cell_holds_title_and_description_only(path):
    "nbdev makes front matter of that cell: anything else in it would be missing from the site."
    cells = json.loads(path.read_text())["cells"]
    title = "".join(next(c for c in cells if c["cell_type"] == "markdown")["source"])
    assert re.fullmatch(r"# .+\n\n> .+", title.strip())


def papermill(cwd, *parameters):
    flags = [word for name, value in parameters for word in ("-p", name, value)]
    flags += ["-p", "preset", "smoke", "-p", "dataset", "synthetic"]
    return command(BIN / "papermill", ROOT / "nbs/experiments.ipynb", cwd / "out.ipynb", *flags, cwd=cwd)


def test_papermill_leaves_row_curve_and_pictures(tmp_path):
    done = papermill(tmp_path, ("method", "dli"), ("weights", "None"))
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    left = {"config.json", "row.json", "curve.csv", "curve.png", "predictions.png", "counts.csv", "regions.npz"}
    assert {p.name for p in folder.iterdir()} == left | {"model.safetensors"}
    row = json.loads((folder / "row.json").read_text())
    assert row["method"] == "dli" and row["source"] == "synthetic" and row["weights"] is None and row["steps"] == 6
    assert "SYNTHETIC" in (tmp_path / "out.ipynb").read_text()


@pytest.mark.parametrize("name,value,expected", [
    ("methd", "dli", "unknown parameter methd: the parameters are method, encoder"),
    ("method", "dly", "method='dly' is not known: choose one of baseline"),
    ("encoder", "vgg", "encoder='vgg' is not known: choose one of resnet18"),
])
def test_papermill_refuses_what_it_does_not_know(tmp_path, name, value, expected):
    done = papermill(tmp_path, (name, value))
    assert done.returncode != 0 and expected in done.stderr
    assert not (tmp_path / "runs").exists()
