"""What is shipped: the wheel and the sdist hold what they must and nothing else, and the demo runs from the wheel."""

import ast
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NEEDED = (
    "py.typed data/templates.json evaluation/protocols/tasks/siqa.yaml evaluation/protocols/tasks/_common_yaml "
    "microworld/demo.yaml "
    "microworld/model/model.safetensors microworld/model/tokenizer.json microworld/data/piqa/test.json "
    "mfnn/experiments/configs/figure1.yaml reporting/report.css reporting/report.html.jinja"
)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, and the wheel that is built from it."""
    out = tmp_path_factory.mktemp("dist")
    words = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(built):
    with zipfile.ZipFile(built[1]) as wheel:
        names = set(wheel.namelist())
    inside = {name.removeprefix("poc_lora/") for name in names if name.startswith("poc_lora/")}
    assert set(NEEDED.split()) <= inside
    tracked = subprocess.run(["git", "ls-files", "poc_lora"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert {name.removeprefix("poc_lora/") for name in tracked} <= inside
    assert not any(".pyc" in name or "__pycache__" in name for name in names)
    assert {name.split("/")[0] for name in names if ".dist-info" not in name.split("/")[0]} == {"poc_lora"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_every_library_that_is_imported_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for extra, lines in project["optional-dependencies"].items() if extra != "dev" for line in lines]
    declared, anywhere = (
        {re.match(r"[\w-]+", line)[0].lower().replace("_", "-") for line in lines}
        for lines in (project["dependencies"], project["dependencies"] + extras)
    )
    distributions = packages_distributions()
    for path in sorted((ROOT / "poc_lora").rglob("*.py")):
        tree = ast.parse(path.read_text())
        # What is imported inside of functions may be an extra's, and so may all of a module that only they import.
        at_import = set() if path.name == "harness_model.py" else {id(node) for node in tree.body}
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in {name.partition(".")[0] for name in names} - {"poc_lora", *sys.stdlib_module_names}:
                known = {found.lower().replace("_", "-") for found in distributions.get(name, [name])}
                allowed = declared if id(node) in at_import else anywhere
                assert known & allowed, (
                    f"{path.relative_to(ROOT)} imports {name}, which pyproject.toml does not declare"
                )


@pytest.mark.slow
def test_the_sdist_holds_what_a_packager_needs(built):
    with tarfile.open(built[0]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    for name in "pyproject.toml LICENSE README.md SECURITY.md CHANGELOG.md constraints.txt configs/demo.yaml".split():
        assert name in names, name
    assert {"tests/conftest.py", "scripts/reproduce_table1.sh", "docs/configuration.md", "poc_lora/cli/app.py"} <= names
    assert not any(name.startswith((".venv", ".git/", "runs/")) for name in names)


@pytest.mark.slow
def test_the_demo_runs_from_the_wheel_outside_the_checkout(built, tmp_path):
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, built[1]]
    subprocess.run(pip, check=True)
    environment = os.environ | {"PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}
    where = [sys.executable, "-c", "import poc_lora; print(poc_lora.__file__)"]
    found = subprocess.run(where, cwd=tmp_path, env=environment, capture_output=True, text=True).stdout
    assert found.startswith(str(site))
    words = [sys.executable, "-m", "poc_lora", "demo", "adapters.count=2", "train.max_steps=3", "--out", "demo"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "PoC merge" in done.stdout
    assert (tmp_path / "demo" / "report.html").is_file()
