"""`printable`, which lies in `fluxjax/printable.py`, so that it is imported without networks."""

from fluxjax.printable import printable

__all__ = ["printable"]
