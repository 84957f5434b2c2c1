"""Losses of reinforcement learning: functions of log-probabilities, not of rows of logits."""

TESTED_IN = {
    "tests/losses/test_policy.py": (
        "jaxsoft.losses: cispo_loss clipped_policy_loss f_divergence f_dpg_loss f_dpg_reward fuzzy_reward "
        "group_relative_advantage kl_coefficient_loss length_weighted_mean sampled_kl"
    ),
}
