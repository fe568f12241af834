"""Images that drawn ones follow by a ControlNet: their edges, depth, poses or colors."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import equinox as eqx
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from fluxjax.arguments import convert_arguments
from fluxjax.generate.condition_images import encode_image
from fluxjax.generate.conditioning import AddedCondition, Conditioning
from fluxjax.generate.controls import Control, control_times
from fluxjax.generate.draw_hooks import DrawHooks
from fluxjax.generate.image_to_image import check_image
from fluxjax.generate.latents import check_size, pack_latents
from fluxjax.nets.controlnet import ControlNet
from fluxjax.nets.controlnet_config import ControlNetConfig
from fluxjax.nets.vae import Vae
from fluxjax.numeric import check_finite
from fluxjax.shapes import Image, ScalarLike, Times
from fluxjax.zoo import FLUX1

CONTROL_MODES: Mapping[str, int] = {
    "canny": 0,
    "tile": 1,
    "depth": 2,
    "blur": 3,
    "pose": 4,
    "gray": 5,
    "low_quality": 6,
}
"""The kinds of condition of InstantX's and Shakker's Union, and their numbers."""


@convert_arguments
@dataclass(frozen=True, kw_only=True)
class ControlSettings:
    """How a ControlNet is used.

    `mode`: the kind of the condition, for a network with modes: a name of `CONTROL_MODES`, or a
    number. `scale`: the factor of what the network adds; 0.3 to 0.9 are usual, 0 is without it.
    `start`, `end`: it is on for the steps from one to the other, as shares of all steps in [0, 1];
    of a schedule whose first steps are left out, these are counted too. `shared`: whether the
    negative prompt gets what the network adds for the positive one, as in diffusers; otherwise it
    is run for the negative prompt too, as in XLabs' code. `guidance`: the distilled scale that the
    network reads; None takes that of the images.

    **Raises:** `ValueError` for an unknown mode, a scale that is not finite, or shares that are not
    in [0, 1] and in order.
    """

    mode: str | int | None = None
    scale: float = 0.7
    start: float = 0.0
    end: float = 1.0
    shared: bool = True
    guidance: float | None = None

    def __post_init__(self):
        check_finite("ControlSettings", scale=self.scale, guidance=self.guidance)
        if not 0 <= self.start <= self.end <= 1:
            raise ValueError(
                "`ControlSettings(start, end)` are shares of the steps, 0 <= start <= end <= 1, "
                f"got {self.start:g} and {self.end:g}. The defaults are all steps."
            )
        if isinstance(self.mode, str) and self.mode not in CONTROL_MODES:
            raise ValueError(
                f"`ControlSettings(mode)` is one of {', '.join(CONTROL_MODES)}, or a number, got "
                f"{self.mode!r}."
            )


class ControlNetCondition(AddedCondition):
    """A ControlNet with the image that it follows, the same for all images that are drawn.

    `control`: as part of a conditioning. `start`, `end`: the shares of the steps in which it is on.
    """

    control: Control
    start: ScalarLike
    end: ScalarLike

    def add(self, conditioning: Conditioning) -> Conditioning:
        """Return a conditioning with this control, after those that it has."""
        tokens = conditioning.img_ids.shape[-2]
        own = _token_count(self.control)
        if own != tokens:
            raise ValueError(
                f"`ControlNetCondition` follows an image of {own} tokens, and the images that are "
                f"drawn have {tokens}. Make it of an image of their size."
            )
        return replace(conditioning, control=(*conditioning.control, self.control))

    def add_to_negative(self, conditioning: Conditioning) -> Conditioning:
        return conditioning if self.control.shared else self.add(conditioning)

    def for_times(self, times: Times) -> AddedCondition:
        window = control_times(times, start=self.start, end=self.end)
        return eqx.tree_at(lambda one: (one.control.low, one.control.high), self, window)


@convert_arguments
def controlnet_condition(
    controlnet: ControlNet,
    vae: Vae | None,
    image: Image,
    settings: ControlSettings = ControlSettings(),
    *,
    dtype: DTypeLike,
    mesh: Mesh | None = None,
    hooks: DrawHooks | None = None,
) -> ControlNetCondition:
    """Return what images are conditioned on that follow another one by a ControlNet.

    Pass it in `DrawSettings(conditions=...)`; with several ControlNets, what they add is summed.

    **Arguments:** `controlnet`: from `load_controlnet`, on a mesh from `shard`. `vae`: encodes the
    image; None for a network that takes the image itself (XLabs). `image`: what the network was
    trained on, such as edges, in [-1, 1], of the size that is drawn. `settings`: how it is used.
    `dtype`: of the VAE's activations. `mesh`: of devices, if the VAE is from `shard`. `hooks`: run
    the encoder.
    **Raises:** `ValueError` for an image that is not finite, or whose sides are not multiples of 16
    pixels; for a missing VAE; for a mode that the network does not have, or that it lacks.
    **Source:** the latent is the mean of its posterior; diffusers draws a sample.
    """
    call = "controlnet_condition"
    check_image(call, image)
    check_size(f"`{call}(image)`", *image.shape[:2])
    config = controlnet.config
    mode = _mode_number(settings, config)
    condition = image
    if not config.hint_image:
        if vae is None:
            raise ValueError(
                f"`{call}(vae)` is needed: this ControlNet follows a latent. Pass the model's VAE."
            )
        latent = encode_image(vae, image, dtype=dtype, mesh=mesh, hooks=hooks)
        condition = pack_latents(latent)
    control = Control(
        controlnet,
        condition,
        mode=None if mode is None else jnp.int32(mode),
        # Arrays, so that other numbers compile nothing.
        scale=jnp.float32(settings.scale),
        low=jnp.float32(-1),
        high=jnp.float32(1),
        guidance=None if settings.guidance is None else jnp.float32(settings.guidance),
        shared=settings.shared,
    )
    return ControlNetCondition(control, jnp.float32(settings.start), jnp.float32(settings.end))


def _mode_number(settings: ControlSettings, config: ControlNetConfig) -> int | None:
    """Return the number of the mode. **Raises:** `ValueError` for one that there is not."""
    mode, modes = settings.mode, config.modes
    number = CONTROL_MODES[mode] if isinstance(mode, str) else mode
    if modes is None and number is not None:
        raise ValueError(
            f"`ControlSettings(mode)` is {mode!r}, and this ControlNet has no modes. Leave it out."
        )
    if modes is not None and (number is None or not 0 <= number < modes):
        raise ValueError(
            f"`ControlSettings(mode)` is {mode!r}, and this ControlNet has modes 0 to {modes - 1}. "
            "Choose what its image shows, such as 'canny'."
        )
    return number


def _token_count(control: Control) -> int:
    """Return how many image tokens a condition is for."""
    if control.condition.ndim == 2:
        return len(control.condition)
    height, width, _ = control.condition.shape
    return height * width // FLUX1.latent.token_side**2
