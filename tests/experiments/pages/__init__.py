"""Tests of experiments/pages/."""
