"""The distribution: wheel and sdist are built, installed without any extra, and tried; what is missing is named."""
import os
import shutil
import subprocess
import sys
import tarfile
import venv
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from dli._extras import DISTRIBUTION, extra

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("settings.ini", "setup.py", "pyproject.toml", "MANIFEST.in", "constraints.txt", "README.md", "LICENSE",
           "CHANGELOG.md", "CITATION.cff", "dli", "tests")
TABLES = {"data/magnetic_tiles.csv", "data/magnetic_tiles_audit.csv", "data/magnetic_tiles_folds.csv",
          "study/printed_values.csv"}


def test_a_missing_extra_is_one_sentence():
    with pytest.raises(ModuleNotFoundError) as caught:
        with extra("train"):
            import package_that_nobody_wrote.layers  # noqa: F401
    assert str(caught.value) == ("package_that_nobody_wrote is not installed; it comes with: "
                                 "pip install 'dynamic-label-injection[train]'")
    with pytest.raises(ModuleNotFoundError, match="No module named 'dli.nothing'"):
        with extra("train"):
            import dli.nothing  # noqa: F401
    with pytest.raises(ImportError, match="cannot import name"), extra("train"):
        from torch import nothing  # noqa: F401


def command(*words, **options) -> str:
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(w) for w in words], env=plain, capture_output=True, text=True, timeout=600, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def required(lines: list[str], found: dict[str, metadata.Distribution]) -> dict[str, metadata.Distribution]:
    "The distributions that some requirements and their own ask for here, without any extra."
    for requirement in map(Requirement, lines):
        if requirement.name not in found and (not requirement.marker or requirement.marker.evaluate({"extra": ""})):
            found[requirement.name] = metadata.distribution(requirement.name)
            required(found[requirement.name].requires or [], found)
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    "A folder with the sdist, and the wheel that was built from it."
    there = tmp_path_factory.mktemp("built")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, there / name)
    command(sys.executable, "-m", "build", "--no-isolation", there, cwd=there)
    return there / "dist"


@pytest.fixture(scope="module")
def python(built, tmp_path_factory) -> Path:
    """The interpreter of an empty environment in which the wheel is installed.

    Of everything else only what the wheel requires is there, and what that requires: linked from this environment,
    because installing PyTorch once more takes minutes and gigabytes."""
    there = tmp_path_factory.mktemp("environment")
    venv.create(there, with_pip=False)
    python = there / "bin" / "python"
    (site,) = (there / "lib").glob("python*/site-packages")
    (wheel,) = built.glob("*.whl")
    command(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    (own,) = metadata.distributions(name=DISTRIBUTION, path=[str(site)])
    for distribution in required(own.requires, {}).values():
        for top in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(distribution.locate_file(top))
    return python


TRIED = """
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

import dli
from dli import (DonorPool, DynamicLabelInjection, cut_paste, poisson_blend, read_folds, score, split_samples,
                 synthetic_tiles)

assert sys.prefix in dli.__file__, dli.__file__
assert not any(map(find_spec, ("segmentation_models_pytorch", "timm", "torchvision", "papermill", "pytest", "ray")))
train, val = split_samples(synthetic_tiles(n=60, size=32))
inject = DynamicLabelInjection(DonorPool(train), fill="all")
images, masks = torch.from_numpy(train.images)[:, None], torch.from_numpy(train.masks)
after, labels = inject(images, masks)
assert (labels > 0).flatten(1).any(1).all() and after.shape == images.shape
region = torch.zeros(1, 32, 32, dtype=torch.bool)
region[:, 10:20, 10:20] = True
for blend in (cut_paste, poisson_blend):
    assert not torch.equal(blend(images[:1], images[1:2], region), images[:1])
assert len(read_folds()) == 1344
print(*[str(p.relative_to(Path(dli.__file__).parent)) for p in Path(dli.__file__).parent.rglob("*.csv")])
"""


@pytest.mark.slow
def test_wheel_and_sdist_hold_the_package(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "CHANGELOG.md", "settings.ini", *(f"dli/{table}" for table in TABLES)} <= names
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "dli").rglob("*.py")}
    assert modules <= names and not any(name.startswith("tests/") for name in names)


@pytest.mark.slow
def test_the_core_works_without_any_extra(python, tmp_path):
    assert set(command(python, "-I", "-c", TRIED, cwd=tmp_path).split()) == TABLES


@pytest.mark.slow
def test_commands_are_installed_and_what_is_missing_is_named(python, tmp_path):
    assert "--fold" in command(python.parent / "dli", "score", "--help", cwd=tmp_path)
    code = "import dli; dli.lightweight_unet(weights=None)"
    done = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    last = done.stderr.splitlines()[-1]
    assert last.endswith("is not installed; it comes with: pip install 'dynamic-label-injection[train]'"), done.stderr
