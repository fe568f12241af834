"""Names of modules in adapter files: which weight of which network a name means, in each format.

A format is a prefix before the names of a checkpoint's key table, of BFL, diffusers or
transformers, in which dots may be written as underscores. For example, all of these mean
"double.0.img.out.weight":

    lora_unet_double_blocks_0_img_attn_proj                    kohya
    transformer.transformer_blocks.0.attn.to_out.0             diffusers and PEFT
    lora_transformer_transformer_blocks_0_attn_to_out_0        OneTrainer
    diffusion_model.double_blocks.0.img_attn.proj              ComfyUI
    double_blocks.0.processor.proj_lora1                       XLabs
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from fluxjax.checkpoint import names as tables
from fluxjax.checkpoint.chroma_names import TRANSFORMER_BFL, TRANSFORMER_DIFFUSERS
from fluxjax.checkpoint.dialect import Dialect, Row


@dataclass(frozen=True)
class Place:
    """The weight that the name of a module means.

    - `format`: the format that the name belongs to.
    - `network`: "flux", "clip" or "t5".
    - `weight`, `bias`: our names of its weight and bias; `bias` is None for a module without one.
    - `part`: the part of a fused weight that the module covers; None for all of it.
    - `swap`: whether the module has the two halves of its rows in the other order.
    - `inner`: the module's name inside the network, without the format's prefix.
    """

    format: str
    network: str
    weight: str
    bias: str | None
    part: str | None
    swap: bool
    inner: str

    @property
    def is_norm(self) -> bool:
        """Whether the weight is the scale of a norm, which is a vector."""
        return self.weight.endswith(".scale")

    def overlaps(self, other: "Place") -> bool:
        """Return whether two modules change the same rows of the same weight."""
        if (self.network, self.weight) != (other.network, other.weight):
            return False
        parts = {self.part, other.part}
        if len(parts) == 1 or None in parts:
            return True
        # Of two different parts only "qkv" covers another one, which is any but "mlp".
        return "qkv" in parts and "mlp" not in parts


@dataclass(frozen=True)
class NameFormat:
    """How one format names the modules of one network.

    - `format`: as `Lora.format` reports it.
    - `network`: "flux", "clip" or "t5".
    - `prefix`: what all names begin with.
    - `dialect`: the key table of the names after the prefix.
    - `flat`: whether dots are written as underscores.
    """

    format: str
    network: str
    prefix: str
    dialect: Dialect
    flat: bool = False


# XLabs adapts the attention processors of BFL's blocks: in a double block 1 is the image's and 2
# the text's; in a single block the processor covers q, k and v, but not the MLP.
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


def _with_processor_names(dialect: Dialect) -> Dialect:
    """Return diffusers' table with the names that old versions gave to attention layers too.

    There, the adapter's layers belonged to an attention processor.
    """
    rows = list(dialect.rows)
    for row in dialect.rows:
        if ".attn." in row.key and ".norm_" not in row.key:
            theirs = row.key.replace(".attn.", ".attn.processor.")
            theirs = theirs.replace(".to_out.0.", ".to_out.")
            rows.append(Row(theirs, row.name, row.part))
    return Dialect("diffusers", "", tuple(rows))


_BFL = TRANSFORMER_BFL
_DIFFUSERS = _with_processor_names(TRANSFORMER_DIFFUSERS)
_CLIP, _T5 = tables.CLIP_TRANSFORMERS, tables.T5_TRANSFORMERS
# Where two entries share a name, the first one counts.
_FORMATS: tuple[NameFormat, ...] = (
    NameFormat("kohya", "flux", "lora_unet_", _BFL, flat=True),
    NameFormat("kohya", "flux", "lora_unet_", _DIFFUSERS, flat=True),
    NameFormat("kohya", "clip", "lora_te1_", _CLIP, flat=True),
    NameFormat("kohya", "clip", "lora_te_", _CLIP, flat=True),
    NameFormat("kohya", "t5", "lora_te3_", _T5, flat=True),
    NameFormat("kohya", "t5", "lora_te2_", _T5, flat=True),
    NameFormat("onetrainer", "flux", "lora_transformer_", _DIFFUSERS, flat=True),
    NameFormat("lycoris", "flux", "lycoris_", _BFL, flat=True),
    NameFormat("lycoris", "flux", "lycoris_", _DIFFUSERS, flat=True),
    NameFormat("peft", "flux", "transformer.", _DIFFUSERS),
    NameFormat("bfl", "flux", "transformer.", _BFL),
    NameFormat("xlabs", "flux", "transformer.", _XLABS),
    NameFormat("peft", "clip", "text_encoder.", _CLIP),
    NameFormat("peft", "t5", "text_encoder_2.", _T5),
    NameFormat("comfy", "flux", "diffusion_model.", _BFL),
    NameFormat("comfy", "flux", "diffusion_model.", _DIFFUSERS),
    NameFormat("xlabs", "flux", "diffusion_model.", _XLABS),
    NameFormat("comfy", "clip", "text_encoders.clip_l.transformer.", _CLIP),
    NameFormat("comfy", "t5", "text_encoders.t5xxl.transformer.", _T5),
    NameFormat("fal", "flux", "base_model.model.", _BFL),
    NameFormat("peft", "flux", "base_model.model.", _DIFFUSERS),
    NameFormat("peft", "clip", "base_model.model.", _CLIP),
    NameFormat("peft", "t5", "base_model.model.", _T5),
    NameFormat("fal", "flux", "base_model.model.transformer.", _BFL),
    NameFormat("peft", "flux", "base_model.model.transformer.", _DIFFUSERS),
    NameFormat("xlabs", "flux", "", _XLABS),
    NameFormat("bfl", "flux", "", _BFL),
    NameFormat("peft", "flux", "", _DIFFUSERS),
    NameFormat("peft", "clip", "", _CLIP),
    NameFormat("peft", "t5", "", _T5),
)


@dataclass(frozen=True)
class _NamePattern:
    """One kind of module in one format.

    - `names`: the format and the network.
    - `pattern`: of the whole name.
    - `row`: of its weight in the key table.
    - `bias`: our name of its bias, with the indices left open; None for a module without one.
    """

    names: NameFormat
    pattern: re.Pattern
    row: Row
    bias: str | None


def find_place(module: str) -> Place | None:
    """Return the weight that a module's name means.

    **Arguments:**

    - `module`: the name as the file has it, without the ending of a tensor.

    **Returns:** None for a name of no known format.
    """
    for candidate in _patterns_by_form().get(_without_numbers(module), ()):
        match = candidate.pattern.match(module)
        if match:
            return _place(module, candidate, match.groupdict())
    return None


def _place(
    module: str,
    candidate: _NamePattern,
    indices: Mapping[str, str],
) -> Place:
    """Return the place of a module that a pattern matches.

    **Arguments:**

    - `module`: the whole name.
    - `candidate`: the pattern.
    - `indices`: the numbers in the name, by the name of the index.
    """
    row, bias = candidate.row, None
    if candidate.bias is not None:
        bias = candidate.bias.format(**indices, p="bias")
    return Place(
        format=candidate.names.format,
        network=candidate.names.network,
        weight=row.name.format(**indices, p="weight"),
        bias=bias,
        part=row.part,
        swap=row.layout == "swap",
        inner=module.removeprefix(candidate.names.prefix),
    )


@cache
def _patterns_by_form() -> Mapping[str, Sequence[_NamePattern]]:
    """Return all patterns by the form of their names, which is the name without its numbers.

    A name is then compared with the one or two patterns of its form, not with all of them.
    """
    found: dict[str, list[_NamePattern]] = {}
    for names in _FORMATS:
        biases = _bias_names(names.dialect)
        for row in names.dialect.rows:
            # A module is found by its weight; its bias is looked up beside it.
            if row.key.endswith(".bias"):
                continue
            stem = _module_name(row.key)
            for spelled in _spellings(names, stem):
                form = _without_numbers(spelled.replace("{i}", "0").replace("{j}", "0"))
                pattern = _NamePattern(names, _compile_name(spelled), row, biases.get(stem))
                found.setdefault(form, []).append(pattern)
    return found


def _bias_names(dialect: Dialect) -> dict[str, str]:
    """Return our names of the biases in a key table, by the names of their modules."""
    biases = {}
    for row in dialect.rows:
        if row.key.endswith((".bias", ".{p}")):
            biases[_module_name(row.key)] = row.name
    return biases


def _spellings(names: NameFormat, module: str) -> Iterator[str]:
    """Yield a module's name as a format writes it, with and without the dialect's own prefix."""
    for inner in {module, names.dialect.prefix + module}:
        yield names.prefix + (inner.replace(".", "_") if names.flat else inner)


def _module_name(theirs: str) -> str:
    """Return a key of a key table without the name of its tensor."""
    return re.sub(r"\.(\{p\}|weight|bias|scale)\Z", "", theirs)


def _without_numbers(name: str) -> str:
    return re.sub(r"[0-9]+", "#", name)


def _compile_name(spelled: str) -> re.Pattern:
    expression = re.escape(spelled)
    # At most three digits: no network has a thousand blocks.
    for index in ("i", "j"):
        expression = expression.replace(rf"\{{{index}\}}", f"(?P<{index}>[0-9]{{1,3}})")
    return re.compile(expression + r"\Z")
