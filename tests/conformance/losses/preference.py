"""Losses of preference optimization: functions of log-probabilities, not of rows of logits."""

TESTED_IN = {
    "tests/losses/test_preference.py": (
        "jaxsoft.losses: direct_nash_loss dpo_loss extrapolate_log_probs extrapolate_policy f_dpo_loss "
        "margin_matching_loss oreo_loss sequence_log_prob simpo_loss sparse_po_loss token_rewards xpo_loss"
    ),
}
