"""The README says nothing that is not there."""

import ast
import re
from pathlib import Path

import setriton
from setriton.cli import COMMANDS
from setriton.recipes import RECIPES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)


def test_commands_recipes_and_options_exist() -> None:
    import tyro

    from setriton.train import TrainConfig

    lines = "\n".join(body for kind, body in BLOCKS if kind == "sh").replace("\\\n", " ").splitlines()
    commands = [line.split("#")[0].split() for line in lines if "setriton " in line]
    commands = [words[words.index("setriton") + 1 :] for words in commands if "setriton" in words]
    assert {words[0] for words in commands} <= set(COMMANDS)
    training = [words[1:] for words in commands if words[0] == "train"]
    assert len(training) >= 2
    for recipe, *options in training:
        if "--help" not in options:
            tyro.cli(TrainConfig, default=RECIPES[recipe][1], args=options)


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:`|^ {4})make ([\w-]+)", README, re.MULTILINE))
    assert {"demo", "test", "gpu"} <= named <= targets


def test_python_uses_public_names() -> None:
    names = set()
    for kind, body in BLOCKS:
        if kind == "python":
            attributes = (node for node in ast.walk(ast.parse(body)) if isinstance(node, ast.Attribute))
            names |= {a.attr for a in attributes if isinstance(a.value, ast.Name) and a.value.id == "setriton"}
    assert names
    assert names <= set(setriton.__all__)


def test_links_and_pictures_exist() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert [link for link in links if not link.startswith("http") and not (ROOT / link).exists()] == []
