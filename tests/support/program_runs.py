"""Generated programs run as written and with their SE blocks replaced, and compared in all that a user can see."""

import linecache
import operator
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from graphs import rewriting
from programs import ARGUMENTS, EXCITATION, Program
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from setriton.compile.report import Match, compile_report, record, reset_compile_report
from setriton.compile.rewrite import rewrite

Function = Callable[..., Any]
_SET_GRAD_ENABLED = torch._C._set_grad_enabled


class Invalid(Exception):
    """A program that eager PyTorch, or what captures graphs, refuses."""


class Wrong(AssertionError):
    """A program whose results differ."""


@dataclass(frozen=True)
class Run:
    """What one comparison has seen.

    Attributes:
        matches: the blocks found, replaced or left alone.
        differentiated: whether gradients were compared.
        sees_excitation: whether each tensor of the excitation that is read has a gradient other than 0.
    """

    matches: tuple[Match, ...]
    differentiated: bool
    sees_excitation: bool


def check(program: Program, through_dynamo: bool = False) -> Run:
    """Compare a program with its rewritten graph.

    Args:
        program: is run without gradients where eager PyTorch refuses to differentiate it.
        through_dynamo: capture it by torch.compile rather than torch.fx, whatever it needs.

    Raises:
        Wrong: something differs.
        Invalid: it does not run in eager mode either, or cannot be captured.
    """
    if program.differentiated:
        try:
            return _compare(program, through_dynamo)
        except Invalid:
            program = replace(program, differentiated=False)
    return _compare(program, through_dynamo)


def compiled_source(program: Program) -> Function:
    """The program as a function."""
    name = f"<program {abs(hash(program.source))}>"
    linecache.cache[name] = (len(program.source), None, program.source.splitlines(True), name)
    namespace = {"torch": torch, "F": F, "operator": operator}
    exec(compile(program.source, name, "exec"), namespace)
    return namespace["program"]  # type: ignore[return-value]


def _compare(program: Program, through_dynamo: bool) -> Run:
    function = compiled_source(program)
    shapes = [program.shape]
    if program.dynamic:
        n, c, h, w = program.shape
        shapes.append((n + 2, c, h + 1, w + 2))
    wanted = [_outcome(function, program, shape) for shape in shapes]
    reset_compile_report()
    run = _by_dynamo(function, program) if through_dynamo or program.needs_dynamo else _by_fx(function, program)
    for shape, want in zip(shapes, wanted, strict=True):
        try:
            found = _outcome(run, program, shape)
        except Invalid as error:
            cause = error.__cause__
            if isinstance(cause, torch._dynamo.exc.TorchDynamoException) and not isinstance(
                cause, torch._dynamo.exc.BackendCompilerFailed
            ):
                raise
            raise Wrong(f"rewritten, it raises {cause!r}") from error
        _require_equal(want, found, "float" in program.source or "half" in program.source)
    gradients = [wanted[0][f"gradient of {name}"] for name in EXCITATION if name not in program.frozen]
    sees = program.differentiated and all(g is None or bool(g.abs().max() > 0) for g in gradients)
    return Run(tuple(compile_report()), program.differentiated, sees and any(g is not None for g in gradients))


def arguments(program: Program, shape: Sequence[int]) -> list[Tensor]:
    """Values for a program, the same each time."""
    generator = torch.Generator().manual_seed(len(program.source))

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64) * scale

    c, r = shape[1], program.hidden
    conv1, conv2 = (((1, 1) if is_convolution else ()) for is_convolution in program.convolutions)
    values = {
        "x": _laid_out(normal, shape, program.layouts[0]),
        "r": _laid_out(normal, shape, program.layouts[1]),
        "w1": normal(r, c, *conv1, scale=0.7),
        "b1": normal(r, scale=0.5),
        "w2": normal(c, r, *conv2, scale=0.7),
        "b2": normal(c, scale=0.5),
        "w3": normal(c, c, 1, 1),
        "gamma": normal(c).abs() + 0.5,
        "beta": normal(c),
        "mean": normal(c),
        "var": normal(c).abs() + 0.5,
    }
    if program.tied:
        values["r"] = values["x"]
    for name, value in values.items():
        value.requires_grad_(program.differentiated and name not in program.frozen)
    return [values[name] for name in ARGUMENTS]


def _laid_out(normal: Callable[..., Tensor], shape: Sequence[int], layout: str) -> Tensor:
    n, c, h, w = shape
    if layout == "channels_last":
        return normal(*shape).contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return normal(n, c, w, h).transpose(2, 3)
    if layout == "chunk":
        return normal(n, 2 * c, h, w).chunk(2, 1)[0]
    if layout == "expanded":
        return normal(1, c, h, w).expand(n, -1, -1, -1)
    if layout == "offset":
        return normal(n + 1, c, h, w)[1:]
    return normal(*shape)


def _outcome(run: Function, program: Program, shape: Sequence[int]) -> dict[str, Tensor | None]:
    """Results, arguments afterwards, and gradients, by name."""
    values = arguments(program, shape)
    torch.manual_seed(0)
    try:
        with torch.set_grad_enabled(program.differentiated), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results = run(*values)
            seen: dict[str, Tensor | None] = {f"result {i}": result for i, result in enumerate(results)}
            loss = sum(
                (t * torch.linspace(0.5, 1.5, t.numel(), dtype=t.dtype).reshape(t.shape)).sum()
                for t in results
                if t.requires_grad
            )
            if program.differentiated:
                if not isinstance(loss, Tensor):
                    raise Invalid("no result needs a gradient")
                loss.backward()
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, NotImplementedError) as error:
        raise Invalid(str(error)) from error
    for name, value in zip(ARGUMENTS, values, strict=True):
        seen[f"{name} afterwards"] = value
        seen[f"gradient of {name}"] = value.grad
    return {name: t if t is None else t.detach() for name, t in seen.items()}


def _require_equal(want: dict[str, Tensor | None], found: dict[str, Tensor | None], is_coarse: bool) -> None:
    # hardswish and hardsigmoid of float64 are ATen's in float32's constants.
    tolerance = 1e-2 if is_coarse else 1e-6
    for name, a in want.items():
        b = found[name]
        if a is None or b is None:
            if (a is None) != (b is None):
                raise Wrong(f"{name}: {_told(a)} as written, {_told(b)} rewritten")
            continue
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            raise Wrong(f"{name}: {a.dtype} {tuple(a.shape)} as written, {b.dtype} {tuple(b.shape)} rewritten")
        if name.startswith("result") and _strides(a) != _strides(b):
            raise Wrong(f"{name}: strides {_strides(a)} as written, {_strides(b)} rewritten, of {tuple(a.shape)}")
        scale = max(1.0, a.abs().nan_to_num(0, 0, 0).max().item()) if a.numel() else 1.0
        if not torch.allclose(a, b, rtol=0, atol=tolerance * scale, equal_nan=True):
            raise Wrong(f"{name}: differs by {(a - b).abs().max().item():.3g} of {scale:.3g}")


def _told(t: Tensor | None) -> str:
    return "None" if t is None else "a tensor"


def _strides(t: Tensor) -> tuple[int, ...] | None:
    """Of dimensions that are stepped over, where the tensor is dense."""
    if sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) + 1 != t.numel():
        return None
    return tuple(stride for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1)


def _by_dynamo(function: Function, program: Program) -> Function:
    torch._dynamo.reset()
    return torch.compile(function, backend=rewriting, fullgraph=True, dynamic=program.dynamic or None)


class _Proxy(fx.Proxy):
    """A proxy that records writes, as Dynamo does, where torch.fx makes another value."""

    def __getattr__(self, name: str) -> "_Attribute":
        return _Attribute(self, name)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def __iadd__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def __imul__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.imul, (self, other), {})


class _Attribute(fx.proxy.Attribute, _Proxy):
    """What a proxy has: a method to call, or a value such as `data`."""


class _Tracer(fx.Tracer):
    """Records writes by operators, and changes of the grad mode."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def set_grad_enabled(self, enabled: bool) -> None:
        self.create_node("call_function", _SET_GRAD_ENABLED, (enabled,), {})


class _WithValues(fx.Interpreter):
    """Gives each node the fake tensor that it computes, and the place of the values that Dynamo puts it in."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        n.meta["example_value"] = result
        return result


def _by_fx(function: Function, program: Program) -> Function:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tracer = _Tracer()
            with mock.patch.object(torch._C, "_set_grad_enabled", tracer.set_grad_enabled):
                graph = tracer.trace(function)
            module = fx.GraphModule(tracer.root, graph)
            mode = FakeTensorMode(allow_non_fake_inputs=True)
            fakes = [mode.from_tensor(t, static_shapes=True) for t in arguments(program, program.shape)]
            with mode, torch.set_grad_enabled(program.differentiated):
                _WithValues(module).run(*fakes)
    except Exception as error:
        raise Invalid(f"torch.fx does not trace it: {error}") from error
    with torch.set_grad_enabled(program.differentiated):
        record(rewrite(module))
    return module.forward


def shrunk(program: Program, through_dynamo: bool = False) -> Program:
    """The program without the lines that it fails without, too, in the same way."""
    kind = _failure(program, through_dynamo)
    lines = program.source.splitlines()
    for at in range(len(lines) - 2, 0, -1):
        shorter = replace(program, source="\n".join([*lines[:at], *lines[at + 1 :]]) + "\n")
        if _failure(shorter, through_dynamo or program.needs_dynamo) == kind:
            program, lines = shorter, [*lines[:at], *lines[at + 1 :]]
    return program


def _failure(program: Program, through_dynamo: bool) -> list[str] | None:
    """What differs and how, without numbers; None where all is well or nothing runs."""
    try:
        check(program, through_dynamo)
    except Wrong as error:
        return str(error).split()[:3]
    except Exception:
        return None
    return None
