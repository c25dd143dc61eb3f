"""The command line as a user meets it: what it prints, and one clear message for wrong input."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from setriton import cli, list_models
from setriton.models.published import PUBLISHED

PROGRAM = (sys.executable, "-m", "setriton")


def setriton(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PROGRAM, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "200", "CUDA_VISIBLE_DEVICES": "", **environment},
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "no such command; there are train, evaluate"),
        (["models", "densenet*"], "no network matches 'densenet*'"),
        (["models", "resnet*", "--se"], "no network with SE matches 'resnet*'"),
        (["models", "se_*", "--plain"], "no network without SE matches 'se_*'"),
        (["models", "--se", "--plain"], "plain must be left out where se is given"),
        (["curves"], "runs must name at least one training run"),
        (["curves", "nowhere"], "nowhere holds no metrics.csv"),
        (["bench", "speed"], "bench wants one of ops, models, resources, traffic; got 'speed'"),
        (["curves", "nowhere", "--out", "picture"], "nowhere holds no metrics.csv"),
        (["bench", "resources", "--targets", "sm_10"], "target must be one of sm_80"),
        (["evaluate", "nowhere.safetensors"], "no file nowhere.safetensors"),
        (["evaluate", "README.md"], "README.md is not a safetensors file"),
        (["train", "digits", "--model.name", "seresnet20", "--out", "OUT"], "did you mean se_resnet20"),
        (["train", "imagenet-paper", "--data.source", "imagefolder:nowhere", "--out", "OUT"], "nowhere"),
        (["train", "imagenet"], "RECIPE must be one of digits, imagenet-paper"),
        (["demo", "--ranks", "0"], "ranks must be at least 1; got 0"),
        (["demo", "--ranks", "3"], "ranks must divide the recipe's batch of 64 images; got 3"),
    ],
    ids=lambda value: " ".join(value[:3]) if isinstance(value, list) else "",
)
def test_wrong_input(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    arguments = [str(tmp_path / "out") if argument == "OUT" else argument for argument in arguments]
    assert cli.main(arguments) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert len(shown.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "digits", "--batch-size", "many"], "invalid literal for int"),
        (["train", "digits", "--batch-size", "0"], "batch_size must be at least 1"),
        (["train", "digits", "--learning-rate", "1"], "Unrecognized options: --learning-rate"),
        (["train", "digits", "--optimizer.lr", "-1"], "optimizer.lr must be positive, got -1.0"),
        (["models", "--depth", "3"], "Unrecognized options: --depth"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_options(arguments: list[str], message: str) -> None:
    done = setriton(*arguments)
    assert done.returncode == 2
    assert message in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_only_rank_0_speaks() -> None:
    done = setriton("train", "digits", "--batch-size", "0", RANK="1", WORLD_SIZE="2")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


def test_usage_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    shown = capsys.readouterr().out
    assert all(re.search(rf"^  {name} ", shown, re.MULTILINE) for name in cli.COMMANDS)


def test_help_of_every_training_option_says_something() -> None:
    shown = setriton("train", "digits", "--help", COLUMNS="80").stdout
    options = re.findall(r"^│ (--[\w.-]+)[^│]*│\s+│ +(\S+)", shown, re.MULTILINE)
    assert len(options) >= 30
    assert [name for name, text in options if text.startswith(("(default", "--"))] == []


def rows(shown: str) -> list[list[str]]:
    """The cells of a table's rows."""
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if line.startswith("│")]


def test_models_say_what_is_published_and_what_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", "*resnet[15]*0"]) == 0
    found = {row[0]: row[1:] for row in rows(capsys.readouterr().out)}
    assert found["se_resnet50"] == ["224", "28,088,024", "3.860", "16", "23.29/6.62"]
    assert found["resnet50"] == ["224", "25,557,032", "3.858", "0", "24.80/7.48"]
    assert found["se_resnet110"] == ["32", "1,742,200", "0.253*", "54*", ""]
    assert found["se_preact_resnet110"][-1] == "5.21"


def test_models_fit_into_80_columns() -> None:
    shown = setriton("models", "*152*", COLUMNS="80").stdout
    assert len(rows(shown)) == len(list_models("*152*"))
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize(("option", "se"), [("--se", True), ("--plain", False)])
def test_models_with_and_without_se(option: str, se: bool, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", "*net50*", option]) == 0
    assert [row[0] for row in rows(capsys.readouterr().out)] == list_models("*net50*", se=se)


def test_models_check(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.main(["models", "*resnet?0", "--check"]) == 0
    assert "2 of 4 networks have published sizes: all equal here." in capsys.readouterr().out
    monkeypatch.setitem(PUBLISHED, "se_resnet50", replace(PUBLISHED["se_resnet50"], parameters=1, se_blocks=15))
    assert cli.main(["models", "*resnet?0", "--check"]) == 1
    shown = capsys.readouterr()
    assert "2 of 4 networks have published sizes: 1 not equal here." in shown.out
    assert shown.err.splitlines() == [
        "setriton models: error: se_resnet50: 28,088,024 parameters, published are 1",
        "setriton models: error: se_resnet50: 16 se_blocks, published are 15",
    ]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == "0.1.0"


def test_doctor() -> None:
    done = setriton("doctor")
    assert done.returncode == 0, done.stderr
    assert "reference path" in done.stdout
    assert "right" in done.stdout
    assert "WRONG" not in done.stdout


def test_bench_resources() -> None:
    pytest.importorskip("triton")
    done = setriton("bench", "resources", "--targets", "sm_90")
    assert done.returncode == 0, done.stderr
    assert "sm_90" in done.stdout
    # Each operation once, with its kernels below it.
    assert len(re.findall(r"│ tail, training +│ forward +│ +\d+ +│ 0 ", done.stdout)) == 1
    assert len(re.findall(r"│ +│ excite_gradients +│ +\d+ +│ 0 ", done.stdout)) == 5


@pytest.mark.distributed
def test_demo(tmp_path: Path) -> None:
    """The demonstration, cut to two epochs: all its files, then the same folder shown again without training."""
    arguments = ("demo", "--out", tmp_path, "--epochs", "2", "--ranks", "2")
    done = setriton(*arguments, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert rows[0].startswith("network,epoch,")
    assert [row.split(",")[0] for row in rows[1:]] == ["se_resnet20"] * 2 + ["resnet20"] * 2
    for network in ("se_resnet20", "resnet20"):
        assert re.search(rf"│ {network} +│ +[\d.]+ %", done.stdout)
        assert (tmp_path / network / "model.safetensors").is_file()
    again = setriton(*arguments)
    assert again.stdout.count("already trained") == 2
    other = setriton("demo", "--out", tmp_path, "--epochs", "3")
    assert other.returncode == 2
    assert "holds a finished run of 2; delete it" in other.stderr
    merged = setriton("curves", tmp_path, "--out", tmp_path / "again.png")
    assert "is not the metrics.csv of one run" in merged.stderr
    suffix = setriton("curves", tmp_path / "resnet20", "--out", tmp_path / "again")
    assert "out must end in .png, .pdf, .svg" in suffix.stderr
    evaluated = setriton("evaluate", tmp_path / "resnet20" / "model.safetensors")
    error = re.search(r"top-1 error ([\d.]+) %", evaluated.stdout)
    assert error is not None
    assert f"{error[1]} %" in done.stdout
