"The injection as a part of other people's loops: a module, tensors with types, dictionaries, workers."
import copy
import pickle
from collections import namedtuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, default_collate
from torchvision import tv_tensors
from torchvision.transforms import v2

from dli.method.donors import DonorPool, DonorTransform
from dli.method.injection import DynamicLabelInjection
from dli.method.loops import InjectBatch
from dli.network.losses import LOSSES, make_loss
from test_injection import make_samples, seeded

DARK, LIGHT = 60, 200
KEYS = ("image", "mask")
Pair = namedtuple("Pair", "image mask name")


def painted(n=8, size=48):
    "Samples that are light where they show a defect: half of them do."
    masks = np.zeros((n, size, size), np.uint8)
    for i, mask in enumerate(masks[::2]):
        mask[10 + i:24, 12:30 + i] = i % 3 + 1
    return make_samples(masks, np.where(masks > 0, LIGHT, DARK))


SAMPLES = painted()
ANYWHERE = dict.fromkeys(SAMPLES.classes, DonorTransform(p=1, rotate=0, shift=0.5, scale=0))


def make_injection(**choices):
    return DynamicLabelInjection(DonorPool(SAMPLES, ANYWHERE), **dict(dict(fill="all"), **choices))


def painted_batch():
    return torch.from_numpy(SAMPLES.images)[:, None], torch.from_numpy(SAMPLES.masks)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def agree(images, masks):
    "The share of light or labelled pixels that are both."
    images, defect = images.as_subclass(torch.Tensor)[:, 0].float(), masks.as_subclass(torch.Tensor) > 0
    light = images > (images.min() + images.max()) / 2
    return ((light & defect).sum() / (light | defect).sum()).item()


# ---- a module --------------------------------------------------------------------------------------------------------

class Network(nn.Module):
    def __init__(self, inject):
        super().__init__()
        self.convolution, self.inject = nn.Conv2d(1, 3, 3, padding=1), inject

    def forward(self, images, masks, generator):
        images, masks = self.inject(images, masks, generator)
        return self.convolution(images / 255), masks


def test_it_is_a_module_without_anything_of_its_own():
    inject = make_injection()
    model = Network(inject)
    assert [*model.state_dict()] == ["convolution.weight", "convolution.bias"]
    assert [*inject.parameters(), *inject.buffers(), *inject.state_dict()] == []
    model.load_state_dict(Network(make_injection()).state_dict())
    expected = inject(*painted_batch(), seeded(0))
    assert model.half().to("cpu").double().inject is inject and model.requires_grad_(False).train() is model
    assert same(inject(*painted_batch(), seeded(0)), expected)
    assert "p_poisson=0.5" in repr(model) and len(repr(model)) < 1000


def test_hooks_are_called():
    inject, seen = make_injection(), []
    inject.register_forward_hook(lambda module, given, result: seen.append(result))
    result = inject(*painted_batch())
    assert len(seen) == 1 and same(seen[0], result)


def test_eval_mode_injects_and_says_so_once(recwarn):
    inject = make_injection()
    images, masks = painted_batch()
    expected = inject(images, masks, seeded(0))
    Network(inject).eval()
    assert not inject.training and len(recwarn) == 0
    assert same(inject(images, masks, seeded(0)), expected) and same(inject(images, masks, seeded(0)), expected)
    assert [str(w.message)[:45] for w in recwarn] == ["DynamicLabelInjection: called in eval mode, a"]
    assert recwarn[0].filename == __file__


@pytest.mark.parametrize("make", [make_injection, lambda: InjectBatch(make_injection(), collate=default_collate),
                                  lambda: Network(make_injection())], ids=["alone", "batch", "network"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_do_the_same_and_share_nothing(make, copied):
    thing = make()
    again = copied(thing)
    first, second = (x if isinstance(x, DynamicLabelInjection) else x.inject for x in (thing, again))
    assert same(first(*painted_batch(), seeded(0)), second(*painted_batch(), seeded(0)))
    assert second.pool is not first.pool and second.stats is not first.stats
    first(*painted_batch())
    assert (first.stats.batches, second.stats.batches) == (2, 1)


def test_a_compiled_model_with_the_injection_in_it():
    images, masks = painted_batch()
    model = Network(make_injection())
    expected = model(images, masks, seeded(0))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        assert same(compiled(images, masks, seeded(0)), expected)
    alone = torch.compile(make_injection(), backend="eager")
    assert same(alone(images, masks, seeded(0)), make_injection()(images, masks, seeded(0)))
    whole = torch.compile(InjectBatch(make_injection(), KEYS), backend="eager")
    after = whole(dict(image=images, mask=masks), seeded(0))
    assert same([after[key] for key in KEYS], make_injection()(images, masks, seeded(0)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing_but_the_network(dtype):
    images, masks = painted_batch()
    images, model = images / 255, Network(make_injection())
    expected = model.inject(images, masks, seeded(0))
    with torch.autocast("cpu", dtype):
        result = model.inject(images, masks, seeded(0))
        logits, labels = model(images * 255 / 255, masks, seeded(0))
    assert same(result, expected) and result[0].dtype == torch.float32
    assert logits.dtype == dtype and torch.equal(labels, expected[1])


# ---- types -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("p_poisson", [0.0, 1.0])
@pytest.mark.parametrize("kept", [False, True], ids=["plain results", "typed results"])
def test_types_of_torchvision_are_kept(p_poisson, kept):
    images, masks = painted_batch()
    inject = make_injection(p_poisson=p_poisson)
    expected = inject(images, masks, seeded(0))
    plan = inject.make_params(tv_tensors.Mask(masks), seeded(0))
    with tv_tensors.set_return_type("TVTensor" if kept else "Tensor"):
        given = tv_tensors.Image(images), tv_tensors.Mask(masks)
        results = [inject(*given, seeded(0)), inject.transform(*given, plan)]
    for after, labels in results:
        assert type(after) is tv_tensors.Image and type(labels) is tv_tensors.Mask
        assert same([x.as_subclass(torch.Tensor) for x in (after, labels)], expected)
    assert torch.equal(given[0].as_subclass(torch.Tensor), painted_batch()[0])
    assert [type(x) for x in inject(images, tv_tensors.Mask(masks))] == [torch.Tensor, tv_tensors.Mask]


def test_a_rotation_after_it_turns_both():
    after = v2.Compose([make_injection(), v2.RandomRotation((40, 140))])
    images, masks = painted_batch()
    torch.manual_seed(0)
    turned = after(tv_tensors.Image(images), tv_tensors.Mask(masks))
    assert agree(*turned) > 0.9 and turned[1].flatten(1).any(1).sum() > 4
    assert agree(*after(images, masks)) < 0.6, "what the types are for"


class Marked(torch.Tensor):
    "A type that carries notes, as MONAI's does."


def test_other_types_keep_their_notes():
    images, masks = (x.as_subclass(Marked) for x in painted_batch())
    images.notes, masks.notes = dict(spacing=3), ["by hand"]
    after, labels = make_injection()(images, masks, seeded(0))
    assert type(after) is type(labels) is Marked
    assert (after.notes, labels.notes) == (images.notes, masks.notes) and after.notes is not images.notes
    assert same([x.as_subclass(torch.Tensor) for x in (after, labels)], make_injection()(*painted_batch(), seeded(0)))


def test_a_parameter_makes_a_plain_tensor():
    images, masks = painted_batch()
    after, _ = make_injection()(nn.Parameter(images / 255), masks)
    assert type(after) is torch.Tensor and not after.requires_grad


# ---- whole batches ---------------------------------------------------------------------------------------------------

def test_a_dictionary():
    images, masks = painted_batch()
    batch = dict(image=images, mask=masks, name=["a"] * 8)
    kept = {key: copy.deepcopy(value) for key, value in batch.items()}
    after = InjectBatch(make_injection(), KEYS)(batch, seeded(0))
    assert list(after) == list(batch) and after["name"] is batch["name"]
    assert same([after[key] for key in KEYS], make_injection()(images, masks, seeded(0)))
    assert same([batch[key] for key in KEYS], [kept[key] for key in KEYS])
    other = dict(name=1, labels=masks, x=images)
    assert same([InjectBatch(make_injection(), ["x", "labels"])(other, seeded(0))[key] for key in ("x", "labels")],
                [after[key] for key in KEYS])


@pytest.mark.parametrize("kind, keys", [(tuple, (0, 1)), (list, (0, 1)), (Pair._make, (0, 1)), (tuple, (1, 0))])
def test_sequences_come_back_as_they_were(kind, keys):
    images, masks = painted_batch()
    batch = kind([(images, masks)[i] for i in keys] + ["names"])
    after = InjectBatch(make_injection(), keys)(batch, seeded(0))
    assert type(after) is type(batch) and after[2] == "names"
    assert same([after[i] for i in keys], make_injection()(images, masks, seeded(0)))


@pytest.mark.parametrize("wrap", [lambda x: x, tv_tensors.Mask, lambda x: x.as_subclass(Marked)])
def test_masks_may_have_a_channel(wrap):
    images, masks = painted_batch()
    batch = dict(image=images, mask=wrap(masks[:, None]))
    after = InjectBatch(make_injection(), KEYS)(batch, seeded(0))
    assert type(after["mask"]) is type(batch["mask"])
    expected = make_injection()(images, masks, seeded(0))
    assert same([after["image"], after["mask"].as_subclass(torch.Tensor)[:, 0]], expected)


@pytest.mark.parametrize("args, error, words", [
    (dict(inject=None), TypeError, "inject: expected a DynamicLabelInjection, got NoneType"),
    (dict(keys="image"), ValueError, "keys: expected two, of the images and of the masks, .*got 'image'"),
    (dict(keys=("image",)), ValueError, "keys: expected two"), (dict(keys=(1, 1)), ValueError, "keys: expected two"),
    (dict(collate="default"), TypeError, "collate: expected a function .*got 'default'")])
def test_wrong_arguments(args, error, words):
    with pytest.raises(error, match=words):
        InjectBatch(**(dict(inject=make_injection()) | args))


@pytest.mark.parametrize("keys, change, error, words", [
    (("image", "label"), dict, ValueError, "the keys 'image' .images. and 'label' .masks., got .'image', 'mask'"),
    ((0, 1), dict, ValueError, r"the keys 0 .images. and 1 .masks., got \['image', 'mask'\]"),
    ((0, 2), lambda b: tuple(b.values()), ValueError, "and 2 .masks., got tuple of 2"),
    (KEYS, lambda b: tuple(b.values()), ValueError, "'mask' .masks., got tuple of 2"),
    (KEYS, lambda b: b | dict(mask=b["mask"].numpy()), TypeError, "batch.'mask'.: expected a torch tensor, got numpy")])
def test_a_batch_that_does_not_fit(keys, change, error, words):
    batch = change(dict(zip(KEYS, painted_batch())))
    with pytest.raises(error, match=words):
        InjectBatch(make_injection(), keys)(batch)


# ---- workers ---------------------------------------------------------------------------------------------------------

def batches_of_workers(start):
    "Two epochs of four batches of the same two clean images, each by a worker of its own: images and masks as bytes."
    data = [dict(image=torch.full((1, 48, 48), DARK, dtype=torch.uint8), mask=torch.zeros(48, 48, dtype=torch.uint8))]
    collate = InjectBatch(make_injection(), KEYS, default_collate)
    loader = DataLoader(data * 8, 2, num_workers=4, collate_fn=collate, generator=seeded(0),
                        multiprocessing_context=start, persistent_workers=start == "spawn")
    epochs = [list(loader), list(loader)]
    assert all(agree(*b.values()) > 0.9 and b["mask"].flatten(1).any(1).all() for epoch in epochs for b in epoch)
    return [[b["image"].numpy().tobytes() + b["mask"].numpy().tobytes() for b in epoch] for epoch in epochs]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_inject_and_do_not_repeat_each_other(start):
    first, second = batches_of_workers(start)
    assert len({*first, *second}) == 8
    assert batches_of_workers(start) == [first, second], "the loader's generator decides it all"


# ---- losses ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", LOSSES)
def test_a_channel_for_the_background_is_refused(name):
    "Whether the losses know the number of classes by `classes` or by the counts that they need."
    masks = torch.randint(0, 4, (2, 8, 8), generator=seeded(0))
    logits = torch.randn(2, 4, 8, 8, generator=seeded(0))
    with pytest.raises(ValueError, match=r"logits: expected 3 channels.*got 4\. .*background.*smp.losses.DiceLoss"):
        make_loss(name, [3, 2, 1], [30, 20, 10], classes=3)(logits, masks)
    assert make_loss(name, [3, 2, 1], [30, 20, 10], classes=3)(logits[:, 1:], masks).isfinite()
    with pytest.raises(ValueError, match="logits: expected 3 channels"):
        make_loss(name, [3, 2, 1], [30, 20, 10])(logits, masks)


def test_a_loss_that_does_not_know_its_classes_says_so(recwarn):
    make_loss("baseline", classes=3)
    make_loss("wce", pixels_per_class=[3, 2, 1])
    make_loss("baseline", pixels_per_class=[3, 2, 1])
    assert len(recwarn) == 0
    make_loss("baseline")
    assert ["make_loss: without classes=" in str(w.message) for w in recwarn] == [True]
    assert recwarn[0].filename == __file__


@pytest.mark.parametrize("ignore_index", [None, 255])
def test_masks_are_what_losses_for_softmax_want(ignore_index):
    smp = pytest.importorskip("segmentation_models_pytorch")
    images, masks = painted_batch()
    if ignore_index:
        masks[:, :5] = ignore_index
    _, labels = make_injection(ignore_index=ignore_index)(images, masks)
    target = labels.long()
    certain = 50 * nn.functional.one_hot(target.where(target <= 3, 0), 4).permute(0, 3, 1, 2).float()
    certain[:, :, :5] = torch.randn(8, 4, 5, 48) if ignore_index else certain[:, :, :5]
    cross_entropy = nn.CrossEntropyLoss(ignore_index=ignore_index or -100)(certain, target)
    dice = smp.losses.DiceLoss("multiclass", ignore_index=ignore_index)(certain, target)
    assert cross_entropy < 1e-4 and dice < 1e-4
    assert smp.losses.DiceLoss("multiclass", ignore_index=ignore_index)(certain.roll(1, 1), target) > 0.5
