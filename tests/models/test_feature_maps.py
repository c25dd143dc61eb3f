"""Feature maps: of every network by their shapes, of SE-ResNet by timm's, with dilation too."""

from functools import partial
from typing import Any

import pytest
import timm
import timm.models.resnet
import torch
from same_step import images, randomized
from torch import Tensor, nn

from setriton import create_model, list_models
from setriton.models.base import FeatureExtractor
from setriton.models.blocks import BlockSEOptions
from setriton.models.published import crop
from setriton.models.resnet import Design, ResNet


def assert_close(found: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-10 * float(want.abs().max()))


@pytest.mark.parametrize("name", list_models())
def test_maps_are_what_feature_info_says(name: str) -> None:
    side, model = crop(name), create_model(name, device="meta").eval()
    x = torch.empty(2, 3, side, side, device="meta")
    last, maps = model.forward_intermediates(x)
    assert last.shape == maps[-1].shape
    assert len(maps) == len(model.feature_info)
    for found, level in zip(maps, model.feature_info, strict=True):
        assert found.shape[1] == level["num_chs"]
        # Inception-ResNet-v2 does not pad: 299 pixels become 147, 71, 35, 17 and 8.
        assert side / level["reduction"] - 4 < found.shape[2] <= side / level["reduction"] + 1
        assert isinstance(model.get_submodule(level["module"]), nn.Module)
    extractor = create_model(name, device="meta", features_only=True).eval()
    assert [m.shape for m in extractor(x)] == [m.shape for m in maps]


@pytest.mark.parametrize("name", ["resnet20", "se_resnet20"])
@pytest.mark.parametrize("training", [True, False])
def test_maps_are_those_on_the_way_to_the_logits(name: str, training: bool) -> None:
    model: Any = randomized(create_model(name)).train(training)
    x, seen = images(16), {}
    for level in model.feature_info:
        keep = partial(lambda key, module, args, y: seen.update({key: y}), level["module"])
        model.get_submodule(level["module"]).register_forward_hook(keep)
    want = model(x)
    outputs = [y[0] if isinstance(y, tuple) else y for y in seen.values()]
    last, maps = model.forward_intermediates(x)
    for found, output in zip(maps, outputs, strict=True):
        assert torch.equal(found, output)
    assert torch.equal(last, maps[-1])
    assert torch.equal(model.forward_head(last), want)


def test_levels_that_are_asked_for() -> None:
    model: Any = randomized(create_model("se_resnet20")).eval()
    x = images(16)
    last, every = model.forward_intermediates(x)
    for indices, positions in ((2, [2, 3]), ((0, -1), [0, 3]), ([-3], [1]), ((2, 1, 2), [1, 2]), (None, range(4))):
        assert model.take_indices(indices) == list(positions)
        end, maps = model.forward_intermediates(x, indices)
        assert torch.equal(end, last)
        assert all(torch.equal(m, every[i]) for m, i in zip(maps, positions, strict=True))
        assert len(model.forward_intermediates(x, indices, intermediates_only=True)) == len(maps)
    called = []
    model.layer3.register_forward_hook(lambda *_: called.append(1))
    end, maps = model.forward_intermediates(x, [0, 1], stop_early=True)
    assert torch.equal(end, every[1])
    assert called == []


@pytest.fixture(scope="module")
def seresnet50() -> nn.Module:
    torch.manual_seed(0)
    return randomized(timm.create_model("seresnet50")).eval()


def test_maps_equal_timms(seresnet50: nn.Module) -> None:
    theirs = timm.create_model("seresnet50", features_only=True).double().eval()
    theirs.load_state_dict(seresnet50.state_dict(), strict=False)
    ours = create_model("se_resnet50", layout="torch").double().eval()
    ours.load_state_dict(seresnet50.state_dict())
    x = images(65)
    with torch.no_grad():
        want, (_, maps) = theirs(x), ours.forward_intermediates(x)
        assert [level["num_chs"] for level in ours.feature_info] == theirs.feature_info.channels()
        assert [level["reduction"] for level in ours.feature_info] == theirs.feature_info.reduction()
        for found, wanted in zip(maps, want, strict=True):
            assert_close(found, wanted)
        assert_close(ours(x), seresnet50(x))
        some = create_model("se_resnet50", layout="torch", features_only=True, out_indices=(1, 3)).double().eval()
        assert not hasattr(some.network, "layer4")
        assert isinstance(some.network.fc, nn.Identity)
        state = {f"network.{key}": value for key, value in ours.state_dict().items()}
        some.load_state_dict({key: state[key] for key in some.state_dict()})
        for found, wanted in zip(some(x), (want[1], want[3]), strict=True):
            assert_close(found, wanted)


def test_an_extractor_keeps_the_keys_of_the_network() -> None:
    full = create_model("se_resnet20", device="meta").state_dict()
    extractor = create_model("se_resnet20", features_only=True, device="meta", dtype=torch.float64)
    assert isinstance(extractor, FeatureExtractor)
    assert list(extractor.state_dict()) == [f"network.{key}" for key in full if not key.startswith("fc.")]
    assert extractor.feature_info == create_model("se_resnet20", device="meta").feature_info


@pytest.mark.parametrize("output_stride", [8, 16])
def test_dilated_maps_equal_timms(output_stride: int, seresnet50: nn.Module) -> None:
    torch.manual_seed(0)
    theirs = timm.create_model("seresnet50", output_stride=output_stride).double().eval()
    ours = create_model("se_resnet50", layout="torch", output_stride=output_stride).double().eval()
    for model in (theirs, ours):
        model.load_state_dict(seresnet50.state_dict())
    x = images(96)
    with torch.no_grad():
        found = ours.forward_features(x)
        assert found.shape[2] == 96 // output_stride
        assert_close(found, theirs.forward_features(x))
    assert ours.feature_info[-1]["reduction"] == output_stride


@pytest.mark.parametrize("output_stride", [8, 16, 32])
def test_senet154_with_few_blocks_equals_timms(output_stride: int) -> None:
    """Also its 3x3 projections, which are dilated where they are not strided."""
    torch.manual_seed(0)
    ours = ResNet(
        Design((1, 2, 2, 1), groups=64, base_width=4, senet154=True),
        BlockSEOptions(),
        layout="torch",
        output_stride=output_stride,
        num_classes=10,
    ).double()
    theirs = timm.models.resnet.ResNet(
        timm.models.resnet.Bottleneck,
        (1, 2, 2, 1),
        cardinality=64,
        base_width=4,
        stem_type="deep",
        down_kernel_size=3,
        block_reduce_first=2,
        block_args={"attn_layer": "se"},
        output_stride=output_stride,
        num_classes=10,
    )
    ours.load_state_dict(randomized(theirs).state_dict())
    x = images(48)
    with torch.no_grad():
        assert_close(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize(("name", "layout"), [("se_resnet18", "torch"), ("se_resnet50", "caffe")])
def test_a_stage_is_as_large_as_its_stride_says(name: str, layout: str) -> None:
    x = torch.empty(2, 3, 224, 224, device="meta")
    for output_stride in (8, 16, 32):
        model = create_model(name, layout=layout, output_stride=output_stride, device="meta")
        _, maps = model.forward_intermediates(x)
        assert [224 // m.shape[2] for m in maps] == [level["reduction"] for level in model.feature_info]
        assert [level["reduction"] for level in model.feature_info] == [
            min(stride, output_stride) for stride in (2, 4, 8, 16, 32)
        ]
        convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
        assert max(m.dilation[0] for m in convs) == 32 // output_stride


def test_an_extractor_trains_as_its_network_does() -> None:
    torch.manual_seed(0)
    full: Any = randomized(create_model("se_resnet20"))
    extractor = create_model("se_resnet20", features_only=True, out_indices=[2]).double()
    state = {f"network.{key}": value for key, value in full.state_dict().items()}
    extractor.load_state_dict({key: state[key] for key in extractor.state_dict()})
    x = images(16)
    (found,) = extractor(x)
    (want,) = full.forward_intermediates(x, [2], intermediates_only=True)
    for y in (found, want):
        y.square().mean().backward()
    assert torch.equal(found, want)
    for key, parameter in extractor.network.named_parameters():
        assert_close(parameter.grad, full.get_parameter(key).grad)
    assert all(torch.equal(b, full.get_buffer(key)) for key, b in extractor.network.named_buffers())
