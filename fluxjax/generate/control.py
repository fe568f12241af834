"""Control images: edges or depth that the drawn image follows, as FLUX.1 Canny and Depth do."""

from jax.sharding import Mesh
from jax.typing import DTypeLike

from fluxjax.arguments import convert_arguments
from fluxjax.generate.channels import ConcatCondition
from fluxjax.generate.condition_images import encode_image
from fluxjax.generate.draw_hooks import DrawHooks
from fluxjax.generate.image_to_image import check_image
from fluxjax.generate.latents import check_size, pack_latents
from fluxjax.nets.vae import Vae
from fluxjax.shapes import Image


@convert_arguments
def control_condition(
    vae: Vae,
    image: Image,
    *,
    dtype: DTypeLike,
    mesh: Mesh | None = None,
    hooks: DrawHooks | None = None,
) -> ConcatCondition:
    """Return what FLUX.1 Canny or Depth is conditioned on: a control image.

    Its packed latent follows the noise in each token: [noise 64 | control 64].

    **Arguments:** `image`: in [-1, 1], of the size that is drawn; edges white on black (see
    `canny_edges`), or depth with what is near bright, from -1 for the farthest to 1 for the nearest
    point. `dtype`: of the VAE's activations. `mesh`: of devices, if the VAE is from `shard`.
    `hooks`: run the encoder.
    **Raises:** `ValueError` for an image that is not finite, or whose sides are not multiples of 16
    pixels.
    **Source:** Black Forest Labs 2024, FLUX.1 tools. The latent is the mean of its posterior, as
    there; diffusers draws a sample.
    """
    check_image("control_condition", image)
    check_size("`control_condition(image)`", *image.shape[:2])
    latent = encode_image(vae, image, dtype=dtype, mesh=mesh, hooks=hooks)
    return ConcatCondition(pack_latents(latent))
