"""Regional prompts of the command line."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax.numpy as jnp

from fluxjax.cli.compound_options import RegionOption
from fluxjax.cli.condition_source import (
    ConditionFacts,
    ConditionOfSize,
    ConditionParts,
    ConditionSource,
)
from fluxjax.cli.console import interruptible
from fluxjax.cli.output import encodable
from fluxjax.cli.starts import describe_file
from fluxjax.generate.conditioning import AddedCondition
from fluxjax.generate.masks import read_mask
from fluxjax.generate.regions import (
    REGION_BASE,
    REGION_UNTIL,
    MixedCondition,
    Region,
    RegionalCondition,
    check_region_list,
    check_until,
    region_labels,
    regional_condition,
)
from fluxjax.generate.stage_memory import AddedTokens
from fluxjax.generate.text import TextStates


@dataclass(frozen=True, kw_only=True, eq=False)
class RegionSource(ConditionSource):
    """Prompts of parts of the images.

    `prompts`, `regions`, `places`: the text of each region, where it is, and how metadata say that.
    `rule`, `base`, `until`: as of `regional_condition`; those that are not given as its defaults.
    """

    prompts: tuple[str, ...]
    regions: tuple[Region, ...]
    places: tuple[str, ...]
    rule: str
    base: float
    until: float | None

    @property
    def texts(self) -> Sequence[str]:
        return self.prompts

    def added_tokens(self, img_tokens: int, max_length: int) -> AddedTokens:
        # Mixed prompts are evaluated one after another.
        return AddedTokens(txt=0 if self.rule == "mix" else len(self.prompts) * max_length)

    def check(self, facts: ConditionFacts) -> None:
        mesh = facts.load.mesh
        if mesh is not None and mesh.shape["context"] > 1:
            raise ValueError(
                "--region names tokens of a whole image, and --mesh splits them. "
                "Use context=1 with it."
            )
        # The same errors as once all is loaded.
        check_region_list(self.regions)
        if facts.size is not None:
            region_labels(self.regions, *facts.size)
        if self.until is not None:
            check_until(self.until, facts.steps)

    def describe(self) -> Mapping[str, str]:
        regions = []
        for place, prompt in zip(self.places, self.prompts, strict=True):
            regions.append(f"{place}={prompt}")
        rule = f"{self.rule}, base {self.base:g}"
        if self.until is not None:
            rule += f", until {self.until:g}"
        return {"regions": encodable("; ".join(regions)), "region_rule": rule}

    def load(self, parts: ConditionParts) -> ConditionOfSize:
        encoded = [parts.texts[prompt] for prompt in self.prompts]
        pooled = [one.vec for one in encoded if one.vec is not None]
        states = TextStates(
            jnp.concatenate([one.txt for one in encoded]),
            jnp.concatenate(pooled) if pooled else None,
        )

        def condition(height: int, width: int) -> AddedCondition:
            return self._condition(states, height, width)

        return condition

    def _condition(
        self, states: TextStates, height: int, width: int
    ) -> RegionalCondition | MixedCondition:
        return regional_condition(
            states,
            self.regions,
            height=height,
            width=width,
            rule=self.rule,
            base=self.base,
            until=self.until,
        )


def read_regions(options: argparse.Namespace) -> ConditionSource | None:
    """Return the regions that options name, if any.

    **Raises:** `ValueError` for options that do not go together, or what is no region.
    """
    rule = options.region_rule or "attention"
    if not options.region:
        for name in ("rule", "base", "until"):
            if getattr(options, f"region_{name}") is not None:
                raise ValueError(f"--region-{name} does nothing without --region. Give one.")
        return None
    if options.nag is not None:
        raise ValueError(
            "--nag guides away from one prompt by another, and --region adds prompts of parts. "
            "Use --cfg with it."
        )
    if rule == "mix" and options.cache is not None:
        raise ValueError(
            "--cache remembers one evaluation of a step, and --region-rule mix takes several. "
            "Leave --cache out."
        )
    base, until = options.region_base, options.region_until
    if rule == "attention":
        base = REGION_BASE if base is None else base
        until = REGION_UNTIL if until is None else until
    elif until is not None:
        raise ValueError("--region-until is for --region-rule attention. Leave it out.")
    regions, places = [], []
    for option in options.region:
        region, place = _read_region(option)
        regions.append(region)
        places.append(place)
    source = RegionSource(
        prompts=tuple(option.prompt for option in options.region),
        regions=tuple(regions),
        places=tuple(places),
        rule=rule,
        base=0.0 if base is None else base,
        until=until,
    )
    return source


def _read_region(option: RegionOption) -> tuple[Region, str]:
    """Return a region, and how metadata say where it is."""
    if option.mask is not None:
        mask = interruptible(read_mask, option.mask)
        return Region(mask=jnp.asarray(mask)), describe_file(option.mask)
    if option.box is None:
        return Region(), "background"
    return Region(box=option.box), ",".join(f"{edge:g}" for edge in option.box)
