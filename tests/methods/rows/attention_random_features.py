import torch
from eff_attention.random_features import RandomFeatureAttention
from eff_kernels import Handle
from method_table import Row, kept_by_state, normal
from torch import nn


class Mean(nn.Module):
    def forward(self, x, key_padding_mask=None):
        return x.mean(1, keepdim=True).expand_as(x)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.mixer = nn.Linear(8, 8), Mean()

    def forward(self, x, mask=None):
        return self.mixer(self.first(x), key_padding_mask=None if mask is None else mask == 0)


def make():
    torch.manual_seed(0)
    return Net().eval()


def apply(model):
    handle = Handle()
    handle.replace(model, "mixer", RandomFeatureAttention(8, 6).to(model.first.weight.dtype))
    return handle


ROWS = [
    Row(
        name="random_features",
        host="other",
        make=make,
        apply=apply,
        run=lambda model, x, mask=None: model(x, mask),
        data=normal(2, 16, 8),
        **kept_by_state(make, apply),
        lora=("first",),
        absent=dict.fromkeys(("twice", "stranger"), "a layer of one's own model, put in by hand"),
    )
]
