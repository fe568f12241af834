"""Adapter files of every format: each key is told by its module's name and its role, and every key is used."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, overload

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from fluxjax.convert import tables
from fluxjax.convert.files import File, Tensor, WeightsError, read_header
from fluxjax.convert.tables import Dialect, Row
from fluxjax.lora.terms import Assigned, Full, Hadamard, Kron, LowRank, Magnitude, Term
from fluxjax.shapes import Array


class Change(eqx.Module):
    """A term and the place of it in a weight: the rows of a fused weight's part (`part`), whose halves are in the other order
    if `swap`."""

    term: Term
    part: str | None = eqx.field(static=True)
    swap: bool = eqx.field(static=True)


class Lora(eqx.Module):
    """An adapter. `changes`: by network ("flux", "clip", "t5"), then by the name of the weight or bias that they change.

    `format`: whose key names the file has.
    """

    changes: dict[str, dict[str, tuple[Change, ...]]]
    format: str = eqx.field(static=True)


@dataclass(frozen=True)
class Names:
    """How a format names the modules of one network. `flat`: with underscores for dots."""

    format: str
    network: str
    prefix: str
    dialect: Dialect
    flat: bool = False

    @cached_property
    def patterns(self) -> list[tuple[re.Pattern, Row]]:
        return [(_module_pattern(self.dialect, row, self.flat), row) for row in self.dialect.rows]

    def find(self, module: str) -> tuple[str, Row] | None:
        """Return our name of a module, its last field `{p}` left open where it has a weight and a bias."""
        if not module.startswith(self.prefix):
            return None
        rest = module[len(self.prefix) :]
        for pattern, row in self.patterns:
            if match := pattern.match(rest):
                return _open(row.ours).format(**match.groupdict(), p="{p}"), row
        return None


def _open(ours: str) -> str:
    return ours.removesuffix("weight") + "{p}" if ours.endswith(".weight") else ours


def _module_pattern(dialect: Dialect, row: Row, flat: bool) -> re.Pattern:
    theirs = row.theirs.removesuffix(".{p}").removesuffix(".weight")
    body = re.escape(theirs).replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{j\}", r"(?P<j>\d+)")
    text = f"(?:{re.escape(dialect.prefix)})?{body}"
    return re.compile((text.replace(r"\.", "_") if flat else text) + r"\Z")


# XLabs name the processors of BFL's blocks: 1 is the image's, 2 the text's; a single block's covers q, k, v alone.
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
_BFL, _DIFFUSERS = tables.FLUX_BFL, tables.FLUX_DIFFUSERS
_CLIP, _T5 = tables.CLIP_TRANSFORMERS, tables.T5_TRANSFORMERS
NAMES = (
    Names("kohya", "flux", "lora_unet_", _BFL, flat=True),
    Names("kohya", "flux", "lora_unet_", _DIFFUSERS, flat=True),
    Names("kohya", "clip", "lora_te1_", _CLIP, flat=True),
    Names("kohya", "t5", "lora_te3_", _T5, flat=True),
    Names("kohya", "t5", "lora_te2_", _T5, flat=True),
    Names("onetrainer", "flux", "lora_transformer_", _DIFFUSERS, flat=True),
    Names("lycoris", "flux", "lycoris_", _BFL, flat=True),
    Names("lycoris", "flux", "lycoris_", _DIFFUSERS, flat=True),
    Names("peft", "flux", "transformer.", _DIFFUSERS),
    Names("peft", "clip", "text_encoder.", _CLIP),
    Names("peft", "t5", "text_encoder_2.", _T5),
    Names("comfy", "flux", "diffusion_model.", _BFL),
    Names("comfy", "clip", "text_encoders.clip_l.transformer.", _CLIP),
    Names("comfy", "t5", "text_encoders.t5xxl.transformer.", _T5),
    Names("fal", "flux", "base_model.model.", _BFL),
    Names("peft", "flux", "base_model.model.", _DIFFUSERS),
    Names("xlabs", "flux", "", _XLABS),
    Names("bfl", "flux", "", _BFL),
    Names("peft", "flux", "", _DIFFUSERS),
)

# A key's end, and the role of its tensor.
_ROLES = {
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_A.default.weight": "down",
    "lora_B.default.weight": "up",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "down.weight": "down",
    "up.weight": "up",
    "lora_B.bias": "bias",
    "alpha": "alpha",
    "dora_scale": "magnitude",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "diff": "full",
    "diff_b": "bias",
    "scale": "assigned",
    **{f"lokr_{name}": name for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")},
    **{f"hada_{name}": f"h{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b")},
}


def _split(key: str) -> tuple[str, str] | None:
    """Return a key's module and its tensor's role."""
    for end in sorted(_ROLES, key=len, reverse=True):
        if key.endswith(f".{end}"):
            # A norm's own scale is part of its name.
            return (key if end == "scale" else key[: -len(end) - 1]), _ROLES[end]
    return None


@dataclass
class _Module:
    """The tensors of one module, by role."""

    names: Names
    weight: str
    row: Row
    roles: dict[str, str]


@overload
def read_lora(path: str | Path, *, strict: Literal[True] = True) -> Lora: ...


@overload
def read_lora(path: str | Path, *, strict: Literal[False]) -> tuple[Lora, list[str]]: ...


def read_lora(path: str | Path, *, strict: bool = True) -> Lora | tuple[Lora, list[str]]:
    """Read an adapter of any known format: kohya, OneTrainer, diffusers/PEFT, ComfyUI, fal, BFL Control, XLabs, LyCORIS's LoKr
    and LoHa, DoRA on any of them; for the transformer, CLIP and T5.

    **Arguments:** `path`: a safetensors file. `strict`: whether a key that is not used is an error.
    **Returns:** the adapter; without `strict` also the keys that are not used.
    **Raises:** `WeightsError` for keys that match nothing, with what they look like, a file that adapts nothing of FLUX.1, or
    tensors that do not belong together.
    """
    path = Path(path)
    file = read_header(path)
    modules, unused = _modules(file.tensors)
    if not modules:
        raise WeightsError(f"{path} adapts nothing of FLUX.1: {_looks_like(unused)}")
    if unused and strict:
        some = ", ".join(unused[:20]) + (f" … and {len(unused) - 20} more" if len(unused) > 20 else "")
        raise WeightsError(
            f"{path} holds {len(unused)} keys that fluxjax has no place for: {some}. {_looks_like(unused)} "
            "Pass strict=False to leave them out."
        )
    changes: dict[str, dict[str, list[Change]]] = {}
    settings = _settings(file)
    for name, module in modules.items():
        mine = changes.setdefault(module.names.network, {})
        for weight, term in _terms(path, name, module, file.tensors, settings):
            change = Change(term, module.row.part, module.row.layout == "swap")
            mine.setdefault(weight, []).append(change)
    formats = sorted({module.names.format for module in modules.values()})
    whole = {network: {name: tuple(found) for name, found in mine.items()} for network, mine in changes.items()}
    lora = Lora(whole, "+".join(formats))
    return lora if strict else (lora, unused)


def describe_lora(path: str | Path) -> str:
    """Return what an adapter file holds: format, networks, blocks, ranks, factors (alpha / rank), and keys without a place.

    **Raises:** as `read_lora`, but for keys without a place.
    """
    lora, unused = read_lora(path, strict=False)
    lines = [f"{Path(path).name}: {lora.format}"]
    for network, changes in lora.changes.items():
        terms = [change.term for found in changes.values() for change in found]
        terms = [term.inner if isinstance(term, Magnitude) else term for term in terms]
        low = [term for term in terms if isinstance(term, LowRank)]
        kinds = sorted({type(term).__name__ for found in changes.values() for term in (c.term for c in found)})
        lines.append(f"  {network}: {len(changes)} weights in {_blocks(changes)}; {', '.join(kinds)}")
        if low:
            ranks, factors = {len(term.down) for term in low}, {round(float(term.factor), 6) for term in low}
            lines.append(f"    rank {_span(ranks)}, alpha / rank {_span(factors)}")
    if unused:
        lines.append(f"  {len(unused)} keys without a place: {', '.join(unused[:20])}{' …' if len(unused) > 20 else ''}")
    return "\n".join(lines)


def _blocks(names: Iterable[str]) -> str:
    """Return the fields that weights belong to, with the number of their blocks where these are stacked."""
    blocks: dict[str, set[str]] = {}
    for name in names:
        first, second, *_ = name.split(".")
        blocks.setdefault(first, set()).update({second} if second.isdigit() else ())
    return ", ".join(f"{first} ({len(found)} blocks)" if found else first for first, found in sorted(blocks.items()))


def _span(values: set) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _modules(tensors: Mapping[str, Tensor]) -> tuple[dict[str, _Module], list[str]]:
    """Sort the keys by module; those without a place are returned too."""
    modules: dict[str, _Module] = {}
    unused = []
    for key in tensors:
        split = _split(key)
        if split is None:
            unused.append(key)
            continue
        name, role = split
        if name not in modules:
            found = next(((names, found) for names in NAMES if (found := names.find(name)) is not None), None)
            if found is None:
                unused.append(key)
                continue
            names, (weight, row) = found
            modules[name] = _Module(names, weight, row, {})
        modules[name].roles[role] = key
    return modules, unused


def _settings(file: File) -> dict[str, Any]:
    """Return what PEFT says of ranks and alphas in the metadata, by component."""
    text = file.metadata.get("lora_adapter_metadata")
    if text is None:
        return {}
    try:
        settings = json.loads(text)
    except ValueError as error:
        raise WeightsError(f"{file.path}: its lora_adapter_metadata is not JSON. Save the adapter anew.") from error
    if not isinstance(settings, dict):
        raise WeightsError(f"{file.path}: its lora_adapter_metadata is damaged. Save the adapter anew.")
    return settings


def _terms(
    path: Path, name: str, module: _Module, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> list[tuple[str, Term]]:
    """Return the changes of a module's weight and bias."""
    roles = dict(module.roles)

    def take(role: str) -> Array:
        if role not in roles:
            raise WeightsError(
                f"{path}: {name} comes without its {role}, beside {', '.join(module.roles.values())}. It is not whole."
            )
        return _matrix(tensors[roles.pop(role)])

    def scalar() -> float | None:
        return float(np.asarray(tensors[roles.pop("alpha")].view(), np.float32).reshape(-1)[0]) if "alpha" in roles else None

    found: list[tuple[str, Term]] = []
    weight, bias = module.weight.format(p="weight"), module.weight.format(p="bias")
    alpha = scalar()
    if "assigned" in roles:
        found.append((weight, Assigned(_vector(tensors[roles.pop("assigned")]))))
    if "bias" in roles:
        if weight == bias:
            raise WeightsError(f"{path}: {name} has no bias for {roles['bias']} to change.")
        found.append((bias, Full(_vector(tensors[roles.pop("bias")]))))
    build = next((build for mark, build in _BUILDERS.items() if mark & roles.keys()), None)
    if build is not None:
        term = build(take, roles, lambda rank: _factor(module, name, settings, alpha, rank))
        if "magnitude" in roles:
            raw = tensors[roles.pop("magnitude")]
            magnitude = _vector(raw)
            term = Magnitude(term, magnitude, by_row=magnitude.size == term.rows)
        found.insert(0, (weight, term))
    if roles:
        raise WeightsError(f"{path}: {', '.join(roles.values())} of {name} have nothing to belong to. It is not whole.")
    return found


Take = Callable[[str], Array]
Factor = Callable[[int], Array]


def _low_rank(take: Take, roles: Mapping[str, str], factor: Factor) -> Term:
    up, down = take("up"), take("down")
    if up.shape[1] != down.shape[0]:
        raise WeightsError(f"An adapter's up of {list(up.shape)} and down of {list(down.shape)} have different ranks.")
    return LowRank(up, down, factor(len(down)))


def _kron(take: Take, roles: Mapping[str, str], factor: Factor) -> Term:
    rank = None

    def side(name: str) -> tuple[Array, ...]:
        nonlocal rank
        if name in roles:
            return (take(name),)
        first, second = take(f"{name}_a"), take(f"{name}_b")
        rank = len(second)
        return first, second

    left, right = side("w1"), side("w2")
    # Alpha applies where a factor is itself decomposed.
    return Kron(left, right, jnp.float32(1.0) if rank is None else factor(rank))


def _hadamard(take: Take, roles: Mapping[str, str], factor: Factor) -> Term:
    up1, down1, up2, down2 = (take(role) for role in ("hw1_a", "hw1_b", "hw2_a", "hw2_b"))
    return Hadamard(up1, down1, up2, down2, factor(len(down1)))


def _full(take: Take, roles: Mapping[str, str], factor: Factor) -> Term:
    return Full(take("full"))


_BUILDERS: dict[frozenset[str], Callable[[Take, Mapping[str, str], Factor], Term]] = {
    frozenset({"up", "down"}): _low_rank,
    frozenset({"w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b"}): _kron,
    frozenset({"hw1_a", "hw1_b", "hw2_a", "hw2_b"}): _hadamard,
    frozenset({"full"}): _full,
}


def _factor(module: _Module, name: str, settings: Mapping[str, Any], alpha: float | None, rank: int) -> Array:
    """Return alpha / rank, or alpha / sqrt(rank) where PEFT's metadata says so; without an alpha it is the rank."""
    component = name.partition(".")[0]
    inner = name.partition(".")[2]
    if alpha is None:
        patterns = settings.get(f"{component}.alpha_pattern") or {}
        named = (value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", inner))
        alpha = next(named, settings.get(f"{component}.lora_alpha"))
    if alpha is None:
        alpha = rank
    root = settings.get(f"{component}.use_rslora", False)
    return jnp.float32(alpha / (rank**0.5 if root else rank))


def _matrix(tensor: Tensor) -> Array:
    """Return a tensor as a matrix; one of a 1x1 convolution loses its last axes."""
    values = jnp.asarray(tensor.view())
    if values.ndim == 4 and values.shape[2:] == (1, 1):
        values = values[:, :, 0, 0]
    if values.ndim != 2:
        raise WeightsError(f"{tensor.file}: a factor of shape {list(tensor.shape)} is no matrix.")
    return values


def _vector(tensor: Tensor) -> Array:
    return jnp.asarray(tensor.view()).reshape(-1)


_OTHERS = {
    "lora_unet_down_blocks": "Stable Diffusion 1 or XL",
    "lora_unet_input_blocks": "Stable Diffusion XL",
    "unet.down_blocks": "Stable Diffusion 1 or XL",
    "joint_blocks": "Stable Diffusion 3",
    "double_stream_modulation": "FLUX.2",
    "single_stream_modulation": "FLUX.2",
    "img_mlp_gate": "FLUX.2",
    "distilled_guidance_layer": "Chroma",
    "lora_te2_text_model": "Stable Diffusion XL",
}


def _looks_like(keys: Sequence[str]) -> str:
    """Say which model or format keys seem to be of."""
    for mark, model in _OTHERS.items():
        if any(mark in key for key in keys):
            return f"They look like {model}'s: use the adapter with that model."
    if keys and not any(_split(key) for key in keys):
        return f"They look like no adapter's ({', '.join(keys[:3])}): pass a LoRA, not a model."
    return "They look like no format that fluxjax knows."
