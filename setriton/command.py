"""What every command is made of: parsing by tyro, and one voice among many ranks."""

import os
from collections.abc import Callable, Sequence
from typing import Any


def call(name: str, command: Callable[..., None], arguments: Sequence[str]) -> int:
    import tyro

    tyro.cli(command, prog=f"setriton {name}", args=list(arguments), console_outputs=is_rank0())
    return 0


def positional() -> Any:
    import tyro

    return tyro.conf.Positional


def is_rank0() -> bool:
    return os.environ.get("RANK", "0") == "0"


def show(renderable: Any) -> None:
    from rich.console import Console

    Console().print(renderable)
