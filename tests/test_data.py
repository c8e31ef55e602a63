"""Properties and faults of dli.data: folds, tiles, verification, download, synthetic tiles."""
import http.server
import multiprocessing
import re
import subprocess
import sys
import threading
import time
import unicodedata
import warnings
import zipfile
from hashlib import sha256
from importlib import import_module
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

import dli.data
from dli.files import csv_bytes, read_table
from dli.pictures import drawable
from dli.data import magnetic
from dli.data.samples import FREE, TABLE_COLUMNS, Samples, class_members, dataset_table, same_name, show_samples
from dli.data.splits import SPLITS, find_folds, held_out, rarest_class, split_samples
from dli.data.magnetic import (MT_CLASSES, BrokenDownload, DamagedDataset, DownloadError, find_magnetic_tiles,
                               find_problems, index_fingerprint, magnetic_tiles, unpack, verify_magnetic_tiles)
from dli.data.synthetic import SYNTHETIC_VERSION, add_defect, clean_surface, synthetic_tiles
from dli.experiment.datasets import data_fingerprint, load_dataset, resolve_dataset
from conftest import patch

SHIPPED = Path(dli.__file__).parent / "data"  # tables that come with the package

ROOT = find_magnetic_tiles()
needs_real = pytest.mark.skipif(ROOT is None, reason="the Magnetic Tiles are not on this machine (set DLI_DATA)")
CLASSES = (*MT_CLASSES, FREE)


# ---- the wing ------------------------------------------------------------------------------------------------------

LIGHT = """
import sys
import numpy as np, pandas as pd
from dli.data import Samples
table = pd.DataFrame({"name": ["a"], "class": ["Free"], "tile": [1], "exposure": 1})
table = table.assign(width=8, height=8, usable=True)
zeros = np.zeros((1, 8, 8), np.uint8)
assert Samples(zeros, zeros, table, ("Crack",), "own")[0].clean.all()
print(*sys.modules)
"""


def test_making_samples_loads_no_heavy_package():
    loaded = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=True).stdout.split()
    heavy = {"torch", "torchvision", "sklearn", "matplotlib", "scipy", "requests", "platformdirs", "tqdm", "PIL"}
    assert not heavy & set(loaded)


def test_the_doors_names_are_what_the_rooms_export():
    rooms = {path.stem for path in Path(dli.data.__file__).parent.glob("*.py")} - {"__init__"}
    exported = [name for room in rooms for name in import_module(f"dli.data.{room}").__all__]
    assert {"samples", "folders", "check"} < rooms
    assert sorted(exported) == sorted(dli.data.__all__)


# ---- a small dataset on disk -------------------------------------------------------------------------------------

def write_dataset(root, classes=CLASSES, each=3, side=40):
    """Write noise images and masks as the Magnetic Tiles have them; return their index."""
    rng, rows, number = np.random.default_rng(0), [], 100
    for c in classes:
        (folder := root / f"MT_{c}" / "Imgs").mkdir(parents=True)
        for exposure in range(1, each + 1):
            number += 10 if exposure > 1 else 1000
            stem = folder / f"exp{exposure}_num_{number}"
            Image.fromarray(rng.integers(0, 255, (side + 4, side), np.uint8)).save(stem.with_suffix(".jpg"), quality=95)
            mask = np.zeros((side + 4, side), np.uint8)
            mask[4:12, 4:12] = 255 * (c != FREE)
            mask[0, 0] = number % 100 * (c != FREE)
            Image.fromarray(mask).save(stem.with_suffix(".png"))
            rows.append({"name": stem.name, "class": c, "number": number, "exposure": exposure,
                         "width": side, "height": side + 4, "tile": number - 10 * (exposure - 1), "usable": True,
                         **{k: sha256(stem.with_suffix(f".{k}").read_bytes()).hexdigest() for k in ("jpg", "png")}})
    return pd.DataFrame(rows)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A dataset of 18 photographs that the package takes for the Magnetic Tiles, with no other place to find them."""
    monkeypatch.delenv("DLI_DATA", raising=False)
    patch(monkeypatch, "cache_folder", lambda: tmp_path / "cache" / "magnetic-tiles")
    index = write_dataset(tmp_path / "tiles")
    patch(monkeypatch, "read_index", lambda: index)
    return tmp_path / "tiles"


def first(root, pattern, k=0):
    return sorted(root.glob(pattern))[k]


def truncate(root):
    path = first(root, "MT_Crack/Imgs/*.jpg")
    path.write_bytes(path.read_bytes()[:-300])
    return rf"{path.name}: truncated or damaged .*expected an image of 40 x 44"


def empty(root):
    path = first(root, "MT_Free/Imgs/*.jpg")
    path.write_bytes(b"")
    return rf"{path.name}: empty; expected an image of 40 x 44"


def lose_mask(root):
    path = first(root, "MT_Break/Imgs/*.png")
    path.unlink()
    return rf"{path.name}: missing; it is the mask of MT_Break/Imgs/{path.stem}.jpg"


def lose_image(root):
    path = first(root, "MT_Break/Imgs/*.jpg")
    path.unlink()
    return rf"MT_Break/Imgs/{path.name}: missing"


def resize_mask(root):
    path = first(root, "MT_Fray/Imgs/*.png")
    Image.open(path).resize((30, 20)).save(path)
    return rf"{path.name}: another size: expected 40 x 44 pixels, got 30 x 20"


def swap(root):
    a, b = first(root, "MT_Uneven/Imgs/*.jpg"), first(root, "MT_Crack/Imgs/*.jpg")
    content = a.read_bytes()
    a.write_bytes(b.read_bytes()), b.write_bytes(content)
    return rf"(?s){b.name}: swapped or renamed: its content is that of MT_Uneven/Imgs/{a.name}.*{a.name}: swapped"


def repaint(root):
    path = first(root, "MT_Uneven/Imgs/*.png")
    Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    return rf"{path.name}: other content"


def text_file(root):
    path = first(root, "MT_Free/Imgs/*.jpg")
    path.write_text("version https://git-lfs.github.com/spec/v1")
    return rf"{path.name}: truncated or damaged"


def extra_class(root):
    (root / "MT_Scratch/Imgs").mkdir(parents=True)
    Image.new("L", (4, 4)).save(root / "MT_Scratch/Imgs/1.jpg")
    return r"MT_Scratch: extra class folder with 1 images; expected only MT_Blowhole, .*MT_Uneven"


def extra_image(root):
    Image.new("L", (4, 4)).save(root / "MT_Free/Imgs/mine.png")
    return r"MT_Free/Imgs/mine.png: extra file"


def lose_class(root):
    for path in root.glob("MT_Fray/Imgs/*"):
        path.unlink()
    return r"MT_Fray: class folder missing, or without images; expected 6 files"


FAULTS = [truncate, empty, lose_mask, lose_image, resize_mask, swap, repaint, text_file, extra_class, extra_image,
          lose_class]


def test_reads_every_photograph(small):
    samples = magnetic_tiles(small, size=20)
    assert len(samples) == 18 and samples.source == "magnetic-tiles" and samples.images.shape == (18, 20, 20)
    assert samples.table["tile"].nunique() == 6
    assert samples.label.tolist() == [k for k in (1, 2, 3, 4, 5, 0) for _ in range(3)]
    assert all(set(np.unique(m)) == {0, k} for m, k in zip(samples.masks[:15], samples.label))


def test_threshold_is_exclusive(small):
    high, low = (magnetic_tiles(small, size=20, threshold=t).masks for t in (254, 0))
    assert (high > 0).sum() < (low > 0).sum() and (high > 0).any()
    for wrong in (dict(threshold=255), dict(threshold=-1), dict(size=1)):
        with pytest.raises(ValueError, match="expected size >= 8 and threshold in 0..254"):
            magnetic_tiles(small, **wrong)


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_file_is_named(small, fault):
    expected = fault(small)
    with pytest.raises(DamagedDataset, match=expected) as error:
        magnetic_tiles(small, size=16)
    assert str(small) in str(error.value) and "Put the named files back" in str(error.value)


def test_all_problems_are_listed_and_capped(small):
    truncate(small), resize_mask(small), extra_image(small)
    with pytest.raises(DamagedDataset, match="3 problems"):
        verify_magnetic_tiles(small)
    for k in range(30):
        (small / f"MT_Free/Imgs/x{k}.png").write_bytes(b"x")
    with pytest.raises(DamagedDataset, match=r"33 problems(.|\n)*and 13 more"):
        verify_magnetic_tiles(small)


@pytest.mark.parametrize("harmless", [
    "README.md", "dataset.jpg", ".git/x.png", "MT_Free/Imgs/.DS_Store", "MT_Free/Imgs/Thumbs.db"])
def test_harmless_files_are_fine(small, harmless):
    (small / harmless).parent.mkdir(exist_ok=True)
    (small / harmless).write_bytes(b"x")
    verify_magnetic_tiles(small)
    assert find_problems(small, magnetic.read_index()) == []


def test_folder_above_is_recognised(small, tmp_path):
    with pytest.raises(DamagedDataset, match="no class folder here; but there are some in its subfolder 'tiles'"):
        magnetic_tiles(tmp_path)


# ---- where it is looked for --------------------------------------------------------------------------------------

def test_search_order(small, tmp_path, monkeypatch):
    assert find_magnetic_tiles() is None
    (cached := magnetic.cache_folder()).mkdir(parents=True)
    assert find_magnetic_tiles() == cached
    monkeypatch.setenv("DLI_DATA", str(small))
    assert find_magnetic_tiles() == small
    assert find_magnetic_tiles(tmp_path) == tmp_path


@pytest.mark.parametrize("name", ["root", "DLI_DATA"])
def test_wrong_place_is_never_skipped(small, monkeypatch, name):
    magnetic.cache_folder().parent.mkdir()
    small.rename(magnetic.cache_folder())  # the next place would do
    if name == "DLI_DATA":
        monkeypatch.setenv("DLI_DATA", "/no/such/folder")
    with pytest.raises(FileNotFoundError, match=f"{name} = '/no/such/folder': no such folder"):
        magnetic_tiles("/no/such/folder" if name == "root" else None)
    if name == "DLI_DATA":
        with pytest.raises(FileNotFoundError):
            load_dataset("auto")


def test_damaged_is_an_error_under_auto(small, monkeypatch):
    monkeypatch.setenv("DLI_DATA", str(small))
    lose_mask(small)
    with pytest.raises(DamagedDataset):
        load_dataset("auto", size=32)


def test_unknown_dataset_lists_the_choices():
    with pytest.raises(ValueError, match="'magnetic_tiles': expected one of auto, magnetic-tiles, synthetic"):
        load_dataset("magnetic_tiles")


def test_resolving_a_found_dataset_reads_nothing(small, monkeypatch, recwarn):
    monkeypatch.setenv("DLI_DATA", str(small))
    for name in ("decode_all", "verify_magnetic_tiles", "fetch_magnetic_tiles"):
        patch(monkeypatch, name, None)
    assert resolve_dataset("auto") == "magnetic-tiles" and not len(recwarn)


@pytest.mark.parametrize("name", ["magnetic-tiles", "synthetic"])
def test_resolving_a_settled_name_looks_nowhere(name, monkeypatch):
    for used in ("find_magnetic_tiles", "fetch_magnetic_tiles"):
        patch(monkeypatch, used, None)
    assert resolve_dataset(name) == name


@pytest.mark.parametrize("function", [resolve_dataset, data_fingerprint])
@pytest.mark.parametrize("name", ["magnetic_tiles", "", None])
def test_unknown_names_are_refused(function, name):
    message = f"unknown dataset {name!r}: expected one of .*magnetic-tiles, synthetic"
    with pytest.raises(ValueError, match=message):
        function(name)


def test_resolving_a_wrong_place_is_an_error(small, monkeypatch):
    monkeypatch.setenv("DLI_DATA", "/no/such/folder")
    with pytest.raises(FileNotFoundError, match="DLI_DATA = '/no/such/folder'"):
        resolve_dataset("auto")


# ---- fingerprints ------------------------------------------------------------------------------------------------

@pytest.fixture
def fresh():
    """No fingerprint of the index is remembered, before the test or after it."""
    index_fingerprint.cache_clear()
    yield
    index_fingerprint.cache_clear()


def test_fingerprint_needs_no_dataset_and_is_cached(fresh, tmp_path, monkeypatch):
    monkeypatch.setenv("DLI_DATA", "/no/such/folder")
    patch(monkeypatch, "cache_folder", lambda: tmp_path / "none")
    found = data_fingerprint("magnetic-tiles")
    assert re.fullmatch("[0-9a-f]{16}", found)
    patch(monkeypatch, "read_index", None)
    assert data_fingerprint("magnetic-tiles") == found


def test_fingerprint_of_the_index_does_not_depend_on_line_ends(fresh, tmp_path, monkeypatch):
    shipped = SHIPPED.joinpath("magnetic_tiles.csv").read_bytes().replace(b"\r\n", b"\n")
    found = data_fingerprint("magnetic-tiles")
    assert found == sha256(shipped).hexdigest()[:16]
    (tmp_path / "windows.csv").write_bytes(shipped.replace(b"\n", b"\r\n"))
    patch(monkeypatch, "read_index", lambda: pd.read_csv(tmp_path / "windows.csv"))
    index_fingerprint.cache_clear()
    assert data_fingerprint("magnetic-tiles") == found


@pytest.mark.parametrize("column, value", [("tile", 1), ("usable", False), ("png", "0" * 64), ("class", "Fray")])
def test_fingerprint_changes_with_the_index(fresh, monkeypatch, column, value):
    found, index = data_fingerprint("magnetic-tiles"), magnetic.read_index()
    index.loc[1000, column] = value
    patch(monkeypatch, "read_index", lambda: index)
    index_fingerprint.cache_clear()
    assert data_fingerprint("magnetic-tiles") != found


def test_fingerprint_of_synthetic_tiles_is_their_version(monkeypatch):
    patch(monkeypatch, "synthetic_tiles", None)
    found = data_fingerprint("synthetic")
    assert re.fullmatch("[0-9a-f]{16}", found) and int(found, 16) == SYNTHETIC_VERSION
    patch(monkeypatch, "SYNTHETIC_VERSION", SYNTHETIC_VERSION + 1)
    assert data_fingerprint("synthetic") != found


def test_fingerprint_of_auto_is_refused():
    with pytest.raises(ValueError, match="got 'auto': call resolve_dataset first"):
        data_fingerprint("auto")


# ---- download ----------------------------------------------------------------------------------------------------

class Server(http.server.ThreadingHTTPServer):
    """Serves `content` on the loopback. May break off after `cut` bytes, ignore ranges, refuse, or be slow."""
    content, cut, ranges, status, pause = b"", None, True, None, 0

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked = []


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, given = self.server, self.headers.get("Range")
        server.asked.append(given)
        start = int(re.fullmatch(r"bytes=(\d+)-", given)[1]) if given and server.ranges else 0
        body = server.content[start:]
        self.send_response(server.status or (416 if start and not body else 206 if start else 200))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        time.sleep(server.pause)
        self.wfile.write(body[:server.cut])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(small, monkeypatch):
    """A server for a zip of the small dataset, packed as the repository's is."""
    (small / "README.md").write_text("about")
    archive = small.parent / "repository.zip"
    with zipfile.ZipFile(archive, "w") as zipped:
        for path in sorted(small.rglob("*")):
            zipped.write(path, Path("repo-master") / path.relative_to(small))
        zipped.writestr("repo-master/padding.bin", np.random.default_rng(0).bytes(400_000))
    server = Server()
    server.content = archive.read_bytes()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    patch(monkeypatch, "MT_URL", f"http://127.0.0.1:{server.server_port}/master.zip")
    yield server
    server.shutdown(), server.server_close()


def part_file():
    return magnetic.cache_folder().with_name("magnetic-tiles.zip.part")


def left_behind():
    """What lies beside the cache, but for the lock."""
    return sorted(p.name for p in magnetic.cache_folder().parent.iterdir() if p.suffix != ".lock")


def test_download_is_verified_and_cached(server):
    samples = magnetic_tiles(size=16)
    assert len(samples) == 18 and magnetic.cache_folder().is_dir() and server.asked == [None]
    assert left_behind() == ["magnetic-tiles"]
    assert len(load_dataset("auto", size=16)) == 18 and len(server.asked) == 1


def test_resolving_auto_downloads_once(server):
    assert [resolve_dataset("auto") for _ in range(2)] == ["magnetic-tiles"] * 2
    assert magnetic.cache_folder().is_dir() and server.asked == [None]
    assert load_dataset("auto", size=16).source == "magnetic-tiles" and server.asked == [None]


def test_interrupted_download_resumes(server):
    server.cut = 250_000
    with pytest.raises(DownloadError, match="DLI_DATA"):
        magnetic_tiles(size=16)
    arrived = part_file().stat().st_size
    assert 0 < arrived <= 250_000 and not magnetic.cache_folder().exists()
    server.cut = None
    assert len(magnetic_tiles(size=16)) == 18
    assert server.asked == [None, f"bytes={arrived}-"] and not part_file().exists()


def test_download_starts_over_where_the_server_cannot_resume(server):
    server.cut = 250_000
    with pytest.raises(DownloadError):
        magnetic_tiles(size=16)
    server.cut, server.ranges = None, False
    assert len(magnetic_tiles(size=16)) == 18


def test_stale_part_longer_than_the_file_is_replaced(server):
    part_file().parent.mkdir(parents=True)
    part_file().write_bytes(b"x" * (len(server.content) + 5))
    assert len(magnetic_tiles(size=16)) == 18 and server.asked[-1] is None


def test_stale_part_is_found_out_and_dropped(server):
    part_file().parent.mkdir(parents=True)
    part_file().write_bytes(b"x" * 1000)
    with pytest.raises((DownloadError, DamagedDataset)):
        magnetic_tiles(size=16)
    assert len(magnetic_tiles(size=16)) == 18


def test_truncated_zip_without_length_is_an_error(server):
    server.content = server.content[:200_000]
    with pytest.raises(DownloadError, match="not a zip file"):
        magnetic_tiles(size=16)
    assert not left_behind()


@pytest.mark.parametrize("status", [404, 500])
def test_refusing_server_falls_back_only_under_auto(server, status, capsys):
    server.status = status
    with pytest.raises(DownloadError, match=str(status)):
        load_dataset("magnetic-tiles", size=32)
    with pytest.warns(UserWarning, match="SYNTHETIC DATA"):
        samples = load_dataset("auto", size=32)
    assert samples.source == "synthetic" and "SYNTHETIC DATA" in capsys.readouterr().out
    with pytest.warns(UserWarning, match="SYNTHETIC DATA"):
        assert resolve_dataset("auto") == "synthetic"
    assert "SYNTHETIC DATA" in capsys.readouterr().out and resolve_dataset("magnetic-tiles") == "magnetic-tiles"
    with pytest.raises(DownloadError, match=str(status)):
        resolve_dataset("auto", fallback=False)


def test_unreachable_host_says_where_to_put_the_folder(server, monkeypatch):
    patch(monkeypatch, "MT_URL", "http://127.0.0.1:9/master.zip")
    with pytest.raises(DownloadError) as error:
        magnetic_tiles(size=16)
    message = str(error.value)
    assert "root=" in message and "DLI_DATA" in message and str(magnetic.cache_folder()) in message


def test_damaged_download_never_reaches_the_cache(server, small):
    first(small, "MT_Crack/Imgs/*.jpg").write_bytes(b"x")
    archive = small.parent / "bad.zip"
    with zipfile.ZipFile(archive, "w") as zipped:
        for path in small.rglob("*"):
            zipped.write(path, Path("repo-master") / path.relative_to(small))
    server.content = archive.read_bytes()
    with pytest.raises(DamagedDataset, match="The zip from .*(.|\n)*1 problem"):
        load_dataset("auto", size=16)
    assert not left_behind()


@pytest.mark.parametrize("name", [
    "repo/../../evil.txt", "/evil.txt", "repo\\..\\..\\evil.txt", "C:/evil.txt", "../evil.txt"])
def test_zip_that_leads_outside_stays_in_the_folder(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as zipped:
        zipped.writestr(name, "evil")
    unpack(tmp_path / "evil.zip", tmp_path / "deep" / "into")
    files = [p for p in tmp_path.rglob("*") if p.is_file() and p.name != "evil.zip"]
    assert len(files) == 1 and files[0].is_relative_to(tmp_path / "deep" / "into")


def test_zip_with_a_link_makes_no_link(tmp_path):
    link = zipfile.ZipInfo("repo/link")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as zipped:
        zipped.writestr(link, "/etc")
    unpack(tmp_path / "evil.zip", tmp_path / "into")
    assert not any(p.is_symlink() for p in tmp_path.rglob("*"))


def test_zip_bomb_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    patch(monkeypatch, "UNPACKED_MOST", 2**20)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as zipped:
        for k in range(3):
            zipped.writestr(f"repo/{k}", bytes(400_000))
    assert (tmp_path / "bomb.zip").stat().st_size < 5000
    with pytest.raises(DamagedDataset, match="at most 1,048,576 bytes when unpacked, got 1,200,000; nothing was"):
        unpack(tmp_path / "bomb.zip", tmp_path / "into")
    assert not (tmp_path / "into").exists()


def test_zip_bomb_is_an_error_under_auto(server, monkeypatch):
    patch(monkeypatch, "UNPACKED_MOST", 1000)
    with pytest.raises(DamagedDataset, match="nothing was unpacked"):
        resolve_dataset("auto")
    assert not left_behind()


@pytest.mark.parametrize("name", ["auto", "magnetic-tiles"])
def test_a_download_that_broke_off_is_an_error(server, name):
    server.cut = 250_000
    for _ in range(1 + (name == "auto")):
        with pytest.raises(BrokenDownload, match="interrupted download resumes"):
            load_dataset(name, size=32)
        server.status, server.cut = 500, 0
    server.status = server.cut = None
    assert load_dataset(name, size=32).source == "magnetic-tiles"


def fetch_and_count(results):
    results.put(len(magnetic_tiles(size=16)))


def test_several_processes_download_once(server):
    server.pause = 0.5
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=fetch_and_count, args=(results,)) for _ in range(3)]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [18] * 3 and server.asked == [None]
    for process in processes:
        process.join()


def test_the_next_process_tries_again_after_one_that_failed(server):
    server.pause, server.cut = 0.5, 250_000
    failures = []

    def fail():
        try:
            magnetic_tiles(size=16)
        except DownloadError as error:
            failures.append(error)
        server.cut = None

    first = threading.Thread(target=fail)
    first.start()
    time.sleep(0.2)
    waiting = threading.Thread(target=lambda: failures.append(len(magnetic_tiles(size=16))))
    waiting.start()
    first.join(), waiting.join()
    assert isinstance(failures[0], BrokenDownload) and magnetic.cache_folder().is_dir() and not part_file().exists()


@given(parts=st.lists(st.sampled_from(["..", "a", "b.jpg", ".", "...", "MT_Free"]), min_size=2, max_size=6))
@settings(max_examples=60, deadline=None)
def test_unpack_stays_inside_or_refuses(tmp_path_factory, parts):
    base = tmp_path_factory.mktemp("zip")
    with zipfile.ZipFile(base / "x.zip", "w") as zipped:
        zipped.writestr("/".join(parts), "x")
    try:
        unpack(base / "x.zip", base / "deep" / "into")
    except (DamagedDataset, OSError):
        pass
    assert all(p.is_relative_to(base / "deep" / "into") for p in base.rglob("*") if p.is_file() and p.name != "x.zip")


# ---- Samples -----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def synthetic():
    return synthetic_tiles(200, 32)


def rebuilt(samples, **changes):
    fields = {k: getattr(samples, k) for k in ("images", "masks", "table", "classes", "source")}
    return Samples(**fields | changes)


@given(idx=st.lists(st.integers(-200, 199), max_size=20))
@settings(max_examples=30, deadline=None)
def test_indexing_keeps_image_mask_and_row_together(synthetic, idx):
    chosen = synthetic[idx]
    assert len(chosen) == len(idx) and list(chosen.table.index) == list(range(len(idx)))
    assert (chosen.images == synthetic.images[idx]).all() and (chosen.masks == synthetic.masks[idx]).all()
    assert chosen.table["name"].tolist() == [synthetic.table["name"].iloc[i] for i in idx]


def test_indexing_by_mask_slice_and_number(synthetic):
    assert synthetic[synthetic.clean].clean.all() and len(synthetic[10:14]) == 4 and len(synthetic[3]) == 1
    with pytest.raises(IndexError):
        synthetic[[200]]
    with pytest.raises(IndexError):
        synthetic[np.ones(3, bool)]


@pytest.mark.parametrize("change, message", [
    (lambda s: dict(images=s.images.astype(float)), r"images: expected uint8 .* got float64"),
    (lambda s: dict(images=s.images[:, None]), r"images: expected uint8 \(N, H, W\).*channels come last"),
    (lambda s: dict(images=s.images[..., None].repeat(40, -1)), r"images: .*an image is \(H, W\), or \(H, W, C\)"),
    (lambda s: dict(masks=s.masks[:-1]), r"table: expected 199 rows, one per image \(masks\), got 200"),
    (lambda s: dict(masks=s.masks[:, :-1]), r"masks: expected whole numbers \(200, 32, 32\) like the images"),
    (lambda s: dict(classes=s.classes[:2]), r"table: expected the classes .* got also \['Crack', 'Fray', 'Uneven'\]"),
    (lambda s: dict(table=s.table[:-1]), r"table: expected 200 rows"),
    (lambda s: dict(table=s.table.drop(columns="tile")), r"missing \['tile'\]"),
    (lambda s: dict(table=s.table.replace("Crack", "Rust")), r"got also \['Rust'\]"),
    (lambda s: dict(table=s.table.assign(**{"class": "Free"})),
     r"Free images have no defect pixels, but \d+ do: 'synthetic_0_exp"),
])
def test_samples_refuse_what_does_not_fit(synthetic, change, message):
    with pytest.raises(ValueError, match=message):
        rebuilt(synthetic, **change(synthetic))


def test_samples_take_colour(synthetic):
    colour = rebuilt(synthetic, images=np.repeat(synthetic.images[..., None], 3, -1))
    assert colour[:5].images.shape == (5, 32, 32, 3)
    show_samples(colour, [0, 100], titles=["a", "b"])


CLASSES_TWO = ("A", "B")


def own(size=(12, 20), channels=0, per=2, parts=5):
    """A small data set of one's own: `parts` parts of A, of B and clean ones, `per` photographs of each, not square."""
    rows, masks = [], []
    for kind in range(3):
        for part in range(parts):
            for view in range(per):
                masks.append(np.zeros(size, np.uint8))
                masks[-1][2:6, 3:9] = kind
                rows.append({"name": f"{kind}{part}{view}", "class": ("Free", *CLASSES_TWO)[kind],
                             "tile": parts * kind + part, "exposure": 1,
                             "width": size[1], "height": size[0], "usable": True})
    images = np.random.default_rng(0).integers(0, 256, (len(masks), *size, *([channels] * (channels > 0))), np.uint8)
    return dict(images=images, masks=np.stack(masks), table=pd.DataFrame(rows), classes=CLASSES_TWO, source="own")


def made(**changes):
    """Samples of `own`; columns of the table are given as `table_<column>`."""
    fields = own()
    columns = {k.removeprefix("table_"): changes.pop(k) for k in list(changes) if k.startswith("table_")}
    return Samples(**fields | dict(table=fields["table"].assign(**columns)) | changes)


def fill(values, i, value):
    values = list(values)
    values[i] = value
    return values


def altered(array, i, value):
    array = array.copy()
    array[i] = value
    return array


OWN = own()
IMAGES, MASKS, TABLE = OWN["images"], OWN["masks"], OWN["table"]
SAME = {  # different ways to give the same samples
    "lists": dict(images=list(IMAGES), masks=MASKS.tolist(), classes=list(CLASSES_TWO)),
    "one channel": dict(images=IMAGES[..., None], masks=MASKS[..., None]),
    "masks with a channel": dict(masks=MASKS[:, None]),
    "mirrored views": dict(images=np.ascontiguousarray(IMAGES[:, ::-1])[:, ::-1],
                           masks=np.ascontiguousarray(MASKS[..., ::-1])[..., ::-1]),
    "other order": dict(images=np.asfortranarray(IMAGES), masks=np.asfortranarray(MASKS)),
    "every second": dict(images=IMAGES.repeat(2, 2)[:, :, ::2]),
    "int64 masks": dict(masks=MASKS.astype(np.int64)),
    "float masks": dict(masks=MASKS.astype(np.float32)),
    "big endian masks": dict(masks=MASKS.astype(">i4")),
    "usable 1": dict(table_usable=1),
    "usable 1.0": dict(table_usable=1.0),
    "usable objects": dict(table_usable=pd.Series([True] * 30, dtype=object)),
    "usable nullable": dict(table_usable=pd.array([True] * 30, "boolean")),
    "float parts": dict(table_tile=TABLE["tile"].astype(float)),
    "object parts": dict(table_tile=TABLE["tile"].astype(object)),
    "nullable parts": dict(table_tile=pd.array(TABLE["tile"], "Int64")),
    "categories": {f"table_{c}": pd.Categorical(TABLE[c]) for c in ("name", "class", "tile")},
    "nullable text": {f"table_{c}": pd.array(TABLE[c], "string") for c in ("name", "class")},
    "nullable numbers": dict(table_width=pd.array([20] * 30, "Int32"), table_height=pd.array([12.0] * 30, "Float64")),
    "float sizes": dict(table_width=20.0, table_height=12.0),
    "another index": dict(table=TABLE.set_index(np.arange(30)[::-1] * 7)),
    "another column": dict(table_note=np.nan),
}


@pytest.mark.parametrize("way", SAME)
def test_samples_are_the_same_whichever_way_they_are_given(way):
    expected, found = made(), made(**SAME[way])
    for name in ("images", "masks"):
        array = getattr(found, name)
        assert (array == getattr(expected, name)).all() and array.dtype == np.uint8
        assert array.flags.c_contiguous and array.flags.writeable
    table = found.table[list(TABLE_COLUMNS)]
    objects = {"name": object, "class": object}
    pd.testing.assert_frame_equal(table.astype(objects), expected.table.astype(objects))
    assert found.usable.dtype == bool and table["usable"].dtype == bool and table["tile"].dtype.kind == "i"
    assert split_samples(found)[1].table["name"].tolist() == split_samples(expected)[1].table["name"].tolist()


def test_read_only_arrays_are_copied():
    images, masks = IMAGES.copy(), MASKS.copy()
    for array in (images, masks):
        array.flags.writeable = False
    samples = made(images=images, masks=masks)
    assert samples.images.flags.writeable and samples.masks.flags.writeable


def test_the_callers_table_and_arrays_stay_as_they_are():
    fields = own()
    before = fields["table"].copy()
    fields["table"] = fields["table"].assign(usable=1, tile=fields["table"]["tile"].astype(float))
    kept = fields["table"].copy()
    Samples(**fields)
    assert fields["table"].equals(kept) and own()["table"].equals(before)


REFUSED = {
    "usable as text": (dict(table_usable=np.where(np.arange(30) % 2, "True", "False")),
                       "usable to be True or False, got 'False'.*'000'"),
    "usable with a gap": (dict(table_usable=fill([1.0] * 30, 3, np.nan)),
                          "usable to be True or False, got nan for '011'"),
    "usable with NA": (dict(table_usable=pd.array(fill([True] * 30, 3, None), "boolean")), "usable.* for '011'"),
    "usable 2": (dict(table_usable=2), "usable to be True or False, got 2"),
    "usable None": (dict(table_usable=None), "usable to be True or False"),
    "names repeat": (dict(table_name=[f"{i % 10:03}" for i in range(30)]),
                     "each name once, 30 images share.*'000', '001'.*folder/000"),
    "names repeat in NFD": (dict(table_name=fill(fill(TABLE["name"], 0, "caf\u00e9"), 1, "cafe\u0301")),
                            "each name once, 2 images"),
    "name empty": (dict(table_name=fill(TABLE["name"], 4, "")), "a name for each image, got '' in row 4"),
    "name missing": (dict(table_name=fill(TABLE["name"], 4, None)), "a name for each image, got .* in row 4"),
    "name a number": (dict(table_name=fill(TABLE["name"], 4, 1.5)), "a name for each image, got 1.5 in row 4"),
    "name NA": (dict(table_name=pd.array(fill(TABLE["name"], 4, None), "string")),
                "a name for each image, got <NA> in row 4"),
    "class NA": (dict(table_class=pd.array(fill(TABLE["class"], 12, None), "string")),
                 "classes .* got also .* for '110'"),
    "part NA": (dict(table_tile=pd.array(fill(TABLE["tile"], 12, None), "Int64")),
                "part .* of 1 images is unknown: '110'"),
    "name above": (dict(table_name=fill(TABLE["name"], 4, "../a")), "names like 'a' or 'folder/a', got '../a'"),
    "name of the root": (dict(table_name=fill(TABLE["name"], 4, "/a")), "got '/a'"),
    "name of a folder": (dict(table_name=fill(TABLE["name"], 4, "a/")), "got 'a/'"),
    "name with backslash": (dict(table_name=fill(TABLE["name"], 4, "a\\b")), "names like 'a' or 'folder/a'"),
    "part missing": (dict(table_tile=fill(TABLE["tile"].astype(float), 5, np.nan)),
                     "part .* of 1 images is unknown: '021'"),
    "part None": (dict(table_tile=fill(["p"] * 30, 5, None)), "part .* of 1 images is unknown: '021'"),
    "part empty": (dict(table_tile=fill(["p"] * 30, 5, "")), "part .* of 1 images is unknown: '021'"),
    "part a fraction": (dict(table_tile=0.5), "text or a whole number, got 0.5"),
    "part infinite": (dict(table_tile=np.inf), "text or a whole number, got inf"),
    "part a truth": (dict(table_tile=True), "text or a whole number, got True"),
    "part 1 and '1'": (dict(table_tile=fill([1] * 30, 5, "1")), "all numbers or all text"),
    "width 0": (dict(table_width=0), "the photograph's width in pixels, got 0"),
    "height a gap": (dict(table_height=fill([12.0] * 30, 2, np.nan)),
                     "the photograph's height in pixels, got nan for '010'"),
    "class contradicts": (dict(table_class=TABLE["class"].replace({"A": "B"})),
                          "10 do not: '100'.*is of class 'B' and shows \\['A'\\]"),
    "classes swapped": (dict(classes=CLASSES_TWO[::-1]), "expected every image to show its class, 20 do not: '100'"),
    "class a gap": (dict(table_class=TABLE["class"].where(TABLE.index != 12)), "classes .* got also .*nan.* for '110'"),
    "class unknown": (dict(table_class=TABLE["class"].replace({"A": "a"})), "got also \\['a'\\] for '100'"),
    "class with a space": (dict(table_class=TABLE["class"].replace({"A": "A "})), "got also \\['A '\\] for '100'"),
    "class twice": (dict(classes=("A", "B", "A")), "each name once, got 'A' more than once"),
    "Free a class": (dict(classes=("A", "B", "Free")), "'Free' names the images without a defect"),
    "class empty": (dict(classes=("A", "B", "")), "text that is not empty, got ''"),
    "class a number": (dict(classes=("A", "B", 3)), "text that is not empty, got 3"),
    "class missing": (dict(classes=("A", "B", np.nan)), "text that is not empty, got nan"),
    "class called macro": (dict(classes=("A", "B", "macro")), "iou_macro, so no class can be 'macro'"),
    "class called micro": (dict(classes=("A", "B", "micro")), "iou_micro"),
    "class called of_images": (dict(classes=("A", "B", "of_images_A")), "iou_of_images_A"),
    "class called just of_images": (dict(classes=("A", "B", "of_images")), "iou_of_images"),
    "no classes": (dict(classes=()), "1 to 255 names, got 0"),
    "defect empty": (dict(masks=altered(MASKS, 12, 0)),
                     "a defect in each usable image of a defect class, none in '110'"),
    "clean marked": (dict(masks=altered(MASKS, 3, 1)), "Free images have no defect pixels, but 1 do: '011'"),
    "mask 255": (dict(masks=altered(MASKS, (12, 0), 255)), "values 0..2, got 255 in '110'; 255 is white"),
    "mask 3": (dict(masks=altered(MASKS, (12, 0), 3)), "values 0..2, got 3 in '110'; write 0 for no defect and 1..2"),
    "mask 256": (dict(masks=altered(MASKS.astype(int), (12, 0), 256)), "values 0..2, got 256 in '110'"),
    "mask negative": (dict(masks=altered(MASKS.astype(np.int8), (12, 0), -1)), "values 0..2, got -1 in '110'"),
    "mask of ToTensor": (dict(masks=MASKS.astype(np.float32) / 255), r"got 0.00392157 in .*that is 1 / 255: ToTensor"),
    "mask a fraction": (dict(masks=altered(MASKS.astype(float), (12, 0), 0.5)), "got 0.5 in '110'"),
    "mask NaN": (dict(masks=altered(MASKS.astype(float), (12, 0), np.nan)), "got nan in '110'"),
    "mask one-hot": (dict(masks=np.stack([MASKS == 1, MASKS == 2], 1)), r"like the images.*argmax\(1\)"),
    "mask of another size": (dict(masks=MASKS[:, :6]), r"like the images, got uint8 \(30, 6, 20\)"),
    "mask turned": (dict(masks=MASKS.transpose(0, 2, 1)), r"like the images, got uint8 \(30, 20, 12\)"),
    "mask one short": (dict(masks=list(MASKS)[:-1]), "table: expected 29 rows"),
    "images of two sizes": (dict(images=[*IMAGES[:-1], IMAGES[-1, :8]]),
                            r"one size, got \(12, 20\) for '000' and \(8, 20\) for '241'"),
    "images 0..1": (dict(images=IMAGES / 255), r"got float64 .*np.rint\(255 \* images\)"),
    "images 0..255": (dict(images=IMAGES.astype(np.float32)), r"got float32 .*np.rint\(images\)"),
    "images 16 bit": (dict(images=IMAGES.astype(np.uint16) * 16), r"got uint16 .*high - low"),
    "images black and white": (dict(images=IMAGES > 99), r"got bool .*np.uint8\(255\)"),
    "images of paths": (dict(images=[f"{i}.png" for i in range(30)]), "got <U.*read the files"),
    "images of one picture": (dict(images=IMAGES[0]), "table: expected 12 rows"),
    "no images": (dict(images=IMAGES[:0], masks=MASKS[:0], table=TABLE[:0]), "at least one image"),
    "no pixels": (dict(images=IMAGES[:, :0], masks=MASKS[:, :0]), "and pixels in it"),
    "a column twice": (dict(table=pd.concat([TABLE, TABLE[["tile"]]], axis=1)), "each column once, got .*tile"),
}
REFUSED_TYPES = {
    "classes as text": (dict(classes="AB"), "a list of names.* got 'AB'"),
    "classes as a set": (dict(classes={"A", "B"}), "a list of names"),
    "classes as a dict": (dict(classes={"A": 1, "B": 2}), "a list of names"),
    "a list of rows": (dict(table=TABLE.to_dict("records")), "expected a DataFrame"),
    "masked masks": (dict(masks=np.ma.masked_equal(MASKS, 2)), r"masks: .*\.filled\(0\)"),
    "masked images": (dict(images=[np.ma.masked_equal(i, 9) for i in IMAGES]), r"images: .*\.filled\(0\)"),
    "masks as text": (dict(masks=MASKS.astype(str)), "masks: expected whole numbers"),
    "no array": (dict(images=None), "images: expected an array"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_samples_refuse_what_could_give_a_wrong_number(fault):
    changes, message = REFUSED[fault]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        made(**changes)


@pytest.mark.parametrize("fault", REFUSED_TYPES)
def test_samples_refuse_other_types(fault):
    changes, message = REFUSED_TYPES[fault]
    with pytest.raises(TypeError, match=message):
        made(**changes)


def test_usable_zero_and_one_is_what_false_and_true_are():
    flags = np.arange(30) % 3 > 0
    kinds = (flags, flags.astype(int), flags.astype(float), pd.array(flags, "boolean"))
    assert all(made(table_usable=kind).usable.tolist() == flags.tolist() for kind in kinds)


def test_a_column_altered_later_is_looked_at_again():
    samples = made()
    samples.table["usable"] = 1
    assert samples.usable.dtype == bool and len(split_samples(samples)[1]) == 6
    samples.table["usable"] = "False"
    with pytest.raises(ValueError, match="usable to be True or False"):
        split_samples(samples)
    samples = made()
    samples.table["tile"] = samples.table["tile"].where(samples.table.index > 3)
    with pytest.raises(ValueError, match="part .* of 4 images is unknown"):
        split_samples(samples)


def test_a_defect_lost_in_the_resize_is_said_and_taken():
    masks = altered(MASKS, 12, 0)
    with pytest.warns(UserWarning, match="the defect of 1 usable images is lost at this size: '110'"):
        samples = made(masks=masks, table_width=200, table_height=120)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "110" not in names(samples[:11])
        assert not made(masks=masks, table_usable=TABLE.index != 12).masks[12].any()


def test_an_image_may_show_several_classes():
    samples = made(masks=altered(MASKS, (slice(10, 12), 0), 2))
    table = dataset_table(samples)
    assert table["images"].tolist() == [10, 10, 12] and table["tiles"].tolist() == [5, 5, 6]
    assert table.loc["A", "area"] == pytest.approx(100 * 24 / 240)
    assert table.loc["B", "area"] == pytest.approx(100 * 280 / 240 / 12)


def test_indexing_gives_arrays_that_pytorch_takes():
    samples = made()
    for idx in (slice(None, None, -1), slice(0, 9, 2), [3, 1], samples.usable, 4):
        part = samples[idx]
        assert part.images.flags.c_contiguous and part.masks.flags.c_contiguous
        assert part.table.index.tolist() == list(range(len(part)))
    with pytest.raises(IndexError):
        samples[[[1, 2], [3, 4]]]
    with pytest.raises(IndexError):
        samples["000"]


@pytest.mark.parametrize("channels", [0, 1, 3])
@pytest.mark.parametrize("size", [(1, 1), (7, 90), (90, 7), (64, 64)])
def test_any_shape_is_split_and_shown(size, channels):
    fields = own(size, channels)
    fields["masks"] = np.broadcast_to((np.arange(30) // 10).astype(np.uint8)[:, None, None], (30, *size))
    samples = Samples(**fields)
    train, val = split_samples(samples)
    assert len(val) == 6 and len(train) == 24 and dataset_table(samples)["area"][1:].tolist() == [100, 100]
    if min(size) > 1:
        show_samples(samples, slice(0, 2))


TEXT = st.text(st.characters(exclude_categories=[]), min_size=1, max_size=12)
CLASS = TEXT.filter(lambda c: c not in ("macro", "micro", "Free") and not c.startswith("of_images"))
NAME = TEXT.filter(lambda n: not set(n) & set("/\\\0"))
PART = st.one_of(st.sampled_from(["001", "1", "NA", "nan", "1e3", "True", "-1", " 1", "1.0"]), TEXT)


@given(st.lists(CLASS, min_size=2, max_size=2, unique=True),
       st.lists(NAME, min_size=30, max_size=30, unique_by=same_name),
       st.lists(PART, min_size=15, max_size=15, unique=True))
@settings(max_examples=60, deadline=None)
def test_any_text_is_a_class_a_name_and_a_part(classes, texts, parts):
    kinds = TABLE["class"].replace(dict(zip(CLASSES_TWO, classes)))
    tiles = np.repeat(np.array(parts, object), 2)
    samples = made(classes=classes, table_class=kinds, table_name=texts, table_tile=tiles)
    assert samples.table["name"].tolist() == texts and list(dataset_table(samples).index) == ["Free", *classes]
    train, val = split_samples(samples)
    assert not set(train.table["tile"]) & set(val.table["tile"])
    for table in (samples.table, train.table, val.table):
        again = read_table(csv_bytes(table))
        assert all(again[c].tolist() == table[c].tolist() for c in TABLE_COLUMNS)


@pytest.mark.parametrize("text", ["a$\\frac$", "$", "_a", "\udce9", "\x07", "a\nb", "\u65b0", ""])
def test_pictures_show_any_text(text):
    kinds = TABLE["class"].replace({"A": f"{text}A"})
    samples = made(table_tile=[f"{text}{i // 2}" for i in range(30)], table_class=kinds, classes=(f"{text}A", "B"))
    three, one = show_samples(samples, slice(9, 12)), show_samples(samples, [0], titles=[text])
    for figure in (three, one):
        figure.canvas.draw()
    assert sum(bool(ax.images) for ax in three.axes) == 3 and one.axes[0].get_title() == drawable(text)


# ---- tables on disk ----------------------------------------------------------------------------------------------

def test_a_table_of_the_magnetic_tiles_is_written_as_before():
    index = magnetic.read_index()
    assert csv_bytes(index) == index.to_csv(index=False, lineterminator="\n").encode()
    assert index.equals(pd.read_csv(SHIPPED.joinpath("magnetic_tiles.csv")))


NUMBER = st.floats(allow_nan=False, allow_infinity=False)
ROW = st.tuples(TEXT, TEXT, st.one_of(PART, st.just("")), NUMBER, st.integers(0, 2**40))


@given(st.lists(ROW, min_size=1), CLASS)
@settings(max_examples=300, deadline=None)
def test_text_is_read_back_as_it_was(rows, kind):
    table = pd.DataFrame(rows, columns=["name", "class", "tile", f"p_{kind}", f"tp_{kind}"])
    table["tile"] = table["tile"].astype(object)
    again = read_table(csv_bytes(table))
    assert list(again.columns) == list(table.columns)
    for column in ("name", "class", "tile", f"tp_{kind}"):
        assert again[column].tolist() == table[column].tolist()
    assert np.allclose(again[f"p_{kind}"], table[f"p_{kind}"], rtol=1e-15, atol=0)


@given(st.lists(st.integers(-2**62, 2**62), min_size=1))
@settings(max_examples=50, deadline=None)
def test_whole_numbers_stay_parts_that_are_numbers(tiles):
    table = pd.DataFrame({"name": [f"{i}" for i in range(len(tiles))], "class": "A", "tile": tiles})
    tiles = read_table(csv_bytes(table))["tile"].tolist()
    assert list(map(str, tiles)) == list(map(str, table["tile"]))
    assert max(map(abs, table["tile"])) >= 10**18 or tiles == table["tile"].tolist()


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_tables_of_other_programs(tmp_path, end):
    text = end.join(["name,class,tile,tp_A,fold", "001,NA,007,1,", "a\rb" * (end == "\n") + "c,null,x,2,3", ""])
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    table = read_table(tmp_path / "t.csv")
    assert table["name"].tolist()[0] == "001" and table["class"].tolist() == ["NA", "null"]
    assert table["tile"].tolist() == ["007", "x"]
    assert list(table.columns)[0] == "name" and table["fold"].isna().tolist() == [True, False]
    assert table["tp_A"].tolist() == [1, 2]


# ---- the index ---------------------------------------------------------------------------------------------------

def test_index_is_complete():
    index = magnetic.read_index()
    counts = {"Blowhole": 115, "Break": 85, "Crack": 57, "Fray": 32, "Free": 952, "Uneven": 103}
    assert index.groupby("class").size().to_dict() == counts
    assert index["number"].is_unique and index["jpg"].is_unique and index["jpg"].str.fullmatch("[0-9a-f]{64}").all()
    parts = index["name"].str.extract(r"exp(\d)_num_(\d+)$").astype(int)
    assert (parts[0] == index["exposure"]).all() and (parts[1] == index["number"]).all()
    smallest = index.groupby("tile")["number"].min()
    assert (smallest.index == smallest).all() and index["suspect"].dtype == bool
    assert not index["suspect"][index["class"] != "Free"].any()


# ---- folds -------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def awkward(synthetic):
    """Synthetic samples with the real ones' troubles: an empty mask, a tile of two classes, suspect images."""
    table, masks = synthetic.table.copy(), synthetic.masks.copy()
    masks[np.flatnonzero(table["class"] == "Uneven")[0]] = 0
    of = {c: table.index[table["class"] == c] for c in CLASSES}
    table.loc[of["Crack"][0], "tile"] = table.loc[of["Break"][0], "tile"]
    table.loc[of["Free"][:3], "tile"] = table.loc[of["Blowhole"][0], "tile"]
    suspect = synthetic.clean & table["tile"].isin(table["tile"][~synthetic.clean])
    table["usable"] = ~suspect & (synthetic.clean | masks.any((1, 2)))
    return rebuilt(synthetic, table=table, masks=masks)


def names(samples):
    return set(samples.table["name"])


SPLIT = dict(split=st.sampled_from(SPLITS), fold=st.integers(0, 4), partition=st.integers(0, 8))


@given(**SPLIT, fraction=st.floats(0.01, 1), clean_validation=st.booleans(), keep_empty=st.booleans())
@settings(max_examples=60, deadline=None)
def test_split_keeps_its_promises(awkward, split, fold, partition, fraction, clean_validation, keep_empty):
    train, val = split_samples(awkward, split, fold, partition, fraction, clean_validation, keep_empty)
    assert not names(train) & names(val)
    assert set(train.label) == set(range(6))
    assert all((part.table["usable"] | ~part.clean).all() for part in ((train, val) if clean_validation else (val,)))
    if not keep_empty:
        assert (train.masks.any((1, 2)) | train.clean).all() and val.table["usable"].all()
    if split == "tile":
        assert not set(train.table["tile"]) & set(val.table["tile"])
    if not clean_validation:
        assert not val.clean.any()


@given(**SPLIT, fractions=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)), keep_empty=st.booleans())
@settings(max_examples=40, deadline=None)
def test_fractions_are_nested_and_leave_validation_alone(awkward, split, fold, partition, fractions, keep_empty):
    part = lambda fraction: split_samples(awkward, split, fold, partition, fraction, keep_empty=keep_empty)
    (small, val), (large, same) = map(part, sorted(fractions))
    assert names(small) <= names(large) and names(val) == names(same)
    whole = part(1.0)[0].table
    if split == "tile":
        kept = whole[whole["tile"].isin(small.table["tile"])]
        assert set(kept["name"]) == names(small)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("partition", [0, 1, 7])
def test_five_folds_validate_everything_once(awkward, split, partition):
    validated = [n for k in range(5) for n in split_samples(awkward, split, k, partition)[1].table["name"]]
    assert len(validated) == len(set(validated))
    assert set(validated) == names(awkward[awkward.table["usable"].to_numpy()])
    assert len(awkward) - len(validated) == 4  # three suspect images, one empty mask


@given(fold=SPLIT["fold"], partition=SPLIT["partition"])
@settings(max_examples=15, deadline=None)
def test_clean_tiles_are_the_same_under_both_protocols(awkward, fold, partition):
    tile, image = (split_samples(awkward, p, fold, partition)[1] for p in SPLITS)
    assert names(tile[tile.clean]) == names(image[image.clean])


def test_split_is_reproducible_and_partitions_differ(awkward):
    again = [split_samples(awkward, "image", 3)[1] for _ in range(2)]
    assert names(again[0]) == names(again[1]) != names(split_samples(awkward, "image", 3, partition=1)[1])


def test_clean_validation_false_trains_on_all_clean_images(awkward):
    train, val = split_samples(awkward, "image", 0, clean_validation=False)
    assert train.clean.sum() == awkward.clean.sum() and not val.clean.any()
    kept = split_samples(awkward, "image", 0)[1]
    assert names(val) == names(kept[~kept.clean])


@given(**SPLIT)
@settings(max_examples=30, deadline=None)
def test_held_out_is_what_split_samples_validates(awkward, split, fold, partition):
    usable = awkward[awkward.table["usable"].to_numpy()]
    expected = names(split_samples(awkward, split, fold, partition)[1])
    for samples in (awkward, usable):
        assert names(samples[held_out(samples, split, fold, partition)]) == expected


# ---- empty masks -------------------------------------------------------------------------------------------------

def later_photographs(samples):
    """Every photograph of a defective tile but its first: without these, each tile is still there."""
    return [i for _, own in samples.table[~samples.clean].groupby("tile") for i in own.index[1:]]


def without_masks(samples, indices, **columns):
    """The samples with some masks emptied and called unusable."""
    masks, table = samples.masks.copy(), samples.table.copy()
    masks[indices], table.loc[indices, "usable"] = 0, False
    for column, value in columns.items():
        table.loc[indices, column] = value
    return rebuilt(samples, masks=masks, table=table)


@given(split=SPLIT["split"], partition=SPLIT["partition"], count=st.integers(0, 12), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_empty_masks_get_a_fold_and_change_no_other(synthetic, split, partition, count, seed):
    empty = np.sort(np.random.default_rng(seed).permutation(later_photographs(synthetic))[:count])
    samples = without_masks(synthetic, empty)
    folds, kept = (find_folds(samples, split, partition, keep_empty=k) for k in (False, True))
    assert np.flatnonzero(folds < 0).tolist() == empty.tolist() and (kept >= 0).all()
    assert (kept[folds >= 0] == folds[folds >= 0]).all()
    if split == "tile":
        assert (pd.Series(kept).groupby(samples.table["tile"]).nunique() == 1).all()
    else:
        assert kept[empty].tolist() == [i % 5 for i in range(count)]


def test_a_tile_of_empty_masks_alone_stays_together(synthetic):
    empty = np.array(later_photographs(synthetic)[:4])
    samples = without_masks(synthetic, empty[:2], tile=901)
    samples = without_masks(samples, empty[2:], tile=900)
    kept = find_folds(samples, "tile", keep_empty=True)
    assert kept[empty].tolist() == [0, 0, 1, 1]
    train, val = split_samples(samples, "tile", 1, keep_empty=True)
    assert {900} == {901, 900} & set(val.table["tile"]) and {901} == {901, 900} & set(train.table["tile"])


@given(**SPLIT, fraction=st.floats(0.01, 1), clean_validation=st.booleans())
@settings(max_examples=30, deadline=None)
def test_keep_empty_changes_nothing_where_no_mask_is_empty(synthetic, fraction, clean_validation, **split):
    pairs = [split_samples(synthetic, **split, fraction=fraction, clean_validation=clean_validation, keep_empty=k)
             for k in (False, True)]
    for one, other in zip(*pairs):
        assert one.table.equals(other.table)


@given(**SPLIT, clean_validation=st.booleans())
@settings(max_examples=30, deadline=None)
def test_keep_empty_adds_images_and_takes_none_away(awkward, clean_validation, **split):
    split |= dict(clean_validation=clean_validation)
    (train, val), (more, also) = (split_samples(awkward, **split, keep_empty=k) for k in (False, True))
    empty = names(awkward[~awkward.clean & ~awkward.masks.any((1, 2))])
    assert len(empty) == 1 and (names(more) - names(train)) | (names(also) - names(val)) == empty
    assert names(train) <= names(more) and names(val) <= names(also)


@pytest.mark.parametrize("split", SPLITS)
def test_a_defect_lost_at_the_working_size_trains_only_with_keep_empty(synthetic, split):
    masks = synthetic.masks.copy()
    masks[lost := np.flatnonzero(~synthetic.clean)[0]] = 0
    with pytest.warns(UserWarning, match="lost at this size"):
        samples = rebuilt(synthetic, masks=masks, table=synthetic.table.assign(width=64))
    name = synthetic.table["name"][lost]
    for fold in range(5):
        (train, val), (more, same) = (split_samples(samples, split, fold, keep_empty=k) for k in (False, True))
        assert name not in names(train) and (name in names(more)) != (name in names(val)) and names(val) == names(same)


def test_the_authors_protocol_leaves_nothing_out(awkward):
    options = dict(split="image", clean_validation=False, keep_empty=True)
    pairs = [split_samples(awkward, fold=fold, **options) for fold in range(5)]
    for train, val in pairs:
        assert names(train) | names(val) == names(awkward) and names(awkward[awkward.clean]) <= names(train)
    assert sum(len(val) for _, val in pairs) == (~awkward.clean).sum()


def test_suspect_images_stay_out_with_keep_empty(awkward):
    suspect = names(awkward[awkward.clean & ~awkward.table["usable"].to_numpy()])
    for split in SPLITS:
        for part in split_samples(awkward, split, keep_empty=True):
            assert not suspect & names(part)


# ---- fractions and faults ----------------------------------------------------------------------------------------

def test_fraction_counts_tiles(synthetic):
    half, whole = (split_samples(synthetic, fold=1, fraction=f)[0].table for f in (0.5, 1))
    count = lambda t: t.groupby("class")["tile"].nunique()
    assert ((count(half) - count(whole) / 2).abs() <= 0.5).all()


@pytest.mark.parametrize("arguments, message", [
    (dict(split="tiles"), "unknown split 'tiles': expected one of tile, image"),
    (dict(fraction=0), r"expected a fraction in \(0, 1\], got 0"),
    (dict(fraction=1.5), r"expected a fraction in \(0, 1\], got 1.5"),
    (dict(fraction=float("nan")), "expected a fraction"),
    (dict(fold=-1), r"expected a fold in 0\.\.4, got -1"),
    (dict(fold=5), r"expected a fold in 0\.\.4, got 5; for other folds, choose another partition"),
    (dict(fold=1.0), r"expected a fold in 0\.\.4, got 1\.0"),
    (dict(fold=None), r"expected a fold in 0\.\.4, got None"),
    (dict(fold=True), r"expected a fold in 0\.\.4, got True"),
    (dict(partition=True), "expected a partition >= 0, a whole number, got True"),
    (dict(partition=-1), "expected a partition >= 0, a whole number, got -1"),
    (dict(partition=0.5), "expected a partition >= 0, a whole number, got 0.5"),
])
def test_wrong_split_arguments(synthetic, arguments, message):
    with pytest.raises(ValueError, match=message):
        split_samples(synthetic, **arguments)
    if "fraction" in arguments:
        return
    with pytest.raises(ValueError, match=message):
        held_out(synthetic, **dict(split="tile", fold=0) | arguments)


def several_classes(seed):
    """Parts that show several classes each, so that they cannot always be dealt evenly."""
    rng, rows, masks = np.random.default_rng(seed), [], []
    for part in range(rng.integers(6, 14)):
        for k in rng.choice(4, size=rng.integers(1, 4), replace=False):
            for view in range(rng.integers(1, 8)):
                masks.append(np.zeros((16, 16), np.uint8))
                masks[-1][4:8, 4:8] = k
                rows.append((f"{part}-{k}-{view}", ("Free", "Ast", "Bug", "Cut")[k], part, view, 16, 16, True))
    table = pd.DataFrame(rows, columns=list(TABLE_COLUMNS))
    return Samples(np.zeros((len(rows), 16, 16), np.uint8), np.stack(masks), table, ("Ast", "Bug", "Cut"), "own")


@given(seed=st.integers(0, 2000), **SPLIT)
@settings(max_examples=150, deadline=None)
def test_a_class_that_a_side_lacks_is_named(seed, split, fold, partition):
    samples = several_classes(seed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            train, val = split_samples(samples, split, fold, partition)
        except ValueError as error:
            assert re.search("at least 5 tiles|validates no image at all", str(error))
            return
    told = [str(w.message) for w in caught]
    said = {side: " ".join(text for text in told if side in text) for side in ("validates", "trains")}
    for side, part in zip(("validates", "trains"), (val, train)):
        absent = set(samples.table["class"]) - set(part.table["class"])
        assert all(kind in said[side] for kind in absent) and bool(said[side]) == bool(absent)


@given(seed=st.integers(0, 2000), kinds=st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_rarest_class_by_hand(seed, kinds):
    rng = np.random.default_rng(seed)
    members = np.zeros((20, kinds + 1), bool)
    for row in members:
        row[rng.choice(kinds + 1, rng.integers(1, kinds + 2), replace=False)] = True
    counts, found = members.sum(0), rarest_class(members)
    for row, k in zip(members, found):
        assert row[k] and counts[k] == counts[row].min() and k == np.flatnonzero(row & (counts == counts[k]))[0]


def test_an_image_is_stratified_by_its_rarest_class():
    """Ten images of A of which five show B, too: every fold validates B, though the table says A."""
    masks = (np.arange(30) // 10).astype(np.uint8)[:, None, None] * np.ones((1, 8, 8), np.uint8)
    masks[20:] = 0
    masks[10:20:2, :4] = 2
    kinds = ["Free"] * 10 + ["A"] * 10 + ["Free"] * 10
    table = TABLE.assign(name=[f"{i:02}" for i in range(30)], tile=range(30), width=8, height=8, **{"class": kinds})
    samples = Samples(masks, masks, table, CLASSES_TWO, "own")
    for partition in range(4):
        folds = [split_samples(samples, fold=fold, partition=partition)[1] for fold in range(5)]
        assert [(val.masks == 2).any((1, 2)).sum() for val in folds] == [1] * 5


def test_too_few_tiles_are_named(synthetic):
    few = synthetic[(synthetic.table["class"] != "Fray") | (synthetic.table["tile"] % 2 == 0)]
    with pytest.raises(ValueError, match=r"at least 5 tiles of each class .* got \{'Fray': \d\}"):
        split_samples(few)


# ---- synthetic ---------------------------------------------------------------------------------------------------

@given(n=st.integers(60, 150), size=st.sampled_from([32, 48, 64]), seed=st.integers(0, 2**32))
@settings(max_examples=15, deadline=None)
def test_synthetic_tiles(n, size, seed):
    a, b = (synthetic_tiles(n, size, seed) for _ in range(2))
    assert len(a) == n and a.images.shape == (n, size, size) and a.source == "synthetic"
    assert (a.images == b.images).all() and (a.masks == b.masks).all() and a.table.equals(b.table)
    assert a.masks[~a.clean].any(axis=(1, 2)).all()
    assert all(set(np.unique(m)) <= {0, k} for m, k in zip(a.masks, a.label))
    assert a.table["name"].is_unique and a.table.groupby("tile")["class"].nunique().max() == 1
    assert a.table.groupby("class")["tile"].nunique().min() >= 5
    for _, own in a.table.groupby("tile"):
        assert len(own) > 1 and (np.diff(own["exposure"]) > 0).all()
    for fold in range(5):
        split_samples(a, fold=fold)


@given(kind=st.sampled_from(MT_CLASSES), side=st.integers(34, 130), seed=st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_masks_are_exactly_what_was_changed(kind, side, seed):
    rng = np.random.default_rng(seed)
    surface = clean_surface(rng, side)
    before = surface.copy()
    changed, mask = add_defect(rng, kind, surface)
    assert (surface == before).all() and mask.any() and not mask.all()
    assert (changed[~mask] == before[~mask]).all() and (changed[mask] != before[mask]).mean() > 0.9


def test_synthetic_sizes_are_like_the_real_ones():
    table = dataset_table(synthetic_tiles(1344, 64))
    assert table["images"].tolist() == [952, 115, 85, 57, 32, 103]
    for kind, real, low, high in (("Blowhole", 0.21, .7, 2), ("Break", 4.24, .4, 2), ("Crack", 0.49, .5, 2.5),
                                  ("Fray", 17.1, .6, 1.6), ("Uneven", 23.9, .7, 1.4)):
        assert low < table.loc[kind, "area"] / real < high, (kind, table.loc[kind, "area"])


def test_defects_show_but_not_by_brightness_alone():
    samples = synthetic_tiles(336, 64)
    holes = np.flatnonzero(samples.label == 1)
    dark = [samples.images[i][samples.masks[i] > 0].mean() < samples.images[i].mean() for i in holes]
    assert np.mean(dark) > 0.8
    darkest = [samples.images[i].min() < samples.images[i][samples.masks[i] > 0].min() for i in holes]
    assert np.mean(darkest) > 0.5  # something that is no defect is darker: a threshold finds nothing


@pytest.mark.parametrize("arguments, message", [
    (dict(n=59), "expected n >= 60"), (dict(n=100, size=31), "expected size >= 32")])
def test_synthetic_minimum(arguments, message):
    with pytest.raises(ValueError, match=message):
        synthetic_tiles(**arguments)


# ---- the real dataset --------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def real():
    return magnetic_tiles(ROOT)


@needs_real
def test_real_table_is_the_papers(real):
    table = dataset_table(real)
    assert table["images"].tolist() == [952, 115, 85, 57, 32, 103] and table.loc["Uneven", "empty"] == 6
    assert table["area"][1:].round(2).tolist() == [0.21, 4.24, 0.49, 17.10, 23.90]
    # the paper prints 15.32 for the last
    assert table["deviation"][1:].round(2).tolist() == [0.16, 7.22, 0.53, 14.15, 14.32]


@needs_real
@pytest.mark.parametrize("fold, partition", [(0, 0), (4, 0), (1, 2)])
def test_real_folds(real, fold, partition):
    for split in SPLITS:
        train, val = split_samples(real, split, fold, partition)
        assert len(train) + len(val) == real.table["usable"].sum()
        assert set(train.label) == set(val.label) == set(range(6))


FROZEN = {  # SHA-256 over the sorted names that each fold validates: published rows can be compared only on these
    ("tile", (0, 1)): "968fffd21b74d9d1",
    ("image", (0, 1)): "9d113dc081b2b8c2",
    ("tile", (2, 3)): "b4f622ac55842072",
    ("image", (2, 3)): "68833215359c3b63"}


@needs_real
@pytest.mark.parametrize("split, partitions", FROZEN)
def test_folds_are_frozen(real, split, partitions):
    pairs = [(fold, partition) for partition in partitions for fold in range(5)]
    folds = [sorted(split_samples(real, split, *pair)[1].table["name"]) for pair in pairs]
    digest = sha256("\n".join(" ".join(f) for f in folds).encode()).hexdigest()[:16]
    assert digest == FROZEN[split, partitions]


@needs_real
@pytest.mark.parametrize("split", SPLITS)
def test_real_empty_masks(real, split):
    options = dict(split=split, clean_validation=False, keep_empty=True)
    pairs = [split_samples(real, fold=fold, **options) for fold in range(5)]
    empty = [(~part.masks.any((1, 2)) & ~part.clean).sum() for pair in pairs for part in pair]
    assert sum(len(val) for _, val in pairs) == 392 and sum(empty) == 5 * 6
    if split == "image":
        assert all(train.clean.sum() == 952 for train, _ in pairs)


@needs_real
def test_folds_do_not_depend_on_size_or_threshold(real):
    for other in (magnetic_tiles(ROOT, size=64), magnetic_tiles(ROOT, size=128, threshold=0)):
        for split in SPLITS:
            (train, val), (small, same) = (split_samples(s, split, 3) for s in (real, other))
            assert names(val) == names(same) and names(small) <= names(train)
            lost = set(other.table["name"][~other.clean & ~other.masks.any((1, 2))])
            assert names(train) - names(small) == lost & names(train)


@pytest.fixture
def linked(tmp_path):
    """The real dataset as links, so that one file can be replaced."""
    for path in Path(ROOT).resolve().rglob("*.*g"):
        target = tmp_path / "mt" / path.relative_to(Path(ROOT).resolve())
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(path)
    return tmp_path / "mt"


@needs_real
def test_real_faults_are_named(linked):
    jpg, lost, resized = (linked / f"MT_{n}" for n in (
        "Crack/Imgs/exp4_num_85602.jpg", "Blowhole/Imgs/exp1_num_108719.png", "Fray/Imgs/exp0_num_797.png"))
    content, mask = jpg.read_bytes(), Image.open(resized).resize((100, 100))
    for path in (jpg, lost, resized):
        path.unlink()
    jpg.write_bytes(content[:5000]), mask.save(resized)
    with pytest.raises(DamagedDataset) as error:
        magnetic_tiles(linked)
    for text in ("3 problems", "exp4_num_85602.jpg: truncated", "exp1_num_108719.png: missing",
                 "expected 488 x 354 pixels, got 100 x 100"):
        assert text in str(error.value)


# ---- pixels that count for nothing -------------------------------------------------------------------------------

def marked_fields(**changes):
    masks = np.zeros((3, 8, 6), np.int64)
    masks[0, 2:4, 2:4], masks[1, 2:4, 2:4], masks[:, :, 0] = 1, 2, 255
    table = pd.DataFrame(dict(name=list("abc"), tile=range(3), exposure=1, width=6, height=8, usable=True) | {
        "class": ["Ast", "Bug", "Free"]})
    return dict(images=np.zeros((3, 8, 6), np.uint8), masks=masks, table=table, classes=("Ast", "Bug"), source="own",
                ignore_index=255) | changes


def test_samples_keep_what_they_ignore():
    samples = Samples(**marked_fields())
    assert samples.masks.dtype == np.uint8 and samples[1].ignore_index == samples[[2, 0]].ignore_index == 255
    assert samples[samples.clean].masks[0, :, 0].tolist() == [255] * 8
    assert Samples(**marked_fields(ignore_index=np.uint8(255))).ignore_index == 255
    assert class_members(samples).tolist() == np.eye(3, dtype=bool)[[1, 2, 0]].tolist()
    assert dataset_table(samples).loc["Ast", "area"] == 100 * 4 / 40


@pytest.mark.parametrize("changes, error, words", [
    (dict(ignore_index=None), ValueError, r"values 0..2, got 255 in 'a', 'b', 'c'; .*pass ignore_index=255"),
    (dict(ignore_index=254), ValueError, r"values 0..2, got 255 in 'a'"),
    (dict(ignore_index=2), ValueError, r"ignore_index: .* in 3..255, got 2"),
    (dict(ignore_index=-1), ValueError, r"ignore_index: .* got -1; masks are kept as bytes, so write 255"),
    (dict(ignore_index=True), TypeError, "ignore_index: .* got True"),
    (dict(ignore_index="255"), TypeError, "ignore_index: .* got '255'"),
    (dict(classes=[f"c{i}" for i in range(255)]), ValueError, "ignore_index: expected a value that masks have for no"),
    (dict(masks=np.full((3, 8, 6), 255)), ValueError,
     "a pixel that counts in each usable image, none in 'a', 'b', 'c'")])
def test_what_is_ignored_is_checked(changes, error, words):
    with pytest.raises(error, match=words):
        Samples(**marked_fields(**changes))


def test_a_defect_that_is_ignored_altogether_is_none():
    masks = marked_fields()["masks"]
    masks[0][masks[0] == 1] = 255
    with pytest.raises(ValueError, match="a defect in each usable image of a defect class, none in 'a'"):
        Samples(**marked_fields(masks=masks))
    table = marked_fields()["table"].assign(usable=[False, True, True])
    assert dataset_table(Samples(**marked_fields(masks=masks, table=table))).loc["Ast", "empty"] == 1
