"""Who may know what: read from the imports of every file."""

import ast
import re
import runpy
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
TASKS = ("classification", "segmentation", "saliency")
COMMON_MAY = {
    "common",
    "torch",
    "numpy",
    "safetensors",
    "matplotlib",
    "tensorboard",
    "scipy",
    "tqdm",
    "mlxtend",
    "sklearn",
    "submitit",
    "yaml",
}
HOSTS = {
    "classification": {"detectron2", "mask2former", "cv2"},
    "segmentation": set(),
    "saliency": {"detectron2", "mask2former", "timm"},
}
# How packages are called where their modules have other names.
DISTRIBUTIONS = {"cv2": "opencv-python", "PIL": "pillow", "yaml": "pyyaml"}
BY_HAND = {"detectron2"}  # no release on PyPI: segmentation/detectron2.txt pins what serves


def files(folder):
    return sorted((ROOT / folder).rglob("*.py"))


def imports(path):
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module.split(".")[0])
    return found


def needed(path):
    """Packages without which a module cannot be imported."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    own = {"common", *TASKS, *sys.stdlib_module_names}
    return {DISTRIBUTIONS.get(name, name) for name in found - own - BY_HAND}


@pytest.fixture
def declared(monkeypatch):
    """What setup.py says a task's users get, by the task."""
    told = {}
    monkeypatch.setattr("setuptools.setup", lambda **given: told.update(given))
    runpy.run_path(str(ROOT / "setup.py"))
    names = {
        extra: {
            re.match(r"[\w-]+", requirement)[0].lower().replace("_", "-")
            for requirement in requirements
        }
        for extra, requirements in {"": told["install_requires"], **told["extras_require"]}.items()
    }
    return {"common": names[""], **{task: names[""] | names[task] for task in TASKS}}


@pytest.mark.parametrize("folder", ["common", *TASKS])
def test_setup_declares_what_every_module_needs(folder, declared):
    for path in files(folder):
        left_over = {name.replace("_", "-") for name in needed(path)} - declared[folder]
        assert not left_over, f"{path} imports {left_over}; setup.py does not name it"


@pytest.mark.parametrize("path", files("common"), ids=lambda p: p.name)
def test_common_knows_no_host_and_no_task(path):
    others = imports(path) - COMMON_MAY - set(sys.stdlib_module_names)
    assert not others, f"{path} imports {others}"


@pytest.mark.parametrize("path", files("common"), ids=lambda p: p.name)
def test_common_reads_no_argv_and_only_torchruns_environment(path):
    text = path.read_text(encoding="utf-8")
    assert "sys.argv" not in text
    if path.name != "distributed.py":
        assert "environ" not in text


def test_only_transfer_has_the_formula():
    for path in files("common"):
        if path.name != "transfer.py":
            assert "log_softmax" not in path.read_text(encoding="utf-8"), path


@pytest.mark.parametrize("task", TASKS)
def test_tasks_do_not_know_each_other(task):
    others = set(TASKS) - {task} | HOSTS[task]
    for path in files(task):
        assert not imports(path) & others, f"{path} imports {imports(path) & others}"


def test_every_dependency_has_a_range_that_admits_what_is_installed(monkeypatch):
    told = {}
    monkeypatch.setattr("setuptools.setup", lambda **given: told.update(given))
    runpy.run_path(str(ROOT / "setup.py"))
    asked = {*told["install_requires"], *(r for rs in told["extras_require"].values() for r in rs)}
    for text in sorted(asked - {"setuptools>=68", "wheel", "types-PyYAML"}):
        requirement = Requirement(text)
        bounds = {part.operator for part in requirement.specifier}
        assert bounds == {">=", "<"}, f"{text}: expected a lower and an upper bound"
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            continue
        assert requirement.specifier.contains(installed, prereleases=True), f"{text}: {installed}"
