"""Training: every method trains and leaves a row that can be recomputed; configs are checked; seeds repeat; killed runs end as if they had not been."""
import copy
import itertools
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoderBlock

from dli import files
from dli.files import locked, write_whole
from dli.network.speed import FoldedBlock, default_device, memory_format, network_dtype
from dli.scoring.metrics import scores
from dli.experiment.config import (METHODS, PRESETS, RECIPE, RunConfig, evaluation_steps, learning_rate,
                                   notebook_config, resolve, run_key, run_model)
from dli.experiment.store import run_folder
from dli.experiment.batches import (DRAWN, batches, chance, clean_share_after_dli, draw_weights, run_injection,
                                    run_samples, shuffled)
from dli.experiment.evaluation import save_pictures
from dli.experiment.steps import GraphStep, loss_of_batch, run_loss, train_step
from dli.experiment.state import CHECKPOINTS, CHECKPOINT_SECONDS, advance, begin, fit, resume
from dli.experiment.training import load_model, run
from conftest import patch


def config(**kwargs):
    return resolve(RunConfig(**dict(preset="smoke", dataset="synthetic", weights=None) | kwargs))


save_pictures = save_pictures


def no_pictures(done, val, folder):
    pass


@pytest.fixture(autouse=True)
def without_pictures(request, monkeypatch):
    "Drawing takes longer than training here: only the test that looks at the pictures draws them."
    if request.node.name != "test_pictures_are_left":
        patch(monkeypatch, "save_pictures", no_pictures)


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


def test_a_picture_that_fails_costs_no_row(tmp_path, monkeypatch):
    patch(monkeypatch, "plot_curve", lambda *a: 1 / 0)
    patch(monkeypatch, "save_pictures", save_pictures)
    with pytest.warns(UserWarning, match="curve.png is not drawn: ZeroDivisionError"):
        row = run(config(out=str(tmp_path)), progress=False)
    assert row["iou_macro"] is not None and (run_folder(config(out=str(tmp_path))) / "predictions.png").exists() and not plt.get_fignums()


def test_pictures_are_left(tmp_path):
    c = config(out=str(tmp_path))
    run(c, progress=False)
    pictures = [plt.imread(run_folder(c) / name) for name in ("curve.png", "predictions.png")]
    assert all(p.std() > 0.05 and min(p.shape[:2]) > 200 for p in pictures) and not plt.get_fignums()
    assert {p.name for p in run_folder(c).iterdir()} == {"config.json", "counts.csv", "curve.csv", "curve.png", "model.safetensors", "predictions.png", "regions.npz", "row.json"}


def test_a_finished_run_is_read_not_repeated(tmp_path, monkeypatch):
    c = config(out=str(tmp_path))
    row = run(c, progress=False)
    patch(monkeypatch, "fit", lambda *a, **k: pytest.fail("trained again"))
    assert run(c, progress=False) == row


def test_weights_come_back_from_the_file(tmp_path):
    c = config(out=str(tmp_path))
    with pytest.raises(FileNotFoundError, match="call run"):
        load_model(c, run_samples(c)[0])
    run(c, progress=False)
    train, val = run_samples(c)
    done = fit(c, train, val, progress=False)
    again = load_model(c, train).state_dict()
    assert all(torch.equal(v, again[k]) for k, v in done.model.state_dict().items())


def test_methods_of_one_seed_see_the_same_photographs():
    c = [config(method=m) for m in ("baseline", "wce", "dli")]
    train, _ = run_samples(c[0])
    streams = [batches(x, train, run_injection(x, train), torch.device("cpu")) for x in c]
    for _ in range(5):
        (a, ma), (b, mb), (d, md) = map(next, streams)
        assert torch.equal(a, b) and torch.equal(ma, mb)
        defective = (ma > 0).flatten(1).any(1)
        assert torch.equal(a[defective], d[defective]) and torch.equal(ma[defective], md[defective])


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 5), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_shuffled_epochs_show_each_image_at_most_once(n, size, seed, epoch):
    if size > n:
        with pytest.raises(ValueError, match="larger than the"):
            shuffled(n, size, seed, 0)
        return
    steps = range(epoch * (n // size), (epoch + 1) * (n // size))
    shown = torch.cat([shuffled(n, size, seed, step) for step in steps])
    assert len(shown.unique()) == len(shown) == n // size * size and shown.max() < n


def test_chance_is_independent_of_seed_purpose_and_step():
    drawn = {(seed, what, step): torch.rand(4, generator=chance(seed, what, step)).tolist()
             for seed in (0, 1, 2**20) for what in DRAWN for step in (0, 1, 10**6)}
    assert len({tuple(v) for v in drawn.values()}) == 9 * len(DRAWN)
    assert drawn[1, "flips", 1] == torch.rand(4, generator=chance(1, "flips", 1)).tolist()


def test_balanced_draws_have_dlis_clean_share():
    labels = np.repeat([0, 1, 3], [300, 40, 10])
    share, weight = clean_share_after_dli(labels, 16), draw_weights(labels, 16, "balanced").numpy()
    drawn = np.bincount(labels, weight, minlength=4)
    np.testing.assert_allclose(drawn, [share, (1 - share) / 2, 0, (1 - share) / 2])
    assert len(np.unique(weight[labels == 1])) == 1
    assert 0 < share < 300 / 350  # some clean images are filled, others stay


@pytest.mark.parametrize("wrong,message", [
    (dict(method="dly"), "choose one of baseline, focal"),
    (dict(preset="fast"), "choose one of smoke, quick, study, paper"),
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
    (dict(fold=5), "from 0 to 4"),
    (dict(partition=-1), "expected a number"),
    (dict(method="sampler", draw="share"), "means draw='balanced'"),
    (dict(loss="wce"), "means loss='baseline'"),
    (dict(method="wce", margin=2), "injects nothing"),
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
    one, other = RunConfig(preset="smoke", dataset="synthetic", **spelling), RunConfig(preset="smoke", dataset="synthetic", **plain)
    assert one == other and run_key(one) == run_key(other) and json.dumps(asdict(one)) == json.dumps(asdict(other))


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
    assert done.dataset == "synthetic" and done.data and len(done.weights_hash) == 64 and done.dtype in ("bfloat16", "float32")
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
    other = dict(method="dli-all", encoder="resnet18", weights=None, split="image", fold=1, partition=1, seed=9, fraction=0.5, clean_validation=False,
                 keep_empty=True, preset="study", steps=7, image_size=64, batch_size=4, lr=0.1, warmup=0.5, beta2=0.5, evaluations=3, decoder=(8, 8),
                 dtype="float32", select="best", p_poisson=0.1, fill="all", mix_gradients=True, region="image", grow_label=True, margin=7, threshold=3, dice="batch")
    keys = {run_key(c)} | {run_key(replace(c, **{name: value})) for name, value in other.items() if name != "method"} | {run_key(RunConfig(method="dli-all", dataset="synthetic"))}
    assert len(keys) == 1 + len(other)


def test_a_config_means_the_same_in_another_process(tmp_path):
    "Saved as JSON, read by another process: the same key, and the same bits."
    c = config(method="share", out=str(tmp_path / "here"))
    row = run(c, progress=False)
    there = json.loads((run_folder(c) / "config.json").read_text()) | dict(out=str(tmp_path / "there"))
    code = "import json, sys; from dli.training import *; c = json.loads(sys.argv[1]); c.pop('recipe'); print(run(RunConfig(**c), progress=False)['key'])"
    done = subprocess.run([sys.executable, "-c", code, json.dumps(there)], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == row["key"], done.stderr
    assert (tmp_path / "there" / run_folder(c).name / "model.safetensors").read_bytes() == (run_folder(c) / "model.safetensors").read_bytes()


def test_shares_without_balancing_keep_the_classes_proportions():
    labels = np.repeat([0, 1, 3], [300, 40, 10])
    clean, weight = clean_share_after_dli(labels, 16), draw_weights(labels, 16, "share").numpy()
    drawn = np.bincount(labels, weight, minlength=4)
    np.testing.assert_allclose(drawn, [clean, (1 - clean) * 0.8, 0, (1 - clean) * 0.2])


def test_the_best_evaluation_is_scored_where_asked_for(tmp_path, monkeypatch):
    c = config(method="baseline", select="best", evaluations=3, out=str(tmp_path))
    usual, marks = scores, iter((0.2, 0.9, 0.1))
    patch(monkeypatch, "scores", lambda *a: usual(*a) | dict(iou_micro=next(marks, usual(*a)["iou_micro"])))
    states = []
    patch(monkeypatch, "save_state", lambda done, folder: states.append({k: v.clone() for k, v in done.model.state_dict().items()}))
    run(c, progress=False)
    saved = load_model(c, run_samples(c)[0]).state_dict()
    same = [all(torch.equal(v, saved[k]) for k, v in state.items()) for state in states]
    assert same == [False, True, False]


def test_the_best_network_survives_a_kill(tmp_path):
    c = config(method="baseline", select="best", evaluations=3, out=str(tmp_path / "whole"))
    run(c, progress=False)
    stopped = replace(c, out=str(tmp_path / "stopped"))
    with pytest.MonkeyPatch.context() as m:
        stop_at(m, 5, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run(stopped, progress=False)
    run(stopped, progress=False)
    assert outcome(stopped) == outcome(c)


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


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("method", METHODS)
def test_trains_on_cuda(method, tmp_path):
    row = run(config(method=method, steps=20, out=str(tmp_path)), progress=False)
    curve = pd.read_csv(run_folder(config(method=method, steps=20, out=str(tmp_path))) / "curve.csv")
    assert row["device"] == "cuda" and curve["loss"].iloc[-1] < curve["loss"].iloc[0]


@pytest.mark.parametrize("cuda, mps, expected", [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_the_gpu_is_used_where_there_is_one(cuda, mps, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert default_device() == torch.device(expected)
    assert network_dtype(torch.device("mps")) == torch.float32
    assert memory_format("resnet18", torch.device("mps")) == torch.contiguous_format


def test_a_device_is_chosen_by_name(tmp_path):
    assert run(config(out=str(tmp_path)), progress=False, device="cpu")["device"] == "cpu"
    with pytest.raises(ValueError, match="device='gpu' can't be used here"):
        run(config(out=str(tmp_path), seed=3), progress=False, device="gpu")


def test_torchs_defaults_change_no_bit(tmp_path, unstopped):
    "Whatever the process has set as default number format and device, a run is the same."
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        run(config(out=str(tmp_path)), progress=False, device="cpu")
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert outcome(config(out=str(tmp_path))) == unstopped


class NoStream:
    "Stands in for a CUDA stream: what is put on it is done at once."
    def __init__(self, *_):
        pass
    def __enter__(self):
        return self
    def __exit__(self, *_):
        pass
    def synchronize(self):
        pass
    def wait_stream(self, other):
        pass


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_captured_step_is_the_usual_one(dtype, monkeypatch):
    "What `GraphStep` records, computed on the CPU without a graph, does what `train_step` does."
    for name in ("Stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, NoStream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    patch(monkeypatch, "WARM_STEPS", 100)
    patch(monkeypatch, "fused", lambda loss: loss)
    c = config(method="baseline", dtype=dtype)
    train, _ = run_samples(c)
    usual = run_model(c, train, torch.device("cpu"))
    model, loss = copy.deepcopy(usual), run_loss(c, train)
    adam = [torch.optim.SGD(m.parameters(), lr=rate) for m, rate in ((usual, 0.1), (model, torch.tensor(0.0)))]
    counted = [m.num_batches_tracked for m in model.modules() if hasattr(m, "num_batches_tracked")]
    step = None
    for images, masks in itertools.islice(batches(c, train, None, torch.device("cpu")), 3):
        expected = train_step(usual, loss, adam[0], images, masks, getattr(torch, dtype))
        step = step or GraphStep(model, loss, adam[1], getattr(torch, dtype), images, masks)
        step(images, masks, 0.1)
        assert step.losses() == [pytest.approx(expected, rel=1e-4 if dtype == "float32" else 1e-2)] and step.losses() == []
    difference = max((a - b).abs().max().item() for a, b in zip(usual.parameters(), model.parameters()))
    assert difference < (1e-5 if dtype == "float32" else 0.02)
    assert counted == [m.num_batches_tracked for m in model.modules() if hasattr(m, "num_batches_tracked")] and all(n == 0 for n in counted)


def test_a_captured_loss_that_is_not_finite_is_named(monkeypatch):
    step = GraphStep.__new__(GraphStep)
    step.stream, step.values = NoStream(), [torch.tensor(1.0), torch.tensor(float("nan")), torch.tensor(2.0)]
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        step.losses()


# Interruption. A process is killed for real, so runs are trained in processes of their own: forked from one that has imported everything.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["dli.experiment.training"])


def train_apart(c: RunConfig, checkpoint_seconds: float, threads: int):
    CHECKPOINT_SECONDS, save_pictures = checkpoint_seconds, no_pictures
    torch.set_num_threads(threads)
    run(c, progress=False)


def start(c, checkpoint_seconds=0.0, threads=1):
    process = PROCESSES.Process(target=train_apart, args=(c, checkpoint_seconds, threads))
    process.start()
    return process


def outcome(c):
    "All that a finished run leaves, times left out."
    folder = run_folder(c)
    row = {k: v for k, v in json.loads((folder / "row.json").read_text()).items() if not k.startswith("seconds") and k not in ("finished", "out")}
    assert not any((folder / name).exists() for name in (*CHECKPOINTS, "lock")) and not list(folder.glob("*.part"))
    return row, pd.read_csv(folder / "curve.csv").drop(columns="seconds").to_csv(), *((folder / name).read_bytes() for name in ("counts.csv", "model.safetensors"))


@pytest.mark.parametrize("kills,threads,method", [
    (3, 1, "dli"),
    pytest.param(20, 1, "dli", marks=pytest.mark.slow),
    pytest.param(5, 1, "sampler", marks=pytest.mark.slow),
    pytest.param(5, 2, "dli", marks=pytest.mark.slow),
])
def test_killed_runs_end_as_if_they_had_not_been(kills, threads, method, tmp_path):
    place = lambda name: config(method=method, steps=12, out=str(tmp_path / name))
    for name in ("warm", "whole"):  # the first may have to compile
        process, began = start(place(name), 60, threads), time.perf_counter()
        process.join()
    seconds, whole, moments, left = time.perf_counter() - began, outcome(place("whole")), random.Random(kills), kills
    for attempt in itertools.count():
        if not left:
            break
        c = place(f"killed-{attempt}")
        while left and not (run_folder(c) / "row.json").exists():
            process = start(c, 0, threads)
            process.join(moments.uniform(0, seconds))
            process.kill()
            process.join()
            left -= process.exitcode == -signal.SIGKILL
        run_in = start(c, 0, threads)
        run_in.join()
        assert run_in.exitcode == 0 and outcome(c) == whole


class Dies(BaseException):
    "A process that ends: nothing catches it."


def test_a_run_that_dies_after_every_write_ends_as_if_it_had_not(tmp_path, monkeypatch):
    whole, c, write = config(steps=2, out=str(tmp_path / "whole")), config(steps=2, out=str(tmp_path / "dies")), write_whole
    run(whole, progress=False)
    deaths, left = 0, 0

    def write_or_die(path, content):
        nonlocal left
        if left == 0:
            path.with_name(path.name + ".part").write_bytes(content[:len(content) // 2])
            raise Dies
        left -= 1
        write(path, content)

    patch(monkeypatch, "write_whole", write_or_die)
    while not (run_folder(c) / "row.json").exists():
        left = deaths
        try:
            run(c, progress=False)
        except Dies:
            deaths += 1
    assert deaths >= 5
    assert outcome(c) == outcome(whole)


@pytest.fixture
def stopped(tmp_path):
    "A run of six steps that was stopped in its fifth, after the checkpoint of its third."
    c = config(out=str(tmp_path))
    with pytest.MonkeyPatch.context() as m:
        stop_at(m, 5, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt, match="at step 5 of dli.*call run again to continue"):
            run(c, progress=False)
    assert {p.name for p in run_folder(c).iterdir()} == {"config.json", "curve.csv", CHECKPOINTS[1], "lock"}
    return c


@pytest.fixture(scope="module")
def unstopped(tmp_path_factory):
    c = config(out=str(tmp_path_factory.mktemp("unstopped")))
    run(c, progress=False)
    return outcome(c)


def stop_at(monkeypatch, step, error):
    "Let the run's step (counted from 1) raise an error."
    advance = advance

    def stopping(done, *batch):
        if done.step + 1 == step:
            raise error
        advance(done, *batch)
    patch(monkeypatch, "advance", stopping)


def test_a_stopped_run_shows_what_it_has_and_continues(stopped, unstopped, monkeypatch):
    folder, steps, advance = run_folder(stopped), [], advance
    assert pd.read_csv(folder / "curve.csv")["step"].tolist() == [3]
    assert RunConfig(**{k: v for k, v in json.loads((folder / "config.json").read_text()).items() if k != "recipe"}) == stopped
    patch(monkeypatch, "advance", lambda done, *batch: (steps.append(done.step), advance(done, *batch)))
    run(stopped, progress=False)
    assert steps == [3, 4, 5] and outcome(stopped) == unstopped


def two_checkpoints(c, monkeypatch):
    "Continue the stopped run to its last step, so that there are checkpoints of the third and of the fifth."
    patch(monkeypatch, "CHECKPOINT_SECONDS", 0)
    with pytest.MonkeyPatch.context() as m:
        stop_at(m, 6, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run(c, progress=False)
    return [run_folder(c) / name for name in CHECKPOINTS]


def test_a_truncated_checkpoint_is_named(stopped):
    path = run_folder(stopped) / CHECKPOINTS[1]
    content, fresh = path.read_bytes(), begin(stopped, run_samples(stopped)[0])
    for length in (0, 1, 8, 100, 5000, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=f"{path.name} can't be read.*truncated.*delete it to start from the beginning"):
            resume(fresh, path.parent)
    assert fresh.step == 0


def test_the_good_one_of_two_checkpoints_is_used(stopped, unstopped, monkeypatch):
    older, newer = sorted(two_checkpoints(stopped, monkeypatch), key=os.path.getmtime)
    newer.write_bytes(newer.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=f"{newer.name} can't be read.*truncated.*continuing from the other"):
        run(stopped, progress=False)
    assert outcome(stopped) == unstopped


@pytest.mark.parametrize("change,message", [
    (lambda m: dict(seed=1), "seed=0, here 1"),
    (lambda m: patch(m, "RECIPE", RECIPE + 1), f"recipe={RECIPE}, here {RECIPE + 1}"),
    (lambda m: patch(m, "versions", lambda: dict(torch="9")), "torch='.*', here '9'"),
    (lambda m: dict(dtype="float32"), "dtype='bfloat16', here 'float32'"),
    (lambda m: patch(m, "run_samples", lambda c: [replace(s, source="magnetic-tiles") for s in run_samples(c)]), "source='synthetic', here 'magnetic-tiles'"),
])
def test_a_checkpoint_of_another_run_or_version_is_named(change, message, stopped, monkeypatch):
    content = (run_folder(stopped) / CHECKPOINTS[1]).read_bytes()
    other = RunConfig(**asdict(stopped) | (change(monkeypatch) or {}))
    path = run_folder(other) / CHECKPOINTS[1]
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"is of another run or version: .*{message}.*delete it to start"):
        run(other, progress=False)
    assert path.read_bytes() == content and not (path.parent / "row.json").exists()


def test_a_damaged_row_is_not_overwritten(tmp_path):
    c = config(out=str(tmp_path))
    run_folder(c).mkdir()
    (run_folder(c) / "row.json").write_text('{"method": "dl')
    with pytest.raises(ValueError, match="row.json can't be read.*delete it to train again"):
        run(c, progress=False)
    assert (run_folder(c) / "row.json").read_text() == '{"method": "dl'


@pytest.mark.parametrize("content", ["{}", "[]", '{"iou_macro": 1.0, "key": "other"}'])
def test_the_row_of_another_run_is_not_taken_for_this_one(content, tmp_path):
    c = config(out=str(tmp_path))
    run_folder(c).mkdir()
    for name in ("row.json", CHECKPOINTS[0]):
        (run_folder(c) / name).write_text(content)
    with pytest.raises(ValueError, match="row.json is not the row of this run.*delete it to train again"):
        run(c, progress=False)
    assert all((run_folder(c) / name).read_text() == content for name in ("row.json", CHECKPOINTS[0]))


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_a_sound_checkpoint(tmp_path, unstopped):
    c, usual = config(out=str(tmp_path)), loss_of_batch
    with pytest.MonkeyPatch.context() as m:
        calls = []
        patch(m, "loss_of_batch", lambda *a: usual(*a) * (float("nan") if calls.append(1) or len(calls) == 5 else 1))
        patch(m, "CHECKPOINT_SECONDS", 0)
        with pytest.raises(FloatingPointError, match="the loss is nan at step 5 of dli-.*rate.*lower lr"):
            run(c, progress=False)
    run(c, progress=False)
    assert outcome(c) == unstopped


def test_weights_that_are_not_finite_are_not_saved(tmp_path, unstopped):
    c, usual = config(out=str(tmp_path)), train_step

    def spoil(model, *rest):
        value = usual(model, *rest)
        if rest[1].state[next(model.parameters())]["step"] == 5:
            next(model.parameters()).data[:] = float("inf")
        return value
    with pytest.MonkeyPatch.context() as m:
        patch(m, "train_step", spoil)
        patch(m, "CHECKPOINT_SECONDS", 0)
        with pytest.raises(FloatingPointError, match="is not finite .*lower lr"):
            run(c, progress=False)
    run(c, progress=False)
    assert outcome(c) == unstopped


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full, the disk that is always full")
@pytest.mark.parametrize("writes", [0, 1, 2, 5])
def test_a_full_disk_is_named_and_the_run_continues(writes, tmp_path, unstopped):
    c, files = config(out=str(tmp_path)), []

    def limited(path, mode):
        files.append(path)
        return open(path if len(files) <= writes else "/dev/full", mode)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(files, "open", limited, raising=False)
        with pytest.raises(OSError, match=r"No space left on device.*make room, then call run again.*") as error:
            run(c, progress=False)
    assert error.value.errno == 28 and not list(run_folder(c).glob("*.part")) and not (run_folder(c) / "row.json").exists()
    run(c, progress=False)
    assert outcome(c) == unstopped


def train_until_interrupted(c, errors: Path):
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    train_apart(c, 0, 1)


def test_another_process_is_kept_out_until_ctrl_c(tmp_path):
    c = config(steps=2000, out=str(tmp_path))
    process = PROCESSES.Process(target=train_until_interrupted, args=(c, tmp_path / "errors"))
    process.start()
    while not (run_folder(c) / CHECKPOINTS[0]).exists():
        time.sleep(0.05)
    with pytest.raises(RuntimeError, match=f"{run_key(c)}: another process is training this very run: wait for it, or end it"):
        run(c, progress=False)
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == 1 and "KeyboardInterrupt: stopped at step" in (tmp_path / "errors").read_text()
    fresh = begin(c, run_samples(c)[0])
    with locked(run_folder(c)):
        resume(fresh, run_folder(c))
    assert fresh.step >= 2


def test_seeds_repeat_and_differ(tmp_path, unstopped):
    again, other = config(out=str(tmp_path)), config(seed=5, out=str(tmp_path))
    run(again, progress=False), run(other, progress=False)
    assert outcome(again) == unstopped and outcome(other)[3] != unstopped[3]


def test_no_global_generator_is_used(tmp_path):
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    run(config(out=str(tmp_path)), progress=False)
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all() and before[2] == random.getstate()


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 2), st.integers(1, 5), st.integers(1, 5), st.sampled_from((0, 3)), st.sampled_from((torch.contiguous_format, torch.channels_last)), st.integers(0, 2**31))
def test_a_folded_block_is_the_block(batch, height, width, skipped, layout, seed):
    "Output and every gradient, with and without a skip connection, of any size."
    torch.manual_seed(seed)
    block = UnetDecoderBlock(4, skipped, 5).double().eval()
    folded = FoldedBlock(copy.deepcopy(block)).eval()
    found = []
    for b in (block, folded):
        torch.manual_seed(seed)
        x = torch.randn(batch, 4, height, width, dtype=torch.double).contiguous(memory_format=layout).requires_grad_()
        skip = torch.randn(batch, skipped, 2 * height, 2 * width, dtype=torch.double).contiguous(memory_format=layout).requires_grad_() if skipped else None
        out = b(x, 2 * height, 2 * width, skip)
        out.square().sum().backward()
        found.append([out, x.grad, *([skip.grad] if skipped else []), *(p.grad for p in b.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    assert block.state_dict().keys() == folded.state_dict().keys()


def test_a_folded_block_refuses_other_sizes():
    block = FoldedBlock(UnetDecoderBlock(4, 0, 5))
    with pytest.raises(ValueError, match="expected images whose height and width are multiples of 8, got features .3, 4. for 7x8"):
        block(torch.rand(1, 4, 3, 4), 7, 8)
