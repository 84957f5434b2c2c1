"""Writes docs/losses-table.md: one row for each loss, from the list below.

  python docs/generate_loss_table.py           writes the page
  python docs/generate_loss_table.py --check   fails if the page is not what would be written

An exported loss without a row, or a row without an exported loss, is an error.
"""

from __future__ import annotations

import pathlib
import sys
from typing import NamedTuple

from jaxsoft import losses

PAGE = pathlib.Path(__file__).with_name("losses-table.md")

# Exports of jaxsoft.losses that take a loss, and are none.
# Means, and the losses of routers, which have no labels and a page of their own (api/gating.md).
NOT_LOSSES = {"weighted_mean", "weighted_sum"}
NOT_LOSSES |= {"importance_loss", "load_balance_loss", "modality_routing_kl", "router_z_loss"}


class Loss(NamedTuple):
    """A row of the table.

    Attributes:
      name: the function's name in `jaxsoft.losses`.
      formula: of one row, in the notation that the page explains.
      statistics: the row reductions it is a function of (names of `jaxsoft.rows.reductions`).
      passes: how often it reads the logits for its value; two where a statistic needs another one first. The
        tests count it.
      streams: whether it takes `linear_logits`.
      reference: the paper.
    """

    name: str
    formula: str
    statistics: tuple[str, ...]
    passes: int
    streams: bool
    reference: str


LOSSES = (
    Loss(
        "cross_entropy",
        "l",
        ("label_statistics",),
        1,
        True,
        "Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models",
    ),
    Loss(
        "cross_entropy, label distributions",
        "-sum_c q_c log p_c",
        ("soft_label_statistics",),
        1,
        True,
        "",
    ),
    Loss(
        "cross_entropy, label_smoothing=a",
        "(1 - a) l + a mean_c(lse - x_c)",
        ("label_statistics", "sum"),
        1,
        True,
        "Szegedy et al., Rethinking the Inception Architecture",
    ),
    Loss(
        "cross_entropy, z_loss=k",
        "l + k lse^2",
        ("label_statistics",),
        1,
        True,
        "Chowdhery et al., PaLM",
    ),
    Loss(
        "poly_loss",
        "l + sum_j epsilon_j (1 - p_y)^j",
        ("label_statistics",),
        1,
        True,
        "Leng et al., PolyLoss",
    ),
    Loss(
        "poly1_cross_entropy",
        "l + epsilon (1 - p_y)",
        ("label_statistics",),
        1,
        True,
        "Leng et al., PolyLoss",
    ),
    Loss(
        "focal_loss",
        "(1 - p_y)^gamma l",
        ("label_statistics",),
        1,
        True,
        "Lin et al., Focal Loss for Dense Object Detection",
    ),
    Loss(
        "poly1_focal_loss",
        "(1 - p_y)^gamma l + epsilon (1 - p_y)^(gamma + 1)",
        ("label_statistics",),
        1,
        True,
        "Leng et al., PolyLoss",
    ),
    Loss(
        "dual_focal_loss",
        "(1 - p_y + p_j)^gamma l, with j the class of the largest p below p_y",
        ("label_statistics", "take", "maximum_below"),
        2,
        True,
        "Tao et al., Dual Focal Loss for Calibration",
    ),
    Loss(
        "max_suppression_loss",
        "l + suppression (max_c x_c - mean_c x_c)",
        ("label_statistics", "maximum", "mean"),
        1,
        True,
        "Zhou et al., MaxSup",
    ),
    Loss(
        "spherical_z_loss",
        "softplus(a (b - z)) / a, with z = (x_y - mean_c x_c) / std_c x_c",
        ("take", "moments"),
        1,
        True,
        "de Brebisson and Vincent, The Z-loss",
    ),
    Loss(
        "decoupled_softmax_loss",
        "mean over positives i of softplus(lse_N - x_i)",
        ("log_partition_excluding", "take"),
        1,
        True,
        "Gupta et al., Dual-Encoders for Extreme Multi-Label Classification",
    ),
    Loss(
        "decoupled_softmax_loss, boolean labels",
        "the same",
        ("weighted_log_partition", "mapped_sum"),
        2,
        True,
        "Gupta et al., Dual-Encoders for Extreme Multi-Label Classification",
    ),
)

HEAD = """\
<!-- Written by docs/generate_loss_table.py; do not edit. -->

# Table of losses

Each loss is a function of a few statistics of a row of logits, which are [row reductions](api/reductions.md).
In the formulas, `x` are the logits of the row, `y` its label, `lse` the log-sum-exp of `x` (`lse_N`: over the
classes that are not positive), `p = softmax(x)`, and `l = lse - x_y` the negative log-likelihood. Means run over
the classes that are not masked.

*Streams*: takes `linear_logits`, and never stores the logits. *Passes*: how often the logits are read, or
computed, for the value. The gradient reads them as often again; in `weighted_sum` and `weighted_mean` a chunk of
rows is computed once for all of it.

| loss | formula | statistics | streams | passes | reference |
| --- | --- | --- | --- | --- | --- |
"""


def check_complete() -> None:
    """Raises if the list and the exports of `jaxsoft.losses` differ."""
    listed = {loss.name.partition(",")[0] for loss in LOSSES}
    exported = set(losses.__all__) - NOT_LOSSES
    if listed != exported:
        raise SystemExit(
            f"docs/generate_loss_table.py: without a row: {sorted(exported - listed)}; "
            f"not exported: {sorted(listed - exported)}"
        )


def page() -> str:
    """The text of the page."""
    check_complete()
    rows = []
    for loss in LOSSES:
        name, _, variant = loss.name.partition(",")
        link = f"[`{name}`][jaxsoft.losses.{name}]" + (f", {variant.strip()}" if variant else "")
        statistics = ", ".join(f"`{s}`" for s in loss.statistics)
        streams = "yes" if loss.streams else "no"
        cells = link, f"`{loss.formula}`", statistics, streams, str(loss.passes), loss.reference
        rows.append(f"| {' | '.join(cells)} |\n")
    return HEAD + "".join(rows)


def main() -> None:
    """Writes the page, or with `--check` compares it."""
    text = page()
    if "--check" in sys.argv[1:]:
        if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
            raise SystemExit(f"{PAGE.name} is out of date: run python docs/generate_loss_table.py")
    else:
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
