"""Names of modules in adapter files: which weight of which network a name means, in every format."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from fluxjax.checkpoint import names as tables
from fluxjax.checkpoint.dialect import Dialect, Row


@dataclass(frozen=True)
class Place:
    """What a module's name means. `weight`, `bias`: our names of them; `bias` is None where there is none. `part`: the rows
    of a fused weight that it covers. `swap`: whether its halves are in the other order. `inner`: the module's name inside
    the network, without the format's prefix."""

    format: str
    network: str
    weight: str
    bias: str | None
    part: str | None
    swap: bool
    inner: str

    @property
    def is_norm(self) -> bool:
        return self.weight.endswith(".scale")

    def overlaps(self, other: "Place") -> bool:
        """Whether two modules change the same rows of the same weight."""
        if (self.network, self.weight) != (other.network, other.weight):
            return False
        parts = {self.part, other.part}
        return len(parts) == 1 or None in parts or ("qkv" in parts and "mlp" not in parts)


@dataclass(frozen=True)
class Names:
    """How a format names the modules of one network. `flat`: with underscores for dots."""

    format: str
    network: str
    prefix: str
    dialect: Dialect
    flat: bool = False


# XLabs name the processors of BFL's blocks: 1 is the image's, 2 the text's; a single block's covers only q, k, v.
_XLABS = Dialect(
    "xlabs",
    "",
    (
        Row("double_blocks.{i}.processor.qkv_lora1.{p}", "double.{i}.img.qkv.{p}"),
        Row("double_blocks.{i}.processor.proj_lora1.{p}", "double.{i}.img.out.{p}"),
        Row("double_blocks.{i}.processor.qkv_lora2.{p}", "double.{i}.txt.qkv.{p}"),
        Row("double_blocks.{i}.processor.proj_lora2.{p}", "double.{i}.txt.out.{p}"),
        Row("single_blocks.{i}.processor.qkv_lora.{p}", "single.{i}.linear1.{p}", "qkv"),
        Row("single_blocks.{i}.processor.proj_lora.{p}", "single.{i}.linear2.{p}"),
    ),
)


def _old_attention(row: Row) -> tuple[Row, ...]:
    """Return the names that a layer had when it belonged to a processor of diffusers' attention."""
    if ".attn." not in row.key or ".norm_" in row.key:
        return ()
    return (
        Row(
            row.key.replace(".attn.", ".attn.processor.").replace(".to_out.0.", ".to_out."),
            row.name,
            row.part,
        ),
    )


_BFL = tables.FLUX_BFL
_DIFFUSERS = Dialect(
    "diffusers",
    "",
    (
        *tables.FLUX_DIFFUSERS.rows,
        *(old for row in tables.FLUX_DIFFUSERS.rows for old in _old_attention(row)),
    ),
)
_CLIP, _T5 = tables.CLIP_TRANSFORMERS, tables.T5_TRANSFORMERS
_ALL: tuple[Names, ...] = (
    Names("kohya", "flux", "lora_unet_", _BFL, flat=True),
    Names("kohya", "flux", "lora_unet_", _DIFFUSERS, flat=True),
    Names("kohya", "clip", "lora_te1_", _CLIP, flat=True),
    Names("kohya", "clip", "lora_te_", _CLIP, flat=True),
    Names("kohya", "t5", "lora_te3_", _T5, flat=True),
    Names("kohya", "t5", "lora_te2_", _T5, flat=True),
    Names("onetrainer", "flux", "lora_transformer_", _DIFFUSERS, flat=True),
    Names("lycoris", "flux", "lycoris_", _BFL, flat=True),
    Names("lycoris", "flux", "lycoris_", _DIFFUSERS, flat=True),
    Names("peft", "flux", "transformer.", _DIFFUSERS),
    Names("bfl", "flux", "transformer.", _BFL),
    Names("xlabs", "flux", "transformer.", _XLABS),
    Names("peft", "clip", "text_encoder.", _CLIP),
    Names("peft", "t5", "text_encoder_2.", _T5),
    Names("comfy", "flux", "diffusion_model.", _BFL),
    Names("comfy", "flux", "diffusion_model.", _DIFFUSERS),
    Names("xlabs", "flux", "diffusion_model.", _XLABS),
    Names("comfy", "clip", "text_encoders.clip_l.transformer.", _CLIP),
    Names("comfy", "t5", "text_encoders.t5xxl.transformer.", _T5),
    Names("fal", "flux", "base_model.model.", _BFL),
    Names("peft", "flux", "base_model.model.", _DIFFUSERS),
    Names("peft", "clip", "base_model.model.", _CLIP),
    Names("peft", "t5", "base_model.model.", _T5),
    Names("fal", "flux", "base_model.model.transformer.", _BFL),
    Names("peft", "flux", "base_model.model.transformer.", _DIFFUSERS),
    Names("xlabs", "flux", "", _XLABS),
    Names("bfl", "flux", "", _BFL),
    Names("peft", "flux", "", _DIFFUSERS),
    Names("peft", "clip", "", _CLIP),
    Names("peft", "t5", "", _T5),
)


@dataclass(frozen=True)
class _Entry:
    """One kind of module in one format: the pattern of its name, and the rows of its weight and of its bias."""

    names: Names
    pattern: re.Pattern
    row: Row
    bias: str | None


def find_place(module: str) -> Place | None:
    """Return what a module's name means, or None for a name of no known format."""
    for entry in _entries().get(_without_numbers(module), ()):
        if match := entry.pattern.match(module):
            fields, row = match.groupdict(), entry.row
            weight = row.name.format(**fields, p="weight")
            bias = None if entry.bias is None else entry.bias.format(**fields, p="bias")
            inner = module.removeprefix(entry.names.prefix)
            return Place(
                entry.names.format,
                entry.names.network,
                weight,
                bias,
                row.part,
                row.layout == "swap",
                inner,
            )
    return None


def _without_numbers(name: str) -> str:
    return re.sub(r"[0-9]+", "#", name)


@cache
def _entries() -> Mapping[str, Sequence[_Entry]]:
    """Return every kind of module by its name without numbers, so that finding one takes no search over all patterns."""
    found: dict[str, list[_Entry]] = {}
    for names in _ALL:
        biases = {
            _stem(row.key): row.name
            for row in names.dialect.rows
            if row.key.endswith((".bias", ".{p}"))
        }
        for row in names.dialect.rows:
            if row.key.endswith(".bias"):
                continue
            stem = _stem(row.key)
            for prefix in {names.prefix, names.prefix + _spelled(names.dialect.prefix, names.flat)}:
                spelled = prefix + _spelled(stem, names.flat)
                key = _without_numbers(spelled.replace("{i}", "0").replace("{j}", "0"))
                found.setdefault(key, []).append(
                    _Entry(names, _pattern(spelled), row, biases.get(stem))
                )
    return found


def _stem(theirs: str) -> str:
    """Return a key without the name of its tensor."""
    return re.sub(r"\.(\{p\}|weight|bias|scale)\Z", "", theirs)


def _spelled(name: str, flat: bool) -> str:
    return name.replace(".", "_") if flat else name


def _pattern(spelled: str) -> re.Pattern:
    # No network has a thousand blocks.
    return re.compile(
        re.escape(spelled)
        .replace(r"\{i\}", r"(?P<i>[0-9]{1,3})")
        .replace(r"\{j\}", r"(?P<j>[0-9]{1,3})")
        + r"\Z"
    )
