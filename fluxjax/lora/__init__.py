"""Adapters: reading every format, merging, attaching, extracting, writing."""

from fluxjax.lora.adapter import Lora
from fluxjax.lora.attach import attach, without_adapters
from fluxjax.lora.convert import adapter_notes, merge_while_converting
from fluxjax.lora.describe import ChangedNetwork, LoraSummary, describe_lora
from fluxjax.lora.extract import extract_lora
from fluxjax.lora.init import BLOCKS, init_dora, init_lokr, init_lora, trainable
from fluxjax.lora.merge import merge, unmerge
from fluxjax.lora.read import read_lora
from fluxjax.lora.write import write_lora

__all__ = [
    "BLOCKS",
    "ChangedNetwork",
    "Lora",
    "LoraSummary",
    "adapter_notes",
    "attach",
    "describe_lora",
    "extract_lora",
    "init_dora",
    "init_lokr",
    "init_lora",
    "merge",
    "merge_while_converting",
    "read_lora",
    "trainable",
    "unmerge",
    "without_adapters",
    "write_lora",
]
