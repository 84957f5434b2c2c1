"""Losses of preference optimization: functions of log-probabilities, not of rows of logits."""

TESTED_IN = {
    "tests/losses/test_preference.py": (
        "jaxsoft.losses: cpo_loss direct_nash_loss dpo_loss extrapolate_log_probs extrapolate_policy f_dpo_loss "
        "kto_loss margin_matching_loss oreo_loss orpo_loss sequence_log_prob simpo_loss sparse_po_loss token_rewards "
        "xpo_loss"
    ),
}
