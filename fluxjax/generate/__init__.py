"""From prompts to images: text, conditioning, guided velocities, drawing; loading by name."""

from fluxjax.generate.autoencode import decode, decode_tokens, encode
from fluxjax.generate.cache import CachedFlux, FirstBlock, StepCache, TeaCache
from fluxjax.generate.canvas import Margins, extend_canvas
from fluxjax.generate.channels import ConcatCondition
from fluxjax.generate.compare import Comparison, compare
from fluxjax.generate.condition_images import encode_image, resize_image
from fluxjax.generate.conditioning import (
    AddedCondition,
    Conditioning,
    PreparedConditioning,
    ReferenceTokens,
)
from fluxjax.generate.control import control_condition
from fluxjax.generate.controlnet import (
    CONTROL_MODES,
    ControlNetCondition,
    ControlSettings,
    controlnet_condition,
)
from fluxjax.generate.controls import Control, control_times
from fluxjax.generate.degradations import Blurred, DecodePixels, Degradation, Hidden, Shrunk
from fluxjax.generate.draw import (
    DenoisedBatch,
    DrawnBatch,
    decode_batch,
    denoise,
    denoise_batch,
    draw_batch,
)
from fluxjax.generate.draw_hooks import DrawHooks, DrawProgress
from fluxjax.generate.draw_settings import DrawSettings
from fluxjax.generate.edges import canny_edges
from fluxjax.generate.edit_image import edit_image
from fluxjax.generate.edit_methods import EDIT_METHODS, FlowEditing, SDEditing
from fluxjax.generate.edit_record import EditMethod
from fluxjax.generate.encoder_pixels import clip_pixels, siglip_pixels
from fluxjax.generate.field_functions import trajectories
from fluxjax.generate.fill import fill_around, fill_condition, fill_image, mask_features
from fluxjax.generate.image import read_image, write_png
from fluxjax.generate.image_batch import DrawChange, ImageBatch, Recipe
from fluxjax.generate.image_grid import show_images
from fluxjax.generate.image_to_image import (
    Repaint,
    Start,
    begin_from_images,
    image_to_image,
    outpaint,
)
from fluxjax.generate.inverting_edits import DiffEditing, FireFlowEditing, RFInverting
from fluxjax.generate.ip_adapter import (
    CombinedCondition,
    ImagePromptCondition,
    ip_adapter_condition,
)
from fluxjax.generate.kontext import (
    ReferenceCondition,
    References,
    kontext_condition,
    kontext_image,
    preferred_size,
)
from fluxjax.generate.latents import (
    image_ids,
    initial_noise,
    pack_latents,
    seed_key,
    unpack_latents,
)
from fluxjax.generate.load import (
    activation_dtype,
    load_chroma,
    load_clip,
    load_controlnet,
    load_flux,
    load_t5,
    load_tokenizers,
    load_vae,
)
from fluxjax.generate.load_image_encoders import (
    load_clip_vision,
    load_ip_adapter,
    load_redux,
    load_siglip,
)
from fluxjax.generate.load_models import Models, load_models
from fluxjax.generate.load_network import LoadOptions, load_network
from fluxjax.generate.masks import cell_mask, mask_tokens, pad_image, paste_kept, read_mask
from fluxjax.generate.plots import plot_errors, plot_times
from fluxjax.generate.preview import Preview, fit_preview
from fluxjax.generate.prompt_batch import prompt_batch
from fluxjax.generate.prompt_conditioning import prompt_conditioning
from fluxjax.generate.redux import (
    REDUX_GUIDANCE,
    REDUX_RULES,
    REDUX_STEPS,
    ReduxCondition,
    redux_condition,
    redux_tokens,
)
from fluxjax.generate.reference_ids import reference_ids
from fluxjax.generate.region_prompts import MixedPrompts, RegionLabels, RegionPrompts
from fluxjax.generate.regions import (
    REGION_RULES,
    MixedCondition,
    Region,
    RegionalCondition,
    region_labels,
    region_weights,
    regional_condition,
)
from fluxjax.generate.restore_image import SOLVERS, Restoration, restoration_times, restore_image
from fluxjax.generate.samplers import (
    INTEGRATORS,
    RULES,
    TIMERS,
    integrator,
    model_times,
    step_cache,
    timer,
)
from fluxjax.generate.save import save, save_models
from fluxjax.generate.text import PromptIds, TextStates, encode_text, prompt_ids
from fluxjax.generate.text_to_image import text_to_image
from fluxjax.generate.times_file import read_times, write_times
from fluxjax.generate.tokens import Tokenizers, tokenize
from fluxjax.generate.velocity import Guidance, WeakNetwork, flux_velocity

__all__ = [
    "CONTROL_MODES",
    "EDIT_METHODS",
    "INTEGRATORS",
    "REDUX_GUIDANCE",
    "REDUX_RULES",
    "REDUX_STEPS",
    "REGION_RULES",
    "RULES",
    "SOLVERS",
    "TIMERS",
    "AddedCondition",
    "Blurred",
    "CachedFlux",
    "CombinedCondition",
    "Comparison",
    "ConcatCondition",
    "Conditioning",
    "Control",
    "ControlNetCondition",
    "ControlSettings",
    "DecodePixels",
    "Degradation",
    "DenoisedBatch",
    "DiffEditing",
    "DrawChange",
    "DrawHooks",
    "DrawProgress",
    "DrawSettings",
    "DrawnBatch",
    "EditMethod",
    "FireFlowEditing",
    "FirstBlock",
    "FlowEditing",
    "Guidance",
    "Hidden",
    "ImageBatch",
    "ImagePromptCondition",
    "LoadOptions",
    "Margins",
    "MixedCondition",
    "MixedPrompts",
    "Models",
    "PreparedConditioning",
    "Preview",
    "PromptIds",
    "RFInverting",
    "Recipe",
    "ReduxCondition",
    "ReferenceCondition",
    "ReferenceTokens",
    "References",
    "Region",
    "RegionLabels",
    "RegionPrompts",
    "RegionalCondition",
    "Repaint",
    "Restoration",
    "SDEditing",
    "Shrunk",
    "Start",
    "StepCache",
    "TeaCache",
    "TextStates",
    "Tokenizers",
    "WeakNetwork",
    "activation_dtype",
    "begin_from_images",
    "canny_edges",
    "cell_mask",
    "clip_pixels",
    "compare",
    "control_condition",
    "control_times",
    "controlnet_condition",
    "decode",
    "decode_batch",
    "decode_tokens",
    "denoise",
    "denoise_batch",
    "draw_batch",
    "edit_image",
    "encode",
    "encode_image",
    "encode_text",
    "extend_canvas",
    "fill_around",
    "fill_condition",
    "fill_image",
    "fit_preview",
    "flux_velocity",
    "image_ids",
    "image_to_image",
    "initial_noise",
    "integrator",
    "ip_adapter_condition",
    "kontext_condition",
    "kontext_image",
    "load_chroma",
    "load_clip",
    "load_clip_vision",
    "load_controlnet",
    "load_flux",
    "load_ip_adapter",
    "load_models",
    "load_network",
    "load_redux",
    "load_siglip",
    "load_t5",
    "load_tokenizers",
    "load_vae",
    "mask_features",
    "mask_tokens",
    "model_times",
    "outpaint",
    "pack_latents",
    "pad_image",
    "paste_kept",
    "plot_errors",
    "plot_times",
    "preferred_size",
    "prompt_batch",
    "prompt_conditioning",
    "prompt_ids",
    "read_image",
    "read_mask",
    "read_times",
    "redux_condition",
    "redux_tokens",
    "reference_ids",
    "region_labels",
    "region_weights",
    "regional_condition",
    "resize_image",
    "restoration_times",
    "restore_image",
    "save",
    "save_models",
    "seed_key",
    "show_images",
    "siglip_pixels",
    "step_cache",
    "text_to_image",
    "timer",
    "tokenize",
    "trajectories",
    "unpack_latents",
    "write_png",
    "write_times",
]
