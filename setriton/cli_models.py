"""The table of networks on the command line."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from .command import call, positional, show

if TYPE_CHECKING:
    from .models.published import Counts, Published


def models(arguments: Sequence[str]) -> int:
    """The networks: names, sizes and the paper's errors; whether the sizes are as published."""
    import tyro
    from rich.table import Table

    from .models import list_models
    from .models.published import PUBLISHED, Counts, Published, count, crop, differences

    wrong: list[str] = []
    # Without pairs: --no-se would read as --plain, and be the default.
    flag = tyro.conf.FlagCreatePairsOff

    def command(
        pattern: Annotated[str, positional()] = "*",
        se: Annotated[bool, flag] = False,
        plain: Annotated[bool, flag] = False,
        check: Annotated[bool, flag] = False,
    ) -> None:
        """The networks: input size, parameters, multiply-adds, SE blocks, and the paper's errors.

        Args:
            pattern: shell pattern, such as 'se_*'.
            se: only networks with SE blocks.
            plain: only networks without.
            check: count again what is published, and name each difference.
        """
        if se and plain:
            raise ValueError("plain must be left out where se is given: no network is both")
        names = list_models(pattern, se=se if se or plain else None)
        if not names:
            kind = "network with SE" if se else "network without SE" if plain else "network"
            raise ValueError(f"no {kind} matches {pattern!r}; `setriton models` lists all")
        table = Table(caption=_LEGEND, caption_justify="left")
        for title in ("network", "px", "parameters", "GMACs", "SE", "error %"):
            table.add_column(title, justify="left" if title == "network" else "right", overflow="fold")
        compared = differing = 0
        for name in names:
            known = PUBLISHED.get(name, Published())
            published = known.parameters, known.macs, known.se_blocks
            counted = count(name) if check or None in published else Counts()
            table.add_row(name, str(crop(name)), *_sizes(known, counted), _errors(known))
            if check:
                found = differences(name, counted)
                wrong.extend(found)
                compared += published.count(None) < 3
                differing += bool(found)
        show(table)
        if check:
            verdict = f"{differing} not equal here" if differing else "all equal here"
            print(f"{compared} of {len(names)} networks have published sizes: {verdict}.")

    call("models", command, arguments)
    for line in wrong:
        print(f"setriton models: error: {line}", file=sys.stderr)
    return 1 if wrong else 0


_LEGEND = (
    "px: side of the input. SE: number of SE blocks. Sizes without a star are published, those with * counted now. "
    "error %: as the paper reports it, top-1/top-5 on ImageNet, top-1 on CIFAR-10 (32 px)."
)


def _sizes(known: "Published", counted: "Counts") -> list[str]:
    """Parameters, multiply-adds and SE blocks: published ones as they are, others as counted, with a star."""
    cells = []
    for size in ("parameters", "macs", "se_blocks"):
        published, here = getattr(known, size), getattr(counted, size)
        value, star = (here, "*") if published is None else (published, "")
        # A published number that is rounded to 10 million, as 15.47 G, has no third digit.
        text = f"{value:,}" if size != "macs" else f"{value / 1e9:.{2 if not star and known.macs_unit > 10**6 else 3}f}"
        cells.append(text + star)
    return cells


def _errors(known: "Published") -> str:
    errors = [error for error in (known.top1, known.top5) if error is not None]
    # Table 3 of the paper has one digit, the others have two.
    digits = 1 if all(f"{error:.2f}".endswith("0") for error in errors) else 2
    return "/".join(f"{error:.{digits}f}" for error in errors)
