"""The public names at the top of the package, and the folders that they live in.

Each is imported when it is first used.
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
    load_defaults as load_defaults,
)
from .devices import (
    fetch as fetch,
    make_mesh as make_mesh,
    offload as offload,
    on_mesh as on_mesh,
    shard as shard,
    shardings as shardings,
    stream_blocks as stream_blocks,
)
from .flow import (
    DDIM as DDIM,
    ClassifierFree as ClassifierFree,
    DPMpp2M as DPMpp2M,
    Euler as Euler,
    Guided as Guided,
    Heun as Heun,
    UniPC2 as UniPC2,
    Velocity as Velocity,
    flow_times as flow_times,
    sample as sample,
    stream as stream,
    time_shift as time_shift,
)
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
    save as save,
    save_models as save_models,
    seed_key as seed_key,
    text_to_image as text_to_image,
    tokenize as tokenize,
    unpack_latents as unpack_latents,
    write_png as write_png,
)
from .kernels import (
    Attention as Attention,
    BlockSizes as BlockSizes,
    Nag as Nag,
    attention as attention,
)
from .lora import (
    Lora as Lora,
    attach as attach,
    init_lora as init_lora,
    merge as merge,
    read_lora as read_lora,
    unmerge as unmerge,
    write_lora as write_lora,
)
from .nets import (
    T5 as T5,
    Clip as Clip,
    ClipConfig as ClipConfig,
    Flux as Flux,
    FluxConfig as FluxConfig,
    T5Config as T5Config,
    Vae as Vae,
    VaeConfig as VaeConfig,
    quantize as quantize,
    unroll as unroll,
)
from .zoo import ZOO as ZOO, Defaults as Defaults

__version__: str
