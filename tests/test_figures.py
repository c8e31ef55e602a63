"""Figures: tables agree with the metrics they quote, choose rows by rule, refuse what can't be compared."""
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import papermill
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from dli import study
from dli.data.splits import split_samples
from dli.scoring.metrics import compare, influence, scores
from dli.experiment.config import METHODS, RECIPE
from dli.experiment.store import load_runs, read_counts, read_regions
from dli.experiment.training import run
from dli.study.studies import AGAIN, LADDER, REPLICATION, STUDIES, study_configs
from dli.study.rows import (INVENTED_ROWS, NoRows, budget_line, difference, fold_counts, invent_run, invented_tiles,
                            matching, numbers_text, one_budget, places_text, study_methods, method_scores)
from dli.study.tables import (admissibility_table, admissible_text, printed_of, printed_values, readable, table1,
                              table1_methods, table2)
from dli.study.figures import (best_competitor, chosen_images, fig3_iou_per_class, table1_differences,
                               table5_weak_supervision)
from dli.study.comparisons import PRIMARY, again_pairs, comparisons_table, noise_table, power_table, variances_of
from dli.study.questions import (PAIRS, attribution_table, ladder_table, leakage_table, policy_figure, policy_table,
                                 replication_table, shortcut_table)
from dli.study.artifacts import (best_text, comparison_text, draw_artifact, latex_text, lead_text, leak_text,
                                 markdown_text, notebook_runs, plain_lines, save_artifact, study_runs, verdict_text,
                                 weak_text)
from conftest import patch

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = invented_tiles()
LITE = ["efficientnet_lite0"]


def invent(store: Path, missed=0.2, **choices) -> None:
    "Leave what a run leaves, of one that misses a fifth of the images."
    invent_run(store, missed, **choices)


def invent_studies(store, encoders=LITE, folds=(0,), studies=tuple(STUDIES), partitions=(0,)):
    "Rows of studies; methods that inject miss less."
    for c in study_configs(studies, "smoke", encoders, folds, partitions):
        choices = {k: v for k, v in asdict(c).items() if k not in ("dataset", "data")}
        invent(store, missed=(0.1 if METHODS[c.method].inject is not None else 0.3) + 0.3 * (1 - c.fraction), **choices)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    "All studies, one encoder and one fold."
    store = tmp_path_factory.mktemp("one")
    invent_studies(store)
    return load_runs(store)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    "Some studies, two encoders and two folds."
    store = tmp_path_factory.mktemp("four")
    invent_studies(store, ("efficientnet_lite0", "resnet18"), (0, 1), ("policy", "leakage", "shortcut"))
    return load_runs(store)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "Attribution and A/A pairs over two partitions, wce over one, table1's dli-all in three folds."
    store = tmp_path_factory.mktemp("whole")
    invent_studies(store, folds=range(5), studies=("attribution", "noise"), partitions=(0, 1))
    for fold in range(5):
        invent(store, method="wce", fold=fold, missed=0.3)
    for fold in range(3):
        invent(store, method="dli-all", fold=fold)
    return load_runs(store)


def caption_of(artifact) -> str:
    return artifact._supxlabel.get_text() if isinstance(artifact, Figure) else artifact.attrs["caption"]


DRAWN = ["table1", "table1_differences", "fig3_iou_per_class", "table3_iou_per_class", "table2",
         "table5_weak_supervision", "fig5_weak_supervision", "leakage_table",
         "leakage_figure", "attribution_table", "attribution_figure", "policy_table", "policy_figure", "shortcut_table",
         "shortcut_figure", "ladder_table", "ladder_figure", "admissibility_table",
         "comparisons_table", "comparisons_figure", "noise_table", "influence_figure", "replication_table",
         "replication_figure"]
WITH_PHOTOGRAPHS = ["fig4_qualitative", "fig6_weak_qualitative", "fig7_ablation_qualitative"]


SEVERAL = ["table1", "fig3_iou_per_class", "leakage_figure", "attribution_figure", "shortcut_figure",
           "fig7_ablation_qualitative"]
WHOLE = ["table1", "comparisons_table", "comparisons_figure", "noise_table", "influence_figure", "power_table",
         "power_figure", "attribution_table"]


@pytest.mark.parametrize("rows,name", [("one", n) for n in DRAWN + WITH_PHOTOGRAPHS] + [("four", n) for n in SEVERAL]
                         + [("whole", n) for n in WHOLE])
def test_everything_is_drawn_from_rows_alone_and_says_from_what(rows, name, request):
    runs = request.getfixturevalue(rows)
    photographs = [SAMPLES] if name in WITH_PHOTOGRAPHS else []
    if not photographs:
        runs = runs.assign(folder="nowhere")  # no file is read
    artifact = getattr(study, name)(runs, *photographs)
    text = " ".join(caption_of(artifact).split())
    for said in (INVENTED_ROWS, "SYNTHETIC", "reduced budget (smoke: 64 px, 6 steps of 8 images) (1 epoch)",
                 "rate 0.002", "Dice per ", "masks > ", "clean images", "cpu, ", f"recipe {RECIPE}",
                 "The budget is admissible by the protocol"):
        assert said in text
    assert dict(one="fold 0 of partition 0;", four="folds 0, 1 of partition 0;",
                whole="folds 0-4 of partition")[rows] in text
    if isinstance(artifact, Figure):
        assert [text.get_text() for text in artifact.texts].count("invented rows") == 1
        artifact.draw_without_rendering()
    else:
        assert len(artifact) and not readable(artifact).isin(["nan", "None", "<NA>"]).any(axis=None)


@pytest.mark.parametrize("name", ["dataset_numbers", "fig2_histogram", "fig1_pipeline", "fig8_blends"])
def test_the_data_is_drawn(name):
    train, _ = split_samples(SAMPLES)
    artifact = getattr(study, name)(SAMPLES if name in ("dataset_numbers", "fig2_histogram") else train)
    assert "SYNTHETIC" in caption_of(artifact)


def test_printed_values_are_the_papers():
    printed = printed_values("table1")
    cells = [(r["value"], r["std"]) == printed_of("table1", r["row"],
                                                  {"l-ResNest50d": "resnest50d", "l-ResNet18": "resnet18",
                                                   "l-MobileoneS1": "mobileone_s1", "Avg": "average"}[r["column"]])
             for _, r in printed.iterrows()]
    assert len(cells) == 20 and all(cells)
    with pytest.raises(ValueError, match="prints numbers for table1, table2"):
        printed_values("table9")


def test_table1_quotes_the_metrics(four):
    table = table1(four).set_index(["encoder", "method"])
    own = {m: matching(four[four["encoder"] == "resnet18"], method=m) for m in ("dli", "wce")}
    counts = {m: [read_counts(r) for _, r in rows.iterrows()] for m, rows in own.items()}
    result, line = compare(counts["dli"], counts["wce"], SAMPLES.classes), table.loc[("resnet18", "wce")]
    assert line["dli_minus"] == result.difference and math.isnan(line["dli_minus_low"])
    assert "No interval" in table1(four).attrs["caption"]
    pooled = scores(pd.concat(counts["wce"]), SAMPLES.classes)
    assert line["iou_macro"] == pooled["iou_macro"] and line["clean_alarm"] == pooled["clean_alarm"]
    assert line["iou_micro_mean"] == pytest.approx(own["wce"]["iou_micro"].mean())
    assert line["iou_micro_mean_deviation"] == pytest.approx(own["wce"]["iou_micro"].std())
    assert (line["printed"], line["printed_deviation"], line["printed_avg"]) == (0.741, 0.016, 0.755)
    printed, macro = table["printed_avg"], table["iou_macro"]
    assert math.isnan(printed[("resnet18", "dli")]), "the printed DLI has the recipe fill='all'"
    assert printed[("resnet18", "dli-all")] == 0.800
    both = [macro[(encoder, "wce")] for encoder in ("resnet18", "efficientnet_lite0")]
    assert macro[("average", "wce")] == pytest.approx(np.mean(both))
    assert table.loc[("average", "wce"), "printed"] == 0.755
    assert math.isnan(table.loc[("efficientnet_lite0", "wce"), "printed"])
    assert math.isnan(table.loc[("resnet18", "dli"), "dli_minus"])


def test_one_fold_has_no_deviation(one):
    text = readable(table1(one)).set_index("method")
    assert text.loc["wce", "iou_macro_mean"] == f"{table1(one).set_index('method').loc['wce', 'iou_macro']:.3f}"
    assert text.loc["wce", "dli_minus"].startswith("+")
    assert "[" not in text.loc["wce", "dli_minus"] and text.loc["wce", "folds"] == "1"
    assert text.loc["tversky", "printed_avg"] == "-"


def test_methods_without_a_common_fold_are_not_compared(four):
    dli, wce = (matching(four[four["encoder"] == "resnet18"], method=m) for m in ("dli", "wce"))
    assert difference(dli[dli["fold"] == 0], wce[wce["fold"] == 1]) is None
    assert len(difference(dli, wce[wce["fold"] == 1]).folds) == 1
    apart = pd.concat([dli[dli["fold"] == 0], wce[wce["fold"] == 1]])
    assert readable(table1(apart)).set_index("method").loc["wce", "dli_minus"] == "-"


def test_splits_are_compared_only_on_the_same_images(one, tmp_path):
    image, tile = (matching(one, method="dli", split=s) for s in ("image", "tile"))
    assert difference(image, tile) is None
    for fold in range(5):
        for split in ("image", "tile"):
            invent(tmp_path, method="dli", split=split, fold=fold, missed=0.1 if split == "image" else 0.4)
    runs = load_runs(tmp_path)
    result = difference(*(matching(runs, method="dli", split=s) for s in ("image", "tile")))
    assert result.difference > 0 and result.tiles == SAMPLES.table[~SAMPLES.clean]["tile"].nunique()
    assert leakage_table(runs)["leak_low"].notna().tolist()[0]
    invent(tmp_path, method="dli", split="image", partition=1, fold=2)
    again = leakage_table(load_runs(tmp_path))
    assert again.equals(leakage_table(runs)), "the same folds of both splits"


def test_variants_are_not_taken_for_the_method(one):
    for choices in (dict(), dict(fraction=0.25), dict(split="image")):
        assert len(matching(one, method="dli", **choices)) == 1
    rungs = [matching(one, **changes) for _, changes in LADDER]
    assert all(len(rows) == 1 for rows in rungs)
    assert len(one[one["method"] == "dli"]) > 5


def test_a_new_method_appears_in_table_and_figure(tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "novel", replace(METHODS["dli"]))
    for method in ("baseline", "wce", "dli", "novel"):
        invent(tmp_path, method=method)
    runs = load_runs(tmp_path)
    assert table1_methods(runs) == ["baseline", "wce", "dli", "novel"] and "novel" in table1(runs)["method"].tolist()
    assert "novel" in [t.get_text() for t in fig3_iou_per_class(runs).axes[0].get_yticklabels()]


@pytest.mark.parametrize("name,value", [("recipe", RECIPE - 1), ("steps", 7), ("source", "magnetic-tiles"),
                                        ("image_size", 128), ("weights", "a file"),
                                        ("device", "cuda"), ("dtype", "float16"), ("lr", 0.5)])
def test_rows_of_two_kinds_are_refused(one, name, value):
    mixed = one.copy()
    mixed.loc[matching(one, method="dli").index, name] = value
    for draw in (table1, fig3_iou_per_class, policy_figure, ladder_table):
        with pytest.raises(ValueError, match=name):
            draw(mixed)


def test_devices_are_counted_where_they_are_mixed(one):
    mixed = one.assign(device=np.where(one["method"] == "dli", "cuda", "cpu"))
    with pytest.raises(ValueError,
                       match=r"rows of different devices are not compared: \d+ of device cpu, \d+ of device cuda"):
        table1(mixed)


def test_without_rows_nothing_is_drawn(one, tmp_path, capsys):
    with pytest.raises(NoRows, match="expected rows, got none"):
        one_budget(one[:0])
    with pytest.raises(NoRows, match="split 'image'"):
        leakage_table(one[one["split"] == "tile"])
    with pytest.raises(NoRows, match="beside baseline"):
        best_competitor(one[one["method"].isin(["baseline", "dli"])])
    (tmp_path / "table1.md").write_text("of before")
    for name in DRAWN + WITH_PHOTOGRAPHS + ["power_table", "power_figure"]:
        assert draw_artifact(name, tmp_path, getattr(study, name), one[:0]) is None
    assert "table1 is not drawn: " in capsys.readouterr().out and [p.name for p in tmp_path.iterdir()] == ["table1.md"]


def test_a_fold_that_occurs_twice_is_refused(one):
    dli = matching(one, method="dli")
    with pytest.raises(ValueError, match="expected one row per fold"):
        fold_counts(pd.concat([dli, dli]))


def test_scores_are_pooled_per_partition_and_averaged(whole):
    rows = matching(whole, method="share")
    each = [scores(pd.concat(read_counts(r) for _, r in own.iterrows()), SAMPLES.classes)["iou_macro"]
            for _, own in rows.groupby("partition")]
    assert len(each) == 2 and method_scores(rows).loc["iou_macro", "pooled"] == pytest.approx(np.mean(each))
    left_out = "of an incomplete partition nothing counts beside a whole one"
    assert method_scores(rows[:7]).equals(method_scores(rows[:5])), left_out
    assert method_scores(rows[5:7]).loc["iou_macro", "mean"] == pytest.approx(rows[5:7]["iou_macro"].mean())


def test_comparisons_use_the_folds_of_both_over_partitions(whole):
    table = comparisons_table(whole).set_index("difference_of")
    assert table["folds"].tolist() == [10, 10, 10, 5] and table["partitions"].tolist() == [2, 2, 2, 1]
    x, y = ([read_counts(r) for _, r in matching(whole, method=m).iterrows()] for m in ("dli", "share"))
    result = compare(x, y, SAMPLES.classes, partitions=[0] * 5 + [1] * 5)
    line = table.loc["dli - share"]
    assert line["difference"] == result.difference
    assert (line["difference_low"], line["difference_high"]) == (result.low, result.high)
    assert line["each_partition"] == " ".join(f"{d:+.3f}" for d in result.partitions)
    assert line["difference_folds"].count("/") == 1
    first = influence(x, y, SAMPLES.classes, [0] * 5 + [1] * 5).iloc[0]
    assert line["tiles_that_move_it"].startswith(f"{first['class']} {first['tile']} ({first['without']:+.3f} without)")
    assert "baseline +" in line["again"] or "baseline -" in line["again"]


def test_pairs_trained_again_enter_no_other_table(whole):
    assert (whole["seed"] >= AGAIN).sum() == 20
    assert len(matching(whole, method="dli")) == 10 == len(matching(whole, again=True, method="dli"))
    first, again = matching(whole, method="dli"), matching(whole, again=True, method="dli")
    assert (again["seed"].to_numpy() == AGAIN + first["seed"].to_numpy()).all()
    table = noise_table(whole).set_index("difference_of")
    assert table.loc["dli - dli again", "difference"] == difference(first, again).difference


def test_there_is_no_interval_from_fewer_than_five_folds(whole):
    dli, share = (matching(whole, method=m) for m in ("dli", "share"))
    assert difference(dli, share[:4]).low is None
    assert difference(dli, share[1:9]).low is None and difference(dli, share[:5]).low is not None
    table = table1(whole).set_index("method")
    assert table.loc["dli-all", "folds"] == 3
    assert math.isnan(table.loc["dli-all", "dli_minus_low"]) and table.loc["wce", "dli_minus_low"] < 1
    assert "No interval where two methods share less than a whole partition" in table1(whole).attrs["caption"]
    assert comparison_text(whole, "dli",
                           "dli-all").endswith("over 3 folds of 1 partition: no interval from fewer than five folds.")


def test_power_is_from_pairs_and_partitions(whole):
    own = variances_of(whole)
    squares = [d**2 for pair in again_pairs(whole).values() for d in difference(*pair).partitions]
    between = [np.var(difference(matching(whole, method="dli"), matching(whole, method=m)).partitions, ddof=1)
               for m in ("share", "inject-random", "baseline")]
    assert own.degrees == 7 and own.training == pytest.approx((sum(squares) + sum(between)) / 7)
    table = power_table(whole).set_index("partitions")
    these = table["half_width_these_tiles"]
    assert these[4] == pytest.approx(these[1] / 2) == pytest.approx(0.98 * np.sqrt(own.training))
    assert (table["half_width_new_tiles"] >= table["half_width_these_tiles"]).all()
    assert table["power"].is_monotonic_increasing
    without = whole[(whole["seed"] < AGAIN) & (whole["partition"] == 0)]
    with pytest.raises(NoRows, match="takes A/A pairs"):
        power_table(without)


def test_the_replication_stands_beside_the_printed_values(tmp_path):
    for fold in (0, 1):
        for method in study_methods("replication"):
            invent(tmp_path, method=method, fold=fold, missed=0.05 if method == "dli-authors" else 0.3, **REPLICATION)
    invent(tmp_path, method="baseline", fold=0)
    runs = load_runs(tmp_path)
    table = replication_table(runs).set_index("method")
    assert table["printed_avg"].to_dict() == {"baseline": 0.754, "focal-authors": 0.689, "balanced-authors": 0.745,
                                              "wce": 0.755, "dli-authors": 0.800}
    assert table["printed_lead"]["baseline"] == pytest.approx(0.046)
    assert table["folds"].tolist() == [2] * 5 and table["printed"].isna().all()
    own = {m: matching(runs, method=m, **REPLICATION)["iou_micro"].to_numpy() for m in ("baseline", "dli-authors")}
    assert table["iou_micro"]["baseline"] == pytest.approx(own["baseline"].mean()) and len(own["baseline"]) == 2
    assert table["lead"]["baseline"] == pytest.approx((own["dli-authors"] - own["baseline"]).mean())
    caption = table.attrs["caption"]
    assert "the encoder (efficientnet_lite0)" in caption
    assert "best evaluation by iou_micro" in caption and "all clean images in training" in caption


def test_every_method_shows_its_own_fit(one):
    uneven = one.assign(train_iou_Crack=np.where(one["method"] == "wce", 0.31, 0.6))
    table = table1(uneven).set_index("method")
    assert (table["lowest_train_iou"]["wce"], table["lowest_in"]["wce"]) == (0.31, "Crack, fold 0 of partition 0")
    assert table["lowest_train_iou"]["dli"] == pytest.approx(0.55)
    assert "admissible by" in admissible_text(uneven) and table1(uneven).attrs["heading"] == "", "the baseline judges"
    for draw in (table2, policy_table, shortcut_table, ladder_table,
                 table5_weak_supervision, replication_table):
        assert "lowest_train_iou" in draw(one)


def test_full_and_reduced_budgets_are_named(one):
    paper = one.assign(image_size=256, batch_size=64, steps=20_000)
    assert "full budget" in budget_line(paper) and "reduced budget" in budget_line(one)
    assert "reduced budget" in budget_line(paper.assign(steps=19_999))
    assert "decoder ends at half size" in budget_line(one)
    assert "half size" not in budget_line(one.assign(decoder=[(128, 64, 32)] * len(one)))


def test_a_budget_is_admissible_by_its_worst_class_in_its_worst_fold(one, four):
    assert "is admissible by the protocol, judged by 1 of its five folds" in admissible_text(one)
    uneven = four.assign(train_iou_Crack=[0.28 if f else 0.73 for f in four["fold"]])
    assert "NOT ADMISSIBLE" in (text := admissible_text(uneven)) and "0.28 (Crack, fold 1 of partition 0, " in text
    for draw in (table1, leakage_table, policy_table, shortcut_table):
        table = draw(uneven)
        assert text in table.attrs["caption"] and table.attrs["heading"] == "Not admissible"
    assert markdown_text(readable(table1(uneven))).startswith("| encoder")
    assert text in caption_of(fig3_iou_per_class(uneven)).replace("\n", " ")


def test_only_partition_0_judges(whole):
    assert "judged" not in admissible_text(whole)
    elsewhere = whole.assign(train_iou_Break=np.where(whole["partition"] == 1, 0.1, 0.6))
    assert "admissible by" in admissible_text(elsewhere) and admissible_text(whole[whole["method"] != "baseline"]) == ""
    table = admissibility_table(whole.assign(train_iou_Break=np.where(whole["fold"] == 3, 0.4, 0.6)))
    assert table["fold"].tolist() == [0, 1, 2, 3, 4]
    assert table["admissible"].tolist() == ["yes", "yes", "yes", "no", "yes"] and table["lowest"][3] == 0.4


def test_the_heading_is_written_over_the_table(one, tmp_path):
    save_artifact("table1", table1(one.assign(train_iou_Crack=0.2)), tmp_path)
    assert (tmp_path / "table1.md").read_text().startswith("**Not admissible**\n\n| encoder")
    assert "Not admissible. " in (tmp_path / "table1.tex").read_text()


def test_intervals_say_what_they_resample(whole):
    defective = SAMPLES.table[~SAMPLES.clean]
    rarest = defective.groupby("class")["tile"].nunique().min()
    for draw in (table1, comparisons_table, attribution_table, table1_differences):
        text = " ".join(caption_of(draw(whole)).split())
        assert f"Intervals resample {defective['tile'].nunique()} tiles" in text
        assert f"only {rarest}, in all partitions together" in text


def test_networks_scored_on_different_truths_are_not_compared(one):
    steps = readable(ladder_table(one)).set_index("change")["step"]
    assert steps["authors"] == steps["masks above 127"] == "-" and steps["Dice per image"].startswith(("+", "-0"))


def test_a_seam_is_what_rises_over_the_runs_own_alarms(one):
    table = shortcut_table(one)
    assert np.allclose(table["seam_rise_cutpaste"], 0.3 - table["clean_alarm"])
    assert table["seam_rise_cutpaste"].notna().all()


def test_captions_are_escaped_for_latex():
    table = pd.DataFrame(dict(x=["a"]))
    table.attrs["caption"] = "masks > 0 & a_b < 5 % of $1 #2"
    assert r"masks \textgreater{} 0 \& a\_b \textless{} 5 \% of \$1 \#2" in latex_text(table)


ANY_TEXT = st.text(st.one_of(st.characters(), st.sampled_from("|`<>*_~[](){}#&$^!\\\\ \n\t-+=:.w/1")), max_size=14)


def read_markdown(text):
    "The texts of the table's cells, and those of the paragraphs, as a reader sees them: nothing in them is a mark."
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable(["table", "strikethrough"])
    tokens, cells, paragraphs = parser.parse(text), [], []
    for before, token in zip(tokens, tokens[1:]):
        if token.type != "inline":
            continue
        allowed = {"text", "softbreak", "html_inline", "strong_open", "strong_close"}
        assert {part.type for part in token.children} <= allowed
        assert all(part.content == "<br>" for part in token.children if part.type == "html_inline")
        seen = "".join("\n" if part.type in ("softbreak", "html_inline") else part.content for part in token.children)
        (paragraphs if before.type == "paragraph_open" else cells).append(seen)
    return cells, paragraphs


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(ANY_TEXT, ANY_TEXT), min_size=1, max_size=3), ANY_TEXT)
def test_any_text_is_read_back_from_markdown(rows, heading):
    table = pd.DataFrame(rows, columns=["a_b", "x|*y*"])
    table.attrs = dict(heading=heading, caption="# masks > 0, *_mean* <b> [a](b) of `iou_macro`")
    cells, paragraphs = read_markdown(markdown_text(table))
    shown = plain_lines
    assert cells == ["a_b", "x|*y*", *(shown(text) for row in rows for text in row)]
    assert paragraphs[-1] == table.attrs["caption"]
    if heading.strip():
        assert paragraphs[0].strip() == shown(heading).strip()


@pytest.mark.parametrize("name, latex, html", [
    ("a_b & c|d", r"a\_b \& c\textbar{}d", "a_b &amp; c|d"),
    ("<b>x", r"\textless{}b\textgreater{}x", "&lt;b&gt;x"),
    ("[x]", "{[}x]", "[x]"),
    ("two\nlines\n\nmore", "two lines  more", "two\nlines"),
    ("\\frac`$", r"\textbackslash{}frac\textasciigrave{}\$", "\\frac`$")])
def test_any_text_is_right_in_latex_and_html(name, latex, html, tmp_path):
    table = pd.DataFrame({"class": [name], name: ["1"]})
    table.attrs = dict(heading=name, caption=name)
    text, shown = latex_text(table), save_artifact("own", table, tmp_path).to_html()
    assert f"class & {latex} \\\\\n" in text and f"\n{latex} & 1 \\\\\n" in text and "\n\n" not in text
    assert shown.count(html) == 4 and "<b>" not in shown


def test_images_are_the_lower_median(four):
    rows = matching(four[four["encoder"] == "resnet18"], method="baseline")
    counts = pd.concat([c.table.assign(fold=f) for (_, f), c in fold_counts(rows).items()])
    chosen = chosen_images(rows)
    assert chosen["class"].tolist() == list(SAMPLES.classes)
    for _, image in chosen.iterrows():
        own, c = counts[counts["class"] == image["class"]], image["class"]
        iou = own[f"tp_{c}"] / (own[f"tp_{c}"] + own[f"fp_{c}"] + own[f"fn_{c}"]).clip(lower=1)
        here = (own["name"] == image["name"]) & (own["fold"] == image["fold"])
        assert iou[here].item() == np.sort(iou)[(len(iou) - 1) // 2]


def test_regions_are_those_of_the_image(one, tmp_path):
    row = matching(one, method="dli").iloc[0]
    name = chosen_images(matching(one, method="dli")).iloc[4]["name"]
    regions, counts = read_regions(row, name), read_counts(row).set_index("name").loc[name]
    assert regions.sum((1, 2)).tolist() == [counts[f"tp_{c}"] + counts[f"fp_{c}"] for c in SAMPLES.classes]
    with pytest.raises(ValueError, match="no image 'other'"):
        read_regions(row, "other")
    with pytest.raises(FileNotFoundError, match="predicted regions"):
        read_regions(pd.Series(dict(row) | dict(folder=tmp_path)), name)


def test_the_competitor_is_the_best_of_those_that_do_not_inject(tmp_path):
    for method, missed in dict(baseline=0.0, wce=0.5, focal=0.2, dli=0.1).items():
        invent(tmp_path, method=method, missed=missed)
    assert best_competitor(load_runs(tmp_path)) == "focal"


@given(st.lists(st.one_of(st.none(), st.floats(-2, 2)), min_size=1))
def test_what_is_undefined_is_a_dash(values):
    table = pd.DataFrame(dict(x=pd.array(values, dtype=float), x_deviation=math.nan))
    text = readable(table)["x"].tolist()
    assert text == ["-" if v is None else f"{v:.3f}" for v in values]


@given(st.sets(st.integers(0, 30), min_size=1))
def test_numbers_can_be_read_back(numbers):
    text = numbers_text(numbers)
    low, _, high = text.partition("-")
    assert set(range(int(low), int(high) + 1)) == numbers if high else {int(s) for s in text.split(", ")} == numbers


def test_places_are_named_by_partition():
    places = [(0, f) for f in range(5)] + [(1, f) for f in range(5)] + [(2, 3)]
    assert places_text(pd.DataFrame(places, columns=["partition",
                                                     "fold"])) == "folds 0-4 of partitions 0, 1; fold 3 of partition 2"


def test_a_table_keeps_its_numbers_and_is_written_the_same_again(one, tmp_path):
    for folder in ("a", "b"):
        save_artifact("table2", table2(one), tmp_path / folder)
        save_artifact("policy", policy_figure(one), tmp_path / folder)
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
    assert np.allclose(pd.read_csv(tmp_path / "a/table2.csv")["iou_macro"], table2(one)["iou_macro"], rtol=0,
                       atol=1e-15)
    assert "\\pm" in (tmp_path / "a/table2.tex").read_text()
    assert "| dli-poisson |" in (tmp_path / "a/table2.md").read_text()


def test_missing_rows_are_listed(tmp_path, capsys):
    invent(tmp_path, method="dli")
    wanted = dict(dataset="synthetic", store=str(tmp_path))
    runs = study_runs(["table2"], "smoke", LITE, [0], **wanted)
    said = capsys.readouterr().out
    assert runs["method"].tolist() == ["dli"]
    assert said.startswith("2 of 3 rows are missing:\n  dli-cutpaste-efficientnet_lite0-smoke-tile-p0f0s0-")
    command = ("dli study table2 --preset smoke --encoders efficientnet_lite0 --folds 0 --partitions 0 "
               "--dataset synthetic --out ")
    assert f"Train them: {command}" in said
    for method in ("dli-cutpaste", "dli-poisson"):
        invent(tmp_path, method=method)
    invent(tmp_path, method="dli", fold=1, partition=1)
    runs = study_runs(["table2"], "smoke", LITE, [0], **wanted)
    assert capsys.readouterr().out == "" and sorted(runs["method"]) == ["dli", "dli-cutpaste", "dli-poisson"]
    runs = study_runs(["table2"], "smoke", LITE, **wanted)
    assert len(runs) == 4 and "12 of 15 rows are missing" in (said := capsys.readouterr().out) and "more" not in said
    assert len(study_runs(["table1"], "smoke", LITE, **wanted)) == 4 and "and 27 more" in capsys.readouterr().out
    assert study_runs(["table2"], "smoke", ["resnet18"], **wanted).empty
    assert study_runs(["table2"], "paper", LITE, **wanted).empty


def test_rows_are_verified_once_a_notebook(one, monkeypatch):
    store = str(Path(one["folder"][0]).parent)
    loaded = load_runs.__globals__
    read, folders, read_table, files = loaded["read_run"], [], loaded["read_table"], []
    loaded["counts_at"].cache_clear()
    monkeypatch.setitem(loaded, "read_run", lambda folder: folders.append(folder) or read(folder))
    monkeypatch.setitem(loaded, "read_table", lambda path: files.append(path) or read_table(path))
    runs = study_runs(list(STUDIES), "smoke", LITE, [0], dataset="synthetic", store=store)
    for name in ("table1", "fig3_iou_per_class", "policy_table", "ladder_figure"):
        getattr(study, name)(runs)
    assert len(folders) == len(set(folders)) >= len(runs)
    assert len(files) == len(set(files)) == len(folders)


def test_counts_go_with_their_rows(one):
    assert isinstance(repr(one["counts"].iloc[0]), str) and len(repr(one)) < 20_000
    for rows in (one[one["split"] == "tile"], pd.concat([one[5:], one[:5]]), one.sort_values("iou_macro"),
                 one.assign(x=1).reset_index(drop=True)):
        for _, row in rows.iterrows():
            assert row["counts"].table.equals(read_counts(row))


def test_only_invented_rows_are_marked(one):
    trained = one.assign(commit="of a trained run")
    assert "INVENTED" not in table2(trained).attrs["caption"] and "INVENTED" in table2(one).attrs["caption"]
    across = [[text.get_text() for text in policy_figure(rows).texts].count("invented rows") for rows in (trained, one)]
    assert across == [0, 1]


def test_what_is_compared_is_trained_by_a_study():
    assert study_methods("noise") == ["baseline", "dli"] and study_methods("weak") == ["dli", "wce"]
    trained = {m for name in STUDIES for m in study_methods(name)}
    assert {m for pair in (*PRIMARY, *PAIRS) for m in pair} <= trained


def test_notebook_parameters_are_checked():
    good = dict(preset="smoke", encoders=LITE, folds=[0], partitions=[], dataset="synthetic", run_missing=False, jobs=1,
                store="runs", out="paper_figures")
    with pytest.raises(ValueError, match="unknown parameter seed: the parameters are preset"):
        notebook_runs(good | dict(seed=1), "table1")
    for name in ("encoders", "folds", "partitions"):
        with pytest.raises(ValueError, match=f"{name}=0: expected a list"):
            notebook_runs(good | {name: 0}, "table1")


def test_answers_are_sentences_of_the_rows(whole, one):
    result = difference(matching(whole, method="dli"), matching(whole, method="share"))
    expected = (f"dli minus share: {result.difference:+.3f} [{result.low:+.3f}, {result.high:+.3f}] in iou_macro over "
                f"10 folds of 2 partitions: ")
    assert comparison_text(whole, "dli", "share").startswith(expected)
    assert comparison_text(whole[:0], "dli", "share").endswith("no rows to compare yet.")
    assert verdict_text(replace(result, low=0.01, high=0.02), "dli", "share").endswith("is better")
    assert verdict_text(replace(result, low=-0.01, high=0.02), "dli", "share") == "not settled"
    assert "methods on the five folds of partition 0" in best_text(whole)
    assert best_text(one).startswith("There are no two")
    assert "baseline has iou_macro" in leak_text(one) and "there are no rows" in leak_text(whole)
    assert "where the paper prints 0.800 and 0.754, a lead of +0.046" in lead_text(one)
    assert lead_text(whole[:0]).startswith("There are no rows")
    assert "With 10% of the data" in weak_text(one, 0.1)
    assert weak_text(whole, 0.1).startswith("Nothing was trained")


NOTEBOOKS = dict(
    baselines=["dataset", "fig2_histogram", "fig1_pipeline", "admissibility", "table1", "comparisons", "influence",
               "power", "fig3_iou_per_class", "fig4_qualitative",
               "policy"],
    ablation=["table2", "fig7_ablation_qualitative", "fig8_blends", "ladder"],
    weak_supervision=["fig5_weak_supervision", "fig6_weak_qualitative"],
    replication=["replication"],
    leakage=["leakage"],
    attribution=["attribution", "shortcut"])
BOTH = {"table1", "comparisons", "fig3_iou_per_class", "policy", "ladder", "fig5_weak_supervision", "replication",
        "leakage", "attribution", "shortcut", "power"}


def run_without_pictures(config):
    with pytest.MonkeyPatch.context() as monkeypatch:
        patch(monkeypatch, "save_pictures", lambda *_: None)
        run(config, progress=False)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Rows of all studies but one, which the notebook has to train: invented, but for those of three methods; A/A
    pairs of a whole partition."""
    folder = tmp_path_factory.mktemp("store")
    for c in study_configs(["leakage"], "smoke", LITE, [0]):
        if c.split == "tile":
            run_without_pictures(replace(c, dataset="synthetic", out=str(folder)))
    invent_studies(folder)
    invent_studies(folder, folds=range(5), studies=("noise",))
    shutil.rmtree(next(folder.glob("dli-*-image-*")))
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "Trained rows of all studies."
    folder = tmp_path_factory.mktemp("trained")
    for c in study_configs(STUDIES, "smoke", LITE, [0]):
        run_without_pictures(replace(c, dataset="synthetic", out=str(folder)))
    return folder


def draw_notebook(name, store, out, **parameters):
    given = dict(preset="smoke", folds=[0], dataset="synthetic", store=str(store), out=str(out)) | parameters
    papermill.execute_notebook(ROOT / f"nbs/{name}.ipynb", out / f"{name}.ipynb", given, cwd=ROOT, progress_bar=False)
    return (out / f"{name}.ipynb").read_text()


def artifacts_lacking(name, store, out, **parameters):
    """Draw a notebook's artifacts; those of which a format is missing, or of which there is a figure and a table where
    one was meant."""
    draw_notebook(name, store, out, **parameters, **dict(size=64) if name in ("baselines", "ablation") else {})
    files = {p.name for p in out.iterdir()}
    drawn = {a: [all(f"{a}.{k}" in files for k in kinds) for kinds in (("png", "pdf"), ("md", "csv", "tex"))]
             for a in NOTEBOOKS[name]}
    return [a for a, found in drawn.items() if sum(found) != (2 if a in BOTH else 1)]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_draw_every_artifact(name, store, tmp_path):
    assert artifacts_lacking(name, store, tmp_path, run_missing=name == "leakage",
                             folds=[0] if name == "leakage" else []) == []
    assert list(store.glob("dli-*-image-*/row.json")) or name != "leakage"


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_draw_trained_rows(name, trained, tmp_path):
    # of one fold there is no interval
    assert set(artifacts_lacking(name, trained, tmp_path, run_missing=True)) <= {"power"}


@pytest.mark.parametrize("name", ["leakage", "baselines"])
def test_a_notebook_without_rows_lists_what_is_missing(name, tmp_path):
    said = draw_notebook(name, tmp_path / "empty", tmp_path, **dict(size=64) if name == "baselines" else {})
    assert "rows are missing:" in said and "-efficientnet_lite0-smoke-tile-p0f0s0-" in said
    assert "is not drawn" in said and "yet." in said
    assert not (tmp_path / "table1.md").exists() and not (tmp_path / "leakage.md").exists()
