"""The networks of `fluxjax generate`: loaded one by one, and where their weights lie."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from tqdm import tqdm

from fluxjax.cli.condition_source import ConditionOfSize, ConditionParts
from fluxjax.cli.conditions import load_conditions
from fluxjax.cli.console import complain
from fluxjax.cli.progress import Clock
from fluxjax.cli.request import Request
from fluxjax.devices.offload import fetch, offload, residency
from fluxjax.devices.vae_memory import limit_vae_memory
from fluxjax.generate.load import load_tokenizers
from fluxjax.generate.load_network import load_network
from fluxjax.generate.prompt_batch import distilled_guidance
from fluxjax.generate.text import TextStates
from fluxjax.generate.tokens import Tokenizers
from fluxjax.nets.clip import Clip
from fluxjax.nets.t5 import T5
from fluxjax.nets.transformer import AbstractTransformer
from fluxjax.nets.vae import Vae
from fluxjax.shapes import Array, Float


class LoadedEncoders(NamedTuple):
    """What prompts are encoded with. `clip`: None for a family without it."""

    tokenizers: Tokenizers
    clip: Clip | None
    t5: T5

    def on_device(self) -> "LoadedEncoders":
        """Return the encoders with all weights on the device, as programs take them."""
        clip = None if self.clip is None else fetch(self.clip)
        return self._replace(clip=clip, t5=fetch(self.t5))


class LoadedNetworks(NamedTuple):
    """What a batch is drawn with.

    `guidance`: the distilled scale, for a network that takes one. `conditions`: make what images of
    a size are conditioned on beside their prompts.
    """

    flux: AbstractTransformer
    vae: Vae
    guidance: Float[Array, ""] | None
    conditions: tuple[ConditionOfSize, ...]

    def at_guidance(self, request: Request) -> "LoadedNetworks":
        """Return the networks with a request's distilled scale.

        **Raises:** `ValueError` as `distilled_guidance`.
        """
        scale = distilled_guidance(self.flux, request.defaults, request.distilled)
        return self._replace(guidance=scale)

    @property
    def guidance_number(self) -> float | None:
        """The distilled scale as a number."""
        return None if self.guidance is None else float(self.guidance)

    @property
    def guidance_text(self) -> str:
        """The distilled scale as metadata have it."""
        number = self.guidance_number
        return "none" if number is None else f"{number:g}"


def load_text_encoders(request: Request, clock: Clock) -> LoadedEncoders:
    """Load the tokenizers and text encoders, into host memory if they are to stay there.

    **Raises:** as `load_tokenizers` and `load_network`.
    """
    tokenizers = clock.load("tokenizers", lambda: load_tokenizers(request.model))
    networks: dict[str, Any] = {}
    for name in request.family.text_encoders:
        network = _load(name, request, clock)
        if request.offload_encoders:
            network = offload(network)
        networks[name] = network
    return LoadedEncoders(tokenizers, networks.get("clip"), networks["t5"])


def load_drawing_networks(
    request: Request, clock: Clock, texts: Mapping[str, TextStates]
) -> LoadedNetworks:
    """Load the transformer, the VAE, and what images are conditioned on.

    **Arguments:** `texts`: those of the conditions, from `TextStages.encode_conditions`.
    **Raises:** as `load_network` and `distilled_guidance`; `ValueError` for conditions that the
    transformer does not take.
    """
    transformer = request.family.transformer
    flux = _load(transformer, request, clock)
    request.check_conditions(flux.config)
    scale = distilled_guidance(flux, request.defaults, request.distilled)
    vae = _load("vae", request, clock)
    if request.vae_memory is not None:
        vae = limit_vae_memory(vae, request.vae_memory)
    parts = ConditionParts(
        flux=flux,
        vae=vae,
        load=request.load_of(transformer),
        dtype=request.dtype,
        hooks=clock,
        time_load=clock.load,
        texts=texts,
    )
    conditions = load_conditions(request.conditions, parts)
    return LoadedNetworks(flux, vae, scale, conditions)


def _load(name: str, request: Request, clock: Clock) -> Any:
    options = request.load_of(name)
    return clock.load(name, lambda: load_network(name, request.model, options, note=complain))


def show_residency(
    request: Request, encoders: LoadedEncoders | None, networks: LoadedNetworks | None
) -> None:
    """Print where the weights lie, if --show-memory asks for it.

    **Arguments:** `encoders`, `networks`: None while they are not loaded, or are freed.
    """
    if not request.show_memory:
        return
    networks_by_name = {
        "clip": None if encoders is None else encoders.clip,
        "t5": None if encoders is None else encoders.t5,
        request.family.transformer: None if networks is None else networks.flux,
        "vae": None if networks is None else networks.vae,
    }
    tqdm.write(residency(networks_by_name) + "\n")
