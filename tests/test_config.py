"""Configurations: checked, filled in, resolved; a key that differs whenever the result could."""
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import patch
from dli.experiment.config import (INJECTION, METHODS, PRESETS, RECIPE, Method, RunConfig, evaluation_steps,
                                   learning_rate, notebook_config, resolve, run_key)
from dli.experiment.store import row_config
from dli.method.blending import BLENDS
from dli.method.injection import DynamicLabelInjection

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("wrong,message", [
    (dict(method="dly"), "choose one of baseline, focal"),
    (dict(preset="fast"), "choose one of smoke, quick, study, paper"),
    (dict(split="tiles"), "choose one of None, tile, image"),
    (dict(dataset="mvtec"), "magnetic-tiles"),
    (dict(fraction=0), "expected a number"),
    (dict(fraction=1.5), "expected a number"),
    (dict(steps=2.5), "whole number"),
    (dict(steps=0), "expected a number"),
    (dict(lr=float("nan")), "expected a number"),
    (dict(seed="0"), "expected a number"),
    (dict(batch_size=1), "expected a number"),
    (dict(image_size=100), "multiple of 8"),
    (dict(method="wce", p_poisson=0.5), "injects nothing"),
    (dict(method="dli-all", fill="uniform"), "means fill='all'"),
    (dict(p_poisson=1.1), "expected a number"),
    (dict(fold=5), "from 0 to 4"),
    (dict(partition=-1), "expected a number"),
    (dict(method="sampler", draw="share"), "means draw='balanced'"),
    (dict(loss="wce"), "means loss='baseline'"),
    (dict(method="wce", margin=2), "injects nothing"),
    (dict(method="dli-authors", threshold=127), "means threshold=0"),
    (dict(method="dli-authors", dice="image"), "means dice='batch'"),
    (dict(dtype="float16"), "choose one of None, auto, bfloat16, float32"),
    (dict(select="first"), "choose one of last, best"),
    (dict(evaluations=21), "from 1 to 20"),
    (dict(keep_empty=1), "expected True or False"),
    (dict(out=3), "expected the path"),
    (dict(decoder=(64, 2.5)), "whole number"),
])
def test_wrong_configs_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        RunConfig(**wrong)


def test_configs_are_filled_in_and_round_trip():
    for method in METHODS:
        for preset in PRESETS:
            c = RunConfig(method=method, preset=preset)
            assert RunConfig(**asdict(c)) == c
    assert RunConfig(method="dli-authors").threshold == 0 and RunConfig(method="dli-authors").dice == "batch"


@pytest.mark.parametrize("spelling, plain", [
    (dict(steps=6e0), dict(steps=6)),
    (dict(steps=np.int64(6)), dict(steps=6)),
    (dict(lr=np.float32(0.5)), dict(lr=0.5)),
    (dict(fold=np.float64(2)), dict(fold=2)),
    (dict(fraction=1), dict(fraction=1.0)),
    (dict(keep_empty=np.True_), dict(keep_empty=True)),
    (dict(decoder=[32, 16]), dict(decoder=(32, 16))),
    (dict(out=Path("there")), dict(out="there")),
    (dict(out="~/there"), dict(out=os.path.expanduser("~/there"))),
])
def test_one_run_has_one_key_whatever_the_spelling(spelling, plain):
    one, other = (RunConfig(preset="smoke", dataset="synthetic", **given) for given in (spelling, plain))
    assert one == other and run_key(one) == run_key(other)
    assert json.dumps(asdict(one)) == json.dumps(asdict(other))


def test_a_config_is_made_without_disk_or_network(monkeypatch):
    for name in ("resolve_dataset", "data_fingerprint", "file_hash"):
        patch(monkeypatch, name, lambda *a: pytest.fail("a config looked at the machine"))
    c = RunConfig(weights="/no/such/file.pth", dataset="auto")
    assert c.weights == "/no/such/file.pth" and c.data is None and c.weights_hash is None


def test_resolving_settles_what_the_machine_knows(tmp_path, monkeypatch):
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"one")
    patch(monkeypatch, "resolve_dataset", lambda name: "synthetic")
    c = RunConfig(weights=weights, dtype="auto")
    done = resolve(c)
    assert done.dataset == "synthetic" and done.data and len(done.weights_hash) == 64
    assert done.dtype in ("bfloat16", "float32")
    assert resolve(done) == done and run_key(c) == run_key(done)
    weights.write_bytes(b"two")
    assert run_key(c) != done.weights_hash
    with pytest.raises(ValueError, match="made for another weights_hash"):
        resolve(done)
    with pytest.raises(ValueError, match="made for another data"):
        resolve(replace(done, data="0" * 16, weights_hash=None))


def test_a_new_field_keeps_every_key():
    @dataclass(frozen=True)
    class Longer(RunConfig):
        roi: str | None = None
    for kwargs in (dict(), dict(method="wce", fold=3), dict(preset="study", dataset="magnetic-tiles")):
        usual = dict(dataset="synthetic") | kwargs
        assert run_key(Longer(**usual)) == run_key(RunConfig(**usual)) != run_key(Longer(roi="mask", **usual))


def test_fields_that_were_there_count_in_the_key():
    c = resolve(RunConfig(dataset="synthetic"))
    other = dict(encoder="resnet18", weights=None, split="image", fold=1, partition=1, seed=9, fraction=0.5,
                 clean_validation=False, keep_empty=True, preset="study", steps=7, image_size=64, batch_size=4, lr=0.1,
                 warmup=0.5, beta2=0.5, evaluations=3, decoder=(8, 8), dtype="float32", select="best", p_poisson=0.1,
                 fill="all", mix_gradients=True, region="image", grow_label=True, margin=7, threshold=3, dice="batch")
    keys = {run_key(replace(c, **{name: value})) for name, value in other.items()}
    keys |= {run_key(c), run_key(RunConfig(method="dli-all", dataset="synthetic"))}
    assert len(keys) == 2 + len(other)


def test_notebook_parameters():
    assert notebook_config(dict(method="wce", fold=3, json=json)) == RunConfig(method="wce", fold=3)
    with pytest.raises(ValueError, match="unknown parameter sede: the parameters are method"):
        notebook_config(dict(sede=3))


@given(st.sampled_from(list(PRESETS)), st.integers(1, 300))
@settings(max_examples=30, deadline=None)
def test_rate_and_evaluations(preset, steps):
    c = RunConfig(preset=preset, steps=steps)
    rates = [learning_rate(c, s) for s in range(steps)]
    assert 0 <= min(rates) and max(rates) <= c.lr and np.argmax(rates) <= c.warmup * steps + 1
    stops = evaluation_steps(c)
    assert max(stops) == steps and 1 <= len(stops) <= 20


def test_a_method_is_a_row_of_one_table(monkeypatch):
    monkeypatch.setitem(METHODS, "tversky-all", Method(loss="tversky", inject=dict(fill="all")))
    c = RunConfig(method="tversky-all")
    assert (c.loss, c.fill, c.p_poisson, c.margin) == ("tversky", "all", 0.5, 1)
    with pytest.raises(ValueError, match="means fill='all'"):
        RunConfig(method="tversky-all", fill="uniform")


@pytest.mark.parametrize("row, message", [
    (dict(draw="shares"), "draw='shares' is not known: choose one of shuffled, balanced, share"),
    (dict(loss="nonsense"), "loss='nonsense' is not known: choose one of baseline, focal"),
    (dict(dice="batches"), "dice='batches' is not known: choose one of image, batch"),
    (dict(inject=dict(blend="sticker")), "blend='sticker' is not known: choose one of poisson, cutpaste"),
])
def test_a_methods_row_is_checked_when_a_config_is_made(monkeypatch, row, message):
    monkeypatch.setitem(METHODS, "wrong", Method(**row))
    with pytest.raises(ValueError, match=f"method 'wrong': {message}"):
        RunConfig(method="wrong")


def test_the_protocol_can_be_chosen_where_the_method_says_nothing_of_it():
    for method in METHODS:
        own = RunConfig(method=method)
        assert RunConfig(method=method, threshold=own.threshold, dice=own.dice) == own
        if method != "dli-authors":
            c = RunConfig(method=method, threshold=0, dice="batch")
            assert (c.threshold, c.dice) == (0, "batch")


def test_what_only_a_methods_row_can_say_is_in_the_key(monkeypatch):
    rows = dict(usual={}, said=dict(blend="poisson"), paste=dict(blend="cutpaste"), mine=dict(blend="mine"))
    monkeypatch.setitem(BLENDS, "mine", BLENDS["cutpaste"])
    keys = {}
    for name, inject in rows.items():
        monkeypatch.setitem(METHODS, "own", Method(inject=inject))
        keys[name] = run_key(RunConfig(method="own", dataset="synthetic"))
    assert keys["usual"] == keys["said"] and len(set(keys.values())) == 3


@pytest.mark.parametrize("preset", PRESETS)
def test_the_rate_after_the_last_step_is_zero(preset):
    for warmup in (0, 0.5, 1):
        c = RunConfig(preset=preset, warmup=warmup)
        assert learning_rate(c, c.steps) == 0 < learning_rate(c, c.steps - 1)


def test_the_injection_has_the_defaults_of_the_transform():
    defaults = {name: p.default for name, p in signature(DynamicLabelInjection).parameters.items()}
    assert set(INJECTION) == set(defaults) - {"pool", "ignore_index", "blend"}  # these a method's row alone can say
    assert defaults["blend"] == "poisson"
    assert {name: getattr(RunConfig(), name) for name in INJECTION} == {name: defaults[name] for name in INJECTION}


def test_making_a_config_loads_no_network_and_no_pictures():
    heavy = ("segmentation_models_pytorch", "timm", "torchvision", "matplotlib")
    code = ("import sys; from dli.experiment import RunConfig; RunConfig(method='dli'); "
            f"print(*[name for name in {heavy} if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.split() == [], done.stdout + done.stderr


def test_every_committed_row_has_the_key_that_its_fields_make():
    rows = [json.loads(path.read_text()) for path in (ROOT / "paper_figures").glob("*/*/row.json")]
    rows = [row for row in rows if row["recipe"] == RECIPE]
    assert len(rows) > 100
    assert [run_key(row_config(row)) for row in rows] == [row["key"] for row in rows]
