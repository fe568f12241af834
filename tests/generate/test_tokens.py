import json
import os
import shutil
import subprocess
import sys

import pytest

from fluxjax import WeightsError, load_tokenizers, tokenize
from fluxjax.checkpoint.shipped import tiny_folder
from fluxjax.generate.tokens import END, START, Tokenizers


@pytest.fixture(scope="module")
def tokenizers():
    return load_tokenizers("tiny")


def pieces(tokenizers, ids):
    return [tokenizers.t5.id_to_piece(int(i)) for i in ids]


def test_a_short_prompt_ends_and_is_padded_as_each_encoder_has_it(tokenizers):
    ids = tokenize(tokenizers, "A red STAR on white", max_length=8)
    assert pieces(tokenizers, ids.t5) == [
        "▁a",
        "▁red",
        "▁star",
        "▁on",
        "▁white",
        "</s>",
        "<pad>",
        "<pad>",
    ]
    assert list(ids.t5[-2:]) == [0, 0]
    end, start = (tokenizers.clip.token_to_id(token) for token in (END, START))
    assert len(ids.clip) == 77
    assert ids.clip[0] == start
    assert list(ids.clip[6:]) == [end] * 71


def test_a_long_prompt_is_cut_so_that_its_end_stays(tokenizers):
    ids = tokenize(tokenizers, "red star " * 200, max_length=24)
    assert len(ids.t5) == 24
    assert ids.t5[-1] == 1
    assert ids.clip[-1] == tokenizers.clip.token_to_id(END)
    assert ids.clip[-2] != ids.clip[-1]


def test_the_second_prompt_feeds_t5_alone(tokenizers):
    one, two = tokenize(tokenizers, "a red star"), tokenize(tokenizers, "a blue ring")
    mixed = tokenize(tokenizers, "a red star", "a blue ring")
    assert (mixed.clip == one.clip).all()
    assert (mixed.t5 == two.t5).all()


def test_an_empty_second_prompt_is_a_prompt(tokenizers):
    assert tokenize(tokenizers, "a red star", "").t5[0] == 1


def test_an_empty_prompt_is_its_end_alone(tokenizers):
    ids = tokenize(tokenizers, "", max_length=4)
    assert list(ids.t5) == [1, 0, 0, 0]


@pytest.mark.parametrize(
    "text",
    ["☃", "日本語 👩‍👩‍👧", "é\u200b\u00a0ﬁ", "\x00\x07", "zebra", "</s> <pad> <|endoftext|>"],
)
def test_any_text_tokenizes(tokenizers, text):
    ids = tokenize(tokenizers, text, max_length=16)
    assert 1 in ids.t5
    assert ids.t5.max() < tokenizers.t5.get_piece_size()
    assert ids.clip.max() < tokenizers.clip.get_vocab_size()


def test_an_unknown_character_is_unk(tokenizers):
    assert "<unk>" in pieces(tokenizers, tokenize(tokenizers, "☃").t5)


def test_bad_lengths_and_folders_are_refused(tokenizers, tmp_path):
    with pytest.raises(ValueError, match="at least 1 token, got 0"):
        tokenize(tokenizers, "a", max_length=0)
    with pytest.raises(FileNotFoundError, match=r"vocab\.json is missing"):
        Tokenizers.read(tmp_path, tmp_path)
    for name in ("vocab.json", "merges.txt", "spiece.model"):
        (tmp_path / name).write_text("nonsense")
    with pytest.raises(WeightsError, match=r"vocab\.json is not JSON in UTF-8"):
        Tokenizers.read(tmp_path, tmp_path)


@pytest.fixture
def folders(tmp_path):
    """Copies of the tiny model's tokenizers, to be changed."""
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(tiny_folder() / name, tmp_path / name)
    return tmp_path / "tokenizer", tmp_path / "tokenizer_2"


@pytest.mark.parametrize(
    ("settings", "length"),
    [
        ({"model_max_length": int(1e30)}, 77),  # as transformers writes no limit
        ({"model_max_length": 1e30}, 77),
        ({"model_max_length": None}, 77),
        ({}, 77),
        ({"model_max_length": 16, "other": [{}]}, 16),
    ],
)
def test_clips_length_is_read_and_no_limit_is_its_own(folders, settings, length):
    (folders[0] / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert len(tokenize(Tokenizers.read(*folders), "a red star").clip) == length


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        (
            "tokenizer_config.json",
            b'{"model_max_length": -3}',
            "'model_max_length' should be an integer from 2 to 4096, or null",
        ),
        ("tokenizer_config.json", b'{"model_max_length": "77"}', "got '77'"),
        ("tokenizer_config.json", b"[]", "an object with names and values"),
        ("vocab.json", b'{"a": 1.5}', "a table of tokens and their ids"),
        ("vocab.json", b'{"a": 0, "b": 0}', "each once"),
        ("vocab.json", b'{"a": 1}', "the ids from 0 on"),
        ("vocab.json", b'{"a": 0}', r"has no <\|startoftext\|>"),
        ("merges.txt", b"a b c", "line 1: should be two tokens, got 'a b c'"),
        ("merges.txt", b"#version: 0.2\nabc", "line 2: should be two tokens"),
        ("merges.txt", b"caf\xe9 b", "is not UTF-8"),
        ("merges.txt", b"qqq zzz", "can't be read"),
    ],
)
def test_a_damaged_clip_tokenizer_is_named(folders, file, content, told):
    (folders[0] / file).write_bytes(content)
    with pytest.raises(WeightsError, match=told):
        Tokenizers.read(*folders)


def test_damaged_pieces_are_named(folders):
    (folders[1] / "spiece.model").write_bytes(b"nonsense")
    with pytest.raises(WeightsError, match=r"spiece\.model can't be read"):
        Tokenizers.read(*folders)


def test_merges_with_windows_line_ends_are_the_same(folders, tokenizers):
    merges = folders[0] / "merges.txt"
    merges.write_bytes(merges.read_bytes().replace(b"\n", b"\r\n"))
    prompt = "a red star on white, naïve"
    assert (
        tokenize(Tokenizers.read(str(folders[0]), folders[1]), prompt).clip
        == tokenize(tokenizers, prompt).clip
    ).all()


IN_ASCII = """
import locale, sys
import fluxjax
assert locale.getpreferredencoding(False) != "UTF-8", "the locale's encoding is UTF-8 here"
ids = fluxjax.tokenize(fluxjax.load_tokenizers(sys.argv[1]), "caf\\xe9 \\u2b50")
fluxjax.checkpoint.load_defaults(sys.argv[1])
fluxjax.convert_weights(sys.argv[1], sys.argv[2], only="clip")
print(*ids.clip)
"""


def test_files_are_read_as_utf_8_whatever_the_locale(tokenizers, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_folder(), model)
    vocabulary = model / "tokenizer" / "vocab.json"  # as transformers writes it, without escapes
    vocabulary.write_text(
        json.dumps(json.loads(vocabulary.read_bytes()), ensure_ascii=False), encoding="utf-8"
    )
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", IN_ASCII, str(model), str(tmp_path / "again")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [int(number) for number in done.stdout.split()] == list(
        tokenize(tokenizers, "café ⭐").clip
    )
