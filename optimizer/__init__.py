"""What reads, decides and drives: checkpoints, plan, capture, calibration, conversion, verification."""
