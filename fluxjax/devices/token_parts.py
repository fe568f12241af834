"""Types of attention over tokens that are split among devices."""

from fluxjax.shapes import Array, Float, Int

Heads = Float[Array, "tokens heads head_dim"]
"""A device's part of the text tokens, then its part of the image tokens."""

TxtLength = Int[Array, "*prompts"]
"""How many text tokens of a prompt are attended to."""
