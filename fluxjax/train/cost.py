"""What a training step costs: operations by formula, and memory of the compiled program."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
from jaxtyping import PyTree

from fluxjax.generate.limits import memory_bytes
from fluxjax.lora.networks import dense_shapes
from fluxjax.nets.stack import leaf_names
from fluxjax.nets.transformer import AbstractTransformer

_TXT_LAYERS = ("double.txt.", "txt_in.")
_IMG_LAYERS = ("double.img.", "img_in.", "final.linear.")
_ALL_LAYERS = ("single.",)


class TokenCounts(NamedTuple):
    """The tokens of an example: `img` of the image and of references, `txt` of the text."""

    img: int
    txt: int


def forward_flop(network: AbstractTransformer, tokens: TokenCounts) -> float:
    """Return the floating-point operations of one evaluation for one example.

    They are those of products: of the layers and of the attention.

    **Arguments:** `network`: or its shapes.
    """
    config = network.config
    layers = sum(_layer_flop(network, tokens).values())
    all_tokens = tokens.img + tokens.txt
    attention = 4 * all_tokens**2 * config.width * (config.double_depth + config.single_depth)
    return layers + attention


def training_flop(
    network: AbstractTransformer, tokens: TokenCounts, trained: Mapping[str, PyTree] | None = None
) -> float:
    """Return the operations of the loss of one example and of its gradient.

    The gradient of activations costs as much as the evaluation, and that of the trained weights as
    much as their products. What rematerialization computes again is not counted.

    **Arguments:** `trained`: the leaves that are trained, by name; None for all of them.
    """
    by_layer = _layer_flop(network, tokens)
    chosen = by_layer if trained is None else {name: by_layer.get(name, 0.0) for name in trained}
    attention = forward_flop(network, tokens) - sum(by_layer.values())
    # Both products of the attention have two inputs that depend on what is trained.
    return 2 * sum(by_layer.values()) + 3 * attention + sum(chosen.values())


def _layer_flop(network: AbstractTransformer, tokens: TokenCounts) -> dict[str, float]:
    """Return the operations of each layer's product, by the name of its weight.

    Layers of the text's stream see the text's tokens, those of the image's stream the image's, and
    single blocks both. Modulation and embedders see one vector for each example.
    """
    found = {}
    # In fewer bits a weight multiplies as much as a plain one of its shape.
    dense = dense_shapes(network)
    for name, leaf in zip(leaf_names(dense), jax.tree.leaves(dense), strict=True):
        if not name.endswith(".weight"):
            continue
        rows = 1  # of the conditioning vector
        if ".modulation." not in name:
            if name.startswith(_TXT_LAYERS):
                rows = tokens.txt
            elif name.startswith(_IMG_LAYERS):
                rows = tokens.img
            elif name.startswith(_ALL_LAYERS):
                rows = tokens.img + tokens.txt
        found[name] = 2.0 * rows * math.prod(leaf.shape)
    return found


class StepCost(NamedTuple):
    """The cost of a compiled step, on one device.

    - `arguments`, `temporaries`, `outputs`: bytes; of the outputs those that do not take the
      place of an argument.
    - `flop`: operations of the step by formula, over all devices.
    - `present`: bytes of the device's memory; None if that is not known.
    """

    arguments: int
    temporaries: int
    outputs: int
    flop: float
    present: int | None

    @property
    def bytes(self) -> int:
        """The most bytes that are in use at once."""
        return self.arguments + self.temporaries + self.outputs

    def report(self) -> str:
        """Return the cost as a few lines of text."""
        lines = [
            f"arguments    {_gigabytes(self.arguments)}  weights, optimizer, average, batch",
            f"temporaries  {_gigabytes(self.temporaries)}  activations and gradients",
            f"outputs      {_gigabytes(self.outputs)}  beyond what takes an argument's place",
            f"in all       {_gigabytes(self.bytes)}  on each device",
            f"operations   {self.flop / 1e12:10.4g} TFLOP for each step, by formula",
        ]
        if self.present is not None:
            lines.append(f"the device   {_gigabytes(self.present)}")
        return "\n".join(lines)

    def check(self) -> None:
        """**Raises:** `ValueError` for a step that does not fit in the device's memory."""
        if self.present is None or self.bytes <= self.present:
            return
        raise ValueError(
            f"A step needs {_gigabytes(self.bytes).strip()} on each device, which has "
            f"{_gigabytes(self.present).strip()}. Set remat, accumulate more, split the weights "
            "by mesh.fsdp, choose optimizer.name = 'adafactor', or train an adapter."
        )


def step_cost(compiled: jax.stages.Compiled, flop: float, device: jax.Device) -> StepCost:
    """Return the cost of a compiled step.

    **Arguments:** `flop`: operations of the step. `device`: one of those it runs on.
    """
    memory = compiled.memory_analysis()
    assert memory is not None  # all of XLA's backends tell
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return StepCost(
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        max(outputs, 0),
        flop,
        memory_bytes(device),
    )


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:8.3f} GB"
