"""The list of the models that can be named."""

import json

import pytest

from fluxjax.zoo import ZOO


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    """A hub's cache with nothing in it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def test_models_are_listed_with_their_sizes_licences_and_places(run, empty_cache):
    finished = run("models")
    assert finished.code == 0
    header, *rows = finished.output.splitlines()
    assert header.split() == "name transformer licence takes steps guidance files".split()
    assert [row.split()[0] for row in rows] == list(ZOO)
    (dev,) = (row for row in rows if row.startswith("dev "))
    assert "11.9 B" in dev
    assert "non-commercial" in dev
    assert dev.endswith("on the hub")
    assert rows[0].startswith("tiny")
    assert rows[0].endswith("in the package")


def test_models_are_listed_for_programs(run, empty_cache):
    found = {}
    for line in run("models", "--json").output.splitlines():
        row = json.loads(line)
        found[row["name"]] = row
    assert list(found) == list(ZOO)
    assert found["fill"]["takes"] == "fill"
    assert (found["chroma"]["family"], found["chroma"]["cfg"]) == ("Chroma", 4.0)
    # As the cards of the models say: 8.2 and 8.9 billion.
    assert round(found["lite"]["transformer"] / 1e9, 1) == 8.2
    assert round(found["chroma"]["transformer"] / 1e9, 1) == 8.9
