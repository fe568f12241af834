"""Files and pytrees: reading, writing, converting and inspecting weights; the hub."""

from fluxjax.checkpoint.convert import WeightsTransform, convert_weights
from fluxjax.checkpoint.defaults import load_defaults
from fluxjax.checkpoint.errors import WeightsError
from fluxjax.checkpoint.inspect import Report, inspect_weights
from fluxjax.checkpoint.locate import download

__all__ = [
    "Report",
    "WeightsError",
    "WeightsTransform",
    "convert_weights",
    "download",
    "inspect_weights",
    "load_defaults",
]
