"""Examples encoded once: what interruptions leave, what is refused, and what training reads."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples_on_disk import CAPTIONS, png, write_folder, write_json

import fluxjax.train.encode_data as encode_data
from fluxjax.train import DataSettings, EncodeOptions, Encoders, ProcessShare, open_batches
from fluxjax.train.cache_files import shard_path
from fluxjax.train.encode_data import encode_examples

OPTIONS = EncodeOptions(batch_size=2, shard_examples=2)


@pytest.fixture(scope="module")
def encoders(tiny):
    return Encoders(
        tiny.tokenizers, tiny.clip, tiny.t5, tiny.vae, jnp.float32, tiny.defaults, "tiny"
    )


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Of examples with masks, of which those of two captions are alike, for Fill."""
    path = tmp_path_factory.mktemp("data") / "examples" / "all.jsonl"
    write_json(path, ("image", "prompt"), mask="mask")
    path.write_text(path.read_text().replace(CAPTIONS[1], CAPTIONS[0]))
    return DataSettings(
        sources=(str(path),),
        size=32,
        max_ratio=1,
        max_length=8,
        threads=1,
        condition="fill",
        masked_loss=True,
        flip=True,
        sample_posterior=True,
    )


@pytest.fixture(scope="module")
def cache(settings, encoders, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / "whole"
    report = encode_examples(settings, encoders, folder, options=OPTIONS)
    assert (report.written, report.kept, report.examples, report.broken) == (3, 0, 5, ())
    return folder


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_cached_batches_are_the_raw_ones(settings, cache, encoders):
    raw = open_batches(settings, encoders=encoders, batch_size=2)
    cached = open_batches(replace(settings, cache=str(cache), sources=()), batch_size=2)
    for _ in range(6):  # two epochs
        first, second = next(raw), next(cached)
        assert first.size == second.size
        assert raw.state() == cached.state()
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
            # Captions are encoded in other batches, and so by sums in another order.
            np.testing.assert_allclose(a, b, atol=2e-5)
    assert raw.names([4]) == cached.names([4])
    empty = raw.empty_text(), cached.empty_text()
    jax.tree.map(np.testing.assert_array_equal, *empty)
    raw.close()
    cached.close()


@pytest.mark.parametrize("place", ["between", "before the entry"])
def test_what_was_interrupted_goes_on_and_ends_with_the_same_files(
    place, settings, cache, encoders, tmp_path, monkeypatch
):
    folder, written = tmp_path / "cache", []
    write = encode_data.write_shard

    def stop(folder, number, tensors, entry):
        entry = write(folder, number, tensors, entry)
        written.append(number)
        if len(written) == 2:
            if place == "before the entry":
                (folder / "000001.json").unlink()
            raise KeyboardInterrupt
        return entry

    monkeypatch.setattr(encode_data, "write_shard", stop)
    with pytest.raises(KeyboardInterrupt):
        encode_examples(settings, encoders, folder, options=OPTIONS)
    with pytest.raises(ValueError, match=r"of 3 files .* missing or unfinished: .*000002"):
        open_batches(replace(settings, cache=str(folder)), batch_size=2)
    seen = []
    report = encode_examples(
        settings, encoders, folder, options=OPTIONS, report=lambda *counts: seen.append(counts)
    )
    kept = 2 if place == "between" else 1
    assert (report.kept, report.written) == (kept, 3 - kept)
    assert seen[0] == (2 * kept, 5)
    assert seen[-1] == (5, 5)
    assert contents(folder) == contents(cache)


def test_damaged_shards_are_written_again(settings, cache, encoders, tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    for name, data in contents(cache).items():
        (folder / name).write_bytes(data)
    longer, changed = shard_path(folder, 0), shard_path(folder, 2)
    longer.write_bytes(longer.read_bytes() + b"0")
    data = changed.read_bytes()
    changed.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    report = encode_examples(settings, encoders, folder, options=OPTIONS)
    assert (report.kept, report.written) == (1, 2)
    assert contents(folder) == contents(cache)


def test_parts_by_several_processes_make_the_same_folder(settings, cache, encoders, tmp_path):
    counts = []
    for index in range(2):
        options = replace(OPTIONS, part=ProcessShare(index, 2))
        report = encode_examples(settings, encoders, tmp_path / "cache", options=options)
        counts.append(report.written)
    assert counts == [2, 1]
    assert contents(tmp_path / "cache") == contents(cache)


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"flip": False}, "flip True, not False"),
        ({"size": 48}, "size 32, not 48"),
        ({"text_dtype": "bfloat16"}, "text_dtype None, not bfloat16"),
        ({"seed": 1}, "seed 0, not 1"),
    ],
)
def test_a_folder_of_other_settings_is_refused(changes, difference, settings, cache, encoders):
    with pytest.raises(ValueError, match=f"{difference}.*or choose another folder"):
        encode_examples(replace(settings, **changes), encoders, cache, options=OPTIONS)


def test_a_folder_of_another_model_or_other_data_is_refused(settings, cache, encoders, tmp_path):
    other = jax.tree.map(lambda x: 2 * x, encoders.vae)
    with pytest.raises(ValueError, match=r"other encoders \(of tiny, not mine\)"):
        encode_examples(
            settings, encoders._replace(vae=other, model="mine"), cache, options=OPTIONS
        )
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.png").write_bytes(png(0))
    (tmp_path / "images" / "0.txt").write_text("a star")
    mine = replace(settings, sources=(str(tmp_path / "images"),))
    with pytest.raises(ValueError, match=r"was encoded with data .*examples 5, not 1"):
        encode_examples(mine, encoders, cache, options=OPTIONS)
    with pytest.raises(FileExistsError, match=r"holds other files\. Choose a new folder"):
        encode_examples(mine, encoders, tmp_path / "images", options=OPTIONS)


def test_training_is_refused_what_the_cache_lacks(settings, cache, tmp_path):
    mine = replace(settings, cache=str(cache))
    for changes, difference in (
        ({"size": 64}, "size 32, not 64"),
        ({"condition": None}, "condition fill, not None"),
    ):
        with pytest.raises(ValueError, match=difference):
            open_batches(replace(mine, **changes), batch_size=2)
    with pytest.raises(FileNotFoundError, match=r"no encoded examples .*fluxjax encode"):
        open_batches(replace(mine, cache=str(tmp_path)), batch_size=2)
    with pytest.raises(ValueError, match="without a cache"):
        open_batches(settings, batch_size=2)


def test_training_may_use_less_than_the_cache_has(settings, cache):
    plain = replace(
        settings, cache=str(cache), flip=False, masked_loss=False, sample_posterior=False, size=None
    )
    batches = open_batches(plain, batch_size=5)
    first = next(batches)
    next(batches)
    again = open_batches(plain, batch_size=5)
    next(again)
    again.close()
    assert first.mask is None
    assert first.latents.shape == (5, 4, 64)
    batches.close()


def test_images_that_cannot_be_read_are_left_out_and_named(encoders, tmp_path):
    folder = write_folder(tmp_path / "folder")
    for number in (0, 1):
        (folder / f"{number}.png").write_bytes(png(number)[:-200])
    settings = DataSettings(sources=(str(folder),), size=32, max_ratio=1, max_length=8, threads=1)
    report = encode_examples(settings, encoders, tmp_path / "cache", options=OPTIONS)
    assert [line.split(":")[0] for line in report.broken] == ["0.png", "1.png"]
    assert report.examples == 3  # the first shard has none
    again = encode_examples(settings, encoders, tmp_path / "cache", options=OPTIONS)
    assert (again.kept, again.broken) == (3, report.broken)
    batches = open_batches(replace(settings, cache=str(tmp_path / "cache")), batch_size=3)
    assert sorted(batches.names(next(batches).numbers)) == ["2.png", "3.png", "4.png"]
    assert batches.broken() == report.broken
    batches.close()
    with pytest.raises(ValueError, match=r"2 examples can't be used, more than max_broken = 1"):
        encode_examples(replace(settings, max_broken=1), encoders, tmp_path / "c", options=OPTIONS)
