"""Tests of experiments/study."""
