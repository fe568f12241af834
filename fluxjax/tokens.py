"""Prompts to token ids, on the host."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
import tokenizers
from tokenizers import Regex, normalizers, pre_tokenizers

START, END = "<|startoftext|>", "<|endoftext|>"
# Contractions, words, single digits, and runs of other signs: the split of OpenAI's CLIP.
_CLIP_SPLIT = Regex(
    rf"{START}|{END}|".replace("|>", r"\|>").replace("<|", r"<\|") + r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
)


class TokenIds(NamedTuple):
    """One prompt's ids, int32."""

    clip: np.ndarray
    t5: np.ndarray


@dataclass(frozen=True)
class Tokenizers:
    """The two tokenizers of a FLUX checkpoint. `clip_length`: ids a prompt gets for CLIP; `t5_pad`: T5's padding id."""

    clip: tokenizers.Tokenizer
    t5: sentencepiece.SentencePieceProcessor
    clip_length: int = 77

    @classmethod
    def read(cls, clip_folder: Path, t5_folder: Path) -> "Tokenizers":
        """Read `vocab.json` and `merges.txt` of one folder and `spiece.model` of the other.

        **Raises:** `FileNotFoundError` if one is missing, `ValueError` if one is not of its format.
        """
        vocabulary, merges = _existing(clip_folder / "vocab.json"), _existing(clip_folder / "merges.txt")
        pieces = _existing(t5_folder / "spiece.model")
        settings = clip_folder / "tokenizer_config.json"
        length = json.loads(settings.read_text()).get("model_max_length", 77) if settings.exists() else 77
        try:
            clip = _clip_tokenizer(json.loads(vocabulary.read_text()), _read_merges(merges))
            t5 = sentencepiece.SentencePieceProcessor(model_proto=pieces.read_bytes())
        except Exception as error:
            raise ValueError(
                f"The tokenizers in {clip_folder} and {t5_folder} can't be read: {error}. Download the folders anew."
            ) from error
        return cls(clip, t5, length)


def tokenize(tokenizers: Tokenizers, prompt: str, prompt_2: str | None = None, *, max_length: int = 512) -> TokenIds:
    """Turn a prompt into the ids of both encoders.

    **Arguments:** `prompt`: any text. `prompt_2`: a text for T5 alone, in place of `prompt`. `max_length`: ids for T5,
    at least 1; dev takes 512, schnell 256.
    **Returns:** ids of `clip_length` for CLIP, padded with its end token, and of `max_length` for T5, padded with 0. A
    longer text is cut so that its end token stays.
    **Raises:** `ValueError` if `max_length` is not positive.
    """
    if max_length < 1:
        raise ValueError(f"`tokenize(max_length)` needs at least 1 token, got {max_length}.")
    start, end = (_id(tokenizers.clip, token) for token in (START, END))
    words = tokenizers.clip.encode(prompt, add_special_tokens=False).ids
    t5_words = tokenizers.t5.encode(prompt if prompt_2 is None else prompt_2)
    return TokenIds(
        clip=_fit([start, *words], end, tokenizers.clip_length, pad=end),
        t5=_fit(t5_words, tokenizers.t5.eos_id(), max_length, pad=tokenizers.t5.pad_id()),
    )


def token_counts(tokenizers: Tokenizers, prompt: str, prompt_2: str | None = None) -> tuple[int, int]:
    """Return how many tokens CLIP and T5 have for a prompt before it is cut, with those that begin and end it."""
    words = tokenizers.clip.encode(prompt, add_special_tokens=False).ids
    return len(words) + 2, len(tokenizers.t5.encode(prompt if prompt_2 is None else prompt_2)) + 1


def _fit(ids: Sequence[int], end: int, length: int, *, pad: int) -> np.ndarray:
    """Cut to `length` with the end token last, or pad."""
    kept = [*ids[: length - 1], end]
    return np.array(kept + [pad] * (length - len(kept)), np.int32)


def _clip_tokenizer(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    model = tokenizers.models.BPE(
        vocab=vocabulary, merges=merges, unk_token=END, end_of_word_suffix="</w>", continuing_subword_prefix=""
    )
    clip = tokenizers.Tokenizer(model)
    clip.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    clip.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_CLIP_SPLIT, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    clip.add_special_tokens([tokenizers.AddedToken(token, normalized=True) for token in (START, END)])
    return clip


def _read_merges(path: Path) -> list[tuple[str, str]]:
    lines = path.read_text(encoding="utf-8").split("\n")
    pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    return [(left, right) for left, right in pairs]


def _id(tokenizer: tokenizers.Tokenizer, token: str) -> int:
    found = tokenizer.token_to_id(token)
    if found is None:
        raise ValueError(f"This CLIP vocabulary has no {token}. Pass a CLIP tokenizer's vocab.json.")
    return found


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing. A FLUX folder keeps its tokenizers in tokenizer/ and tokenizer_2/.")
    return path
