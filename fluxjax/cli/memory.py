"""The plan of the memory of a request: what fits on this machine, and what is changed for it."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache

from fluxjax.cli.console import complain
from fluxjax.cli.request import Request, configs_of, demand_of
from fluxjax.generate.device_memory import MachineMemory, machine_memory
from fluxjax.generate.limits import first_device, gigabytes
from fluxjax.generate.memory_plan import Choice, Job, MemoryPlan, plan_memory
from fluxjax.generate.network_bytes import NOTHING, STREAMED, NetworkBytes, bytes_of_source
from fluxjax.nets.quantized import EIGHT_BITS


def job_of(request: Request, *, picture: bool = False) -> Job:
    """Return what is drawn for a request, and with which networks.

    **Arguments:** `picture`: whether a command draws it from a picture: all networks are then
    loaded first, and text encoders wait in the host's memory.
    """
    configs = configs_of(request)
    family, dtype = request.family, request.load.dtype
    sizes: dict[str, NetworkBytes] = {}
    for name in family.networks:
        config = configs.flux if name == family.transformer else None
        source = request.load.source_of(name, request.model)
        sizes[name] = bytes_of_source(name, source, config=config, dtype=dtype)
    beside, image_encoders = _condition_bytes(request)
    has_file = request.prompts is not None
    rows = request.batch if has_file else max(request.batch, len(request.draws))
    return Job(
        demand=demand_of(request)._replace(rows=rows),
        configs=configs,
        text=sizes["t5"],
        clip=sizes.get("clip", NOTHING),
        transformer=sizes[family.transformer],
        vae=sizes["vae"],
        beside=beside,
        image_encoders=image_encoders,
        encodes_images=picture or _starts_from_image(request) or bool(request.conditions),
        keeps_encoders=picture or has_file or request.keep_encoders,
        encodes_beside=picture or has_file,
        can_free=not picture and not has_file,
        prompts=request.batch if has_file else 1,
        vae_memory=request.vae_memory,
    )


def _starts_from_image(request: Request) -> bool:
    return request.line is not None and request.line.init_image is not None


def _condition_bytes(request: Request) -> tuple[NetworkBytes, int]:
    """Return the sizes of networks that stay beside the transformer, and of those that do not."""
    beside, freed = NOTHING, 0
    seen: set[tuple[str, str]] = set()
    for condition in request.conditions:
        for network in condition.networks:
            if (network.kind, network.source) in seen:
                continue
            seen.add((network.kind, network.source))
            size = bytes_of_source(network.kind, network.source, dtype=request.load.dtype)
            if network.stays:
                beside = beside.plus(size)
            else:
                freed += size.on_device(None)
    return beside, freed


def with_plan(request: Request, *, picture: bool = False) -> Request:
    """Return a request with what the device's memory makes necessary; one line says what that is.

    On a mesh, on a CPU, and where the memory is not known, it is returned as it is.

    **Arguments:** `picture`: as for `job_of`.
    """
    machine = machine_memory(first_device())
    if request.load.mesh is not None or machine.is_cpu or machine.pool is None:
        return request
    fixed = request.fixed
    if picture:
        fixed = replace(fixed, offloads=True)
    plan = plan_memory(job_of(request, picture=picture), machine, fixed)
    if not plan.fits:
        _note(_does_not_fit(plan, machine))
    elif plan.is_needed:
        _note(f"{described_choice(plan.choice)}, so that {_fits_text(plan, machine)}")
    return with_choice(request, plan.choice)


@cache  # so that a file of pictures has one note, not one for each of its lines
def _note(text: str) -> None:
    complain(f"{text} (`fluxjax plan` shows all)")


def with_found_plan(expected: Mapping[str, str], found: Mapping[str, str]) -> dict[str, str]:
    """Return metadata that an image should have, with the storages that a plan had chosen for it:
    the plan of this run is made later."""
    planned = found.get("quantize", "")
    if "quantize" in expected or not planned.startswith(("transformer ", "t5 ")):
        return dict(expected)
    return {**expected, "quantize": planned}


def with_choice(request: Request, choice: Choice) -> Request:
    """Return a request in which a plan's choice is carried out."""
    description = dict(request.description)
    rounded = []
    for name, storage in (("transformer", choice.transformer), ("t5", choice.text)):
        if storage is not None and storage != STREAMED:
            rounded.append(f"{name} {storage}")
    if rounded and "quantize" not in description:
        description["quantize"] = ", ".join(rounded)
    return replace(
        request,
        choice=choice,
        batch=choice.batch,
        offload_encoders=choice.offloads,
        description=description,
    )


def described_choice(choice: Choice) -> str:
    """Return a choice in words, on one line."""
    parts = [
        f"the transformer {_described_storage(choice.transformer)}",
        f"T5 {_described_storage(choice.text)}",
        f"batches of {choice.batch}",
    ]
    if choice.offloads:
        parts.append("text encoders wait in host memory")
    if choice.frees:
        parts.append("the transformer is freed before decoding")
    return ", ".join(parts)


def _described_storage(storage: str | None) -> str:
    if storage is None:
        return "as it is"
    if storage == STREAMED:
        return "streamed from host memory block by block"
    return f"in {storage}" + (" (8 bits)" if storage in EIGHT_BITS else "")


def _fits_text(plan: MemoryPlan, machine: MachineMemory) -> str:
    stage, most = plan.most
    assert machine.pool is not None
    return f"the {stage} fits: {gigabytes(most)} of {gigabytes(machine.pool)}"


def _does_not_fit(plan: MemoryPlan, machine: MachineMemory) -> str:
    """Return a note on a plan of which no choice fits, with what may help."""
    stage, most = plan.most
    assert machine.pool is not None
    text = (
        f"the {stage} is expected to need {gigabytes(most)}, and JAX has {gigabytes(machine.pool)} "
        "of this device; lower --width and --height"
    )
    if machine.larger_pool is not None and most < machine.larger_pool:
        text += ", or set XLA_PYTHON_CLIENT_MEM_FRACTION=0.92"
    return text
