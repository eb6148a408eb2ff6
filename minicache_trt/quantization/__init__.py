"""Weights of an engine in another form than the checkpoint's: rounded codes, scaled by calibration, or cast floats."""
