"""Networks in float64, in a separate process, since `jax_enable_x64` applies to a process."""

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import jax

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_traceback_in_locations_limit", 0)
import jax.numpy as jnp
import numpy as np
from drawing import with_small_vae
from small import IDS, small_flux

import fluxjax

narrow = small_flux()
wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), narrow)
draw = np.random.default_rng(0).normal
x, txt, vec, way = draw(size=(5, 8)), draw(size=(3, 12)), draw(size=6), draw(size=(5, 8))


def velocity(flux, x, dtype):
    given = {"txt": jnp.asarray(txt, dtype), "vec": jnp.asarray(vec, dtype), "img_ids": IDS}
    return flux(jnp.asarray(x, dtype), 0.7, guidance=3.5, **given)


run = jax.jit(velocity, static_argnames="dtype")
found, expected = run(wide, x, "float64"), run(narrow, x, "float32")
assert found.dtype == jnp.float64
error = float(jnp.linalg.norm(found - expected.astype(jnp.float64)) / jnp.linalg.norm(found))
assert 1e-9 < error <= 1e-5, error  # not 0: float64 has more digits than float32

# Central differences of step h have an error of h^2, and of the dtype's rounding over h, which
# would be 1e-3 in float32.
step = 1e-5
slope = (run(wide, x + step * way, "float64") - run(wide, x - step * way, "float64")) / (2 * step)
slide = jax.jit(lambda x, way: jax.jvp(lambda x: velocity(wide, x, "float64"), (x,), (way,))[1])
tangent = slide(jnp.asarray(x), jnp.asarray(way))
error = float(jnp.linalg.norm(slope - tangent) / jnp.linalg.norm(tangent))
assert error <= 1e-8, error

q, k, v = (jnp.asarray(draw(size=(4, 2, 8))) for _ in range(3))
for implementation in ("xla", "xla_chunked"):
    chosen = {"implementation": implementation}
    masked = fluxjax.attention(q, k, v, causal=True, key_length=jnp.int32(3), **chosen)
    # Without the key that is masked, queries up to the last of the others see the same.
    np.testing.assert_allclose(
        masked[:3], fluxjax.attention(q[:3], k[:3], v[:3], causal=True, **chosen), atol=1e-12
    )

models = with_small_vae(fluxjax.load_models("tiny"))
drawn = []
for dtype in ("float64", "float32"):
    settings = fluxjax.generate.DrawSettings(steps=1, height=32, width=32, dtype=dtype)
    image = fluxjax.text_to_image(models, "a red star", key=jax.random.key(0), settings=settings)
    drawn.append(image)
assert all(image.dtype == jnp.float32 for image in drawn)
np.testing.assert_allclose(*drawn, atol=1e-4)
print("equal")
"""


def test_a_network_in_float64_equals_float32_with_more_digits():
    tests = Path(__file__).parent
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(map(str, (tests, tests.parent))),
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout == "equal\n", done.stderr
