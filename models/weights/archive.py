"""Zip files, which PyTorch's checkpoints and NumPy's .npz are, read with bounds: never more than the file can hold."""

import errno
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Of weights, deflate makes half at best, zeros included about a tenth; a zip bomb is a thousandth.
_FREE_BYTES = 64 << 20
_LARGEST_RATIO = 32
# What parsers of damaged bytes trip over; an error of the disk is another thing.
DAMAGE = (
    *(ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, RuntimeError, TypeError, ValueError),
    *(struct.error, zipfile.BadZipFile, zlib.error),
)


@contextmanager
def reading(path: Path, wanted: str) -> Iterator[None]:
    """Turn whatever damaged bytes lead to into a ValueError: "`path` `wanted`: reason"."""
    try:
        yield
    except DAMAGE as error:
        raise ValueError(f"{path} {wanted}: {str(error) or type(error).__name__}") from None
    except OSError as error:
        if error.errno != errno.EINVAL:  # a position before the first byte
            raise
        raise ValueError(f"{path} {wanted}: {error}") from None


class Archive:
    """A zip file whose entries are checked: each name once, no larger than the file can hold, of the right sum."""

    def __init__(self, path: Path) -> None:
        self._file = zipfile.ZipFile(path)
        self.entries: dict[str, zipfile.ZipInfo] = {}
        for info in self._file.infolist():
            if info.filename in self.entries:
                raise ValueError(f"it has the entry {info.filename[:200]!r} twice")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"its entry {info.filename[:200]!r} is compressed by method {info.compress_type}")
            if info.compress_type == zipfile.ZIP_STORED and info.file_size != info.compress_size:
                raise ValueError(f"its entry {info.filename[:200]!r} has two sizes")
            self.entries[info.filename] = info
        size, claimed = path.stat().st_size, sum(info.file_size for info in self.entries.values())
        if claimed > _FREE_BYTES + _LARGEST_RATIO * size:
            raise ValueError(f"its entries would have {claimed:,} bytes, of a file of {size:,}")
        if not any(info.CRC for info in self.entries.values()):
            # As torch.save writes it where sums are switched off (torch.serialization.set_crc32_options).
            for info in self.entries.values():
                del info.CRC

    def read(self, name: str) -> bytearray:
        """The bytes of an entry.

        Raises:
            KeyError: there is none of this name.
        """
        info = self.entries[name]
        with self._file.open(info) as file:
            content = bytearray(file.read(info.file_size))
        if len(content) != info.file_size:
            raise ValueError(f"its entry {name[:200]!r} ends after {len(content):,} of {info.file_size:,} bytes")
        return content
