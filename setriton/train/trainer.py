"""The training loop."""

import json
import math
import time
from dataclasses import asdict, dataclass, replace
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from setriton.files import write_atomically
from setriton.models import create_model
from setriton.models.saved import Header
from setriton.train.batchnorm import sync_batch_norm_stats
from setriton.train.checkpoint import Checkpointer, is_finite
from setriton.train.config import TrainConfig, differences
from setriton.train.data import make_loader, open_data
from setriton.train.distributed import World, errors_once, process_group, restart_count
from setriton.train.evaluation import EvalResult, run_evaluation, validation_loader
from setriton.train.export import export
from setriton.train.meter import LossMeter, NonFiniteLoss, Sums
from setriton.train.metrics import EpochMetrics, MetricsLogger, RunLogger
from setriton.train.optimizer import make_optimizer
from setriton.train.parallelize import parallelize, precision_context, set_gradient_sync
from setriton.train.sampler import TrainSampler, stable_seed
from setriton.train.schedule import learning_rate
from setriton.train.signals import StopRequest


class NonFiniteError(RuntimeError):
    """The loss or a weight became infinite or NaN."""


@dataclass(frozen=True)
class TrainResult:
    """What a run came to; a complete one is also written to result.json. Errors in percent."""

    completed: bool
    """False where a signal stopped the run; it can be resumed."""
    epochs: int
    steps: int
    val_loss: float | None
    val_error_top1: float | None
    val_error_top5: float | None
    parameters: int
    images_per_second: float | None
    """Training alone, over the steps of this process; None where there were none."""
    seconds: float
    """Wall time of this process's loop, evaluation and checkpoints included."""
    world_size: int
    device: str
    torch: str


def train(config: TrainConfig) -> TrainResult:
    """Train as `config` says: alone in this process, or together with the others that torchrun started.

    SIGTERM, SIGINT and SIGUSR1 make the run save at the next log step and return with `completed=False`.

    Raises:
        TypeError: `config` is no TrainConfig.
        ValueError: the configuration does not fit the images, the network, the ranks or the checkpoint.
        FileNotFoundError: image folders are missing.
        FileExistsError: `config.out` holds checkpoints and `config.resume` is off.
        NonFiniteError: training diverged; nothing of that is saved.
    """
    if not isinstance(config, TrainConfig):
        raise TypeError(f"config must be a TrainConfig, got {type(config).__name__}")
    with process_group(config.parallel) as world:
        with errors_once():
            trainer = Trainer(config, world)
        return trainer.run()


class Trainer:
    """One run on one rank.

    The position of a run is one integer, the step: order, augmentation, dropout and learning rate are functions of it.
    A checkpoint adds weights, BatchNorm statistics, momentum and the sums of the running epoch to it.
    """

    def __init__(self, config: TrainConfig, world: World) -> None:
        self.config = config
        self.world = world
        self.data = open_data(config.data, seed=config.seed)
        self.sampler = TrainSampler(
            num_images=len(self.data.train),
            batch_size=config.batch_size,
            seed=config.seed,
            first_step=0,
            last_step=config.schedule.epochs * (len(self.data.train) // config.batch_size),
            rank=world.rank,
            world_size=world.size,
            accumulate=config.parallel.accumulate,
        )
        torch.manual_seed(config.seed)
        model = create_model(
            config.model.name, num_classes=self.data.num_classes, in_chans=self.data.in_chans, **config.model.options()
        )
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.model = parallelize(model.to(world.device), world.mesh, config.parallel)
        self.optimizer = make_optimizer(self.model, config.optimizer)
        self.normalize = self.data.normalizer(world.device)
        micro_batch = config.batch_size // (world.size * config.parallel.accumulate)
        self.val_loader = validation_loader(self.data, batch_size=micro_batch, workers=config.data.workers, world=world)
        self.checkpointer = Checkpointer(
            config.out / "checkpoints",
            keep=config.checkpoint.keep,
            run={
                "model": asdict(config.model),
                "source": config.data.source,
                "batch_size": config.batch_size,
                "seed": config.seed,
            },
            world=world,
        )
        self.meter = LossMeter(world)
        self.epoch_sums = Sums()
        self.step = self._restore()
        self.logger = MetricsLogger()
        self.stop = StopRequest()

    def run(self) -> TrainResult:
        """Train to the end, or to a request to stop."""
        config, world = self.config, self.world
        if world.is_rank0:
            config.out.mkdir(parents=True, exist_ok=True)
            self._write_config()
            # There means complete, for whoever has to decide whether to start the run again.
            (config.out / "result.json").unlink(missing_ok=True)
            self.logger = RunLogger(
                config.out, step=self.step, steps_per_epoch=self.sampler.steps_per_epoch, epochs=config.schedule.epochs
            )
        first_step, started = self.step, time.monotonic()
        try:
            with self.stop.listening():
                evaluation, training_seconds = self._train_epochs()
        finally:
            self.logger.close()
        completed = self.step == self.sampler.last_step
        if completed and evaluation is None:
            evaluation = self._evaluate()
        images = (self.step - first_step) * config.batch_size
        result = TrainResult(
            completed=completed,
            epochs=self.step // self.sampler.steps_per_epoch,
            steps=self.step,
            val_loss=evaluation.loss if evaluation else None,
            val_error_top1=evaluation.error_top1 if evaluation else None,
            val_error_top5=evaluation.error_top5 if evaluation else None,
            parameters=self.parameters,
            images_per_second=images / training_seconds if images else None,
            seconds=time.monotonic() - started,
            world_size=world.size,
            device=torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
            torch=torch.__version__,
        )
        if completed:
            export(self.model, config.out / "model.safetensors", self._header())
            if world.is_rank0:
                write_atomically(config.out / "result.json", _to_json(asdict(result)))
            world.say(f"finished after {result.epochs} epochs; weights, metrics and result.json are in {config.out}")
        else:
            newest = self.checkpointer.newest or "the beginning: nothing could be saved"
            world.say(f"stopped after step {self.step}; the same command with --resume goes on from {newest}")
        return result

    def train_step(self, micro_batches: list[tuple[Tensor, Tensor]]) -> None:
        """One optimizer step on this rank's micro-batches; does not wait for the device."""
        config, world = self.config, self.world
        lr = learning_rate(
            self.step,
            peak=config.optimizer.lr,
            schedule=config.schedule,
            steps_per_epoch=self.sampler.steps_per_epoch,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        for micro_step, (images, labels) in enumerate(micro_batches):
            set_gradient_sync(self.model, micro_step == len(micro_batches) - 1)
            # By step and chunk: dropout needs no saved state, and accumulation draws what more ranks would.
            torch.manual_seed(stable_seed(config.seed, self.step, micro_step * world.size + world.rank))
            labels = labels.to(world.device, non_blocking=True)
            with precision_context(config.parallel, world.device):
                logits = self.model(self.normalize(images)).float()
            loss = F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
            (loss / len(micro_batches)).backward()
            self.meter.update(loss, logits, labels, step=self.step + 1)
        self.optimizer.step()
        self.step += 1

    def _train_epochs(self) -> tuple[EvalResult | None, float]:
        """Steps up to the last one or a request to stop; the last evaluation, and the seconds spent in steps."""
        config, world = self.config, self.world
        batches = replace(self.sampler, first_step=self.step)
        loader = iter(make_loader(self.data.train, batches, workers=config.data.workers, device=world.device))
        evaluation, training_seconds, stop = None, 0.0, False
        steps_per_epoch = self.sampler.steps_per_epoch
        started = time.monotonic()
        while self.step < self.sampler.last_step and not stop:
            self.train_step([next(loader) for _ in range(config.parallel.accumulate)])
            epoch_ends = self.step % steps_per_epoch == 0
            save = self.step == self.sampler.last_step or config.checkpoint.is_due(self.step, steps_per_epoch)
            if not (save or epoch_ends or self.step % config.log_every == 0):
                continue
            stop, seconds = self._log_step(started)
            training_seconds += seconds
            if epoch_ends:
                evaluation = self._evaluate()
                self._log_epoch(evaluation)
            if save or stop:
                self._save()
            started = time.monotonic()
        return evaluation, training_seconds

    def _log_step(self, started: float) -> tuple[bool, float]:
        """Whether a rank was asked to stop, and the seconds since `started`."""
        try:
            # The clock is read again after the reduction, which waits for the device.
            interval, stop = self.meter.reduce(stop=self.stop.received)
        except NonFiniteLoss as error:
            self._abort(f"the loss of step {error.step} is not finite")
        interval.seconds = time.monotonic() - started
        self.epoch_sums.add(interval)
        self.logger.log_step(
            self.step,
            loss=interval.loss,
            error=interval.error,
            lr=self.optimizer.param_groups[0]["lr"],
            images_per_second=interval.images_per_second,
        )
        return stop, interval.seconds

    def _evaluate(self) -> EvalResult:
        sync_batch_norm_stats(self.model)
        evaluation = run_evaluation(
            self.model, self.val_loader, self.data, world=self.world, parallel=self.config.parallel
        )
        if not math.isfinite(evaluation.loss):
            self._abort(f"the validation loss after step {self.step} is not finite")
        return evaluation

    def _log_epoch(self, evaluation: EvalResult) -> None:
        sums = self.epoch_sums
        self.logger.log_epoch(
            EpochMetrics(
                epoch=self.step // self.sampler.steps_per_epoch - 1,
                step=self.step,
                lr=self.optimizer.param_groups[0]["lr"],
                train_loss=sums.loss,
                train_error=sums.error,
                val_loss=evaluation.loss,
                val_error_top1=evaluation.error_top1,
                val_error_top5=evaluation.error_top5,
                images_per_second=sums.images_per_second,
                seconds=sums.seconds,
            )
        )
        self.epoch_sums = Sums()

    def _save(self) -> None:
        sync_batch_norm_stats(self.model)
        if not is_finite(self.model, self.world):
            self._abort(f"a weight is not finite after step {self.step}")
        self.checkpointer.save(self.step, self.model, self.optimizer, asdict(self.epoch_sums))

    def _restore(self) -> int:
        """The step to go on from."""
        checkpointer, world = self.checkpointer, self.world
        if not (self.config.resume or restart_count() > 0):
            if world.from_rank0(checkpointer.exists()):
                raise FileExistsError(f"{self.config.out} holds a run: go on with --resume, or choose another --out")
            return 0
        commit = checkpointer.load(self.model, self.optimizer)
        if commit is None:
            world.say(f"no checkpoint in {checkpointer.folder}: starting from the beginning")
            return 0
        if commit.step > self.sampler.last_step:
            raise ValueError(
                f"{checkpointer.newest} is past the end: schedule.epochs {self.config.schedule.epochs} "
                f"ends at step {self.sampler.last_step}"
            )
        self.epoch_sums = Sums(**commit.progress)
        world.say(f"resuming after step {commit.step} of {self.sampler.last_step}")
        return commit.step

    def _write_config(self) -> None:
        path, settings = self.config.out / "config.json", _to_json(asdict(self.config))
        if self.step and path.is_file():
            for change in differences(json.loads(path.read_bytes()), json.loads(settings)):
                self.world.say(f"not as before: {change}")
        write_atomically(path, settings)

    def _abort(self, problem: str) -> NoReturn:
        newest = self.checkpointer.newest
        with errors_once():
            raise NonFiniteError(f"{problem}; nothing of it is saved, the newest checkpoint is {newest}")
        raise AssertionError

    def _header(self) -> Header:
        sizes = {"num_classes": self.data.num_classes, "in_chans": self.data.in_chans}
        return Header(
            model=self.config.model.name,
            options=sizes | self.config.model.options(),
            preprocessing=self.data.preprocessing,
            origin=self.config.data.source,
        )


def _to_json(fields: dict[str, object]) -> bytes:
    return (json.dumps(fields, indent=2, default=str) + "\n").encode()
