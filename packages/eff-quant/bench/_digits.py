"""A small vision transformer on the digits of scikit-learn, dense and with sparse plus linear attention.

1797 images of 8 x 8, enlarged to 16 x 16 and cut into 16 patches: a model that learns in seconds, with layers of the
kind that the paper adapts.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, DEPTH, CLASSES, TOKENS = 64, 4, 4, 10, 16
HELD_OUT = 397
BATCH = 100


def load_digits_images() -> tuple[Tensor, Tensor]:
    """Images [1797, 16, 48] in patches, and labels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    images = F.interpolate(images, size=(16, 16), mode="bilinear").expand(-1, 3, -1, -1)
    patches = images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(-1, TOKENS, 48)
    order = torch.randperm(len(patches), generator=torch.Generator().manual_seed(0))
    return patches[order], torch.tensor(digits.target)[order]


class Attention(nn.Module):
    """Dense attention, or with ``sparse``: the largest 30 % of the scores exactly, the others by linear attention."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.proj_lin = nn.Linear(WIDTH // HEADS, WIDTH // HEADS, bias=False) if sparse else None
        if self.proj_lin is not None:
            nn.init.zeros_(self.proj_lin.weight)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if self.proj_lin is None:
            heads = scores.softmax(-1) @ v
        else:
            least = scores.topk(math.ceil(0.3 * n), dim=-1).values[..., -1:]
            kept = scores >= least
            near = scores.masked_fill(~kept, -torch.inf).softmax(-1) @ v
            likeness = (q.softmax(-1) @ k.softmax(-1).transpose(-1, -2)).masked_fill(kept, 0)
            far = likeness / likeness.sum(-1, keepdim=True).clamp(min=1e-6) @ v
            heads = near + self.proj_lin(far)
        return self.proj(heads.transpose(1, 2).reshape(b, n, -1))


class Block(nn.Module):
    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = Attention(sparse)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    def __init__(self, *, sparse: bool = False) -> None:
        super().__init__()
        self.embed = nn.Linear(48, WIDTH)
        self.position = nn.Parameter(0.02 * torch.randn(TOKENS, WIDTH))
        self.blocks = nn.Sequential(*(Block(sparse) for _ in range(DEPTH)))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x) + self.position).mean(1))


def batches(images: Tensor, labels: Tensor, epoch: int):
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch))
    for part in order.split(BATCH)[: len(images) // BATCH]:
        yield images[part], labels[part]


def train_teacher(images: Tensor, labels: Tensor, epochs: int, seed: int = 0) -> VisionTransformer:
    """The dense model."""
    torch.manual_seed(seed)
    model = VisionTransformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for epoch in range(epochs):
        for x, y in batches(images, labels, epoch):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval().requires_grad_(False)


def student_of(teacher: VisionTransformer) -> VisionTransformer:
    """The same weights with sparse plus linear attention."""
    model = VisionTransformer(sparse=True)
    missing = model.load_state_dict(teacher.state_dict(), strict=False)
    assert all(name.endswith("proj_lin.weight") for name in missing.missing_keys)
    return model


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return (model(images).argmax(-1) == labels).float().mean().item()
