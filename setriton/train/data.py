"""Image sets: uint8 tensors out, the same ones whatever the number of ranks and workers."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from setriton.models.preprocessing import Preprocessing
from setriton.train.config import DataConfig
from setriton.train.sampler import SampleKey, stable_seed

_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_SYNTHETIC_CLASSES = 1000
_SYNTHETIC_IMAGES = 128_000
_SYNTHETIC_POOL = 64

Transform = Callable[[Tensor], Tensor]
Reader = Callable[[int], tuple[Tensor, int]]


class ImageSet(Dataset[tuple[Tensor, int]]):
    """Images by key: (C, H, W) uint8 and a label, augmentation drawn from (seed, epoch, image) alone.

    Args:
        read: gives image `index` as uint8 (C, H, W) and its label.
        size: number of images.
        transform: uint8 to uint8; may draw from torch's global random numbers.
        seed: of the augmentation.
    """

    def __init__(self, read: Reader, size: int, transform: Transform, *, seed: int) -> None:
        self.read = read
        self.size = size
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, key: SampleKey) -> tuple[Tensor, int]:
        image, label = self.read(max(key.image, 0))
        # torchvision's transforms know only the global generator; fork_rng gives the caller's stream back.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stable_seed(self.seed, key.epoch, key.image))
            image = self.transform(image)
        return image, label if key.image >= 0 else -1


@dataclass(frozen=True)
class ImageData:
    """A training and a validation set and what a network must know about them."""

    train: ImageSet
    val: ImageSet
    num_classes: int
    in_chans: int
    preprocessing: Preprocessing

    def normalizer(self, device: torch.device) -> Transform:
        """uint8 RGB (N, C, H, W) to the network's input in float32, on `device`; channels_last on a GPU."""
        mean = torch.tensor(self.preprocessing.mean, device=device).view(1, -1, 1, 1) * 255
        std = torch.tensor(self.preprocessing.std, device=device).view(1, -1, 1, 1) * 255
        memory_format = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        reverse = self.preprocessing.channels == "bgr"

        def normalize(images: Tensor) -> Tensor:
            images = images.to(device, non_blocking=True)
            images = images.flip(1) if reverse else images
            return images.float().sub_(mean).div_(std).contiguous(memory_format=memory_format)

        return normalize


def open_data(
    config: DataConfig, *, preprocessing: Preprocessing | None = None, seed: int = 0, val_only: bool = False
) -> ImageData:
    """Open the image sets that `config.source` names.

    Args:
        config: what to open.
        preprocessing: what a trained network wants of its images; `config` wins where it says more. None: the defaults,
            and of the digits their own statistics.
        seed: of the augmentation.
        val_only: do not ask for training images; `train` is then the validation set.

    Raises:
        FileNotFoundError: an image folder, or its train/, val/ or classes, are missing.
        ValueError: training and validation folders disagree about the classes.
    """
    kind, _, argument = config.source.partition(":")
    if kind == "digits":
        data = _digits(seed)
        return data if preprocessing is None else replace(data, preprocessing=preprocessing)
    wanted = _sized(preprocessing or Preprocessing(), config)
    if kind == "synthetic":
        return _synthetic(int(argument or _SYNTHETIC_IMAGES), wanted, seed)
    return _image_folder(Path(argument).expanduser(), wanted, seed, val_only)


def _sized(preprocessing: Preprocessing, config: DataConfig) -> Preprocessing:
    """With the sizes that are asked for; another `image_size` alone keeps the share of the image that is seen."""
    image_size = config.image_size or preprocessing.image_size
    resize = config.resize or round(image_size * preprocessing.resize / preprocessing.image_size)
    return replace(preprocessing, image_size=image_size, resize=resize)


def make_loader(
    images: ImageSet, batches: Iterable[list[SampleKey]], *, workers: int, device: torch.device
) -> DataLoader[Any]:
    """Batches (N, C, H, W) uint8 and (N,) int64 in the order of `batches`."""
    return DataLoader(
        images,
        batch_sampler=batches,
        num_workers=workers,
        worker_init_fn=_ignore_interrupt,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
    )


def _ignore_interrupt(worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; the training process alone decides what it means."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _identity(image: Tensor) -> Tensor:
    return image


def _digits(seed: int) -> ImageData:
    """The 1,797 handwritten digits that come with scikit-learn, 8x8 grey: 1,437 to train on, 360 to validate."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from torchvision.transforms import v2

    digits = load_digits()
    images = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(digits.target)
    train, val = train_test_split(range(len(labels)), test_size=0.2, random_state=0, stratify=digits.target)
    scaled = images[train].double() / 255
    return ImageData(
        train=ImageSet(_MemoryReader(images[train], labels[train]), len(train), v2.RandomCrop(8, padding=1), seed=seed),
        val=ImageSet(_MemoryReader(images[val], labels[val]), len(val), _identity, seed=seed),
        num_classes=10,
        in_chans=1,
        preprocessing=Preprocessing(8, 8, (scaled.mean().item(),), (scaled.std().item(),)),
    )


def _synthetic(size: int, preprocessing: Preprocessing, seed: int) -> ImageData:
    """Noise from a small pool, so that reading costs next to nothing and a run measures the training step."""
    generator = torch.Generator().manual_seed(seed)
    shape = (_SYNTHETIC_POOL, 3, preprocessing.image_size, preprocessing.image_size)
    pool = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    read = _MemoryReader(pool, torch.arange(_SYNTHETIC_CLASSES))
    train = ImageSet(read, size, _identity, seed=seed)
    val = ImageSet(read, -(-size // 10), _identity, seed=seed)
    return ImageData(train, val, _SYNTHETIC_CLASSES, 3, preprocessing)


def _image_folder(root: Path, preprocessing: Preprocessing, seed: int, val_only: bool) -> ImageData:
    from torchvision.transforms import v2

    image_size = preprocessing.image_size
    interpolation = v2.InterpolationMode(preprocessing.interpolation)
    val_classes, val_files = _scan_classes(root, "val")
    classes, files = (val_classes, val_files) if val_only else _scan_classes(root, "train")
    if classes != val_classes:
        different = sorted(set(classes) ^ set(val_classes))
        raise ValueError(f"{root}: train and val must have the same class folders; in one of them only: {different}")
    random_crop = v2.RandomResizedCrop(image_size, interpolation=interpolation, antialias=True)
    augment = v2.Compose([random_crop, v2.RandomHorizontalFlip()])
    resize = v2.Resize(preprocessing.resize, interpolation=interpolation, antialias=True)
    centre = v2.Compose([resize, v2.CenterCrop(image_size)])
    return ImageData(
        train=ImageSet(_FileReader(files), len(files), augment, seed=seed),
        val=ImageSet(_FileReader(val_files), len(val_files), centre, seed=seed),
        num_classes=len(classes),
        in_chans=3,
        preprocessing=preprocessing,
    )


def _scan_classes(root: Path, split: str) -> tuple[list[str], list[tuple[str, int]]]:
    """Class names and (file, label) pairs of root/split, both sorted."""
    from torchvision.datasets import DatasetFolder

    if not root.is_dir():
        raise FileNotFoundError(f"data.source: no folder {root}")
    folder = root / split
    if not folder.is_dir():
        raise FileNotFoundError(f"data.source: {root} has no folder {split}/; wanted {root}/train and {root}/val")
    try:
        images = DatasetFolder(str(folder), loader=_decode, extensions=_IMAGE_SUFFIXES)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"data.source: {folder} must hold one folder of images per class: {error}") from None
    return images.classes, images.samples


class _MemoryReader:
    """Images and labels in memory, each repeated without end."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels: list[int] = labels.tolist()

    def __call__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index % len(self.images)], self.labels[index % len(self.labels)]


class _FileReader:
    """Images decoded from files. Readers are classes so that data loading processes can pickle them."""

    def __init__(self, files: list[tuple[str, int]]) -> None:
        self.files = files

    def __call__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.files[index]
        return _decode(path), label


def _decode(path: str) -> Tensor:
    """The file as uint8 RGB (3, H, W)."""
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms.v2 import functional

    try:
        image: Tensor = decode_image(path, mode=ImageReadMode.RGB)
    except RuntimeError as error:
        raise ValueError(f"cannot read image {path}: {error}") from None
    # PNG may hold 16 bits a channel.
    return cast(Tensor, functional.to_dtype(image, torch.uint8, scale=True))
