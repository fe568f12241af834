"""Train the tiny model's two vocabularies on its captions, in the file formats of CLIP and T5."""

import io
import json
import math
import string
from collections import Counter
from pathlib import Path

import numpy as np
import sentencepiece
import tokenizers
from scenes import caption, random_scene
from sentencepiece import sentencepiece_model_pb2
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from fluxjax.generate.tokens import END, START, _clip_tokenizer

CLIP_LENGTH = 77
T5_LENGTH = 24


def write(folder: Path) -> None:
    """Write `tokenizer/` and `tokenizer_2/` below a folder."""
    rng = np.random.default_rng(0)
    captions = [caption(random_scene(rng), rng) for _ in range(20_000)]
    _write_clip(captions, folder / "tokenizer")
    _write_t5(captions, folder / "tokenizer_2")


def _write_clip(captions: list[str], folder: Path) -> None:
    """Train byte-level BPE as CLIP's: every byte, every byte that ends a word, then merges."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    untrained = _clip_tokenizer({END: 0, START: 1}, [])
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        initial_alphabet=bytes_,
        end_of_word_suffix="</w>",
        special_tokens=[],
        show_progress=False,
    )
    untrained.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(untrained.to_str())["model"]["merges"]]
    words = (
        bytes_
        + [f"{byte}</w>" for byte in bytes_]
        + [left + right for left, right in merges]
        + [START, END]
    )
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words))}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    _write_json(folder / "special_tokens_map.json", special)
    config = special | {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": CLIP_LENGTH,
        "do_lower_case": True,
    }
    _write_json(folder / "tokenizer_config.json", config)


def _write_t5(captions: list[str], folder: Path) -> None:
    """Write a unigram model with T5's special ids that ignores case.

    Its pieces are the captions' words, and letters, digits and signs to spell other words. Any
    other character becomes <unk>.
    """
    proto = _empty_proto()
    counts = Counter(word for text in captions for word in text.replace(",", " ,").split())
    total = sum(counts.values())
    pieces = [
        ("\u2581" + word, math.log(count / total))
        for word, count in counts.most_common()
        if word != ","
    ]
    characters = ["\u2581", *string.ascii_lowercase, *string.digits, *".,'-!?:;()"]
    # A spelled word must never score above the word itself.
    pieces += [(character, -20.0) for character in characters]
    for piece, score in pieces:
        proto.pieces.add(piece=piece, score=score)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(proto.SerializeToString())
    _t5_fast(proto).save(str(folder / "tokenizer.json"))
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    _write_json(folder / "special_tokens_map.json", special)
    config = special | {
        "tokenizer_class": "T5Tokenizer",
        "model_max_length": T5_LENGTH,
        "extra_ids": 0,
    }
    _write_json(folder / "tokenizer_config.json", config)


def _empty_proto() -> sentencepiece_model_pb2.ModelProto:
    """Return a unigram model with T5's normalization, case-folded, and its special pieces alone."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([string.ascii_lowercase]),
        model_writer=model,
        vocab_size=40,
        hard_vocab_limit=False,
        normalization_rule_name="nmt_nfkc_cf",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
    del proto.pieces[3:]
    return proto


def _t5_fast(proto: sentencepiece_model_pb2.ModelProto) -> tokenizers.Tokenizer:
    """The same model as a `tokenizer.json`, which transformers prefers."""
    fast = tokenizers.Tokenizer(
        models.Unigram([(piece.piece, piece.score) for piece in proto.pieces], unk_id=2)
    )
    fast.normalizer = normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap)
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    fast.decoder = decoders.Metaspace(prepend_scheme="always")
    fast.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    fast.add_special_tokens([proto.pieces[index].piece for index in range(3)])
    return fast


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
