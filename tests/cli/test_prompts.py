"""Files of prompts: what is wrong is told by line, and the rest goes on."""

import json
import time

import PIL.Image
import pytest
from jobs import start, start_job

from fluxjax.cli.main import main as cli
from fluxjax.cli.prompts import Line, read_prompts, share


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
    }
    lines, problems = read(tmp_path, {"prompt": "a"}, "", full)
    assert lines == [
        Line("a", None, None, "0", 0, 1),
        Line("ein Stern ★", "b", "c", "star-1.v2", 7, 3),
    ]
    assert not problems


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"prompt": ', "line 2: it is no JSON"),
        ('"a red star"', "line 2: it is no object with a prompt"),
        ({"id": "a"}, "line 2: it is no object with a prompt"),
        ({"prompt": 3}, "its prompt is no text"),
        ({"prompt": "a", "seed": "3"}, "its seed is no whole number"),
        ({"prompt": "a", "seed": True}, "its seed is no whole number"),
        ({"prompt": "a", "seed": -1}, "its seed is not in [0, 2^63), got -1"),
        ({"prompt": "a", "steps": 3}, "unknown field 'steps'"),
        ({"prompt": "a", "id": "../a"}, "its id '../a' is no file name"),
        ({"prompt": "a", "id": "/a"}, "is no file name"),
        ({"prompt": "a", "id": ".."}, "is no file name"),
        ({"prompt": "a", "id": ""}, "is no file name"),
        ({"prompt": "a", "id": "a\u0000b"}, "is no file name"),
        ({"prompt": "a", "id": "FIRST"}, "its id 'FIRST' is that of line 1"),
    ],
)
def test_a_bad_line_is_told_and_the_others_are_read(tmp_path, line, told):
    lines, problems = read(tmp_path, {"prompt": "a", "id": "first"}, line, {"prompt": "b"})
    assert [line.id for line in lines] == ["first", "2"]
    assert len(problems) == 1
    assert told in problems[0]


def test_a_negative_prompt_that_nothing_would_use_is_refused(tmp_path):
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


def command(tmp_path, folder, *more):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, PROMPTS)))
    options = ["--steps", "2", "--batch", "2", "--integrator", "ancestral", "--cfg", "1.5"]
    cache = [
        "--compilation-cache",
        str(tmp_path.parent / "programs"),
    ]  # shared: no test is about compiling
    return [
        "generate",
        "--prompts",
        str(path),
        "--output-dir",
        str(tmp_path / folder),
        *options,
        *cache,
        *more,
    ]


def images(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The images of one process that nothing disturbs."""
    folder = tmp_path_factory.mktemp("one")
    process = start(command(folder, "out"))
    said = process.communicate(timeout=300)
    assert process.returncode == 2  # for the line that was refused
    assert said[1].splitlines()[-1].endswith("which it may not begin with")
    assert "line 3: its id '../cross'" in said[1]
    found = images(folder / "out")
    assert list(found) == NAMES
    assert not (folder / "cross.png").exists()
    return found


def test_an_image_of_a_file_says_how_it_was_made_and_is_that_of_its_line_alone(
    undisturbed, tmp_path
):
    (tmp_path / "ring.png").write_bytes(undisturbed["ring.png"])
    with PIL.Image.open(tmp_path / "ring.png") as file:
        assert {
            "prompt": "a blue ring on black",
            "seed": "5",
            "steps": "2",
        }.items() <= file.text.items()
    # Batches of others: one line is passed over, so that every later one has another neighbour.
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "0.png").write_bytes(b"mine")
    # Where the weights lie changes no image either.
    start(
        command(tmp_path, "out", "--offload-encoders", "--stream-blocks", "--show-memory")
    ).communicate(timeout=300)
    found = images(tmp_path / "out")
    assert found.pop("0.png") == b"mine"
    assert found == {name: data for name, data in undisturbed.items() if name != "0.png"}


def test_killed_at_any_moment_and_run_again_every_line_has_its_image(undisturbed, tmp_path):
    process = start(command(tmp_path, "out", "--batch", "1"))
    while not images(tmp_path / "out") and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    done = images(tmp_path / "out")
    assert 0 < len(done) < len(NAMES)
    again = start(command(tmp_path, "out", "--batch", "1"))
    again.communicate(timeout=300)
    found = images(tmp_path / "out")
    assert list(found) == NAMES
    assert done.items() <= found.items()


def test_two_processes_share_a_file_and_one_that_is_killed_ends_the_other(undisturbed, tmp_path):
    arguments = command(tmp_path, "out")
    first, second = start_job(arguments, 2)
    second.stderr.read(1)  # has joined, and begins to load
    second.kill()
    killed = time.monotonic()
    said = first.communicate(timeout=120)[1]
    assert time.monotonic() - killed < 60
    assert first.returncode not in (0, 2)
    assert "another task died" in said
    second.communicate()
    done = images(tmp_path / "out")
    assert len(done) <= 3  # of five
    said = [process.communicate(timeout=300)[0] for process in start_job(arguments, 2)]
    assert sum(int(one[: one.index(" images written")].split()[-1]) for one in said) == len(
        NAMES
    ) - len(done)
    assert images(tmp_path / "out") == undisturbed


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["a star", "--distributed"], "Give one of them"),
        (["--prompts", "none.jsonl"], "No such file"),
        (["a star", "--offload-encoders"], "does nothing for one prompt"),
        (["a star", "--stream-blocks", "--mesh", "data=1"], "Leave out --mesh"),
        (["--prompts", "none.jsonl", "--seed", "1"], "--seed does nothing with --prompts"),
        (["a star", "--prompts", "none.jsonl"], "not allowed with"),
        ([], "one of the arguments"),
    ],
)
def test_what_does_not_go_together_is_told(arguments, told, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["generate", *arguments])
    assert stopped.value.code == 2
    assert told in capsys.readouterr().err
