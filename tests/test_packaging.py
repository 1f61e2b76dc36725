"""What an import loads, what a wheel contains, and that `kernels/` stays a source root."""

import ast
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OPTIONAL = (
    "pyhealth",
    "transformers",
    "pyarrow",
    "dask",
    "distributed",
    "matplotlib",
    "polars",
    "typer",
    "starlette",
    "uvicorn",
    "timm",
    "torchvision",
)

PROBE = """
import json, sys
before = set(sys.modules)
import {package}
print(json.dumps(sorted(set(sys.modules) - before)))
"""


WITHOUT = """
class Finder:
    def find_spec(name, path, target=None):
        if name in {lacking!r}:
            raise ModuleNotFoundError("No module named " + name, name=name)
sys.meta_path.insert(0, Finder)
for statement in sys.stdin:
    try:
        exec(statement)
    except ImportError as error:
        print(f"{{type(error).__name__}}: {{error}}")
"""
BY_EXTRA = {
    "from rollout.pyhealth import AttentionRollout": "pyhealth",
    "from rollout.report import write_report": "cohort",
    "from rollout.runfile import save_model": "cohort",
    "from rollout.cohort.explain import Explained": "cohort",
    "import rollout.cli": "cohort",
    "import rollout; rollout.attribute_cohort": "cohort",
    "import rollout; rollout.CohortAttributions": "cohort",
}
"""What a user may begin with, and the extra that it needs."""


def loaded_by(package: str) -> set[str]:
    """Every module that importing `package` in a new process brings in."""
    paths = [str(ROOT), str(ROOT / "kernels")]
    script = f"import sys; sys.path[:0] = {paths!r}\n" + PROBE.format(package=package)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_import_rollout_loads_no_optional_package():
    modules = loaded_by("rollout")
    assert {"rollout.api", "rollout_kernels.ops", "torch"} <= modules
    assert not {name.partition(".")[0] for name in modules} & set(OPTIONAL)
    assert "rollout.pyhealth" not in modules
    assert not any(name.startswith("rollout_kernels._triton") for name in modules)


def test_what_an_extra_brings_is_asked_for_by_its_name():
    """Without any of them: before, these were a bare `No module named …`."""
    paths, lines = [str(ROOT), str(ROOT / "kernels")], "\n".join(BY_EXTRA)
    script = f"import sys; sys.path[:0] = {paths!r}\n{WITHOUT.format(lacking=OPTIONAL)}"
    done = subprocess.run([sys.executable, "-c", script], input=lines, capture_output=True, text=True, check=True)
    said = [line.split(" is not installed; it comes with an extra: ") for line in done.stdout.splitlines()]
    assert [how for _, how in said] == [f"pip install 'attention-rollout[{extra}]'" for extra in BY_EXTRA.values()]
    assert {lacking for lacking, _ in said} <= {f"ImportError: {name}" for name in OPTIONAL}


def test_kernels_load_without_the_engine():
    modules = loaded_by("rollout_kernels")
    assert "rollout_kernels.ops" in modules
    assert not any(name == "rollout" or name.startswith("rollout.") for name in modules)


def imports_of(path: Path) -> set[str]:
    """The top-level packages a file names in an import, at any depth of the code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found


def test_kernels_import_torch_triton_and_themselves_only():
    files = sorted((ROOT / "kernels").rglob("*.py"))
    assert len(files) >= 10
    for path in files:
        others = imports_of(path) - set(sys.stdlib_module_names)
        assert others <= {"torch", "triton", "rollout_kernels"}, path


def test_kernels_is_a_source_root_and_no_package():
    assert (ROOT / "kernels" / "rollout_kernels" / "__init__.py").is_file()
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not list(ROOT.glob("kernels/*.py"))
    probe = (
        "import importlib.util, sys; sys.path.insert(0, '.'); "
        "spec = importlib.util.find_spec('kernels'); print(spec and spec.origin)"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, cwd=ROOT)
    assert str(ROOT / "kernels" / "__init__.py") != done.stdout.strip()


def build_wheel(folder: Path, **environment: str) -> Path:
    """The wheel of a copy of this checkout, built offline by the declared backend."""
    source, out = folder / "tree", folder / "wheel"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "*.so", "build", "dist", "output", "demo-*")
    shutil.copytree(ROOT, source, ignore=ignored)
    for extra in ("bench", "examples", "tests"):  # present, so that leaving them out is a choice
        (source / extra).mkdir(exist_ok=True)
        (source / extra / "probe.py").touch()
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(out)!r})"
    done = subprocess.run(
        [sys.executable, "-c", build], cwd=source, capture_output=True, text=True, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def wheel_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def wheel(wheel_path: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(wheel_path)


ROWS_PROBE = """
import torch, rollout, rollout_kernels
from rollout_kernels import _native
maps = [torch.rand(2, 3, 9, 9, generator=torch.Generator().manual_seed(0)).softmax(-1)] * 2
rows = {name: rollout.attention_rollout(maps, query=0, backend=name) for name in ("auto", "torch", "reference")}
assert all(torch.allclose(rows[name], rows["reference"], atol=1e-7) for name in rows)
print(rollout_kernels.__file__, _native.unusable(), torch.equal(rows["auto"], rows["torch"]), sep="\\n")
"""


def compute_rows(wheel: Path, folder: Path) -> tuple[str, str, str]:
    """What an unpacked wheel computes with: its place, why its native kernel cannot serve, whether torch did."""
    zipfile.ZipFile(wheel).extractall(folder)
    script = f"import sys; sys.path.insert(0, {str(folder)!r})\n" + ROWS_PROBE
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=folder, check=True)
    place, reason, same = done.stdout.splitlines()
    assert Path(place).is_relative_to(folder)
    return place, reason, same


def compiler() -> str | None:
    command = os.environ.get("CC") or sysconfig.get_config_var("CC")
    return command and shutil.which(command.split()[0])


@pytest.mark.skipif(compiler() is None, reason="there is no C compiler")
@pytest.mark.skipif(sys.platform != "linux", reason="only on Linux is the native kernel known to compile")
def test_where_there_is_a_compiler_the_wheel_brings_the_native_kernel(wheel_path: Path, tmp_path: Path):
    place, reason, _ = compute_rows(wheel_path, tmp_path / "site")
    assert reason == "None"
    assert list(Path(place).parent.glob("_native/_rows*"))


def test_a_failed_compiler_leaves_a_package_that_works(tmp_path: Path):
    """Built all the same, and what it computes is torch's."""
    wheel = build_wheel(tmp_path, CC=shutil.which("false") or "no-such-compiler")
    place, reason, same = compute_rows(wheel, tmp_path / "site")
    assert not list(Path(place).parent.glob("_native/_rows*"))
    assert reason == "it was not compiled when this package was installed"
    assert same == "True"


def test_wheel_holds_the_two_packages_and_nothing_else(wheel: zipfile.ZipFile):
    names = set(wheel.namelist())
    top = {name.partition("/")[0] for name in names}
    (info,) = (name for name in top if name.endswith(".dist-info"))
    assert top == {"rollout", "rollout_kernels", info}
    expected = {
        str(path.relative_to(base))
        for base, package in ((ROOT, "rollout"), (ROOT / "kernels", "rollout_kernels"))
        for path in (base / package).rglob("*.py")
    }
    assert {name for name in names if name.endswith(".py")} == expected
    assert {"rollout/py.typed", "rollout_kernels/py.typed"} <= names
    tables = {str(p.relative_to(ROOT / "kernels")) for p in (ROOT / "kernels").rglob("tuned/*.json")}
    assert {name for name in names if name.endswith(".json")} == tables
    templates = {str(path.relative_to(ROOT)) for path in (ROOT / "rollout" / "report" / "templates").rglob("*.*")}
    assert templates <= names


def test_wheel_metadata(wheel: zipfile.ZipFile):
    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    metadata = wheel.read(name).decode()
    header, _, readme = metadata.partition("\n\n")
    assert "Name: attention-rollout" in header
    assert f"Version: {project()['version']}" in header
    assert "Requires-Python: >=3.12" in header
    assert "License-Expression: MIT" in header
    assert "rollout" in readme
    (entry,) = (n for n in wheel.namelist() if n.endswith("entry_points.txt"))
    assert "rollout = rollout.__main__:main" in wheel.read(entry).decode()


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_project_declares_its_dependencies_and_extras():
    core = {requirement.split(">")[0].strip() for requirement in project()["dependencies"]}
    assert core == {"torch", "numpy", "triton"}
    (triton,) = (r for r in project()["dependencies"] if r.startswith("triton"))
    assert "sys_platform == 'linux'" in triton
    extras = project()["optional-dependencies"]
    assert set(extras) == {"pyhealth", "cohort", "dask", "hf", "plots", "explore", "bench", "dev", "all"}
    assert extras["pyhealth"] == ["pyhealth>=2.1,<3"]
    named = extras["all"][0].partition("[")[2].rstrip("]").split(",")
    assert set(named) == set(extras) - {"dev", "all"}


def test_version_is_said_once():
    import rollout

    assert rollout.__version__ == project()["version"]
    assert (ROOT / ".python-version").read_text(encoding="utf-8").strip() == "3.12"


def test_public_names():
    import rollout

    for name in ("METHODS", "Method", "attention_rollout", "attention_rollout_qk"):
        assert name in rollout.__all__
        assert hasattr(rollout, name)
