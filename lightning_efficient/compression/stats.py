"""What a compressor did, in counters that only ever grow."""

from dataclasses import asdict, dataclass


@dataclass(slots=True)
class CompressionStats:
    """Counters of one rank since the compressor was built.

    Attributes:
        steps: synchronised backward passes (``no_sync`` passes do not count).
        buckets: DDP buckets reduced.
        dense_buckets: of these, the buckets sent uncompressed (warm-up, sparse or complex gradients).
        collectives: collectives started.
        bytes_sent: payload bytes this rank handed to collectives.
        bytes_dense: payload bytes plain DDP would have handed to its all-reduces for the same buckets.
    """

    steps: int = 0
    buckets: int = 0
    dense_buckets: int = 0
    collectives: int = 0
    bytes_sent: int = 0
    bytes_dense: int = 0

    @property
    def ratio(self) -> float:
        """How many times fewer bytes were sent than plain DDP would have sent (1.0 before the first step)."""
        return self.bytes_dense / self.bytes_sent if self.bytes_sent else 1.0

    def as_dict(self) -> dict[str, float]:
        """The counters and the ratio as plain numbers, for loggers."""
        return {**asdict(self), "ratio": self.ratio}
