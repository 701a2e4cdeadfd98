"""The choice of a backend, on described devices: no GPU is needed to prove what a P100 would run."""

from __future__ import annotations

import itertools
import random
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import fastattn
from fastattn import backends, contests, functional
from fastattn.arguments import attention_params, varlen_attention_params
from fastattn.backends import CallTraits
from fastattn.contests import Contest
from tests.support.cases import AXES, Case
from tests.support.contract import check
from tests.support.stand_in import installed, stand_in

GPUS = {
    "P100": (6, 0), "GTX 1080": (6, 1), "V100": (7, 0), "T4": (7, 5),
    "A100": (8, 0), "A10": (8, 6), "L4": (8, 9), "H100": (9, 0), "B200": (10, 0),
}  # fmt: skip
FUSED = {"P100": "cuda", "GTX 1080": "cuda", "V100": "cuda", "T4": "cuda"}  # triton on all others


def call_on(gpu: str | None, **changes: Any) -> CallTraits:
    described: dict[str, Any] = {"device_type": "cpu" if gpu is None else "cuda", "capability": gpu and GPUS[gpu]}
    return CallTraits(**{**described, "dtype": torch.float32, "head_dim": 64, "head_dim_v": 64, **changes})


@pytest.fixture
def all_installed() -> Iterator[None]:
    """Every backend's module can be imported."""
    with installed("triton", "cuda", "cpu"):
        yield


@pytest.fixture
def none_installed() -> Iterator[None]:
    """Only the plain torch routes are there."""
    with installed():
        yield


@pytest.fixture
def warned() -> Iterator[set[str]]:
    """An empty record of the warnings given, so that each is given once more."""
    before = set(backends._warned)
    backends._warned.clear()
    yield backends._warned
    backends._warned.update(before)


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [1, 64, 256])
def test_every_gpu_gets_its_kernels(all_installed: None, gpu: str, dtype: torch.dtype, head_dim: int) -> None:
    call = call_on(gpu, dtype=dtype, head_dim=head_dim, head_dim_v=head_dim)
    assert backends.choose(call).name == FUSED.get(gpu, "triton")
    explanation = backends.explain_choice(call)
    assert explanation.backend == FUSED.get(gpu, "triton")
    if gpu in FUSED:
        dotted = ".".join(map(str, GPUS[gpu]))
        assert f"not triton: it needs compute capability >= 8.0, got {dotted}" in str(explanation)


@pytest.mark.parametrize("installed", ["all_installed", "none_installed"])
@pytest.mark.parametrize("gpu", [None, *GPUS])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("head_dims", [(64, 64), (256, 257), (257, 256)])
def test_a_backend_takes_what_it_has_no_reason_against(request, installed, gpu, dtype, head_dims) -> None:
    request.getfixturevalue(installed)
    call = call_on(gpu, dtype=dtype, head_dim=head_dims[0], head_dim_v=head_dims[1])
    for backend in backends.BACKENDS:
        assert backend.takes(call) == (backend.why_not(call) == [])


def test_the_cpu_gets_its_kernels(all_installed: None) -> None:
    explanation = backends.explain_choice(call_on(None))
    assert explanation.backend == "cpu" and explanation.route == "fused kernels, forward and backward"
    assert explanation.refusals == {
        "triton": ["needs a CUDA device, got cpu"],
        "cuda": ["needs a CUDA device, got cpu"],
    }
    for changes in ({"head_dim": 257}, {"dtype": torch.float64}):
        assert backends.choose(call_on(None, **changes)).name == "torch"


def test_the_cpu_runs_torch_where_nothing_is_installed(none_installed: None) -> None:
    explanation = backends.explain_choice(call_on(None))
    assert explanation.backend == "torch" and explanation.route == "F.scaled_dot_product_attention"
    assert explanation.refusals["cpu"] == ["is not part of this installation (no module)"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"head_dim": 257}, "takes head_dim <= 256, got 257"),
        ({"head_dim_v": 300}, "takes head_dim <= 256, got 300"),
        ({"dtype": torch.float64}, "takes float32, float16, bfloat16, got float64"),
    ],
)
def test_falls_back_to_torch_with_a_warning(
    all_installed: None, warned: set[str], changes: dict[str, Any], reason: str
) -> None:
    call = call_on("P100", **changes)
    with pytest.warns(fastattn.FastattnFallbackWarning) as record:
        assert backends.choose(call).name == "torch"
    assert f"cuda {reason}" in str(record[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose(call).name == "torch"  # once per reason
    with pytest.warns(fastattn.FastattnFallbackWarning):
        backends.choose(call._replace(head_dim=512))


def test_missing_kernels_are_a_reason(none_installed: None, warned: set[str]) -> None:
    with pytest.warns(fastattn.FastattnFallbackWarning, match="is not part of this installation"):
        assert backends.choose(call_on("H100")).name == "torch"


def test_no_warning_on_the_cpu(none_installed: None, warned: set[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose(call_on(None, head_dim=512)).name == "torch"
    assert not warned


def test_forcing_is_strict(all_installed: None) -> None:
    with fastattn.use_backend("triton"):
        assert backends.choose(call_on("H100")).name == "triton"
        with pytest.raises(NotImplementedError, match=r"'triton' cannot take this call.*capability >= 8.0, got 6.0"):
            backends.choose(call_on("P100"))
        q = torch.randn(1, 1, 2, 4)
        with pytest.raises(NotImplementedError, match="needs a CUDA device, got cpu"):
            fastattn.scaled_dot_product_attention(q, q, q)


def test_forcing_nests_and_ends(all_installed: None) -> None:
    with fastattn.use_backend("reference"):
        with fastattn.use_backend("torch"):
            assert backends.choose(call_on(None)).name == "torch"
        assert backends.choose(call_on(None)).name == "reference"
        with pytest.raises(RuntimeError), fastattn.use_backend("torch"):
            raise RuntimeError
        assert backends.choose(call_on("H100")).name == "reference"
    assert backends.choose(call_on(None)).name == "cpu"


def test_forcing_an_unknown_backend() -> None:
    rule = "backend: must be one of triton, cuda, cpu, torch, reference, got 'flash'"
    with pytest.raises(ValueError, match=rule), fastattn.use_backend("flash"):
        raise AssertionError("entered")


# ---- the calls that torch's kernel computes faster ----


def test_long_rows_of_float16_are_left_to_torch_where_it_alone_has_tensor_cores(all_installed: None, warned: set[str]):
    lengths, dtypes = (1, 96, 97, 128, 129, 4096), (torch.float32, torch.float16, torch.bfloat16)
    for gpu, dtype, seqlen, needs_grad in itertools.product(GPUS, dtypes, lengths, (False, True)):
        call = call_on(gpu, dtype=dtype, contest=Contest(seqlen, needs_grad))
        limit = {"V100": (None, 96), "T4": (128, 96)}.get(gpu, (None, None))[needs_grad]
        is_left = dtype == torch.float16 and limit is not None and seqlen > limit
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert backends.choose(call).name == ("torch" if is_left else FUSED.get(gpu, "triton")), call
        assert ("leaves" in str(backends.explain_choice(call))) == is_left


@pytest.mark.parametrize(
    "changes",
    [{"is_packed": True}, {"return_lse": True}, {"dropout_p": 0.1}, {"has_softcap": True}, {"has_seqused": True}]
    + [{"bias_dtype": torch.float32}, {"contest": None}],
    ids=str,
)
def test_what_torchs_function_does_not_say_stays(all_installed: None, changes: dict[str, Any]) -> None:
    call = call_on("V100", dtype=torch.float16, contest=Contest(1000, True))
    assert backends.choose(call).name == "torch"
    assert backends.choose(call._replace(**changes)).name == "cuda"


def test_a_named_backend_keeps_what_torch_computes_faster(all_installed: None) -> None:
    call = call_on("T4", dtype=torch.float16, contest=Contest(1000, True))
    explanation = backends.explain_choice(call)
    assert explanation.backend == "torch" and explanation.route == "F.scaled_dot_product_attention"
    assert explanation.refusals["triton"] == ["needs compute capability >= 8.0, got 7.5"]
    assert explanation.refusals["cuda"] == [
        "leaves float16 of more than 96 tokens with a gradient, or 128 without, at compute capability 7.5 to torch's "
        "kernel, which is faster; use_backend keeps it"
    ]
    with fastattn.use_backend("cuda"):
        explanation = backends.explain_choice(call)
    assert explanation.backend == "cuda" and "leaves" not in str(explanation)


def test_a_missing_backend_leaves_nothing(none_installed: None, warned: set[str]) -> None:
    explanation = backends.explain_choice(call_on("T4", dtype=torch.float16, contest=Contest(1000, True)))
    assert explanation.refusals["cuda"] == ["is not part of this installation (no module)"]


def contest_of(q: torch.Tensor, k: torch.Tensor, capability: tuple[int, int] = (7, 0), **arguments) -> Contest | None:
    return contests.of(attention_params(q, k, k, **arguments), capability)


def test_a_contest_knows_the_longer_length_and_whether_a_gradient_is_asked_for() -> None:
    q, k = torch.randn(2, 2, 30, 16).half(), torch.randn(2, 2, 50, 16).half()
    assert contest_of(q, k) == contest_of(k, q) == Contest(50, False)
    assert contest_of(q, k.clone().requires_grad_()) == contest_of(q.clone().requires_grad_(), k) == Contest(50, True)
    bias = torch.zeros(30, 50).half().requires_grad_()
    assert contest_of(q, k, attn_bias=bias) == Contest(50, True)
    with torch.no_grad():
        assert contest_of(q, k, attn_bias=bias) == Contest(50, False)


def test_there_is_no_contest_where_nothing_asks_or_torch_has_no_such_kernel() -> None:
    q, k = torch.randn(2, 2, 30, 16).half(), torch.randn(2, 2, 50, 16).half()
    assert backends.traits(attention_params(q, k, k), False).contest is None
    for capability in ((6, 1), (8, 0)):
        assert contest_of(q, k, capability) is None
    for dtype in (torch.float32, torch.bfloat16):
        assert contest_of(q.to(dtype), k.to(dtype)) is None
    assert contest_of(q[..., :12], k[..., :12]) is None
    assert contest_of(q, k[:, :1], enable_gqa=True) is None
    assert contest_of(q, k.mT.contiguous().mT) is None
    cu_seqlens = torch.tensor([0, 30], dtype=torch.int32)
    packed = varlen_attention_params(*[q[0].transpose(0, 1)] * 3, cu_seqlens, cu_seqlens, 30, 30)
    assert contests.of(packed, (7, 0)) is None
    torch.use_deterministic_algorithms(True)
    try:
        assert contest_of(q, k) is None
    finally:
        torch.use_deterministic_algorithms(False)
    assert contest_of(q, k) == Contest(50, False)


def test_a_contest_is_part_of_a_compiled_graph() -> None:
    def length(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        contest = contest_of(q, k)
        return q.new_zeros(()) if contest is None else q.new_full((), contest.seqlen)

    compiled = torch.compile(length, backend="eager", fullgraph=True)
    for seqlen in (30, 40, 50):
        q = torch.randn(2, 2, seqlen, 16)
        assert (compiled(q.half(), q.half()), compiled(q, q)) == (seqlen, 0)


# ---- the cases in which F.scaled_dot_product_attention says the same ----


def _torch_takes(case: Case) -> bool:
    (q, k, v, bias), arguments = case.make()
    del arguments["return_lse"], arguments["sinks"]
    p = attention_params(q, k, v, attn_bias=bias, **arguments)
    return backends.why_not_sdpa(backends.traits(p, case.return_lse)) is None


def _claimed() -> list[Case]:
    """Every mask, bias and band that torch is trusted with; sizes, dtypes, layouts, heads and scales are drawn."""
    draw = random.Random(0).choice
    cases = []
    for mask, bias, band in itertools.product(AXES["mask"], AXES["bias"], AXES["band"]):
        # Alone, the band is torch's own business, and whether it agrees depends on the lengths.
        for seqlens in AXES["seqlens"] if mask == bias == "none" else [draw(AXES["seqlens"])]:
            axes = {name: draw(AXES[name]) for name in ("dtype", "layout", "heads", "scale", "dims")}
            case = Case(mask=mask, bias=bias, band=band, seqlens=seqlens, return_lse=False, **axes)
            if _torch_takes(case):
                cases.append(case)
    return cases


class SdpaCalls(TorchFunctionMode):
    """Notes with which options F.scaled_dot_product_attention is called."""

    def __init__(self) -> None:
        super().__init__()
        self.options: list[dict[str, Any]] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention:
            self.options.append(kwargs or {})
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=str(case), marks=pytest.mark.long if n % 4 else ()) for n, case in enumerate(_claimed())],
)
def test_torch_says_the_same(case: Case) -> None:
    with SdpaCalls() as calls, fastattn.use_backend("torch"):
        check(case)
    assert len(calls.options) == 2  # the two runs that must agree
    assert not any("is_causal" in options for options in calls.options) or case.mask == case.bias == "none"


def test_ours_in_the_place_of_torchs_does_not_call_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = torch.randn(3, 2, 2, 9, 8).unbind()
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    monkeypatch.setattr(F, "scaled_dot_product_attention", fastattn.scaled_dot_product_attention)
    with fastattn.use_backend("torch"):
        assert torch.equal(F.scaled_dot_product_attention(q, k, v, is_causal=True), expected)


@pytest.mark.parametrize("scale", [-0.5, 0.0])
@pytest.mark.parametrize("seqlens", [(5, 5), (5, 9), (9, 5)])
def test_causal_with_a_scale_that_torch_cannot_take(scale: float, seqlens: tuple[int, int]) -> None:
    """F.scaled_dot_product_attention(is_causal=True) is NaN for scales of 0 and less, in torch 2.7.1 and 2.13.0."""
    with fastattn.use_backend("torch"):
        check(Case(band="causal", scale=scale, seqlens=seqlens, return_lse=False))


def test_torch_is_trusted_with_most_of_the_contract() -> None:
    claimed = _claimed()
    for name in ("mask", "bias", "band", "dtype", "layout", "heads", "scale", "dims", "seqlens"):
        assert {getattr(case, name) for case in claimed} == set(AXES[name])


@pytest.mark.parametrize("seqlens", [(0, 5), (5, 0)])
def test_torch_is_not_trusted_with_the_bias_of_nothing(seqlens: tuple[int, int]) -> None:
    case = Case(bias="full", return_lse=False, seqlens=seqlens)
    assert not _torch_takes(case)
    with fastattn.use_backend("torch"):
        check(case)


# ---- explain ----


def test_explain_names_the_route() -> None:
    q, k = torch.randn(2, 2, 3, 8), torch.randn(2, 2, 5, 8)
    mask = torch.ones(3, 5, dtype=torch.bool)
    assert fastattn.explain(q, k, k).route == "fused kernels, forward and backward"
    with fastattn.use_backend("torch"):
        for kwargs in ({}, {"attn_mask": mask, "is_causal": True, "attn_bias": torch.zeros(3, 5)}, {"window": (1, 1)}):
            assert fastattn.explain(q, k, k, **kwargs).route == "F.scaled_dot_product_attention"
        half, bias = q[:, :, :, :1].bfloat16(), torch.zeros(3, 3)
        assert "the query's dtype" in fastattn.explain(half, half, half, attn_bias=bias).route
        for kwargs, reason in [
            ({"attn_mask": mask, "dropout_p": 0.1}, "dropout bits"),
            ({"return_lse": True}, "log-sum-exp"),
        ]:
            assert reason in fastattn.explain(q, k, k, **kwargs).route
    with fastattn.use_backend("reference"):
        assert fastattn.explain(q, k, k).backend == "reference"


def test_explain_packed_and_copies() -> None:
    x, cu_seqlens = torch.randn(7, 2, 8), torch.tensor([0, 3, 7], dtype=torch.int32)
    with fastattn.use_backend("torch"):
        assert "packed" in fastattn.explain(x, x, x, cu_seqlens, cu_seqlens, 4, 4).route
    strided = torch.randn(7, 8, 2).transpose(1, 2)
    explanation = fastattn.explain(strided, x, x, cu_seqlens, cu_seqlens, 4, 4)
    assert explanation.notes == ("q is copied, because its last dimension is not contiguous",)
    assert "note: q is copied" in str(explanation)


def test_explain_tells_dense_from_packed_as_the_call_does() -> None:
    x, cu_seqlens = torch.randn(7, 2, 8), torch.tensor([0, 3, 7], dtype=torch.int32)
    lengths = {"cu_seqlens_k": cu_seqlens, "max_seqlen_q": 4, "max_seqlen_k": 4}
    q = torch.randn(2, 2, 3, 8)
    with fastattn.use_backend("torch"):
        assert "packed" in fastattn.explain(x, x, x, cu_seqlens, **lengths).route
        assert "dropout" in fastattn.explain(q, q, q, None, 0.5).route
    mask = torch.ones(3, 3, dtype=torch.int32)
    for call in (fastattn.explain, fastattn.scaled_dot_product_attention):
        with pytest.raises(ValueError, match="attn_mask: dtype must be bool .* got torch.int32"):
            call(q, q, q, mask)


def test_explain_draws_no_random_number() -> None:
    q = torch.randn(1, 1, 2, 4)
    before = torch.get_rng_state()
    fastattn.explain(q, q, q, dropout_p=0.5)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("dtype", backends.HALF)
@pytest.mark.parametrize("is_autocast", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_half_precision_is_attended_to_in_float32_on_the_cpu(backend, dtype, is_autocast):
    q, k, v = torch.randn(3, 2, 4, 9, 16).to(dtype).unbind()
    mask = torch.rand(2, 1, 1, 9) < 0.8
    with torch.autocast("cpu", dtype, enabled=is_autocast), fastattn.use_backend(backend):
        out = functional.scaled_dot_product_attention(q, k, v, mask)
        expected = functional.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask)
    assert out.dtype == dtype and torch.equal(out, expected.to(dtype))


# ---- seams for whoever runs kernels elsewhere ----


def test_a_backend_is_allowed_anywhere_in_every_thread(all_installed: None) -> None:
    seen = []
    with backends.anywhere("cuda"):
        thread = threading.Thread(target=lambda: seen.append(backends.choose(call_on(None)).name))
        thread.start()
        thread.join()
        assert backends.get("cuda").why_not(call_on(None)) == []
    assert seen == ["cuda"]
    assert backends.choose(call_on(None)).name == "cpu"
    assert backends.get("cuda").why_not(call_on(None)) == ["needs a CUDA device, got cpu"]


def test_a_record_names_the_devices_it_takes(all_installed: None) -> None:
    with stand_in("cuda", devices=("cpu", "cuda"), min_capability=(7, 0)):
        assert backends.choose(call_on(None)).name == "cuda"
        assert backends.get("cuda").why_not(call_on("P100")) == ["needs compute capability >= 7.0, got 6.0"]
        assert backends.get("cuda").why_not(call_on(None)._replace(device_type="mps")) == [
            "needs a CPU or CUDA device, got mps"
        ]


def test_amds_gpus_run_on_torch(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    call = backends.CallTraits("cuda", (9, 4), torch.float16, 64, 64)
    monkeypatch.setattr(backends, "_warned", set())
    with pytest.warns(fastattn.FastattnFallbackWarning, match="AMD"):
        explanation = backends.explain_choice(call)
    assert explanation.backend == "torch"
    assert all("AMD" in explanation.refusals[name][0] for name in ("triton", "cuda"))
