"""What importing costs, and what it must not need; each in a fresh process."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from setriton import kernels


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


KERNEL_MODULES = sorted(
    f"setriton.kernels.{path.stem}"
    for path in Path(kernels.__file__).parent.glob("*.py")
    if re.search(r"^(import|from) triton", path.read_text(), re.MULTILINE)
)


def test_import_and_use_on_the_cpu_bring_none_of_the_heavy_packages_and_no_kernels() -> None:
    code = f"""
import sys, setriton, torch
model = setriton.create_model("se_resnet20")
setriton.squeeze_excite, setriton.SqueezeExcite
model(torch.randn(1, 3, 32, 32)).sum().backward()
heavy = ["torchvision", "timm", "sklearn", "tyro", "rich", "matplotlib", *{KERNEL_MODULES!r}]
print("setriton.models" in sys.modules, [name for name in heavy if name in sys.modules])
"""
    assert {"setriton.kernels.forward_kernel", "setriton.kernels.primitives"} <= set(KERNEL_MODULES)
    assert run_python(code) == "True []"


def test_import_alone_imports_no_torch_and_no_triton() -> None:
    assert run_python("import sys, setriton; print('torch' in sys.modules, 'triton' in sys.modules)") == "False False"


def test_import_adds_little_to_torch() -> None:
    code = """
import time, torch
before = time.perf_counter()
import setriton
print(time.perf_counter() - before)
"""
    assert float(run_python(code)) < 0.3


# Without the site module no installed setriton is found, nor anything else: torch's folder is added by hand.
HUB = f"""
import sys
sys.path += [{str(Path(torch.__file__).parents[1])!r}]
"""

BLOCK = """
import sys
for name in {blocked!r}:
    sys.modules[name] = None
"""


@pytest.mark.parametrize("blocked", [("triton",), ("torchvision", "timm", "sklearn", "tyro", "rich", "matplotlib")])
def test_works_without(blocked: tuple[str, ...]) -> None:
    code = (
        BLOCK.format(blocked=blocked)
        + """
import torch, setriton
x = torch.randn(2, 16, 4, 4, requires_grad=True)
setriton.SqueezeExcite(16)(x).sum().backward()
setriton.create_model("se_resnet20")(torch.randn(1, 3, 32, 32))
print(x.grad.shape)
"""
    )
    assert run_python(code) == "torch.Size([2, 16, 4, 4])"


def test_a_missing_triton_is_reported_once() -> None:
    code = """
import warnings
from unittest import mock
from setriton import ops
with mock.patch("importlib.util.find_spec", return_value=None), warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("default")
    print(*(ops.has_kernels("cuda") for _ in range(3)), ops.has_kernels("cpu"))
print(len(caught), caught[0].message)
"""
    first, second = run_python(code).splitlines()
    assert first == "False False False False"
    assert second.startswith("1 setriton: Triton is not installed")


def test_the_guarded_folders_refuse_their_bare_names() -> None:
    code = """
for name in ("kernels", "models", "bench"):
    try:
        __import__(name)
    except ImportError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=".")
    assert done.stdout.splitlines() == [
        f"this folder is setriton.{name}; import it by that name" for name in ("kernels", "models", "bench")
    ]


def test_torch_hub_from_a_checkout() -> None:
    code = """
import torch
print(torch.hub.load(".", "se_resnet20", source="local", num_classes=7).fc.out_features)
import hubconf
from setriton.models import list_models
public = [name for name, value in vars(hubconf).items() if callable(value) and not name.startswith("_")]
print(sorted(public) == sorted(list_models()))  # what torch.hub.list would show
"""
    done = subprocess.run([sys.executable, "-S", "-c", HUB + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["7", "True"]
