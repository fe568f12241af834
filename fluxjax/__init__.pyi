"""The public names at the top of the package, and the folders that they live in.

Each is imported when it is first used. What has its file's name is imported from that file: type
checkers would take the folder's name for the file otherwise.
"""

from . import (
    checkpoint as checkpoint,
    devices as devices,
    flow as flow,
    generate as generate,
    kernels as kernels,
    lora as lora,
    nets as nets,
    train as train,
)
from .checkpoint import (
    WeightsError as WeightsError,
    convert_weights as convert_weights,
    download as download,
    inspect_weights as inspect_weights,
)
from .devices import (
    make_mesh as make_mesh,
    on_mesh as on_mesh,
    stream_blocks as stream_blocks,
)
from .devices.offload import offload as offload
from .devices.shard import shard as shard
from .flow import (
    DDIM as DDIM,
    ClassifierFree as ClassifierFree,
    DPMpp2M as DPMpp2M,
    Euler as Euler,
    Heun as Heun,
    UniPC2 as UniPC2,
    flow_times as flow_times,
)
from .flow.sample import sample as sample
from .flow.stream import stream as stream
from .generate import (
    Conditioning as Conditioning,
    DrawSettings as DrawSettings,
    Guidance as Guidance,
    ImageBatch as ImageBatch,
    Models as Models,
    Recipe as Recipe,
    decode as decode,
    denoise as denoise,
    draw_batch as draw_batch,
    encode as encode,
    encode_text as encode_text,
    flux_velocity as flux_velocity,
    image_ids as image_ids,
    initial_noise as initial_noise,
    load_clip as load_clip,
    load_flux as load_flux,
    load_models as load_models,
    load_t5 as load_t5,
    load_tokenizers as load_tokenizers,
    load_vae as load_vae,
    pack_latents as pack_latents,
    read_image as read_image,
    save_models as save_models,
    tokenize as tokenize,
    unpack_latents as unpack_latents,
    write_png as write_png,
)
from .generate.save import save as save
from .generate.text_to_image import text_to_image as text_to_image
from .kernels.attention import attention as attention
from .lora import (
    Lora as Lora,
    read_lora as read_lora,
    write_lora as write_lora,
)
from .lora.attach import attach as attach
from .lora.merge import merge as merge
from .nets import (
    T5 as T5,
    Clip as Clip,
    Flux as Flux,
    FluxConfig as FluxConfig,
    Vae as Vae,
    quantize as quantize,
    unroll as unroll,
)
from .zoo import ZOO as ZOO

__version__: str
