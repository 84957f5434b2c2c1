"""Losses over alignments and ordered classes, not functions of one row."""

TESTED_IN = {
    "tests/losses/test_structured.py": (
        "jaxsoft.losses: hmm_log_likelihood proportional_odds_loss proportional_odds_penalty transducer_lattice_loss "
        "transducer_loss"
    ),
}
