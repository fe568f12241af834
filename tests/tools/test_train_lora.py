"""Training an adapter: reproducible in micro-batches and after interruptions; clear errors."""

import re
import shutil

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_lora
from PIL import Image

from fluxjax import Flux, FluxConfig, WeightsError, read_lora, write_lora
from fluxjax.generate.text import TextStates
from fluxjax.lora import init_lora, trainable
from fluxjax.nets.layers import Linear, gelu
from fluxjax.nets.scan import scan_blocks
from fluxjax.nets.stack import stack
from fluxjax.train.step import TrainState
from fluxjax.zoo import Defaults

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
        Image.fromarray(rng.integers(0, 256, (*size[::-1], len(kind)), np.uint8)).save(
            folder / f"{index}.png"
        )
        (folder / f"{index}.txt").write_text(f"a red star number {index}\n")
    return folder


@pytest.fixture(scope="module")
def flux():
    leaves, structure = jax.tree.flatten(Flux(CONFIG, key=jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return jax.tree.unflatten(
        structure, [0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    )


def fit(flux, output, *options: str):
    """Train on random latents and captions of two sizes.

    **Returns:** the trained adapter and its average.
    """
    rng = np.random.default_rng(0)
    buckets = [
        train_lora.Bucket(
            height,
            32,
            rng.standard_normal((count, height // 8, 64), np.float32),
            TextStates(
                rng.standard_normal((count + 1, 5, 24), np.float32),
                rng.standard_normal((count + 1, 8), np.float32),
            ),
        )
        for height, count in ((32, 5), (48, 2))
    ]
    fixed = [
        "--images",
        ".",
        "--output",
        str(output),
        "--rank",
        "2",
        "--learning-rate",
        "0.02",
        "--ema",
        "0.5",
    ]
    parsed = train_lora.parser().parse_args([*fixed, *options])
    with jax.numpy_dtype_promotion("standard"):  # optax promotes
        average = train_lora.fit(parsed, flux, buckets, Defaults(), jnp.float32)
    lora = init_lora(flux, 2, key=jax.random.key(0))
    optimizer, spec = train_lora.make_optimizer(0.02, parsed.accumulate), trainable(lora)
    path = parsed.state or output.with_suffix(".state")
    return train_lora.load_state(
        path, {}, TrainState.create(lora, optimizer, trainable=spec)
    ).model, average


def test_images_are_scaled_and_cut_to_buckets(images):
    read, captions = train_lora.read_folder(images, 48 * 48)
    assert [image.shape for image in read] == [(48, 48, 3), (48, 48, 3), (32, 64, 3), (32, 64, 3)]
    assert captions[2] == "a red star number 2"
    transparent = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    transparent.save(images / "clear.png")
    assert np.all(train_lora._resized(images / "clear.png", 256) == 1)  # on white
    (images / "clear.png").unlink()


def test_neither_micro_batches_nor_interruptions_change_what_is_trained(flux, tmp_path):
    options = ("--batch", "2", "--accumulate", "2", "--remat", "--caption-dropout", "0.5")
    parts, average = fit(flux, tmp_path / "parts", *options, "--steps", "4")
    assert all(jnp.abs(change.term.up).max() > 0 for (change,) in parts.changes["flux"].values())
    whole, _ = fit(
        flux, tmp_path / "whole", "--batch", "4", "--caption-dropout", "0.5", "--steps", "4"
    )
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        # Adam divides a gradient by its own size, so rounding counts more where that is small.
        assert jnp.linalg.norm(a - b) <= 1e-3 * jnp.linalg.norm(a)
    kept = ("--state", str(tmp_path / "kept"))
    fit(flux, tmp_path / "half", *options, *kept, "--steps", "2")
    _, resumed = fit(flux, tmp_path / "rest", *options, *kept, "--steps", "4")
    assert eqx.tree_equal(average, resumed)
    with pytest.raises(
        ValueError,
        match=r"other settings: seed 0, not 5\. Use the same settings, or another --state",
    ):
        fit(flux, tmp_path / "other", *options, *kept, "--seed", "5")
    for content in (b"", (tmp_path / "kept").read_bytes()[:-100]):
        (tmp_path / "broken").write_bytes(content)
        with pytest.raises(ValueError, match="or is damaged"):
            fit(flux, tmp_path / "broken", *options, "--state", str(tmp_path / "broken"))


def test_a_folder_of_images_becomes_an_adapter_file(tmp_path, images):
    output = tmp_path / "style.safetensors"
    options = [
        "--images",
        str(images),
        "--output",
        str(output),
        "--size",
        "32",
        "--steps",
        "1",
        "--batch",
        "1",
        "--rank",
        "2",
    ]
    with jax.numpy_dtype_promotion("standard"):
        train_lora.main([*options, "--save-dtype", "bfloat16", "--target", r"single\.\d\.linear2"])
    assert len(read_lora(output).changes["flux"]) == 4
    with pytest.raises(SystemExit, match="exists already"):
        train_lora.main(options)


def test_an_adapter_that_changes_nothing_is_not_written(flux, tmp_path):
    with pytest.raises(WeightsError, match="changes nothing"):
        write_lora(tmp_path / "a.safetensors", init_lora(flux, 2, key=jax.random.key(0)))
    assert not (tmp_path / "a.safetensors").exists()


def test_images_without_captions_are_an_error(images, tmp_path):
    options = ["--images", str(tmp_path), "--output", str(tmp_path / "a.safetensors")]
    with pytest.raises(SystemExit, match="There are no images"):
        train_lora.main(options)
    shutil.copy(images / "0.png", tmp_path / "bare.png")
    with pytest.raises(
        SystemExit,
        match=r"1 of 1 images in .* have no caption\. Write that of bare\.png to bare\.txt",
    ):
        train_lora.main(options)
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
