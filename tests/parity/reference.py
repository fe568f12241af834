"""Random reference networks on torch, and how far an output is from another."""

import jax
import jax.numpy as jnp
import numpy as np
import torch


def perturbed(network: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Return the network with every weight changed, also norm scales and biases."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim < 2:
                weight.copy_((1.0 if name.endswith("weight") else 0.0) + 0.2 * noise)
            else:
                weight.copy_(noise * weight[0].numel() ** -0.5)
    return network.eval()


def relative_error(out, reference) -> float:
    """Return |out - reference| / |reference|, in float64."""
    out, reference = as_float64(out), as_float64(reference)
    assert out.shape == reference.shape
    return float(np.linalg.norm(out - reference) / np.linalg.norm(reference))


def as_float64(x) -> np.ndarray:
    if isinstance(x, torch.Tensor):
        return x.detach().double().numpy()
    return np.asarray(jnp.asarray(x, jnp.float32)).astype(np.float64)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def to_torch(x, dtype=torch.float32) -> torch.Tensor:
    return torch.from_numpy(np.array(x)).to(dtype)


def as_bfloat16(x) -> jax.Array:
    return jnp.asarray(x, jnp.bfloat16)


# Float32 sums in another order differ by a few units in the last place in each layer; see the
# numeric policy.
FLOAT32_BOUND = 1e-5
# Ours may be no further from float32 than 1.2 times the reference's own bfloat16 is.
BFLOAT16_RATIO = 1.2
