"""Figures: tables agree with the metrics they quote, choose rows and images by rule, refuse what can't be compared; notebooks draw every artifact."""
import json
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import papermill
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from dli import figures, training
from dli.data import load_dataset, split_samples
from dli.figures import (admissible_text, best_competitor, budget_line, chosen_images, difference, fold_counts, matching, notebook_runs, one_budget, printed_of,
                         printed_values, read_regions, readable, save_artifact, seeds_text, study_runs, summary, table1, table1_methods, table2)
from dli.losses import one_hot
from dli.metrics import compare, count_batch, counts_table, scores
from dli.study import LADDER, STUDIES, load_runs, read_counts, study_configs
from dli.training import METHODS, RECIPE, RunConfig, as_npz, run, run_key, run_name

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = load_dataset("synthetic", size=64)


def invent(store: Path, missed=0.2, **choices) -> None:
    "Leave what a run leaves; its predictions are the truth, missing in some images."
    config = RunConfig(**dict(preset="smoke", dataset="synthetic") | choices)
    folder = store / run_name(config)
    if (folder / "row.json").exists(): return
    _, val = split_samples(SAMPLES, protocol=config.split, seed=config.seed)
    regions = one_hot(torch.from_numpy(val.masks), 5).numpy().astype(bool)
    regions[np.random.default_rng(config.seed).random(len(val)) < missed] = False
    regions = np.roll(regions, 1, axis=-1)
    counts = counts_table(val.table, count_batch(torch.from_numpy(regions).float() * 10 - 5, torch.from_numpy(val.masks)), val.classes)
    row = asdict(config) | dict(key=run_key(config), recipe=RECIPE, source="synthetic", **scores(counts, val.classes), seam_alarm_cutpaste=0.5, seam_alarm_poisson=0.2,
                                best_iou_macro_selected_on_val=0.9, **{f"train_iou_{c}": 0.6 for c in val.classes})
    folder.mkdir(parents=True)
    counts.to_csv(folder / "counts.csv", index=False)
    (folder / "regions.npz").write_bytes(as_npz(name=counts["name"].to_numpy(str), regions=np.packbits(regions, axis=-1)))
    (folder / "row.json").write_text(json.dumps(row))


def invent_studies(store, encoders=("efficientnet_lite0",), seeds=(0,), studies=tuple(STUDIES)):
    "Rows of studies; methods that inject miss less."
    for c in study_configs(studies, "smoke", encoders, seeds):
        choices = {k: v for k, v in asdict(c).items() if k != "dataset"}
        invent(store, missed=(0.1 if METHODS[c.method].inject is not None else 0.3) + 0.3 * (1 - c.fraction), **choices)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    "All studies, one encoder and one seed."
    store = tmp_path_factory.mktemp("one")
    invent_studies(store)
    return load_runs(store)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    "Some studies, two encoders and two seeds."
    store = tmp_path_factory.mktemp("four")
    invent_studies(store, ("efficientnet_lite0", "resnet18"), (0, 1), ("policy", "leakage", "shortcut"))
    return load_runs(store)


def caption_of(artifact) -> str:
    return artifact._supxlabel.get_text() if isinstance(artifact, Figure) else artifact.attrs["caption"]


DRAWN = ["table1", "table1_differences", "fig3_iou_per_class", "table3_iou_per_class", "table2", "table5_weak_supervision", "fig5_weak_supervision", "leakage_table",
         "leakage_figure", "attribution_table", "attribution_figure", "policy_table", "policy_figure", "shortcut_table", "shortcut_figure", "ladder_table", "ladder_figure"]
WITH_PHOTOGRAPHS = ["fig4_qualitative", "fig6_weak_qualitative", "fig7_ablation_qualitative"]


SEVERAL = ["table1", "fig3_iou_per_class", "leakage_figure", "attribution_figure", "shortcut_figure", "fig7_ablation_qualitative"]


@pytest.mark.parametrize("rows,name", [("one", n) for n in DRAWN + WITH_PHOTOGRAPHS] + [("four", n) for n in SEVERAL])
def test_everything_is_drawn_whatever_is_there_and_says_from_what(rows, name, request):
    artifact = getattr(figures, name)(request.getfixturevalue(rows), *([SAMPLES] if name in WITH_PHOTOGRAPHS else []))
    text = " ".join(caption_of(artifact).split())
    assert "SYNTHETIC" in text and "reduced budget (smoke: 64 px, 6 steps of 8 images)" in text and f"recipe {RECIPE}" in text
    assert "seed 0;" in text if rows == "one" else "seeds 0, 1;" in text
    if isinstance(artifact, Figure): artifact.draw_without_rendering()
    else: assert len(artifact) and not readable(artifact).isin(["nan", "None", "<NA>"]).any(axis=None)


@pytest.mark.parametrize("name", ["dataset_numbers", "fig2_histogram", "fig1_pipeline", "fig8_blends"])
def test_the_data_is_drawn(name):
    train, _ = split_samples(SAMPLES)
    artifact = getattr(figures, name)(SAMPLES if name in ("dataset_numbers", "fig2_histogram") else train)
    assert "SYNTHETIC" in caption_of(artifact)


def test_printed_values_are_the_papers():
    printed = printed_values("table1")
    cells = [(r["value"], r["std"]) == printed_of("table1", r["row"], {"l-ResNest50d": "resnest50d", "l-ResNet18": "resnet18", "l-MobileoneS1": "mobileone_s1", "Avg": "average"}[r["column"]])
             for _, r in printed.iterrows()]
    assert len(cells) == 20 and all(cells)
    with pytest.raises(ValueError, match="prints numbers for table1, table2"): printed_values("table9")


def test_table1_quotes_the_metrics(four):
    table = table1(four).set_index(["encoder", "method"])
    own = {m: matching(four[four["encoder"] == "resnet18"], method=m) for m in ("dli", "wce")}
    counts = {m: [read_counts(r) for _, r in rows.iterrows()] for m, rows in own.items()}
    result, line = compare(counts["dli"], counts["wce"], SAMPLES.classes), table.loc[("resnet18", "wce")]
    assert (line["dli_minus"], line["dli_minus_low"], line["dli_minus_high"]) == (result.difference, result.low, result.high)
    pooled = scores(pd.concat(counts["wce"]), SAMPLES.classes)
    assert line["iou_macro"] == pooled["iou_macro"] and line["clean_alarm"] == pooled["clean_alarm"]
    assert line["iou_micro_mean"] == pytest.approx(own["wce"]["iou_micro"].mean()) and line["iou_micro_mean_deviation"] == pytest.approx(own["wce"]["iou_micro"].std())
    assert (line["printed"], line["printed_deviation"], line["printed_avg"]) == (0.741, 0.016, 0.755)
    assert table.loc[("average", "wce"), "iou_macro"] == pytest.approx(table.loc[[("resnet18", "wce"), ("efficientnet_lite0", "wce")], "iou_macro"].mean())
    assert table.loc[("average", "wce"), "printed"] == 0.755 and math.isnan(table.loc[("efficientnet_lite0", "wce"), "printed"])
    assert math.isnan(table.loc[("resnet18", "dli"), "dli_minus"])


def test_one_seed_has_no_deviation(one):
    text = readable(table1(one)).set_index("method")
    assert text.loc["wce", "iou_macro_mean"] == f"{table1(one).set_index('method').loc['wce', 'iou_macro']:.3f}" and text.loc["wce", "dli_minus"].startswith("+") and text.loc["wce", "folds"] == "1"
    assert text.loc["tversky", "printed_avg"] == "-"


def test_methods_without_a_common_fold_are_not_compared(four):
    dli, wce = (matching(four[four["encoder"] == "resnet18"], method=m) for m in ("dli", "wce"))
    assert difference(dli[dli["seed"] == 0], wce[wce["seed"] == 1]) is None
    assert len(difference(dli, wce[wce["seed"] == 1]).folds) == 1
    apart = pd.concat([dli[dli["seed"] == 0], wce[wce["seed"] == 1]])
    assert readable(table1(apart)).set_index("method").loc["wce", "dli_minus"] == "-"


def test_splits_are_compared_only_on_the_same_images(one, tmp_path):
    image, tile = (matching(one, method="dli", split=s) for s in ("image", "tile"))
    assert difference(image, tile) is None
    for seed in range(5):
        for split in ("image", "tile"): invent(tmp_path, method="dli", split=split, seed=seed, missed=0.1 if split == "image" else 0.4)
    runs = load_runs(tmp_path)
    result = difference(*(matching(runs, method="dli", split=s) for s in ("image", "tile")))
    assert result.difference > 0 and result.tiles == SAMPLES.table[~SAMPLES.clean]["tile"].nunique()
    assert figures.leakage_table(runs)["leak_low"].notna().tolist()[0]


def test_variants_are_not_taken_for_the_method(one):
    assert len(matching(one, method="dli")) == len(matching(one, method="dli", fraction=0.25)) == len(matching(one, method="dli", split="image")) == 1
    rungs = [matching(one, **changes) for _, changes in LADDER]
    assert all(len(rows) == 1 for rows in rungs)
    assert len(one[one["method"] == "dli"]) > 5


def test_a_new_method_appears_in_table_and_figure(tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "novel", replace(METHODS["dli"]))
    for method in ("baseline", "wce", "dli", "novel"): invent(tmp_path, method=method)
    runs = load_runs(tmp_path)
    assert table1_methods(runs) == ["baseline", "wce", "dli", "novel"] and "novel" in table1(runs)["method"].tolist()
    assert "novel" in [t.get_text() for t in figures.fig3_iou_per_class(runs).axes[0].get_yticklabels()]


@pytest.mark.parametrize("name,value", [("recipe", RECIPE - 1), ("steps", 7), ("source", "magnetic-tiles"), ("image_size", 128), ("weights", "a file")])
def test_rows_of_two_kinds_are_refused(one, name, value):
    mixed = one.copy()
    mixed.loc[matching(one, method="dli").index, name] = value
    for draw in (table1, figures.fig3_iou_per_class, figures.policy_figure, figures.ladder_table):
        with pytest.raises(ValueError, match=name): draw(mixed)


def test_no_rows_are_refused(one):
    with pytest.raises(ValueError, match="expected rows, got none"): one_budget(one[:0])
    with pytest.raises(ValueError, match="split 'image'"): figures.leakage_table(one[one["split"] == "tile"])
    with pytest.raises(ValueError, match="beside baseline"): best_competitor(one[one["method"] != "wce"][one["method"].isin(["baseline", "dli"])])


def test_a_seed_that_occurs_twice_is_refused(one):
    dli = matching(one, method="dli")
    with pytest.raises(ValueError, match="expected one row a seed"): fold_counts(pd.concat([dli, dli]))


def test_full_and_reduced_budgets_are_named(one):
    paper = one.assign(image_size=256, batch_size=64, steps=20_000)
    assert "full budget" in budget_line(paper) and "reduced budget" in budget_line(one) and "reduced budget" in budget_line(paper.assign(steps=19_999))
    assert "decoder ends at half size" in budget_line(one) and "half size" not in budget_line(one.assign(preset="paper"))


def test_a_budget_is_admissible_by_its_worst_class_in_its_worst_fold(one, four):
    assert "is admissible by" in admissible_text(one)
    uneven = four.assign(train_iou_Crack=[0.28 if s else 0.73 for s in four["seed"]])
    assert "NOT ADMISSIBLE" in (text := admissible_text(uneven)) and "0.28 (Crack in fold 1, " in text
    for draw in (table1, figures.leakage_table, figures.policy_table, figures.shortcut_table): assert text in draw(uneven).attrs["caption"]


def test_a_budget_is_judged_by_all_folds_in_the_store(tmp_path):
    for seed in (0, 1): invent(tmp_path, method="baseline", seed=seed)
    for method in ("dli", "dli-all"): invent(tmp_path, method=method)
    path = next(tmp_path.glob("baseline-*-s1-*/row.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(train_iou_Crack=0.2)))
    shown = load_runs(tmp_path).query("seed == 0 and method != 'baseline'")
    assert "NOT ADMISSIBLE" in figures.policy_table(shown).attrs["caption"] and "0.20 (Crack in fold 1)" in admissible_text(shown)
    shutil.rmtree(path.parent)
    shutil.rmtree(next(tmp_path.glob("baseline-*-s0-*")))
    assert admissible_text(shown) == "" and figures.policy_table(shown).attrs["caption"].count("\n") == 2


def test_intervals_say_what_they_resample(one):
    counts = read_counts(matching(one, method="dli").iloc[0])
    rarest = counts[counts["class"] != "Free"].groupby("class")["tile"].nunique().min()
    for draw in (table1, table2, figures.attribution_table, figures.ladder_table, figures.table1_differences):
        text = " ".join(caption_of(draw(one)).split())
        assert f"only {rarest}; the noise of training is not included (one training per fold)" in text


def test_networks_scored_on_different_truths_are_not_compared(one):
    steps = readable(figures.ladder_table(one)).set_index("change")["step"]
    assert steps["authors"] == steps["masks above 127"] == "-" and steps["Dice per image"].endswith("]")


def test_a_seam_is_what_rises_over_the_runs_own_alarms(one):
    table = figures.shortcut_table(one)
    assert np.allclose(table["seam_rise_cutpaste"], 0.5 - table["clean_alarm"]) and table["seam_rise_cutpaste"].notna().all()


def test_captions_are_escaped_for_latex():
    table = pd.DataFrame(dict(x=["a"]))
    table.attrs["caption"] = "masks > 0 & a_b < 5 % of $1 #2"
    assert r"masks \textgreater{} 0 \& a\_b \textless{} 5 \% of \$1 \#2" in figures.latex_text(table)


def test_images_are_the_lower_median(four):
    rows = matching(four[four["encoder"] == "resnet18"], method="baseline")
    counts = pd.concat([t.assign(seed=s) for s, t in fold_counts(rows).items()])
    chosen = chosen_images(rows)
    assert chosen["class"].tolist() == list(SAMPLES.classes)
    for _, image in chosen.iterrows():
        own, c = counts[counts["class"] == image["class"]], image["class"]
        iou = own[f"tp_{c}"] / (own[f"tp_{c}"] + own[f"fp_{c}"] + own[f"fn_{c}"]).clip(lower=1)
        assert iou[(own["name"] == image["name"]) & (own["seed"] == image["seed"])].item() == np.sort(iou)[(len(iou) - 1) // 2]


def test_regions_are_those_of_the_image(one, tmp_path):
    row = matching(one, method="dli").iloc[0]
    name = chosen_images(matching(one, method="dli")).iloc[4]["name"]
    regions, counts = read_regions(row, name), read_counts(row).set_index("name").loc[name]
    assert regions.sum((1, 2)).tolist() == [counts[f"tp_{c}"] + counts[f"fp_{c}"] for c in SAMPLES.classes]
    with pytest.raises(ValueError, match="no image 'other'"): read_regions(row, "other")
    with pytest.raises(FileNotFoundError, match="predicted regions"): read_regions(pd.Series(dict(row) | dict(folder=tmp_path)), name)


def test_the_competitor_is_the_best_of_those_that_do_not_inject(tmp_path):
    for method, missed in dict(baseline=0.0, wce=0.5, focal=0.2, dli=0.1).items(): invent(tmp_path, method=method, missed=missed)
    assert best_competitor(load_runs(tmp_path)) == "focal"


@given(st.lists(st.one_of(st.none(), st.floats(-2, 2)), min_size=1))
def test_what_is_undefined_is_a_dash(values):
    table = pd.DataFrame(dict(x=pd.array(values, dtype=float), x_deviation=math.nan))
    text = readable(table)["x"].tolist()
    assert text == ["-" if v is None else f"{v:.3f}" for v in values]


@given(st.sets(st.integers(0, 30), min_size=1))
def test_seeds_can_be_read_back(seeds):
    text = seeds_text(seeds)
    low, _, high = text.partition("-")
    assert set(range(int(low), int(high) + 1)) == seeds if high else {int(s) for s in text.split(", ")} == seeds


def test_a_table_keeps_its_numbers_and_is_written_the_same_again(one, tmp_path):
    for folder in ("a", "b"):
        save_artifact("table2", table2(one), tmp_path / folder)
        save_artifact("policy", figures.policy_figure(one), tmp_path / folder)
    for path in sorted((tmp_path / "a").iterdir()): assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
    assert np.allclose(pd.read_csv(tmp_path / "a/table2.csv")["iou_macro"], table2(one)["iou_macro"], rtol=0, atol=1e-15)
    assert "\\pm" in (tmp_path / "a/table2.tex").read_text() and "| dli-poisson |" in (tmp_path / "a/table2.md").read_text()


def test_missing_rows_are_listed(tmp_path):
    invent(tmp_path, method="dli")
    with pytest.raises(RuntimeError, match="2 rows are missing:\n  dli-cutpaste-efficientnet_lite0-smoke-tile-s0-.*\n  dli-poisson.*(?s:.*)Train them: dli-study table2 --preset smoke --encoders efficientnet_lite0 --seeds 0 "):
        study_runs(["table2"], "smoke", ["efficientnet_lite0"], [0], dataset="synthetic", store=str(tmp_path))
    for method in ("dli-cutpaste", "dli-poisson", "wce"): invent(tmp_path, method=method)
    invent(tmp_path, method="dli", seed=1)
    runs = study_runs(["table2"], "smoke", ["efficientnet_lite0"], [0], dataset="synthetic", store=str(tmp_path))
    assert sorted(runs["method"]) == ["dli", "dli-cutpaste", "dli-poisson"] and set(runs["seed"]) == {0}
    whole = study_runs(["table2"], "smoke", ["efficientnet_lite0"], [], dataset="synthetic", store=str(tmp_path))
    assert whole["key"].tolist() == runs["key"].tolist()


def test_without_a_whole_fold_all_rows_are_asked_for(tmp_path):
    invent(tmp_path, method="dli")
    with pytest.raises(RuntimeError, match="14 rows are missing"): study_runs(["table2"], "smoke", ["efficientnet_lite0"], [], dataset="synthetic", store=str(tmp_path))


def test_notebook_parameters_are_checked():
    good = dict(preset="smoke", encoders=["efficientnet_lite0"], seeds=[0], dataset="synthetic", run_missing=False, jobs=1, store="runs", out="paper_figures")
    with pytest.raises(ValueError, match="unknown parameter seed: the parameters are preset"): notebook_runs(good | dict(seed=1), "table1")
    with pytest.raises(ValueError, match="seeds=0: expected a list"): notebook_runs(good | dict(seeds=0), "table1")


NOTEBOOKS = dict(
    baselines=["dataset", "fig2_histogram", "fig1_pipeline", "table1", "fig3_iou_per_class", "fig4_qualitative", "policy"],
    ablation=["table2", "fig7_ablation_qualitative", "fig8_blends", "ladder"],
    weak_supervision=["fig5_weak_supervision", "fig6_weak_qualitative"],
    leakage=["leakage"],
    attribution=["attribution", "shortcut"])
BOTH = {"table1", "fig3_iou_per_class", "policy", "ladder", "fig5_weak_supervision", "leakage", "attribution", "shortcut"}


def run_without_pictures(config):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "save_pictures", lambda *_: None)
        run(config, progress=False)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    "Rows of all studies but one, which the notebook has to train: invented, but for those of three methods."
    folder = tmp_path_factory.mktemp("store")
    for c in study_configs(["leakage"], "smoke", ["efficientnet_lite0"], [0]):
        if c.split == "tile": run_without_pictures(replace(c, dataset="synthetic", out=str(folder)))
    invent_studies(folder)
    shutil.rmtree(next(folder.glob("dli-*-image-*")))
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "Trained rows of all studies."
    folder = tmp_path_factory.mktemp("trained")
    for c in study_configs(STUDIES, "smoke", ["efficientnet_lite0"], [0]): run_without_pictures(replace(c, dataset="synthetic", out=str(folder)))
    return folder


def draw_notebook(name, store, out, **parameters):
    given = dict(preset="smoke", seeds=[0], dataset="synthetic", store=str(store), out=str(out)) | parameters
    papermill.execute_notebook(ROOT / f"nbs/{name}.ipynb", out / f"{name}.ipynb", given, cwd=ROOT, progress_bar=False)


def artifacts_lacking(name, store, out):
    "Draw a notebook's artifacts; those of which a format is missing, or of which there is a figure and a table where one was meant."
    draw_notebook(name, store, out, run_missing=True, **dict(size=64) if name in ("baselines", "ablation") else {})
    files = {p.name for p in out.iterdir()}
    drawn = {a: [all(f"{a}.{k}" in files for k in kinds) for kinds in (("png", "pdf"), ("md", "csv", "tex"))] for a in NOTEBOOKS[name]}
    return [a for a, found in drawn.items() if sum(found) != (2 if a in BOTH else 1)]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_draw_every_artifact(name, store, tmp_path):
    assert artifacts_lacking(name, store, tmp_path) == []
    assert list(store.glob("dli-*-image-*/row.json")) or name != "leakage"


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_draw_trained_rows(name, trained, tmp_path):
    assert artifacts_lacking(name, trained, tmp_path) == []


@pytest.mark.slow
def test_a_notebook_lists_what_is_missing(tmp_path):
    with pytest.raises(papermill.PapermillExecutionError, match="6 rows are missing:\n  baseline-efficientnet_lite0-smoke-tile-s0-(?s:.*)dli-study leakage --preset smoke"):
        draw_notebook("leakage", tmp_path / "empty", tmp_path)
