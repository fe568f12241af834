"""Types of what the bodies of Pallas kernels work with."""

from typing import Any, Protocol, runtime_checkable

import numpy as np

from fluxjax.shapes import Array


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


Index = int | Array
"""A block's number or a number of tokens: known in Python, or a traced int32 scalar."""
