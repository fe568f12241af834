"""The rules of merging: 8-bit rounding, scales, values that are set, inputs of any width."""

import json
import zlib
from dataclasses import asdict, replace

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from adapters import convert_merged, effective, leaves, random_clip, random_t5, same_leaves
from layouts import cast_network, export, write as write_file
from small import CONFIG, small_flux

from fluxjax import (
    T5,
    Clip,
    Flux,
    Lora,
    WeightsError,
    attach,
    convert_weights,
    load_flux,
    load_vae,
    merge,
)
from fluxjax.checkpoint import names as tables
from fluxjax.checkpoint.weights import InMemoryWeights, parameters_of
from fluxjax.lora import init_lora, unmerge
from fluxjax.lora.adapter import Change
from fluxjax.lora.base_terms import MagnitudeTerm
from fluxjax.lora.changes import changes_of
from fluxjax.lora.merge import MergedWeights
from fluxjax.lora.stochastic_rounding import rounding_seed
from fluxjax.lora.terms import FullTerm, HadamardTerm, KronTerm, LowRankTerm, ReplacementTerm
from fluxjax.lora.weight_update import round_compiled
from fluxjax.nets.weight import Weight

E4M3, E5M2 = jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.float8_e5m2)
rng = np.random.default_rng(0)


def normal(*shape: int, scale: float = 1.0) -> jax.Array:
    numbers = scale * rng.standard_normal(shape)
    return jnp.asarray(numbers.astype(np.float32), jnp.float32)


def adapter(changes: dict[str, object], network: str = "flux", part: str | None = None) -> Lora:
    """Return an adapter of one term per weight."""
    return Lora(
        {network: {name: (Change(term, part, False),) for name, term in changes.items()}}, "made"
    )


def low_rank(rows: int, columns: int, rank: int = 2, scale: float = 0.3) -> LowRankTerm:
    return LowRankTerm(
        normal(rows, rank, scale=scale), normal(rank, columns, scale=scale), jnp.float32(0.7)
    )


@pytest.fixture(scope="module")
def flux() -> Flux:
    return small_flux()


@pytest.fixture(scope="module")
def clip() -> Clip:
    return random_clip()


@pytest.fixture(scope="module")
def t5() -> T5:
    return random_t5()


def described(flux: Flux) -> dict[str, str]:
    """Return metadata that says the config of a network whose heads are not FLUX.1's."""
    return {"fluxjax": json.dumps({"layout": "bfl", "parts": {"flux": asdict(flux.config)}})}


def wide_flux(inputs: int) -> Flux:
    """Return a network that takes more input features than it predicts, as Fill and Control do."""
    shapes = eqx.filter_eval_shape(Flux, replace(CONFIG, in_channels=inputs), key=jax.random.key(0))
    return jax.tree.map(lambda leaf: normal(*leaf.shape), shapes)


# Rounding to 8 bits.


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
def test_stochastic_rounding_takes_one_of_the_two_neighbours_and_keeps_what_is_representable(dtype):
    every = np.arange(256, dtype=np.uint8).view(dtype)
    values = np.unique(every.astype(np.float32)[np.isfinite(every.astype(np.float32))])
    kept, lost = round_compiled(jnp.asarray(values), dtype, np.uint32(1))
    np.testing.assert_array_equal(np.asarray(kept).astype(np.float32), values)
    assert lost == 0
    x = rng.standard_normal(20_000).astype(np.float32) * np.exp(rng.uniform(-14, 4, 20_000)).astype(
        np.float32
    )
    out = np.asarray(round_compiled(jnp.asarray(x), dtype, np.uint32(2))[0]).astype(np.float32)
    above = np.searchsorted(values, x, side="right").clip(1, len(values) - 1)
    lower, upper = values[above - 1], values[above]
    assert np.all((out == lower) | (out == upper))
    # Unbiased: the sum of the errors is within four of its own standard deviations.
    deviation = np.sqrt(np.sum((upper - x).astype(np.float64) * (x - lower)))
    assert abs(np.sum((out - x).astype(np.float64))) < 4 * deviation


@pytest.mark.parametrize(("size", "bound"), [(0.005, 0.25), (0.02, 0.12)])
def test_a_small_change_of_fp8_weights_is_kept_on_average(flux, size, bound):
    shape = flux.double.img.mlp.up.weight.value.shape
    base = normal(*shape).astype(E4M3)
    model = eqx.tree_at(lambda net: net.double.img.mlp.up.weight.value, flux, base)
    deltas = {
        f"double.{i}.img.mlp.up.weight": FullTerm(normal(*shape[1:], scale=size))
        for i in range(shape[0])
    }
    merged = merge(model, [adapter(deltas)])
    exact = base.astype(jnp.float32)
    wanted = np.stack([np.asarray(term.value, np.float64) for term in deltas.values()])
    realised = np.asarray(
        merged.double.img.mlp.up.weight.value.astype(jnp.float32) - exact, np.float64
    )
    kept = np.sum(realised * wanted) / np.sum(wanted * wanted)
    nearest = np.asarray(
        (exact + jnp.asarray(wanted, jnp.float32)).astype(E4M3).astype(jnp.float32) - exact,
        np.float64,
    )
    # Rounding's noise is 3.6 and 1.6 times as large as the change, so the projection over 4,608
    # weights has a standard deviation of 0.053 and 0.023. Over 4 million weights, 1.002 and 1.000
    # were measured.
    assert abs(kept - 1) < bound
    assert np.sum(nearest * wanted) / np.sum(wanted * wanted) < 0.75


def test_rounding_is_the_same_on_every_run_in_every_reading_and_on_every_sharding(flux):
    eight = cast_network(flux, E4M3)
    lora = adapter({"double.1.img.qkv.weight": low_rank(96, 32)})
    merged = merge(eight, [lora])
    assert same_leaves(merged, merge(eight, [lora]))
    assert not same_leaves(merged, merge(eight, [lora], [0.9]))
    read = MergedWeights(InMemoryWeights(eight), changes_of(eight, [lora], None))
    whole = np.asarray(merged.double.img.qkv.weight.value[1])
    for rows in (slice(0, 96), slice(32, 64), slice(90, 96)):
        np.testing.assert_array_equal(read.read("double.1.img.qkv.weight", rows, E4M3), whole[rows])
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.NamedSharding(mesh, jax.P(None, "x"))
    placed = eqx.tree_at(
        lambda net: net.double.img.qkv.weight.value,
        eight,
        jax.device_put(eight.double.img.qkv.weight.value, split),
    )
    np.testing.assert_array_equal(
        np.asarray(merge(placed, [lora]).double.img.qkv.weight.value[1]), whole
    )


def test_a_checkpoint_converted_to_fp8_with_adapters_keeps_them_and_without_is_rounded_to_nearest(
    flux, tmp_path
):
    write_file(tmp_path / "flux.safetensors", export(flux, tables.FLUX_BFL), described(flux))
    lora = adapter({"single.0.linear1.weight": FullTerm(normal(144, 32, scale=1e-3))})
    plain_path = tmp_path / "plain.safetensors"
    convert_weights(tmp_path / "flux.safetensors", plain_path, only=["flux"], dtype="float8_e4m3fn")
    source, target = tmp_path / "flux.safetensors", tmp_path / "merged.safetensors"
    convert_merged(source, target, lora, dtype="float8_e4m3fn")
    plain, merged = (load_flux(tmp_path / f"{name}.safetensors") for name in ("plain", "merged"))
    np.testing.assert_array_equal(
        np.asarray(plain.single.linear1.weight.value),
        np.asarray(flux.single.linear1.weight.value).astype(E4M3),
    )
    exact, _ = round_compiled(
        flux.single.linear1.weight.value[0]
        + lora.changes["flux"]["single.0.linear1.weight"][0].term.value,
        E4M3,
        np.uint32(zlib.crc32(b"single.0.linear1.weight")),
    )
    np.testing.assert_array_equal(
        np.asarray(merged.single.linear1.weight.value[0]), np.asarray(exact)
    )
    # What no adapter changes is rounded as without any.
    np.testing.assert_array_equal(
        np.asarray(merged.single.linear1.weight.value[1]),
        np.asarray(plain.single.linear1.weight.value[1]),
    )


@pytest.mark.parametrize("dtype", [np.dtype(np.float16), E4M3, E5M2], ids=str)
def test_a_sum_that_a_dtype_can_not_hold_is_named(flux, dtype):
    model = cast_network(flux, dtype)
    lora = adapter({"double.2.txt.out.weight": FullTerm(jnp.full((32, 32), 1e5))})
    with pytest.raises(
        WeightsError,
        match=rf"double\.2\.txt\.out\.weight with the adapters added holds 1e\+05, which {dtype}",
    ):
        merge(model, [lora])
    assert jnp.isfinite(
        merge(model, [lora], [1e-4]).double.txt.out.weight.value.astype(jnp.float32)
    ).all()


def test_attached_adapters_are_exact_beside_fp8_weights_and_biases(flux):
    eight = cast_network(flux, E4M3)
    bias = normal(32, scale=1e-3)
    lora = adapter(
        {"double.0.img.out.bias": FullTerm(bias), "double.0.img.out.weight": low_rank(32, 32)}
    )
    attached = attach(eight, [lora])
    wanted = eight.double.img.out.bias.astype(jnp.float32)[0] + bias
    np.testing.assert_array_equal(attached.double.img.out.bias[0], wanted)
    assert attached.double.img.out.bias.dtype == jnp.float32


def test_a_scaled_base_is_merged_at_its_decoded_values(flux, tmp_path):
    tensors = export(flux, tables.FLUX_BFL)
    key, scale = "double_blocks.0.img_attn.proj.weight", np.float32(0.0123)
    eight = (tensors[key] / scale).astype(ml_dtypes.float8_e4m3fn)
    tensors |= {key: eight, "double_blocks.0.img_attn.proj.scale_weight": scale.reshape(())}
    write_file(tmp_path / "scaled.safetensors", tensors, described(flux))
    lora = adapter({"double.0.img.out.weight": low_rank(32, 32)})
    source, target = tmp_path / "scaled.safetensors", tmp_path / "out.safetensors"
    convert_merged(source, target, lora, 0.5, dtype="float32")
    wanted = eight.astype(np.float64) * float(scale)
    term = lora.changes["flux"]["double.0.img.out.weight"][0].term
    wanted += 0.5 * 0.7 * np.asarray(term.up, np.float64) @ np.asarray(term.down, np.float64)
    merged = load_flux(tmp_path / "out.safetensors").double.img.out.weight.value[0]
    assert np.linalg.norm(merged - wanted) <= 1e-6 * np.linalg.norm(wanted)


# Scales.


@pytest.mark.parametrize(
    "scale", [float("nan"), float("inf"), -np.inf, 1e39, np.float64(1e39), jnp.float32(jnp.nan)]
)
def test_a_scale_that_is_not_finite_in_float32_is_refused_by_every_call(flux, tmp_path, scale):
    lora = adapter({"img_in.weight": low_rank(32, 8)})
    for call in (merge, unmerge, attach):
        for one in (scale, {"": 1.0, "double": scale}):
            with pytest.raises(
                ValueError, match=rf"`{call.__name__}` needs scales that are finite"
            ):
                call(flux, [lora], [one])
    with pytest.raises(ValueError, match=r"`.*` needs scales that are finite"):
        convert_merged("tiny", tmp_path / "out", lora, scale)
    assert not (tmp_path / "out").exists()


def test_scales_may_be_any_kind_of_number(flux):
    lora = adapter({"single.1.linear2.weight": low_rank(32, 80)})
    wanted = merge(flux, [lora], [0.5])
    for scale in (
        np.float32(0.5),
        np.float64(0.5),
        jnp.float32(0.5),
        jnp.bfloat16(0.5),
        np.array(0.5),
        {"": np.float16(0.5)},
    ):
        assert same_leaves(merge(flux, [lora], [scale]), wanted)
    assert same_leaves(merge(flux, [lora], np.array([0.5])), wanted)
    assert same_leaves(merge(flux, [lora], jnp.array([0.5])), wanted)
    assert same_leaves(merge(flux, [lora], [1]), merge(flux, [lora]))
    for wrong in ([True], [np.ones(1)], [1j]):
        with pytest.raises((ValueError, TypeError)):
            merge(flux, [lora], wrong)
    with pytest.raises(ValueError, match="one scale per adapter, got 2 for 1"):
        merge(flux, [lora], [1.0, 1.0])


# Norms that are set.


def test_a_norm_is_set_at_any_scale_but_0_and_by_one_adapter_only(flux):
    name, first, second = "double.1.img.query_norm.scale", normal(16), normal(16)
    a, b = adapter({name: ReplacementTerm(first)}), adapter({name: ReplacementTerm(second)})
    for scale in (1.0, 0.85, -1.0):
        np.testing.assert_array_equal(
            merge(flux, [a], [scale]).double.img.query_norm.scale[1], first
        )
    assert same_leaves(merge(flux, [a], [0.0]), flux)
    assert same_leaves(merge(flux, [a, b], [1.0, 0.0]), merge(flux, [a]))
    for call in (merge, attach):
        with pytest.raises(
            WeightsError,
            match=r"Adapters 1 \(made\) and 2 \(made\) both set double\.1\.img\.query_norm\.scale",
        ):
            call(flux, [a, b], [1.0, 0.5])
    added = adapter({name: FullTerm(second)})
    np.testing.assert_allclose(
        merge(flux, [added, a]).double.img.query_norm.scale[1], first + second, rtol=1e-6
    )
    traced = jax.jit(lambda scale: attach(flux, [a], [scale]).double.img.query_norm.scale[1])
    np.testing.assert_array_equal(traced(0.3), first)
    np.testing.assert_array_equal(traced(0.0), flux.double.img.query_norm.scale[1])


# Inputs of any width: 8 features of the image, in Fill and Control models others beside them.


def test_an_adapter_of_the_image_only_adapts_those_features_of_a_wide_model():
    wide = wide_flux(48)
    narrow, whole = (
        adapter({"img_in.weight": low_rank(32, 8)}),
        adapter({"img_in.weight": low_rank(32, 48)}),
    )
    for lora in (narrow, whole):
        term = lora.changes["flux"]["img_in.weight"][0].term
        delta = 0.7 * np.asarray(term.up, np.float64) @ np.asarray(term.down, np.float64)
        wanted = np.asarray(wide.img_in.weight.value, np.float64)
        wanted[:, : delta.shape[1]] += 0.5 * delta
        merged = merge(wide, [lora], [0.5])
        np.testing.assert_allclose(merged.img_in.weight.value, wanted, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(
            effective(attach(wide, [lora], [0.5]).img_in.weight), wanted, rtol=1e-5, atol=1e-6
        )
        back = unmerge(merged, [lora], [0.5])
        np.testing.assert_allclose(
            back.img_in.weight.value, wide.img_in.weight.value, rtol=1e-5, atol=1e-6
        )


def test_a_dora_of_the_image_only_has_the_norms_of_those_features():
    wide, term, magnitude = wide_flux(16), low_rank(32, 8), jnp.abs(normal(32))
    merged = merge(
        wide, [adapter({"img_in.weight": MagnitudeTerm(term, magnitude, True)})]
    ).img_in.weight.value
    changed = np.asarray(wide.img_in.weight.value[:, :8] + term.delta(jnp.zeros(())), np.float64)
    wanted = (
        np.asarray(magnitude)[:, None] * changed / np.linalg.norm(changed, axis=1, keepdims=True)
    )
    np.testing.assert_allclose(merged[:, :8], wanted, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(merged[:, 8:], wide.img_in.weight.value[:, 8:])


@pytest.mark.parametrize(
    ("inputs", "columns", "message"),
    [
        (8, 3, "has 8 input features, the adapter's 3"),
        (8, 12, "which an adapter of 12 can't widen"),
        (16, 12, "has 16 input features, the adapter's 12"),
        (48, 16, "has 48 input features, the adapter's 16"),
        (16, 48, "has 16 input features, which an adapter of 48 can't widen"),
    ],
)
def test_an_adapter_of_another_input_is_refused(inputs, columns, message):
    lora = adapter({"img_in.weight": low_rank(32, columns)})
    for call in (merge, unmerge, attach):
        with pytest.raises(WeightsError, match=message):
            call(wide_flux(inputs), [lora])


def test_two_adapters_that_widen_to_different_inputs_are_refused(flux):
    loras = [adapter({"img_in.weight": low_rank(32, columns)}) for columns in (16, 24)]
    with pytest.raises(WeightsError, match="input features, the adapter's 16"):
        merge(flux, loras)


@pytest.mark.parametrize("columns", [31, 33, 16, 1])
def test_an_adapter_narrower_or_wider_than_another_weight_is_refused(flux, columns):
    for term in (low_rank(96, columns), FullTerm(normal(96, columns))):
        with pytest.raises(WeightsError, match=rf"is \[96, 32\], the adapter's \[96, {columns}\]"):
            merge(flux, [adapter({"double.0.img.qkv.weight": term})])


# Laws, on every network.

WEIGHTS = {
    "flux": (
        "single.1.linear1",
        "final.modulation",
        "double.2.txt.mlp.down",
        "double.0.img.qkv",
        "img_in",
    ),
    "clip": ("blocks.1.q", "blocks.0.down", "blocks.0.up", "blocks.1.out", "blocks.0.v"),
    "t5": ("blocks.1.gate", "blocks.0.out", "blocks.1.down", "blocks.0.q", "blocks.1.k"),
}
VECTORS = {
    "flux": ("single.0.key_norm.scale", "double.1.img.out.bias"),
    "clip": ("blocks.0.norm1.bias", "norm.scale"),
    "t5": ("blocks.1.norm2.scale",),
}


def subtractable(number: int, rows: int, columns: int) -> object:
    """Return a term of a kind that can be subtracted; the last two have no low-rank form."""
    half = jnp.float32(0.3)
    return (
        lambda: low_rank(rows, columns),
        lambda: KronTerm((normal(4, 2),), (normal(rows // 4, 2), normal(2, columns // 2)), half),
        lambda: HadamardTerm(
            normal(rows, 2), normal(2, columns), normal(rows, 3), normal(3, columns), half
        ),
        lambda: KronTerm((normal(4, 2),), (normal(rows // 4, columns // 2),), half),
        lambda: FullTerm(normal(rows, columns)),
    )[number]()


@pytest.mark.parametrize("network", ["flux", "clip", "t5"])
def test_unmerge_undoes_merge_and_attach_is_merge(network, request):
    model = request.getfixturevalue(network)
    shapes = {name: slot.shape for name, slot in parameters_of(model).items()}
    names = [f"{name}.weight" for name in WEIGHTS[network]]
    terms = {name: subtractable(number, *shapes[name]) for number, name in enumerate(names)}
    terms |= {name: FullTerm(normal(*shapes[name])) for name in VECTORS[network]}
    lora, before = adapter(terms, network), leaves(model)
    merged = merge(model, [lora], [0.6])
    changed = {
        name for name, leaf in leaves(merged).items() if not np.array_equal(leaf, before[name])
    }
    assert changed == {
        ".".join(field for field in name.split(".") if not field.isdigit()) for name in terms
    }
    # Sums of a weight and a change of some units, in float32.
    for name, back in leaves(unmerge(merged, [lora], [0.6])).items():
        np.testing.assert_allclose(back, before[name], rtol=1e-6, atol=2e-6, err_msg=name)
    for name in names[3:]:
        with pytest.raises(WeightsError, match="no low-rank form"):
            attach(model, [adapter({name: terms[name]}, network)])
    lora = adapter({name: term for name, term in terms.items() if name not in names[3:]}, network)
    ours, theirs = attach(model, [lora], [0.6]), merge(model, [lora], [0.6])
    for one, other in zip(
        *(jax.tree.leaves(m, is_leaf=lambda n: isinstance(n, Weight)) for m in (ours, theirs)),
        strict=True,
    ):
        left, right = (
            effective(node) if isinstance(node, Weight) else np.asarray(node)
            for node in (one, other)
        )
        assert np.linalg.norm(left - right) <= 1e-6 * np.linalg.norm(right)


def test_a_network_without_adapters_is_refused():
    with pytest.raises(ValueError, match="needs a Flux, Chroma, ControlNet, Clip or T5, got Vae"):
        merge(load_vae("tiny"), [])


def test_an_adapter_in_memory_that_is_nan_is_refused_and_not_merged(flux):
    lora = init_lora(flux, 1, [r"double\.0\.img\.out"], key=jax.random.key(0))
    damaged = jax.tree.map(lambda leaf: leaf * jnp.nan if leaf.ndim == 2 else leaf, lora)
    with pytest.raises(
        WeightsError,
        match=r"double\.0\.img\.out\.weight with the adapters added is infinite or NaN",
    ):
        merge(flux, [damaged])


def test_a_sum_beyond_float32_is_refused_as_files_are_merged(flux):
    lora = init_lora(flux, 1, [r"double\.0\.img\.out"], key=jax.random.key(0))
    large = jax.tree.map(lambda leaf: leaf + 1e20 if leaf.ndim == 2 else leaf, lora)
    name = "double.0.img.out.weight"
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(
            WeightsError, match=f"{name} with the adapters added is infinite or NaN"
        ):
            MergedWeights(InMemoryWeights(flux), changes_of(flux, [large], None)).read(
                name, slice(0, 4), np.dtype(dtype)
            )


def test_stochastic_rounding_does_not_depend_on_the_configured_generator():
    x = jnp.linspace(0.1, 1, 200)
    found = []
    for generator in ("threefry2x32", "rbg"):
        with jax.default_prng_impl(generator):
            found.append(
                np.asarray(
                    round_compiled(x, jnp.dtype("float8_e4m3fn"), rounding_seed("a"))[0], np.float32
                )
            )
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        (0.5, r"`merge\(scales\)` takes a sequence of|got the single number"),
        (np.float32(0.5), "needs one scale per adapter, got the single number"),
        (jnp.float32(0.5), "needs one scale per adapter, got the single number"),
        ("a", r"`merge\(scales\)` takes a sequence of a number"),
        (["a"], r"`merge\(scales\)` takes a sequence of a number"),
        ([None], r"`merge\(scales\)` takes a sequence of a number"),
        ({"": 1.0}, r"`merge\(scales\)` takes a sequence of a number"),
    ],
)
def test_scales_of_a_wrong_kind_are_one_clear_error(flux, scales, message):
    lora = init_lora(flux, 1, [r"double\.0\.img\.out"], key=jax.random.key(0))
    with pytest.raises(ValueError, match=message):
        merge(flux, [lora], scales)
    for call, run in {"merge": merge, "unmerge": unmerge, "attach": attach}.items():
        with pytest.raises(
            ValueError, match=rf"`{call}\(loras\)` takes a sequence of Lora, got a Lora"
        ):
            run(flux, lora)
