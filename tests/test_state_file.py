"""State files: nothing damaged, inconsistent or forged is read; old formats are."""

from __future__ import annotations

import copy
import json
import os
import random
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from state_files import Parts, as_format, put_together, taken_apart
from strategies import BASES, DTYPES, Recipe, build
from torch import Tensor

import glora_ops as glora
from glora_ops import STATS, GloraError, GloraWarning, Refused, State
from glora_ops.cli.show import print_json
from glora_ops.cli.state_facts import state_facts

#: Written by glora 0.1.0 when its format was 2: three modules, one a convolution, and a head.
FORMAT_2 = Path(__file__).parent / "data" / "state_format_2.safetensors"
DOCS = Path(__file__).parents[1] / "docs" / "reliability.md"


VERDICT: dict[str, Any] = {
    "rule": "gate", "applied": "gate", "reason": "", "clip": 2.0, "norm_limit": 3.0,
    "cosine_limit": 0.25, "left_out": ["bob"], "clients": [
        {"norm": 6.0, "cosine": 0.5, "distance": None, "scale": 0.5, "trust": 2.0},
        {"norm": 1.0, "cosine": 0.1, "distance": None, "scale": 1.0, "trust": 0.0},
    ],
}  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A state of everything that a state may hold, in today's format."""
    path = tmp_path / "s.safetensors"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GloraWarning)
        state = State.load(FORMAT_2)
    record = state.record | {"readouts": {"ranks": [2, 4], "pad": "zero"}}
    record["arguments"] |= {"robust": "gate", "clip": 2.0}
    settings = state.settings | {"robust": VERDICT, "rank_to_captured": {"1": 0.5, "3": 1.0}}
    State(**vars(state) | {"record": record, "settings": settings}).save(path)
    return path


def stat(name: str, value: float) -> Callable[[dict[str, Tensor]], object]:
    return lambda t: t["modules/conv/stats"].__setitem__(STATS.index(name), value)


# --- formats ---------------------------------------------------------------------------------


def test_a_file_of_format_2_loads_and_says_that_it_has_no_checksum(tmp_path: Path) -> None:
    with pytest.warns(GloraWarning, match="has format 2, which carries no checksum"):
        state = State.load(FORMAT_2)
    tensors = load_file(FORMAT_2)
    for name, m in state.modules.items():
        for part, x in vars(m).items():
            assert torch.equal(x, tensors[f"modules/{name}/{part}"])
    assert state.clients == ("ann", "bob")
    assert state.weights == (0.75, 0.25)
    assert state.captured == 0.999999960983038
    assert sorted(state.dense) == ["head.bias", "head.weight"]
    assert state.record["clients"][0]["path"] == str(FORMAT_2.parents[1] / "clients/ann")
    # Saved again it has them, and nothing else has changed.
    state.save(tmp_path / "s.safetensors")
    again, about = taken_apart(tmp_path / "s.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        State.load(tmp_path / "s.safetensors")
    assert {k: x.tolist() for k, x in again.items()} == {k: x.tolist() for k, x in tensors.items()}
    before = taken_apart(FORMAT_2)[1]
    for what in (about, before):
        what.pop("format_version")
        for client in what["record"]["clients"]:
            client.pop("path")  # relative to another place
    assert about == before


def test_format_1_loads_too(path: Path) -> None:
    want = State.load(path)
    as_format(path, 1)
    with pytest.warns(GloraWarning, match="format 1"):
        state = State.load(path)
    assert state.record is None
    assert state.settings == want.settings
    assert torch.equal(state.modules["conv"].u, want.modules["conv"].u)


@pytest.mark.parametrize("basis", BASES)
def test_a_state_without_client_statistics_is_saved_and_says_so(basis: str, path: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    pairs = [(torch.randn(6, 2, generator=rng), torch.randn(2, 5, generator=rng)) for _ in "abc"]
    state = glora.aggregate(pairs, rank=3, basis=basis, client_statistics=False)
    state.save(path)
    again = State.load(path)
    told, m = glora.aggregate(pairs, rank=3, basis=basis), again.modules[""]
    assert m.client_stats.shape == (0, 4)
    assert torch.equal(m.u, told.modules[""].u)
    assert "made without client_statistics" in again.report()
    (client, *_) = state_facts(again)["clients"]
    assert client["norm"] is client["share"] is None
    with pytest.raises(GloraError, match="norm: got none, expected a state made with"):
        m.client_stat("norm")
    if basis == "update":  # the others need canonical forms in any case
        with pytest.raises(GloraError, match="voices: got none"):
            m.stat("voices")


@pytest.mark.parametrize("name", ["captured", "norm", "voices"])
def test_numbers_that_are_missing_elsewhere_are_damage(name: str, path: Path) -> None:
    tensors, about = taken_apart(path)
    stat(name, float("nan"))(tensors)
    put_together(path, tensors, about)
    with pytest.raises(Refused, match=f"{name} nan"):
        State.load(path)


def test_the_same_state_is_the_same_bytes(path: Path, tmp_path: Path) -> None:
    """Saved twice, loaded and saved, and in processes that hash strings differently."""
    before = path.read_bytes()
    State.load(path).save(path)
    assert path.read_bytes() == before
    code = (
        "import sys, torch, glora_ops; torch.manual_seed(0);"
        "clients = [{m: (torch.randn(6, 2), torch.randn(2, 5)) for m in 'qkv'} for _ in range(3)];"
        "glora_ops.aggregate(clients, rank='auto').save(sys.argv[1])"
    )
    files = [tmp_path / f"{seed}.safetensors" for seed in "12"]
    for file in files:
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code, str(file)],
            env=os.environ | {"PYTHONHASHSEED": file.stem, "OMP_NUM_THREADS": "1"},
            check=True,
        )
    assert len({file.read_bytes() for file in files}) == 1


def documented(path: Path) -> None:
    """The lines of the documentation that verify a file, run on `path`."""
    text = DOCS.read_text(encoding="utf-8")
    (code,) = [block for block in text.split("```python\n")[1:] if "hashlib" in block]
    exec(code.partition("```")[0].replace('"server.safetensors"', repr(str(path))), {})


def test_the_documented_lines_verify_a_file_and_find_one_flipped_bit(path: Path) -> None:
    documented(path)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(AssertionError):
        documented(path)


# --- what every state fulfils ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("basis", BASES)
def test_what_glora_computes_can_be_saved_and_read(basis: str, dtype: str, tmp_path: Path) -> None:
    """Every route: deficient, dead, silent, cancelling and zero clients, ranks beyond the layer."""
    for i, recipe in enumerate(
        (
            Recipe(seed=1, cut=">d", spectrum="deficient", dead=True, mute=True, dtype=dtype),
            Recipe(seed=2, cut="dim-1", kind="frozen", condition=1e4, widen=4, dtype=dtype),
            Recipe(seed=3, cut="N", kind="cancelling", ranks=(4, 4), dtype=dtype),
            Recipe(seed=4, cut="1", loud=1e6, spectrum="steep", dtype=dtype),
            Recipe(seed=5, cut="r", m=300, n=200, ranks=(12,) * 20, dtype=dtype),  # dual route
            Recipe(seed=6, cut="r", m=700, n=90, ranks=(8,) * 30, dtype=dtype),  # tall route
        )
    ):
        problem = build(recipe)
        pairs = [*problem.clients]
        if i == 0:
            pairs = [(torch.zeros_like(b), a) for b, a in pairs] + pairs[:1] * (basis != "update")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", GloraWarning)
            state = glora.aggregate(pairs, rank=problem.rank, basis=basis)
        state.save(tmp_path / "s.safetensors")
        assert State.load(tmp_path / "s.safetensors").captured == state.captured


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_columns_are_orthonormal_to_their_dtype_and_no_further_off(
    path: Path, dtype: torch.dtype
) -> None:
    tensors, about = taken_apart(path)
    for key in ("modules/conv/u", "modules/conv/v"):
        tensors[key] = torch.linalg.qr(tensors[key].double())[0].contiguous().to(dtype)
    put_together(path, tensors, about)
    State.load(path)
    for error in (64, 1024):
        spoilt = dict(tensors)
        spoilt["modules/conv/u"] = tensors["modules/conv/u"] * (1 + error * torch.finfo(dtype).eps)
        put_together(path, spoilt, about)
        with pytest.raises(Refused, match=r"modules/conv/u.*inner products off by"):
            State.load(path)


Edit = Callable[[dict[str, Tensor]], object]


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda t: t["modules/first/s"].fill_(float("nan")), r"modules/first/s'.*finite"),
        (lambda t: t["modules/first/s"][0].neg_(), r"modules/first/s.*descending"),
        (lambda t: t["modules/first/s"][1].mul_(1e3), r"modules/first/s.*descending"),
        (lambda t: t["modules/first/s"].fill_(1e200), r"modules/first/s.*1e\+150"),
        # Rank 2 of 3: the last column belongs to no singular value.
        (
            lambda t: t["modules/first/u"][0, 2].fill_(1e-30),
            r"modules/first/u.*without a singular value",
        ),
        (lambda t: t["modules/first/u"][:, 0].zero_(), r"modules/first/u.*inner products"),
        (
            lambda t: t["modules/first/v"][0, 0].fill_(float("inf")),
            r"modules/first/v.*off by (nan|inf)",
        ),
        (lambda t: t["modules/conv/eig_u"][-1].fill_(float("nan")), r"modules/conv/eig_u.*finite"),
        (lambda t: t["modules/conv/client_stats"][1, 3].fill_(float("inf")), "client_stats"),
        (lambda t: t["modules/conv/client_stats"][1, 0].fill_(-1), "negative norm"),
        (lambda t: t["modules/conv/present"].view(torch.uint8).fill_(2), r"present.*0 and 1"),
        (lambda t: t["dense/head.bias"][0].fill_(float("nan")), r"dense/head.bias.*not finite"),
        (stat("captured", 1.5), "captured 1.5"),
        (stat("captured", -0.1), "captured -0.1"),
        (stat("attainable", 0.5), "captured above attainable"),
        (stat("attainable", 1.0000001), "attainable 1"),
        (stat("norm", 1e200), r"norm 1e\+200"),
        (stat("effective_rank", 1.0), "effective_rank 1.*3, as s has"),
        (stat("effective_rank", float("inf")), "effective_rank inf"),
        (stat("info_limited", 0.5), "info_limited 0.5.*integer"),
        (stat("voices", 3), "voices 3"),
        (stat("gap_u", float("nan")), "gap_u nan"),
        (lambda t: t.pop("modules/conv/u"), r"modules/conv/u.*missing"),
        (lambda t: t.update({"modules/conv/w": torch.ones(1)}), "belongs to no module"),
        (lambda t: t.update({"x": torch.ones(1)}), r"tensor 'x'.*belongs to no module"),
        (lambda t: t.update({"modules/conv/u": t["modules/conv/u"].long()}), "one floating"),
        (lambda t: t.update({"modules/conv/u": t["modules/conv/u"].double()}), "one floating"),
        (
            lambda t: t.update({"modules/conv/u": t["modules/conv/u"][:, :2].clone()}),
            "does not fit",
        ),
        (lambda t: t.update({"modules/conv/s": t["modules/conv/s"].float()}), "does not fit"),
        (lambda t: t.update({"modules/conv/eig_u": torch.zeros(0)}), "does not fit"),
        (lambda t: t.update({"modules/conv/present": torch.ones(9).bool()}), "does not fit"),
    ],
)
def test_values_that_no_state_has_are_refused_with_true_checksums(
    path: Path, edit: Edit, says: str
) -> None:
    tensors, about = taken_apart(path)
    edit(tensors)
    put_together(path, tensors, about)
    with pytest.raises(Refused, match=says) as caught:
        State.load(path)
    assert all(refusal.file == str(path) for refusal in caught.value.refusals)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda m: m.update(format_version=4), "format_version: got 4"),
        (lambda m: m.update(format_version=True), "format_version: got True"),
        (lambda m: m.pop("format_version"), "no glora metadata"),
        (lambda m: m.update(surplus=1), "surplus: 1"),
        (lambda m: m.update(modules=[]), "modules"),
        (lambda m: m.update(modules=["conv", "conv", "first"]), "each name once"),
        (lambda m: m.update(clients=["ann", "ann"]), "each name once"),
        (lambda m: m.update(clients=["ann"]), "one weight per client"),
        (lambda m: m["record"]["clients"].reverse(), "record of the clients"),
        (lambda m: m.update(clients=["ann", "x" * 9000]), "8192 characters"),
        (lambda m: m.update(weights=[0.75, "0.25"]), r"weights\.1: '0.25'"),
        (lambda m: m.update(weights=[0.5, True]), r"weights\.1: True"),
        (lambda m: m.update(weights=[float("nan"), 1.0]), r"weights\.0: nan"),
        (lambda m: m.update(weights=[0.5, 0.25]), "of sum 1"),
        (lambda m: m.update(weights=[1.5, -0.5]), "none negative"),
        (lambda m: m["settings"].update(basis="mean"), r"settings\.basis: 'mean'"),
        (lambda m: m["settings"].update(rank=4), "does not fit"),
        (lambda m: m["settings"].update(rank=2**40), r"settings\.rank"),
        (lambda m: m["settings"].update(seed=2**70), r"settings\.seed"),
        (lambda m: m["settings"].update(note="x"), r"settings\.note: 'x'"),
        (lambda m: m["settings"].pop("seed"), r"settings\.seed: nothing"),
        (lambda m: m["settings"].pop("weights_from"), "where the weights are from"),
        (lambda m: m["settings"].update(rank_to_captured={"x": 1.0}), "rank_to_captured"),
        (lambda m: m["settings"].update(x=json.loads("[" * 900 + "]" * 900)), "too deeply"),
        (lambda m: m["settings"].update(robust=None), r"settings\.robust: None"),
        (lambda m: m["settings"].update(robust=VERDICT | {"clip": 0}), r"robust\.clip"),
        (lambda m: m["settings"].update(robust=VERDICT | {"left_out": []}), "those left out"),
        (lambda m: m["settings"].update(robust=VERDICT | {"cosine_limit": None}), "the cosines"),
        (lambda m: m["settings"].update(robust=VERDICT | {"norm_limit": None}), "is clipped"),
        (lambda m: m["layout"].update(modules={}), "layout of the modules"),
        (lambda m: m["layout"]["modules"]["conv"].update(kernel=[0, 2]), "kernel"),
        (lambda m: m["layout"]["modules"]["conv"].update(kernel=[2]), "height, width"),
        (lambda m: m["record"]["arguments"].update(scratch="/tmp"), "scratch: '/tmp'"),
        (lambda m: m["record"]["arguments"].update(max_file_bytes=1), "max_file_bytes"),
        (lambda m: m["record"]["clients"][0].update(path="a\0b"), "a path"),
        (lambda m: m["record"]["clients"][0].update(path="\ud800"), "clients.0.path"),
        (lambda m: m["record"]["clients"][0].update(sha256="x"), "clients.0.sha256"),
        (lambda m: m["record"]["clients"][0].update(weight=None), "weight in the record"),
        (lambda m: m["record"]["clients"][0].update(ranks=[]), "clients.0.ranks"),
        (lambda m: m["record"]["readouts"].update(ranks=["../x"]), r"readouts.ranks.0: '../x'"),
        (lambda m: m["record"]["readouts"].update(pad="x"), "readouts.pad"),
    ],
)
def test_metadata_that_no_state_has_are_refused_with_true_checksums(
    path: Path, edit: Callable[[dict[str, Any]], object], says: str
) -> None:
    tensors, about = taken_apart(path)
    edit(about)
    put_together(path, tensors, about)
    with pytest.raises(GloraError, match=says):
        State.load(path)


def test_many_faults_are_counted_and_not_listed(path: Path) -> None:
    tensors, about = taken_apart(path)
    about["layout"]["modules"] = {f"m{i}": {} for i in range(20_000)}
    put_together(path, tensors, about)
    with pytest.raises(Refused, match="59 995 more") as caught:
        State.load(path)
    assert len(caught.value.refusals) == 5


def test_what_could_not_be_read_is_not_saved(path: Path, tmp_path: Path) -> None:
    state = State.load(path)
    for change, says in (
        ({"settings": state.settings | {"note": 1}}, r"settings\.note"),
        ({"settings": state.settings | {"robust": torch.ones(1)}}, "JSON"),
        ({"dense": {"head.bias": torch.ones(2).cdouble()}}, "dtype cannot be read again"),
        ({"dense": {"head\n": torch.ones(2)}}, "name cannot be read again"),
        ({"dense": {"x" * 510: torch.ones(2)}}, "name cannot be read again"),
        ({"dense": {"head.bias": torch.full((2,), float("nan"))}}, "not finite"),
    ):
        with pytest.raises(GloraError, match=says):
            State(**vars(state) | change).save(tmp_path / "new.safetensors")
    assert list(tmp_path.iterdir()) == [path]


# --- damage ------------------------------------------------------------------------------------


def test_what_is_no_state_is_refused(path: Path, tmp_path: Path) -> None:
    whole = path.read_bytes()
    os.mkfifo(tmp_path / "pipe")
    for nothing in ("missing", ".", "pipe", "/dev/zero"):
        with pytest.raises(GloraError, match="existing file"):
            State.load(tmp_path / nothing)
    for content in (b"not a tensor in sight", b"", b"1234567", whole[:-100], whole + b"\0"):
        path.write_bytes(content)
        with pytest.raises(Refused, match="no safetensors file"):
            State.load(path)
    for metadata in (None, {"glora": "[]"}, {"glora": "{}"}, {"glora": "[" * 10**5}, {"x": "{}"}):
        save_file({"x": torch.ones(1)}, path, metadata=metadata)
        with pytest.raises(GloraError, match="no glora metadata"):
            State.load(path)


def test_files_of_the_system_are_not_even_opened() -> None:
    """They count as regular files of no bytes, and reading one may never end."""
    with pytest.raises(Refused, match=r"no safetensors file.*a file of 0 bytes"):
        State.load("/proc/self/environ")


@pytest.mark.parametrize("change", ["cut", "rewritten", "replaced", "gone"])
def test_a_file_that_changes_while_it_is_read_is_refused(
    path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = path.read_bytes()
    plain = json.loads

    def loads(text: Any, **kwargs: Any) -> Any:  # the header has been read, the tensors not yet
        if change == "cut":
            os.truncate(path, len(content) // 2)
        elif change == "rewritten":
            path.write_bytes(content)
        else:
            path.unlink(missing_ok=True)
            if change == "replaced":
                path.write_bytes(content)
        return plain(text, **kwargs)

    monkeypatch.setattr(json, "loads", loads)
    with pytest.raises(Refused, match="the file changed while it was being used"):
        State.load(path)


def test_a_file_cut_in_the_middle_of_a_tensor_is_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from glora_ops.adapters.stored import Stored

    plain = Stored._tensor

    def tensor(stored: Stored, *args: Any) -> Tensor:
        os.truncate(path, stored.start + 10)
        return plain(stored, *args)

    monkeypatch.setattr(Stored, "_tensor", tensor)
    with pytest.raises(Refused, match="the file changed while it was being used"):
        State.load(path)


def flips(content: bytes, rng: random.Random) -> Iterator[bytes]:
    start = 8 + int.from_bytes(content[:8], "little")
    places = [*range(8), *rng.sample(range(8, start), 150)]
    places += rng.sample(range(start, len(content)), 150)
    for at in places:
        out = bytearray(content)
        out[at] ^= 1 << rng.randrange(8)
        yield bytes(out)


def cuts(content: bytes, rng: random.Random) -> Iterator[bytes]:
    for _ in range(30):
        at, length = rng.randrange(len(content)), rng.randrange(1, 64)
        yield content[:at]
        yield content[:at] + content[at + length :]
        yield content[:at] + bytes(length) + content[at:]


def test_every_flipped_bit_and_every_cut_is_refused(path: Path) -> None:
    content = path.read_bytes()
    rng = random.Random(0)
    for damaged in (*flips(content, rng), *cuts(content, rng)):
        path.write_bytes(damaged)
        with pytest.raises(GloraError):
            State.load(path)


def test_exchanged_tensors_are_refused(path: Path) -> None:
    """Equal shapes, both as they were written: only their checksums tell them apart."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    one, two = (header[f"modules/{name}/eig_u"]["data_offsets"] for name in ("conv", "first"))
    swapped = bytearray(content)
    swapped[start + one[0] : start + one[1]] = content[start + two[0] : start + two[1]]
    swapped[start + two[0] : start + two[1]] = content[start + one[0] : start + one[1]]
    assert swapped != content
    path.write_bytes(swapped)
    with pytest.raises(Refused, match="the tensor is not what was written") as caught:
        State.load(path)
    assert [r.tensor for r in caught.value.refusals] == [
        "modules/conv/eig_u",
        "modules/first/eig_u",
    ]


# --- forgeries ---------------------------------------------------------------------------------

HOSTILE: tuple[Any, ...] = (
    None, True, -1, 0, 2**53, 2**70, 10**400, 1e308, float("nan"), float("inf"), "", "x", "\0",
    "\x1b[2J", "\udcff", "\ud800", "../../../../etc", "/dev/zero", [], [None], {}, {"": 0},
)  # fmt: skip


def leaves(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to everything in `value` that can be replaced."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inside in items:
        yield (*way, key)
        if isinstance(inside, (dict, list)):
            yield from leaves(inside, (*way, key))


def forged_metadata(parts: Parts, rng: random.Random) -> Iterator[Parts]:
    tensors, about = parts
    for way in leaves(about):
        for value in rng.sample(HOSTILE, 4):
            made = copy.deepcopy(about)
            at = made
            for key in way[:-1]:
                at = at[key]
            at[way[-1]] = value
            yield tensors, made
        made = copy.deepcopy(about)
        at = made
        for key in way[:-1]:
            at = at[key]
        del at[way[-1]]
        yield tensors, made


def forged_tensors(parts: Parts, rng: random.Random) -> Iterator[Parts]:
    tensors, about = parts
    for name, x in tensors.items():
        for value in rng.sample((0.0, -1.0, 1e-3, 0.5, 2.0, 1e30, float("nan"), float("inf")), 3):
            made = x.clone()
            made.view(-1)[rng.randrange(x.numel())] = (
                bool(value) if x.dtype == torch.bool else value
            )
            yield tensors | {name: made}, about
        others = [y for other, y in tensors.items() if other != name and y.shape == x.shape]
        if others:
            yield tensors | {name: rng.choice(others).clone()}, about
        yield {key: y for key, y in tensors.items() if key != name}, about


def fulfils_everything(state: State) -> None:
    """Independently of the package: what a state promises, and everything that shows it."""
    assert len(set(state.clients)) == len(state.clients) == len(state.weights)
    assert all(torch.tensor(state.weights, dtype=torch.float64).isfinite())
    assert 0 <= state.captured <= state.attainable <= 1
    for m in state.modules.values():
        alive = m.s > 0
        assert torch.equal(m.s, m.s.sort(descending=True)[0])
        assert bool((m.s >= 0).all())
        for x in (m.u, m.v):
            gram = x.double().mT @ x.double()
            assert torch.allclose(gram, torch.diag(alive.double()), atol=1e-5)
            assert not x[:, ~alive].any()
    state.readout(2)
    assert "\x1b" not in state.report()
    print_json(state_facts(state))


def test_what_is_forged_is_refused_or_a_state_with_every_promise_kept(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing else: no other error, and no state that breaks a promise. Checksums are true."""
    rng, outcomes = random.Random(1), Counter[str]()
    parts = taken_apart(path)
    for make in (forged_metadata, forged_tensors):
        for forged in make(parts, rng):
            put_together(path, *forged)
            try:
                state = State.load(path)
            except GloraError:
                outcomes["refused"] += 1
                continue
            outcomes["kept every promise"] += 1
            fulfils_everything(state)
            state.save(tmp_path / "again.safetensors")
            assert State.load(tmp_path / "again.safetensors").clients == state.clients
    capsys.readouterr()
    assert outcomes["refused"] > 300
    assert outcomes["kept every promise"] > 20
