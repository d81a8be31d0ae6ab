"""Steps that are cut by whole matrices: SPECTRA with every rule and storage, on every backend."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import fused_optim
from fused_optim.kernels.control import Control
from fused_optim.kernels.matrix import MatrixBucket
from fused_optim.sparsity import OneShot
from fused_optim.spectral import ClipSchedule, Hypersphere, SpectralClip
from tests import cases
from tests.cases import EVERY_TARGET, INTERPRETER, TARGETS, Target, assert_same_bits
from tests.oracles.adam import adam
from tests.oracles.adamw import adamw
from tests.oracles.lion import lion
from tests.oracles.matrices import soft_clip, spectra
from tests.oracles.sgd import sgd

STEPS = 5
SHAPES = ((12, 8), (8, 12), (8, 8), (12, 8), (3, 6, 5), (6, 3, 2, 2), (7,), (1, 9), (0, 4), ())
RULES: dict[str, tuple[Any, Callable[..., Any], dict[str, Any]]] = {
    "AdamW": (fused_optim.AdamW, adamw, {"weight_decay": 0.1}),
    "AdamW-amsgrad,maximize": (fused_optim.AdamW, adamw, {"amsgrad": True, "maximize": True}),
    "Adam-coupled": (fused_optim.Adam, adam, {"weight_decay": 0.1}),
    "Lion": (fused_optim.Lion, lion, {"weight_decay": 0.1, "lr": 0.01}),
    "SGD": (fused_optim.SGD, sgd, {"weight_decay": 0.1}),
    "SGD-nesterov": (fused_optim.SGD, sgd, {"momentum": 0.9, "nesterov": True}),
}


def _matrices(x: np.ndarray) -> np.ndarray:
    """As the option sees a tensor: stacks as they are, convolutions flattened, vectors alone."""
    return x.reshape(len(x), -1) if x.ndim > 3 else x


def _on(function: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    return lambda x: function(_matrices(x)).reshape(x.shape) if x.ndim and x.size else x


def _params(dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [
        Parameter(torch.randn(shape, generator=generator).to(device=device, dtype=dtype)) for shape in SHAPES
    ]


def _set_gradients(params: list[Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p)


@pytest.mark.parametrize("clips", [(0.7, None), (None, 0.5), (0.7, 0.5)], ids=["post", "pre", "both"])
@pytest.mark.parametrize("name", RULES)
def test_every_rule_equals_the_paper(name: str, clips: tuple[float | None, float | None]) -> None:
    optimizer_class, oracle, options = RULES[name]
    post, pre = clips
    params, starts = _params(), [p.detach().double().numpy() for p in _params()]
    spectral = SpectralClip(post=post, pre=pre, apply_to="all")
    optimizer = optimizer_class(params, **options, spectral=spectral)
    grads: list[list[np.ndarray]] = [[] for _ in params]
    for step in range(STEPS):
        _set_gradients(params, step)
        for kept, p in zip(grads, params, strict=True):
            assert p.grad is not None
            kept.append(p.grad.double().numpy().copy())
        optimizer.step()
    for p, start, given in zip(params, starts, grads, strict=True):
        hooks = {"update": _on(partial(spectra, c=post))} if post else {}
        hooks |= {"clip": _on(partial(soft_clip, c=pre))} if pre else {}
        expected = oracle(start, given, **options, **hooks)["param"]
        np.testing.assert_allclose(p.detach().numpy(), expected, rtol=2e-5, atol=2e-6)
        plain = oracle(start, given, **options)["param"]
        if p.ndim > 1 and min(p.shape) > 1:
            assert np.abs(plain - expected).max() > 1e-4, "clipping that changes nothing proves nothing"


STORAGES = [
    ("fp32", "fp32"),
    ("fp32", "int8"),
    ("bf16", "bf16"),
    ("bf16_split8", "int8_companded"),
    ("bf16_sr", "int4"),
    ("bf16_kahan", "fp8"),
    ("bf16_split16", "bf16_sr"),
    ("fp16_kahan", "int8"),
]


def _views(dtype: torch.dtype, device: str) -> list[Tensor]:
    """Parameters that lie in memory in every way, of few shapes."""
    values = partial(cases.normal, dtype=dtype)
    return [
        x.to(device)
        for x in (
            values((40, 24), seed=1),
            values((24, 40), seed=2).t(),
            values((40, 48), seed=3)[:, ::2],
            values((40, 24), seed=4),
            values((6, 4, 3, 3), seed=5).contiguous(memory_format=torch.channels_last),
            values((3, 10, 8), seed=6).transpose(1, 2),
            values((33,), seed=7),
        )
    ]


def _trained(storage: tuple[str, str], target: Target, spectral: Any, rule: str) -> list[Any]:
    param_codec, state_codec = storage
    params = [Parameter(x) for x in _views(cases.DTYPES[param_codec], target.device)]
    optimizer = getattr(fused_optim, rule)(
        params,
        lr=0.01,
        param_codec=param_codec,
        state_codec=state_codec,
        keep_fp32=(),
        spectral=spectral,
        seed=7,
        backend=target.backend,
        **({} if target.device == "cpu" else {"arithmetic": "exact"}),
    )
    for step in range(3):
        _set_gradients(params, step)
        optimizer.step()
    return [[p.detach(), *optimizer.state[p].values()] for p in params]


@pytest.mark.parametrize(
    ("storage", "target"),
    [
        pytest.param(storage, *target.values, id=f"{'-'.join(storage)}-{target.id}", marks=target.marks)
        for storage in STORAGES
        for target in TARGETS
        if target is not INTERPRETER or storage in STORAGES[1:4:2]
    ],
)
def test_backends_equal_the_reference(storage: tuple[str, str], target: Target) -> None:
    """Both elementwise halves; between them the same products on every backend of a device."""
    rule = "Lion" if storage[1] in ("int4", "fp8") else "AdamW"
    reference = Target("reference", target.device)
    spectral = SpectralClip(post=0.5, pre=0.8)
    for ours, theirs in zip(
        _trained(storage, target, spectral, rule), _trained(storage, reference, spectral, rule), strict=True
    ):
        for x, y in zip(ours, theirs, strict=True):
            assert_same_bits(x, y)


def test_matrices_share_a_workspace_of_bounded_size() -> None:
    def run(workspace_bytes: int) -> tuple[list[Parameter], list[Any]]:
        params = [Parameter(torch.eye(16) + i) for i in range(10)] + [Parameter(torch.ones(8, 64))]
        spectral = SpectralClip(post=0.3, workspace_bytes=workspace_bytes)
        optimizer = fused_optim.AdamW(params, lr=0.1, spectral=spectral)
        for step in range(2):
            _set_gradients(params, step)
            optimizer.step()
        assert optimizer._plan is not None
        return params, optimizer._plan.buckets

    (whole, together), (parts, apart), (one, alone) = (run(size) for size in (1 << 20, 3 * 106 * 256, 1))
    assert [len(bucket.members) for bucket in together] == [10, 1]
    assert [len(bucket.members) for bucket in apart] == [3, 3, 3, 1, 1]
    assert [len(bucket.members) for bucket in alone] == [1] * 11
    memory = {bucket._batch.untyped_storage().data_ptr() for bucket in apart}
    assert len(memory) == 1, "every launch has a workspace of its own"
    assert apart[0]._batch.untyped_storage().nbytes() <= 3 * 256 * 4
    for p, q, r in zip(whole, parts, one, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(p, r, rtol=1e-6, atol=1e-6)


def test_fused_matrices_are_clipped_one_by_one() -> None:
    q, k, v = (cases.normal((n, 8), torch.float32, seed=n) for n in (8, 4, 4))
    fused, lone = Parameter(torch.cat([q, k, v])), [Parameter(x.clone()) for x in (q, k, v)]
    even = Parameter(torch.cat([k, v]))
    clip = SpectralClip(post=0.5, split={"qkv": (8, 4, 4), "*.kv": 2})
    ours = fused_optim.Lion([("qkv", fused), ("layer.kv", even)], lr=0.1, spectral=clip)
    theirs = fused_optim.Lion(lone, lr=0.1, spectral=SpectralClip(post=0.5))
    for step in range(3):
        _set_gradients(lone, step)
        fused.grad = torch.cat([p.grad for p in lone if p.grad is not None])
        even.grad = fused.grad[8:].clone()
        ours.step()
        theirs.step()
    together = torch.cat([p.detach() for p in lone])
    # The factor for tall matrices is that of the parts.
    torch.testing.assert_close(fused.detach(), together, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(even.detach(), together[8:], rtol=1e-5, atol=1e-6)


def test_one_bad_matrix_leaves_the_others_alone() -> None:
    def run(bad: bool) -> list[Parameter]:
        params = [Parameter(torch.eye(8) * (i + 1)) for i in range(4)]
        optimizer = fused_optim.AdamW(params, lr=0.1, spectral=SpectralClip(post=0.5, pre=1.0))
        _set_gradients(params, 0)
        assert params[2].grad is not None
        params[2].grad[1, 2] = float("nan") if bad else 1.0
        optimizer.step()
        return params

    good, spoilt = run(False), run(True)
    assert spoilt[2].isnan().all()
    for i in (0, 1, 3):
        torch.testing.assert_close(spoilt[i], good[i])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradients_of_pruned_weights_that_do_not_count_may_be_anything(bad: float) -> None:
    def run(of_pruned: float) -> Tensor:
        w = cases.normal((8, 16), torch.float32, 1).requires_grad_()
        optimizer = fused_optim.AdamW([w], lr=0.1, sparsity=OneShot(), spectral=SpectralClip(post=0.5))
        for step in range(3):
            w.grad = cases.normal((8, 16), torch.float32, 5 + step)
            w.grad[w.detach() == 0] = of_pruned
            optimizer.step()
        return w.detach()

    assert_same_bits(run(bad), run(0.0))


@pytest.mark.parametrize("target", EVERY_TARGET[:2])
def test_skipped_steps_change_nothing(target: Target) -> None:
    params = [Parameter(torch.eye(8)), Parameter(torch.ones(3))]
    optimizer = fused_optim.AdamW(
        params, lr=0.1, skip_nonfinite=True, backend=target.backend, spectral=SpectralClip(pre=1.0)
    )
    _set_gradients(params, 0)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    states = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in params]
    _set_gradients(params, 1)
    assert params[0].grad is not None
    params[0].grad[0, 0] = float("inf")
    optimizer.step()
    assert optimizer.skipped_steps == 1
    for p, old, state in zip(params, before, states, strict=True):
        assert_same_bits(p.detach(), old)
        for key, value in state.items():
            assert_same_bits(optimizer.state[p][key], value, key)
    _set_gradients(params, 1)
    optimizer.step()
    assert not torch.equal(params[0], before[0])


def test_clip_grad_norm_and_loss_scale_come_before_the_matrices() -> None:
    plain, scaled = ([Parameter(torch.eye(6))] for _ in range(2))
    clip = SpectralClip(post=None, pre=0.2)
    ours = fused_optim.SGD(plain, lr=1.0, clip_grad_norm=0.5, spectral=clip)
    _set_gradients(plain, 0)
    grad = plain[0].grad
    assert grad is not None
    clipped = grad.double().numpy() * 0.5 / (np.linalg.norm(grad.double().numpy()) + 1e-6)
    ours.step()
    np.testing.assert_allclose(plain[0].detach().numpy(), np.eye(6) - soft_clip(clipped, 0.2), atol=1e-6)
    theirs = fused_optim.SGD(scaled, lr=1.0, clip_grad_norm=0.5, spectral=clip)
    theirs.grad_scale = torch.tensor(1024.0)
    scaled[0].grad = grad * 1024
    theirs.step()
    torch.testing.assert_close(scaled[0], plain[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "spectral", [SpectralClip(0.5, 0.7), Hypersphere(), Hypersphere("current")], ids=repr
)
@pytest.mark.parametrize("rule", ["AdamW", "Adam", "Lion"])
def test_step_counts_that_the_host_never_reads(rule: str, spectral: Any) -> None:
    """As on a GPU with ``capturable``, run on the CPU: rows and thresholds are made on the device."""
    schedule = ClipSchedule(warmup_steps=2, peak_lr=0.1, total_steps=6, decay="cosine", decay_fraction=0.5)
    if isinstance(spectral, SpectralClip):
        spectral = SpectralClip(spectral.post, spectral.pre, schedule)
    options = {"weight_decay": 0.1, "spectral": spectral}

    def groups(params: list[Parameter]) -> Any:
        return [{"params": params[:2], "lr": 0.05}, {"params": params[2:], "lr": 0.02}]

    host, device = ([Parameter(torch.eye(9) * (i + 1)) for i in range(3)] for _ in range(2))
    ours = getattr(fused_optim, rule)(groups(host), **options)
    theirs = getattr(fused_optim, rule)(groups(device), **options)
    bucket: MatrixBucket | None = None
    for step in range(6):
        _set_gradients(host, step)
        _set_gradients(device, step)
        ours.step()
        if bucket is None:
            (planned,) = theirs._make_plan(False).buckets
            memory = torch.zeros(3 * 81)
            bucket = MatrixBucket(planned.members[0].key, planned.members, True, memory)
        assert bucket.collect()
        bucket.prepare(theirs.param_groups, Control([1.0, 1.0], None))
        bucket.commit()
        bucket.run()
    for p, q in zip(host, device, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-7)


def test_new_options_and_learning_rates_are_noticed() -> None:
    params = [Parameter(torch.eye(6))]
    optimizer = fused_optim.SGD(params, lr=1.0, spectral=SpectralClip(post=0.5))
    for options, bound in (
        ({"spectral": SpectralClip(post=0.5)}, 0.5),
        ({"spectral": SpectralClip(post=0.1)}, 0.1),
        ({"lr": 0.5}, 0.05),
    ):
        optimizer.param_groups[0].update(options)
        before = params[0].detach().clone()
        params[0].grad = 100 * torch.eye(6)
        optimizer.step()
        step = torch.linalg.matrix_norm(params[0].detach() - before, 2).item()
        assert 0.99 * bound < step < bound
    optimizer.param_groups[0]["spectral"] = None
    params[0].grad = 100 * torch.eye(6)
    optimizer.step()
    assert params[0].abs().max() > 40


@pytest.mark.parametrize("spectral", [SpectralClip(0.5), Hypersphere()], ids=["clip", "sphere"])
def test_resuming_gives_the_same_bits(spectral: Any) -> None:
    def make() -> tuple[list[Parameter], Any]:
        params = [Parameter(torch.eye(32) * (i + 1)) for i in range(3)]
        return params, fused_optim.AdamW8bit(params, lr=0.05, keep_fp32=(), spectral=spectral)

    whole, ours = make()
    for step in range(6):
        _set_gradients(whole, step)
        ours.step()
        if step == 2:
            saved = io.BytesIO()
            torch.save({"p": whole, "o": ours.state_dict()}, saved)
    resumed, theirs = make()
    loaded = torch.load(io.BytesIO(saved.getvalue()), weights_only=True)
    with torch.no_grad():
        for p, q in zip(resumed, loaded["p"], strict=True):
            p.copy_(q)
    theirs.load_state_dict(loaded["o"])
    for step in range(3, 6):
        _set_gradients(resumed, step)
        theirs.step()
    for p, q in zip(whole, resumed, strict=True):
        assert_same_bits(q.detach(), p.detach())
        for key, value in ours.state[p].items():
            assert_same_bits(theirs.state[q][key], value, key)


@pytest.mark.parametrize("active", [True, False])
def test_a_step_that_the_device_skips_keeps_states_of_rows_and_matrices(active: bool) -> None:
    """The host does not know whether a step happens, so the matrices are computed all the same."""
    params = [Parameter(torch.eye(6) * (i + 1)) for i in range(2)]
    optimizer = fused_optim.Muon(params, lr=0.1, beta2=0.9, radius="fixed")
    _set_gradients(params, 0)
    (planned,) = optimizer._make_plan(False).buckets
    bucket = MatrixBucket(planned.members[0].key, planned.members, True, torch.zeros(72))
    for step, control in enumerate((Control([1.0], None), Control([1.0], torch.tensor(active)))):
        _set_gradients(params, step)
        before = [p.detach().clone() for p in params] + [
            value.clone() for p in params for value in optimizer.state[p].values()
        ]
        assert bucket.collect()
        bucket.prepare(optimizer.param_groups, control)
        bucket.commit()
        bucket.run()
    after = [p.detach() for p in params] + [v for p in params for v in optimizer.state[p].values()]
    changed = [not torch.equal(x, y) for x, y in zip(before, after, strict=True)]
    # Of the states only the radius stays as it was in a step that happens.
    assert sum(changed) == (len(changed) - 2 if active else 0)
