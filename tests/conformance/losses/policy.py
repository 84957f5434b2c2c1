"""Losses of reinforcement learning: functions of log-probabilities, not of rows of logits."""

TESTED_IN = {
    "tests/losses/test_policy.py": (
        "jaxsoft.losses: cispo_loss clipped_policy_loss f_divergence f_dpg_loss f_dpg_reward "
        "group_relative_advantage length_weighted_mean"
    ),
}
