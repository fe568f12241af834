"""The adapters that ship with the tiny model: each gives its style, keeps the objects, and goes with its scale."""

import numpy as np
import pytest
from evaluate_lora import adapted, prompts_without, score
from evaluate_tiny import generate
from scenes import Scene, random_scene, render
from styles import STYLES, adheres, distance, draw

from fluxjax import cli, read_lora
from fluxjax.zoo import shipped_lora


@pytest.mark.parametrize("style", STYLES)
def test_the_measure_tells_a_style_and_the_checker_reads_its_scenes(style):
    rng = np.random.default_rng(0)
    scenes = [pair[0] for pair in prompts_without(style, 40)]
    styled = [draw(scene, style, 128, 128, rng) for scene in scenes]
    assert max(distance(image, style) for image in styled) < 1
    assert min(distance(render(scene, 128, 128, rng), style) for scene in scenes) > 20
    assert np.mean([adheres(image, scene, style) for image, scene in zip(styled, scenes, strict=True)]) >= 0.97
    others = [random_scene(rng) for _ in scenes]
    wrong = [
        adheres(image, other, style) for image, scene, other in zip(styled, scenes, others, strict=True) if alters(scene, other)
    ]
    assert len(wrong) > 20
    assert not any(wrong)


def alters(scene: Scene, other: Scene) -> bool:
    """Tell whether two scenes differ in their objects' shapes."""

    def shapes(scene: Scene) -> list[str]:
        return sorted(thing.shape for thing in scene.things)

    return shapes(scene) != shapes(other)


@pytest.mark.parametrize("style", STYLES)
def test_a_shipped_adapter_changes_the_style_and_keeps_the_scene(tiny, style):
    found = score(tiny, shipped_lora(style), style, 16, scales=(0.0, 0.5, 1.0))
    assert found["moved"] >= 90
    # The page on adapters gives the figures of 100 prompts; of 16, fewer than ten would hold by chance once in thousands.
    assert found["kept"] >= 60
    assert list(found["distance"].values()) == sorted(found["distance"].values(), reverse=True)


def test_both_styles_are_had_at_once(tiny):
    both = adapted(tiny, [shipped_lora("night"), shipped_lora("frame")], [1.0, 1.0])
    image = generate(both, ["a large red circle on a green background"], steps=20, guidance=3.5)[0]
    assert distance(image, "frame") < 40
    assert distance(image[12:-12, 12:-12], "night") < 40


def test_the_command_line_knows_the_shipped_adapters(tmp_path, capsys):
    cli.main(["lora", "inspect", "tiny:night"])
    assert "peft" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["generate", "a red star", "--lora", "tiny:day", "--output-dir", str(tmp_path)])
    assert "There are: frame, night" in capsys.readouterr().err
    (network,) = read_lora(shipped_lora("frame")).changes
    assert network == "flux"
