"""Features that are appended to each image token, as FLUX.1 Fill, Canny and Depth take them."""

from collections.abc import Mapping
from dataclasses import replace

import jax.numpy as jnp

from fluxjax.arguments import convert_arguments
from fluxjax.generate.conditioning import AddedCondition, Conditioning
from fluxjax.nets.chroma_config import ChromaConfig
from fluxjax.nets.flux_config import FluxConfig
from fluxjax.shapes import Array, Float
from fluxjax.zoo import APPENDED_FEATURES

_REMEDIES: Mapping[int, str] = {
    APPENDED_FEATURES["fill"]: (
        "an image and a mask, as FLUX.1 Fill: draw with `fluxjax fill`, `fill_image`, or "
        "`fill_condition` in DrawSettings(conditions=...)"
    ),
    APPENDED_FEATURES["control"]: (
        "a control image, as FLUX.1 Canny and Depth: draw with --control, or with "
        "`control_condition` in DrawSettings(conditions=...)"
    ),
}
"""What models take that read so many features beside the latent's, and how it is passed."""


@convert_arguments
class ConcatCondition(AddedCondition):
    """Features that are appended to those of each noisy token, the same for all images.

    `features`: [img_tokens, features].
    """

    features: Float[Array, "img_tokens features"]

    def add(self, conditioning: Conditioning) -> Conditioning:
        """Return a conditioning with these features, after those that it has."""
        tokens = conditioning.img_ids.shape[-2]
        if len(self.features) != tokens:
            raise ValueError(
                f"`ConcatCondition` has features of {len(self.features)} tokens, and the images "
                f"that are drawn have {tokens}. Make it of an image of their size."
            )
        concat = self.features
        if conditioning.concat is not None:
            shape = (*conditioning.concat.shape[:-1], concat.shape[-1])
            appended = jnp.broadcast_to(concat, shape).astype(conditioning.concat.dtype)
            concat = jnp.concatenate([conditioning.concat, appended], axis=-1)
        return replace(conditioning, concat=concat)


def check_features(call: str, config: FluxConfig | ChromaConfig, features: int) -> None:
    """Check that a transformer takes as many features beside the latent's as it is given.

    **Arguments:** `call`: what the message begins with. `features`: of each token, 0 for none.
    **Raises:** `ValueError` for a network that takes others, or none.
    """
    taken = config.in_channels - config.out_channels
    if features == taken:
        return
    if taken == 0:
        raise ValueError(
            f"{call} got {features} features beside the latent of each token, and this model "
            "takes none. Leave out what it is conditioned on, or load FLUX.1 Fill for a mask, "
            "FLUX.1 Canny or Depth (or their LoRA) for a control image."
        )
    remedy = _REMEDIES.get(taken, f"{taken} features: pass Conditioning(concat=...)")
    given = "none" if features == 0 else f"{features}"
    raise ValueError(
        f"{call} got {given} of the {taken} features that this model takes beside the latent of "
        f"each token. It is conditioned on {remedy}."
    )
