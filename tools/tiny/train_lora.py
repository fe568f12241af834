"""Train a LoRA adapter on a folder of images with captions.

Each image has its caption in a text file of the same name. The state of the training is saved in
`--state`, so that the same command continues an interrupted training and ends with the same result.
The adapter loads in fluxjax, diffusers and ComfyUI.
"""

import argparse
import hashlib
import json
import operator
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import PIL.Image
from PIL import ImageOps
from tqdm import tqdm

from fluxjax.checkpoint.atomic import new_file
from fluxjax.checkpoint.defaults import load_defaults
from fluxjax.cli.choices import DTYPES
from fluxjax.flow.times import resolution_mu
from fluxjax.generate.latents import image_ids, pack_latents
from fluxjax.generate.load import (
    activation_dtype,
    load_clip,
    load_flux,
    load_t5,
    load_tokenizers,
    load_vae,
)
from fluxjax.generate.prompted import distilled_guidance
from fluxjax.generate.text import TextStates, encode_text, prompt_ids
from fluxjax.lora.adapter import Lora
from fluxjax.lora.attach import attach
from fluxjax.lora.init import BLOCKS, init_lora, trainable
from fluxjax.lora.write import FORMATS, write_lora
from fluxjax.nets.flux import Flux
from fluxjax.train.loss import drop_captions, flow_matching_loss, logit_normal_times
from fluxjax.train.step import TrainState, make_step
from fluxjax.zoo import FLUX1, Defaults

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SIDE = FLUX1.latent.token_side
WARM_UP = 20


class Bucket(NamedTuple):
    """Encoded examples of one image size.

    `packed`: latents, [count, tokens, channels]. `text`: the encoded captions, and last the empty
    one.
    """

    height: int
    width: int
    packed: np.ndarray
    text: TextStates


def read_folder(folder: Path, area: int) -> tuple[list[np.ndarray], list[str]]:
    """Read the images, float32 in [-1, 1], and their captions.

    Each is resized and cropped around its center to sides that are multiples of 16, with about
    `area` pixels.
    **Raises:** `FileNotFoundError` for a folder without images, or for images without captions.
    """
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise FileNotFoundError(
            f"There are no images in {folder}. Put {', '.join(SUFFIXES)} files there."
        )
    uncaptioned = [path.name for path in paths if not path.with_suffix(".txt").is_file()]
    if uncaptioned:
        raise FileNotFoundError(
            f"{len(uncaptioned)} of {len(paths)} images in {folder} have no caption. "
            f"Write that of {uncaptioned[0]} to {Path(uncaptioned[0]).stem}.txt."
        )
    captions = [path.with_suffix(".txt").read_text(encoding="utf-8").strip() for path in paths]
    return [_resized(path, area) for path in paths], captions


def _resized(path: Path, area: int) -> np.ndarray:
    """Read an image, with transparent pixels on white, resized and cropped to `area` pixels."""
    with PIL.Image.open(path) as file:
        image = ImageOps.exif_transpose(file).convert("RGBA")
    on_white = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image).convert(
        "RGB"
    )
    scale = (area / (image.width * image.height)) ** 0.5 / SIDE
    size = tuple(max(1, round(side * scale)) * SIDE for side in image.size)
    return (
        np.asarray(ImageOps.fit(on_white, size, PIL.Image.Resampling.LANCZOS), np.float32) / 127.5
        - 1
    )


def encode(
    source: str, images: Sequence[np.ndarray], captions: Sequence[str], max_length: int, dtype: Any
) -> list[Bucket]:
    """Encode images and captions, one bucket for each image size.

    The encoders are freed before this returns. The empty caption is the last one of each bucket.
    """
    vae = load_vae(source, dtype=jnp.float32)
    latents = eqx.filter_jit(lambda vae, image: pack_latents(vae.encode(image)))
    packed = [np.asarray(latents(vae, image)) for image in tqdm(images, desc="images")]
    del vae
    tokenizers, clip, t5 = (
        load_tokenizers(source),
        load_clip(source, dtype=dtype),
        load_t5(source, dtype=dtype),
    )
    texts = []
    for caption in tqdm([*captions, ""], desc="captions"):
        ids = prompt_ids(tokenizers, [caption], max_length=max_length)
        texts.append(jax.tree.map(np.asarray, encode_text(clip, t5, ids, dtype=dtype)))
    groups = defaultdict(list)
    for index, image in enumerate(images):
        groups[image.shape[:2]].append(index)
    return [
        Bucket(
            *size,
            np.stack([packed[i] for i in group]),
            _joined([*(texts[i] for i in group), texts[-1]]),
        )
        for size, group in sorted(groups.items())
    ]


def _digest(buckets: Sequence[Bucket]) -> str:
    """Return a hash of the examples."""
    digest = hashlib.sha256()
    for array in jax.tree.leaves(list(buckets)):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def _joined(texts: Sequence[TextStates]) -> TextStates:
    return jax.tree.map(lambda *rows: np.concatenate(rows), *texts)


class Batch(NamedTuple):
    """Examples of one size.

    `x0`: packed latents. `text`: the captions. `empty`: the empty caption. `places`: the examples'
    numbers in the whole step, which their noise depends on. `mu`: the log-shift of their times.
    """

    x0: Any
    text: TextStates
    empty: TextStates
    img_ids: Any
    places: Any
    mu: Any


def draw(
    buckets: Sequence[Bucket], defaults: Defaults, seed: int, index: int, batch: int, parts: int
) -> list[Batch]:
    """Draw the batches of a training step: `parts` of `batch` examples, all of one image size.

    They depend only on the seed and on the step's number.
    """
    rng = np.random.default_rng((seed, index))
    counts = np.array([len(bucket.packed) for bucket in buckets])
    bucket = buckets[rng.choice(len(buckets), p=counts / counts.sum())]
    count = batch * parts
    # Every example is used once before any is used again.
    picks = np.concatenate(
        [rng.permutation(len(bucket.packed)) for _ in range(-(-count // len(bucket.packed)))]
    )[:count]
    tokens = bucket.packed.shape[1]
    mu = (
        resolution_mu(tokens, base_shift=defaults.base_shift, max_shift=defaults.max_shift)
        if defaults.shift
        else 0.0
    )
    ids, empty = (
        image_ids(bucket.height, bucket.width),
        jax.tree.map(lambda rows: rows[-1], bucket.text),
    )
    places = np.arange(count)
    return [
        Batch(
            bucket.packed[mine],
            jax.tree.map(operator.itemgetter(mine), bucket.text),
            empty,
            ids,
            places[here],
            jnp.float32(mu),
        )
        for here in (slice(start, start + batch) for start in range(0, count, batch))
        for mine in (picks[here],)
    ]


def adapter_loss(
    lora: Lora,
    flux: Flux,
    batch: Batch,
    guidance: Any,
    dropout: float,
    dtype: Any,
    remat: bool,
    *,
    key,
) -> Any:
    """Return the flow-matching loss of the network with the adapter, averaged over a batch."""
    adapted = attach(flux, [lora])

    def one(x0, text: TextStates, place):
        drop, when, noise = jax.random.split(jax.random.fold_in(key, place), 3)
        text = jax.tree.map(
            lambda x: x[0],
            drop_captions(drop, jax.tree.map(lambda x: x[None], text), batch.empty, dropout),
        )
        t = logit_normal_times(when, 1, mu=batch.mu)[0]
        velocity = eqx.Partial(
            adapted,
            txt=text.txt,
            vec=text.vec,
            guidance=guidance,
            img_ids=batch.img_ids,
            dtype=dtype,
            remat=remat,
        )
        return flow_matching_loss(velocity, x0, t, jax.random.normal(noise, x0.shape))

    return jnp.mean(jax.vmap(one)(batch.x0, batch.text, batch.places))


def make_optimizer(learning_rate: float, parts: int) -> optax.GradientTransformation:
    """Return AdamW with gradient clipping and a warm-up.

    It updates once in `parts` batches, by the mean of their gradients.
    """
    schedule = optax.linear_schedule(learning_rate / WARM_UP, learning_rate, WARM_UP - 1)
    chain = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01))
    return optax.MultiSteps(chain, parts).gradient_transformation()


def save_state(path: Path, settings: dict[str, Any], state: TrainState) -> None:
    """Write the training state, completely or not at all; its first line holds the settings."""
    with new_file(path, overwrite=True) as file:
        file.write(json.dumps(settings).encode() + b"\n")
        eqx.tree_serialise_leaves(file, state)


def load_state(path: Path, settings: dict[str, Any], state: TrainState) -> TrainState:
    """Read what `save_state` wrote.

    **Raises:** `ValueError` if it was made with other settings, or is damaged.
    """
    damaged = ValueError(
        f"{path} is not a training state, or is damaged. Move it away to start from the beginning."
    )
    with open(path, "rb") as file:
        try:
            theirs = json.loads(file.readline())
        except ValueError:
            raise damaged from None
        other = [name for name, value in settings.items() if theirs.get(name) != value]
        if other:
            differences = [f"{name} {theirs.get(name)}, not {settings[name]}" for name in other]
            raise ValueError(
                f"{path} was made with other settings: {', '.join(differences)}. "
                "Use the same settings, or another --state."
            )
        try:
            return eqx.tree_deserialise_leaves(file, state)
        except (ValueError, RuntimeError, EOFError):
            raise damaged from None


def fit(
    options: argparse.Namespace,
    flux: Flux,
    buckets: Sequence[Bucket],
    defaults: Defaults,
    dtype: Any,
) -> Lora:
    """Train an adapter to `options.steps`, from its saved state if there is one.

    **Returns:** the exponential moving average of the adapter.
    """
    targets, seed, parts = options.target or BLOCKS, options.seed, options.accumulate
    distilled = 1.0 if flux.config.guidance_embed and options.guidance is None else options.guidance
    guidance = distilled_guidance(flux, defaults, distilled)
    lora = init_lora(flux, options.rank, targets, alpha=options.alpha, key=jax.random.key(seed))
    spec, optimizer = trainable(lora), make_optimizer(options.learning_rate, parts)
    state = TrainState.create(lora, optimizer, trainable=spec)
    names = (
        "model",
        "rank",
        "alpha",
        "batch",
        "accumulate",
        "learning_rate",
        "ema",
        "caption_dropout",
        "guidance",
        "seed",
    )
    settings = {name: getattr(options, name) for name in names}
    settings |= {"targets": list(targets), "examples": _digest(buckets)}
    path = options.state or options.output.with_suffix(".state")
    if path.exists():
        state = load_state(path, settings, state)
    step = make_step(adapter_loss, optimizer, ema_decay=options.ema ** (1 / parts), trainable=spec)
    first = int(state.step) // parts
    with tqdm(total=options.steps, initial=first, desc="steps") as bar:
        for index in range(first, options.steps):
            key, losses = jax.random.fold_in(jax.random.key(seed), index), []
            for batch in draw(buckets, defaults, seed, index, options.batch, parts):
                state, loss = step(
                    state,
                    flux,
                    batch,
                    guidance,
                    options.caption_dropout,
                    dtype,
                    options.remat,
                    key=key,
                )
                losses.append(loss)
            bar.update()
            bar.set_postfix_str(f"loss {float(np.mean(losses)):.4f}", refresh=False)
            if (index + 1) % options.save_every == 0 or index + 1 == options.steps:
                save_state(path, settings, state)
    return state.ema


def train(options: argparse.Namespace) -> None:
    """Encode the folder, train, and write the adapter."""
    if options.output.exists():
        raise FileExistsError(
            f"{options.output} exists already. Remove it, or choose another --output."
        )
    defaults = load_defaults(options.model)
    dtype = activation_dtype() if options.dtype is None else jnp.dtype(options.dtype)
    images, captions = read_folder(
        options.images, options.size**2 if options.size else defaults.height * defaults.width
    )
    buckets = encode(
        options.model, images, captions, options.max_sequence_length or defaults.max_length, dtype
    )
    lora = fit(options, load_flux(options.model, dtype=dtype), buckets, defaults, dtype)
    write_lora(options.output, lora, to=options.to, dtype=jnp.dtype(options.save_dtype))
    print(options.output)


def _number(kind: type, least: float, below: float = float("inf")) -> Any:
    def read(text: str) -> Any:
        value = kind(text)
        if not least <= value < below:
            raise argparse.ArgumentTypeError(f"{text} is not in [{least}, {below})")
        return value

    return read


def parser() -> argparse.ArgumentParser:
    """Return the options."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = made.add_argument
    add(
        "--images",
        type=Path,
        required=True,
        help="folder of images with captions: a.png with a.txt",
    )
    add("--output", type=Path, required=True, help="a new .safetensors file")
    add("--model", default="tiny", help="a zoo name, a diffusers folder, or a hub id")
    add("--rank", type=_number(int, 1), default=16, help="of the low-rank change of each weight")
    add(
        "--alpha",
        type=_number(float, 0),
        help="the change is alpha / rank times the product of the factors (default: rank)",
    )
    add(
        "--target",
        action="append",
        help="regular expression for names of weights; can be repeated (default: all blocks)",
    )
    add("--steps", type=_number(int, 1), default=1000, help="updates by the optimizer in total")
    add("--batch", type=_number(int, 1), default=4, help="images in a forward pass")
    add("--accumulate", type=_number(int, 1), default=1, help="forward passes for each update")
    add(
        "--remat",
        action="store_true",
        help="recompute blocks in the backward pass: less memory, more time",
    )
    add(
        "--learning-rate",
        type=_number(float, 0),
        default=1e-3,
        help="of AdamW, after a warm-up of 20 steps",
    )
    add(
        "--ema",
        type=_number(float, 0, 1),
        default=0.98,
        help="decay of the moving average of the adapter, which is written",
    )
    add(
        "--caption-dropout",
        type=_number(float, 0, 1),
        default=0.1,
        help="share of examples whose caption is replaced by the empty one",
    )
    add(
        "--guidance",
        type=float,
        help="distilled guidance during training (default: 1, if the model takes one)",
    )
    add(
        "--size",
        type=_number(int, SIDE),
        help="images are resized to about SIZE * SIZE pixels (default: the model's size)",
    )
    add(
        "--max-sequence-length",
        type=_number(int, 1),
        help="T5 tokens of a caption (default: the model's)",
    )
    add("--seed", type=int, default=0, help="for the initial adapter, the batches and the noise")
    add(
        "--dtype",
        choices=DTYPES,
        help="of the frozen weights and the activations (default: bfloat16, on CPU float32)",
    )
    add("--to", choices=FORMATS, default="peft", help="format of the written file")
    add("--save-dtype", choices=DTYPES, default="float32", help="of the written file")
    add("--save-every", type=_number(int, 1), default=100, help="steps between two saved states")
    add(
        "--state",
        type=Path,
        help="file of the training state (default: OUTPUT with the suffix .state)",
    )
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    try:
        train(options)
    except (ValueError, OSError) as error:
        raise SystemExit(f"train_lora: {error}") from None


if __name__ == "__main__":
    main()
