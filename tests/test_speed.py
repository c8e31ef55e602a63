"""The same network, faster: which device and format are chosen, and that a folded block is the block."""
import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoderBlock

from dli.network.speed import FoldedBlock, default_device, memory_format, network_dtype


@pytest.mark.parametrize("cuda, mps, expected", [
    (True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_the_gpu_is_used_where_there_is_one(cuda, mps, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert default_device() == torch.device(expected)
    assert network_dtype(torch.device("mps")) == torch.float32
    assert memory_format("resnet18", torch.device("mps")) == torch.contiguous_format


def random_features(batch, channels, height, width, layout):
    features = torch.randn(batch, channels, height, width, dtype=torch.double)
    return features.contiguous(memory_format=layout).requires_grad_()


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 2), st.integers(1, 5), st.integers(1, 5), st.sampled_from((0, 3)),
       st.sampled_from((torch.contiguous_format, torch.channels_last)), st.integers(0, 2**31))
def test_a_folded_block_is_the_block(batch, height, width, skipped, layout, seed):
    "Output and every gradient, with and without a skip connection, of any size."
    torch.manual_seed(seed)
    block = UnetDecoderBlock(4, skipped, 5).double().eval()
    folded = FoldedBlock(copy.deepcopy(block)).eval()
    found = []
    for b in (block, folded):
        torch.manual_seed(seed)
        x = random_features(batch, 4, height, width, layout)
        skip = random_features(batch, skipped, 2 * height, 2 * width, layout) if skipped else None
        out = b(x, 2 * height, 2 * width, skip)
        out.square().sum().backward()
        found.append([out, x.grad, *([skip.grad] if skipped else []), *(p.grad for p in b.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    assert block.state_dict().keys() == folded.state_dict().keys()


def test_a_folded_block_refuses_other_sizes():
    block = FoldedBlock(UnetDecoderBlock(4, 0, 5))
    message = "expected images whose height and width are multiples of 8, got features .3, 4. for 7x8"
    with pytest.raises(ValueError, match=message):
        block(torch.rand(1, 4, 3, 4), 7, 8)
