import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import (
    BFLOAT16_RATIO,
    FLOAT32_BOUND,
    as_bfloat16,
    perturbed,
    relative_error,
    to_torch,
)

from fluxjax.generate.load import load_clip, load_t5

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CLIPS = {
    "end by id": dict(
        vocab_size=90,
        hidden_size=48,
        intermediate_size=100,
        num_hidden_layers=3,
        num_attention_heads=3,
        max_position_embeddings=20,
        eos_token_id=88,
        hidden_act="quick_gelu",
    ),
    "end by the largest id": dict(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=11,
        eos_token_id=2,
        hidden_act="gelu",
    ),
    "two heads, tanh": dict(
        vocab_size=70,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=5,
        num_attention_heads=2,
        max_position_embeddings=30,
        eos_token_id=69,
        hidden_act="gelu_new",
        layer_norm_eps=1e-3,
    ),
    "official width": dict(
        vocab_size=200,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=2,
        num_attention_heads=12,
        max_position_embeddings=77,
        eos_token_id=2,
        hidden_act="quick_gelu",
    ),
}
T5S = {
    "odd depth": dict(
        vocab_size=90,
        d_model=48,
        d_kv=16,
        d_ff=100,
        num_layers=3,
        num_heads=5,
        relative_attention_num_buckets=32,
        relative_attention_max_distance=128,
    ),
    "few buckets": dict(
        vocab_size=50,
        d_model=32,
        d_kv=24,
        d_ff=64,
        num_layers=1,
        num_heads=2,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=12,
    ),
    "narrow heads": dict(
        vocab_size=60,
        d_model=64,
        d_kv=8,
        d_ff=40,
        num_layers=4,
        num_heads=8,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=64,
    ),
    "official width": dict(
        vocab_size=100,
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=1,
        num_heads=64,
        relative_attention_num_buckets=32,
        relative_attention_max_distance=128,
    ),
}


def ids(rows: int, tokens: int, below: int) -> np.ndarray:
    return np.random.default_rng(0).integers(3, below, (rows, tokens)).astype(np.int32)


@pytest.fixture(params=CLIPS, scope="module")
def clips(request, tmp_path_factory):
    config = transformers.CLIPTextConfig(**CLIPS[request.param], bos_token_id=0, pad_token_id=1)
    theirs = perturbed(transformers.CLIPTextModel(config))
    folder = tmp_path_factory.mktemp("clip")
    theirs.save_pretrained(folder)
    end = config.vocab_size - 1 if config.eos_token_id == 2 else config.eos_token_id
    prompts = ids(3, config.max_position_embeddings, end)
    for row, length in enumerate((4, 7, len(prompts[0]) - 1)):
        prompts[row, length:] = end
    return theirs, load_clip(folder), prompts


def test_clip_equals_transformers_in_every_state_and_pooled(clips):
    theirs, ours, prompts = clips
    with torch.no_grad():
        expected = theirs(to_torch(prompts, torch.long))
    assert (
        relative_error(jax.vmap(ours.hidden_states)(prompts), expected.last_hidden_state)
        <= FLOAT32_BOUND
    )
    assert relative_error(jax.vmap(ours)(prompts), expected.pooler_output) <= FLOAT32_BOUND


def test_clip_in_bfloat16_is_as_close_to_float32_as_transformers(clips):
    theirs, ours, prompts = clips
    with torch.no_grad():
        exact = theirs(to_torch(prompts, torch.long)).pooler_output
        reference = theirs.bfloat16()(to_torch(prompts, torch.long)).pooler_output
        theirs.float()
    half = jax.vmap(jax.tree.map(as_bfloat16, ours))(prompts)
    assert half.dtype == jnp.bfloat16
    assert relative_error(half, exact) <= BFLOAT16_RATIO * relative_error(reference, exact)


@pytest.fixture(params=T5S, scope="module")
def t5s(request, tmp_path_factory):
    config = transformers.T5Config(
        **T5S[request.param],
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        tie_word_embeddings=False,
    )
    theirs = perturbed(transformers.T5EncoderModel(config))
    folder = tmp_path_factory.mktemp("t5")
    theirs.save_pretrained(folder)
    prompts = ids(2, 150 if config.d_model < 100 else 40, config.vocab_size)
    prompts[1, 10:] = 0
    return theirs, load_t5(folder), prompts


def test_t5_equals_transformers_padding_unmasked(t5s):
    theirs, ours, prompts = t5s
    with torch.no_grad():
        expected = theirs(to_torch(prompts, torch.long)).last_hidden_state
    assert relative_error(jax.vmap(ours)(prompts), expected) <= FLOAT32_BOUND


def test_t5_in_bfloat16_is_as_close_to_float32_as_transformers(t5s, platform):
    theirs, ours, prompts = t5s
    with torch.no_grad():
        exact = theirs(to_torch(prompts, torch.long)).last_hidden_state
        reference = theirs.bfloat16()(to_torch(prompts, torch.long)).last_hidden_state
        theirs.float()
    half = jax.vmap(jax.tree.map(as_bfloat16, ours))(prompts)
    assert half.dtype == jnp.bfloat16
    assert relative_error(half, exact) <= BFLOAT16_RATIO * relative_error(reference, exact)


def test_t5_in_float16_stays_finite_where_the_residual_stream_exceeds_its_range(t5s):
    _, ours, prompts = t5s
    # Each MLP then adds some 1e6 to the stream; float16 ends at 65,504.
    large = jax.tree_util.tree_map_with_path(
        lambda path, x: 1e6 * x if "down" in jax.tree_util.keystr(path) else x, ours
    )
    exact = jax.vmap(large)(prompts)
    half = jax.vmap(lambda ids: large(ids, dtype=jnp.float16))(prompts)
    # float16 has 11 bits: 5e-4 a rounding, some ten of them in a row.
    assert relative_error(half, exact) <= 1e-2
