"""Tests that share compiled programs run in one process."""

import os


def test_groups_are_kept(request):
    """pytest-xdist knows a group by the end of a test's name; without it the tests take far longer, and all pass."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        assert request.node.nodeid.endswith("@tests/conformance/test_groups.py")
