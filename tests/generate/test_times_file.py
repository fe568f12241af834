"""Files of sampling times."""

import json

import numpy as np
import pytest

from fluxjax import flow_times
from fluxjax.generate import read_times, write_times


def test_times_come_back_bit_by_bit(tmp_path):
    path, times = tmp_path / "times.json", flow_times(50, mu=1.15)
    write_times(path, times, {"model": "tiny"})
    np.testing.assert_array_equal(read_times(path), times)
    assert json.loads(path.read_text())["about"] == {"model": "tiny"}
    with pytest.raises(FileExistsError):
        write_times(path, times)
    write_times(path, times[1:], overwrite=True)
    np.testing.assert_array_equal(read_times(str(path)), times[1:])


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff", b"[1, 0]", b'{"times": 3}', b'{"times": ["x"]}', b'{"steps": []}', b"[" * 9999],
)
def test_a_file_that_holds_none_is_an_error_that_names_it(tmp_path, content):
    (tmp_path / "times.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"times.json holds no sampling times"):
        read_times(tmp_path / "times.json")


@pytest.mark.parametrize(
    "nodes", [[], [1.0], [0.0, 1.0], [1.0, 1.0, 0.0], [2.0, 0.0], [1.0, "nan"]]
)
def test_times_that_do_not_fall_from_1_to_0_are_refused(tmp_path, nodes):
    (tmp_path / "times.json").write_text(json.dumps({"times": nodes}))
    with pytest.raises(ValueError, match=r"times.json: .* fall strictly within \[0, 1\]"):
        read_times(tmp_path / "times.json")
