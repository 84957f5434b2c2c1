"""Internals of the engine that the library's normalizers, attentions and losses use in addition to its public names.

Not for users: these names may change at any time.
"""
# ruff: noqa: F401 (imported here for others)

from jaxsoft.kernels.inner import compiled
from jaxsoft.rows._gauge import exponentials, keep_gauge, rescale, running_max
from jaxsoft.rows._layout import moved, on_mesh, placed
from jaxsoft.rows._logits import check_axis, row_scalar, rows_of
from jaxsoft.rows._masks import split_mask, unmasked
from jaxsoft.rows._reduction import block_sums, is_reduction, shares
from jaxsoft.rows._selection import Selection, just_below, nth
from jaxsoft.rows._shards import check_axis_name, joined, shard_count
from jaxsoft.rows._softmax import check_dense, softmax_with
from jaxsoft.rows._source import capped
from jaxsoft.rows._statistics import check_ids, check_range, log_partition
from jaxsoft.rows._two_way import reduce_two_ways
from jaxsoft.rows._weighted import check_loss, detached
