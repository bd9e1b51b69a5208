"""Agreement between running ranks: small numbers and texts over all ranks, and which ranks have fallen behind."""


def max_over_ranks(number: int) -> int:
    """The maximum of a number over all ranks, by which they agree on the step at which to stop. A collective."""
    return _over_all_ranks(number, "MAX")


def sum_over_ranks(number: int) -> int:
    """The sum of a number over all ranks. A collective."""
    return _over_all_ranks(number, "SUM")


def _over_all_ranks(number: int, operation: str) -> int:
    import torch
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return number
    reduced = torch.tensor([number], dtype=torch.int64)  # on the CPU, so gloo carries it and no device waits
    dist.all_reduce(reduced, op=getattr(dist.ReduceOp, operation))
    return int(reduced.item())


class Progress:
    """Counts in the store the phases that this rank has begun, so that the others can tell which ranks are behind."""

    def __init__(self) -> None:
        import torch.distributed as dist

        self._store, self._rank = dist.distributed_c10d._get_default_store(), dist.get_rank()
        self._world_size, self._number = dist.get_world_size(), 0
        self.what = "the start"

    def begin(self, what: str) -> None:
        """Notes the next phase; all ranks begin the same phases in the same order."""
        self._number, self.what = self._number + 1, what
        self._store.set(f"trainyard/begun/{self._rank}", str(self._number))

    def behind(self) -> list[int]:
        """The ranks that have not begun this phase; rank 0, which hosts the store, when it does not answer."""
        try:
            keys = {rank: f"trainyard/begun/{rank}" for rank in range(self._world_size)}
            return [rank for rank, key in keys.items()
                    if not self._store.check([key]) or int(self._store.get(key)) < self._number]
        except RuntimeError:
            return [0]


def all_gather_text(text: str) -> list[str]:
    """The text of every rank, by rank. A collective over all ranks."""
    import torch
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [text]
    data = text.encode()
    padded = torch.zeros(max_over_ranks(max(1, len(data))), dtype=torch.uint8)
    padded[: len(data)] = torch.tensor(list(data), dtype=torch.uint8)
    told = [torch.empty_like(padded) for _ in range(dist.get_world_size())]
    dist.all_gather(told, padded)  # all ranks, on the CPU as above
    return [bytes(part.tolist()).rstrip(b"\0").decode() for part in told]
