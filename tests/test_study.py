"""The study: stores believe only rows that fit; studies are the protocol's; the matrix survives kills and failures."""
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import torch
from dli import cli
from dli.files import locked, read_table, write_whole
from dli.data.magnetic import DownloadError
from dli.experiment.config import METHODS, PRESETS, RECIPE, Method, RunConfig, resolve, run_key, run_name
from dli.experiment.store import (FILES, RESULTS, load_runs, one_kind, one_recipe, publish, read_counts, row_config,
                                  run_folder, store_files)
from dli.experiment.evaluation import save_pictures
from dli.experiment.state import CHECKPOINTS
from dli.experiment.training import run
from dli.study.studies import LADDER, REPLICATION, STUDIES, configs_of, methods, missing, resolve_all, study_configs
from dli.study.matrix import (WORKER, Bar, FailedRuns, Worker, as_job, finished_runs, makespan, projected_cost,
                              projected_seconds, run_matrix, train_job)
from conftest import patch

ROOT = Path(__file__).resolve().parent.parent


def config(**kwargs):
    return resolve(RunConfig(**dict(preset="smoke", dataset="synthetic", weights=None, method="baseline") | kwargs))


def no_pictures(done, val, folder):
    pass


# Tests start workers that draw no pictures and leave a checkpoint after every step.
QUICK_WORKER = """
import dli.experiment.state, dli.experiment.training
from dli.study.matrix import work
dli.experiment.state.CHECKPOINT_SECONDS = 0
dli.experiment.training.save_pictures = lambda *args: None
work()
"""


@pytest.fixture(autouse=True)
def quick_workers(monkeypatch):
    patch(monkeypatch, "WORKER", QUICK_WORKER)
    patch(monkeypatch, "save_pictures", no_pictures)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    "A store of two runs that nobody changes."
    store = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as m:
        patch(m, "save_pictures", no_pictures)
        for method in ("baseline", "dli"):
            run(config(method=method, out=str(store)), progress=False)
    return store


@pytest.fixture
def store(trained, tmp_path):
    "A copy of it."
    return shutil.copytree(trained, tmp_path / "store")


def folder_of(store, method="baseline"):
    return next(store.glob(f"{method}-*"))


def silently(*stores, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_runs(*stores, **kwargs)


def rows_of(store):
    return {p.parent.name: p.read_bytes() for p in store.glob("*/row.json")}


# The store

def test_rows_are_loaded_as_they_were_stored(trained):
    runs = silently(trained)
    assert runs["method"].tolist() == ["baseline", "dli"]
    assert len(silently(trained, preset="smoke")) == 2 and len(silently(trained, preset="quick")) == 0
    for _, row in runs.iterrows():
        stored = json.loads((Path(row["folder"]) / "row.json").read_text())
        assert all(row[k] == v or v is None and pd.isna(row[k]) for k, v in stored.items() if k != "decoder")
        assert run_key(row_config(row)) == row["key"] and run_name(row_config(row)) == Path(row["folder"]).name
        assert len(read_counts(row)) == row["val_images"]


def test_an_empty_store_has_the_columns(tmp_path):
    runs = silently(tmp_path, tmp_path / "never made")
    assert len(runs) == 0 and {"key", "recipe", "method", "iou_macro", "folder"} <= set(runs)
    assert one_recipe(runs) is None


def test_the_committed_rows_are_whole():
    assert len(silently(ROOT / RESULTS)) == len(list((ROOT / RESULTS).glob("*/row.json")))


@dataclass(frozen=True)
class Later(RunConfig):
    "What `RunConfig` may become: a field with a default that changes nothing."
    ema: float = 0.0


def test_a_field_added_later_loses_no_row(store, monkeypatch):
    committed = silently(ROOT / RESULTS, store)
    patch(monkeypatch, "RunConfig", Later)
    runs = silently(ROOT / RESULTS, store)
    assert runs["key"].tolist() == committed["key"].tolist() and set(runs["ema"]) == {0.0} and len(runs) >= 2
    wanted = [Later(**asdict(row_config(row)) | dict(out=str(store))) for _, row in runs.iterrows()]
    assert missing(wanted, ROOT / RESULTS, store) == []
    assert len(missing([replace(c, ema=0.9) for c in wanted])) == len(wanted)
    change_row(folder_of(store), ema=0.0)
    assert len(silently(store)) == 2
    change_row(folder_of(store), ema=0.9)
    with pytest.warns(UserWarning, match="its key is"):
        load_runs(store)


def test_counts_are_read_once_and_again_once_they_changed(store, monkeypatch):
    folder, read, reads = folder_of(store), read_table, []
    patch(monkeypatch, "read_table", lambda path: reads.append(path) or read(path))
    first, again = read_counts(dict(folder=folder)), read_counts(dict(folder=folder))
    assert len(reads) == 1 and first.equals(again)
    first["tp_Break"] = -1  # a reader's changes are its own
    assert read_counts(dict(folder=folder)).equals(again)
    change_counts(folder, lambda c: c[1:])
    os.utime(folder / "counts.csv", ns=(1, 1))
    assert len(read_counts(dict(folder=folder))) == len(again) - 1


def test_a_matrix_is_never_filled_with_synthetic_rows_in_silence(monkeypatch):
    patch(monkeypatch, "find_magnetic_tiles", lambda: None)

    def no_network():
        raise DownloadError("no network")
    patch(monkeypatch, "fetch_magnetic_tiles", no_network)
    with pytest.raises(DownloadError, match="no network"):
        run_matrix([RunConfig(preset="smoke", dataset="auto")])


def change_row(folder, **changes):
    path = folder / "row.json"
    row = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in row.items() if v is not ...}))


def change_counts(folder, change):
    counts = pd.read_csv(folder / "counts.csv")
    change(counts).to_csv(folder / "counts.csv", index=False)


DAMAGES = {
    "truncated": (lambda f: (f / "row.json").write_bytes((f / "row.json").read_bytes()[:500]), "can't be read"),
    "empty": (lambda f: (f / "row.json").write_bytes(b""), "can't be read"),
    "not text": (lambda f: (f / "row.json").write_bytes(b"\xff\xfe\x00"), "can't be read"),
    "a list": (lambda f: (f / "row.json").write_text("[1]"), "expected a JSON object"),
    "no counts": (lambda f: (f / "counts.csv").unlink(), "counts.csv is missing"),
    "empty counts": (lambda f: (f / "counts.csv").write_text(""), ""),
    "fewer counts": (lambda f: change_counts(f, lambda c: c[1:]), "has 67 images, the row says 68"),
    "other counts": (lambda f: change_counts(f, lambda c: c.assign(fn_Break=c["fn_Break"] + 1)), "by counts.csv"),
    "no class in counts": (lambda f: change_counts(f, lambda c: c.drop(columns="fp_Fray")), "missing"),
    "a better score": (lambda f: change_row(f, iou_macro=0.99), "iou_macro is 0.99 in the row"),
    "no score": (lambda f: change_row(f, auroc_image=None), "auroc_image is None in the row"),
    "a score as text": (lambda f: change_row(f, iou_macro="0.1"), ""),
    "a field missing": (lambda f: change_row(f, source=...), "lacks source"),
    "an option missing": (lambda f: change_row(f, dice=...), "lacks dice"),
    "a score missing": (lambda f: change_row(f, iou_Fray=...), "lacks iou_Fray"),
    "a field too many": (lambda f: change_row(f, margins=2), "unknown fields margins"),
    "another seed": (lambda f: change_row(f, seed=3), "its key is"),
    "another fold": (lambda f: change_row(f, fold=3), "its key is"),
    "another key": (lambda f: change_row(f, key="0123456789"), "its key is 0123456789"),
    "an unknown method": (lambda f: change_row(f, method="dly"), "choose one of baseline"),
    "nonsense": (lambda f: change_row(f, steps={}), ""),
    "a recipe as text": (lambda f: change_row(f, recipe="two"), ""),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_broken_rows_are_named_skipped_and_left_alone(damage, store):
    spoil, message = DAMAGES[damage]
    spoil(folder_of(store))
    before = rows_of(store)
    with pytest.warns(UserWarning, match=f"{folder_of(store).name} is not counted: .*{message}"):
        runs = load_runs(store)
    assert runs["method"].tolist() == ["dli"] and rows_of(store) == before


@pytest.mark.parametrize("damage", ["truncated", "no counts", "a better score"])
@pytest.mark.filterwarnings("ignore:.*is not counted")
def test_broken_rows_are_missing_and_not_overwritten(damage, store):
    DAMAGES[damage][0](folder_of(store))
    before, c = rows_of(store), config(out=str(store))
    assert missing([c]) == [c]
    with pytest.raises(ValueError, match=DAMAGES[damage][1]):
        train_job(as_job(c))
    assert rows_of(store) == before


@given(st.integers(0, 2000), st.integers(0, 255))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_spoilt_byte_makes_another_row(trained, tmp_path, place, byte):
    "Whatever a byte is replaced by: the row is refused, or what identifies and scores it is what it was."
    folder, target = folder_of(trained), tmp_path / "spoilt" / "run"
    target.mkdir(parents=True, exist_ok=True)
    content = bytearray((folder / "row.json").read_bytes())
    content[place % len(content)] = byte
    (target / "row.json").write_bytes(content)
    shutil.copy(folder / "counts.csv", target)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runs = load_runs(tmp_path / "spoilt")
    if len(runs):
        assert row_config(runs.iloc[0]) == replace(config(), out=runs["out"][0])
        assert np.isclose(runs["iou_macro"][0], silently(trained)["iou_macro"][0], atol=1e-9)
        assert runs["key"][0] == run_key(config())


def test_foreign_folders_are_named_and_unfinished_runs_are_not(store):
    (store / "notes").mkdir()
    (store / ".ipynb_checkpoints").mkdir()
    (store / "run.ipynb").write_text("{}")
    (store / "under-way").mkdir()
    (store / "under-way" / "config.json").write_text("{}")
    with pytest.warns(UserWarning) as said:
        assert len(load_runs(store)) == 2
    assert [str(w.message).split(": ", 1)[1]
            for w in said] == ["neither a row.json nor a config.json: not the folder of a run"]
    assert "notes" in str(said[0].message)


def test_a_run_in_two_stores_counts_once(trained, store):
    change_row(folder_of(store), finished="2020-01-01", seconds_total=1.0)
    runs = silently(trained, store)
    assert len(runs) == 2 and set(runs["folder"].map(lambda f: Path(f).parent)) == {trained}
    assert set(silently(store, trained)["folder"].map(lambda f: Path(f).parent)) == {store}


def test_two_results_of_one_run_are_named(trained, store):
    change_row(folder_of(store), seam_alarm_poisson=0.123)
    with pytest.warns(UserWarning, match=f"{folder_of(store)} is not counted: {folder_of(trained)} has another result"):
        runs = load_runs(trained, store)
    assert len(runs) == 2 and 0.123 not in runs["seam_alarm_poisson"].tolist()


def test_recipes_are_not_mixed(trained, store):
    change_row(folder_of(store), recipe=RECIPE - 1, key="of another")
    runs = silently(store)
    assert len(runs) == 2 and one_recipe(silently(trained)) == RECIPE
    with pytest.raises(ValueError, match=f"1 of recipe {RECIPE - 1}, 1 of recipe {RECIPE}"):
        one_recipe(runs)


def test_rows_of_another_recipe_may_have_other_fields(store):
    change_row(folder_of(store), recipe=RECIPE - 1, fold=..., partition=..., device=..., another=1)
    assert len(silently(store)) == 2
    change_row(folder_of(store), key=...)
    with pytest.warns(UserWarning, match="it lacks key"):
        assert len(load_runs(store)) == 1


def test_devices_and_number_formats_are_not_mixed(trained):
    runs = silently(trained)
    assert one_kind(runs) == ("cpu", runs["dtype"][0]) and one_kind(runs[:0]) == (None, None)
    for name, values in dict(device=["cpu", "cuda"], dtype=["bfloat16", "float32"]).items():
        listed = f"1 of {name} {values[0]}, 1 of {name} {values[1]}"
        with pytest.raises(ValueError, match=f"rows of different {name}s are not compared: {listed}"):
            one_kind(runs.assign(**{name: values}))


# Publishing

def test_published_rows_are_small_and_the_same(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copies = publish(silently(trained))
    assert copies == [tmp_path / RESULTS / f.name for f in sorted(trained.iterdir())]
    assert all({p.name for p in f.iterdir()} == set(FILES) for f in copies)
    drop = dict(columns=["out", "folder", "decoder", "counts"])
    pd.testing.assert_frame_equal(silently().drop(**drop), silently(trained).drop(**drop))
    assert str(trained) not in "".join(p.read_text() for f in copies for p in f.glob("*.json"))  # no machine's paths
    before = {f: (f / "row.json").stat().st_mtime_ns for f in copies}
    assert publish([config(out=str(trained))]) == copies[:1] and publish(silently()) == copies
    assert before == {f: (f / "row.json").stat().st_mtime_ns for f in copies}


def test_another_result_is_never_overwritten(trained, tmp_path):
    publish(silently(trained), tmp_path)
    change_row(folder_of(tmp_path), seam_alarm_poisson=0.123)
    shutil.rmtree(folder_of(tmp_path, "dli"))
    with pytest.raises(FileExistsError, match=f"{folder_of(tmp_path)} holds another result"):
        publish(silently(trained), tmp_path)
    assert json.loads((folder_of(tmp_path) / "row.json").read_text())["seam_alarm_poisson"] == 0.123
    assert folder_of(tmp_path, "dli").is_dir()


def test_unfinished_and_broken_runs_are_not_published(store, tmp_path):
    with pytest.raises((ValueError, OSError)):
        publish([config(seed=4, out=str(store))], tmp_path / "results")
    change_row(folder_of(store), iou_macro=0.99)
    with pytest.raises(ValueError, match="0.99 in the row"):
        publish([config(out=str(store))], tmp_path / "results")
    (folder_of(store, "dli") / "regions.npz").unlink()
    with pytest.raises(ValueError, match="regions.npz is missing"):
        publish([config(method="dli", out=str(store))], tmp_path / "results")
    assert not rows_of(tmp_path / "results")


class Dies(BaseException):
    "A process that ends: nothing catches it."


def test_publishing_may_die_after_every_write(trained, tmp_path, monkeypatch):
    write, deaths, left = write_whole, 0, 0

    def write_or_die(path, content):
        nonlocal left
        if left == 0:
            raise Dies
        left -= 1
        write(path, content)
    patch(monkeypatch, "write_whole", write_or_die)
    while True:
        left = deaths
        try:
            publish(silently(trained), tmp_path)
        except Dies:
            deaths += 1
        else:
            break
        silently(tmp_path) # what is there is whole
    assert deaths == 2 * len(FILES) - 1 or deaths >= len(FILES)
    assert rows_of(tmp_path).keys() == rows_of(trained).keys() and len(silently(tmp_path)) == 2


# Studies

PROTOCOL = dict(table1="baseline focal balanced wce lovasz tversky dli dli-all", table2="dli-cutpaste dli-poisson dli",
                attribution="dli inject-random sampler share baseline", policy="dli dli-all",
                shortcut="baseline dli-cutpaste dli-poisson dli")
LITE = ["efficientnet_lite0"]


@pytest.mark.parametrize("name", PROTOCOL)
def test_methods_are_the_protocols(name):
    expected = [RunConfig(method=m, encoder="resnet18", fold=3, partition=2, preset="study")
                for m in PROTOCOL[name].split()]
    assert STUDIES[name]("study", ["resnet18"], [3], [2]) == expected


def test_weak_and_leakage_are_the_protocols():
    weak, leakage = (STUDIES[name]("paper", ["resnet18"], [0]) for name in ("weak", "leakage"))
    expected = set(itertools.product(["dli", "wce"], [0.1, 0.25, 0.5, 0.75, 1.0]))
    assert {(c.method, c.fraction) for c in weak} == expected and len(weak) == 10
    expected = set(itertools.product(["baseline", "wce", "dli"], ["tile", "image"]))
    assert {(c.method, c.split) for c in leakage} == expected
    assert len(leakage) == 6
    assert all(c.clean_validation for c in leakage), "the same clean tiles under both splits"


def test_the_replication_has_every_switch_of_the_authors_protocol():
    configs = STUDIES["replication"]("study", LITE, [1])
    assert [c.method for c in configs] == "baseline focal-authors balanced-authors wce dli-authors".split()
    assert all({k: getattr(c, k) for k in REPLICATION} == REPLICATION for c in configs)
    assert REPLICATION == dict(split="image", clean_validation=False, keep_empty=True, threshold=0, dice="batch",
                           select="best", evaluations=20)
    authors = configs[-1]
    assert (authors.fill, authors.region, authors.mix_gradients, authors.grow_label) == ("all", "image", True, True)


def test_noise_pairs_differ_in_the_training_seed_alone():
    configs = STUDIES["noise"]("study", LITE, [2, 3], [1])
    pairs = list(zip(configs[::2], configs[1::2]))
    expected = [(m, f, 1) for f in (2, 3) for m in ("baseline", "dli")]
    assert [(a.method, a.fold, a.partition) for a, _ in pairs] == expected
    assert all((a.seed, b.seed) == (5 + a.fold, 1000 + 5 + a.fold) and replace(b, seed=a.seed) == a for a, b in pairs)
    others = study_configs([name for name in STUDIES if name != "noise"], "study", LITE, [2, 3], [1])
    assert not {b for _, b in pairs} & set(others), "they enter no other study"


def test_the_ladder_changes_one_thing_a_rung():
    rungs = [asdict(RunConfig(**row)) for _, row in LADDER]
    changes = [{k for k in a if a[k] != b[k]} for a, b in itertools.pairwise(rungs)]
    assert changes == [{"method", "threshold"}, {"dice"}, {"region"}, {"grow_label"}, {"method", "mix_gradients"},
                       {"method", "fill"}, set()]
    assert rungs[0] == asdict(RunConfig(method="dli-authors")) and rungs[-1] == asdict(RunConfig())
    assert [RunConfig(preset="study", **row) for _, row in LADDER[:-1]] == STUDIES["ladder"]("study", LITE, [0])


def test_no_training_runs_twice_under_two_names():
    kept = [asdict(c) for c in study_configs(STUDIES, "study", LITE, [0]) if c.method in ("dli", "dli-all")]
    for a, b in itertools.combinations(kept, 2):
        assert a | dict(method="") != b | dict(method="")


@given(st.lists(st.sampled_from(list(STUDIES)), min_size=1, max_size=8, unique=True), st.permutations(range(3)),
       st.lists(st.integers(0, 3), min_size=1, max_size=2, unique=True),
       st.lists(st.sampled_from(["resnet18", "resnest50d"]), min_size=1, unique=True))
@settings(max_examples=40, deadline=None)
def test_studies_together(names, folds, partitions, encoders):
    together = study_configs(names, "smoke", encoders, folds, partitions)
    assert len({run_key(c) for c in together}) == len(together)
    assert set(together) == {c for name in names for c in STUDIES[name]("smoke", encoders, folds, partitions)}
    places = [(c.partition, c.fold) for c in together]
    expected = list(itertools.product(partitions, folds))
    assert list(dict.fromkeys(places)) == expected, "whole folds, partitions outermost"
    assert sum(a != b for a, b in itertools.pairwise(places)) == len(folds) * len(partitions) - 1


def test_unknown_studies_are_refused():
    with pytest.raises(ValueError, match="no study is called table3: choose among table1, table2"):
        study_configs(["table3"], "smoke", ["resnet18"])


def test_what_auto_means_is_decided_once(monkeypatch):
    asked = []

    def decide(name, fallback=True):
        asked.append((name, fallback))
        return "synthetic"
    monkeypatch.setattr("dli.study.studies.resolve_dataset", decide)
    resolved = resolve_all(RunConfig(preset="smoke", fold=f) for f in range(3))
    assert asked == [("auto", False)] and {c.dataset for c in resolved} == {"synthetic"}


# The matrix

def test_what_is_finished_is_not_repeated(trained, tmp_path, monkeypatch):
    patch(monkeypatch, "Worker", lambda *a: pytest.fail("a run was started"))
    configs = [config(method=m, out=str(trained)) for m in ("dli", "baseline", "dli")]
    assert run_matrix(configs, progress=False)["method"].tolist() == ["dli", "baseline"]
    monkeypatch.chdir(tmp_path)
    publish(silently(trained)) # committed rows count, wherever new ones would go
    elsewhere = [replace(c, out="new") for c in configs]
    assert missing(elsewhere) == [] and len(run_matrix(elsewhere, progress=False)) == 2
    assert missing(elsewhere, tmp_path / "new") == elsewhere


SOME_ARE_KILLED = """
import json, os, sys
signal = json.loads(sys.argv[1])[0]["seed"]
if signal:
    os.kill(os.getpid(), signal)
""" + QUICK_WORKER


def test_failures_stop_nobody_and_are_told_at_the_end(tmp_path, monkeypatch):
    patch(monkeypatch, "WORKER", SOME_ARE_KILLED)
    good, bad = config(out=str(tmp_path)), config(batch_size=4000, out=str(tmp_path))
    killed = [config(seed=s, out=str(tmp_path)) for s in (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP)]
    with pytest.raises(FailedRuns, match="4 runs failed, 1 have a row") as e:
        run_matrix([bad, *killed, good], jobs=2, progress=False)
    said = dict(e.value.failures)
    assert set(said) == {bad, *killed} and e.value.runs["key"].tolist() == [run_key(good)]
    assert "Traceback" in said[bad] and f"{run_name(bad)}: ValueError: batch_size=4000 is larger" in str(e.value)
    for c in killed:
        assert f"{run_name(c)}: the process ended with exit code -{c.seed}" in str(e.value)
    assert "-9 (killed; short of memory?)" in said[killed[0]]


def test_what_a_worker_printed_is_passed_on(tmp_path, monkeypatch, capsys):
    patch(monkeypatch, "WORKER", "import warnings; warnings.warn('disk almost full')")
    assert len(run_matrix([config(out=str(tmp_path))], progress=False)) == 0  # it did nothing
    assert "disk almost full" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [dict(engine="slurm"), dict(jobs=0), dict(jobs=-1), dict(threads=0)])
def test_wrong_arguments_are_refused(wrong):
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        run_matrix([], **wrong)


def test_so_many_at_a_time_and_in_order(tmp_path, monkeypatch):
    workers, others = [], []

    class Watched(Worker):
        def __init__(self, config, threads):
            others.append(sum(worker.poll() is None for worker in workers))
            super().__init__(config, threads)
            self.config = config
            workers.append(self)
    patch(monkeypatch, "WORKER", "import time; time.sleep(0.2)")
    patch(monkeypatch, "Worker", Watched)
    configs = [config(seed=s, out=str(tmp_path)) for s in range(5)]
    assert len(run_matrix(configs, jobs=2, progress=False)) == 0  # nobody did anything
    assert [worker.config for worker in workers] == configs and others[:2] == [0, 1] and max(others) == 1


def test_a_method_that_is_added_in_one_place_runs_and_has_rows(tmp_path, monkeypatch, capsys):
    "As outside of tests: by the worker that users have, with its number of threads."
    patch(monkeypatch, "WORKER", WORKER)
    monkeypatch.setitem(METHODS, "dli-mixed", Method(loss="focal", inject=dict(mix_gradients=True)))
    before = dict(os.environ)
    runs = run_matrix([config(method="dli-mixed", steps=1, out=str(tmp_path))], threads=2)
    assert silently(tmp_path)["method"].tolist() == ["dli-mixed"] and runs["mix_gradients"].tolist() == [True]
    assert runs["threads"].tolist() == [2] and dict(os.environ) == before
    assert "1 of 1 runs: 100%" in capsys.readouterr().err
    assert "dli-mixed" in {c.method for c in configs_of(methods("dli-mixed"), "smoke", ["resnet18"], [0])}


def test_a_bar_counts_steps_and_forgets_those_that_failed(tmp_path, capsys):
    done, half, failed = (config(seed=s, out=str(tmp_path)) for s in range(3))
    for c, step in ((half, 3), (failed, 3)):
        run_folder(c).mkdir()
        (run_folder(c) / "curve.csv").write_text(f"step,loss\n1,1\n{step},1\n")
    bar = Bar([done, half, failed], show=True)
    assert (bar.bar.n, bar.bar.total) == (6, 18)
    bar.end(done, failed=False)
    bar.end(failed, failed=True)
    assert (bar.bar.n, bar.bar.total) == (12, 15) and "2 of 3 runs, 1 failed" in bar.bar.desc
    (run_folder(half) / "curve.csv").write_text("step,loss\n5,1\n")
    bar.look([half])
    assert bar.bar.n == 14
    bar.bar.close()


# The matrix, interrupted

RUNNER = f"""
import json, signal, sys
import dli.study.matrix as matrix
from dli.experiment.config import RunConfig
matrix.WORKER = {QUICK_WORKER!r}
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
"""
RUN_CONFIGS = RUNNER + """
matrix.run_matrix([RunConfig(**given) for given in json.loads(sys.argv[1])], jobs=2, progress=False)
"""
MANY_STEPS = """
from dataclasses import replace
from dli.experiment.config import PRESETS
PRESETS["smoke"] = replace(PRESETS["smoke"], steps=5000)
"""
RUN_COMMAND = RUNNER + "from dli.cli import main; sys.exit(main(['study', *json.loads(sys.argv[1])]))"


def start_apart(code, argument, **kwargs):
    "A process with a process group of its own, as a shell gives to a command."
    environment = os.environ | dict(PYTHONPATH=str(ROOT))
    return subprocess.Popen([sys.executable, "-c", code, json.dumps(argument)], env=environment,
                            start_new_session=True, text=True, **kwargs)


def without_times(rows):
    return rows.drop(columns=[k for k in rows if k.startswith("seconds_")
                              or k in ("finished", "commit", "out", "folder", "decoder")])


def outcome(configs):
    "All that finished runs leave, times left out."
    rows = finished_runs(configs, *{c.out for c in configs}).set_index("key")
    for c in configs:
        pictures = {"curve.png", "predictions.png"}
        assert {p.name for p in run_folder(c).iterdir()} - pictures == {*FILES, "model.safetensors"}
    curves = [pd.read_csv(run_folder(c) / "curve.csv").drop(columns="seconds").to_csv() for c in configs]
    files = [(run_folder(c) / name).read_bytes() for c in configs for name in ("counts.csv", "model.safetensors")]
    regions = [np.load(run_folder(c) / "regions.npz")["regions"].tobytes() for c in configs]
    return without_times(rows).sort_index().to_json(), curves, files, regions


def place(configs, out):
    return [replace(c, out=str(out)) for c in configs]


def killed_at_random(begin, configs, kills, seconds, tmp_path):
    "Kill runners of the configs so often, each within `seconds`, and yield what the last runner of each store leaves."
    moments, left = random.Random(kills), kills
    for attempt in itertools.count():
        if not left:
            return
        own = place(configs, tmp_path / f"killed-{attempt}")
        while left and len(silently(own[0].out)) < len(own):
            ended = begin(own, moments.uniform(0, seconds))
            left -= not ended
        assert begin(own, None)
        yield outcome(own)


def wait_for(condition, seconds=180):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


def is_free(folder):
    "Whether no process trains in it."
    try:
        with locked(folder):
            return True
    except RuntimeError:
        return False


def has_checkpoint(folder, since=0.0):
    paths = [folder / name for name in CHECKPOINTS]
    return any(path.exists() and path.stat().st_mtime > since for path in paths)


def test_a_killed_matrix_leaves_no_worker_and_ends_as_if_it_had_not_been_killed(tmp_path):
    configs = [config(method=m, steps=20) for m in ("baseline", "dli")]
    for c in place(configs, tmp_path / "whole"):
        run(c, progress=False)
    own = place(configs, tmp_path / "killed")
    folders = [run_folder(c) for c in own]
    for kind in (signal.SIGKILL, signal.SIGTERM):
        began = time.time()
        process = start_apart(RUN_CONFIGS, [asdict(c) for c in own])
        wait_for(lambda: any(has_checkpoint(folder, began) for folder in folders))
        process.send_signal(kind)  # it alone: its workers find out
        assert process.wait() == -kind
        wait_for(lambda: all(map(is_free, folders)), seconds=20)
        assert not rows_of(tmp_path / "killed")
    run_matrix(own, jobs=2, progress=False)
    assert outcome(own) == outcome(place(configs, tmp_path / "whole"))


COMMAND = "import sys; from dli.cli import main; sys.exit(main(['study', *sys.argv[1:]]))"


def command(*args, **kwargs):
    environment = os.environ | dict(PYTHONPATH=str(ROOT))
    return subprocess.Popen([sys.executable, "-c", COMMAND, *map(str, args)], env=environment, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, start_new_session=True, **kwargs)


@pytest.mark.slow
def test_a_killed_command_ends_as_if_it_had_not_been(tmp_path):
    configs = [replace(c, dataset="synthetic") for c in study_configs(["table2"], "smoke", LITE, [0, 1])]

    def begin(own, seconds):
        process = command("table2", "--preset", "smoke", "--dataset", "synthetic", "--folds", 0, 1, "--jobs", 2,
                          "--out", own[0].out, cwd=tmp_path)
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return False
        assert process.returncode == 0, output
        return True
    began = time.perf_counter()
    assert begin(place(configs, tmp_path / "whole"), None)
    seconds, whole = time.perf_counter() - began, outcome(place(configs, tmp_path / "whole"))
    assert all(left == whole for left in killed_at_random(begin, configs, 10, seconds, tmp_path))


def test_ctrl_c_ends_the_workers_and_says_little(tmp_path):
    args = ["policy", "--preset", "smoke", "--dataset", "synthetic", "--folds", "0", "--jobs", "2", "--out",
            str(tmp_path / "runs")]
    process = start_apart(MANY_STEPS + RUN_COMMAND, args, stderr=subprocess.PIPE)
    runs = tmp_path / "runs"
    wait_for(lambda: len(list(runs.glob("*"))) == 2 and all(map(has_checkpoint, runs.iterdir())))
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 130 and "the same command continues" in errors
    assert "Traceback" not in errors and all(map(is_free, runs.iterdir()))


# The command

def main(words):
    return cli.main(["study", *words])


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = ["policy", "--preset", "smoke", "--dataset", "synthetic", "--folds", "0", "--jobs", "2"]
    assert main([*args, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "2 runs, 2 without a row" in printed
    assert all(f"{m}-efficientnet_lite0-smoke" in printed for m in ("dli", "dli-all"))
    assert "nothing was measured for efficientnet_lite0 at smoke" in printed
    assert not (tmp_path / "runs").exists()
    assert main([*args, "--publish"]) == 0
    assert "2 of 2 runs have a row" in capsys.readouterr().out and set(silently()["method"]) == {"dli", "dli-all"}
    assert main([*args, "--dry-run"]) == 0 and "2 runs, 0 without" in capsys.readouterr().out
    assert main(["attribution", *args[1:], "--dry-run"]) == 0
    assert "5 runs, 4 without a row" in (printed := capsys.readouterr().out) and "machine_hours" in printed


def test_the_commands_exit_code_tells_of_failures(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    patch(monkeypatch, "WORKER", "raise ValueError('a bad day')")
    assert main(["policy", "--preset", "smoke", "--dataset", "synthetic", "--folds", "0"]) == 1
    said = capsys.readouterr()
    assert said.err.count(": ValueError: a bad day") == 2 and "0 of 2 runs have a row" in said.out
    for wrong in (["table3"], [], ["table1", "--preset", "fast"], ["table1", "--encoders", "vgg"]):
        assert main(wrong) == 2


# What it costs

@given(st.lists(st.floats(0, 1e5), min_size=1, max_size=30), st.integers(1, 40))
def test_makespan_is_within_its_bounds(seconds, workers):
    total, longest = sum(seconds), max(seconds)
    assert max(longest, total / workers) <= makespan(seconds, workers) * (1 + 1e-9) + 1e-9
    assert makespan(seconds, workers) <= total / workers + longest + 1e-6
    assert makespan(seconds, 1) == pytest.approx(total)


def measured(**columns):
    row = asdict(config()) | dict(seconds_total=10.0, seconds_evaluations=4.0) | columns
    return pd.DataFrame([row])


def test_costs_are_steps_and_evaluations():
    rows = measured()  # six steps in 6 s, two evaluations in 4 s
    assert projected_seconds(config(), rows) == pytest.approx(10)
    assert projected_seconds(config(steps=600), rows) == pytest.approx(604)
    assert projected_seconds(config(method="dli"), rows) == pytest.approx(10)  # for want of its own
    both = pd.concat([rows, measured(method="dli", seconds_total=16.0)])
    assert projected_seconds(config(method="dli"), both) == pytest.approx(16)
    assert projected_seconds(config(), both) == pytest.approx(10)
    assert projected_seconds(config(encoder="resnet18"), both) is None
    assert projected_seconds(config(image_size=128), both) is None


def test_costs_by_number_of_machines():
    table = projected_cost([config(seed=s) for s in range(4)], measured(seconds_total=3600.0, seconds_evaluations=0.0),
                           machines=(1, 2, 3), jobs=2)
    assert table["hours"].tolist() == pytest.approx([2, 1, 1])
    assert table["machine_hours"].tolist() == pytest.approx([2, 2, 3])
    with pytest.raises(ValueError, match="nothing was measured for resnet18 at smoke: measure it"):
        projected_cost([config(encoder="resnet18")], measured())
    with pytest.raises(ValueError, match="-p preset smoke -p encoder resnet18 "):
        projected_cost([config(), config(encoder="resnet18")], measured())
    for wrong in (dict(jobs=0), dict(jobs=-1), dict(machines=(1, 0))):
        with pytest.raises(ValueError, match=r"=(0|-1): expected 1 or more"):
            projected_cost([config()], measured(), **wrong)


@pytest.mark.parametrize("wrong", ["--jobs=-1", "--jobs=0", "--threads=0"])
def test_no_command_takes_less_than_one_job_or_thread(wrong, capsys):
    for more in (["--dry-run"], []):
        assert main(["policy", "--preset", "smoke", "--dataset", "synthetic", "--folds", "0", wrong, *more]) == 2
        said = capsys.readouterr()
        assert said.err.startswith("dli study: ") and "expected 1 or more" in said.err and not said.out


# Ray

def test_without_ray_the_extra_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"ray is not installed; it comes with: pip install '.*\[ray\]'"):
        run_matrix([config(out=str(tmp_path))], engine="ray", progress=False)
    monkeypatch.chdir(tmp_path)
    command = ["policy", "--preset", "smoke", "--dataset", "synthetic", "--folds", "0", "--engine", "ray"]
    assert main(command) == 2 and "[ray]" in capsys.readouterr().err


class NoCluster:
    "What `run_ray` uses of Ray, without Ray: a task is done here when its result is asked for."
    class exceptions:
        RayError = ArithmeticError

    is_initialized = staticmethod(lambda: True)
    cluster_resources = staticmethod(dict)
    wait = staticmethod(lambda tasks, num_returns: (tasks[:num_returns], tasks[num_returns:]))

    @staticmethod
    def get_runtime_context():
        return SimpleNamespace(get_node_id=lambda: f"here-{os.getpid()}")

    @staticmethod
    def remote(**options):
        return lambda function: SimpleNamespace(remote=lambda *args: (function, args))

    @staticmethod
    def get(task):
        function, args = task
        try:
            return function(*args)
        except ValueError as e:
            raise ArithmeticError(f"Traceback of the node\nValueError: {e}") from e


def test_files_of_tasks_arrive_in_the_store(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", NoCluster)
    good, bad = config(out=str(tmp_path)), config(batch_size=4000, out=str(tmp_path))
    with pytest.raises(FailedRuns, match=f"1 runs failed, 1 have a row:\n{run_name(bad)}: ValueError: batch_size") as e:
        run_matrix([bad, good], engine="ray", progress=False)
    assert e.value.runs["out"].tolist() == [str(tmp_path)]
    assert {p.name for p in run_folder(good).iterdir()} == set(FILES)
    node = Path(tempfile.gettempdir()) / f"dli-here-{os.getpid()}"
    assert not (node / run_name(good)).exists(), "the node keeps nothing"
    shutil.rmtree(node)


@pytest.fixture
def two_nodes(monkeypatch):
    "A Ray cluster of two nodes on this machine, one core each: the ids of its nodes, and how to kill the second."
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster
    cluster = Cluster(initialize_head=True, connect=True, head_node_args=dict(num_cpus=1))
    head = ray.nodes()[0]["NodeID"]
    second = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    other = next(node["NodeID"] for node in ray.nodes() if node["NodeID"] != head)
    yield head, other, lambda: cluster.remove_node(second, allow_graceful=False)
    ray.shutdown()
    cluster.shutdown()


def at_work(node):
    "Folders of the runs that a node is at."
    return list((Path(tempfile.gettempdir()) / f"dli-{node}").glob("*"))


@pytest.mark.slow
@pytest.mark.parametrize("kill", [False, True])
def test_ray_on_two_nodes(kill, tmp_path, two_nodes, monkeypatch):
    """All rows arrive, none twice, and they are those of this machine alone; also when a node is killed in the middle
    of a run."""
    head, other, kill_other = two_nodes
    configs = [config(method=m, seed=s, steps=30) for s in (0, 1) for m in ("baseline", "dli")]
    arrived, seen, store_files, began = [], {head: set(), other: set()}, store_files, time.perf_counter()
    say = lambda *what: print(f"{time.perf_counter() - began:6.1f} s", *what)

    def noted(folder, files):
        arrived.append(folder.name)
        say("arrived:", folder.name)
        store_files(folder, files)
    patch(monkeypatch, "store_files", noted)

    def watch():
        killed = False
        while not stop.wait(0.05):
            for node in (head, other):
                seen[node] |= {folder.name for folder in at_work(node)}
            if kill and not killed and any((folder / "curve.csv").exists() for folder in at_work(other)):
                say("the second node is killed while at", *(folder.name for folder in at_work(other)))
                killed = kill_other() or True
    stop, watcher = threading.Event(), threading.Thread(target=watch)
    watcher.start()
    try:
        runs = run_matrix(place(configs, tmp_path / "ray"), engine="ray", progress=False)
    finally:
        stop.set(), watcher.join()
    for name, node in (("first", head), ("second", other)):
        say(f"the {name} node was at:", *sorted(seen[node]))
    assert sorted(arrived) == sorted(run_name(c) for c in configs) and seen[head] and seen[other]
    assert runs["key"].tolist() == [run_key(c) for c in configs] and len(silently(tmp_path / "ray")) == 4
    if kill:
        assert seen[head] & seen[other], "the killed node's run was done again by the other"
    alone = run_matrix(place(configs, tmp_path / "local"), jobs=2, progress=False)
    pd.testing.assert_frame_equal(without_times(runs), without_times(alone))


def test_wrong_arguments_end_in_a_sentence(capsys):
    assert main(["table2", "--folds", "7", "--dataset", "synthetic", "--dry-run"]) == 2
    assert "fold=7: expected a number from 0 to 4" in capsys.readouterr().err


def test_output_that_nobody_reads_to_its_end_is_no_error():
    args = ["all", "--preset", "smoke", "--dataset", "synthetic", "--dry-run"]
    process = subprocess.Popen([sys.executable, "-u", "-c", COMMAND, *args], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    assert "Traceback" not in process.stderr.read() and process.wait() == 0
