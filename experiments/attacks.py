"""What bad clients do to an aggregate: the table of docs/reliability.md.

python experiments/attacks.py            # compute, store results/attacks.json, print the table
python experiments/attacks.py --table    # print the table of what is stored

Twenty clients of rank 4 on one 40 × 32 module in float64: B_i = B + N, A_i = A + N, N a fifth as
large, so that a client's own part is 0.28 of what all share. The error is that of the server's
update (rank 8) to the mean of the honest clients' updates, over its norm; 0 is perfect, 1 what no
update at all would give. Factors are left in the common gauge they were drawn in, the best case for
everything that averages factors.
"""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from peft import LoraConfig, get_peft_model
from scipy.optimize import minimize
from torch import Tensor, nn

import glora_ops as glora
from glora_ops.robust import judge

OUT = Path(__file__).parent / "results" / "attacks.json"
COUNT, D_OUT, D_IN, RANK, SERVER_RANK = 20, 40, 32, 4, 8
OWN = 0.2
BAD = (1, 2, 4, 6)  # 5, 10, 20, 30 %
BEYOND = (9, 11)  # 45, 55 %: just below and just above a half
SEEDS = 3
LOUDEST, SENT = 100.0, 12  # median norms and rank of the attacker who knows the rule

Pair = tuple[Tensor, Tensor]
Aggregate = Callable[[list[Pair], int], Tensor]  # clients, how many may be bad → dense update


def normal(rng: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def population(seed: int, own: float = OWN) -> list[Pair]:
    """Twenty honest clients."""
    rng = torch.Generator().manual_seed(seed)
    b, a = normal(rng, D_OUT, RANK), normal(rng, RANK, D_IN)
    return [
        (b + own * normal(rng, *b.shape), a + own * normal(rng, *a.shape)) for _ in range(COUNT)
    ]


def dense(clients: Sequence[Pair]) -> Tensor:
    """(K, d_out, d_in): the updates."""
    return torch.stack([b @ a for b, a in clients])


def error(got: Tensor, honest: Sequence[Pair]) -> float:
    truth = dense(honest).mean(0)
    return float((got - truth).norm() / truth.norm())


# --- attacks ---------------------------------------------------------------------------------


def foreign(rng: torch.Generator, norm: float) -> Pair:
    """A random update of that norm: directions that nobody shares."""
    b, a = normal(rng, D_OUT, RANK), normal(rng, RANK, D_IN)
    return b * (norm / float((b @ a).norm())), a


def attacked(attack: str, clients: list[Pair], bad: int, seed: int) -> list[Pair]:
    """The clients with the last `bad` of them spoilt."""
    rng = torch.Generator().manual_seed(1000 + seed)
    good, spoilt = clients[: COUNT - bad], clients[COUNT - bad :]
    usual = float(dense(good).norm(dim=(1, 2)).median())
    factor = {"sign flip": -1.0, "−10×": -10.0, "×100": 100.0}.get(attack)
    if factor is not None:
        return good + [(factor * b, a) for b, a in spoilt]
    if attack == "injection":  # everybody a subspace of its own
        return good + [foreign(rng, usual) for _ in spoilt]
    if attack == "collusion":  # all the same one
        return good + [foreign(rng, usual)] * bad
    return clients


ATTACKS = ("none", "sign flip", "−10×", "×100", "injection", "collusion")


def knowing(
    aggregate: Aggregate, clients: list[Pair], bad: int, seed: int, search: Aggregate | None = None
) -> tuple[float, list[float]]:
    """The worst error that `bad` clients reach who know the honest ones and the rule; where it is.

    All send the one update s·n·(cos θ · H + sin θ · (cos φ · Y + sin φ · Z)): H the direction of
    the honest mean, Y a foreign one, Z what five honest clients have of their own (their agreement
    carries a median), n the honest clients' median norm, s ≤ 100. A grid over s and θ, then,
    where there is a cheap `search` for the aggregate, Nelder–Mead over all three from its eight
    best points: around the edge of what is accepted. The error is the aggregate's own.
    """
    good = clients[: COUNT - bad]
    updates = dense(good)
    usual = float(updates.norm(dim=(1, 2)).median())
    y = torch.matmul(*foreign(torch.Generator().manual_seed(2000 + seed), 1.0))
    own = updates[:5].mean(0) - updates.mean(0)
    # Orthonormal directions: H, then Y and Z without what they share with those before.
    span = torch.linalg.qr(torch.stack([updates.mean(0), y, own]).flatten(1).mT)
    directions = (span.Q * span.R.diagonal().sign()).mT.reshape(3, D_OUT, D_IN)

    def reached(x: Sequence[float], aggregate: Aggregate = search or aggregate) -> float:
        scale, (angle, turn) = min(math.exp(x[0]), LOUDEST), x[1:]
        along = [
            math.cos(angle),
            math.sin(angle) * math.cos(turn),
            math.sin(angle) * math.sin(turn),
        ]
        sent = torch.einsum("k,kij->ij", torch.tensor(along, dtype=torch.float64), directions)
        u, s, vt = torch.linalg.svd(scale * usual * sent, full_matrices=False)
        root = s[:SENT].sqrt()
        return error(
            aggregate(good + [(u[:, :SENT] * root, root[:, None] * vt[:SENT])] * bad, bad), good
        )

    scales = (0.5, 1.0, 1.5, 2.0, 3.0, 10.0, LOUDEST) if search else (1.0, 2.0, LOUDEST)
    steps = 36 if search else 4
    grid = [(math.log(s), math.pi * k / steps, 0.0) for s in scales for k in range(steps + 1)]
    best = sorted(grid, key=reached)[-8:]
    for start in tuple(best) if search else ():
        simplex = [start, *(
            tuple(v + d * (k == at) for k, v in enumerate(start))
            for at, d in enumerate((0.2, -0.05, 0.3))
        )]  # fmt: skip
        options = {"maxfev": 300, "initial_simplex": simplex}
        found = minimize(lambda x: -reached(x), start, method="Nelder-Mead", options=options)
        best.append(tuple(map(float, found.x)))
    worst, (log_scale, *angles) = max((reached(x, aggregate), x) for x in best)
    return worst, [min(math.exp(log_scale), LOUDEST), *angles]


# --- aggregates ------------------------------------------------------------------------------


def ours(rule: str | None, clients: list[Pair], bad: int = 0) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", glora.GloraWarning)
        state = glora.aggregate(clients, rank=SERVER_RANK, robust=rule)
    b, a = state.readout(SERVER_RANK)
    return b @ a


def judged_mean(rule: str, clients: list[Pair], bad: int) -> Tensor:
    """The mean of the judged updates, before any basis: 40 times cheaper than `ours`."""
    x = dense(clients)
    verdict = judge(rule, x.flatten(1) @ x.flatten(1).mT, [1 / len(x)] * len(x))
    factors = [t * s / len(x) for t, s in zip(verdict.trust, verdict.scale, strict=True)]
    return torch.einsum("k,kij->ij", torch.tensor(factors, dtype=x.dtype), x)


def mean(clients: list[Pair], bad: int) -> Tensor:
    return dense(clients).mean(0)


def factors(clients: list[Pair], bad: int) -> Tensor:
    rank = max(a.shape[0] for _, a in clients)
    pad = torch.nn.functional.pad
    b = torch.stack([pad(b, (0, rank - b.shape[1])) for b, _ in clients])
    a = torch.stack([pad(a, (0, 0, 0, rank - a.shape[0])) for _, a in clients])
    return b.mean(0) @ a.mean(0)


def multi_krum(clients: list[Pair], bad: int) -> Tensor:
    """The mean of the K − f updates with the least sum of squared distances to their K − f − 2
    nearest; f is known to it (Blanchard et al., NeurIPS 2017)."""
    x = dense(clients).flatten(1)
    nearest = torch.cdist(x, x).square().sort().values[:, 1 : len(x) - bad - 1]
    chosen = nearest.sum(1).argsort()[: len(x) - bad]
    return dense(clients)[chosen].mean(0)


def peft(combination: str, clients: list[Pair], bad: int) -> Tensor:
    """PEFT's own `add_weighted_adapter` on a model of one linear layer."""
    model = None
    for i, (b, a) in enumerate(clients):
        r = a.shape[0]
        config = LoraConfig(r=r, lora_alpha=r, target_modules=["0"])
        if model is None:
            base = nn.Sequential(nn.Linear(D_IN, D_OUT, bias=False, dtype=torch.float64))
            model = get_peft_model(base, config, adapter_name="0", autocast_adapter_dtype=False)
        else:
            model.add_adapter(str(i), config)
        layer = model.base_model.model[0]
        layer.lora_A[str(i)].weight.data = a.clone()
        layer.lora_B[str(i)].weight.data = b.clone()
    # ties averages by itself, and linear weighs both factors by roots: 1/K² there is the mean.
    weight = {"ties_svd": 1.0, "linear": len(clients) ** -2}.get(combination, 1 / len(clients))
    more = {"density": 0.5} if combination == "ties_svd" else {}
    more |= {"svd_rank": SERVER_RANK} if "svd" in combination else {}
    names = [str(i) for i in range(len(clients))]
    model.add_weighted_adapter(names, [weight] * len(clients), "merged", combination, **more)
    merged: Tensor = layer.get_delta_weight("merged")
    return merged.detach()


AGGREGATES: dict[str, Aggregate] = {
    "factor averaging, PEFT linear": factors,
    "plain mean, PEFT cat": mean,
    "PEFT svd": partial(peft, "svd"),
    "PEFT ties_svd": partial(peft, "ties_svd"),
    "multi-Krum, told how many": multi_krum,
    "glora": partial(ours, None),
    "glora, clip": partial(ours, "clip"),
    "glora, gate": partial(ours, "gate"),
    "glora, geometric-median": partial(ours, "geometric-median"),
}
#: Of those that judge clients, what the attacker searches on.
JUDGES: dict[str, Aggregate] = {
    "multi-Krum, told how many": multi_krum,
    "glora, clip": partial(judged_mean, "clip"),
    "glora, gate": partial(judged_mean, "gate"),
    "glora, geometric-median": partial(judged_mean, "geometric-median"),
}


# --- the tables ------------------------------------------------------------------------------


def measure(seed: int, bad: int, name: str) -> dict[str, float]:
    """Errors by attack."""
    aggregate, honest = AGGREGATES[name], population(seed)
    row = {
        attack: error(
            aggregate(attacked(attack, honest, bad, seed), bad),
            honest if attack == "none" else honest[: COUNT - bad],
        )
        for attack in ATTACKS
    }
    if bad in BAD:
        worst, at = knowing(aggregate, honest, bad, seed, JUDGES.get(name))
        # Whoever knows all this also knows the other attacks.
        row |= {
            "knows the rule": max(worst, *row.values()),
            **dict(zip(("scale", "angle", "turn"), at, strict=True)),
        }
    return row


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for name in AGGREGATES:
        for bad in (*BAD, *BEYOND) if name in JUDGES else BAD:
            for seed in range(SEEDS):
                found = {k: float(f"{v:.4g}") for k, v in measure(seed, bad, name).items()}
                rows.append({"aggregate": name, "bad": bad, "seed": seed, **found})
            print(name, bad, flush=True, file=sys.stderr)
    OUT.write_text("[\n" + ",\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n]\n")


def table() -> str:
    """Markdown: one line per aggregate; in each cell the mean over draws at 5 / 10 / 20 / 30 %."""
    return _table("5 / 10 / 20 / 30 % bad", AGGREGATES, (*ATTACKS, "knows the rule"), BAD)


def beyond() -> str:
    """The same just below and just above a half."""
    return _table("45 / 55 % bad", JUDGES, ATTACKS[1:], BEYOND)


def _table(head: str, names: Iterable[str], attacks: Sequence[str], shares: Sequence[int]) -> str:
    rows = json.loads(OUT.read_text(encoding="utf-8"))

    def cell(name: str, attack: str) -> str:
        means = [
            fmean(r[attack] for r in rows if (r["aggregate"], r["bad"]) == (name, bad))
            for bad in shares
        ]
        return " / ".join(map(_short, means[:1] if attack == "none" else means))

    lines = [[head, *attacks], [":--", *["--:"] * len(attacks)]]
    lines += [[name, *(cell(name, attack) for attack in attacks)] for name in names]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _short(x: float) -> str:
    return f"{x:.2f}" if x < 10 else f"{x:.0f}"


if __name__ == "__main__":
    if "--table" not in sys.argv:
        main()
    print(table(), beyond(), sep="\n\n")
