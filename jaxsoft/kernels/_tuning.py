"""Sizes of blocks that were measured, by kind of device."""


def is_measured(device_kind: str) -> bool:
    return False
