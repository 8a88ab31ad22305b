"""Calibration: measure a model on sample inputs, and write the policy by which it then runs."""

from adaattn_compiler.calibrate.run import calibrate

__all__ = ["calibrate"]
