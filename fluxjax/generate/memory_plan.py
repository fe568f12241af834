"""How a model is drawn with in the memory that there is: what each stage needs, and the choice."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

import jax.numpy as jnp

from fluxjax.generate.device_memory import MachineMemory
from fluxjax.generate.load_network import LoadOptions
from fluxjax.generate.network_bytes import NOTHING, STREAMED, NetworkBytes
from fluxjax.generate.stage_memory import (
    Configs,
    Demand,
    decode_bytes,
    denoise_bytes,
    encode_bytes,
    text_bytes,
)
from fluxjax.generate.storages import STORAGES
from fluxjax.nets.quantized import EIGHT_BITS

FULL = 0.95
"""Share of JAX's memory that a plan fills: the rest is what lies between arrays."""
HOST_FULL = 0.8
"""Share of the host's free memory that a plan fills."""
BFLOAT16 = "bfloat16"
"""In place of a storage: matrices of a wider dtype rounded to this one."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What can be chosen so that drawing fits.

    `transformer`, `text`: how the matrices of the transformer's and of T5's blocks are kept: the
    name of a storage, `BFLOAT16`, `STREAMED`, or None as they are. `batch`: images in a forward
    pass. `offloads`: whether text encoders wait in the host's memory. `frees`: whether the
    transformer is freed before images are decoded.
    """

    transformer: str | None = None
    text: str | None = None
    batch: int = 1
    offloads: bool = False
    frees: bool = False


@dataclass(frozen=True, kw_only=True)
class Fixed:
    """What the user has chosen; None leaves it to the plan.

    `storage`: of both networks, "" for as they are. `batch`, `offloads`: as in `Choice`.
    `excluded`: storages that are not chosen.
    """

    storage: str | None = None
    batch: int | None = None
    offloads: bool | None = None
    excluded: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is drawn, and with which networks.

    `demand`: of all images at once. `configs`: of the largest networks. `text`, `clip`,
    `transformer`, `vae`: their sizes. `beside`: of networks that stay beside the transformer, as
    ControlNets; `image_encoders`: of those that are freed before it is sampled. `encodes_images`:
    whether the VAE encodes images first. `keeps_encoders`: whether text encoders stay until the
    end. `encodes_beside`: whether prompts are encoded while the transformer is there. `can_free`:
    whether the transformer can be freed before images are decoded. `prompts`: the most that are
    encoded at once. `vae_memory`: bytes from which on the VAE is run in strips; None for never.
    """

    demand: Demand
    configs: Configs
    text: NetworkBytes
    clip: NetworkBytes = NOTHING
    transformer: NetworkBytes
    vae: NetworkBytes
    beside: NetworkBytes = NOTHING
    image_encoders: int = 0
    encodes_images: bool = False
    keeps_encoders: bool = False
    encodes_beside: bool = False
    can_free: bool = True
    prompts: int = 1
    vae_memory: float | None = None


class StageNeed(NamedTuple):
    """What a stage needs on the device: bytes of weights, and of what is computed beside them."""

    weights: int
    temporaries: int

    @property
    def total(self) -> int:
        return self.weights + self.temporaries


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """A choice, and what each stage needs with it.

    `stages`: by name. `plain`: the needs without any choice. `host`: bytes in the host's memory.
    `fits`: whether all of it fits. `is_needed`: whether it differs from no choice at all.
    """

    choice: Choice
    stages: Mapping[str, StageNeed]
    plain: Mapping[str, StageNeed]
    host: int
    fits: bool
    is_needed: bool

    @property
    def most(self) -> tuple[str, int]:
        """The stage that needs the most, and its bytes."""
        return _most(self.stages)


def _most(stages: Mapping[str, StageNeed]) -> tuple[str, int]:
    name = max(stages, key=lambda stage: stages[stage].total)
    return name, stages[name].total


def plan_memory(job: Job, machine: MachineMemory, fixed: Fixed) -> MemoryPlan:
    """Choose how to draw so that each stage fits on the device, with the least loss.

    Tried in this order, each with what comes after it: weights as they are, in bfloat16 if they are
    wider, in 8 bits, streamed from the host's memory; smaller batches; T5 the same, but streamed
    before it is rounded, since it runs once; the transformer freed before images are decoded.

    **Arguments:** `machine`: with a known pool, unless everything is to fit.
    **Returns:** the first choice that fits; if none does, the one whose largest stage is smallest.
    """
    candidates = list(_candidates(job, machine, fixed))
    plain = stage_needs(job, machine, candidates[0])

    def most(choice: Choice) -> tuple[bool, int]:
        # What the host can't hold is no way out, however little the device needs with it.
        lacking = not host_suffices(job, machine, choice)
        return lacking, _most(stage_needs(job, machine, choice))[1]

    fitting = (one for one in candidates if _fits(job, machine, one))
    best = next(fitting, None)
    fits = best is not None
    if best is None:
        best = min(candidates, key=most)
    return MemoryPlan(
        choice=best,
        stages=stage_needs(job, machine, best),
        plain=plain,
        host=_host_bytes(job, best),
        fits=fits,
        is_needed=best != candidates[0],
    )


def _candidates(job: Job, machine: MachineMemory, fixed: Fixed) -> Iterator[Choice]:
    """Return all choices, from that of no loss on."""
    orders = product(
        _storages(job.transformer, machine, fixed, is_text=False),
        _batches(job.demand.rows, fixed),
        _storages(job.text, machine, fixed, is_text=True),
        _offloads(job, fixed),
        (False, True) if job.can_free else (False,),
    )
    for transformer, batch, text, offloads, frees in orders:
        yield Choice(
            transformer=transformer, text=text, batch=batch, offloads=offloads, frees=frees
        )


def _storages(
    network: NetworkBytes, machine: MachineMemory, fixed: Fixed, *, is_text: bool
) -> Sequence[str | None]:
    """Return how the blocks of a network may be kept, from the least loss on."""
    if fixed.storage is not None:
        return [fixed.storage or None]
    if not network.has_blocks:
        return [None]
    found: list[str | None] = [None]
    itemsize = network.matrices / network.numbers
    if itemsize > 2:
        found.append(BFLOAT16)
    near: list[str] = []
    far: list[str] = []
    for storage in STORAGES:
        if storage.name in machine.storages and storage.bits < 8 * itemsize:
            (near if storage.bits >= 8 else far).append(storage.name)
    if machine.is_cpu:
        found += [*near, *far]
    elif is_text:
        found += [STREAMED, *near, *far]
    else:
        found += [*near, STREAMED, *far]
    return [name for name in found if name not in fixed.excluded]


def _batches(images: int, fixed: Fixed) -> Sequence[int]:
    """Return the batches that are tried, the largest first."""
    if fixed.batch is not None:
        return [min(fixed.batch, images)]
    batches = [images]
    while batches[-1] > 1:
        batches.append(-(-batches[-1] // 2))
    return batches


def _offloads(job: Job, fixed: Fixed) -> Sequence[bool]:
    if fixed.offloads is not None:
        return [fixed.offloads]
    # Elsewhere they are freed once prompts are encoded.
    return (False, True) if job.keeps_encoders else (False,)


def stage_needs(job: Job, machine: MachineMemory, choice: Choice) -> dict[str, StageNeed]:
    """Return what each stage needs on the device.

    **Arguments:** `choice`: how networks are stored, how many images are drawn at once, and what is
    freed or offloaded between the stages.
    **Returns:** by the name of the stage, in order; images are encoded only where the job has some.
    """
    demand = job.demand._replace(rows=choice.batch)
    t5, flux, vae = job.configs
    encoders = _encoder_bytes(job, choice)
    stays = job.keeps_encoders and not choice.offloads
    kept = encoders if stays else 0
    transformer = _on_device(job.transformer, choice.transformer)
    transformer += _on_device(job.beside, choice.transformer)
    vae_weights = job.vae.on_device(None)
    drawing = kept + transformer + vae_weights
    encoding = encoders
    if job.encodes_beside:
        encoding += transformer + vae_weights
    prompts = demand._replace(rows=min(job.prompts, choice.batch))
    found = {"text encoders": StageNeed(encoding, text_bytes(prompts, t5))}
    images = encode_bytes(demand, vae, job.vae_memory) if job.encodes_images else 0
    if images or job.image_encoders:
        found["image encoders"] = StageNeed(drawing + job.image_encoders, images)
    denoising = denoise_bytes(
        demand,
        flux,
        plain_attention=machine.plain_attention,
        eight_bits=choice.transformer in EIGHT_BITS,
    )
    found["transformer"] = StageNeed(drawing, denoising)
    decoding = drawing - transformer if choice.frees else drawing
    found["VAE decoder"] = StageNeed(decoding, decode_bytes(demand, vae, job.vae_memory))
    return found


def _encoder_bytes(job: Job, choice: Choice) -> int:
    """Return the bytes of the text encoders on the device."""
    return _on_device(job.text, choice.text) + job.clip.on_device(None)


def _on_device(network: NetworkBytes, storage: str | None) -> int:
    """Return the bytes of a network on the device, in a storage or in bfloat16."""
    if storage == BFLOAT16:
        return network.rest + 2 * network.numbers
    return network.on_device(storage)


def _host_bytes(job: Job, choice: Choice) -> int:
    """Return the bytes that stay in the host's memory at once."""
    drawing = job.transformer.on_host(choice.transformer)
    drawing += job.beside.on_host(choice.transformer)
    text = job.text.on_host(choice.text)
    if choice.offloads and choice.text != STREAMED:
        text += _encoder_bytes(job, choice)
    if job.encodes_beside or job.keeps_encoders:
        return drawing + text
    # One prompt's encoders are freed before the transformer is loaded.
    return max(drawing, text)


def host_suffices(job: Job, machine: MachineMemory, choice: Choice) -> bool:
    """Return whether the host has the memory that a choice takes there, as far as is known."""
    if machine.host is None:
        return True
    return _host_bytes(job, choice) <= HOST_FULL * machine.host


def _fits(job: Job, machine: MachineMemory, choice: Choice) -> bool:
    """Return whether a choice fits in the memory of the host and, if known, of the device."""
    if not host_suffices(job, machine, choice):
        return False
    if machine.pool is None:
        return True
    return _most(stage_needs(job, machine, choice))[1] <= FULL * machine.pool


def with_storage(load: LoadOptions, storage: str | None) -> LoadOptions:
    """Return how a network is loaded whose blocks are kept as a plan has chosen."""
    if storage is None:
        return load
    if storage == BFLOAT16:
        return replace(load, dtype=jnp.bfloat16)
    if storage == STREAMED:
        return replace(load, stream=True, quantize=None)
    return replace(load, quantize=storage, stream=False)


def with_larger_pool(job: Job, machine: MachineMemory, fixed: Fixed) -> MemoryPlan | None:
    """Return the plan for a JAX that takes more of the device; None if that can't be."""
    if machine.larger_pool is None:
        return None
    return plan_memory(job, replace(machine, pool=machine.larger_pool), fixed)
