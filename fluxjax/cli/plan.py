"""The command `fluxjax plan`: what drawing needs in memory, what there is, and the choice."""

import argparse
import json
from dataclasses import asdict, replace
from typing import Any

import jax.numpy as jnp

from fluxjax.cli.jobs import check_together
from fluxjax.cli.memory import described_choice, job_of
from fluxjax.cli.read_request import request_of_options, vae_memory_of
from fluxjax.cli.replay import replayed
from fluxjax.cli.request import Request
from fluxjax.devices import choose_strips
from fluxjax.generate.device_memory import (
    LARGE_FRACTION,
    MachineMemory,
    imagined_machine,
    machine_memory,
    pool_fraction,
)
from fluxjax.generate.limits import check_devices, first_device, gigabytes
from fluxjax.generate.memory_plan import (
    HOST_FULL,
    Job,
    MemoryPlan,
    StageNeed,
    plan_memory,
    with_larger_pool,
)
from fluxjax.generate.network_bytes import STREAMED, NetworkBytes
from fluxjax.generate.storages import STORAGES


def run_plan(options: argparse.Namespace) -> None:
    """Print the plan of what `fluxjax generate` would do with these options."""
    options = replayed(options)
    options.texts = options.texts or [""]
    check_together(options)
    request = request_of_options(options)
    if options.memory is None:
        check_devices()
        machine = machine_memory(first_device())
    else:
        machine = imagined_machine(options.memory)
        if options.dtype is None:
            request = replace(request, dtype=jnp.bfloat16)  # as on every GPU
            request = replace(request, vae_memory=vae_memory_of(options, request))
    job = job_of(request)
    plan = plan_memory(job, machine, request.fixed)
    if options.json:
        print(json.dumps(_values(request, job, machine, plan)))
        return
    lines = [_title(request), _describe_machine(machine), ""]
    lines += _table(plan)
    lines += ["", *_networks(request, job), ""]
    lines += _conclusion(request, job, machine, plan)
    print("\n".join(lines))


def _large_networks(request: Request, job: Job) -> dict[str, NetworkBytes]:
    """Return the networks that can be stored in several ways, by name."""
    return {request.family.transformer: job.transformer, "t5": job.text}


def _values(request: Request, job: Job, machine: MachineMemory, plan: MemoryPlan) -> dict[str, Any]:
    """Return the plan as values of JSON; memory in bytes, None where it is not known."""
    stages = {}
    for name, need in plan.stages.items():
        stages[name] = {
            **need._asdict(),
            "total": need.total,
            "without_choice": plan.plain[name].total,
        }
    networks = {}
    for name, network in _large_networks(request, job).items():
        sizes = {storage.name: network.on_device(storage.name) for storage in STORAGES}
        sizes["as_is"] = network.on_device(None)
        sizes[STREAMED] = network.on_device(STREAMED)
        networks[name] = {"bytes": sizes, "known": network.known}
    return {
        "model": request.model,
        "images": len(request.draws),
        "height": request.height,
        "width": request.width,
        "steps": request.steps,
        "max_length": request.max_length,
        "device": machine.device,
        "memory": machine.pool,
        "host_memory": machine.host,
        "stages": stages,
        "networks": networks,
        "choice": asdict(plan.choice),
        "host": plan.host,
        "fits": plan.fits,
        "needs_choice": plan.is_needed,
    }


def _title(request: Request) -> str:
    """Return a line that says what is drawn."""
    count = len(request.draws)
    images = "1 image" if count == 1 else f"{count} images"
    return (
        f"{request.model}: {images} of {request.width}x{request.height}, {request.steps} steps, "
        f"{request.max_length} tokens"
    )


def _describe_machine(machine: MachineMemory) -> str:
    """Return a line that says what memory there is."""
    if machine.pool is None:
        return f"{machine.device}: its memory is not known"
    text = f"{machine.device}: {gigabytes(machine.pool)} for JAX"
    if machine.larger_pool is not None:
        assert machine.total is not None
        text += f", {pool_fraction():.0%} of its {gigabytes(machine.total)}"
    if machine.host is not None and not machine.is_cpu:
        text += f"; {gigabytes(machine.host)} free in the host"
    return text


def _table(plan: MemoryPlan) -> list[str]:
    """Return the needs of the stages as lines of a table."""
    rows = [("stage", "weights", "temporaries", "together", "without a choice")]
    for name, need in plan.stages.items():
        plain = gigabytes(plan.plain[name].total)
        rows.append((name, *_cells(need), plain))
    columns = zip(*rows, strict=True)
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0])]
        for cell, width in zip(others, widths[1:], strict=True):
            cells.append(cell.rjust(width))
        lines.append("  ".join(cells))
    return lines


def _cells(need: StageNeed) -> tuple[str, str, str]:
    """Return the cells of a stage: its weights, its temporary arrays, and both together."""
    return (
        gigabytes(need.weights),
        gigabytes(need.temporaries),
        gigabytes(need.total),
    )


def _networks(request: Request, job: Job) -> list[str]:
    """Return the bytes of the transformer and of T5 in each storage, one line for each."""
    lines = []
    for name, network in _large_networks(request, job).items():
        cells = [f"{gigabytes(network.on_device(None))} as it is"]
        for storage in STORAGES:
            size = network.on_device(storage.name)
            cells.append(f"{gigabytes(size)} in {storage.name}")
        cells.append(f"{gigabytes(network.on_device(STREAMED))} streamed")
        source = "" if network.known else " (not on this machine: the published sizes)"
        lines.append(f"{name}: {', '.join(cells)}{source}")
    lines.append(f"vae: {_described_vae(request, job)}")
    return lines


def _described_vae(request: Request, job: Job) -> str:
    """Return how images are decoded, in words."""
    memory = job.vae_memory
    if memory is None:
        return "whole images"
    size = (request.height, request.width)
    strips = choose_strips(job.configs.vae, *size, dtype=request.dtype, memory=memory)
    if strips is None:
        return "whole images"
    limit = f"whole, an image would need more than {gigabytes(int(memory))}"
    return f"in strips of the image: {limit} (--vae-memory)"


def _conclusion(request: Request, job: Job, machine: MachineMemory, plan: MemoryPlan) -> list[str]:
    """Return lines that say whether it fits, by which choice, and what would change that."""
    lines = _verdict(job, machine, plan)
    if plan.host:
        lines.append(f"in host memory: {gigabytes(plan.host)}")
    larger = with_larger_pool(job, machine, request.fixed)
    if larger is not None and larger.choice != plan.choice and larger.fits:
        lines.append(
            f"with XLA_PYTHON_CLIENT_MEM_FRACTION={LARGE_FRACTION}, where nothing else uses the "
            f"device: {described_choice(larger.choice)}"
        )
    return lines


def _verdict(job: Job, machine: MachineMemory, plan: MemoryPlan) -> list[str]:
    """Return lines that say whether it fits."""
    stage, most = plan.most
    choice = described_choice(plan.choice)
    lines = []
    if machine.pool is None:
        lines.append(f"not known whether it fits; planned: {choice}")
    elif plan.fits and not plan.is_needed:
        lines.append(f"fits: {choice}")
    elif plan.fits:
        plain = max(need.total for need in plan.plain.values())
        lines.append(
            f"`fluxjax generate` chooses: {choice}; without, {gigabytes(plain)} would be needed"
        )
    else:
        lines.append(
            f"does not fit: with {choice}, the {stage} needs {gigabytes(most)}. Lower --width and "
            "--height, or split it over devices by --mesh fsdp=-1."
        )
        streamed = _streamed_host_bytes(job)
        if machine.host is not None and streamed > HOST_FULL * machine.host:
            lines.append(
                f"streaming from host memory would need {gigabytes(streamed)} of the host's "
                f"{gigabytes(machine.host)}"
            )
    return lines


def _streamed_host_bytes(job: Job) -> int:
    """Return the bytes of the host's memory that streamed blocks would take."""
    return job.transformer.on_host(STREAMED) + job.beside.on_host(STREAMED)
