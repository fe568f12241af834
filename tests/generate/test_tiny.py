"""The shipped model draws what prompts say, as an analytic checker finds it in the images."""

import zlib
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import reduce
from evaluate_tiny import generate, held_out_scenes, score
from scenes import SHAPES, Scene, Thing, caption, check, find, random_scene, render

import fluxjax
from fluxjax.checkpoint.defaults import load_defaults
from fluxjax.checkpoint.shipped import tiny_folder
from fluxjax.generate import (
    Repaint,
    Restoration,
    Shrunk,
    fit_preview,
    image_to_image,
    restore_image,
)
from fluxjax.zoo import ZOO

SIZES = ((128, 128), (96, 160), (160, 96))


def test_the_zoo_and_the_folder_agree_on_the_defaults():
    assert load_defaults(tiny_folder()) == ZOO["tiny"].defaults


def test_the_folder_is_small_enough_to_ship():
    files = [path for path in tiny_folder().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 22_000_000
    # Wheels are compressed with zlib. The files that turn the model into members of the FLUX.1
    # family may add 4 MB to the wheel. The two adapters for styles do not count as such files.
    folders = {"loras", "controlnet", "image_encoder", "image_embedder"}
    members = [path for path in files if path.parent.name in folders]
    added = [path for path in members if path.stem not in ("chalk", "kraft", "styles")]
    assert {path.parent.name for path in added} == folders
    assert sum(len(zlib.compress(path.read_bytes())) for path in added) <= 4_000_000


def test_the_checker_reads_rendered_truth():
    rng = np.random.default_rng(0)
    scenes = [random_scene(rng) for _ in range(90)]
    right = [
        check(render(scene, *SIZES[i % 3], rng), scene)["all"] for i, scene in enumerate(scenes)
    ]
    assert np.mean(right) >= 0.99


@pytest.mark.parametrize(
    ("attribute", "other"),
    [
        (
            "background",
            Scene("pink", (Thing("large", "red", "star"), Thing("small", "blue", "ring")), "above"),
        ),
        (
            "shape",
            Scene(
                "beige", (Thing("large", "red", "heart"), Thing("small", "blue", "ring")), "above"
            ),
        ),
        (
            "color",
            Scene(
                "beige", (Thing("large", "red", "star"), Thing("small", "green", "ring")), "above"
            ),
        ),
        (
            "size",
            Scene(
                "beige", (Thing("small", "red", "star"), Thing("small", "blue", "ring")), "above"
            ),
        ),
        (
            "relation",
            Scene(
                "beige", (Thing("large", "red", "star"), Thing("small", "blue", "ring")), "left of"
            ),
        ),
        ("count", Scene("beige", (Thing("large", "red", "star"),))),
    ],
)
def test_the_checker_forgives_no_wrong_attribute(attribute, other):
    truth = Scene("beige", (Thing("large", "red", "star"), Thing("small", "blue", "ring")), "above")
    image = render(truth, 128, 128, np.random.default_rng(0))
    assert check(image, truth)["all"]
    verdict = check(image, other)
    assert not verdict[attribute]
    assert not verdict["all"]


def test_the_checker_accepts_no_scene_that_is_wrong_in_one_shape_or_size():
    rng = np.random.default_rng(1)
    accepted = []
    for index in range(100):
        scene = random_scene(rng)
        other = altered(scene, rng)
        if other is not None:
            accepted.append(check(render(scene, *SIZES[index % 3], rng), other)["all"])
    assert len(accepted) > 60
    assert not any(accepted)


def altered(scene: Scene, rng: np.random.Generator) -> Scene | None:
    """Return a scene with another shape, or the other size where one is told, of one object."""
    index = int(rng.integers(len(scene.things)))
    thing = scene.things[index]
    if rng.random() < 0.5:
        thing = replace(
            thing, shape=str(rng.choice([shape for shape in SHAPES if shape != thing.shape]))
        )
    elif (
        scene.relation == "inside" or not thing.size
    ):  # drawn at sizes of their own, or at none in particular
        return None
    else:
        thing = replace(thing, size={"small": "large", "large": "small"}[thing.size])
    return replace(scene, things=(*scene.things[:index], thing, *scene.things[index + 1 :]))


def test_captions_never_leave_out_what_was_drawn():
    rng = np.random.default_rng(0)
    for _ in range(300):
        scene = random_scene(rng)
        words = caption(scene, rng)
        for thing in scene.things:
            assert f"{thing.color} {thing.shape}" in words
            assert thing.size in words
        assert scene.background in words or scene.background == "white"


def test_the_vae_returns_a_scene_within_30_db(tiny):
    rng = np.random.default_rng(3)
    images = np.stack([render(random_scene(rng), 128, 128, rng) for _ in range(8)])
    back = jax.jit(lambda vae, x: jax.lax.map(lambda one: vae.decode(vae.encode(one)), x))(
        tiny.vae, images
    )
    assert -10 * np.log10(np.mean(np.square((np.clip(back, -1, 1) - images) / 2))) >= 30


def test_latents_have_mean_zero_and_deviation_one(tiny):
    rng = np.random.default_rng(4)
    images = jnp.stack([jnp.asarray(render(random_scene(rng), 128, 128, rng)) for _ in range(32)])
    latents = jax.jit(lambda vae, x: jax.lax.map(vae.encode, x))(tiny.vae, images)
    # 32 scenes, whose backgrounds alone move the mean.
    assert abs(float(latents.mean())) < 0.15
    assert abs(float(latents.std()) - 1) < 0.15


def test_images_show_what_held_out_prompts_say(tiny):
    pairs = held_out_scenes(60, seed=1)
    images = generate(
        tiny,
        [text for _, text in pairs],
        steps=tiny.defaults.steps,
        guidance=tiny.defaults.guidance,
        batch=20,
    )
    # The card's figure is 96.6 %; of 60 prompts, fewer than 85 % would then be right once in some
    # ten thousand draws.
    assert score(images, [scene for scene, _ in pairs])["all"] >= 85


def test_backgrounds_are_those_of_the_prompts(tiny):
    grounds = ["beige", "navy", "pink", "white"]
    prompts = [f"a large red star on a {ground} background" for ground in grounds]
    settings = fluxjax.DrawSettings(steps=8)
    images = np.asarray(
        fluxjax.text_to_image(tiny, prompts, key=jax.random.key(0), settings=settings)
    )
    assert [find(image)[0] for image in images] == grounds


def test_a_preview_of_the_tiny_model_shows_what_its_decoder_would(tiny):
    rng = np.random.default_rng(3)
    images = np.stack([render(random_scene(rng), 128, 128, rng) for _ in range(40)])
    latents = jax.lax.map(tiny.vae.encode, jnp.asarray(images, jnp.float32))
    preview = fit_preview(tiny.vae, latents[:32])
    shown = jax.vmap(preview)(latents[32:])
    assert shown.shape == (8, 16, 16, 3)
    decoded = jnp.clip(jax.lax.map(tiny.vae.decode, latents[32:]), -1, 1)
    cells = reduce(
        decoded, "images (rows a) (columns b) rgb -> images rows columns rgb", "mean", a=8, b=8
    )
    error, spread = jnp.mean(jnp.square(shown - cells)), jnp.mean(jnp.var(cells, axis=(1, 2)))
    # The tiny model's decoder is far from linear: 0.45 of the spread is missed in images that the
    # preview was not fitted to.
    assert error < 0.5 * spread


def test_an_enlarged_image_shrinks_nearer_to_what_was_measured(tiny):
    """Through the decoder, at one token: two steps come nearer by a third than plain drawing."""
    y, x = np.meshgrid(np.arange(8), np.arange(8), indexing="ij")
    image = np.stack([np.sin(y / 9), np.cos(x / 7), 0.3 * np.sin((x + y) / 8)], -1).astype(
        "float32"
    )
    small = image.reshape(4, 2, 4, 2, 3).mean((1, 3))
    settings = fluxjax.DrawSettings(steps=2)

    def distance(found):
        assert found.shape == (1, 8, 8, 3)
        shrunk = np.asarray(found).reshape(4, 2, 4, 2, 3).mean((1, 3))
        return np.sqrt(np.mean(np.square(shrunk - small)))

    restoration = Restoration(degradation=Shrunk(2), iterations=3)
    options = {"key": jax.random.key(3), "settings": settings}
    found = restore_image(tiny, small, "a red star", restoration=restoration, **options)
    plain = image_to_image(tiny, image, "a red star", repaint=Repaint(strength=1.0), **options)
    assert distance(found) < 2 / 3 * distance(plain)
