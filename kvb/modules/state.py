"""The state of a bottleneck: buffers with published names, flags and a mask; how it is written, copied and loaded.

The buffers are authoritative: whoever copies, averages or replaces them changes the module. The host's copy of the
flags follows, so that no forward waits for a device; it looks at a buffer again when that was written or replaced.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from kvb import _torch, validation
from kvb.checkpoints import FLAGS, MASK, all_or_nothing
from kvb.modules import entries, legacy
from kvb.modules.entries import STATISTICS, VERSION
from kvb.modules.packed_keys import PackedKeys, WatchedBuffers
from kvb.modules.recomputation import Forwards

_LOOKED_AT = ("initted", FLAGS, MASK, "cluster_size_counter")
_Self = TypeVar("_Self", bound="BottleneckState")


class BottleneckState(nn.Module):
    """Buffers, flags, mask and packed keys of a ``KeyValueBottleneck``.

    State:
        initted [1], cluster_size [C, K], keys_avg [C, K, D], keys [C, K, D] float32, cluster_size_counter [C, K] int64:
        the published names; kvb_flags [3] float32: version, 1 while keys learn, 1 while hits are counted; kvb_mask
        [C, K] float32: 1 where a pair may be fetched. A state_dict without the last two loads too, and leaves both as
        they are.
    """

    initted: Tensor
    cluster_size: Tensor
    cluster_size_counter: Tensor
    keys_avg: Tensor
    keys: Tensor
    kvb_flags: Tensor
    kvb_mask: Tensor
    values: nn.Parameter  # which a subclass has, as its
    init_mode: str

    def __init__(self, C: int, K: int, D: int, *, initialised: bool) -> None:
        super().__init__()
        float32 = torch.float32  # whatever the default dtype: moving averages are lost in half precision
        fresh = torch.randn(C, K, D, dtype=float32) if initialised else torch.zeros(C, K, D, dtype=float32)
        self.register_buffer("initted", torch.tensor([float(initialised)], dtype=float32))
        self.register_buffer("cluster_size", torch.ones(C, K, dtype=float32))
        self.register_buffer("cluster_size_counter", torch.zeros(C, K, dtype=torch.int64))
        self.register_buffer("keys_avg", fresh.clone())
        self.register_buffer("keys", fresh)
        self.register_buffer(FLAGS, torch.tensor([VERSION, 1, 1], dtype=float32))
        self.register_buffer(MASK, torch.ones(C, K, dtype=float32))  # AveragedModel subtracts buffers, and no bools
        # The host's copy of the flags, and what the mask comes to.
        self._learning = self._counting = True
        self._initialised, self._masked = initialised, False
        self._usable: Tensor | None = None  # the pairs that the search may find; None for all
        self._fewest = K  # such pairs in a codebook
        self._watch()

    def _watch(self) -> None:
        """Begin to look at the buffers: nothing of what follows is saved, copied or shared."""
        self.__dict__["_buffers"] = WatchedBuffers(self._buffers)
        self._packed = PackedKeys(self.__dict__["_buffers"])
        self._forwards = Forwards()
        self._strict = False  # whether names that are missing or left over keep a state_dict from being loaded
        # The buffers at the last look, their versions, how many names they have, and whether others hold one of them.
        self._seen: list[Tensor] = []
        self._versions: list[int] = []
        self._names, self._held = 0, True

    def _table(self) -> Tensor:
        """The values that are here, [C, K, V]."""
        own = self.__dict__["_parameters"].get("values")
        return self.values if own is None else own  # which finds what stands in its place, ten times as slow

    def _part(self, whole: Tensor) -> Tensor:
        """What is here of a tensor [C, K, ...]."""
        return whole

    # --- sizes: those of the tensors, which may be replaced -----------------------------------------------------------

    # Also where this is traced, the keys are not taken.

    @property
    def num_codebooks(self) -> int:
        """C."""
        size: int = dict.__getitem__(self.__dict__["_buffers"], "keys").shape[0]
        return size

    @property
    def key_value_pairs_per_codebook(self) -> int:
        """K."""
        size: int = dict.__getitem__(self.__dict__["_buffers"], "keys").shape[1]
        return size

    @property
    def dim_keys(self) -> int:
        """D."""
        size: int = dict.__getitem__(self.__dict__["_buffers"], "keys").shape[2]
        return size

    @property
    def _device(self) -> torch.device:
        device: torch.device = self._taken_quietly("initted").device
        return device

    # --- flags and mask -----------------------------------------------------------------------------------------------

    @property
    def keys_initialised(self) -> bool:
        """Whether the keys no longer wait for data."""
        self._look()
        return self._initialised

    @property
    def keys_frozen(self) -> bool:
        """Whether the keys have stopped learning."""
        self._look()
        return not self._learning

    @property
    def update_keys(self) -> bool:
        """The published name of ``not keys_frozen``."""
        return not self.keys_frozen

    @update_keys.setter
    def update_keys(self, learning: bool) -> None:
        self._set_flags(learning=learning)

    @property
    def count_cluster_size(self) -> bool:
        """Whether hits are counted while keys are frozen; the published name."""
        self._look()
        return self._counting

    @count_cluster_size.setter
    def count_cluster_size(self, counting: bool) -> None:
        self._set_flags(counting=counting)

    @property
    def pair_mask(self) -> Tensor | None:
        """The mask [C, K] of ``mask_pairs``, or None where every pair may be fetched."""
        self._look()
        return self._taken_quietly(MASK) > 0.5 if self._masked else None

    def mask_pairs(self: _Self, mask: Tensor | None) -> _Self:
        """Restrict the search to pairs where ``mask`` [C, K] (bool) is True; None lifts it. Saved with the module."""
        if mask is not None:
            validation.mask("mask_pairs", mask, self.num_codebooks, self.key_value_pairs_per_codebook)
        self._write(MASK, torch.ones((), device="cpu") if mask is None else self._part(mask))
        self._look()
        return self

    def _search_mask(self) -> Tensor | None:
        """The pairs that may be fetched: the manual mask, and the counted ones while counts are deactivated."""
        self._look()
        return self._usable

    def _set_flags(self, *, learning: bool | None = None, counting: bool | None = None) -> None:
        self._look()
        self._learning = self._learning if learning is None else learning
        self._counting = self._counting if counting is None else counting
        self._write_flags()
        self._look()

    def _write_flags(self) -> None:
        flags = [VERSION, self._learning, self._counting]
        self._write(FLAGS, torch.tensor(flags, dtype=torch.float32, device="cpu"))

    def _write(self, name: str, value: Tensor) -> None:
        """Write into the buffer, or replace it where PyTorch forbids writing."""
        buffer = self._taken_quietly(name)
        if buffer.is_inference() and not torch.is_inference_mode_enabled():
            setattr(self, name, value.to(buffer))
        else:
            with torch.no_grad():
                buffer.copy_(value)
            self._held = True  # by the caller, until the next look

    def _commit(self, keys: Tensor, keys_avg: Tensor, cluster_size: Tensor) -> None:
        """Make them the state of keys that are initialised."""
        for name, part in (("keys", keys), ("keys_avg", keys_avg), ("cluster_size", cluster_size)):
            self._write(name, part)
        self._write("initted", torch.ones(1, device="cpu"))
        self._packed.forget()
        self._look()

    def _taken_quietly(self, name: str) -> Any:
        """A buffer, without the look at the keys that follows whenever somebody takes them."""
        if is_compiling():
            return getattr(self, name)
        return dict.__getitem__(self.__dict__["_buffers"], name)

    def _look(self) -> None:
        """Bring the host's copy up to date. A traced graph has that of the time when it was traced, and guards it."""
        if is_compiling():
            return
        buffers = self.__dict__["_buffers"]
        if self._held or getattr(buffers, "read", True):
            self._look_closely(buffers)

    def _look_closely(self, buffers: dict[str, Any]) -> None:
        """Read the buffers: on the CPU, where others hold them, at every look; elsewhere when PyTorch tells of a write.

        The host waits for another device here.
        """
        self._held = True  # other threads wait for nothing, but look themselves until this is done
        if isinstance(buffers, WatchedBuffers):
            buffers.read = False  # before all reading, as somebody may take a buffer meanwhile
        tensors = [dict.__getitem__(buffers, name) for name in _LOOKED_AT]
        versions = [-1 if tensor.is_inference() else _torch.version_of(tensor) for tensor in tensors]
        same = versions == self._versions and all(map(operator.is_, tensors, self._seen)) and -1 not in versions
        self._seen, self._versions = tensors, versions
        self._names = sum(map(sys.getrefcount, tensors))
        held = self._names > _ALONE
        initted, flags, mask, counter = tensors
        if same and not initted.is_cpu:
            self._held = held
            return
        if not (initted.is_meta or flags.is_meta):
            self._initialised = initted.item() > 0.5
            _, learning, counting = flags.tolist()
            self._learning, self._counting = learning > 0.5, counting > 0.5
        restricted = not (self._learning or self._counting)
        if not (mask.is_meta or counter.is_meta):
            allowed = mask > 0.5
            usable = allowed & (counter > 0) if restricted else allowed
            self._masked = not bool(allowed.all())
            self._fewest = int(usable.sum(-1).min())
            self._usable = None if self._fewest == mask.shape[1] else usable
        elif self._usable is not None:
            self._usable = mask > 0.5
        self._held = held

    # --- packed keys --------------------------------------------------------------------------------------------------

    def _packed_keys(self) -> tuple[Tensor, Tensor]:
        """The keys and their packed form: what a search takes."""
        if is_compiling():
            return self._packed.traced(self.__dict__["_buffers"])
        return self._packed.current(self.__dict__["_buffers"])

    def _keep_packed(self, packed: Tensor) -> None:
        if is_compiling():
            self._packed.forget()
        else:
            self._packed.keep(self.__dict__["_buffers"], packed)

    def refresh_keys(self: _Self) -> _Self:
        """Pack the keys again before the next search; returns self.

        Needed only after a write that leaves no trace at all: through an address that outlived every reference.
        """
        self._packed.forget()
        return self

    # --- copies and conversions ---------------------------------------------------------------------------------------

    def _apply(self: _Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Self:
        before = {name: self._taken_quietly(name) for name in STATISTICS}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._taken_quietly(name)
            if new.dtype in (torch.float16, torch.bfloat16) and old.dtype.itemsize > new.dtype.itemsize:
                setattr(self, name, old.to(new.device))  # moving averages are lost in half precision
        if before["keys"].is_meta:
            self._leave_meta()
        self._look()
        return self.refresh_keys()

    def _leave_meta(self) -> None:
        """Write flags and mask, which the host knows, where a buffer has only just got memory, or has none yet."""
        device = self._taken_quietly("keys").device
        if device.type == "meta":
            return
        for name in ("initted", FLAGS, MASK):
            if self._taken_quietly(name).is_meta:
                setattr(self, name, torch.empty_like(self._taken_quietly(name), device=device))
        self._write("initted", torch.tensor([float(self._initialised)], device="cpu"))
        self._write_flags()
        if not self._masked:
            self._write(MASK, torch.ones((), device="cpu"))

    def _replicate_for_data_parallel(self) -> Any:
        replica: BottleneckState = super()._replicate_for_data_parallel()
        replica._watch()
        return replica

    def __getstate__(self) -> dict[str, Any]:
        hidden = "_packed", "_forwards", "_seen", "_versions", "_usable"
        return {**self.__dict__, "_buffers": dict(self._buffers), **dict.fromkeys(hidden)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if FLAGS not in self._buffers:
            self._upgrade()
        self._watch()
        self._look()

    def _upgrade(self) -> None:
        """A module pickled by kvb 0.1: flags as attributes, a mask or None."""
        own, mask = self.__dict__, self._buffers.pop("pair_mask", None)
        self._non_persistent_buffers_set.discard("pair_mask")
        self._learning, self._counting = own.pop("update_keys"), own.pop("count_cluster_size")
        flags = torch.tensor([VERSION, self._learning, self._counting], dtype=torch.float32, device=self.keys.device)
        self.register_buffer(FLAGS, flags)
        self.register_buffer(MASK, torch.ones_like(self.cluster_size) if mask is None else mask.to(self.cluster_size))
        self.cluster_size_counter = self.cluster_size_counter.to(torch.int64)

    # --- state_dict ---------------------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As ``torch.nn.Module.load_state_dict``, but all or nothing: what does not fit changes nothing.

        Raises:
            RuntimeError: strict and names missing or left over; shapes that differ; keys with NaN or Inf; negative or
            infinite counts; flags that are damaged or of a newer version.
        """
        self._strict = strict
        try:
            if not self._modules:  # whose checks come before anything is copied
                return super().load_state_dict(state_dict, strict, assign)
            with all_or_nothing(self, copies=not assign):
                return super().load_state_dict(state_dict, strict, assign)
        finally:
            self._strict = False

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """All or nothing: what does not fit changes none of this module's own tensors."""
        # The last of all hooks: those of users may rename, and run before it.
        check = self.register_load_state_dict_pre_hook(_admit)
        try:
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
        except _Refused:
            return
        finally:
            check.remove()
        missing_keys[:] = [name for name in missing_keys if name not in (prefix + FLAGS, prefix + MASK)]
        if self._taken_quietly(FLAGS).is_meta or self._taken_quietly(MASK).is_meta:
            self._leave_meta()
        self._look()
        self._packed.forget()


def _count_alone() -> int:
    module = BottleneckState(1, 1, 1, initialised=True)
    for _ in range(2):
        module._held = True
        module._look()
    return module._names


_ALONE = 0  # how many names the buffers have where nobody else holds one: versions of Python count differently
_ALONE = _count_alone()


class _Refused(Exception):
    """Ends the loading of one module before anything is copied; the reasons are in the lists of ``load_state_dict``."""


def _admit(
    module: BottleneckState,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Bring old entries up to date, and let nothing be copied if anything does not fit."""
    former = state_dict.pop(prefix + legacy.NAME, None)
    if isinstance(former, Tensor) and (problem := legacy.problem(former, module.cluster_size.numel())):
        error_msgs.append(problem)
        raise _Refused
    if isinstance(former, Tensor):
        flags, mask = legacy.flags_and_mask(former, module.cluster_size.shape)
        state_dict[prefix + FLAGS] = torch.tensor([VERSION, *flags], dtype=torch.float32, device="cpu")
        state_dict[prefix + MASK] = mask
    tensors = {**module._parameters, **module._buffers}
    names = tensors.keys() - module._non_persistent_buffers_set
    own = {name: tensor for name, tensor in tensors.items() if name in names and tensor is not None}
    given = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
    problems = [problem for name in own if name in given for problem in entries.problems(name, given[name], own[name])]
    if problems:
        error_msgs.extend(problems)
        raise _Refused
    missing = sorted(prefix + name for name in own.keys() - given.keys() - {FLAGS, MASK})
    surplus = sorted(prefix + name for name in given if _is_surplus(name, own, module))
    if module._strict and (missing or surplus):
        missing_keys.extend(missing)
        unexpected_keys.extend(surplus)
        raise _Refused
    for name in own.keys() & given.keys() & (entries.WIDE | {"cluster_size_counter"}):
        state_dict[prefix + name] = entries.widened(name, given[name])


def _is_surplus(name: str, own: dict[str, Any], module: nn.Module) -> bool:
    child, dot, _ = name.partition(".")
    return child not in module._modules if dot else name not in own and name != "_extra_state"
