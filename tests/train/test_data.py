from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from setriton.train import DataConfig
from setriton.train.data import make_loader, open_data
from setriton.train.sampler import SampleKey

CPU = torch.device("cpu")


def write_images(folder: Path, count: int = 2) -> None:
    from torchvision.io import write_png

    folder.mkdir(parents=True)
    for number in range(count):
        write_png(torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8), str(folder / f"{number}.png"))


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            write_images(tmp_path / split / name)
    return tmp_path


def test_digits_are_split_once_and_for_all() -> None:
    data = open_data(DataConfig("digits"))
    assert (len(data.train), len(data.val)) == (1437, 360)
    assert (data.num_classes, data.in_chans, data.preprocessing.image_size) == (10, 1, 8)
    labels = [data.val[SampleKey(0, image)][1] for image in range(360)]
    assert torch.bincount(torch.tensor(labels)).tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]


def test_normalised_training_images_have_mean_zero_and_deviation_one() -> None:
    data = open_data(DataConfig("digits"))
    images = torch.stack([data.train.read(image)[0] for image in range(len(data.train))])
    normalised = data.normalizer(CPU)(images)
    assert images.dtype == torch.uint8
    assert normalised.dtype == torch.float32
    assert normalised.mean().item() == pytest.approx(0, abs=1e-4)
    assert normalised.std().item() == pytest.approx(1, abs=1e-4)


def test_padding_has_label_minus_one() -> None:
    data = open_data(DataConfig("digits"))
    image, label = data.val[SampleKey(0, -1)]
    assert image.shape == (1, 8, 8)
    assert label == -1


def test_image_folder_gives_uint8_of_the_size_asked_for(image_folder: Path) -> None:
    data = open_data(DataConfig(f"imagefolder:{image_folder}", image_size=24))
    assert (data.num_classes, data.in_chans, len(data.train), len(data.val)) == (2, 3, 4, 4)
    for images in (data.train, data.val):
        batch, labels = next(iter(make_loader(images, [[SampleKey(0, 0), SampleKey(0, 3)]], workers=0, device=CPU)))
        assert (batch.shape, batch.dtype) == ((2, 3, 24, 24), torch.uint8)
        assert labels.tolist() == [0, 1]


def test_grey_images_become_rgb(image_folder: Path) -> None:
    from torchvision.io import write_png

    write_png(torch.zeros(1, 30, 30, dtype=torch.uint8), str(image_folder / "val" / "cat" / "0.png"))
    data = open_data(DataConfig(f"imagefolder:{image_folder}", image_size=24))
    assert data.val[SampleKey(0, 0)][0].shape == (3, 24, 24)


def test_16_bit_images_become_8_bit(image_folder: Path) -> None:
    from PIL import Image

    Image.new("I;16", (30, 30), 0x8000).save(image_folder / "val" / "cat" / "0.png")
    data = open_data(DataConfig(f"imagefolder:{image_folder}", image_size=24))
    image, _ = data.val[SampleKey(0, 0)]
    assert (image.shape, image.dtype, image.unique().tolist()) == ((3, 24, 24), torch.uint8, [0x80])


def test_validation_needs_no_training_images(image_folder: Path) -> None:
    import shutil

    shutil.rmtree(image_folder / "train")
    config = DataConfig(f"imagefolder:{image_folder}", image_size=24)
    assert len(open_data(config, val_only=True).val) == 4
    with pytest.raises(FileNotFoundError, match=r"has no folder train/; wanted .*/train and .*/val"):
        open_data(config)


def _remove_root(root: Path) -> str:
    root.rename(root.with_name("elsewhere"))
    return "no folder"


def _remove_val(root: Path) -> str:
    (root / "val").rename(root / "validation")
    return "has no folder val/"


def _remove_classes(root: Path) -> str:
    import shutil

    for folder in (root / "train").iterdir():
        shutil.rmtree(folder)
    return "must hold one folder of images per class"


def _empty_class(root: Path) -> str:
    (root / "train" / "fish").mkdir()
    return r"one folder of images per class: .*fish"


@pytest.mark.parametrize("damage", [_remove_root, _remove_val, _remove_classes, _empty_class])
def test_what_a_folder_lacks_is_said(image_folder: Path, damage: Callable[[Path], str]) -> None:
    message = damage(image_folder)
    with pytest.raises(FileNotFoundError, match=message):
        open_data(DataConfig(f"imagefolder:{image_folder}"))


def test_class_lists_must_agree(image_folder: Path) -> None:
    write_images(image_folder / "val" / "fish")
    with pytest.raises(ValueError, match=r"same class folders; in one of them only: \['fish'\]"):
        open_data(DataConfig(f"imagefolder:{image_folder}"))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("content", [b"", b"not an image at all"])
def test_an_unreadable_image_is_named(image_folder: Path, content: bytes, workers: int) -> None:
    path = image_folder / "train" / "dog" / "1.png"
    path.write_bytes(content)
    images = open_data(DataConfig(f"imagefolder:{image_folder}", image_size=24)).train
    with pytest.raises(ValueError, match=f"cannot read image {path}"):
        list(make_loader(images, [[SampleKey(0, 3)]], workers=workers, device=CPU))


def test_synthetic_images_cost_little_and_repeat() -> None:
    data = open_data(DataConfig("synthetic:500", image_size=16))
    assert (len(data.train), len(data.val), data.num_classes) == (500, 50, 1000)
    image, label = data.train[SampleKey(0, 499)]
    assert (image.shape, image.dtype, label) == ((3, 16, 16), torch.uint8, 499)
