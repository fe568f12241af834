import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from fluxjax import image_ids, initial_noise, pack_latents, unpack_latents
from fluxjax.generate import seed_key
from fluxjax.generate.latents import aspect_size

SIDES = st.integers(1, 6).map(lambda n: 16 * n)


@settings(max_examples=8)  # each shape compiles
@given(height=SIDES, width=SIDES)
def test_unpack_inverts_pack(height, width):
    latent = initial_noise(jax.random.key(0), height, width)
    np.testing.assert_array_equal(unpack_latents(pack_latents(latent), height, width), latent)


def test_a_token_holds_its_patch_channel_by_channel():
    latent = jnp.arange(16 * 4 * 6, dtype=jnp.float32).reshape(16, 4, 6)
    packed = pack_latents(latent)
    row, column = 1, 2  # the token of that row and column of a 2 x 3 grid
    expected = [
        latent[c, 2 * row + dy, 2 * column + dx]
        for c in range(16)
        for dy in range(2)
        for dx in range(2)
    ]
    np.testing.assert_array_equal(packed[3 * row + column], jnp.array(expected))


def test_ids_are_zero_row_column_in_row_major_order():
    expected = [(0, row, column) for row in range(2) for column in range(3)]
    np.testing.assert_array_equal(image_ids(32, 48), np.array(expected, np.float32))


def test_ids_line_up_with_packed_tokens():
    rows, columns = jnp.meshgrid(jnp.arange(4.0), jnp.arange(6.0), indexing="ij")
    packed = pack_latents(jnp.stack([rows, columns] * 8))
    np.testing.assert_array_equal(packed[:, [0, 4]] // 2, image_ids(32, 48)[:, 1:])


def test_noise_is_standard_normal_and_one_key_gives_one_noise():
    noise = initial_noise(jax.random.key(1), 512, 512)
    assert noise.shape == (16, 64, 64)
    assert noise.dtype == jnp.float32
    # 65,536 draws: the mean is within 4 / sqrt(65536), the variance within 4 sqrt(2 / 65536).
    assert abs(float(noise.mean())) < 4 / 256
    assert abs(float(noise.var()) - 1) < 4 * (2 / 65536) ** 0.5
    np.testing.assert_array_equal(noise, initial_noise(jax.random.key(1), 512, 512))


@pytest.mark.parametrize("size", [(100, 128), (128, 0), (-16, 16), (8, 16)])
def test_a_size_that_is_no_multiple_of_16_is_refused_with_the_nearest(size):
    for call in (lambda: initial_noise(jax.random.key(0), *size), lambda: image_ids(*size)):
        with pytest.raises(
            ValueError, match=r"multiples of 16 pixels, got .*The nearest such size is \d+x\d+"
        ):
            call()


def test_odd_cells_and_wrong_token_counts_are_refused():
    with pytest.raises(ValueError, match="even rows and columns, got 7x8"):
        pack_latents(jnp.zeros((16, 7, 8)))
    with pytest.raises(ValueError, match="needs 4 tokens, got 6"):
        unpack_latents(jnp.zeros((6, 64)), 32, 32)


@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_the_key_of_a_seed_is_that_of_64_bits(implementation):
    with jax.default_prng_impl(implementation):
        for seed in (0, 7, 2**31, 2**32 - 1):  # those that JAX does not cut either
            np.testing.assert_array_equal(
                jax.random.key_data(seed_key(seed)), jax.random.key_data(jax.random.key(seed))
            )
        words = np.asarray(jax.random.key_data(seed_key(2**62 + 2**40 + 3)))[:2]
    # The seed's high and low words.
    assert words.tolist() == [(2**62 + 2**40) >> 32, 3]


def test_seeds_that_differ_in_the_high_word_alone_give_other_noise():
    noise = [initial_noise(seed_key(seed), 16, 16) for seed in (0, 2**32, 2**33, 2**63 - 1)]
    assert all(abs(a - b).max() > 1 for i, a in enumerate(noise) for b in noise[:i])


@pytest.mark.parametrize("seed", [-1, 2**63, True, 1.0, "1", None])
def test_what_is_no_seed_is_refused(seed):
    with pytest.raises(ValueError, match=r"needs a whole number from 0 to 2\^63 - 1"):
        seed_key(seed)


def test_an_aspect_gives_multiples_of_16_of_about_as_many_pixels():
    assert aspect_size(1.0, 1024 * 1024) == (1024, 1024)
    assert aspect_size(16 / 9, 1024 * 1024) == (768, 1360)
    assert aspect_size(3 / 4, 128 * 128) == (144, 112)
    assert aspect_size(8.0, 16 * 16) == (16, 48)
