"""The house rules that a machine can check: imports point downwards, and `--help` stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import poc_lora
from poc_lora.cli.app import app

PACKAGE = Path(poc_lora.__file__).parent
# From the top of the house to its foundations; a layer may import from itself and from those below it.
LAYERS = [
    ("__init__", "__main__"),
    ("cli",),
    ("microworld", "controls"),
    ("hub",),
    ("reporting",),
    ("evaluation",),
    ("training",),
    ("merging",),
    ("lora",),
    ("adapters",),
    ("models",),
    ("artifacts",),
    ("data", "optim"),
    ("mfnn",),
    ("config", "config_files", "progress", "distributed", "environment"),
    ("rng",),
    ("files", "hub_ids", "devices", "fusion", "plotting"),
    ("envvars",),
    ("errors",),
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def layer(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import"
            inside = node.module == "poc_lora"
            found |= {f"poc_lora.{alias.name}" for alias in node.names} if inside else {node.module}
    return {name for name in found if name.split(".")[0] == "poc_lora"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    own = LEVEL[parts[0]]
    if parts[0] == "__init__":
        return  # the public API names what lies below, and imports it lazily
    for name in imported(path) - {"poc_lora", "poc_lora.__version__"}:
        assert LEVEL[layer(name)] >= own, f"{path} imports {name}, which lies above it"


def test_data_and_optim_do_not_know_lora():
    for below in ("data", "optim"):
        for path in (PACKAGE / below).glob("*.py"):
            assert not any(layer(name) == "lora" for name in imported(path)), path


def test_modules_stay_small():
    long = {
        str(p.relative_to(PACKAGE)): n for p in PACKAGE.rglob("*.py") if (n := len(p.read_text().splitlines())) > 400
    }
    assert not long


@pytest.mark.parametrize(
    "arguments",
    [
        "--help",
        "train --help",
        "merge --help",
        "eval --help",
        "controls --help",
        "mfnn --help",
        "mfnn poc --help",
        "push --help",
    ],
)
def test_help_imports_no_torch(arguments):
    code = (
        "import sys\n"
        "from poc_lora.cli.app import app\n"
        f"app({arguments.split()!r}, standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_help_of_every_verb_has_an_example():
    verbs = typer.main.get_command(app).commands
    inner = verbs.pop("mfnn").commands
    for name, verb in {**verbs, **{f"mfnn {name}": verb for name, verb in inner.items()}}.items():
        assert f"Example: poc-lora {name}" in verb.help, name
        assert all(parameter.help for parameter in verb.params if parameter.name != "help"), name


def test_public_names_resolve():
    assert set(poc_lora.__all__) == {*poc_lora._HOME, "__version__"}
    for name in poc_lora.__all__:
        assert getattr(poc_lora, name) is not None
