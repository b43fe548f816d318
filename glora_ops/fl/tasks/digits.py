"""The embedded default: scikit-learn's digits and a small transformer. Nothing is downloaded.

A digit is 8 × 8 pixels; its 8 rows are the 8 tokens. The model is pretrained on digits that lean
up to 45° either way, half of them inverted. The clients' digits lie on their side: the pretrained
model reads about one in five of them, so there is something to learn.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ...runtime.outputs import new_file, ours
from ..seeds import numpy_stream
from .base import Answer, HeldOut, Judged

__all__ = ["DigitTransformer", "Digits", "Part", "accuracy", "fit", "pretrain", "split_digits"]

WIDTH = 128  # of the transformer
HELD_OUT = 497  # VALIDATION + TEST
PRETRAINING = 600  # of the 1797 digits; the clients have 700
VALIDATION, TEST = 197, 300  # of the 1197 digits the base has not seen; the rest is trained on
BASE_NAME = "digits-transformer-1.safetensors"


@dataclass(frozen=True)
class Part:
    """Some digits: x (n, 8, 8) in [0, 1] and their labels y (n,)."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, rows: np.ndarray | Tensor) -> Part:
        return Part(self.x[rows], self.y[rows])

    def on_their_side(self) -> Part:
        """The clients' task: every digit turned by 90°."""
        return Part(torch.rot90(self.x, 1, dims=(1, 2)), self.y)

    def leaning(self, degrees: float) -> Part:
        angle = torch.tensor(degrees).deg2rad()
        cos, sin, zero = angle.cos(), angle.sin(), torch.zeros(())
        turn = torch.stack([cos, -sin, zero, sin, cos, zero]).view(1, 2, 3).expand(len(self), 2, 3)
        grid = F.affine_grid(turn, [len(self), 1, 8, 8], align_corners=False)
        return Part(F.grid_sample(self.x[:, None], grid, align_corners=False)[:, 0], self.y)


def all_digits() -> Part:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return Part(
        torch.from_numpy(x.reshape(-1, 8, 8).astype(np.float32) / 16),
        torch.from_numpy(y.astype(np.int64)),
    )


def split_digits(seed: int) -> tuple[Part, Part, Part]:
    """The 1797 digits: 600 to pretrain on, 700 for the clients, 497 held out; balanced classes."""
    from sklearn.model_selection import train_test_split

    digits = all_digits()
    y = digits.y.numpy()
    rest, held_out = train_test_split(
        range(len(y)), test_size=HELD_OUT, stratify=y, random_state=seed
    )
    pretraining, clients = train_test_split(
        rest, train_size=PRETRAINING, stratify=y[rest], random_state=seed
    )
    return digits[pretraining], digits[clients], digits[held_out]


class Block(nn.Module):
    """Pre-norm attention and MLP; everything LoRA adapts is a plain nn.Linear."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (
            f(h).unflatten(2, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class DigitTransformer(nn.Module):
    def __init__(self, name: str, width: int = WIDTH, layers: int = 2) -> None:
        super().__init__()
        self.name_or_path = name  # PEFT writes it into adapter_config.json as the base
        self.embed = nn.Linear(8, width)
        self.position = nn.Parameter(0.5 * torch.randn(8, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x - 0.5) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(dim=1))


def fit(model: nn.Module, part: Part, *, steps: int, batch: int, lr: float, seed: int) -> None:
    """AdamW on the parameters that require a gradient; batches from one seeded generator."""
    draw = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps)
    model.train()
    for _ in range(steps):
        rows = torch.randint(len(part), (batch,), generator=draw)
        optimiser.zero_grad(set_to_none=True)
        F.cross_entropy(model(part.x[rows]), part.y[rows]).backward()
        optimiser.step()
        schedule.step()
    model.eval()


def pretrain(part: Part, seed: int) -> DigitTransformer:
    views = [part.leaning(degrees) for degrees in range(-45, 46, 15)]
    x = torch.cat([view.x for view in views])
    y = torch.cat([view.y for view in views])
    torch.manual_seed(seed)
    model = DigitTransformer(f"digit-transformer-seed{seed}")
    seen = Part(torch.cat([x, 1 - x]), torch.cat([y, y]))
    fit(model, seen, steps=300, batch=64, lr=2e-3, seed=seed)
    return model


@torch.no_grad()
def accuracy(model: nn.Module, part: Part) -> float:
    return (model(part.x).argmax(dim=1) == part.y).double().mean().item()


def cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "glora"


@lru_cache(maxsize=1)
def base_weights() -> dict[str, Tensor]:
    """The pretrained base of every run: trained once (4 s), then kept in the user's cache."""
    path = cache_folder() / BASE_NAME
    try:
        return load_file(path)
    except (OSError, SafetensorError):
        weights = dict(pretrain(split_digits(0)[0], 0).state_dict())
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path, ours) as partial:
        save_file(weights, partial)
    return weights


class Digits:
    """Digits on their side. What the base was pretrained on is in no other part.

    Parameters
    ----------
    seed : int
        Of the split between clients (700) and test (300) digits. Validation (197) is the same for
        every seed.
    held_out : {"test", "validation"}
        What `evaluate` judges on.
    """

    metric = "accuracy"
    label_names: tuple[str, ...] = tuple("0123456789")
    targets: tuple[str, ...] = ("q", "k", "v", "o", "up", "down")
    heads: tuple[str, ...] = ()

    def __init__(self, seed: int, held_out: HeldOut = "test") -> None:
        from sklearn.model_selection import train_test_split

        _, *others = split_digits(0)
        unseen = Part(torch.cat([p.x for p in others]), torch.cat([p.y for p in others]))
        unseen = unseen.on_their_side()
        rest, validation = train_test_split(
            np.arange(len(unseen)), test_size=VALIDATION, stratify=unseen.y, random_state=0
        )
        rows, test = train_test_split(
            rest,
            test_size=TEST,
            stratify=unseen.y[rest],
            random_state=int(numpy_stream(seed, "digits").integers(2**31)),
        )
        self.train = unseen[rows]
        self._ids = validation if held_out == "validation" else test
        self.held_out = unseen[self._ids]
        self.labels = self.train.y.numpy()

    def model(self) -> nn.Module:
        model = DigitTransformer("digit-transformer")
        model.load_state_dict(base_weights())
        return model

    def loss(self, model: nn.Module, rows: np.ndarray) -> Tensor:
        part, device = self.train[rows], next(model.parameters()).device
        return F.cross_entropy(model(part.x.to(device)), part.y.to(device))

    def evaluate(self, model: nn.Module) -> Judged:
        with torch.no_grad():
            logits = model(self.held_out.x.to(next(model.parameters()).device)).cpu()
        found, truth = logits.argmax(1), self.held_out.y
        answers = [
            Answer(int(i), p, y, float(p == y), y)
            for i, p, y in zip(self._ids, found.tolist(), truth.tolist(), strict=True)
        ]
        loss = float(F.cross_entropy(logits, truth))
        return Judged({"accuracy": float((found == truth).double().mean()), "loss": loss}, answers)
