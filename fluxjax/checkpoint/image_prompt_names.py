"""The key tables of image prompts: SigLIP, CLIP's vision encoder, Redux, IP-Adapters."""

from fluxjax.checkpoint.dialect import Dialect, Row


def _norm(key: str, name: str) -> tuple[Row, ...]:
    # PyTorch calls a norm's scale its weight.
    return Row(f"{key}.weight", f"{name}.scale"), Row(f"{key}.bias", f"{name}.bias")


def _encoder_blocks(key: str) -> tuple[Row, ...]:
    """Return the rows of the blocks, which transformers names alike in both encoders."""
    name = "blocks.{i}"
    return (
        *_norm(f"{key}.layer_norm1", f"{name}.norm1"),
        Row(f"{key}.self_attn.q_proj.{{p}}", f"{name}.q.{{p}}"),
        Row(f"{key}.self_attn.k_proj.{{p}}", f"{name}.k.{{p}}"),
        Row(f"{key}.self_attn.v_proj.{{p}}", f"{name}.v.{{p}}"),
        Row(f"{key}.self_attn.out_proj.{{p}}", f"{name}.out.{{p}}"),
        *_norm(f"{key}.layer_norm2", f"{name}.norm2"),
        Row(f"{key}.mlp.fc1.{{p}}", f"{name}.up.{{p}}"),
        Row(f"{key}.mlp.fc2.{{p}}", f"{name}.down.{{p}}"),
    )


SIGLIP_TRANSFORMERS = Dialect(
    "transformers",
    # CLIP's vision encoder has no bias here.
    "embeddings.patch_embedding.bias",
    (
        Row("embeddings.patch_embedding.{p}", "patches.{p}"),
        Row("embeddings.position_embedding.weight", "positions.weight"),
        *_encoder_blocks("encoder.layers.{i}"),
        *_norm("post_layernorm", "norm"),
        Row("head.probe", "pooler.probe"),
        Row("head.attention.in_proj_weight", "pooler.qkv.weight"),
        Row("head.attention.in_proj_bias", "pooler.qkv.bias"),
        Row("head.attention.out_proj.{p}", "pooler.out.{p}"),
        *_norm("head.layernorm", "pooler.norm"),
        Row("head.mlp.fc1.{p}", "pooler.mlp.up.{p}"),
        Row("head.mlp.fc2.{p}", "pooler.mlp.down.{p}"),
    ),
    prefix="vision_model.",
    # Checkpoints of the whole SigLIP hold its text encoder too.
    ignored=("embeddings.position_ids", "logit_scale", "logit_bias", "text_model."),
)

CLIP_VISION_TRANSFORMERS = Dialect(
    "transformers",
    "vision_model.embeddings.class_embedding",
    (
        Row("vision_model.embeddings.class_embedding", "class_token"),
        Row("vision_model.embeddings.patch_embedding.weight", "patches.weight"),
        Row("vision_model.embeddings.position_embedding.weight", "positions.weight"),
        # transformers misspells this name.
        *_norm("vision_model.pre_layrnorm", "norm_in"),
        *_encoder_blocks("vision_model.encoder.layers.{i}"),
        *_norm("vision_model.post_layernorm", "norm"),
        Row("visual_projection.weight", "project.weight"),
    ),
    ignored=("vision_model.embeddings.position_ids",),
)

REDUX_BFL = Dialect(
    "bfl",
    "redux_up.weight",
    (Row("redux_up.{p}", "up.{p}"), Row("redux_down.{p}", "down.{p}")),
)
"""diffusers' names are the same."""

IP_ADAPTER_XLABS = Dialect(
    "xlabs",
    "ip_adapter_proj_model.proj.weight",
    (
        Row("ip_adapter_proj_model.proj.{p}", "project.{p}"),
        *_norm("ip_adapter_proj_model.norm", "norm"),
        Row(
            "double_blocks.{i}.processor.ip_adapter_double_stream_k_proj.{p}",
            "blocks.{i}.k.{p}",
        ),
        Row(
            "double_blocks.{i}.processor.ip_adapter_double_stream_v_proj.{p}",
            "blocks.{i}.v.{p}",
        ),
    ),
)
"""diffusers and ComfyUI read these names."""

IP_ADAPTER_INSTANTX = Dialect(
    "instantx",
    "image_proj.proj.0.weight",
    (
        Row("image_proj.proj.0.{p}", "up.{p}"),
        Row("image_proj.proj.2.{p}", "project.{p}"),
        *_norm("image_proj.norm", "norm"),
        # The double blocks, then the single ones.
        Row("ip_adapter.{i}.to_k_ip.weight", "blocks.{i}.k.weight"),
        Row("ip_adapter.{i}.to_v_ip.weight", "blocks.{i}.v.weight"),
    ),
)
