"""What the data modules share: checked arguments, loaders for this rank, and the place in the epoch."""

from abc import abstractmethod
from dataclasses import dataclass
from functools import partial

import torch.distributed as dist
from lightning.pytorch import LightningDataModule
from typing_extensions import override

from lightning_efficient.data._examples import Examples
from lightning_efficient.data._loaders import EvalLoader, TrainLoader


@dataclass(frozen=True)
class Splits:
    """The parts of a data set. ``test`` is ``None`` where the user asked for none."""

    train: Examples
    val: Examples
    test: Examples | None = None


class InMemoryDataModule(LightningDataModule):
    """A data module whose splits fit in memory; a subclass only says how to make them.

    The splits and the order of training batches depend on ``seed`` (and the epoch) alone, not on the global random
    state. Under DDP each rank reads its own slice of a global batch of ``world_size * batch_size`` items; Lightning's
    sampler is neither needed nor put in. Training resumes with the next batch, in the middle of an epoch too.

    Args:
        batch_size: items per process and batch.
        seed: decides the splits and the order.

    Raises:
        ValueError: ``batch_size`` is below 1 or ``seed`` is negative.
    """

    def __init__(self, *, batch_size: int, seed: int) -> None:
        super().__init__()
        require_at_least("batch_size", batch_size, 1)
        require_at_least("seed", seed, 0)
        self.batch_size = batch_size
        self.seed = seed
        self._splits: Splits | None = None

    @abstractmethod
    def make_splits(self) -> Splits:
        """Read or generate the data and split it. Called once, in every process."""

    @property
    def splits(self) -> Splits:
        """The splits, made on first use."""
        if self._splits is None:
            self._splits = self.make_splits()
        return self._splits

    @override
    def setup(self, stage: str) -> None:
        """Make the splits now, so that an error appears before the model is moved to its device."""
        self.splits  # noqa: B018

    @override
    def train_dataloader(self) -> TrainLoader:
        """Return this rank's training batches."""
        rank, world_size = self._shard()
        make_loader = partial(
            TrainLoader,
            self.splits.train,
            batch_size=self.batch_size,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
        )
        trainer = self.trainer
        if trainer is None:
            return make_loader()
        full_epoch, limit = len(make_loader()), trainer.limit_train_batches
        return make_loader(
            first_epoch=lambda: trainer.current_epoch,
            batches_per_epoch=min(limit, full_epoch) if isinstance(limit, int) else int(full_epoch * limit),
            # "Overfit" means the same few batches over and over. (The Trainer sets this attribute outside __init__.)
            reshuffle=not getattr(trainer, "overfit_batches", 0),
        )

    @override
    def val_dataloader(self) -> EvalLoader:
        """Return this rank's validation batches."""
        return self._eval_loader(self.splits.val)

    @override
    def test_dataloader(self) -> EvalLoader:
        """Return this rank's test batches.

        Raises:
            ValueError: there is no test split.
        """
        if self.splits.test is None:
            raise ValueError(
                f"{type(self).__name__} has no test split (test_fraction=0). Set test_fraction, for example to 0.1; "
                "the training split then shrinks by as much."
            )
        return self._eval_loader(self.splits.test)

    @override
    def predict_dataloader(self) -> EvalLoader:
        """Return the test split, or the validation split where there is no test split."""
        return self._eval_loader(self.splits.test or self.splits.val)

    def _eval_loader(self, examples: Examples) -> EvalLoader:
        rank, world_size = self._shard()
        return EvalLoader(examples, batch_size=self.batch_size, rank=rank, world_size=world_size)

    def _shard(self) -> tuple[int, int]:
        """Return ``(rank, world_size)`` among the processes that hold different data."""
        # The strategy knows best: under model parallelism several processes must read the same data.
        if self.trainer is not None and (sampler_kwargs := self.trainer.distributed_sampler_kwargs):
            return int(sampler_kwargs["rank"]), int(sampler_kwargs["num_replicas"])
        if dist.is_available() and dist.is_initialized():
            return dist.get_rank(), dist.get_world_size()
        return 0, 1


def require_at_least(name: str, value: int, least: int) -> None:
    """Raise ``ValueError`` if ``value`` is below ``least``."""
    if value < least:
        raise ValueError(f"{name} is {value}, but must be at least {least}. Set {name} to {least} or more.")


def require_fractions(val_fraction: float, test_fraction: float) -> None:
    """Raise ``ValueError`` unless validation, test and training each get a sensible part."""
    if not 0 < val_fraction < 1:
        raise ValueError(
            f"val_fraction is {val_fraction}, but must lie strictly between 0 and 1: it is the part of the data "
            "kept for validation. Set it to, for example, 0.1."
        )
    if not 0 <= test_fraction < 1 - val_fraction:
        raise ValueError(
            f"test_fraction is {test_fraction} beside val_fraction {val_fraction}: it must be at least 0, and the two "
            "together below 1, or nothing is left for training. Lower one of them."
        )
