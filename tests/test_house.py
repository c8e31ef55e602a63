"""The house: what doors hand out, which room may import which, how a notebook is written, what a light import loads."""
import ast
import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import FunctionType
from typing import get_type_hints

import pytest

import dli

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "dli"
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
WINGS = ("data", "method", "network", "scoring", "experiment", "study", "deploy")
LEVELS = dict(_door=0, _extras=0, files=0, pictures=0, pages=0, measuring=0, data=1, method=2, network=2, scoring=2,
              experiment=3, study=4, deploy=4, cli=5)
OLD = ("blending", "injection", "losses", "models", "metrics", "benchmark", "training", "figures", "tiles")
ROOMS = sorted(path for path in PACKAGE.rglob("*.py") if not path.name.startswith("_"))


def dotted(path: Path) -> str:
    "dli/data/samples.py -> data.samples"
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def number(path: Path) -> int:
    "The number of the notebook that a room is exported from."
    return int(re.search(r"nbs/(\d\d)_\w+\.ipynb", path.read_text()).group(1))


def public_names(path: Path) -> list[str]:
    "A room's `__all__`, read without importing it."
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "__all__":
            return ast.literal_eval(node.value)
    raise AssertionError(f"{path}: no __all__")


def imported_rooms(path: Path) -> set[str]:
    "The modules of dli that a room imports, at its top or inside a function."
    own, found = ["dli", *path.relative_to(PACKAGE).with_suffix("").parts], set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            start = own[:-node.level] if node.level else []
            module = [*start, *(node.module or "").split(".")] if node.module else start
            names = [[*module, alias.name] for alias in node.names] if len(module) == 1 else [module]
            found |= {".".join(name[1:]) for name in names if name[0] == "dli"}
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("dli.") for alias in node.names if alias.name.startswith("dli.")}
    return found - {"__version__"}


# ---- doors -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("wing", WINGS)
def test_a_door_lists_what_its_rooms_make_public(wing):
    behind = {name for path in ROOMS if dotted(path).startswith(f"{wing}.") for name in public_names(path)}
    listed = import_module(f"dli.{wing}").__all__
    assert len(listed) == len(set(listed))
    assert sorted(set(listed) - behind) == [], "in the door, and public in no room"
    assert sorted(behind - set(listed)) == [], "public in a room, missing in the door: list it, or use `#| exporti`"


@pytest.mark.parametrize("package", ["dli", *(f"dli.{wing}" for wing in WINGS)])
def test_every_name_of_a_door_is_found(package):
    door = import_module(package)
    assert set(door.__all__) <= set(dir(door))
    for name in door.__all__:
        assert getattr(door, name) is not None
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'dynamic'"):
        door.dynamic


@pytest.mark.parametrize("wing", WINGS)
def test_annotations_of_public_names_resolve(wing):
    "The site's pages ask for them; a package that is imported in a function only can't be named in an annotation."
    door = import_module(f"dli.{wing}")
    for name in door.__all__:
        thing = getattr(door, name)
        if isinstance(thing, (type, FunctionType)):
            assert set(get_type_hints(thing)) >= set(vars(thing).get("__annotations__", thing.__annotations__)), name


def test_no_name_is_behind_two_doors_or_is_that_of_a_wing():
    names = [name for wing in WINGS for name in import_module(f"dli.{wing}").__all__]
    assert sorted({name for name in names if names.count(name) > 1}) == []
    assert not {*WINGS, "files", "pictures", "pages", "measuring"} & set(names)
    assert set(dli.__all__) <= set(names), "the top level hands out what the wings' doors do"
    assert len(names) <= 165, "a public name is one that a user needs"


def test_no_public_name_is_that_of_a_room():
    "Once the room is imported, `from dli.wing import name` would find the module in the place of what it should find."
    for wing in WINGS:
        rooms = {dotted(path).removeprefix(f"{wing}.") for path in ROOMS if dotted(path).startswith(f"{wing}.")}
        assert sorted(rooms & set(import_module(f"dli.{wing}").__all__)) == [], wing


@pytest.mark.parametrize("name", OLD)
def test_old_module_paths_are_gone(name):
    with pytest.raises(ModuleNotFoundError):
        import_module(f"dli.{name}")


# ---- who imports whom ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("path", ROOMS, ids=dotted)
def test_no_arrow_runs_back(path):
    "Wings import those before them in the chain, rooms those before them in their wing."
    wing = dotted(path).partition(".")[0]
    for room in imported_rooms(path):
        other = room.partition(".")[0]
        assert LEVELS[other] < LEVELS[wing] or other == wing, f"imports {room}"
        source = PACKAGE / f"{room.replace('.', '/')}.py"
        if source.is_file() and not source.name.startswith("_"):
            assert number(source) < number(path), f"imports {room}, which is read later"


# ---- how a notebook is written ---------------------------------------------------------------------------------------

def code_cells(path: Path) -> list[tuple[int, str]]:
    "Place and text of the cells of a notebook that hold code."
    cells = json.loads(path.read_text())["cells"]
    return [(i, "".join(c["source"])) for i, c in enumerate(cells) if c["cell_type"] == "code"]


def syntax(source: str) -> list[ast.stmt]:
    "The statements of a cell; none where it speaks to IPython."
    try:
        return ast.parse(source).body
    except SyntaxError:
        return []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_lines_are_short_and_hold_one_statement(path):
    for place, source in code_cells(path):
        long = [line for line in source.splitlines() if len(line) > 120]
        assert long == [], f"cell {place}"
        starts = [node.lineno for top in syntax(source) for node in ast.walk(top) if isinstance(node, ast.stmt)]
        crowded = [source.splitlines()[n - 1] for n in {n for n in starts if starts.count(n) > 1}]
        assert crowded == [], f"cell {place}"


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.name[:2].isdigit()], ids=lambda p: p.stem)
def test_a_room_is_no_larger_than_a_reader_can_take_in(path):
    cells = json.loads(path.read_text())["cells"]
    assert len(cells) <= 72
    for place, source in code_cells(path):
        statements = syntax(source)
        most = 70 if len(statements) == 1 and isinstance(statements[0], ast.ClassDef) else 30  # a class stands whole
        assert source.count("\n") < most, f"cell {place}: {source[:80]}"
        kinds = {isinstance(node, (ast.Import, ast.ImportFrom)) for node in statements}
        if re.match(r"#\| *exporti?\b", source):
            assert len(kinds) <= 1, f"cell {place}: imports stand in a cell of their own"


def test_lines_of_the_tests_and_the_doors_are_short():
    paths = {*(ROOT / "tests").glob("*.py"), *PACKAGE.rglob("_*.py"), *(ROOT / "docs").glob("*.py"), ROOT / "setup.py"}
    lengths = {path.name: max(map(len, path.read_text().splitlines())) for path in paths - {PACKAGE / "_modidx.py"}}
    assert {name: longest for name, longest in lengths.items() if longest > 120} == {}


# ---- what a light import loads ---------------------------------------------------------------------------------------

HEAVY = ("segmentation_models_pytorch", "timm", "torchvision", "sklearn", "matplotlib", "papermill", "huggingface_hub",
         "requests", "ipywidgets", "ray")
LIGHT = f"""
import sys
import numpy as np
import pandas as pd
import torch
from dli import DonorPool, DonorTransform, DynamicLabelInjection, Samples

rng = np.random.default_rng(0)
masks = np.zeros((8, 32, 32), np.uint8)
masks[:4, 10:14, 10:14] = 1
columns = dict(name=[f"{{i}}.png" for i in range(8)], tile=range(8), exposure=1, width=32, height=32, usable=True)
table = pd.DataFrame(columns | {{"class": ["Pit"] * 4 + ["Free"] * 4}})
samples = Samples(rng.integers(60, 140, (8, 32, 32)).astype(np.uint8), masks, table, ("Pit",), "own")
inject = DynamicLabelInjection(DonorPool(samples, transforms=dict(Pit=DonorTransform(rotate=10))), fill="all")
images = torch.from_numpy(samples.images)[:, None]
after, labels = inject(images, torch.from_numpy(samples.masks), torch.Generator().manual_seed(0))
assert labels.flatten(1).any(1).all() and not torch.equal(after, images)
print(*[name for name in {HEAVY} if name in sys.modules])
"""


def test_the_transform_loads_nothing_that_it_does_not_need():
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [], "import it in the function that needs it"
