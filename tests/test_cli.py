"The command line: every command, what it says when it fails, and what it leaves."
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from PIL import Image
from typer.main import get_command
from typer.testing import CliRunner

from dli import cli
from dli.data.synthetic import synthetic_tiles
from dli.experiment.config import RunConfig
from dli.scoring.metrics import Comparison
from dli.study.parts import PartsAnswer, answer_text, time_text

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ("data", "init", "check", "preview", "train", "evaluate", "threshold", "predict", "export", "score", "study")
SMOKE = ("--preset", "smoke", "--quiet")


def dli(*words):
    "The command in this process; its output holds both streams."
    return CliRunner().invoke(cli.app, [str(w) for w in words], prog_name="dli")


def heed_ctrl_c():
    "A job in a shell's background ignores Ctrl-C, and hands that down."
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(*words, **options):
    "The command in a process of its own."
    environment = os.environ | dict(PYTHONPATH=str(ROOT))
    return subprocess.Popen([sys.executable, "-m", "dli", *map(str, words)], env=environment, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, preexec_fn=heed_ctrl_c, **options)


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    "A folder of 90 photographs with a data file."
    root = tmp_path_factory.mktemp("own")
    tiles = synthetic_tiles(n=90, size=64, seed=3)
    for kind, arrays in (("images", tiles.images), ("masks", tiles.masks)):
        (root / kind).mkdir()
        for name, array in zip(tiles.table["name"], arrays):
            Image.fromarray(array).save(root / kind / f"{name}.png")
    lines = f"layout: index\nclasses: {list(tiles.classes)}\npart: '^synthetic_(\\d+)_'\nsize: 64\n"
    (root / "parts.yaml").write_text(lines)
    return root


@pytest.fixture(scope="module")
def trained(own, tmp_path_factory) -> Path:
    "A folder with one run on these photographs."
    out = tmp_path_factory.mktemp("runs")
    done = dli("train", own, "--out", out, *SMOKE)
    assert done.exit_code == 0, done.output
    return out


# ---- help ------------------------------------------------------------------------------------------------------------

def test_every_command_is_listed():
    done = dli("--help")
    assert done.exit_code == 0
    listed = re.findall(r"^  (\w+)  ", done.output.partition("Commands:")[2], re.MULTILINE)
    assert sorted(listed) == sorted(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_ends_with_an_example_that_parses(name):
    done = dli(name, "--help")
    assert done.exit_code == 0 and "--quiet" in done.output
    example = " ".join(done.output.partition("Example: dli ")[2].split())
    own, *words = shlex.split(example)
    assert own == name
    group = get_command(cli.app)
    command = group.commands[name]
    context = command.make_context(name, words)
    assert all(context.params[p.name] is not None for p in command.params if p.required)


def test_options_of_train_are_the_fields_of_a_config():
    options = set(cli.field_help())
    assert options | set(cli.FIXED) == {f.name for f in fields(RunConfig)}
    text = dli("train", "--help").output
    assert all(f"--{name.replace('_', '-')}" in text for name in options)


def test_the_help_loads_nothing_heavy():
    code = ("import sys; from dli.cli import main; main(['--help']); "
            "print('HEAVY', *[m for m in ('torch', 'pandas', 'numpy', 'matplotlib', 'cv2') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.splitlines()[-1].split() == ["HEAVY"]


# ---- errors ----------------------------------------------------------------------------------------------------------

WRONG = [("nothing",), ("train",), ("train", "synthetic", "--steps", "many"), ("train", "synthetic", "--method", "x"),
         ("train", "synthetic", "--folds", "7"), ("train", "synthetic", "--fold", "1", "--folds", "0"),
         ("train", "synthetic", "--log", "paper"), ("evaluate", "runs", "--part", "half"),
         ("threshold", "runs", "--max-clean-alarm", "2"), ("score", "masks", "--split", "random"),
         ("study", "table1", "--folds", "9"), ("study", "table1", "--steps", "5"), ("study", "table9"),
         ("predict", "runs", "photographs"), ("export", "runs", "model.txt")]


@pytest.mark.parametrize("words", WRONG, ids=" ".join)
def test_a_wrong_command_line_ends_in_a_sentence(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = dli(*words)
    assert done.exit_code == 2 and "Traceback" not in done.output and done.output.strip()
    assert list(tmp_path.iterdir()) == []


BAD = [("check", "nowhere"), ("check", "bad.yaml"), ("train", "bad.yaml"), ("preview", "nowhere"),
       ("evaluate", "nowhere"), ("threshold", "nowhere"), ("predict", "nowhere", "images", "--out", "out"),
       ("export", "nowhere", "model.onnx"), ("score", "nowhere", "--data", "bad.yaml"), ("init", "nowhere"),
       ("study", "bad.yaml")]


@pytest.mark.parametrize("words", BAD, ids=" ".join)
def test_bad_data_end_in_a_sentence(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text("layout: index\n")
    done = dli(*words)
    assert done.exit_code == 1 and "Traceback" not in done.output
    assert done.output.startswith(f"dli {words[0]}: ") and len(done.output.splitlines()) < 4


def test_a_fault_of_the_program_is_not_hidden(monkeypatch, tmp_path):
    monkeypatch.setattr("dli.data.check.check_folder", lambda *a, **k: {}["a fault"])
    assert isinstance(dli("check", tmp_path).exception, KeyError)


def test_warnings_are_sentences(monkeypatch, own):
    import warnings

    from dli.data.check import check_folder

    def warned(*args, **options):
        warnings.warn("mind the gap", stacklevel=2)
        warnings.warn("soon gone", FutureWarning, stacklevel=2)
        return check_folder(*args, **options)
    monkeypatch.setattr("dli.data.check.check_folder", warned)
    done = dli("check", own)
    assert "warning: mind the gap\n" in done.output and "soon gone" not in done.output


# ---- values ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("words, spelled", [
    ("a --folds 0 1 2", "a --folds 0 --folds 1 --folds 2"), ("--folds 0 1 a", "--folds 0 --folds 1 a"),
    ("--folds all a", "--folds all a"), ("--encoders x y --folds 1", "--encoders x --encoders y --folds 1"),
    ("--out 3 4", "--out 3 4")])
def test_an_option_may_have_several_values(words, spelled):
    assert cli.repeated(words.split(), {"--folds"}, {"--encoders"}) == spelled.split()


def test_values_are_read_as_the_field_says():
    found = cli.field_values(dict(method="dli", steps="20", lr="1e-3", weights="none", decoder="64,32", seed=None,
                                  keep_empty=True))
    assert found == dict(method="dli", steps=20, lr=1e-3, weights=None, decoder=(64, 32), keep_empty=True)


# ---- commands --------------------------------------------------------------------------------------------------------

def test_check_reports_and_writes_only_what_is_asked_for(own, tmp_path):
    before = sorted(own.rglob("*"))
    done = dli("check", own, "--html", tmp_path / "check.html")
    assert done.exit_code == 0 and "Ready to train." in done.output
    assert "data:image/png" in (tmp_path / "check.html").read_text()
    assert json.loads(dli("check", own, "--json").output)["ok"]
    assert dli("check", own, "--quiet").output == "" and sorted(own.rglob("*")) == before


def test_check_writes_parts_in_which_copies_share_one(own, tmp_path):
    photographs = tmp_path / "photographs"
    shutil.copytree(own, photographs)
    first = sorted((photographs / "images").iterdir())[0].name
    for kind in ("images", "masks"):
        shutil.copy(photographs / kind / first, photographs / kind / "synthetic_9999_copy.png")
    done = dli("check", photographs, "--parts", tmp_path / "parts.csv")
    assert "equal" in done.output
    parts = pd.read_csv(tmp_path / "parts.csv", dtype=str).set_index("name")["part"]
    assert parts["synthetic_9999_copy"] == parts[first.removesuffix(".png")]
    shutil.copy(tmp_path / "parts.csv", photographs / "parts.csv")
    text = (photographs / "parts.yaml").read_text()
    (photographs / "parts.yaml").write_text(text.replace("part: '^synthetic_(\\d+)_'", "part: part"))
    again = dli("check", photographs)
    assert again.exit_code == 0 and "equal" not in again.output


def test_check_says_when_training_would_break(own, tmp_path):
    text = (own / "parts.yaml").read_text()
    (tmp_path / "parts.yaml").write_text(f"root: {own}\n" + text.replace("['Blowhole'", "['Scratch', 'Blowhole'"))
    done = dli("check", tmp_path)
    assert done.exit_code == 1 and "Mend the problems" in done.output


def outside(text):
    "Whether a page names something outside itself; its pictures, which are base64, may hold any four letters."
    return "http" in re.sub("base64,[A-Za-z0-9+/=]*", "", text)


def test_preview_is_one_page(own, tmp_path):
    done = dli("preview", own, "--out", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert done.exit_code == 0 and "wrote" in done.output
    assert text.count("data:image/png") == 3 + 5 and not outside(text) and "hardly see" in text


def test_train_leaves_a_model_and_a_report(trained):
    (folder,) = trained.iterdir()
    assert {"model.safetensors", "row.json", "report.html"} <= {p.name for p in folder.iterdir()}
    text = (folder / "report.html").read_text()
    assert "Validation parts" in text and text.count("data:image/png") == 2 and not outside(text)


def test_a_finished_run_is_not_repeated_and_more_steps_say_what_to_do(own, trained):
    (folder,) = trained.iterdir()
    before = (folder / "row.json").read_bytes()
    done = dli("train", own, "--out", trained, "--preset", "smoke")
    assert done.exit_code == 0 and (folder / "row.json").read_bytes() == before
    again = dli("train", own, "--out", trained, "--steps", 7, "--log", "mlflow", *SMOKE)
    assert "is finished after 6 steps" in again.output and "--weights" in again.output
    assert again.exit_code == 2 and "pip install mlflow" in again.output


def test_the_curve_is_logged(own, tmp_path, monkeypatch):
    heard, active = [], []

    @contextmanager
    def start_run(run_name):
        active.append(run_name)
        yield
        active.pop()
    mlflow = SimpleNamespace(active_run=lambda: active[-1] if active else None, start_run=start_run,
                             log_metrics=lambda m, step: heard.append((active[-1], step, m)))
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    done = dli("train", own, "--out", tmp_path, "--log", "mlflow", "--method", "baseline", "--folds", "0", "1", *SMOKE)
    assert done.exit_code == 0, done.output
    assert [step for _, step, _ in heard] == [3, 6, 3, 6] and all("loss" in m for *_, m in heard)
    names = {path.name for path in tmp_path.iterdir()}
    assert {name for name, *_ in heard} == names and len(names) == 2  # each fold logs to a run of its own


def test_predict_writes_masks_and_names_a_broken_file(own, trained, tmp_path):
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    for path in sorted((own / "images").iterdir())[:3]:
        (photographs / path.name).write_bytes(path.read_bytes())
    assert dli("predict", trained, photographs, "--out", tmp_path / "good", "--quiet").exit_code == 0
    (photographs / "broken.png").write_bytes(b"half a file")
    done = dli("predict", trained, photographs, "--out", tmp_path / "out", "--overlays")
    assert done.exit_code == 1 and "1 unreadable" in done.output
    assert len(list((tmp_path / "out" / "masks").glob("*.png"))) == 3 and (tmp_path / "out" / "defects.csv").is_file()


def test_evaluate_and_threshold_a_model(own, trained, tmp_path):
    done = dli("evaluate", trained, "--html", tmp_path / "page.html")
    assert done.exit_code == 0, done.output
    assert "Blowhole" in done.output and "data:image" in (tmp_path / "page.html").read_text()
    assert isinstance(json.loads(dli("evaluate", trained, own, "--part", "all", "--json").output), dict)
    done = dli("threshold", trained, "--max-clean-alarm", "0.1")
    assert done.exit_code == 0 and "Blowhole" in done.output
    assert dli("evaluate", trained, "--quiet").output == ""


def test_export_writes_an_onnx_file(own, trained, tmp_path):
    pytest.importorskip("onnxruntime")
    done = dli("export", trained, tmp_path / "model.onnx")
    assert done.exit_code == 0 and (tmp_path / "model.onnx").stat().st_size > 10**5, done.output


def test_init_writes_a_data_file_once(own, tmp_path):
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
        for path in (own / kind).iterdir():
            (tmp_path / kind / path.name).write_bytes(path.read_bytes())
    done = dli("init", tmp_path)
    assert done.exit_code == 0 and "layout: index" in (tmp_path / "parts.yaml").read_text(), done.output
    again = dli("init", tmp_path)
    assert again.exit_code == 2 and "is there already" in again.output


# ---- a study of one's own parts --------------------------------------------------------------------------------------

STUDY = ("--preset", "smoke", "--steps", 6, "--folds", 0, "--jobs", 2, "--out")


def test_a_study_of_own_parts_says_the_time_before_it_trains(own, tmp_path):
    done = dli("study", own, *STUDY, tmp_path, "--dry-run")
    assert done.exit_code == 0 and re.search(r"3 runs of 6 steps: .*; 0 are finished. .* about \d+", done.output)
    assert "None" not in done.output
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_study_of_own_parts_answers_and_reads_its_rows_again(own, tmp_path):
    done = dli("study", own, *STUDY, tmp_path)
    assert done.exit_code == 0, done.output
    assert done.output.count("95 % interval by part") == 2 and len(list(tmp_path.iterdir())) == 3
    intervals = re.findall(r"95 % interval by part: [^)]*", done.output)
    again = dli("study", own, *STUDY, tmp_path)
    assert "3 are finished." in again.output and re.findall(r"95 % interval by part: [^)]*", again.output) == intervals


@pytest.mark.parametrize("name, low, high, verdict", [
    ("baseline", 0.01, 0.1, "Training with injection is better: "), ("share", 0.01, 0.1, "Injection itself helps: "),
    ("baseline", -0.1, -0.01, "Training with injection is worse: "), ("share", -0.1, -0.01, "Injection itself harms: "),
    ("baseline", -0.1, 0.1, "It is not shown that training with injection is better: "),
    ("share", -0.1, 0.1, "It is not shown that injection itself helps: ")])
def test_the_answer_follows_the_interval(name, low, high, verdict):
    found = Comparison((low + high) / 2, low, high, (), tiles=30)
    assert answer_text(name, found).startswith(verdict)
    few = PartsAnswer(pd.DataFrame(), dict(share=Comparison(0.0, low, high, (), tiles=3)))
    assert "rough" in str(few)


def test_durations_are_said_as_one_says_them():
    assert [time_text(s) for s in (0.2, 80, 100, 7200)] == ["1 seconds", "80 seconds", "2 minutes", "2.0 hours"]


# ---- processes -------------------------------------------------------------------------------------------------------

def test_ctrl_c_leaves_what_is_finished(own, tmp_path):
    process = start("train", own, "--preset", "smoke", "--steps", 5000, "--evaluations", 20, "--out", tmp_path)
    end = time.monotonic() + 300
    while not list(tmp_path.glob("*/checkpoint-*")) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and "the same command continues" in errors and "Traceback" not in errors
    assert list(tmp_path.glob("*/checkpoint-*"))


def test_output_that_nobody_reads_is_no_error(own):
    process = start("check", own)
    process.stdout.close()
    assert "Traceback" not in process.stderr.read() and process.wait() == 0


def test_a_warning_is_said_once(capsys):
    warned = cli.Warned()
    for text in ("no part", "no part", "too few"):
        warned(UserWarning(text), UserWarning, "x.py", 1)
    warned(DeprecationWarning("old"), DeprecationWarning, "x.py", 1)
    assert capsys.readouterr().err == "warning: no part\nwarning: too few\n"
