"""Images as the weights at hand want them: order of channels, interpolation, crop, mean and deviation."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torchvision.io import ImageReadMode, decode_image, write_png
from torchvision.transforms.v2 import functional as tf

from setriton import create_model
from setriton.models.preprocessing import Preprocessing
from setriton.models.saved import Header, save
from setriton.train import DataConfig, ParallelConfig, evaluate
from setriton.train.data import open_data
from setriton.train.sampler import SampleKey


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    for name in ("cat", "dog"):
        (tmp_path / "val" / name).mkdir(parents=True)
        image = torch.randint(0, 256, (3, 50, 60), dtype=torch.uint8, generator=generator)
        write_png(image, str(tmp_path / "val" / name / "0.png"))
    return tmp_path


AUTHORS = Preprocessing(24, 30, (104 / 255, 117 / 255, 123 / 255), (1 / 255,) * 3, "bgr", "bicubic")


def test_evaluation_does_as_the_file_says(folder: Path) -> None:
    model = create_model("se_resnet20", num_classes=2).eval()
    path = folder / "model.safetensors"
    save(path, model.state_dict(), Header("se_resnet20", {"num_classes": 2}, AUTHORS, "somewhere"))
    result = evaluate(path, f"imagefolder:{folder}", parallel=ParallelConfig(device="cpu"))
    losses = []
    for label, name in enumerate(("cat", "dog")):
        image = decode_image(str(folder / "val" / name / "0.png"), mode=ImageReadMode.RGB)
        image = tf.resize(image, [30], interpolation=tf.InterpolationMode.BICUBIC, antialias=True)
        image = tf.center_crop(image, [24, 24]).float()
        bgr = torch.stack([image[2] - 104, image[1] - 117, image[0] - 123])
        losses.append(F.cross_entropy(model(bgr[None]), torch.tensor([label])).item())
    assert result.images == 2
    assert result.loss == pytest.approx(sum(losses) / 2, rel=1e-5)


def test_without_images_of_its_training_a_file_needs_a_source(folder: Path) -> None:
    path = folder / "model.safetensors"
    model = create_model("se_resnet20", num_classes=2)
    save(path, model.state_dict(), Header("se_resnet20", {"num_classes": 2}, AUTHORS, "timm or torchvision"))
    with pytest.raises(ValueError, match=r"data\.source must be one of digits, imagefolder, synthetic"):
        evaluate(path, parallel=ParallelConfig(device="cpu"))


@pytest.mark.parametrize(
    ("config", "size", "resize"),
    [({}, 24, 30), ({"image_size": 48}, 48, 60), ({"image_size": 26, "resize": 50}, 26, 50)],
)
def test_sizes_that_are_asked_for_win(folder: Path, config: dict[str, int], size: int, resize: int) -> None:
    data = open_data(DataConfig(f"imagefolder:{folder}", **config), preprocessing=AUTHORS, val_only=True)
    assert (data.preprocessing.image_size, data.preprocessing.resize) == (size, resize)
    assert data.val[SampleKey(0, 0)][0].shape == (3, size, size)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 0}, "image_size must be at least 1; got 0"),
        ({"resize": 100}, "resize must be at least image_size, 224; got 100"),
        ({"channels": "bgra"}, "channels must be one of rgb, bgr; got 'bgra'"),
        ({"interpolation": "nearest"}, "interpolation must be one of bilinear, bicubic"),
        ({"std": (1.0, 1.0)}, "std must have a positive value for each of mean"),
        ({"std": (1.0, 1.0, 0.0)}, "std must have a positive value for each of mean"),
        ({"mean": (math.nan,) * 3}, "mean must have a finite value"),
    ],
)
def test_wrong_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preprocessing(**arguments)
