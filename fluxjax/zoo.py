"""The named models, as data: one `Family` record for each kind of model, a `Model` for each name.

Nothing here loads or computes: `fluxjax.checkpoint.locate` finds a model's files,
`fluxjax.generate` loads and samples it. This module imports no array library, so that a command
line can list its names at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """How a model is meant to be sampled.

    `steps`: of the Euler method. `guidance`: the distilled guidance scale; None if the model takes
    none. `cfg`: the scale of true classifier-free guidance away from a negative prompt, which is
    empty by default; 1 is none. `height`, `width`: in pixels. `max_length`: T5 tokens for each
    prompt. `visible_padding`: how many padding tokens of a prompt the transformer attends to; T5
    then attends to none. None: both attend to all of them, as FLUX.1. `shift`: whether the times
    are shifted by the number of image tokens, with log-shifts from `base_shift` to `max_shift`.
    """

    steps: int = 28
    guidance: float | None = 3.5
    cfg: float = 1.0
    height: int = 1024
    width: int = 1024
    max_length: int = 512
    visible_padding: int | None = None
    shift: bool = True
    base_shift: float = 0.5
    max_shift: float = 1.15


APPENDED_FEATURES: Mapping[str, int] = {"fill": 320, "control": 64}
"""Features beside those of the latent that each image token has, by what a model is conditioned on:
the latent of an image and its mask, 64 + 256, or the latent of a control image."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A named model.

    `repository`: its hub id, or None for the one that ships with the package. `double_blocks`:
    of its transformer, where they are not those of the family. `licence`: of its weights; the dev
    licence of Black Forest Labs allows no commercial use. `takes`: what it is conditioned on beside
    a prompt: "fill" for an image and a mask, "control" for edges or depth, "reference" for an image
    that is edited, None for nothing. `adapters`: names of LoRA adapters that ship with the package,
    by what the model takes with them; "image" for the image prompts of the Redux that ships.
    """

    repository: str | None
    defaults: Defaults
    double_blocks: int | None = None
    licence: str = "FLUX.1 dev, non-commercial"
    takes: str | None = None
    adapters: Mapping[str, str] = field(default_factory=dict)

    @property
    def appended_features(self) -> int:
        """Features beside those of the latent that each image token has."""
        return APPENDED_FEATURES.get(self.takes or "", 0)


@dataclass(frozen=True, kw_only=True)
class LatentLayout:
    """The geometry of a latent and of the image tokens that it is packed into.

    `channels`: of the latent. `cell`: pixels along a side of a latent cell (the VAE's factor).
    `patch`: cells along a side of an image token.
    """

    channels: int
    cell: int
    patch: int

    @property
    def token_side(self) -> int:
        """Pixels along a side of an image token; image sizes are multiples of it."""
        return self.cell * self.patch


@dataclass(frozen=True, kw_only=True)
class Family:
    """What the models of a family share.

    `networks`: each network's name and its folder in a diffusers checkpoint. `transformer`: the
    name of the one that is sampled. `text_encoders`: the names of those that encode a prompt.
    `tokenizers`: the folders of their tokenizers, in this order. `pipeline`: the class that
    diffusers has for it. `scheduler`: the folder of the sampling settings. `latent`: how latents
    are packed into tokens. `shift_rule`: how times are shifted for the number of image tokens, a
    name in `fluxjax.generate.samplers.SHIFT_RULES`. `guidance`: the distilled scale of a model of
    the family that takes one and names none. `models`: the named ones. `variants`: how others are
    meant to be sampled, of which no repository has all parts, by what they are called.
    """

    name: str
    networks: Mapping[str, str]
    transformer: str
    text_encoders: tuple[str, ...]
    tokenizers: tuple[str, ...]
    pipeline: str
    scheduler: str
    latent: LatentLayout
    shift_rule: str
    guidance: float
    models: Mapping[str, Model]
    variants: Mapping[str, Defaults] = field(default_factory=dict)

    @property
    def folders(self) -> tuple[str, ...]:
        """The folders of a diffusers checkpoint that fluxjax reads."""
        return (*self.networks.values(), *self.tokenizers, self.scheduler)


FLUX1 = Family(
    name="FLUX.1",
    networks={
        "flux": "transformer",
        "clip": "text_encoder",
        "t5": "text_encoder_2",
        "vae": "vae",
    },
    transformer="flux",
    text_encoders=("clip", "t5"),
    tokenizers=("tokenizer", "tokenizer_2"),
    pipeline="FluxPipeline",
    scheduler="scheduler",
    latent=LatentLayout(channels=16, cell=8, patch=2),
    shift_rule="resolution",
    guidance=3.5,
    models={
        # Latents of the tiny model are so redundant that the layout of a scene is decided at high
        # noise, so its times are shifted more than dev's.
        "tiny": Model(
            repository=None,
            licence="Apache-2.0",
            defaults=Defaults(
                steps=20, height=128, width=128, max_length=24, base_shift=2.0, max_shift=2.65
            ),
            adapters={"fill": "fill", "control": "edges", "reference": "kontext", "image": "redux"},
        ),
        "dev": Model(repository="black-forest-labs/FLUX.1-dev", defaults=Defaults()),
        "schnell": Model(
            repository="black-forest-labs/FLUX.1-schnell",
            licence="Apache-2.0",
            defaults=Defaults(steps=4, guidance=None, max_length=256, shift=False),
        ),
        "krea": Model(
            repository="black-forest-labs/FLUX.1-Krea-dev", defaults=Defaults(guidance=4.5)
        ),
        "fill": Model(
            repository="black-forest-labs/FLUX.1-Fill-dev",
            defaults=Defaults(steps=50, guidance=30.0),
            takes="fill",
        ),
        "canny": Model(
            repository="black-forest-labs/FLUX.1-Canny-dev",
            defaults=Defaults(steps=50, guidance=30.0),
            takes="control",
        ),
        "depth": Model(
            repository="black-forest-labs/FLUX.1-Depth-dev",
            defaults=Defaults(steps=50, guidance=10.0),
            takes="control",
        ),
        "kontext": Model(
            repository="black-forest-labs/FLUX.1-Kontext-dev",
            defaults=Defaults(guidance=2.5),
            takes="reference",
        ),
        # dev with 8 of its 19 double blocks.
        "lite": Model(repository="Freepik/flux.1-lite-8B", defaults=Defaults(), double_blocks=8),
        # schnell, trained until it needs true guidance and more steps again.
        "openflux": Model(
            repository="ostris/OpenFLUX.1",
            licence="Apache-2.0",
            defaults=Defaults(guidance=None, cfg=3.5),
        ),
        "libreflux": Model(
            repository="jimmycarter/LibreFLUX",
            licence="Apache-2.0",
            defaults=Defaults(guidance=None, cfg=4.0, visible_padding=0, shift=False),
        ),
    },
    # dev, trained in the same way. What is published is the transformer alone.
    variants={"de-distilled": Defaults(guidance=None, cfg=3.5)},
)
CHROMA = Family(
    name="Chroma",
    networks={"chroma": "transformer", "t5": "text_encoder", "vae": "vae"},
    transformer="chroma",
    text_encoders=("t5",),
    tokenizers=("tokenizer",),
    pipeline="ChromaPipeline",
    scheduler="scheduler",
    latent=FLUX1.latent,
    # That of diffusers' pipeline; the scheduler's settings in the repository are read from a folder
    # that has them, and were not checked.
    shift_rule="resolution",
    guidance=FLUX1.guidance,
    models={
        "chroma": Model(
            repository="lodestones/Chroma1-HD",
            licence="Apache-2.0",
            defaults=Defaults(steps=40, guidance=None, cfg=4.0, visible_padding=1),
        ),
    },
)
FAMILIES: tuple[Family, ...] = (FLUX1, CHROMA)
ZOO: Mapping[str, Model] = {
    name: model for family in FAMILIES for name, model in family.models.items()
}
"""Every named model."""


def named_model(source: str) -> Model | None:
    """Return the model of a name or a hub id, or None for any other source."""
    for name, model in ZOO.items():
        if source in (name, model.repository):
            return model
    return None


def family_of(source: str) -> Family:
    """Return the family of a named model or of its hub id; FLUX.1 for any other source."""
    for family in FAMILIES:
        for name, model in family.models.items():
            if source in (name, model.repository):
                return family
    return FLUX1
