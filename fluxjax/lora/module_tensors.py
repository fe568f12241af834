"""The tensors of one module of an adapter file: read, checked, and each used exactly once.

A file may come from anywhere, so every shape, dtype and value is checked before it is used, and
an error names the key.
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from fluxjax.checkpoint.errors import WeightsError
from fluxjax.checkpoint.tensors import TensorFile
from fluxjax.lora.names import Place
from fluxjax.lora.peft_settings import PeftSettings
from fluxjax.printable import printable
from fluxjax.shapes import Array

_DAMAGED = "The adapter is damaged: download or save it again"


@dataclass
class Module:
    """The keys of one module of an adapter file.

    - `name`: as the file has it.
    - `place`: the weight that the name means.
    - `keys`: of its tensors, by role.
    - `settings`: PEFT's settings of its network; None if there are none.
    """

    name: str
    place: Place
    keys: dict[str, str]
    settings: PeftSettings | None


class ModuleTensors:
    """Access to the tensors of one module by role.

    `role in tensors` says whether a tensor is there and not read yet.

    Reading a tensor removes its key from `keys`, so that what is left at the end is known to be
    unused. All methods that read raise `WeightsError` for a tensor that is missing or damaged.

    - `file`, `module`: where the tensors are.
    - `keys`: of the tensors that are not read yet, by role.
    - `alpha`: the value of the alpha tensor; None without one.
    """

    def __init__(self, file: TensorFile, module: Module):
        self.file = file
        self.module = module
        self.keys = dict(module.keys)
        self.alpha: float | None = None
        if "alpha" in self.keys:
            self.alpha = self._take_alpha()
        # Remembered here, because a bias has the scale of factors that are taken before it.
        self._up_rank: int | None = None
        if "up" in module.keys:
            up_shape = file.tensors[module.keys["up"]].shape
            self._up_rank = up_shape[1] if len(up_shape) > 1 else None

    def __contains__(self, role: str) -> bool:
        return role in self.keys

    @property
    def name(self) -> str:
        """The module's name, printable."""
        return printable(self.module.name)

    def error(self, text: str) -> WeightsError:
        """Return an error about this file; `text` is its message without the final period."""
        return WeightsError(f"{self.file.path}: {text}.")

    def unused_keys(self) -> str:
        """Return the keys that were not read, printable."""
        return ", ".join(printable(key) for key in self.keys.values())

    def take(self, role: str) -> np.ndarray:
        """Return the values of a tensor: finite floats, in its own dtype or float32.

        A 16-bit or 8-bit dtype is kept, so that an adapter takes no more memory than its file.
        """
        if role not in self.keys:
            others = ", ".join(self.module.keys)
            raise self.error(
                f"{self.name} comes without its {role}, beside {others}. It is incomplete"
            )
        key = self.keys.pop(role)
        values = self.file.tensors[key].view()
        if not jnp.issubdtype(values.dtype, jnp.floating):
            raise self.error(
                f"{printable(key)} has dtype {values.dtype}, but adapters are of floating-point "
                "numbers"
            )
        if not values.size:
            raise self.error(f"{printable(key)} of shape {list(values.shape)} is empty (rank 0)")
        if values.dtype == np.float64:
            # A number beyond float32 becomes infinity, which is refused below.
            with np.errstate(over="ignore"):
                values = values.astype(np.float32)
        if not np.isfinite(values).all():
            raise self.error(f"{printable(key)} holds NaN or infinity. {_DAMAGED}")
        return values

    def _take_alpha(self) -> float:
        """Return alpha as a number. **Raises:** `WeightsError` for anything else."""
        key = self.keys.pop("alpha")
        stored = self.file.tensors[key].view()
        value = np.asarray(stored).reshape(-1)
        # An integer is accepted, as some programs write it; a bool is not a number.
        is_number = value.size == 1 and value.dtype != np.bool_
        if not is_number or not np.isfinite(value.astype(np.float32)).all():
            raise self.error(f"{printable(key)} has to be one finite number. {_DAMAGED}")
        return float(value.astype(np.float32)[0])

    def matrix(self, role: str) -> np.ndarray:
        """Return a tensor as a matrix; the kernel of a 1x1 convolution loses its last axes."""
        # The key is looked up before, for the error message: `take` removes it.
        key = self.keys.get(role, "")
        values = self.take(role)
        is_kernel = values.ndim in (3, 4, 5)
        if is_kernel and set(values.shape[2:]) == {1}:
            values = values.reshape(values.shape[:2])
        if values.ndim != 2:
            raise self._shape_error(key, values, f"{role} has to be a matrix")
        return values

    def array(self, role: str, axes: int) -> np.ndarray:
        """Return a tensor with this number of axes.

        **Arguments:**

        - `axes`: the number that the method's files have.
        """
        key = self.keys.get(role, "")
        values = self.take(role)
        if values.ndim != axes:
            raise self._shape_error(key, values, f"{role} has to have {axes} axes")
        return values

    def vector(self, role: str) -> np.ndarray:
        """Return a tensor as a vector; all of its axes but one have length 1."""
        key = self.keys.get(role, "")
        values = self.take(role)
        if values.size != max(values.shape, default=1):
            raise self._shape_error(key, values, "it has to be a vector")
        return values.reshape(-1)

    def _shape_error(
        self,
        key: str,
        values: np.ndarray,
        rule: str,
    ) -> WeightsError:
        shape = list(values.shape)
        return self.error(f"{printable(key)} has shape {shape}, but {rule}")

    def integers(self, role: str) -> tuple[int, ...]:
        """Return a short tensor of integers; () for any other tensor."""
        tensor = self.file.tensors[self.keys.pop(role)]
        if tensor.size > 4 or tensor.dtype.kind not in "iu":
            return ()
        return tuple(int(number) for number in tensor.view().reshape(-1))

    def bias_name(self, role: str) -> str:
        """Return our name of the module's bias, which the tensor of this role changes.

        **Raises:** `WeightsError` for a layer without a bias, as those of T5 are.
        """
        place = self.module.place
        if place.bias is None:
            raise self.error(
                f"{place.weight} has no bias for {printable(self.keys[role])} to change"
            )
        return place.bias

    def bias(self, role: str) -> Array:
        """Return the tensor of a bias; one of lora_B has alpha / rank of its factors."""
        value = self.vector(role)
        if role == "up_bias" and self._up_rank is not None:
            factor = np.float32(self.factor(self._up_rank))
            value = factor * value.astype(np.float32)
        return jnp.asarray(value)

    def factor(self, rank: int) -> float:
        """Return alpha / rank, or alpha / sqrt(rank) for rsLoRA; without an alpha it is 1.

        The alpha is that of the module's own tensor, or else that of PEFT's settings.

        **Arguments:**

        - `rank`: as the shapes of the factors show it.
        """
        settings = self.module.settings
        if self.alpha is not None:
            divisor: float = rank
            if settings is not None and settings.root:
                divisor = math.sqrt(rank)
            factor = self.alpha / divisor
        elif settings is not None:
            factor = settings.factor(self.module.place.inner, rank)
        else:
            factor = 1.0
        # Written so that NaN is refused too.
        if not abs(factor) < np.finfo(np.float32).max:
            raise self.error(f"alpha / rank of {self.name} is {factor}, beyond float32")
        return factor

    def check_shapes(self, fits: bool, **tensors: np.ndarray) -> None:
        """Check that some tensors fit together.

        **Arguments:**

        - `fits`: whether they do.
        - `tensors`: by the name that the error message has for them.

        **Raises:** `WeightsError` with their shapes, unless they fit.
        """
        if fits:
            return
        shapes = [f"{name} of {list(value.shape)}" for name, value in tensors.items()]
        listed = " and ".join(shapes)
        raise self.error(f"{self.name} has {listed}, which do not fit together")
