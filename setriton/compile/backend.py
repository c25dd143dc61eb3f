"""The compiler: `torch.compile(model, backend="setriton")`, and the same pass inside of `backend="inductor"`."""

import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, GraphModule

from . import report
from .rewrite import TARGETS, rewrite
from .verify import verifies


def setriton(
    graph_module: GraphModule,
    example_inputs: Sequence[Tensor],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """What torch.compile calls for each graph: its SE blocks replaced, the rest as Inductor compiles it.

    Args:
        graph_module: Dynamo's graph; it is changed in place.
        example_inputs: of the graph.
        mode, options: torch.compile's, as for Inductor.

    Raises:
        RuntimeError: an option that Inductor does not know.
    """
    from torch._inductor.compile_fx import compile_fx

    patches = inductor_options(mode, options)
    found = rewrite(graph_module)
    compiled = compile_fx(graph_module, example_inputs, config_patches=patches)
    # Not before: Inductor may ask Dynamo to begin anew, with numbers that it wants to be constants.
    report.record(found)
    return cast(Callable[..., Any], compiled)


def inductor_options(mode: str | None, options: dict[str, Any] | None) -> dict[str, Any]:
    """Inductor's configuration: torch.compile's mode and options, and leave to cache graphs that call TARGETS."""
    patches = dict(torch._TorchCompileInductorWrapper(mode, options, None).config)
    named = "unsafe_marked_cacheable_functions"
    found = patches.get(named) or getattr(inductor_config, named)
    return patches | {named: found | {f"{f.__module__}.{f.__name__}": source_digest() for f in TARGETS}}


class _Pass(CustomGraphPass):
    """The same as a pass of Inductor's. It has no state: Inductor copies it with its configuration."""

    def __call__(self, graph: Graph) -> None:
        module = graph.owning_module
        assert module is not None
        report.record(rewrite(module))

    def uuid(self) -> str:
        return source_digest() + "verified" * verifies()


def enable() -> None:
    """Replace SE blocks in all that `torch.compile` compiles with `backend="inductor"` from now on.

    What Inductor finds in its caches is not matched again, and adds nothing to `compile_report`; what
    `backend="setriton"` finds there does.

    Raises:
        RuntimeError: Inductor's `pre_grad_custom_pass` is somebody else's.
    """
    found = inductor_config.pre_grad_custom_pass
    if found is not None and not isinstance(found, _Pass):
        raise RuntimeError(f"torch._inductor.config.pre_grad_custom_pass is taken: {found!r}")
    inductor_config.pre_grad_custom_pass = _Pass()


def disable() -> None:
    """Undo `enable`, for what is compiled from now on."""
    if isinstance(inductor_config.pre_grad_custom_pass, _Pass):
        inductor_config.pre_grad_custom_pass = None


@functools.cache
def source_digest() -> str:
    """Of this package and what its functions run when they are traced: other sources make other cached graphs."""
    digest = hashlib.sha256()
    folder = Path(__file__).parent
    for path in sorted([*folder.glob("*.py"), *folder.parent.glob("*.py")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
