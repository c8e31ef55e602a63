"""Deployment: model files, prediction on photographs, thresholds, and the scores of a model."""
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from dli.network.modelfile import ModelNotes, build_model, find_models, read_notes, save_model, save_notes
from dli.network.models import lightweight_unet, save_weights
from dli.network.speed import faster

NOTES = ModelNotes(("Crack", "Fray"), "efficientnet_lite0", (64, 32), channels=1, mean=0.43, deviation=0.12,
                   levels=(0, 4095), ignore=255, thresholds={"Fray": (0.8, 40)}, train_parts=("1", "2"),
                   config=dict(steps=3, decoder=[64, 32]))


def small_network(classes=2, channels=1, decoder=(64, 32), encoder="efficientnet_lite0") -> torch.nn.Module:
    return lightweight_unet(encoder, classes=classes, weights=None, channels=channels, decoder_channels=decoder)


@pytest.fixture
def stored(tmp_path):
    path = tmp_path / "model.safetensors"
    save_model(small_network(), path, NOTES)
    return path


# ---- model files -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("encoder", ["resnet18", "resnest50d", "mobileone_s1", "efficientnet_lite0"])
def test_a_network_made_faster_comes_back_plain(encoder, tmp_path):
    network = faster(small_network(encoder=encoder), "cpu", torch.bfloat16).eval()
    save_model(network, tmp_path / "model.safetensors", replace(NOTES, encoder=encoder))
    again = build_model(tmp_path / "model.safetensors", "cpu")
    assert not again.training and again.state_dict().keys() == network.state_dict().keys()
    assert not any("Folded" in type(m).__name__ or "Sliced" in type(m).__name__ for m in again.modules())
    image = torch.rand(1, 1, 32, 40, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(again(image), network(image), rtol=1e-3, atol=1e-3)


def test_notes_come_back_as_they_were(stored):
    assert read_notes(stored) == NOTES
    assert json.loads(json.dumps(NOTES.config)) == NOTES.config


def test_building_a_network_draws_no_random_number(stored):
    torch.manual_seed(3)
    build_model(stored, "cpu")
    drawn = torch.rand(2)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(2), drawn)


def write_notes(path, text: str) -> None:
    save_file(load_file(path), path, {"dli": text})


@pytest.mark.parametrize("damage, said", [
    (lambda p: p.write_bytes(p.read_bytes()[:1000]), "is it complete"),
    (lambda p: p.write_bytes(b""), "is it complete"),
    (lambda p: p.write_bytes(b"\x80\x04}." * 20), "is it complete"),
    (lambda p: save_weights(small_network(), p), "weights without notes"),
    (lambda p: write_notes(p, "{"), "are no JSON"),
    (lambda p: write_notes(p, "[" * 100_000), "are no JSON"),
    (lambda p: write_notes(p, "[]"), "expected notes of format 1"),
    (lambda p: write_notes(p, '{"format": 2}'), "another version of dli"),
    (lambda p: write_notes(p, '{"format": 1, "colour": 1}'), "unknown notes colour"),
    (lambda p: write_notes(p, '{"format": 1}'), "missing"),
])
def test_a_file_that_is_no_model_is_refused_by_name(stored, damage, said):
    damage(stored)
    for read in (read_notes, lambda p: build_model(p, "cpu")):
        with pytest.raises(ValueError, match=said) as caught:
            read(stored)
        assert str(stored) in str(caught.value)


def test_weights_of_another_network_are_refused(stored, tmp_path):
    with pytest.raises(ValueError, match="model: the weights are not those"):
        save_model(small_network(classes=3), tmp_path / "other.safetensors", NOTES)
    assert not (tmp_path / "other.safetensors").exists()
    write_notes(stored, json.dumps(dict(format=1, classes=["Crack"], encoder="efficientnet_lite0", decoder=[64, 32],
                                        channels=1, mean=0.4, deviation=0.1)))
    with pytest.raises(ValueError, match="not those of the network in the notes"):
        build_model(stored, "cpu")
    with pytest.raises(ValueError, match="expected the path of a .safetensors file"):
        read_notes(tmp_path / "model.pth")
    with pytest.raises(FileNotFoundError, match="no such model file"):
        read_notes(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize("wrong", [
    dict(classes=()), dict(classes="Crack"), dict(classes=("Crack", "Crack")), dict(encoder="vgg"), dict(channels=2),
    dict(decoder=(1,)), dict(mean=float("nan")), dict(deviation=0), dict(scale=0), dict(size=(0, 8)), dict(size=8),
    dict(size=(8, 8), crop=(8, 8)), dict(levels=(1, 1)), dict(levels=3), dict(ignore=2), dict(ignore=256),
    dict(thresholds={"Frey": (0.5, 1)}), dict(thresholds={"Fray": (0, 1)}), dict(thresholds={"Fray": (1.1, 1)}),
    dict(thresholds={"Fray": (0.5, 0)}), dict(thresholds={"Fray": 0.5}), dict(thresholds=[]), dict(config=None)])
def test_notes_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        replace(NOTES, **wrong)


def test_new_notes_leave_the_weights(stored):
    before = load_file(stored)
    save_notes(stored, replace(NOTES, thresholds={}))
    assert read_notes(stored).threshold("Fray") == (0.5, 1)
    after = load_file(stored)
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert [p.name for p in stored.parent.iterdir()] == [stored.name]


def test_models_are_found_in_runs_and_folders_of_runs(tmp_path, stored):
    for name in ("b", "a"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "model.safetensors").write_bytes(stored.read_bytes())
    (tmp_path / "runs" / "unfinished").mkdir()
    assert [p.parent.name for p in find_models(tmp_path / "runs")] == ["a", "b"]
    assert find_models(tmp_path / "runs" / "a") == [tmp_path / "runs" / "a" / "model.safetensors"]
    assert find_models(str(stored)) == [stored]
    for wrong in (tmp_path / "runs" / "unfinished", tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=str(wrong)):
            find_models(wrong)


# ---- a model file as a start -----------------------------------------------------------------------------------------

def test_a_model_file_is_a_start(stored):
    own = load_file(stored)
    same = lightweight_unet("efficientnet_lite0", 2, stored, channels=1, decoder_channels=(64, 32)).state_dict()
    assert all(torch.equal(same[k], own[k]) for k in own)
    other = lightweight_unet("efficientnet_lite0", 5, stored, channels=1, decoder_channels=(64, 32)).state_dict()
    equal = {k for k in own if own[k].shape == other[k].shape and torch.equal(own[k], other[k])}
    assert {k for k in own if k.startswith("encoder.")} <= equal
    assert not any(own[k].ndim == 4 for k in equal if k.startswith("decoder."))
    with pytest.raises(ValueError, match="does not fit the encoder"):
        lightweight_unet("resnet18", 2, stored, channels=1)


def test_a_grey_start_sees_equal_channels_as_it_saw_one(stored):
    grey = build_model(stored, "cpu")
    rgb = lightweight_unet("efficientnet_lite0", 2, stored, decoder_channels=(64, 32)).eval()
    image = torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rgb(image.expand(1, 3, 32, 32)), grey(image), rtol=1e-4, atol=1e-4)
