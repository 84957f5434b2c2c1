"""Objectives on embeddings, codes, activations and weights, not on rows of logits with labels."""

TESTED_IN = {
    "tests/losses/test_regularizers.py": (
        "jaxsoft.losses: domain_adversarial_loss domain_adversarial_schedule effective_entropy_loss "
        "forward_forward_loss generalized_gaussian_rate generalized_gaussian_shape gradient_reversal infomax_code_loss "
        "matrix_nuclear_norm norm_loss vq_commitment_loss"
    ),
}
