"""Names of the folders and files of a checkpoint in the diffusers layout."""

TRANSFORMER_FOLDER = "transformer"
CLIP_FOLDER = "text_encoder"
T5_FOLDER = "text_encoder_2"
VAE_FOLDER = "vae"
IMAGE_ENCODER_FOLDER = "image_encoder"
IMAGE_EMBEDDER_FOLDER = "image_embedder"
IP_ADAPTER_FOLDER = "ip_adapter"
CLIP_TOKENIZER_FOLDER = "tokenizer"
T5_TOKENIZER_FOLDER = "tokenizer_2"
SCHEDULER_FOLDER = "scheduler"
CONTROLNET_FOLDER = "controlnet"

TOKENIZER_FOLDERS: tuple[str, ...] = (CLIP_TOKENIZER_FOLDER, T5_TOKENIZER_FOLDER)
MODEL_FOLDERS: tuple[str, ...] = (
    TRANSFORMER_FOLDER,
    CLIP_FOLDER,
    T5_FOLDER,
    VAE_FOLDER,
    *TOKENIZER_FOLDERS,
    SCHEDULER_FOLDER,
)
"""All folders of a model that fluxjax reads, in the order in which they are downloaded."""

MODEL_INDEX_FILE = "model_index.json"
SCHEDULER_FILE = "scheduler_config.json"
DEFAULTS_FILE = "fluxjax.json"
"""fluxjax's own file beside them: how the model is meant to be sampled."""
