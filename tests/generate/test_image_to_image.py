"""Images drawn from images: strength, masks, outpainting, editing, restoring, on the tiny model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import monitoring

from fluxjax import DDIM, DrawSettings, text_to_image
from fluxjax.generate import (
    EDIT_METHODS,
    SOLVERS,
    DiffEditing,
    FirstBlock,
    FlowEditing,
    Guidance,
    Hidden,
    Margins,
    Repaint,
    Restoration,
    SDEditing,
    decode,
    edit_image,
    encode,
    image_to_image,
    model_times,
    outpaint,
    pad_image,
    restore_image,
)

KEY = jax.random.key(3)
SETTINGS = DrawSettings(steps=3)
SIZE = (25, 30)


@pytest.fixture(scope="module")
def image():
    """A smooth picture, whose sides are no multiples of 16."""
    y, x = np.meshgrid(*map(np.arange, SIZE), indexing="ij")
    return np.stack([np.sin(y / 9), np.cos(x / 7), 0.3 * np.sin((x + y) / 8)], -1).astype("float32")


@pytest.fixture(scope="module")
def compiled():
    """The names of what is compiled, as it is compiled."""
    names = []

    def listen(event, seconds, **about):
        if event.endswith("backend_compile_duration"):
            names.append(about.get("fun_name"))

    monitoring.register_event_duration_secs_listener(listen)
    yield names
    monitoring.unregister_event_duration_listener(listen)


def draw_again(tiny, image, prompt="a blue ring", **repaint):
    options = {"key": KEY, "settings": SETTINGS, "repaint": Repaint(**repaint)}
    return image_to_image(tiny, image, prompt, **options)


@pytest.fixture(scope="module")
def round_trip(tiny, image):
    latent = encode(tiny.vae, pad_image(image)[None], dtype=jnp.float32)
    return np.asarray(decode(tiny.vae, latent, dtype=jnp.float32))[0, :25, :30]


def test_strength_0_returns_the_image_up_to_the_vae(tiny, image, round_trip):
    found = draw_again(tiny, image, strength=0.0)
    assert found.shape == (1, *SIZE, 3)
    np.testing.assert_array_equal(found[0], round_trip)


def test_strength_1_is_plain_drawing_to_the_last_bit(tiny, image):
    settings = DrawSettings(steps=3, height=32, width=32)
    plain = text_to_image(tiny, "a blue ring", key=KEY, settings=settings)
    again = draw_again(tiny, image, strength=1.0)
    np.testing.assert_array_equal(again, plain[:, :25, :30])


def test_kept_pixels_are_the_images_and_others_are_drawn(tiny, image):
    mask = np.zeros(SIZE, np.float32)
    mask[:, 16:] = 1
    found = draw_again(tiny, image, mask=mask, strength=1.0)[0]
    np.testing.assert_array_equal(found[:, :16], image[:, :16])
    assert np.abs(found[:, 16:] - image[:, 16:]).mean() > 0.1


def test_a_map_of_strengths_draws_more_where_it_is_whiter(tiny, image, round_trip):
    """At 3 steps, a gray of 0.4 is repainted in the last step only, 0 never, 1 in all."""
    black, gray, white = (np.full(SIZE, level, np.float32) for level in (0, 0.4, 1))
    changes = []
    for mask in (black, gray, white):
        found = draw_again(tiny, image, mask=mask, strength=1.0)[0]
        changes.append(np.abs(found - round_trip).mean())
    # Black is the image itself, and so nearest to its round trip.
    assert changes[0] < changes[1] < changes[2]


def test_a_constant_white_mask_draws_what_no_mask_draws(tiny, image):
    white = np.ones(SIZE, np.float32)
    masked = draw_again(tiny, image, mask=white, strength=0.7)
    # Another program, which rounds otherwise.
    np.testing.assert_allclose(masked, draw_again(tiny, image, strength=0.7), atol=1e-4)


def test_other_images_masks_and_strengths_compile_nothing(tiny, image, compiled):
    mask = np.eye(*SIZE, dtype=np.float32)
    draw_again(tiny, image, strength=0.4)
    draw_again(tiny, image, strength=0.4, mask=mask)
    compiled.clear()
    for strength in (0.0, 0.9, 1.0):
        draw_again(tiny, -image, "a red star", strength=strength)
        draw_again(tiny, -image, "a red star", strength=strength, mask=mask[::-1])
    assert compiled == []
    draw_again(tiny, image[:9], strength=0.4)
    assert compiled  # the listener hears what does compile


def test_both_meanings_of_strength_start_where_they_say(tiny):
    """At 1024x1024 and 28 steps diffusers starts at t = 0.83 for 0.6."""
    defaults = type(tiny.defaults)()
    times = model_times(defaults, 28, 1024, 1024)
    start = Repaint(strength=0.6).start_of(times)
    assert (start.first, start.steps) == (11, 17)
    assert abs(start.time - 0.83) < 0.005
    start = Repaint(strength=0.6, rule="time").start_of(times)
    assert (start.first, start.steps) == (0, 28)
    assert start.time == pytest.approx(0.6)
    for rule in ("steps", "time"):
        assert Repaint(strength=0.0, rule=rule).start_of(times).steps == 0
        assert Repaint(strength=1.0, rule=rule).start_of(times).time == 1


def test_an_outpainted_image_keeps_the_image(tiny, image):
    margins = Margins(right=2, bottom=7)
    found = outpaint(tiny, image, "a blue ring", key=KEY, margins=margins, settings=SETTINGS)
    assert found.shape == (1, 32, 32, 3)
    np.testing.assert_array_equal(found[0, :25, :30], image)
    assert np.isfinite(found).all()


def test_flowedit_between_equal_prompts_keeps_the_image_to_the_last_bit(tiny, image, round_trip):
    method = FlowEditing(source_prompt="a blue ring", source_guidance=2.0)
    settings = DrawSettings(steps=3, distilled_guidance=2.0)
    options = {"key": KEY, "method": method, "settings": settings}
    found = edit_image(tiny, image, "a blue ring", **options)
    np.testing.assert_array_equal(found[0], round_trip)
    changed = edit_image(tiny, image, "a red star", **options)
    assert np.abs(changed[0] - round_trip).mean() > 0.01


def test_sdediting_is_image_to_image(tiny, image):
    options = {"key": KEY, "settings": SETTINGS}
    found = edit_image(tiny, image, "a blue ring", method=SDEditing(strength=0.7), **options)
    np.testing.assert_array_equal(found, draw_again(tiny, image, strength=0.7))


@pytest.mark.parametrize("name", ["fireflow", "rf-inversion", "diffedit"])
def test_inversions_edit_and_at_strength_0_keep_the_image(tiny, image, round_trip, name):
    def edited(**numbers):
        method = EDIT_METHODS[name](source_prompt="a red star", **numbers)
        options = {"key": KEY, "method": method, "settings": DrawSettings(steps=2)}
        return edit_image(tiny, image, "a blue ring", **options)[0]

    # Of only 4 tokens few are far above the mean.
    numbers = {"ratio": 0.5} if name == "diffedit" else {}
    found = edited(**numbers)
    assert np.isfinite(found).all()
    assert np.abs(found - round_trip).mean() > 1e-3
    if name == "fireflow":
        np.testing.assert_array_equal(edited(strength=0.0), round_trip)


def test_diffedit_keeps_what_prompts_do_not_change(tiny, image, round_trip):
    """Equal prompts differ nowhere, so that the path of the inversion is gone back all the way."""
    method = DiffEditing(source_prompt="a blue ring", source_guidance=3.5)
    options = {"key": KEY, "method": method, "settings": DrawSettings(steps=2)}
    found = edit_image(tiny, image, "a blue ring", **options)
    np.testing.assert_array_equal(found[0], round_trip)


def restored(tiny, image, degradation, method="decoupled", prompt="a red star", **numbers):
    restoration = Restoration(degradation=degradation, method=method, **numbers)
    options = {"key": KEY, "settings": SETTINGS, "restoration": restoration}
    return restore_image(tiny, image, prompt, **options)[0]


@pytest.mark.parametrize("method", ["decoupled", "flowchef"])
def test_what_is_seen_without_noise_is_kept(tiny, image, method):
    mask = np.zeros(SIZE, np.float32)
    mask[:, 16:] = 1
    found = restored(tiny, image, Hidden(mask), method, noise=0.0)
    np.testing.assert_array_equal(found[:, :16], image[:, :16])
    assert np.isfinite(found).all()


def test_every_method_of_restoration_has_a_name_and_its_rules():
    hidden = Hidden(np.zeros((16, 16)))
    for name in SOLVERS:
        assert Restoration(degradation=hidden, method=name).method == name
    with pytest.raises(ValueError, match=r"no method 'magic' of restoration. Choose one of"):
        Restoration(degradation=hidden, method="magic")
    with pytest.raises(ValueError, match="by dps needs a finite deviation above 0, got 0"):
        Restoration(degradation=hidden, method="dps", noise=0.0)
    with pytest.raises(ValueError, match=r"for flowdps and flowchef, got 0.5 for decoupled"):
        Restoration(degradation=hidden, size=0.5)


@pytest.mark.parametrize(
    ("method", "attention", "remat"),
    [("tmpd", "xla_chunked", True), ("pigdm", None, True), ("decoupled", None, False)],
)
def test_methods_with_gradients_compute_blocks_again_and_forward_ones_attend_in_plain_jax(
    tiny, image, monkeypatch, method, attention, remat
):
    class SeenError(Exception):
        pass

    def see(flux, vae, batch, recipe, **options):
        raise SeenError(recipe.attention, recipe.remat)

    monkeypatch.setattr("fluxjax.generate.prompted.draw_batch", see)
    restoration = Restoration(degradation=Hidden(np.zeros(SIZE)), method=method)
    with pytest.raises(SeenError) as seen:
        restore_image(tiny, image, "", key=KEY, restoration=restoration, settings=SETTINGS)
    assert seen.value.args == (attention, remat)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda tiny, x: draw_again(tiny, x, strength=1.5), r"in \[0, 1\], got 1.5. 0 keeps"),
        (lambda tiny, x: draw_again(tiny, x, rule="share"), "one of steps, time, got 'share'"),
        (lambda tiny, x: draw_again(tiny, x, mask=np.zeros((3, 4))), "30x25 pixels, got 4x3"),
        (lambda tiny, x: draw_again(tiny, x, mask=np.full(SIZE, 2.0)), r"in \[0, 1\], from kept"),
        (lambda tiny, x: draw_again(tiny, x * np.nan), "finite numbers in"),
        (
            lambda tiny, x: image_to_image(
                tiny, x, "x", key=KEY, settings=DrawSettings(height=32, width=32)
            ),
            "at the size of its image",
        ),
        (
            lambda tiny, x: edit_image(
                tiny,
                x,
                "x",
                key=KEY,
                method=FlowEditing(source_prompt="y"),
                settings=DrawSettings(step=DDIM(1.0)),
            ),
            "by flowedit has an integrator of its own, which DDIM",
        ),
        (
            lambda tiny, x: edit_image(
                tiny,
                x,
                "x",
                key=KEY,
                method=EDIT_METHODS["fireflow"](source_prompt="y"),
                settings=DrawSettings(images=2),
            ),
            "all 2 images would be the same",
        ),
        (
            lambda tiny, x: edit_image(
                tiny,
                x,
                "x",
                key=KEY,
                method=SDEditing(),
                guidance=Guidance(cache=FirstBlock(0.1)),
            ),
            "Leave the cache out",
        ),
        (lambda tiny, x: restored(tiny, x, Hidden(np.zeros((3, 4)))), "got 4x3. Make the mask"),
    ],
)
def test_mistakes_are_refused(tiny, image, call, said):
    with pytest.raises(ValueError, match=said):
        call(tiny, image)
