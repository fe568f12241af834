"""Downloads, against a local server: whole, only what is needed, resumed; and every refusal says what to do."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from hub import Hub, run, serve

from fluxjax.zoo import WHOLE, tiny_folder


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A repository in the diffusers layout, with files that fluxjax has no use for."""
    root = tmp_path_factory.mktemp("repository")
    shutil.copytree(tiny_folder(), root, dirs_exist_ok=True)
    (root / "flux1-tiny.safetensors").write_bytes(bytes(1000))
    (root / "transformer" / "model.onnx").write_bytes(bytes(1000))
    return root


def test_a_model_downloads_without_what_it_does_not_need_and_only_once(repository, tmp_path):
    with serve(Hub(repository)) as hub:
        first = run(hub.url, tmp_path, "download", "owner/model")
        assert first.returncode == 0, first.stderr
        folder = Path(first.stdout.strip())
        assert {path.name for path in folder.iterdir()} == {*WHOLE, "model_index.json"}
        assert not (folder / "transformer" / "model.onnx").exists()
        assert "%" in first.stderr  # a progress bar
        served = len(hub.served)
        assert run(hub.url, tmp_path, "download", "owner/model").stdout == first.stdout
        assert len(hub.served) == served
        assert "whole: loads with load_t5" in run(hub.url, tmp_path, "inspect", "owner/model").stdout


def test_one_network_downloads_alone(repository, tmp_path):
    with serve(Hub(repository)) as hub:
        done = run(hub.url, tmp_path, "download", "owner/model", "--only", "vae")
        assert done.returncode == 0, done.stderr
        assert {path.name for path in Path(done.stdout.strip()).iterdir()} == {"vae", "model_index.json"}


def test_a_connection_that_is_cut_goes_on_where_it_ended(tmp_path):
    file = tmp_path / "repository" / "vae" / "diffusion_pytorch_model.safetensors"
    file.parent.mkdir(parents=True)
    file.write_bytes(np.random.default_rng(0).bytes(24_000_000))
    with serve(Hub(tmp_path / "repository", cut=15_000_000)) as hub:
        done = run(hub.url, tmp_path / "cache", "download", "owner/model", "--only", "vae")
        assert done.returncode == 0, done.stderr
        (wanted,) = hub.ranges
        # The hub's client writes pieces of 10 MiB.
        assert wanted == f"bytes={10 * 2**20}-"
    assert (Path(done.stdout.strip()) / "vae" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("status", "code", "told"),
    [
        (403, "GatedRepo", ["is gated", "accept its licence at http", "`hf auth login`"]),
        (401, "GatedRepo", ["is gated", "accept its licence at http", "`hf auth login`"]),
        (401, None, ["owner/model", "`hf auth login`"]),
        (403, None, ["owner/model", "`hf auth login`"]),
        (404, "RepoNotFound", ["There is no model at http"]),
        (500, None, ["can't be downloaded", "Check the network"]),
    ],
)
def test_a_refusal_says_what_to_do(repository, tmp_path, status, code, told):
    with serve(Hub(repository, status=status, code=code)) as hub:
        done = run(hub.url, tmp_path, "download", "owner/model")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert all(part in done.stderr for part in told), done.stderr


def test_without_a_network_the_error_says_so_and_what_is_there_still_loads(repository, tmp_path):
    with serve(Hub(repository)) as hub:
        assert run(hub.url, tmp_path, "download", "owner/model").returncode == 0
        gone = hub.url
    assert run(gone, tmp_path, "convert", "owner/model", str(tmp_path / "own")).returncode == 0
    done = run(gone, tmp_path / "empty", "convert", "owner/model", str(tmp_path / "x"))
    assert done.returncode == 2
    assert "can't be downloaded" in done.stderr
    assert "Traceback" not in done.stderr


def test_inspect_downloads_nothing(repository, tmp_path):
    with serve(Hub(repository)) as hub:
        done = run(hub.url, tmp_path, "inspect", "owner/model")
        assert hub.served == []
    assert done.returncode == 2
    assert "Run `fluxjax download owner/model` first" in done.stderr


def test_another_layout_is_told(tmp_path):
    root = tmp_path / "repository"
    root.mkdir()
    (root / "weights.safetensors").write_bytes(bytes(100))
    with serve(Hub(root)) as hub:
        done = run(hub.url, tmp_path / "cache", "download", "owner/model")
    assert done.returncode == 2
    assert "owner/model holds no transformer folder" in done.stderr
