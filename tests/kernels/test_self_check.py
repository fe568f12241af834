"""Kernels are checked on the device before they are a default there, once."""

import json
import re
import sys
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fluxjax.kernels import flash_tpu, qkv_tpu, select_attention, verified
from fluxjax.kernels.chips import has_fp8_products, local_twin
from fluxjax.kernels.self_check import BlockCheck, block_check, failure_of
from fluxjax.kernels.verified import cached_failure

CPU = jax.devices()[0]
X = np.linspace(1, 2, 6, dtype=np.float32)


def refuse(x):
    raise NotImplementedError("no such instruction\nmore lines")


KERNELS = {
    "right": (lambda x: 2 * x + 1e-3, None),
    "wrong": (lambda x: 2.1 * x, r"its values are wrong \(relative error 0.05\)"),
    "NaN": (lambda x: x * jnp.nan, r"its values are wrong .*nan\)"),
    "does not lower": (refuse, r"it does not run \(NotImplementedError: no such instruction\)"),
}


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_is_compared_with_its_reference(name):
    kernel, message = KERNELS[name]
    check = BlockCheck(kernel, lambda x: 2 * x, [X])
    found = [failure_of(check, CPU)]

    @jax.jit
    def traced(x):  # as where a network that is being traced chooses an attention
        found.append(failure_of(check, CPU))
        return x

    traced(X)
    for reason in found:
        if message is None:
            assert reason is None
        else:
            assert re.fullmatch(message, reason)


@pytest.mark.parametrize("name", ["flash_tpu", "qkv_tpu"])
def test_interpreted_kernels_pass_their_checks(name, monkeypatch):
    for module, function in ((flash_tpu, "flash_attention_tpu"), (qkv_tpu, "fused_qkv_tpu")):
        interpreted = partial(getattr(module, function), interpret=True)
        monkeypatch.setattr(module, function, interpreted)
    assert failure_of(block_check(name, CPU), CPU) is None


def test_a_result_is_kept_for_this_device_and_these_versions(tmp_path, monkeypatch):
    file = tmp_path / "new" / "kernels.json"
    make = mock.Mock(return_value=BlockCheck(refuse, lambda x: x, [X]))
    for _ in range(2):
        assert "no such instruction" in cached_failure("flash_tpu", CPU, file, make)
    assert make.call_count == 1
    (key,) = json.loads(file.read_text())
    assert CPU.device_kind in key
    assert f"jax {jax.__version__}" in key
    monkeypatch.setattr(verified, "__version__", "another")
    cached_failure("flash_tpu", CPU, file, make)
    assert make.call_count == 2
    assert len(json.loads(file.read_text())) == 2
    assert [path.name for path in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": 1}', "\x00", "[" * 10**5])
def test_a_damaged_file_is_ignored_and_replaced(tmp_path, content):
    file = tmp_path / "kernels.json"
    file.write_text(content)
    make = mock.Mock(return_value=BlockCheck(lambda x: x, lambda x: x, [X]))
    assert cached_failure("cudnn", CPU, file, make) == ""
    assert list(json.loads(file.read_text()).values()) == [""]
    # A folder that can't be written to keeps nothing, and is no error.
    assert cached_failure("cudnn", CPU, file / "below" / "kernels.json", make) == ""


def test_a_reference_that_fails_says_nothing_of_the_kernel(tmp_path, capsys):
    file = tmp_path / "kernels.json"
    make = mock.Mock(return_value=BlockCheck(lambda x: x, refuse, [X]))
    assert cached_failure("cudnn", CPU, file, make) == ""
    assert "cudnn was not checked (no such instruction" in capsys.readouterr().err
    assert not file.exists()


def test_the_next_implementation_is_taken_and_said_once(tmp_path, monkeypatch, capsys):
    # By name, since the package has a function `attention` too.
    attention = sys.modules["fluxjax.kernels.attention"]
    tpu = mock.Mock(spec=jax.Device, platform="tpu", device_kind="TPU v6 lite")
    monkeypatch.setattr(attention, "default_device", lambda: tpu)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    x = jax.ShapeDtypeStruct((4608, 24, 128), jnp.bfloat16)
    assert select_attention(x, x) == "flash_tpu"  # which is only compiled for: nothing is checked
    monkeypatch.setattr(verified, "local_twin", lambda device: device)
    monkeypatch.setattr(verified, "_key", lambda name, device: name)
    failing = BlockCheck(refuse, lambda x: x, [X])
    monkeypatch.setattr(verified.cached_failure, "__defaults__", (lambda *_: failing,))
    monkeypatch.setattr(verified, "failure_of", lambda check, device: failure_of(check, CPU))
    for _ in range(2):
        assert select_attention(x, x) == "xla_chunked"
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert errors[0].startswith("fluxjax: flash_tpu is not used on TPU v6 lite, but xla: it does")
    assert json.loads((tmp_path / "fluxjax" / "kernels.json").read_text()).keys() == {"flash_tpu"}


def test_what_multiplies_fp8():
    def device(platform, kind="", capability=None):
        return mock.Mock(
            spec=jax.Device, platform=platform, device_kind=kind, compute_capability=capability
        )

    assert has_fp8_products(device("gpu", capability="8.9"))
    assert has_fp8_products(device("gpu", capability="12.0"))
    assert has_fp8_products(device("gpu", capability="gfx942"))
    assert has_fp8_products(device("tpu", "TPU v7x"))
    assert not has_fp8_products(device("gpu", capability="8.6"))
    assert not has_fp8_products(device("gpu", capability="gfx1100"))
    assert not has_fp8_products(device("tpu", "TPU v6 lite"))
    assert not has_fp8_products(CPU)
    assert local_twin(CPU) == CPU
    assert local_twin(device("cpu", "another CPU")) is None
