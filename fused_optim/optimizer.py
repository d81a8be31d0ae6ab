"""FusedOptimizer: the only ``step()``. A class gives defaults and says which rule a group follows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import chain
from typing import Any, ClassVar, NamedTuple, TypeVar, overload

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim.optimizer import Optimizer, ParamsT

from . import checkpoint, checks, masking, norm, shards, storage
from .hooks import hooked
from .kernels import dispatch
from .kernels.aliasing import Occupied
from .kernels.bucket import Bucket, Member
from .kernels.control import Control, control
from .kernels.finders import Finder
from .kernels.guards import NativeDictGuards, PythonDictGuards, same_objects
from .kernels.launch import Key
from .kernels.layout import MAX_DIMS, layout_of
from .kernels.matrix import MatrixCut, couples_l2
from .kernels.plan import build
from .kernels.spec import Rule
from .options import ENGINE_OPTIONS, OPTION_DEFAULTS, Options, check_changed, check_group
from .precision import marks_of

Loss = TypeVar("Loss")


class _Plan(NamedTuple):
    """The buckets of a step and what must stay as it was for them to be used again."""

    buckets: list[Bucket]
    groups: list[list[Tensor]]
    idle: list[Tensor]
    signature: list[tuple[Any, ...]]
    steps_on_device: bool
    state: dict[Tensor, Any]
    unchanged: PythonDictGuards
    occupied: Occupied


class FusedOptimizer(Optimizer, ABC):
    """Base of all optimizers: one pass over memory for all tensors that share rule and storage.

    Subclasses pass their defaults to this constructor and implement :meth:`_rule`; those of the
    subclasses change nothing but options (``_preset``).

    Example:
        >>> import torch, fused_optim
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> isinstance(fused_optim.Lion([weight]), fused_optim.FusedOptimizer)
        True
    """

    _preset: ClassVar[Options] = {}

    _step_supports_amp_scaling = True
    _unknown_to_torch: frozenset[str] = frozenset()
    """State and group keys that the torch.optim class of the same name does not have."""
    _planned_options: tuple[str, ...] = ("decoupled_weight_decay",)
    """Options of the class that decide about launches; all others are scalars of a row."""
    # A loss scaler sets these for the time of a step; it must not find them otherwise.
    grad_scale: Tensor | None
    found_inf: Tensor | None

    def __init__(self, params: ParamsT, defaults: dict[str, Any], options: Options) -> None:
        unknown = sorted(set(options) - set(OPTION_DEFAULTS))
        if unknown:
            known = [*checks.arguments_of(type(self), FusedOptimizer), *OPTION_DEFAULTS]
            raise TypeError(f"{type(self).__name__} does not know the options {unknown}; it has {known}")
        self._plan: _Plan | None = None
        self._skipped: Tensor | None = None
        defaults = {**defaults, **OPTION_DEFAULTS, **self._preset, **options}
        check_group(defaults)
        super().__init__(params, defaults)

    @abstractmethod
    def _rule(self, group: Mapping[str, Any]) -> Rule:
        """The rule that the parameters of a group follow."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters with options of their own, as ``torch.optim.Optimizer`` does.

        Raises:
            ValueError: an option out of range, or storage that does not fit a parameter.
            TypeError: a value or a tensor of a type that no rule updates.
        """
        index = len(self.param_groups)
        checks.list_params(param_group)
        storage.check_leaves(index, param_group)
        super().add_param_group(param_group)
        try:
            check_group(self.param_groups[index])
            for position, param in enumerate(self.param_groups[index]["params"]):
                storage.check_parameter(self._name(index, position), param)
                self._key(index, position, param)
        except Exception:
            self.param_groups.pop()
            raise
        self._plan = None

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], Loss]) -> Loss: ...

    @torch._disable_dynamo
    @hooked
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Updates every parameter that has a gradient, or none.

        Args:
            closure: recomputes the loss and the gradients before the update.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            ValueError: sparse gradients, parameters that share memory, states that do not fit.
            RuntimeError: inside CUDA graph capture without ``capturable=True`` or without a warm-up.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # What torch.no_grad() makes and calls, without its detours: they cost 20 us after a backward.
        with torch.set_grad_enabled(False):
            buckets: list[Bucket] = []
            try:
                buckets = self._collect()
                self._update(buckets)
            except Exception:
                # Somebody may have set an option to what the constructor would have refused.
                check_changed(self.param_groups)
                raise
            finally:
                for bucket in buckets:
                    bucket.release()
        return loss

    @property
    def skipped_steps(self) -> int:
        """Steps that changed nothing because of ``skip_nonfinite`` or a loss scaler (reads the device)."""
        return 0 if self._skipped is None else int(self._skipped)

    @torch._disable_dynamo
    def state_dict(self, *, portable: bool = False) -> dict[str, Any]:
        """The state, exact and as stored; with ``portable=True`` as ``torch.optim`` would keep it.

        Args:
            portable: states decoded to float32 and no options of this library, for ``torch.optim`` or
                for an optimizer here with other codecs. Masks and the dense weights behind them stand under
                a key that ``torch.optim`` ignores. Bits that ``param_codec`` keeps beside a parameter are
                left out: :func:`fused_optim.full_precision` gives its weights whole.
        """
        return checkpoint.save(self, portable, self._unknown_to_torch)

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what :meth:`state_dict` gave, here or in ``torch.optim``; states keep their codecs.

        Args:
            state_dict: from this library (same codecs, or ``portable=True``) or from the
                ``torch.optim`` class of the same name. Its tensors are copied.

        Raises:
            ValueError: it belongs to another model, another optimizer or other codecs. Nothing has
                changed then.
            TypeError: it is no dict.
        """
        if not isinstance(state_dict, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"a state dict is a dict, got {type(state_dict).__name__}: {state_dict!r}")
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            result = hook(self, state_dict)
            state_dict = state_dict if result is None else result
        groups, state, skipped = checkpoint.unpack(self, state_dict)
        self.__setstate__({"state": state, "param_groups": groups, "_skipped": skipped})
        masking.show_loaded(self)
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def __getstate__(self) -> dict[str, Any]:
        marks = marks_of(param for _, _, param in self._parameters())
        return {**super().__getstate__(), "_skipped": self._skipped, "_marks": marks}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Copies have their marks by now; held any longer, these would keep replaced parameters alive.
        super().__setstate__({name: value for name, value in state.items() if name != "_marks"})
        self._plan = None
        for group in self.param_groups:
            for name, default in self.defaults.items():
                group.setdefault(name, default)

    def _parameter_name(self, group: int, position: int) -> str:
        """What the user calls a parameter; empty if it came without a name."""
        names = self.param_groups[group].get("param_names")
        return names[position] if names else ""

    def _name(self, group: int, position: int) -> str:
        name = self._parameter_name(group, position)
        return f"parameter {position} of group {group}" + (f" ({name!r})" if name else "")

    def _key(self, group_index: int, position: int, param: Tensor) -> Key:
        """Which bucket a parameter belongs to, its gradient being stored as itself."""
        group, name = self.param_groups[group_index], self._name(group_index, position)
        own_name = self._parameter_name(group_index, position)
        rule, cut, finder = self._rule_of(group, name, own_name, param)
        param_codec, states = storage.codecs(name, own_name, param, group, rule)
        driver = dispatch.choose(param.device.type, (param_codec, *states), group["backend"])
        grad_codec = storage.plain_codec(param)
        codecs = (param_codec, grad_codec, *states)
        exact = dispatch.choose_exact(param.device.type, group["arithmetic"], rule, codecs)
        key = Key(param.device, rule, param_codec, grad_codec, states, driver, exact, finder=finder)
        adjusts = couples_l2(rule, group) or (rule.inner is not None and group["sparsity"].adjusts_gradients)
        return key if cut is None else key._replace(cut=cut, adjusts_gradients=adjusts)

    def _rule_of(
        self, group: Mapping[str, Any], name: str, own_name: str, param: Tensor
    ) -> tuple[Rule, MatrixCut | None, Finder | None]:
        """A parameter's rule, with the states of its matrices and masks, and what happens to these."""
        rule, cut = self._rule(group), self._cut(group, name, own_name, param)
        rule = rule if cut is None else replace(rule, shared=cut.shared)
        if group["sparsity"] is None:
            return rule, cut, None
        inner, state = replace(self._masked_rule(group), shared=rule.shared), self.state.get(param, {})
        masked, finder = masking.find(group["sparsity"], inner, name, own_name, param, state)
        return masked or rule, cut, finder

    def _masked_rule(self, group: Mapping[str, Any]) -> Rule:
        """The rule of the parameters of a group that have masks."""
        return self._rule(group)

    def _cut(self, group: Mapping[str, Any], name: str, own_name: str, param: Tensor) -> MatrixCut | None:
        """What happens to a parameter's update as a matrix; ``name`` is for messages."""
        return None if group["spectral"] is None else group["spectral"].cut(name, own_name, param)

    def _needs_norm(self) -> bool:
        return any(
            group["clip_grad_norm"] is not None or group["skip_nonfinite"] for group in self.param_groups
        )

    def _signature(self) -> list[tuple[Any, ...]]:
        """The options that decide about buckets and their checks."""
        engine = [tuple(map(group.get, ENGINE_OPTIONS)) for group in self.param_groups]
        rules = [self._rule(group).name for group in self.param_groups]
        own = [tuple(map(group.get, self._planned_options)) for group in self.param_groups]
        # A copy: somebody may change one of several codecs in place.
        codecs = [group["state_codec"] for group in self.param_groups]
        codecs = [codec if isinstance(codec, str) else dict(codec) for codec in codecs]
        return [(self._needs_norm(),), *zip(rules, own, engine, codecs, strict=True)]

    def _collect(self) -> list[Bucket]:
        """The buckets of this step with its gradients, planned anew where something moved."""
        capturable = any(group["capturable"] for group in self.param_groups)
        capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
        if capturing and not capturable:
            raise RuntimeError(
                f"CUDA graph capture of {type(self).__name__}.step() needs capturable=True in its groups"
            )
        skipping = any(group["skip_nonfinite"] for group in self.param_groups)
        on_device = capturable or skipping or hasattr(self, "found_inf")
        plan = self._plan
        if plan is not None and self._still_valid(plan, on_device):
            return self._without_aliases(plan)
        if capturing:
            raise RuntimeError(
                "step() must run once before CUDA graph capture, with the parameters, states and options "
                "that the graph will use: the plan of its launches cannot be made while capturing"
            )
        self._plan = None
        plan = self._make_plan(on_device)
        collected = [bucket.collect() for bucket in plan.buckets]
        assert all(collected)
        self._plan = plan
        return self._without_aliases(plan)

    def _without_aliases(self, plan: _Plan) -> list[Bucket]:
        """The plan's buckets, none of whose gradients lies in memory that the step changes."""
        for bucket in plan.buckets:
            index = bucket.find_aliased(plan.occupied)
            if index is not None:
                places = {id(param): (group, i) for group, i, param in self._parameters()}
                name = self._name(*places[id(bucket.owners[index])])
                raise ValueError(
                    f"the gradient of {name} lies in memory that the step changes (a parameter or a state); "
                    "assign a copy: p.grad = grad.clone()"
                )
        return plan.buckets

    def _still_valid(self, plan: _Plan, on_device: bool) -> bool:
        return (
            self._same_parameters(plan.groups)
            and all(p.grad is None for p in plan.idle)
            and self.state is plan.state
            and plan.unchanged.check()
            and (plan.steps_on_device or not on_device)
            and self._signature() == plan.signature
            and all(bucket.collect() for bucket in plan.buckets)
            and masking.in_frame(plan.buckets, self.param_groups)
        )

    def _same_parameters(self, planned: list[list[Tensor]]) -> bool:
        groups = [group["params"] for group in self.param_groups]
        return len(groups) == len(planned) and all(map(same_objects, groups, planned))

    def _parameters(self) -> Iterator[tuple[int, int, Tensor]]:
        for group_index, group in enumerate(self.param_groups):
            for position, param in enumerate(group["params"]):
                yield group_index, position, param

    def _make_plan(self, on_device: bool) -> _Plan:
        check_changed(self.param_groups)
        active = [(g, i, p) for g, i, p in self._parameters() if p.grad is not None]
        keys = [self._checked_key(*item) for item in active]
        locals_ = [storage.local_view(p) for _, _, p in active]
        checks.check_apart([self._name(group, position) for group, position, _ in active], locals_)
        for (group, position, _), key in zip(active, keys, strict=True):
            masking.complete(self, group, position, key, on_device)
        everything = [p for _, _, p in self._parameters()]
        ordinals = {id(param): index for index, param in enumerate(everything)}
        members = [
            Member(
                *(key, group, param, self.state[param], storage.local_view, ordinals[id(param)]),
                drawn=shards.drawn_before(param),
            )
            for (group, _, param), key in zip(active, keys, strict=True)
        ]
        groups = [list(group["params"]) for group in self.param_groups]
        idle = [p for p in everything if p.grad is None]
        buckets = build(members, on_device)
        occupied = Occupied(chain.from_iterable(bucket.written() for bucket in buckets))
        unchanged = NativeDictGuards([self.state, *(member.state for member in members)])
        return _Plan(buckets, groups, idle, self._signature(), on_device, self.state, unchanged, occupied)

    def _checked_key(self, group: int, position: int, param: Tensor) -> Key:
        """The bucket of a parameter with its gradient, after every check that could refuse it."""
        name, grad = self._name(group, position), param.grad
        assert grad is not None
        storage.check_parameter(name, param)
        checks.check_memory(name, param)
        grad_codec = storage.check_gradient(name, param, grad)
        key = self._key(group, position, param)
        storage.check_state(name, self.state.get(param, {}), param, key.rule, key.param, key.states)
        if param.ndim >= MAX_DIMS:
            layout = layout_of(storage.local_view(param), storage.local_view(grad))
            backend = self.param_groups[group]["backend"]
            key = key._replace(driver=dispatch.that_walks(layout, name, key.driver, backend))
        shared = key.cut is not None or self._needs_norm()
        return key._replace(grad=grad_codec, spread=shards.spread(param) if shared else None)

    def _update(self, buckets: list[Bucket]) -> None:
        """Prepares all rows, then launches: an error in a row leaves every tensor as it was."""
        clips = [group["clip_grad_norm"] for group in self.param_groups]
        skipping = any(group["skip_nonfinite"] for group in self.param_groups)
        total = norm.square_sum(buckets) if self._needs_norm() else None
        skipping = skipping and total is not None
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        controls: dict[torch.device, Control] = {}
        for bucket in buckets:
            if bucket.device not in controls:
                controls[bucket.device] = control(bucket.device, scale, found_inf, total, clips, skipping)
        updated = [bucket for bucket in buckets if controls[bucket.device].active is not False]
        for bucket in updated:
            bucket.prepare(self.param_groups, controls[bucket.device])
        self._count_skipped(controls)
        for bucket in updated:
            bucket.commit()
        for bucket in updated:
            bucket.run()
            # Kernels write behind autograd's back; a graph that saved a parameter must notice.
            increment_version(bucket.owners)

    def _count_skipped(self, controls: Mapping[torch.device, Control]) -> None:
        """Adds one, on the first device, if this step is skipped there (it is skipped everywhere)."""
        for device, ctl in controls.items():
            if ctl.active is not None:
                skipped = torch.as_tensor(ctl.active, device=device).logical_not().to(torch.int64)
                self._skipped = skipped if self._skipped is None else self._skipped.to(device).add_(skipped)
                return
