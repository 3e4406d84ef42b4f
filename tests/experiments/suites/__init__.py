"""Tests of experiments/suites/."""
