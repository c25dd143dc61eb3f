"""Ready training configurations, by name: what the command line starts from."""

from pathlib import Path

from setriton.train.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
    TrainConfig,
)

RECIPES: dict[str, tuple[str, TrainConfig]] = {
    "digits": (
        "SE-ResNet-20 on scikit-learn's 8x8 digits: minutes on a CPU, nothing to download.",
        TrainConfig(
            model=ModelConfig("se_resnet20"),
            data=DataConfig("digits"),
            optimizer=OptimizerConfig(lr=0.1, nesterov=True, weight_decay=5e-4),
            schedule=ScheduleConfig("cosine", epochs=20, warmup_epochs=1),
            checkpoint=CheckpointConfig(every_epochs=5),
            batch_size=64,
            out=Path("runs/digits"),
        ),
    ),
    "imagenet-paper": (
        "The SENet paper: batch 1024, lr 0.6 divided by 10 every 30 of 100 epochs. The paper does not state its weight "
        "decay (1e-4 here); its accuracy has not been measured with this library.",
        TrainConfig(
            model=ModelConfig("se_resnet50", layout="caffe"),
            data=DataConfig("imagefolder:imagenet", image_size=224, resize=256, workers=8),
            optimizer=OptimizerConfig(lr=0.6, momentum=0.9, weight_decay=1e-4),
            schedule=ScheduleConfig("step", epochs=100, step_epochs=30, gamma=0.1),
            batch_size=1024,
            out=Path("runs/imagenet-paper"),
        ),
    ),
    "imagenet-modern": (
        "Nesterov SGD, lr 0.1 per 256 images, warm-up and cosine, label smoothing, no decay of BatchNorm and biases, "
        "bf16. Its accuracy has not been measured with this library.",
        TrainConfig(
            model=ModelConfig("se_resnet50", layout="torch", zero_init_last=True),
            data=DataConfig("imagefolder:imagenet", image_size=224, resize=256, workers=8),
            optimizer=OptimizerConfig(lr=0.4, nesterov=True, weight_decay=5e-5, decay_norm_and_bias=False),
            schedule=ScheduleConfig("cosine", epochs=100, warmup_epochs=5),
            parallel=ParallelConfig(precision="bf16", compile=True),
            batch_size=1024,
            label_smoothing=0.1,
            out=Path("runs/imagenet-modern"),
        ),
    ),
    "synthetic": (
        "One epoch of noise held in memory: measures training throughput without a data set.",
        TrainConfig(
            model=ModelConfig("se_resnet50"),
            data=DataConfig("synthetic:12800", image_size=224),
            optimizer=OptimizerConfig(lr=0.01),
            schedule=ScheduleConfig("cosine", epochs=1),
            parallel=ParallelConfig(precision="bf16", compile=True),
            checkpoint=CheckpointConfig(every_epochs=0),
            batch_size=256,
            out=Path("runs/synthetic"),
        ),
    ),
}
