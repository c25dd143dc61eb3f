"""The wheel and the sdist, and what stands in them."""

import importlib.metadata
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel and the sdist, built from a copy that has only what git tracks."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    tracked = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    for name in tracked:
        path = ROOT / name
        if path.is_file() and not path.is_symlink():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes(path.read_bytes())
    build = "from setuptools.build_meta import build_sdist, build_wheel"
    # -I keeps the source folder, and so its folder called kernels, out of sys.path.
    run(sys.executable, "-I", "-c", f"{build}; build_wheel({str(out)!r}); build_sdist({str(out)!r})", cwd=source)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


def test_wheel_holds_every_module_and_no_stray_package(distributions: tuple[Path, Path]) -> None:
    names = zipfile.ZipFile(distributions[0]).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"setriton"}
    assert {
        "setriton/py.typed",
        "setriton/kernels/excite.py",
        "setriton/models/resnet.py",
        "setriton/bench/ops.py",
    } <= {*names}


def test_every_package_on_disk_is_listed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    mapped = {"kernels", "models", "bench"}
    on_disk = {"setriton"}
    for folder in ("setriton", *mapped):
        prefix = "setriton" if folder == "setriton" else f"setriton.{folder}"
        for init in (ROOT / folder).rglob("__init__.py"):
            on_disk.add(".".join([prefix, *init.parent.relative_to(ROOT / folder).parts]))
    assert set(project["packages"]) == on_disk
    assert {name.split(".")[-1] for name in project["package-dir"]} == {"setriton", *mapped}


def test_type_checkers_see_every_module() -> None:
    shown = {path.name for path in (ROOT / "typings" / "setriton").iterdir()}
    own = {
        p.name for p in (ROOT / "setriton").iterdir() if p.suffix in (".py", ".typed") or (p / "__init__.py").exists()
    }
    assert shown == own | {"kernels", "models", "bench"}


def link_torch(folder: Path) -> None:
    """Links to torch and what it needs: a second copy would be 5 GB."""
    wanted, linked = ["torch"], set()
    while wanted:
        name = wanted.pop()
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # needed on other systems only
        if distribution.name in linked:
            continue
        linked.add(distribution.name)
        for top in {file.parts[0] for file in distribution.files or [] if file.parts[0] != ".."}:
            if not (folder / top).exists():
                (folder / top).symlink_to(distribution.locate_file(top))
        needs = [need for need in distribution.requires or [] if "extra ==" not in need]
        wanted += [need for line in needs if (need := re.split(r"[^A-Za-z0-9._-]", line)[0])]


def test_wheel_in_an_empty_environment(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    """Without extras, beside the other project that is called `kernels`."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    # On the path of the environment but outside it: there pip never removes files, which links would make ours.
    borrowed = tmp_path / "borrowed"
    borrowed.mkdir()
    link_torch(borrowed)
    (site / "borrowed.pth").write_text(f"{borrowed}\n")
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet")
    run(*pip, distributions[0], "kernels", cwd=tmp_path)
    code = """
import kernels, setriton, torch
print(kernels.__file__, setriton.__file__, setriton.kernels.__file__ if hasattr(setriton, "kernels") else "")
x = torch.randn(2, 16, 4, 4)
print(setriton.SqueezeExcite(16)(x).shape, setriton.create_model("se_resnet20")(torch.randn(1, 3, 32, 32)).shape)
"""
    files, shapes = run(python, "-c", code, cwd=tmp_path).splitlines()
    assert files.split()[:2] == [f"{site}/kernels/__init__.py", f"{site}/setriton/__init__.py"]
    assert shapes == "torch.Size([2, 16, 4, 4]) torch.Size([1, 10])"
    done = subprocess.run(
        [tmp_path / "venv" / "bin" / "setriton", "train", "digits"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2
    assert "pip install 'setriton[train]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_sdist_builds_the_same_wheel(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    wheel, sdist = distributions
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    code = "from setuptools.build_meta import build_wheel; print(build_wheel('.'))"
    name = run(sys.executable, "-I", "-c", code, cwd=source).splitlines()[-1]
    assert sorted(zipfile.ZipFile(source / name).namelist()) == sorted(zipfile.ZipFile(wheel).namelist())
