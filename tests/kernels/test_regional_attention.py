"""Attention by labels and by regions, against masks written by hand."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import draw

from fluxjax import attention
from fluxjax.kernels import Attention, BlockSizes, RegionalAttention, labelled_attention
from fluxjax.kernels.cudnn_attention import cudnn_labelled_attention

BASE, TOKENS, IMAGE = 2, 3, 6  # tokens of the base prompt, of each region's prompt, of the image
TEXT = BASE + 2 * TOKENS
# The image: two tokens of the first region, one of both, two of the second, one of none.
IMG_LABELS = jnp.int32([1, 1, 3, 2, 2, 4])
TXT_LABELS = jnp.int32([1] * TOKENS + [2] * TOKENS)
VISIBLE = np.array(
    [
        # texts of the first region, of the second, the image
        *3 * [[1, 1, 1, 0, 0, 0, 1, 1, 1, 0, 0, 0]],
        *3 * [[0, 0, 0, 1, 1, 1, 0, 0, 1, 1, 1, 0]],
        *2 * [[1, 1, 1, 0, 0, 0, 1, 1, 1, 0, 0, 0]],
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0],
        *2 * [[0, 0, 0, 1, 1, 1, 0, 0, 1, 1, 1, 0]],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1],
    ],
    bool,
)
LABELS = jnp.concatenate([TXT_LABELS, IMG_LABELS])
# The same sums in another order.
BOUND = 1e-6


def heads(tokens=TEXT + IMAGE):
    return draw(3, tokens, 2, 8)


def masked(q, k, v, visible):
    """Attention under a mask, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    logits = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[-1])
    weights = np.where(visible, np.exp(logits), 0)
    return np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), v)


@eqx.filter_jit
def run(regional, q, k, v):
    return regional(q, k, v, TEXT)


def regions(base_ratio, **options):
    return RegionalAttention(TXT_LABELS, IMG_LABELS, jnp.float32(base_ratio), **options)


def in_regions(x):
    return x[:, BASE:]


def without_regions(x):
    return jnp.concatenate([x[:, :BASE], x[:, TEXT:]], axis=1)


@pytest.mark.parametrize(
    "implementation", ["xla", Attention("xla_chunked", BlockSizes(q=5)), "flash_tpu", None]
)
def test_tokens_see_those_that_share_a_bit(implementation):
    q, k, v = in_regions(heads())
    attend = jax.jit(labelled_attention, static_argnums=4)
    found = attend(q, k, v, LABELS, implementation)
    np.testing.assert_allclose(found, masked(q, k, v, VISIBLE), atol=BOUND)


def test_gradients_of_chunks_are_those_of_the_mask():
    q, k, v = in_regions(heads())
    bias = jnp.broadcast_to(jnp.where(VISIBLE, 0.0, -1e9), (2, *VISIBLE.shape))
    chunks = Attention("xla_chunked", BlockSizes(q=5))

    @jax.jit
    def gradients(*x):
        by_labels = jax.grad(lambda *x: (labelled_attention(*x, LABELS, chunks) ** 2).sum(), (0, 2))
        by_bias = jax.grad(lambda *x: (attention(*x, bias=bias) ** 2).sum(), (0, 2))
        return by_labels(*x), by_bias(*x)

    for found, expected in zip(*gradients(q, k, v), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def in_place_of_cudnn(monkeypatch) -> list:
    """Replace cuDNN's attention by XLA's in JAX's function, since there is no GPU here.

    **Returns:** a list to which it adds the shapes of masks.
    """
    masks = []

    def plain(q, k, v, *, mask, implementation, **options):
        assert implementation == "cudnn"
        assert len(q) == len(mask)
        masks.append(mask.shape[1:])
        return original(q, k, v, mask=mask, implementation="xla", **options)

    original = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", plain)
    # From JAX 0.12 on a program that another test has traced is not traced again.
    jax.clear_caches()
    return masks


@pytest.mark.parametrize("tokens", [12, 11])
def test_cudnn_gets_one_mask_for_all_heads_and_padding_that_no_token_sees(tokens, monkeypatch):
    q, k, v = in_regions(heads())[:, :tokens]
    masks = in_place_of_cudnn(monkeypatch)
    found = cudnn_labelled_attention(q, k, v, LABELS[:tokens], 8**-0.5)
    assert set(masks) == {(1, 12, 12)}
    expected = masked(q, k, v, VISIBLE[:tokens, :tokens])
    np.testing.assert_allclose(found, expected, atol=BOUND)


def test_examples_of_a_batch_with_labels_of_their_own_and_their_gradients(monkeypatch):
    q, k, v = in_regions(heads())
    masks = in_place_of_cudnn(monkeypatch)
    scales, labels = jnp.array([0.5, 1.0, 2.0]), jnp.stack([LABELS, LABELS[::-1], LABELS])

    def attend_cudnn(q, k, v, labels):
        return cudnn_labelled_attention(q, k, v, labels, 8**-0.5)

    def attend_plain(q, k, v, labels):
        return labelled_attention(q, k, v, labels, "xla")

    def losses(attend):
        def loss(scale, labels):
            return (attend(scale * q, k, scale * v, labels) ** 2).sum()

        # Both of labels and of scales, one after the other.
        over_labels = jax.vmap(jax.value_and_grad(loss), in_axes=(None, 0))
        return jax.jit(jax.vmap(over_labels, in_axes=(0, None)))(scales, labels)

    expected = losses(attend_plain)
    for found, one in zip(losses(attend_cudnn), expected, strict=True):
        assert found.shape == (3, 3)
        np.testing.assert_allclose(found, one, rtol=1e-5)
    assert set(masks) == {(1, 12, 12)}


def test_jax_traces_cudnn_for_a_batch_with_labels_of_their_own(monkeypatch):
    # What it looks for on this machine, before it traces.
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91900)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)
    x, labels = jnp.zeros((3, 12, 6, 64), jnp.bfloat16), jnp.stack([LABELS] * 3)

    def loss(x, labels):
        return cudnn_labelled_attention(x, x, x, labels, 0.1).astype(jnp.float32).sum()

    traced = str(jax.make_jaxpr(jax.vmap(jax.grad(loss)))(x, labels))
    assert "dot_product_attention_fwd" in traced
    assert "bf16[3,1,12,12]" in traced  # the mask
    assert "bf16[3,6,12,12]" not in traced


def test_the_image_mixes_the_base_prompt_and_its_regions():
    q, k, v = heads()
    base = masked(*without_regions(jnp.stack([q, k, v])), True)
    regional = masked(*in_regions(jnp.stack([q, k, v])), VISIBLE)
    found = run(regions(0.3), q, k, v)
    np.testing.assert_allclose(found[:BASE], base[:BASE], atol=BOUND)
    np.testing.assert_allclose(found[BASE:TEXT], regional[: 2 * TOKENS], atol=BOUND)
    image = 0.3 * base[BASE:] + 0.7 * regional[2 * TOKENS :]
    np.testing.assert_allclose(found[TEXT:], image, atol=BOUND)


def test_a_base_ratio_of_1_is_the_base_prompt_bit_by_bit():
    x = heads()
    plain = jax.jit(attention)(*without_regions(x))
    found = run(regions(1.0), *x)
    np.testing.assert_array_equal(found[:BASE], plain[:BASE])
    np.testing.assert_array_equal(found[TEXT:], plain[BASE:])


def test_a_region_does_not_depend_on_the_text_of_another():
    regional = regions(0.0)

    @jax.jit
    def image(v):
        q, k, _ = heads()
        return regional(q, k, v, TEXT)[TEXT:].sum((1, 2))

    by_value = jax.jit(jax.jacrev(image))(heads()[2])
    used = np.abs(np.asarray(by_value)).sum((2, 3)) > 0
    expected = np.concatenate([np.zeros((IMAGE, BASE), bool), VISIBLE[2 * TOKENS :]], axis=1)
    np.testing.assert_array_equal(used, expected)


def test_images_of_a_batch_compute_regions_only_if_one_needs_them():
    q, k, v = heads()

    def program(axes):
        def one(base_ratio):
            regional = RegionalAttention(TXT_LABELS, IMG_LABELS, base_ratio, image_axes=axes)
            return regional(q, k, v, TEXT)

        return jax.vmap(one, axis_name="images")

    ratios = jnp.float32([0.3, 1.0])
    together = program(("images",))
    assert "cond[" in str(jax.make_jaxpr(together)(ratios))
    assert "cond[" not in str(jax.make_jaxpr(program(()))(ratios))
    found = jax.jit(together)(ratios)
    for row, ratio in zip(found, ratios, strict=True):
        np.testing.assert_allclose(row[TEXT:], run(regions(ratio), q, k, v)[TEXT:], atol=BOUND)


def test_other_boxes_and_shares_compile_nothing():
    traced = []

    @eqx.filter_jit
    def attend(regional, q, k, v):
        traced.append(None)
        return regional(q, k, v, TEXT)

    x = heads()
    attend(regions(0.3), *x)
    attend(RegionalAttention(TXT_LABELS, IMG_LABELS[::-1], jnp.float32(0.9)), *x)
    assert len(traced) == 1


def test_labels_are_those_of_these_tokens():
    with pytest.raises(ValueError, match="6 text tokens and 6 image tokens, got 8 and 5"):
        regions(0.3)(*heads(TEXT + IMAGE - 1), TEXT)
    with pytest.raises(ValueError, match="is unknown"):
        labelled_attention(*in_regions(heads()), LABELS, "flash")
