"""The digits task of the accuracy benchmarks: scikit-learn's digits and a small perceptron."""

import torch
from torch import Tensor, nn


def load(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images (1437, 64) and labels, then test images (360, 64) and labels, split by the seed."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(x / 16, y, test_size=0.2, stratify=y, random_state=seed)
    images = (torch.tensor(part, dtype=torch.float32) for part in (x_train, x_test))
    labels = (torch.tensor(part) for part in (y_train, y_test))
    (x_train, x_test), (y_train, y_test) = images, labels
    return x_train, y_train, x_test, y_test


def perceptron(seed: int) -> nn.Module:
    """64-256-256-10 with ReLU."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Percent of ``x`` that the model labels ``y``."""
    with torch.no_grad():
        return 100 * (model(x).argmax(1) == y).double().mean().item()
