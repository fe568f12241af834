"""Adapters as the command line names them."""

import pytest

from fluxjax.checkpoint.shipped import tiny_folder
from fluxjax.cli.adapters import adapter_file, with_shipped_adapters
from fluxjax.cli.compound_options import adapter
from fluxjax.zoo import ZOO


def places(model: str, given: list[str], takes: list[str | None]) -> list[str]:
    """Return the places of the adapters that are used."""
    adapters = with_shipped_adapters(model, [adapter(text) for text in given], takes)
    return [one.place for one in adapters]


@pytest.mark.parametrize(
    ("given", "takes", "expected"),
    [
        ([], [None], []),
        ([], ["fill"], ["tiny:fill"]),
        ([], [None, "control"], ["tiny:edges"]),
        ([], ["reference"], ["tiny:kontext"]),
        ([], ["fill", "fill"], ["tiny:fill"]),
        ([], ["image", None], ["tiny:redux"]),
        (["tiny:chalk:0.5"], ["fill"], ["tiny:chalk", "tiny:fill"]),
        (["tiny:fill:0.5"], ["fill"], ["tiny:fill"]),
        (["mine.safetensors"], ["fill"], ["mine.safetensors"]),
    ],
)
def test_the_shipped_adapter_joins_the_tiny_model_unless_another_is_given(given, takes, expected):
    assert places("tiny", given, takes) == expected


def test_other_models_get_no_shipped_adapter():
    assert places("fill", [], ["fill"]) == []
    assert places("dev", ["tiny:chalk"], ["control"]) == ["tiny:chalk"]


def test_each_adapter_of_the_zoo_ships():
    for name in ZOO["tiny"].adapters.values():
        assert adapter_file(f"tiny:{name}").parent == tiny_folder() / "loras"
