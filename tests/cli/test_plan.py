"""What fits is planned before anything is loaded, said in one line, and then done."""

from dataclasses import replace
from unittest import mock

import jax
import pytest

from fluxjax.cli import device as devices, memory
from fluxjax.cli.console import run_command
from fluxjax.generate import limits
from fluxjax.generate.device_memory import MachineMemory
from fluxjax.generate.image import read_metadata
from fluxjax.generate.memory_plan import FULL, Choice, stage_needs

SMALL = ["--steps", "2", "--height", "32", "--width", "32"]


def machine(pool, **changes):
    return MachineMemory(
        device="a GPU", pool=pool, total=pool, host=10**10, storages=("int8",), **changes
    )


@pytest.fixture
def on_a_device_of(monkeypatch):
    """Plan for a pool between what is needed in 8 bits and as it is, times a factor."""
    memory._note.cache_clear()
    plan = memory.plan_memory

    def replace_pool(factor):
        def plan_for(job, machine, fixed):
            needs = []
            for storage in (None, "int8"):
                stages = stage_needs(job, machine, Choice(transformer=storage, frees=True))
                needs.append(stages["transformer"].total)
            pool = int(factor * sum(needs) / 2 / FULL)
            return plan(job, replace(machine, pool=pool), fixed)

        monkeypatch.setattr(memory, "machine_memory", lambda device: machine(10**9))
        monkeypatch.setattr(memory, "plan_memory", plan_for)

    return replace_pool


def test_plan_prints_stages_and_what_is_chosen(run):
    done = run("plan", "--model", "dev", "--memory", "24GB")
    lines = done.output.splitlines()
    assert lines[0] == "dev: 1 image of 1024x1024, 28 steps, 512 tokens"
    assert lines[1] == "an NVIDIA GPU: 18.0 GB for JAX, 75% of its 24.0 GB"
    assert [line.split("  ")[0] for line in lines[3:7]] == [
        *("stage", "text encoders", "transformer", "VAE decoder"),
    ]
    assert lines[5].split()[1:] == ["12.2", "GB", "0.6", "GB", "12.8", "GB", "24.4", "GB"]
    assert "flux: 23.8 GB as it is, 12.0 GB in int8" in done.output
    assert (
        "`fluxjax generate` chooses: the transformer in int8 (8 bits), T5 as it is" in done.output
    )


def test_plan_takes_the_options_of_generate(run):
    done = run(
        "plan", "a prompt", "--memory", "80GB", "--model", "dev", "--images", "8", "--batch", "2"
    )
    assert "8 images" in done.output
    assert "batches of 2" in done.output
    done = run("plan", "--model", "dev", "--memory", "16GB", "--quantize", "int8")
    assert "does not fit: with the transformer in int8 (8 bits), T5 in int8" in done.output
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION=0.92" in done.output
    done = run("plan", "--lora", "tiny:kraft", "--region", "background=a sea")
    assert "fits: the transformer as it is" in done.output
    assert run("plan", "--memory", "much").code == 2


def test_generate_does_what_fits_and_says_so(run, tmp_path, on_a_device_of):
    on_a_device_of(1)
    done = run("generate", "a red star", *SMALL)
    assert done.code == 0
    (line,) = done.errors
    assert line.startswith(("fluxjax: the transformer in int8", "fluxjax: the transformer in bf"))
    assert line.endswith("(`fluxjax plan` shows all)")
    about = read_metadata(tmp_path / "flux_0.png")
    assert about["quantize"].startswith(("transformer int8", "transformer bfloat16"))
    # What is chosen by an option stays.
    on_a_device_of(100)
    done = run("generate", "a red star", *SMALL, "--quantize", "int8")
    assert not done.errors
    assert read_metadata(tmp_path / "flux_1.png")["quantize"] == "int8"


def test_what_is_not_expected_to_fit_is_said_and_tried(run, tmp_path, on_a_device_of):
    on_a_device_of(0.01)
    done = run("generate", "a red star", *SMALL, "--images", "2")
    assert done.code == 0
    assert "is expected to need" in done.errors[0]
    assert (tmp_path / "flux_1.png").exists()


def test_an_image_of_a_plan_is_that_of_its_line():
    """The plan of a run that goes on is made after it has looked at the images."""
    found = {"prompt": "a", "quantize": "transformer nf4, t5 int8"}
    assert memory.with_found_plan({"prompt": "a"}, found) == found
    own = {"prompt": "a", "quantize": "int8"}
    assert memory.with_found_plan(own, found) == own
    assert memory.with_found_plan({"prompt": "a"}, own) == {"prompt": "a"}


def test_the_device_is_named_once(run):
    done = run("generate", "a red star", *SMALL)
    named = [line for line in done.progress.splitlines() if line.startswith("device")]
    assert len(named) == 1
    assert "CPU" in named[0]


DRIVERS = {
    ("", ()): None,
    (
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat",
        (),
    ): "install -U 'jax[cuda12]'",
    ("NVRM version: NVIDIA Open Kernel Module  580.65.06", ()): "pip install -U 'jax[cuda13]'",
    ("Module  470.82.01", ("jax_cuda12_plugin",)): "Update the driver to 525",
    ("Module  535.1.05", ("jax_cuda13_plugin",)): "needs driver 580 or newer: update the driver",
    ("Module  580.1.05", ("jax_cuda13_plugin",)): "did not start",
}


@pytest.mark.parametrize("case", DRIVERS)
def test_a_gpu_that_jax_does_not_use_is_told_with_the_remedy(tmp_path, monkeypatch, case):
    content, installed = case
    file = tmp_path / "version"
    if content:
        file.write_text(content)
    monkeypatch.setattr(devices.shutil, "which", lambda name: None)
    find = lambda name: object() if name in installed else None  # noqa: E731
    monkeypatch.setattr(devices.importlib.util, "find_spec", find)
    found = devices.unused_gpu(file)
    if DRIVERS[case] is None:
        assert found is None
    else:
        assert "There is an NVIDIA GPU" in found
        assert "in float32" in found
        assert DRIVERS[case] in found


def test_fp8_is_refused_where_it_is_only_converted(run, monkeypatch):
    ampere = mock.Mock(
        spec=jax.Device, platform="gpu", device_kind="NVIDIA A100", compute_capability="8.0"
    )
    monkeypatch.setattr("fluxjax.cli.read_request.first_device", lambda: ampere)
    done = run("generate", "a red star", *SMALL, "--quantize", "fp8")
    assert done.code == 2
    assert (
        "NVIDIA A100 would convert the weights in every step. Use --quantize int8"
        in (done.errors[-1])
    )


def test_memory_that_runs_out_is_one_line(capsys):
    def command():
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1234 bytes.\nBuffers"
        )

    with pytest.raises(SystemExit) as stopped:
        run_command(command, program=False)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "allocate 1234 bytes" in line
    assert "Buffers" not in line
    assert "`fluxjax plan` with the same options shows what fits" in line


def test_the_hosts_free_memory_is_known():
    assert limits.available_host_bytes() > 0
