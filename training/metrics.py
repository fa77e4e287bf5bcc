"""Means of scalar metrics between two log steps, kept on the device."""

from collections.abc import Mapping

import torch
import torch.distributed as dist

from runtime.processes import sum_over_processes


class MeanMetrics:
    """Accumulates scalars without synchronising; :meth:`pop` averages over steps and processes.

    Non-finite values are left out of the mean and counted, so that one bad step is seen but does not hide the rest.
    """

    def __init__(self):
        self._tables: dict[tuple[str, ...], torch.Tensor] = {}  # names → float64 [sum, finite, non-finite] × names

    @torch.no_grad()
    def update(self, values: Mapping[str, torch.Tensor]) -> None:
        """Add one step's scalars, tensors on one device."""
        names = tuple(values)
        row = torch.stack([value.detach().double() for value in values.values()])
        finite = row.isfinite()
        table = torch.stack([torch.where(finite, row, 0.0), finite.double(), (~finite).double()])
        if names in self._tables:
            self._tables[names] += table
        else:
            self._tables[names] = table

    def pop(self) -> tuple[dict[str, float], dict[str, int]]:
        """(mean of each metric over its finite values, count of non-finite values where there are any); starts anew."""
        means, bad = {}, {}
        sums: dict[str, list[float]] = {}
        for names, table in self._tables.items():
            sum_over_processes(table)
            for name, *column in zip(names, *table.tolist(), strict=True):
                previous = sums.get(name, [0.0, 0.0, 0.0])
                sums[name] = [old + new for old, new in zip(previous, column, strict=True)]
        for name, (total, finite, non_finite) in sums.items():
            if finite:
                means[name] = total / finite
            if non_finite:
                bad[name] = int(non_finite)
        self._tables = {}
        return means, bad

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Each process's sums, ``[R, 3, n]``, by comma-separated names. Collective: every process calls it."""
        state = {}
        for names, table in self._tables.items():
            tables = [table]
            if dist.is_available() and dist.is_initialized():
                tables = [torch.empty_like(table) for _ in range(dist.get_world_size())]
                dist.all_gather(tables, table)
            state[",".join(names)] = torch.stack(tables).cpu()
        return state

    def load_state_dict(self, state: dict[str, torch.Tensor], rank: int, world_size: int, device: torch.device) -> None:
        """Take up this process's sums; with another number of processes, the first one takes them all.

        They are scaled as if that many processes had summed: steps before and after weigh the same in the mean.
        """
        self._tables = {}
        for names, tables in state.items():
            if len(tables) == world_size:
                table = tables[rank]
            else:
                share = world_size / len(tables)
                shares = tables.new_tensor([[share], [share], [1.0]])  # non-finite values are told one by one
                table = tables.sum(0) * shares if rank == 0 else torch.zeros_like(tables[0])
            self._tables[tuple(names.split(","))] = table.to(device)
