"""Streaming DiLoCo (arXiv 2501.18512): workers that train by themselves, and now and then move towards one another.

For a fragment ``p`` of the parameters that is due after step ``t``, with outer values ``theta`` and this worker's ``w``:

    after step t          delta = mean over workers of (theta - w)        sent while training goes on
    after step t + tau    theta = nesterov(theta, delta)                  the same on all workers, bit for bit
                          w     = alpha w + (1 - alpha) theta

Of a weight that a grass optimizer projects, ``theta - w`` is known without a message but for the rows (columns) that have moved
(`outer`). So only these are sent.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..checks import boolean, finite, is_whole, positive_int
from ..errors import ConfigError, StateError
from .agreement import check_settings
from .codes import BITS
from .exchange import Mean, all_gather
from .fragments import is_due, split
from .layout import MeshDim, is_sharded, sharded_by
from .moving import MovesRows, Moving
from .outer import Cut, OuterWeight


@dataclasses.dataclass
class Pending:
    """What a fragment waits for.

    Attributes:
        step: after which it was sent.
        cuts: what it is about, of each weight.
        mean: on its way.
    """

    step: int
    cuts: list[Cut]
    mean: Mean


class Fragment:
    """Parameters that are synchronised together.

    Attributes:
        weights: them.
        pending: what they wait for, or None.
    """

    def __init__(self, weights: Sequence[OuterWeight]) -> None:
        self.weights = list(weights)
        self.pending: Pending | None = None


class DiLoCo:
    """Streaming DiLoCo over the ranks of a process group, each of which is a worker with batches of its own.

    Call `step` once after each ``opt.step()``, on all workers alike. At construction all take the weights of the first.

    Args:
        named_parameters: names and parameters, as of ``model.named_parameters()``. Those that do not train are left out.
        opt: the inner optimizer. One of this package gives the gain: only what its steps have moved is sent. With any other, and
            for parameters that it does not hold, all is sent.
        every: steps from one message of a fragment to the next (H in the paper).
        fragments: how many fragments; layers go round, everything else goes where least is. Or a list of lists of names (or
            ``fnmatch`` patterns). None: one for each three layers. Fragment ``i`` of ``P`` is first sent after step
            ``(i + 1) * every // P``.
        overlap: steps for which a message may travel while training goes on (tau in the paper); below ``every``.
        alpha: the share of a worker's own weights that is kept when a message arrives: 0 takes the outer weights, 1 sends for
            nothing. None: 0.5 with an overlap, and else 0. Rows that have left the selection before the message was sent are not
            kept.
        bits: of each number that is sent: 32, 16 (bf16), 8 or 4 (see `grass_compile.distributed.codes`).
        lr: of the outer optimizer.
        momentum: of the outer optimizer, Nesterov's; 0 for none.
        group: the process group; None for all processes.
        sparse: False sends whole weights, whatever has moved.

    Attributes:
        optimizer: the outer one, ``torch.optim.SGD`` over the outer weights. A scheduler may write its learning rate, on all
            workers alike.
        fragments: the names of each.
        steps: how often `step` was called.
        numbers_sent: how many numbers of outer gradients this worker has contributed.
        bytes_sent: what it has sent to others, all in all, once for each receiver.

    Raises:
        ConfigError: an argument is invalid; there are no processes; a parameter is spread over processes (``DTensor``, FSDP);
            the workers' settings differ (on all of them); or the rows of a weight are chosen by its gradient, which is another on
            each worker.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        opt: torch.optim.Optimizer,
        *,
        every: int,
        fragments: int | Sequence[Sequence[str]] | None = None,
        overlap: int = 0,
        alpha: float | None = None,
        bits: int = 32,
        lr: float = 0.7,
        momentum: float = 0.9,
        group: Any = None,
        sparse: bool = True,
    ) -> None:
        parameters = _checked(named_parameters)
        if not isinstance(opt, torch.optim.Optimizer):
            raise ConfigError(f"opt must be the inner optimizer, got {type(opt).__name__}.")
        self.opt, self._group, self.sparse = opt, group, boolean("sparse", sparse)
        self._selects = opt if isinstance(opt, MovesRows) else None
        self.every, self.overlap, self.alpha, self.bits = _numbers(every, overlap, alpha, bits)
        self.steps = self.numbers_sent = self.bytes_sent = 0
        self._decays: dict[Tensor, float] = {}
        trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
        self.fragments = split({name: p.numel() for name, p in trained.items()}, _fragments(fragments))
        self._meet(parameters, {"lr": finite("lr", lr), "momentum": finite("momentum", momentum)})
        for parameter in parameters.values():
            dist.broadcast(parameter.detach(), group=group, group_src=0)
        self._weights = {name: OuterWeight(name, parameter) for name, parameter in trained.items()}
        self._fragments = [Fragment([self._weights[name] for name in names]) for names in self.fragments]
        outer = [weight.outer for weight in self._weights.values()]
        try:
            self.optimizer = torch.optim.SGD(outer, lr=lr, momentum=momentum, nesterov=momentum != 0)
        except ValueError as error:
            raise ConfigError(f"DiLoCo: {error}") from error
        for weight in self._weights.values():
            weight.begin(self._moving(weight))
        if self._selects is not None:
            me = weakref.ref(self)
            opt.register_step_pre_hook(lambda *_: _note_decays(me()))

    def _meet(self, parameters: Mapping[str, Tensor], rates: Mapping[str, float]) -> None:
        """Compare settings with the other workers, and have all select the same rows.

        Raises:
            ConfigError: on all of them.
        """
        group: Any = dist.group.WORLD if self._group is None else self._group
        mesh = (MeshDim(group.group_name, dist.get_world_size(group)),)
        own = {name: getattr(self, name) for name in ("every", "overlap", "alpha", "bits", "sparse", "fragments")}
        facts = {f"DiLoCo's {name}": repr(value) for name, value in {**own, **rates}.items()}
        facts |= {f"parameter {name}": f"{list(p.shape)} {p.dtype} {p.requires_grad}" for name, p in parameters.items()}
        check_settings(mesh, facts, (), False)
        if self.sparse and self._selects is not None:
            self._selects.share_rows(mesh)

    @property
    def outer(self) -> dict[str, Tensor]:
        """The outer weights by name, at least fp32: the same on all workers, and what the paper evaluates."""
        return {name: weight.outer for name, weight in self._weights.items()}

    # ------------------------------------------------------------------------------------------------------------ a step

    @torch.no_grad()
    def step(self) -> None:
        """Send the fragments that are due, and apply what has arrived; after each ``opt.step()``, on all workers.

        Raises:
            StateError: on all workers, if other rows have moved on one than on another.
        """
        self.steps += 1
        for weight in self._weights.values():
            weight.note(self._moving(weight), self._decays.get(weight.parameter, 0.0))
        for number, fragment in enumerate(self._fragments):
            if is_due(self.steps, number, len(self._fragments), self.every):
                self._send(fragment)
        for fragment in self._fragments:
            if fragment.pending is not None:
                self._advance(fragment, fragment.pending)

    def _moving(self, weight: OuterWeight) -> Moving | None:
        return None if self._selects is None else self._selects.moving(weight.parameter)

    def _send(self, fragment: Fragment) -> None:
        """Start the message of a fragment."""
        cuts = [weight.cut(self.sparse) for weight in fragment.weights]
        self._agree(fragment, cuts)
        vector = torch.cat([weight.delta(cut).float() for weight, cut in zip(fragment.weights, cuts, strict=True)])
        for weight in fragment.weights:
            weight.sent()
        codes = Mean.encoded(vector, self.bits, self._group)
        fragment.pending = Pending(self.steps, cuts, self._start(codes, len(vector)))
        self.numbers_sent += len(vector)

    def _start(self, codes: Tensor, size: int) -> Mean:
        mean = Mean(codes, size, self.bits, self._group)
        self.bytes_sent += mean.bytes_sent
        return mean

    def _agree(self, fragment: Fragment, cuts: Sequence[Cut]) -> None:
        """Compare which rows have moved, and take the mean of what all others were multiplied by: one short message, which is
        waited for.

        Raises:
            StateError: on all workers.
        """
        mine = [[float(cut.checksum(self.steps)), cut.factor] for cut in cuts]
        device, count = fragment.weights[0].outer.device, dist.get_world_size(self._group)
        header = torch.tensor(mine, dtype=torch.float64, device=device)
        theirs = header.new_empty(count * header.numel())
        all_gather(theirs, header.flatten(), self._group, False)
        self.bytes_sent += (count - 1) * header.nbytes
        sums, factors = theirs.cpu().view(count, *header.shape).unbind(2)
        for weight, found in zip(fragment.weights, sums.unbind(1), strict=True):
            if (differs := (found != found[0]).nonzero().flatten()).numel():
                raise StateError(
                    f"{weight.name}: other rows have moved on rank {int(differs[0])} than on rank 0, or it has taken another "
                    "number of steps there. Each worker has to take every step, and to call diloco.step() after it; or use "
                    "sparse=False, which sends whole weights."
                )
        for cut, factor in zip(cuts, factors.mean(0).tolist(), strict=True):
            cut.factor = factor

    def _advance(self, fragment: Fragment, pending: Pending) -> None:
        """Do what a message is ready for: its second half at half time, and the outer step at the end."""
        since, before = self.steps - pending.step, pending.mean.bytes_sent
        if since >= (self.overlap + 1) // 2:
            pending.mean.start_second_half()
        if since >= self.overlap:
            self._apply(fragment, pending)
        self.bytes_sent += pending.mean.bytes_sent - before

    def _apply(self, fragment: Fragment, pending: Pending) -> None:
        """Take the outer step of a fragment, and merge."""
        lengths = [weight.length(cut) for weight, cut in zip(fragment.weights, pending.cuts, strict=True)]
        means = pending.mean.wait().split(lengths)
        for weight, cut, mean in zip(fragment.weights, pending.cuts, means, strict=True):
            weight.outer.grad = weight.gradient(cut, mean)
        self.optimizer.step()  # leaves alone what has no gradient
        self.optimizer.zero_grad()
        for weight in fragment.weights:
            weight.merge(self.alpha)
        fragment.pending = None

    # ------------------------------------------------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values of this worker, to be saved beside its own weights and inner optimizer. Nothing is sent for
        it: of a message on its way it holds what this worker has contributed."""
        return {
            "steps": self.steps,
            "numbers_sent": self.numbers_sent,
            "bytes_sent": self.bytes_sent,
            **self._form(),
            "optimizer": self.optimizer.state_dict(),
            "weights": {name: weight.state() for name, weight in self._weights.items()},
            "pending": [_saved(fragment.pending) for fragment in self._fragments],
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict()`` gave, bit for bit; on all workers, each with its own. Messages that were on their way
        are sent again. Weights and inner optimizer are loaded by themselves, after construction.

        Raises:
            StateError: it is of other parameters; or a message was on its way between another number of workers, in other
                fragments or in another number of bits. Nothing was changed.
        """
        weights, pending = state_dict["weights"], state_dict["pending"]
        if weights.keys() != self._weights.keys():
            names = sorted(weights.keys() ^ self._weights.keys())
            raise StateError(f"{names[0]}: it is in the state or here, but not in both. Nothing was changed.")
        for name, weight in self._weights.items():
            weight.check(weights[name])
        for key, here in self._form().items():
            if any(pending) and state_dict[key] != here:
                raise StateError(
                    f"a message was on its way when this was saved, and {key} was {state_dict[key]}; here it is {here}. "
                    "Nothing was changed."
                )
        self.optimizer.load_state_dict(state_dict["optimizer"])
        self.steps, self.numbers_sent, self.bytes_sent = (state_dict[key] for key in ("steps", "numbers_sent", "bytes_sent"))
        for name, weight in self._weights.items():
            weight.load(weights[name])
        for fragment, saved in zip(self._fragments, pending if any(pending) else [None] * len(self._fragments), strict=True):
            fragment.pending = None if saved is None else self._resumed(fragment, saved)

    def _form(self) -> dict[str, Any]:
        """What has to be the same where a message on its way is sent again."""
        return {"workers": dist.get_world_size(self._group), "bits": self.bits, "fragments": self.fragments}

    def _resumed(self, fragment: Fragment, saved: Mapping[str, Any]) -> Pending:
        """Send a message again."""
        device = fragment.weights[0].outer.device
        cuts = [Cut(dim, None if rows is None else rows.to(device), factor) for dim, rows, factor in saved["cuts"]]
        return Pending(saved["step"], cuts, self._start(saved["codes"].to(device), saved["size"]))


def _saved(pending: Pending | None) -> dict[str, Any] | None:
    """A message on its way as tensors and plain values."""
    if pending is None:
        return None
    cuts = [(cut.dim, cut.rows, cut.factor) for cut in pending.cuts]
    return {"step": pending.step, "cuts": cuts, "codes": pending.mean.codes, "size": pending.mean.size}


def _note_decays(diloco: DiLoCo | None) -> None:
    """Before a step of the inner optimizer, note by how much it decays weights: a scheduler may write the rate right after it."""
    for group in diloco.opt.param_groups if diloco is not None else ():
        decay = float(group["lr"]) * float(group["weight_decay"])
        diloco._decays.update(dict.fromkeys(group["params"], decay))  # type: ignore[union-attr]


# ------------------------------------------------------------------------------------------------------------- arguments


def _checked(named_parameters: Iterable[Any]) -> dict[str, Tensor]:
    """The parameters by name.

    Raises:
        ConfigError: they have no names, cannot be synchronised, or there are no processes.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ConfigError("DiLoCo: there is no process group. Call torch.distributed.init_process_group() before.")
    found: dict[str, Tensor] = {}
    for entry in named_parameters:
        if not (isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[1], Tensor)):
            raise ConfigError("DiLoCo takes names and parameters: model.named_parameters().")
        name, parameter = entry
        if name in found:
            raise ConfigError(f"DiLoCo: two parameters are called {name}.")
        if is_sharded(parameter) or sharded_by(parameter):
            raise ConfigError(
                f"{name}: it is spread over processes ({sharded_by(parameter) or 'a DTensor'}), which DiLoCo does not support. "
                "Each worker has to have the whole of its weights."
            )
        if not parameter.is_floating_point():
            raise ConfigError(f"{name}: its dtype is {parameter.dtype}; DiLoCo synchronises real floating point weights.")
        found[name] = parameter
    if not any(parameter.requires_grad for parameter in found.values()):
        raise ConfigError("DiLoCo: no parameter trains.")
    return found


def _numbers(every: Any, overlap: Any, alpha: Any, bits: Any) -> tuple[int, int, float, int]:
    """Those of the schedule and the message.

    Raises:
        ConfigError: naming one that is invalid.
    """
    every = positive_int("every", every)
    if not is_whole(overlap) or not 0 <= overlap < every:
        raise ConfigError(f"overlap must be a whole number from 0 to every - 1 = {every - 1}, got {overlap!r}.")
    alpha = (0.5 if overlap else 0.0) if alpha is None else finite("alpha", alpha)
    if not 0.0 <= alpha <= 1.0:
        raise ConfigError(f"alpha must be from 0 to 1, got {alpha!r}.")
    if not is_whole(bits) or bits not in BITS:
        raise ConfigError(f"bits must be one of {BITS}, got {bits!r}.")
    return every, int(overlap), alpha, int(bits)


def _fragments(fragments: Any) -> int | list[list[str]] | None:
    """How many there are, or the patterns of each.

    Raises:
        ConfigError: it is neither.
    """
    if fragments is None or is_whole(fragments):
        return None if fragments is None else positive_int("fragments", fragments)
    parts = fragments if isinstance(fragments, (list, tuple)) else ()
    if parts and all(isinstance(part, (list, tuple)) and part and all(isinstance(name, str) for name in part) for part in parts):
        return [list(part) for part in parts]
    raise ConfigError(f"fragments must be a number, or a list of lists of names, got {fragments!r}.")
