"""The orthogonal blocks of OFT and BOFT, from the parameters that LyCORIS and PEFT store.

An orthogonal block is the Cayley transform of a skew-symmetric one. It is computed in float64, in
NumPy, once as a file is read, so that a merge only multiplies by the result.
"""

import numpy as np

from fluxjax.lora.peft_settings import PeftSettings


def cayley(blocks: np.ndarray, limit: float) -> np.ndarray:
    """Return the Cayley transform (I + Q) (I - Q)^-1 of each block, where Q = block - block^T.

    **Arguments:**

    - `blocks`: [..., size, size].
    - `limit`: the largest Frobenius norm of all Q together, to which larger ones are scaled down;
      0 for no limit.

    **Returns:** orthogonal blocks of the same shape, in float32.

    **Source:** LyCORIS, `lycoris.functional.diag_oft.get_r`; Qiu et al. 2023, section 4.
    """
    blocks = blocks.astype(np.float64)
    skew = blocks - np.swapaxes(blocks, -1, -2)
    # LyCORIS adds this constant too, so that the scaled blocks are the same.
    norm = float(np.linalg.norm(skew)) + 1e-8
    if 0 < limit < norm:
        skew *= limit / norm
    identity = np.eye(blocks.shape[-1])
    return ((identity + skew) @ np.linalg.inv(identity - skew)).astype(np.float32)


def peft_cayley(
    vectors: np.ndarray,
    size: int,
    settings: PeftSettings,
) -> np.ndarray:
    """Return the blocks of PEFT's OFT: the Cayley transform (I - Q) (I + Q)^-1, or its series.

    **Arguments:**

    - `vectors`: [blocks, size (size - 1) / 2], the upper triangles of the skew-symmetric Q.
    - `size`: of a block.
    - `settings`: say whether it is the series, and whether OFT is constrained.

    **Returns:** blocks [blocks, size, size] in float32, orthogonal up to the error of the series.

    **Source:** peft, `OFTRotationModule`.
    """
    upper = np.zeros((len(vectors), size, size))
    upper[:, *np.triu_indices(size, 1)] = vectors
    skew = upper - np.swapaxes(upper, 1, 2)
    if settings.constrained:
        skew = _project(skew, settings.epsilon / np.sqrt(len(vectors)))
    if settings.neumann:
        return _neumann_series(skew, settings.terms).astype(np.float32)
    identity = np.eye(size)
    return ((identity - skew) @ np.linalg.inv(identity + skew)).astype(np.float32)


def _project(skew: np.ndarray, radius: float) -> np.ndarray:
    """Scale down each block whose Frobenius norm is larger than the radius.

    **Arguments:**

    - `skew`: [blocks, size, size].
    - `radius`: the largest norm that a block keeps.
    """
    norm = np.linalg.norm(skew, axis=(1, 2), keepdims=True)
    # The smallest normal number only keeps a zero block from a division by 0.
    factor = radius / np.maximum(norm, np.finfo(np.float64).tiny)
    return skew * np.where(norm <= radius, 1.0, factor)


def _neumann_series(skew: np.ndarray, terms: int) -> np.ndarray:
    """Return I + 2 Q + 2 Q^2 + … + Q^last; as in PEFT, the last power counts once.

    **Arguments:**

    - `skew`: Q of each block, [blocks, size, size].
    - `terms`: their number, as PEFT's settings have it.
    """
    total = np.broadcast_to(np.eye(skew.shape[-1]), skew.shape).copy()
    if terms > 1:
        total += 2 * skew
    if terms <= 2:
        return total
    last = max(3, terms - 1)
    power = skew
    for exponent in range(2, last + 1):
        power = power @ skew
        if exponent == last:
            total += power
        else:
            total += 2 * power
    return total


def butterfly_order(
    stages: int,
    number: int,
    size: int,
) -> np.ndarray | None:
    """Return the permutation of the rows in each stage of LyCORIS's BOFT.

    **Arguments:**

    - `stages`: the number of factors of the rotation.
    - `number`, `size`: of the blocks of a stage.

    **Returns:** [stages, number * size]; None for blocks that can't make a butterfly.
    """
    if size % 2 or stages > 32 or number % 2 ** (stages - 1):
        return None
    rows = np.arange(number * size, dtype=np.int32)
    orders = []
    for stage in range(stages):
        width = 2**stage * size // 2
        orders.append(rows.reshape(-1, 2, width).swapaxes(1, 2).reshape(-1))
    return np.stack(orders)


def peft_butterfly_order(
    stages: int,
    number: int,
    size: int,
) -> np.ndarray | None:
    """Return the permutation of the inputs in each stage of PEFT's BOFT.

    In each group of 2^(stage + 1) half blocks, the even ones come first.

    **Arguments:**

    - `stages`: the number of factors of the rotation.
    - `number`, `size`: of the blocks of a stage.

    **Returns:** [stages, number * size]; None for blocks that can't make a butterfly.

    **Source:** peft, `BOFTLayer.block_butterfly_perm`.
    """
    inputs = np.arange(number * size, dtype=np.int32)
    # A single stage has no permutation, and so no condition on its blocks.
    if stages == 1:
        return inputs[None]
    if size % 2 or stages > 32 or number % 2 ** (stages - 1):
        return None
    orders = []
    for stage in range(stages):
        halves = inputs.reshape(-1, 2**stage, 2, size // 2)
        orders.append(np.argsort(halves.swapaxes(1, 2).reshape(-1)).astype(np.int32))
    return np.stack(orders)
