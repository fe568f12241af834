"""Downloads from a local hub: only what is needed, resumed, verified, and inside the cache.

Every error says what to do.
"""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hub import COMMIT, Hub, checksum, run, run_process, serve

from fluxjax.checkpoint.folders import MODEL_FOLDERS
from fluxjax.checkpoint.shipped import tiny_folder

VAE_WEIGHTS = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A repository in the diffusers layout, and with files that fluxjax does not need."""
    root = tmp_path_factory.mktemp("repository")
    shutil.copytree(tiny_folder(), root, dirs_exist_ok=True)
    (root / "flux1-tiny.safetensors").write_bytes(bytes(1000))
    (root / "transformer" / "model.onnx").write_bytes(bytes(1000))
    return root


def test_a_model_downloads_without_what_it_does_not_need_and_only_once(repository, tmp_path):
    with serve(Hub(repository)) as hub:
        first = run_process(hub.url, tmp_path, "download", "owner/model")
        assert first.returncode == 0, first.stderr
        folder = Path(first.stdout.strip())
        assert {path.name for path in folder.iterdir()} == {*MODEL_FOLDERS, "model_index.json"}
        assert not (folder / "transformer" / "model.onnx").exists()
        assert "%" in first.stderr  # a progress bar
        served = len(hub.served)
        assert run(hub.url, tmp_path, "download", "owner/model").stdout == first.stdout
        assert len(hub.served) == served
        assert (
            "whole: loads with load_t5" in run(hub.url, tmp_path, "inspect", "owner/model").stdout
        )


def test_one_network_downloads_alone(repository, tmp_path):
    with serve(Hub(repository)) as hub:
        done = run(hub.url, tmp_path, "download", "owner/model", "--only", "vae")
        assert done.returncode == 0, done.stderr
        assert {path.name for path in Path(done.stdout.strip()).iterdir()} == {
            "vae",
            "model_index.json",
        }


def test_a_broken_connection_is_resumed_where_it_ended(tmp_path):
    file = tmp_path / "repository" / VAE_WEIGHTS
    file.parent.mkdir(parents=True)
    file.write_bytes(np.random.default_rng(0).bytes(24_000_000))
    with serve(Hub(tmp_path / "repository", cut=15_000_000)) as hub:
        done = run(hub.url, tmp_path / "cache", "download", "owner/model", "--only", "vae")
        assert done.returncode == 0, done.stderr
        (requested,) = hub.ranges
        # The hub's client writes pieces of 10 MiB.
        assert requested == f"bytes={10 * 2**20}-"
    assert (Path(done.stdout.strip()) / "vae" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (403, "GatedRepo", ["is gated", "accept its licence at http", "`hf auth login`"]),
        (401, "GatedRepo", ["is gated", "accept its licence at http", "`hf auth login`"]),
        (401, None, ["owner/model", "`hf auth login`"]),
        (403, None, ["owner/model", "`hf auth login`"]),
        (404, "RepoNotFound", ["There is no model at http"]),
        (500, None, ["can't be downloaded", "Check the network"]),
    ],
)
def test_an_http_error_says_what_to_do(repository, tmp_path, status, code, message):
    with serve(Hub(repository, status=status, code=code)) as hub:
        done = run(hub.url, tmp_path, "download", "owner/model")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert all(part in done.stderr for part in message), done.stderr


def test_without_a_network_the_error_says_so_and_a_cached_model_still_loads(repository, tmp_path):
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


def test_a_repository_in_another_layout_is_refused(tmp_path):
    root = tmp_path / "repository"
    root.mkdir()
    (root / "weights.safetensors").write_bytes(bytes(100))
    with serve(Hub(root)) as hub:
        done = run(hub.url, tmp_path / "cache", "download", "owner/model")
    assert done.returncode == 2
    assert "owner/model has no folder transformer" in done.stderr


def download_vae(hub, cache):
    """Download one network, and return the folder in the cache."""
    done = run(hub.url, cache, "download", "owner/model", "--only", "vae")
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


def blobs(cache):
    return cache / "hub" / "models--owner--model" / "blobs"


def test_download_replaces_a_damaged_file(repository, tmp_path):
    with serve(Hub(repository)) as hub:
        folder = download_vae(hub, tmp_path)
        weights = folder / VAE_WEIGHTS
        settings = folder / "vae" / "config.json"
        whole = weights.read_bytes()
        weights.resolve().write_bytes(whole[:-1000] + bytes(1000))  # as large as before
        settings.resolve().write_bytes(b"{")
        hub.served.clear()
        done = run(hub.url, tmp_path, "download", "owner/model", "--only", "vae")
        assert done.returncode == 0, done.stderr
    assert sorted(hub.served) == ["vae/config.json", VAE_WEIGHTS]
    assert weights.read_bytes() == whole
    assert settings.read_bytes() == (repository / "vae" / "config.json").read_bytes()


def test_download_without_a_network_names_a_damaged_file(repository, tmp_path):
    with serve(Hub(repository)) as hub:
        folder = download_vae(hub, tmp_path)
        gone = hub.url
    assert run(gone, tmp_path, "download", "owner/model", "--only", "vae").returncode == 0
    weights = (folder / VAE_WEIGHTS).resolve()
    weights.write_bytes(weights.read_bytes()[:-1000] + bytes(1000))
    done = run(gone, tmp_path, "download", "owner/model", "--only", "vae")
    assert done.returncode == 2
    assert (
        "diffusion_pytorch_model.safetensors is damaged, and the hub can't be reached"
        in done.stderr
    )


def test_a_file_that_arrives_damaged_is_refused_and_not_kept(repository, tmp_path):
    name = VAE_WEIGHTS
    with serve(Hub(repository, corrupt=(name,))) as hub:
        done = run(hub.url, tmp_path, "download", "owner/model", "--only", "vae")
        assert done.returncode == 2
        assert f"{name} of owner/model arrives damaged" in done.stderr
        assert hub.served.count(name) == 2
    left = {checksum(path.read_bytes()): path.name for path in blobs(tmp_path).iterdir()}
    assert all(content == name for content, name in left.items())


@pytest.mark.parametrize("part", ["/api/models", "/resolve/"])
def test_a_hub_that_never_answers_is_given_up_after_the_timeout(repository, tmp_path, part):
    began = time.monotonic()
    with serve(Hub(repository, silent=part)) as hub:
        done = run(hub.url, tmp_path, "download", "owner/model", "--only", "vae", timeout=0.2)
    assert done.returncode == 2
    assert "can't be downloaded" in done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - began < 15


@pytest.mark.parametrize(
    "hostile",
    [
        {"files": ("vae/../../../../../evil.json",)},
        {"files": ("vae//evil.json",)},
        {"files": ("vae/..\\..\\evil.json",)},
        {"files": ("vae/\x1b[2Jevil.json",)},
        {"commit": "../../../../evil"},
        {"headers": {"ETag": '"../../../../evil"'}},
        {"headers": {"ETag": '"ABSOLUTE"'}},
        {"headers": {"X-Linked-Etag": '"../evil"'}},
        {"headers": {"X-Repo-Commit": "../../evil"}},
        {"headers": {"X-Repo-Commit": "f" * 40}},
    ],
)
def test_no_answer_of_a_server_places_a_file_outside_of_the_cache(tmp_path, hostile):
    root, cache = tmp_path / "repository", tmp_path / "a" / "b" / "cache"
    (root / "vae").mkdir(parents=True)
    (root / "vae" / "config.json").write_text("{}")
    if headers := hostile.get("headers"):
        hostile = {
            "headers": {
                name: value.replace("ABSOLUTE", str(tmp_path / "evil"))
                for name, value in headers.items()
            }
        }
    with serve(Hub(root, **hostile)) as hub:
        done = run(hub.url, cache, "download", "owner/model", "--only", "vae")
    assert done.returncode == 2
    assert "has an invalid" in done.stderr
    assert done.stderr.isascii()
    assert "\x1b" not in done.stderr
    assert not list(tmp_path.rglob("*evil*"))
    assert {path.name for path in tmp_path.iterdir()} <= {"repository", "a"}


def test_a_link_that_leads_out_of_the_cache_is_refused(repository, tmp_path):
    with serve(Hub(repository)) as hub:
        folder = download_vae(hub, tmp_path / "cache")
        (tmp_path / "mine.json").write_text("{}")
        (folder / "vae" / "config.json").unlink()
        (folder / "vae" / "config.json").symlink_to(tmp_path / "mine.json")
        done = run(hub.url, tmp_path / "cache", "download", "owner/model", "--only", "vae")
    assert done.returncode == 2
    assert "leads out of the hub's cache" in done.stderr
    assert (tmp_path / "mine.json").read_text() == "{}"


LOCK_FILE = """
import fcntl, sys, time
file = open(sys.argv[1], "ab")
fcntl.flock(file, fcntl.LOCK_EX)
print("locked", flush=True)
time.sleep(100)
"""


def test_incomplete_files_of_killed_processes_are_removed_and_those_of_living_ones_stay(
    repository, tmp_path
):
    with serve(Hub(repository)) as hub:
        assert run(hub.url, tmp_path, "download", "owner/model", "--only", "vae").returncode == 0
        locks = tmp_path / "hub" / ".locks" / "models--owner--model"
        dead, alive, older = "a" * 64, "b" * 64, "c" * 64
        for name in (
            f"{dead}.01234567.incomplete",
            f"{alive}.01234567.incomplete",
            f"{older}.incomplete",
        ):
            (blobs(tmp_path) / name).write_bytes(b"half")
        holder = subprocess.Popen(
            [sys.executable, "-c", LOCK_FILE, str(locks / f"{alive}.lock")],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            holder.stdout.readline()
            assert (
                run(hub.url, tmp_path, "download", "owner/model", "--only", "vae").returncode == 0
            )
        finally:
            holder.kill()
            holder.wait()
    left = {path.name for path in blobs(tmp_path).glob("*.incomplete")}
    assert left == {f"{alive}.01234567.incomplete", f"{older}.incomplete"}


def test_the_newest_version_is_recorded_when_all_of_its_files_are_complete(repository, tmp_path):
    with serve(Hub(repository, corrupt=("vae/config.json",))) as hub:
        assert run(hub.url, tmp_path, "download", "owner/model", "--only", "vae").returncode == 2
        reference = tmp_path / "hub" / "models--owner--model" / "refs" / "main"
        assert not reference.exists()
        hub.corrupt = ()
        assert run(hub.url, tmp_path, "download", "owner/model", "--only", "vae").returncode == 0
    assert reference.read_text() == COMMIT
