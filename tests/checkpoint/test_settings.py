"""Settings in JSON: what is allowed is read; else one error names the file, field and rule."""

import json
import os

import pytest

from fluxjax.checkpoint.errors import WeightsError
from fluxjax.checkpoint.json_file import read_json
from fluxjax.checkpoint.settings import Field, check_settings, read_settings_file

FIELDS = {
    "steps": Field(kind="integer", least=1, most=100, required=True),
    "height": Field(kind="integer", least=16, most=4096, multiple=16),
    "guidance": Field(kind="number", least=0, most=100, optional=True),
    "shift": Field(kind="boolean"),
    "kind": Field(kind="text", choices=("a", "b")),
    "axes": Field(kind="integers", least=1, most=9),
}


def test_valid_settings_are_returned_and_unknown_ones_ignored(tmp_path):
    settings = {
        "steps": 4,
        "height": 32,
        "guidance": 3,
        "shift": True,
        "kind": "b",
        "axes": [1, 9],
        "other": None,
    }
    byte_order_mark = b"\xef\xbb\xbf"
    (tmp_path / "a.json").write_bytes(byte_order_mark + json.dumps(settings).encode())
    read = read_settings_file(tmp_path / "a.json", FIELDS)
    assert read == {
        "steps": 4,
        "height": 32,
        "guidance": 3.0,
        "shift": True,
        "kind": "b",
        "axes": (1, 9),
    }
    assert type(read["guidance"]) is float
    assert check_settings("here", {"steps": 1, "guidance": None}, FIELDS) == {
        "steps": 1,
        "guidance": None,
    }


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("steps", 0, "an integer from 1 to 100, got 0"),
        ("steps", 101, "got 101"),
        ("steps", 1.0, "an integer from 1 to 100, got 1.0"),
        ("steps", True, "got true"),
        ("steps", None, "got null"),
        ("steps", "4", "got '4'"),
        ("steps", [4], "got a list of 1"),
        ("steps", 10**4000, "more than 30 digits"),
        ("height", 40, "from 16 to 4096, a multiple of 16, got 40"),
        ("guidance", float("nan"), "or null, got NaN"),
        ("guidance", 1e28, r"got 1e\+28"),
        ("guidance", False, "got false"),
        ("shift", 1, "true or false, got 1"),
        ("kind", "\x1b[2J", r"one of a, b, got '\\x1b\[2J'"),
        ("axes", [1, 10], "a list of integers from 1 to 9, got a list of 2"),
        ("axes", 3, "got 3"),
    ],
)
def test_the_error_for_a_value_names_the_rule_and_the_value(field, value, rule):
    with pytest.raises(WeightsError, match=rf"^fluxjax\.json: '{field}' should be .*{rule}"):
        check_settings("fluxjax.json", {"steps": 4} | {field: value}, FIELDS)


def test_fields_that_are_missing_or_unknown_are_named():
    with pytest.raises(WeightsError, match="lacks the field 'steps'"):
        check_settings("here", {}, FIELDS)
    with pytest.raises(WeightsError, match=r"unknown field, 'stepz'.*steps, height"):
        check_settings("here", {"steps": 1, "stepz": 2}, FIELDS, closed=True)
    for settings in ([], "text", None, 3, {"steps": {}}):
        with pytest.raises(WeightsError, match="got"):
            check_settings("here", settings, FIELDS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe{}", "not JSON in UTF-8"),
        ('{"a": "é"}'.encode("latin-1"), "not JSON in UTF-8"),
        (b'{"a": NaN}', "NaN is not a number"),
        (b'{"a": -Infinity}', "-Infinity is not a number"),
        (b'{"a": 1e999}', "1e999 is too large"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"a": 1, "a": 2}', "'a' comes twice"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a":' * 200_000, "nested too deeply"),
        (b" " * 4_000_001, "larger than the 4,000,000 bytes"),
    ],
)
def test_a_file_that_is_not_json_within_bounds_is_one_error(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(WeightsError, match=message) as error:
        read_json(tmp_path / "a.json")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_a_pipe_or_a_missing_file_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "missing"):
        with pytest.raises(FileNotFoundError, match="is missing, or not a file"):
            read_json(tmp_path / name)
