"""How each dialect names the weights: one row a kind of tensor, read forwards to load and backwards to export.

`{i}` and `{j}` stand for indices, `{p}` for weight or bias, `{leaf}` for anything. A row's right side names one of our
leaves; a stacked leaf carries its block's index after its first field.
"""

import re
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Row:
    """One kind of tensor. `part`: the rows of a fused weight it holds, by name. `layout`: "1x1" for a linear layer stored as
    a 1x1 convolution, "swap" for one whose halves are in the other order, "ours" for a tensor as it is in memory."""

    theirs: str
    ours: str
    part: str | None = None
    layout: str | None = None

    @cached_property
    def reader(self) -> re.Pattern:
        return _pattern(self.theirs)

    @cached_property
    def writer(self) -> re.Pattern:
        return _pattern(self.ours)


def _form(key: str) -> str:
    """Return a key with a sign in place of each index."""
    return ".".join("#" if part.isascii() and part.isdigit() else part for part in key.split("."))


def _pattern(text: str) -> re.Pattern:
    escaped = re.escape(text)
    for name, expression in (
        ("i", "[0-9]+"),
        ("j", "[0-9]+"),
        ("p", "weight|bias"),
        ("leaf", ".+"),
    ):
        escaped = escaped.replace(re.escape(f"{{{name}}}"), f"(?P<{name}>{expression})", 1)
    return re.compile(escaped + r"\Z")


@dataclass(frozen=True)
class Dialect:
    """A naming of a network's weights. `prefix`: what its keys may begin with, and do on export. `unneeded`: keys, and
    beginnings of keys that end in a dot, that are known and not used. `mark`: a key that tells this dialect from the
    network's others."""

    name: str
    mark: str
    rows: tuple[Row, ...]
    prefix: str = ""
    unneeded: tuple[str, ...] = ()

    def strip(self, key: str) -> str:
        return key.removeprefix(self.prefix)

    def find(self, key: str) -> tuple[str, Row] | None:
        """Return the name of the leaf that a key fills, and its row."""
        stripped = self.strip(key)
        for row in self._rows_by_form.get(_form(stripped), self._general_rows):
            if match := row.reader.match(stripped):
                return row.ours.format(**match.groupdict()), row
        return None

    def ignores(self, key: str) -> bool:
        """Return whether a key is known and not used; an entry of `unneeded` that ends in a dot is a prefix."""
        stripped = self.strip(key)
        return any(
            stripped == known or (known.endswith(".") and stripped.startswith(known))
            for known in self.unneeded
        )

    @cached_property
    def _rows_by_form(self) -> dict[str, list[Row]]:
        """Rows by the form of their keys, so that a key is compared with one or two of them and not with all."""
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            for last in ("weight", "bias") if "{p}" in row.theirs else ("",):
                found.setdefault(_form(row.theirs.format(i=0, j=0, p=last, leaf="")), []).append(
                    row
                )
        return found

    @cached_property
    def _general_rows(self) -> list[Row]:
        return [row for row in self.rows if "{leaf}" in row.theirs]

    def keys(self, leaf: str) -> list[tuple[str, Row]]:
        """Return the keys that a leaf is exported to, in the order of its parts."""
        found = [(row, row.writer.match(leaf)) for row in self.rows]
        return [
            (self.prefix + row.theirs.format(**match.groupdict()), row)
            for row, match in found
            if match
        ]


def _rows(*pairs: tuple[str, str], layout: str | None = None) -> tuple[Row, ...]:
    return tuple(Row(theirs, ours, layout=layout) for theirs, ours in pairs)


def _mlp_embedder(theirs: str, ours: str, first: str, second: str) -> tuple[Row, ...]:
    return _rows(
        (f"{theirs}.{first}.{{p}}", f"{ours}.up.{{p}}"),
        (f"{theirs}.{second}.{{p}}", f"{ours}.down.{{p}}"),
    )


def _bfl_stream(short: str) -> tuple[Row, ...]:
    theirs, ours = f"double_blocks.{{i}}.{short}", f"double.{{i}}.{short}"
    return _rows(
        (f"{theirs}_mod.lin.{{p}}", f"{ours}.modulation.{{p}}"),
        (f"{theirs}_attn.qkv.{{p}}", f"{ours}.qkv.{{p}}"),
        (f"{theirs}_attn.norm.query_norm.scale", f"{ours}.query_norm.scale"),
        (f"{theirs}_attn.norm.key_norm.scale", f"{ours}.key_norm.scale"),
        (f"{theirs}_attn.proj.{{p}}", f"{ours}.out.{{p}}"),
        (f"{theirs}_mlp.0.{{p}}", f"{ours}.mlp.up.{{p}}"),
        (f"{theirs}_mlp.2.{{p}}", f"{ours}.mlp.down.{{p}}"),
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


def _diffusers_stream(
    short: str, qkv: tuple[str, str, str], norms: tuple[str, str], out: str, norm1: str, ff: str
):
    theirs, ours = "transformer_blocks.{i}", f"double.{{i}}.{short}"
    return (
        Row(f"{theirs}.{norm1}.linear.{{p}}", f"{ours}.modulation.{{p}}"),
        *(
            Row(f"{theirs}.attn.{name}.{{p}}", f"{ours}.qkv.{{p}}", part)
            for name, part in zip(qkv, "qkv", strict=True)
        ),
        Row(f"{theirs}.attn.{norms[0]}.weight", f"{ours}.query_norm.scale"),
        Row(f"{theirs}.attn.{norms[1]}.weight", f"{ours}.key_norm.scale"),
        Row(f"{theirs}.attn.{out}.{{p}}", f"{ours}.out.{{p}}"),
        Row(f"{theirs}.{ff}.net.0.proj.{{p}}", f"{ours}.mlp.up.{{p}}"),
        Row(f"{theirs}.{ff}.net.2.{{p}}", f"{ours}.mlp.down.{{p}}"),
    )


FLUX_DIFFUSERS = Dialect(
    "diffusers",
    "x_embedder.weight",
    (
        *_rows(("x_embedder.{p}", "img_in.{p}"), ("context_embedder.{p}", "txt_in.{p}")),
        *_mlp_embedder("time_text_embed.timestep_embedder", "time_in", "linear_1", "linear_2"),
        *_mlp_embedder("time_text_embed.text_embedder", "vector_in", "linear_1", "linear_2"),
        *_mlp_embedder("time_text_embed.guidance_embedder", "guidance_in", "linear_1", "linear_2"),
        *_diffusers_stream(
            "img", ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), "to_out.0", "norm1", "ff"
        ),
        *_diffusers_stream(
            "txt",
            ("add_q_proj", "add_k_proj", "add_v_proj"),
            ("norm_added_q", "norm_added_k"),
            "to_add_out",
            "norm1_context",
            "ff_context",
        ),
        Row("single_transformer_blocks.{i}.norm.linear.{p}", "single.{i}.modulation.{p}"),
        Row("single_transformer_blocks.{i}.attn.to_q.{p}", "single.{i}.linear1.{p}", "q"),
        Row("single_transformer_blocks.{i}.attn.to_k.{p}", "single.{i}.linear1.{p}", "k"),
        Row("single_transformer_blocks.{i}.attn.to_v.{p}", "single.{i}.linear1.{p}", "v"),
        Row("single_transformer_blocks.{i}.proj_mlp.{p}", "single.{i}.linear1.{p}", "mlp"),
        Row("single_transformer_blocks.{i}.attn.norm_q.weight", "single.{i}.query_norm.scale"),
        Row("single_transformer_blocks.{i}.attn.norm_k.weight", "single.{i}.key_norm.scale"),
        Row("single_transformer_blocks.{i}.proj_out.{p}", "single.{i}.linear2.{p}"),
        # diffusers' last modulation is (scale, shift); BFL's and ours is (shift, scale).
        Row("norm_out.linear.{p}", "final.modulation.{p}", layout="swap"),
        Row("proj_out.{p}", "final.linear.{p}"),
    ),
)

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
    # Whole CLIP checkpoints hold the vision tower too.
    unneeded=(
        "embeddings.position_ids",
        "logit_scale",
        "text_projection.weight",
        "visual_projection.weight",
        "vision_model.",
    ),
)

OWN = Dialect("own", "", (Row("{leaf}", "{leaf}", layout="ours"),))
"""fluxjax's own names: the leaves'."""

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
    # The same tensor as shared.weight, written twice by some.
    unneeded=("encoder.embed_tokens.weight",),
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


def _norm(theirs: str, ours: str) -> tuple[Row, ...]:
    return _rows((f"{theirs}.weight", f"{ours}.scale"), (f"{theirs}.bias", f"{ours}.bias"))


def _resnet(theirs: str, ours: str, shortcut: str) -> tuple[Row, ...]:
    return (
        *_norm(f"{theirs}.norm1", f"{ours}.norm1"),
        *_rows((f"{theirs}.conv1.{{p}}", f"{ours}.conv1.{{p}}")),
        *_norm(f"{theirs}.norm2", f"{ours}.norm2"),
        *_rows(
            (f"{theirs}.conv2.{{p}}", f"{ours}.conv2.{{p}}"),
            (f"{theirs}.{shortcut}.{{p}}", f"{ours}.shortcut.{{p}}"),
        ),
    )


def _vae_ends(side: str, norm_out: str) -> tuple[Row, ...]:
    return (
        *_rows(
            (f"{side}.conv_in.{{p}}", f"{side}.conv_in.{{p}}"),
            (f"{side}.conv_out.{{p}}", f"{side}.conv_out.{{p}}"),
        ),
        *_norm(f"{side}.{norm_out}", f"{side}.norm_out"),
    )


def _bfl_side(side: str) -> tuple[Row, ...]:
    attention, ours = f"{side}.mid.attn_1", f"{side}.middle.attention"
    return (
        *_vae_ends(side, "norm_out"),
        *_resnet(f"{side}.mid.block_1", f"{side}.middle.resnet1", "nin_shortcut"),
        *_norm(f"{attention}.norm", f"{ours}.norm"),
        *_rows(
            *(
                (f"{attention}.{theirs}.{{p}}", f"{ours}.{name}.{{p}}")
                for theirs, name in _BFL_ATTENTION
            ),
            layout="1x1",
        ),
        *_resnet(f"{side}.mid.block_2", f"{side}.middle.resnet2", "nin_shortcut"),
    )


def _bfl_level(theirs: str, ours: str, resample: str) -> tuple[Row, ...]:
    return (
        *_resnet(f"{theirs}.block.{{j}}", f"{ours}.resnets.{{j}}", "nin_shortcut"),
        *_rows((f"{theirs}.{resample}.conv.{{p}}", f"{ours}.resample.{{p}}")),
    )


_BFL_ATTENTION = (("q", "q"), ("k", "k"), ("v", "v"), ("proj_out", "out"))


def vae_bfl(levels: int) -> Dialect:
    """Return BFL's names of a VAE of so many sizes: its decoder's levels are numbered finest first, ours as they run."""
    ups = [
        _bfl_level(f"decoder.up.{levels - 1 - i}", f"decoder.up.{i}", "upsample")
        for i in range(levels)
    ]
    return Dialect(
        "bfl",
        "decoder.mid.block_1.conv1.weight",
        (
            *_bfl_side("encoder"),
            *_bfl_level("encoder.down.{i}", "encoder.down.{i}", "downsample"),
            *_bfl_side("decoder"),
            *(row for up in ups for row in up),
        ),
    )


def _diffusers_side(side: str, levels: str) -> tuple[Row, ...]:
    attention, ours = f"{side}.mid_block.attentions.0", f"{side}.middle.attention"
    blocks = f"{side}.{levels}_blocks.{{i}}"
    return (
        *_vae_ends(side, "conv_norm_out"),
        *_resnet(f"{side}.mid_block.resnets.0", f"{side}.middle.resnet1", "conv_shortcut"),
        *_norm(f"{attention}.group_norm", f"{ours}.norm"),
        *_rows(
            (f"{attention}.to_q.{{p}}", f"{ours}.q.{{p}}"),
            (f"{attention}.to_k.{{p}}", f"{ours}.k.{{p}}"),
            (f"{attention}.to_v.{{p}}", f"{ours}.v.{{p}}"),
            (f"{attention}.to_out.0.{{p}}", f"{ours}.out.{{p}}"),
        ),
        *_resnet(f"{side}.mid_block.resnets.1", f"{side}.middle.resnet2", "conv_shortcut"),
        *_resnet(
            f"{blocks}.resnets.{{j}}", f"{side}.{levels}.{{i}}.resnets.{{j}}", "conv_shortcut"
        ),
        *_rows(
            (f"{blocks}.{levels}samplers.0.conv.{{p}}", f"{side}.{levels}.{{i}}.resample.{{p}}")
        ),
    )


VAE_DIFFUSERS = Dialect(
    "diffusers",
    "decoder.mid_block.resnets.0.conv1.weight",
    (*_diffusers_side("encoder", "down"), *_diffusers_side("decoder", "up")),
)
