"""Types of what the bodies of Pallas kernels work with."""

from typing import Any, Protocol, runtime_checkable

import numpy as np

from fluxjax.shapes import Array, Int


@runtime_checkable
class Ref(Protocol):
    """A reference to memory inside of a kernel, or to a part of it: `ref[...]` loads and stores."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    @property
    def at(self) -> Any:
        """`ref.at[index]` is a reference to a part."""

    def __getitem__(self, index: Any) -> Any: ...

    def __setitem__(self, index: Any, value: Any) -> None: ...


MosaicRef = Any
"""A `Ref`, or a barrier, in Mosaic GPU.

JAX annotates its functions with classes that the traced references are no instances of.
"""

Step = Int[Array, ""]
"""The number of a loop's iteration."""

Index = int | Array
"""A block's number or a number of tokens: known in Python, or a traced int32 scalar."""
