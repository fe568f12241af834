"""A batch split into its images: what each has of its own, and a function applied to each."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple, TypeVar

import equinox as eqx
import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from fluxjax.devices.run import on_mesh
from fluxjax.devices.tokens import TokenParallelFlux
from fluxjax.generate.conditioning import Conditioning, Transformer, split_images
from fluxjax.generate.conditions import Nets, nets_of
from fluxjax.generate.controls import without_networks
from fluxjax.generate.image_batch import ImageBatch, Recipe
from fluxjax.generate.velocity import Guidance, split_scales
from fluxjax.nets.image_prompt import ImagePrompt
from fluxjax.nets.transformer import AbstractTransformer
from fluxjax.shapes import Array, Float

Result = TypeVar("Result")


class ImageRows(eqx.Module):
    """What each image of a batch has of its own: every array has a leading axis of images.

    A function of one image gets its row, without that axis. The fields are those of `ImageBatch`,
    each as the part of it that differs between images; `guidance`: the scales that differ.
    """

    noise: Float[Array, "... latent_channels rows columns"]
    positive: Conditioning
    negative: Conditioning | None
    guidance: Guidance
    key: Array | None
    inputs: PyTree
    source: Conditioning | None


class CommonInputs(eqx.Module):
    """What all images of a batch have in common.

    The conditions and the guidance are complements of those in `ImageRows`: `equinox.combine` of
    both gives the ones of an image. `split_axes`: the axes of the mesh that split the transformer's
    layers or tokens.
    """

    positive: Conditioning
    negative: Conditioning | None
    guidance: Guidance
    recipe: Recipe
    source: Conditioning | None
    split_axes: tuple[str, ...] = eqx.field(static=True, default=())


class FieldNetworks(NamedTuple):
    """What velocities are computed with.

    `flux`: the transformer. `own`, `source`: the networks of the controls of an image, and of those
    of its source.
    """

    flux: Transformer
    own: Nets
    source: Nets


def networks_of_batch(flux: AbstractTransformer, batch: ImageBatch) -> FieldNetworks:
    """Return the networks that the velocities of a batch are computed with."""
    return FieldNetworks(flux, nets_of(batch.positive), nets_of(batch.source))


def split_batch(
    batch: ImageBatch, recipe: Recipe, mesh: Mesh | None
) -> tuple[ImageRows, CommonInputs]:
    """Split a batch into what each image has of its own, and what all share.

    **Arguments:** `mesh`: of devices that the heads of attention may be split over, or None.
    """
    if mesh is not None:
        batch = _with_split_heads(batch)
    positive_rows, positive = _split_condition(batch.positive)
    negative_rows = negative = None
    if batch.negative is not None:
        negative_rows, negative = _split_condition(batch.negative)
    source_rows = source = None
    if batch.source is not None:
        source_rows, source = _split_condition(batch.source)
    guidance = recipe.guidance
    if mesh is not None and guidance.nag is not None:
        # Its norms are over all heads of a token, which are split over this axis.
        nag = replace(guidance.nag, head_axes=("tensor",))
        guidance = replace(guidance, nag=nag)
    guidance_rows, guidance = split_scales(guidance)
    rows = ImageRows(
        noise=batch.noise,
        positive=positive_rows,
        negative=negative_rows,
        guidance=guidance_rows,
        key=batch.keys,
        inputs=batch.inputs,
        source=source_rows,
    )
    shared = CommonInputs(
        positive=positive,
        negative=negative,
        guidance=guidance,
        recipe=recipe,
        source=source,
        split_axes=_split_axes(mesh),
    )
    return rows, shared


def _split_axes(mesh: Mesh | None) -> tuple[str, ...]:
    """Return the axes of a mesh that split the transformer's layers or tokens."""
    if mesh is None:
        return ()
    return tuple(axis for axis in ("tensor", "context") if mesh.shape[axis] > 1)


def _split_condition(conditioning: Conditioning) -> tuple[Conditioning, Conditioning]:
    """Return `split_images` of a condition, without the networks of its controls."""

    def without_nets(part: Conditioning) -> Conditioning:
        return eqx.tree_at(lambda one: one.control, part, without_networks(part.control))

    rows, shared = split_images(conditioning)
    return without_nets(rows), without_nets(shared)


def _with_split_heads(batch: ImageBatch) -> ImageBatch:
    """Return a batch whose image prompts are for a transformer with heads split over "tensor"."""

    def is_prompt(node: PyTree) -> bool:
        return isinstance(node, ImagePrompt)

    def split(node: PyTree) -> PyTree:
        return replace(node, head_axis="tensor") if is_prompt(node) else node

    return jax.tree.map(split, batch, is_leaf=is_prompt)


def for_each_image(
    function: Callable[..., Result],
    networks: FieldNetworks,
    rows: tuple,
    shared: object,
    mesh: Mesh | None,
) -> Result:
    """Return function(networks, *row, shared) of each image, on a mesh if there is one.

    **Arguments:** `rows`: pytrees whose arrays have a leading axis of images. `shared`: a pytree
    that every image gets as it is. `mesh`: of devices; where it splits tokens, the transformer is
    replaced by one that does too.
    **Returns:** the results of all images, stacked.
    """
    splits_tokens = mesh is not None and mesh.shape["context"] > 1

    def batched(networks: FieldNetworks, rows: tuple, shared: object) -> Result:
        if splits_tokens and isinstance(networks.flux, AbstractTransformer):
            networks = networks._replace(flux=TokenParallelFlux(networks.flux))
        by_row = jax.vmap(lambda *row: function(networks, *row, shared), axis_name="images")
        return by_row(*rows)

    if mesh is None:
        return batched(networks, rows, shared)
    return on_mesh(batched, mesh, networks, rows, shared)
