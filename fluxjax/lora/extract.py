"""Adapters extracted from the difference of two networks.

Networks are read one weight at a time, so two checkpoints in files need memory for one weight.
"""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from fluxjax.arguments import convert_arguments
from fluxjax.checkpoint.errors import WeightsError
from fluxjax.checkpoint.kinds import Network as AnyNetwork
from fluxjax.checkpoint.weights import InMemoryWeights, Parameter, Weights, parameters_of
from fluxjax.lora.adapter import Change, Lora
from fluxjax.lora.networks import check_plain, network_kind
from fluxjax.lora.terms import FullTerm, LowRankTerm
from fluxjax.lora.write import check_peft_holds

_OVERSAMPLING = 16
_POWER_ITERATIONS = 4
_LARGEST_EXACT_SIDE = 1024
"""Matrices whose smaller side is at most this long are decomposed as they are."""


@convert_arguments
def extract_lora(
    base: Weights | AnyNetwork,
    tuned: Weights | AnyNetwork,
    network: str,
    *,
    rank: int,
    to: str | None = None,
) -> Lora:
    """Return the adapter that makes a fine-tuned network of its base.

    For matrices it is the nearest difference of a rank, in the Frobenius norm; for biases and
    norm scales it is the full difference. At a rank that the differences have, base and adapter
    give the tuned network up to float32's rounding.

    For example:

        difference = extract_lora(flux, tuned_flux, "flux", rank=32, to="kohya")
        write_lora("difference.safetensors", difference, to="kohya")

    **Arguments:**

    - `base`, `tuned`: networks of the same shapes, or their weights in files.
    - `network`: "flux", "clip" or "t5".
    - `rank`: of the differences of matrices, at least 1.
    - `to`: the format in which the adapter will be written. What it can't hold is then an error
      before the work.

    **Raises:** `ValueError` for a rank below 1, or another network; `WeightsError` for networks of
    different shapes, for weights that are not plain or not finite, and for equal networks.

    **Source:** Eckart & Young 1936.
    """
    if rank < 1:
        raise ValueError(f"`extract_lora` needs a rank of at least 1, got {rank}.")
    base_weights, tuned_weights = _weights(base, network), _weights(tuned, network)
    slots = parameters_of(base_weights.network)
    if _shapes(slots) != _shapes(parameters_of(tuned_weights.network)):
        raise WeightsError(
            "The two checkpoints are networks of different shapes. "
            "Pass a fine-tuned model and its own base."
        )
    changes: dict[str, Change] = {}
    # Vectors first: an error about one of them should not come after hours of work.
    for name in sorted(slots, key=lambda name: len(slots[name].shape)):
        difference = _difference(base_weights, tuned_weights, name, slots[name])
        if not difference.any():
            continue
        is_whole = difference.ndim == 1
        if to is not None:
            check_peft_holds(name, is_whole=is_whole, to=to)
        if is_whole:
            term: FullTerm | LowRankTerm = FullTerm(jnp.asarray(difference))
        else:
            term = nearest_low_rank(difference, rank)
        changes[name] = Change(term, None, False)
    if not changes:
        raise WeightsError(
            "The two checkpoints have the same weights: there is nothing to extract. "
            "Pass a fine-tuned model and its own base."
        )
    # In the order of the network again.
    ordered: dict[str, tuple[Change, ...]] = {}
    for name in slots:
        if name in changes:
            ordered[name] = (changes[name],)
    return Lora({network: ordered}, "extracted")


def _shapes(slots: Mapping[str, Parameter]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights of a network by name."""
    return {name: slot.shape for name, slot in slots.items()}


def _weights(model: Weights | AnyNetwork, network: str) -> Weights:
    """Return a network's weights, checked.

    **Arguments:**

    - `model`: a network in memory, or its weights in files.
    - `network`: the name that the caller passed.

    **Raises:** `ValueError` for another network; `WeightsError` for weights that are not plain.
    """
    weights = model if isinstance(model, Weights) else InMemoryWeights(model)
    kind = network_kind("extract_lora", weights.network)
    if kind != network:
        raise ValueError(
            f"`extract_lora(network)` got {network!r}, but these are the weights of {kind!r}. "
            f"Pass {kind!r}."
        )
    check_plain(weights.network, "No adapter can be extracted from")
    return weights


def _difference(
    base: Weights,
    tuned: Weights,
    name: str,
    slot: Parameter,
) -> np.ndarray:
    """Return the difference of one weight, in float32.

    **Arguments:**

    - `base`, `tuned`: the weights of both networks.
    - `name`, `slot`: of the weight.

    **Raises:** `WeightsError` for NaN or infinity in one of them.
    """
    rows, float32 = slice(0, slot.shape[0]), np.dtype(np.float32)
    difference = tuned.read(name, rows, float32) - base.read(name, rows, float32)
    if not np.isfinite(difference).all():
        raise WeightsError(
            f"{name} holds NaN or infinity in one of the checkpoints. "
            "Pass checkpoints that are not damaged."
        )
    return difference


def nearest_low_rank(matrix: np.ndarray, rank: int) -> LowRankTerm:
    """Return the nearest matrix of a rank, from the singular value decomposition.

    The square roots of the singular values go into each of the two factors.

    Large matrices are projected before, on a basis of nearly the same range.

    **Arguments:**

    - `matrix`: [rows, columns], float32.
    - `rank`: at least 1.

    **Returns:** a term of this rank, or of a lower one if the matrix has that.
    """
    shorter_side = min(matrix.shape)
    if shorter_side > max(_LARGEST_EXACT_SIDE, 2 * (rank + _OVERSAMPLING)):
        basis = _range_basis(matrix, rank)
        left, values, right = np.linalg.svd(basis.T @ matrix, full_matrices=False)
        left = basis @ left
    else:
        left, values, right = np.linalg.svd(matrix, full_matrices=False)
    # A singular value of 0 adds nothing, but a term has at least rank 1.
    positive = int((values > 0).sum())
    count = max(1, min(rank, positive))
    root = np.sqrt(values[:count])
    return LowRankTerm(
        up=jnp.asarray(left[:, :count] * root),
        down=jnp.asarray(root[:, None] * right[:count]),
        factor=jnp.float32(1.0),
    )


def _range_basis(matrix: np.ndarray, rank: int) -> np.ndarray:
    """Return an orthonormal basis of nearly the span of the first left singular vectors.

    It is the range of a random projection, which power iterations sharpen.

    **Arguments:**

    - `matrix`: [rows, columns].
    - `rank`: the number of singular vectors that matter.

    **Returns:** [rows, rank + oversampling].

    **Source:** Halko et al. 2011, algorithm 4.4.
    """
    # A fixed seed, so that the same two checkpoints give the same adapter.
    rng = np.random.default_rng(0)
    sample = rng.standard_normal((matrix.shape[1], rank + _OVERSAMPLING)).astype(np.float32)
    basis = np.linalg.qr(matrix @ sample)[0]
    for _ in range(_POWER_ITERATIONS):
        row_basis = np.linalg.qr(matrix.T @ basis)[0]
        basis = np.linalg.qr(matrix @ row_basis)[0]
    return basis
