"""What kernels need of a GPU, found without one: each launch of a function, compiled ahead of time for a target."""

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from setriton.kernels import config

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}


_NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.uint8: "u8",
}


@dataclass(frozen=True)
class Resources:
    """One launch, compiled.

    `spilled` counts bytes a thread keeps in local memory, `shared` bytes of shared memory a program has,
    `widest_access` bits of the widest global load or store.
    """

    kernel: str
    target: str
    registers: int
    spilled: int
    shared: int
    widest_access: int


@dataclass(frozen=True)
class Program:
    """A kernel with all that is compiled into it."""

    source: ASTSource
    options: dict[str, Any]

    @property
    def key(self) -> tuple[str, str]:
        """Of equal programs, the same."""
        return self.source.hash(), repr(sorted(self.options.items()))


def resources(function: Callable[[], Any], target: str) -> list[Resources]:
    """Compile every kernel that `function` launches for `target`, without launching it.

    Args:
        function: calls launchers of `setriton.kernels` with tensors on the CPU; what they return is not computed.
        target: one of `TARGETS`.

    Raises:
        ValueError: the target is unknown.
    """
    return [compile_for(program, target) for program in programs(function, target)]


def programs(function: Callable[[], Any], target: str) -> list[Program]:
    """What `resources` would compile; equal keys are the same machine code.

    Raises:
        ValueError: the target is unknown.
    """
    if target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}; got {target!r}")
    is_amd = TARGETS[target].backend == "hip"
    with _recorded_launches() as launches, mock.patch.object(config, "is_amd", return_value=is_amd):
        function()
    return [Program(_source(kernel, arguments), options) for kernel, arguments, options in launches]


def worst(functions: Iterable[Callable[[], Any]], target: str) -> dict[str, tuple[int, Resources]]:
    """Of all programs of functions, compiled once each: how many there are of each kernel, and the most each needs.

    Raises:
        ValueError: the target is unknown.
    """
    found: dict[str, tuple[int, Resources]] = {}
    distinct = {program.key: program for function in functions for program in programs(function, target)}
    for program in distinct.values():
        row = compile_for(program, target)
        count, most = found.get(row.kernel, (0, row))
        found[row.kernel] = (
            count + 1,
            Resources(
                row.kernel,
                target,
                max(row.registers, most.registers),
                max(row.spilled, most.spilled),
                max(row.shared, most.shared),
                min(row.widest_access, most.widest_access),
            ),
        )
    return found


Launch = tuple[JITFunction, dict[str, Any], dict[str, Any]]


@contextlib.contextmanager
def _recorded_launches() -> Iterator[list[Launch]]:
    launches: list[Launch] = []

    def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        arguments = dict(zip(kernel.arg_names, args, strict=False))
        options = {name: value for name, value in kwargs.items() if name not in kernel.arg_names}
        launches.append((kernel, arguments | {n: v for n, v in kwargs.items() if n in kernel.arg_names}, options))

    with mock.patch.object(JITFunction, "run", record):
        yield launches


def _source(kernel: JITFunction, arguments: dict[str, Any]) -> ASTSource:
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        kind = "constexpr" if parameter.is_constexpr else _kind(value, not parameter.do_not_specialize)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[(index,)] = value
        elif not parameter.do_not_specialize and _is_aligned(value):
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def compile_for(program: Program, target: str) -> Resources:
    """What one program needs of a target."""
    compiled = triton.compile(program.source, target=TARGETS[target], options=program.options)
    registers, spilled = _registers(compiled.asm, target)
    return Resources(
        kernel=program.source.fn.__name__,
        target=target,
        registers=registers,
        spilled=spilled,
        shared=compiled.metadata.shared,
        widest_access=_widest_access(compiled.asm, target),
    )


def _kind(value: Any, is_specialized: bool) -> str:
    """The signature entry the launcher would make: Triton bakes None and 1 into the kernel."""
    if isinstance(value, torch.Tensor):
        return "*" + _NAMES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if value is None or (value == 1 and is_specialized):
        return "constexpr"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _is_aligned(value: Any) -> bool:
    """What the launcher tells the compiler: an address, or a number, that 16 divides."""
    if isinstance(value, torch.Tensor):
        return value.data_ptr() % 16 == 0
    return isinstance(value, int) and value % 16 == 0


def _registers(asm: dict[str, Any], target: str) -> tuple[int, int]:
    if target.startswith("gfx"):
        vgprs = re.search(r"\.vgpr_count:\s*(\d+)", asm["amdgcn"])
        spilled = re.search(r"\.vgpr_spill_count:\s*(\d+)", asm["amdgcn"])
        assert vgprs is not None
        assert spilled is not None
        return int(vgprs[1]), 4 * int(spilled[1])
    usage = _cuobjdump(asm["cubin"], "--dump-resource-usage")
    registers, stack = re.search(r"REG:(\d+)", usage), re.search(r"STACK:(\d+)", usage)
    assert registers is not None
    assert stack is not None
    return int(registers[1]), int(stack[1])


def _widest_access(asm: dict[str, Any], target: str) -> int:
    if target.startswith("gfx"):
        access = r"(?:global|buffer)_(?:load|store)_\w*?(?:dword(?:x(\d))?|b(\d+)|u?short|ubyte)\b"
        found = re.findall(access, asm["amdgcn"])
        return max((int(bits) if bits else 32 * int(words or 1) for words, bits in found), default=0)
    found = re.findall(r"\b(?:ld|st)\.global\S*?(?:\.v(\d))?\.[bu](\d+)", asm["ptx"])
    return max((int(bits) * int(lanes or 1) for lanes, bits in found), default=0)


def _cuobjdump(cubin: bytes, option: str) -> str:
    """Output of the disassembler that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], check=True, capture_output=True, text=True).stdout
