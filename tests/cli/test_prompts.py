"""Files of prompts: each wrong line is reported, and the others are drawn."""

import json
import time
from dataclasses import replace
from pathlib import Path

import jax
import PIL.Image
import pytest
from jobs import IMPATIENT, start, start_job

from fluxjax.cli.image_paths import line_paths
from fluxjax.cli.jobs import join_job
from fluxjax.cli.main import build_parser, main
from fluxjax.cli.prompt_file_drawing import group_lines, sort_lines
from fluxjax.cli.prompts import Line, read_prompts, share
from fluxjax.cli.read_request import request_of_options
from fluxjax.cli.replay import replayed


def read(tmp_path, *lines):
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines),
        encoding="utf-8",
    )
    return read_prompts(path)


def test_lines_have_their_number_as_id_and_seed(tmp_path):
    full = {
        "prompt": "ein Stern ★",
        "prompt_2": "b",
        "negative_prompt": "c",
        "id": "star-1.v2",
        "seed": 7,
        "height": 32,
        "width": 48,
        "steps": 5,
        "guidance": 2,
    }
    lines, problems = read(tmp_path, {"prompt": "a"}, "", full)
    assert lines == [
        Line("a", None, None, "0", 0, 1),
        Line("ein Stern ★", "b", "c", "star-1.v2", 7, 3, *[None] * 3, Path(), 32, 48, 5, 2.0),
    ]
    assert not problems


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": ', "line 2: it is not JSON"),
        ('"a red star"', "line 2: it is not an object with a prompt"),
        ({"id": "a"}, "line 2: it is not an object with a prompt"),
        ({"prompt": 3}, "its prompt is not a text"),
        ({"prompt": "a", "seed": "3"}, "its seed is not a whole number"),
        ({"prompt": "a", "seed": True}, "its seed is not a whole number"),
        ({"prompt": "a", "seed": -1}, "its seed is not from 0 to 9223372036854775807, got -1"),
        ({"prompt": "a", "step": 3}, "unknown field 'step'"),
        ({"prompt": "a", "steps": 0}, "its steps is not from 1 to 10000, got 0"),
        ({"prompt": "a", "width": 32.0}, "its width is not a whole number"),
        ({"prompt": "a", "width": 40, "height": 32}, "its size needs height and width that are"),
        ({"prompt": "a", "guidance": "3"}, "its guidance is not a number"),
        ({"prompt": "a", "mask": "m.png"}, "its mask does nothing without an init_image"),
        ({"prompt": "a", "width": 32, "init_image": "i.png"}, "its width does nothing with an"),
        ({"prompt": "a", "id": "../a"}, "its id '../a' is not a file name"),
        ({"prompt": "a", "id": "/a"}, "is not a file name"),
        ({"prompt": "a", "id": ".."}, "is not a file name"),
        ({"prompt": "a", "id": ""}, "is not a file name"),
        ({"prompt": "a", "id": "a\u0000b"}, "is not a file name"),
        ({"prompt": "a", "id": "FIRST"}, "its id 'FIRST' is also that of line 1"),
    ],
)
def test_a_wrong_line_is_reported_and_the_others_are_read(tmp_path, line, reason):
    lines, problems = read(tmp_path, {"prompt": "a", "id": "first"}, line, {"prompt": "b"})
    assert [line.id for line in lines] == ["first", "2"]
    assert len(problems) == 1
    assert reason in problems[0]


def test_a_negative_prompt_that_would_have_no_effect_is_refused(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "a", "negative_prompt": ""}')
    lines, problems = read_prompts(path, guided=False)
    assert ([line.id for line in lines], problems) == (
        ["0"],
        ["line 2: its negative_prompt does nothing at --cfg 1 without --nag"],
    )


def test_processes_share_the_lines(tmp_path):
    lines, _ = read(tmp_path, *({"prompt": str(i)} for i in range(7)))
    parts = [share(lines, process, 3) for process in range(3)]
    assert [[line.id for line in part] for part in parts] == [
        ["0", "3", "6"],
        ["1", "4"],
        ["2", "5"],
    ]


PROMPTS = [
    {"prompt": "a red star on white"},
    {"prompt": "a blue ring on black", "id": "ring", "seed": 5},
    {"prompt": "a cross", "id": "../cross"},
    {
        "prompt": "a large green cross left of a small white heart on a navy background",
        "prompt_2": "a green cross",
    },
    {"prompt": "a yellow heart on teal", "negative_prompt": "a red star"},
    {"prompt": "a purple diamond on pink"},
]
NAMES = ["0.png", "3.png", "4.png", "5.png", "ring.png"]


FAST = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
"""As in the process of the tests: other processes compile faster, and to the same numbers."""


def test_lines_of_one_size_and_number_of_steps_share_batches(tmp_path):
    """Each size and number of steps is compiled once, also where some images are there already."""
    lines, _ = read(
        tmp_path,
        {"prompt": "a"},
        {"prompt": "b", "width": 64},
        {"prompt": "c", "steps": 3},
        {"prompt": "d"},
        {"prompt": "e", "guidance": 2.0},
    )
    words = ["generate", "--prompts", "x", "--height", "48", "--width", "32", "--steps", "2"]
    options = replayed(build_parser().parse_args([*words, "--output", str(tmp_path / "{id}.png")]))
    request = request_of_options(options)
    paths, problems = line_paths(request, lines)
    work = sort_lines(request, lines, paths)
    alike = {(48, 32, 2, None): 3, (48, 64, 2, None): 1, (48, 32, 3, None): 5, (48, 32, 2, 2.0): 1}
    groups = group_lines(replace(request, batch=2), work, alike)
    assert not problems
    assert not work.problems
    found = []
    for group in groups:
        own = group.request
        found.append((group.numbers, own.width, len(own.recipe.times) - 1, own.distilled))
    assert found == [
        ([0, 3], 32, 2, None),
        ([2, 2], 32, 3, None),
        ([4], 32, 2, 2.0),
        ([1], 64, 2, None),
    ]
    about = groups[1].request.metadata(lines[2], "3.5")
    assert (about["size"], about["steps"], about["guidance"]) == ("32x48", "3", "3.5")


def test_a_line_that_cannot_be_drawn_is_reported(tmp_path):
    lines, _ = read(
        tmp_path, {"prompt": "a", "width": 40}, {"prompt": "b", "steps": 3}, {"prompt": "a b"}
    )
    times = tmp_path / "times.json"
    times.write_text(json.dumps({"times": [1.0, 0.5, 0.0]}))
    words = ["generate", "--prompts", "x", "--timer", str(times), "--output", "{prompt:.1}.png"]
    request = request_of_options(replayed(build_parser().parse_args(words)))
    paths, problems = line_paths(request, lines)
    assert "line 1: its size needs height and width" in problems[0]
    assert "line 2: its 3 steps are not those of the file of times, 2" in problems[1]
    assert list(paths) == ["2"]
    plain = request_of_options(replayed(build_parser().parse_args(words[:-2])))
    assert line_paths(plain, lines) == ({"2": Path("2.png")}, problems)
    words[-1] = "{steps}.png"
    request = request_of_options(replayed(build_parser().parse_args(words)))
    _, problems = line_paths(request, [lines[2], lines[2]._replace(id="3", number=4)])
    assert problems == ["line 4: its image 2.png is also that of line 3"]


def command(tmp_path, folder, programs, *more):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, PROMPTS)))
    return [
        *("generate", "--prompts", str(path), "--output-dir", str(tmp_path / folder)),
        *("--steps", "2", "--height", "32", "--width", "48", "--batch", "2"),
        *("--integrator", "ancestral", "--cfg", "1.5"),
        *("--compilation-cache", str(programs), *more),
    ]


def images(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


def draw(arguments):
    """Run a command in this process, which refuses one line."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, programs):
    """The images of a single process that nothing disturbs."""
    folder = tmp_path_factory.mktemp("one")
    draw(command(folder, "out", programs))
    found = images(folder / "out")
    assert list(found) == NAMES
    assert not (folder / "cross.png").exists()
    return found


def test_an_image_of_a_file_says_how_it_was_made_and_is_that_of_its_line_alone(
    undisturbed, tmp_path, programs, capsys
):
    (tmp_path / "ring.png").write_bytes(undisturbed["ring.png"])
    with PIL.Image.open(tmp_path / "ring.png") as file:
        expected = {"prompt": "a blue ring on black", "seed": "5", "steps": "2"}
        assert expected.items() <= file.text.items()
    # One line is skipped, so that every later one shares its batch with another line.
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "0.png").write_bytes(b"mine")
    # Where the weights lie changes no image either.
    memory = ["--offload-encoders", "--stream-blocks", "--show-memory"]
    draw(command(tmp_path, "out", programs, *memory))
    errors = capsys.readouterr().err
    assert "line 3: its id '../cross' is not a file name" in errors
    assert "line 1: there is another file of its name" in errors
    found = images(tmp_path / "out")
    assert found.pop("0.png") == b"mine"
    assert found == {name: data for name, data in undisturbed.items() if name != "0.png"}


def test_killed_at_any_moment_and_run_again_every_line_has_its_image(
    undisturbed, tmp_path, programs
):
    arguments = command(tmp_path, "out", programs)
    process = start(arguments, **FAST)
    while not images(tmp_path / "out") and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    done = images(tmp_path / "out")
    assert 0 < len(done) < len(NAMES)
    draw(arguments)
    # Those that were drawn now share their batches with other lines than in `undisturbed`.
    assert images(tmp_path / "out") == undisturbed
    assert done.items() <= undisturbed.items()


def test_two_processes_share_a_file_and_one_that_is_killed_ends_the_other(
    undisturbed, tmp_path, programs
):
    arguments = command(tmp_path, "out", programs)
    first, second = start_job(arguments, 2, program=IMPATIENT, **FAST)
    second.stderr.read(1)  # it has joined the job, and begins to load
    second.kill()
    killed = time.monotonic()
    errors = first.communicate(timeout=120)[1]
    assert time.monotonic() - killed < 60
    assert first.returncode not in (0, 2)
    assert "another task died" in errors
    second.communicate()
    done = images(tmp_path / "out")
    assert len(done) <= 3  # of five: the share of the first process
    outputs = [process.communicate(timeout=300)[0] for process in start_job(arguments, 2, **FAST)]
    written = [int(text[: text.index(" images written")].split()[-1]) for text in outputs]
    assert sum(written) == len(NAMES) - len(done)
    assert images(tmp_path / "out") == undisturbed


def test_a_process_that_is_killed_ends_the_others_within_half_a_minute(monkeypatch):
    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **options: joined.append(options))
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    join_job()
    expected = {"num_processes": 2, "process_id": 1, "heartbeat_timeout_seconds": 30}
    assert expected.items() <= joined[0].items()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["a star", "--distributed"], "Give one of them"),
        (["--prompts", "none.jsonl"], "No such file"),
        (["a star", "--offload-encoders"], "does nothing for one prompt"),
        (["a star", "--stream-blocks", "--mesh", "data=1"], "Leave out --mesh"),
        (["--prompts", "none.jsonl", "--seed", "1"], "--seed does nothing with --prompts"),
    ],
)
def test_options_that_contradict_each_other_are_refused(arguments, reason, capsys):
    draw(["generate", *arguments])
    assert reason in capsys.readouterr().err
