"""Examples in files: every format reads the same, and what is broken is named."""

import gzip
import json
import sys

import numpy as np
import pytest
from examples_on_disk import (
    CAPTIONS,
    FORMATS,
    SIZES,
    WEIGHTS,
    png,
    write_examples,
    write_folder,
    write_tar,
)

from fluxjax.generate.image import decode_image
from fluxjax.train import DataSettings
from fluxjax.train.catalog import make_catalog
from fluxjax.train.data_settings import data_settings
from fluxjax.train.examples import BrokenExample, Example
from fluxjax.train.sources import find_examples


def settings_of(*places, **options) -> DataSettings:
    return DataSettings(sources=tuple(map(str, places)), size=32, threads=2, **options)


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_reads_the_same_examples(kind, tmp_path):
    found = find_examples([write_examples(tmp_path, kind)], {})
    assert [one.caption for one in found] == list(CAPTIONS)
    for number, one in enumerate(found):
        assert one.image.image_size() == SIZES[number]
        expected = decode_image(png(number), "png")
        np.testing.assert_array_equal(decode_image(one.image.read(), one.name), expected)
    if kind not in ("folder", "tar"):  # which have no place for them
        assert [one.weight for one in found] == list(WEIGHTS)
    assert len({one.name for one in found}) == len(found)


def test_places_are_read_in_order_and_may_be_patterns(tmp_path):
    write_tar(tmp_path / "b.tar")
    write_tar(tmp_path / "a.tar")
    folder = write_folder(tmp_path / "folder")
    found = find_examples([folder, tmp_path / "*.tar"], {})
    assert len(found) == 3 * len(SIZES)
    assert [found[number].name for number in (0, 5, 10)] == ["0.png", "a.tar/0000", "b.tar/0000"]


def test_a_tar_file_has_images_beside_the_examples_own(tmp_path):
    import io
    import tarfile

    path = tmp_path / "edits.tar"
    with tarfile.open(path, "w") as archive:
        for name, data in (
            ("x/1.png", png(0)),
            ("x/1.source.png", png(1)),
            ("x/1.mask.png", png(2)),
            ("x/1.json", json.dumps({"caption": "not this", "weight": 3}).encode()),
            ("x/1.txt", b"make it night"),
            ("x/._1.png", b"made by macOS"),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    (one,) = find_examples([path], {})
    assert (one.name, one.caption) == ("edits.tar/x/1", "make it night")
    assert one.source.image_size() == SIZES[1]
    assert one.mask.read() == png(2)
    assert one.control is None


def test_fields_are_named_where_there_are_several(tmp_path):
    (tmp_path / "0.png").write_bytes(png(0))
    line = {"image": "0.png", "text": "short", "caption": "long", "height": 9, "width": 7}
    path = tmp_path / "all.jsonl"
    path.write_text(json.dumps(line))
    (broken,) = find_examples([path], {})
    assert "it has caption and text; choose one with fields" in str(broken)
    (one,) = find_examples([path], {"prompt": "text"})
    assert (one.caption, one.size) == ("short", (9, 7))
    with pytest.raises(ValueError, match="got one for 'colour'"):
        find_examples([path], {"colour": "text"})


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "it is not JSON"),
        ("[1]", "it is not an object of JSON"),
        ('{"prompt": "a"}', "it names no image"),
        ('{"image": 3, "prompt": "a"}', "an image is 3, not a path"),
        ('{"image": "0.png"}', "it has no caption"),
        ('{"image": "0.png", "prompt": ["a"]}', "its caption is list, not text"),
        ('{"image": "0.png", "prompt": "a", "weight": -1}', "its weight is -1"),
        ('{"image": "0.png", "prompt": "a", "weight": "1"}', "its weight is '1', not a number"),
    ],
)
def test_each_broken_line_is_named_with_its_reason(line, reason, tmp_path):
    path = tmp_path / "all.jsonl"
    path.write_text(f'{{"image": "0.png", "prompt": "good"}}\n\n{line}\n')
    good, broken = find_examples([path], {})
    assert isinstance(good, Example)
    assert isinstance(broken, BrokenExample)
    assert str(broken).startswith(f"all.jsonl:3: {reason}")


def test_a_damaged_tar_file_is_one_error(tmp_path):
    whole = write_tar(tmp_path / "whole.tar").read_bytes()
    damages = {
        "short.tar": whole[: len(png(0)) + 700],
        "header.tar": whole.replace(b"0002.png", b"\xff002.png", 1),
        "text.tar": b"not a tar file" * 100,
        "small.tar.gz": gzip.compress(whole),
    }
    for name, data in damages.items():
        (tmp_path / name).write_bytes(data)
        remedy = "Decompress" if name.endswith(".gz") else "Copy it again"
        with pytest.raises(ValueError, match=f"{name}.*{remedy}"):
            find_examples([tmp_path / name], {})


def test_a_damaged_parquet_file_is_one_error(tmp_path):
    path = write_examples(tmp_path, "parquet")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"can't be read as Parquet.*Download it again"):
        find_examples([path], {})


def test_places_without_examples_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.docx").write_text("")
    with pytest.raises(FileNotFoundError, match=r"nothing at .*missing"):
        find_examples([tmp_path / "missing"], {})
    with pytest.raises(ValueError, match=r"no examples in .*empty.*a.png with a.txt"):
        find_examples([tmp_path / "empty"], {})
    with pytest.raises(ValueError, match=r"notes.docx is neither"):
        find_examples([tmp_path / "notes.docx"], {})
    folder = write_folder(tmp_path / "mixed")
    write_tar(folder / "more.tar")
    with pytest.raises(ValueError, match=r"holds images, and .tar files as well"):
        find_examples([folder], {})


def test_captions_that_are_missing_everywhere_are_one_error(tmp_path):
    folder = write_folder(tmp_path / "folder")
    for path in folder.glob("*.txt"):
        path.unlink()
    with pytest.raises(ValueError, match=r"None of the 5 images has a caption, as 0.png"):
        make_catalog(settings_of(folder))


def test_some_broken_examples_are_left_out_and_more_are_an_error(tmp_path):
    folder = write_folder(tmp_path / "folder")
    (folder / "1.txt").unlink()
    (folder / "2.png").write_bytes(b"GIF89a")
    (folder / "3.txt").write_bytes(b"\xff\xfe")
    catalog = make_catalog(settings_of(folder, max_broken=3))
    assert catalog.names == ["0.png", "4.png"]
    assert {one.name: one.reason.split()[0] for one in catalog.broken} == {
        "1.png": "it",
        "2.png": "`stored_size`",
        "3.png": "its",
    }
    assert sum(line.startswith("left out: ") for line in catalog.summary()) == 3
    with pytest.raises(ValueError, match=r"3 examples.*max_broken = 2: .*1.png.*Repair") as caught:
        make_catalog(settings_of(folder, max_broken=2))
    assert "\n" not in str(caught.value)


def test_the_summary_says_what_is_enlarged_and_what_is_unused(tmp_path):
    path = tmp_path / "all.jsonl"
    (tmp_path / "0.png").write_bytes(png(0))
    path.write_text('{"image": "0.png", "prompt": "a", "mask": "m.png", "control": "c.png"}')
    catalog = make_catalog(settings_of(path))
    assert catalog.summary() == [
        "32x32: 1 image",
        "1 control image unused with these settings",
        "1 mask unused with these settings",
    ]
    larger = DataSettings(sources=(str(path),), size=64, condition="control", masked_loss=True)
    assert make_catalog(larger).summary() == [
        "64x64: 1 image",
        "1 image smaller than that and enlarged",
    ]
    with pytest.raises(ValueError, match="it has no source image, which the condition needs"):
        make_catalog(settings_of(path, condition="reference", max_broken=0))


def test_a_configurations_table_becomes_settings(tmp_path):
    table = {"sources": "images", "cache": "encoded", "size": 64, "fields": {"prompt": "text"}}
    settings = data_settings(table, tmp_path)
    assert settings.sources == (str(tmp_path / "images"),)
    assert settings.cache == str(tmp_path / "encoded")
    assert settings.fields == {"prompt": "text"}
    for wrong, rule in (
        ({"colour": 1}, "no setting 'colour' of data. Choose from sources"),
        ({"flip": "yes"}, r"\(flip\)` takes a bool"),
        ({"sources": 3}, r"\(sources\)` takes"),
        ({"condition": "depth"}, "one of control, fill, reference, got 'depth'"),
        ({"size": 100}, "multiples of 16"),
    ):
        with pytest.raises(ValueError, match=rule):
            data_settings(wrong)


@pytest.mark.parametrize("package", ["grain", "pyarrow"])
def test_a_package_that_is_missing_is_named_with_its_extra(package, tmp_path, monkeypatch):
    path = write_examples(tmp_path, "parquet")
    for name in list(sys.modules):
        if name.partition(".")[0] == package:
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    from fluxjax.train.read_ahead import import_grain

    read = import_grain if package == "grain" else lambda: find_examples([path], {})
    with pytest.raises(ImportError, match=r"pip install 'fluxjax\[train\]'"):
        read()
