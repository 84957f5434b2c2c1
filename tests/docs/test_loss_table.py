"""The table of losses of the documentation: what each loss reads, and its matrix products."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import pytest
from conformance.entry import make_inputs
from conformance.table import ENTRIES

import jaxsoft

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "docs"))

import generate
import loss_table


def runs(jaxpr):
    """How often a program runs the engine."""
    count = 0
    for equation in jaxpr.eqns:
        if equation.params.get("name") == "run":
            count += 1
            continue
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                count += runs(inner)
    return count


COUNTED = {e.export.rpartition(".")[2]: e for e in ENTRIES if e.loss and not e.variant}


@pytest.mark.parametrize("loss", COUNTED)
def test_the_table_of_losses_has_the_passes_of_each(loss):
    entry = COUNTED[loss]
    _, _, trace = next(loss_table.rows([loss]))
    if entry.dense_only:
        assert trace is None
        return
    given = make_inputs(0, (2,), 5)

    def call(hidden, weight):
        return entry.call(jaxsoft.linear_logits(hidden, weight), {k: given[k] for k in entry.inputs})

    jaxpr = jax.make_jaxpr(call)(jnp.ones((2, 3)), jnp.ones((3, 5))).jaxpr
    assert runs(jaxpr) == len(trace.passes) > 0


COSTS = {  # matrix products of the value, and those that the gradient adds
    "cross_entropy": ("1", "3"),
    "clip_loss": ("1", "3"),
    "dual_focal_loss": ("2", "6"),
    "weighted_mean": ("1", "2"),
    "weighted_sum": ("1", "2"),
    "distillation_loss": ("2", "4"),  # two heads, of which one gets a gradient
    "trades_loss": ("4", "12"),
    "sparsemax_loss": ("2 + s", "3"),
}


@pytest.mark.parametrize("loss", COSTS)
def test_the_table_of_losses_counts_matrix_products(loss):
    _, _, trace = next(loss_table.rows([loss]))
    assert (str(trace.value), str(trace.gradient)) == COSTS[loss]


def test_the_page_of_the_table_of_losses():
    """`make docs` makes it of all losses."""
    table = list(loss_table.rows(["clip_loss", "weighted_mean"]))
    page = generate.table_page(table)
    assert all(f"][jaxsoft.losses.{name}]" in page for name, _, _ in table)
    assert "## [" not in page and page.count("\n| ") > len(table)
