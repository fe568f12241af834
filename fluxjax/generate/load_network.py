"""One network as it is drawn with: with adapters, on a mesh, its blocks rounded or streamed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from fluxjax.checkpoint.kinds import KINDS
from fluxjax.checkpoint.load import load_quantized
from fluxjax.devices.shard import shard
from fluxjax.devices.specs import shardings
from fluxjax.devices.stream import stream_blocks
from fluxjax.generate.load import (
    load_chroma,
    load_clip,
    load_controlnet,
    load_flux,
    load_t5,
    load_vae,
    plan_of_source,
)
from fluxjax.lora.adapter import Lora
from fluxjax.lora.attach import attach
from fluxjax.lora.merge import merge, notes_of
from fluxjax.lora.merged_plan import merged_plan
from fluxjax.lora.networks import is_plain
from fluxjax.nets.packed import decode_weights
from fluxjax.nets.rounding import quantize
from fluxjax.nets.stack import unroll


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How networks are loaded for drawing.

    `dtype`: of the weights; None keeps the files'. `files`: files or folders whose networks replace
    the model's, by "flux" (its transformer, of any family), "vae", "t5" and "clip". `mesh`: of
    devices that share the networks. `adapters`: with their scales, merged into the networks that
    they change, or attached to those whose matrices are packed in their files. `quantize`,
    `stream`, `unroll`: for the blocks of the transformer, of T5 and of ControlNets: round their
    matrices as `fluxjax.quantize` does; keep them in host memory (on a CPU: in their files) and
    fetch one block at a time, with adapters attached rather than merged; compile each block by
    itself.
    """

    dtype: DTypeLike | None = None
    files: Mapping[str, str | Path] = field(default_factory=dict)
    mesh: Mesh | None = None
    adapters: tuple[tuple[Lora, float], ...] = ()
    quantize: str | None = None
    stream: bool = False
    unroll: bool = False

    def source_of(self, name: str, model: str | Path) -> str | Path:
        """Return where a network is loaded from: its own file, or the model."""
        return self.files.get("flux" if name in _TRANSFORMERS else name, model)

    def adapters_of(self, name: str) -> tuple[tuple[Lora, float], ...]:
        """Return the adapters that change a network."""
        role = KINDS[name].role
        return tuple((lora, scale) for lora, scale in self.adapters if role in lora.changes)


_LOADERS: Mapping[str, Callable[..., Any]] = {
    "flux": load_flux,
    "chroma": load_chroma,
    "clip": load_clip,
    "t5": load_t5,
    "vae": load_vae,
    "controlnet": load_controlnet,
}
_TRANSFORMERS = ("flux", "chroma")
_WITH_LARGE_BLOCKS = ("flux", "chroma", "t5", "controlnet")
"""The networks whose blocks are worth rounding, streaming and unrolling."""


def load_network(
    name: str,
    source: str | Path,
    options: LoadOptions,
    *,
    note: Callable[[str], None] = lambda text: None,
) -> Any:
    """Load one network for drawing.

    **Arguments:** `name`: "flux", "chroma", "clip", "t5", "vae" or "controlnet". `note`: called
    with a line for each part of an adapter that has no effect.
    """
    source = options.source_of(name, source)
    load_one = partial(_LOADERS[name], source, dtype=options.dtype)
    has_blocks = name in _WITH_LARGE_BLOCKS
    if has_blocks and options.stream:
        return _load_with_streamed_blocks(name, load_one, options, note)
    adapters = options.adapters_of(name)
    rounded = options.quantize if has_blocks else None
    mesh = options.mesh
    if rounded is not None and mesh is None:
        # Block by block, so that it is never whole in memory.
        network = _load_rounded(name, source, options, note)
    else:
        if mesh is not None:
            load_one = partial(load_one, sharding=lambda network: shardings(network, mesh))
        network = load_one()
        if rounded is not None:
            network = decode_weights(network, donate=True)
        if adapters:
            network = _with_adapters(network, adapters, note)
        if rounded is not None:
            network = quantize(network, rounded, donate=True)
    if has_blocks and options.unroll:
        network = unroll(network, donate=True)
    return network if mesh is None else shard(network, mesh)


def _with_adapters(
    network: Any, adapters: tuple[tuple[Lora, float], ...], note: Callable[[str], None]
) -> Any:
    """Return a network with adapters merged; attached, if its matrices stay packed."""
    _note_adapters(network, adapters, note)
    loras, scales = zip(*adapters, strict=True)
    if is_plain(network):
        return merge(network, loras, scales, donate=True)
    return attach(network, loras, scales)


def _load_rounded(
    name: str, source: str | Path, options: LoadOptions, note: Callable[[str], None]
) -> Any:
    """Load a network whose blocks' matrices are rounded as they are read, adapters added before."""
    assert options.quantize is not None
    plan = plan_of_source(KINDS[name], source)
    adapters = options.adapters_of(name)
    if adapters:
        _note_adapters(plan.network, adapters, note)
        loras, scales = zip(*adapters, strict=True)
        plan = merged_plan(plan, loras, scales)
    return load_quantized(plan, options.quantize, dtype=options.dtype)


def _load_with_streamed_blocks(
    name: str, load_one: Callable[..., Any], options: LoadOptions, note: Callable[[str], None]
) -> Any:
    """Load a network whose blocks stay in host memory, or in their files where that is the device's
    own memory."""
    if jax.default_backend() == "cpu":
        network = load_one(stream=True)
    else:
        device = jax.local_devices()[0]
        host = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
        network = stream_blocks(load_one(sharding=host))
    adapters = options.adapters_of(name)
    if not adapters:
        return network
    _note_adapters(network, adapters, note)
    loras, scales = zip(*adapters, strict=True)
    return attach(network, loras, scales)


def _note_adapters(
    network: eqx.Module, adapters: tuple[tuple[Lora, float], ...], note: Callable[[str], None]
) -> None:
    """Call `note` with what is worth knowing of each adapter on a network."""
    for lora, _ in adapters:
        for text in notes_of(network, lora):
            note(f"an adapter ({lora.format}): {text}")
