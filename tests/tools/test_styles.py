"""The tiny model's adapters: each gives its style, keeps the objects, and follows its scale."""

from dataclasses import replace

import numpy as np
import pytest
from evaluate_lora import adapted, prompts_without, score
from evaluate_tiny import generate
from scenes import Scene, Thing, render
from styles import STYLES, adheres, distance, restyled, suits

from fluxjax import read_lora
from fluxjax.checkpoint.shipped import shipped_lora
from fluxjax.cli import main as cli


@pytest.mark.parametrize("style", STYLES)
def test_the_distance_recognizes_a_style_and_the_checker_reads_its_scenes(style):
    rng = np.random.default_rng(0)
    scenes = [scene for scene, _ in prompts_without(style, 40)]
    plain, styled = (
        [render(s, 128, 128, rng) for s in drawn]
        for drawn in (scenes, [restyled(s, style) for s in scenes])
    )
    distances = [[distance(image, style) for image in images] for images in (plain, styled)]
    assert all(after < 0.5 * before for before, after in zip(*distances, strict=True))
    # A black object inside a white one on black is taken for a hole.
    assert (
        np.mean([adheres(image, scene) for image, scene in zip(styled, scenes, strict=True)])
        >= 0.97
    )
    shapes = [sorted(thing.shape for thing in scene.things) for scene in scenes]
    others = [(i, j) for i in range(40) for j in range(i) if shapes[i] != shapes[j]]
    assert not any(adheres(styled[i], scenes[j]) for i, j in others[::10])


def test_chalk_differs_from_what_is_behind_it():
    inside = Scene("green", (Thing("", "red", "star"), Thing("", "blue", "circle")), "inside")
    assert [thing.color for thing in restyled(inside, "chalk").things] == ["black", "white"]
    on_white = replace(inside, background="white")
    assert not suits(on_white, "chalk")
    assert suits(on_white, "kraft")


@pytest.mark.parametrize("style", STYLES)
def test_a_shipped_adapter_changes_the_style_and_keeps_the_scene(tiny, style):
    found = score(tiny, shipped_lora(style), style, 16, scales=(0.0, 0.5, 1.0))
    assert found["moved"] >= 87
    # docs/lora.md gives the figures of 100 prompts. With 16, fewer than ten would be kept by
    # chance only once in thousands of draws.
    assert found["kept"] >= 60
    assert list(found["distance"].values()) == sorted(found["distance"].values(), reverse=True)


def test_both_styles_can_be_combined(tiny):
    both = adapted(tiny, [shipped_lora("kraft"), shipped_lora("chalk")], [1.0, 1.0])
    (image,) = generate(both, ["a large red circle on a green background"], steps=20, guidance=3.5)
    assert distance(image, "kraft") < 20
    assert distance(image, "chalk") < 40


def test_the_command_line_knows_the_shipped_adapters(tmp_path, capsys):
    cli.main(["lora", "inspect", "tiny:kraft"])
    assert "peft" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["generate", "a red star", "--lora", "tiny:day", "--output-dir", str(tmp_path)])
    assert "Choose one of chalk, " in capsys.readouterr().err
    assert [*read_lora(shipped_lora("chalk")).changes] == ["flux"]
