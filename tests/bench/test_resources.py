"""Every kernel compiles for every target: no spills, shared memory within limits, 16-byte accesses on aligned maps."""

import pytest
import torch

triton = pytest.importorskip("triton")

from setriton.bench.launches import FORMS, Form, step  # noqa: E402
from setriton.bench.resources import TARGETS, Resources, resources  # noqa: E402

# What a program may have without asking the driver for more.
SHARED_BYTES = 48 * 1024


def assert_lean(found: list[Resources]) -> None:
    for launch in found:
        assert launch.spilled == 0, launch
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
    assert_lean(resources(step(FORMS[name], dtype=dtype, channels_last=channels_last), "sm_90"))


def test_unknown_target() -> None:
    with pytest.raises(ValueError, match="target must be one of sm_80"):
        resources(lambda: None, "sm_10")
