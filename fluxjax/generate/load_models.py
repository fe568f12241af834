"""Whole models: all networks that drawing needs, and the tokenizers."""

import html
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from fluxjax.arguments import convert_arguments
from fluxjax.checkpoint.defaults import load_defaults
from fluxjax.checkpoint.family import family_of_source
from fluxjax.devices.offload import offload
from fluxjax.generate.load import load_tokenizers
from fluxjax.generate.load_network import LoadOptions, load_network
from fluxjax.generate.tokens import Tokenizers
from fluxjax.nets.clip import Clip
from fluxjax.nets.summary import network_size
from fluxjax.nets.t5 import T5
from fluxjax.nets.transformer import AbstractTransformer
from fluxjax.nets.vae import Vae
from fluxjax.zoo import Defaults, Family


class Models(NamedTuple):
    """All that text to image needs.

    `clip`: None for models that read prompts by T5 alone. `flux`: the transformer, also of another
    family. `defaults`: how the model is meant to be sampled. `mesh`: the devices that the networks
    lie on, if they are sharded.
    """

    tokenizers: Tokenizers
    clip: Clip | None
    t5: T5
    flux: AbstractTransformer
    vae: Vae
    defaults: Defaults
    mesh: Mesh | None = None

    def __repr__(self) -> str:
        lines = [f"Models({self.defaults}, mesh={self.mesh})"]
        for name in ("flux", "clip", "t5", "vae"):
            network = getattr(self, name)
            if network is not None:
                lines.append(f"{name}: {network!r}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """Return a table of the networks, for notebooks."""
        rows = [
            "<tr><th></th><th>network</th><th>parameters</th><th>memory</th><th>dtypes</th></tr>"
        ]
        for name in ("flux", "clip", "t5", "vae"):
            network = getattr(self, name)
            if network is not None:
                parameters, memory, dtypes = network_size(network)
                cells = (name, type(network).__name__, f"{parameters:,}", memory, dtypes)
                rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
        text = html.escape(f"{self.defaults}, mesh={self.mesh}")
        return f"<table>{''.join(rows)}</table><p>{text}</p>"

    @property
    def networks(self) -> tuple[eqx.Module, ...]:
        """The networks that there are, the transformer first."""
        found = (self.flux, self.t5, self.clip, self.vae)
        return tuple(network for network in found if network is not None)


def assemble_models(
    tokenizers: Tokenizers,
    networks: Mapping[str, Any],
    *,
    family: Family,
    defaults: Defaults,
    mesh: Mesh | None,
) -> Models:
    """Return models of loaded networks.

    **Arguments:** `networks`: by the names that the family has for them.
    """
    return Models(
        tokenizers,
        networks.get("clip"),
        networks["t5"],
        networks[family.transformer],
        networks["vae"],
        defaults,
        mesh,
    )


@convert_arguments
def load_models(
    source: str | Path,
    *,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    offload_encoders: bool = False,
    quantize: str | None = None,
    stream: bool = False,
    files: Mapping[str, str | Path] | None = None,
) -> Models:
    """Load every part of a model, from a zoo name, a diffusers folder or a hub id.

    **Arguments:** `dtype`: of the weights; None keeps the files'. `mesh`: of devices, from
    `make_mesh`, each of which gets its part of the networks; `text_to_image` then runs on it.
    `offload_encoders`: keep the text encoders in host memory, from which they are fetched while
    they are used. `quantize`: round the blocks' matrices of the transformer and T5, as
    `load_flux`. `stream`: keep these blocks in host memory (on a CPU: in their files) and fetch one
    at a time. `files`: that replace networks, by "flux", "vae", "t5" and "clip".
    **Raises:** as `load_flux`; `ValueError` for a mesh that does not divide heads and hidden
    features, for `stream` with `quantize` or `mesh`, and for a file of a network that there is not.
    """
    if stream and (quantize is not None or mesh is not None):
        raise ValueError(
            "`load_models(stream=True)` passes the weights as they are through one device. Leave "
            "out quantize= and mesh=."
        )
    known = {"flux", *family_of_source(source).networks}
    unknown = sorted(set(files or {}) - known)
    if unknown:
        raise ValueError(
            f"`load_models(files)` replaces {', '.join(sorted(known))} of this model, got "
            f"{unknown[0]!r}. Name one of these."
        )
    options = LoadOptions(
        dtype=dtype, mesh=mesh, quantize=quantize, stream=stream, files=dict(files or {})
    )
    return load_parts(source, lambda name: options, offload_encoders=offload_encoders)


def load_parts(
    source: str | Path,
    options_of: "Callable[[str], LoadOptions]",
    *,
    offload_encoders: bool,
    load: Callable[[str, Callable[[], Any]], Any] = lambda name, function: function(),
    note: Callable[[str], None] = lambda text: None,
) -> Models:
    """Load every part of a model.

    **Arguments:** `options_of`: the name of a network -> how it is loaded, all on the same mesh.
    `load`: (name of a part, function) -> function(), which loads it. `note`: as for `load_network`.
    """
    family = family_of_source(source)
    tokenizers = load("tokenizers", lambda: load_tokenizers(source))
    networks = {}
    for name in family.networks:

        def load_one(name: str = name) -> eqx.Module:
            network = load_network(name, source, options_of(name), note=note)
            return (
                offload(network) if offload_encoders and name in family.text_encoders else network
            )

        networks[name] = load(name, load_one)
    mesh = options_of(family.transformer).mesh
    return assemble_models(
        tokenizers, networks, family=family, defaults=load_defaults(source), mesh=mesh
    )
