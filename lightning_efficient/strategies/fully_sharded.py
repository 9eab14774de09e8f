"""`FullyShardedStrategy`: FSDP2 over all ranks, for modules that shard themselves in `configure_model`."""

from datetime import timedelta

from lightning.pytorch.strategies import ModelParallelStrategy
from typing_extensions import override

from lightning_efficient._compat import set_data_parallel_size


class FullyShardedStrategy(ModelParallelStrategy):
    """Lightning's `ModelParallelStrategy` with every rank data-parallel, however many there are.

    The module applies ``fully_shard`` over ``device_mesh["data_parallel"]`` in ``configure_model``;
    :class:`~lightning_efficient.models.LlamaLM` and :class:`~lightning_efficient.models.HFCausalLM` do. Runs on CPUs,
    too.

    Args:
        save_distributed_checkpoint: write a folder with one file per rank, instead of a single file.
        process_group_backend: ``None``: nccl on GPUs, gloo on CPUs.
        timeout: seconds after which a collective fails.
    """

    def __init__(
        self,
        *,
        save_distributed_checkpoint: bool = False,
        process_group_backend: str | None = None,
        timeout: float = 1800.0,
    ) -> None:
        super().__init__(
            data_parallel_size="auto",
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timedelta(seconds=timeout),
        )

    @override
    def setup_environment(self) -> None:
        # Lightning's own "auto" is the number of nodes.
        set_data_parallel_size(self, self.num_nodes * self.num_processes)
        super().setup_environment()
