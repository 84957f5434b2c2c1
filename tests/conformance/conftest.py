"""The laws run entry by entry, those of one entry in one process, so that they share its compiled programs."""

import pytest


def pytest_collection_modifyitems(items):
    """Sorts the laws by entry, and marks them for pytest's `--dist loadgroup`."""
    laws = [
        i for i, item in enumerate(items) if "entry" in getattr(getattr(item, "callspec", None), "params", {})
    ]
    order = {}
    for i in laws:
        entry = items[i].callspec.params["entry"]
        items[i].add_marker(pytest.mark.xdist_group(entry.id))
        order.setdefault(entry.id, len(order))
    ordered = sorted((items[i] for i in laws), key=lambda item: order[item.callspec.params["entry"].id])
    for i, item in zip(laws, ordered):
        items[i] = item
