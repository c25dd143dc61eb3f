"""What compiling a model would replace, found without compiling it: `setriton.explain`."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule

from .report import CompileReport, Match, table
from .rewrite import rewrite
from .shadow import trace, unwrapped

# Passes over a bfloat16 map, forward and backward in training and forward in evaluation, of what Inductor generates
# for the block as it is written: `setriton.bench.inductor.generated_code`, in a chain of 1x1 convolutions under
# autocast, where a residual has a second reader; torch 2.14, batch 32, 256 channels, 56x56. bn_act_se has SiLU before
# SE; with ReLU it is 17.2 passes rather than 24.2.
_AS_WRITTEN = {
    "se": (3.0, 4.0, 3.0),
    "se+add": (4.0, 11.0, 4.0),
    "se+add+relu": (4.0, 10.0, 4.0),
    "se+relu": (3.0, 6.0, 3.0),
    "bn_se": (6.1, 7.1, 5.0),
    "bn_se+add": (7.1, 21.1, 6.0),
    "bn_se+add+relu": (7.1, 18.1, 6.0),
    "bn_se+relu": (6.1, 10.1, 5.0),
    "bn_act_se": (9.1, 15.1, 8.0),
    "bn_act_se+add": (10.1, 25.1, 9.0),
    "bn_act_se+add+relu": (10.1, 24.1, 9.0),
    "bn_act_se+relu": (9.1, 20.1, 8.0),
}


class Explanation(CompileReport):
    """A report whose `str` says, too, how many passes over its map each block takes as written and fused.

    Attributes:
        ended: why the model was not traced to its end; None where it was.
    """

    ended: str | None = None

    def __str__(self) -> str:
        return "\n".join([self._told(), *filter(None, [self.ended])])

    def _told(self) -> str:
        if not self.replaced:
            return super().__str__()
        rows = [("block", "where", "as written", "fused", "saved")]
        for match in self.replaced:
            written, fused = passes_as_written(match), passes_fused(match)
            rows.append(
                (match.kind, match.where, f"{written:.1f}", f"{fused:.1f}", f"{written - fused:.1f}"),
            )
        head = "Passes over the map, of Inductor's code for the block as it is written and of the fused operation:"
        return "\n".join([super().__str__(), "", head, *table(rows)])


def passes_as_written(match: Match) -> float:
    """Passes over the map, forward and backward in training, of Inductor's code for a block of this kind."""
    forward, backward, evaluation = _AS_WRITTEN[match.kind]
    return forward + backward if match.differentiated else evaluation


def passes_fused(match: Match) -> float:
    """Passes that the fused operation takes: each read or write of a map one, of a bit for each element 1/16."""
    residual, relu, act = "+add" in match.kind, "+relu" in match.kind, "act" in match.kind
    # Statistics or squeeze, a squeeze of its own behind an activation, and y.
    forward = 3 + residual + (act and match.training)
    if not match.differentiated:
        return forward
    # dy and x (dy, bits and x); again, and dx. With a residual, its two gradients are summed and written on the way.
    backward = (4 if match.kind == "se" else 5) + 2 * residual
    return forward + backward + relu * (2 if residual else 3) / 16


def explain(model: nn.Module, *inputs: Any, verify: bool = False, **options: Any) -> Explanation:
    """Find what `torch.compile(model, backend="setriton")` would replace, and compile nothing.

    The model is traced on tensors without data: nothing is computed, and its parameters, statistics and the state of
    random numbers stay as they are. Dynamo's caches hold nothing more afterwards; code after a graph break that was
    compiled before is compiled again at its next call.

    Args:
        model: in the mode, training or evaluation, that is asked about. What `torch.compile` returned, whatever its
            backend, stands for the model that was given to it.
        inputs, options: as `model` is called with them.
        verify: run each block beside its replacement on random numbers of its shapes, and give the error in
            `Match.error`; where they differ the block is reported as left alone.

    Returns:
        The blocks found; `print` shows them, and the passes over memory that each saves.

    Raises:
        TypeError: `model` is no nn.Module, or cannot be copied.
    """
    model = unwrapped(model)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module; got {type(model).__name__}")
    found = Explanation()

    def backend(graph_module: GraphModule, example_inputs: Sequence[Tensor]) -> Callable[..., Any]:
        found.extend(rewrite(graph_module, verify=verify or None))
        return graph_module.forward

    found.ended = trace(model, inputs, options, backend)
    return found
