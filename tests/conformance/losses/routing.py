"""Losses of routers, not functions of one row."""

TESTED_IN = {
    "tests/losses/test_routing.py": (
        "jaxsoft.losses: importance_loss load_balance_loss modality_routing_kl router_z_loss"
    ),
}
