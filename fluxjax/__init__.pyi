"""The names at the top of the package, and the folders that they live in; each is imported when it is first used."""

from . import (
    checkpoint as checkpoint,
)
from . import (
    devices as devices,
)
from . import (
    flow as flow,
)
from . import (
    generate as generate,
)
from . import (
    kernels as kernels,
)
from . import (
    lora as lora,
)
from . import (
    nets as nets,
)
from . import (
    train as train,
)
from .checkpoint import WeightsError as WeightsError
from .checkpoint import convert_weights as convert_weights
from .checkpoint import download as download
from .checkpoint import inspect_weights as inspect_weights
from .checkpoint import load_defaults as load_defaults
from .devices import fetch as fetch
from .devices import make_mesh as make_mesh
from .devices import offload as offload
from .devices import on_mesh as on_mesh
from .devices import shard as shard
from .devices import shardings as shardings
from .devices import stream_blocks as stream_blocks
from .flow import DDIM as DDIM
from .flow import ClassifierFree as ClassifierFree
from .flow import DPMpp2M as DPMpp2M
from .flow import Euler as Euler
from .flow import Guided as Guided
from .flow import Heun as Heun
from .flow import UniPC2 as UniPC2
from .flow import Velocity as Velocity
from .flow import flow_times as flow_times
from .flow import sample as sample
from .flow import stream as stream
from .flow import time_shift as time_shift
from .generate import Models as Models
from .generate import decode as decode
from .generate import denoise as denoise
from .generate import encode as encode
from .generate import encode_text as encode_text
from .generate import image_ids as image_ids
from .generate import initial_noise as initial_noise
from .generate import load_clip as load_clip
from .generate import load_flux as load_flux
from .generate import load_models as load_models
from .generate import load_t5 as load_t5
from .generate import load_tokenizers as load_tokenizers
from .generate import load_vae as load_vae
from .generate import pack_latents as pack_latents
from .generate import read_image as read_image
from .generate import save as save
from .generate import save_models as save_models
from .generate import seed_key as seed_key
from .generate import text_to_image as text_to_image
from .generate import tokenize as tokenize
from .generate import unpack_latents as unpack_latents
from .generate import write_png as write_png
from .kernels import Attention as Attention
from .kernels import BlockSizes as BlockSizes
from .kernels import Nag as Nag
from .kernels import attention as attention
from .lora import Lora as Lora
from .lora import attach as attach
from .lora import init_lora as init_lora
from .lora import merge as merge
from .lora import read_lora as read_lora
from .lora import unmerge as unmerge
from .lora import write_lora as write_lora
from .nets import T5 as T5
from .nets import Clip as Clip
from .nets import ClipConfig as ClipConfig
from .nets import Flux as Flux
from .nets import FluxConfig as FluxConfig
from .nets import T5Config as T5Config
from .nets import Vae as Vae
from .nets import VaeConfig as VaeConfig
from .nets import quantize as quantize
from .nets import unroll as unroll
from .zoo import ZOO as ZOO
from .zoo import Defaults as Defaults

__version__: str
