"""The configuration of a training: read, overridden, and refused where it is wrong."""

from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from fluxjax.train.config import TrainConfig, train_config, with_overrides

PAGE = Path(__file__).parents[2] / "docs" / "training.md"


def test_values_of_a_file_and_overrides_become_settings():
    values = {
        "model": "dev",
        "steps": 20,
        "train": {"method": "layers", "targets": ["double.*"]},
        "optimizer": {"learning_rate": 1, "betas": [0.8, 0.9]},
        "loss": {"guidance": 3.5},
        "data": {"sources": "photos", "size": 256},
    }
    overrides = [("optimizer.learning_rate", 2e-4), ("checkpoints.every", 7)]
    config = train_config(with_overrides(values, overrides), Path("/here"))
    assert (config.model, config.steps) == ("dev", 20)
    assert config.train.targets == ("double.*",)
    assert (config.optimizer.learning_rate, config.optimizer.betas) == (2e-4, (0.8, 0.9))
    assert config.loss.guidance == (3.5, 3.5)
    assert config.checkpoints.every == 7
    assert (config.data.sources, config.data.size) == (("/here/photos",), 256)
    assert values["optimizer"]["learning_rate"] == 1


WRONG = {
    "unknown": ({"stesp": 3}, r"no setting stesp of a training\. Did you mean steps\?"),
    "unknown in a table": (
        {"optimizer": {"learnig_rate": 1.0}},
        r"Did you mean optimizer\.learning_rate\?",
    ),
    "unknown of data": ({"data": {"sorces": "a"}}, r"Did you mean data\.sources\?"),
    "far from all": ({"optimizer": {"q": 1}}, "Choose from name, learning_rate"),
    "type": ({"steps": "many"}, "steps needs a int, got 'many'"),
    "a table": ({"loss": 3}, r"loss is a table of a configuration\. Write it as \[loss\]"),
    "a list of another length": ({"optimizer": {"betas": [0.9]}}, "optimizer.betas needs a list"),
    "method": ({"train": {"method": "all"}}, "train.method is one of full, layers, lora"),
    "no targets": ({"train": {"method": "layers"}}, "needs train.targets"),
    "micro-batches": ({"batch": 4, "accumulate": 3}, "not a multiple of accumulate"),
    "rounding": ({"stochastic_rounding": True}, "trained weights in bfloat16"),
    "decay": ({"ema": 1.0}, r"in \[0, 1\), got 1\.0"),
    "optimizer": ({"optimizer": {"name": "sgd"}}, "one of adamw, adafactor, lion, muon"),
    "start": ({"train": {"method": "full", "start": "a.safetensors"}}, "is for adapters"),
    "storage": ({"train": {"quantize": "nf5"}}, "no format 'nf5' to quantize to. Choose one of"),
    "norms of a storage": ({"train": {"method": "dora", "quantize": "nf4"}}, "Choose 'lora'"),
    "times": ({"loss": {"times": "linear"}}, "is one of logit_normal, uniform"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_setting_is_refused_with_the_remedy(name):
    values, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        train_config(values)


def keys(kind, prefix=""):
    for one in fields(kind):
        if is_dataclass(one.default_factory):
            yield from keys(one.default_factory, f"{one.name}.")
        else:
            yield f"{prefix}{one.name}"


def test_every_setting_is_in_the_table_of_the_page():
    text = PAGE.read_text()
    missing = [
        key for key in keys(TrainConfig) if not key.startswith("data.") and f"`{key}`" not in text
    ]
    assert not missing
