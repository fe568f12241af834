"""The prompts of a call, and what they are guided away from, encoded."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fluxjax.devices.offload import fetch
from fluxjax.generate.draw_hooks import DrawHooks
from fluxjax.generate.draw_settings import DrawSettings
from fluxjax.generate.load import activation_dtype
from fluxjax.generate.load_models import Models
from fluxjax.generate.text import TextStates, encode_text, prompt_ids
from fluxjax.generate.velocity import Guidance
from fluxjax.nets.layers import check_ids

Runner = Callable[..., Any]
"""(stage, function, *inputs, **options) -> function(*inputs, **options), as `DrawHooks.run`."""


class PromptTexts(NamedTuple):
    """The texts of what is drawn.

    `prompts`: one or more. `seconds`: as many, which T5 reads in their place. `negatives`: as many
    that are guided away from, or None.
    """

    prompts: list[str]
    seconds: list[str] | None = None
    negatives: list[str] | None = None


def negative_prompts(
    call: str, negative_prompt: str | Sequence[str], prompts: int, guidance: Guidance
) -> list[str] | None:
    """Return one negative prompt for each prompt, or None if nothing is guided by them.

    **Arguments:** `call`: the function that messages name. `prompts`: how many there are.
    **Raises:** `ValueError` for another number of them, or for some that nothing is guided by.
    """
    if isinstance(negative_prompt, str):
        negatives = [negative_prompt] * prompts
    else:
        negatives = list(negative_prompt)
    if len(negatives) != prompts:
        raise ValueError(
            f"`{call}(negative_prompt)` takes one text, or one for each of {prompts} "
            f"prompts, got {len(negatives)}."
        )
    # The value of an array may change from call to call, and may well be 1 at times.
    scale = guidance.scale
    unguided = guidance.nag is None and not isinstance(scale, jax.Array) and np.all(scale == 1)
    if not unguided:
        return negatives
    if negative_prompt != "":
        raise ValueError(
            f"`{call}(negative_prompt)` does nothing without guidance away from it. "
            "Pass guidance=Guidance(scale=3.0), or Guidance(nag=Nag())."
        )
    return None


def runner_of(hooks: DrawHooks | None) -> Runner:
    """Return what runs a jitted function: the hooks, or a call of it."""
    if hooks is None:
        hooks = DrawHooks()
    return hooks.run


def encode_prompts(
    models: Models, texts: PromptTexts, settings: DrawSettings, hooks: DrawHooks | None
) -> tuple[TextStates, TextStates | None]:
    """Encode the prompts, and each different negative prompt once, with encoders fetched for it.

    **Arguments:** `settings`: of which the length of prompts and the dtype count.
    """
    run = runner_of(hooks)
    clip = None if models.clip is None else fetch(models.clip)
    t5 = fetch(models.t5)
    max_length = models.defaults.max_length if settings.max_length is None else settings.max_length
    dtype = activation_dtype() if settings.dtype is None else settings.dtype

    def encode(prompts: Sequence[str], seconds: Sequence[str] | None) -> TextStates:
        ids = prompt_ids(
            models.tokenizers,
            prompts,
            seconds,
            max_length=max_length,
            visible_padding=models.defaults.visible_padding,
        )
        if clip is not None and ids.clip is not None:
            check_ids("Clip", ids.clip, clip.config.vocabulary)
        check_ids("T5", ids.t5, t5.config.vocabulary)
        return run("encode", encode_text, clip, t5, ids, dtype=dtype, mesh=models.mesh)

    negative_states = None
    if texts.negatives is not None:
        different = list(dict.fromkeys(texts.negatives))
        rows = [different.index(text) for text in texts.negatives]
        negative_states = encode(different, None).rows(rows)
    return encode(texts.prompts, texts.seconds), negative_states
