"Poisson blending against an independent dense solution, and the properties that every blend must have."
import importlib.util
import inspect
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy import ndimage
from scipy.fft import dctn, idctn

from dli.method.blending import (copy_batch, cut_paste, grow_mask, grow_window, outside_compiler, poisson_blend,
                                 poisson_blend_image)
from dli.method.multigrid import mask_box
from dli.method.poisson import blend_tensors

NEIGHBOURS = ((-1, 0), (1, 0), (0, -1), (0, 1))
properties = settings(deadline=None, max_examples=60)
EXACT = 0.05 / 255  # the twentieth of a grey level, in images of 0..1


@st.composite
def blends(draw, least=1, most=9):
    "dst, src (B, C, H, W) in 0..1 and masks (B, H, W): random pixels, rectangles at any place, empty or full ones."
    b, c = draw(st.integers(1, 3)), draw(st.sampled_from((1, 3)))
    h, w = draw(st.integers(least, most)), draw(st.integers(least, most))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    mask = np.zeros((b, h, w), bool)
    for one in mask:
        y, x = sorted(rng.integers(0, h + 1, 2)), sorted(rng.integers(0, w + 1, 2))
        kind = draw(st.sampled_from(("rectangle", "pixels", "both", "empty", "full")))
        if kind in ("rectangle", "both"):
            one[slice(*y), slice(*x)] = True
        if kind in ("pixels", "both"):
            one |= rng.random((h, w)) < 0.4
        if kind == "full":
            one[:] = True
    return *(torch.from_numpy(rng.random((b, c, h, w))) for _ in range(2)), torch.from_numpy(mask)


def blend_tensors_of(dst, src, mask, mix):
    "The path of every device: a new batch."
    out = dst.clone()
    blend_tensors(list(out), list(src), list(mask), mix)
    return out


def dense_blend(dst, src, mask, mix):
    "Pixel by pixel, edge by edge, with a dense least-squares solution: one channel (H, W), unclamped."
    h, w = dst.shape
    pixels = [tuple(p) for p in np.argwhere(mask)]
    number = {p: n for n, p in enumerate(pixels)}
    a, b = np.zeros((len(pixels), len(pixels))), np.zeros(len(pixels))
    for p, n in number.items():
        for q in ((p[0] + dy, p[1] + dx) for dy, dx in NEIGHBOURS):
            if not (0 <= q[0] < h and 0 <= q[1] < w):
                continue
            steps = [src[p] - src[q]] + [dst[p] - dst[q]] * mix
            a[n, n] += 1
            b[n] += steps[-1] if mix and abs(steps[-1]) > 1.001 * abs(steps[0]) else steps[0]
            if q in number:
                a[n, number[q]] -= 1
            else:
                b[n] += dst[q]
    out = dst.copy()
    if pixels:
        out[mask] = np.linalg.lstsq(a, b, rcond=1e-12)[0]
    if mask.all():
        out += dst.mean() - out.mean()
    return out


@properties
@given(blends(), st.booleans())
def test_equals_dense_solution(case, mix):
    dst, src, mask = case
    out = poisson_blend(dst, src, mask, mix)
    for i, c in np.ndindex(*dst.shape[:2]):
        expected = dense_blend(dst[i, c].numpy(), src[i, c].numpy(), mask[i].numpy(), mix)
        np.testing.assert_allclose(out[i, c], expected.clip(0, 1), atol=EXACT)


@properties
@given(blends(), st.booleans(), st.sampled_from((torch.uint8, torch.float32, torch.float64)))
def test_outside_unchanged_inputs_unchanged(case, mix, dtype):
    mask = case[2]
    dst, src = ((x * 255).to(dtype) for x in case[:2])
    kept = dst.clone(), src.clone(), mask.clone()
    for out in (poisson_blend(dst, src, mask, mix), cut_paste(dst, src, mask), poisson_blend_image(dst, src, mask)):
        assert out.dtype == dtype and out.shape == dst.shape and out.data_ptr() != dst.data_ptr()
        assert out[~mask.any(2).any(1)].equal(dst[~mask.any(2).any(1)]), "an empty mask changes nothing"
    outside = (~mask)[:, None].expand_as(dst)
    for out in (poisson_blend(dst, src, mask, mix), cut_paste(dst, src, mask)):
        assert torch.equal(out[outside], dst[outside])
    assert all(torch.equal(a, b) for a, b in zip((dst, src, mask), kept))


@properties
@given(blends())
def test_cut_paste_is_the_source_inside(case):
    dst, src, mask = case
    inside = mask[:, None].expand_as(dst)
    assert torch.equal(cut_paste(dst, src, mask)[inside], src[inside])


@properties
@given(blends(least=2), st.floats(0, 1))
def test_zero_guidance_is_harmonic_within_its_boundary(case, level):
    dst, _, mask = case
    out = poisson_blend(dst, torch.full_like(dst, level), mask)
    for image, filled, region in zip(dst.numpy(), out.numpy(), mask.numpy()):
        parts, n = ndimage.label(region)
        for part in (parts == k for k in range(1, n + 1)):
            boundary = image[:, ndimage.binary_dilation(part) & ~region]
            if not boundary.size:
                continue
            for values, around in zip(filled[:, part], boundary):
                assert around.min() - EXACT <= values.min() and values.max() <= around.max() + EXACT


@properties
@given(blends(least=2), st.booleans())
def test_blending_with_itself_changes_nothing(case, mix):
    dst, _, mask = case
    torch.testing.assert_close(poisson_blend(dst, dst, mask, mix), dst, atol=EXACT, rtol=0)
    torch.testing.assert_close(poisson_blend_image(dst, dst, mask, mix), dst, atol=1e-9, rtol=0)


@properties
@given(blends(least=2))
def test_mixed_with_a_flat_source_is_the_target(case):
    dst, src, mask = case
    torch.testing.assert_close(poisson_blend(dst, torch.zeros_like(src), mask, True), dst, atol=EXACT, rtol=0)


@properties
@given(blends(), st.floats(-0.3, 0.3))
def test_level_of_the_source_does_not_matter(case, level):
    dst, src, mask = case
    lifted, plain = src * 0.5 + 0.3 + level / 2, src * 0.5
    torch.testing.assert_close(poisson_blend(dst, lifted, mask), poisson_blend(dst, plain, mask), atol=EXACT, rtol=0)


@properties
@given(blends(), st.booleans())
def test_one_by_one_equals_batch(case, mix):
    dst, src, mask = case
    for blend in (poisson_blend, poisson_blend_image):
        single = [blend(d[None], s[None], m[None], mix) for d, s, m in zip(dst, src, mask)]
        assert torch.equal(blend(dst, src, mask, mix), torch.cat(single))


@properties
@given(blends(least=3))
def test_source_far_away_does_not_matter(case):
    "Not even for the clamping: it sees the mask's box and one pixel around it."
    dst, src, mask = case
    boxes = torch.zeros_like(mask)
    for box, m in zip(boxes, mask):
        y, x = torch.nonzero(m).unbind(1)
        if len(y):
            box[max(y.min() - 1, 0):y.max() + 2, max(x.min() - 1, 0):x.max() + 2] = True
    near = src * 3
    bright, dark = (torch.where(boxes[:, None], near, far) for far in (9.0, 0.0))
    assert torch.equal(poisson_blend(dst, bright, mask), poisson_blend(dst, dark, mask))


@properties
@given(blends())
def test_uint8_is_the_rounded_solution(case):
    dst, src, mask = case
    dst, src = ((x * 255).byte() for x in (dst, src))
    exact = poisson_blend(dst.double() / 255, src.double() / 255, mask) * 255
    assert (poisson_blend(dst, src, mask).double() - exact).abs().max() <= 0.5 + 0.05


def test_three_by_three_by_hand():
    dst = torch.arange(9.0).reshape(1, 1, 3, 3) / 10
    src, mask = torch.zeros(1, 1, 3, 3), torch.zeros(1, 3, 3, dtype=torch.bool)
    src[..., 1, 1], mask[..., 1, 1] = 0.2, True
    assert poisson_blend(dst, src, mask)[0, 0, 1, 1] == pytest.approx(0.4 + 0.2)  # mean of 1, 3, 5, 7 and the bump
    mask[:] = False
    mask[..., 0, 0], src[..., 0, 0] = True, 0.1  # a corner has two neighbours, 1 and 3
    assert poisson_blend(dst, src, mask)[0, 0, 0, 0] == pytest.approx(0.2 + 0.1)
    mask[..., 0, 1] = True  # and with (0, 1): 2a - b = 0.3 + 0.2, 3b - a = 0.2 + 0.4 - (0.1 + 0.2)
    assert poisson_blend(dst, src, mask)[0, 0, 0, :2].tolist() == pytest.approx([0.36, 0.22])


def test_five_by_five_by_hand():
    "A 3x3 hole in a flat frame of 0.5; the source is a spike of 0.4, of which the plus around it carries nothing."
    dst, src = torch.full((1, 1, 5, 5), 0.5), torch.zeros(1, 1, 5, 5)
    mask = torch.zeros(1, 5, 5, dtype=torch.bool)
    mask[:, 1:4, 1:4], src[..., 2, 2] = True, 0.4
    expected = dst.clone()
    expected[..., 2, 2] += 0.4
    torch.testing.assert_close(poisson_blend(dst, src, mask), expected)
    mixed = dst.clone()
    mixed[..., 1, 1] = 0.7  # a spike of 0.2 of the target's own, kept beside the source's
    expected[..., 1, 1] = 0.7
    torch.testing.assert_close(poisson_blend(mixed, src, mask, True), expected)


def test_full_mask_keeps_the_mean():
    dst, src = torch.rand(2, 3, 6, 7) * 0.2 + 0.4, torch.rand(2, 3, 6, 7) * 0.2
    out = poisson_blend(dst, src, torch.ones(2, 6, 7, dtype=torch.bool))
    expected = src - src.mean((2, 3), keepdim=True) + dst.mean((2, 3), keepdim=True)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("h, w", [(33, 32), (65, 65), (22, 42), (129, 129), (1, 7)])
@pytest.mark.parametrize("blend", [poisson_blend, blend_tensors_of], ids=["compiled", "tensors"])
def test_full_mask_with_mixed_gradients(h, w, blend):
    "The equations leave a constant free; it must not grow."
    g = torch.Generator().manual_seed(22)
    dst, src = torch.rand(2, 1, 1, h, w, generator=g)
    out = blend(dst, src, torch.ones(1, h, w, dtype=torch.bool), True)[0, 0].double().numpy()
    steps = [[np.diff(x[0, 0].double().numpy(), axis=axis) for axis in (0, 1)] for x in (src, dst)]
    wanted = [np.where(abs(t) > 1.001 * abs(s), t, s) for s, t in zip(*steps)]
    rooms = ((1, 1), (0, 0)), ((0, 0), (1, 1))
    rise = [-np.diff(np.pad(v, room), axis=axis) for axis, (v, room) in enumerate(zip(wanted, rooms))]
    y, x = np.mgrid[:h, :w]
    waves = 4 - 2 * np.cos(np.pi * y / h) - 2 * np.cos(np.pi * x / w)
    spectrum = dctn(rise[0] + rise[1], norm="ortho") / np.where(waves, waves, 1)
    spectrum[0, 0] = dst.mean().item() * np.sqrt(h * w)
    assert abs(idctn(spectrum, norm="ortho").clip(0, 1) - out).max() < 4 * EXACT


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("mix", [False, True])
@pytest.mark.parametrize("blend", [poisson_blend, blend_tensors_of], ids=["compiled", "tensors"])
def test_values_that_are_no_numbers_are_refused(value, mix, blend):
    dst, src = torch.full((1, 1, 9, 9), 0.5), torch.full((1, 1, 9, 9), 0.3)
    mask = torch.zeros(1, 9, 9, dtype=torch.bool)
    mask[0, 3:6, 3:6], src[0, 0, 4, 4] = True, value
    with pytest.raises(ValueError, match="NaN"):
        blend(dst, src, mask, mix)


@pytest.mark.parametrize("where", ["source, in the region", "source, elsewhere", "target, in the region",
                                   "target, elsewhere"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_blends_that_look_at_whole_images_refuse_no_numbers(value, where):
    "Every pixel of the result depends on every pixel of the target; of the source, on those whose steps are used."
    dst, src, mask = torch.full((3, 1, 9, 9), 0.5), torch.full((3, 1, 9, 9), 0.3), torch.zeros(3, 9, 9,
        dtype=torch.bool)
    mask[:, 3:6, 3:6] = True
    (src if "source" in where else dst)[1, 0, *((4, 4) if "in the" in where else (1, 7))] = value
    if where == "source, elsewhere":
        return poisson_blend(dst, src, mask)
    with pytest.raises(ValueError, match="image 1: expected finite values"):
        poisson_blend_image(dst, src, mask)
    if where == "source, in the region":
        with pytest.raises(ValueError, match="image 1: "):
            poisson_blend(dst, src, mask)


def test_one_pixel_image():
    dst, mask = torch.full((1, 1, 1, 1), 0.3), torch.ones(1, 1, 1, dtype=torch.bool)
    for blend in (poisson_blend, poisson_blend_image):
        assert torch.equal(blend(dst, dst + 0.5, mask), dst)


def test_range():
    dst, src = torch.zeros(1, 1, 3, 3), torch.zeros(1, 1, 3, 3)
    mask = torch.zeros(1, 3, 3, dtype=torch.bool)
    mask[:, 1, 1], src[..., 1, 1] = True, -0.5
    assert poisson_blend(dst, src + 0.5, mask)[..., 1, 1] == 0  # stays in [0, 1]
    assert poisson_blend(dst - 2, src, mask)[..., 1, 1] == -2  # as low as the images go, where they exceed it
    assert poisson_blend(dst.byte() + 5, (src * 100 + 50).byte(), mask)[..., 1, 1] == 0


def test_residual_on_a_large_region():
    rng = np.random.default_rng(0)
    dst, src = (torch.from_numpy(rng.random((1, 1, 96, 80)) * 0.2 + 0.4) for _ in range(2))
    y, x = np.mgrid[:96, :80]
    mask = torch.from_numpy(((y - 70) ** 2 / 3 + (x - 10) ** 2 < 900) & ((x + y) % 11 > 0))[None]
    g, s, inside = *(t[0, 0].numpy() for t in (poisson_blend(dst, src, mask), src)), mask[0].numpy()
    residual = np.zeros_like(g)
    for axis in (0, 1):
        step = np.diff(g - s, axis=axis)
        front, back = np.delete(np.indices(g.shape)[axis], -1, axis), np.delete(np.indices(g.shape)[axis], 0, axis)
        other = np.indices(step.shape)[1 - axis]
        np.add.at(residual, (front, other) if axis == 0 else (other, front), step)
        np.add.at(residual, (back, other) if axis == 0 else (other, back), -step)
    assert np.abs(residual[inside]).max() < EXACT and inside.sum() > 2000


@properties
@given(blends(least=3), st.booleans())
def test_whole_image_variant_solves_its_own_equation(case, mix):
    dst, src, mask = (case[0] * 0.02 + 0.5, case[1] * 0.02 + 0.5, case[2])
    for d, s, m, g in zip(dst.numpy(), src.numpy(), mask.numpy(), poisson_blend_image(dst, src, mask, mix).numpy()):
        rise = np.zeros_like(g)
        for y, x in np.ndindex(*m.shape):
            for p, q in (((y, x), (y + 1, x)), ((y, x), (y, x + 1))):
                if q[0] == m.shape[0] or q[1] == m.shape[1]:
                    continue
                p, q = (slice(None), *p), (slice(None), *q)
                v, t = s[q] - s[p], d[q] - d[p]
                if mix:
                    v = np.where(np.abs(t) > 1.001 * np.abs(v), t, v)
                step = (g[q] - g[p]) - (v if m[y, x] else t)
                rise[p] -= step
                rise[q] += step
        assert np.abs(rise[:, 1:-1, 1:-1]).max() < 1e-9
        for edge in (np.s_[:, 0], np.s_[:, -1], np.s_[:, :, 0], np.s_[:, :, -1]):
            assert (g[edge] == d[edge]).all()


@properties
@given(blends(), st.integers(0, 3))
def test_grow_mask(case, margin):
    grown = grow_mask(case[2], margin)
    for mask, wide in zip(case[2].numpy(), grown.numpy()):
        np.testing.assert_array_equal(wide, ndimage.binary_dilation(mask, np.ones((2 * margin + 1,) * 2)))


@properties
@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(1, 30), st.sampled_from((0, 0.01, 0.2, 1)),
       st.integers(0, 8))
def test_boxes_and_growing_of_windows(seed, h, w, share, margin):
    mask = np.random.default_rng(seed).random((h, w)) < share
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    expected = (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1) if mask.any() else (0, 0, 0, 0)
    assert mask_box(mask) == expected == mask_box(np.asfortranarray(mask))
    assert torch.equal(grow_window(torch.from_numpy(mask), margin), grow_mask(torch.from_numpy(mask)[None], margin)[0])


def test_grow_mask_refuses_a_negative_margin():
    with pytest.raises(ValueError, match="expected 0 or more pixels, got -1"):
        grow_mask(torch.ones(1, 2, 2, dtype=torch.bool), -1)


@pytest.mark.parametrize("change, message", [
    (dict(dst=torch.zeros(4, 4)), r"dst: expected \(B, C, H, W\), got \(4, 4\)"),
    (dict(src=torch.zeros(1, 3, 4, 4)), r"src: expected .* \(1, 1, 4, 4\).* got .* \(1, 3, 4, 4\)"),
    (dict(src=torch.zeros(1, 1, 4, 4).double()), "src: expected torch.float32.* got torch.float64"),
    (dict(mask=torch.zeros(1, 1, 4, 4, dtype=torch.bool)), r"mask: expected torch.bool \(1, 4, 4\)"),
    (dict(mask=torch.zeros(1, 4, 4)), "mask: expected torch.bool .* got torch.float32"),
    (dict(mask=torch.zeros(1, 4, 4, dtype=torch.bool, device="meta")), "on cpu to go with dst, got .* on meta"),
])
def test_wrong_arguments(change, message):
    good = dict(dst=torch.zeros(1, 1, 4, 4), src=torch.zeros(1, 1, 4, 4), mask=torch.zeros(1, 4, 4, dtype=torch.bool))
    for blend in (poisson_blend, cut_paste, poisson_blend_image):
        with pytest.raises(ValueError, match=message):
            blend(**good | change)


def test_wrong_types():
    x, mask = torch.zeros(1, 1, 4, 4), torch.zeros(1, 4, 4, dtype=torch.bool)
    for blend in (poisson_blend, cut_paste, poisson_blend_image):
        for args, name in (((x.numpy(), x, mask), "dst"), ((x, [x], mask), "src"), ((x, x, mask.numpy()), "mask")):
            with pytest.raises(TypeError, match=f"{name}: expected a torch tensor, got"):
                blend(*args)


def test_poisson_refuses_half_precision():
    x = torch.zeros(1, 1, 4, 4, dtype=torch.float16)
    with pytest.raises(ValueError, match="expected one of torch.uint8.*got torch.float16"):
        poisson_blend(x, x, torch.zeros(1, 4, 4, dtype=torch.bool))


@properties
@given(blends(), st.booleans(), st.sampled_from((torch.uint8, torch.float32, torch.float64)),
       st.sampled_from((0, -3, 5)))
def test_tensors_agree_with_the_compiled_kernel(case, mix, dtype, shift):
    "The path for other devices, here on the CPU; the range that results are clamped to included."
    dst, src = ((x * 200 + 20).to(dtype) if dtype == torch.uint8 else x.to(dtype) + shift for x in case[:2])
    out, mask = dst.clone(), case[2]
    blend_tensors(list(out), list(src), list(mask), mix)
    expected = poisson_blend(dst, src, mask, mix)
    assert torch.equal(out[~mask[:, None].expand_as(out)], dst[~mask[:, None].expand_as(dst)])
    allowed = 1 if dtype == torch.uint8 else 2 * EXACT * (1 + abs(shift))
    assert (out.double() - expected.double()).abs().max() <= allowed


@properties
@given(blends(), st.integers(1, 3))
def test_mixed_gradients_do_not_hang_on_rounding(case, step):
    "Steps of equal size are many on 8 bits: floats of 0..1 must choose the same one (the source's)."
    dst, src = ((x * 10).byte() * (10 * step) for x in case[:2])
    real = poisson_blend(dst / 255, src / 255, case[2], True) * 255
    assert (poisson_blend(dst, src, case[2], True) - real).abs().max() <= 0.5 + 0.1


@pytest.mark.parametrize("x", (
    torch.rand(2, 3, 4, 5),
    torch.rand(2, 3, 4, 5).bfloat16(),
    torch.zeros(0, 1, 4, 4),
    torch.zeros(3, 5, 5, dtype=torch.int64),
    torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last),
    torch.ones(2, 2, dtype=torch.bool),
    torch.rand(3, 1, 2, 2, requires_grad=True),
    torch.rand(8, 8)[:, ::2],
), ids=lambda x: f"{tuple(x.shape)}-{x.dtype}-{x.stride()}")
def test_copy_batch_is_clone(x):
    copy = copy_batch(x)
    assert torch.equal(copy, x) and copy.dtype == x.dtype and copy.stride() == x.clone().stride()
    assert not copy.requires_grad and (not x.numel() or copy.data_ptr() != x.data_ptr())


# The environment

@pytest.mark.parametrize("blend", [poisson_blend, poisson_blend_image, cut_paste])
def test_compiled_by_torch_is_the_same(blend):
    g = torch.Generator().manual_seed(0)
    dst, src, mask = torch.rand(2, 3, 9, 9, generator=g), torch.rand(2, 3, 9, 9, generator=g), torch.rand(2, 9, 9,
        generator=g) < 0.4
    torch._dynamo.reset()
    compiled = torch.compile(lambda d, s, m: blend(d + 0, s, m) + 0, backend="eager")
    for _ in range(2):
        assert torch.equal(compiled(dst, src, mask), blend(dst, src, mask))


def test_outside_compiler_keeps_names_and_lets_go_of_torch():
    assert poisson_blend.__name__ == "poisson_blend" and list(inspect.signature(poisson_blend).parameters) == ["dst",
        "src", "mask", "mix_gradients"]
    seen = []
    plain = outside_compiler(lambda x: seen.append(torch.compiler.is_compiling()) or x)
    torch.compile(lambda x: plain(x + 1) + 1, backend="eager")(torch.ones(2))
    assert seen == [False]


KERNEL = """
from dli.method.multigrid import compiled

@compiled
def twice(x):
    return 2 * x
"""


def load_kernel(folder):
    "A module with a compiled function, imported anew."
    (folder / "kernel.py").write_text(KERNEL)
    spec = importlib.util.spec_from_file_location("kernel", folder / "kernel.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module.twice


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("numba.core.config.CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def cached(folder):
    return sorted(p.suffix for p in folder.rglob("*.nb*"))


def test_compiled_code_is_kept_where_there_is_room(cache, tmp_path):
    for hits in (0, 1):
        twice = load_kernel(tmp_path)
        assert (twice(21), twice(2.5)) == (42, 5.0) and cached(cache) == [".nbc", ".nbc", ".nbi"]
        assert list(twice.stats.cache_hits.values()) == [hits] * (2 * hits)


@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:len(b) // 2], lambda b: b"\0" * len(b),
                                    lambda b: b[::-1]],
                         ids=["empty", "half", "zeros", "reversed"])
def test_damaged_files_of_compiled_code(cache, tmp_path, suffix, damage):
    load_kernel(tmp_path)(21)
    for path in cache.rglob(f"*{suffix}"):
        path.write_bytes(damage(path.read_bytes()))
    assert load_kernel(tmp_path)(21) == 42


def test_compiled_code_when_the_disk_is_full(cache, tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("numba.core.caching.IndexDataCacheFile._open_for_write", refuse)
    assert load_kernel(tmp_path)(21) == 42 and cached(cache) == []


def test_compiled_code_without_any_folder(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    (tmp_path / "file").touch()
    monkeypatch.setattr("numba.core.config.CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr("numba.core.caching._CacheLocator.ensure_cache_path", refuse)
    assert load_kernel(tmp_path)(21) == 42 and cached(tmp_path) == []


NO_ROOM = """
import os, tempfile
makedirs = os.makedirs
def refuse(path=None, *args, **kwargs):
    if not str(path).startswith(os.environ["TORCHINDUCTOR_CACHE_DIR"]): raise OSError(30, "Read-only file system")
    makedirs(path, *args, **kwargs)
os.makedirs = tempfile.TemporaryFile = refuse
"""


def no_room(folder):
    "An environment in which only PyTorch has a folder to write to, without which it can't be imported."
    (folder / "file").touch()
    nowhere = str(folder / "file" / "home")
    return dict(HOME=nowhere, NUMBA_CACHE_DIR=nowhere, XDG_CACHE_HOME=nowhere, PYTHONDONTWRITEBYTECODE="1",
                TORCHINDUCTOR_CACHE_DIR=str(folder / "torch"), MPLCONFIGDIR=str(folder / "torch"))


def test_the_library_without_a_writable_home(tmp_path):
    "Imported and used, in a process that can write nowhere but to PyTorch's folder."
    code = NO_ROOM + """
import torch
from dli import DonorPool, DynamicLabelInjection, synthetic_tiles
tiles = synthetic_tiles(60, size=32)
masks = torch.from_numpy(tiles.masks)
after, labels = DynamicLabelInjection(DonorPool(tiles), fill="all")(torch.from_numpy(tiles.images)[:, None], masks)
print((labels > 0).flatten(1).any(1).all().item())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env=os.environ | no_room(tmp_path), timeout=300)
    assert done.returncode == 0 and done.stdout.split()[-1] == "True", done.stderr


ONE_BLEND = """
import torch
from dli import poisson_blend
for dtype in (torch.uint8, torch.float32, torch.float64):
    x = torch.rand(1, 1, 9, 9).mul(255).to(dtype)
    poisson_blend(x[..., ::2], x.flip(-1)[..., ::2], torch.ones(1, 9, 5, dtype=torch.bool).tril(), True)
"""


def test_compiling_is_announced_once_and_done_once(tmp_path):
    "One line on stderr with the first blend; one version of each kernel, whatever the images' type and strides."
    environment = os.environ | dict(NUMBA_CACHE_DIR=str(tmp_path))
    errors = [subprocess.run([sys.executable, "-c", ONE_BLEND], capture_output=True, text=True, env=environment,
                             timeout=600, check=True).stderr.splitlines() for _ in range(2)]
    assert [len([line for line in e if line.startswith("dli: compiling")]) for e in errors] == [1, 0]
    kernels = [path.name for path in tmp_path.rglob("*.nbi")]
    assert kernels and len(list(tmp_path.rglob("*.nbc"))) == len(kernels)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_cuda_agrees():
    dst, src = torch.rand(2, 4, 3, 32, 32)
    mask = torch.zeros(4, 32, 32, dtype=torch.bool)
    mask[:, 5:20, :17] = True
    for blend in (poisson_blend, cut_paste, poisson_blend_image):
        out = blend(dst.cuda(), src.cuda(), mask.cuda())
        assert out.is_cuda
        torch.testing.assert_close(out.cpu(), blend(dst, src, mask), atol=2 * EXACT, rtol=0)
