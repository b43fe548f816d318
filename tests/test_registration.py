"""How the ops sit in torch: schemas, fakes, compilation, autograd, global settings, strides."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import bounds
import pytest
import torch
from glora_ops.bindings.checks import NUMBERS
from glora_ops.bindings.library import OPS, Op
from strategies import Recipe, build

import glora_ops
from glora_ops import CLIENT_STATS, STATS, GloraError, pack_modules

FACTORS = [
    build(Recipe(seed=s, ranks=(3, 1, 4), weights="uneven", condition=10.0)).clients
    for s in range(2)
]


def operands(batched: bool, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Inputs every op can be called with, of two modules or of one."""
    packed = pack_modules(FACTORS)
    b, a = packed.b.to(dtype), packed.a.to(dtype)
    s, w = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.5, 0.2, 0.3])
    t_u, _, _, f = torch.ops.glora.canonicalize(b, a, packed.offsets, s)
    g = torch.Generator().manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    out = {
        "b": b,
        "a": a,
        "t": t_u,
        "f": f,
        "u": torch.randn(2, 20, 4, generator=g, dtype=wide),
        "v": torch.randn(2, 16, 4, generator=g, dtype=wide),
        "s": torch.rand(2, 4, generator=g, dtype=torch.float64).sort(descending=True).values,
    }
    if not batched:
        out = {name: x[0] for name, x in out.items()}
    return out | {"offsets": packed.offsets, "w": w, "scaling": s}


def calls(batched: bool, dtype: torch.dtype = torch.float32) -> dict[str, tuple[tuple, dict]]:
    """(args, kwargs) of each overload."""
    x = operands(batched, dtype)
    b, a, o, w, s = x["b"], x["a"], x["offsets"], x["w"], x["scaling"]
    out = {
        "canonicalize": ((b, a, o, s), {"max_rank": 4}),
        "projector_matmul": ((b, o, x["t"], x["f"], x["u"]), {}),
        "projector_matmul.factors": ((b, o, w, x["u"]), {}),
        "projector_svd": ((b, o, x["t"], x["f"], 3), {"extra": x["u"]}),
        "projector_svd.factors": ((b, o, w, 3), {"seed": 2}),
        "core": ((x["u"], x["v"], b, a, o, w, s), {}),
        "aggregate": ((b, a, o, w, s, 4), {}),
        "client_stats": ((b, a, o, w, s, x["u"], x["s"], x["v"]), {}),
        "readout": ((x["u"], x["s"], x["v"], 6, 2.0, "trainable"), {}),
    }
    if not batched:
        pairs = [(p.to(dtype), q.to(dtype)) for p, q in FACTORS[0]]
        lists = [p for p, _ in pairs], [q for _, q in pairs]
        out["aggregate.list"] = ((*lists, w, s, 4), {})
    return out


def overload(name: str):
    base, _, which = name.partition(".")
    return getattr(getattr(torch.ops.glora, base), which or "default")


CASES = [(name, batched) for batched in (False, True) for name in calls(batched)]
IDS = [f"{name}-{'modules' if batched else 'one'}" for name, batched in CASES]


def as_tuple(out) -> tuple[torch.Tensor, ...]:
    return (out,) if isinstance(out, torch.Tensor) else tuple(out)


def test_every_op_of_the_contract_is_registered_and_tried_here():
    assert set(OPS) == {name for name, _ in CASES}
    for name in OPS:
        schema = overload(name)._schema
        assert not schema.is_mutable
        assert all(r.alias_info is None for r in schema.returns)


def test_every_argument_is_one_of_the_table_and_the_other_way_round():
    used = {name for op in OPS.values() for name in op.arguments}
    table = {name for name, kind in Op.__annotations__.items() if "ClassVar" not in kind}
    assert used == table
    assert NUMBERS.keys() <= table


def test_an_op_is_found_by_the_arguments_of_its_overload():
    (x, offsets, weights, omega), _ = calls(False)["projector_matmul.factors"]
    op = torch.ops.glora.projector_matmul
    assert torch.equal(op(x, offsets, weights, omega), op.factors(x, offsets, weights, omega))


@pytest.mark.parametrize(("name", "batched"), CASES, ids=IDS)
def test_opcheck(name, batched):
    args, kwargs = calls(batched)[name]
    torch.library.opcheck(overload(name), args, kwargs)


@pytest.mark.parametrize("basis", ["projector", "update"])
def test_opcheck_of_the_other_bases(basis):
    args, kwargs = calls(False)["aggregate"]
    torch.library.opcheck(torch.ops.glora.aggregate.default, args, {**kwargs, "basis": basis})


def test_opcheck_of_a_canonical_form_of_unknown_width():
    args, _ = calls(False)["canonicalize"]
    torch.library.opcheck(
        torch.ops.glora.canonicalize.default,
        args,
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "batched"), CASES, ids=IDS)
def test_fakes_tell_the_truth(name, batched, dtype):
    """Shapes, dtypes and strides of the fake are those of the op, for every dtype."""
    args, kwargs = calls(batched, dtype)[name]
    real = as_tuple(overload(name)(*args, **kwargs))
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake_args = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, args)
        fake_kwargs = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, kwargs)
        fake = as_tuple(overload(name)(*fake_args, **fake_kwargs))
    for x, y in zip(real, fake, strict=True):
        assert x.shape == y.shape
        assert x.dtype == y.dtype
        assert x.stride() == y.stride()
        assert x.is_contiguous()


def test_small_results_are_fp64_and_large_ones_working_precision():
    args, _ = calls(False, torch.bfloat16)["aggregate"]
    u, s, v, eig_u, eig_v, stats, client_stats = torch.ops.glora.aggregate(*args)
    assert u.dtype == v.dtype == torch.float32
    assert {x.dtype for x in (s, eig_u, eig_v, stats, client_stats)} == {torch.float64}
    assert stats.shape == (len(STATS),) == (16,)
    assert client_stats.shape == (3, len(CLIENT_STATS)) == (3, 4)
    args, _ = calls(False, torch.float64)["aggregate"]
    assert torch.ops.glora.aggregate(*args)[0].dtype == torch.float64


@pytest.mark.parametrize(("name", "batched"), CASES, ids=IDS)
def test_no_output_aliases_an_input_or_another(name, batched):
    args, kwargs = calls(batched)[name]
    inputs = [
        x.untyped_storage().data_ptr()
        for x in torch.utils._pytree.tree_leaves((args, kwargs))
        if isinstance(x, torch.Tensor)
    ]
    outputs = [x.untyped_storage().data_ptr() for x in as_tuple(overload(name)(*args, **kwargs))]
    assert len(set(outputs)) == len(outputs)
    assert not set(outputs) & set(inputs)


def test_readout_without_padding_does_not_alias_the_state():
    x = operands(False)
    b, a = torch.ops.glora.readout(x["u"], x["s"], x["v"], 4)
    storages = [t.untyped_storage().data_ptr() for t in (x["u"], x["v"], b, a)]
    assert len(set(storages)) == 4


@pytest.mark.parametrize(("name", "batched"), CASES, ids=IDS)
def test_compiles_as_one_graph(name, batched):
    args, kwargs = calls(batched)[name]
    op = overload(name)

    def model(*args):
        return tuple(2 * x for x in as_tuple(op(*args, **kwargs)))

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for x, y in zip(compiled(*args), model(*args), strict=True):
        assert torch.equal(x, y)


def test_a_whole_server_step_compiles_as_one_graph():
    x = operands(False)

    def server(b, a, w, s):
        u, sigma, v, *_ = torch.ops.glora.aggregate(b, a, x["offsets"], w, s, 4)
        return torch.ops.glora.readout(u, sigma, v, 2, 2.0, "trainable")

    torch._dynamo.reset()
    args = x["b"], x["a"], x["w"], x["scaling"]
    compiled = torch.compile(server, fullgraph=True, backend="aot_eager")
    for one, two in zip(compiled(*args), server(*args), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(("name", "batched"), CASES, ids=IDS)
def test_gradients_are_refused_by_name(name, batched):
    args, kwargs = calls(batched)[name]
    leaves, spec = torch.utils._pytree.tree_flatten(args)
    at = next(i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor))
    leaves[at] = leaves[at].clone().requires_grad_()
    args = torch.utils._pytree.tree_unflatten(leaves, spec)
    with pytest.raises(GloraError, match=rf"glora\.{name}.*detach"):
        overload(name)(*args, **kwargs)
    with torch.no_grad():
        out = as_tuple(overload(name)(*args, **kwargs))
    assert not any(x.requires_grad for x in out)


def test_the_python_api_detaches():
    pairs = [(b.clone().requires_grad_(), a.clone().requires_grad_()) for b, a in FACTORS[0]]
    state = glora_ops.aggregate(pairs, rank=4)
    b, _ = state.readout(2)
    assert not b.requires_grad


@contextmanager
def autocast() -> Iterator[None]:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        yield


@contextmanager
def medium() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def bf16_backend() -> Iterator[None]:
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


@contextmanager
def float64_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "setting", [autocast, medium, bf16_backend, float64_by_default, torch.inference_mode]
)
@pytest.mark.parametrize(("name", "batched"), CASES, ids=IDS)
def test_results_do_not_depend_on_the_callers_settings(name, batched, setting):
    args, kwargs = calls(batched)[name]
    want = as_tuple(overload(name)(*args, **kwargs))
    with setting():
        precision = torch.backends.mkldnn.matmul.fp32_precision
        got = as_tuple(overload(name)(*args, **kwargs))
        assert torch.backends.mkldnn.matmul.fp32_precision == precision
    for x, y in zip(got, want, strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


def test_settings_are_left_as_they_were_even_after_an_error():
    args, _ = calls(False)["aggregate"]
    with bf16_backend():
        with pytest.raises(GloraError):
            torch.ops.glora.aggregate(*args[:-1], 0)
        torch.ops.glora.aggregate(*args)
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"


def strided(x: torch.Tensor, kind: str) -> torch.Tensor:
    """The same numbers with other strides."""
    if x.dim() < 2 or not x.is_floating_point():
        return x
    if kind == "transposed":
        return x.mT.contiguous().mT
    wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1] + 1)
    wide[..., 1::2] = x
    return wide[..., 1::2]


@pytest.mark.parametrize("kind", ["transposed", "gapped"])
@pytest.mark.parametrize(("name", "batched"), CASES, ids=IDS)
def test_any_strides_in_contiguous_out(name, batched, kind):
    args, kwargs = calls(batched)[name]
    want = as_tuple(overload(name)(*args, **kwargs))
    args, kwargs = torch.utils._pytree.tree_map_only(
        torch.Tensor, lambda x: strided(x, kind), (args, kwargs)
    )
    leaves = torch.utils._pytree.tree_leaves((args, kwargs))
    assert any(isinstance(x, torch.Tensor) and not x.is_contiguous() for x in leaves)
    got = as_tuple(overload(name)(*args, **kwargs))
    for x, y in zip(got, want, strict=True):
        assert x.is_contiguous()
        assert torch.allclose(x, y, rtol=1e-4, atol=32 * bounds.U32 * float(y.abs().max()))


def test_the_list_form_is_the_packed_form_bit_for_bit():
    (b, a, offsets, w, s, rank), _ = calls(False)["aggregate"]
    packed = torch.ops.glora.aggregate(b, a, offsets, w, s, rank, "consensus", seed=3)
    lists, _ = calls(False)["aggregate.list"]
    listed = torch.ops.glora.aggregate.list(*lists[:2], w, s, rank, "consensus", seed=3)
    ragged = [(p[:, : p.shape[1]], q) for p, q in FACTORS[0]]
    assert len({p.shape for p, _ in ragged}) > 1
    for x, y in zip(packed, listed, strict=True):
        assert torch.equal(x, y)


def test_weights_and_scalings_may_be_of_any_float_dtype_and_per_module():
    (b, a, offsets, w, s, rank), _ = calls(True)["aggregate"]
    w, s = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([1.0, -2.0, 0.5])
    want = torch.ops.glora.aggregate(b, a, offsets, w, s, rank)
    for dtype in (torch.float64, torch.bfloat16):
        got = torch.ops.glora.aggregate(b, a, offsets, w.to(dtype), s.to(dtype), rank)
        assert all(torch.equal(x, y) for x, y in zip(want, got, strict=True))
    got = torch.ops.glora.aggregate(b, a, offsets, w.expand(2, 3), s.expand(2, 3), rank)
    assert all(torch.equal(x, y) for x, y in zip(want, got, strict=True))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"b": torch.ones(3, 8)}, r"a: got float32 \(2, 6\).*b"),
        ({"b": torch.ones(2, 8, dtype=torch.int32)}, "b: got int32"),
        ({"b": torch.ones(2, 0)}, "b: "),
        ({"offsets": torch.tensor([0, 1])}, r"weights|offsets"),
        ({"offsets": torch.tensor([0, 1, 3])}, r"offsets.*2 rows"),
        ({"offsets": torch.tensor([0, 3, 2])}, "offsets"),
        ({"offsets": torch.tensor([0.0, 1, 2])}, "offsets"),
        ({"weights": torch.ones(3)}, r"weights: got float32 \(3,\)"),
        ({"scaling": torch.ones(1)}, "scaling"),
        ({"rank": 0}, "rank: got 0"),
        ({"basis": "mean"}, r"basis: got 'mean'.*consensus"),
        ({"tau_rel": -1.0}, "tau_rel"),
        ({"anchor": -0.1}, "anchor"),
        ({"oversample": 0}, "oversample"),
        ({"power_iters": -2}, "power_iters"),
        ({"tol": 0.0}, "tol"),
        ({"warm_u": torch.ones(7, 2)}, "warm_u"),
        ({"warm_v": torch.ones(8, 2)}, "warm_v"),
    ],
)
def test_what_does_not_fit_is_named_with_its_value(change, says):
    args = {
        "b": torch.ones(2, 8),
        "a": torch.ones(2, 6),
        "offsets": torch.tensor([0, 1, 2]),
        "weights": torch.ones(2),
        "scaling": torch.ones(2),
        "rank": 1,
    }
    with pytest.raises(GloraError, match=says):
        torch.ops.glora.aggregate(**(args | change))


def named(name):
    """Arguments of an op as the call above has them, by name."""
    args, kwargs = calls(False)[name]
    given = [a.name for a in overload(name)._schema.arguments]
    return dict(zip(given, args, strict=False)) | kwargs


NAN, INF = float("nan"), float("inf")
EYE = torch.eye(20, 4)
MISFITS = [
    ("canonicalize", {"tau_rel": INF}, "tau_rel: got inf"),
    ("canonicalize", {"tau_rel": -0.1}, r"tau_rel: got -0\.1"),
    ("canonicalize", {"tau_rel": NAN}, "tau_rel: got nan"),
    ("canonicalize", {"max_rank": 0}, "max_rank: got 0"),
    ("canonicalize", {"max_rank": -2}, "max_rank: got -2"),
    ("canonicalize", {"scaling": torch.ones(3, dtype=torch.complex64)}, "scaling: got complex64"),
    ("canonicalize", {"offsets": torch.tensor([0])}, "offsets: got int64"),
    ("canonicalize", {"b": torch.ones(8, 20, dtype=torch.bool)}, "b: got bool"),
    ("projector_matmul", {"omega": EYE.int()}, "omega: got int32"),
    ("projector_matmul", {"omega": EYE.cfloat()}, "omega: got complex64"),
    ("projector_matmul", {"t": torch.ones(8, 4).long()}, "t: got int64"),
    ("projector_matmul", {"row_weights": torch.ones(8).bool()}, "row_weights: got bool"),
    ("projector_matmul", {"row_weights": torch.ones(3)}, r"row_weights: got float32 \(3,\)"),
    ("projector_matmul.factors", {"omega": EYE.int()}, "omega: got int32"),
    ("projector_matmul.factors", {"weights": torch.ones(3).cfloat()}, "weights: got complex64"),
    ("projector_matmul.factors", {"offsets": torch.tensor([0.0, 8])}, "offsets: got float32"),
    ("projector_svd", {"extra": EYE.int()}, "extra: got int32"),
    ("projector_svd", {"warm": EYE.cfloat()}, "warm: got complex64"),
    ("projector_svd", {"tol": NAN}, "tol: got nan"),
    ("projector_svd.factors", {"weights": torch.ones(2)}, r"weights: got float32 \(2,\)"),
    ("projector_svd.factors", {"offsets": torch.tensor([0.0, 8])}, "offsets: got float32"),
    ("projector_svd.factors", {"tol": INF}, "tol: got inf"),
    ("core", {"u": EYE.int()}, "u: got int32"),
    ("core", {"v": torch.ones(16, 4).cfloat()}, "v: got complex64"),
    ("core", {"offsets": torch.tensor([0.0, 8])}, "offsets: got float32"),
    ("core", {"weights": torch.ones(2)}, r"weights: got float32 \(2,\)"),
    ("core", {"scaling": torch.ones(3).bool()}, "scaling: got bool"),
    ("aggregate", {"weights": torch.ones(3).cfloat()}, "weights: got complex64"),
    ("aggregate", {"anchor": INF}, "anchor: got inf"),
    ("aggregate", {"tau_rel": INF}, "tau_rel: got inf"),
    ("aggregate", {"warm_u": EYE.int()}, "warm_u: got int32"),
    ("aggregate.list", {"weights": torch.ones(3).cfloat()}, "weights: got complex64"),
    ("aggregate.list", {"scaling": torch.ones(4)}, r"scaling: got float32 \(4,\)"),
    ("aggregate.list", {"warm_v": torch.ones(5, 2)}, r"warm_v: got float32 \(5, 2\)"),
    ("aggregate.list", {"lora_A": [torch.ones(1)] * 3}, "client 0: got lora_B"),
    ("aggregate.list", {"lora_A": []}, "lora_A: got 0 matrices"),
    ("readout", {"scaling": INF}, "scaling: got inf"),
    ("readout", {"scaling": NAN}, "scaling: got nan"),
    ("readout", {"u": EYE.int()}, "u: got int32"),
    ("readout", {"u": EYE.double()}, r"v: got float32 .* expected float64, as u"),
    ("readout", {"s": torch.ones(4).cfloat()}, "s: got complex64"),
    ("readout", {"u": torch.ones(4)}, r"u: got float32 \(4,\)"),
    ("readout", {"rank": 0}, "rank: got 0"),
    ("readout", {"pad": "ones"}, "pad: got 'ones'"),
]


@pytest.mark.parametrize(("name", "change", "says"), MISFITS)
def test_op_and_fake_refuse_the_same_in_the_same_words(name, change, says):
    arguments = named(name) | change
    with pytest.raises(GloraError, match=says) as real:
        overload(name)(**arguments)
    with torch._subclasses.FakeTensorMode() as mode:
        arguments = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, arguments)
        with pytest.raises(GloraError) as fake:
            overload(name)(**arguments)
    assert str(fake.value) == str(real.value)


def test_weights_may_be_numbers_of_examples():
    (b, a, offsets, _, s, rank), _ = calls(False)["aggregate"]
    counts = torch.tensor([600, 200, 100])
    got = torch.ops.glora.aggregate(b, a, offsets, counts, s, rank)
    want = torch.ops.glora.aggregate(b, a, offsets, counts.double(), s, rank)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
