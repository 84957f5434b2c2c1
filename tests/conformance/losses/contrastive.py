"""Contrastive losses between pairs."""

from conformance.entry import loss_entry
from jaxsoft import losses

ENTRIES = [loss_entry(losses.info_nce_loss)]

TESTED_IN = {
    "tests/losses/test_contrastive.py": (
        "jaxsoft.losses: clip_loss multi_similarity_loss siglip_loss supervised_contrastive_loss"
    ),
}
