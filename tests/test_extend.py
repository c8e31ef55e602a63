"""A loss, an encoder, a method, a blend and a data set more: one row of one table each, in a process of its own."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ADDED = """
import json
from dataclasses import replace

import numpy as np
import torch

from dli.data import synthetic_tiles
from dli.experiment import DATASETS, METHODS, Method, RunConfig, load_runs, run
from dli.method import BLENDS
from dli.network import ENCODERS, LOSSES, Encoder
from dli.study import table1


def halves(targets, patches, masks, options):
    seen.append(len(targets))
    for target, patch, mask in zip(targets, patches, masks):
        target.copy_(torch.where(mask, target // 2 + patch // 2, target))
    return masks


def darker(size, threshold):
    samples = synthetic_tiles(n=240, size=size)
    return replace(samples, images=samples.images // 2, source="darker")


seen = []
LOSSES["mine"] = replace(LOSSES["baseline"], overlap=LOSSES["lovasz"].overlap)
METHODS["my-loss"] = Method(loss="mine")
METHODS["my-method"] = Method(inject=dict(fill="all", choose="random"))
ENCODERS["resnet34"] = Encoder("resnet34", ("layer3", "layer4", "fc"))
BLENDS["halves"] = halves
METHODS["my-blend"] = Method(inject=dict(blend="halves", p_poisson=1.0))
DATASETS["darker"] = replace(DATASETS["synthetic"], load=darker, fingerprint=lambda: "d" * 16, mean=0.2, deviation=0.06)
rows = {}
for name, choice in dict(loss=dict(method="my-loss"), method=dict(method="my-method"), blend=dict(method="my-blend"),
                         encoder=dict(encoder="resnet34"), data=dict(dataset="darker")).items():
    budget = dict(preset="smoke", steps=2, evaluations=1, weights=None, out="kept")
    rows[name] = run(RunConfig(**dict(dataset="synthetic") | budget | choice), progress=False)
runs = load_runs("kept")
tables = {source: table1(own) for source, own in runs.groupby("source")}
lines = {source: t[["encoder", "method"]].to_dict("list") for source, t in tables.items()}
captions = [t.attrs["caption"] for t in tables.values()]
print(json.dumps(dict(rows=rows, blended=sum(seen), count=len(runs), captions=captions, lines=lines)))
"""


@pytest.fixture(scope="module")
def added(tmp_path_factory) -> dict:
    "What the process prints: its rows, and what the tables of the study show."
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", ADDED], cwd=tmp_path_factory.mktemp("extended"), timeout=600,
                          env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_each_is_trained_and_stored(added):
    rows = added["rows"]
    assert added["count"] == 5 == len({row["key"] for row in rows.values()})
    assert rows["loss"]["loss"] == "mine" and rows["encoder"]["encoder"] == "resnet34"
    assert rows["method"]["fill"] == "all" and rows["method"]["choose"] == "random"
    assert rows["data"]["source"] == "darker" and rows["data"]["data"] == "d" * 16
    assert all(row["steps"] == 2 and row["iou_macro"] is not None for row in rows.values())


def test_a_blend_of_ones_own_is_what_a_run_injects_with(added):
    injected = sum(n for name, n in added["rows"]["blend"].items() if name.startswith("injected_"))
    assert added["blended"] == injected > 0


def test_each_is_in_a_table_of_the_study(added):
    lines = added["lines"]["synthetic"]
    shown = set(zip(lines["encoder"], lines["method"]))
    own = {("efficientnet_lite0", f"my-{kind}") for kind in ("loss", "method", "blend")}
    assert own | {("resnet34", "dli")} <= shown
    assert added["lines"]["darker"]["method"] == ["dli"]
    assert any("resnet34" in caption for caption in added["captions"])
