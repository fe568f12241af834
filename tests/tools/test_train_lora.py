"""Training an adapter by the tool: its options are a configuration, and a folder becomes a file."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_lora
from PIL import Image

from fluxjax import Flux, FluxConfig, WeightsError, read_lora, write_lora
from fluxjax.lora import init_lora
from fluxjax.nets.activations import gelu
from fluxjax.nets.layers import Linear
from fluxjax.nets.scan import scan_blocks
from fluxjax.nets.stack import stack

CONFIG = FluxConfig(
    width=32,
    heads=2,
    double_depth=1,
    single_depth=1,
    mlp_width=128,
    context=24,
    pooled=8,
    in_channels=64,
    out_channels=64,
    rope_axes=(4, 6, 6),
    time_width=16,
)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Images of two aspect ratios, one with alpha, and their captions."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for index, size in enumerate([(40, 40), (64, 64), (60, 30), (90, 47)]):
        kind = "RGBA" if index == 1 else "RGB"
        levels = rng.integers(0, 256, (*size[::-1], len(kind)), np.uint8)
        Image.fromarray(levels).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"a red star number {index}\n")
    return folder


def parsed(*options):
    return train_lora.parser().parse_args(["--images", "photos", "--output", "a", *options])


def test_options_are_a_configuration():
    config = train_lora.config_of(parsed("--batch", "2", "--accumulate", "3", "--guidance", "2"))
    assert (config.batch, config.accumulate) == (6, 3)
    assert config.loss.guidance == (2.0, 2.0)
    assert config.optimizer.warm_up == 20
    assert config.train.method == "lora"
    assert train_lora.config_of(parsed("--state", "kept")).checkpoints.folder == "kept"


def test_a_folder_of_images_becomes_an_adapter_file(tmp_path, images):
    output = tmp_path / "style.safetensors"
    options = ["--images", str(images), "--output", str(output), "--size", "32", "--steps", "1"]
    options += ["--batch", "1", "--rank", "2"]
    with jax.numpy_dtype_promotion("standard"):
        train_lora.main([*options, "--save-dtype", "bfloat16", "--target", r"single\.\d\.linear2"])
    assert len(read_lora(output).changes["flux"]) == 4
    with pytest.raises(SystemExit):
        train_lora.main(options)


def test_an_adapter_that_changes_nothing_is_not_written(tmp_path):
    flux = Flux(CONFIG, key=jax.random.key(0))
    with pytest.raises(WeightsError, match="changes nothing"):
        write_lora(tmp_path / "a.safetensors", init_lora(flux, 2, key=jax.random.key(0)))
    assert not (tmp_path / "a.safetensors").exists()


def test_rematerialised_gradients_are_the_same_and_need_less_memory():
    blocks = stack(lambda key: Linear(32, 32, key=key), 16, key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (256, 32))

    def compiled(remat: bool):
        def loss(blocks):
            # Each step of a block is something that a gradient keeps.
            return jnp.sum(
                scan_blocks(blocks, x, lambda block, x: gelu(jnp.sin(gelu(block(x)))), remat=remat)
            )

        return jax.jit(jax.grad(loss)).lower(blocks).compile()

    plain, remat = compiled(False), compiled(True)
    for a, b in zip(jax.tree.leaves(plain(blocks)), jax.tree.leaves(remat(blocks)), strict=True):
        assert jnp.linalg.norm(a - b) <= 1e-5 * jnp.linalg.norm(a)
    kept, recomputed = (one.memory_analysis().temp_size_in_bytes for one in (plain, remat))
    assert recomputed < 0.6 * kept


def test_a_file_of_half_precision_holds_the_rounded_factors(tmp_path):
    names = ["single.0.linear2", "double.0.img.out"]
    lora = init_lora(
        Flux(CONFIG, key=jax.random.key(0)),
        3,
        [re.escape(name) for name in names],
        key=jax.random.key(2),
    )
    lora = jax.tree.map(lambda x: x + 0.3 if x.ndim else x, lora)
    write_lora(tmp_path / "a.safetensors", lora, to="kohya", dtype=jnp.bfloat16)
    read = read_lora(tmp_path / "a.safetensors").changes["flux"]
    for name in names:
        ((was,), (now,)) = (changes[f"{name}.weight"] for changes in (lora.changes["flux"], read))
        assert now.term.up.dtype == now.term.down.dtype == jnp.bfloat16
        assert jnp.array_equal(now.term.up, was.term.up.astype(jnp.bfloat16))
        assert jnp.array_equal(now.term.down, was.term.down.astype(jnp.bfloat16))
