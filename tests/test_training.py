"""Training: every method leaves a row that can be recomputed; seeds repeat; killed runs end as if they had not been."""
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
from dataclasses import asdict, replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from conftest import patch
from dli import files
from dli.experiment.loader import batches, run_samples
from dli.experiment.config import METHODS, RECIPE, RunConfig, resolve, run_key
from dli.experiment.datasets import MAGNETIC_TILES
from dli.experiment.evaluation import predict_samples, save_pictures, with_patches
from dli.experiment.state import CHECKPOINTS, advance, begin, fit, resume
from dli.experiment.steps import GraphBody, GraphStep, loss_of_batch, run_loss, run_model, train_step
from dli.experiment.store import ROW, complete_row, run_folder
from dli.experiment.training import load_model, run
from dli.files import locked, write_whole
from dli.method import DonorPool
from dli.scoring.metrics import scores


def config(**kwargs):
    return resolve(RunConfig(**dict(preset="smoke", dataset="synthetic", weights=None) | kwargs))


def no_pictures(state, val, folder):
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
    trained = [k.removeprefix("train_iou_") for k in row if k.startswith("train_iou_")]
    classes = [name for name in trained if name not in ("macro", "micro")]
    assert len(counts) == row["val_images"] and len(classes) == 5
    assert scores(counts, classes)["iou_macro"] == row["iou_macro"]
    injected = sum(v for k, v in row.items() if k.startswith("injected_"))
    assert (injected > 0) == (METHODS[method].inject is not None)


def test_a_picture_that_fails_costs_no_row(tmp_path, monkeypatch):
    patch(monkeypatch, "plot_curve", lambda *a: 1 / 0)
    patch(monkeypatch, "save_pictures", save_pictures)
    with pytest.warns(UserWarning, match="curve.png is not drawn: ZeroDivisionError"):
        row = run(config(out=str(tmp_path)), progress=False)
    assert row["iou_macro"] is not None and not plt.get_fignums()
    assert (run_folder(config(out=str(tmp_path))) / "predictions.png").exists()


def test_pictures_are_left(tmp_path):
    c = config(out=str(tmp_path))
    run(c, progress=False)
    pictures = [plt.imread(run_folder(c) / name) for name in ("curve.png", "predictions.png")]
    assert all(p.std() > 0.05 and min(p.shape[:2]) > 200 for p in pictures) and not plt.get_fignums()
    assert {p.name for p in run_folder(c).iterdir()} == {"config.json", "counts.csv", "curve.csv", "curve.png",
                                                         "model.safetensors", "predictions.png", "regions.npz",
                                                         "row.json"}


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


def test_a_config_means_the_same_in_another_process(tmp_path):
    "Saved as JSON, read by another process: the same key, and the same bits."
    c = config(method="share", out=str(tmp_path / "here"))
    row = run(c, progress=False)
    there = json.loads((run_folder(c) / "config.json").read_text()) | dict(out=str(tmp_path / "there"))
    code = ("import json, sys; from dli.experiment import RunConfig, run; c = json.loads(sys.argv[1]); "
            "c.pop('recipe'); print(run(RunConfig(**c), progress=False)['key'])")
    done = subprocess.run([sys.executable, "-c", code, json.dumps(there)], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == row["key"], done.stderr
    weights = [folder / "model.safetensors" for folder in (run_folder(c), tmp_path / "there" / run_folder(c).name)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_the_best_evaluation_is_scored_where_asked_for(tmp_path, monkeypatch):
    c = config(method="baseline", select="best", evaluations=3, out=str(tmp_path))
    usual, marks = scores, iter((0.2, 0.9, 0.1))
    patch(monkeypatch, "scores", lambda *a: usual(*a) | dict(iou_micro=next(marks, usual(*a)["iou_micro"])))
    states = []
    copied = lambda state, folder: states.append({k: v.clone() for k, v in state.model.state_dict().items()})
    patch(monkeypatch, "save_state", copied)
    run(c, progress=False)
    saved = load_model(c, run_samples(c)[0]).state_dict()
    same = [all(torch.equal(v, saved[k]) for k, v in state.items()) for state in states]
    assert same == [False, True, False]


@pytest.mark.parametrize("marks, chosen", [((None, 0.2, None), 4), ((None, None, None), 6), ((0.0, None, 0.0), 2)])
def test_an_evaluation_without_a_score_is_never_the_best(monkeypatch, marks, chosen):
    c = config(method="baseline", select="best", evaluations=3)
    usual, left = scores, iter(marks)
    patch(monkeypatch, "scores", lambda *a: usual(*a) | dict(iou_micro=next(left)))
    train, val = run_samples(c)
    found = fit(c, train, val, progress=False)
    steps = [line["step"] for line in found.curve]
    assert steps == [2, 4, 6] and [line["iou_micro"] for line in found.curve] == list(marks)
    patch(monkeypatch, "scores", usual)
    state, loss = begin(c, train), run_loss(c, train)
    for images, masks in itertools.islice(batches(c, train, state.inject, torch.device("cpu")), chosen):
        advance(state, loss, images, masks)
    assert all(torch.equal(v, found.model.state_dict()[k]) for k, v in state.model.state_dict().items())


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


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("method", METHODS)
def test_trains_on_cuda(method, tmp_path):
    row = run(config(method=method, steps=20, out=str(tmp_path)), progress=False)
    curve = pd.read_csv(run_folder(config(method=method, steps=20, out=str(tmp_path))) / "curve.csv")
    assert row["device"] == "cuda" and curve["loss"].iloc[-1] < curve["loss"].iloc[0]


@pytest.mark.parametrize("select", ["last", "best"])
def test_a_run_predicts_its_validation_images_once(select, tmp_path, monkeypatch):
    "Once per evaluation; once more only where the best network is not the last one."
    c = config(method="baseline", select=select, out=str(tmp_path))
    images = [len(samples) for samples in run_samples(c)]
    predicted = []
    patch(monkeypatch, "predict_samples", lambda model, samples, *rest: (predicted.append(len(samples)),
                                                                         predict_samples(model, samples, *rest))[1])
    patch(monkeypatch, "save_pictures", save_pictures)
    row = run(c, progress=False)
    curve = pd.read_csv(run_folder(c) / "curve.csv")
    best_is_last = curve["iou_micro"].argmax() == len(curve) - 1
    assert predicted == [images[1]] * (c.evaluations + (select == "best" and not best_is_last))
    regions = np.unpackbits(np.load(run_folder(c) / "regions.npz")["regions"], axis=-1)
    counts = pd.read_csv(run_folder(c) / "counts.csv")
    found = counts.filter(like="tp_").to_numpy() + counts.filter(like="fp_").to_numpy()
    assert (regions.sum((2, 3)) == found).all() and row["val_images"] == images[1]


def test_a_row_is_written_by_the_table_that_reads_it(tmp_path):
    c = config(out=str(tmp_path))
    row = run(c, progress=False)
    own = [name for name in row if name not in asdict(c)]
    assert all(any(field.holds(name) for field in ROW) for name in own)
    assert all(any(field.holds(name) for name in own) for field in ROW)
    found = {name: row[name] for name in own}
    assert list(complete_row(c, found)) == list(row)
    with pytest.raises(ValueError, match="unknown fields iuo_macro"):
        complete_row(c, found | dict(iuo_macro=1))
    with pytest.raises(ValueError, match="it lacks source"):
        complete_row(c, {name: value for name, value in found.items() if name != "source"})


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
    counts = lambda: [m.num_batches_tracked for m in model.modules() if hasattr(m, "num_batches_tracked")]
    counted = counts()
    step = None
    for images, masks in itertools.islice(batches(c, train, None, torch.device("cpu")), 3):
        expected = train_step(usual, loss, adam[0], images, masks, getattr(torch, dtype), MAGNETIC_TILES)
        body = GraphBody(model, loss, adam[1], getattr(torch, dtype), (images, masks), MAGNETIC_TILES)
        step = step or GraphStep(body)
        step(images, masks, 0.1)
        assert step.losses() == [pytest.approx(expected, rel=1e-4 if dtype == "float32" else 1e-2)]
        assert step.losses() == []
    difference = max((a - b).abs().max().item() for a, b in zip(usual.parameters(), model.parameters()))
    assert difference < (1e-5 if dtype == "float32" else 0.02)
    assert counted == counts() and all(n == 0 for n in counted)


def test_a_captured_loss_that_is_not_finite_is_named(monkeypatch):
    step = GraphStep.__new__(GraphStep)
    step.stream, step.values = NoStream(), [torch.tensor(1.0), torch.tensor(float("nan")), torch.tensor(2.0)]
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        step.losses()


# Interruption. A process is killed for real, so runs are trained in processes of their own: forked from one that has
# imported everything.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["dli.experiment.training"])


def train_apart(c: RunConfig, checkpoint_seconds: float, threads: int):
    m = pytest.MonkeyPatch()
    patch(m, "CHECKPOINT_SECONDS", checkpoint_seconds)
    patch(m, "save_pictures", no_pictures)
    torch.set_num_threads(threads)
    run(c, progress=False)


def start(c, checkpoint_seconds=0.0, threads=1):
    process = PROCESSES.Process(target=train_apart, args=(c, checkpoint_seconds, threads))
    process.start()
    return process


def outcome(c):
    "All that a finished run leaves, times left out."
    folder = run_folder(c)
    row = json.loads((folder / "row.json").read_text())
    row = {k: v for k, v in row.items() if not k.startswith("seconds") and k not in ("finished", "out")}
    assert not any((folder / name).exists() for name in (*CHECKPOINTS, "lock")) and not list(folder.glob("*.part"))
    curve = pd.read_csv(folder / "curve.csv").drop(columns="seconds").to_csv()
    return row, curve, *((folder / name).read_bytes() for name in ("counts.csv", "model.safetensors", "regions.npz"))


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
    whole, c = (config(steps=2, out=str(tmp_path / name)) for name in ("whole", "dies"))
    write = write_whole
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
    def stopping(state, *batch):
        if state.step + 1 == step:
            raise error
        advance(state, *batch)
    patch(monkeypatch, "advance", stopping)


def test_a_stopped_run_shows_what_it_has_and_continues(stopped, unstopped, monkeypatch):
    folder, steps = run_folder(stopped), []
    assert pd.read_csv(folder / "curve.csv")["step"].tolist() == [3]
    there = json.loads((folder / "config.json").read_text())
    assert there.pop("recipe") == RECIPE and RunConfig(**there) == stopped
    patch(monkeypatch, "advance", lambda state, *batch: (steps.append(state.step), advance(state, *batch)))
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
        message = f"{path.name} can't be read.*truncated.*delete it to start from the beginning"
        with pytest.raises(ValueError, match=message):
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


def test_samples_of_another_data_set_are_refused(tmp_path):
    c = config(out=str(tmp_path))
    train, val = run_samples(c)
    with pytest.raises(ValueError, match="the training samples are of 'magnetic-tiles', the config is of 'synthetic'"):
        fit(c, replace(train, source="magnetic-tiles"), val, progress=False)


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
    c, opened = config(out=str(tmp_path)), []

    def limited(path, mode):
        opened.append(path)
        return open(path if len(opened) <= writes else "/dev/full", mode)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(files, "open", limited, raising=False)
        with pytest.raises(OSError, match=r"No space left on device.*make room, then do the same again.*") as error:
            run(c, progress=False)
    assert error.value.errno == 28 and not list(run_folder(c).glob("*.part"))
    assert not (run_folder(c) / "row.json").exists()
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
    message = f"{run_key(c)}: another process is training this very run: wait for it, or end it"
    with pytest.raises(RuntimeError, match=message):
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
    for c in (again, other):
        run(c, progress=False)
    assert outcome(again) == unstopped and outcome(other)[3] != unstopped[3]


def test_no_global_generator_is_used(tmp_path):
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    run(config(out=str(tmp_path)), progress=False)
    assert torch.equal(before[0], torch.get_rng_state()) and before[2] == random.getstate()
    assert (before[1] == np.random.get_state()[1]).all()


def test_seam_probes_vary_as_the_data_set_says(monkeypatch):
    train, val = run_samples(config())
    given = []

    def watched(samples, transforms=None, **choices):
        given.append(transforms)
        return DonorPool(samples, transforms, **choices)

    monkeypatch.setattr("dli.experiment.evaluation.DonorPool", watched)
    with_patches(train, val, 0, 0.0, MAGNETIC_TILES)
    assert given == [MAGNETIC_TILES.transforms], "rows of the study were probed so"
