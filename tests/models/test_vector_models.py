"""The classifiers and the autoencoder: they learn the digits, and refuse what they cannot use."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule

from lightning_efficient.data import DigitsData
from lightning_efficient.models import AutoEncoder, MLPClassifier, ResNetClassifier
from tests.data.recording import trainer

pytest.importorskip("sklearn")


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=5e-3)


CLASSIFIERS = {
    "mlp": lambda: MLPClassifier(optimizer=adam),
    "mlp without hidden layers": lambda: MLPClassifier(hidden=[], optimizer=adam),
    "resnet, batch norm": lambda: ResNetClassifier(width=8, optimizer=adam),
    "resnet, group norm": lambda: ResNetClassifier(width=8, norm="group", optimizer=adam),
}


def fit(folder: Path, model: LightningModule, **kwargs: Any) -> Any:
    run = trainer(folder, enable_checkpointing=False, **kwargs)
    run.fit(model, DigitsData())
    return run


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifier_learns_the_digits(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    model = CLASSIFIERS[name]()
    run = fit(tmp_path, model, max_epochs=4)
    assert run.callback_metrics["val_accuracy"] > 0.85
    assert run.callback_metrics["val_loss"] < 1.0

    run.save_checkpoint(tmp_path / "model.ckpt")
    loaded = type(model).load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True).eval()
    images, labels = next(iter(DigitsData().val_dataloader()))
    with torch.no_grad():
        assert torch.equal(loaded(images), model.eval()(images))
        accuracy = (model.predict_step((images, labels), 0) == labels).float().mean()
    assert accuracy > 0.8


def test_autoencoder_learns_more_than_the_mean_image(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = DigitsData()
    model = AutoEncoder(optimizer=adam)
    run = fit(tmp_path, model, max_epochs=6)
    images, _ = next(iter(data.val_dataloader()))
    assert run.callback_metrics["val_loss"] < 0.7 * data.splits.train.inputs.var(0, correction=0).mean()
    assert model(images).shape == images.shape
    assert model.predict_step(images, 0).shape == (len(images), 8)


def test_resnet_takes_cifar_images_and_has_the_papers_size() -> None:
    model = ResNetClassifier(3, 10, width=16, blocks=[3, 3, 3])
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    convolutions = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 4 and "shortcut" not in n)
    # He et al. table 6: 20 layers, 0.27 M parameters (their shortcuts hold none).
    assert convolutions + 10 * 65 == pytest.approx(270_000, rel=0.01)


def test_resnet_relu_is_in_place_and_backward_works() -> None:
    model = ResNetClassifier(width=8)
    assert any(isinstance(module, torch.nn.ReLU) and module.inplace for module in model.modules())
    model(torch.randn(4, 1, 8, 8)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"num_classes is 1: .* Set it to 2 or more"):
        MLPClassifier(num_classes=1)
    with pytest.raises(ValueError, match=r"layer sizes are \[64, 0, 10\]: each must be at least 1"):
        MLPClassifier(hidden=[0])
    with pytest.raises(ValueError, match=r"blocks \[1, 0\] must all be at least 1"):
        ResNetClassifier(blocks=[1, 0])
    with pytest.raises(ValueError, match=r"norm is 'layer': .* Use 'batch' or 'group'"):
        ResNetClassifier(norm="layer")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"shape \(2, 64\).*flat=False"):
        ResNetClassifier()(torch.zeros(2, 64))
