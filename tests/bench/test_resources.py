"""Every kernel compiles for every target: no spills, shared memory within limits, 16-byte accesses on aligned maps."""

import dataclasses

import pytest
import torch

triton = pytest.importorskip("triton")

from setriton.bench.launches import FORMS, NETWORKS, Form, step, steps_of  # noqa: E402
from setriton.bench.resources import TARGETS, Resources, programs, resources, worst  # noqa: E402

# What a program may have without asking the driver for more.
SHARED_BYTES = 48 * 1024


def assert_lean(found: list[Resources], spilled: int = 0) -> None:
    for launch in found:
        assert launch.spilled <= spilled, launch
        assert launch.shared <= SHARED_BYTES, launch
        assert launch.widest_access >= 128, launch


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("target", TARGETS)
def test_every_form_for_every_target(target: str, form: Form) -> None:
    found = resources(step(form), target)
    assert len(found) == form.launches + (4 if form.training else 0)
    assert_lean(found)


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["SE", "tail, training", "BN-SiLU-SE, training"])
def test_every_dtype_and_layout(name: str, dtype: torch.dtype, channels_last: bool) -> None:
    # ptxas of Triton 3.6 keeps two registers of the gradients' sums elsewhere, for four programs of 128 at once;
    # allowed 168 it takes 163, and three run.
    is_old = triton.__version__.startswith("3.6.") and (dtype, channels_last) == (torch.float32, False)
    spilled = 8 if is_old and name == "tail, training" else 0
    assert_lean(resources(step(FORMS[name], dtype=dtype, channels_last=channels_last), "sm_90"), spilled)


def of(network: str, training: bool, channels: int) -> Form:
    """The form of a network's block."""
    return next(
        form
        for form, shapes in NETWORKS[network]
        if form.training == training and channels in {shape.channels for shape in shapes}
    )


# What once spilled, up to 1,200 bytes a thread: of each kernel the worst.
HEAVY = {
    "sm_90": [
        (of("SE-ResNet-50, SENet-154", True, 2048), (128, 2048, 7, 7), False, 128),
        (of("MobileNetV3-large", True, 120), (32, 120, 28, 28), True, 32),
        (of("MobileNetV3-large", False, 72), (128, 72, 28, 28), False, 24),
        (of("EfficientNet-B0", True, 672), (1, 672, 7, 7), False, 28),
    ],
    "sm_80": [
        (of("MobileNetV3-large", True, 960), (128, 960, 7, 7), True, 240),
        (of("MobileNetV3-large", False, 72), (128, 72, 28, 28), True, 24),
    ],
}


@pytest.mark.parametrize("target", HEAVY)
def test_no_spills_in_networks(target: str) -> None:
    """A sample of `setriton bench resources --networks`."""
    steps = [step(form, shape, torch.bfloat16, last, hidden) for form, shape, last, hidden in HEAVY[target]]
    found = worst(steps, target)
    assert len(found) == 5
    for _, most in found.values():
        assert most.spilled == 0, most
        assert most.shared <= SHARED_BYTES, most


def test_networks() -> None:
    steps = [list(steps_of(network)) for network in NETWORKS]
    assert [len(found) for found in steps] == [3 * 2 * 2 * 4 * 3, 3 * 2 * 2 * 10 * 2, 3 * 2 * 2 * 6 * 2]
    assert {program.source.fn.__name__ for program in programs(steps[0][0], "sm_90")} == {
        "forward_kernel", "reduce_kernel", "hidden_gradient_kernel", "excite_gradients_kernel", "dx_kernel",
    }  # fmt: skip
    with pytest.raises(ValueError, match="network must be one of SE-ResNet-50"):
        next(steps_of("VGG"))


def test_the_batch_is_no_part_of_a_program() -> None:
    """In evaluation one program serves every batch: what it sums in which order is the same."""
    for name in ("SE, y apart", "tail, evaluation", "BN-SiLU-SE, evaluation"):
        form = dataclasses.replace(FORMS[name], training=False)
        for channels_last in (True, False):
            steps = [step(form, (n, 72, 7, 7), channels_last=channels_last) for n in (1, 2, 16, 63, 64, 65, 500)]
            assert len({tuple(p.key for p in programs(found, "sm_90")) for found in steps}) == 1


def test_unknown_target() -> None:
    with pytest.raises(ValueError, match="target must be one of sm_80"):
        resources(lambda: None, "sm_10")
