# %% [markdown]
# # From two adapters to a merged one
#
# Two people fine-tune the same model with LoRA, each on data of their own. We make one adapter of
# the two, look at what happened, let a third one join, and hand the result out: as adapters of two
# ranks and as a whole model.
#
# Run it cell by cell in an editor that knows `# %%`, or all at once: `python examples/tutorial.py
# --out tutorial-out`. It downloads nothing and takes less than a minute; it needs `pip install
# '.[demo]'`. Pictures and adapters go to the empty folder `--out`, or else to a temporary one.

# %%
import argparse
import copy
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from digits_clients import CLIENTS, fine_tune, load, regauge, skewed_split  # beside this file
from peft import PeftModel
from safetensors.torch import load_file, save_file

import glora_ops as glora
from glora_ops.adapters import read_adapter
from glora_ops.fl.tasks.digits import Digits, accuracy

parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path)
options, _ = parser.parse_known_args()  # a notebook adds options of its own
out = options.out or Path(tempfile.mkdtemp(prefix="glora-tutorial-"))

# %% [markdown]
# ## Two adapters
#
# The base reads upright digits; the clients' digits lie on their side. Each client holds other
# digits than the next, so each learns a part of the task. Their ranks differ, 4 and 8, and so do
# their scalings alpha/r. Ann's and Bob's folders are what PEFT's `save_pretrained` writes, with the
# number of examples in a `glora.json` beside it. The base is trained once and kept in the user's
# cache.

# %%
task = Digits(seed=0)
base, held_out = task.model(), task.held_out
parts = skewed_split(task.train, seed=0)

ann, bob, cyd = (out / "clients" / name for name in ("ann", "bob", "cyd"))
for folder, i in ((ann, 3), (bob, 4), (cyd, 5)):
    fine_tune(base, CLIENTS[i], parts[i], folder, seed=0)


def reads(folder: Path) -> float:
    """How many of the held-out digits the base reads with the adapter of this folder on it."""
    return accuracy(load(base, folder), held_out)


print(f"base {accuracy(base, held_out):.2f}, ann {reads(ann):.2f}, bob {reads(bob):.2f}")

# %% [markdown]
# ## What an adapter is, and what it is not
#
# LoRA stores an update ΔW as a product s·B·A. For every invertible G, (B·G, G⁻¹·A) has the same
# product: it is the same update in another *gauge*. Which gauge training ends in is an accident.
# Here is Ann once more, in a random one: the factors are others, the update and the accuracy are
# not.

# %%
ann_again = out / "regauged" / "ann"
regauge(ann, ann_again, seed=1)

module = "blocks.0.q"
(B, A), (B2, A2) = (read_adapter(folder).factors(module) for folder in (ann, ann_again))
factor_change = float((B2 - B).norm() / B.norm())
update_change = float((B2 @ A2 - B @ A).norm() / (B @ A).norm())
print(f"B changed by {factor_change:.0%}, B·A by {update_change:.0e}")
print(f"ann {reads(ann):.3f}, ann in another gauge {reads(ann_again):.3f}")

# %% [markdown]
# ## Why not average the factors?
#
# Because the average of B's times the average of A's depends on the gauge. We average Ann's and
# Bob's factors, Ann's padded with zeros to Bob's rank; then we do it again with the other, equal
# Ann. The "mean" has moved.


# %%
def mean_of_factors(one: Path, other: Path) -> torch.Tensor:
    (B1, A1), (B2, A2) = (read_adapter(folder).factors(module) for folder in (one, other))
    missing = B2.shape[1] - B1.shape[1]
    B1 = torch.nn.functional.pad(B1, (0, missing))
    A1 = torch.nn.functional.pad(A1, (0, 0, 0, missing))
    return (B1 + B2) / 2 @ (A1 + A2) / 2


def moved(before: torch.Tensor, after: torch.Tensor) -> float:
    return float((after - before).norm() / before.norm())


averaged_moved = moved(mean_of_factors(ann, bob), mean_of_factors(ann_again, bob))
print(f"the average of factors moved by {averaged_moved:.0%}")

# %% [markdown]
# ## Do they agree at all?
#
# `glora compare` looks at what no gauge changes: the spaces that the updates write to and read
# from, and the signed cosine of the updates. 1 is the same, 0 is unrelated; a cosine of −1 is the
# opposite. Clients that contradict each other merge into something weaker than each of them.

# %%
alignment_picture = out / "alignment.png"
compare = [sys.executable, "-m", "glora_ops", "compare", ann, bob, "--plot", alignment_picture]
subprocess.run(compare, check=True)

# %% [markdown]
# ## Merge
#
# The server keeps one update of rank R per module: bases U and V for all clients together, and a
# small core between them. Ann and Bob have 4 + 8 directions, so R = 12 could hold their mean
# exactly; we take 6. *Captured* is the share of the mean's energy that the state holds,
# *attainable* what the best state of that rank could hold. No dense matrix of a module's size is
# formed on the way.

# %%
state = glora.aggregate_adapters([ann, bob], rank=6)
print(state)
print(f"weights {state.weights}, from {state.settings['weights_from']}")

# %% [markdown]
# And the gauge? With the other Ann the same update comes out, to rounding.


# %%
def update_of(state: glora.State) -> torch.Tensor:
    u_times_s, vt = state[module].update
    return u_times_s @ vt


again = glora.aggregate_adapters([ann_again, bob], rank=6)
merged_moved = moved(update_of(state), update_of(again))
print(f"the merged update moved by {merged_moved:.0e}")

# %% [markdown]
# ## Which basis?
#
# R directions have to be chosen where the clients have more. `update` takes those of the largest
# mean: no state of rank R has more energy. `consensus`, the default, lets every client vote alike,
# loud or quiet; that may cost energy, and `captured` below `attainable` says how much. `projector`
# is the published rule, in which a direction counts the same however little a client used it. With
# enough rank all three hold these float32 factors exactly. The warnings are meant: they come where
# a state holds much less than its rank could, or where a cut falls between equals.

# %%
captured = {}
for basis in ("consensus", "update", "projector"):
    for rank in (2, 6, 12):
        other = glora.aggregate_adapters([ann, bob], rank=rank, basis=basis)
        captured[basis, rank] = other.captured
        print(f"{basis:9}  R = {rank:2}  captured {other.captured:.4f} of {other.attainable:.4f}")

# %% [markdown]
# ## Look at it
#
# The report says every certificate with its meaning, and what deserves a second look. The picture
# shows the singular values of the merged update, and the clients' votes on both sides of the cut: a
# clear drop there is a clear choice.

# %%
print(state.report())
state_picture = out / "state.png"
state.plot(state_picture)

# %% [markdown]
# ## A third client
#
# Cyd comes later. A state remembers its clients' folders, weights and settings, so adding one is a
# line, and the result is that of merging all three anew, bit for bit. A client is withdrawn in the
# same way: `remove=["bob"]`.

# %%
all_three = glora.update_adapters(state, add=[cyd])
anew = glora.aggregate_adapters([ann, bob, cyd], rank=6)
same_bits = all(torch.equal(all_three[name].u, anew[name].u) for name in anew)
print(all_three, "the same as anew:", same_bits)

# %% [markdown]
# ## Readouts
#
# Adapters of any rank come out of one state: its leading directions, strongest first. So a small
# device gets rank 2 and a server rank 6 of the same thing. Both folders are as PEFT writes them.
# The merged adapter is the mean of all three, held as well as its rank can: whether it reads more
# than the best client alone is for the data to say.

# %%
for rank in (2, 6):
    all_three.write_adapter(out / "merged" / f"r{rank}", rank=rank)
    print(f"merged, rank {rank}: {reads(out / 'merged' / f'r{rank}'):.2f}")
print(f"alone: ann {reads(ann):.2f}, bob {reads(bob):.2f}, cyd {reads(cyd):.2f}")

# %% [markdown]
# `reads` calls `load`, which is one line of PEFT:

# %%
adapted = PeftModel.from_pretrained(copy.deepcopy(base), out / "merged" / "r6").eval()

# %% [markdown]
# ## Into the weights
#
# A model that is only served needs no adapter: `apply_adapter` adds ΔW to the base's weights, file
# by file, and writes the whole model.

# %%
(out / "base").mkdir(parents=True, exist_ok=True)
save_file(base.state_dict(), out / "base" / "model.safetensors", metadata={"format": "pt"})
(out / "base" / "config.json").write_text("{}")
glora.apply_adapter(out / "merged" / "r6", out / "base", out / "model")

whole = task.model()
whole.load_state_dict(load_file(out / "model" / "model.safetensors"))
with torch.no_grad():
    apart = float((whole.eval()(held_out.x) - adapted(held_out.x)).abs().max())
print(f"whole model and base with adapter differ by at most {apart:.0e}")

# %% [markdown]
# ## The same from the command line
#
# ```
# glora aggregate clients/ann clients/bob -o merged --rank 6 --readout 2,6
# glora inspect merged --plot state.png
# glora update merged --add clients/cyd
# glora apply merged/r6 --base base -o model
# ```
#
# Coming from another tool? See [the same job there and here](../docs/coming_from.md). Bad clients,
# many modules, federated rounds: [all pages](../docs/README.md).

# %%
print(f"everything is in {out}")
