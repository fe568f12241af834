import random
from pathlib import Path

import pytest

from fluxjax import tokenize
from fluxjax.generate.tokens import Tokenizers

transformers = pytest.importorskip("transformers")
FOLDER = Path(__file__).parents[3] / "shared" / "tokenizers"

WORDS = [
    *"a red star Über naïve emoji it's DON'T 123 4.5 -- ... #hash @user http://x.y".split(),
    *"café I'll we've ¿qué? </w>".split(),
    *"日本語 😀👨\u200d👩\u200d👧 é e\u0301 ﬁ".split(),
    *"½ ① Ω مرحبا हिन्दी 한국어 ЖЗИ ﷺ ™ 🏳️\u200d🌈 <|endoftext|>".split(),
    *("\t", "\n", "\u200b", "\u00a0", "\u2028"),
]


def texts() -> list[str]:
    """Return 1,000 texts: words of many scripts and raw code points, from empty to long."""
    draw, result = random.Random(0), ["", " ", "\n\t ", "a" * 2000, "😀" * 300]
    ranges = [(32, 127), (32, 127), (160, 0x2000), (0x1F300, 0x1F6FF), (0x4E00, 0x9FFF)]
    while len(result) < 1000:
        if len(result) % 2:
            result.append(
                " ".join(draw.choice(WORDS) for _ in range(draw.choice([1, 3, 8, 20, 120])))
            )
        else:
            count = draw.choice([1, 5, 30, 300])
            result.append("".join(chr(draw.randrange(*draw.choice(ranges))) for _ in range(count)))
    return result


@pytest.fixture(scope="module")
def ours():
    if not FOLDER.exists():
        pytest.skip("the official vocabularies are not at hand")
    return Tokenizers.read(FOLDER / "clip-l", FOLDER / "t5-xxl")


def test_clip_ids_equal_transformers(ours):
    theirs = transformers.CLIPTokenizer.from_pretrained(FOLDER / "clip-l")
    expected = theirs(texts(), padding="max_length", max_length=77, truncation=True).input_ids
    assert [tokenize(ours, text).clip.tolist() for text in texts()] == expected


@pytest.mark.parametrize("length", [512, 64])
def test_t5_ids_equal_transformers(ours, length):
    theirs = transformers.T5TokenizerFast.from_pretrained(FOLDER / "t5-xxl")
    expected = theirs(texts(), padding="max_length", max_length=length, truncation=True).input_ids
    assert [tokenize(ours, text, max_length=length).t5.tolist() for text in texts()] == expected
