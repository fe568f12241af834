"""Images drawn again from their own metadata, by `fluxjax generate --from`."""

import shlex
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from commands import OPTIONS

from fluxjax.cli.main import build_parser
from fluxjax.cli.output_pattern import FIELDS, name_part, output_pattern, repeated_path
from fluxjax.cli.places import BatchSize, read_batch_size
from fluxjax.cli.read_request import request_of_options
from fluxjax.cli.replay import OF_IMAGE, OF_RUN, check_recorded, image_command, replayed
from fluxjax.cli.starts import start_facts
from fluxjax.generate import write_png

AS_GIVEN = {
    *("max_sequence_length", "flux", "vae", "t5", "clip", "dtype", "lora", "integrator", "eta"),
    *("churn", "timer"),
    *("shift", "rule", "nag", "cache", "quantize", "attention", "flash_block_sizes", "unroll"),
    *("vae_memory", "mesh", "control", "canny", "image_prompt", "redux"),
    *("redux_rule", "siglip", "ip_adapter", "clip_vision", "ip_scale", "region", "region_rule"),
    *("region_base", "region_until", "controlnet", "controlnet_image", "controlnet_scale"),
    *("controlnet_mode", "controlnet_start", "controlnet_end", "controlnet_negative"),
}
"""Options that the command of an image repeats."""
SMALL = ["--height", "32", "--width", "48", "--steps", "2"]


def parse(*words):
    return build_parser().parse_args(["generate", *map(str, words)])


def request_and_facts(*words):
    request = request_of_options(replayed(parse(*words)))
    facts = start_facts(request.lines[0], request.start, request.timer)
    return request if facts is None else request.at_size(*facts.padded), facts


def command_of(*words):
    """Return the command of the last image of a command line."""
    request, facts = request_and_facts(*words)
    image = request.draws[-1]
    line = request.lines[image.line]
    return image_command(request, line, image, request.distilled, facts)


def write_record(path, command, **metadata):
    """Write an image that says that a command has drawn it."""
    about = {"prompt": "a", "version": "fluxjax 0.2.0", "command": command, **metadata}
    write_png(np.zeros((16, 16, 3), np.float32), path, about)


def test_every_option_is_of_the_run_or_of_the_image():
    """A new option belongs to one of the three."""
    parser = parse("a").parser
    names = {action.dest for action in parser._actions if action.option_strings} - {"help"}
    assert names == OF_RUN | OF_IMAGE | AS_GIVEN
    assert len(names) == len(OF_RUN) + len(OF_IMAGE) + len(AS_GIVEN)
    assert "--from" in OPTIONS["generate"]


@pytest.mark.parametrize(
    "words",
    [
        ["-5 degrees, 'quoted'", "--seeds", "3,4", "--images", "2", "--first-image", "1"],
        ["a", "b", "--cfg", "0.1", "--negative-prompt", "", "--rule", "apg", "--guidance=-1.25"],
        ["a", "--integrator", "sde", "--eta", "0.3", "--timer", "karras", "--nag", "3"],
        ["a", "--lora", "tiny:kraft:0.5", "--cache", "0.1", "--unroll", "--dtype", "float32"],
        ["a", "--prompt-2=--b", "--max-sequence-length", "20", "--region", "0,0,0.5,1=c"],
    ],
)
def test_the_command_of_an_image_is_its_own_command(words):
    """It holds everything: read back, it writes itself."""
    command = command_of(*words, *SMALL)
    first, second = shlex.split(command)[:2]
    assert (first, second) == ("fluxjax", "generate")
    assert command_of(*shlex.split(command)[2:]) == command
    for word in ("--images", "--seeds"):
        assert word not in command


def test_numbers_keep_the_bits_that_the_network_gets():
    command = command_of("a", *SMALL, "--guidance", "3.14159274", "--cfg", "0.30000001")
    again, _ = request_and_facts(*shlex.split(command)[2:])
    first, _ = request_and_facts("a", *SMALL, "--guidance", "3.14159274", "--cfg", "0.30000001")
    assert np.float32(again.distilled) == np.float32(first.distilled)
    assert again.recipe.guidance.scale == first.recipe.guidance.scale


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("start.png", "mask.png"):
        write_png(np.zeros((32, 40, 3), np.float32), name)
    return tmp_path


def test_an_image_that_was_drawn_from_a_file_names_it_and_notices_its_change(pictures):
    start = ["--init-image", "start.png", "--mask", "mask.png", "--start-time", "0.5"]
    words = ["a", *start, "--steps", "4", "--integrator", "ancestral", "--repeats", "2"]
    command = command_of(*words)
    assert command_of(*shlex.split(command)[2:]) == command
    request, facts = request_and_facts(*words)
    about = request.metadata(request.line, "3.5", facts.description)
    write_record("drawn.png", command, **about)
    again, facts = request_and_facts("--from", "drawn.png", "--output", "x.png")
    check_recorded(again, facts)
    assert again.recorded == {name: about[name] for name in about if name != "version"}
    other, other_facts = request_and_facts("--from", "drawn.png", "--seed", "5")
    assert set(other.recorded) == {"init_image", "mask"}
    check_recorded(other, other_facts)
    (pictures / "mask.png").unlink()
    write_png(np.ones((32, 40, 3), np.float32), "mask.png")
    changed, facts = request_and_facts("--from", "drawn.png", "--seed", "5")
    with pytest.raises(ValueError, match=r"its mask was 'mask\.png, sha256 .* now"):
        check_recorded(changed, facts)
    anew, facts = request_and_facts("--from", "drawn.png", "--mask", "mask.png")
    check_recorded(anew, facts)
    (pictures / "start.png").unlink()
    with pytest.raises(FileNotFoundError):
        request_and_facts("--from", "drawn.png")


def test_what_is_given_replaces_what_the_metadata_say(pictures):
    command = command_of("a", *SMALL, "--seed", "3", "--lora", "tiny:kraft", "--cfg", "2")
    write_record("drawn.png", command, batch="4 images")
    same = replayed(parse("--from", "drawn.png", "--quiet"))
    assert (same.texts, same.seed, same.cfg, same.quiet) == (["a"], 3, 2.0, True)
    assert same.drawn_in == BatchSize(4, together=False)
    other = replayed(parse("b", "c", "--from", "drawn.png", "--seeds", "1,2", "--lora", "tiny:ruf"))
    assert (other.texts, other.seeds, other.seed) == (["b", "c"], [1, 2], None)
    assert other.drawn_in is None
    assert [adapter.place for adapter in other.lora] == ["tiny:ruf"]
    assert (other.height, other.steps) == (32, 2)
    wide = replayed(parse("--from", "drawn.png", "--aspect", "2:1"))
    assert (wide.aspect, wide.height, wide.width) == (2, None, None)
    several = replayed(parse("--from", "drawn.png", "--images", "3"))
    assert (several.images, several.drawn_in) == (3, None)
    model = replayed(parse("--from", "drawn.png", "--model", "schnell"))
    assert (model.guidance, model.steps, model.cfg) == (None, None, None)


@pytest.mark.parametrize(
    ("about", "reason"),
    [
        ({}, "it has no metadata of fluxjax"),
        ({"version": "fluxjax 0.2.0", "prompt": "a"}, "are not those of `fluxjax generate` from"),
        ({"version": "fluxjax 0.2.0", "command": "rm -r x"}, "is not one of `fluxjax generate`"),
        ({"version": "fluxjax 0.2.0", "command": "'"}, "is not one of `fluxjax generate`"),
        (
            {"version": "fluxjax 0.2.0", "command": "fluxjax generate a --output-dir /etc"},
            "its command is not that of one image",
        ),
        ({"version": "fluxjax 0.2.0", "command": "fluxjax generate a b"}, "not that of one image"),
        (
            {"version": "fluxjax 0.2.0", "command": "fluxjax generate a", "batch": "0 images"},
            "is not the size of a batch",
        ),
    ],
)
def test_an_image_without_a_command_is_refused(about, reason, tmp_path):
    path = tmp_path / "other.png"
    write_png(np.zeros((16, 16, 3), np.float32), path, about)
    with pytest.raises(ValueError, match=reason):
        replayed(parse("--from", path))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        replayed(parse("--from", tmp_path / "none.png"))


def test_the_size_of_a_batch_is_read_as_it_is_described():
    for size in (BatchSize(1, together=False), BatchSize(12, together=True)):
        assert read_batch_size(size.describe()) == size


def test_patterns_name_each_image_by_its_fields():
    pattern = output_pattern("out/{prompt}_{seed:03}_{model}.png")
    values = {**FIELDS, "prompt": "A red_star, über\n../x", "seed": 7, "model": "a/FLUX.1"}
    assert str(pattern.path(values)) == "out/a-red-star-über-..-x_007_a-flux.1.png"
    assert name_part("★") == "empty"
    assert len(name_part("ü" * 500).encode()) <= 100
    assert str(repeated_path([pattern.path(FIELDS), pattern.path(values)])) == "None"
    assert repeated_path([Path("a.png"), Path("A.png")]) == Path("A.png")


def test_images_are_drawn_again_bit_by_bit(run, tmp_path):
    sampler = ["--integrator", "ancestral", "--cfg", "1.5", "--lora", "tiny:kraft:0.3"]
    names = ["--output", "o/{prompt}_{seed}.png", "--preview", "p.png", "--preview-every", "1"]
    seeds = ["--seeds", "1,2", "--batch", "3"]
    first = run("generate", "a red star", "a ring", *SMALL, *sampler, *seeds, *names)
    assert first.code == 0, first.errors
    with PIL.Image.open(tmp_path / "p.png") as file:
        assert (file.size, file.text) == ((96, 64), {"preview": "step 2 of 2"})
    drawn = (tmp_path / "o/a-red-star_2.png").read_bytes()
    again = run("generate", "--from", "o/a-red-star_2.png", "--output", "again.png", "--quiet")
    assert (again.code, again.output) == (0, "again.png\n")
    assert (tmp_path / "again.png").read_bytes() == drawn
    refused = run("generate", "--from", "o/a-red-star_2.png", "--output", "again.png")
    assert (refused.code, len(refused.errors)) == (2, 1)
    assert "there is a file again.png" in refused.errors[0]
    clash = run("generate", "a", "b", *SMALL, "--output", "x_{seed}.png")
    assert "names several images x_0.png. Add {index}" in clash.errors[0]


def test_an_image_of_a_line_is_drawn_again_bit_by_bit(run, tmp_path):
    (tmp_path / "lines.jsonl").write_text(
        '{"prompt": "a red star"}\n{"prompt": "a ring", "id": "ring"}\n'
    )
    file = ["--prompts", "lines.jsonl", *SMALL, "--batch", "2", "--quiet", "--output", "{id}.png"]
    first = run("generate", *file)
    assert (first.code, first.output.split()) == (0, ["0.png", "ring.png"])
    again = run("generate", "--from", "ring.png", "--quiet")
    assert again.code == 0, again.errors
    pixels = []
    for name in ("ring.png", "flux_0.png"):
        with PIL.Image.open(tmp_path / name) as image:
            pixels.append(np.asarray(image))
            assert image.text["batch"] == "2 lines"
    assert np.array_equal(*pixels)
