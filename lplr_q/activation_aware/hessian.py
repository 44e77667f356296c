"""Second moments of the inputs of linear layers, streamed block by block.   [CALDERA §5; GPTQ §3]

The calibration text goes through one decoder block at a time: only one block's sums and the hidden
states are held. Layers with the same input (found by object identity in a probing forward) share
one Hessian. Under torchrun every process takes its share of the batches and the sums are added up,
which is exact.

With ``inputs="compressed"`` a block sees what the compressed blocks before it give, and together
with the cross moment of original and compressed inputs, W* = W + a W (C - H^) H^^-1 makes up for
part of their errors (:func:`corrected_weight`).   [QEP §3]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from lplr_q import distributed
from lplr_q.activation_aware.discovery import (
    EXPERT,
    UnfusedExperts,
    decoder_blocks,
    linear_names,
    linear_shape,
    linear_weight,
)
from lplr_q.activation_aware.moments import (
    Calibration,
    SecondMoment,
    SecondMomentAccumulator,
    begin_hessians,
    block_is_stored,
    load_hessians,
    save_hessians,
    write_block,
)
from workbench import storage
from workbench.errors import ConfigError, DataError

__all__ = [
    "BlockMoments",
    "Calibration",
    "SecondMoment",
    "SecondMomentAccumulator",
    "collect_hessians",
    "corrected_weight",
    "decoder_blocks",
    "linear_names",
    "linear_weight",
    "load_hessians",
    "save_hessians",
    "stream_blocks",
]

PROBE_TOKENS = 64
INPUTS = ("original", "compressed")


@dataclass(frozen=True)
class BlockMoments:
    """What one decoder block's linear layers were given."""

    index: int
    calibration: Calibration
    cross: dict[str, Float[Tensor, "n n"]] = field(default_factory=dict)
    """X X^^T / N of original and compressed inputs by key; with ``cross`` only."""


# ---------------------------------------------------------------- block calls


class _Stop(Exception):
    """Raised by the hook once the first block's input is known."""


def _split_hidden(args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, tuple, dict[str, Any]]:
    """The hidden states and the other arguments of a decoder block call."""
    if args:
        return args[0], args[1:], kwargs
    others = dict(kwargs)
    return others.pop("hidden_states"), (), others


def _first_inputs(
    model: nn.Module, blocks: nn.ModuleList, batches: list[Tensor]
) -> tuple[list[Tensor], dict[int, list[tuple[tuple, dict]]]]:
    """Input of block 0 for every batch, and each block's other arguments per batch size."""
    inputs: list[Tensor] = []
    arguments: dict[int, list[tuple[tuple, dict]]] = {}

    def hook(index: int, full: bool) -> Callable:
        def record(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            hidden, rest, others = _split_hidden(args, kwargs)
            if index == 0:
                inputs.append(hidden.detach())
                if not full:
                    raise _Stop
            arguments.setdefault(hidden.shape[0], []).append((rest, others))

        return record

    for batch in batches:
        full = batch.shape[0] not in arguments
        handles = [
            block.register_forward_pre_hook(hook(i, full), with_kwargs=True)
            for i, block in enumerate(blocks)
        ]
        try:
            model(input_ids=batch, use_cache=False)
        except _Stop:
            pass
        finally:
            for handle in handles:
                handle.remove()
    return inputs, arguments


def _call_block(block: nn.Module, hidden: Tensor, extra: tuple[tuple, dict]) -> Tensor:
    out = block(hidden, *extra[0], **extra[1])
    return out[0] if isinstance(out, tuple) else out


def shared_inputs(
    model: nn.Module, names_of: dict[int, list[str]], probe: Int64[Tensor, "1 length"]
) -> dict[int, list[list[str]]]:
    """Names of linear layers of each block that receive the very same input tensor.

    Experts that the probe did not choose stand alone. Layers whose weight is used without a call
    (dt_proj of Mamba) are left out: nothing could be put in their place.
    """
    seen: dict[int, list[tuple[Tensor | None, list[str]]]] = {i: [] for i in names_of}

    def hook(index: int, name: str) -> Callable:
        def record(_module: nn.Module, args: tuple) -> None:
            for tensor, members in seen[index]:
                if tensor is args[0]:
                    members.append(name)
                    return
            seen[index].append((args[0], [name]))  # the reference keeps its identity alive

        return record

    handles = [
        model.get_submodule(name).register_forward_pre_hook(hook(index, name))
        for index, names in names_of.items()
        for name in names
    ]
    try:
        model(input_ids=probe, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    for index, names in names_of.items():
        met = {name for _, members in seen[index] for name in members}
        alone = (name for name in names if name not in met and EXPERT.match(name))
        seen[index] += [(None, [name]) for name in alone]
    return {index: [members for _, members in entries] for index, entries in seen.items()}


# ---------------------------------------------------------------- the pass


def stream_blocks(
    model: nn.Module,
    tokens: Int64[Tensor, "rows length"],
    *,
    batch_size: int = 8,
    include: str = ".*",
    exclude: str | None = None,
    mask: Bool[Tensor, "rows length"] | None = None,
    inputs: str = "original",
    cross: bool = False,
    skip: Callable[[int], bool] = lambda index: False,
    progress: Callable[[Iterable], Iterator] = iter,
) -> Iterator[BlockMoments]:
    """The moments of one decoder block after the other.

    With ``inputs="compressed"`` the block is called again after the moments were given out, so
    whatever was put into it meanwhile makes the next block's inputs. ``cross`` (which needs that)
    keeps the original inputs beside them. Blocks for which ``skip`` is true are only passed
    through. Tokens where ``mask`` is False (padding) are left out.

    Raises:
        DataError: no tokens, or non-finite activations (names the layer).
    """
    if tokens.ndim != 2 or tokens.numel() == 0:
        raise DataError(
            f"calibration tokens of shape {tuple(tokens.shape)}; expected rows x length"
        )
    if inputs not in INPUTS or (cross and inputs != "compressed"):
        raise ConfigError(f"inputs={inputs!r}; choose from {', '.join(INPUTS)}; cross needs those")
    prefix, blocks = decoder_blocks(model)
    names_of = linear_names(model, include=include, exclude=exclude)
    device = next(model.parameters()).device
    batches = distributed.mine([b.to(device) for b in tokens.split(batch_size)])
    masks = None if mask is None else distributed.mine(list(mask.to(device).split(batch_size)))
    with torch.no_grad():
        probe = tokens[:1, :PROBE_TOKENS].to(device)
        groups_of = shared_inputs(model, names_of, probe)
        hidden, arguments = _first_inputs(model, blocks, batches)
        original = list(hidden) if cross else None
    for index, block in progress(list(enumerate(blocks))):
        walk = _Walk(model, block, index, groups_of[index], arguments, masks)
        with torch.no_grad():
            if skip(index):
                hidden = walk.forward(hidden)
                continue
            after = walk.accumulate(hidden, original)
            for sums in walk.sums.values():
                sums.all_reduce(device)
        yield walk.finish(prefix)
        with torch.no_grad():
            if inputs == "compressed":
                hidden = walk.forward(hidden)
                original = walk.after_original
            else:
                hidden = after


class _Walk:
    """One block and the sums over its inputs."""

    def __init__(
        self,
        model: nn.Module,
        block: nn.Module,
        index: int,
        groups: list[list[str]],
        arguments: dict[int, list[tuple[tuple, dict]]],
        masks: list[Tensor] | None,
    ) -> None:
        self.model, self.block, self.index = model, block, index
        self.groups, self.arguments, self.masks = groups, arguments, masks
        self.modules = {g[0]: model.get_submodule(g[0]) for g in groups}
        self.sums = {
            name: SecondMomentAccumulator(linear_shape(m)[1]) for name, m in self.modules.items()
        }
        self.cross: dict[str, Tensor] = {}
        self.after_original: list[Tensor] | None = None
        self._mask: Tensor | None = None
        self._kept: dict[str, Tensor] | None = None

    def _call(self, states: Tensor) -> Tensor:
        extra = self.arguments[states.shape[0]][self.index]
        return _call_block(self.block, states, extra)

    def forward(self, hidden: list[Tensor]) -> list[Tensor]:
        """The block's outputs, nothing else."""
        return [self._call(states) for states in hidden]

    def accumulate(self, hidden: list[Tensor], original: list[Tensor] | None) -> list[Tensor]:
        """Outputs for ``hidden`` while the inputs of its layers are added up."""
        outputs, after_original = [], []
        for i, states in enumerate(hidden):
            self._mask = None if self.masks is None else self.masks[i]
            self._kept = None
            if original is not None:
                self._kept = {}
                with self._hooks(self._keep):
                    after_original.append(self._call(original[i]))
            with self._hooks(self._add):
                outputs.append(self._call(states))
        self.after_original = after_original if original is not None else None
        return outputs

    def _hooks(self, act: Callable[[str, nn.Module, Tensor], None]) -> Any:
        handles = [
            module.register_forward_pre_hook(lambda m, args, n=name: act(n, m, args[0]))
            for name, module in self.modules.items()
        ]

        class Hooks:
            def __enter__(self) -> None:
                pass

            def __exit__(self, *_: object) -> None:
                for handle in handles:
                    handle.remove()

        return Hooks()

    def _rows(self, name: str, x: Tensor) -> Tensor:
        """The vectors that are no padding."""
        mask = self._mask
        if mask is None:
            return x.reshape(-1, x.shape[-1])
        expert = EXPERT.match(name)
        if expert:
            experts = self.model.get_submodule(expert[1])
            if isinstance(experts, UnfusedExperts) and experts.tokens is not None:
                return x[mask.flatten()[experts.tokens]]
        if x.shape[:-1] == mask.shape:
            return x[mask]
        rows = x.reshape(-1, x.shape[-1])
        return rows[mask.flatten()] if len(rows) == mask.numel() else rows

    def _keep(self, name: str, module: nn.Module, x: Tensor) -> None:
        assert self._kept is not None
        self._kept[name] = self._rows(name, x)

    def _add(self, name: str, module: nn.Module, x: Tensor) -> None:
        rows = self._rows(name, x)
        try:
            self.sums[name].add(rows)
        except DataError as error:
            raise DataError(f"{name}: {error}") from None
        if self._kept is not None:
            before = self._kept.get(name)
            if before is None or before.shape != rows.shape:
                return  # another choice of experts: no pairs
            total = (before.double().T @ rows.double()).cpu()
            self.cross[name] = self.cross[name] + total if name in self.cross else total

    def finish(self, prefix: str) -> BlockMoments:
        """Means of the sums; experts that saw too few tokens get their layer's pooled moment."""
        moments: dict[str, SecondMoment] = {}
        key_of: dict[str, str] = {}
        cross: dict[str, Tensor] = {}
        pooled = _pooled(self.sums)
        for members in self.groups:
            name = members[0]
            sums, label = self.sums[name], name
            if name in pooled and sums.count < len(sums.sum):
                label, sums = pooled[name]
            key = label.removeprefix(f"{prefix}.")
            if key not in moments:
                try:
                    moments[key] = sums.finish()
                except DataError as error:
                    raise DataError(f"{name}: {error}") from None
            key_of.update(dict.fromkeys(members, key))
            if name in self.cross and label == name:
                total = distributed.all_reduce_sum(self.cross[name])
                cross[key] = total / sums.count
        return BlockMoments(self.index, Calibration(moments, key_of), cross)


def _pooled(
    sums: dict[str, SecondMomentAccumulator],
) -> dict[str, tuple[str, SecondMomentAccumulator]]:
    """For every expert's layer: name and sums of that layer over all experts of its block."""
    found: dict[str, tuple[str, SecondMomentAccumulator]] = {}
    together: dict[str, SecondMomentAccumulator] = {}
    for name, own in sums.items():
        match = EXPERT.match(name)
        if match:
            label = f"{match[1]}.pooled.{match[3]}"
            total = together.setdefault(label, SecondMomentAccumulator(len(own.sum)))
            total.merge(SecondMomentAccumulator.from_tree(own.to_tree()))
            found[name] = (label, total)
    return found


def collect_hessians(
    model: nn.Module,
    tokens: Int64[Tensor, "rows length"],
    *,
    batch_size: int = 8,
    include: str = ".*",
    exclude: str | None = None,
    mask: Bool[Tensor, "rows length"] | None = None,
    folder: Path | str | None = None,
    fingerprint: dict[str, Any] | None = None,
    progress: Callable[[Iterable], Iterator] = iter,
) -> Calibration:
    """Second moments of the inputs of all linear layers in the decoder blocks.

    With ``folder`` every block's moments are written when they are done and found again by the
    same call after an interruption; memory then holds one block's sums only. ``fingerprint`` says
    what they are made from. Under torchrun rank 0 writes.

    Raises:
        DataError: no tokens, or non-finite activations (names the layer).
        ConfigError: the folder holds Hessians of another origin.
    """
    options: dict[str, Any] = {
        "batch_size": batch_size, "include": include, "exclude": exclude, "mask": mask,
        "progress": progress,
    }  # fmt: skip
    if folder is None:
        moments: dict[str, SecondMoment] = {}
        key_of: dict[str, str] = {}
        for block in stream_blocks(model, tokens, **options):
            moments |= block.calibration.moments
            key_of |= block.calibration.key_of
        return Calibration(moments, key_of)
    folder = Path(folder)
    names = linear_names(model, include=include, exclude=exclude)
    layers = [index for index, found in names.items() if found]
    if distributed.rank() == 0:
        begin_hessians(folder, {**(fingerprint or {}), "layers": layers})
    distributed.barrier()
    stored = {index for index in layers if block_is_stored(folder, index)}
    stored |= set(names) - set(layers)
    distributed.barrier()  # all have looked before anyone writes
    for block in stream_blocks(model, tokens, skip=lambda index: index in stored, **options):
        if distributed.rank() == 0:
            write_block(folder, block.index, block.calibration)
    if distributed.rank() == 0:
        storage.sweep_litter(folder)  # of killed processes
    distributed.barrier()
    return load_hessians(folder)


def corrected_weight(
    weight: Float[Tensor, "m n"],
    moment: SecondMoment,
    cross: Float[Tensor, "n n"],
    *,
    alpha: float = 0.5,
    sigma: float = 1e-2,
) -> Float[Tensor, "m n"]:
    """W* = W + a W (C - H^) (H^ + s mean(diag H^) I)^-1: what W gives to the original inputs, as
    far as a linear map of the compressed ones can say it.   [QEP, eq. 7]"""
    if not alpha:
        return weight
    hessian = moment.matrix()
    damped = hessian.clone()
    damped.diagonal().add_(sigma * float(hessian.diagonal().mean()))
    gap = (cross.to(hessian) - hessian).T  # solve (H^ + sI) X = (C - H^)^T, then W X^T
    shift = torch.linalg.solve(damped, gap).T
    return weight + alpha * (weight.double() @ shift.to(weight.device)).to(weight.dtype)
