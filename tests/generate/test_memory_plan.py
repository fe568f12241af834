"""What is chosen for each size of memory, by hand-written cases, and the formulas behind it."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from fluxjax.checkpoint.kinds import FLUX, KINDS
from fluxjax.generate.device_memory import (
    MachineMemory,
    imagined_machine,
    machine_memory,
    pool_fraction,
)
from fluxjax.generate.load_network import LoadOptions
from fluxjax.generate.memory_plan import (
    BFLOAT16,
    Choice,
    Fixed,
    Job,
    plan_memory,
    stage_needs,
    with_larger_pool,
    with_storage,
)
from fluxjax.generate.network_bytes import (
    NOTHING,
    STREAMED,
    bytes_of_config,
    bytes_of_source,
)
from fluxjax.generate.stage_memory import AddedTokens, Configs, Demand
from fluxjax.nets.flux_config import FluxConfig
from fluxjax.nets.t5 import T5Config
from fluxjax.nets.vae import VaeConfig

GB = 10**9
DEMAND = Demand(1, 1024, 1024, 28, 512, jnp.bfloat16)
SIZES = {name: bytes_of_config(KINDS[name]) for name in ("flux", "t5", "clip", "vae", "controlnet")}
DEV = Job(
    demand=DEMAND,
    configs=Configs(T5Config(), FluxConfig(), VaeConfig()),
    text=SIZES["t5"],
    clip=SIZES["clip"],
    transformer=SIZES["flux"],
    vae=SIZES["vae"],
)
FREE = Fixed()


def machine(pool, host=64.0, **changes):
    """Return a GPU of which JAX has so many GB."""
    size = None if pool is None else int(pool * GB)
    return MachineMemory(
        **{
            "device": "a GPU",
            "pool": size,
            "total": size,
            "host": None if host is None else int(host * GB),
            "storages": ("int8",),
            **changes,
        }
    )


def chosen(pool, job=DEV, fixed=FREE, **about):
    plan = plan_memory(job, machine(pool, **about), fixed)
    assert plan.fits
    return plan.choice


BOTH_STREAMED = Choice(transformer=STREAMED, text=STREAMED)
CASES = {
    # Cards of 8 to 80 GB, of which JAX takes three quarters.
    6.0: BOTH_STREAMED,
    9.0: BOTH_STREAMED,
    12.0: Choice(transformer=STREAMED),
    18.0: Choice(transformer="int8"),
    24.0: Choice(transformer="int8"),
    30.0: Choice(),
    60.0: Choice(),
    # The transformer fits beside its own temporaries, and not beside the decoder's.
    26.0: Choice(frees=True),
    13.8: Choice(transformer="int8", frees=True),
}


@pytest.mark.parametrize("pool", CASES)
def test_dev_fits_with_the_least_loss(pool):
    assert chosen(pool) == CASES[pool]


def test_a_card_of_more_memory_never_loses_more():
    order = [STREAMED, "int8", None]
    ranks = [order.index(chosen(pool).transformer) for pool in sorted(CASES)]
    assert ranks == sorted(ranks)


def test_a_batch_shrinks_before_weights_are_rounded():
    many = replace(DEV, demand=DEMAND._replace(rows=64))
    assert chosen(60.0, many) == Choice(batch=64)
    assert chosen(30.0, many) == Choice(batch=8)
    assert chosen(18.0, many) == Choice(transformer="int8", batch=4)
    assert chosen(18.0, many, Fixed(batch=2)).batch == 2
    assert chosen(60.0, many, Fixed(batch=100)).batch == 64


def test_what_the_user_has_chosen_stays():
    assert chosen(60.0, fixed=Fixed(storage="int8")) == Choice(transformer="int8", text="int8")
    assert chosen(60.0, fixed=Fixed(storage=STREAMED)) == BOTH_STREAMED
    plan = plan_memory(DEV, machine(12.0), Fixed(storage="int8"))
    assert not plan.fits  # and is not streamed
    assert plan.choice == Choice(transformer="int8", text="int8", frees=True)
    # Unrolled blocks are not streamed.
    plan = plan_memory(DEV, machine(6.0), Fixed(excluded=(STREAMED,)))
    assert not plan.fits
    assert plan.most[1] > 12 * GB


def test_streaming_needs_the_hosts_memory():
    assert not plan_memory(DEV, machine(12.0, host=16.0), FREE).fits
    assert chosen(12.0, host=None).transformer == STREAMED
    assert plan_memory(DEV, machine(12.0), FREE).host == SIZES["flux"].matrices


def test_wider_weights_are_rounded_to_bfloat16_first():
    float32 = replace(DEV, transformer=bytes_of_config(FLUX, None, jnp.float32))
    assert chosen(60.0, float32) == Choice()
    assert chosen(30.0, float32).transformer == BFLOAT16
    assert chosen(18.0, float32).transformer == "int8"
    # --dtype float32 says otherwise.
    assert chosen(30.0, float32, Fixed(excluded=(BFLOAT16,))).transformer == "int8"


def test_files_of_prompts_keep_their_encoders_where_they_fit():
    file = replace(DEV, keeps_encoders=True, encodes_beside=True, can_free=False)
    assert chosen(60.0, file) == Choice()
    # Streamed, T5 takes little beside the transformer, and loses nothing.
    assert chosen(30.0, file) == Choice(text=STREAMED)
    picture = plan_memory(file, machine(18.0), Fixed(offloads=True))
    assert picture.choice == Choice(transformer="int8", text=STREAMED, offloads=True)


def test_everything_beside_the_transformer_counts():
    plain = stage_needs(DEV, machine(60.0), Choice())
    control = replace(DEV, beside=SIZES["controlnet"], encodes_images=True)
    controlled = stage_needs(control, machine(60.0), Choice())
    union = SIZES["controlnet"].on_device(None)
    assert controlled["transformer"].weights - plain["transformer"].weights == union
    redux = replace(DEV, image_encoders=GB)
    assert stage_needs(redux, machine(60.0), Choice())["image encoders"].weights > 24 * GB
    longer = [
        DEMAND._replace(added=AddedTokens(txt=729)),
        DEMAND._replace(added=AddedTokens(reference=4096)),
        DEMAND._replace(added=AddedTokens(residuals=15)),
        DEMAND._replace(conditions=2),
    ]
    for demand in longer:
        needs = stage_needs(replace(DEV, demand=demand), machine(60.0), Choice())
        assert needs["transformer"].temporaries > plain["transformer"].temporaries
        assert needs["VAE decoder"] == plain["VAE decoder"]


def test_a_decoder_in_strips_needs_no_more_than_its_limit():
    large = replace(DEV, demand=DEMAND._replace(height=4096, width=4096))
    in_strips = replace(large, vae_memory=1.5e9)
    needs = [stage_needs(job, machine(60), Choice())["VAE decoder"] for job in (large, in_strips)]
    assert needs[0].temporaries > 25 * GB
    assert needs[1].temporaries < 2 * GB
    # With a picture the transformer stays, and would have to be streamed for the whole decoder.
    plans = [
        plan_memory(replace(job, can_free=False), machine(36), FREE) for job in (large, in_strips)
    ]
    assert [plan.choice.transformer for plan in plans] == [STREAMED, None]


def test_a_plan_that_does_not_fit_is_the_smallest():
    huge = replace(DEV, demand=DEMAND._replace(height=8192, width=8192))
    plan = plan_memory(huge, machine(24.0), FREE)
    assert not plan.fits
    assert plan.most == ("VAE decoder", plan.stages["VAE decoder"].total)
    assert plan.choice.frees or plan.choice.transformer == STREAMED


def test_a_larger_share_of_the_device_is_tried(monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    sixteen = imagined_machine(16 * GB)
    assert sixteen.pool == 12 * GB
    assert plan_memory(DEV, sixteen, FREE).choice.transformer == STREAMED
    larger = with_larger_pool(DEV, sixteen, FREE)
    assert larger.choice.transformer == "int8"
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    assert pool_fraction() == 0.95
    assert with_larger_pool(DEV, imagined_machine(16 * GB), FREE) is None
    for text in ("", "much", "0", "2"):
        monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", text)
        assert pool_fraction() == 0.75


def test_networks_are_loaded_as_chosen():
    plain = LoadOptions()
    assert with_storage(plain, None) is plain
    assert with_storage(plain, "int8").quantize == "int8"
    assert with_storage(plain, STREAMED).stream
    assert with_storage(plain, BFLOAT16).dtype == jnp.bfloat16


def test_sizes_of_networks_are_those_of_their_files(tiny):
    for name, network in (("flux", tiny.flux), ("t5", tiny.t5), ("vae", tiny.vae)):
        found = bytes_of_source(name, "tiny", dtype=jnp.float32)
        assert found.known
        leaves = [leaf.nbytes for leaf in jax.tree.leaves(network)]
        assert found.on_device(None) == sum(leaves)
    # 11.9 B parameters, and what is left of them in 8 bits: `gpu-aot` has 11.99 GB of arguments.
    assert SIZES["flux"].on_device(None) == 2 * 11_901_408_320
    assert 11.9 * GB < SIZES["flux"].on_device("int8") < 12.1 * GB
    assert SIZES["vae"].on_device("int8") == SIZES["vae"].on_device(STREAMED)
    assert NOTHING.on_device(None) == 0
    assert not bytes_of_source("flux", "dev").known


def test_this_machine_has_memory(tiny):
    here = machine_memory(jax.devices()[0])
    assert here.is_cpu
    assert here.plain_attention
    assert 0 < here.host <= here.pool
    assert plan_memory(replace(DEV, vae=NOTHING), replace(here, pool=None), FREE).choice == Choice()
