"""Adapters attached beside the weights: the same as merged ones, as arguments of a function."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from adapters import (
    FORMATS,
    Draw,
    assert_close,
    changed_weights,
    effective,
    effective_weights,
    kohya,
    random_flux,
    same_leaves,
    saved,
)

from fluxjax import Flux, WeightsError, attach, image_ids, merge, read_lora
from fluxjax.lora import init_lora, trainable
from fluxjax.lora.terms import HadamardTerm, KronTerm
from fluxjax.nets.weight import Dense, LocalWeight, Weight
from fluxjax.train.step import TrainState, make_step

LOW_RANK = ("kohya", "peft, metadata", "onetrainer", "control", "xlabs", "loha")


@pytest.fixture(scope="module")
def flux() -> Flux:
    """A network of moderate weights: an adapter moves its output, which is not chaotic."""
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.5 * np.asarray(leaf), jnp.float32), random_flux()
    )


@eqx.filter_jit
def velocity(model, x):
    ids, draw = image_ids(32, 48), Draw(20)
    txt, vec = jnp.asarray(draw(5, 24)), jnp.asarray(draw(8))
    return model(x, 0.6, txt=txt, vec=vec, img_ids=ids, guidance=3.5)


@pytest.mark.parametrize("name", LOW_RANK)
def test_an_attached_adapter_adds_what_its_formula_says(flux, tmp_path, name):
    sample = FORMATS[name]()
    lora = read_lora(saved(sample, tmp_path / "x.safetensors"))
    attached = attach(flux, [lora], [0.1])
    assert_close(effective_weights(attached), changed_weights(flux, sample, 0.1), 1e-6)


def test_adapters_and_scales_of_a_batch_are_arguments_of_one_compiled_function(flux, tmp_path):
    traces = []

    @eqx.filter_jit
    def run(model, loras, scales, xs):
        traces.append(1)

        def one(lora, scale, x):
            return velocity(attach(model, [lora], [scale]), x)

        return jax.vmap(one)(loras, scales, xs)

    def reverse(leaf):
        return leaf[..., ::-1] if leaf.ndim else leaf

    first = jax.tree.map(np.asarray, read_lora(saved(kohya(), tmp_path / "a.safetensors")))
    second = jax.tree.map(reverse, first)
    xs = Draw(22)(2, 6, 64)
    plain = [np.asarray(velocity(flux, jnp.asarray(x))) for x in xs]
    for loras, scales in (((first, second), (0.1, -0.2)), ((second, first), (0.3, 0.1))):
        both = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *loras)
        batch = run(flux, both, jnp.array(scales), jnp.asarray(xs))
        for i, (lora, scale) in enumerate(zip(loras, scales, strict=True)):
            merged = merge(flux, [jax.tree.map(jnp.asarray, lora)], [scale])
            expected = np.asarray(velocity(merged, jnp.asarray(xs[i])))
            change = np.linalg.norm(expected - plain[i])
            assert change > 1e-3 * np.linalg.norm(plain[i])
            error = np.linalg.norm(batch[i] - expected)
            # The product is taken in another order, over six layers in float32.
            assert error <= 1e-5 * np.linalg.norm(expected)
            assert error < 1e-2 * change
    assert len(traces) == 1


@pytest.mark.parametrize("name", ["lokr", "dora"])
def test_an_adapter_without_a_low_rank_form_is_refused(flux, tmp_path, name):
    lora = read_lora(saved(FORMATS[name](), tmp_path / "x.safetensors"))
    with pytest.raises(WeightsError, match=r"has no low-rank form\. Merge it instead"):
        attach(flux, [lora])


def factors(*shapes: tuple[int, int]) -> list[jax.Array]:
    return [jnp.asarray(Draw(seed)(*shape)) for seed, shape in enumerate(shapes)]


def loha() -> HadamardTerm:
    return HadamardTerm(*factors((8, 2), (2, 6), (8, 3), (3, 6)), jnp.float32(0.5))


def lokr_of_a_whole_left_factor() -> KronTerm:
    left, up, down = factors((4, 3), (2, 2), (2, 5))
    return KronTerm((left,), (up, down), jnp.float32(0.5))


def lokr() -> KronTerm:
    left_up, left_down, up, down = factors((4, 2), (2, 3), (2, 2), (2, 5))
    return KronTerm((left_up, left_down), (up, down), jnp.float32(0.5))


@pytest.mark.parametrize(("make", "rank"), [(loha, 6), (lokr_of_a_whole_left_factor, 6), (lokr, 4)])
def test_lohas_and_lokrs_are_products_of_the_rank_that_their_formula_says(make, rank):
    term = make()
    up, down = term.factors()
    assert up.shape[1] == down.shape[0] == rank
    delta = term.delta(jnp.zeros(()))
    product = np.asarray(up) @ np.asarray(down)
    np.testing.assert_allclose(product, delta, rtol=1e-5, atol=1e-5)


class Int8(LocalWeight):
    """A weight of bytes with one scale per row, as a quantized network has."""

    value: jax.Array
    scale: jax.Array

    @property
    def shape(self):
        return self.value.shape

    def matmul(self, x, maxima=None):
        return Dense(self.value.astype(jnp.float32) * self.scale[..., None]).matmul(x)


def quantized(weight: Dense) -> Int8:
    value = np.asarray(weight.value)
    scale = np.abs(value).max(-1) / 127
    rounded = np.round(value / scale[..., None]).astype(np.int8)
    return Int8(jnp.asarray(rounded), jnp.asarray(scale))


def dequantized(weight: Int8) -> Dense:
    value = np.asarray(weight.value).astype(np.float32)
    return Dense(jnp.asarray(value * np.asarray(weight.scale)[..., None]))


def is_weight(node) -> bool:
    return isinstance(node, Weight)


def map_weights(function, model):
    return jax.tree.map(
        lambda node: function(node) if is_weight(node) else node, model, is_leaf=is_weight
    )


def test_adapters_can_be_attached_to_quantized_and_to_adapted_weights(flux, tmp_path):
    small = map_weights(quantized, flux)
    exact = map_weights(dequantized, small)
    first, second = (
        read_lora(saved(FORMATS[name](), tmp_path / f"{name}.safetensors"))
        for name in ("kohya", "peft, metadata")
    )
    # Two calls, so that the second one finds weights that are adapted already.
    attached = attach(attach(small, [first], [0.1]), [second], [0.05])
    merged = merge(exact, [first, second], [0.1, 0.05])
    for select, block in (
        (lambda net: net.double.img.qkv.weight, 1),  # of the first adapter
        (lambda net: net.single.linear2.weight, 1),  # of the second
        (lambda net: net.img_in.weight, None),  # not stacked
        (lambda net: net.txt_in.weight, None),  # of neither
    ):
        ours, theirs = select(attached), select(merged)
        if block is not None:
            ours, theirs = jax.tree.map(lambda leaf, n=block: leaf[n], (ours, theirs))
        x = Draw(21)(6, theirs.shape[1])
        expected = x @ effective(theirs).T
        error = np.linalg.norm(ours.matmul(jnp.asarray(x)) - expected)
        assert error <= 1e-5 * np.linalg.norm(expected)
    with pytest.raises(
        WeightsError, match=r"stored as Int8\. Merge into the plain network before, or `attach`"
    ):
        merge(small, [first])


def test_a_new_adapter_changes_nothing_and_training_changes_only_its_factors(flux):
    targets = [r"double\.\d+\.img\.qkv", r"single\.2\.linear1"]
    lora = init_lora(flux, 2, targets, alpha=4.0, key=jax.random.key(0))
    names = {f"{name}.weight" for name in ("double.0.img.qkv", "double.1.img.qkv")}
    assert set(lora.changes["flux"]) == names | {"single.2.linear1.weight"}
    assert same_leaves(merge(flux, [lora]), flux)
    x = jnp.asarray(Draw(23)(6, 32))

    def outputs(model):
        # The layers that are adapted; a whole network would take most of the time to compile.
        first, second = model.double.img.qkv.weight, model.single.linear1.weight
        return [jax.vmap(lambda weight: weight.matmul(x))(weight) for weight in (first, second)]

    goal = [output + 0.1 for output in outputs(flux)]

    def loss(lora, model, *, key):
        del key
        pairs = zip(outputs(attach(model, [lora])), goal, strict=True)
        return sum(jnp.mean(jnp.square(found - wanted)) for found, wanted in pairs)

    # Weight decay would move alpha / rank, if that were trained.
    optimizer, spec = optax.adamw(1e-2, weight_decay=0.1), trainable(lora)
    state = TrainState.create(lora, optimizer, trainable=spec)
    step = make_step(loss, optimizer, ema_decay=0.9, trainable=spec)
    losses = []
    with jax.numpy_dtype_promotion("standard"):  # optax promotes
        for _ in range(40):
            state, value = step(state, flux, key=jax.random.key(0))
            losses.append(float(value))
    assert losses[-1] < 0.9 * losses[0]
    for (change,) in state.model.changes["flux"].values():
        assert float(change.term.factor) == 2.0
        assert np.any(np.asarray(change.term.up) != 0)


def test_init_lora_names_what_is_wrong_and_chooses_the_matrices_of_all_blocks(flux):
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"\['doubel.*'\] match no matrix of this network"):
        init_lora(flux, 2, ["doubel.*"], key=key)
    with pytest.raises(ValueError, match="a rank of at least 1, got 0"):
        init_lora(flux, 0, key=key)
    every = init_lora(flux, 1, key=key).changes["flux"]
    # Two streams of four matrices in each double block, two matrices in each single one.
    assert len(every) == 2 * 8 + 3 * 2
