import jax
import pytest
from meshes import mesh_of
from test_mesh_step import ADAPTERS
from training import *

from fluxjax.train.place import place_batch


def test_added():
    batch = batch_of(5)
    rows, shared = place_batch(batch, Training.empty, mesh_of(data=4), accumulate=2)
    print(rows.weight, rows.place)

@pytest.mark.parametrize("name", ADAPTERS)
def test_trace(name):
    t = Training(mesh_of(fsdp=2, context=2), method=ADAPTERS[name])
    rows, shared = place_batch(batch_of(3), EMPTY, t.mesh)
    with jax.numpy_dtype_promotion("standard"):
        out = jax.eval_shape(t.step, t.state, t.frozen, rows, shared, KEY)
