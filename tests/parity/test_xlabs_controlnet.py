"""XLabs' ControlNet beside its formulas, written on torch, of a file with XLabs' names."""

import equinox as eqx
import numpy as np
import pytest
from layouts import export, random_network, write
from reference import FLOAT32_BOUND, normal, relative_error, to_torch

from fluxjax import image_ids
from fluxjax.checkpoint.controlnet_names import CONTROLNET_XLABS
from fluxjax.generate import load_controlnet
from fluxjax.nets import ControlNet, ControlNetConfig

torch = pytest.importorskip("torch")
functional = torch.nn.functional

HEADS, HEAD_DIM, AXES = 1, 128, (16, 56, 56)
CONFIG = ControlNetConfig(
    width=128,
    heads=HEADS,
    double_depth=2,
    single_depth=0,
    mlp_width=256,
    context=12,
    pooled=6,
    modes=None,
    hint_image=True,
)
# Small ones: the sinusoid of 4000 would show the last place of each frequency.
T, GUIDANCE = 0.125, 0.25
TXT, VEC = normal(5, 12, seed=2), normal(6, seed=3)


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """Ours, and the tensors of its file."""
    drawn = random_network(ControlNet, CONFIG, scale=0.1)
    path = tmp_path_factory.mktemp("xlabs") / "canny.safetensors"
    tensors = export(drawn, CONTROLNET_XLABS)
    write(path, tensors)
    return load_controlnet(path), {key: to_torch(value) for key, value in tensors.items()}


class Formulas:
    """The network as functions of the file's tensors."""

    def __init__(self, tensors):
        self.tensors = tensors

    def linear(self, name, x):
        return functional.linear(x, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"])

    def embedder(self, name, x):
        hidden = functional.silu(self.linear(f"{name}.in_layer", x))
        return self.linear(f"{name}.out_layer", hidden)

    def hint(self, image):
        """[3, rows, columns] to [tokens, 64]: the third, fifth and seventh of stride 2."""
        x = image[None]
        for number, stride in enumerate((1, 1, 2, 1, 2, 1, 2, 1)):
            if number:
                x = functional.silu(x)
            name = f"input_hint_block.{2 * number}"
            weight, bias = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
            x = functional.conv2d(x, weight, bias, stride=stride, padding=1)
        tokens = []
        for row in range(0, x.shape[2], 2):
            for column in range(0, x.shape[3], 2):
                # The features of a token: channel, then row, then column of its 2x2 cells.
                tokens.append(x[0, :, row : row + 2, column : column + 2].reshape(-1))
        return torch.stack(tokens)

    def residuals(self, x, image, ids):
        img = self.linear("img_in", x) + self.linear("pos_embed_input", self.hint(image))
        txt = self.linear("txt_in", to_torch(TXT))
        vec = self.embedder("time_in", wave(T)) + self.embedder("guidance_in", wave(GUIDANCE))
        vec = functional.silu(vec + self.embedder("vector_in", to_torch(VEC)))
        angles = rotation(torch.cat([torch.zeros(len(TXT), 3), ids]))
        found = []
        for number in range(2):
            img, txt = self.block(f"double_blocks.{number}", img, txt, vec, angles)
            found.append(self.linear(f"controlnet_blocks.{number}", img))
        return torch.stack(found)

    def block(self, name, img, txt, vec, angles):
        streams = {"txt": txt, "img": img}
        parts = {key: self.linear(f"{name}.{key}_mod.lin", vec).chunk(6) for key in streams}
        joint = []
        for key, stream in streams.items():
            shift, scale = parts[key][:2]
            qkv = self.linear(f"{name}.{key}_attn.qkv", normed(stream) * (1 + scale) + shift)
            q, k, v = qkv.chunk(3, dim=-1)
            norms = f"{name}.{key}_attn.norm"
            q = rms(q) * self.tensors[f"{norms}.query_norm.scale"]
            k = rms(k) * self.tensors[f"{norms}.key_norm.scale"]
            joint.append((q, k, v))
        q, k, v = (torch.cat(both) for both in zip(*joint, strict=True))
        scores = rotated(q, angles) @ rotated(k, angles).T / HEAD_DIM**0.5
        attended = dict(
            zip(streams, (torch.softmax(scores, -1) @ v).split([len(txt), len(img)]), strict=True)
        )
        for key, stream in streams.items():
            _, _, gate1, shift, scale, gate2 = parts[key]
            stream = stream + gate1 * self.linear(f"{name}.{key}_attn.proj", attended[key])
            hidden = self.linear(f"{name}.{key}_mlp.0", normed(stream) * (1 + scale) + shift)
            hidden = functional.gelu(hidden, approximate="tanh")
            streams[key] = stream + gate2 * self.linear(f"{name}.{key}_mlp.2", hidden)
        return streams["img"], streams["txt"]


def wave(value):
    angles = 1000 * value * torch.exp(-np.log(10_000) * torch.arange(128) / 128)
    return torch.cat([torch.cos(angles), torch.sin(angles)])


def normed(x):
    return functional.layer_norm(x, x.shape[-1:], eps=1e-6)


def rms(x):
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def rotation(ids):
    angles = []
    for axis, size in enumerate(AXES):
        frequencies = 10_000 ** (-torch.arange(0, size, 2) / size)
        angles.append(ids[:, axis, None] * frequencies)
    return torch.cat(angles, dim=-1)


def rotated(x, angles):
    pairs = torch.view_as_complex(x.reshape(len(x), -1, 2).contiguous())
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(turned).reshape(x.shape)


@pytest.mark.parametrize(("height", "width"), [(48, 80), (32, 64)])
def test_residuals_are_those_of_the_formulas(network, height, width):
    ours, tensors = network
    x = normal(height * width // 256, 64, seed=1)
    image, ids = np.tanh(normal(height, width, 3, seed=4)), image_ids(height, width)
    found = eqx.filter_jit(ours)(
        x, T, condition=image, txt=TXT, vec=VEC, img_ids=ids, guidance=GUIDANCE
    )
    inputs = to_torch(x), to_torch(image).permute(2, 0, 1), to_torch(ids)
    expected = Formulas(tensors).residuals(*inputs)
    assert relative_error(found.double, expected) <= FLOAT32_BOUND
    assert found.repeated
