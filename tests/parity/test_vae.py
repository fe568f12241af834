import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import (
    BFLOAT16_RATIO,
    FLOAT32_BOUND,
    as_bfloat16,
    normal,
    perturbed,
    relative_error,
    to_torch,
)

from fluxjax.generate.load import load_vae

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

CONFIGS = {
    "one resnet": dict(block_out_channels=(16, 24, 32, 32), layers_per_block=1, norm_num_groups=8),
    "wider at the bottom": dict(
        block_out_channels=(8, 16, 24, 40), layers_per_block=2, norm_num_groups=4
    ),
    "all one width": dict(
        block_out_channels=(32, 32, 32, 32), layers_per_block=3, norm_num_groups=32
    ),
    "official width": dict(
        block_out_channels=(128, 256, 512, 512), layers_per_block=1, norm_num_groups=32
    ),
}


@pytest.fixture(params=CONFIGS, scope="module")
def pair(request, tmp_path_factory):
    theirs = perturbed(
        diffusers.AutoencoderKL(
            **CONFIGS[request.param],
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=16,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    )
    folder = tmp_path_factory.mktemp("vae")
    theirs.save_pretrained(folder)
    return theirs, load_vae(folder), normal(2, 48, 80, 3), normal(2, 16, 6, 10)


def encode_theirs(network, images):
    with torch.no_grad():
        posterior = network.encode(to_torch(np.moveaxis(images, -1, 1), network.dtype)).latent_dist
    return (posterior.mean - 0.1159) * 0.3611, posterior


def decode_theirs(network, latents):
    with torch.no_grad():
        z = to_torch(latents, network.dtype) / 0.3611 + 0.1159
        return network.decode(z).sample.movedim(1, -1)


def test_the_mean_latent_equals_diffusers(pair):
    theirs, ours, images, _ = pair
    assert (
        relative_error(jax.vmap(ours.encode)(images), encode_theirs(theirs, images)[0])
        <= FLOAT32_BOUND
    )


def test_the_posterior_variance_equals_diffusers(pair):
    theirs, ours, images, _ = pair
    _, log_variance = jax.vmap(ours.moments)(images)
    assert (
        relative_error(jnp.exp(0.5 * log_variance), encode_theirs(theirs, images)[1].std)
        <= FLOAT32_BOUND
    )


def test_a_decoded_image_equals_diffusers(pair):
    theirs, ours, _, latents = pair
    assert (
        relative_error(jax.vmap(ours.decode)(latents), decode_theirs(theirs, latents))
        <= FLOAT32_BOUND
    )


def test_bfloat16_is_as_close_to_float32_as_diffusers(pair):
    theirs, ours, images, latents = pair
    exact, exact_image = encode_theirs(theirs, images)[0], decode_theirs(theirs, latents)
    theirs.bfloat16()
    latent_error = relative_error(encode_theirs(theirs, images)[0], exact)
    image_error = relative_error(decode_theirs(theirs, latents), exact_image)
    theirs.float()
    half = jax.tree.map(as_bfloat16, ours)
    assert (
        relative_error(jax.vmap(half.encode)(as_bfloat16(images)), exact)
        <= BFLOAT16_RATIO * latent_error
    )
    assert (
        relative_error(jax.vmap(half.decode)(as_bfloat16(latents)), exact_image)
        <= BFLOAT16_RATIO * image_error
    )
