"""Folders are layers: a file imports from lower ones or from its own, without cycles."""

import ast
import graphlib
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import fluxjax

PACKAGE = Path(fluxjax.__file__).parent
LAYERS = {
    "version": 0,
    "shapes": 0,
    "numeric": 0,
    "printable": 0,
    "suggestions": 0,
    "annotations": 0,
    "cache_folder": 0,
    "arguments": 1,
    "flow": 2,
    "kernels": 2,
    "nets": 3,
    "zoo": 4,
    "checkpoint": 5,
    "devices": 6,
    "lora": 6,
    "generate": 7,
    "train": 8,
    "cli": 9,
    "__main__": 10,
}
FILES = [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imports_of(path: Path) -> list[str]:
    """Return the modules of the package that a file imports, "" for the package itself."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            module = node.module or ""
            names = [f"{module}.{alias.name}" for alias in node.names]
            files = [name for name in names if (PACKAGE / _path_of(name)).is_file()]
            found += files or [module]
    return [name.removeprefix("fluxjax").lstrip(".") for name in found if _is_ours(name)]


def _path_of(module: str) -> str:
    return module.removeprefix("fluxjax").lstrip(".").replace(".", "/") + ".py"


def _is_ours(module: str) -> bool:
    return module == "fluxjax" or module.startswith("fluxjax.")


def test_every_import_points_to_a_lower_layer_or_stays_in_its_folder():
    wrong = []
    for path in FILES:
        folder = module_of(path).partition(".")[0]
        for module in imports_of(path):
            other = module.partition(".")[0]
            if other != folder and LAYERS[other] >= LAYERS[folder]:
                wrong.append(f"{module_of(path)} imports {module}")
    assert not wrong


def test_no_file_imports_the_root_of_the_package():
    assert not [module_of(path) for path in FILES if "" in imports_of(path)]


def test_imports_have_no_cycles():
    graph = {module_of(path): imports_of(path) for path in FILES}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_every_folder_says_what_lives_there():
    for folder in PACKAGE.iterdir():
        if (folder / "__init__.py").is_file():
            assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text())), folder


def test_the_top_level_has_few_names():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    names = [name for name in fluxjax.__all__ if name not in folders]
    assert len(names) <= 60, "put further names in their folders"


def test_no_two_things_share_a_name():
    homes = defaultdict(list)
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].append(module_of(path))
    shared = {name: modules for name, modules in homes.items() if len(set(modules)) > 1}
    assert not shared


def test_a_program_that_uses_only_flow_imports_no_network():
    program = (
        "import sys, jax.numpy as jnp, fluxjax.flow\n"
        "assert not {'beartype', 'scipy', 'diffrax'} & sys.modules.keys()\n"  # slow to import
        "from fluxjax import Euler, flow_times, sample\n"
        "sample(lambda x, t: -x, jnp.ones(3), flow_times(4), step=Euler())\n"
        "print(*[name for name in sys.modules if name.startswith('fluxjax.')])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folders = {name.split(".")[1] for name in done.stdout.split()}
    assert folders == {"flow", "shapes", "annotations", "arguments", "numeric", "version"}
