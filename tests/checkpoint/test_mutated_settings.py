"""Three hundred damaged settings files: a right result or one clear error, at once."""

import json
import random
import shutil
import time

import numpy as np

from fluxjax import WeightsError, load_tokenizers, tokenize
from fluxjax.checkpoint import load_defaults
from fluxjax.checkpoint.defaults import DEFAULTS_FIELDS
from fluxjax.checkpoint.shipped import tiny_folder

FILES = (
    "fluxjax.json",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "tokenizer_2/spiece.model",
    "model_index.json",
)
VALUES = (
    None,
    "text",
    [],
    {},
    [[[]]],
    True,
    -1,
    0,
    2,
    1e28,
    10**30,
    float("nan"),
    float("inf"),
    "\x1b[2J",
    "\ud800",
    0.5,
)


def mutated(content: bytes, name: str, rng: random.Random) -> bytes:
    """Return a damaged file.

    It has another value or field, changed bytes, an early end, or endless nesting.
    """
    kind = rng.choice(("value", "value", "value", "field", "bytes", "cut", "deep", "whole"))
    if kind in ("value", "field", "whole") and name.endswith(".json"):
        table = json.loads(content)
        field = rng.choice(list(table)) if kind == "value" else f"new{rng.random()}"
        table[field] = rng.choice(VALUES)
        return json.dumps(rng.choice(VALUES) if kind == "whole" else table).encode()
    if kind == "deep":
        return rng.choice((b"[", b'{"steps":')) * 100_000
    if kind == "cut":
        return content[: rng.randrange(len(content))]
    changed = bytearray(content)
    for _ in range(rng.choice((1, 4, 64))):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def check_use(folder):
    """Load the defaults and the tokenizers of a folder, and check that they work."""
    defaults = load_defaults(folder)
    assert all(DEFAULTS_FIELDS[name].allows(value) for name, value in vars(defaults).items())
    tokenizers = load_tokenizers(folder)
    ids = tokenize(tokenizers, "a red star on white, café ⭐", max_length=24)
    for found, size in (
        (ids.clip, tokenizers.clip.get_vocab_size()),
        (ids.t5, tokenizers.t5.get_piece_size()),
    ):
        assert found.dtype == np.int32
        assert 0 <= found.min() <= found.max() < size


def test_a_damaged_settings_file_gives_a_right_result_or_one_clear_error(tmp_path):
    folder, rng, outcomes = tmp_path / "model", random.Random(16), []
    for name in (
        *FILES,
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(tiny_folder() / name, folder / name)
    own = (folder / "fluxjax.json").read_bytes()
    for number in range(300):
        name = FILES[number % len(FILES)]
        content = (tiny_folder() / name).read_bytes()
        (folder / name).write_bytes(mutated(content, name, rng))
        if name.startswith("scheduler"):
            (folder / "fluxjax.json").unlink()  # it would be read instead
        start, message = time.monotonic(), ""
        try:
            check_use(folder)
        except (WeightsError, FileNotFoundError) as error:
            message = str(error)
        outcomes.append("refused" if message else "read")
        assert message.isprintable(), (name, message)
        assert len(message) < 600, (name, message)
        assert time.monotonic() - start < 5, name
        (folder / name).write_bytes(content)
        (folder / "fluxjax.json").write_bytes(own)
    assert min(outcomes.count("read"), outcomes.count("refused")) > 30  # both happened often
