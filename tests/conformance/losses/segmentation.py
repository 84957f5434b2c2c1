"""Overlap losses of segmentation: functions of all pixels together."""

TESTED_IN = {
    "tests/losses/test_segmentation.py": (
        "jaxsoft.losses: dice_semimetric_loss jaccard_metric_loss tversky_loss"
    ),
}
