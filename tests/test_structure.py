"""A module imports from lower layers alone."""

import ast
from pathlib import Path

import fluxjax

PACKAGE = Path(fluxjax.__file__).parent
LAYERS = {
    "shapes": -1,
    "arguments": 0,
    "atomic": 0,
    "errors": 0,
    "settings": 1,
    "numeric": 0,
    "printable": 0,
    "predict": 1,
    "kernels": 1,
    "nets": 2,
    "tokens": 2,
    "image": 2,
    "latents": 2,
    "schedule": 2,
    "integrate": 2,
    "guidance": 3,
    "cache": 3,
    "convert": 3,
    "shard": 3,
    "tiles": 3,
    "quantize": 5,
    "unroll": 4,
    "sample": 4,
    "memory": 4,
    "ode": 5,
    "lora": 4,
    "hub": 5,
    "zoo": 6,
    "generate": 7,
    "named": 7,
    "weights": 7,
    "inverse": 5,
    "edit": 5,
    "train": 5,
    "compare": 8,
    "save": 8,
    "plots": 9,
    "preview": 3,
    "prompts": 3,
    "console": 1,
    "options": 4,
    "limits": 8,
    "draw": 9,
    "cli": 10,
}


def imports_of(path: Path) -> list[str]:
    """Return the package's rooms that a file imports."""
    tree = ast.parse(path.read_text())
    names = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names += [
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    ]
    return [name.split(".")[1] for name in names if name.startswith("fluxjax.")]


def test_every_import_points_to_a_lower_layer_or_stays_in_its_room():
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        wrong += [
            f"{path.name} imports {other}"
            for other in imports_of(path)
            if other != room and LAYERS[other] >= LAYERS[room]
        ]
    assert not wrong


def test_what_samplers_know_of_is_no_network():
    files = [PACKAGE / f"{name}.py" for name in ("predict", "schedule", "sample")] + [
        *(PACKAGE / "integrate").glob("*.py")
    ]
    assert len(files) > 6
    for path in files:
        assert "nets" not in imports_of(path)
