"""The orthogonal blocks of OFT and BOFT, from the parameters that LyCORIS and PEFT store."""

import numpy as np

from fluxjax.lora.settings import Settings


def cayley(blocks: np.ndarray, limit: float) -> np.ndarray:
    """Return (I + Q) (I - Q)^-1 of each block's skew part Q = block - block^T, in float32.

    **Arguments:** `blocks`: [..., size, size]. `limit`: the largest Frobenius norm of all Q together; 0 for none.
    **Source:** LyCORIS, `lycoris.functional.diag_oft.get_r`; Qiu et al. 2023, section 4.
    """
    blocks = blocks.astype(np.float64)
    skew = blocks - np.swapaxes(blocks, -1, -2)
    norm = float(np.linalg.norm(skew)) + 1e-8
    if 0 < limit < norm:
        skew *= limit / norm
    identity = np.eye(blocks.shape[-1])
    return ((identity + skew) @ np.linalg.inv(identity - skew)).astype(np.float32)


def peft_cayley(vectors: np.ndarray, size: int, settings: Settings) -> np.ndarray:
    """Return the blocks of PEFT's OFT: (I - Q) (I + Q)^-1, or PEFT's series, of the skew Q whose upper triangle is stored.

    **Arguments:** `vectors`: [blocks, size (size - 1) / 2]. `settings`: the options of the series, and of constrained OFT.
    **Source:** peft, `OFTRotationModule`.
    """
    upper = np.zeros((len(vectors), size, size))
    upper[:, *np.triu_indices(size, 1)] = vectors
    skew = upper - np.swapaxes(upper, 1, 2)
    if settings.constrained:
        most = settings.epsilon / np.sqrt(len(vectors))
        norm = np.linalg.norm(skew, axis=(1, 2), keepdims=True)
        skew = skew * np.where(
            norm <= most, 1.0, most / np.maximum(norm, np.finfo(np.float64).tiny)
        )
    identity = np.eye(size)
    if not settings.neumann:
        return ((identity - skew) @ np.linalg.inv(identity + skew)).astype(np.float32)
    return _series(skew, settings.terms).astype(np.float32)


def _series(skew: np.ndarray, terms: int) -> np.ndarray:
    """Return I + 2 Q + 2 Q^2 + … + Q^last, as PEFT ends it: the last power counts once."""
    total = np.broadcast_to(np.eye(skew.shape[-1]), skew.shape).copy()
    if terms > 1:
        total += 2 * skew
    if terms > 2:
        power, last = skew, max(3, terms - 1)
        for order in range(2, last + 1):
            power = power @ skew
            total += power if order == last else 2 * power
    return total


def butterfly_order(stages: int, number: int, size: int) -> np.ndarray | None:
    """Return the order of the rows in each stage of LyCORIS's BOFT, or None for blocks that make no butterfly."""
    if size % 2 or stages > 32 or number % 2 ** (stages - 1):
        return None
    rows = np.arange(number * size, dtype=np.int32)
    widths = [2**stage * size // 2 for stage in range(stages)]
    return np.stack([rows.reshape(-1, 2, width).swapaxes(1, 2).reshape(-1) for width in widths])


def peft_butterfly_order(stages: int, number: int, size: int) -> np.ndarray | None:
    """Return the order of the inputs in each stage of PEFT's BOFT, or None for blocks that make no butterfly.

    **Source:** peft, `BOFTLayer.block_butterfly_perm`: in each block of 2^(stage + 1) half blocks, the even ones come first.
    """
    rows = np.arange(number * size, dtype=np.int32)
    if stages == 1:
        return rows[None]
    if size % 2 or stages > 32 or number % 2 ** (stages - 1):
        return None
    halves = [rows.reshape(-1, 2**stage, 2, size // 2) for stage in range(stages)]
    return np.stack(
        [np.argsort(half.swapaxes(1, 2).reshape(-1)).astype(np.int32) for half in halves]
    )
