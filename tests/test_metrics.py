"""Metrics: counts are right, pooling is adding, scores are what the protocol says, and undefined is None."""
import io
import json
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.metrics import jaccard_score, roc_auc_score

from dli.data.samples import FREE
from dli.data.synthetic import synthetic_tiles
from dli.files import csv_bytes, read_table
from dli.scoring.metrics import (Comparison, Counts, alarm_scores, alarm_threshold, compare, count_batch, counts_table,
                                 influence, iou_scores, median_images, pooled_iou, resample_tiles, scores, summarize,
                                 tile_counts, weighted_iou_macro)

CLASSES = ["A", "B", "C"]
seeds = st.integers(0, 2**31 - 1)


@pytest.fixture(autouse=True)
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def example(seed, n=6, size=8, k=3):
    "Logits, masks and a table: an image has defects of one class or is clean; all are drawn at random."
    g = torch.Generator().manual_seed(seed)
    classes = torch.randint(0, k + 1, (n,), generator=g)
    masks = (torch.rand(n, size, size, generator=g) < 0.3) * classes[:, None, None]
    logits = torch.randn(n, k, size, size, generator=g) - 1
    table = pd.DataFrame({"name": [f"i{i}" for i in range(n)], "class": [[FREE, *CLASSES][c] for c in classes],
                          "tile": range(n)})
    return logits, masks, table


def counted(logits, masks, table):
    return counts_table(table, count_batch(logits, masks), CLASSES)


def perfect(masks, k=3):
    return torch.stack([(masks == c) * 20.0 - 10 for c in range(1, k + 1)], 1)


# Counts

@given(seeds)
@settings(max_examples=30, deadline=None)
def test_counts_by_loops(seed):
    logits, masks, _ = example(seed)
    counts = count_batch(logits, masks)
    for i in range(len(masks)):
        for k in range(3):
            said, true = logits[i, k].sigmoid() >= 0.5, masks[i] == k + 1
            expected = [(said & true).sum(), (said & ~true).sum(), (~said & true).sum()]
            assert [counts.tp[i, k], counts.fp[i, k], counts.fn[i, k]] == expected
            assert counts.p_max[i, k] == logits[i, k].sigmoid().max()
    assert counts.tp.dtype == counts.fp.dtype == counts.fn.dtype == torch.int64
    assert counts.p_max.dtype == torch.float32 and (counts.pixels == 64).all()


@given(seeds, st.sampled_from([torch.uint8, torch.int32]))
@settings(max_examples=15, deadline=None)
def test_types_do_not_matter_and_inputs_stay(seed, dtype):
    logits, masks, table = example(seed)
    before = logits.clone(), masks.clone()
    a, b = counted(logits, masks, table), counted(logits.double(), masks.to(dtype), table)
    pd.testing.assert_frame_equal(a, b, atol=1e-6)
    assert torch.equal(logits, before[0]) and torch.equal(masks, before[1])


@given(seeds)
@settings(max_examples=5, deadline=None)
def test_memory_layout_does_not_matter(seed):
    logits, masks, table = example(seed)
    turned = logits.transpose(2, 3).contiguous().transpose(2, 3), masks.transpose(1, 2).contiguous().transpose(1, 2)
    assert counted(*turned, table).equals(counted(logits, masks, table))
    assert counted(logits.to(memory_format=torch.channels_last), masks, table).equals(counted(logits, masks, table))


def test_a_half_is_predicted_and_less_is_not():
    logits = torch.tensor([0.0, -1e-3, 1e-3, -50]).reshape(1, 1, 2, 2)
    counts = count_batch(logits, torch.zeros(1, 2, 2, dtype=torch.int64))
    assert counts.fp.item() == 2 and counts.p_max.item() > 0.5


@given(seeds, st.integers(1, 5))
@settings(max_examples=20, deadline=None)
def test_batches_do_not_matter(seed, cut):
    logits, masks, table = example(seed)
    parts = [counted(logits[part], masks[part], table[part]) for part in (slice(0, cut), slice(cut, None))]
    assert pd.concat(parts, ignore_index=True).equals(counted(logits, masks, table))


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_pooled_counts_are_those_of_one_large_image(seed):
    logits, masks, table = example(seed)
    joined = count_batch(torch.cat(list(logits), 2)[None], torch.cat(list(masks), 1)[None])
    table = counted(logits, masks, table)
    for kind in ("tp", "fp", "fn"):
        assert table[[f"{kind}_{c}" for c in CLASSES]].sum().tolist() == getattr(joined, kind)[0].tolist()
    assert pooled_iou(table, CLASSES) == pooled_iou(counts_table(pd.DataFrame({"name": ["j"], "class": ["A"],
                                                                               "tile": [0]}), joined, CLASSES), CLASSES)


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_csv_repeats_the_table_exactly(seed):
    logits, masks, table = example(seed)
    table = counted(logits * 8, masks, table)
    again = read_table(csv_bytes(table))
    assert again.equals(table) and scores(again, CLASSES) == scores(table, CLASSES)
    assert again.equals(pd.read_csv(io.StringIO(table.to_csv(index=False))))


TEXT = st.text(st.characters(exclude_categories=[]), min_size=1, max_size=8) | st.sampled_from(
    ["001", "NA", "nan", "1", "None", "1e3", " a "]
)
CLASS = TEXT.filter(lambda c: c not in ("macro", "micro", "Free") and not c.startswith("of_images"))


@given(st.lists(CLASS, min_size=2, max_size=3, unique=True), st.data())
@settings(max_examples=60, deadline=None)
def test_counts_of_any_names_are_read_back_the_same(classes, given):
    n = given.draw(st.integers(1, 6))
    names = given.draw(st.lists(TEXT, min_size=n, max_size=n, unique=True))
    parts = given.draw(
        st.lists(TEXT, min_size=n, max_size=n) | st.lists(st.integers(-(10**9), 10**9), min_size=n, max_size=n)
    )
    kinds = given.draw(st.lists(st.sampled_from([*classes, "Free"]), min_size=n, max_size=n))
    counts = Counts(*torch.randint(0, 9, (3, n, len(classes))), torch.rand(n, len(classes)), 64)
    table = counts_table(pd.DataFrame({"name": names, "class": kinds, "tile": parts}), counts, classes)
    again = read_table(csv_bytes(table))
    assert list(again.columns) == list(table.columns) and all(again[c].tolist() == table[c].tolist() for c in table)
    assert scores(again, classes) == scores(table, classes) and len(scores(table, classes)) == 5 + 2 * len(classes)
    assert tile_counts(again, classes).to_dict() == tile_counts(table, classes).to_dict()


def test_an_image_of_several_classes_counts_under_each():
    known = pd.DataFrame({"name": ["a", "b", "c"], "class": ["A", "A", "Free"], "tile": [0, 1, 2]})
    tp, fp = torch.tensor([[4, 1], [2, 0], [0, 0]]), torch.zeros(3, 2, dtype=torch.long)
    fn = torch.tensor([[0, 3], [2, 0], [0, 0]])
    found = scores(counts_table(known, Counts(tp, fp, fn, torch.rand(3, 2), 64), ["A", "B"]), ["A", "B"])
    assert found["iou_of_images_A"] == 7 / 12 and found["iou_of_images_B"] == 5 / 8


@pytest.mark.parametrize("spoil, message", [
    (lambda t: t.assign(tile=t["tile"].where(t.index != 2)), "1 have an unknown tile: '"),
    (lambda t: t.assign(name=t["name"].where(t.index != 2, t["name"].iloc[0])), "1 have a name that repeats: '")])
def test_unknown_tiles_and_repeated_names_are_no_pairs(spoil, message):
    table = counted(*example(0))
    for pair in ((spoil(table), table), (table, spoil(table)), (spoil(table), spoil(table))):
        with pytest.raises(ValueError, match=message):
            compare([pair[0]], [pair[1]], CLASSES, times=10)
    if "tile" in message:
        defective = spoil(table).assign(**{"class": CLASSES[0]})
        with pytest.raises(ValueError, match="expected the tile of each image"):
            tile_counts(defective, CLASSES)


def test_the_table_of_samples():
    tiles = synthetic_tiles(n=60, size=64, seed=0)
    masks = torch.from_numpy(tiles.masks)
    table = counts_table(tiles.table, count_batch(perfect(masks, 5), masks), tiles.classes)
    assert list(table.columns[:4]) == ["name", "class", "tile", "pixels"]
    assert table["name"].tolist() == tiles.table["name"].tolist()
    assert scores(table, tiles.classes)["iou_macro"] == 1


# IoU

@given(seeds)
@settings(max_examples=40, deadline=None)
def test_agreement_with_sklearn(seed):
    logits, masks, table = example(seed)
    said, true = logits >= 0, torch.stack([masks == c for c in (1, 2, 3)], 1)
    keep = torch.tensor((table["class"] != FREE).to_numpy())
    assume(keep.any())
    result, flat = iou_scores(counted(logits, masks, table), CLASSES), lambda x: x.transpose(0, 1).flatten(1).numpy()
    y, z = flat(true[keep]), flat(said[keep])
    assume(all((a | b).any() for a, b in zip(y, z)))
    assert result["iou_macro"] == pytest.approx(jaccard_score(y.T, z.T, average="macro"))
    assert result["iou_micro"] == pytest.approx(jaccard_score(y.T, z.T, average="micro"))
    assert [result[f"iou_{c}"] for c in CLASSES] == pytest.approx(jaccard_score(y.T, z.T, average=None).tolist())
    for c in CLASSES:
        some = torch.tensor((table["class"] == c).to_numpy())
        if not some.any():
            continue
        assert result[f"iou_of_images_{c}"] == pytest.approx(jaccard_score(flat(true[some]).T, flat(said[some]).T,
                                                                           average="micro"))


@given(seeds)
@settings(max_examples=40, deadline=None)
def test_scores_are_in_bounds_flat_and_json(seed):
    logits, masks, table = example(seed)
    result = scores(counted(logits, masks, table), CLASSES)
    assert set(result) == {"iou_macro", "iou_micro", "clean_alarm", "auroc_image", "alarm_at_95",
                           *(f"iou_{c}" for c in CLASSES), *(f"iou_of_images_{c}" for c in CLASSES)}
    assert all(v is None or type(v) is float and 0 <= v <= 1 for v in result.values())
    assert json.loads(json.dumps(result, allow_nan=False)) == result


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_order_of_images_does_not_matter(seed):
    logits, masks, table = example(seed)
    table = counted(logits, masks, table)
    assert scores(table.sample(frac=1, random_state=seed % 1000), CLASSES) == scores(table, CLASSES)


def all_kinds():
    masks = torch.zeros(8, 8, 8, dtype=torch.int64)
    for i, c in enumerate((1, 1, 2, 2, 3, 3)):
        masks[i, i:i + 2, :4] = c
    return masks, pd.DataFrame({"name": list("abcdefgh"), "class": [*"AABBCC", FREE, FREE], "tile": range(8)})


def test_a_perfect_prediction():
    masks, table = all_kinds()
    result = scores(counted(perfect(masks), masks, table), CLASSES)
    assert result.pop("clean_alarm") == 0 and result.pop("alarm_at_95") == 0 and set(result.values()) == {1.0}


def test_an_empty_prediction():
    masks, table = all_kinds()
    result = scores(counted(torch.full((8, 3, 8, 8), -10.0), masks, table), CLASSES)
    assert all(v == 0 for k, v in result.items() if k.startswith("iou")) and result["clean_alarm"] == 0
    assert result["auroc_image"] == 0.5 and result["alarm_at_95"] == 1  # all alike: to find any is to alarm all


def test_an_inverted_prediction():
    masks, table = all_kinds()
    result = scores(counted(-perfect(masks), masks, table), CLASSES)
    assert all(v == 0 for k, v in result.items() if k.startswith("iou")) and result["clean_alarm"] == 1


def test_false_alarms_on_clean_images_do_not_lower_the_iou():
    masks, table = all_kinds()
    logits = perfect(masks)
    logits[6:] = 10
    result = scores(counted(logits, masks, table), CLASSES)
    assert result["iou_macro"] == result["iou_micro"] == 1 and result["clean_alarm"] == 1


def test_predicting_another_class_costs_both():
    masks, table = all_kinds()
    result = scores(counted(perfect(masks)[:, [1, 0, 2]], masks, table), CLASSES)
    assert (result["iou_A"], result["iou_B"], result["iou_C"]) == (0, 0, 1)
    assert result["iou_macro"] == pytest.approx(1 / 3)


@given(seeds)
@settings(max_examples=30, deadline=None)
def test_the_median_image_of_each_class(seed):
    logits, masks, table = example(seed, n=12)
    table = counted(logits, masks, table).sample(frac=1, random_state=seed % 1000)
    expected = []
    for c in CLASSES:
        own = table[table["class"] == c]
        value = {i: scores(own.loc[[i]], CLASSES)[f"iou_{c}"] or 0.0 for i in own.index}
        expected += sorted(value, key=value.get)[(len(own) - 1) // 2:][:1] if len(own) else []
    assert median_images(table, CLASSES) == expected


def test_an_image_without_a_pixel_that_counts_is_the_worst():
    table = pd.DataFrame({"class": "A", "tp_A": [5, 0, 1], "fp_A": 0, "fn_A": [5, 0, 9]})
    assert median_images(table, ["A"]) == [2] and median_images(table[:2], ["A"]) == [1]


# Undefined

def test_a_class_that_is_neither_there_nor_predicted():
    masks, table = all_kinds()
    result = scores(counted(perfect(masks), masks, table)[table["class"] != "C"], CLASSES)
    assert result["iou_C"] is None and result["iou_of_images_C"] is None and result["iou_macro"] == 1


def test_a_class_that_is_not_there_but_predicted_is_zero():
    masks, table = all_kinds()
    logits = perfect(masks)
    logits[0, 2, 0, 0] = 10
    result = scores(counted(logits, masks, table)[table["class"] != "C"], CLASSES)
    assert result["iou_C"] == 0 and result["iou_macro"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("kept, undefined", [("ABC", {"clean_alarm", "auroc_image", "alarm_at_95"}), ("", None)])
def test_only_defective_images_or_none(kept, undefined):
    masks, table = all_kinds()
    result = scores(counted(perfect(masks), masks, table)[table["class"].isin(list(kept))], CLASSES)
    assert {k for k, v in result.items() if v is None} == (set(result) if undefined is None else undefined)


def test_only_clean_images():
    masks, table = all_kinds()
    result = scores(counted(perfect(masks)[6:], masks[6:], table[6:]), CLASSES)
    assert {k for k, v in result.items() if v is not None} == {"clean_alarm"}


# Alarms

@pytest.mark.parametrize("pixels, region, alarm", [(10_000, 1, 0), (10_000, 2, 1), (65_536, 13, 0), (65_536, 14, 1),
                                                   (128**2, 3, 0), (128**2, 4, 1)])
def test_the_smallest_region_that_alarms(pixels, region, alarm):
    table = pd.DataFrame({"class": [FREE], "pixels": pixels, "tp_A": 0, "fp_A": region, "fn_A": 0, "p_A": 0.9,
                          "tp_B": 0, "fp_B": 1, "fn_B": 0, "p_B": 0.9})
    assert alarm_scores(table, ["A", "B"])["clean_alarm"] == alarm


def test_regions_of_two_classes_are_not_added():
    table = pd.DataFrame({"class": [FREE], "pixels": 10_000}
                         | {f"{kind}_{c}": [n] for c in "AB" for kind, n in dict(tp=0, fp=1, fn=0, p=0.9).items()})
    assert alarm_scores(table, ["A", "B"])["clean_alarm"] == 0


@given(seeds)
@settings(max_examples=30, deadline=None)
def test_image_scores_use_the_largest_probability(seed):
    logits, masks, table = example(seed, n=12)
    clean = (table["class"] == FREE).to_numpy()
    assume(0 < clean.sum() < 12)
    result, p = alarm_scores(counted(logits, masks, table), CLASSES), logits.sigmoid().amax((1, 2, 3)).numpy()
    assert result["auroc_image"] == pytest.approx(roc_auc_score(~clean, p))
    levels = [t for t in p if (p[~clean] >= t).mean() >= 0.95]
    assert result["alarm_at_95"] == pytest.approx((p[clean] >= max(levels)).mean())


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=300), st.integers(1, 100))
def test_the_threshold_finds_enough_and_is_the_largest(values, found):
    values, limit = np.array(values), alarm_threshold(np.array(values), found)
    assert (values >= limit).sum() * 100 >= found * len(values)
    assert (values > limit).sum() * 100 < found * len(values)


# Wrong arguments

def test_shapes_that_differ():
    logits, masks, table = example(0)
    for a, b in ((logits, masks[1:]), (logits[0], masks), (logits, masks[:, 1:])):
        with pytest.raises(ValueError, match="of one size"):
            count_batch(a, b)
    counts = count_batch(logits, masks)
    with pytest.raises(ValueError, match=r"= \(5, 3\), got \(6, 3\)"):
        counts_table(table[1:], counts, CLASSES)
    with pytest.raises(ValueError, match=r"= \(6, 2\), got \(6, 3\)"):
        counts_table(table, counts, CLASSES[1:])


def test_nan_and_infinity():
    logits, masks, _ = example(0)
    logits[2, 1, 3, 3] = torch.inf
    assert count_batch(logits, masks).p_max[2, 1] == 1
    logits[2, 1, 3, 3] = torch.nan
    with pytest.raises(ValueError, match="NaN. Has the training diverged"):
        count_batch(logits, masks)


def test_a_column_that_is_missing_is_named():
    logits, masks, table = example(0)
    with pytest.raises(ValueError, match="missing .'tp_Fray'"):
        scores(counted(logits, masks, table), [*CLASSES, "Fray"])


# ---- comparisons --------------------

CLASSES3 = ("A", "B", "C")


@st.composite
def fold_tables(draw, folds=3, methods=2):
    "Random counts of the same images by several methods, in folds; tiles stay in their fold, some images are clean."
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    result = [[] for _ in range(methods)]
    for fold in range(folds):
        n = 12
        kinds = np.array(["A", "A", "B", "B", "C", "C", *rng.choice([*CLASSES3, FREE], n - 6)])
        base = pd.DataFrame({"name": [f"{fold}-{i}" for i in range(n)], "class": kinds,
                             "tile": fold * 100 + rng.integers(0, 6, n), "pixels": 4096})
        for tables in result:
            counts = {f"{kind}_{c}": rng.integers(0, 50, n) for kind in ("tp", "fp", "fn") for c in CLASSES3}
            tables.append(base.assign(**counts, **{f"p_{c}": rng.random(n) for c in CLASSES3}))
    return result


@given(fold_tables())
@settings(max_examples=25, deadline=None)
def test_compare_is_the_difference_of_scores_and_antisymmetric(tables):
    a, b = tables
    forth, back = (compare(*pair, CLASSES3, times=200) for pair in ((a, b), (b, a)))
    pooled = [scores(pd.concat(t), CLASSES3)["iou_macro"] for t in (a, b)]
    assert forth.difference == pytest.approx(pooled[0] - pooled[1])
    assert [forth.difference, forth.low, forth.high] == pytest.approx([-back.difference, -back.high, -back.low])
    assert len(forth.folds) == 3 and forth.low <= forth.high
    assert forth == compare(a, b, CLASSES3, times=200) and compare(a, a, CLASSES3, times=50).high == 0


@given(fold_tables(methods=1))
@settings(max_examples=25, deadline=None)
def test_tile_counts_add_up_and_weights_of_one_score_the_whole(tables):
    table = pd.concat(tables[0])
    counts = tile_counts(table, CLASSES3)
    defective = table[table["class"] != FREE]
    assert set(counts.index) == set(defective["tile"])
    assert (counts.drop(columns="class").sum() == defective[counts.columns[1:]].sum()).all()
    whole = weighted_iou_macro(counts, CLASSES3, np.ones((1, len(counts)), int))[0]
    assert whole == pytest.approx(iou_scores(table, CLASSES3)["iou_macro"])


@given(st.lists(st.sampled_from("ABC"), min_size=1, max_size=40), st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_resamples_keep_the_number_of_tiles_of_each_class(kinds, seed):
    kinds = np.array(kinds)
    weights = resample_tiles(kinds, 20, np.random.default_rng(seed))
    assert weights.shape == (20, len(kinds)) and weights.min() >= 0
    for k in set(kinds):
        assert (weights[:, kinds == k].sum(1) == (kinds == k).sum()).all()


def test_a_tile_of_several_classes_is_of_its_most_frequent():
    table = pd.DataFrame({"class": ["A", "B", "B", "C", "A"], "tile": [1, 1, 1, 2, 2],
                          **{f"{k}_{c}": 1 for k in ("tp", "fp", "fn") for c in CLASSES3}})
    assert tile_counts(table, CLASSES3)["class"].to_dict() == {1: "B", 2: "A"}


@pytest.mark.parametrize("spoil, message", [
    (lambda b: b[:-1], "expected as many folds on both sides, at least one, got 3 and 2"),
    (lambda b: [b[0].iloc[1:], *b[1:]],
     r"fold 0: expected the same images on both sides, 1 are on one only: \['0-0'\]"),
    (lambda b: [b[0], b[1].assign(tile=5), b[2]], "fold 1: class, tile or size of .* images differ"),
    (lambda b: [b[0], b[1], b[2].assign(pixels=1)], "fold 2: class, tile or size of 12 images differ"),
])
def test_compare_refuses_other_images(spoil, message):
    rng = np.random.default_rng(0)
    base = lambda f: pd.DataFrame({"name": [f"{f}-{i}" for i in range(12)], "class": rng.choice(list(CLASSES3), 12),
                                   "tile": np.arange(12) + 20 * f, "pixels": 4096,
                                   **{f"{k}_{c}": rng.integers(1, 50, 12) for k in ("tp", "fp", "fn")
                                      for c in CLASSES3}, **{f"p_{c}": 0.5 for c in CLASSES3}})
    a = [base(f) for f in range(3)]
    with pytest.raises(ValueError, match=message):
        compare(a, spoil([t.copy() for t in a]), CLASSES3, times=10)


def test_interval_holds_the_truth_about_as_often_as_it_says():
    "120 studies of 15 tiles a class, one photograph each, with a known difference: 95 % should cover, 87 % must."
    rng, held = np.random.default_rng(0), 0

    def study(n):
        area, shared = rng.integers(50, 400, n), rng.normal(0, 1, n)
        found = [np.round(area / (1 + np.exp(-shared - shift - rng.normal(0, 0.7, n)))).astype(int)
                 for shift in (0.6, 0.2)]
        base = pd.DataFrame({"name": np.arange(n).astype(str), "class": "A", "tile": np.arange(n), "pixels": 4096,
                             "fp_A": 0, "p_A": 1.0})
        return [[base.assign(tp_A=f, fn_A=area - f)] for f in found]

    truth = compare(*study(200_000), ["A"], times=2).difference
    for _ in range(120):
        c = compare(*study(15), ["A"], times=400)
        held += c.low <= truth <= c.high
    assert held / 120 > 0.87


@given(fold_tables(methods=1))
@settings(max_examples=15, deadline=None)
def test_summary_is_of_the_folds(tables):
    table = summarize(tables[0], CLASSES3)
    each = [scores(t, CLASSES3)["iou_A"] for t in tables[0]]
    assert table.loc["iou_A", "mean"] == pytest.approx(np.mean(each))
    assert table.loc["iou_A", "deviation"] == pytest.approx(np.std(each, ddof=1))
    assert table.loc["iou_A", "pooled"] == scores(pd.concat(tables[0]), CLASSES3)["iou_A"]
    assert table.loc["iou_A", "folds"] == 3


def partitioned(seed):
    "Two methods in two partitions of the same twelve tiles into two folds each."
    rng = np.random.default_rng(seed)
    base = pd.DataFrame({"name": [str(i) for i in range(12)], "class": [*"AAAABBBBCCCC"], "tile": np.arange(12),
                         "pixels": 4096})
    tables = []
    for order in (rng.permutation(12), rng.permutation(12)):
        for half in (order[:6], order[6:]):
            tables.append([base.iloc[half].assign(**{f"{k}_{c}": rng.integers(1, 50, 6) for k in ("tp", "fp", "fn")
                                                     for c in CLASSES3},
                                                  **{f"p_{c}": 0.5 for c in CLASSES3}) for _ in range(2)])
    return [a for a, _ in tables], [b for _, b in tables]


def test_partitions_are_scored_apart_and_tiles_drawn_together():
    a, b = partitioned(0)
    both = compare(a, b, CLASSES3, times=500, partitions=[3, 3, 7, 7])
    alone = [compare(a[i:i + 2], b[i:i + 2], CLASSES3, times=500) for i in (0, 2)]
    assert both.partitions == pytest.approx([c.difference for c in alone])
    assert both.difference == pytest.approx(np.mean(both.partitions))
    assert both.tiles == 12 and len(both.folds) == 4
    twice = compare(a[:2] * 2, b[:2] * 2, CLASSES3, times=500, partitions=[0, 0, 1, 1])
    assert (twice.low, twice.high) == pytest.approx((alone[0].low,
                                                     alone[0].high)), "the same partition again is no further evidence"


def test_a_partition_may_lack_tiles():
    a, b = partitioned(1)
    part = compare(a[:3], b[:3], CLASSES3, times=50, partitions=[0, 0, 1])
    assert part.tiles == 12 and part.partitions[1] == pytest.approx(part.folds[2])


def test_influence_is_the_difference_without_a_tile():
    a, b = partitioned(2)
    table = influence(a, b, CLASSES3, [0, 0, 1, 1])
    whole = compare(a, b, CLASSES3, times=10, partitions=[0, 0, 1, 1]).difference
    assert len(table) == 12 and table["moves"].abs().is_monotonic_decreasing
    for _, row in table.iterrows():
        left = [[t[t["tile"] != row["tile"]] for t in tables] for tables in (a, b)]
        without = compare(*left, CLASSES3, times=10, partitions=[0, 0, 1, 1]).difference
        assert row["without"] == pytest.approx(without) and row["moves"] == pytest.approx(whole - without)


def test_a_comparison_without_an_interval_says_so():
    assert str(Comparison(0.1, None, None, (0.1,), 3)) == "+0.100 [no interval], folds +0.100"


# ---- pixels that are not counted, and batches that make no sense --------------------

@given(seeds, st.sampled_from((255, -1, -100)))
@settings(max_examples=30, deadline=None)
def test_ignored_pixels_are_not_counted(seed, ignore):
    "Whatever is predicted there, NaN included: the counts are those of an image that is sure of nothing there."
    logits, masks, _ = example(seed)
    masks, ignored = masks.long(), torch.rand(masks.shape, generator=torch.Generator().manual_seed(seed)) < 0.3
    counts = count_batch(logits.masked_fill(ignored[:, None], torch.nan), masks.masked_fill(ignored, ignore),
                         ignore_index=ignore)
    expected = count_batch(logits.masked_fill(ignored[:, None], -1e4), masks.masked_fill(ignored, 0))
    for name in ("tp", "fp", "fn", "p_max"):
        assert torch.equal(getattr(counts, name), getattr(expected, name))
    assert torch.equal(counts.pixels, (~ignored).sum((1, 2))) and (expected.pixels == masks[0].numel()).all()


def test_an_alarm_is_a_share_of_the_pixels_that_count():
    "Two false pixels of 10,000 are just an alarm (1 of 5000); one is, where only half of the pixels count."
    logits, masks = torch.full((4, 1, 100, 100), -9.0), torch.zeros(4, 100, 100, dtype=torch.uint8)
    logits[:2, 0, 0, 0] = 9
    masks[1:3, 50:], masks[3] = 255, 255
    logits[2, 0, 50:] = 9  # on ignored pixels
    table = pd.DataFrame(dict(name=list("abcd"), tile=range(4)) | {"class": ["Free"] * 4})
    counts = counts_table(table, count_batch(logits, masks, ignore_index=255), ["A"])
    assert counts["pixels"].tolist() == [10_000, 5000, 5000, 0]
    alarm = lambda rows: scores(counts.iloc[rows], ["A"])["clean_alarm"]
    assert [alarm([i]) for i in range(4)] == [0, 1, 0, None] and alarm([0, 1, 2, 3]) == 1 / 3


def test_ignore_index_is_no_class():
    logits, masks, _ = example(0)
    with pytest.raises(ValueError, match="ignore_index: expected .* outside 0..3, got 2"):
        count_batch(logits, masks, ignore_index=2)
    with pytest.raises(ValueError, match="pass ignore_index=255"):
        count_batch(logits, masks.long().fill_(255))


def test_probabilities_and_empty_batches():
    logits, masks, _ = example(0)
    with pytest.raises(ValueError, match="expected at least one image"):
        count_batch(logits[:0], masks[:0])
    with pytest.raises(ValueError, match="before the sigmoid"):
        count_batch((logits * 9).sigmoid(), masks)
    with pytest.raises(ValueError, match="expected floats, .* got torch.bool"):
        count_batch(logits > 0, masks)
    assert count_batch(logits * 0, masks).tp.sum() == (masks > 0).sum(), "zeros are logits"
