"""The list of the models that can be named."""

import json

import pytest

from fluxjax.checkpoint.shipped import shipped_lora, tiny_folder
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


def test_files_and_plans_are_described_for_programs(run):
    vae = json.loads(run("inspect", tiny_folder() / "vae", "--json").output)
    assert vae["whole"]
    assert (vae["networks"][0]["kind"], vae["networks"][0]["loads_as"]) == ("vae", "bfloat16")
    adapter = json.loads(run("lora", "inspect", shipped_lora("kraft"), "--json").output)
    network = adapter["networks"]["flux"]
    assert network["blocks"]["double"] == 2
    assert network["weights"] > len(network["ranks"]) > 0
    plan = json.loads(run("plan", "--model", "dev", "--memory", "24GB", "--json").output)
    assert (plan["width"], plan["steps"], plan["fits"]) == (1024, 28, True)
    for need in plan["stages"].values():
        assert need["total"] == need["weights"] + need["temporaries"] <= plan["memory"]
    assert plan["networks"]["flux"]["bytes"]["as_is"] > plan["networks"]["flux"]["bytes"]["int8"]
    assert plan["choice"]["batch"] == 1
