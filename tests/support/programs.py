"""SE blocks written in random ways, with random faults of the kinds that a rewriting compiler gets wrong.

`generate(seed, index)` gives the same program always: Python source of a function of tensors, and how it is called.
"""

import random
from dataclasses import dataclass
from string import Template

import program_mutations as mutations
import program_spellings as spellings

ARGUMENTS = ("x", "r", "w1", "b1", "w2", "b2", "w3", "gamma", "beta", "mean", "var")
EXCITATION = ("w1", "b1", "w2", "b2")
# Few, so that what PyTorch knows of an operation's result serves again; with one image, one channel, one pixel.
SHAPES = ((3, 6, 4, 3), (2, 4, 2, 2), (1, 6, 4, 3), (3, 1, 4, 3), (2, 6, 1, 1), (1, 1, 2, 2), (2, 6, 1, 4))
SHARES = (40, 20, 15, 7, 6, 4, 8)
LAYOUTS = ("contiguous", "channels_last", "transposed", "chunk", "expanded", "offset")


@dataclass(frozen=True)
class Program:
    """Source of `program(x, r, ...)` and what it is called with.

    Attributes:
        source: of the function.
        shape: (N, C, H, W) of x.
        hidden: R.
        convolutions: whether each layer's weight is (out, in, 1, 1) rather than (out, in).
        layouts: of x and r.
        frozen: arguments that need no gradient.
        differentiated: whether it is run with gradients.
        dynamic: whether it is run again at other sizes, in a graph with symbolic ones.
        tied: whether r is x.
    """

    source: str
    shape: tuple[int, int, int, int]
    hidden: int
    convolutions: tuple[bool, bool]
    layouts: tuple[str, str]
    frozen: tuple[str, ...]
    differentiated: bool
    dynamic: bool
    tied: bool

    @property
    def needs_dynamo(self) -> bool:
        """Whether torch.fx alone would not see all that happens: autocast, symbolic sizes, shared arguments."""
        return self.dynamic or self.tied or "autocast" in self.source


class _Writer:
    """Lines of a program, step by step; `step` may put a mutation before and after."""

    def __init__(self, pick: random.Random, sizes: dict[str, str]) -> None:
        self.pick, self.sizes = pick, sizes
        self.lines: list[str] = []
        self.values: list[str] = []
        self.wrong = pick.choices((0, 1, 2), (75, 21, 4))[0]

    def line(self, template: str, **names: str) -> None:
        self.lines.append(Template(template).substitute(self.sizes, **names))

    def step(self, right: tuple[str, ...], wrong: tuple[str, ...], name: str, **names: str) -> str:
        """Write one step; where faults are left to be written, it may be a near miss."""
        is_wrong = bool(wrong) and self.wrong > 0 and self.pick.random() < 0.13
        self.wrong -= is_wrong
        template = self.pick.choice(wrong if is_wrong else right)
        self.line(template, o=name, **names)
        self.values.append(name)
        return name


def generate(seed: int, index: int) -> Program:
    """The program of this number: the same whenever it is asked for."""
    pick = random.Random(f"{seed}/{index}")
    shape = pick.choices(SHAPES, SHARES)[0]
    hidden, convolutions = pick.choice((1, 3, 3)), (pick.random() < 0.5, pick.random() < 0.5)
    dynamic = pick.random() < 0.015
    named = zip("NCHW", ("x.size(0)", str(shape[1]), "x.shape[2]", "x.size(-1)"), strict=True)
    sizes = dict(named) if dynamic else dict(zip("NCHW", map(str, shape), strict=True))
    writer = _Writer(pick, sizes | {"R": str(hidden)})
    result = _block(writer, convolutions)
    _mutate(writer, result)
    extra = "s = x.new_zeros(1)"
    body = "\n    ".join([extra, *writer.lines, f"return {result}, s"])
    frozen = tuple(name for name in ARGUMENTS[:9] if pick.random() < 0.08)
    return Program(
        source=f"def program({', '.join(ARGUMENTS)}):\n    {body}\n",
        shape=shape,
        hidden=hidden,
        convolutions=convolutions,
        layouts=(_layout(pick), _layout(pick)),
        frozen=(*frozen, "mean", "var"),
        differentiated=pick.random() < 0.75,
        dynamic=dynamic,
        tied=pick.random() < 0.005,
    )


def _layout(pick: random.Random) -> str:
    return pick.choices(LAYOUTS, (50, 25, 5, 8, 4, 8))[0]


def _block(writer: _Writer, convolutions: tuple[bool, bool]) -> str:
    """Write a block of a kind that is drawn, and return the name of its result."""
    pick = writer.pick
    y = writer.step(spellings.INPUTS, (), "a")
    if pick.random() < 0.65:
        y = writer.step(spellings.NORMS, (), "y", v=y)
        if pick.random() < 0.5:
            y = writer.step(spellings.NORM_ACTS, (), "y", v=y)
    else:
        y = writer.step(("$o = $v",), (), "y", v=y)
    e = _gate(writer, y, convolutions)
    o = writer.step(spellings.PRODUCTS, spellings.PRODUCTS_WRONG, "o", v=y, e=e)
    if pick.random() < 0.5:
        o = writer.step(spellings.SUMS, spellings.SUMS_WRONG, "o", v=o)
    if pick.random() < 0.5:
        o = writer.step(spellings.OUT_ACTS, spellings.OUT_ACTS_WRONG, "o", v=o)
    return o


def _gate(writer: _Writer, y: str, convolutions: tuple[bool, bool]) -> str:
    is_4d = writer.pick.random() < 0.6
    if is_4d:
        q = writer.step(spellings.SQUEEZES_4D, spellings.SQUEEZES_4D_WRONG, "q", v=y)
    else:
        q = writer.step(spellings.SQUEEZES_2D, spellings.SQUEEZES_2D_WRONG, "q", v=y)
    for number, is_convolution in enumerate(convolutions, 1):
        if is_convolution != is_4d:
            q = writer.step(spellings.TO_4D if is_convolution else spellings.TO_2D, (), "q", v=q)
            is_4d = is_convolution
        right, wrong = (
            (spellings.LAYERS_4D, spellings.LAYERS_4D_WRONG)
            if is_convolution
            else (spellings.LAYERS_2D, spellings.LAYERS_2D_WRONG)
        )
        q = writer.step(right, wrong, f"z{number}", v=q, w=f"w{number}", b=f"b{number}")
        if number == 1 and writer.pick.random() < 0.95:
            q = writer.step(spellings.ACTS, spellings.ACTS_WRONG, "z1", v=q)
    e = writer.step(spellings.GATES, spellings.GATES_WRONG, "e", v=q)
    return e if is_4d else writer.step(spellings.TO_4D, (), "e", v=e)


def _mutate(writer: _Writer, result: str) -> None:
    """Put writes, readers, casts and scopes between the lines of a block."""
    pick, lines = writer.pick, writer.lines
    for _ in range(pick.choices((0, 1, 2, 3), (45, 38, 13, 4))[0]):
        at = pick.randrange(1, len(lines) + 1)
        before = writer.values[:at]
        value = pick.choice([*before, *before, *before, "x", "r", *ARGUMENTS[2:]])
        other = pick.choice([name for name in ("a", "y", "o") if name in before])
        kind = pick.choices(("write", "alias", "reader", "cast", "scope"), (45, 15, 28, 4, 8))[0]
        names = {"v": value, "z": value if value not in ("a", "y", "o", "x", "r") else other} | writer.sizes
        if kind == "write":
            added = Template(pick.choice(mutations.WRITES)).substitute(names)
        elif kind == "alias":
            added = Template(pick.choice(mutations.ALIASES)).substitute(names)
            later = pick.randrange(at, len(lines) + 1)
            lines.insert(later, pick.choice(mutations.LATER_WRITES))
            writer.values.insert(later, before[-1])
        elif kind == "reader":
            added = Template(pick.choice(mutations.READERS)).substitute(names)
        elif kind == "cast":
            added = Template(pick.choice(mutations.CASTS)).substitute(names)
        else:
            chosen = pick.randrange(len(lines))
            if not lines[chosen].startswith("with "):
                lines[chosen] = Template(pick.choice(mutations.SCOPES)).substitute(s=lines[chosen])
            continue
        lines.insert(at, added)
        writer.values.insert(at, before[-1])


def pasteable(program: Program) -> str:
    """Python that makes the same program again and checks it; with tests/support on the path."""
    fields = {name: value for name, value in vars(program).items() if name != "source"}
    call = ", ".join(f"{name}={value!r}" for name, value in fields.items())
    source = f'source = """\n{program.source}"""'
    return f"from program_runs import check\nfrom programs import Program\n{source}\ncheck(Program(source, {call}))\n"
