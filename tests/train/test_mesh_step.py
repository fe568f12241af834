"""A training step on a mesh, or in micro-batches, is the step on one device at once."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec
from meshes import mesh_of
from training import AVERAGED, CONFIG, Training, batch_of, jit_gradients, random_flux

from fluxjax.nets import PackedWeight, decode_weights, quantize
from fluxjax.train import mesh_step
from fluxjax.train.config import MethodSettings
from fluxjax.train.mesh_step import StepSettings
from fluxjax.train.place import place_batch

# Sums in another order, through three blocks and their gradients.
BOUND = 1e-5
BETA = 0.9  # of Adam's first moments
STATELESS = optax.sgd(1.0)
AXES = ("data", "fsdp", "tensor", "context")
MESHES = {
    "data and fsdp": dict(data=2, fsdp=4),
    "fsdp, tensor and context": dict(fsdp=2, tensor=2, context=2),
}
ROWS = 5  # a number that no mesh here divides


def relative(found, expected):
    """Return the largest relative error of an array of two pytrees."""
    largest = 0.0
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        largest = max(largest, np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))
    return largest


def stepped(mesh=None, **options):
    """Return the state and the metrics after one step."""
    training = Training(mesh, **options)
    metrics = training.take(batch_of(ROWS))
    return training.state, metrics


def gradients(mesh=None, **options):
    """Return the gradients of the first step."""
    options = {"optimizer": STATELESS, "settings": StepSettings(), **options}
    return Training(mesh, **options).gradients(batch_of(ROWS))


@pytest.fixture(scope="module")
def expected():
    return stepped()


@pytest.fixture(scope="module")
def expected_gradients(expected):
    """What Adam's first moments are a tenth of after the first step."""
    moments = optax.tree.get(expected[0].optimizer, "mu")
    return {name: np.asarray(moment) / (1 - BETA) for name, moment in moments.items()}


@pytest.mark.parametrize("name", MESHES)
def test_a_step_on_a_mesh_is_the_step_on_one_device(expected, name):
    found = stepped(mesh_of(**MESHES[name]))
    # The weights, their average, the optimizer's moments, the loss and the gradient's norm.
    assert relative(found, expected) <= BOUND


@pytest.mark.parametrize("axis", AXES)
def test_gradients_over_one_axis_are_those_on_one_device(expected_gradients, axis):
    found = gradients(mesh_of(**{axis: 2}))
    assert found.keys() == expected_gradients.keys()
    assert relative(found, expected_gradients) <= BOUND


def test_without_one_of_its_sums_over_devices_a_step_is_wrong(expected_gradients, monkeypatch):
    others = tuple(axis for axis in mesh_step.AXES if axis != "tensor")
    monkeypatch.setattr(mesh_step, "AXES", others)
    # The program with all sums is compiled already, and the one without has to go again.
    jit_gradients.clear_cache()
    found = gradients(mesh_of(tensor=2))
    jit_gradients.clear_cache()
    assert relative(found, expected_gradients) > 100 * BOUND


@pytest.mark.parametrize(
    ("sizes", "split"),
    [
        (dict(data=2, fsdp=4), PartitionSpec("fsdp")),
        (dict(fsdp=2, tensor=2, context=2), PartitionSpec(None, ("tensor", "fsdp"))),
        (dict(data=2, tensor=2, context=2), PartitionSpec()),
    ],
    ids=str,
)
def test_gradients_are_added_up_along_the_axes_that_do_not_split_them(sizes, split):
    mesh = mesh_of(**sizes)
    # One number of each device, which tells it from the others in any sum.
    numbers = 2.0 ** np.arange(8).reshape([sizes.get(axis, 1) for axis in AXES])

    def of_device(numbers):
        gradients = {"weight": numbers.reshape(1, 1)}
        return mesh_step.reduce_gradients(gradients, {"weight": split})["weight"].reshape(
            1, 1, 1, 1
        )

    by_device = PartitionSpec(*AXES)
    run = jax.shard_map(
        of_device, mesh=mesh, in_specs=by_device, out_specs=by_device, check_vma=False
    )
    summed = tuple(number for number, axis in enumerate(AXES) if axis not in str(split))
    expected = np.broadcast_to(numbers.sum(summed, keepdims=True), numbers.shape)
    np.testing.assert_array_equal(jax.jit(run)(jnp.asarray(numbers, jnp.float32)), expected)


def test_micro_batches_are_the_batch_at_once(expected, expected_gradients):
    # 5 rows in 3 micro-batches of 2: one row of weight 0 is added.
    alone = gradients(settings=StepSettings(accumulate=3))
    assert relative(alone, expected_gradients) <= BOUND
    settings = StepSettings(accumulate=3, ema_decay=AVERAGED.ema_decay)
    on_mesh = stepped(mesh_of(fsdp=2), settings=settings, remat=True)
    assert relative(on_mesh, expected) <= BOUND


def test_added_rows_have_no_weight_and_draws_do_not_depend_on_the_mesh():
    batch = batch_of(5)
    rows, shared = place_batch(batch, Training.empty, mesh_of(data=4), accumulate=2)
    assert rows.weight.shape == (8,)
    np.testing.assert_array_equal(rows.weight, [*batch.weight, 0, 0, 0])
    np.testing.assert_array_equal(rows.place[:5], range(5))
    assert shared.empty.txt.shape == batch.text.txt.shape[1:]


SPLIT = mesh_of(fsdp=2, tensor=2)
ADAPTERS = {
    "lora": MethodSettings(method="lora", rank=2),
    "lokr": MethodSettings(method="lokr", rank=2, divisor=4),
    "dora": MethodSettings(method="dora", rank=2),
    "layers": MethodSettings(
        method="layers", targets=(r"double\.1\..*", r"single\.0\.linear[12]", "img_in")
    ),
}


def test_a_lora_is_trained_alike_on_a_mesh():
    one, many = [Training(mesh, method=ADAPTERS["lora"]) for mesh in (None, SPLIT)]
    before = {key: np.asarray(leaf) for key, leaf in one.weights.items()}
    metrics = [training.take(batch_of(ROWS)) for training in (one, many)]
    assert relative((many.state, metrics[1]), (one.state, metrics[0])) <= BOUND
    # The ups of an adapter are zeros before the step, so that only some of the factors move.
    assert max(relative(one.state.model[key], leaf) for key, leaf in before.items()) > 1e-4


@pytest.mark.parametrize("name", ["lokr", "dora", "layers"])
def test_other_adapters_and_layers_have_the_same_gradients_on_a_mesh(name):
    mesh = mesh_of(fsdp=2, context=2) if name == "dora" else SPLIT
    one, many = [gradients(place, method=ADAPTERS[name]) for place in (None, mesh)]
    assert relative(many, one) <= BOUND
    assert max(np.abs(np.asarray(leaf)).max() for leaf in one.values()) > 1e-4


def test_a_dora_is_not_split_over_tensor():
    with pytest.raises(ValueError, match="Use fsdp or context"):
        stepped(mesh_of(tensor=2), method=ADAPTERS["dora"])


def test_untrained_blocks_stay_bitwise_and_the_rest_of_a_stack_is_kept():
    training = Training(method=ADAPTERS["layers"])
    before = random_flux()
    training.take(batch_of(2))
    after = training.step.part.join(training.state.model, training.frozen)
    first, second = before.double.img.qkv.weight.value, after.double.img.qkv.weight.value
    np.testing.assert_array_equal(first[0], second[0])
    assert not np.array_equal(first[1], second[1])
    np.testing.assert_array_equal(before.txt_in.weight.value, after.txt_in.weight.value)
    assert not np.array_equal(before.img_in.bias, after.img_in.bias)


def test_bfloat16_weights_have_moments_and_an_average_in_float32():
    method = MethodSettings(method="layers", targets=("img_in",), weights_dtype="bfloat16")
    lost, kept = [
        Training(
            method=method,
            settings=StepSettings(ema_decay=0.5, stochastic_rounding=stochastic),
        )
        for stochastic in (False, True)
    ]
    for training in (lost, kept):
        assert training.state.model["img_in.weight"].dtype == jnp.bfloat16
        assert training.state.ema["img_in.weight"].dtype == jnp.float32
        for number in range(2):
            training.take(batch_of(2, seed=number))
    start = np.asarray(lost.weights["img_in.weight"], np.float32)
    changed = [
        np.mean(np.asarray(training.state.model["img_in.weight"], np.float32) != start)
        for training in (lost, kept)
    ]
    # Updates of 1e-3 beside weights of 0.2, which are 1e-3 apart, and half of them more.
    assert changed[1] > 0.3
    assert np.all(np.isfinite(np.asarray(kept.state.ema["img_in.weight"])))


@pytest.mark.parametrize("kind", ["lora", "lokr"])
@pytest.mark.parametrize("format", ["nf4", "int8-128"])
def test_an_adapter_beside_packed_weights_gets_the_gradients_beside_their_values(format, kind):
    config = replace(CONFIG, width=64, heads=4, mlp_width=128)  # blocks of 64 values divide these
    packed = quantize(random_flux(config=config), format)
    assert isinstance(packed.single.linear2.weight, PackedWeight)
    method = MethodSettings(method=kind, rank=2, divisor=4)
    found = gradients(network=packed, method=method, remat=True)
    expected = gradients(network=decode_weights(packed, "float32"), method=method, remat=True)
    assert found.keys() == expected.keys()
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected)) > 1e-3
    assert relative(found, expected) <= BOUND
