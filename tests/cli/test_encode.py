"""`fluxjax encode`: from a configuration, continued, and its mistakes in one line."""

import json

import numpy as np
from PIL import Image

CONFIG = 'model = "tiny"\nsteps = 3\n[data]\nsources = "photos"\nsize = 32\nmax_length = 8\n'


def write_photos(folder):
    folder.mkdir()
    for number in range(3):
        levels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), np.uint8)
        Image.fromarray(levels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"star {number}")


def test_a_configurations_data_are_encoded_and_continued(run, tmp_path, programs):
    write_photos(tmp_path / "photos")
    (tmp_path / "photos" / "2.txt").unlink()
    (tmp_path / "train.toml").write_text(CONFIG)
    words = ("encode", "train.toml", "--cache", "encoded", "--shard-examples", 1, "--batch", 1)
    words += ("--compilation-cache", programs)
    done = run(*words)
    assert done.code == 0
    assert done.output == f"{tmp_path / 'encoded'}\n"
    assert done.errors == [
        "fluxjax: left out: 2.png: it has no caption",
        "fluxjax: 2 examples in 2 files, of which 0 were there",
    ]
    settings = json.loads((tmp_path / "encoded" / "cache.json").read_text())["settings"]
    assert (settings["size"], settings["max_length"], settings["dtype"]) == (32, 8, "float32")
    (tmp_path / "encoded" / "000001.safetensors").unlink()
    assert run(*words).errors[-1] == "fluxjax: 2 examples in 2 files, of which 1 were there"
    refused = run(*words, "--size", 48)
    assert refused.code == 2
    assert "was encoded with size 32, not 48" in refused.errors[0]


def test_mistakes_are_one_line(run, tmp_path):
    (tmp_path / "train.toml").write_text("[data\n")
    for words, message in (
        (("--sources", "photos"), "`fluxjax encode` needs a folder to write. Pass --cache."),
        (("train.toml", "--cache", "a"), "train.toml is not TOML"),
        (("--sources", "photos", "--cache", "a", "--part", "3/2"), "needs I/N, as 1/8 to 8/8"),
        (("--sources", "photos", "--cache", "a", "--size", "50"), "multiples of 16 pixels"),
        (("--sources", "photos", "--cache", "a"), "There is nothing at"),
    ):
        done = run("encode", *words)
        assert done.code == 2
        assert len(done.errors) == 1
        assert message in done.errors[0]
