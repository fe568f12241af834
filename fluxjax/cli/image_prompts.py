"""Image prompts of the command line: by FLUX.1 Redux, or by an IP-Adapter."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp

from fluxjax.cli.condition_source import (
    ConditionNetwork,
    ConditionOfSize,
    ConditionParts,
    ConditionSource,
)
from fluxjax.cli.console import interruptible
from fluxjax.cli.output import encodable
from fluxjax.cli.starts import describe_file
from fluxjax.generate.conditioning import AddedCondition
from fluxjax.generate.image import read_image
from fluxjax.generate.ip_adapter import CombinedCondition, ImageEncoder, ip_adapter_condition
from fluxjax.generate.load_image_encoders import (
    load_clip_vision,
    load_ip_adapter,
    load_redux,
    load_siglip,
)
from fluxjax.generate.redux import REDUX_GUIDANCE, REDUX_STEPS, redux_condition, redux_tokens
from fluxjax.generate.stage_memory import AddedTokens
from fluxjax.nets.siglip import SiglipConfig
from fluxjax.shapes import Image
from fluxjax.zoo import Defaults, named_model

_SIGLIP_TOKENS = (SiglipConfig().image_size // SiglipConfig().patch) ** 2
"""Of an image prompt of Redux."""


class _Prompt(NamedTuple):
    """An image prompt that has been read."""

    path: Path
    image: Image
    weight: float

    def __str__(self) -> str:
        return f"{describe_file(self.path)}, weight {self.weight:g}"


@dataclass(frozen=True, kw_only=True, eq=False)
class ReduxSource(ConditionSource):
    """Image prompts by FLUX.1 Redux.

    `redux`, `siglip`: names of the networks' files, folders or hub ids. `rule`: how several images
    are combined. `needs_both`: whether negative prompts get the images too.
    """

    prompts: tuple[_Prompt, ...]
    redux: str
    siglip: str
    rule: str
    needs_both: bool

    @property
    def takes(self) -> str | None:
        # The adapter that ships with a model belongs to the Redux that ships with it.
        return None if named_model(self.redux) is None else "image"

    @property
    def networks(self) -> Sequence[ConditionNetwork]:
        return (ConditionNetwork("redux", self.redux), ConditionNetwork("siglip", self.siglip))

    def added_tokens(self, img_tokens: int, max_length: int) -> AddedTokens:
        sequences = 1 if self.rule == "sum" else len(self.prompts)
        return AddedTokens(txt=sequences * _SIGLIP_TOKENS)

    def change_defaults(self, defaults: Defaults) -> Defaults:
        if defaults.guidance is None:
            # A model of few steps, as schnell, keeps its own.
            return defaults
        return replace(defaults, steps=REDUX_STEPS, guidance=REDUX_GUIDANCE)

    def describe(self) -> Mapping[str, str]:
        return {
            "image_prompts": _described(self.prompts),
            "redux": f"{_described_source(self.redux)}, {self.rule}",
            "siglip": _described_source(self.siglip),
        }

    def load(self, parts: ConditionParts) -> ConditionOfSize:
        dtype = parts.load.dtype
        redux = parts.time_load("redux", lambda: load_redux(self.redux, dtype=dtype))
        siglip = parts.time_load("siglip", lambda: load_siglip(self.siglip, dtype=dtype))
        images = [prompt.image for prompt in self.prompts]
        tokens = redux_tokens(siglip, redux, images, dtype=parts.dtype, hooks=parts.hooks)
        condition = redux_condition(
            tokens,
            weights=jnp.float32([prompt.weight for prompt in self.prompts]),
            rule=self.rule,
            in_negative=self.needs_both,
        )
        return lambda height, width: condition


@dataclass(frozen=True, kw_only=True, eq=False)
class IpAdapterSource(ConditionSource):
    """Image prompts by an IP-Adapter.

    `adapter`, `encoder`: names of the networks' files, folders or hub ids. `load_encoder`: loads
    the encoder. `scale`: factor of all weights.
    """

    prompts: tuple[_Prompt, ...]
    adapter: str
    encoder: str
    load_encoder: Callable[..., ImageEncoder]
    scale: float

    @property
    def networks(self) -> Sequence[ConditionNetwork]:
        encoder = "siglip" if self.load_encoder is load_siglip else "clip_vision"
        return (
            ConditionNetwork("ip_adapter", self.adapter, stays=True),
            ConditionNetwork(encoder, self.encoder),
        )

    def describe(self) -> Mapping[str, str]:
        name = "siglip" if self.load_encoder is load_siglip else "clip_vision"
        return {
            "image_prompts": _described(self.prompts),
            "ip_adapter": f"{_described_source(self.adapter)}, scale {self.scale:g}",
            name: _described_source(self.encoder),
        }

    def load(self, parts: ConditionParts) -> ConditionOfSize:
        dtype = parts.load.dtype
        adapter = parts.time_load("ip-adapter", lambda: load_ip_adapter(self.adapter, dtype=dtype))
        encoder = parts.time_load("encoder", lambda: self.load_encoder(self.encoder, dtype=dtype))
        conditions: list[AddedCondition] = []
        for prompt in self.prompts:
            condition = ip_adapter_condition(
                adapter,
                encoder,
                prompt.image,
                scale=self.scale * prompt.weight,
                dtype=parts.dtype,
                hooks=parts.hooks,
            )
            conditions.append(condition)
        combined = CombinedCondition(tuple(conditions))
        return lambda height, width: combined


def read_image_prompts(options: argparse.Namespace) -> ConditionSource | None:
    """Return the image prompts that options name, with the networks that read them, if any."""
    _check_options(options)
    if not options.image_prompt:
        return None
    prompts = []
    for path, weight in options.image_prompt:
        prompts.append(_Prompt(path, jnp.asarray(interruptible(read_image, path)), weight))
    if options.redux is not None:
        return ReduxSource(
            prompts=tuple(prompts),
            redux=options.redux,
            siglip=options.redux if options.siglip is None else options.siglip,
            rule=options.redux_rule or "append",
            # Both prompts attend side by side there, and have as many tokens.
            needs_both=options.nag is not None,
        )
    is_clip = options.clip_vision is not None
    return IpAdapterSource(
        prompts=tuple(prompts),
        adapter=options.ip_adapter,
        encoder=options.clip_vision if is_clip else options.siglip,
        load_encoder=load_clip_vision if is_clip else load_siglip,
        scale=1.0 if options.ip_scale is None else options.ip_scale,
    )


def _check_options(options: argparse.Namespace) -> None:
    """**Raises:** `ValueError` for options that do not go together."""
    readers = [name for name in ("redux", "ip_adapter") if getattr(options, name) is not None]
    if len(readers) > 1:
        raise ValueError("--redux and --ip-adapter both read --image-prompt. Give one of them.")
    if options.image_prompt and not readers:
        raise ValueError("--image-prompt needs --redux or --ip-adapter, which read the image.")
    if readers and not options.image_prompt:
        raise ValueError(f"{_option(readers[0])} does nothing without --image-prompt. Give one.")
    users = {
        "redux_rule": ("redux",),
        "siglip": ("redux", "ip_adapter"),
        "clip_vision": ("ip_adapter",),
        "ip_scale": ("ip_adapter",),
    }
    for name, used_by in users.items():
        if getattr(options, name) is not None and not set(readers) & set(used_by):
            needed = " or ".join(_option(one) for one in used_by)
            raise ValueError(f"{_option(name)} does nothing without {needed}. Leave it out.")
    encoders = [name for name in ("clip_vision", "siglip") if getattr(options, name) is not None]
    if options.ip_adapter is not None and len(encoders) != 1:
        raise ValueError(
            "--ip-adapter needs its image encoder: --clip-vision for XLabs', or --siglip for "
            f"InstantX's, got {len(encoders)} of them."
        )


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _described(prompts: Sequence[_Prompt]) -> str:
    return "; ".join(map(str, prompts))


def _described_source(source: str) -> str:
    path = Path(source)
    return describe_file(path) if path.is_file() else encodable(source)
