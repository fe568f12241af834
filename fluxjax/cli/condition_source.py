"""A condition of the command line: what is known of it before, and once, networks are loaded."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jax.typing import DTypeLike

from fluxjax.generate.conditioning import AddedCondition
from fluxjax.generate.draw_hooks import DrawHooks
from fluxjax.generate.load_network import LoadOptions
from fluxjax.generate.stage_memory import AddedTokens
from fluxjax.generate.text import TextStates
from fluxjax.nets.chroma_config import ChromaConfig
from fluxjax.nets.flux_config import FluxConfig
from fluxjax.nets.transformer import AbstractTransformer
from fluxjax.nets.vae import Vae
from fluxjax.zoo import APPENDED_FEATURES, Defaults

ConditionOfSize = Callable[[int, int], AddedCondition]
"""(height, width) in pixels -> the condition of images of this size."""


class ConditionNetwork(NamedTuple):
    """A network of a condition.

    `kind`: its name, as "controlnet". `source`: as for the function that loads it. `stays`: whether
    it is used in every step, and not only before the first one.
    """

    kind: str
    source: str
    stays: bool = False


class ConditionFacts(NamedTuple):
    """What a source is checked against before anything is written.

    `model`: its name, folder or hub id. `flux`: the transformer's config, with adapters; None if it
    is not known before the file is downloaded. `is_guided`: whether there is a negative prompt.
    `load`: how networks are loaded, with the mesh. `size`: height and width in pixels; None if each
    image has its own. `steps`: of the sampling.
    """

    model: str
    flux: FluxConfig | ChromaConfig | None
    is_guided: bool
    load: LoadOptions
    size: tuple[int, int] | None
    steps: int


@dataclass(frozen=True, kw_only=True)
class ConditionParts:
    """What a condition is made with, once the networks are loaded.

    `load`: how they were loaded; other networks of a condition are loaded in the same way. `dtype`:
    of the activations. `hooks`: run jitted functions, with `hooks.run("encode", ...)`. `time_load`:
    (name, function) -> function(), whose time is counted as loading. `texts`: the texts that
    sources name, encoded, each as a batch of one.
    """

    flux: AbstractTransformer
    vae: Vae
    load: LoadOptions
    dtype: DTypeLike
    hooks: DrawHooks
    time_load: Callable[[str, Callable], Any]
    texts: Mapping[str, TextStates]


class ConditionSource:
    """A condition as plain values, before anything is loaded.

    It applies to every image that the command draws: those of one prompt, or of all lines of a
    file. `takes`: what a model has to take for it, as in `fluxjax.zoo.Model`, or None. `features`:
    how many it appends to each image token. `texts`: those that it needs encoded as prompts are.
    """

    @property
    def takes(self) -> str | None:
        return None

    @property
    def features(self) -> int:
        return APPENDED_FEATURES.get(self.takes or "", 0)

    @property
    def texts(self) -> Sequence[str]:
        return ()

    def added_tokens(self, img_tokens: int, max_length: int) -> AddedTokens:
        """Return what it adds to the tokens of an image of `img_tokens`.

        **Arguments:** `max_length`: T5 tokens of a prompt.
        """
        return AddedTokens()

    @property
    def networks(self) -> Sequence[ConditionNetwork]:
        """The networks that it loads."""
        return ()

    def change_defaults(self, defaults: Defaults) -> Defaults:
        """Return how the model is sampled with this condition where no option says otherwise."""
        return defaults

    def check(self, facts: ConditionFacts) -> None:
        """Check that the model can use it; called when the options are read, and once more with
        the config of the loaded transformer if that was not known.

        **Raises:** `ValueError` if it can't.
        """

    @abstractmethod
    def describe(self) -> Mapping[str, str]:
        """Return what images' metadata say of it, by name; files with `describe_file`."""

    @abstractmethod
    def load(self, parts: ConditionParts) -> ConditionOfSize:
        """Load what it needs, once; return the function that makes the condition of a size."""
