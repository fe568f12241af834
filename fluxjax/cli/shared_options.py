"""Options that more than one command has."""

from pathlib import Path

from fluxjax.cli.choices import (
    DTYPES,
    FILE_DTYPES,
    INTEGRATORS,
    LAYOUTS,
    NETWORKS,
    QUANTIZATIONS,
    RULES,
)
from fluxjax.cli.compilation_cache import default_cache_folder
from fluxjax.cli.compound_options import mesh_sizes
from fluxjax.cli.option_parser import OptionGroup
from fluxjax.cli.options import (
    MAX_PIXELS,
    byte_count,
    file_path,
    finite_number,
    pixel_count,
    positive_number,
)
from fluxjax.zoo import ZOO

SOURCE_HELP = "a file or folder in any layout, a model's name, or a hub id"
ADAPTER_HELP = "a .safetensors file, or hub:OWNER/REPO/FILE"


def add_model(group: OptionGroup) -> None:
    """Add the option that chooses the model."""
    group.add_argument(
        "--model",
        default="tiny",
        help=f"{', '.join(ZOO)}, a folder in the diffusers layout, or a hub id "
        "(default: %(default)s)",
    )


def add_parts(group: OptionGroup) -> None:
    """Add the options that replace networks of the model."""
    group.add_argument(
        "--flux",
        metavar="FILE",
        help="a file or folder in any layout whose transformer replaces the model's; the matrices "
        "of GGUF and NF4 files stay packed (default: the model's own)",
    )
    for name, title in (("vae", "VAE"), ("t5", "T5 encoder"), ("clip", "CLIP text encoder")):
        group.add_argument(
            f"--{name}",
            metavar="FILE",
            help=f"a file or folder whose {title} replaces the model's (default: its own)",
        )


def add_dtype(group: OptionGroup) -> None:
    """Add the option that sets the dtype of the computation."""
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        help="dtype of weights and activations (default: weights keep the dtype of their files; "
        "activations are bfloat16, on CPU float32)",
    )


def add_size(group: OptionGroup) -> None:
    """Add the options that set the size of an image."""
    for name in ("height", "width"):
        group.add_argument(
            f"--{name}",
            type=pixel_count,
            metavar="PIXELS",
            help=f"{name} of the image, a multiple of 16 up to {MAX_PIXELS} (default: the model's)",
        )


def add_guidance(group: OptionGroup) -> None:
    """Add the option that sets the distilled guidance."""
    group.add_argument(
        "--guidance",
        type=finite_number(),
        metavar="SCALE",
        help="distilled guidance scale, an input of the network (default: the model's)",
    )


def add_cfg(group: OptionGroup) -> None:
    """Add the options of classifier-free guidance."""
    group.add_argument(
        "--cfg",
        type=finite_number(),
        metavar="SCALE",
        help="classifier-free guidance scale; other values than 1 double the work "
        "(default: the model's, which is 1, no guidance, except for Chroma and the like)",
    )


def add_rule(group: OptionGroup) -> None:
    """Add the option that chooses the rule of classifier-free guidance."""
    group.add_argument(
        "--rule",
        choices=RULES,
        default="cfg",
        metavar="NAME",
        help="how --cfg combines the two velocities: %(choices)s (default: %(default)s)",
    )


def add_integrator(group: OptionGroup) -> None:
    """Add the options that choose the integrator and how much noise it draws."""
    group.add_argument(
        "--integrator",
        choices=INTEGRATORS,
        default="euler",
        metavar="NAME",
        help="numerical integrator: %(choices)s (default: %(default)s)",
    )
    add_eta(group)


def add_eta(group: OptionGroup) -> None:
    """Add the option that sets how much noise some integrators draw."""
    group.add_argument(
        "--eta",
        type=finite_number(0, 1),
        help="amount of fresh noise per step for the integrators ddim, sde and dpmpp_2m_sde, "
        "from 0 to 1 (default: 0 for ddim, 1 for the others)",
    )


def add_churn(group: OptionGroup) -> None:
    """Add the option that adds noise before each step of a deterministic integrator."""
    group.add_argument(
        "--churn",
        type=positive_number,
        metavar="RATE",
        help="share by which the noise grows before each step of an integrator that draws none, "
        "up to 0.4142: S_churn / steps of Karras et al. (default: 0, no noise)",
    )


def add_shift(group: OptionGroup) -> None:
    """Add the option that shifts the timer flux_static."""
    group.add_argument(
        "--shift",
        type=positive_number,
        help="shift factor of the timer flux_static (default: 3)",
    )


def add_mesh(group: OptionGroup) -> None:
    """Add the option that shares the work among devices."""
    group.add_argument(
        "--mesh",
        type=mesh_sizes,
        metavar="SIZES",
        help="devices that share the work, as data=2,fsdp=4; one size may be -1, for all "
        "remaining devices (default: one device)",
    )


def add_quantize(group: OptionGroup) -> None:
    """Add the option that rounds matrices to fewer bits."""
    group.add_argument(
        "--quantize",
        choices=QUANTIZATIONS,
        metavar="DTYPE",
        help="round the matrices of the transformer and T5: %(choices)s; int8 and fp8 are "
        "multiplied in 8 bits, the others only stored in fewer (default: the weights as they are)",
    )


def add_vae_memory(group: OptionGroup) -> None:
    """Add the option that limits the VAE's memory."""
    group.add_argument(
        "--vae-memory",
        type=byte_count,
        metavar="BYTES",
        help="run the VAE in strips of the image where it needs more memory than this beside its "
        "weights (default: as much as the transformer's activations, at least 1.5 GiB)",
    )


def add_output_folder(group: OptionGroup, files: str) -> None:
    """Add the option that sets where files are written. `files`: their names, for its help."""
    group.add_argument(
        "--output-dir",
        type=file_path,
        default=Path(),
        metavar="DIR",
        help=f"folder for {files} (default: the current one)",
    )


def add_quiet(group: OptionGroup) -> None:
    """Add the option that prints nothing but the names of the written files."""
    group.add_argument(
        "--quiet",
        action="store_true",
        help="print the files of the images and nothing else: no progress bar, no times",
    )


def add_compilation_cache(group: OptionGroup) -> None:
    """Add the option that sets where compiled programs are kept."""
    group.add_argument(
        "--compilation-cache",
        type=file_path,
        default=default_cache_folder(),
        metavar="DIR",
        help="folder in which compiled programs are kept (default: %(default)s)",
    )


def add_json(group: OptionGroup) -> None:
    """Add the option that prints what is known for other programs."""
    group.add_argument("--json", action="store_true", help="print all of it as one JSON object")


def add_layout(group: OptionGroup) -> None:
    """Add the options that set how weights are written."""
    group.add_argument(
        "--to",
        choices=LAYOUTS,
        default="own",
        metavar="LAYOUT",
        help="layout of the output: %(choices)s (default: %(default)s)",
    )
    group.add_argument(
        "--dtype",
        choices=FILE_DTYPES,
        help="dtype of the written weights; float8_e4m3 is used only for the matrices of linear "
        "layers; Q8_0, Q4_K and Q4_0 are for --to gguf, and for the matrices of blocks "
        "(default: the dtypes of the source)",
    )


def add_network_filter(group: OptionGroup) -> None:
    """Add the option that chooses some of the four networks."""
    group.add_argument(
        "--only",
        action="append",
        choices=NETWORKS,
        metavar="NETWORK",
        help="one of the networks: %(choices)s; repeat the option for several (default: all)",
    )
