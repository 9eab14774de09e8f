"""Seeded loaders that shard over ranks and resume exactly.

Both loaders cut a *global* batch of ``world_size * batch_size`` items and hand each rank its slice, so n ranks together
see what one process with an n times larger batch sees. They are not ``torch.utils.data.DataLoader``: everything is in
memory, a batch is one gather, and workers would only add copies. It also keeps Lightning from replacing the sampler
(with ``use_distributed_sampler=True`` it puts its own shuffling one into every DataLoader).
"""

from collections.abc import Callable, Iterator
from typing import Any

from lightning_efficient.data._examples import Batch, Examples, seeded_generator


class TrainLoader:
    """Training batches in an order that is a pure function of ``(seed, epoch)``.

    Items left over after the last full global batch are not read in that epoch; each epoch leaves out others.

    It is *stateful* in Lightning's sense, so ``fit(ckpt_path=...)`` continues with the next batch of the interrupted
    epoch. The position is kept in items, so the rest of an epoch may be read by another number of ranks.

    The loader counts epochs itself, from ``first_epoch()`` on: each new iteration is the next one. Lightning's number
    would not do: a run that ``max_steps`` ends inside an epoch counts that epoch as finished, and yet resumes in it.
    (Unless it resumes with ``max_epochs`` alone; then Lightning leaves out what was left of that epoch.)

    Args:
        examples: the training split.
        batch_size: items per rank and batch.
        seed: with the epoch, decides the order.
        rank: this process.
        world_size: processes that share the data.
        first_epoch: gives the number of the first epoch; asked when the first batch is wanted, because a Trainer that
            resumes knows it no earlier.
        batches_per_epoch: where the reader ends an epoch, if before the end of the data
            (``Trainer(limit_train_batches=...)``). Only needed to resume at such an end.
        reshuffle: ``False`` repeats the order of epoch 0.

    Raises:
        ValueError: there are fewer items than one global batch.
    """

    def __init__(
        self,
        examples: Examples,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        first_epoch: Callable[[], int] = lambda: 0,
        batches_per_epoch: int | None = None,
        reshuffle: bool = True,
    ) -> None:
        self.examples = examples
        self.batch_size = batch_size
        self.global_batch_size = batch_size * world_size
        self.seed = seed
        self.rank = rank
        self._first_epoch = first_epoch
        self._epoch: int | None = None
        self.reshuffle = reshuffle
        if len(self) == 0:
            raise ValueError(
                f"The training split is smaller than one batch ({examples.num_items} items for {world_size} x "
                f"{batch_size}): no training step is possible. Lower batch_size, use fewer processes or give more data."
            )
        self._batches_per_epoch = len(self) if batches_per_epoch is None else batches_per_epoch
        self._items_done = 0
        self._resumed = False

    @property
    def epoch(self) -> int:
        """Number of the epoch being read, or about to be."""
        return self._first_epoch() if self._epoch is None else self._epoch

    def __len__(self) -> int:
        return self.examples.num_items // self.global_batch_size

    def __iter__(self) -> Iterator[Batch]:
        # A generator: nothing happens before the first next(). Lightning calls iter() early, and more than once.
        self._open_epoch()
        order = self.examples.shuffled_items(
            seeded_generator(self.seed, "order", self.epoch if self.reshuffle else 0),
        )
        while self._items_done + self.global_batch_size <= len(order):
            start = self._items_done + self.rank * self.batch_size
            self._items_done += self.global_batch_size
            yield self.examples.batch(order[start : start + self.batch_size])

    def _open_epoch(self) -> None:
        """Stay in the epoch just restored, if it has a batch left; otherwise begin the next one."""
        epoch_is_over = self._items_done >= self._batches_per_epoch * self.global_batch_size
        if epoch_is_over or (self._items_done > 0 and not self._resumed):
            self._epoch = self.epoch + 1
            self._items_done = 0
        else:
            self._epoch = self.epoch
        self._resumed = False

    def state_dict(self) -> dict[str, Any]:
        """Return where this loader stands: plain numbers, the same on every rank."""
        return {
            "epoch": self.epoch,
            "items_done": self._items_done,
            "num_items": self.examples.num_items,
            "seed": self.seed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken.

        Raises:
            ValueError: the state belongs to other data or another seed, so its position means nothing here.
        """
        here = self.state_dict()
        for name in ("num_items", "seed"):
            if state[name] != here[name]:
                raise ValueError(
                    f"The checkpoint was written with {name}={state[name]} in the training data, here it is "
                    f"{here[name]}: its place in the epoch has no meaning for this data. Resume with the same data, "
                    "block size and seed, or load only the weights (load_from_checkpoint) and start a new run."
                )
        self._epoch = int(state["epoch"])
        self._items_done = int(state["items_done"])
        self._resumed = True


class EvalLoader:
    """Evaluation batches: every item exactly once, and the same number of batches on every rank.

    Lightning's sampler repeats items to even out the ranks, which biases a mean. Here the batches are as equal in size
    as possible and at most ``batch_size`` long; only with ``batch_size=1`` may a batch hold two items, where the items
    cannot be dealt out evenly.

    Ranks may thus differ by an item or two per epoch. Average with a torchmetrics metric, as the models here do:
    ``self.log(..., sync_dist=True)`` of a tensor divides by the *integer* mean of the ranks' counts (lightning 2.6.6).

    Args:
        examples: the split to read.
        batch_size: largest batch of a rank.
        rank: this process.
        world_size: processes that share the data.

    Raises:
        ValueError: there are fewer items than ranks.
    """

    def __init__(self, examples: Examples, *, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self._items = examples.items()
        if len(self._items) < world_size:
            raise ValueError(
                f"The evaluation split has {len(self._items)} items for {world_size} processes: some would have "
                "nothing to do. Give more data, a larger val_fraction or test_fraction, or use fewer processes."
            )
        self.examples = examples
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        num_items = len(self._items)
        batches = -(-num_items // (self.batch_size * self.world_size))
        return min(batches, num_items // self.world_size)

    def __iter__(self) -> Iterator[Batch]:
        shares = self._items.tensor_split(len(self) * self.world_size)
        for share in shares[self.rank :: self.world_size]:
            yield self.examples.batch(share)
