"""Names that options accept, read from the modules that own them when they are first needed.

Most of the owners import JAX, which takes seconds. The command line is parsed without them, unless
an option is given whose value has to be looked up.
"""

import functools
import pkgutil
from collections.abc import Collection, Iterator

from fluxjax.cli.console import interruptible


class LazyChoices(Collection[str]):
    """The names in a tuple or mapping, whose module is imported when the names are first used.

    argparse also iterates over the choices of an option that has no `metavar`, as the option is
    defined; give one.

    **Arguments:** `owner`: where the names are, as "package.module:NAME". `more`: names beside
    them.
    """

    def __init__(self, owner: str, more: tuple[str, ...] = ()):
        self._owner = owner
        self._more = more

    @functools.cached_property
    def _names(self) -> tuple[str, ...]:
        return (*interruptible(pkgutil.resolve_name, self._owner), *self._more)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


ATTENTIONS = LazyChoices("fluxjax.kernels.attention:IMPLEMENTATIONS")
BLOCK_PRESETS = LazyChoices("fluxjax.kernels.block_sizes:PRESETS")
CONTROL_MODES = LazyChoices("fluxjax.generate.controlnet:CONTROL_MODES")
DATA_CONDITIONS = LazyChoices("fluxjax.train.data_settings:CONDITIONS")
EDIT_METHODS = LazyChoices("fluxjax.generate.edit_methods:EDIT_METHODS", more=("kontext",))
INTEGRATORS = LazyChoices("fluxjax.generate.samplers:INTEGRATORS")
LAYOUTS = LazyChoices("fluxjax.checkpoint.layouts:LAYOUTS")
LORA_FORMATS = LazyChoices("fluxjax.lora.write:FORMATS")
MESH_AXES = LazyChoices("fluxjax.devices.mesh:AXES")
NETWORKS = LazyChoices("fluxjax.checkpoint.kinds:KINDS")
PLACEMENTS = LazyChoices("fluxjax.generate.reference_ids:PLACEMENTS")
QUANTIZATIONS = LazyChoices("fluxjax.nets.rounding:QUANTIZATIONS")
REDUX_RULES = LazyChoices("fluxjax.generate.redux:REDUX_RULES")
REGION_RULES = LazyChoices("fluxjax.generate.regions:REGION_RULES")
RULES = LazyChoices("fluxjax.generate.samplers:RULES")
SOLVERS = LazyChoices("fluxjax.generate.restore_image:SOLVERS")
TEXT_DTYPES = LazyChoices("fluxjax.train.data_settings:TEXT_DTYPES")
TIMERS = LazyChoices("fluxjax.generate.samplers:TIMERS")

DTYPES = ("float32", "bfloat16", "float16")
"""Dtypes of weights and activations; `jax.numpy.dtype` makes dtypes of the names."""
FILE_DTYPES = (*DTYPES, "float8_e4m3", "Q8_0", "Q4_K", "Q4_0")
"""What weights are written to files as: dtypes, and block formats of GGUF files."""
