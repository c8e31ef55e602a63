"""Training: every method trains and leaves a row that can be recomputed; configs are checked; seeds repeat."""
import json
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dli import training
from dli.metrics import scores
from dli.training import METHODS, PRESETS, RunConfig, fit, load_model, notebook_config, rate, run, run_folder, run_key, run_samples


def config(**kwargs):
    return RunConfig(**dict(preset="smoke", dataset="synthetic", weights=None) | kwargs)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_leaves_a_row(method, tmp_path):
    c = config(method=method, out=str(tmp_path))
    row = run(c, progress=False)
    stored = json.loads((run_folder(c) / "row.json").read_text())
    assert stored == row and row["method"] == method and row["key"] == run_key(c)
    counts = pd.read_csv(run_folder(c) / "counts.csv")
    classes = [k.removeprefix("train_iou_") for k in row if k.startswith("train_iou_") and k[10:] not in ("macro", "micro")]
    assert len(counts) == row["val_images"] and len(classes) == 5
    assert scores(counts, classes)["iou_macro"] == row["iou_macro"]
    injected = sum(v for k, v in row.items() if k.startswith("injected_"))
    assert (injected > 0) == (METHODS[method].inject is not None)


def test_a_finished_run_is_read_not_repeated(tmp_path, monkeypatch):
    c = config(out=str(tmp_path))
    row = run(c, progress=False)
    monkeypatch.setattr(training, "fit", lambda *a, **k: pytest.fail("trained again"))
    assert run(c, progress=False) == row


def test_a_failed_run_leaves_no_row(tmp_path, monkeypatch):
    c = config(out=str(tmp_path))
    monkeypatch.setattr(training, "save_file", lambda *a: (_ for _ in ()).throw(OSError("No space left on device")))
    with pytest.raises(OSError, match="No space"): run(c, progress=False)
    assert not (run_folder(c) / "row.json").exists()


def test_weights_come_back_from_the_file(tmp_path):
    c = config(out=str(tmp_path))
    with pytest.raises(FileNotFoundError, match="call run"): load_model(c, run_samples(c)[0])
    run(c, progress=False)
    train, val = run_samples(c)
    done = fit(c, train, val, progress=False)
    again = load_model(c, train).state_dict()
    assert all(torch.equal(v, again[k]) for k, v in done.model.state_dict().items())


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    c = config(method="baseline", out=str(tmp_path))
    train, val = run_samples(c)
    broken = lambda *a: (torch.nn.Parameter(torch.tensor(float("nan"))))
    with pytest.MonkeyPatch.context() as m:
        m.setattr(training, "run_loss", lambda *a: broken)
        with pytest.raises(FloatingPointError, match="step 1 of baseline.*lower lr"): fit(c, train, val, progress=False)


def test_methods_of_one_seed_see_the_same_photographs():
    c = [config(method=m) for m in ("baseline", "wce", "dli")]
    train, _ = run_samples(c[0])
    streams = [training.batches(x, train, training.run_injection(x, train), torch.device("cpu")) for x in c]
    for _ in range(5):
        (a, ma), (b, mb), (d, md) = map(next, streams)
        assert torch.equal(a, b) and torch.equal(ma, mb)
        defective = (ma > 0).flatten(1).any(1)
        assert torch.equal(a[defective], d[defective]) and torch.equal(ma[defective], md[defective])


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_shuffled_epochs_show_each_image_at_most_once(n, size, seed):
    draws = training.shuffled(n, size, torch.Generator().manual_seed(seed))
    if size > n:
        with pytest.raises(ValueError, match="larger than the"): next(draws)
        return
    epoch = torch.cat([next(draws) for _ in range(n // size)])
    assert len(epoch.unique()) == len(epoch) == n // size * size and epoch.max() < n


def test_balanced_draws_have_dlis_clean_share():
    labels = np.repeat([0, 1, 3], [300, 40, 10])
    share = training.clean_share_after_dli(labels, 16)
    draws = training.balanced(labels, 16, torch.Generator().manual_seed(0))
    drawn = np.bincount(np.concatenate([labels[next(draws).numpy()] for _ in range(500)]), minlength=4) / 8000
    assert abs(drawn[0] - share) < 0.02 and abs(drawn[1] - drawn[3]) < 0.03 and drawn[2] == 0


@pytest.mark.parametrize("wrong,message", [
    (dict(method="dly"), "choose one of baseline, focal"),
    (dict(preset="fast"), "choose one of smoke, quick, paper"),
    (dict(split="tiles"), "choose one of tile, image"),
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
])
def test_wrong_configs_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message): RunConfig(**wrong)


def test_configs_are_filled_in_and_round_trip():
    for method in METHODS:
        for preset in PRESETS:
            c = RunConfig(method=method, preset=preset)
            assert RunConfig(**asdict(c)) == c
    assert RunConfig(method="dli-authors").threshold == 0 and RunConfig(method="dli-authors").dice == "batch"


def test_notebook_parameters():
    assert notebook_config(dict(method="wce", seed=3, json=json)) == RunConfig(method="wce", seed=3)
    with pytest.raises(ValueError, match="unknown parameter sede: the parameters are method"): notebook_config(dict(sede=3))


@given(st.sampled_from(list(PRESETS)), st.integers(1, 300))
@settings(max_examples=30, deadline=None)
def test_rate_and_evaluations(preset, steps):
    c = RunConfig(preset=preset, steps=steps)
    rates = [rate(c, s) for s in range(steps)]
    assert 0 <= min(rates) and max(rates) <= c.lr and np.argmax(rates) <= PRESETS[preset].warmup * steps + 1
    stops = training.evaluation_steps(c)
    assert max(stops) == steps and 1 <= len(stops) <= 20


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_trains_on_cuda(tmp_path):
    assert run(config(out=str(tmp_path)), progress=False)["device"] == "cuda"
