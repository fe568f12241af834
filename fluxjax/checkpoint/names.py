"""The key tables: how BFL, diffusers, transformers and llama.cpp name each network's weights.

The file's key is on the left, the parameter's name in fluxjax on the right; `Row` in `dialect.py`
explains the patterns.
"""

from fluxjax.checkpoint.dialect import Dialect, Layout, Row


def _rows(*pairs: tuple[str, str], layout: Layout | None = None) -> tuple[Row, ...]:
    """Return rows of pairs of a key and a name."""
    return tuple(Row(key, name, layout=layout) for key, name in pairs)


def _mlp_embedder(key: str, name: str, first: str, second: str) -> tuple[Row, ...]:
    """Return the rows of an embedder: two layers with an activation between."""
    return _rows(
        (f"{key}.{first}.{{p}}", f"{name}.up.{{p}}"),
        (f"{key}.{second}.{{p}}", f"{name}.down.{{p}}"),
    )


# The transformer.


def _bfl_stream(stream: str) -> tuple[Row, ...]:
    """Return the rows of the image's or the text's half of a double block."""
    key, name = f"double_blocks.{{i}}.{stream}", f"double.{{i}}.{stream}"
    return _rows(
        (f"{key}_mod.lin.{{p}}", f"{name}.modulation.{{p}}"),
        (f"{key}_attn.qkv.{{p}}", f"{name}.qkv.{{p}}"),
        (f"{key}_attn.norm.query_norm.scale", f"{name}.query_norm.scale"),
        (f"{key}_attn.norm.key_norm.scale", f"{name}.key_norm.scale"),
        (f"{key}_attn.proj.{{p}}", f"{name}.out.{{p}}"),
        (f"{key}_mlp.0.{{p}}", f"{name}.mlp.up.{{p}}"),
        (f"{key}_mlp.2.{{p}}", f"{name}.mlp.down.{{p}}"),
    )


FLUX_BFL = Dialect(
    "bfl",
    "img_in.weight",
    (
        *_rows(("img_in.{p}", "img_in.{p}"), ("txt_in.{p}", "txt_in.{p}")),
        *_mlp_embedder("time_in", "time_in", "in_layer", "out_layer"),
        *_mlp_embedder("vector_in", "vector_in", "in_layer", "out_layer"),
        *_mlp_embedder("guidance_in", "guidance_in", "in_layer", "out_layer"),
        *_bfl_stream("img"),
        *_bfl_stream("txt"),
        *_rows(
            ("single_blocks.{i}.modulation.lin.{p}", "single.{i}.modulation.{p}"),
            ("single_blocks.{i}.linear1.{p}", "single.{i}.linear1.{p}"),
            ("single_blocks.{i}.norm.query_norm.scale", "single.{i}.query_norm.scale"),
            ("single_blocks.{i}.norm.key_norm.scale", "single.{i}.key_norm.scale"),
            ("single_blocks.{i}.linear2.{p}", "single.{i}.linear2.{p}"),
            ("final_layer.adaLN_modulation.1.{p}", "final.modulation.{p}"),
            ("final_layer.linear.{p}", "final.linear.{p}"),
        ),
    ),
)

_DOUBLE = "transformer_blocks.{i}"
_SINGLE = "single_transformer_blocks.{i}"
# diffusers stores q, k and v of the image and the text as six layers; here they are two.
_DIFFUSERS_IMAGE_STREAM = (
    Row(f"{_DOUBLE}.norm1.linear.{{p}}", "double.{i}.img.modulation.{p}"),
    Row(f"{_DOUBLE}.attn.to_q.{{p}}", "double.{i}.img.qkv.{p}", "q"),
    Row(f"{_DOUBLE}.attn.to_k.{{p}}", "double.{i}.img.qkv.{p}", "k"),
    Row(f"{_DOUBLE}.attn.to_v.{{p}}", "double.{i}.img.qkv.{p}", "v"),
    Row(f"{_DOUBLE}.attn.norm_q.weight", "double.{i}.img.query_norm.scale"),
    Row(f"{_DOUBLE}.attn.norm_k.weight", "double.{i}.img.key_norm.scale"),
    Row(f"{_DOUBLE}.attn.to_out.0.{{p}}", "double.{i}.img.out.{p}"),
    Row(f"{_DOUBLE}.ff.net.0.proj.{{p}}", "double.{i}.img.mlp.up.{p}"),
    Row(f"{_DOUBLE}.ff.net.2.{{p}}", "double.{i}.img.mlp.down.{p}"),
)
_DIFFUSERS_TEXT_STREAM = (
    Row(f"{_DOUBLE}.norm1_context.linear.{{p}}", "double.{i}.txt.modulation.{p}"),
    Row(f"{_DOUBLE}.attn.add_q_proj.{{p}}", "double.{i}.txt.qkv.{p}", "q"),
    Row(f"{_DOUBLE}.attn.add_k_proj.{{p}}", "double.{i}.txt.qkv.{p}", "k"),
    Row(f"{_DOUBLE}.attn.add_v_proj.{{p}}", "double.{i}.txt.qkv.{p}", "v"),
    Row(f"{_DOUBLE}.attn.norm_added_q.weight", "double.{i}.txt.query_norm.scale"),
    Row(f"{_DOUBLE}.attn.norm_added_k.weight", "double.{i}.txt.key_norm.scale"),
    Row(f"{_DOUBLE}.attn.to_add_out.{{p}}", "double.{i}.txt.out.{p}"),
    Row(f"{_DOUBLE}.ff_context.net.0.proj.{{p}}", "double.{i}.txt.mlp.up.{p}"),
    Row(f"{_DOUBLE}.ff_context.net.2.{{p}}", "double.{i}.txt.mlp.down.{p}"),
)
_DIFFUSERS_SINGLE = (
    Row(f"{_SINGLE}.norm.linear.{{p}}", "single.{i}.modulation.{p}"),
    Row(f"{_SINGLE}.attn.to_q.{{p}}", "single.{i}.linear1.{p}", "q"),
    Row(f"{_SINGLE}.attn.to_k.{{p}}", "single.{i}.linear1.{p}", "k"),
    Row(f"{_SINGLE}.attn.to_v.{{p}}", "single.{i}.linear1.{p}", "v"),
    Row(f"{_SINGLE}.proj_mlp.{{p}}", "single.{i}.linear1.{p}", "mlp"),
    Row(f"{_SINGLE}.attn.norm_q.weight", "single.{i}.query_norm.scale"),
    Row(f"{_SINGLE}.attn.norm_k.weight", "single.{i}.key_norm.scale"),
    Row(f"{_SINGLE}.proj_out.{{p}}", "single.{i}.linear2.{p}"),
)
FLUX_DIFFUSERS = Dialect(
    "diffusers",
    "x_embedder.weight",
    (
        *_rows(("x_embedder.{p}", "img_in.{p}"), ("context_embedder.{p}", "txt_in.{p}")),
        *_mlp_embedder("time_text_embed.timestep_embedder", "time_in", "linear_1", "linear_2"),
        *_mlp_embedder("time_text_embed.text_embedder", "vector_in", "linear_1", "linear_2"),
        *_mlp_embedder("time_text_embed.guidance_embedder", "guidance_in", "linear_1", "linear_2"),
        *_DIFFUSERS_IMAGE_STREAM,
        *_DIFFUSERS_TEXT_STREAM,
        *_DIFFUSERS_SINGLE,
        # diffusers' last modulation is (scale, shift); BFL's and fluxjax's is (shift, scale).
        Row("norm_out.linear.{p}", "final.modulation.{p}", layout="swap"),
        Row("proj_out.{p}", "final.linear.{p}"),
    ),
)

# The text encoders.

CLIP_TRANSFORMERS = Dialect(
    "transformers",
    "embeddings.token_embedding.weight",
    _rows(
        ("embeddings.token_embedding.weight", "tokens.weight"),
        ("embeddings.position_embedding.weight", "positions.weight"),
        ("encoder.layers.{i}.layer_norm1.weight", "blocks.{i}.norm1.scale"),
        ("encoder.layers.{i}.layer_norm1.bias", "blocks.{i}.norm1.bias"),
        ("encoder.layers.{i}.self_attn.q_proj.{p}", "blocks.{i}.q.{p}"),
        ("encoder.layers.{i}.self_attn.k_proj.{p}", "blocks.{i}.k.{p}"),
        ("encoder.layers.{i}.self_attn.v_proj.{p}", "blocks.{i}.v.{p}"),
        ("encoder.layers.{i}.self_attn.out_proj.{p}", "blocks.{i}.out.{p}"),
        ("encoder.layers.{i}.layer_norm2.weight", "blocks.{i}.norm2.scale"),
        ("encoder.layers.{i}.layer_norm2.bias", "blocks.{i}.norm2.bias"),
        ("encoder.layers.{i}.mlp.fc1.{p}", "blocks.{i}.up.{p}"),
        ("encoder.layers.{i}.mlp.fc2.{p}", "blocks.{i}.down.{p}"),
        ("final_layer_norm.weight", "norm.scale"),
        ("final_layer_norm.bias", "norm.bias"),
    ),
    prefix="text_model.",
    # Checkpoints of the whole CLIP hold the vision encoder and the projections too.
    ignored=(
        "embeddings.position_ids",
        "logit_scale",
        "text_projection.weight",
        "visual_projection.weight",
        "vision_model.",
    ),
)

T5_TRANSFORMERS = Dialect(
    "transformers",
    "shared.weight",
    _rows(
        ("shared.weight", "tokens.weight"),
        (
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            "position_bias.weight",
        ),
        ("encoder.block.{i}.layer.0.layer_norm.weight", "blocks.{i}.norm1.scale"),
        ("encoder.block.{i}.layer.0.SelfAttention.q.weight", "blocks.{i}.q.weight"),
        ("encoder.block.{i}.layer.0.SelfAttention.k.weight", "blocks.{i}.k.weight"),
        ("encoder.block.{i}.layer.0.SelfAttention.v.weight", "blocks.{i}.v.weight"),
        ("encoder.block.{i}.layer.0.SelfAttention.o.weight", "blocks.{i}.out.weight"),
        ("encoder.block.{i}.layer.1.layer_norm.weight", "blocks.{i}.norm2.scale"),
        ("encoder.block.{i}.layer.1.DenseReluDense.wi_0.weight", "blocks.{i}.gate.weight"),
        ("encoder.block.{i}.layer.1.DenseReluDense.wi_1.weight", "blocks.{i}.up.weight"),
        ("encoder.block.{i}.layer.1.DenseReluDense.wo.weight", "blocks.{i}.down.weight"),
        ("encoder.final_layer_norm.weight", "norm.scale"),
    ),
    # The same tensor as shared.weight, which some programs write a second time.
    ignored=("encoder.embed_tokens.weight",),
)

T5_LLAMA = Dialect(
    "llama.cpp",
    "token_embd.weight",
    _rows(
        ("token_embd.weight", "tokens.weight"),
        ("enc.blk.0.attn_rel_b.weight", "position_bias.weight"),
        ("enc.blk.{i}.attn_norm.weight", "blocks.{i}.norm1.scale"),
        ("enc.blk.{i}.attn_q.weight", "blocks.{i}.q.weight"),
        ("enc.blk.{i}.attn_k.weight", "blocks.{i}.k.weight"),
        ("enc.blk.{i}.attn_v.weight", "blocks.{i}.v.weight"),
        ("enc.blk.{i}.attn_o.weight", "blocks.{i}.out.weight"),
        ("enc.blk.{i}.ffn_norm.weight", "blocks.{i}.norm2.scale"),
        ("enc.blk.{i}.ffn_gate.weight", "blocks.{i}.gate.weight"),
        ("enc.blk.{i}.ffn_up.weight", "blocks.{i}.up.weight"),
        ("enc.blk.{i}.ffn_down.weight", "blocks.{i}.down.weight"),
        ("enc.output_norm.weight", "norm.scale"),
    ),
)

# The VAE.


def _norm(key: str, name: str) -> tuple[Row, ...]:
    # PyTorch calls a norm's scale its weight.
    return _rows((f"{key}.weight", f"{name}.scale"), (f"{key}.bias", f"{name}.bias"))


def _resnet(key: str, name: str, shortcut: str) -> tuple[Row, ...]:
    """Return the rows of a residual block; `shortcut`: the key of its 1x1 convolution."""
    return (
        *_norm(f"{key}.norm1", f"{name}.norm1"),
        *_rows((f"{key}.conv1.{{p}}", f"{name}.conv1.{{p}}")),
        *_norm(f"{key}.norm2", f"{name}.norm2"),
        *_rows(
            (f"{key}.conv2.{{p}}", f"{name}.conv2.{{p}}"),
            (f"{key}.{shortcut}.{{p}}", f"{name}.shortcut.{{p}}"),
        ),
    )


def _vae_ends(side: str, norm_out: str) -> tuple[Row, ...]:
    """Return the rows of the first and last convolution of the encoder or the decoder."""
    return (
        *_rows(
            (f"{side}.conv_in.{{p}}", f"{side}.conv_in.{{p}}"),
            (f"{side}.conv_out.{{p}}", f"{side}.conv_out.{{p}}"),
        ),
        *_norm(f"{side}.{norm_out}", f"{side}.norm_out"),
    )


def _bfl_side(side: str) -> tuple[Row, ...]:
    """Return the rows of the encoder or the decoder, without those of its levels."""
    key, name = f"{side}.mid.attn_1", f"{side}.middle.attention"
    return (
        *_vae_ends(side, "norm_out"),
        *_resnet(f"{side}.mid.block_1", f"{side}.middle.resnet1", "nin_shortcut"),
        *_norm(f"{key}.norm", f"{name}.norm"),
        # BFL's attention of the VAE is made of 1x1 convolutions.
        *_rows(
            (f"{key}.q.{{p}}", f"{name}.q.{{p}}"),
            (f"{key}.k.{{p}}", f"{name}.k.{{p}}"),
            (f"{key}.v.{{p}}", f"{name}.v.{{p}}"),
            (f"{key}.proj_out.{{p}}", f"{name}.out.{{p}}"),
            layout="1x1",
        ),
        *_resnet(f"{side}.mid.block_2", f"{side}.middle.resnet2", "nin_shortcut"),
    )


def _bfl_level(key: str, name: str, resample: str) -> tuple[Row, ...]:
    """Return the rows of one resolution; `resample`: the key of its change to the next one."""
    return (
        *_resnet(f"{key}.block.{{j}}", f"{name}.resnets.{{j}}", "nin_shortcut"),
        *_rows((f"{key}.{resample}.conv.{{p}}", f"{name}.resample.{{p}}")),
    )


def vae_bfl(levels: int) -> Dialect:
    """Return BFL's names of a VAE with this many resolutions.

    BFL numbers the decoder's levels from the finest to the coarsest, fluxjax in the order in which
    they run, from the coarsest to the finest.
    """
    decoder_levels: list[Row] = []
    for level in range(levels):
        key = f"decoder.up.{levels - 1 - level}"
        decoder_levels += _bfl_level(key, f"decoder.up.{level}", "upsample")
    return Dialect(
        "bfl",
        "decoder.mid.block_1.conv1.weight",
        (
            *_bfl_side("encoder"),
            *_bfl_level("encoder.down.{i}", "encoder.down.{i}", "downsample"),
            *_bfl_side("decoder"),
            *decoder_levels,
        ),
    )


def _diffusers_side(side: str, direction: str) -> tuple[Row, ...]:
    """Return the rows of the encoder (`direction` "down") or the decoder ("up")."""
    key, name = f"{side}.mid_block.attentions.0", f"{side}.middle.attention"
    level_key, level_name = f"{side}.{direction}_blocks.{{i}}", f"{side}.{direction}.{{i}}"
    return (
        *_vae_ends(side, "conv_norm_out"),
        *_resnet(f"{side}.mid_block.resnets.0", f"{side}.middle.resnet1", "conv_shortcut"),
        *_norm(f"{key}.group_norm", f"{name}.norm"),
        *_rows(
            (f"{key}.to_q.{{p}}", f"{name}.q.{{p}}"),
            (f"{key}.to_k.{{p}}", f"{name}.k.{{p}}"),
            (f"{key}.to_v.{{p}}", f"{name}.v.{{p}}"),
            (f"{key}.to_out.0.{{p}}", f"{name}.out.{{p}}"),
        ),
        *_resnet(f"{side}.mid_block.resnets.1", f"{side}.middle.resnet2", "conv_shortcut"),
        *_resnet(f"{level_key}.resnets.{{j}}", f"{level_name}.resnets.{{j}}", "conv_shortcut"),
        *_rows((f"{level_key}.{direction}samplers.0.conv.{{p}}", f"{level_name}.resample.{{p}}")),
    )


VAE_DIFFUSERS = Dialect(
    "diffusers",
    "decoder.mid_block.resnets.0.conv1.weight",
    (*_diffusers_side("encoder", "down"), *_diffusers_side("decoder", "up")),
)

# fluxjax's own files.

OWN = Dialect("own", "", (Row("{leaf}", "{leaf}", layout="own"),))
"""fluxjax's own names: those of the leaves in memory."""
