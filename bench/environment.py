"""Where a measurement was taken: what every result file says of itself."""

import datetime
import platform
import subprocess
from pathlib import Path

import torch

import setriton


def environment() -> dict[str, str]:
    """Device, driver, versions, commit and date; "unknown" for what cannot be found out."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "setriton": setriton.__version__,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


def results_folder(device: str) -> Path:
    """Where results of a device go: bench/results/<device>, its name in lower case with dashes."""
    return Path("bench", "results", "-".join(device.lower().split()))


def _commit() -> str:
    """Of the checkout this file stands in; an installed package stands in none, or in somebody else's."""
    root = Path(__file__).resolve().parents[1]
    return _output("git", "-C", str(root), "describe", "--always", "--dirty") if (root / ".git").exists() else "unknown"


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "not installed"
    return str(triton.__version__)


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() or "unknown"
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
