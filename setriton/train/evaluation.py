"""Loss and error on validation images."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader

from setriton.train.config import DataConfig, ParallelConfig
from setriton.train.data import ImageData, make_loader, open_data
from setriton.train.distributed import World, errors_once, process_group
from setriton.train.export import load_exported
from setriton.train.parallelize import parallelize, precision_context
from setriton.train.sampler import ValidationSampler


@dataclass(frozen=True)
class EvalResult:
    """Errors in percent; top-5 where there are more than five classes."""

    images: int
    loss: float
    error_top1: float
    error_top5: float | None


def validation_loader(data: ImageData, *, batch_size: int, workers: int, world: World) -> DataLoader[Any]:
    """This rank's share of the validation images, `batch_size` at a time, padded with label -1."""
    batches = ValidationSampler(len(data.val), batch_size, world.rank, world.size)
    return make_loader(data.val, batches, workers=workers, device=world.device)


@torch.no_grad()
def run_evaluation(
    model: nn.Module,
    loader: DataLoader[Any],
    data: ImageData,
    *,
    world: World,
    parallel: ParallelConfig,
) -> EvalResult:
    """Evaluate `model` on all ranks together; it is left in the mode it came in.

    BatchNorm statistics must be equal on all ranks: see `sync_batch_norm_stats`.
    """
    was_training = model.training
    model.eval()
    normalize = data.normalizer(world.device)
    # float64: loss sum, right answers at top-1 and top-5, images.
    totals = torch.zeros(4, dtype=torch.float64, device=world.device)
    for images, labels in loader:
        labels = labels.to(world.device, non_blocking=True)
        with precision_context(parallel, world.device):
            logits = model(normalize(images)).float()
        real = labels >= 0
        loss_sum = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels.unsqueeze(1)
        totals += torch.stack([loss_sum, best[:, 0].sum(), best.any(dim=1).sum(), real.sum()])
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    model.train(was_training)
    loss_sum, top1, top5, images_seen = world.sum(totals).tolist()
    return EvalResult(
        images=round(images_seen),
        loss=loss_sum / images_seen,
        error_top1=100 * (1 - top1 / images_seen),
        error_top5=100 * (1 - top5 / images_seen) if data.num_classes > 5 else None,
    )


def evaluate(
    path: str | Path,
    source: str | None = None,
    *,
    image_size: int | None = None,
    resize: int | None = None,
    batch_size: int = 256,
    workers: int = 0,
    parallel: ParallelConfig | None = None,
) -> EvalResult:
    """Evaluate an exported network; under torchrun, on all ranks together.

    Args:
        path: model.safetensors as a run leaves it, or what `setriton convert` wrote. It says which mean, deviation,
            order of channels, crop and interpolation its network wants.
        source: validation images, as in `DataConfig.source`; unset: those that the network was trained with.
        image_size: side of the network input, pixels; unset: as trained.
        resize: shorter side before the centre crop; unset: as trained, in proportion to image_size.
        batch_size: images per rank and forward pass.
        workers: data loading processes per rank.
        parallel: device and precision; unset: a GPU where there is one, fp32.

    Raises:
        FileNotFoundError: no such file or image folder.
        ValueError: not an exported network, or images that do not fit it.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    parallel = parallel or ParallelConfig()
    with process_group(parallel) as world:
        with errors_once():
            model, header = load_exported(path)
            source = header.origin if source is None else source
            config = DataConfig(source, image_size=image_size, resize=resize, workers=workers)
            data = open_data(config, preprocessing=header.preprocessing, val_only=True)
            for name in ("num_classes", "in_chans"):
                wanted, got = getattr(model, name), getattr(data, name)
                if wanted != got:
                    raise ValueError(f"{path} has {name} {wanted}, the images of {source} have {got}")
        model = parallelize(model.to(world.device), world.mesh, parallel)
        loader = validation_loader(data, batch_size=batch_size, workers=workers, world=world)
        return run_evaluation(model, loader, data, world=world, parallel=parallel)
