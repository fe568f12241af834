"""The model that ships with the package, and its LoRA adapters."""

from pathlib import Path

_PACKAGE = Path(__file__).parent.parent
_WEIGHTS = Path("weights", "tiny")


def tiny_folder() -> Path:
    """Return the folder of the model that ships with the package.

    It lies inside the installed package, or beside the package in a checkout of the repository.
    """
    installed = _PACKAGE / _WEIGHTS
    if installed.is_dir():
        return installed
    return _PACKAGE.parent / _WEIGHTS


def shipped_lora(name: str) -> Path:
    """Return the file of an adapter that ships with the tiny model.

    **Raises:** `FileNotFoundError` that lists the adapters if there is none of this name.
    """
    folder = tiny_folder() / "loras"
    path = folder / f"{name}.safetensors"
    if not path.is_file():
        names = sorted(file.stem for file in folder.glob("*.safetensors"))
        raise FileNotFoundError(
            f"No adapter {name!r} ships with the tiny model. Choose one of {', '.join(names)}."
        )
    return path
