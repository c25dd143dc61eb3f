"""One rank of a batch whose statistics are taken over all ranks; compared with one process on the whole batch."""

import copy
import functools
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).with_name("support")))

from tail_oracle import TailInputs, make_tail_inputs, naive_tail, tail_outputs

from setriton import BatchNormSqueezeExcite
from setriton.batch_statistics import merge_statistics
from setriton.functional import bn_squeeze_excite_forked

MAPS = ("x", "residual", "dy", "dy_skip")


def rows_of(inputs: TailInputs, rows: slice) -> TailInputs:
    return inputs._replace(**{name: getattr(inputs, name)[rows] for name in MAPS})


def compare(function: Callable[..., object], whole: TailInputs, rows: slice, bn_act: str, training: bool) -> None:
    options = {"training": training, "bn_act": bn_act, "out_act": "relu"}
    found = tail_outputs(function, rows_of(whole, rows), **options)
    for name, want in tail_outputs(naive_tail, whole, **options).items():
        if name in ("y", "dx", "dresidual"):
            want = want[rows]
        elif not name.startswith("running"):
            dist.all_reduce(found[name])
        torch.testing.assert_close(found[name], want, rtol=1e-11, atol=1e-11)


def compare_modules(rows: slice) -> None:
    x, residual = torch.randn(2, 5, 8, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    module = BatchNormSqueezeExcite(8, rd_channels=2, out_act="relu", momentum=None, dtype=torch.float64)
    dist.broadcast_object_list(states := [module.state_dict()])
    module.load_state_dict(states[0])
    ours = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(module))
    assert type(ours.bn) is nn.SyncBatchNorm
    for _ in range(2):
        torch.testing.assert_close(ours(x[rows], residual[rows]), module(x, residual)[rows], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(ours.state_dict(), module.state_dict(), rtol=1e-11, atol=1e-11)
    if dist.get_rank() == 0:  # alone: in evaluation mode nothing is waited for
        ours.eval()(x[rows])


def _world() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def compare_constants() -> None:
    """The variance of equal means is 0, and not what rounding leaves of them."""
    mean = torch.tensor([0.37, 3000.1, -7e5])
    merged, var, _ = merge_statistics(mean, torch.zeros(3), 3 + 4 * dist.get_rank(), _world().group_name)
    assert torch.equal(merged, mean)
    assert not var.any()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    eager = functools.partial(bn_squeeze_excite_forked, process_group=dist.group.WORLD)
    compiled = torch.compile(eager, fullgraph=True)
    # Batches of 4 and 1, of 5 and 0, and of one value per channel.
    for shape, first in (((5, 6, 2, 3, 4), 4), ((5, 6, 2, 3, 4), 5), ((2, 6, 2, 1, 1), 1)):
        rows = slice(0, first) if dist.get_rank() == 0 else slice(first, None)
        whole = make_tail_inputs(*shape, torch.float64, fork=True)
        for bn_act, training in itertools.product(("identity", "silu"), (True, False)):
            compare(eager, whole, rows, bn_act, training)
            if first == 4:
                compare(compiled, whole, rows, bn_act, training)
    compare_constants()
    compare_modules(slice(0, 4) if dist.get_rank() == 0 else slice(4, None))
    print(f"rank {dist.get_rank()} done")
    dist.destroy_process_group()
