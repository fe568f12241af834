"""Guidance and caching against diffusers."""

import jax.numpy as jnp
import numpy as np
import pytest
from reference import FLOAT32_BOUND, normal, perturbed, relative_error, to_torch

from fluxjax import flow_times, image_ids, load_flux
from fluxjax.flow import Guided, Projected, ZeroStar, sample
from fluxjax.generate import CachedFlux, Conditioning, FirstBlock
from fluxjax.kernels import isolated_attention

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

HEIGHT, WIDTH, TXT_TOKENS, HEADS, HEAD_DIM = 32, 48, 7, 2, 16
CONFIG = dict(
    num_layers=3,
    num_single_layers=2,
    num_attention_heads=HEADS,
    attention_head_dim=HEAD_DIM,
    axes_dims_rope=(4, 6, 6),
    joint_attention_dim=24,
    pooled_projection_dim=16,
    guidance_embeds=False,
    in_channels=16,
)


def test_isolated_attention_equals_that_of_the_reference_pag():
    """diffusers has it for Stable Diffusion 3; of two rows the second is the perturbed one."""
    from diffusers.models.attention_processor import Attention, PAGJointAttnProcessor2_0

    width, img_tokens = HEADS * HEAD_DIM, 6
    theirs = perturbed(
        Attention(
            width,
            added_kv_proj_dim=width,
            heads=HEADS,
            dim_head=HEAD_DIM,
            out_dim=width,
            context_pre_only=False,
            bias=True,
        )
    )
    img, txt = (
        to_torch(normal(1, tokens, width, seed=tokens)) for tokens in (img_tokens, TXT_TOKENS)
    )
    with torch.no_grad():
        out, txt_out = PAGJointAttnProcessor2_0()(
            theirs, torch.cat([img, img]), torch.cat([txt, txt])
        )
        q, k, v = (
            torch.cat([of_txt(txt), of_img(img)], 1)[0].reshape(-1, HEADS, HEAD_DIM).numpy()
            for of_txt, of_img in (
                (theirs.add_q_proj, theirs.to_q),
                (theirs.add_k_proj, theirs.to_k),
                (theirs.add_v_proj, theirs.to_v),
            )
        )
        mixed = isolated_attention(
            jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), TXT_TOKENS
        ).reshape(-1, width)
        ours = (
            theirs.to_out[0](to_torch(mixed[TXT_TOKENS:])),
            theirs.to_add_out(to_torch(mixed[:TXT_TOKENS])),
        )
    assert relative_error(ours[0], out[1]) <= FLOAT32_BOUND
    assert relative_error(ours[1], txt_out[1]) <= FLOAT32_BOUND


@pytest.mark.parametrize("momentum", [None, -0.5])
@pytest.mark.parametrize("bound", [float("inf"), 2.0])
def test_projected_guidance_of_estimates_equals_the_reference(momentum, bound):
    from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance

    rule = Projected(0.3, bound, momentum)
    buffer = None if momentum is None else MomentumBuffer(momentum)
    memory = rule.init(jnp.zeros((5, 4)))
    for seed, t in enumerate((1.0, 0.7, 0.4)):
        x, positive, negative = normal(3, 5, 4, seed=seed)
        guided, memory = rule.with_memory(
            *map(jnp.asarray, (x, np.float32(t), positive, negative, np.float32(4.0))), memory
        )
        # diffusers counts the scale from 0, this package from 1, as in classifier-free guidance.
        theirs = normalized_guidance(
            *(to_torch(x - t * v)[None] for v in (positive, negative)),
            guidance_scale=3.0,
            momentum_buffer=buffer,
            eta=0.3,
            norm_threshold=0.0 if bound == float("inf") else bound,
            use_original_formulation=True,
        )
        assert relative_error(x - t * guided, theirs[0]) <= FLOAT32_BOUND


def test_the_optimised_scale_of_zero_star_equals_the_reference():
    from diffusers.guiders.classifier_free_zero_star_guidance import cfg_zero_star_scale

    x, positive, negative = normal(3, 5, 4)
    scale = cfg_zero_star_scale(*(to_torch(v).reshape(1, -1) for v in (positive, negative))).item()
    guided = ZeroStar()(
        *map(jnp.asarray, (x, np.float32(0.5), positive, negative, np.float32(4.0)))
    )
    assert (
        relative_error(guided, scale * negative + 4 * (positive - scale * negative))
        <= FLOAT32_BOUND
    )


@pytest.mark.parametrize(("threshold", "reuses"), [(0.05, False), (0.6, True), (0.8, True)])
def test_the_first_block_cache_reuses_when_the_reference_does(tmp_path, threshold, reuses):
    from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

    theirs = perturbed(diffusers.FluxTransformer2DModel(**CONFIG))
    theirs.save_pretrained(tmp_path)
    ours = load_flux(tmp_path)
    apply_first_block_cache(theirs, FirstBlockCacheConfig(threshold=threshold))
    tokens = (HEIGHT // 16) * (WIDTH // 16)
    noise, txt, vec = normal(tokens, 16, seed=1), normal(TXT_TOKENS, 24, seed=2), normal(16, seed=3)
    times, ids = flow_times(8), image_ids(HEIGHT, WIDTH)
    with torch.no_grad(), theirs.cache_context("cond"):
        x = to_torch(noise)[None]
        for t, u in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
            v = theirs(
                hidden_states=x,
                encoder_hidden_states=to_torch(txt)[None],
                pooled_projections=to_torch(vec)[None],
                timestep=torch.tensor([t]),
                img_ids=to_torch(ids),
                txt_ids=torch.zeros(TXT_TOKENS, 3),
                return_dict=False,
            )[0]
            x = x + (u - t) * v
    conditioning = Conditioning(jnp.asarray(txt), jnp.asarray(vec), ids)
    velocity = Guided(CachedFlux(ours, FirstBlock(threshold)), conditioning)
    result = sample(velocity, jnp.asarray(noise), times)
    assert (int(result.memory.positive.reused) > 0) == reuses
    assert relative_error(result.x, x[0]) <= FLOAT32_BOUND
