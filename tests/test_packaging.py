"""What an installation consists of: files, tag, metadata; and that building it needs no torch."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import HeaderParser
from importlib import metadata
from pathlib import Path

import pytest

import fused_optim
from bench.base import instruction_set

ROOT = Path(__file__).resolve().parents[1]
# Fails the build at once if its back end, or anything it starts, imports torch.
NO_TORCH = "raise ImportError('the build must not import torch')"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel for one instruction set and without the CUDA library: other tests compile all."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "hidden" / "torch").mkdir(parents=True)
    (folder / "hidden" / "torch" / "__init__.py").write_text(NO_TORCH)
    settings = {"build-dir": str(folder / "build"), "cmake.define.FUSED_OPTIM_CUDA": "OFF"}
    settings["cmake.define.FUSED_OPTIM_ISAS"] = instruction_set()
    hook = f"import scikit_build_core.build as b; print(b.build_wheel({str(folder)!r}, {settings!r}))"
    done = subprocess.run(
        [sys.executable, "-c", hook],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(folder / "hidden")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return zipfile.ZipFile(folder / done.stdout.splitlines()[-1])


def _sources(folder: str, package: str) -> set[str]:
    return {f"{package}/{path.relative_to(ROOT / folder)}" for path in (ROOT / folder).rglob("*.py")}


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    """In particular no top-level ``kernels``: that name belongs to another project."""
    files = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = _sources("fused_optim", "fused_optim") | _sources("kernels", "fused_optim/kernels")
    assert files == expected | {"fused_optim/py.typed", "fused_optim/lib/libfused_optim_cpu.so"}


def test_source_distribution_holds_what_builds_a_wheel(tmp_path: Path) -> None:
    """Neither tests nor a part of what they read: the results that they compare the README with."""
    hook = f"import scikit_build_core.build as b; print(b.build_sdist({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", hook], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    with tarfile.open(tmp_path / done.stdout.splitlines()[-1]) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    needed = _sources("fused_optim", "fused_optim") | _sources("kernels", "kernels")
    needed |= {f"csrc/{path.relative_to(ROOT / 'csrc')}" for path in (ROOT / "csrc").rglob("*.*")}
    assert needed <= files
    rest = {name.partition("/")[0] for name in files - needed}
    more = {"fused_optim", "docs", "LICENSE", "PKG-INFO", "README.md", "pyproject.toml"}
    assert more <= rest <= more | {"CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md"}


@pytest.mark.parametrize("arguments", [["-m", "fused_optim", "info"], ["-c", "import fused_optim"]])
def test_source_folder_without_its_kernels_says_what_to_do(arguments: list[str], tmp_path: Path) -> None:
    """It comes first on the path in a checkout after `pip install .`; -S leaves the editable one out."""
    shutil.copytree(ROOT / "fused_optim", tmp_path / "fused_optim")
    done = subprocess.run([sys.executable, "-S", *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    said = done.stderr.splitlines()[-1]
    assert f"{tmp_path / 'fused_optim'} is the source folder" in said and "`pip install -e .`" in said
    assert arguments[0] == "-c" or done.stderr.count("\n") <= 1


@pytest.mark.slow
def test_wheel_fits_every_python_and_torch(wheel: zipfile.ZipFile) -> None:
    assert re.fullmatch(r".*-py3-none-(linux|manylinux)\w*\.whl", str(wheel.filename))


@pytest.mark.slow
def test_wheel_metadata(wheel: zipfile.ZipFile) -> None:
    dist_info = f"fused_optim-{fused_optim.__version__}.dist-info"
    entries = HeaderParser().parsestr(wheel.read(f"{dist_info}/METADATA").decode())
    required = [line for line in entries.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert entries["License-Expression"] == "Apache-2.0"
    assert f"{dist_info}/licenses/LICENSE" in wheel.namelist()
    assert sorted(required) == ["numpy", "torch>=2.8", "typing_extensions>=4.10"]
    assert "Typing :: Typed" in entries.get_all("Classifier", [])


@pytest.mark.slow
def test_installed_wheel_has_no_top_level_kernels(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    code = (
        "import importlib.util, fused_optim; from fused_optim.kernels.native import library;"
        "assert importlib.util.find_spec('kernels') is None;"
        "print(fused_optim.__file__, library.path('cpu'))"
    )
    # -S keeps the editable installation's import hook out; the other packages come by path.
    path = os.pathsep.join([str(tmp_path), str(Path(metadata.distribution("torch").locate_file("")))])
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    module, library = done.stdout.split()
    assert module == str(tmp_path / "fused_optim" / "__init__.py")
    assert library == str(tmp_path / "fused_optim" / "lib" / "libfused_optim_cpu.so")


def test_torch_is_no_build_requirement() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    requires = re.search(r"^\[build-system\]\nrequires = \[(.*?)\]", text, re.MULTILINE | re.DOTALL)
    assert requires is not None
    assert "torch" not in requires[1]


def test_dependencies_name_every_package_that_is_imported() -> None:
    """But for those of an extra."""
    text = (ROOT / "pyproject.toml").read_text()
    lists = re.search(r"^dependencies = (.*?)^test = ", text, re.MULTILINE | re.DOTALL)
    assert lists is not None
    declared = set(re.findall(r'"([\w-]+)', lists[1]))
    folders = (ROOT / "fused_optim", ROOT / "kernels")
    trees = [ast.parse(path.read_text()) for folder in folders for path in folder.rglob("*.py")]
    nodes = [node for tree in trees for node in tree.body]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    imported = {name.partition(".")[0] for name in names} - sys.stdlib_module_names
    assert imported - {"fused_optim", "triton"} <= declared


def test_version_is_the_same_everywhere() -> None:
    assert metadata.version("fused_optim") == fused_optim.__version__


def test_kernels_is_no_package_of_its_own() -> None:
    """With ``kernels/__init__.py``, ``import kernels`` in the checkout would hide Hugging Face's package."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_files_stay_short() -> None:
    sources = [
        path
        for folder in ("fused_optim", "kernels", "csrc", "tests", "bench")
        for path in (ROOT / folder).rglob("*")
    ]
    too_long = {
        str(path.relative_to(ROOT))
        for path in sources
        if path.suffix in {".py", ".cpp", ".h", ".cu", ".cuh"} and len(path.read_text().splitlines()) > 400
    }
    assert not too_long
