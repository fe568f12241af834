"""FLUX for JAX: networks, weights and sampling as pure functions.

The names here are those that a program like the README's uses; `fluxjax.flow`, `fluxjax.nets`,
`fluxjax.checkpoint`, `fluxjax.devices`, `fluxjax.lora`, `fluxjax.generate` and `fluxjax.train` hold
the rest. `__init__.pyi` lists them; each is imported when it is first used, so that a program which
uses only `fluxjax.flow` imports no network.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
from fluxjax.version import __version__  # noqa: F401, E402 (public)
