"""Tests of experiments/stats/."""
