"""The command line as a user meets it: what it prints, and one clear message for wrong input."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from setriton import cli

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
        (["models", "vgg*"], "no network matches 'vgg*'"),
        (["curves"], "runs must name at least one training run"),
        (["curves", "nowhere"], "nowhere holds no metrics.csv"),
        (["bench", "speed"], "bench wants one of ops, models, resources, traffic; got 'speed'"),
        (["curves", "nowhere", "--out", "picture"], "nowhere holds no metrics.csv"),
        (["bench", "resources", "--targets", "sm_10"], "target must be one of sm_80"),
        (["evaluate", "nowhere.safetensors"], "no exported network nowhere.safetensors"),
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


def test_models_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", "se_resnet50"]) == 0
    assert "28,088,024" in capsys.readouterr().out
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
