"""Tests that share compiled programs, or one run of an example, run in one process."""

import os

import pytest


@pytest.mark.xdist_group("a group")
def test_groups_are_kept(request):
    """pytest-xdist knows a group by the end of a test's name; without it the laws take far longer, and all pass."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        assert request.node.nodeid.endswith("@a group")
