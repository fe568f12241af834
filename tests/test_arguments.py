"""Public functions take numbers and arrays of Python, NumPy and JAX, and name a wrong argument."""

import functools
import inspect
import traceback
from collections.abc import Iterator
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawing import with_small_vae

from fluxjax import checkpoint, devices, flow, generate, kernels, lora, nets, train
from fluxjax.arguments import convert_arguments
from fluxjax.shapes import Array, Float, PerImage, PRNGKeyArray

FOLDERS = (flow, kernels, nets, checkpoint, devices, lora, generate, train)
PUBLIC = {name: getattr(folder, name) for folder in FOLDERS for name in folder.__all__}
f = SimpleNamespace(**PUBLIC)

IMAGE = np.linspace(-1, 1, 16 * 16 * 3).reshape(16, 16, 3)  # float64, as NumPy's are
HALF = np.tile([0.0, 1.0], (16, 8))
LATENT = np.zeros((16, 2, 2))
X = np.array([0.5, -1.0, 2.0])
HEADS = np.linspace(0, 1, 24).reshape(3, 2, 4)


def straight(x, t):
    return -x


def double(x):
    return 2 * x


MEASUREMENT = f.Measurement(f.Mask(1.0), jnp.float32([0.1, 0.2, 0.3]), 0.5)
RESTORATION = {"velocity": straight, "measurement": MEASUREMENT, "key": jax.random.key(0)}
# For each public function with numbers or arrays: those by name, and its other arguments.
CALLS = {
    f.sample: ({"x": X, "times": [1.0, 0.5, 0.0]}, {"velocity": straight}),
    f.stream: ({"x": X, "times": [1.0, 0.5, 0.0]}, {"velocity": straight}),
    f.evaluation_times: ({"times": [1.0, 0.5, 0.0]}, {"step": f.Heun()}),
    f.time_shift: ({"t": [0.5, 0.2], "mu": 1.5}, {}),
    f.resolution_mu: ({"tokens": 1024, "base_shift": 0.5}, {}),
    f.flow_times: ({"steps": 3, "mu": 0.5}, {}),
    f.uniform_times: ({"steps": 3, "first": 0.9, "last": 0.1}, {}),
    f.static_times: ({"steps": 3, "shift": 2.0}, {}),
    f.karras_times: ({"times": [1.0, 0.5, 0.0], "rho": 3.0}, {}),
    f.exponential_times: ({"times": [1.0, 0.5, 0.0]}, {}),
    f.beta_times: ({"times": [1.0, 0.5, 0.0], "alpha": 0.5, "beta": 0.5}, {}),
    f.linear_quadratic_times: ({"steps": 4, "threshold": 0.1}, {}),
    f.custom_times: ({"nodes": [1.0, 0.5, 0.0]}, {}),
    f.pnp_flow: ({"x": X, "times": [1.0, 0.5, 0.0], "rate": 0.5, "draws": 2}, RESTORATION),
    f.red_diff: ({"x": X, "times": [1.0, 0.5, 0.0], "strength": 0.5}, RESTORATION),
    f.randomize_then_optimize: (
        {"noise": X, "times": [1.0, 0.5, 0.0], "iterations": 1, "tolerance": 0.1},
        RESTORATION,
    ),
    f.optimize_noise: (
        {"noise": X, "times": [1.0, 0.5, 0.0], "iterations": 1, "tolerance": 0.1},
        {"velocity": straight, "measurement": MEASUREMENT},
    ),
    f.moment_gain: ({"draws": np.stack([X, -X]), "std": 0.5}, {"operator": f.Mask(1.0)}),
    f.contrastive_gain: (
        {"draws": np.stack([X, -X]), "std": 0.5},
        {"operator": f.Mask(1.0), "key": jax.random.key(0)},
    ),
    f.choose_measurements: (
        {"draws": np.stack([X, -X]), "std": 0.5, "count": 2},
        {"candidates": f.Mask(np.eye(3))},
    ),
    f.window_masks: ({"size": 2, "stride": 1}, {"shape": (3, 4)}),
    f.plan_times: (
        {"noise": np.stack([X, -X]), "steps": 2, "nodes": [1.0, 0.5, 0.2, 0.0], "decay": 0.9},
        {"velocity": straight},
    ),
    f.add_noise: ({"x0": X, "noise": -X, "t": 0.3}, {}),
    f.start_time: ({"times": [1.0, 0.5, 0.0], "strength": 0.5}, {}),
    f.partial_times: ({"times": [1.0, 0.5, 0.0], "strength": 0.5}, {}),
    f.sdedit: ({"image": X, "noise": -X, "times": [0.5, 0.0]}, {"velocity": straight}),
    f.edit_mask: (
        {"image": X, "t": 0.3, "draws": 2, "ratio": 1.2, "axis": 0},
        {"source": straight, "target": lambda x, t: x, "key": jax.random.key(0)},
    ),
    f.control_times: ({"times": [1.0, 0.5, 0.0], "start": 0.5, "end": 1.0}, {}),
    f.initial_noise: ({"height": 32, "width": 16}, {"key": jax.random.key(0)}),
    f.pack_latents: ({"latent": LATENT}, {}),
    f.unpack_latents: ({"packed": np.zeros((1, 64)), "height": 16, "width": 16}, {}),
    f.image_ids: ({"height": 32, "width": 16}, {}),
    f.pad_image: ({"image": IMAGE[:9, :5]}, {}),
    f.extend_canvas: ({"image": IMAGE}, {"margins": f.Margins(left=3)}),
    f.cell_mask: ({"mask": IMAGE[..., 0] / 2 + 0.5, "margin": 3}, {}),
    f.mask_tokens: ({"cells": LATENT[0], "channels": 4}, {}),
    f.mask_features: ({"mask": HALF}, {}),
    f.resize_image: ({"image": IMAGE, "height": 8, "width": 24}, {}),
    f.paste_kept: (
        {"drawn": -IMAGE, "image": IMAGE, "mask": HALF},
        {},
    ),
    f.siglip_pixels: ({"image": IMAGE}, {"config": f.SiglipConfig(image_size=5, patch=2)}),
    f.clip_pixels: ({"image": IMAGE}, {"config": f.ClipVisionConfig(image_size=5, patch=2)}),
    f.redux_condition: (
        {"tokens": LATENT[:3], "weights": [0.5, 1.0, 2.0], "text_weight": 0.3},
        {},
    ),
    f.estimates: ({"prediction": X, "x": X, "t": 0.5}, {"kind": "velocity"}),
    f.convert_prediction: (
        {"prediction": X, "x": X, "t": 0.5},
        {"source": "velocity", "target": "noise"},
    ),
    f.attention: ({"q": HEADS, "k": HEADS, "v": HEADS, "scale": 0.5, "key_length": 2}, {}),
    f.isolated_attention: ({"q": HEADS, "k": HEADS, "v": HEADS, "txt_tokens": 1}, {}),
    f.solve_normal: (
        {"covariance": 0.7, "std": 0.5, "r": X, "iterations": 3},
        {"forward": double, "backward": double},
    ),
    f.pseudo_inverse: ({"r": X, "iterations": 3}, {"forward": double, "backward": double}),
    f.tmpd: ({"iterations": 3}, {}),
    f.pigdm: ({"iterations": 3, "prior_std": 1.5}, {}),
    f.proximal: ({"iterations": 3, "prior_std": 1.5}, {}),
    f.twisted_sample: (
        {"x": np.stack([X, -X]), "times": [1.0, 0.5, 0.0]},
        {
            "conditioned": f.Conditioned(
                straight, f.Measurement(f.Mask([1.0, 0.0, 1.0]), X, 0.1), f.proximal()
            ),
            "step": f.DDIM(),
            "key": jax.random.key(0),
        },
    ),
    train.logit_normal_times: ({"count": 3, "mean": 0.5, "mu": 1.0}, {"key": jax.random.key(0)}),
    train.min_snr_weight: ({"t": 0.3, "gamma": 4.0}, {}),
    train.teacher_interval: ({"t": 0.3, "mu": 0.5}, {"steps": 2, "teacher_steps": 3}),
    train.consistency_loss: (
        {"x": X},
        {
            "student": straight,
            "teacher": straight,
            "interval": train.TeacherInterval(*np.float32([0.9, 0.7, 0.5])),
        },
    ),
    train.flow_matching_loss: ({"x0": X, "t": 0.5, "noise": X}, {"velocity": straight}),
    train.interpolate_conditions: (
        {"share": 0.3},
        {"fitted": [np.float32(X)], "target": [np.float32(-X)]},
    ),
    train.guided_target: ({"conditional": X, "unconditional": X, "scale": 2.0}, {}),
}
# With networks, files or devices: tested in their folders, or below.
ELSEWHERE = {
    train.bucket_sizes,
    train.encode_examples,
    train.load_encoders,
    train.open_batches,
    f.text_to_image,
    f.controlnet_condition,
    f.image_to_image,
    f.begin_from_images,
    f.ip_adapter_condition,
    f.outpaint,
    f.labelled_attention,
    f.region_labels,
    f.region_weights,
    f.regional_condition,
    f.redux_tokens,
    f.edit_image,
    f.restore_image,
    f.canny_edges,
    f.control_condition,
    f.encode_image,
    f.fill_around,
    f.fill_condition,
    f.fill_image,
    f.kontext_condition,
    f.kontext_image,
    f.reference_ids,
    f.widen_input,
    f.load_models,
    f.fit_preview,
    f.prompt_conditioning,
    f.decode_tokens,
    f.show_images,
    f.make_mesh,
    f.sample_ode,
    f.adjoint,
    f.linearize,
    f.begin_sample,
    f.flux_velocity,
    f.advance_sample,
    f.as_velocity,
    f.merge,
    f.unmerge,
    f.attach,
    f.init_dora,
    f.init_lokr,
    f.init_lora,
    f.write_lora,
    f.extract_lora,
    f.fit_times,
    f.read_times,
    f.write_times,
    f.save,
    f.save_models,
    train.make_step,
    train.average,
    train.drop_captions,
    train.fit_condition,
}
FORMS = {
    "NumPy": lambda value: np.int64(value) if isinstance(value, int) else np.asarray(value)[()],
    "JAX": lambda value: jnp.asarray(value, jnp.int32 if isinstance(value, int) else jnp.float32),
    "float32": lambda value: value if isinstance(value, int) else np.asarray(value, np.float32)[()],
    "plain": lambda value: np.asarray(value).tolist(),
}


def leaves_of(result):
    """Return the arrays of a result. `stream` returns an iterator."""
    if isinstance(result, Iterator):
        result = [one.x for one in result]
    return jax.tree.leaves(result)


@functools.cache
def canonical_leaves(function):
    """Return what a function returns for float32 arrays of JAX and for numbers of Python."""
    numbers, rest = CALLS[function]
    canonical = {
        name: value if isinstance(value, int | float) else jnp.float32(value)
        for name, value in numbers.items()
    }
    return leaves_of(function(**canonical, **rest))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("function", CALLS, ids=lambda function: function.__name__)
def test_numbers_and_arrays_of_any_library_give_the_same(function, form):
    numbers, rest = CALLS[function]
    found = function(**{name: FORMS[form](value) for name, value in numbers.items()}, **rest)
    for one, other in zip(leaves_of(found), canonical_leaves(function), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
        assert jnp.result_type(one) == jnp.result_type(other)


def test_every_function_that_converts_its_arguments_is_tested():
    """The decorator marks a function; all public ones of sampling must have it."""
    public = list(PUBLIC.values())
    functions = [
        one for one in public if inspect.isfunction(one) and one.__module__.startswith("fluxjax")
    ]
    decorated = {one for one in functions if hasattr(one, "converts_arguments")}
    assert decorated == CALLS.keys() | ELSEWHERE
    # All functions of sampling, and of the loss, but for those that take no numbers, or are for
    # other folders. The rest of training takes records, which check their own values.
    public = [getattr(flow, name) for name in flow.__all__]
    public += [
        one
        for one in vars(train).values()
        if getattr(one, "__module__", "") == "fluxjax.train.loss"
    ]
    plain = {one.__name__ for one in public if inspect.isfunction(one) and one not in decorated}
    assert plain == {"ancestral", "dps", "initial_memory"}


def computed(call, *argument):
    """Call a network in one program: outside of one, XLA compiles each operation by itself.

    **Arguments:** `argument`: one that the program holds, so that the network gets it as it is.
    """
    return jax.jit(lambda: call(*argument))()


def test_networks_take_what_fluxjax_itself_returns(tiny):
    ids = f.tokenize(tiny.tokenizers, "a red star", max_length=8)
    for encoder, plain in ((tiny.clip, ids.clip), (tiny.t5, list(map(int, ids.t5)))):
        of_jax = jnp.asarray(plain, jnp.int32)
        np.testing.assert_array_equal(computed(encoder, plain), computed(encoder, of_jax))
    vae = with_small_vae(tiny).vae
    latent = computed(vae.encode, IMAGE)
    assert latent.dtype == jnp.float32
    of_numpy = computed(vae.decode, np.asarray(latent))
    np.testing.assert_array_equal(of_numpy, computed(vae.decode, latent))


@pytest.mark.parametrize("network", ["clip", "t5"])
def test_ids_outside_of_the_vocabulary_are_refused_and_traced_ones_give_nan(tiny, network):
    encoder = getattr(tiny, network)
    size = encoder.config.vocabulary
    for wrong in (-1, size):
        with pytest.raises(
            ValueError, match=rf"\(ids\)` takes ids of its vocabulary, 0 to {size - 1}, got {wrong}"
        ):
            encoder([1, wrong])
        assert jnp.isnan(jax.jit(lambda ids: encoder(ids))(jnp.array([1, wrong]))).any()
    with pytest.raises(ValueError, match="at least one token"):
        encoder(np.zeros(0, np.int32))


@pytest.mark.parametrize(
    "key",
    [0, jax.random.split(jax.random.key(0), 2), jax.random.split(jax.random.PRNGKey(0), 2), "a"],
)
def test_what_is_not_one_key_is_refused_by_the_function_called(tiny, key):
    for call, run in {
        "text_to_image": lambda: f.text_to_image(tiny, "x", key=key),
        "initial_noise": lambda: f.initial_noise(key, 32, 32),
        "sample": lambda: f.sample(straight, X, f.flow_times(2), step=f.DDIM(), key=key),
        "Vae.encode": lambda: tiny.vae.encode(IMAGE, key=key),
    }.items():
        with pytest.raises(
            ValueError, match=rf"^`{call}\(key\)` needs one PRNG key, got .*Pass jax.random.key"
        ):
            run()


def test_a_legacy_key_draws_what_the_new_one_does():
    np.testing.assert_array_equal(
        f.initial_noise(jax.random.PRNGKey(7), 32, 32), f.initial_noise(jax.random.key(7), 32, 32)
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"image": np.zeros((2, 2, 3), np.uint8)},
            r"`call\(image\)` takes a float array \[h, w, 3\], got uint8\[2, 2, 3\]",
        ),
        ({"image": np.zeros((1, 2, 2, 3))}, r"got float64\[1, 2, 2, 3\]"),
        ({"image": [[1], [2, 3]]}, r"takes a float array .*got \[\[1\], \[2, 3\]\]"),
        ({"image": object()}, "got an object"),
        ({"image": IMAGE, "count": 2.5}, r"`call\(count\)` takes an integer, got 2.5"),
        (
            {"image": IMAGE, "scale": "a"},
            r"`call\(scale\)` takes a number or a float array \[images\], got 'a'",
        ),
    ],
)
def test_what_can_not_be_converted_is_named(arguments, message):
    @convert_arguments
    def call(
        image: Float[Array, "h w 3"],
        count: int = 1,
        scale: PerImage = 1.0,
        key: PRNGKeyArray | None = None,
    ):
        return image

    call.__wrapped__.__qualname__ = "call"
    with pytest.raises(ValueError, match=message.replace("call", ".*call")):
        call(**arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: f.sample(straight, X, [1.0, 0.0], step=f.Euler),
            r"`sample\(step\)` takes Step, got the class Euler. Pass an instance, such as Euler",
        ),
        (lambda: f.sample(straight, X, [1.0, 0.0], step="euler"), r"takes Step, got 'euler'"),
        (
            lambda: f.sample(3, X, [1.0, 0.0]),
            r"`sample\(velocity\)` takes a function or \w+, got 3",
        ),
        (lambda: f.sample(straight, X, [1.0, 0.0], history=3), r"`sample\(history\)` takes a bool"),
        (lambda: f.estimates(X, X, 0.5, kind=3), r"`estimates\(kind\)` takes a string, got 3"),
        (lambda: f.estimates(X, X[:2], 0.5, "x0"), "Dimensions of one name have the same size"),
        (lambda: f.as_velocity(straight, "x0", "straight"), r"takes Path, got 'straight'"),
        (lambda: f.DDIM("a"), r"`DDIM\(eta\)` takes a number, got 'a'"),
        (lambda: f.UniPC2("snr"), r"`UniPC2\(clock\)` takes 'log_snr' or 'log_time', got 'snr'"),
        (lambda: f.Guided(straight, 1, 2, rule=f.ZeroStar), r"takes Rule, got the class ZeroStar"),
    ],
)
def test_a_wrong_type_is_one_error_with_a_short_traceback(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    frames = traceback.extract_tb(caught.value.__traceback__)
    # Without those of equinox, and of the hook that checks a class's fields after this.
    ours = [frame for frame in frames if "site-packages" not in frame.filename]
    # This test, the lambda above, and the decorator.
    assert len(ours) == 3
    assert ours[-1].name == "converted"
    assert caught.value.__suppress_context__


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: f.Nag(float("nan")), r"`Nag\(scale\)` needs finite"),
        (lambda: f.DDIM(np.inf), r"`DDIM\(eta\)` needs finite"),
        (lambda: f.Guided(straight, 1, 2, scale=jnp.nan), r"`Guided\(scale\)` needs finite"),
        (lambda: f.Guided(straight, 1, scale=np.float32(2)), "needs the condition"),
        (lambda: f.WeakModel(straight, np.nan), r"`WeakModel\(strength\)` needs finite"),
        (lambda: f.Projected(bound=float("nan")), "needs a positive number"),
        (lambda: f.FirstBlock(float("nan")), "is NaN"),
    ],
)
def test_numbers_of_modules_are_finite(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_one_number_for_each_image_is_what_each_image_alone_has(tiny):
    tiny = with_small_vae(tiny)
    prompts, key = ["a red star", "a blue ring"], jax.random.key(0)

    def drawn(prompts, distilled, scale, negatives):
        return f.text_to_image(
            tiny,
            prompts,
            key=key,
            negative_prompt=negatives,
            settings=f.DrawSettings(steps=2, height=32, width=32, distilled_guidance=distilled),
            guidance=f.Guidance(scale=scale),
        )

    both = drawn(prompts, [1.0, 4.0], np.array([2.0, 3.0]), ["a star", "white"])
    # The second image of a batch has its own noise: draw the prompt twice, compare the second.
    alone = drawn([prompts[1]] * 2, np.float32(4), jnp.float32(3), "white")
    np.testing.assert_allclose(both[1], alone[1], atol=1e-4)
    three = [1.0, 2.0, 3.0]
    for wrong in ((three, 2.0, ""), (1.0, three, "")):
        with pytest.raises(ValueError, match="one for each of the 2 images, got 3"):
            drawn(prompts, *wrong)
    weak = f.WeakNetwork(f.DegradedBlocks(tiny.flux.config, double=(0,)), jnp.asarray(three))
    with pytest.raises(ValueError, match=r"\(strength\)` .* one for each of the 2 images, got 3"):
        f.text_to_image(tiny, prompts, key=key, guidance=f.Guidance(weak=weak))
    for wrong in ((float("nan"), 2.0, ""), (1.0, float("nan"), "")):
        with pytest.raises(ValueError, match="needs finite numbers"):
            drawn(prompts, *wrong)
    with pytest.raises(ValueError, match="one for each of 2 prompts, got 1"):
        drawn(prompts, 1.0, 2.0, ["a"])


@pytest.mark.parametrize("form", [np.int64, jnp.int32, np.asarray, int])
def test_a_new_adapter_takes_numbers_of_any_library(tiny, form):
    found = f.init_lora(
        tiny.clip, form(2), r"blocks\.0\.q", alpha=form(4), key=jax.random.PRNGKey(0)
    )
    expected = f.init_lora(tiny.clip, 2, [r"blocks\.0\.q"], alpha=4.0, key=jax.random.key(0))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 2.5}, r"`init_lora\(rank\)` takes an integer, got 2.5"),
        ({"rank": 10**10}, "a rank of at most"),
        ({"alpha": float("nan")}, r"`init_lora\(alpha\)` needs a number that is finite"),
        ({"alpha": 1e39}, r"`init_lora\(alpha\)` needs a number that is finite"),
        ({"targets": ["(("]}, "is not a valid regular expression"),
        ({"key": 0}, "needs one PRNG key"),
    ],
)
def test_a_new_adapter_of_wrong_numbers_is_refused(tiny, arguments, message):
    with pytest.raises(ValueError, match=message):
        f.init_lora(tiny.clip, **{"rank": 2, "key": jax.random.key(0), **arguments})
