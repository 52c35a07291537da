"""Models that `torch.distributed.fsdp.fully_shard` divides among processes.

Each process, a *rank*, holds a part of every parameter. While a wrapped module runs, its whole parameters are gathered
from all ranks, which therefore have to run the same modules in the same order: a rank that does not would leave the
rest waiting forever. So ranks move in step. Before each gathering, and before each decision about what to run next,
they *vote*: each sends its position in the program and reads the positions of all. A rank that fails votes too, once,
and then every rank raises; a rank without work of its own runs a copy of another rank's sample
(`tracer.api.featurizer`).

Votes use a process group of their own, on the CPU. Nothing here runs for models that are not sharded.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor, distributed, nn

from tracer._core.sharding import fsdp_modules, fsdp_state, is_sharded, outermost, reshard
from tracer.data.tasks import Task
from tracer.errors import GradientError, RankError
from tracer.gradients.fsdp_support import check_policy, initialize, one_mesh
from tracer.gradients.selfcheck import Arrivals, Reference, sharded_reference_pass
from tracer.types import Batch

_QUIET = {"reduce_grads": False, "reshard_after_backward": True}
"""Settings of groups of parameters: gradients are not reduced, and whole parameters are freed after a backward."""


class _At(IntEnum):
    """The positions in the program at which ranks vote."""

    FAILED = 0
    BATCH = 1
    GATHER = 2
    DECISION = 3
    WRITTEN = 4
    TURN = 5
    CHECKPOINT = 6
    JOINED = 7


_PLACES = {
    _At.BATCH: "begins a batch, or waits for other ranks to end theirs",
    _At.GATHER: "gathers the weights of {}",
    _At.DECISION: "decides what to run next",
    _At.WRITTEN: "has written its batch",
    _At.TURN: "opens files of the store",
    _At.CHECKPOINT: "takes a checkpoint",
    _At.JOINED: "has flushed its rows",
}

WORKING, WAITING, ENDED = 2, 1, 0
"""The state of a rank's batch: to be computed; stored already; or there are none left."""


class FsdpBackend:
    """A sharded model on this rank; all ranks must build it, and make every voting call.

    Args:
        model: The model, the same on all ranks and divided in the same way.

    Attributes:
        model: As passed.
        is_sharded: True.
        rank: This process's number.
        device_type: The device on which whole parameters are gathered.
        stand_in: A batch of one sample, on the CPU, for rounds in which this rank has no work; None before the first.
        all_ended: Whether no rank had batches left at the last `begin`.

    Raises:
        GradientError: If the model is sharded in an unsupported way.
    """

    is_sharded = True

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        modules = fsdp_modules(model)
        for module in modules:
            check_policy(module)
        reshard(model)
        mesh, axis = one_mesh(model)
        self.device_type: str = mesh.device_type
        for module in outermost(modules):
            initialize(module)
        self._states = list({id(state): state for state in map(fsdp_state, modules)}.values())
        self._groups = [group for state in self._states for group in state._fsdp_param_groups]
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._slots = [
            (module, local, names[id(parameter)])
            for module in model.modules()
            for local, parameter in module._parameters.items()
            if parameter is not None and is_sharded(parameter)
        ]
        members = distributed.get_process_group_ranks(mesh.get_group(axis))
        self._group = distributed.new_group(members, backend="gloo", use_local_synchronization=True)
        self.rank, self.size = distributed.get_rank(self._group), len(members)
        self.stand_in: Any = None
        self.all_ended = True
        self._inside = False

    @contextmanager
    def step(self) -> Iterator[None]:
        """Announce an exception inside to all ranks, which raise `RankError` at their next vote."""
        if self._inside:
            yield
            return
        self._inside = True
        try:
            yield
        except RankError:  # all ranks raise it
            raise
        except Exception as error:
            self._announce(error)
            raise
        finally:
            self._inside = False

    def abandon(self, error: BaseException) -> None:
        """Announce a failure of this rank unless all ranks know it; they raise at their next vote."""
        if isinstance(error, Exception) and not isinstance(error, RankError) and not hasattr(error, "_told_to_ranks"):
            self._announce(error)

    def _announce(self, error: Exception) -> None:
        error._told_to_ranks = True  # type: ignore[attr-defined]  # not kept here: it holds the batch's tensors
        try:
            self._exchange(_At.FAILED, 0)
            self._tell(f"{type(error).__name__}: {error}")
        except RuntimeError as lost:
            error.add_note(f"The other ranks could not be told: {lost}")

    def any(self, flag: bool) -> bool:
        """Return whether a flag is set on any rank."""
        return any(self._vote(_At.DECISION, int(flag)))

    def agree(self, what: str, value: object) -> None:
        """Raise `RankError` unless a named value has the same representation on all ranks."""
        self._vote(_At.CHECKPOINT)
        values = self._tell(repr(value))
        if len(set(values)) > 1:
            raise RankError(f"All ranks must pass the same {what}; they passed {_by_rank(values)}.")

    def begin(self, state: int, row: Any) -> bool:
        """Announce whether this rank has a batch, and send one sample of it to ranks that never had one.

        Args:
            state: `WORKING`, `WAITING` or `ENDED`.
            row: Returns a batch of one sample of this rank's work, on the CPU.

        Returns:
            Whether any rank works, so that all have to run.

        Raises:
            RankError: If a rank failed, or is at another position.
        """
        lacking = self.stand_in is None and state != WORKING
        answers = self._vote(_At.BATCH, 2 * state + int(lacking))
        states = [answer // 2 for answer in answers]
        if WORKING not in states:
            self.all_ended = max(states) == ENDED
            return False
        self.all_ended = False
        if any(answer % 2 for answer in answers):
            donor = states.index(WORKING)
            sent = pickle.dumps(row()) if self.rank == donor else b""
            self._vote(_At.DECISION)  # where a row that cannot be sent is told
            received = self._tell(sent)[donor]
            if lacking:
                self.stand_in = pickle.loads(received)  # from a process of the same job
        return True

    def remember(self, row: Callable[[], Any]) -> None:
        """Store a stand-in for rounds without work, if there is none yet."""
        if self.stand_in is None:
            self.stand_in = row()

    def written(self) -> None:
        """Wait until every rank has written its batch."""
        self._vote(_At.WRITTEN)

    @contextmanager
    def rank_zero_first(self, what: str = "", value: object = None) -> Iterator[bool]:
        """Let rank 0 run first, so that other ranks find its files; with ``what``, first `agree` on a value.

        Args:
            what: The name of a value that must be the same on all ranks; empty for none.
            value: This rank's value.

        Yields:
            Whether this is rank 0.

        Raises:
            RankError: If values differ, or another rank failed.
        """
        with self.step():
            if what:
                self.agree(what, value)
            if self.rank != 0:
                self._vote(_At.TURN)
            yield self.rank == 0
            if self.rank == 0:
                self._vote(_At.TURN)

    def joined(self) -> None:
        """Wait until every rank has flushed what it wrote."""
        self._vote(_At.JOINED)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Vote before every gathering and reduce no gradients within a ``with`` block."""
        contexts = {id(state._state_ctx): state._state_ctx for state in self._states}
        with ExitStack() as stack:
            for number, group in enumerate(self._groups):
                for name, value in (*_QUIET.items(), ("_all_gather_comm", None)):
                    stack.callback(setattr, group, name, getattr(group, name))
                    setattr(
                        group, name, _VotingGather(self, number, group._all_gather_comm) if value is None else value
                    )
            for context in contexts.values():
                stack.callback(setattr, context, "is_last_backward", context.is_last_backward)
                context.is_last_backward = True
            yield

    @contextmanager
    def whole_parameters(self) -> Iterator[dict[str, Tensor]]:
        """Collect the whole parameters that forwards in a ``with`` block use, by name: leaves of their graph."""
        found: dict[str, Tensor] = {
            name: value for name, value in self.model.named_parameters() if not is_sharded(value)
        }

        def collect(module: nn.Module, args: Any) -> None:
            inside = {id(one) for one in module.modules()}
            for owner, local, name in self._slots:
                parameter = owner._parameters[local]
                if id(owner) in inside and parameter is not None and not is_sharded(parameter):
                    found[name] = parameter

        hooks = [module.register_forward_pre_hook(collect) for module in fsdp_modules(self.model)]
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()

    def reference(
        self,
        task: Task,
        batch: Batch,
        weights: Tensor,
        shapes: Mapping[str, Sequence[int]],
        precision: torch.dtype | None,
        against: Mapping[str, Tensor],
        keep: Collection[str] = (),
    ) -> Reference:
        """Return what autograd's gradients of the weighted sum of outputs are, `shrunk`; all ranks must call this."""
        found = Arrivals(against, keep, shrink=True)
        return sharded_reference_pass(self.whole_parameters, task, self.model, batch, weights, shapes, found, precision)

    def refuse_fallback(self, reasons: Mapping[str, str]) -> None:
        """Refuse parameters without a layer rule, since the fallback needs whole weights.

        Raises:
            GradientError: If there are any.
        """
        if not reasons:
            return
        listed = "; ".join(f"{name!r}: {reason}" for name, reason in list(reasons.items())[:6])
        more = f"; and {len(reasons) - 6} more" if len(reasons) > 6 else ""
        raise GradientError(
            f"The model is sharded by fully_shard, so its gradients must be captured by layer rules, which cannot be "
            f"done for {len(reasons)} parameters ({listed}{more}). Leave them out with params=, register_layer_rule, "
            f"or pass the plain model."
        )

    def _vote(self, at: _At, number: int = 0) -> list[int]:
        """Send this rank's position and a number; return all ranks' numbers, which must be at one position."""
        answers = self._exchange(at, number)
        if any(place is _At.FAILED for place, _ in answers):
            self._raise_for_others()
        places = {place for place, _ in answers}
        if len(places) > 1 or (at is _At.GATHER and len(set(answers)) > 1):
            names = {id(module): name for name, module in self.model.named_modules()}
            units = [names[id(group.modules[0])] or "the outermost module" for group in self._groups]
            said = [_PLACES[place].format(units[value] if place is _At.GATHER else "") for place, value in answers]
            raise RankError(
                f"The ranks of the sharded model are not in step: {_by_rank(said)}. Each rank must make the same calls "
                f"of the Tracer, batches aside, and the model must run the same modules for every batch."
            )
        return [value for _, value in answers]

    def gather_vote(self, number: int) -> None:
        """Vote before the weights of a group are gathered."""
        self._vote(_At.GATHER, number)

    def _exchange(self, at: _At, number: int) -> list[tuple[_At, int]]:
        mine = torch.tensor([int(at), number], dtype=torch.int64)
        answers = [torch.empty_like(mine) for _ in range(self.size)]
        with _answered():
            distributed.all_gather(answers, mine, group=self._group)
        return [(_At(int(place)), int(value)) for place, value in answers]

    def _tell(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.size
        with _answered():
            distributed.all_gather_object(values, value, group=self._group)
        return values

    def _raise_for_others(self) -> None:
        texts = self._tell(None)
        raise RankError(
            f"Another rank of the sharded model failed, so all ranks abandon this step: {_by_rank(texts)}. Nothing is "
            f"lost: written examples remain, and the rest can be passed again."
        )


@contextmanager
def _answered() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RankError(
            f"Another rank of the sharded model does not answer: its process ended, or it never called the same method "
            f"of its Tracer ({str(error).strip().partition(chr(10))[0]}). Look at its own output first."
        ) from error


class _VotingGather:
    """The gathering of a group of parameters, with a vote before it."""

    def __init__(self, ranks: FsdpBackend, number: int, gather: Any) -> None:
        self._ranks, self._number, self._gather = ranks, number, gather

    def allocate(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return memory for gathered parameters."""
        return self._gather.allocate(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Vote, then gather."""
        self._ranks.gather_vote(self._number)
        return self._gather(*args, **kwargs)


def _by_rank(values: Sequence[str | None]) -> str:
    return "; ".join(f"rank {rank}: {value}" for rank, value in enumerate(values) if value is not None)
