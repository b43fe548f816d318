"""Compile-only cases of the kernels that read or write the long dimension."""

from __future__ import annotations

import torch
from compile_case import case, meta

HALF = torch.bfloat16
MODULES, ROWS, WIDTH, COLUMNS = 2, 1600, 4096, 80


@case(tensor_cores="HGMMA|HMMA")
def times_bf16() -> None:
    from glora_ops.kernels.product import launch_times

    launch_times(meta(MODULES, ROWS, WIDTH, dtype=HALF), meta(MODULES, COLUMNS, WIDTH).mT)


@case(tensor_cores="HGMMA|HMMA")
def times_signs_bf16() -> None:
    from glora_ops.kernels.product import launch_times

    signs = meta(1, COLUMNS, WIDTH, dtype=HALF).mT
    launch_times(meta(MODULES, ROWS, WIDTH, dtype=HALF), signs)


@case(tensor_cores="HGMMA|HMMA", tf32=True)
def times_fp32() -> None:
    from glora_ops.kernels.product import launch_times

    launch_times(meta(MODULES, ROWS, WIDTH), meta(MODULES, COLUMNS, WIDTH).mT)


@case(tensor_cores="HGMMA|HMMA", tf32=True)
def times_fp16() -> None:
    from glora_ops.kernels.product import launch_times

    x = meta(MODULES, ROWS, WIDTH, dtype=torch.float16)
    launch_times(x, meta(MODULES, COLUMNS, WIDTH).mT)


@case(tensor_cores="HGMMA|HMMA")
def accumulate_bf16() -> None:
    from glora_ops.kernels.product import launch_accumulate

    z = meta(MODULES, ROWS, COLUMNS, dtype=torch.float64)
    launch_accumulate(meta(MODULES, ROWS, WIDTH, dtype=HALF), z)


@case(tensor_cores="HGMMA|HMMA", tf32=True)
def accumulate_fp32() -> None:
    from glora_ops.kernels.product import launch_accumulate

    z = meta(MODULES, ROWS, COLUMNS, dtype=torch.float64)
    launch_accumulate(meta(MODULES, ROWS, WIDTH), z)


@case(tensor_cores="HGMMA|HMMA", tf32=True)
def accumulate_fp16() -> None:
    from glora_ops.kernels.product import launch_accumulate

    x = meta(MODULES, ROWS, WIDTH, dtype=torch.float16)
    launch_accumulate(x, meta(MODULES, ROWS, COLUMNS))


@case(tensor_cores="DMMA", without_doubles="")
def accumulate_fp64() -> None:
    from glora_ops.kernels.product import launch_accumulate

    z = meta(MODULES, ROWS, COLUMNS, dtype=torch.float64)
    launch_accumulate(meta(MODULES, ROWS, WIDTH, dtype=torch.float64), z)


@case(tensor_cores="HGMMA|HMMA")
def times_of_both_sides() -> None:
    from glora_ops.kernels.product import times_each

    sides = (WIDTH, 11008)
    rows = [meta(MODULES, ROWS, d, dtype=HALF) for d in sides]
    times_each(rows, [meta(MODULES, COLUMNS, d).mT for d in sides])


@case(tensor_cores="HGMMA|HMMA", tf32=True)
def combine_of_both_sides() -> None:
    from glora_ops.kernels.product import accumulate_each

    y, onto = ([meta(MODULES, k, d) for d in (WIDTH, 11008)] for k in (64, COLUMNS))
    c = [meta(MODULES, 64, COLUMNS, dtype=torch.float64)] * 2
    accumulate_each(y, c, [x.mT for x in onto])


@case(tensor_cores="DMMA")
def inner_fp32() -> None:
    from glora_ops.kernels.product import launch_inner

    y = meta(MODULES, COLUMNS, WIDTH).mT
    launch_inner(y, y)


@case(tensor_cores="DMMA")
def inner_fp64() -> None:
    from glora_ops.kernels.product import launch_inner

    y = meta(MODULES, ROWS, COLUMNS, dtype=torch.float64)
    launch_inner(y, y)


@case(tensor_cores="DMMA")
def gram_whole_bf16() -> None:
    from glora_ops.kernels.product import launch_inner

    x = meta(MODULES, 640, WIDTH, dtype=HALF).mT
    launch_inner(x, x)


def sketch(dtype: torch.dtype, max_rank: int, clients: int, columns: int) -> None:
    from glora_ops.kernels.sketch import fits, launch_sketch

    sides = [meta(MODULES * 16, ROWS, d, dtype=dtype) for d in (WIDTH, 11008)]
    together = fits(sides[0], max_rank, columns)
    tests = [meta(columns, d, dtype=dtype).mT for d in (WIDTH, 11008)]
    marks = meta(clients + 1, dtype=torch.int64)
    launch_sketch(sides, marks, max_rank, tests if columns and together else None)


@case(tensor_cores="HGMMA|HMMA")
def sketch_bf16_rank_16() -> None:
    sketch(HALF, 16, 100, COLUMNS)


@case(tensor_cores="HGMMA|HMMA")
def sketch_bf16_ragged() -> None:
    sketch(HALF, 64, 47, COLUMNS)


@case(tensor_cores="HGMMA|HMMA")
def sketch_fp16_ragged() -> None:
    sketch(torch.float16, 64, 47, COLUMNS)


@case(tensor_cores="HGMMA|HMMA", tf32=True)
def sketch_fp32_ragged() -> None:
    sketch(torch.float32, 64, 47, COLUMNS)


@case(tensor_cores="DMMA")
def gram_bf16_ragged() -> None:
    sketch(HALF, 64, 47, 0)


@case(tensor_cores="DMMA")
def fold_and_unfold() -> None:
    from glora_ops.kernels.fold import fold_each, launch_fold

    t = meta(MODULES, ROWS, 64, dtype=torch.float64)
    z = meta(MODULES, ROWS, COLUMNS, dtype=torch.float64)
    for back in (False, True):
        scale, marks = meta(MODULES, ROWS, dtype=torch.float64), meta(48, dtype=torch.int64)
        launch_fold(t, scale, z, marks, 64, back)
        fold_each([t, t], [scale, scale], [z, z], marks, 64, back)


def core(dtype: torch.dtype) -> None:
    from glora_ops.kernels.core import launch_core

    b, a = (meta(MODULES, ROWS, d, dtype=dtype) for d in (WIDTH, 11008))
    u, v = (meta(MODULES, 64, d).mT for d in (WIDTH, 11008))
    launch_core(b, a, u, v, meta(MODULES, ROWS, dtype=torch.float64))


@case(tensor_cores="HGMMA|HMMA")
def core_bf16() -> None:
    core(HALF)


@case(tensor_cores="HGMMA|HMMA", tf32=True)
def core_fp16() -> None:
    core(torch.float16)


@case(tensor_cores="HGMMA|HMMA", tf32=True)
def core_fp32() -> None:
    core(torch.float32)


@case()
def readout() -> None:
    from glora_ops.kernels.readout import launch_readout

    u, v = (meta(MODULES, 64, d).mT for d in (WIDTH, 11008))
    launch_readout(u, v, meta(MODULES, 64), 16)


def overlaps(rows: int, dtype: torch.dtype) -> None:
    from glora_ops.kernels.overlaps import launch_overlaps

    launch_overlaps(meta(MODULES, rows, WIDTH, dtype=dtype), meta(MODULES, rows))


@case(tensor_cores="HGMMA|HMMA")
def overlaps_bf16() -> None:
    overlaps(1024, HALF)


@case(tensor_cores="HGMMA|HMMA")
def overlaps_few_bf16() -> None:
    overlaps(160, HALF)


@case(tensor_cores="HGMMA|HMMA")
def overlaps_fp16() -> None:
    overlaps(1024, torch.float16)


@case(tensor_cores="HGMMA|HMMA", tf32=True)
def overlaps_fp32() -> None:
    overlaps(384, torch.float32)


def metric(columns: int, terms: int) -> None:
    from glora_ops.kernels.metric import launch_metric_terms

    gamma, units = meta(2, MODULES, 1024, 1024, dtype=torch.float16), meta(MODULES, columns)
    z = meta(terms, MODULES, columns, 1024, dtype=torch.float16)
    launch_metric_terms(gamma, z, units, meta(MODULES, columns, 2048).mT, False)


@case()
def metric_round() -> None:
    from glora_ops.kernels.metric import launch_metric_round

    launch_metric_round(meta(MODULES, COLUMNS, 1024).mT, True, False)


@case(tensor_cores="HGMMA|HMMA")
def metric_one_term() -> None:
    metric(COLUMNS, 1)


@case(tensor_cores="HGMMA|HMMA")
def metric_two_terms() -> None:
    metric(COLUMNS, 2)


@case(tensor_cores="HGMMA|HMMA")
def metric_two_terms_narrow() -> None:
    metric(32, 2)


@case()
def metric_energy() -> None:
    from glora_ops.kernels.metric import launch_metric_energy

    left, right = meta(2, 2 * MODULES, 1024, 1024, dtype=torch.float16).chunk(2, 1)
    launch_metric_energy(left, right, meta(MODULES, 1024))


def whitened(rank: int) -> None:
    from glora_ops.kernels.whitened import launch_whitened

    gram, t = meta(MODULES, 1024, 1024), meta(MODULES, 1024, rank, dtype=torch.float64)
    launch_whitened([gram], [t], meta(1024 // rank + 1, dtype=torch.int64), rank)


@case(wide_loads=False, tensor_cores="DMMA", without_doubles="")
def whitened_rank_16() -> None:
    whitened(16)


@case(wide_loads=False, tensor_cores="DMMA", without_doubles="")
def whitened_rank_64() -> None:
    whitened(64)
