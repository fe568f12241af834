"""Prompts to token ids, on the host: the tokenizers of CLIP and T5."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
import tokenizers
from tokenizers import Regex, normalizers, pre_tokenizers

from fluxjax.checkpoint.atomic import new_file
from fluxjax.checkpoint.errors import WeightsError
from fluxjax.checkpoint.json_file import read_json
from fluxjax.checkpoint.settings import Field, check_settings, describe
from fluxjax.printable import printable

START, END = "<|startoftext|>", "<|endoftext|>"
# How OpenAI's CLIP splits a text: contractions, words, single digits, runs of other characters.
_CLIP_SPLIT = Regex(
    rf"{START}|{END}|".replace("|>", r"\|>").replace("<|", r"<\|")
    + r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
)

_CLIP_LENGTH = 77
"""Tokens of a prompt for CLIP, if a checkpoint does not say."""
_NO_LIMIT = 1e18
"""Lengths from here on mean no limit: transformers writes 1e30."""
_CLIP_FIELDS = {"model_max_length": Field(kind="integer", least=2, most=4096, optional=True)}
_MOST_BYTES = 64_000_000
"""Bytes of a tokenizer's file; the real ones have at most 2.5 million."""


class TokenIds(NamedTuple):
    """The token ids of one prompt, for CLIP, if there is one, and for T5, int32.

    `t5_length`: how many of T5's are not padding.
    """

    clip: np.ndarray | None
    t5: np.ndarray
    t5_length: int


@dataclass(frozen=True)
class Tokenizers:
    """The tokenizers of a checkpoint; `clip` is None for models that read prompts by T5 alone.

    `clip_length`: ids of a prompt for CLIP. `files`: the content of the files that they were read
    from, by folder and name, so that they can be saved with a model.
    """

    clip: tokenizers.Tokenizer | None
    t5: sentencepiece.SentencePieceProcessor
    clip_length: int = 77
    files: Mapping[str, bytes] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def read(cls, clip_folder: str | Path | None, t5_folder: str | Path) -> "Tokenizers":
        """Read both tokenizers from their folders.

        **Arguments:** `clip_folder`: with `vocab.json`, `merges.txt` and, for the number of ids of
        a prompt, `tokenizer_config.json`; None for a model without CLIP. `t5_folder`: with
        `spiece.model`.
        **Raises:** `FileNotFoundError` if one is missing, `ValueError` if one is not of its format.
        """
        if clip_folder is None:
            t5_folder = Path(t5_folder)
            files = _files(t5_folder, "tokenizer")
            return cls(None, _read_pieces(_existing(t5_folder / "spiece.model")), files=files)
        clip_folder = Path(clip_folder)
        vocabulary = _existing(clip_folder / "vocab.json")
        merges = _existing(clip_folder / "merges.txt")
        pieces = _existing(Path(t5_folder) / "spiece.model")
        length = _clip_length(clip_folder / "tokenizer_config.json")
        try:
            clip = _clip_tokenizer(_read_vocabulary(vocabulary), _read_merges(merges))
        except WeightsError:
            raise
        except Exception as error:  # the library's errors are of no common class
            raise _unreadable(clip_folder, error) from error
        files = _files(clip_folder, "tokenizer") | _files(Path(t5_folder), "tokenizer_2")
        return cls(clip, _read_pieces(pieces), length, files)

    def write(self, folder: Path) -> None:
        """Write their files, in `tokenizer` and, if there are two, `tokenizer_2` of a folder."""
        for name, content in self.files.items():
            with new_file(folder / name) as file:
                file.write(content)


_FILES = (
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


def _files(folder: Path, name: str) -> dict[str, bytes]:
    """Return the content of a tokenizer's files, with those that only other programs read."""
    files = {}
    for file in _FILES:
        if (folder / file).is_file():
            files[f"{name}/{file}"] = _content(folder / file)
    return files


def _unreadable(path: Path, error: Exception) -> WeightsError:
    return WeightsError(
        f"The tokenizer in {path} can't be read: {printable(str(error))}. Download the folder anew."
    )


def tokenize(
    tokenizers: Tokenizers, prompt: str, prompt_2: str | None = None, *, max_length: int = 512
) -> TokenIds:
    """Turn a prompt into the token ids of both encoders.

    **Arguments:** `prompt`: any text. `prompt_2`: a text that T5 reads in place of `prompt`.
    `max_length`: ids for T5, at least 1; dev takes 512, schnell 256.
    **Returns:** `clip_length` ids for CLIP, padded with its end token, if there is a tokenizer of
    it, and `max_length` for T5, padded with 0. A longer text is cut so that its end token stays.
    **Raises:** `ValueError` if `max_length` is not positive.
    """
    if max_length < 1:
        raise ValueError(f"`tokenize(max_length)` needs at least 1 token, got {max_length}.")
    clip = None
    if tokenizers.clip is not None:
        start, end = (_id(tokenizers.clip, token) for token in (START, END))
        words = tokenizers.clip.encode(prompt, add_special_tokens=False).ids
        clip = _fit([start, *words], end, tokenizers.clip_length, pad=end)
    t5_words = tokenizers.t5.encode(prompt if prompt_2 is None else prompt_2)
    return TokenIds(
        clip=clip,
        t5=_fit(t5_words, tokenizers.t5.eos_id(), max_length, pad=tokenizers.t5.pad_id()),
        t5_length=min(len(t5_words) + 1, max_length),
    )


def token_counts(
    tokenizers: Tokenizers, prompt: str, prompt_2: str | None = None
) -> tuple[int, int]:
    """Return how many tokens CLIP and T5 have for an uncut prompt, with the special ones.

    Without a tokenizer of CLIP its number is 0.
    """
    clip = 0
    if tokenizers.clip is not None:
        clip = len(tokenizers.clip.encode(prompt, add_special_tokens=False).ids) + 2
    return clip, len(tokenizers.t5.encode(prompt if prompt_2 is None else prompt_2)) + 1


def _fit(ids: Sequence[int], end: int, length: int, *, pad: int) -> np.ndarray:
    """Cut ids to a length, with the end token last, or pad them to it."""
    row = np.full(length, pad, np.int32)
    kept = [*ids[: length - 1], end]
    row[: len(kept)] = kept
    return row


def _clip_tokenizer(
    vocabulary: dict[str, int], merges: list[tuple[str, str]]
) -> tokenizers.Tokenizer:
    """Return CLIP's tokenizer: lower case, words by its own expression, then byte pairs.

    **Arguments:** `vocabulary`: ids by token. `merges`: pairs that are joined, in order.
    """
    model = tokenizers.models.BPE(
        vocab=vocabulary,
        merges=merges,
        unk_token=END,
        end_of_word_suffix="</w>",
        continuing_subword_prefix="",
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
    clip.add_special_tokens(
        [tokenizers.AddedToken(token, normalized=True) for token in (START, END)]
    )
    return clip


def _clip_length(path: Path) -> int:
    """Return how many ids a prompt has for CLIP."""
    if not path.is_file():
        return _CLIP_LENGTH
    settings = read_json(path)
    length = settings.get("model_max_length") if isinstance(settings, dict) else None
    if isinstance(length, int | float) and length >= _NO_LIMIT:
        settings = settings | {"model_max_length": None}
    checked = check_settings(str(path), settings, _CLIP_FIELDS)
    return checked.get("model_max_length") or _CLIP_LENGTH


def _read_vocabulary(path: Path) -> dict[str, int]:
    """Return tokens and their ids.

    The ids are rows of an embedding: each integer below the number of tokens, once.
    """
    table = read_json(path, most_bytes=_MOST_BYTES)
    if not isinstance(table, dict) or not all(type(number) is int for number in table.values()):
        raise WeightsError(f"{path} should be a table of tokens and their ids. Download it anew.")
    if set(table.values()) != set(range(len(table))):
        raise WeightsError(
            f"{path} should give its {len(table)} tokens the ids from 0 on, each once. "
            "Download it anew."
        )
    absent = [token for token in (START, END) if token not in table]
    if absent:
        raise WeightsError(f"{path} has no {absent[0]}. Pass a CLIP tokenizer's vocab.json.")
    return table


def _read_merges(path: Path) -> list[tuple[str, str]]:
    """Return the pairs of tokens that are merged, one per line."""
    try:
        lines = _content(path).decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise WeightsError(f"{path} is not UTF-8. Download it anew.") from error
    pairs = []
    for number, line in enumerate(lines, 1):
        line = line.removesuffix("\r")
        if not line or line.startswith("#version"):
            continue
        left, _, right = line.partition(" ")
        if not left or not right or " " in right:
            raise WeightsError(
                f"{path}, line {number}: should be two tokens, got {describe(line)}. "
                "Download it anew."
            )
        pairs.append((left, right))
    return pairs


def _read_pieces(path: Path) -> sentencepiece.SentencePieceProcessor:
    """Read T5's tokenizer. **Raises:** `WeightsError` for a file that is none."""
    try:
        t5 = sentencepiece.SentencePieceProcessor(model_proto=_content(path))
        size = t5.get_piece_size()
    except Exception as error:  # the library's errors are of no common class
        raise _unreadable(path, error) from error
    for name, number in {"</s>": t5.eos_id(), "<pad>": t5.pad_id(), "<unk>": t5.unk_id()}.items():
        if not 0 <= number < size:
            raise WeightsError(
                f"{path} has no {name}, which T5 needs. Pass a T5 tokenizer's spiece.model."
            )
    return t5


def _content(path: Path) -> bytes:
    with open(path, "rb") as file:
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise WeightsError(
            f"{path} is larger than {_MOST_BYTES:,} bytes, so it is not a tokenizer's. "
            "Download it anew."
        )
    return content


def _id(tokenizer: tokenizers.Tokenizer, token: str) -> int:
    found = tokenizer.token_to_id(token)
    if found is None:
        raise ValueError(
            f"This CLIP vocabulary has no {token}. Pass a CLIP tokenizer's vocab.json."
        )
    return found


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing. A FLUX folder keeps its tokenizers in tokenizer/ and tokenizer_2/."
        )
    return path
