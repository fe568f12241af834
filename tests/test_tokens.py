import pytest

from fluxjax import load_tokenizers, tokenize
from fluxjax.tokens import END, START, Tokenizers


@pytest.fixture(scope="module")
def tokenizers():
    return load_tokenizers("tiny")


def pieces(tokenizers, ids):
    return [tokenizers.t5.id_to_piece(int(i)) for i in ids]


def test_a_short_prompt_ends_and_is_padded_as_each_encoder_has_it(tokenizers):
    ids = tokenize(tokenizers, "A red STAR on white", max_length=8)
    assert pieces(tokenizers, ids.t5) == ["▁a", "▁red", "▁star", "▁on", "▁white", "</s>", "<pad>", "<pad>"]
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


@pytest.mark.parametrize("text", ["☃", "日本語 👩‍👩‍👧", "é\u200b\u00a0ﬁ", "\x00\x07", "zebra", "</s> <pad> <|endoftext|>"])
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
    with pytest.raises(ValueError, match="can't be read"):
        Tokenizers.read(tmp_path, tmp_path)
